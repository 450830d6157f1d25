"""What the fields of a row are called, and what stands beside question and answer: options,
passages, pictures; which texts of a row nothing has read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain, count
from string import ascii_uppercase
from typing import Any

from cllm.data.text import RowError, clean, text_of

Row = dict[str, Any]
Rewrite = Callable[[str], str]
PASSAGES = "context contexts passage passages reference references document documents".split()
OPTIONS = ("options", "option", "choices")
NUMBERED = [f"option_{number}" for number in range(1, 10)]
_BESIDE = (*PASSAGES, *OPTIONS, "option_1", "A")
LETTERS = ascii_uppercase
LONG = 40  # characters of a text that is looked for as a whole, not word by word
MEDIA = frozenset(
    f"{noun}{plural}{tail}"
    for noun in ("image", "img", "picture", "photo", "video", "audio")
    for plural in ("", "s")
    for tail in ("", "_path", "_paths", "_url", "_urls", "_file", "_files", "_base64", "_bytes")
)
ALIASES = {
    "指令": "instruction",
    "输入": "input",
    "輸入": "input",
    "输出": "output",
    "輸出": "output",
    "问题": "question",
    "問題": "question",
    "回答": "answer",
    "答案": "answer",
    "选项": "options",
    "answerkey": "answer",
    "answer_key": "answer",
    "sys": "system",
    "system_prompt": "system",
    "systemprompt": "system",
    "system_message": "system",
    "meta_instruction": "system",
    "functions": "tools",
    "contents": "messages",
    "systeminstruction": "system",
    "system_instruction": "system",
}
_FORMS = ("op{}", "option{}", "option_{}", "choice{}", "choice_{}", "选项{}")
ALIASES |= {form.format(letter.lower()): letter for letter in LETTERS[:8] for form in _FORMS}
ALIASES |= {form.format(name[-1]): name for name in NUMBERED for form in _FORMS}
# a name, or the last word of one, that says where a row is from and not what it says
METADATA = frozenset(
    "id ids uuid uid guid idx index no number md5 hash source sources src_url dataset category"
    " categories task class type kind topic subject domain lang language split model model_name"
    " version date time timestamp created created_at updated_at url link file filename path license"
    " copyright tag tags score scores rating level difficulty length len tokens num turns count"
    " meta metadata meta_info role from 编号 序号 行号 来源 日期 时间 链接 网址".split()
)
# words of markup that is taken away, and of fields that say "nothing"
_UNSAID = frozenset(ALIASES).union(
    map(str, range(len(LETTERS))),  # the place of an option
    "human user assistant bot client gpt moss inner thoughts commands results eoh eom eot eoc eor"
    " system think tool_call tool_response functioncall function response endoftext name arguments"
    " none nan null n a noinput"
    " 用户 助手 客户 律师 患者 医生 无 无输入 没有输入 无需输入 不适用".split(),
)
_MARKED = re.compile(r"\(?([A-Z])[.、:：)）．]\s*")
# the last two are HTML's, too
PLACE = re.compile(
    r"<(?i:image)(?:_?\d+|Here)?>|<\|(?:image|vision|video|audio)_\w+\|>|<img>[^<]*</img>"
    r"|\A\s*<(?:video|audio)>"
)
# several words, or a sentence of Chinese
_PROSE = re.compile(r"[，。？！；]|\S\s+\S+\s+\S+\s+\S")
_WORD = re.compile(r"\w+")
_HAN = re.compile("[\u4e00-\u9fff]")


def once(pairs: list[tuple[str, Any]]) -> Row:
    """A row of these members. Of a name that is given twice the last counts, as for every reader
    of JSON; an earlier value that differs is kept as `name (1)`, so that it is said not to be read.
    """
    if len(row := dict(pairs)) == len(pairs):
        return row
    row = {}
    for name, value in pairs:
        if name in row and row[name] != value:
            row[next(n for i in count(1) if (n := f"{name} ({i})") not in row)] = row[name]
        row[name] = value
    return row


# raw tabs and newlines inside strings are common, and harmless
DECODER = json.JSONDecoder(strict=False, object_pairs_hook=once)


def unpacked(value: Any) -> Any:
    """The list or object that a text holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return DECODER.decode(value)
    return value


def refuse_media(row: Row, turns: Iterable[Any]) -> None:
    """Raises RowError for a row that shows pictures or plays sounds, in a field or at a place of
    what the user says in `turns`: a text model cannot learn from it.
    """
    for key in sorted(MEDIA.intersection(row)):
        if row[key] and row[key] == row[key]:
            raise RowError("row.media", "invalid_text", name=key)
    for turn in turns:
        if turn.role == "user" and "<" in turn.content and (place := PLACE.search(turn.content)):
            raise RowError("row.media", "invalid_text", name=place.group())


