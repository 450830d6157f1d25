"""Which template a tokenizer has, and its own chat_template (Jinja) where that is none of ours."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cllm.data.message import Call, Message, block_of, with_block
from cllm.data.schema import Conversation
from cllm.data.template import TEMPLATES, Chat, Segment, Template, messages_of, render
from cllm.data.tools import TOOL_STYLES, Tools, called, parse, read_tools
from cllm.messages import UserError, to_json
from cllm.model.vocabulary import Bpe

if TYPE_CHECKING:
    from cllm.model.tokenizer import Tokenizer

_KINDS = {  # tokenizer_class or model_type -> template
    "ChatGLMTokenizer": "chatglm3",
    "ChatGLM4Tokenizer": "glm4",
    "BaichuanTokenizer": "baichuan2",
    "QWenTokenizer": "qwen1",
    "InternLMTokenizer": "internlm",
    "InternLM2Tokenizer": "internlm2",
    "glm": "glm4",
    "glm4": "glm4",
}
_PROBES = (  # on which one of our templates and a chat_template must agree to be the same
    ([Message("user", "a"), Message("assistant", "b"), Message("user", "c")], True),
    (
        [
            Message("system", "s"),
            Message("user", " a\n"),
            Message("assistant", "b"),
            Message("user", "c"),
            Message("assistant", "d"),
        ],
        False,
    ),
    ([Message("user", "a"), Message("assistant", "b")], False),
)


def restored_template(values: Mapping[str, Any]) -> Template:
    """The template whose `asdict` went through JSON."""
    parts: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return Template(**parts)


def choose_template(
    tokenizer: Tokenizer, name: str, family: str, model: Mapping[str, Any], thinking: str
) -> Template:
    """The template of this name, fitted to the vocabulary; "auto": see `load_tokenizer`."""
    published = published_template(tokenizer)
    if name == "auto":
        chatml = {"<|im_start|>", "<|im_end|>"} <= tokenizer.vocabulary.control.keys()
        name = _of_kind(tokenizer, family, model)
        if not name and published:
            name = _same(tokenizer, published) or "native"
        name = name or ("chatml" if chatml else "plain")
    if name == "native" and published:
        return _native(tokenizer, published, thinking)
    if name not in TEMPLATES:
        raise UserError("tokenizer.template", name=name, known=", ".join([*TEMPLATES, "native"]))
    return _fitted(tokenizer, TEMPLATES[name], thinking)


def published_template(tokenizer: Tokenizer) -> str:
    """The chat_template that came with the tokenizer, "" where there is none."""
    own = tokenizer.config.get("chat_template") or ""
    if isinstance(own, list):  # several named ones
        own = next((entry["template"] for entry in own if entry.get("name") == "default"), "")
    return str(own)


def _of_kind(tokenizer: Tokenizer, family: str, model: Mapping[str, Any]) -> str:
    """The template that the original tokenizer class, the model type or the family names; "" if
    they say nothing.
    """
    name = _KINDS.get(
        tokenizer.config.get("tokenizer_class", ""), _KINDS.get(model.get("model_type", ""), family)
    )
    if name == "chatglm3":  # ChatGLM2, ChatGLM3 and GLM-4 share their class names
        names = f"{tokenizer.config.get('name_or_path')} {model.get('_name_or_path')}".lower()
        if isinstance(tokenizer.vocabulary, Bpe):
            return "glm4"
        return "chatglm2" if "chatglm2" in names else "chatglm3"
    if name == "baichuan2" and tokenizer.vocab_size == 64000:
        return "baichuan"
    return name if name in TEMPLATES else ""


def _fitted(tokenizer: Tokenizer, template: Template, thinking: str) -> Template:
    """The template with this tokenizer's own end of text where it lacks the template's, and its bos
    if it always has one.
    """
    vocabulary = tokenizer.vocabulary
    if template.thinking or thinking == "keep":
        template = replace(template, thinking=thinking if template.thinking else "text")
    if (end := template.end.strip()) not in vocabulary.control:
        text = to_json(asdict(template)).replace(end, vocabulary.name(tokenizer.eos_id))
        template = restored_template(json.loads(text))
    if tokenizer.bos_id is not None:
        bos = vocabulary.name(tokenizer.bos_id)
        usual = vocabulary.begins_with(tokenizer.bos_id)
        opens = bos in template.prefix + template.user[0]
        if not opens and tokenizer.config.get("add_bos_token", usual):
            template = replace(template, prefix=bos + template.prefix)
    return template


# --- A tokenizer's own chat_template, rendered with a mark in place of each message's words, so
# that only its own text is markup
_MARK = re.compile("\ue000(\\d+)\ue001")
_THINK_PROMPT = re.compile(r"<think>\s*(</think>\s*)?\Z")  # what only a prompt may end with
_THOUGHT = re.compile(r"<think>\s*(\ue000\d+\ue001)?\s*</think>\s*")
_EMPTY_BLOCK = re.compile(r"\s*(<think>\s*)?</think>\s*")  # its opening may be the prompt's


def _mark(number: int, words: str) -> str:
    return f"\ue000{number}\ue001" if words else ""


def _marked(messages: Sequence[Message], unmarked: str = "") -> list[Message]:
    """Message i's words are mark 2i, its reasoning is mark 2i + 1; the role `unmarked` stays."""
    return [
        m
        if m.role == unmarked
        else m._replace(content=_mark(2 * i, m.content), reasoning=_mark(2 * i + 1, m.reasoning))
        for i, m in enumerate(messages)
    ]


