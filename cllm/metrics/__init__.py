"""Metrics with their definitions on the label: BLEU, ROUGE, chrF, significance. No torch; numpy and jieba on use."""

from .bleu import BLEU, corpus_bleu, sentence_bleu
from .chrf import CHRF, corpus_chrf, sentence_chrf
from .rouge import ROUGE, generation_scores, lcs_length, rouge
from .score import Metric, Score, corpus_score, corpus_statistics, sentence_score
from .significance import Comparison, Interval, paired_bootstrap, wilson_interval
from .tokens import TOKENIZERS

__all__ = [
    "BLEU",
    "CHRF",
    "ROUGE",
    "TOKENIZERS",
    "Comparison",
    "Interval",
    "Metric",
    "Score",
    "corpus_bleu",
    "corpus_chrf",
    "corpus_score",
    "corpus_statistics",
    "generation_scores",
    "lcs_length",
    "paired_bootstrap",
    "rouge",
    "sentence_bleu",
    "sentence_chrf",
    "sentence_score",
    "wilson_interval",
]
