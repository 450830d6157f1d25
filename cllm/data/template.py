"""Conversation -> Segments: one `Template` value per chat format, and the one function that renders
them all.

A template is data: the markup round each role's words. It knows no token ids; the tokenizer turns
markup into special tokens and everything else into plain text. Sources: the chat code published
with each checkpoint; where LLaMA-Factory's template differs from the model's own, the model is
right.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from cllm.data.schema import Conversation, Message
from cllm.messages import load_toml

Chat: TypeAlias = "Conversation | Iterable[Message | Mapping[str, str]]"


class Segment(NamedTuple):
    """A stretch of the rendered text. Only `markup` may become special tokens; an empty segment
    keeps its neighbours from being encoded as one string. `target` is the label's token where it
    differs from the input's (Baichuan2: input user, label eos).
    """

    text: str
    supervised: bool
    markup: bool
    target: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Markup of one chat format. Pairs stand before and after a message's words."""

    name: str
    user: tuple[str, str]
    # Opens the assistant's turn; generation starts after it.
    assistant: str
    # Ends the assistant's turn, always trained: one special token (Llama 2: with the blank before
    # it).
    end: str
    # Follows the end token; never trained.
    after: str = ""
    # Opens the conversation: beginning-of-sequence tokens.
    prefix: str = ""
    # None: the format has no system turn, and its authors' code drops the message.
    system: tuple[str, str] | None = None
    # The system text stands inside the first user turn.
    merge_system: bool = False
    default_system: str | None = None
    # A system message without words still makes a turn.
    empty_system: bool = True
    # A tool's result (None: as a user turn), and what stands round neighbouring results.
    tool: tuple[str, str] | None = None
    tool_group: tuple[str, str] = ("", "")
    # How tools are announced and called: a key of assets/tools.toml or internlm2; react where the
    # model has no format of its own.
    tools: str = "react"
    # First thing generated in an assistant's turn, before its words.
    lead: str = ""
    # Markup and words are encoded separately, as the model's own code does.
    apart: bool = False
    # The end token closes the conversation only; in between the next role's token ends a turn.
    final_end: bool = False
    # The label of that role token: None: not trained; "": itself; else this token.
    handover: str | None = None
    # Only the last answer is trained, as the authors do: earlier ones have no end in this format.
    last_only: bool = False
    # Message texts are stripped.
    trim: bool = False
    # "off" or "keep" for formats with <think> blocks: leave the reasoning out, or train it.
    thinking: str = ""
    # With "keep", generation starts inside an opened block, and each answer after the last user
    # message has one.
    think_opened: bool = False
    # Further tokens at which generation stops.
    stop: tuple[str, ...] = ()
    # The tokenizer's own chat_template, which it renders instead of all of the above.
    jinja: str = ""

    @property
    def opening(self) -> str:
        """What generation starts after: the opening of the assistant's turn, and of its <think>
        block where the format has one.
        """
        block = {"off": "<think>\n\n</think>\n\n", "keep": "<think>\n" if self.think_opened else ""}
        return self.assistant + block.get(self.thinking, "")


