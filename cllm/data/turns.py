"""The turns of a row in any of the schemas that instruction files are written in: its messages in
order, as they stand there.

The schema is detected per row, never from the first row of a file. Raises RowError for a row that
has none, or turns that are no text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain, zip_longest
from operator import itemgetter
from typing import Any

from cllm.data.message import ROLES, THOUGHT_COLUMNS, Message, is_trained, joined, read_message
from cllm.data.text import RowError, clean, text_of
from cllm.messages import say

NO_INPUT = frozenset(
    "无输入 <noinput> <无输入> （无输入） 没有输入 无需输入 不适用 N/A None 无".split()
)
TURN_KEYS = ("conversations", "messages", "conversation")
PAIRS = {  # question key -> answer keys
    "prompt": ("response", "completion"),
    "query": ("response", "answers"),
    "question": ("answer", "std_answer", "reference"),
    "input": ("target",),
    "content": ("summary",),
    "context": ("target",),
    "riddle": ("answer",),
    "ask": ("answer",),
}
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
_ANSWERS = frozenset(("output", "chosen", "chat", *TURN_KEYS, *chain(*PAIRS.values())))
_OTHERS = "instruction rejected instances paragraph text history system".split()
SCHEMA_KEYS = _ANSWERS.union(PAIRS, CHINESE, _OTHERS)
# Whatever else a row has is metadata: a key that `_recognized` looks at must be among these.
SPECIAL_KEYS = SCHEMA_KEYS.union(("label", "tools"), THOUGHT_COLUMNS)

_BARE = r"(?:(human|user|用户)|(assistant|bot|助手)|(?-i:(FUNCTION RESPONSE)))[ \t]*[:：]"
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
TAG_START = re.compile(r"\s*(?:[<\[【]|(?:human|user|用户)[ \t]*[:：])", re.I)
_SPEAKERS = {1: "user", 2: "assistant", 3: "tool"}  # by the group of `_TAGS` that matched
_ENDED = re.compile(r"\s*<\|endoftext\|>\s*\Z")  # of glaive's answers
_MOSS_MARK = re.compile(r"<\|(?:Human|MOSS)\|>\s*[:：]?|<eo[hm]>")

Row = dict[str, Any]
Turns = list[Message]


def _dialogue(value: object) -> Turns | None:
    """The turns of `Human: … Assistant: …`, `<user>: … <bot>: …`, `[客户] … [律师] …`, glaive's
    `USER: … ASSISTANT: … FUNCTION RESPONSE: …` in a string or a flat list of strings, else None.
    """
    if isinstance(value, list) and all(isinstance(element, str) for element in value):
        value = "\n".join(value)
    if not isinstance(value, str) or not TAG_START.match(value):
        return None
    text = clean(value)
    for pattern in _TAGS:
        marks = list(pattern.finditer(text)) if pattern.match(text) else []
        if marks and marks[0].group(1) and any(mark.group(2) for mark in marks):
            ends = [mark.start() for mark in marks[1:]] + [len(text)]
            return [
                Message(_SPEAKERS[mark.lastindex or 1], _ENDED.sub("", text[mark.end() : end]))
                for mark, end in zip(marks, ends, strict=True)
            ]
    return None


def _asked(text: str, answered: bool = True) -> Turns:
    """A prompt: usually one user turn; a dialogue typed into it (BELLE:
    `Human:…Assistant:…Human:…Assistant:`) is unfolded.
    """
    if turns := _dialogue(text):
        if turns[-1].role == "assistant" and not clean(turns[-1].content):
            turns.pop()
        if turns[-1].role == "user" or not answered:
            return turns
    return [Message("user", text)]


def exchange(ask: str, reply: str) -> Turns:
    """A question, or the dialogue typed into it, and its answer."""
    asked = _asked(ask, bool(clean(reply)))
    return asked if asked[-1].role == "assistant" else [*asked, Message("assistant", reply)]


def unboxed(value: Any) -> Any:
    """What lists of one element hold."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def is_turn(value: object) -> bool:
    """Whether `value` is a message with a role, and no row."""
    return (
        isinstance(value, dict)
        and "messages" not in value
        and any(value.keys() >= pair for pair in ({"role", "content"}, {"from", "value"}))
    )


