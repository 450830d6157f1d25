"""chrF (Popović 2015), chrF+ and chrF++ (Popović 2017) as sacrebleu 2.6 defines them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import punctuation
from typing import Any

from cllm.metrics.ngrams import ngram_matches, ngram_total
from cllm.metrics.score import VERSION, Score, corpus_score, sentence_score


@dataclass(frozen=True)
class CHRF:
    """chrF = (1 + b^2) P R / (b^2 P + R), P and R the mean n-gram precision and recall over the
    orders both sides have.

    Character n-grams without white space up to `char_order`, word n-grams up to `word_order` (1:
    chrF+, 2: chrF++). Several references: the one with the best F counts.
    """

    char_order: int = 6
    word_order: int = 0
    beta: int = 2

    def statistics(self, hypothesis: str, references: Sequence[str]) -> list[float]:
        """[n-grams of the hypothesis, of the reference, matches] for each order, characters
        first.
        """
        return max(
            (self._pair(hypothesis, reference) for reference in references),
            key=lambda row: self.score(row).value,
        )

    def _pair(self, *texts: str) -> list[float]:
        row: list[float] = []
        characters, words = (
            ["".join(text.split()) for text in texts],
            [_words(text) for text in texts],
        )
        for (hyp, ref), max_order in ((characters, self.char_order), (words, self.word_order)):
            for n, matches in enumerate(ngram_matches(hyp, [ref], max_order), start=1):
                ref_total = ngram_total(ref, n)
                row += [ngram_total(hyp, n) if ref_total else 0, ref_total, matches]
        return row

    def score(self, totals: Sequence[float]) -> Score:
        """`parts`: mean precision and recall (0-100) over the orders that both sides have."""
        orders = zip(totals[0::3], totals[1::3], totals[2::3], strict=True)
        both = [(match / hyp, match / ref) for hyp, ref, match in orders if hyp and ref]
        precision, recall = (
            (sum(side) / len(both) for side in zip(*both, strict=True)) if both else (0.0, 0.0)
        )
        weight = self.beta**2
        f = (
            (1 + weight) * precision * recall / (weight * precision + recall)
            if precision and recall
            else 0.0
        )
        # as sacrebleu signs it, without `nrefs`, which only a corpus knows
        signature = (
            f"case:mixed|eff:yes|nc:{self.char_order}|nw:{self.word_order}|space:no|{VERSION}"
        )
        parts = {"precision": 100 * precision, "recall": 100 * recall}
        return Score(f"chrF{self.beta}{'+' * self.word_order}", 100 * f, parts, signature)


def _words(text: str) -> list[str]:
    """Words with one ASCII punctuation mark cut off each: the last character, else the first."""
    cuts = [
        (word, len(word) - 1 if word[-1] in punctuation else int(word[0] in punctuation))
        for word in text.split()
    ]
    return [piece for word, cut in cuts for piece in (word[:cut], word[cut:]) if piece]


def sentence_chrf(hypothesis: str, references: Sequence[str | None], **options: Any) -> Score:
    """chrF of one hypothesis (chrF++: word_order=2); `options` are `CHRF`'s. Raises ValueError as
    `corpus_statistics` does.
    """
    return sentence_score(CHRF(**options), hypothesis, references)


def corpus_chrf(
    hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], **options: Any
) -> Score:
    """chrF of a corpus; `options` are `CHRF`'s. For the streams of references and the errors see
    `corpus_statistics`.
    """
    return corpus_score(CHRF(**options), hypotheses, references)
