"""BLEU (Papineni et al. 2002) as sacrebleu 2.6 defines it, and nltk's method3 as Chinese
fine-tuning tools use it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cllm.metrics.ngrams import ngram_matches, ngram_total
from cllm.metrics.score import VERSION, Score, corpus_score, sentence_score
from cllm.metrics.tokens import choice, tokenizer_signature, tokens

# name -> default smooth_value
SMOOTHINGS = {"exp": 0.0, "floor": 0.1, "add-k": 1.0, "none": 0.0, "method3": 0.0}


@dataclass(frozen=True)
class BLEU:
    """BLEU = BP * exp(mean of ln p_n, n <= max_order), p_n = clipped matches / n-grams, BP = min(1,
    e^(1 - ref / sys)).

    tokenize: zh | 13a | intl | none | char | jieba. smooth: for orders without a match (Chen and
    Cherry 2014): `exp` halves at each, p = 1 / (2^k * total); `floor` has
        p = smooth_value / total; `add-k` adds smooth_value to matches and totals of orders >= 2;
        `none`; and `method3`, nltk's form of `exp`: each total is at least 1 and white space counts
        as tokens (under `char` and `jieba`), so short exact matches score below 100. No match at
        all is 0 under every smoothing.
    effective_order: orders longer than the text do not count; otherwise they make the score 0.

    Several references: matches are clipped by the n-gram's maximum over them, ref is the closest
    length, the shorter on a tie. Raises ValueError for an unknown tokenizer or smoothing.
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
        nltk = self.smooth == "method3"
        texts = (text.lower() if self.lowercase else text for text in (hypothesis, *references))
        hyp, *refs = (tokens(text, self.tokenize, blanks=nltk) for text in texts)
        totals = [max(ngram_total(hyp, n), int(nltk)) for n in range(1, self.max_order + 1)]
        _, ref_len = min((abs(len(ref) - len(hyp)), len(ref)) for ref in refs)
        return [len(hyp), ref_len, *ngram_matches(hyp, refs, self.max_order), *totals]

    def score(self, totals: Sequence[float]) -> Score:
        """`parts`: counts, totals and precisions (0-100) by order as smoothed, bp, sys_len,
        ref_len.
        """
        sys_len, ref_len = int(totals[0]), int(totals[1])
        counts, sums = list(totals[2 : 2 + self.max_order]), list(totals[2 + self.max_order :])
        bp = 1.0 if sys_len >= ref_len else math.exp(1 - ref_len / sys_len) if sys_len else 0.0
        precisions = self._precisions(counts, sums) if any(counts) else []
        missing = [0.0] * (self.max_order - len(precisions))
        used = precisions if self.effective_order else precisions + missing
        value = (
            bp * math.exp(math.fsum(map(math.log, used)) / len(used)) * 100
            if used and all(used)
            else 0.0
        )
        percent = [100 * precision for precision in precisions + missing]
        parts = {
            "counts": counts,
            "totals": sums,
            "precisions": percent,
            "bp": bp,
            "sys_len": sys_len,
            "ref_len": ref_len,
        }
        return Score("BLEU", value, parts, self.signature)

    def _precisions(self, counts: list[float], sums: list[float]) -> list[float]:
        """Smoothed precisions (0-1) up to the longest order there is; `add-k` adds to `counts` and
        `sums` in place.
        """
        precisions: list[float] = []
        halves = 1
        for n in range(self.max_order):
            if self.smooth == "add-k" and n:
                counts[n], sums[n] = counts[n] + self._k, sums[n] + self._k
            if not sums[n]:
                break
            precision = counts[n] / sums[n]
            if not counts[n] and self.smooth in ("exp", "method3"):
                halves *= 2
                precision = 1 / (halves * sums[n])
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
        case, effective = (
            "lc" if self.lowercase else "mixed",
            "yes" if self.effective_order else "no",
        )
        smooth = (
            f"{self.smooth}[{self._k:.2f}]" if self.smooth in ("floor", "add-k") else self.smooth
        )
        tokens = tokenizer_signature(self.tokenize)
        return f"case:{case}|eff:{effective}|{tokens}|smooth:{smooth}|{VERSION}"


def sentence_bleu(
    hypothesis: str,
    references: Sequence[str | None],
    *,
    effective_order: bool = True,
    **options: Any,
) -> Score:
    """BLEU of one hypothesis against its references; `options` are `BLEU`'s. Raises ValueError as
    `corpus_statistics` does.
    """
    return sentence_score(BLEU(effective_order=effective_order, **options), hypothesis, references)


def corpus_bleu(
    hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], **options: Any
) -> Score:
    """BLEU of a corpus; `options` are `BLEU`'s. For the streams of references and the errors see
    `corpus_statistics`.
    """
    return corpus_score(BLEU(**options), hypotheses, references)
