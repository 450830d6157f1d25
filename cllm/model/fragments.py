r"""Byte-level BPE by fragments: a text is cut where no token can reach across, and each different
fragment is encoded once.

Merges (Sennrich et al. 2016) join two characters only if some token holds them side by side, and
only inside a word of the pre-tokenizer. Where every byte is a token, the ids of a text are those of
the two parts at a cut, one after the other. Fragments are mostly words of the language, which
repeat; what `tokenizers` remembers are the pre-tokenizer's words, in Chinese all from one
punctuation mark to the next.

It holds for the words of Qwen, GLM-4 and Llama 3, (?i:'s|…)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,n}|
?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|…: a letter or digit ends its word before anything that is
neither, letters and digits part, a line feed ends its word before any mark.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from string import ascii_letters, digits, punctuation
from typing import Any, TypeAlias

import numpy as np

# GPT-2's printable stand-in for each byte, as code points: itself where printable, else the next
# letter from U+0100.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_NEXT = itertools.count(0x100)
BYTE_LETTERS = {byte: byte if byte in _PRINTABLE else next(_NEXT) for byte in range(0x100)}
MAX_KNOWN = 1 << 18  # fragments kept, at about 200 bytes
# ideographs that are letters in every Unicode table, and that no normalization touches
_FIRST, _COUNT = 0x4E00, 0x9FA6 - 0x4E00
_MARKS = punctuation + "，。！？；：、（）《》“”…—·"
# 0: any other character, beside which nothing is cut
_IDEOGRAPH, _LATIN, _DIGIT, _MARK, _SPACE, _LINE_FEED = range(1, 7)
_PARTED = [
    *itertools.product((_IDEOGRAPH, _LATIN, _DIGIT), (_MARK, _SPACE, _LINE_FEED)),
    *itertools.product((_LINE_FEED,), (_IDEOGRAPH, _LATIN, _DIGIT, _MARK)),
    *((_IDEOGRAPH, _DIGIT), (_LATIN, _DIGIT), (_DIGIT, _IDEOGRAPH), (_DIGIT, _LATIN)),
]
_CUT = "\uffff"  # no character, by definition
_HASH_BITS = 22
_PARTS = 8  # of a batch of texts: one is cut while the one before is encoded
# new fragments encoded as one text: an input of its own costs as much as twenty characters
_LINES = 256
_ENDS = "A-Za-z0-9一-龥"
# the same ids in a line of its own
_LINE = re.compile(rf" ?[{_ENDS}{re.escape(_MARKS)}](?:[^\r\n]*[{_ENDS}])?(?<=[{_ENDS}])")
Encode: TypeAlias = "Callable[[list[str]], list[array[int]]]"


def _codes(text: str) -> Any:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _slot(left: Any, right: Any) -> Any:
    """Where a pair of ideographs stands in the table; pairs that share a slot only cost a cut."""
    return (left * np.uint32(0x9E3779B1) ^ right * np.uint32(0x85EBCA6B)) >> np.uint32(
        32 - _HASH_BITS
    )


def _kinds() -> Any:
    """(0x110000,) the kind of each character."""
    kinds = np.zeros(0x110000, np.uint8)
    for characters, kind in (
        (ascii_letters, _LATIN),
        (digits, _DIGIT),
        (_MARKS, _MARK),
        (" \t\u3000", _SPACE),
        ("\n", _LINE_FEED),
    ):
        kinds[_codes(characters)] = kind
    kinds[_FIRST : _FIRST + _COUNT] = _IDEOGRAPH
    return kinds


def token_texts(names: Iterable[str]) -> list[str]:
    """The texts of tokens as byte-level BPE writes them, with bytes that are no whole character as
    U+DC80-DCFF; none may hold byte FF, which is in no text and parts them.
    """
    bytes_of = {letter: byte for byte, letter in BYTE_LETTERS.items()} | {ord("\n"): 0xFF}
    return (
        "\n".join(names)
        .translate(bytes_of)
        .encode("latin-1", "replace")
        .decode("utf-8", "surrogateescape")
        .split("\udcff")
    )


def _joined(texts: Iterable[str]) -> Any:
    """(2^_HASH_BITS,) whether one of the tokens' texts holds a pair of ideographs, or their ends,
    side by side.
    """
    text = "\n".join(texts)
    codes, table = _codes(text), np.zeros(1 << _HASH_BITS, bool)
    ideograph = codes - np.uint32(_FIRST) < _COUNT
    pair = np.flatnonzero(ideograph[:-1] & ideograph[1:])
    table[_slot(codes[pair] - np.uint32(_FIRST), codes[pair + 1] - np.uint32(_FIRST))] = True
    # A few tokens begin or end inside a character: any ideograph that ends, or begins, with these
    # bytes may be meant.
    rest, lead = (codes >= 0xDC80) & (codes < 0xDCC0), (codes >= 0xDCE4) & (codes < 0xDCEA)
    spelled = np.frombuffer(
        "".join(map(chr, range(_FIRST, _FIRST + _COUNT))).encode(), np.uint8
    ).reshape(_COUNT, 3)
    for at in np.flatnonzero(
        (rest[:-1] & (ideograph | lead)[1:]) | (ideograph[:-1] & lead[1:])
    ).tolist():
        before, after = (
            part.encode("utf-8", "surrogateescape")
            for part in (text[max(0, at - 2) : at + 1], text[at + 1 : at + 4])
        )
        ending, beginning = (
            re.search(rb"[\xe4-\xe9]?[\x80-\xbf]{1,2}$", before),
            re.match(rb"[\xe4-\xe9][\x80-\xbf]{0,2}", after),
        )
        if ending and beginning:
            left, right = (
                np.frombuffer(ending.group(), np.uint8),
                np.frombuffer(beginning.group(), np.uint8),
            )
            lefts = np.flatnonzero((spelled[:, 3 - len(left) :] == left).all(1)).astype(np.uint32)
            rights = np.flatnonzero((spelled[:, : len(right)] == right).all(1)).astype(np.uint32)
            table[_slot(lefts[:, None], rights)] = True
    return table


class Fragments:
    """`encode` of many texts by fragments.

    plain: encodes texts as they are; texts: the tokens' (`token_texts`); unmerged: those that a
    word is taken for though no merges make them, so that no fragment may end with one: as far as
    they reach, ideographs behind their first characters stay together.
    """

    def __init__(self, plain: Encode, texts: Iterable[str], unmerged: Collection[str] = ()) -> None:
        self.plain, self.reach = plain, max(map(len, unmerged), default=0)
        self.beginnings = _codes("".join({text[0] for text in unmerged}))
        self.known: dict[str, bytes] = {}
        (self.line_feed,) = plain(["\n"])[0]
        self.kinds, self.joined = _kinds(), _joined(texts)
        self.parted = np.zeros(64, bool)
        self.parted[[left << 3 | right for left, right in _PARTED]] = True

    def cuts(self, codes: Any) -> Any:
        """(n-1,) whether a text of n characters is cut behind each but the last."""
        kinds = self.kinds[codes]
        cut = self.parted[kinds[:-1] << 3 | kinds[1:]]
        inside = (kinds[:-1] == _IDEOGRAPH) & (kinds[1:] == _IDEOGRAPH)
        for start in np.flatnonzero(np.isin(codes, self.beginnings)).tolist() if self.reach else ():
            inside[start : start + self.reach] = False
        at = np.flatnonzero(inside)
        cut[at] = ~self.joined[
            _slot(codes[at] - np.uint32(_FIRST), codes[at + 1] - np.uint32(_FIRST))
        ]
        return cut

    def encode(self, texts: list[str]) -> list[array[int]]:
        """The ids of each text, the same as `plain` gives. What is new in some texts is encoded
        while the next ones are cut.
        """
        if len(self.known) > MAX_KNOWN:
            self.known = {}
        known = self.known  # another thread may begin a new one
        begun, encoded, asked = [], [], set[str]()
        with ThreadPoolExecutor(1) as worker:
            size = -(-len(texts) // _PARTS) or 1
            for start in range(0, len(texts), size):
                fragments, bounds = self._cut(texts[start : start + size])
                ids: list[Any] = list(map(known.get, fragments))
                missing = [index for index, found in enumerate(ids) if found is None]
                new = {fragments[index] for index in missing} - asked
                asked |= new
                lines = [fragment for fragment in new if _LINE.fullmatch(fragment)]
                groups = [lines[first : first + _LINES] for first in range(0, len(lines), _LINES)]
                groups += [[fragment] for fragment in new.difference(lines)]
                answer = worker.submit(self.plain, ["\n".join(group) for group in groups])
                begun.append((fragments, bounds, ids, missing, groups, answer))
            for fragments, bounds, ids, missing, groups, answer in begun:
                for group, line_ids in zip(groups, answer.result(), strict=True):
                    known.update(self._by_line(group, line_ids))
                for index in missing:
                    ids[index] = known[fragments[index]]
                encoded += [
                    array("i", b"".join(ids[start:end]))
                    for start, end in itertools.pairwise(bounds)
                ]
        return encoded

    def _cut(self, texts: list[str]) -> tuple[list[str], list[int]]:
        """(fragments of all the texts, where each text's begin and the last one's end)."""
        whole = "".join(texts)
        if _CUT in whole:
            return texts, list(range(len(texts) + 1))
        codes, ends = _codes(whole), np.cumsum([len(text) for text in texts])
        cut = np.append(self.cuts(codes), True)
        cut[ends[ends > 0] - 1] = True
        places = np.flatnonzero(cut) + 1
        fragments = (
            np.insert(codes, places[:-1], ord(_CUT)).tobytes().decode("utf-32-le").split(_CUT)
        )
        return fragments, [0, *np.searchsorted(places, ends, "right").tolist()]

    def _by_line(self, group: list[str], ids: array[int]) -> Iterator[tuple[str, bytes]]:
        """The ids of each fragment of a group, which were lines of one text, as bytes of int32."""
        stored = ids.tobytes()
        ends = (
            [index for index, id in enumerate(ids) if id == self.line_feed]
            if len(group) > 1
            else []
        )
        for fragment, start, end in zip(
            group, [0, *(end + 1 for end in ends)], [*ends, len(ids)], strict=True
        ):
            yield fragment, stored[4 * start : 4 * end]


def is_ideograph(character: str) -> bool:
    """Whether it is one of those between which texts are cut."""
    return 0 <= ord(character) - _FIRST < _COUNT
