"""BLEU (Papineni et al. 2002) as sacrebleu 2.6 defines it, and nltk's method3 as Chinese fine-tuning tools use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .ngrams import ngram_matches, ngram_total
from .score import VERSION, Score, corpus_score, sentence_score
from .tokens import choice, tokenizer_signature, tokens

SMOOTHINGS = {"exp": 0.0, "floor": 0.1, "add-k": 1.0, "none": 0.0, "method3": 0.0}  # name -> default smooth_value


@dataclass(frozen=True)
class BLEU:
    """BLEU = BP * exp(mean of ln p_n, n <= max_order), p_n = clipped matches / n-grams, BP = min(1, e^(1 - ref / sys)).

    tokenize: zh | 13a | intl | none | char | jieba.
    smooth: for orders without a match (Chen and Cherry 2014): `exp` halves at each, p = 1 / (2^k * total); `floor` has
        p = smooth_value / total; `add-k` adds smooth_value to matches and totals of orders >= 2; `none`; and `method3`,
        nltk's form of `exp`: each total is at least 1 and white space counts as tokens (under `char` and `jieba`), so
        short exact matches score below 100. No match at all is 0 under every smoothing.
    effective_order: orders longer than the text do not count; otherwise they make the score 0.

    Several references: matches are clipped by the n-gram's maximum over them, ref is the closest length, the shorter on
    a tie. Raises ValueError for an unknown tokenizer or smoothing.
    """

    tokenize: str = "zh"
    smooth: str = "exp"
    smooth_value: float | None = None
    effective_order: bool = False
    lowercase: bool = False
    max_order: int = 4

    def __post_init__(self) -> None:
        choice("tokenize", self.tokenize)
        choice("smooth", self.smooth, tuple(SMOOTHINGS))

    def statistics(self, hypothesis: str, references: Sequence[str]) -> list[float]:
        """[sys_len, ref_len, matches of orders 1..max_order, totals of orders 1..max_order]."""
        least = int(self.smooth == "method3")
        hyp, *refs = (
            tokens(text.lower() if self.lowercase else text, self.tokenize, blanks=bool(least)) for text in (hypothesis, *references)
        )
        totals = [max(ngram_total(hyp, n), least) for n in range(1, self.max_order + 1)]
        _, ref_len = min((abs(len(ref) - len(hyp)), len(ref)) for ref in refs)
        return [len(hyp), ref_len, *ngram_matches(hyp, refs, self.max_order), *totals]

    def score(self, totals: Sequence[float]) -> Score:
        """`parts`: counts, totals and precisions (0-100) by order as smoothed, bp, sys_len, ref_len."""
        sys_len, ref_len = int(totals[0]), int(totals[1])
        counts, sums = list(totals[2 : 2 + self.max_order]), list(totals[2 + self.max_order :])
        bp = 1.0 if sys_len >= ref_len else math.exp(1 - ref_len / sys_len) if sys_len else 0.0
        precisions = self._precisions(counts, sums) if any(counts) else []
        orders = len(precisions) if self.effective_order else self.max_order
        precisions += [0.0] * (self.max_order - len(precisions))
        used = precisions[:orders]
        value = bp * math.exp(math.fsum(map(math.log, used)) / orders) * 100 if orders and all(used) else 0.0
        return Score(
            "BLEU",
            value,
            {
                "counts": counts,
                "totals": sums,
                "precisions": [100 * precision for precision in precisions],
                "bp": bp,
                "sys_len": sys_len,
                "ref_len": ref_len,
            },
            self.signature,
        )

    def _precisions(self, counts: list[float], sums: list[float]) -> list[float]:
        """Smoothed precisions (0-1) up to the longest order there is; `add-k` adds to `counts` and `sums` in place."""
        precisions: list[float] = []
        misses = 0
        for n in range(self.max_order):
            if self.smooth == "add-k" and n:
                counts[n] += self._k
                sums[n] += self._k
            if not sums[n]:
                break
            precision = counts[n] / sums[n]
            if not counts[n] and self.smooth in ("exp", "method3"):
                misses += 1
                precision = 1 / (2**misses * sums[n])
            elif not counts[n] and self.smooth == "floor":
                precision = self._k / sums[n]
            precisions.append(precision)
        return precisions

    @property
    def _k(self) -> float:
        return SMOOTHINGS[self.smooth] if self.smooth_value is None else self.smooth_value

    @property
    def signature(self) -> str:
        """sacrebleu's signature without `nrefs`, which only a corpus knows."""
        shown = f"[{self._k:.2f}]" if self.smooth in ("floor", "add-k") else ""
        return "|".join(
            [
                f"case:{'lc' if self.lowercase else 'mixed'}",
                f"eff:{'yes' if self.effective_order else 'no'}",
                tokenizer_signature(self.tokenize),
                f"smooth:{self.smooth}{shown}",
                VERSION,
            ]
        )


def sentence_bleu(
    hypothesis: str,
    references: Sequence[str | None],
    *,
    tokenize: str = "zh",
    smooth: str = "exp",
    smooth_value: float | None = None,
    effective_order: bool = True,
    lowercase: bool = False,
    max_order: int = 4,
) -> Score:
    """BLEU of one hypothesis against its references; see `BLEU` for options, `corpus_statistics` for errors."""
    metric = BLEU(tokenize, smooth, smooth_value, effective_order, lowercase, max_order)
    return sentence_score(metric, hypothesis, references)


def corpus_bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str | None]],
    *,
    tokenize: str = "zh",
    smooth: str = "exp",
    smooth_value: float | None = None,
    effective_order: bool = False,
    lowercase: bool = False,
    max_order: int = 4,
) -> Score:
    """BLEU of a corpus; `references` are streams, None where one is missing. See `BLEU`, `corpus_statistics`."""
    metric = BLEU(tokenize, smooth, smooth_value, effective_order, lowercase, max_order)
    return corpus_score(metric, hypotheses, references)
