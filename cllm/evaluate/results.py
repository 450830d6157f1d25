"""What an evaluation comes to, and how it stands in eval.json and samples.jsonl.

eval.json is an object system -> the fields of `SystemScores` or `ExamScores`; samples.jsonl has one
object a question, of `Sample` or `ExamSample`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cllm.data.message import Message


@dataclass(frozen=True)
class Gap:
    """A system's score minus the base's, by paired bootstrap."""

    difference: float
    low: float
    """Bounds of the 95 % interval."""
    high: float
    p: float
    """Two-sided p-value."""


@dataclass(frozen=True)
class Group:
    """The answers whose references are of one length or one category."""

    answers: int
    scores: dict[str, float]


@dataclass(frozen=True)
class SystemScores:
    """What one system (`base`, `adapter`, `base 2-shot`, `copy`, `majority`) reached."""

    scores: dict[str, float]
    """Metric -> 0-100; `loss`: nats per token; `general-ppl`: a perplexity."""
    interval: dict[str, list[float]]
    """Metric -> [low, high] at 95 %, for the metrics that the base has too."""
    versus_base: dict[str, Gap]
    """Metric -> what the system changed; empty for the base."""
    by_length: dict[str, Group]
    """Characters of the reference -> scores; empty for a system that answered nothing."""
    by_category: dict[str, Group]


@dataclass(frozen=True)
class Sample:
    """One conversation, what the systems that need a model answered, and their scores."""

    category: str
    question: Sequence[Message]
    reference: str
    answers: dict[str, str]
    """System -> answer."""
    scores: dict[str, dict[str, float]]
    """System -> metric -> score of this answer alone (no BLEU of a corpus)."""

    def document(self) -> dict[str, Any]:
        return {
            "category": self.category,
            "messages": [message.row() for message in self.question],
            "reference": self.reference,
            **self.answers,
            "scores": self.scores,
        }


@dataclass(frozen=True)
class Evaluation:
    """All systems on one set of conversations or texts."""

    systems: dict[str, SystemScores]
    samples: list[Sample]
    preference: dict[str, float] = field(default_factory=dict)
    """What the held-out pairs tell of a preference run."""


@dataclass(frozen=True)
class Accuracy:
    """Right answers in percent, with Wilson's 95 % interval [low, high]."""

    accuracy: float
    interval: list[float]
    questions: int


@dataclass(frozen=True)
class SubjectAccuracy(Accuracy):
    """One subject of an exam."""

    shots: int
    """Solved examples that fitted before each question."""


@dataclass(frozen=True)
class ExamScores(Accuracy):
    """One system's exam; `accuracy` counts every question alike (the micro average)."""

    macro: float
    """Mean of the subjects' accuracies."""
    macro_interval: list[float]
    """By resampling the questions of every subject."""
    subjects: dict[str, SubjectAccuracy]
    versus_base: dict[str, Gap]
    """Of `accuracy`; empty for the base."""


@dataclass(frozen=True)
class ExamSample:
    """One question of an exam."""

    subject: str
    question: str
    answer: str
    log_likelihoods: dict[str, dict[str, float]]
    """System -> letter -> log p(letter | prompt) in nats."""

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Exam:
    """All systems on one exam."""

    systems: dict[str, ExamScores]
    samples: list[ExamSample]


def document(results: Evaluation | Exam) -> dict[str, Any]:
    """The content of eval.json: a system's or a group's scores stand beside its other fields, and
    what is empty is left out.
    """
    systems = {name: _flat(asdict(system)) for name, system in results.systems.items()}
    preference = results.preference if isinstance(results, Evaluation) else {}
    return systems | ({"preference": preference} if preference else {})


def _flat(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    fields = {key: _flat(part) for key, part in value.items() if part != {}}
    return fields.pop("scores", {}) | fields
