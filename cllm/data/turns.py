"""The turns of a row in any of the schemas that instruction files are written in: its messages in
order, as they stand there.

The schema is detected per row, never from the first row of a file. Raises RowError for a row that
has none, or turns that are no text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain, zip_longest
from operator import itemgetter
from typing import Any

from cllm.data.fields import (
    ALIASES,
    LETTERS,
    MEDIA,
    NUMBERED,
    OPTIONS,
    PASSAGES,
    Row,
    holds_text,
    refuse_media,
    unpacked,
    with_fields,
)
from cllm.data.message import (
    FLAGS,
    ROLES,
    THOUGHT_COLUMNS,
    Message,
    is_trained,
    joined,
    read_message,
)
from cllm.data.text import RowError, clean, text_of
from cllm.messages import say

NO_INPUT = frozenset(
    "无输入 <noinput> <无输入> （无输入） 没有输入 无需输入 不适用 N/A None 无".split()
)
TURN_KEYS = ("conversations", "messages", "conversation")
LABELS = ("label", "kto_tag")
PAIRS = {  # question key -> answer keys
    "prompt": ("response", "completion"),
    "query": ("response", "answers"),
    "question": ("answer", "response", "std_answer", "reference"),
    "input": ("target",),
    "content": ("summary",),
    "context": ("target",),
    "riddle": ("answer",),
    "ask": ("answer",),
    "user": ("assistant", "bot"),
    "human": ("assistant", "gpt", "bot"),
    "q": ("a",),
}
# one element of a list that is two turns
SPOKEN = (("role", "content"), ("from", "value"), ("role", "parts"))  # the last is Gemini's
EXCHANGES = (("human", "assistant"), ("input", "output"), ("q", "a"))
_ANSWERS = frozenset(("output", "chosen", "chat", *TURN_KEYS, *chain(*PAIRS.values())))
_OTHERS = "instruction rejected instances paragraph text history system".split()
SCHEMA_KEYS = _ANSWERS.union(PAIRS, _OTHERS)
# Whatever else a row has is not read: a key that `_recognized` looks at must be among these.
SPECIAL_KEYS = SCHEMA_KEYS.union(
    ("tools",), LABELS, FLAGS, OPTIONS, NUMBERED, PASSAGES, MEDIA, LETTERS, THOUGHT_COLUMNS
)

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
# one tag before, or a pair of them round, a whole question or answer
_ONE_TAG = {
    role: re.compile(
        rf"\s*(?:<({words})>[ \t]*[:：]?|[\[【](?:{words})[\]】][ \t]*[:：])(.*?)(?:</\1>\s*)?\Z",
        re.I | re.S,
    )
    for role, words in (("user", "human|user|用户"), ("assistant", "assistant|bot|助手"))
}
TAG_START = re.compile(r"\s*(?:[<\[【]|(?:human|user|用户)[ \t]*[:：])", re.I)
_SPEAKERS = {1: "user", 2: "assistant", 3: "tool"}  # by the group of `_TAGS` that matched
_ENDED = re.compile(r"\s*<\|endoftext\|>\s*\Z")  # of glaive's answers
_MOSS_MARK = re.compile(r"<\|(?:Human|MOSS)\|>\s*[:：]?|<eo[hm]>")

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
    return [_untagged("user", text)]


def _untagged(role: str, text: str) -> Message:
    """A message without the one tag that says whose it is."""
    tag = _ONE_TAG[role].match(text)
    return Message(role, tag[2] if tag and not _TAGS[0].search(tag[2]) else text)


def exchange(ask: str, reply: str) -> Turns:
    """A question, or the dialogue typed into it, and its answer."""
    asked = _asked(ask, bool(clean(reply)))
    return asked if asked[-1].role == "assistant" else [*asked, _untagged("assistant", reply)]


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
        and any(value.keys() >= {*pair} for pair in SPOKEN)
    )


def _messages(value: Any, name: str) -> Turns:
    """The turns of a list of messages with roles, or of one message, wherever it stands and be it
    as JSON text; none for anything else.
    """
    value = unpacked(value)
    listed = [value] if isinstance(value, dict) else value
    spoken = isinstance(listed, list) and listed and all(map(is_turn, listed))
    return _turns(listed, name) if spoken else []


def _answered(row: Row, ask_key: str, ask: Any, reply_key: str, reply: Any) -> Turns:
    """A question and its answer, texts or messages. An answer whose messages begin with another
    role is the whole dialogue again.
    """
    asked, told = _messages(ask, ask_key), _messages(reply, reply_key)
    if not asked:
        text, reply = with_fields(row, text_of(ask, ask_key), reply, (ask_key, reply_key))
        if not told:
            return exchange(text, text_of(reply, reply_key))
        asked = _asked(text) if clean(text) else []
    told = told or [Message("assistant", text_of(reply, reply_key))]
    return told if told[0].role != "assistant" else asked + told


def _framed(row: Row, turns: Turns) -> Turns:
    """The turns with the passage and the options of the row at their question, if it is one."""
    asked = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if len(asked) == 1:
        text, _ = with_fields(row, turns[asked[0]].content, clean(turns[-1].content), ())
        turns[asked[0]] = turns[asked[0]]._replace(content=text)
    return turns


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
        if (key := "role" if "role" in element else "from") in element:
            role = str(element[key]).strip().lower().replace("-", "_")
            refuse_media(element, ())
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
        elif "message" in element:  # no roles: speakers alternate, the first one asks
            speaker = "user" if number % 2 else "assistant"
            turns.append(Message(speaker, _text(element, "message")))
        elif (told := _exchanged(element)) is not None:
            told = with_system(element.get("system"), told)
            repeated = told[:1] == turns[:1] and told and told[0].role == "system"
            turns += told[1:] if repeated else told
        elif (
            lower := {str(key).strip().lower(): part for key, part in element.items()}
        ) != element:
            turns += _turns([lower], name)
        else:
            names = ", ".join(map(str, element))
            raise RowError("row.turn_keys", "unknown_schema", number=number, found=names)
    return turns


def _exchanged(element: Row) -> Turns | None:
    """The turns of an element without a role: of any names that a row may have, or one side."""
    pairs = [pair for pair in EXCHANGES if not element.keys().isdisjoint(pair)]
    both = pairs and element.keys() >= {*pairs[0]} and "instruction" not in element
    told = None if both else _recognized(named(element))
    if told is None and pairs:
        roles = zip(("user", "assistant"), pairs[0], strict=True)
        told = [Message(role, _text(element, key)) for role, key in roles]
    if told and not is_trained(element):
        told = [turn._replace(trained=turn.role != "assistant") for turn in told]
    return told


def with_system(value: object, turns: Turns) -> Turns:
    """The turns behind a system turn of these words, unless they open with it already."""
    system = clean(text_of(value, "system")).removeprefix("SYSTEM: ")  # glaive's
    repeated = bool(turns) and turns[0].role == "system" and turns[0].content in ("", system)
    return [Message("system", system), *turns[repeated:]] if system else turns


def history_turns(value: object) -> Turns:
    """`history`: a list of [question, answer] pairs or of objects that say both, tagged text,
    or nothing; a CSV cell may hold the list as JSON.
    """
    value = unpacked(value)
    value = [value] if value and isinstance(value, dict) else value
    if not value or value != value:
        return []
    if isinstance(value, str) and clean(value) in ("", "null", *NO_INPUT):
        return []
    if not isinstance(value, list):
        return _turns(value, "history")
    parts: list[Any] = []
    said = len(value) > 1 and all(
        isinstance(p, list) and len(p) == 2 and p[0] in [*ROLES] for p in value
    )
    for part in value:
        if not isinstance(part, (list, tuple)) or len(part) != 2:
            parts.append(part)
        elif all(map(is_turn, part)):
            parts += part
        else:
            names = ("role", "content") if said else EXCHANGES[0]
            parts.append(dict(zip(names, part, strict=True)))
    return _turns(parts, "history")


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
    if (
        isinstance(asks, list)
        and isinstance(replies, list)
        and len(asks) > 1
        and not any(map(is_turn, asks))
    ):
        asks = [_user_text({**row, "input": asks[0]}), *asks[1:]]
        asked = [Message("user", text_of(ask, "input")) for ask in asks]
        told = [Message("assistant", text_of(reply, "output")) for reply in replies]
        return [turn for both in zip_longest(asked, told) for turn in both if turn]
    while isinstance(replies, list) and not any(map(is_turn, replies)):
        replies = replies[0] if replies else None  # ranked alternatives: the best comes first
    key = "input" if not row.get("instruction") else "instruction"
    ask = row[key] if _messages(row.get(key), key) else _user_text(row)
    return _answered(row, key, ask, "output", replies)


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
    ask = row[ask_key]
    if ask_key == "ask" and clean(_text(row, ask_key)) in ("无", ""):
        ask = row.get("title")
    if "instruction" in row and not _messages(ask, ask_key):
        ask = with_input(clean(_text(row, "instruction")), clean(text_of(ask, ask_key)))
    for key in PAIRS[ask_key]:
        reply = row.get(key)
        if holds_text(reply) or (isinstance(reply, (int, float)) and reply == reply):
            break
    return _answered(row, ask_key, ask, key, reply)


def _preference(row: Row) -> Turns:
    """prompt + chosen; the rejected answer is not for instruction tuning."""
    chosen = unboxed(row["chosen"])
    keys = (*TURN_KEYS, "prompt", "query", "question", "riddle", "ask")
    key = next((key for key in keys if row.get(key) is not None), "")
    ask = row.get(key)
    asked = _turns(ask, key) if isinstance(ask, list) else _messages(ask, key)
    if not asked:
        text = _text(row, key) if key else _user_text(row)
        text, _ = with_fields(row, text, "", (key, "chosen"))
        asked = _asked(text) if text else []
    # the whole dialogue again, or only its last turns
    told = _turns(chosen, "chosen") if isinstance(chosen, list) else _messages(chosen, "chosen")
    if told:
        return told if told[0].role != "assistant" else asked + told
    if not asked and (tagged := _dialogue(chosen)):
        return tagged
    return [*asked, Message("assistant", text_of(chosen, "value"))]


def _recognized(row: Row) -> Turns | None:
    """The turns of a row by the first known schema it has; None if it has none."""
    if "chosen" in row:
        return history_turns(row.get("history")) + _preference(row)
    for key in (*TURN_KEYS, "chat", "paragraph"):
        if key not in row:
            continue
        value = unpacked(row[key])
        if (isinstance(value, list) and value) or _dialogue(value):
            return _framed(row, _turns(value, key))
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
    read = (_messages(value, key) or _dialogue(value) for key, value in row.items())
    return next(filter(None, read), None)


def key_names(row: Mapping[str, Any]) -> str:
    """A row's keys, for people; those of a file without header are whole texts."""
    return ", ".join(f"{name!r:.24}" for name in list(row)[:12]) or say("row.nothing")


