"""Metrics with their definitions on the label: BLEU, ROUGE, chrF, significance. No torch; numpy and
jieba on use.
"""

from cllm.metrics.bleu import BLEU, corpus_bleu, sentence_bleu
from cllm.metrics.chrf import CHRF, corpus_chrf, sentence_chrf
from cllm.metrics.rouge import ROUGE, generation_scores, rouge
from cllm.metrics.score import Metric, Score, corpus_score, corpus_statistics
from cllm.metrics.significance import FEWEST_PAIRS, paired_bootstrap, resampled, wilson_interval
from cllm.metrics.tokens import TOKENIZERS

__all__ = ["BLEU", "CHRF", "FEWEST_PAIRS", "ROUGE", "TOKENIZERS", "Metric", "Score"]
__all__ += [
    "corpus_bleu",
    "corpus_chrf",
    "corpus_score",
    "corpus_statistics",
    "generation_scores",
    "paired_bootstrap",
]
__all__ += ["resampled", "rouge", "sentence_bleu", "sentence_chrf", "wilson_interval"]
