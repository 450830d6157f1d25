"""One row of anybody's instruction file -> one `Conversation` or one `Reject`; it knows nothing of
files, encodings or tokens.

Families are detected per row, never from the first row of a file. Whatever the row holds, nothing
raises for it: a row that is no conversation becomes a `Reject` with one of the fixed `REASONS` and
a detail that says what was found and what is expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

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
from cllm.messages import UserError, say

REASONS = tuple(
    "empty_user empty_assistant no_assistant empty_turn role_order unknown_role unknown_schema not_an_object "
    "parse_error decode_error invalid_text negative_label".split()
)
ROLES = {"system": "system", "observation": "tool", "tool": "tool", "function_call": "assistant"}
ROLES |= dict.fromkeys(("human", "user", "client", "usr", "用户"), "user")
ROLES |= dict.fromkeys(("gpt", "assistant", "bot", "counselor", "助手"), "assistant")
FOLLOWS = {  # what may come after what; several tools may answer one call
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool"),
}  # fmt: skip
NO_INPUT = frozenset(
    "无输入 <noinput> <无输入> （无输入） 没有输入 无需输入 不适用 N/A None 无".split()
)
TURN_KEYS = ("conversations", "messages", "conversation")
PAIRS = {  # question key -> answer keys
    "prompt": ("response", "completion"), "query": ("response",), "question": ("answer", "std_answer", "reference"),
    "input": ("target",), "content": ("summary",), "context": ("target",), "riddle": ("answer",), "ask": ("answer",),
}  # fmt: skip
CHINESE = {
    "指令": "instruction",
    "输入": "input",
    "輸入": "input",
    "输出": "output",
    "輸出": "output",
}
CHINESE |= {"问题": "question", "問題": "question", "回答": "answer"}
# one element of a list that is two turns
EXCHANGES = (("human", "assistant"), ("input", "output"), ("q", "a"))
COLUMN_KEYS = ("system", "user", "assistant", "history", "category")
SCHEMA_KEYS = frozenset(
    "instruction output chosen rejected chat instances paragraph text history system".split()
)
_ANSWERS = frozenset(
    ("output", "chosen", "chat", *TURN_KEYS, *(key for keys in PAIRS.values() for key in keys))
)
SCHEMA_KEYS |= {*PAIRS, *_ANSWERS, *CHINESE}
_SPECIAL = SCHEMA_KEYS | {"label", "tools"}  # whatever else a row has is metadata

_BARE = r"(?:(human|user|用户)|(assistant|bot|助手))[ \t]*[:：]"
# a dialogue inside one string is split by the style it begins with; line starts are believed before
# words
_TAGS = (
    re.compile(
        r"[<\[【](?:(human|user|用户|客户|患者)|(assistant|bot|助手|律师|医生))[>\]】][ \t]*[:：]?",
        re.I,
    ),
    re.compile(rf"^[ \t]*{_BARE}", re.I | re.M),
    re.compile(rf"(?:^|(?<=\s)){_BARE}", re.I),
)
_TAG_START = re.compile(r"\s*(?:[<\[【]|(?:human|user|用户)[ \t]*[:：])", re.I)
_MOSS_MARK = re.compile(r"<\|(?:Human|MOSS)\|>\s*[:：]?|<eo[hm]>")
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


class Message(NamedTuple):
    """One turn; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, plus where they came from.

    category: the row's own `task` / `category` / `class` string, for scores per category; tools:
    the tool list as JSON, verbatim.
    """

    messages: tuple[Message, ...]
    category: str = ""
    tools: str = ""
    file: str = ""
    line: int = 0

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


class Fault(NamedTuple):
    """What the reader hands on in place of a row that it could not read."""

    reason: str
    detail: str


Row = dict[str, Any]
Turns = list[tuple[str, str]]


def _dialogue(value: object) -> Turns | None:
    """The turns of `Human: … Assistant: …`, `<user>: … <bot>: …`, `[客户] … [律师] …` in a string or a
    flat list of strings, else None.
    """
    if isinstance(value, list) and value and all(isinstance(element, str) for element in value):
        value = "\n".join(value)
    if not isinstance(value, str) or not _TAG_START.match(value):
        return None
    text = clean(value)
    for pattern in _TAGS:
        marks = list(pattern.finditer(text)) if pattern.match(text) else []
        if marks and marks[0].group(1) and any(mark.group(2) for mark in marks):
            ends = [mark.start() for mark in marks[1:]] + [len(text)]
            roles = ["user" if mark.group(1) else "assistant" for mark in marks]
            return [
                (role, text[mark.end() : end])
                for role, mark, end in zip(roles, marks, ends, strict=True)
            ]
    return None


def _asked(text: str, answered: bool = True) -> Turns:
    """A prompt: usually one user turn; a dialogue typed into it (BELLE:
    `Human:…Assistant:…Human:…Assistant:`) is unfolded.
    """
    if turns := _dialogue(text):
        if turns[-1][0] == "assistant" and not clean(turns[-1][1]):
            turns.pop()
        if turns[-1][0] == "user" or not answered:
            return turns
    return [("user", text)]


def _exchange(ask: str, reply: str) -> Turns:
    asked = _asked(ask, bool(clean(reply)))
    return asked if asked[-1][0] == "assistant" else [*asked, ("assistant", reply)]


def _parts(parts: list[Any]) -> str:
    """OpenAI-style typed parts: texts and tool calls, one after another; reasoning is an inner
    thought and is dropped.
    """
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind in ("reasoning", "thinking"):
            continue
        if kind in ("text", "input_text", "output_text"):
            texts.append(text_of(part, "text"))
        elif isinstance(kind, str) and re.search("tool|function|observation", kind):
            texts.append(json_text(part.get("value", part.get("text", part))))
        else:
            raise RowError("invalid_text", say("row.part", kind=f"{kind!r:.30}"))
    return "\n".join(texts)


def _unboxed(value: Any) -> Any:
    """What lists of one element hold."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def is_turn(value: object) -> bool:
    """Whether `value` is a message with a role, and no row."""
    pairs = ({"role", "content"}, {"from", "value"})
    return (
        isinstance(value, dict)
        and "messages" not in value
        and any(value.keys() >= pair for pair in pairs)
    )