# fmt: off
_HELPFUL = "You are a helpful assistant."
_INTERNLM2_SYSTEM = """You are an AI assistant whose name is InternLM (书生·浦语).
- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). It is \
designed to be helpful, honest, and harmless.
- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文."""
_CHATML: dict[str, Any] = {
    "user": ("<|im_start|>user\n", "<|im_end|>\n"), "assistant": "<|im_start|>assistant\n", "end": "<|im_end|>", "after": "\n",
    "system": ("<|im_start|>system\n", "<|im_end|>\n"),
}
_QWEN = _CHATML | {
    "tools": "qwen", "tool": ("\n<tool_response>\n", "\n</tool_response>"), "tool_group": ("<|im_start|>user", "<|im_end|>\n"),
}
_INTERNLM2 = _CHATML | {
    "prefix": "<s>", "tools": "internlm2", "empty_system": False, "tool": ("<|im_start|>environment name=<|plugin|>\n", "<|im_end|>\n"),
}
_GLM: dict[str, Any] = {
    "user": ("<|user|>\n", ""), "assistant": "<|assistant|>", "system": ("<|system|>\n", ""), "tool": ("<|observation|>\n", ""),
    "lead": "\n", "apart": True, "final_end": True, "stop": ("<|user|>", "<|observation|>"),
}
_BAICHUAN: dict[str, Any] = {"end": "</s>", "system": ("", ""), "apart": True, "final_end": True, "handover": "</s>"}
_PLAIN: dict[str, Any] = {
    "user": ("Human: ", "</s>\n"), "assistant": "Assistant:", "end": "</s>", "after": "\n", "system": ("System: ", "</s>\n"),
}
_FORMATS: dict[str, dict[str, Any]] = {
    "chatml": _QWEN,
    "qwen1": _CHATML | {"default_system": _HELPFUL, "apart": True},
    "qwen2": _QWEN | {"default_system": _HELPFUL},
    "qwen": _QWEN | {"default_system": f"You are Qwen, created by Alibaba Cloud. {_HELPFUL}"},
    "qwen3": _QWEN | {"thinking": "off"},
    "qwen3.5": _QWEN | {"thinking": "off", "think_opened": True, "trim": True, "tools": "qwen3.5"},
    "yi": _CHATML,
    "internlm2": _INTERNLM2,
    "intern2": _INTERNLM2 | {"default_system": _INTERNLM2_SYSTEM},
    "internlm": {  # the tokenizer's automatic <s> and the prompt's own
        "prefix": "<s><s>", "user": ("<|User|>:", "<eoh>\n"), "assistant": "<|Bot|>:", "end": "<eoa>", "after": "\n",
    },
    "chatglm2": {
        "prefix": "[gMASK]sop", "user": ("[Round {round}]\n\n问：", "\n\n答："), "assistant": "", "end": "</s>", "after": "\n\n",
        "final_end": True, "last_only": True,
    },
    "chatglm3": _GLM | {"prefix": "[gMASK]sop", "end": "</s>", "tools": "chatglm3", "handover": ""},
    "glm4": _GLM | {"prefix": "[gMASK]<sop>", "end": "<|endoftext|>", "tools": "glm4", "handover": "<|endoftext|>"},
    "baichuan": _BAICHUAN | {"user": ("<reserved_102>", ""), "assistant": "<reserved_103>"},
    "baichuan2": _BAICHUAN | {"user": ("<reserved_106>", ""), "assistant": "<reserved_107>"},
    "llama2": {
        "user": ("<s>[INST] ", " [/INST]"), "assistant": "", "end": " </s>", "system": ("<<SYS>>\n", "\n<</SYS>>\n\n"),
        "merge_system": True, "trim": True,
    },
    "llama3": {
        "prefix": "<|begin_of_text|>", "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n", "end": "<|eot_id|>",
        **{role: (f"<|start_header_id|>{name}<|end_header_id|>\n\n", "<|eot_id|>")
           for role, name in (("user", "user"), ("system", "system"), ("tool", "ipython"))},
        "tools": "llama3", "trim": True, "stop": ("<|eom_id|>",),
    },
    "gemma": {
        "prefix": "<bos>", "user": ("<start_of_turn>user\n", "<end_of_turn>\n"), "assistant": "<start_of_turn>model\n",
        "end": "<end_of_turn>", "after": "\n", "system": ("", "\n\n"), "merge_system": True,
        "tool": ("<start_of_turn>tool\n", "<end_of_turn>\n"), "trim": True,
    },
    "alpaca": {
        "user": ("### Instruction:\n", "\n\n"), "assistant": "### Response:\n", "end": "</s>", "after": "\n\n", "system": ("", "\n\n"),
        "default_system": "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    },
    "plain": _PLAIN,
    "default": _PLAIN,  # LLaMA-Factory's name for it
    "text": {"user": ("", ""), "assistant": "", "end": "</s>"},
}
# fmt: on
TEMPLATES = {name: Template(name=name, **parts) for name, parts in _FORMATS.items()}


def messages_of(conversation: Chat) -> list[Message]:
    """The conversation's messages; those of an API request may be {"role": …, "content": …}."""
    return [m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in conversation]


def render(conversation: Chat, template: Template, *, open_turn: bool = False) -> list[Segment]:
    """The conversation in the template's format; joining the texts gives what the model reads.

    Training: the assistant's words and the end token are supervised. open_turn: nothing is, and the
    text ends with the opening of the assistant's turn, which is what generation starts from.
    """
    tools = _tools(getattr(conversation, "tools", ""))
    messages = messages_of(conversation)
    if template.trim:
        messages = [Message(m.role, m.content.strip()) for m in messages]
    system = (
        messages.pop(0).content
        if messages and messages[0].role == "system"
        else template.default_system
    )
    opening = _system(system, tools, template)
    segments = [*_markup(template.prefix), *([] if template.merge_system else opening)]
    opening = opening if template.merge_system else []
    # roles[i] stands before message i, roles[i + 2] after it
    roles = ["", *(m.role for m in messages), ""]
    for i, (role, content) in enumerate(messages):
        if role == "assistant":
            last = i == len(messages) - 1
            called = bool(tools) or roles[i + 2] == "tool"
            trained = not template.last_only or (last and not open_turn)
            current = "user" not in roles[i + 2 :]
            segments += _answer(
                content, template, supervised=trained, last=last, current=current, called=called
            )
            continue
        before, after = _around(role, template, turn=roles[: i + 2].count("user"))
        if role == "tool" and template.tool:
            before = before if roles[i] == "tool" else template.tool_group[0] + before
            after = after if roles[i + 2] == "tool" else after + template.tool_group[1]
        if template.handover is not None and (roles[i] == "assistant" or not segments):
            token = before[: before.index(">") + 1]
            segments.append(Segment(token, True, True, template.handover or None))
            before = before.removeprefix(token)
        segments += [*_markup(before), *opening, *_words(content, template), *_markup(after)]
        opening = []
    if open_turn:
        segments = [
            Segment(s.text, False, s.markup) for s in (*segments, *_markup(template.opening))
        ]
    return segments


@functools.cache
def _markup(text: str, supervised: bool = False) -> tuple[Segment, ...]:
    return (Segment(text, supervised, True),) if text else ()


def _around(role: str, template: Template, turn: int) -> tuple[str, str]:
    """The markup before and after a message that is not the assistant's."""
    if role == "tool" and template.tool:
        return template.tool
    # a later one is a turn of its own
    if role == "system" and template.system and not template.merge_system:
        return template.system
    return template.user[0].replace("{round}", str(turn)), template.user[1]


def _words(text: str, template: Template) -> list[Segment]:
    edge = [Segment("", False, True)] if template.apart else []
    return [*edge, Segment(text, False, False), *edge] if text else edge


def _system(text: str | None, tools: list[dict[str, Any]], template: Template) -> list[Segment]:
    """The system turn with the tools in it (InternLM2: in a turn of their own), or nothing."""
    if template.system is None or not (text or tools or (text == "" and template.empty_system)):
        return []
    before, after = template.system
    words = _words(text or "", template)
    if not tools:
        return [*_markup(before), *words, *_markup(after)]
    if template.tools == "internlm2":
        turn = [*_markup(before), *words, *_markup(after)] if text else []
        return [
            *turn,
            *_markup(before.replace("\n", " name=<|plugin|>\n")),
            Segment(_json(tools, 4), False, False),
            *_markup(after),
        ]
    head, body, tail = _announce(template.tools, tools, bool(text))
    announced = [*_markup(head), Segment(body, False, False), *_markup(tail)]
    return [
        *_markup(before),
        *(announced + words if template.tools == "qwen3.5" else words + announced),
        *_markup(after),
    ]


def _answer(
    content: str, template: Template, *, supervised: bool, last: bool, current: bool, called: bool
) -> list[Segment]:
    """One assistant turn; `current`: after the last user message, where thinking formats show the
    reasoning.
    """
    reasoning = ""
    if template.thinking and "</think>" in content:
        reasoning = (
            content.split("</think>")[0]
            .rstrip("\n")
            .split("<think>")[-1]
            .strip(None if template.trim else "\n")
        )
        content = content.split("</think>")[-1].lstrip("\n")
        if template.thinking == "off":
            reasoning = ""
        elif not current:
            # without the reasoning that led to it, the answer would teach to skip it
            supervised = False
    segments = [*_markup(template.assistant)]
    if template.thinking and current and (last or reasoning or template.think_opened):
        keep = (
            supervised
            and template.thinking == "keep"
            and bool(reasoning or not template.think_opened)
        )
        segments += _markup("<think>\n", keep and not template.think_opened)
        segments += [
            *([Segment(reasoning, keep, False)] if reasoning else []),
            *_markup("\n</think>\n\n", keep),
        ]
    segments += [
        Segment(text, supervised, markup)
        for text, markup in _spoken(content, template, _calls(content) if called else [])
    ]
    if last or not template.final_end:
        segments += _markup(template.end, supervised)
    if not (last and template.final_end):
        segments += _markup(template.after)
    return segments


# --- Tools: announced in the system turn, called by the assistant in JSON ({"name": …, "arguments":
# {…}}, one or a list).
@functools.cache
def _announcement(style: str) -> tuple[str, str]:
    """The texts before and behind the tools, from assets/tools.toml."""
    texts = load_toml(Path(__file__).parents[1] / "assets" / "tools.toml")[style.replace(".", "_")]
    return texts["before"], texts["after"]


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _tools(text: str) -> list[dict[str, Any]]:
    """The functions of a `tools` JSON text, without OpenAI's {"type": "function", …} wrapper; [] if
    it is none.
    """
    try:
        given = json.loads(text) if text else []
    except ValueError:
        return []
    tools = [
        tool.get("function", tool)
        for tool in (given if isinstance(given, list) else [given])
        if isinstance(tool, dict)
    ]
    return [tool for tool in tools if isinstance(tool, dict) and "name" in tool]


def _announce(style: str, tools: list[dict[str, Any]], with_text: bool) -> tuple[str, str, str]:
    """What tells the model of its tools: markup, the tools, markup."""
    wrapped = [{"type": "function", "function": tool} for tool in tools]
    head, tail = _announcement(style)
    gap = "\n\n" if with_text else ""
    if style == "qwen":
        return gap + head, "".join("\n" + _json(tool) for tool in wrapped), tail
    if style == "qwen3.5":
        return head, "".join("\n" + _json(tool) for tool in wrapped), tail + gap
    if style == "glm4":
        return (
            head,
            "".join(f"\n\n## {tool['name']}\n\n{_json(tool, 4)}{tail}" for tool in tools),
            "",
        )
    if style == "chatglm3":
        return "" if with_text else head, "\n" + _json(tools, 4), ""
    if style == "llama3":
        return head, "".join(_json(tool, 4) + "\n\n" for tool in wrapped), ""
    return (
        head,
        "".join(map(_react_tool, tools)) + tail % ", ".join(tool["name"] for tool in tools),
        "",
    )


def _react_tool(tool: dict[str, Any]) -> str:
    schema = tool.get("parameters") or {}
    lines = [
        f"> Tool Name: {tool['name']}",
        f"Tool Description: {tool.get('description', '')}",
        "Tool Args:",
    ]
    for name, value in (schema.get("properties") or {}).items():
        required = ", required" if name in (schema.get("required") or []) else ""
        choices = (
            f", should be one of [{', '.join(map(str, value['enum']))}]"
            if value.get("enum")
            else ""
        )
        items = (
            f", where each item should be {value['items'].get('type', '')}"
            if value.get("items")
            else ""
        )
        lines.append(
            f"  - {name} ({value.get('type', '')}{required}): {value.get('description', '')}{choices}{items}"
        )
    return "\n".join(lines) + "\n\n"


def _calls(content: str) -> list[tuple[str, Any]]:
    """(name, arguments) of each call if the content is function calls in JSON, else []."""
    try:
        value = json.loads(content)
    except ValueError:
        return []
    calls = value if isinstance(value, list) else [value]
    if not all(
        isinstance(call, dict) and "name" in call and ("arguments" in call or "parameters" in call)
        for call in calls
    ):
        return []
    return [
        (call["name"], call["arguments"] if "arguments" in call else call["parameters"])
        for call in calls
    ]


def _spoken(
    content: str, template: Template, calls: list[tuple[str, Any]]
) -> list[tuple[str, bool]]:
    """(text, markup) parts of an assistant's words or calls; an empty part is an edge between
    strings.
    """
    edge = [] if template.last_only else [("", True)]
    opening = [(template.lead, True)] * bool(template.lead) + edge
    if not calls:
        return [*opening, (content, False)] if content else opening
    if template.tools in ("glm4", "chatglm3"):  # the tool's name stands behind the role
        turns = [
            [(f"{name}\n", False), *edge, (_arguments(template.tools, values), False)]
            for name, values in calls
        ]
        return [
            part
            for i, turn in enumerate(turns)
            for part in [(template.assistant, True)] * bool(i) + turn
        ]
    if template.tools in ("qwen", "qwen3.5"):
        bodies = [
            _xml_call(n, v) if template.tools == "qwen3.5" else _json({"name": n, "arguments": v})
            for n, v in calls
        ]
        call = [
            [("\n" * bool(i) + "<tool_call>\n", True), (body, False), ("\n</tool_call>", True)]
            for i, body in enumerate(bodies)
        ]
        return opening + [part for parts in call for part in parts]
    objects = [{"name": name, "parameters": values} for name, values in calls]
    if template.tools == "internlm2":
        return [
            *opening,
            ("<|action_start|><|plugin|>\n", True),
            ("\n".join(map(_json, objects)), False),
            ("<|action_end|>", True),
        ]
    if template.tools == "llama3":
        return [*opening, (_json(objects[0] if len(objects) == 1 else objects), False)]
    return [
        *opening,
        (
            "\n".join(f"Action: {name}\nAction Input: {_json(values)}" for name, values in calls),
            False,
        ),
    ]


def _arguments(style: str, values: Any) -> str:
    if style == "glm4" or not isinstance(values, dict):
        return _json(values)
    return (
        "```python\ntool_call("
        + ", ".join(f"{key}={value!r}" for key, value in values.items())
        + ")\n```"
    )


def _xml_call(name: str, values: Any) -> str:
    """Qwen3.5's call: each argument on lines of its own, lists and objects as JSON."""
    given = values.items() if isinstance(values, dict) else ()
    pairs = (
        (key, _json(value) if isinstance(value, list | dict) else str(value))
        for key, value in given
    )
    return (
        f"<function={name}>\n"
        + "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in pairs)
        + "</function>"
    )