@lru_cache(1000)
def known_names(keys: tuple[Any, ...]) -> tuple[dict[Any, str], bool]:
    """(key -> the name that is known here, for those written otherwise: in Chinese, in capitals,
    under an alias; whether one is of a schema).
    """
    names: dict[Any, str] = {}
    for key in keys:
        folded = re.sub(r"[\s-]+", "_", str(key).strip().lower())
        name = ALIASES.get(folded, folded)
        # the letters of options are no "Q" and "A"
        letter = len(folded) == 1 and ("B" in keys or "Q" not in keys)
        if name in SPECIAL_KEYS and name != key and not letter:
            names[key] = name
    return names, bool(SCHEMA_KEYS.intersection((*keys, *names.values())) - {"text"})


def named(row: Row) -> Row:
    """The row under the names that are known here. One of no known schema that has a row around it,
    or as JSON text in a cell (CSV), is that row.
    """
    names, known = known_names(tuple(row))
    row = {**row} if names else row
    for key, name in names.items():
        if not row.get(name):
            row[name] = row.pop(key)
    for key, value in () if known else row.items():
        inner = unboxed(unpacked(value))
        if isinstance(inner, dict) and known_names(tuple(inner := named(inner)))[1]:
            return {name: other for name, other in row.items() if name != key} | inner
    return row


def row_turns(row: Row) -> Turns:
    """The turns of a `named` row. Raises RowError for no known schema, and for pictures."""
    if (turns := _recognized(row)) is None:
        code = "row.text" if "text" in row else "row.schema"
        raise RowError(code, "unknown_schema", found=key_names(row))
    refuse_media(row, turns)
    if turns and turns[-1].role == "assistant" and not row.keys().isdisjoint(THOUGHT_COLUMNS):
        thoughts = (text_of(row[name], name) for name in THOUGHT_COLUMNS if row.get(name))
        if thought := next(filter(clean, thoughts), ""):
            turns[-1] = turns[-1]._replace(reasoning=thought)
    return with_system(row.get("system"), turns)
