"""Metrics with their definitions on the label: BLEU, ROUGE, chrF, significance. No torch; numpy and
jieba on use.
"""

from cllm.metrics.bleu import BLEU
from cllm.metrics.chrf import CHRF
from cllm.metrics.rouge import ROUGE, generation_scores
from cllm.metrics.score import Metric, Score, corpus_score, corpus_statistics, sentence_score
from cllm.metrics.significance import paired_bootstrap, wilson_interval
from cllm.metrics.tokens import TOKENIZERS

__all__ = ["BLEU", "CHRF", "ROUGE", "TOKENIZERS", "Metric", "Score"]
__all__ += [
    "corpus_score",
    "corpus_statistics",
    "generation_scores",
    "paired_bootstrap",
    "sentence_score",
    "wilson_interval",
]