def _check_tokens(tokenizer: Tokenizer, text: str) -> None:
    """Raises UserError if text that is rendered without a mark holds a special token."""
    ids = tokenizer.encode(text, markup=True)
    if token := next(filter(tokenizer.vocabulary.hidden.__contains__, ids), None):
        raise UserError("template.token", token=tokenizer.vocabulary.name(token))


def _filled(text: str, words: Sequence[str]) -> str:
    return _MARK.sub(lambda match: words[int(match.group(1))], text)


def _wire(row: dict[str, Any]) -> dict[str, Any]:
    """A message as OpenAI's API writes it: arguments as JSON text, no content beside bare calls."""
    for call in row.get("tool_calls", ()):
        call["function"]["arguments"] = to_json(call["function"]["arguments"])
        row["content"] = row["content"] or None
    return row


def _jinja(
    tokenizer: Tokenizer,
    source: str,
    thinking: str | None,
    messages: Sequence[Message],
    opened: bool,
    tools: Tools | None = None,
    wire: bool = False,
) -> str:
    """The text that Transformers renders; thinking None: without saying so; wire: see `_wire`.
    Raises UserError with the chat_template's own complaint.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    rows = [message.row() for message in messages]
    try:
        texts, _ = render_jinja_template(
            conversations=[[_wire(row) for row in rows] if wire else rows],
            tools=[{"type": "function", "function": tool} for tool in tools or ()] or None,
            chat_template=source,
            add_generation_prompt=opened,
            **({} if thinking is None else {"enable_thinking": thinking == "keep"}),
            **tokenizer.special_names(),
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError("tokenizer.native", detail=error) from error
    return str(texts[0])


def _same(tokenizer: Tokenizer, source: str) -> str:
    """The name of our template that renders exactly like the chat_template, thinking or not, or
    "".
    """
    texts = [_rendered(tokenizer, source, mode) for mode in ("off", "keep")]
    for name, template in TEMPLATES.items():
        modes = ("off", "keep") if template.thinking else ("", "")
        if texts == [_probed(replace(template, thinking=mode)) for mode in modes]:
            return name
    return ""


def _rendered(tokenizer: Tokenizer, source: str, thinking: str | None) -> list[str] | None:
    """The probes by the chat_template; None if it refuses one of them."""
    try:
        return [_jinja(tokenizer, source, thinking, turns, opened) for turns, opened in _PROBES]
    except UserError:
        return None


def _probed(template: Template) -> list[str]:
    return [
        "".join(segment.text for segment in render(turns, template, open_turn=opened))
        for turns, opened in _PROBES
    ]


def tool_style(tokenizer: Tokenizer) -> str:
    """In which of TOOL_STYLES its template writes calls; of a chat_template, the one that reads
    them back. Raises UserError if there is none, or no place for the tools.
    """
    template = tokenizer.template
    tools: Tools = [{"name": "probe", "description": "p", "parameters": {}}]
    calls = (Call("probe", {"text": "a"}),)
    turns = (Message("user", "a"), Message("assistant", "", "", calls))
    segments = tokenizer.segments(Conversation(turns, tools=to_json(tools)))
    if not template.jinja:
        return template.tools
    answer = [segment for segment in segments if segment.supervised]
    text = tokenizer.decode(tokenizer.encode_segments(answer)[0])
    for style in TOOL_STYLES:
        if parse(style, text, tools) == ("", calls):
            return style
    raise UserError("template.no_calls")


def call_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Control tokens with which its calls are written, which `decode` leaves out."""
    turns = called(tool_style(tokenizer), [], "a", (Call("a", {}),) * 2)
    texts = ["".join(text for text, _ in turn) for turn in turns]
    ids = tokenizer.encode(tokenizer.template.assistant.join(texts), markup=True)
    hidden = tokenizer.vocabulary.hidden.intersection(ids)
    return {id: tokenizer.vocabulary.name(id) for id in hidden}