def _said(message: Row, role: str) -> str:
    """What a message with a role says: its content, and an assistant's tool calls verbatim."""
    key = "content" if "content" in message else "value"
    value, calls = message.get(key), message.get("tool_calls") or message.get("function_call")
    if isinstance(value, dict) and role in ("function_call", "tool", "observation"):
        text = json_text(value)
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        text = _parts(value)
    else:
        text = text_of(value, key)
    return (
        "\n".join(filter(None, (text, json_text(calls))))
        if calls and ROLES[role] == "assistant"
        else text
    )


def _turns(elements: object, name: str) -> Turns:
    """The turns of a list of role/content, from/value, exchanges, or messages without roles; or of
    tagged text.
    """
    if tagged := _dialogue(elements):
        return tagged
    if not isinstance(elements, list):
        raise RowError("unknown_schema", say("row.turns", name=name, found=f"{elements!r:.40}"))
    roles = {
        str(element.get("role", element.get("from")))
        for element in elements
        if isinstance(element, dict)
    }
    turns: Turns = []
    for number, element in enumerate(elements, 1):
        if not isinstance(element, dict):
            raise RowError(
                "unknown_schema", say("row.turn", number=number, found=f"{element!r:.30}")
            )
        if key := next((key for key in ("role", "from") if key in element), ""):
            role = str(element[key]).strip().lower()
            # CrossWOZ
            role = ("assistant" if "usr" in roles else "system") if role == "sys" else role
            if role not in ROLES:
                raise RowError(
                    "unknown_role",
                    say(
                        "row.role",
                        number=number,
                        found=f"{element[key]!r:.30}",
                        known=", ".join(ROLES),
                    ),
                )
            turns.append((ROLES[role], _said(element, role)))
        elif pair := next(
            (pair for pair in EXCHANGES if pair[0] in element or pair[1] in element), None
        ):
            told = [
                ("user", text_of(element.get(pair[0]), pair[0])),
                ("assistant", text_of(element.get(pair[1]), pair[1])),
            ]
            repeats = bool(turns) and turns[0] == (
                "system",
                clean(text_of(element.get("system"), "system")),
            )
            turns += told if repeats else _with_system(element.get("system"), told)
        elif "message" in element:  # no roles: speakers alternate, the first one asks
            turns.append(
                ("assistant" if number % 2 == 0 else "user", text_of(element["message"], "message"))
            )
        else:
            raise RowError(
                "unknown_schema",
                say("row.turn_keys", number=number, found=", ".join(map(str, element))),
            )
    return turns


