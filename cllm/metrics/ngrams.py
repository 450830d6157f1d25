"""Clipped n-gram matches: what BLEU, chrF and ROUGE-N count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, chain, count, pairwise


def ngram_matches(
    hypothesis: Sequence[str], references: Sequence[Sequence[str]], max_order: int
) -> list[int]:
    """Matches of orders 1..max_order; an n-gram counts at most as often as in the reference that
    has it most often.

    All texts are one row of integers. An n-gram is the rank of the (n - 1)-gram before it times the
    row's length, plus its last token: exact, no hash that could collide. Ranks come from sorting,
    3-5 times as fast as counting in dicts.
    """
    import numpy as np

    texts = [hypothesis, *references]
    bounds = list(pairwise(accumulate(map(len, texts), initial=0)))
    size = bounds[-1][1]
    seen: dict[str, int] = {}  # a token's number is where it was first seen
    tokens = np.fromiter(map(seen.setdefault, chain.from_iterable(texts), count()), np.int64, size)
    ranks, found = tokens, [0] * max_order
    for n in range(1, max_order + 1):
        if n > 1:
            keys = ranks[:-1] * size + tokens[n - 1 :]
            order = keys.argsort()
            ordered = keys[order]
            ranks = np.zeros_like(keys)
            ranks[order[1:]] = (ordered[1:] != ordered[:-1]).cumsum()
        # n-grams that reach into the next text are left out here
        hyp, *limits = (
            np.bincount(ranks[i : max(i, j - n + 1)], minlength=size) for i, j in bounds
        )
        found[n - 1] = int(np.minimum(hyp, reduce(np.maximum, limits)).sum())
        if not found[n - 1]:
            break
    return found


def ngram_total(text: Sequence[str], n: int) -> int:
    """Number of n-grams in `text`."""
    return max(len(text) - n + 1, 0)
