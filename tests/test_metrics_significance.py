"""Paired bootstrap and Wilson's interval."""

from __future__ import annotations

import random
import time

import pytest

from cllm.metrics import (
    BLEU,
    ROUGE,
    corpus_bleu,
    corpus_statistics,
    paired_bootstrap,
    wilson_interval,
)

WORDS = "今天 天气 很好 我们 一起 去 公园 散步 然后 回家 做饭 ， 。".split()


def texts(number: int, seed: int, noise: float) -> list[str]:
    """The same `number` sentences for every seed, with a share of the words replaced."""
    common, own = random.Random(0), random.Random(seed)
    sentences = [[common.choice(WORDS) for _ in range(15)] for _ in range(number)]
    return [
        "".join(own.choice(WORDS) if own.random() < noise else word for word in sentence)
        for sentence in sentences
    ]


def test_a_real_difference_is_significant_and_no_difference_is_not() -> None:
    references, metric = [texts(100, 1, 0)], BLEU()
    worse, better, same = (
        corpus_statistics(metric, texts(100, seed, noise), references)
        for seed, noise in [(2, 0.5), (3, 0.2), (4, 0.2)]
    )
    comparison = paired_bootstrap(metric.score, worse, better)
    assert comparison.a.value == pytest.approx(corpus_bleu(texts(100, 2, 0.5), references).value)
    for interval in comparison[:3]:
        assert interval.low < interval.value < interval.high
    assert comparison.difference.low > 0
    assert comparison.difference.value == pytest.approx(comparison.b.value - comparison.a.value)
    assert comparison.p_value == pytest.approx(1 / 1001)
    assert paired_bootstrap(metric.score, better, same).p_value > 0.05
    assert paired_bootstrap(metric.score, better, better).p_value == 1


def test_swapping_the_systems_mirrors_the_result_and_the_seed_fixes_it() -> None:
    references, metric = [texts(30, 1, 0)], ROUGE("rougeL", "char")
    a, b = (corpus_statistics(metric, texts(30, seed, 0.3), references) for seed in (2, 3))
    forward, backward = paired_bootstrap(metric.score, a, b), paired_bootstrap(metric.score, b, a)
    assert forward.a == backward.b
    assert forward.p_value == backward.p_value
    assert forward.difference.low == pytest.approx(-backward.difference.high)
    assert forward == paired_bootstrap(metric.score, a, b)
    assert forward != paired_bootstrap(metric.score, a, b, seed=1)


def test_the_interval_of_a_mean_is_near_the_normal_one() -> None:
    rng = random.Random(5)
    rows = [[0.0, 0.0, rng.random(), 1.0] for _ in range(400)]
    interval = paired_bootstrap(ROUGE().score, rows, rows).a
    half_width = 100 * 1.96 * (1 / 12 / 400) ** 0.5
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.15)


def test_1000_resamples_of_1000_pairs_take_under_a_second() -> None:
    rng = random.Random(6)
    rows = [
        [20, 20, *(rng.randint(1, 20 - n) for n in range(4)), *range(20, 16, -1)]
        for _ in range(1000)
    ]
    start = time.process_time()
    paired_bootstrap(BLEU().score, rows, rows[::-1], resamples=1000)
    assert time.process_time() - start < 1


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="got 1 and 2 rows"):
        paired_bootstrap(ROUGE().score, [[0, 0, 0, 1]], [[0, 0, 0, 1]] * 2)
    with pytest.raises(ValueError, match="at least 1"):
        paired_bootstrap(ROUGE().score, [], [])
    for wins, total in [(3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="between 0 and total"):
            wilson_interval(wins, total)


def test_wilson_interval() -> None:
    # the roots p of (rate - p)^2 = z^2 p (1 - p) / n, which define the interval
    for wins, total in [(7, 10), (0, 5), (5, 5), (50.5, 100)]:
        rate, low, high = wilson_interval(wins, total)
        assert rate == wins / total
        for p in (low, high):
            assert (rate - p) ** 2 == pytest.approx(
                1.959963984540054**2 * p * (1 - p) / total, abs=1e-12
            )
        assert 0 <= low <= rate <= high <= 1
    assert wilson_interval(0, 0)[1:] == (0, 1)
