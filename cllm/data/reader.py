"""Files of any encoding and container -> conversations and rejects with file:line, streaming; what
a row means is `schema`'s business.

The content, not the extension, decides between JSON Lines, a JSON array, a JSON object and a table.
"""

from __future__ import annotations

import csv
import gc
import gzip
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from cllm.data.encoding import Bytes, decoded, sniff_encoding, split_lines
from cllm.data.fields import once
from cllm.data.json_rows import BLANK, NumberedRow, json_document, json_lines, whole
from cllm.data.pairs import PairNormalizer, pair_row
from cllm.data.schema import Conversation, Normalizer, Reject, to_row
from cllm.data.text import VERBATIM, RowError, TextOptions, printable
from cllm.data.turns import SCHEMA_KEYS
from cllm.messages import UserError, file_name, note, say, to_json

Unread: TypeAlias = dict[str, dict[str, int]]
"""File -> name of a field that nobody has read -> rows where it held text."""
SUFFIXES = frozenset(("", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".gz"))
HEAD_BYTES = 1 << 18  # what the encoding is judged by
HEAD_CHARS = 1 << 16  # what the container is judged by
BINARY = {  # first bytes -> what such a file is
    b"PAR1\x15": "parquet",
    b"PK\x03\x04": "zip",
    b"ARROW1": "arrow",
    b"\xd0\xcf\x11\xe0": "excel",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh9": "bzip2",
}
DELIMITERS = ",\t;"
_BACKSLASH = re.compile(r'(?<!\\)(?:\\\\)*\\(?![\\"\n])')  # alone: it escapes nothing
MAX_NAMES = 100  # of fields that were not read, per file
MAX_RECORD_LINES = 1000  # lines that one quoted CSV record may span


def iter_conversations(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    kind: str = "chat",
    options: TextOptions = VERBATIM,
    unread: Unread | None = None,
) -> Iterator[Conversation | Reject]:
    """Every row of the file or directory `path`, as a Conversation or a Reject, in constant
    memory; of a JSON array or object, with its text.

    columns: user, assistant, rejected, system, history, category -> a column's name, its index
    where there is no header ("0"), or a template ("{Question}\\nA. {A}"); None detects the schema
    of each row.
    kind: "chat", "text" for {"text": …} pre-training rows, or "pairs" of preference; unread: where
    fields that held text and were not read are counted, per file. Raises UserError for a missing or
    unreadable file and for a wrong mapping, when the first row is asked for; never for bad data.
    """
    normalize = (PairNormalizer if kind == "pairs" else Normalizer)(columns, kind, options)
    for file in list_files(path):
        name = file_name(file)
        count = before = 0
        for count, (line, row) in enumerate(_rows(file, normalize), 1):
            item = normalize(row, name, line)
            # many rows on one line: the line alone does not find it
            if line == before and isinstance(item, Reject):
                item = item._replace(detail=say("row.number", number=count, detail=item.detail))
            before = line
            yield item
        if unread is not None and normalize.unread:
            common = normalize.unread.most_common(MAX_NAMES)
            unread[name] = {f"{printable(field):.40}": count for field, count in common}
        normalize.unread.clear()
        if not count:
            note("data.no_rows", file=name)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: for millions of small objects and no cycles it would take a
    quarter of the time and find nothing.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@uncollected()
def read_conversations(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    kind: str = "chat",
    options: TextOptions = VERBATIM,
    unread: Unread | None = None,
) -> tuple[list[Conversation], list[Reject]]:
    """`iter_conversations`, collected: (conversations, rejects); their lengths sum to the number of
    rows.
    """
    conversations: list[Conversation] = []
    rejects: list[Reject] = []
    for item in iter_conversations(path, columns, kind, options, unread):
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            conversations.append(item)
    return conversations, rejects


