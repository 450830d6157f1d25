"""Is the difference real? Paired bootstrap over sufficient statistics, and Wilson's interval for win rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .score import Score


class Interval(NamedTuple):
    """A value and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two systems on the same pairs; `difference` is b - a."""

    a: Interval
    b: Interval
    difference: Interval
    p_value: float


def paired_bootstrap(
    score: Callable[[Sequence[float]], Score],
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 12345,
) -> Comparison:
    """Compare two systems by resampling the pairs (Koehn 2004), the same pairs for both.

    score: statistics summed -> Score, for instance `BLEU().score`; a, b: (pairs, statistics), from `corpus_statistics`.
    Intervals are percentiles of the resampled values. The p-value is two-sided, from the differences d* shifted to the
    null hypothesis (Riezler and Maxwell 2005): p = (1 + #{|d* - mean d*| >= |d|}) / (1 + resamples), 1 if a equals b.

    Raises ValueError if the two systems do not have the same number of pairs, at least 1.
    """
    import numpy as np

    systems = [np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)]
    pairs = len(systems[0])
    if not pairs or len(systems[1]) != pairs:
        raise ValueError(f"a and b must score the same pairs, at least 1; got {pairs} and {len(systems[1])} rows")
    rng = np.random.default_rng(seed)
    values = np.empty((resamples, 2))
    for row in values:
        times_drawn = np.bincount(rng.integers(0, pairs, pairs), minlength=pairs)
        row[:] = [score((times_drawn @ system).tolist()).value for system in systems]
    observed = [score(system.sum(axis=0).tolist()).value for system in systems]
    observed.append(observed[1] - observed[0])
    values = np.column_stack([values, values[:, 1] - values[:, 0]])
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(values, tails, axis=0).tolist()
    shifted = np.abs(values[:, 2] - values[:, 2].mean())
    # the tolerance: a difference that is the same in every resample must not depend on rounding
    extreme = int(np.count_nonzero(shifted >= abs(observed[2]) - 1e-12))
    intervals = [Interval(*bounds) for bounds in zip(observed, low, high, strict=True)]
    return Comparison(intervals[0], intervals[1], intervals[2], (1 + extreme) / (1 + resamples))


def wilson_interval(wins: float, total: int, *, confidence: float = 0.95) -> Interval:
    """Win rate (0-1) with Wilson's score interval (1927); a tie may count as half a win.

    centre +- margin = (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n). Nothing counted: 0 to 1.
    Raises ValueError unless 0 <= wins <= total.
    """
    from statistics import NormalDist

    if not 0 <= wins <= total:
        raise ValueError(f"wins must lie between 0 and total; got {wins} of {total}")
    if total == 0:
        return Interval(0.5, 0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, scale = wins / total, 1 + z * z / total
    centre = (rate + z * z / (2 * total)) / scale
    margin = z * math.sqrt(rate * (1 - rate) / total + (z / (2 * total)) ** 2) / scale
    return Interval(rate, max(0.0, min(rate, centre - margin)), min(1.0, max(rate, centre + margin)))
