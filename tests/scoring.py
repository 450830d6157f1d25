"""Scores of texts by the options' names, as the tests of metrics write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cllm.metrics import BLEU, CHRF, ROUGE, Score, corpus_score, sentence_score
from cllm.metrics.rouge import KINDS

References = Sequence[str | None]


def sentence_bleu(
    hypothesis: str, references: References, *, effective_order: bool = True, **options: Any
) -> Score:
    return sentence_score(BLEU(effective_order=effective_order, **options), hypothesis, references)


def corpus_bleu(
    hypotheses: Sequence[str], references: Sequence[References], **options: Any
) -> Score:
    return corpus_score(BLEU(**options), hypotheses, references)


def sentence_chrf(hypothesis: str, references: References, **options: Any) -> Score:
    return sentence_score(CHRF(**options), hypothesis, references)


def corpus_chrf(
    hypotheses: Sequence[str], references: Sequence[References], **options: Any
) -> Score:
    return corpus_score(CHRF(**options), hypotheses, references)


def rouge(
    hypothesis: str, references: References, tokenize: str = "jieba", counts: str = "clipped"
) -> dict[str, Score]:
    return {
        kind: sentence_score(ROUGE(kind, tokenize, counts), hypothesis, references)
        for kind in KINDS[counts]
    }
