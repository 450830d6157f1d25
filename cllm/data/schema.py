"""One row of anybody's instruction file -> one `Conversation` or one `Reject`; it knows nothing of
files, encodings or tokens.

`cllm.data.turns` finds what was said; here it becomes messages in a trainable order. Whatever the
row holds, nothing raises for it: a row that is no conversation becomes a `Reject` with one of the
fixed `REASONS` and a detail that says what was found and what is expected.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from cllm.data.fields import Row, holds_text, is_metadata, unread
from cllm.data.message import ROLES, Call, Message, block_of, with_calls
from cllm.data.text import (
    SURROGATE,
    VERBATIM,
    RowError,
    TextOptions,
    clean,
    json_text,
    printable,
    rewriter,
    text_of,
)
from cllm.data.tools import read_tools
from cllm.data.turns import (
    PAIRS,
    SPECIAL_KEYS,
    TAG_START,
    TURN_KEYS,
    Turns,
    exchange,
    history_turns,
    is_turn,
    key_names,
    known_names,
    named,
    row_turns,
    unboxed,
    with_input,
    with_system,
)
from cllm.messages import UserError, say

REASONS = tuple(
    "empty_user empty_assistant no_assistant empty_turn role_order unknown_role unknown_schema "
    "not_an_object parse_error decode_error invalid_text negative_label no_rejected no_winner "
    "identical_pair no_common_prompt".split()
)
FOLLOWS = {  # what may come after what; several tools may answer one call
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool", "user"),
}
NEGATIVE = ("false", "0", "0.0")  # what KTO's label calls an answer that is not to be learnt
COLUMN_KEYS = ("system", "user", "assistant", "history", "category")
_CATEGORIES = ("task", "category", "class")
_PLAIN = [("instruction", "output"), *zip(TURN_KEYS, TURN_KEYS, strict=True)]
_PLAIN += [(ask, reply) for ask, replies in PAIRS.items() for reply in replies if ask != "ask"]
# the keys of a message that is nothing but a role and a text, and the words for who says it
_PLAIN_KEYS = {
    keys: names
    for names in (("role", "content"), ("from", "value"))
    for keys in (names, names[::-1])
}
_PLAIN_ROLES = {word: ROLES[word] for word in "system user human assistant gpt".split()}
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, plus where they came from.

    category: the row's own `task` / `category` / `class` string, for scores per category; tools:
    the tool list as JSON, verbatim; rejected: the whole dialogue with the answer that was not
    chosen (`cllm.data.pairs`). A vote against a single answer ends with the question.
    """

    messages: tuple[Message, ...]
    category: str = ""
    tools: str = ""
    file: str = ""
    line: int = 0
    rejected: tuple[Message, ...] = ()

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)


class Reject(NamedTuple):
    """A row that cannot be trained on: where, which of `REASONS`, and what was found against what
    is expected.
    """

    file: str
    line: int
    reason: str
    detail: str


def _mapped(row: Row, source: str) -> object:
    """The value of a mapped column: a name, an index into header-less cells, or a template such as
    "{Question}\\nA. {A}".
    """
    if source in row:
        return row[source]
    names = _PLACEHOLDER.findall(source)
    if absent := [name for name in names or [source] if name not in row]:
        shown = ", ".join(absent)
        raise RowError("row.columns", "unknown_schema", absent=shown, found=key_names(row))
    filled = {name: clean(text_of(row[name], name)) for name in names}
    if not any(filled.values()):
        return ""
    return _PLACEHOLDER.sub(lambda match: filled[match.group(1)], source)


def _mapped_text(row: Row, source: str) -> str:
    return text_of(_mapped(row, source), source)


def _mapped_turns(row: Row, fields: Row, columns: Mapping[str, str]) -> Turns:
    if "user" in columns:
        turns = exchange(*(_mapped_text(row, columns[role]) for role in ("user", "assistant")))
    else:
        turns = row_turns(fields)
    if "history" in columns:
        turns = history_turns(_mapped(row, columns["history"])) + turns
    return with_system(_mapped(row, columns["system"]), turns) if "system" in columns else turns


def _tools(row: Row) -> str:
    """The tool list of a row, or of its first message, as JSON and verbatim; "" for a blank one.
    Raises RowError for one that is no list of tools with names.
    """
    value = row.get("tools")
    for key in () if value else TURN_KEYS:
        if isinstance(turns := row.get(key), list) and turns and isinstance(turns[0], dict):
            value = turns[0].get("tools")
    text = json_text(value) if value and value == value else ""
    if "".join(clean(text).split()) in ("", "[]", "{}", "null"):
        return ""
    if not read_tools(text):
        raise RowError("row.tools", "invalid_text", found=f"{text:.60}")
    return text


