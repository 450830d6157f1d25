"""What all metrics share: `Score`, the `Metric` protocol, and the one way from texts to statistics
to a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from cllm import __version__

# ends every signature, where sacrebleu names its own version
VERSION = f"version:cllm-{__version__}"


class Score(NamedTuple):
    """`value` is 0-100; `parts` holds what it was computed from; `signature` names every choice
    that changes it.
    """

    name: str
    value: float
    parts: dict[str, Any]
    signature: str

    def __str__(self) -> str:
        parts = ", ".join(f"{name} = {_brief(part)}" for name, part in self.parts.items())
        return f"{self.name}|{self.signature} = {self.value:.2f} ({parts})"


def _brief(part: object) -> str:
    if isinstance(part, list):
        return "/".join(map(_brief, part))
    return f"{part:.3f}".rstrip("0").rstrip(".") if isinstance(part, float) else str(part)


class Metric(Protocol):
    """Sentence scores, corpus scores and the bootstrap all add up the same sufficient
    statistics.
    """

    def statistics(self, hypothesis: str, references: Sequence[str]) -> list[float]:
        """Additive statistics of one hypothesis against its references (at least one)."""

    def score(self, totals: Sequence[float]) -> Score:
        """The score from the sum of any number of statistics; its signature does not know the
        number of references.
        """


def sentence_score(metric: Metric, hypothesis: str, references: Sequence[str | None]) -> Score:
    """One hypothesis against its references: a corpus of one pair. Raises ValueError as
    `corpus_statistics` does.
    """
    if not _is_list(references):
        raise ValueError(
            f"references must be a list of strings, not {references!r:.80}: "
            "for one reference write [reference]"
        )
    return corpus_score(metric, [hypothesis], [[reference] for reference in references])


def corpus_score(
    metric: Metric, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]
) -> Score:
    """Score the summed statistics (not the mean of sentence scores). Arguments and errors:
    `corpus_statistics`.
    """
    totals = [
        sum(column)
        for column in zip(*corpus_statistics(metric, hypotheses, references), strict=True)
    ]
    score = metric.score(totals)
    counts = {len(row) - row.count(None) for row in zip(*references, strict=True)}
    return score._replace(
        signature=f"nrefs:{counts.pop() if len(counts) == 1 else 'var'}|{score.signature}"
    )


def corpus_statistics(
    metric: Metric, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]
) -> list[list[float]]:
    """One row of statistics per hypothesis: what `significance` resamples.

    `references` holds streams, as sacrebleu takes them: stream k has the k-th reference of every
    hypothesis, None where a hypothesis has fewer references (an empty string counts as a
    reference).

    Raises ValueError for a string where a list belongs, streams of other lengths than `hypotheses`,
    no hypothesis, or a pair that is not a string with at least one string as reference.
    """
    named: list[tuple[str, object]] = [("hypotheses", hypotheses), ("references", references)]
    named += (
        [(f"references[{k}]", stream) for k, stream in enumerate(references)]
        if _is_list(references)
        else []
    )
    if bare := [name for name, value in named if not _is_list(value)]:
        raise ValueError(
            f"lists are needed, not a bare string or a single value, as {', '.join(bare)}; "
            "write references=[[…], …]"
        )
    lengths = [len(stream) for stream in references]
    if not hypotheses or set(lengths) != {len(hypotheses)}:
        message = "hypotheses and every stream of references must have the same length, at least 1"
        raise ValueError(f"{message}; got {len(hypotheses)} hypotheses and streams of {lengths}")
    rows = [
        [reference for reference in row if reference is not None]
        for row in zip(*references, strict=True)
    ]
    pairs = list(zip(hypotheses, rows, strict=True))
    if bad := [
        i
        for i, (text, row) in enumerate(pairs)
        if not row or not all(isinstance(t, str) for t in (text, *row))
    ]:
        raise ValueError(
            "each pair needs a string and at least one string as reference; "
            f"not so at positions {bad[:10]}"
        )
    return [metric.statistics(hypothesis, row) for hypothesis, row in pairs]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
