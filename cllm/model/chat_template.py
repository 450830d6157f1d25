"""Which template a tokenizer has, and its own chat_template (Jinja) where that is none of ours."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cllm.data.schema import Message
from cllm.data.template import TEMPLATES, Chat, Segment, Template, messages_of, render
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
    if template.thinking:
        template = replace(template, thinking=thinking)
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


# --- A tokenizer's own chat_template, rendered with a mark in place of each message, so that only
# its own text is markup
_MARK = re.compile("\ue000(\\d+)\ue001")


def _marked(messages: Sequence[Message]) -> list[Message]:
    return [Message(m.role, f"\ue000{i}\ue001") for i, m in enumerate(messages)]


def _filled(text: str, words: Sequence[str]) -> str:
    return _MARK.sub(lambda match: words[int(match.group(1))], text)


def _jinja(
    tokenizer: Tokenizer,
    source: str,
    thinking: str | None,
    messages: Sequence[Message],
    opened: bool,
    tools: str = "",
) -> str:
    """The text that Transformers renders; thinking None: without saying so. Raises UserError with
    the chat_template's own complaint.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            conversations=[[m._asdict() for m in messages]],
            tools=json.loads(tools) if tools else None,
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
    """Segments from the chat_template. An answer is what the rendering up to and with it has beyond
    the rendering that opens it; both must begin the whole text.
    """
    messages = messages_of(conversation)
    marked, words = _marked(messages), [m.content for m in messages]
    template, tools = tokenizer.template, getattr(conversation, "tools", "")
    text = functools.partial(_jinja, tokenizer, template.jinja, template.thinking, tools=tools)
    whole, actual = text(marked, open_turn), text(messages, open_turn)
    if _filled(whole, words) != actual:  # most often because the template strips the words
        words = [content.strip() for content in words]
        if _filled(whole, words) != actual:
            raise UserError("tokenizer.prefix")
    segments: list[Segment] = []

    def put(chunk: str, supervised: bool) -> None:
        for at, part in enumerate(_MARK.split(chunk)):
            if part:
                segments.append(
                    Segment(words[int(part)] if at % 2 else part, supervised, at % 2 == 0)
                )

    done = 0
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start, end = text(marked[:i], True), text(marked[: i + 1], False)
        if not (whole.startswith(end) and end.startswith(start)):
            raise UserError("tokenizer.prefix")
        answer, _, tail = end.rpartition("\ue001")
        before, closing = tokenizer.first_control(tail)
        if not closing:
            raise UserError("tokenizer.no_end", token="end of turn", template="chat_template")
        stop = len(answer) + 1 + len(before)
        put(whole[done : len(start)], False)
        segments.append(Segment("", not open_turn, True))
        put(whole[len(start) : stop], not open_turn)
        segments.append(Segment(template.end, not open_turn, True))
        done = stop + len(closing)
    put(whole[done:], False)
    return segments