def renders_like(tokenizer: Tokenizer, source: str) -> bool:
    """Whether the chat_template, called as everybody calls it, renders exactly like the tokenizer's
    template.
    """
    return _probed(tokenizer.template) == _rendered(tokenizer, source, None)


def _native(tokenizer: Tokenizer, source: str, thinking: str) -> Template:
    """The chat_template as a Template; its end token is the first control token behind an
    answer.
    """
    text = _jinja(tokenizer, source, thinking, _marked(_PROBES[2][0]), False)
    tail = text.rpartition("\ue001")[2]
    end = tokenizer.first_control(tail)[1] or tokenizer.vocabulary.name(tokenizer.eos_id)
    return Template(
        name="native", user=("", ""), assistant="", end=end, jinja=source, thinking=thinking
    )


def render_native(tokenizer: Tokenizer, conversation: Chat, *, open_turn: bool) -> list[Segment]:
    """Segments from the chat_template. An answer is what stands between the rendering that opens it
    and the end token behind its words and calls.

    Raises UserError for a conversation that the chat_template refuses, or of which it leaves
    something out.
    """
    messages, tools = messages_of(conversation), read_tools(getattr(conversation, "tools", ""))
    _check_tokens(tokenizer, to_json([tools, [message.calls for message in messages]]))
    try:
        return _native_segments(tokenizer, messages, tools, open_turn=open_turn, wire=False)
    except UserError:
        if any(message.calls for message in messages):
            with suppress(UserError):
                return _native_segments(tokenizer, messages, tools, open_turn=open_turn, wire=True)
        raise


def _given(message: Message, template: Template) -> tuple[Message, str]:
    """(the message as the chat_template gets it, its words with the reasoning that it does not get
    apart).
    """
    reasoning, content = message.reasoning, message.content
    if message.role == "assistant" and not reasoning:
        reasoning, content = block_of(content)
    if not reasoning:
        return message._replace(content=content), content
    # without a switch, a block in the words is words like others
    if template.thinking == "off" and (message.reasoning or "enable_thinking" in template.jinja):
        return message._replace(content=content, reasoning=""), content
    if "reasoning_content" in template.jinja:
        return message._replace(content=content, reasoning=reasoning), content
    return message._replace(content=content, reasoning=""), with_block(message)


def _whole(
    tokenizer: Tokenizer,
    text: Callable[[list[Message], bool], str],
    messages: list[Message],
    open_turn: bool,
) -> tuple[str, list[str], list[Message]]:
    """(the rendering with marks, the words that belong there, the marked messages). Raises
    UserError if they would not give what the template renders.
    """
    actual = text(messages, open_turn)
    words = [part for m in messages for part in (m.content, m.reasoning)]
    for unmarked in ("", "tool"):  # Llama 3.1 writes results as JSON
        marked = _marked(messages, unmarked)
        whole = text(marked, open_turn)
        for filling in (words, [part.strip() for part in words]):  # many strip the words
            if _filled(whole, filling) == actual:
                for m in messages:
                    _check_tokens(tokenizer, m.content if m.role == unmarked else "")
                return whole, filling, marked
    raise UserError("tokenizer.prefix")


