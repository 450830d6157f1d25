"""Conversation -> Segments: one `Template` value per chat format, and the one function that renders
them all.

A template is data: the markup round each role's words. It knows no token ids; the tokenizer turns
markup into special tokens and everything else into plain text. The formats stand in
assets/templates.toml.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from cllm.data.message import Message
from cllm.data.schema import Conversation
from cllm.data.tools import TOOL_STYLES, Parts, Tools, announced, called, read_tools
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
    # How tools are announced and called: a key of TOOL_STYLES; react where the model has no format
    # of its own.
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


def _fields(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of a format: its own, and the others of the one that it is like."""
    table = dict(tables[name])
    inherited = _fields(tables, table.pop("like")) if "like" in table else {}
    pairs = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
    return inherited | table | pairs


_TABLES = load_toml("templates.toml")
TEMPLATES = {name: Template(name=name, **_fields(_TABLES, name)) for name in _TABLES}


def messages_of(conversation: Chat) -> list[Message]:
    """The conversation's messages; those of an API request may be {"role": …, "content": …}."""
    return [m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in conversation]


def render(conversation: Chat, template: Template, *, open_turn: bool = False) -> list[Segment]:
    """The conversation in the template's format; joining the texts gives what the model reads.

    Training: the assistant's words and the end token are supervised. open_turn: nothing is, and the
    text ends with the opening of the assistant's turn, which is what generation starts from.
    """
    tools = read_tools(getattr(conversation, "tools", ""))
    messages = messages_of(conversation)
    if template.trim:
        messages = [m._replace(content=m.content.strip()) for m in messages]
    system = (
        messages.pop(0).content
        if messages and messages[0].role == "system"
        else template.default_system
    )
    opening = _system(system, tools, template)
    segments = [*_markup(template.prefix)]
    if not template.merge_system:
        segments += opening
        opening = []
    # roles[i] stands before message i, roles[i + 2] after it
    roles = ["", *(m.role for m in messages), ""]
    for i, (role, content, *_) in enumerate(messages):
        if role == "assistant":
            last = i == len(messages) - 1
            calling = bool(tools) or roles[i + 2] == "tool"
            trained = not template.last_only or (last and not open_turn)
            current = "user" not in roles[i + 2 :]
            segments += _answer(
                content, template, supervised=trained, last=last, current=current, calling=calling
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


def _system(text: str | None, tools: Tools, template: Template) -> list[Segment]:
    """The system turn, with the tools in it or followed by them in a turn of their own; or
    nothing.
    """
    if template.system is None or not (text or tools or (text == "" and template.empty_system)):
        return []
    before, after = template.system
    words = _words(text or "", template)
    turn = [*_markup(before), *words, *_markup(after)]
    if not tools:
        return turn
    head, body, tail = announced(template.tools, tools, bool(text))
    announcement = [*_markup(head), Segment(body, False, False), *_markup(tail)]
    place = TOOL_STYLES[template.tools].place
    if place == "own turn":
        plugin = before.replace("\n", " name=<|plugin|>\n")
        return [*(turn if text else ()), *_markup(plugin), *announcement, *_markup(after)]
    inside = announcement + words if place == "before words" else words + announcement
    return [*_markup(before), *inside, *_markup(after)]


def _answer(
    content: str, template: Template, *, supervised: bool, last: bool, current: bool, calling: bool
) -> list[Segment]:
    """One assistant turn; `current`: after the last user message, where thinking formats show the
    reasoning.
    """
    reasoning = ""
    if template.thinking and "</think>" in content:
        thought, *_, content = content.split("</think>")
        content = content.lstrip("\n")
        if template.thinking == "keep":
            thought = thought.rstrip("\n").split("<think>")[-1]
            reasoning = thought.strip(None if template.trim else "\n")
            # without the reasoning that led to it, the answer would teach to skip it
            supervised = supervised and current
    segments = [*_markup(template.assistant)]
    if template.thinking and current and (last or reasoning or template.think_opened):
        opened = template.think_opened
        keep = supervised and template.thinking == "keep" and bool(reasoning or not opened)
        segments += _markup("<think>\n", keep and not opened)
        if reasoning:
            segments.append(Segment(reasoning, keep, False))
        segments += _markup("\n</think>\n\n", keep)
    segments += [
        Segment(text, supervised, markup) for text, markup in _spoken(content, template, calling)
    ]
    if last or not template.final_end:
        segments += _markup(template.end, supervised)
    if not (last and template.final_end):
        segments += _markup(template.after)
    return segments


def _spoken(content: str, template: Template, calling: bool) -> Parts:
    """An answer's words, or its calls in the template's format."""
    opening = [(template.lead, True)] if template.lead else []
    opening += [] if template.last_only else [("", True)]
    turns = called(template.tools, opening, content) if calling else []
    if not turns:
        return [*opening, (content, False)] if content else opening
    first, *others = turns
    return [*first, *(part for turn in others for part in [(template.assistant, True), *turn])]
