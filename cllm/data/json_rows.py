"""Text -> (line, row) from JSON Lines, a JSON array or objects; broken places become RowErrors.

Lines are read one by one. Arrays and objects are held as one text, from which values are cut one
after another: what comes before a broken place, and often what follows it, is saved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from cllm.data.encoding import split_lines
from cllm.data.fields import DECODER, Row, once
from cllm.data.text import RowError
from cllm.data.turns import SCHEMA_KEYS, TURN_KEYS, is_turn, unboxed
from cllm.messages import ESCAPED, say

NumberedRow = tuple[int, Any]
# keys, in any case, whose array holds the rows
WRAPPERS = frozenset(
    "data rows items examples samples entries records results list train validation valid dev"
    " test".split()
)
# what may surround a row; the last two end files of DOS and of cut disks
BLANK = " \t\r\n\ufeff\x00\x1a"
_SPACE = re.compile(r"[ \t\r\n]*")
_BLOCK_CHARS = 1 << 18


def whole(line: str) -> int:
    """1: `line` is JSON by itself; 0: it may be the first line of a longer document; -1: it is
    broken.
    """
    text = line.strip(BLANK)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return 0 if error.pos >= len(text) else -1
    except (ValueError, RecursionError):
        return -1
    return 1


def json_lines(pieces: Iterable[str]) -> Iterator[NumberedRow]:
    """A row a line; blank lines are skipped, bad ones are RowErrors one by one."""
    for number, line in enumerate(split_lines(pieces), 1):
        if not (bare := line.strip(BLANK)):
            continue
        try:
            value, end = DECODER.raw_decode(bare)
            if end < len(bare):
                raise json.JSONDecodeError("Extra data", bare, end)
        except (ValueError, RecursionError) as error:
            value = _fault(error, bare)
        yield number, value


def json_document(pieces: Iterable[str]) -> Iterator[NumberedRow]:
    """The rows of a JSON array, or of objects one after another: a wrapper, rows by key, columns,
    or one row each.
    """
    document = _Document("".join(pieces).lstrip("\ufeff"))
    opening = document.peek()
    yield from _joined(_array(document)) if opening == "[" else _object(document)
    while not document.broken and opening == "{" == document.peek():
        yield from _object(document)
    if not document.broken and document.peek():
        yield document.line, RowError("row.behind", "parse_error", found=document.ahead())


def _fault(error: Exception, text: str) -> RowError:
    """Why `text` is no JSON."""
    if ESCAPED.search(text):
        return RowError("row.bytes", "decode_error", found=f"{text:.40}")
    if isinstance(error, json.JSONDecodeError):
        near = repr(error.doc[max(0, error.pos - 15) : error.pos + 15])
        return RowError("row.json", "parse_error", detail=error.msg, column=error.colno, near=near)
    return RowError("row.value", "parse_error", detail=f"{error!s:.100}")


class _Document:
    """A text and the place up to which it is read; `broken` once nothing more can be understood."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.broken = False
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        """The number of the line where the next character stands."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def ahead(self) -> str:
        """What stands next, for people."""
        return repr(self.text[self.at : self.at + 30])

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        if (ahead := self.text[self.at : self.at + 1]) in " \t\r\n":
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            ahead = self.text[self.at : self.at + 1]
        return ahead

    def skip(self, character: str) -> bool:
        """Step over `character` if it is next."""
        if self.peek() != character:
            return False
        self.at += 1
        return True

    def value(self) -> Any:
        """The next JSON value. Raises ValueError or RecursionError and then stays where the value
        starts.
        """
        value, self.at = DECODER.raw_decode(self.text, self.at)
        return value

    def fault(self, error: Exception) -> RowError:
        """Why there is no value where the text is read up to."""
        return _fault(error, self.text[self.at : self.at + 200])

    def resume(self) -> bool:
        """After a broken element, go to the next line that opens an object at this one's
        indentation, if there is one.
        """
        indent = self.at - (self.text.rfind("\n", 0, self.at) + 1)
        opening = re.compile(rf"\n[ \t]{{{indent}}}(?=\{{)").search(self.text, self.at)
        if not opening:
            return False
        self.at = opening.start()
        if self.at > _BLOCK_CHARS:
            # A JSONDecodeError counts the lines from the beginning of its text: with many broken
            # elements, the time would grow with the square of the file's size.
            self._line, self._counted = self.line, 0
            self.text, self.at = self.text[self.at :], 0
        return True


def _joined(rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
    """`rows`, but an array of nothing except turns is one row: files of one conversation each
    (SMILE).
    """
    held: list[NumberedRow] = []
    for line, value in rows:
        if not is_turn(value):
            yield from (*held, (line, value))
            yield from rows
            return
        held.append((line, value))
    if held:
        yield held[0][0], [value for _, value in held]


def _array(document: _Document) -> Iterator[NumberedRow]:
    """The elements of an array, and a RowError where it breaks."""
    document.skip("[")
    number = 0
    while (ahead := document.peek()) != "]":
        if not ahead:
            document.broken = True
            yield document.line, RowError("row.cut", "parse_error", count=number)
            return
        number, line = number + 1, document.line
        try:
            yield line, document.value()
        except (ValueError, RecursionError) as error:
            reason, detail = document.fault(error).args
            yield line, RowError("row.element", reason, number=number, detail=detail)
            if document.resume():
                continue
            document.broken = True
            return
        if document.skip(","):
            if document.peek() == "]":
                yield document.line, RowError("row.comma", "parse_error", count=number)
        elif (following := document.peek()) not in ("]", ""):
            ahead = document.ahead()
            yield document.line, RowError("row.between", "parse_error", found=ahead, number=number)
            if following != "{":
                document.broken = True
                return
    document.skip("]")


def _object(document: _Document) -> Iterator[NumberedRow]:
    """One top-level object; a wrapper's array streams, other members are held until it is clear
    what they are.
    """
    held: list[tuple[str, NumberedRow]] = []
    start, wrapped, schema = document.line, False, False
    document.skip("{")
    while not document.skip("}"):
        try:
            key = document.value() if document.peek() == '"' else None
            if key is None or not document.skip(":"):
                raise ValueError(say("row.key", found=document.ahead()))
            schema |= key.lower() in SCHEMA_KEYS
            if document.peek() == "[" and key.lower() in WRAPPERS and not schema:
                wrapped = True
                yield from _joined(_array(document))
                if document.broken:
                    return
            else:
                held.append((key, (document.line, document.value())))
            if not document.skip(",") and document.peek() != "}":
                raise ValueError(say("row.member", found=document.ahead()))
        except (ValueError, RecursionError) as error:
            document.broken = True
            if _by_key(once(held)):
                yield from once(held).values()
            yield document.line, document.fault(error)
            return
    members = once(held)
    row = {key: value for key, (_, value) in members.items()}
    if not wrapped and (inner := _enclosed(row)):
        yield from ((start, part) for part in inner)
    elif _by_key(members):
        yield from members.values()
    elif not wrapped:
        yield from ((start, part) for part in _unstacked(row))


def _enclosed(row: Row) -> list[Any]:
    """The rows that an object of no known field has around it: its lists of objects, or those of
    the objects that it wraps; empty for any other object.
    """
    if not SCHEMA_KEYS.isdisjoint(map(str.lower, row)):
        return []
    lists = [
        value
        for value in row.values()
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value)
    ]
    wrapped = (value for key, value in row.items() if key.lower() in WRAPPERS)
    return list(chain(*lists)) or next(
        (inner for value in wrapped if isinstance(value, dict) and (inner := _enclosed(value))), []
    )


def _by_key(members: dict[str, NumberedRow]) -> bool:
    """Whether the values of an object are the rows: objects, or one-element lists of one, under
    keys that name no field.
    """
    return (
        bool(members)
        and SCHEMA_KEYS.isdisjoint(map(str.lower, members))
        and all(isinstance(unboxed(value), dict) for _, value in members.values())
    )


def _unstacked(row: dict[str, Any]) -> list[dict[str, Any]]:
    """{"instruction": […], "output": […], …} -> its rows; anything else is one row (input[] and
    output[] alone are turns).
    """
    sizes = {len(value) if isinstance(value, list) else -1 for value in row.values()}
    turns = any(
        value and not isinstance(value[0], list)
        for key in TURN_KEYS
        if isinstance(value := row.get(key), list)
    )
    if (
        len(sizes) != 1
        or -1 in sizes
        or turns
        or set(row) == {"input", "output"}
        or SCHEMA_KEYS.isdisjoint(map(str.lower, row))
    ):
        return [row]
    return [dict(zip(row, values, strict=True)) for values in zip(*row.values(), strict=True)]