def write_conversations(
    conversations: Iterable[Conversation], path: str | Path, kind: str = "chat"
) -> int:
    """Write JSON Lines that read back as the same conversations; returns how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8", newline="\n") as stream:
        for conversation in conversations:
            row = pair_row(conversation) if kind == "pairs" else to_row(conversation, kind)
            stream.write(to_json(row) + "\n")
            count += 1
    return count


def sample_rows(path: str | Path, count: int) -> list[dict[str, Any]]:
    """The first `count` rows with names as they stand in the file, for guessing what those mean;
    what there is to say of the file, the reading of all its rows says.
    """
    rows = (row for file in list_files(path) for _, row in _rows(file, Normalizer()))
    with redirect_stderr(StringIO()):
        return list(islice((row for row in rows if isinstance(row, dict)), count))


def list_files(path: str | Path) -> list[Path]:
    """`path` itself, or the data files of the directory `path`, sorted. Raises UserError if there
    is none.
    """
    path = _on_disk(Path(path))
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES and file.is_file() and file.name[0] != "."
        )
        if not files:
            raise UserError("data.empty_directory", path=file_name(path))
        return files
    if not path.is_file():  # nor a pipe, which could be waited for without end
        raise UserError("data.missing_file", path=path, directory=path.absolute().parent)
    return [path]


def _on_disk(path: Path) -> Path:
    """`path`, or what is there under a name that is no UTF-8 and reads so (`file_name`)."""
    if path.exists() or path == path.parent:
        return path
    folder = _on_disk(path.parent)
    entries = folder.iterdir() if folder.is_dir() else ()
    return next((entry for entry in entries if file_name(entry.name) == path.name), path)


class _Gzip(gzip.GzipFile):
    """A gzip file that ends where it breaks, and then says why in `fault`."""

    fault = ""

    def read1(self, size: int = -1) -> bytes:
        try:
            return super().read1(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.fault = str(error)
            return b""


def _rows(file: Path, normalize: Normalizer) -> Iterator[NumberedRow]:
    """(line, row or RowError) of one file, of whatever format."""
    line = 0
    try:
        with file.open("rb") as raw:
            stream: Bytes = _Gzip(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            head = b""
            while len(head) < HEAD_BYTES and (piece := stream.read1(HEAD_BYTES)):
                head += piece
            binary = next((what for magic, what in BINARY.items() if head.startswith(magic)), "")
            rows = (
                _binary(head, stream, binary)
                if binary
                else _text_rows(file, head, stream, normalize)
            )
            for line, row in rows:
                yield line, row
            if isinstance(stream, _Gzip) and stream.fault:
                yield line + 1, RowError("row.gzip", "decode_error", detail=stream.fault)
    except OSError as error:
        raise UserError("data.unreadable_file", path=file_name(file), cause=error) from error


def _binary(head: bytes, stream: Bytes, kind: str) -> Iterator[NumberedRow]:
    """The rows of a Parquet file if pyarrow is here; else what to do about the file."""
    what = say(f"row.file.{kind}")
    if kind == "parquet" and find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet

        try:
            content = b"".join((head, *iter(lambda: stream.read1(HEAD_BYTES), b"")))
            table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
            yield from enumerate((row for b in table.iter_batches() for row in b.to_pylist()), 1)
            return
        except (pyarrow.ArrowException, OSError) as error:
            what = say("row.file.broken", detail=f"{error!s:.200}")
    yield 1, RowError("row.binary", "parse_error", what=what)


def _text_rows(
    file: Path, head: bytes, stream: Bytes, normalize: Normalizer
) -> Iterator[NumberedRow]:
    encoding = sniff_encoding(head)
    if encoding != "utf-8":
        note("data.encoding", file=file_name(file), encoding=encoding)
    pieces = decoded(head, stream, encoding)
    start = ""
    while len(start.strip(BLANK)) < HEAD_CHARS and (piece := next(pieces, None)) is not None:
        start += piece
    texts = chain((start,), pieces)
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    shape = _shape(start, suffixes[-1] if suffixes else "")
    if shape == "table":
        return _table(split_lines(texts), start, normalize)
    return json_lines(texts) if shape == "lines" else json_document(texts)


def _shape(start: str, suffix: str) -> str:
    """lines | document | table: what the beginning of a file looks like."""
    lines = [line for line in start.split("\n")[:60] if line.strip(BLANK)][:30]
    # unindented, complete
    objects = sum(
        line.lstrip("\ufeff")[:1] in ("{", "[") and whole(line) == 1 for line in lines[1:]
    )
    opening = start.lstrip(BLANK)[:1]
    if opening == "[":
        return "lines" if objects > (whole(lines[0]) == 0) else "document"
    if opening == "{":
        return "lines" if len(lines) > 1 and (whole(lines[0]) or objects > 1) else "document"
    if not lines or objects or suffix in (".json", ".jsonl", ".ndjson"):
        return "lines"
    cells = suffix in (".csv", ".tsv") or any(mark in lines[0] for mark in DELIMITERS)
    return "table" if cells else "lines"


# --- tables


class _Dialect(NamedTuple):
    """How the records of a table are written."""

    delimiter: str
    width: int
    escaped: bool = False
    """A quote inside quotes is `\\"` (MySQL, Spark), not `""` (RFC 4180)."""
    quotes: bool = True
    """Cells are quoted; where no quote ever pairs, all of them are text."""
    trusted: bool = True
    """Every quoted cell at the beginning of the file is closed."""


def _table(lines: Iterator[str], start: str, normalize: Normalizer) -> Iterator[NumberedRow]:
    """The records of a CSV or TSV; a mapping of nothing but indices says that there is no
    header.
    """
    if "\n" not in start.strip() and "\r" in start.strip():  # an old Macintosh's line ends
        start = start.replace("\r", "\n")
        lines = (part for line in lines for part in line.split("\r"))
    dialect = _dialect(start, SCHEMA_KEYS.union(normalize.columns.values(), ("title",)))
    header: list[str] = []
    for line, cells in _records(_Lines(lines), dialect):
        if isinstance(cells, RowError) or normalize.headless:
            yield line, cells
        elif not header:
            places = once([(cell.strip(BLANK), place) for place, cell in enumerate(cells)])
            header = sorted(places, key=places.__getitem__)
        elif len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
            yield (
                line,
                RowError(
                    "row.cells",
                    "parse_error",
                    count=len(cells),
                    header=len(header),
                    delimiter=repr(dialect.delimiter),
                ),
            )
        else:
            yield line, dict(zip(header, cells, strict=False))


def _dialect(start: str, known: frozenset[str]) -> _Dialect:
    """The delimiter whose header names known columns, else the one that splits the lines most
    evenly; and what quotes mean, by reading the beginning of the file.
    """
    lines = [line.rstrip("\r") for line in start.lstrip("\ufeff").split("\n") if line.strip()]
    cut = len(start) >= HEAD_CHARS
    lines = lines[: len(lines) - cut] or [""]
    choices = []
    for delimiter in DELIMITERS:
        names = next(csv.reader(lines[:1], delimiter=delimiter), [""])
        width = len(names)
        even = sum(line.count(delimiter) + 1 == width > 1 for line in lines[:40])
        hits = len(known.intersection(name.strip().lower() for name in names))
        choices.append((hits * (width > 1), even, width, delimiter))
    *_, width, delimiter = max(choices)
    tried = []
    for escaped in {False, '\\"' in start}:
        dialect, unread = _Dialect(delimiter, width, escaped), _Lines(iter(lines))
        records = [(line, _quoted(line, unread, dialect)) for line in unread if '"' in line]
        faults = sum(isinstance(cells, RowError) for _, cells in records) - cut
        paired = any(
            isinstance(cells, list) and cells != line.split(delimiter) for line, cells in records
        )
        tried.append((max(0, faults), escaped, paired))
    faults, escaped, paired = min(tried)
    return _Dialect(delimiter, width, escaped, paired, not faults)


class _Lines(Iterator[str]):
    """Lines, the last of which may be given back; `number` counts those that were not."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines, self.number = lines, 0
        self._returned: deque[str] = deque()

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self.lines)
        self.number += 1
        return line

    def give_back(self, lines: list[str]) -> None:
        self._returned.extendleft(reversed(lines))
        self.number -= len(lines)