def _with_system(value: object, turns: Turns) -> Turns:
    system = clean(text_of(value, "system"))
    repeated = turns[:1] in ([("system", system)], [("system", "")])
    return [("system", system), *turns[repeated:]] if system else turns


def _history(value: object) -> Turns:
    """`history`: a list of [question, answer] pairs, an empty list, or blank text; a CSV cell may
    hold the list as JSON.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError("unknown_schema", say("row.history", found=f"{value!r:.40}")) from None
    if not value or value != value or (isinstance(value, str) and not clean(value)):
        return []
    if isinstance(value, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value
    ):
        pairs = [(text_of(ask, "user"), text_of(reply, "assistant")) for ask, reply in value]
        return [turn for ask, reply in pairs for turn in (("user", ask), ("assistant", reply))]
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return _turns(value, "history")
    raise RowError("unknown_schema", say("row.history", found=f"{value!r:.40}"))


def _user_text(row: Mapping[str, Any]) -> str:
    """instruction + newline + input, or the one that is there."""
    return _with_input(*(clean(text_of(row.get(name), name)) for name in ("instruction", "input")))


def _with_input(ask: str, extra: str) -> str:
    if not extra or extra == ask or extra in NO_INPUT:
        return ask
    return f"{ask}\n{extra}" if ask else extra


def _alpaca(row: Row) -> Turns:
    asks, replies = row.get("input"), row.get("output")
    # parallel lists are turns
    if isinstance(asks, list) and isinstance(replies, list) and len(asks) > 1:
        asked = [("user", text_of(ask, "input")) for ask in asks]
        asked[0] = ("user", _user_text({**row, "input": asked[0][1]}))
        told = [("assistant", text_of(reply, "output")) for reply in replies]
        return [turn for both in zip_longest(asked, told) for turn in both if turn]
    while isinstance(replies, list):  # ranked alternatives: the best comes first
        replies = replies[0] if replies else None
    return _exchange(_user_text(row), text_of(replies, "output"))


def _chat(chat: Row) -> Turns:
    """MOSS: turns by the number in their key; only what was said aloud, without markup."""
    found = [
        (re.search(r"\d{1,9}", str(key)), turn)
        for key, turn in chat.items()
        if isinstance(turn, dict)
    ]
    turns = sorted(
        ((int(digits.group()), turn) for digits, turn in found if digits),
        key=lambda numbered: numbered[0],
    )
    said = [
        (role, text_of(turn.get(key), key))
        for _, turn in turns
        for role, key in (("user", "Human"), ("assistant", "MOSS"))
    ]
    return [(role, _MOSS_MARK.sub("", text)) for role, text in said]


def _instances(row: Row) -> Turns:
    """BELLE's seed tasks: the instruction with each instance's input."""
    if not all(isinstance(instance, dict) for instance in row["instances"]):
        raise RowError("unknown_schema", say("row.instances", found=f"{row['instances']!r:.40}"))
    asks = [
        {**instance, "input": _user_text({**row, "input": instance.get("input")})}
        for instance in row["instances"]
    ]
    return _turns(asks, "instances")


def _pair(row: Row, ask_key: str) -> Turns:
    replies = (text_of(row[key], key) for key in PAIRS[ask_key] if key in row)
    reply, ask = next((text for text in replies if clean(text)), ""), text_of(row[ask_key], ask_key)
    if ask_key == "ask" and clean(ask) in ("无", ""):
        ask = text_of(row.get("title"), "title")
    return _exchange(ask, reply)


def _preference(row: Row) -> Turns:
    """prompt + chosen; the rejected answer is not for instruction tuning."""
    chosen = _unboxed(row["chosen"])
    keys = [
        key
        for key in (*TURN_KEYS, "prompt", "query", "question", "riddle", "ask")
        if row.get(key) is not None
    ]
    if keys and isinstance(row[keys[0]], list):
        asked = _turns(row[keys[0]], keys[0])
    else:
        text = text_of(row[keys[0]], keys[0]) if keys else _user_text(row)
        asked = _asked(text) if text else []
    if isinstance(chosen, list):  # the whole dialogue again, or only its last turns
        told = _turns(chosen, "chosen")
        return told if told and told[0][0] != "assistant" else asked + told
    if not asked and (tagged := _dialogue(chosen)):
        return tagged
    return [*asked, ("assistant", text_of(chosen, "value"))]


def _recognized(row: Row) -> Turns | None:
    """The turns of a row by the first known schema it has; None if it has none."""
    if "chosen" in row:
        return _history(row.get("history")) + _preference(row)
    for key in (*TURN_KEYS, "chat", "paragraph"):
        value = row.get(key)
        if (isinstance(value, list) and value) or _dialogue(value):
            return _turns(value, key)
    if isinstance(row.get("chat"), dict):
        return _chat(row["chat"])
    if isinstance(row.get("instances"), list):
        return _instances(row)
    if "output" in row or ("instruction" in row and _ANSWERS.isdisjoint(row)):
        whole = _unboxed(row.get("instruction"))
        if (
            isinstance(whole, dict)
            and not _ANSWERS.isdisjoint(whole)
            and (turns := _recognized(whole)) is not None
        ):
            return _with_system(whole.get("system"), turns)
        return _history(row.get("history")) + _alpaca(row)
    if ask_key := next(
        (
            ask
            for ask, answers in PAIRS.items()
            if ask in row and not row.keys().isdisjoint(answers)
        ),
        "",
    ):
        return _history(row.get("history")) + _pair(row, ask_key)
    if any(key in row and not row[key] for key in TURN_KEYS):
        return []
    return next((turns for value in row.values() if (turns := _dialogue(value))), None)


def _names(row: Mapping[str, Any]) -> str:
    """A row's keys, for people; those of a file without header are whole texts."""
    return ", ".join(f"{name!r:.24}" for name in list(row)[:12]) or say("row.nothing")