def _rewritten(value: Any, rewrite: Callable[[str], str]) -> Any:
    """A call's arguments with every text in them rewritten."""
    if isinstance(value, dict):
        return {key: _rewritten(part, rewrite) for key, part in value.items()}
    if isinstance(value, list):
        return [_rewritten(part, rewrite) for part in value]
    return rewrite(value) if isinstance(value, str) else value


def _clean_message(turn: Message, rewrite: Callable[[str], str], listed: bool) -> Message:
    """The turn with its calls read out of its text, and every text rewritten; arguments only where
    the options ask for it.
    """
    role, text, reasoning, calls, trained = turn
    content = rewrite(text)
    parted = reasoning or calls or not trained
    marked = listed or "call>" in content or content.startswith("<think>")
    if role != "assistant" or not (parted or marked):
        return turn if content is text else Message(role, content)
    role, text, reasoning, calls, trained = with_calls(turn, listed=listed)
    content = rewrite(text)
    reasoning = rewrite(reasoning).removeprefix("<think>").removesuffix("</think>").strip()
    block, answer = block_of(content)
    if block.strip() in ("", reasoning):  # an empty block, or the reasoning a second time
        content = answer
    if rewrite is not clean:
        calls = tuple(Call(name, _rewritten(values, rewrite)) for name, values in calls)
    return Message(role, content, reasoning, calls, trained)


def _ordered(
    turns: Turns, rewrite: Callable[[str], str], *, tools: bool = False
) -> tuple[Message, ...]:
    """Cleaned messages in a trainable order: system?, user, assistant, … ; what follows the last
    answer is trimmed.
    """
    size = len(turns)
    while size and turns[size - 1].role != "assistant":
        size -= 1
    if not size:
        raise RowError("row.no_answer", "no_assistant", count=len(turns))
    listed = tools or "tool" in [turn.role for turn in turns]
    messages = [_clean_message(turn, rewrite, listed) for turn in turns[:size]]
    if messages[0] == Message("system", ""):
        del messages[0]
    before, spoken = "", sum(message.role != "system" for message in messages)
    for number, message in enumerate(messages, 1):
        role = message.role
        if role not in (follows := FOLLOWS[before]):
            raise RowError(
                "row.order",
                "role_order",
                number=number,
                role=role,
                before=before or say("row.nothing"),
                expected=" / ".join(follows),
            )
        if (
            not message.content and not message.calls
        ):  # the row's own question or answer, or some turn of a dialogue
            own = role in ("user", "assistant") and (spoken == 2 or number >= len(messages) - 1)
            reason = f"empty_{role}" if own else "empty_turn"
            raise RowError("row.empty", reason, number=number, role=role)
        before = role
    return tuple(messages)


def _plain_turns(elements: object) -> tuple[Message, ...] | None:
    """The messages of a list that is in order and holds no parts, else None."""
    messages, before = [], ""
    for element in elements if type(elements) is list else ():
        names = _PLAIN_KEYS.get(tuple(element)) if type(element) is dict else None
        if not names:
            return None
        word, text = element[names[0]], element[names[1]]
        if not type(word) is type(text) is str:
            return None
        role, text = _PLAIN_ROLES.get(word, ""), clean(text)
        if role not in FOLLOWS[before] or not text or text[0] == "<":
            return None
        if "<image>" in text or "call>" in text:
            return None
        messages.append(Message(role, text))
        before = role
    return tuple(messages) if before == "assistant" else None