def _start(whole: str, behind: int, opened: str, closed: str) -> tuple[int, str]:
    """(where an answer begins, the <think> of the prompt that does not stand there), by the texts
    with and without the prompt for it; it is no earlier than `behind`.
    """
    think = _THINK_PROMPT.search(opened)
    lead = think.group() if think else ""
    prompt = opened.removeprefix(closed).removesuffix(lead)
    start = whole.find(prompt, behind) + len(prompt)
    # nothing else may have changed before it than blocks of earlier answers
    before, then = (_THOUGHT.sub("", text) for text in (opened.removesuffix(lead), whole[:start]))
    if before != then:
        raise UserError("tokenizer.prefix")
    return start, lead


def _end(whole: str, start: int, message: Message, ends: Sequence[str]) -> tuple[int, int]:
    """Where the end token of the marked answer from `start` stands, and what follows."""
    at = max(0, whole.find(message.content, start)) + len(message.content)
    end = re.compile("|".join(map(re.escape, ends))).search(whole, at)
    marks = _MARK.finditer(whole[start : end.start() if end else None])
    if not end or not {match.group() for match in marks} <= {message.content, message.reasoning}:
        raise UserError("tokenizer.no_end", token="end of turn", template="chat_template")
    if not all(call.name in whole[start : end.start()] for call in message.calls):
        raise UserError("template.drops", part="tool_calls")
    return end.span()


def _native_segments(
    tokenizer: Tokenizer, messages: list[Message], tools: Tools, *, open_turn: bool, wire: bool
) -> list[Segment]:
    template = tokenizer.template
    pairs = [_given(message, template) for message in messages]
    given, thoughtful = [m for m, _ in pairs], [m._replace(content=full) for m, full in pairs]
    text = functools.partial(
        _jinja, tokenizer, template.jinja, template.thinking, tools=tools, wire=wire
    )
    whole, words, marked = _whole(tokenizer, text, given, open_turn)
    shown = text(thoughtful, open_turn) if thoughtful != given else ""
    dropped = [m.role for m in marked if _MARK.match(m.content) and m.content not in whole]
    dropped += ["tools"] * any(str(tool["name"]) not in whole for tool in tools)
    if dropped:
        raise UserError("template.drops", part=", ".join(dropped))
    segments: list[Segment] = []

    def put(chunk: str, supervised: bool) -> None:
        for at, part in enumerate(_MARK.split(chunk)):
            if part:
                text = words[int(part)] if at % 2 else part
                segments.append(Segment(text, supervised and not open_turn, at % 2 == 0))

    done = 0
    for i, message in enumerate(marked):
        if message.role != "assistant":
            continue
        opened, lead = text(marked[:i], True), ""
        start = len(opened)
        if not whole.startswith(opened):
            start, lead = _start(whole, done, opened, text(marked[:i], False))
        # a model may have been given another end token
        stop, behind = _end(whole, start, message, (template.end, *template.stop))
        answer, full, learned = whole[start:stop], thoughtful[i].content, message.trained
        apart = full != given[i].content
        cut = message.reasoning not in answer or (apart and full not in shown)
        if cut and "user" in [later.role for later in messages[i + 1 :]]:
            # as the prompts of later turns have it; the answer alone would teach to skip thinking
            learned = apart = False
        elif cut and not apart:
            raise UserError("template.drops", part="reasoning")
        lead = lead if apart and full.startswith(lead) else ""
        if apart:
            words[2 * i] = full.removeprefix(lead)
        empty = _EMPTY_BLOCK.match(answer)
        masked = empty.end() if empty else 0
        put(whole[done:start] + lead + answer[:masked], False)
        segments.append(Segment("", learned and not open_turn, True))
        put(answer[masked:] + template.end, learned)
        done = behind
    put(whole[done:], False)
    return segments