def _row_turns(row: Row) -> Turns:
    if not CHINESE.keys().isdisjoint(row):
        row = {CHINESE.get(name, name): value for name, value in row.items()}
    if (turns := _recognized(row)) is None:
        raise RowError(
            "unknown_schema", say("row.text" if "text" in row else "row.schema", found=_names(row))
        )
    return _with_system(row.get("system"), turns)


def _mapped(row: Row, source: str) -> object:
    """The value of a mapped column: a name, an index into header-less cells, or a template such as
    "{Question}\\nA. {A}".
    """
    if source in row:
        return row[source]
    names = _PLACEHOLDER.findall(source)
    if absent := [name for name in names or [source] if name not in row]:
        raise RowError(
            "unknown_schema", say("row.columns", absent=", ".join(absent), found=_names(row))
        )
    filled = {name: clean(text_of(row[name], name)) for name in names}
    return (
        _PLACEHOLDER.sub(lambda match: filled[match.group(1)], source)
        if any(filled.values())
        else ""
    )


def _mapped_turns(row: Row, columns: Mapping[str, str]) -> Turns:
    if "user" in columns:
        ask, reply = (
            text_of(_mapped(row, columns[role]), columns[role]) for role in ("user", "assistant")
        )
        turns = _exchange(ask, reply)
    else:
        turns = _row_turns(row)
    if "history" in columns:
        turns = _history(_mapped(row, columns["history"])) + turns
    return _with_system(_mapped(row, columns["system"]), turns) if "system" in columns else turns


