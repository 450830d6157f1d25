"""chrF (Popović 2015), chrF+ and chrF++ (Popović 2017) as sacrebleu 2.6 defines them."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .ngrams import ngram_matches, ngram_total
from .score import VERSION, Score, corpus_score, sentence_score

_EPS = 1e-16


@dataclass(frozen=True)
class CHRF:
    """chrF = (1 + b^2) P R / (b^2 P + R), P and R the mean n-gram precision and recall over the orders both sides have.

    Character n-grams up to `char_order` (white space removed unless `whitespace`), word n-grams up to `word_order`
    (1: chrF+, 2: chrF++). `eps_smoothing` takes the mean of F over all orders instead, as chrF++.py and nltk do.
    Several references: the one with the best F counts.
    """

    char_order: int = 6
    word_order: int = 0
    beta: int = 2
    lowercase: bool = False
    whitespace: bool = False
    eps_smoothing: bool = False

    def statistics(self, hypothesis: str, references: Sequence[str]) -> list[float]:
        """[n-grams of the hypothesis, of the reference, matches] for each order, characters first."""
        rows = (self._pair(hypothesis, reference) for reference in references)
        return max(rows, key=lambda row: self._f(row)[0])

    def _units(self, text: str) -> tuple[Sequence[str], Sequence[str]]:
        """Characters and words."""
        text = text.lower() if self.lowercase else text
        return text if self.whitespace else "".join(text.split()), _peel(text.split())

    def _pair(self, hypothesis: str, reference: str) -> list[float]:
        row: list[float] = []
        sides = zip(self._units(hypothesis), self._units(reference), (self.char_order, self.word_order), strict=True)
        for hyp, ref, max_order in sides:
            for n, matches in enumerate(ngram_matches(hyp, [ref], max_order), start=1):
                ref_total = ngram_total(ref, n)
                row += [ngram_total(hyp, n) if ref_total else 0, ref_total, matches]
        return row

    def _f(self, totals: Sequence[float]) -> tuple[float, float, float]:
        """F, precision, recall (0-1)."""
        weight = self.beta**2
        orders = list(zip(totals[0::3], totals[1::3], totals[2::3], strict=True))
        both = [(match / hyp, match / ref) for hyp, ref, match in orders if hyp and ref]
        precision, recall = (sum(side) / len(both) for side in zip(*both, strict=True)) if both else (0.0, 0.0)
        if not self.eps_smoothing:
            f = (1 + weight) * precision * recall / (weight * precision + recall) if precision + recall else 0.0
            return f, precision, recall
        mean = 0.0
        for hyp, ref, match in orders:
            p, r = (match / hyp if hyp else _EPS), (match / ref if ref else _EPS)
            mean += (1 + weight) * p * r / (weight * p + r) if p or r else _EPS
        return mean / len(orders), precision, recall

    def score(self, totals: Sequence[float]) -> Score:
        """`parts`: mean precision and recall (0-100) over the orders that both sides have."""
        f, precision, recall = self._f(totals)
        parts = {"precision": 100 * precision, "recall": 100 * recall}
        return Score(f"chrF{self.beta}{'+' * self.word_order}", 100 * f, parts, self.signature)

    @property
    def signature(self) -> str:
        """sacrebleu's signature without `nrefs`, which only a corpus knows."""
        return "|".join(
            [
                f"case:{'lc' if self.lowercase else 'mixed'}",
                f"eff:{'no' if self.eps_smoothing else 'yes'}",
                f"nc:{self.char_order}|nw:{self.word_order}|space:{'yes' if self.whitespace else 'no'}",
                VERSION,
            ]
        )


def _peel(words: Iterable[str]) -> list[str]:
    """Cut one ASCII punctuation mark off each word: the last character, else the first."""
    peeled: list[str] = []
    for word in words:
        if len(word) > 1 and word[-1] in string.punctuation:
            peeled += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in string.punctuation:
            peeled += [word[0], word[1:]]
        else:
            peeled.append(word)
    return peeled


def sentence_chrf(
    hypothesis: str,
    references: Sequence[str | None],
    *,
    char_order: int = 6,
    word_order: int = 0,
    beta: int = 2,
    lowercase: bool = False,
    whitespace: bool = False,
    eps_smoothing: bool = False,
) -> Score:
    """chrF of one hypothesis (chrF++: word_order=2); see `CHRF` for options, `corpus_statistics` for errors."""
    metric = CHRF(char_order, word_order, beta, lowercase, whitespace, eps_smoothing)
    return sentence_score(metric, hypothesis, references)


def corpus_chrf(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str | None]],
    *,
    char_order: int = 6,
    word_order: int = 0,
    beta: int = 2,
    lowercase: bool = False,
    whitespace: bool = False,
    eps_smoothing: bool = False,
) -> Score:
    """chrF of a corpus; `references` are streams, None where one is missing. See `CHRF` and `corpus_statistics`."""
    metric = CHRF(char_order, word_order, beta, lowercase, whitespace, eps_smoothing)
    return corpus_score(metric, hypotheses, references)
