"""Conversation -> Segments: one `Template` value per chat format, and the one function that renders them all.

A template is data: the markup round each role's words. It knows no token ids; the tokenizer turns markup into special tokens and
everything else into plain text. Sources: the chat code published with each checkpoint; where LLaMA-Factory's template differs
from the model's own, the model is right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cllm.data.schema import Conversation, Message


class Segment(NamedTuple):
    """A stretch of the rendered text. Only `markup` may become special tokens; an empty segment keeps its neighbours from being
    encoded as one string. `target` is the label's token where it differs from the input's (Baichuan2: input user, label eos)."""

    text: str
    supervised: bool
    markup: bool
    target: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Markup of one chat format. Pairs stand before and after a message's words."""

    name: str
    user: tuple[str, str]
    assistant: str
    """Opens the assistant's turn; generation starts after it."""
    end: str
    """Ends the assistant's turn, always trained: one special token (Llama 2: with the blank before it)."""
    after: str = ""
    """Follows the end token; never trained."""
    prefix: str = ""
    """Opens the conversation: beginning-of-sequence tokens."""
    system: tuple[str, str] | None = None
    """None: the format has no system turn, and its authors' code drops the message."""
    merge_system: bool = False
    """The system text stands inside the first user turn."""
    default_system: str | None = None
    empty_system: bool = True
    """A system message without words still makes a turn."""
    tool: tuple[str, str] | None = None
    """A tool's result; None: as a user turn."""
    tool_group: tuple[str, str] = ("", "")
    """Round neighbouring tool results."""
    tools: str = "react"
    """How tools are announced and called: qwen, qwen3.5, glm4, chatglm3, llama3, internlm2, or react (no format of its own)."""
    lead: str = ""
    """First thing generated in an assistant's turn, before its words."""
    apart: bool = False
    """Markup and words are encoded separately, as the model's own code does."""
    final_end: bool = False
    """The end token closes the conversation only; in between the next role's token ends a turn, labelled with `handover`."""
    handover: str | None = None
    """None: the next role's token is not trained; "": its own id is the label; else this token is."""
    last_only: bool = False
    """Only the last answer is trained, as the authors do: earlier ones have no end token in this format."""
    trim: bool = False
    """Message texts are stripped."""
    thinking: str = ""
    """"off" or "keep" for formats with <think> blocks: leave the reasoning out, or train it."""
    think_opened: bool = False
    """With "keep", generation starts inside an opened <think> block, and each answer after the last user message has one."""
    stop: tuple[str, ...] = ()
    """Further tokens at which generation stops."""
    jinja: str = ""
    """The tokenizer's own chat_template, used instead of all of the above by the tokenizer."""


def _chatml(name: str, **more: Any) -> Template:
    user, end = ("<|im_start|>user\n", "<|im_end|>\n"), "<|im_end|>"
    more = {"system": ("<|im_start|>system\n", "<|im_end|>\n"), "after": "\n"} | more
    return Template(name=name, user=user, assistant="<|im_start|>assistant\n", end=end, **more)