def _text(row: Mapping[str, Any], key: str) -> str:
    """The text of a field, "" where the row has none."""
    return text_of(row.get(key), key)


def _turns(elements: object, name: str) -> Turns:
    """The turns of a list of role/content, from/value, exchanges, or messages without roles; or of
    tagged text.
    """
    if tagged := _dialogue(elements):
        return tagged
    if not isinstance(elements, list):
        raise RowError("row.turns", "unknown_schema", name=name, found=f"{elements!r:.40}")
    turns: Turns = []
    for number, element in enumerate(elements, 1):
        if not isinstance(element, dict):
            raise RowError("row.turn", "unknown_schema", number=number, found=f"{element!r:.30}")
        if key := next((key for key in ("role", "from") if key in element), ""):
            role = str(element[key]).strip().lower()
            if role == "sys":  # CrossWOZ's assistant, where the user is "usr"
                others = (other for other in elements if isinstance(other, dict))
                assists = any("usr" in (other.get("role"), other.get("from")) for other in others)
                role = "assistant" if assists else "system"
            if role not in ROLES:
                known = ", ".join(ROLES)
                shown = f"{element[key]!r:.30}"
                raise RowError("row.role", "unknown_role", number=number, found=shown, known=known)
            said = read_message(role, element)
            if said[0].calls:
                joined(turns, said.pop(0))
            turns += said
        elif pair := next((pair for pair in EXCHANGES if not element.keys().isdisjoint(pair)), ()):
            reply = Message("assistant", _text(element, pair[1]), trained=is_trained(element))
            told = [Message("user", _text(element, pair[0])), reply]
            told = with_system(element.get("system"), told)
            repeated = told[0].role == "system" and turns[:1] == told[:1]
            turns += told[repeated:]
        elif "message" in element:  # no roles: speakers alternate, the first one asks
            speaker = "user" if number % 2 else "assistant"
            turns.append(Message(speaker, _text(element, "message")))
        else:
            names = ", ".join(map(str, element))
            raise RowError("row.turn_keys", "unknown_schema", number=number, found=names)
    return turns


def with_system(value: object, turns: Turns) -> Turns:
    """The turns behind a system turn of these words, unless they open with it already."""
    system = clean(text_of(value, "system")).removeprefix("SYSTEM: ")  # glaive's
    repeated = bool(turns) and turns[0].role == "system" and turns[0].content in ("", system)
    return [Message("system", system), *turns[repeated:]] if system else turns


