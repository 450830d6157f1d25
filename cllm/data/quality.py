"""What a set of conversations is like: duplicates, lengths, languages, leakage, and answers that
teach nothing. No token knowledge.

The near-duplicate search is MinHash with banded locality-sensitive hashing (Broder 1997; Leskovec,
Rajaraman, Ullman, Mining of Massive Datasets, chapter 3) over character trigrams, which need no
word segmentation; every candidate is checked exactly.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from cllm.data.message import Message, block_of
from cllm.data.schema import Conversation, Reject
from cllm.data.text import PERSONAL, WIDTH

if TYPE_CHECKING:
    import numpy as np

# a pair of Jaccard similarity s is found with probability 1 - (1 - s^4)^16: 0.9998 at 0.8
SHINGLE_CHARS, BANDS, BAND_ROWS = 3, 16, 4
EXAMPLES = 3
BINS, BAR_WIDTH = 12, 40  # of the histogram in a terminal
NEAR_LIMIT = 100_000  # conversations; the search takes about 0.2 ms and 2 kB for each

# Simplified characters, each followed by its traditional form: the commonest of those where the two
# differ.
_PAIRS = (
    "这這个個来來国國说說们們为為时時过過学學对對发發当當无無开開见見经經头頭长長样樣现現将將进進实實点點种種声聲话話问問机機给給"
    "几幾业業间間体體东東车車书書门門语語读讀写寫电電网網数數据據关關应應该該请請让讓谁誰吗嗎药藥医醫处處乐樂两兩从從动動与與还還"
    "没沒气氣万萬义義爱愛钱錢红紅绿綠张張马馬鸟鳥鱼魚龙龍风風飞飛亲親听聽观觀觉覺记記认認识識论論试試谢謝变變边邊运運远遠选選连連"
)
_SIMPLIFIED, _TRADITIONAL = frozenset(_PAIRS[::2]), frozenset(_PAIRS[1::2])
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_LATIN = re.compile("[A-Za-z]+")
BOILERPLATE = re.compile(
    r"作为(?:一个|一名|一款)?(?:AI|人工智能|大?语言模型)|我(?:只)?是(?:一个|一名)(?:AI|人工智能|语言模型)"
    r"|\A(?:很|非常)?(?:抱歉|对不起|遗憾)[，,]?\s*(?:但)?我(?:无法|不能|没有办法)"
    r"|\bAs an? (?:AI|language model)\b|\A(?:I'm|I am) sorry, (?:but )?I can(?:'t|not)",
    re.I,
)

# What a text should not have; a name of each stands under [check.finding] of assets/messages.toml.
FAULTS = {
    # not {a}, \frac{ab} and ${ab}, which are formulas and code
    "placeholder": re.compile(
        r"\{\{\s*\w+\s*\}\}|(?<![\w\\^{}$])\{[^\W\d]\w{1,30}\}(?!\})|<[A-Z]{2,}(?:_[A-Z]+)*>"
    ),
    # UTF-8 read as GBK, Latin-1 or Windows-1252; fresh memory of a Chinese Windows
    "mojibake": re.compile(
        "\ufffd|锟斤拷|烫烫烫|屯屯屯|[\xc3\xc2][\x80-\xbf]|â€|ï»¿|(?:[\xe4-\xe9][\x80-\xbf]{2}){2}"
    ),
    "html": re.compile(r"&(?:[a-z]{2,8}|#\d{2,6}|#x[0-9a-f]{2,5});", re.I),
}
_NOTHING = re.compile(r"(?:nan|none|null|n/a|undefined|#n/a)\Z", re.I)  # a whole message
# Tokens of the Qwen2.5 tokenizer, by least squares over 2,630 Chinese, English and code
# conversations of twenty public sets, and what ChatML puts around a message.
HAN_TOKENS, OTHER_TOKENS, MESSAGE_TOKENS = 0.67, 0.21, 5


def deduplicate(conversations: Iterable[Conversation]) -> list[Conversation]:
    """The conversations without exact duplicates, in order; of equal ones the first is kept."""
    first: dict[tuple[tuple[Message, ...], tuple[Message, ...], str], Conversation] = {}
    for item in conversations:
        first.setdefault((item.messages, item.rejected, item.tools), item)
    return list(first.values())


def split_held_out(
    conversations: Sequence[Conversation], fraction: float, seed: int = 0
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out): about `fraction` of the conversations by their content's hash.

    A conversation's side depends on nothing but its content and the seed, so that it stays when
    rows are added or reordered and duplicates stay together. From two different conversations on,
    neither side is empty (for 0 < fraction < 1).
    """
    salt = seed.to_bytes(8, "little", signed=True)
    draws = []
    for item in conversations:
        # no message holds a NUL
        said = chain.from_iterable((m.role, m.content, *filter(None, [m.parts])) for m in item)
        parts = [*said, item.tools]
        content = hashlib.blake2b("\x00".join(parts).encode(), digest_size=16).digest()
        salted = hashlib.blake2b(content, digest_size=8, salt=salt).digest()
        draws.append(int.from_bytes(salted, "big"))
    limit = int(fraction * 2**64)
    if 0 < fraction < 1 and len(set(draws)) > 1:
        limit = sorted((min(draws) + 1, limit, max(draws)))[1]  # min and max go to different sides
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for item, draw in zip(conversations, draws, strict=True):
        sides[draw < limit].append(item)
    return sides


