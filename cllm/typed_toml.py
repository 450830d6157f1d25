"""TOML as typed, frozen dataclasses and back: mistakes are collected, each with its place, and a
command line's words may be bare where a shell takes their quotes away.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from typing import Any, Literal

from cllm.messages import say, to_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def key_lines(text: str) -> dict[str, int]:
    """Dotted key -> its line; tomllib itself keeps none."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.split("\n"), 1):
        if match := re.match(r"\s*\[\[?\s*([\w.\-]+)\s*\]\]?", line):
            section = match[1]
            lines.setdefault(section, number)
        elif match := re.match(r"\s*([\w.\-\"]+)\s*=", line):
            name = match[1].replace('"', "")
            lines[f"{section}.{name}" if section else name] = number
    return lines


def bare_value(kind: Any, text: str) -> Any:
    """What `text` is for a setting of this kind: TOML, or bare words, as shells leave them: "问题",
    "客服 回复", [a.jsonl, b.jsonl]; where words are asked for, so are 0 and true.
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        if isinstance(value, str) or _fits(kind, value) or not _fits(kind, ""):
            return value
    except tomllib.TOMLDecodeError:
        if text[:1] + text[-1:] == "[]" and _fits(kind, [""]):
            return [part.strip(" \"'") for part in text[1:-1].split(",") if part.strip()]
    return text[1:-1] if re.fullmatch(r"\"[^\"]*\"", text) else text


def kind_of(kind: Any, key: str) -> Any:
    """The type of the setting `section.name` of dataclass `kind`; of an entry of a table its
    values'.
    """
    for name in key.split("."):
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name, object)
    return str | list[object] if typing.get_origin(kind) is tuple else kind


def build(kind: type, tree: Any, prefix: str, where: Any, problems: list[str]) -> Any:
    """Build dataclass `kind` from a table; appends to `problems` and goes on."""
    if not isinstance(tree, dict):
        problems.append(
            say("config.type", where=where(prefix), key=prefix, expected="table", found=repr(tree))
        )
        return kind()
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else name
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = (
                say("config.nearest", name=near[0])
                if near
                else say("config.known", names=", ".join(known))
            )
            problems.append(say("config.unknown", where=where(key), key=key, hint=hint))
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = build(typing.cast(type, hints[name]), value, key, where, problems)
        else:
            built = _value(hints[name], value, key, where, problems)
            low, high = known[name].metadata.get("limits", (-math.inf, math.inf))
            if isinstance(built, int | float) and not low <= built <= high:
                problems.append(
                    say(
                        "config.range",
                        where=where(key),
                        key=key,
                        value=built,
                        bounds=f"{low} … {high}",
                    )
                )
            values[name] = built
    return kind(**values)


def _value(hint: Any, value: Any, key: str, where: Any, problems: list[str]) -> Any:
    if typing.get_origin(hint) is tuple:  # [[tables]]; a text alone is the first field of one
        table = typing.get_args(hint)[0]
        first = dataclasses.fields(table)[0].name
        rows = [value] if isinstance(value, str) else value
        if not isinstance(rows, list):
            problems.append(
                say(
                    "config.type",
                    where=where(key),
                    key=key,
                    expected="string or [[tables]]",
                    found=repr(value),
                )
            )
            return ()
        tables = [{first: row} if isinstance(row, str) else row for row in rows]
        return tuple(build(table, row, key, where, problems) for row in tables)
    if hint == dict[str, str] and isinstance(value, dict):  # the number of a column
        value = {name: str(part) if type(part) is int else part for name, part in value.items()}
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not _fits(hint, value):
        expected = " | ".join(map(_described, options))
        code = "config.table" if typing.get_origin(hint) is dict else "config.type"
        problems.append(say(code, where=where(key), key=key, expected=expected, found=repr(value)))
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return str(getattr(hint, "__name__", hint))


def _fits(hint: Any, value: Any) -> bool:
    if _is_union(hint):
        return any(_fits(option, value) for option in typing.get_args(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            isinstance(k, str) and isinstance(v, str) for k, v in value.items()
        )
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def as_toml(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, bool | str):
        # the one character that only TOML escapes
        return to_json(value).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{as_toml(k)} = {as_toml(v)}" for k, v in value.items()) + " }"
            if value
            else "{}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_toml({k: v for k, v in dataclasses.asdict(value).items() if v not in ("", {})})
    return repr(value)
