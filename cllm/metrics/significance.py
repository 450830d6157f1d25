"""Is the difference real? Paired bootstrap over sufficient statistics, and Wilson's interval for
win rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from cllm.metrics.score import Score

Rows = Sequence[Sequence[float]]
FEWEST_PAIRS = 20
"""Of fewer pairs a resample says nothing: no interval and no p-value is told."""


class Interval(NamedTuple):
    """A value and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two systems on the same pairs; `difference` is b - a."""

    a: Interval
    b: Interval
    difference: Interval
    p_value: float


def resampled(
    score: Callable[[list[float]], Score],
    systems: Sequence[Rows],
    *,
    resamples: int = 1000,
    seed: int = 12345,
) -> Any:
    """What every system scores, an array (1 + resamples, systems): first as observed, then of
    resampled pairs, the same for all.
    """
    import numpy as np

    pairs = len(systems[0])
    arrays = [np.asarray(rows, dtype=np.float64) for rows in systems]
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(0, pairs, pairs), minlength=pairs) for _ in range(resamples))
    return np.array(
        [
            [score((draw @ rows).tolist()).value for rows in arrays]
            for draw in chain([np.ones(pairs)], draws)
        ]
    )


def paired_bootstrap(
    score: Callable[[list[float]], Score],
    a: Rows,
    b: Rows,
    *,
    resamples: int = 1000,
    seed: int = 12345,
) -> Comparison:
    """Compare two systems by resampling the pairs (Koehn 2004), the same pairs for both.

    score: statistics summed -> Score, for instance `BLEU().score`; a, b: (pairs, statistics), from
    `corpus_statistics`. Intervals are percentiles of the resampled values. The p-value is
    two-sided, from the differences d* shifted to the null hypothesis (Riezler and Maxwell 2005): p
    = (1 + #{|d* - mean d*| >= |d|}) / (1 + resamples), 1 if a equals b.

    Raises ValueError if the two systems do not have the same number of pairs, at least 1.
    """
    import numpy as np

    pairs = len(a)
    if not pairs or len(b) != pairs:
        raise ValueError(
            f"a and b must score the same pairs, at least 1; got {pairs} and {len(b)} rows"
        )
    values = resampled(score, (a, b), resamples=resamples, seed=seed)
    # the first row is what was observed
    values = np.column_stack([values, values[:, 1] - values[:, 0]])
    low, high = np.quantile(values[1:], [0.025, 0.975], axis=0)
    intervals = [Interval(*map(float, bounds)) for bounds in zip(values[0], low, high, strict=True)]
    differences = values[1:, 2]
    # the tolerance: a difference that is the same in every resample must not depend on rounding
    smaller = abs(differences - differences.mean()) < abs(values[0, 2]) - 1e-12
    # what is not finite is not smaller, and so never significant
    extreme = int(np.count_nonzero(~smaller))
    return Comparison(intervals[0], intervals[1], intervals[2], (1 + extreme) / (1 + resamples))


def wilson_interval(wins: float, total: int) -> Interval:
    """Win rate (0-1) with Wilson's score interval (1927) at 95 %; a tie may count as half a win.

    centre +- margin = (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n). Nothing
    counted: 0 to 1. Raises ValueError unless 0 <= wins <= total.
    """
    if not 0 <= wins <= total:
        raise ValueError(f"wins must lie between 0 and total; got {wins} of {total}")
    if total == 0:
        return Interval(0.5, 0.0, 1.0)
    z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
    rate, scale = wins / total, 1 + z * z / total
    centre = (rate + z * z / (2 * total)) / scale
    margin = z * math.sqrt(rate * (1 - rate) / total + (z / (2 * total)) ** 2) / scale
    return Interval(
        rate, max(0.0, min(rate, centre - margin)), min(1.0, max(rate, centre + margin))
    )
