"""Text -> (line, row) from JSON Lines, one JSON array, or JSON objects, holding little more than
one row; broken places become Faults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from cllm.data.encoding import ESCAPED, split_lines
from cllm.data.schema import SCHEMA_KEYS, TURN_KEYS, Fault, is_turn
from cllm.messages import say

Row = tuple[int, Any]
MAX_VALUE_CHARS = 1 << 28  # a JSON value that does not end within this is broken
# keys whose array holds the rows
WRAPPERS = frozenset("data rows items examples train validation valid dev test".split())
# what may surround a row; the last two end files of DOS and of cut disks
BLANK = " \t\r\n\ufeff\x00\x1a"
# raw tabs and newlines inside strings are common, and harmless
_DECODER = json.JSONDecoder(strict=False)
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=\{)")


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


def json_lines(pieces: Iterable[str]) -> Iterator[Row]:
    """A row a line; blank lines are skipped, bad ones are Faults one by one."""
    for number, line in enumerate(split_lines(pieces), 1):
        if not (bare := line.strip(BLANK)):
            continue
        try:
            value, end = _DECODER.raw_decode(bare)
            if end < len(bare):
                _DECODER.decode(bare)  # says what stands behind the value
        except (ValueError, RecursionError) as error:
            value = _fault(error, bare)
        yield number, value


def json_document(pieces: Iterable[str]) -> Iterator[Row]:
    """The rows of a JSON array, or of objects one after another: a wrapper, rows by key, columns,
    or one row each.
    """
    source = _Source(pieces)
    opening = source.peek()
    yield from _joined(_array(source)) if opening == "[" else _object(source)
    while not source.broken and opening == "{" == source.peek():
        yield from _object(source)
    if not source.broken and source.peek():
        yield source.line, Fault("parse_error", say("row.behind", found=source.ahead()))


def _fault(error: Exception, text: str) -> Fault:
    """Why `text` is no JSON."""
    if ESCAPED.search(text):
        return Fault("decode_error", say("row.bytes", found=f"{text:.40}"))
    if isinstance(error, json.JSONDecodeError):
        near = error.doc[max(0, error.pos - 15) : error.pos + 15]
        return Fault(
            "parse_error", say("row.json", detail=error.msg, column=error.colno, near=repr(near))
        )
    return Fault("parse_error", say("row.value", detail=f"{error!s:.100}"))


class _Source:
    """JSON values pulled out of pieces of text; `broken` once nothing more can be understood."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self.broken = False
        self.pieces = iter(pieces)
        self.buffer, self.at = next(self.pieces, "").lstrip("\ufeff"), 0
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        """The number of the line where the next character stands."""
        self._line += self.buffer.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def ahead(self) -> str:
        return repr(self.buffer[self.at : self.at + 30])

    def more(self, wanted: int = 1) -> bool:
        """Append at least `wanted` characters if there are any; True if some came."""
        added: list[str] = []
        while wanted > 0 and (piece := next(self.pieces, "")):
            added.append(piece)
            wanted -= len(piece)
        self._line, self._counted = self.line, 0
        self.buffer, self.at = self.buffer[self.at :] + "".join(added), 0
        return bool(added)

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            self.at = _SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.buffer) or not self.more():
                return self.buffer[self.at : self.at + 1]

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
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                held = len(self.buffer) - self.at
                cut = error.pos > len(self.buffer) - 16 or error.msg.startswith("Unterminated")
                if cut and held < MAX_VALUE_CHARS and self.more(held):
                    continue
                raise
            if end == len(self.buffer) and not isinstance(value, (dict, list, str)) and self.more():
                continue  # a number may go on in the next piece
            self.at = end
            return value

    def resume(self) -> bool:
        """After a broken element, go to the next line that opens an object at this one's
        indentation, if there is one.
        """
        indent = self.at - (self.buffer.rfind("\n", 0, self.at) + 1)
        opening = re.compile(rf"\n(?=[ \t]{{{indent}}}\{{)")
        while True:
            if found := opening.search(self.buffer, self.at):
                self.at = found.end()
                return True
            self.at = max(self.at, len(self.buffer) - indent - 2)
            if not self.more():
                return False


def _joined(rows: Iterator[Row]) -> Iterator[Row]:
    """`rows`, but an array of nothing except turns is one row: files of one conversation each
    (SMILE).
    """
    held: list[Row] = []
    for line, value in rows:
        if not is_turn(value):
            yield from (*held, (line, value))
            yield from rows
            return
        held.append((line, value))
    if held:
        yield held[0][0], [value for _, value in held]


def _array(source: _Source) -> Iterator[Row]:
    """The elements of an array, and a Fault where it breaks."""
    source.skip("[")
    number = 0
    while not source.skip("]"):
        if not source.peek():
            source.broken = True
            yield source.line, Fault("parse_error", say("row.cut", count=number))
            return
        number, line = number + 1, source.line
        try:
            yield line, source.value()
        except (ValueError, RecursionError) as error:
            fault = _fault(error, source.buffer[source.at : source.at + 200])
            yield line, Fault(fault.reason, say("row.element", number=number, detail=fault.detail))
            if source.resume():
                continue
            source.broken = True
            return
        if between := _BETWEEN.match(source.buffer, source.at):
            source.at = between.end()
        elif source.skip(","):
            if source.peek() == "]":
                yield source.line, Fault("parse_error", say("row.comma", count=number))
        elif source.peek() not in ("]", ""):
            yield (
                source.line,
                Fault("parse_error", say("row.between", found=source.ahead(), number=number)),
            )
            if source.peek() != "{":
                source.broken = True
                return


def _object(source: _Source) -> Iterator[Row]:
    """One top-level object; a wrapper's array streams, other members are held until it is clear
    what they are.
    """
    members: dict[str, Row] = {}
    start, wrapped = source.line, False
    source.skip("{")
    while not source.skip("}"):
        try:
            key = source.value() if source.peek() == '"' else None
            if key is None or not source.skip(":"):
                raise ValueError(say("row.key", found=source.ahead()))
            if source.peek() == "[" and key in WRAPPERS and SCHEMA_KEYS.isdisjoint(members):
                wrapped = True
                yield from _joined(_array(source))
                if source.broken:
                    return
            else:
                members[key] = (source.line, source.value())
            if not source.skip(",") and source.peek() != "}":
                raise ValueError(say("row.member", found=source.ahead()))
        except (ValueError, RecursionError) as error:
            source.broken = True
            if _by_key(members):
                yield from members.values()
            yield source.line, _fault(error, source.buffer[source.at : source.at + 200])
            return
    if _by_key(members):
        yield from members.values()
    elif not wrapped:
        yield from (
            (start, row) for row in _unstacked({key: value for key, (_, value) in members.items()})
        )


def _by_key(members: dict[str, Row]) -> bool:
    """Whether the values of an object are the rows: objects, or one-element lists of one, under
    keys that name no field.
    """
    values = [
        value[0] if isinstance(value, list) and len(value) == 1 else value
        for _, value in members.values()
    ]
    return (
        bool(members)
        and SCHEMA_KEYS.isdisjoint(members)
        and all(isinstance(value, dict) for value in values)
    )


def _unstacked(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
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
        or SCHEMA_KEYS.isdisjoint(row)
    ):
        yield row
        return
    for values in zip(*row.values(), strict=True):
        yield dict(zip(row, values, strict=True))