_QWEN: dict[str, Any] = {
    "tools": "qwen",
    "tool": ("\n<tool_response>\n", "\n</tool_response>"),
    "tool_group": ("<|im_start|>user", "<|im_end|>\n"),
}
_INTERNLM2: dict[str, Any] = {
    "prefix": "<s>",
    "tools": "internlm2",
    "tool": ("<|im_start|>environment name=<|plugin|>\n", "<|im_end|>\n"),
    "empty_system": False,
}
_INTERNLM2_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文."
)
_HELPFUL = "You are a helpful assistant."
_GLM: dict[str, Any] = {
    "user": ("<|user|>\n", ""),
    "assistant": "<|assistant|>",
    "system": ("<|system|>\n", ""),
    "tool": ("<|observation|>\n", ""),
    "lead": "\n",
    "apart": True,
    "final_end": True,
    "stop": ("<|user|>", "<|observation|>"),
}
_BAICHUAN: dict[str, Any] = {"end": "</s>", "system": ("", ""), "apart": True, "final_end": True, "handover": "</s>"}
_PLAIN: dict[str, Any] = {
    "user": ("Human: ", "</s>\n"),
    "assistant": "Assistant:",
    "end": "</s>",
    "after": "\n",
    "system": ("System: ", "</s>\n"),
}

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _chatml("chatml", **_QWEN),
        _chatml("qwen1", default_system=_HELPFUL, apart=True),
        _chatml("qwen2", default_system=_HELPFUL, **_QWEN),
        _chatml("qwen", default_system=f"You are Qwen, created by Alibaba Cloud. {_HELPFUL}", **_QWEN),
        _chatml("qwen3", thinking="off", **_QWEN),
        _chatml("qwen3.5", thinking="off", think_opened=True, trim=True, **_QWEN | {"tools": "qwen3.5"}),
        _chatml("yi"),
        _chatml("internlm2", **_INTERNLM2),
        _chatml("intern2", default_system=_INTERNLM2_SYSTEM, **_INTERNLM2),
        Template(
            name="internlm",
            prefix="<s><s>",  # the tokenizer's automatic one and the prompt's own
            user=("<|User|>:", "<eoh>\n"),
            assistant="<|Bot|>:",
            end="<eoa>",
            after="\n",
        ),
        Template(
            name="chatglm2",
            prefix="[gMASK]sop",
            user=("[Round {round}]\n\n问：", "\n\n答："),
            assistant="",
            end="</s>",
            after="\n\n",
            final_end=True,
            last_only=True,
        ),
        Template(name="chatglm3", prefix="[gMASK]sop", end="</s>", tools="chatglm3", handover="", **_GLM),
        Template(name="glm4", prefix="[gMASK]<sop>", end="<|endoftext|>", tools="glm4", handover="<|endoftext|>", **_GLM),
        Template(name="baichuan", user=("<reserved_102>", ""), assistant="<reserved_103>", **_BAICHUAN),
        Template(name="baichuan2", user=("<reserved_106>", ""), assistant="<reserved_107>", **_BAICHUAN),
        Template(
            name="llama2",
            user=("<s>[INST] ", " [/INST]"),
            assistant="",
            end=" </s>",
            system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
            merge_system=True,
            trim=True,
        ),
        Template(
            name="llama3",
            prefix="<|begin_of_text|>",
            user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
            end="<|eot_id|>",
            system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
            tool=("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>"),
            tools="llama3",
            trim=True,
            stop=("<|eom_id|>",),
        ),
        Template(
            name="gemma",
            prefix="<bos>",
            user=("<start_of_turn>user\n", "<end_of_turn>\n"),
            assistant="<start_of_turn>model\n",
            end="<end_of_turn>",
            after="\n",
            system=("", "\n\n"),
            merge_system=True,
            tool=("<start_of_turn>tool\n", "<end_of_turn>\n"),
            trim=True,
        ),
        Template(
            name="alpaca",
            user=("### Instruction:\n", "\n\n"),
            assistant="### Response:\n",
            end="</s>",
            after="\n\n",
            system=("", "\n\n"),
            default_system="Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        ),
        Template(name="plain", **_PLAIN),
        Template(name="default", **_PLAIN),  # LLaMA-Factory's name for it
        Template(name="text", user=("", ""), assistant="", end="</s>"),
    )
}


def render(
    conversation: Conversation | Iterable[Message | Mapping[str, str]], template: Template, *, open_turn: bool = False
) -> list[Segment]:
    """The conversation in the template's format; joining the texts gives what the model reads.

    Training: the assistant's words and the end token are supervised. open_turn: nothing is, and the text ends with the opening of
    the assistant's turn, which is what generation starts from.
    """
    tools = _tools(getattr(conversation, "tools", ""))
    messages = [m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in conversation]
    if template.trim:
        messages = [Message(m.role, m.content.strip()) for m in messages]
    segments = _markup(template.prefix)
    system = messages.pop(0).content if messages and messages[0].role == "system" else template.default_system
    opening = _system(system, tools, template)
    if not template.merge_system:
        segments += opening
        opening = []
    roles = ["", *(m.role for m in messages), ""]  # roles[i] stands before message i, roles[i + 2] after it
    query = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    for i, (role, content) in enumerate(messages):
        if role == "assistant":
            called = bool(tools) or roles[i + 2] == "tool"
            final = i == len(messages) - 1 and not open_turn
            segments += _answer(content, template, last=i == len(messages) - 1, final=final, current=i > query, called=called)
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
        segments += _markup(template.assistant)
        if template.thinking == "off":
            segments += _markup("<think>\n\n</think>\n\n")
        elif template.think_opened:
            segments += _markup("<think>\n")
        segments = [Segment(s.text, False, s.markup) for s in segments]
    return segments


def _markup(text: str, supervised: bool = False) -> list[Segment]:
    return [Segment(text, supervised, True)] if text else []


