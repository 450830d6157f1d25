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

from cllm.data.message import Message, block_of, with_block
from cllm.data.schema import Conversation
from cllm.data.tools import TOOL_STYLES, Tools, announced, called, read_tools
from cllm.messages import UserError, load_toml

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
    # "off" or "keep" for formats with <think> blocks: leave the reasoning out, or train it. For
    # others "" leaves it out, and "text" trains it as a block in words.
    thinking: str = ""
    # With "keep", generation starts inside an opened block, and each answer after the last user
    # message has one.
    think_opened: bool = False
    # Further tokens at which generation stops.
    stop: tuple[str, ...] = ()
    # The tokenizer's own chat_template, which it renders instead of all of the above.
    jinja: str = ""

    @property
    def blocks(self) -> bool:
        """Whether the format has <think> blocks."""
        return self.thinking in ("off", "keep")

    @property
    def switches(self) -> bool:
        """Whether it can be asked to think, or not to."""
        return self.blocks or "enable_thinking" in self.jinja

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
    for i, message in enumerate(messages):
        role = message.role
        if role == "assistant":
            last = i == len(messages) - 1
            learned = message.trained and (not template.last_only or (last and not open_turn))
            current = "user" not in roles[i + 2 :]
            segments += _answer(message, template, supervised=learned, last=last, current=current)
            continue
        before, after = _around(role, template, turn=roles[: i + 2].count("user"))
        if role == "tool" and template.tool:
            before = before if roles[i] == "tool" else template.tool_group[0] + before
            after = after if roles[i + 2] == "tool" else after + template.tool_group[1]
        if template.handover is not None and (roles[i] == "assistant" or not segments):
            token = before[: before.index(">") + 1]
            learned = not segments or messages[i - 1].trained
            segments.append(Segment(token, learned, True, template.handover or None))
            before = before.removeprefix(token)
        segments += [
            *_markup(before),
            *opening,
            *_words(message.content, template),
            *_markup(after),
        ]
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
    if template.system is None and tools:
        raise UserError("template.no_tools", template=template.name)
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
    message: Message, template: Template, *, supervised: bool, last: bool, current: bool
) -> list[Segment]:
    """One assistant turn; `current`: after the last user message, where thinking formats show the
    reasoning.
    """
    reasoning, content = message.reasoning, message.content
    if not template.blocks:
        content, reasoning = with_block(message) if template.thinking else content, ""
    elif not reasoning:
        reasoning, content = block_of(content)
    content = content.lstrip("\n") if reasoning else content
    if template.thinking == "keep" and reasoning:
        reasoning = reasoning.strip(None if template.trim else "\n")
        # without the reasoning that led to it, the answer would teach to skip it
        supervised = supervised and current
    else:
        reasoning = ""
    segments = [*_markup(template.assistant)]
    if template.blocks and current and (last or reasoning or template.think_opened):
        keep = supervised and bool(reasoning)  # nobody should learn not to think
        segments += _markup("<think>\n", keep and not template.think_opened)
        if reasoning:
            segments.append(Segment(reasoning, keep, False))
        segments += _markup("\n</think>\n\n", keep)
    opening = [(template.lead, True)] if template.lead else []
    opening += [] if template.last_only else [("", True)]
    turns = [[*opening, (content, False)] if content else opening]
    if message.calls:
        turns = called(template.tools, opening, content, message.calls)
    for number, turn in enumerate(turns):
        parts = [(template.assistant, True), *turn] if number else turn
        segments += [Segment(text, supervised, markup) for text, markup in parts]
    if last or not template.final_end:
        segments += _markup(template.end, supervised)
    if not (last and template.final_end):
        segments += _markup(template.after)
    return segments
