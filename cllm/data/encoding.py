"""Bytes -> text, a chunk at a time: UTF-8, UTF-16 with a byte order mark, GB18030 (GBK), Big5, told
apart by what makes Chinese.

Big5 mostly decodes as GB18030 without an error, into mojibake, so that the first codec that does
not raise proves nothing. Bytes that fit no encoding travel on as U+DC80-DCFF (PEP 383) and reject
only the row that holds them.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Protocol

from cllm.messages import ESCAPED

CHUNK_BYTES = 1 << 20
LEGACY = ("gb18030", "big5hkscs")
MIN_PLAUSIBILITY = 0.25  # of a single foreign line; real Chinese has 0.4 to 0.7, mojibake under 0.1

# The characters that make up most of any Chinese text, in both scripts.
COMMON = frozenset(
    "的一是不了在人有我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可里后小么心多天而能好都然没日于起还发成事只作当想"
    "看文无开手十用主行方又如前所本见经头面公同三已老从动两长知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话者向情部正名定女问力机"
    "给等应该请什吗吧呢啊您使需答信息数据何医服务系统世界历史化术研究展社济因如果以为谁书读写语电脑网车门间体关让"
    "這來個國說們為時過學對裡後麼發當無開見經頭長樣現將進實點種聲話問機給會從動兩與關應請醫還沒讓著嗎誰書讀寫語電腦網東車門間體數據嗎處樂藥"
    "，。、？！：；（）“”《》「」『』"
)


class Bytes(Protocol):
    """What text is decoded from: `read1` gives some bytes, b"" at the end."""

    def read1(self, size: int, /) -> bytes: ...


def plausibility(text: str) -> float:
    """The share of `text`'s characters beyond ASCII that are among the commonest of Chinese; 0 to
    1.
    """
    counts = Counter(text)
    wide = sum([count for character, count in counts.items() if character > "\x7f"])
    common = sum([count for character, count in counts.items() if character in COMMON])
    return common / wide if wide else 0.0


def _guess(data: bytes) -> tuple[float, str]:
    """(plausibility, encoding) of the likeliest encoding of `data`."""
    return max((plausibility(data.decode(codec, "replace")), codec) for codec in ("utf-8", *LEGACY))


def sniff_encoding(head: bytes) -> str:
    """utf-8, utf-16, gb18030 or big5hkscs: by byte order mark, else by what the lines of `head`
    decode as.
    """
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return "utf-8"
    except UnicodeDecodeError:
        lines = [line for line in head.split(b"\n") if not line.isascii()][:200]
    good = sum(line.decode("utf-8", "ignore").encode() == line for line in lines)
    return "utf-8" if 2 * good >= len(lines) else _guess(b"\n".join(lines))[1]


def _mend(text: str, encoding: str) -> str:
    """`text` with the lines in another encoding than the file's decoded on their own, where that
    gives plausible Chinese.
    """
    legacy = encoding in LEGACY
    if not legacy:
        with suppress(UnicodeEncodeError):
            text.encode()  # takes a third of the time of a search
            return text
    if encoding == "utf-16":
        return text
    lines = text.split("\n")
    for index, line in enumerate(lines):
        broken = bool(ESCAPED.search(line))
        if not broken and (not legacy or line.isascii()):
            continue
        try:
            raw = line.encode(encoding, "surrogateescape")
            if not broken:
                raw.decode("utf-8")  # hardly any line of legacy Chinese is valid UTF-8 as well
            score, codec = _guess(raw)
            if codec != encoding and score > (MIN_PLAUSIBILITY if broken else plausibility(line)):
                lines[index] = raw.decode(codec)
        except UnicodeError:
            continue
    return "\n".join(lines)


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, final: bool = False) -> str:
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError:  # multi-byte decoders cannot escape an ASCII byte in an illegal pair
        pending = decoder.getstate()[0]
        decoder.reset()
        return (pending + data).decode("utf-8", "surrogateescape")


def decoded(head: bytes, stream: Bytes, encoding: str) -> Iterator[str]:
    """The text of `head` and the rest of `stream`, in pieces cut at line ends where a chunk has
    one.
    """
    errors = "surrogatepass" if encoding == "utf-16" else "surrogateescape"
    codec = "utf-8-sig" if encoding == "utf-8" else encoding
    decoder = codecs.getincrementaldecoder(codec)(errors)
    rest = ""
    for data in chain((head,), iter(lambda: stream.read1(CHUNK_BYTES), b"")):
        text = rest + _decode(decoder, data)
        cut = text.rfind("\n") + 1 or len(text)
        rest = text[cut:]
        yield _mend(text[:cut], encoding)
    if encoding != "utf-16":  # an odd last byte is no character
        rest += _decode(decoder, b"", True)
    if rest:
        yield _mend(rest, encoding)


def split_lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines, split at LF only: U+2028, U+0085 and others are legal inside JSON strings."""
    rest: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        rest.append(first)
        if others:
            yield "".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    if last := "".join(rest):
        yield last