def _records(lines: _Lines, dialect: _Dialect) -> Iterator[tuple[int, list[str] | RowError]]:
    """Records with the number of their first line. A quote that never closes costs its own line
    only, not the rest of the file; in a TSV or where none closes, it is text.
    """
    csv.field_size_limit(1 << 27)
    delimiter, width = dialect.delimiter, dialect.width
    for line in lines:
        number, line = lines.number, line.rstrip("\r")
        if not line.strip(BLANK):
            continue
        text = line.split(delimiter)
        cells: list[str] | RowError = text
        if '"' in line:
            cells = _quoted(line, lines, dialect)
            bare = len(text) == width and (delimiter == "\t" or not dialect.quotes)
            if bare and isinstance(cells, RowError):
                cells = text
        yield number, cells


def _quoted(line: str, lines: _Lines, dialect: _Dialect) -> list[str] | RowError:
    """The cells of the record that begins with `line`; a broken record gives its further lines
    back.
    """
    further: list[str] = []
    fault: RowError | None = None

    def unclosed() -> RowError:
        return RowError("row.quote", "parse_error", found=f"{line!r:.40}")

    def feed() -> Iterator[str]:
        nonlocal fault
        yield line + "\n"
        for following in islice(lines, MAX_RECORD_LINES):
            further.append(following)
            yield following + "\n"
        fault = unclosed()

    parts = (_BACKSLASH.sub(r"\g<0>\\", part) for part in feed()) if dialect.escaped else feed()
    try:
        cells = next(
            csv.reader(
                parts,
                delimiter=dialect.delimiter,
                escapechar="\\" if dialect.escaped else None,
                skipinitialspace=True,
                strict=True,
            )
        )
    except csv.Error as error:
        fault = fault or RowError("row.csv", "parse_error", detail=error)
    if not fault and dialect.delimiter == "\t":
        # where some quotes are text, so are those round lines that are whole records without them
        each = all(part.count("\t") == dialect.width - 1 for part in (line, *further))
        bare = each and not dialect.trusted and (further or '""' not in line)
        if bare or (further and len(cells) != dialect.width):
            fault = unclosed()
    if not fault:
        return ["" if cell == r"\N" else cell for cell in cells] if dialect.escaped else cells
    lines.give_back(further)
    return fault