def _ordered(turns: Turns, rewrite: Callable[[str], str]) -> tuple[Message, ...]:
    """Cleaned messages in a trainable order: system?, user, assistant, … ; what follows the last
    answer is trimmed.
    """
    size = max((index for index, turn in enumerate(turns, 1) if turn[0] == "assistant"), default=0)
    if not size:
        raise RowError("no_assistant", say("row.no_answer", count=len(turns)))
    messages = [Message(role, rewrite(text)) for role, text in turns[:size]]
    if messages[0] == ("system", ""):
        del messages[0]
    before, spoken = "", sum(message.role != "system" for message in messages)
    for number, (role, content) in enumerate(messages, 1):
        if role not in (follows := FOLLOWS[before]):
            expected, before = " / ".join(follows), before or say("row.nothing")
            raise RowError(
                "role_order",
                say("row.order", number=number, role=role, before=before, expected=expected),
            )
        if not content:  # the row's own question or answer, or some turn of a dialogue
            own = role in ("user", "assistant") and (spoken == 2 or number >= len(messages) - 1)
            raise RowError(
                f"empty_{role}" if own else "empty_turn", say("row.empty", number=number, role=role)
            )
        before = role
    return tuple(messages)


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
        if kind == "chat" and ("user" in self.columns) != ("assistant" in self.columns):
            raise UserError(
                "data.columns_half", have="user" if "user" in self.columns else "assistant"
            )
        self.kind, self.rewrite = kind, rewriter(options)
        self.headless = bool(self.columns) and all(
            source.isdigit() for source in self.columns.values()
        )
        self._planned = lru_cache(1000)(self._plan)

    def __call__(self, row: object, file: str = "", line: int = 0) -> Conversation | Reject:
        """The conversation of `row`, or why there is none. Never raises for bad data."""
        try:
            if type(row) is dict and self.rewrite is clean and (messages := self._plain(row)):
                return Conversation(messages, self._category(row), "", file, line)
            if self.headless and isinstance(row, list):
                row = {str(index): cell for index, cell in enumerate(row)}
            row = _unboxed(row)
            if isinstance(row, list) and row and all(map(is_turn, row)):
                row = {"messages": row}
            if isinstance(row, Fault):
                raise RowError(*row)
            if not isinstance(row, dict):
                raise RowError("not_an_object", say("row.no_object", found=f"{row!r:.40}"))
            return self._conversation(row, file, line)
        except RowError as error:
            reason, detail = error.args
        except RecursionError:
            reason, detail = "invalid_text", say("row.nested")
        return Reject(file, line, reason, printable(detail))

    def _plain(self, row: Row) -> tuple[Message, ...] | None:
        """The short way for most rows there are, one clean question and answer: what
        `_conversation` gives, in a third of the time.
        """
        if not (plan := self._planned(tuple(row))):
            return None
        ask, reply = row[plan[0]], row[plan[1]]
        extra = row.get("input", "") if plan[0] == "instruction" else ""
        if not type(ask) is type(reply) is type(extra) is str:
            return None
        ask, reply = _with_input(clean(ask), clean(extra)), clean(reply)
        return (
            (Message("user", ask), Message("assistant", reply))
            if ask and reply and not _TAG_START.match(ask)
            else None
        )

    def _plan(self, keys: tuple[str, ...]) -> tuple[str, str] | None:
        """(question key, answer key) of rows that have these two and metadata only, else None."""
        special = _SPECIAL.intersection(keys)
        if self.columns or self.kind != "chat":
            return None
        if special - {"input"} == {"instruction", "output"}:
            return "instruction", "output"
        return next(
            (
                (q, a)
                for q, answers in PAIRS.items()
                for a in answers
                if q != "ask" and special == {q, a}
            ),
            None,
        )

    def _conversation(self, row: Row, file: str, line: int) -> Conversation:
        if self.kind == "text":
            source = self.columns.get("assistant", "text")
            turns = [("user", "-"), ("assistant", text_of(_mapped(row, source), source))]
            return Conversation(
                _ordered(turns, self.rewrite)[1:], self._category(row), "", file, line
            )
        turns = _mapped_turns(row, self.columns) if self.columns else _row_turns(row)
        label = row.get("label")
        if "user" not in self.columns and (
            label is False or (isinstance(label, str) and label.strip().lower() == "false")
        ):
            raise RowError("negative_label", say("row.label"))
        messages = _ordered(turns, self.rewrite)
        tools = json_text(row["tools"]) if row.get("tools") else ""
        clean(tools)  # raises for bytes and surrogates; the text stays as it is
        return Conversation(messages, self._category(row), tools, file, line)

    def _category(self, row: Row) -> str:
        if "category" in self.columns:
            return clean(text_of(_mapped(row, self.columns["category"]), "category"))
        texts = [row[key] for key in ("task", "category", "class") if isinstance(row.get(key), str)]
        return clean(texts[0]) if texts and not SURROGATE.search(texts[0]) else ""


def to_row(conversation: Conversation, kind: str = "chat") -> Row:
    """The JSON object that `Normalizer` reads back as the same conversation."""
    if kind == "text":
        row: Row = {"text": conversation.messages[0].content}
    else:
        row = {"messages": [message._asdict() for message in conversation.messages]}
    extra = {"category": conversation.category, "tools": conversation.tools}
    return row | {key: value for key, value in extra.items() if value}