def _folded(text: str) -> str:
    """`text` without white space and case."""
    return "".join(text.lower().split())


def _shingles(text: str) -> np.ndarray:
    """The distinct hashes (uint64) of all runs of SHINGLE_CHARS characters, white space and case
    aside.
    """
    import numpy as np

    codes = np.frombuffer(_folded(text).encode("utf-32-le"), np.uint32).astype(np.uint64)
    size = min(SHINGLE_CHARS, len(codes))
    hashes = np.zeros(len(codes) - size + 1 if size else 0, dtype=np.uint64)
    for offset in range(size):
        hashes = hashes * np.uint64(1_000_003) + codes[offset : len(codes) - size + 1 + offset]
    return np.unique(hashes)


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> list[tuple[int, int]]:
    """(index, earlier index) of every text whose trigrams' Jaccard similarity with an earlier text
    is at least `threshold`.
    """
    import numpy as np

    draws = np.random.default_rng(1)
    factors, offsets = draws.integers(1, 2**63, (2, BANDS * BAND_ROWS, 1), dtype=np.uint64)
    factors |= np.uint64(1)
    buckets: dict[bytes, int] = {}
    sets: dict[int, np.ndarray] = {}
    pairs = []
    for index, text in enumerate(texts):
        shingles = _shingles(text)
        if not len(shingles):
            continue
        # multiply-shift hashing, (64, shingles)
        mixed = (factors * shingles + offsets) >> np.uint64(32)
        signature = mixed.min(axis=1).reshape(BANDS, BAND_ROWS)
        keys = [bytes([band]) + row.tobytes() for band, row in enumerate(signature)]
        for earlier in sorted({buckets[key] for key in keys if key in buckets}):
            common = len(np.intersect1d(shingles, sets[earlier], assume_unique=True))
            if common >= threshold * (len(shingles) + len(sets[earlier]) - common):
                pairs.append((index, earlier))
                break
        else:
            sets[index] = shingles
            for key in keys:
                buckets.setdefault(key, index)
    return pairs


def _whole(conversation: Conversation) -> str:
    return "\n".join(filter(None, [text for m in conversation for text in (m.reasoning, m.words)]))


def question(conversation: Conversation) -> str:
    """Everything the user says, a line each; the text itself for pre-training."""
    asked = "\n".join(m.content for m in conversation if m.role == "user")
    return asked or conversation.messages[0].content


def leaks(train: Sequence[Conversation], test: Sequence[Conversation]) -> list[tuple[int, int]]:
    """(test index, train index) of the test conversations whose questions are also in the training
    set, or nearly.
    """
    texts = [question(conversation) for conversation in (*train, *test)]
    return [
        (late - len(train), early)
        for late, early in near_duplicates(texts)
        if early < len(train) <= late
    ]


def repeated_questions(
    train: Iterable[Conversation], test: Iterable[Conversation]
) -> list[Conversation]:
    """The test conversations whose questions, white space and case aside, are asked in the training
    set too.
    """
    asked = {_folded(question(item)) for item in train}
    return [item for item in test if _folded(question(item)) in asked]


def qwen_tokens(conversations: Iterable[Conversation]) -> int:
    """About how many tokens the conversations are to Qwen, where its tokenizer is not at hand."""
    texts = [text for item in conversations for m in item for text in (m.reasoning, m.words)]
    han, characters = sum(map(_han, texts)), sum(map(len, texts))
    messages = sum(len(item.messages) for item in conversations)
    return round(HAN_TOKENS * han + OTHER_TOKENS * (characters - han) + MESSAGE_TOKENS * messages)


def _han(text: str) -> int:
    return len(text) - len(_HAN.sub("", text))


def language(text: str) -> str:
    """simplified, traditional, english or other, by counting characters."""
    han = _han(text)
    latin = len(text) - len(_LATIN.sub("", text))
    if 3 * han < latin:
        return "english"
    if not han:
        return "other"
    counts = Counter(text)
    simple, full = (
        sum(counts[c] for c in counts.keys() & script) for script in (_SIMPLIFIED, _TRADITIONAL)
    )
    return "traditional" if full > simple else "simplified"