def _around(role: str, template: Template, turn: int) -> tuple[str, str]:
    """The markup before and after a message that is not the assistant's."""
    if role == "tool" and template.tool:
        return template.tool
    if role == "system" and template.system and not template.merge_system:  # a later one is a turn of its own
        return template.system
    return template.user[0].replace("{round}", str(turn)), template.user[1]


def _words(text: str, template: Template) -> list[Segment]:
    edge = [Segment("", False, True)] if template.apart else []
    return [*edge, Segment(text, False, False), *edge] if text else edge


def _answer(content: str, template: Template, *, last: bool, final: bool, current: bool, called: bool) -> list[Segment]:
    """One assistant turn; `current`: after the last user message, where thinking formats show the reasoning."""
    supervised = final or not template.last_only
    reasoning = ""
    if template.thinking and "</think>" in content:
        reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip(None if template.trim else "\n")
        content = content.split("</think>")[-1].lstrip("\n")
        if template.thinking == "off":
            reasoning = ""
        elif not current:
            supervised = False  # without the reasoning that led to it, the answer would teach to skip it
    segments = _markup(template.assistant)
    if template.thinking and current and (last or reasoning or template.think_opened):
        keep = supervised and template.thinking == "keep" and bool(reasoning or not template.think_opened)
        segments += _markup("<think>\n", keep and not template.think_opened)
        segments += [*([Segment(reasoning, keep, False)] if reasoning else []), *_markup("\n</think>\n\n", keep)]
    calls = _calls(content) if called else []
    cut = [] if template.last_only else [Segment("", supervised, True)]
    if calls and template.tools in ("glm4", "chatglm3"):
        for number, call in enumerate(calls):
            name, arguments = _glm_call(template.tools, call)
            segments += _markup(template.assistant if number else "", supervised)
            segments += [Segment(f"{name}\n", supervised, False), *cut, Segment(arguments, supervised, False)]
    else:
        segments += [*_markup(template.lead, supervised), *cut]
        segments += [Segment(t, supervised, markup) for t, markup in _call_text(template.tools, calls) or [(content, False)] if t]
    if last or not template.final_end:
        segments += _markup(template.end, supervised)
    return segments if last and template.final_end else segments + _markup(template.after)


# --- Tools: announced in the system turn, called by the assistant in JSON ({"name": …, "arguments": {…}}, one or a list).


def _tools(text: str) -> list[dict[str, Any]]:
    """The functions of a `tools` JSON text, without OpenAI's {"type": "function", …} wrapper; [] if it is none."""
    try:
        tools = json.loads(text) if text else []
    except ValueError:
        return []
    tools = [tool.get("function", tool) for tool in (tools if isinstance(tools, list) else [tools]) if isinstance(tool, dict)]
    return [tool for tool in tools if isinstance(tool, dict) and "name" in tool]


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _system(text: str | None, tools: list[dict[str, Any]], template: Template) -> list[Segment]:
    """The system turn with the tools in it (InternLM2: in a turn of their own), or nothing."""
    if template.system is None or not (text or tools or (text == "" and template.empty_system)):
        return []
    before, after = template.system
    separate = bool(tools) and template.tools == "internlm2"
    parts = [] if separate or not tools else _announce(template.tools, tools, bool(text))
    announced, words = [Segment(t, False, markup) for t, markup in parts if t], _words(text or "", template)
    turn = [*_markup(before), *(announced + words if template.tools == "qwen3.5" else words + announced), *_markup(after)]
    if separate:
        opening = _markup(before.replace("\n", " name=<|plugin|>\n"))
        turn = [*(turn if text else []), *opening, Segment(_json(tools, 4), False, False), *_markup(after)]
    return turn


_QWEN35_CALLS = (
    "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n</parameter>\n"
    "</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified format: "
    "an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n- You may provide optional reasoning for your function call in natural language "
    "BEFORE the function call, but NOT after\n- If there is no function call available, answer the question like normal with your "
    "current knowledge and do not tell the user about function calls\n</IMPORTANT>"
)