def history_turns(value: object) -> Turns:
    """`history`: a list of [question, answer] pairs, an empty list, or blank text; a CSV cell may
    hold the list as JSON.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    if not value or value != value or (isinstance(value, str) and not clean(value)):
        return []
    if isinstance(value, list):
        if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
            said = (zip(("user", "assistant"), pair, strict=True) for pair in value)
            return [Message(role, text_of(text, role)) for role, text in chain(*said)]
        if all(isinstance(turn, dict) for turn in value):
            return _turns(value, "history")
    raise RowError("row.history", "unknown_schema", found=f"{value!r:.40}")


def _user_text(row: Mapping[str, Any]) -> str:
    """instruction + newline + input, or the one that is there."""
    return with_input(*(clean(_text(row, name)) for name in ("instruction", "input")))


def with_input(ask: str, extra: str) -> str:
    """The question and its input on the next line; words that say "no input" are none."""
    if not extra or extra == ask or extra in NO_INPUT:
        return ask
    return f"{ask}\n{extra}" if ask else extra


def _alpaca(row: Row) -> Turns:
    asks, replies = row.get("input"), row.get("output")
    # parallel lists are turns
    if isinstance(asks, list) and isinstance(replies, list) and len(asks) > 1:
        asks = [_user_text({**row, "input": asks[0]}), *asks[1:]]
        asked = [Message("user", text_of(ask, "input")) for ask in asks]
        told = [Message("assistant", text_of(reply, "output")) for reply in replies]
        return [turn for both in zip_longest(asked, told) for turn in both if turn]
    while isinstance(replies, list):  # ranked alternatives: the best comes first
        replies = replies[0] if replies else None
    return exchange(_user_text(row), text_of(replies, "output"))


def _chat(chat: Row) -> Turns:
    """MOSS: turns by the number in their key; only what was said aloud, without markup."""
    numbered = [
        (int(digits.group()), turn)
        for key, turn in chat.items()
        if isinstance(turn, dict) and (digits := re.search(r"\d{1,9}", str(key)))
    ]
    return [
        Message(role, _MOSS_MARK.sub("", _text(turn, key)))
        for _, turn in sorted(numbered, key=itemgetter(0))
        for role, key in (("user", "Human"), ("assistant", "MOSS"))
    ]


def _instances(row: Row) -> Turns:
    """BELLE's seed tasks: the instruction with each instance's input."""
    if not all(isinstance(instance, dict) for instance in row["instances"]):
        raise RowError("row.instances", "unknown_schema", found=f"{row['instances']!r:.40}")
    asks = [
        {**instance, "input": _user_text({**row, "input": instance.get("input")})}
        for instance in row["instances"]
    ]
    return _turns(asks, "instances")


def _pair(row: Row, ask_key: str) -> Turns:
    ask = _text(row, ask_key)
    if ask_key == "ask" and clean(ask) in ("无", ""):
        ask = _text(row, "title")
    replies = (_text(row, key) for key in PAIRS[ask_key])
    return exchange(ask, next(filter(clean, replies), ""))


def _preference(row: Row) -> Turns:
    """prompt + chosen; the rejected answer is not for instruction tuning."""
    chosen = unboxed(row["chosen"])
    keys = (*TURN_KEYS, "prompt", "query", "question", "riddle", "ask")
    key = next((key for key in keys if row.get(key) is not None), "")
    if isinstance(row.get(key), list):
        asked = _turns(row[key], key)
    else:
        text = _text(row, key) if key else _user_text(row)
        asked = _asked(text) if text else []
    if isinstance(chosen, list):  # the whole dialogue again, or only its last turns
        told = _turns(chosen, "chosen")
        return told if told and told[0].role != "assistant" else asked + told
    if not asked and (tagged := _dialogue(chosen)):
        return tagged
    return [*asked, Message("assistant", text_of(chosen, "value"))]


def _recognized(row: Row) -> Turns | None:
    """The turns of a row by the first known schema it has; None if it has none."""
    if "chosen" in row:
        return history_turns(row.get("history")) + _preference(row)
    for key in (*TURN_KEYS, "chat", "paragraph"):
        value = row.get(key)
        if (isinstance(value, list) and value) or _dialogue(value):
            return _turns(value, key)
    if isinstance(row.get("chat"), dict):
        return _chat(row["chat"])
    if isinstance(row.get("instances"), list):
        return _instances(row)
    if "output" in row or ("instruction" in row and _ANSWERS.isdisjoint(row)):
        whole = unboxed(row.get("instruction"))
        if (
            isinstance(whole, dict)
            and not _ANSWERS.isdisjoint(whole)
            and (turns := _recognized(whole)) is not None
        ):
            return with_system(whole.get("system"), turns)
        return history_turns(row.get("history")) + _alpaca(row)
    if ask_key := next(
        (
            ask
            for ask, answers in PAIRS.items()
            if ask in row and not row.keys().isdisjoint(answers)
        ),
        "",
    ):
        return history_turns(row.get("history")) + _pair(row, ask_key)
    if any(key in row and not row[key] for key in TURN_KEYS):
        return []
    return next((turns for value in row.values() if (turns := _dialogue(value))), None)


def key_names(row: Mapping[str, Any]) -> str:
    """A row's keys, for people; those of a file without header are whole texts."""
    return ", ".join(f"{name!r:.24}" for name in list(row)[:12]) or say("row.nothing")


def row_turns(row: Row) -> Turns:
    """The turns of a row by its Chinese or English keys. Raises RowError if no schema is known."""
    if not CHINESE.keys().isdisjoint(row):
        row = {CHINESE.get(name, name): value for name, value in row.items()}
    if (turns := _recognized(row)) is None:
        code = "row.text" if "text" in row else "row.schema"
        raise RowError(code, "unknown_schema", found=key_names(row))
    if turns and turns[-1].role == "assistant" and not row.keys().isdisjoint(THOUGHT_COLUMNS):
        thoughts = (text_of(row[name], name) for name in THOUGHT_COLUMNS if row.get(name))
        if thought := next(filter(clean, thoughts), ""):
            turns[-1] = turns[-1]._replace(reasoning=thought)
    return with_system(row.get("system"), turns)
