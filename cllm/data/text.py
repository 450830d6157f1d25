"""One field of a row -> its text: what is removed everywhere, what may be converted on request,
what is no text at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from decimal import Decimal

from cllm.messages import UserError, say

_DIRT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ufeff\u200b\u2060\ud800-\udfff]")
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_DEPTH = 100
WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_DAY = r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
PERSONAL = {  # kind -> pattern; the ID card goes before the phone number it might contain
    "EMAIL": re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"),
    "ID": re.compile(rf"(?<![0-9A-Za-z])[1-9]\d{{5}}{_DAY}\d{{3}}[\dXx](?![0-9A-Za-z])"),
    "PHONE": re.compile(
        r"(?<![0-9A-Za-z.])(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?![0-9A-Za-z])"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """Rewriting of texts; everything is off by default, so that nobody's data changes unasked.

    convert: "" or an OpenCC conversion such as "t2s" (traditional to simplified) or "s2t";
    fold_width: full-width ASCII and the ideographic space to half width; unescape_html: `&lt;` to
    `<`; mask_personal: e-mail, ID card and phone to [EMAIL], [ID], [PHONE].
    """

    convert: str = ""
    fold_width: bool = False
    unescape_html: bool = False
    mask_personal: bool = False


VERBATIM = TextOptions()


class RowError(Exception):
    """Why a row is a reject, from the place that finds it to the row's edge; the reader hands one
    on in place of a row that it could not read. `args`: one of `REASONS`, and the message `code`.
    """

    def __init__(self, code: str, reason: str, /, **values: object) -> None:
        super().__init__(reason, say(code, **values))


def clean(text: str) -> str:
    """`text` without zero-width and control characters, with LF line ends and both ends stripped;
    nothing else changes.

    Raises RowError: decode_error for bytes that no encoding explained (U+DC80-DCFF), invalid_text
    for half a surrogate pair.
    """
    if not text.isprintable() and _DIRT.search(text):
        if bad := SURROGATE.search(text):
            code = ord(bad.group())
            if 0xDC80 <= code <= 0xDCFF:
                raise RowError("row.byte", "decode_error", byte=f"0x{code - 0xDC00:02x}")
            raise RowError("row.surrogate", "invalid_text", code=f"\\u{code:04x}")
        text = _DIRT.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.strip()


def rewriter(options: TextOptions) -> Callable[[str], str]:
    """`clean`, with the conversions that `options` asks for. Raises UserError if OpenCC is asked
    for and missing.
    """
    if options == VERBATIM:
        return clean
    steps: list[Callable[[str], str]] = []
    if options.unescape_html:
        import html

        steps.append(html.unescape)
    if options.fold_width:
        steps.append(lambda text: text.translate(WIDTH))
    if options.convert:
        try:
            from opencc import OpenCC

            steps.append(OpenCC(options.convert).convert)
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise UserError("data.opencc", convert=options.convert, cause=error) from None

    def rewrite(text: str) -> str:
        text = clean(text)
        for step in steps:
            text = step(text)
        for name, pattern in PERSONAL.items() if options.mask_personal else ():
            text = pattern.sub(f"[{name}]", text)
        return clean(text)

    return rewrite


def printable(text: str) -> str:
    """`text` for a message to people: no control characters, no half surrogates."""
    return _DIRT.sub("?", text)


def text_of(value: object, name: str) -> str:
    """The text of the field `name`: numbers as decimals, null and NaN as "", dicts and lists
    unwrapped (DATA_RULES 3 and 4).

    Raises RowError("invalid_text") for what is no text: a truth value, an infinite number, an
    object with unknown keys.
    """
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, dict):
        if value.keys() >= {"role", "content"} or value.keys() >= {"from", "value"}:
            raise RowError("row.message", "invalid_text", name=name)
        keys = [
            key
            for key in dict.fromkeys((name, "text", "content", "value", "parts"))
            if key in value
        ]
        if not keys:
            found = ", ".join(map(str, list(value)[:6])) or "nothing"
            raise RowError("row.object", "invalid_text", name=name, found=found)
        return next((text for key in keys if clean(text := text_of(value[key], name))), "")
    if isinstance(value, (list, tuple)):
        return "\n".join([text_of(element, name) for element in value])
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (float, Decimal)) and abs(value) != float("inf"):
        return format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    kind = type(value).__name__
    raise RowError("row.no_text", "invalid_text", name=name, found=f"{value!s:.20}", type=kind)


def encodable(text: str) -> str:
    """The text without half surrogate pairs, which JSON and terminals can hold and no tokenizer can
    read.
    """
    return text.encode("utf-8", "replace").decode()


def overlap(text: str, marks: Collection[str]) -> int:
    """Length of the longest end of `text` that begins one of `marks` and may become it."""
    longest, letters = max(map(len, marks), default=1), {mark[:1] for mark in marks}
    for start in range(max(0, len(text) - longest + 1), len(text)):
        end = text[start:]
        if end[0] in letters and any(mark != end and mark.startswith(end) for mark in marks):
            return len(end)
    return 0


def is_deep(value: object) -> bool:
    """Whether lists and objects stand in each other deeper than MAX_DEPTH, where writing and
    reading them may fail.
    """
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        inner = [list(part.values()) if isinstance(part, dict) else part for part in level]
        level = [part for parts in inner if isinstance(parts, list) for part in parts]
    return depth > MAX_DEPTH


def json_text(value: object) -> str:
    """Tool lists and tool calls: a string verbatim, anything else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise RowError("row.tool_call", "invalid_text", detail=error) from None
