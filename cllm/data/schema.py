"""One row of anybody's instruction file -> one `Conversation` or one `Reject`; it knows nothing of
files, encodings or tokens.

`cllm.data.turns` finds what was said; here it becomes messages in a trainable order. Whatever the
row holds, nothing raises for it: a row that is no conversation becomes a `Reject` with one of the
fixed `REASONS` and a detail that says what was found and what is expected.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from cllm.data.fields import (
    MEDIA,
    PLACE,
    Row,
    holds_text,
    is_metadata,
    refuse_media,
    unread,
    with_kinds,
)
from cllm.data.message import FLAGS, ROLES, Call, Message, block_of, with_calls
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
    EXCHANGES,
    LABELS,
    PAIRS,
    SPECIAL_KEYS,
    SPOKEN,
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
# what KTO's label calls an answer that is not to be learnt, and one that is
NEGATIVE = ("false", "0", "0.0", "-1", "-1.0")
POSITIVE = ("true", "1", "1.0")
COLUMN_KEYS = ("system", "user", "assistant", "rejected", "history", "category")
_CATEGORIES = ("task", "category", "class")
_LISTED = [*zip(TURN_KEYS, TURN_KEYS, strict=True)]
_PLAIN = [("instruction", "output"), *_LISTED]
_PLAIN += [(ask, reply) for ask, replies in PAIRS.items() for reply in replies]
# who speaks in an element that says two turns and nothing else
_PLAIN_SIDES = {
    frozenset((*system, *pair)): tuple(
        zip((*system, "user", "assistant"), (*system, *pair), strict=True)
    )
    for pair in EXCHANGES
    for system in ((), ("system",))
}
_PLAIN_ROLES = {word: ROLES[word] for word in "system user human assistant gpt".split()}
_UNMAPPED = MEDIA.union(("tools",), TURN_KEYS)  # read beside mapped columns
_NO_PARTS = Message("", "")[2:]
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(slots=True)
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


def mapped(row: Row, source: str) -> object:
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
    return text_of(mapped(row, source), source)


def _mapped_turns(row: Row, fields: Row, columns: Mapping[str, str]) -> Turns:
    if "user" in columns:
        turns = exchange(*(_mapped_text(row, columns[role]) for role in ("user", "assistant")))
        refuse_media(row, turns)
    else:
        turns = row_turns(fields)
    if "history" in columns:
        turns = history_turns(mapped(row, columns["history"])) + turns
    return with_system(mapped(row, columns["system"]), turns) if "system" in columns else turns


def _tools(row: Row) -> str:
    """The tool list of a row, or of its first message, as JSON and verbatim; "" for a blank one.
    Raises RowError for one that is no list of tools with names.
    """
    value = row.get("tools")
    for key in () if value else TURN_KEYS:
        if isinstance(turns := row.get(key), list) and turns and isinstance(turns[0], dict):
            value = turns[0].get("tools")
    if not value or value != value:
        return ""
    text = json_text(value)
    clean(text)  # raises for bytes and surrogates; the text stays as it is
    if not _are_tools(text):
        if "".join(clean(text).split()) in ("", "[]", "{}", "null"):
            return ""
        raise RowError("row.tools", "invalid_text", found=f"{text:.60}")
    return text


@lru_cache(1000)
def _are_tools(text: str) -> bool:
    return bool(read_tools(text))


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
    content = rewrite(turn.content)
    plain = turn.role != "assistant" or not (
        listed or turn[2:] != _NO_PARTS or "call>" in content or content.startswith("<think>")
    )
    if plain:
        return turn if content is turn.content else turn._replace(content=content)
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


class _Plan(NamedTuple):
    """Where rows of the same keys have what is said, "" for what they have not; which other keys
    may hold texts; whether a row may have a category.
    """

    ask: str
    extra: str
    reply: str
    system: str
    history: str
    others: list[tuple[str, str, bool]]
    categorized: bool


@lru_cache(1000)
def _speech(keys: tuple[str, ...]) -> tuple[str, str, list[str]] | None:
    """The keys of role and text of a message that has no other but metadata, and those."""
    pair = next((pair for pair in SPOKEN if {*pair} <= {*keys}), ("", ""))
    rest = [key for key in keys if key not in pair]
    plain = pair[0] and "role" not in rest and all(map(is_metadata, rest))
    return (*pair, rest) if plain else None


def _plain_turns(elements: object, paired: bool = False) -> list[Message] | None:
    """The messages of a list that is in order and holds no parts, else None; `paired`: also of
    lists of a question and its answer.
    """
    messages: list[Message] = []
    before = ""
    for element in elements if type(elements) is list else ():
        keys = tuple(element) if type(element) is dict else ()
        said: Iterable[tuple[Any, Any]]
        if names := _speech(keys):
            said = ((element[names[0]], element[names[1]]),)
            for key in names[2]:
                if holds_text(element[key], prose=True):
                    return None
        elif sides := _PLAIN_SIDES.get(frozenset(keys)):
            said = [(role, element[key]) for role, key in sides]
        elif paired and type(element) is list and len(element) == 2 and element[0] not in [*ROLES]:
            said = zip(("user", "assistant"), element, strict=True)
        else:
            return None
        for word, text in said:
            if not type(word) is type(text) is str:
                return None
            role, text = _PLAIN_ROLES.get(word, ""), clean(text)
            if role not in FOLLOWS[before] or not text or text.startswith(("<", "SYSTEM: ")):
                return None
            if "<" in text and ("call>" in text or PLACE.search(text)):
                return None
            messages.append(Message(role, text))
            before = role
    return messages if before == "assistant" else None


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
        if kind != "text" and len(sides) == 1:
            raise UserError("data.columns_half", have=sides[0])
        self.kind, self.rewrite = kind, rewriter(options)
        self.headless = bool(self.columns) and all(map(str.isdigit, self.columns.values()))
        self.unread: Counter[str] = Counter()
        """Names of fields that held text and were not read -> rows."""
        self._planned = lru_cache(1000)(self._plan)

    def __call__(self, row: object, file: str = "", line: int = 0) -> Conversation | Reject:
        """The conversation of `row`, or why there is none. Never raises for bad data."""
        try:
            if type(row) is not dict:
                row = self._opened(row)
            plan = self._planned(tuple(row))
            try:
                turns = self._plain(row, plan) if plan else None
            except RowError:  # which of a row's faults is named, the long way decides
                turns = None
            if not plan or not turns:
                return self._conversation(row, file, line)
            category = self._category(row) if plan.categorized else ""
            return Conversation(tuple(turns), category, "", file, line)
        except RowError as error:
            reason, detail = error.args
        except RecursionError:
            reason, detail = "invalid_text", say("row.nested")
        return Reject(file, line, reason, printable(detail))

    def _opened(self, row: object) -> Row:
        """The row in what stands in its place: cells without header, a list of it, its messages."""
        if self.headless and isinstance(row, list):
            row = {str(index): cell for index, cell in enumerate(row)}
        row = unboxed(row)
        if isinstance(row, list) and row and all(map(is_turn, row)):
            row = {"messages": row}
        if isinstance(row, RowError):
            raise row
        if not isinstance(row, dict):
            raise RowError("row.no_object", "not_an_object", found=f"{row!r:.40}")
        return row

    def _plain(self, row: Row, plan: _Plan) -> list[Message] | None:
        """The short way for most rows there are, of clean texts and lists of messages of one role
        and one text each: what `_conversation` gives, in a third of the time.
        """
        ask_key, extra_key, reply_key, system_key, history_key, others, _ = plan
        turns: list[Message] | None
        if ask_key == reply_key:
            turns = _plain_turns(row[ask_key])
        else:
            ask, reply = row[ask_key], row[reply_key]
            extra = row[extra_key] if extra_key else ""
            extra = "" if extra is None else extra
            if not type(ask) is type(reply) is type(extra) is str:
                return None
            ask, reply = with_input(clean(ask), clean(extra)), clean(reply)
            if ask in ("", "无") or not reply or reply[0] in "<[【" or "call>" in reply:
                return None
            if "<" in ask and PLACE.search(ask):
                return None
            if ask[0] in "<[【hHuU用" and TAG_START.match(ask):
                return None
            turns = [Message("user", ask), Message("assistant", reply)]
            if history_key and (history := row[history_key]):
                turns = (before := _plain_turns(history, paired=True)) and before + turns
        if turns and system_key and (system := row[system_key]) is not None:
            if type(system) is not str or turns[0].role == "system":
                return None
            turns = with_system(system, turns)
        if turns and any(holds_text(row[name], metadata) for name, _, metadata in others):
            self.unread.update(unread(row, turns, "", clean))
        return turns

    def _plan(self, keys: tuple[str, ...]) -> _Plan | None:
        """Where rows of these keys have what is said; None if they have other special keys, or if
        what they say is not taken as it stands.
        """
        if self.kind != "chat" or self.rewrite is not clean:
            return None
        if places := {**self.columns}:
            mapped = "user" in places and {*places.values()} <= {*keys}
            if not mapped or not _UNMAPPED.isdisjoint(keys):
                return None
        else:
            names, _ = known_names(keys)
            written = {names.get(key, key): key for key in keys}
            special = SPECIAL_KEYS.intersection(written)
            beside = special & {"system", "history", "input" if "instruction" in special else ""}
            pair = next((pair for pair in _PLAIN if {*pair} == special - beside), None)
            listed = pair in _LISTED and "history" in beside
            if not pair or listed or len(written) < len(keys):
                return None
            places = {name: written[name] for name in beside}
            places |= {"user": written[pair[0]], "assistant": written[pair[1]]}
        others = [field for field in with_kinds(keys) if field[0] not in places.values()]
        categorized = "category" in places or not {*_CATEGORIES}.isdisjoint(keys)
        place = defaultdict(str, places)
        return _Plan(
            place["user"],
            place["input"],
            place["assistant"],
            place["system"],
            place["history"],
            others,
            categorized,
        )

    def _conversation(self, row: Row, file: str, line: int) -> Conversation:
        tools = ""
        messages: tuple[Message, ...]
        if self.kind == "text":
            text = self.rewrite(_mapped_text(row, self.columns.get("assistant", "text")))
            messages = (Message("assistant", text),)
            if not text:
                raise RowError("row.empty", "empty_assistant", number=1, role="assistant")
        else:
            fields = row if "user" in self.columns else named(row)
            turns = _mapped_turns(row, fields, self.columns) if self.columns else row_turns(fields)
            for name in () if "user" in self.columns else fields.keys() & (*LABELS, *FLAGS):
                word = str(mark := fields[name]).strip().lower()
                if word in NEGATIVE:
                    raise RowError("row.label", "negative_label", name=name, found=repr(mark))
                if name in FLAGS and word not in (*POSITIVE, "", "none", "nan"):
                    self.unread[name] += 1  # a weight that is not used, or a loss once measured
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
