"""ROUGE (Lin 2004) by two definitions: clipped counts (rouge-score 0.1.2) and sets (rouge-chinese
1.0.3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from cllm.metrics.bleu import sentence_bleu
from cllm.metrics.ngrams import ngram_matches, ngram_total
from cllm.metrics.score import VERSION, Score, sentence_score
from cllm.metrics.tokens import Tokens, choice, tokenizer_signature, tokens

KINDS = {
    "clipped": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "set": ("rouge1", "rouge2", "rougeL"),
}


@dataclass(frozen=True)
class ROUGE:
    """F = 2PR / (P + R) of matching n-grams (rouge1, rouge2) or of the longest common subsequence
    (rougeL, rougeLsum).

    counts `clipped`: rouge-score's definition over the tokens that are not white space. rougeLsum
    goes line by line: the union of a reference line's common subsequences with all lines of the
    hypothesis, clipped by token counts. counts `set`: rouge-chinese's definition, which Chinese
    users compare: repeated n-grams count once (so loops go unpunished), F = 2PR / (P + R + 1e-8),
    blank lines give empty tokens; it has no rougeLsum.

    Several references: the best F counts. A corpus score is the mean over pairs. Raises ValueError
    for unknown options.
    """

    kind: str = "rougeL"
    tokenize: str = "jieba"
    counts: str = "clipped"

    def __post_init__(self) -> None:
        choice("tokenize", self.tokenize)
        choice("counts", self.counts, tuple(KINDS))
        choice("kind", self.kind, KINDS[self.counts])

    def statistics(self, hypothesis: str, references: Sequence[str]) -> list[float]:
        """[precision, recall, F, 1.0], each 0-1."""
        return max(
            (self._pair(hypothesis, reference) for reference in references), key=lambda row: row[2]
        )

    def _pair(self, *texts: str) -> list[float]:
        sets = self.counts == "set"
        hyp, ref = (
            (_rouge_chinese_tokens if sets else tokens)(text, self.tokenize) for text in texts
        )
        sizes = [len(hyp), len(ref)]
        if self.kind == "rougeLsum":
            matches = _union_lcs(
                *([tokens(line, self.tokenize) for line in text.split("\n")] for text in texts)
            )
        elif self.kind == "rougeL":
            matches = lcs_length(hyp, ref)
        elif sets:
            ours, theirs = (
                set(text) if self.kind == "rouge1" else set(pairwise(text)) for text in (hyp, ref)
            )
            matches, sizes = len(ours & theirs), [len(ours), len(theirs)]
        else:
            n = int(self.kind[-1])
            matches, sizes = (
                ngram_matches(hyp, [ref], n)[-1],
                [ngram_total(hyp, n), ngram_total(ref, n)],
            )
        if not matches:
            return [0.0, 0.0, 0.0, 1.0]
        precision, recall = (matches / size for size in sizes)
        return [
            precision,
            recall,
            2.0 * ((precision * recall) / (precision + recall + (1e-8 if sets else 0.0))),
            1.0,
        ]

    def score(self, totals: Sequence[float]) -> Score:
        """Means over the pairs; `parts`: precision and recall (0-100)."""
        precision, recall, f, pairs = totals
        name = self.kind if self.counts == "clipped" else f"rouge-chinese-{self.kind[5:].lower()}"
        return Score(
            name,
            f * 100 / pairs,
            {"precision": precision * 100 / pairs, "recall": recall * 100 / pairs},
            self.signature,
        )

    @property
    def signature(self) -> str:
        """Every choice but `nrefs`, which only a corpus knows."""
        return f"{tokenizer_signature(self.tokenize)}|counts:{self.counts}|{VERSION}"


@lru_cache(maxsize=16)  # the three kinds ask for the same pair
def _rouge_chinese_tokens(text: str, tokenizer: str) -> Tokens:
    """The tokens as rouge-chinese sees them in " ".join(tokens).

    It starts a line after each 。！？? and after six dots, then splits the lines at white space: a
    line of nothing else gives one empty token, seven dots give two tokens.
    """
    spaced = re.sub("([。！？?])", r"\1\n", " ".join(tokens(text, tokenizer, blanks=True)))
    spaced = re.sub(r"(\.{6})([^”’])", r"\1\n\2", spaced).rstrip()
    return tuple(token for line in spaced.split("\n") if line for token in line.split() or [""])


def _places(tokens: Tokens) -> dict[str, int]:
    """token -> integer whose bit i says that it stands at position i."""
    places: dict[str, int] = {}
    for i, token in enumerate(tokens):
        places[token] = places.get(token, 0) | 1 << i
    return places


@lru_cache(maxsize=16)  # rougeL and the rougeLsum of one-line texts ask for the same pair
def lcs_length(hypothesis: Tokens, reference: Tokens) -> int:
    """Length of the longest common subsequence, bit-parallel (Crochemore et al. 2001): O(n * m /
    word).

    After j tokens of the hypothesis, bit i of `column` is 0 where they have a longer LCS with
    reference[: i + 1] than with reference[:i]. Python's integers have any length; each carry out of
    bit len(reference) - 1 is one more common token.
    """
    column = (1 << len(reference)) - 1
    for places in filter(None, map(_places(reference).get, hypothesis)):
        hits = column & places
        column = (column + hits) | (column ^ hits)
    return (column >> len(reference)).bit_length()


def _lcs_positions(hypothesis: Tokens, reference: Tokens) -> list[int]:
    """Where in the reference the LCS lies that rouge-score picks: from the end, matches first; else
    the reference steps back unless that shortens the LCS.
    """
    columns, places = [(1 << len(reference)) - 1], _places(reference)
    for token in hypothesis:
        hits = columns[-1] & places.get(token, 0)
        columns.append((columns[-1] + hits) | (columns[-1] ^ hits))
    i, j = len(reference) - 1, len(hypothesis) - 1
    positions = []
    while i >= 0 and j >= 0:
        if reference[i] == hypothesis[j]:
            positions.append(i)
            i, j = i - 1, j - 1
        elif columns[j + 1] >> i & 1:
            i -= 1
        else:
            j -= 1
    return positions


def _union_lcs(hypothesis: list[Tokens], reference: list[Tokens]) -> int:
    """Matches of rougeLsum (Lin 2004, section 3.2), clipped by the tokens of the hypothesis as
    ROUGE 1.5.5 does.
    """
    if len(hypothesis) == len(reference) == 1:
        return lcs_length(hypothesis[0], reference[0])
    common: list[str] = []
    for line in reference:
        common += [
            line[i] for i in {i for other in hypothesis for i in _lcs_positions(other, line)}
        ]
    return ngram_matches(common, [[token for line in hypothesis for token in line]], 1)[0]


def rouge(
    hypothesis: str,
    references: Sequence[str | None],
    *,
    tokenize: str = "jieba",
    counts: str = "clipped",
) -> dict[str, Score]:
    """{"rouge1", "rouge2", "rougeL", "rougeLsum"} of one hypothesis (no rougeLsum with
    counts="set").

    See `ROUGE` for the two definitions and `corpus_statistics` for the errors; texts without tokens
    score 0.
    """
    choice("counts", counts, tuple(KINDS))
    return {
        kind: sentence_score(ROUGE(kind, tokenize, counts), hypothesis, references)
        for kind in KINDS[counts]
    }


def generation_scores(hypothesis: str, reference: str) -> dict[str, float]:
    """{"rouge-1", "rouge-2", "rouge-l", "bleu-4"}, 0-100, rounded to 4 decimals: LLaMA-Factory's
    predict metrics.

    rouge-chinese's F over jieba's words and nltk's BLEU-4 over characters with method3; an empty
    side scores 0, and so does white space in rouge, whereas to BLEU-4 it is characters. Over a data
    set LLaMA-Factory reports the means of these numbers. (ChatGLM3's bleu-4 is `sentence_bleu` /
    100 of the stripped texts with tokenize="jieba", smooth="method3".)
    """
    scores = [*rouge(hypothesis, [reference], counts="set").values()]
    scores.append(sentence_bleu(hypothesis, [reference], tokenize="char", smooth="method3"))
    return {
        name: round(score.value, 4)
        for name, score in zip(("rouge-1", "rouge-2", "rouge-l", "bleu-4"), scores, strict=True)
    }