class Normalizer:
    """Rows of one source -> `Conversation | Reject`.

    columns: the mapping of [data.columns]; kind: "chat", or "text" for pre-training rows; options:
    rewriting of texts. Raises UserError for unknown keys in `columns`, or one of user and assistant
    without the other.
    """

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        kind: str = "chat",
        options: TextOptions = VERBATIM,
    ) -> None:
        self.columns = dict(columns or {})
        if unknown := [key for key in self.columns if key not in COLUMN_KEYS]:
            raise UserError(
                "data.columns_unknown", keys=", ".join(unknown), known=", ".join(COLUMN_KEYS)
            )
        sides = [role for role in ("user", "assistant") if role in self.columns]
        if kind == "chat" and len(sides) == 1:
            raise UserError("data.columns_half", have=sides[0])
        self.kind, self.rewrite = kind, rewriter(options)
        self.headless = bool(self.columns) and all(map(str.isdigit, self.columns.values()))
        self.unread: Counter[str] = Counter()
        """Names of fields that held text and were not read -> rows."""
        self._planned = lru_cache(1000)(self._plan)

    def __call__(self, row: object, file: str = "", line: int = 0) -> Conversation | Reject:
        """The conversation of `row`, or why there is none. Never raises for bad data."""
        try:
            if type(row) is dict and self.rewrite is clean and (messages := self._plain(row)):
                return Conversation(messages, self._category(row), "", file, line)
            if self.headless and isinstance(row, list):
                row = {str(index): cell for index, cell in enumerate(row)}
            row = unboxed(row)
            if isinstance(row, list) and row and all(map(is_turn, row)):
                row = {"messages": row}
            if isinstance(row, RowError):
                raise row
            if not isinstance(row, dict):
                raise RowError("row.no_object", "not_an_object", found=f"{row!r:.40}")
            return self._conversation(row, file, line)
        except RowError as error:
            reason, detail = error.args
        except RecursionError:
            reason, detail = "invalid_text", say("row.nested")
        return Reject(file, line, reason, printable(detail))

    def _plain(self, row: Row) -> tuple[Message, ...] | None:
        """The short way for most rows there are, one clean question and answer or a list of
        messages of one role and one text each: what `_conversation` gives, in a third of the time.
        """
        if not (plan := self._planned(tuple(row))):
            return None
        ask_key, extra_key, reply_key, others = plan
        ask, reply = row[ask_key], row[reply_key]
        if ask_key == reply_key:
            messages = _plain_turns(ask)
        else:
            extra = row[extra_key] if extra_key else ""
            if not type(ask) is type(reply) is type(extra) is str:
                return None
            ask, reply = with_input(clean(ask), clean(extra)), clean(reply)
            unclear = TAG_START.match(ask) or "<image>" in ask or "call>" in reply
            if not ask or not reply or unclear or reply[0] in "<[【":
                return None
            messages = Message("user", ask), Message("assistant", reply)
        for name in others if messages else ():
            if holds_text(row[name]):
                self.unread[name] += 1
        return messages

    def _plan(self, keys: tuple[str, ...]) -> tuple[str, str, str, list[str]] | None:
        """(question, input or "", answer, keys that are not read) of rows that have no other
        special key, else None; of messages, their key stands for question and answer.
        """
        names, _ = known_names(keys)
        written = {names.get(key, key): key for key in keys}
        special = SPECIAL_KEYS.intersection(written)
        extra = "input" if special >= {"instruction", "input"} else ""
        pair = next((pair for pair in _PLAIN if {*pair} == special - {extra}), None)
        if self.columns or self.kind != "chat" or not pair or len(written) < len(keys):
            return None
        ask, reply = (written[name] for name in pair)
        others = [key for name, key in written.items() if name not in special]
        unknown = [key for key in others if not is_metadata(str(key))]
        return ask, written.get(extra, ""), reply, unknown

    def _conversation(self, row: Row, file: str, line: int) -> Conversation:
        tools = ""
        if self.kind == "text":
            source = self.columns.get("assistant", "text")
            turns = [Message("user", "-"), Message("assistant", _mapped_text(row, source))]
            messages = _ordered(turns, self.rewrite)[1:]
        else:
            fields = row if "user" in self.columns else named(row)
            turns = _mapped_turns(row, fields, self.columns) if self.columns else row_turns(fields)
            answered = "user" in self.columns or "label" not in fields
            if not answered and str(label := fields["label"]).strip().lower() in NEGATIVE:
                raise RowError("row.label", "negative_label", found=repr(label))
            tools = _tools(fields)
            messages = _ordered(turns, self.rewrite, tools=bool(tools))
        category = self._category(row)
        for name in unread(row, messages, tools, self.rewrite):
            self.unread[name] += 1
        return Conversation(messages, category, tools, file, line)

    def _category(self, row: Row) -> str:
        if "category" in self.columns:
            return clean(_mapped_text(row, self.columns["category"]))
        if row.keys().isdisjoint(_CATEGORIES):
            return ""
        texts = [row[key] for key in _CATEGORIES if isinstance(row.get(key), str)]
        return clean(texts[0]) if texts and not SURROGATE.search(texts[0]) else ""


def to_row(conversation: Conversation, kind: str = "chat") -> Row:
    """The JSON object that `Normalizer` reads back as the same conversation."""
    if kind == "text":
        row: Row = {"text": conversation.messages[0].content}
    else:
        row = {"messages": [message.row() for message in conversation]}
    extra = {"category": conversation.category, "tools": conversation.tools}
    return row | {key: value for key, value in extra.items() if value}