def _announce(style: str, tools: list[dict[str, Any]], with_text: bool) -> list[tuple[str, bool]]:
    """(text, markup) parts that tell the model of its tools."""
    if style == "qwen":
        return [
            ("\n\n" if with_text else "", True),
            ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\n", True),
            ("You are provided with function signatures within <tools></tools> XML tags:\n<tools>", True),
            ("".join("\n" + _json({"type": "function", "function": tool}) for tool in tools), False),
            ("\n</tools>\n\nFor each function call, return a json object with function name and arguments ", True),
            ("within <tool_call></tool_call> XML tags:\n<tool_call>\n", True),
            ('{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>', True),
        ]
    if style == "qwen3.5":
        return [
            ("# Tools\n\nYou have access to the following functions:\n\n<tools>", True),
            ("".join("\n" + _json({"type": "function", "function": tool}) for tool in tools), False),
            (_QWEN35_CALLS + ("\n\n" if with_text else ""), True),
        ]
    if style == "glm4":
        head = (
            "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
            "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
        )
        tail = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
        return [(head + "".join(f"\n\n## {tool['name']}\n\n{_json(tool, 4)}{tail}" for tool in tools), False)]
    if style == "chatglm3":
        head = "" if with_text else "Answer the following questions as best as you can. You have access to the following tools:"
        return [(f"{head}\n{_json(tools, 4)}", False)]
    if style == "llama3":
        head = (
            "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
            "You have access to the following functions. To call a function, please respond with JSON for a function call. "
            'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
            "Do not use variables.\n\n"
        )
        return [(head + "".join(_json({"type": "function", "function": tool}, 4) + "\n\n" for tool in tools), False)]
    names = ", ".join(tool["name"] for tool in tools)
    text = "You have access to the following tools:\n" + "".join(_react_tool(tool) for tool in tools)
    text += f"Use the following format if using a tool:\n```\nAction: tool name (one of [{names}])\n"
    text += "Action Input: the input to the tool, in a JSON format representing the kwargs "
    return [(text + '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n', False)]


def _react_tool(tool: dict[str, Any]) -> str:
    schema = tool.get("parameters") or {}
    lines = [f"> Tool Name: {tool['name']}", f"Tool Description: {tool.get('description', '')}", "Tool Args:"]
    for name, value in (schema.get("properties") or {}).items():
        required = ", required" if name in (schema.get("required") or []) else ""
        choices = f", should be one of [{', '.join(map(str, value['enum']))}]" if value.get("enum") else ""
        items = f", where each item should be {value['items'].get('type', '')}" if value.get("items") else ""
        lines.append(f"  - {name} ({value.get('type', '')}{required}): {value.get('description', '')}{choices}{items}")
    return "\n".join(lines) + "\n\n"


def _calls(content: str) -> list[tuple[str, Any]]:
    """(name, arguments) of each call if the content is a function call in JSON, else []."""
    try:
        value = json.loads(content)
    except ValueError:
        return []
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and "name" in call and ("arguments" in call or "parameters" in call) for call in calls):
        return []
    return [(call["name"], call["arguments"] if "arguments" in call else call["parameters"]) for call in calls]


def _call_text(style: str, calls: list[tuple[str, Any]]) -> list[tuple[str, bool]]:
    """(text, markup) parts of the assistant's words that call tools."""
    if not calls:
        return []
    if style in ("qwen", "qwen3.5"):
        bodies = [_json({"name": n, "arguments": a}) if style == "qwen" else _xml_call(n, a) for n, a in calls]
        parts = [[("\n" if i else "", True), ("<tool_call>\n", True), (b, False), ("\n</tool_call>", True)] for i, b in enumerate(bodies)]
        return [part for call in parts for part in call]
    as_json = [{"name": name, "parameters": arguments} for name, arguments in calls]
    if style == "internlm2":
        body = "\n".join(map(_json, as_json))
        return [("<|action_start|><|plugin|>\n", True), (body, False), ("<|action_end|>", True)]
    if style == "llama3":
        return [(_json(as_json[0] if len(as_json) == 1 else as_json), False)]
    return [("\n".join(f"Action: {name}\nAction Input: {_json(arguments)}" for name, arguments in calls), False)]


def _xml_call(name: str, arguments: Any) -> str:
    """Qwen3.5's call: each argument on lines of its own, lists and objects as JSON."""
    given = arguments.items() if isinstance(arguments, dict) else ()
    values = ((key, _json(value) if isinstance(value, list | dict) else str(value)) for key, value in given)
    return f"<function={name}>\n" + "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values) + "</function>"


def _glm_call(style: str, call: tuple[str, Any]) -> tuple[str, str]:
    """ChatGLM's calls stand behind the role: the tool's name on its line, then the arguments (ChatGLM3: as Python)."""
    name, arguments = call
    if style == "glm4" or not isinstance(arguments, dict):
        return name, _json(arguments)
    return name, "```python\ntool_call(" + ", ".join(f"{key}={value!r}" for key, value in arguments.items()) + ")\n```"