def percentiles(values: Sequence[int]) -> dict[str, float]:
    """min, p50, p90, p99, max and mean; {} for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    shares = {"min": 0, "p50": 50, "p90": 90, "p99": 99}
    result = {name: ordered[share * len(ordered) // 100] for name, share in shares.items()}
    return result | {"max": ordered[-1], "mean": round(sum(ordered) / len(ordered), 1)}


def bin_edges(values: Sequence[int], bins: int) -> list[int]:
    """Where at most so many bins of equal ratio begin, so that one outlier leaves none empty by the
    dozen.
    """
    low = max(1, min(values))
    ratio = max(values) / low
    return sorted({math.ceil(low * ratio ** (n / bins)) for n in range(bins)}) if ratio else [0]


def histogram(values: Sequence[int]) -> list[str]:
    """Lines of a bar chart for a terminal, in bins of equal ratio; empty ones are left out."""
    if not values:
        return []
    edges = bin_edges(values, BINS)
    heights = Counter(max(1, bisect.bisect_right(edges, value)) for value in values)
    ends = [*(edge - 1 for edge in edges[1:]), max(values)]
    lines = []
    for n, height in sorted(heights.items()):
        bar = "█" * math.ceil(height * BAR_WIDTH / max(heights.values()))
        lines.append(f"{edges[n - 1]:>7}-{ends[n - 1]:<8} {bar} {height}")
    return lines


def _twins(conversations: Iterable[Conversation]) -> list[Conversation]:
    """Those that differ from an earlier one in full-width and half-width characters only."""
    first: dict[str, str] = {}
    twins = []
    for item in conversations:
        text = _whole(item)
        folded = text.translate(WIDTH)
        if first.setdefault(folded, text) != text:
            twins.append(item)
    return twins


def _located(conversations: Iterable[Conversation]) -> dict[str, Any]:
    places = [f"{item.file}:{item.line}" for item in conversations]
    return {"count": len(places), "examples": places[:EXAMPLES]}


def counts(conversations: Sequence[Conversation], rejects: Sequence[Reject]) -> dict[str, Any]:
    """How many rows there are, and of the rejects by reason (the commonest first) how many and the
    first examples; ready for JSON.
    """
    by_reason: dict[str, Any] = {}
    for reason, count in Counter(reject.reason for reject in rejects).most_common():
        first = islice((r._asdict() for r in rejects if r.reason == reason), EXAMPLES)
        by_reason[reason] = {"count": count, "examples": list(first)}
    return {
        "rows": len(conversations) + len(rejects),
        "valid": len(conversations),
        "rejected": len(rejects),
        "rejects": by_reason,
    }


def quality(
    conversations: Sequence[Conversation],
    rejects: Sequence[Reject],
    token_lengths: Sequence[Sequence[int]] = (),
    max_tokens: int = 0,
) -> dict[str, Any]:
    """The account of a data set, ready for JSON; near duplicates are looked for among the first
    NEAR_LIMIT different conversations.

    token_lengths: of each conversation's answers, with all before them, where a tokenizer is at
    hand; max_tokens: the limit some may exceed.
    """
    unique = deduplicate(conversations)
    texts = [_whole(item) for item in conversations]
    near = near_duplicates([_whole(item) for item in unique[:NEAR_LIMIT]])
    kept = set(map(id, unique))
    findings = {
        "exact": [item for item in conversations if id(item) not in kept],
        "near": [unique[late] for late, _ in near],
        "width": _twins(unique),
        "nothing": [item for item in conversations if any(_NOTHING.match(m.content) for m in item)],
    }
    for name, pattern in FAULTS.items():
        pairs = zip(conversations, texts, strict=True)
        findings[name] = [item for item, text in pairs if pattern.search(text)]
    personal = {
        kind: _located(
            item for item, text in zip(conversations, texts, strict=True) if p.search(text)
        )
        for kind, p in PERSONAL.items()
    }
    categories = Counter(item.category for item in conversations if item.category)
    result = counts(conversations, rejects) | {
        "duplicates": {"exact": len(conversations) - len(unique), "near": len(near)},
        "turns": percentiles([sum(m.role == "assistant" for m in item) for item in conversations]),
        "characters": percentiles([len(text) for text in texts]),
        "languages": dict(Counter(map(language, texts)).most_common()),
        "boilerplate": _located(
            item for item in conversations if BOILERPLATE.search(item.messages[-1].content)
        ),
        "personal": personal,
        "findings": {name: _located(items) for name, items in findings.items()},
        "qwen_tokens": qwen_tokens(conversations),
        "reasoning": sum(
            any(m.reasoning or block_of(m.content)[0] for m in item if m.role == "assistant")
            for item in conversations
        ),
        "replacement_characters": sum("\ufffd" in text for text in texts),
        "categories": dict(categories.most_common(20)),
    }
    if token_lengths:
        answers = list(chain(*token_lengths))
        result |= {
            "tokens": percentiles(answers),
            "total_tokens": sum(answers),
            "limit": max_tokens,
            "over_limit": sum(max(lengths) > max_tokens for lengths in token_lengths),
        }
    return result
