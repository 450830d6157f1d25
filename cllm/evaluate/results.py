"""What an evaluation comes to, and how it stands in eval.json and samples.jsonl.

eval.json is an object system -> the fields of `SystemScores` or `ExamScores`; samples.jsonl has one
object a question, of `Sample` or `ExamSample`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from cllm.data.message import Message

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Gap:
    """A system's score minus another's on the same answers, by paired bootstrap; of fewer than
    FEWEST_PAIRS answers the difference alone.
    """

    difference: float | None
    """None in a file: not finite."""
    low: float | None = None
    """Bounds of the 95 % interval."""
    high: float | None = None
    p: float | None = None
    """Two-sided p-value."""


@dataclass(frozen=True)
class Group:
    """The answers whose references are of one length or one category."""

    answers: int
    scores: dict[str, float]


@dataclass(frozen=True)
class SystemScores:
    """What one system (`base`, `adapter`, `adapter 0.5`: at that strength, `base 2-shot`, `copy`,
    `majority`) reached.
    """

    scores: dict[str, float]
    """Metric -> 0-100; `loss`: nats per token; `general-ppl`: a perplexity."""
    interval: dict[str, list[float]]
    """Metric -> [low, high] at 95 %, for the metrics that the base has too, of FEWEST_PAIRS answers
    or more.
    """
    n: dict[str, int]
    """Metric -> of how many answers, conversations or texts."""
    versus_base: dict[str, Gap]
    """Metric -> what the system changed; empty for the base."""
    versus_copy: dict[str, Gap]
    """Metric -> what the adapter is beyond copying the question; empty for the others."""
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
class Strength:
    """Which of the measured strengths of the adapter is recommended, by `answers.recommend`."""

    recommended: float | None
    """None: no strength is as wanted."""
    interval: list[float]
    """[low, high] at 95 % of the resamples that have one; empty where none has, or of fewer than
    FEWEST_PAIRS answers.
    """
    share: float | None
    """Of the resamples that have one; None of fewer than FEWEST_PAIRS answers."""


@dataclass(frozen=True)
class Evaluation:
    """All systems on one set of conversations or texts."""

    systems: dict[str, SystemScores]
    samples: list[Sample]
    preference: dict[str, float] = field(default_factory=dict)
    """What the held-out pairs tell of a preference run."""
    drawn: list[int] = field(default_factory=list)
    """After a training, where not all were asked: which of the held-out conversations, counted
    from 0.
    """
    strength: Strength | None = None
    """Where further strengths of the adapter were measured."""

    @property
    def counts(self) -> dict[str, int]:
        """Metric -> of how many answers, conversations or texts it is."""
        return {c: n for system in self.systems.values() for c, n in system.n.items()}

    @property
    def n(self) -> int:
        """Answers that were scored; without answers, conversations or texts."""
        return self.counts.get("exact", self.counts.get("loss", 0))


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
    """By resampling the questions of every subject; empty for fewer than FEWEST_PAIRS."""
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

    @property
    def n(self) -> int:
        """Questions."""
        return self.systems["base"].questions


def system_at(strength: float) -> str:
    """What the adapter is called at a strength: 0 is the base."""
    return "base" if strength == 0 else "adapter" if strength == 1 else f"adapter {strength}"


def strength_of(system: str) -> float | None:
    """The strength of a system of that name; None of what has none."""
    name, _, rest = system.partition(" ")
    return float(rest or 1) if name == "adapter" else 0.0 if system == "base" else None


def by_strength(systems: Mapping[str, Kept]) -> dict[float, Kept]:
    """The base and the adapter at every strength, in the order of the strengths."""
    placed = [(strength_of(name), system) for name, system in systems.items()]
    known = [(place, system) for place, system in placed if place is not None]
    return dict(sorted(known, key=lambda pair: pair[0]))


def document(results: Evaluation | Exam) -> dict[str, Any]:
    """The content of eval.json: a system's or a group's scores stand beside its other fields, and
    what is empty is left out.
    """
    systems = {name: _flat(asdict(system)) for name, system in results.systems.items()}
    if isinstance(results, Evaluation):
        strength = results.strength and asdict(results.strength)
        beside = {"preference": results.preference, "drawn": results.drawn, "strength": strength}
        systems |= {key: value for key, value in beside.items() if value}
    return systems


def scores_of(document: Mapping[str, Any]) -> Evaluation:
    """The systems and scores of an eval.json that a training wrote."""
    systems = {}
    for name, entry in document.items():
        if name not in ("preference", "drawn", "strength"):
            base, copy = (
                {metric: Gap(**gap) for metric, gap in entry.get(key, {}).items()}
                for key in ("versus_base", "versus_copy")
            )
            scores = {key: value for key, value in entry.items() if isinstance(value, int | float)}
            n = entry.get("n", {})
            systems[name] = SystemScores(scores, {}, n, base, copy, {}, {})
    return Evaluation(systems, [])


def _flat(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    fields = {key: _flat(part) for key, part in value.items() if part != {}}
    return fields.pop("scores", {}) | fields
