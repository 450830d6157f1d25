"""What is said to people: one table, English and Chinese, with stable codes.

The language follows `CLLM_LANG` (`zh` or `en`), else the locale. Log keys and JSON are not here:
they are English, for programs.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import json
import locale
import math
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_spoken = ContextVar("spoken", default="")
WRONG = {
    "usage.required": "the following arguments are required: (?P<names>.*)",
    "usage.unknown": "unrecognized arguments: (?P<names>.*)",
    "usage.value": "argument (?P<name>.*): expected .*",
    "usage.number": "argument (?P<name>.*): invalid int value: (?P<found>.*)",
    "usage.choice": r"argument (?P<name>.*): invalid choice: (?P<found>.*)"
    r" \(choose from (?P<known>.*)\)",
}
"""What argparse says, in English, of a command line."""
ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that no encoding explains (PEP 383)


def load_toml(name: str) -> dict[str, Any]:
    """The file `name` of assets/ as a dictionary."""
    path = Path(__file__).parent / "assets" / name
    return tomllib.loads(path.read_text(encoding="utf-8"))


@functools.cache
def messages() -> dict[str, tuple[str, str]]:
    """Code -> (English, Chinese), both str.format templates with the same fields; read from
    assets/messages.toml when first needed.
    """
    found: dict[str, tuple[str, str]] = {}

    def collect(prefix: str, tree: dict[str, Any]) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                collect(f"{prefix}.{name}" if prefix else name, value)
        if "en" in tree:
            found[prefix] = (tree["en"], tree["zh"])

    collect("", load_toml("messages.toml"))
    return found


@contextlib.contextmanager
def speaking(name: str) -> Iterator[None]:
    """Whatever is said here is said in this language, a reader's of the page."""
    before = _spoken.set(name)
    try:
        yield
    finally:
        _spoken.reset(before)


def language() -> str:
    """`zh` or `en`: `CLLM_LANG` if set, else whether the locale (LC_ALL, LC_MESSAGES, LANG,
    Windows' setting) is Chinese.
    """
    chosen = (
        _spoken.get()
        or os.environ.get("CLLM_LANG")
        or next(
            (os.environ[key] for key in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(key)),
            locale.getlocale()[0] or "",
        )
    )
    return "zh" if chosen.lower().startswith(("zh", "chinese")) else "en"


def say(code: str, /, **values: object) -> str:
    """The message `code` in the user's language with its fields filled in, errors of the operating
    system in that language too. Raises KeyError for an unknown code.
    """
    told = {name: _told(value) for name, value in values.items()}
    return messages()[code][language() == "zh"].format(**told)


def _told(value: object) -> object:
    if not isinstance(value, OSError) or not value.strerror:
        return value
    code = f"system.{errno.errorcode.get(value.errno or 0)}"
    return say(code) if code in messages() else value.strerror


def note(code: str, /, **values: object) -> None:
    """Print the message `code` to stderr, where progress and status go; of several ranks under
    torchrun only the first speaks.
    """
    if os.environ.get("RANK", "0") == "0":
        print(say(code, **values), file=sys.stderr, flush=True)


def shell(*words: object) -> str:
    """The words as one command line, quoted for this system's shells: POSIX ones, or cmd and
    PowerShell, which both take double quotes (no file name there holds one).
    """
    texts = [str(word) for word in words]
    if sys.platform != "win32":
        return shlex.join(texts)
    plain = re.compile(r"[\w./\\:=+-]+")
    return " ".join(text if plain.fullmatch(text) else f'"{text}"' for text in texts)


def command(program: str, *words: object) -> str:
    """The command line that runs `python -m cllm.PROGRAM` with these words."""
    return shell("python", "-m", f"cllm.{program}", *words)


def propose(*commands: str) -> None:
    """Say what to type next, a command a line, ready to paste."""
    note("next", commands="\n  ".join(commands))


def print_result(result: Any, asked: bool) -> None:
    """A program's JSON document, the last line on stdout. It is for other programs, so a terminal
    gets it only where `asked` for.
    """
    if asked or not sys.stdout.isatty():
        print(to_json(result))


def file_name(path: object) -> str:
    """`path` as text: a part that is no UTF-8 (unpacked from a zip of a Chinese Windows) as
    GB18030, else as Latin-1, so that it can be printed and stored.
    """

    def read(part: str) -> str:
        raw = part.encode("utf-8", "surrogateescape")
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode("gb18030")
        return raw.decode("latin-1")

    parts = str(path).split("/")
    return "/".join(read(part) if ESCAPED.search(part) else part for part in parts)


def strength(text: str) -> float:
    """A strength of the adapter as it is written on a command line: 0, the base, to 2. Raises
    UserError for anything else.
    """
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 2:
            return float(text)
    raise UserError("usage.strength", found=text)


def read_json(path: Path, code: str = "model.damaged") -> dict[str, Any]:
    """The JSON object in a file that another program or person wrote: UTF-8, 16 or 32, with or
    without a byte-order mark. Raises UserError `code` if the file cannot be read or holds no
    object.
    """
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
        raise TypeError(f"{type(value).__name__}, no JSON object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(code, path=path, detail=error) from error


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that every reader takes: numbers that are not finite become null."""
    return json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def table(rows: list[list[str]]) -> str:
    """Left-aligned first column, right-aligned others; full-width characters count two columns."""

    def width(text: str) -> int:
        return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)

    columns = [max(width(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = []
    for row in rows:
        cells = [" " * (columns[i] - width(cell)) for i, cell in enumerate(row)]
        padded.append(
            "  ".join(
                c + s if i == 0 else s + c for i, (c, s) in enumerate(zip(row, cells, strict=True))
            ).rstrip()
        )
    return "\n".join(padded)


class CommandLine(argparse.ArgumentParser):
    """The command line of a program; what its arguments are for stands under
    `PROGRAM.help.ARGUMENT`.
    """

    def __init__(self, program: str) -> None:
        super().__init__(prog=f"cllm.{program}", description=say(f"{program}.help"))
        self.add_argument("--json", action="store_true", help=say("usage.json"))
        self.program = program

    def take(self, name: str, **options: Any) -> None:
        """One more argument, `options` as `add_argument`'s."""
        help_name = name.lstrip("-").replace("-", "_")
        self.add_argument(name, help=say(f"{self.program}.help.{help_name}"), **options)

    def error(self, message: str) -> NoReturn:
        """What is wrong, in the user's language and in one line. Raises UserError."""
        found = {code: re.fullmatch(pattern, message) for code, pattern in WRONG.items()}
        told = [say(code, **match.groupdict()) for code, match in found.items() if match]
        raise UserError("usage.wrong", problem=(told or [message])[0], program=self.prog)


class UserError(Exception):
    """The user's mistake or circumstance: what, where and how to mend it, in one line. Programs
    print it and exit with 2.
    """

    def __init__(self, code: str, /, **values: object) -> None:
        super().__init__(say(code, **values))
        self.code = code

    def __str__(self) -> str:
        return say("error", code=self.code, text=self.args[0])