def with_fields(row: Row, ask: str, reply: Any, used: tuple[str, ...]) -> tuple[str, Any]:
    """(question, answer): the passage that the row has stands before the question, under a heading,
    its options behind it, one a line; an answer that names an option's column names its letter.
    """
    if not ask or row.keys().isdisjoint(_BESIDE):
        return ask, reply
    options = _options(row)
    labels = [label for label, _ in options]
    place = str(reply).strip() if type(reply) in (int, str) else ""
    if any(labels) and place.isdecimal() and place not in chain(*options):  # MMLU counts from 0
        if int(place) >= len(options):
            raise RowError("row.option", "invalid_text", found=place, last=len(options) - 1)
        reply = labels[int(place)]
    elif isinstance(reply, str) and ALIASES.get(reply.strip().lower()) in labels:
        reply = ALIASES[reply.strip().lower()]
    held = all(
        text in ask
        and re.search(rf"{re.escape(label)}\W*" * (reply in labels) + re.escape(text), ask)
        for label, text in options
    )
    if not held:
        lines = [f"{label}. {text}" if label else text for label, text in options]
        ask = "\n".join((ask, *lines))
    for key in PASSAGES:
        passage = _passage(row[key]) if key in row and key not in used else ""
        if passage and passage not in ask:
            heading = "参考资料：" if _HAN.search(passage) else "Reference:"
            ask = f"{heading}\n{passage}\n\n{ask}"
    return ask, reply


def _passage(value: Any) -> str:
    """The text of a passage; of several, numbered as answers cite them; an address is none."""
    if isinstance(value, list):
        texts = filter(None, (" ".join(_texts(part)) for part in value))
        return "\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))
    text = clean(" ".join(_texts(value)))
    return "" if re.match(r"https?://\S*\Z", text) else text


def _options(row: Row) -> list[tuple[str, str]]:
    """(letter, text) of the options that a row has, in columns of their own or in one."""
    numbered = {name[-1]: row[name] for name in NUMBERED if name in row}
    value = unpacked(next((row[key] for key in OPTIONS if row.get(key)), numbered))
    if "A" in row and "B" in row:
        value = {letter: row[letter] for letter in LETTERS if letter in row}
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # ARC, CommonsenseQA
        labels = value.get("label") or list(LETTERS)
        value = dict(zip(map(str, labels), value["text"], strict=False))
    if isinstance(value, dict):
        pairs = [(ALIASES.get(str(key).lower(), str(key)), text) for key, text in value.items()]
    elif isinstance(value, list):
        texts = (". ".join(_texts(part)) if isinstance(part, dict) else part for part in value)
        pairs = list(zip(LETTERS, texts, strict=False))
    else:
        pairs = [("", value)]
    options = []
    for label, option in pairs:
        text = clean(text_of(option, label))
        if (mark := _MARKED.match(text)) and mark[1] == label:
            text = text[mark.end() :]
        options += [(label, text)] if text else []
    return options


def _texts(value: Any) -> Iterator[str]:
    """Every text in `value`, at any depth, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str) and value.strip():
        yield value


def holds_text(value: Any, prose: bool = False) -> bool:
    """Whether `value` is a text with something in it, or holds one; `prose`: one that is longer
    than what says where a row is from.
    """
    if isinstance(value, str) and (len(value) <= LONG if prose else value.strip()):
        return not prose
    return any(not prose or (len(text) > LONG and _PROSE.search(text)) for text in _texts(value))


def is_metadata(name: str) -> bool:
    """Whether a field of this name says where a row is from, or nothing at all."""
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower())
    return not METADATA.isdisjoint((name.lower(), words[-1])) or words[0] in ("", "unnamed")


@lru_cache(10_000)
def with_kinds(keys: tuple[Any, ...], name: str = "") -> list[tuple[Any, str, bool]]:
    """(key, what it is called inside the field `name`, whether it is metadata)."""
    dotted = name and name.partition(".")[0] + "."
    return [(key, f"{dotted}{key}", is_metadata(str(key))) for key in keys]


def unread(row: Row, messages: Sequence[Any], tools: str, rewrite: Rewrite) -> set[str]:
    """The names of the fields, `outer.inner` for one inside another, that hold a word that no
    message and no tool has: what was not read of the row.
    """
    names: set[str] = set()
    read: set[str] = set()
    contents = [message.content for message in messages]
    parts = [f"{m.reasoning}{m.calls}" for m in messages if m.reasoning or m.calls]
    said = "\n".join([*contents, tools, *parts])

    def look(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner_name, metadata in with_kinds(tuple(value), name):
                inner = value[key]
                if metadata and not holds_text(inner, prose=True):
                    continue
                if type(inner) is not str:
                    look(inner, inner_name)
                elif inner_name not in names and inner not in said:
                    judge(inner, inner_name)
        elif isinstance(value, (list, tuple)):
            for part in value:
                look(part, name)
        elif isinstance(value, str) and name not in names and value not in said:
            judge(value, name)

    def judge(text: str, name: str) -> None:
        if (inner := unpacked(text)) is not text:
            look(inner, name)
        if inner is not text or text in read:
            return
        rest = text
        for content in contents:
            if LONG < len(content) <= len(rest):
                rest = rest.replace(content, " ")
        with suppress(RowError):
            rest = rewrite(rest)
        words = (word.group() for word in _WORD.finditer(rest))
        if any(word.lower() not in _UNSAID and word not in said for word in words):
            names.add(name)
        else:
            read.add(text)

    look(row, "")
    return names
