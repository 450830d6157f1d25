"""The blind votes that the chat page records: for each pair of models, how often the first one
won.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cllm.messages import say
from cllm.metrics import FEWEST_PAIRS, wilson_interval
from cllm.runs import read_metrics

OUTCOMES = ("wins", "losses", "ties", "both_bad")
Votes = Sequence[Mapping[str, Any]]


def read_votes(file: Path) -> list[dict[str, Any]]:
    """The lines of a votes.jsonl that are votes on two models' answers."""
    rows = [row for row in read_metrics(file) if isinstance(row, dict)]
    return [row for row in rows if "vote" in row and _are_two(row.get("models"))]


def _are_two(models: Any) -> bool:
    is_list = isinstance(models, list) and len(models) == 2
    return is_list and all(isinstance(name, str) for name in models)


@dataclass(frozen=True)
class Tally:
    """Votes on a pair of models, counted for the first of them."""

    wins: int
    losses: int
    ties: int
    both_bad: int
    win_rate: float
    """Wins over decided votes (0-1); ties and both bad are counted beside it."""
    low: float
    """Bounds of Wilson's 95 % interval (Wilson 1927)."""
    high: float


@dataclass(frozen=True)
class PairVotes(Tally):
    """All votes on one pair, and those of each category."""

    models: list[str]
    """With the base, the base is the second; two adapters stand in the order of their names."""
    by_category: dict[str, Tally]


def summarise(votes: Votes) -> list[PairVotes]:
    """The rows of votes.jsonl counted for each pair of models, most votes first."""
    # pair -> category -> its votes; the category "" has all of the pair's
    pairs: defaultdict[tuple[str, ...], defaultdict[str, list[Mapping[str, Any]]]]
    pairs = defaultdict(lambda: defaultdict(list))
    for row in votes:
        pair = tuple(sorted(row["models"], key=lambda name: (name == "base", name)))
        for category in {"", str(row.get("category") or "")}:
            pairs[pair][category].append(row)
    summaries = []
    for pair, groups in sorted(pairs.items(), key=lambda item: (-len(item[1][""]), item[0])):
        total = _tally(pair[0], groups.pop(""))
        by_category = {name: _tally(pair[0], rows) for name, rows in sorted(groups.items())}
        summaries.append(PairVotes(**asdict(total), models=list(pair), by_category=by_category))
    return summaries


def _tally(first: str, votes: Votes) -> Tally:
    counts = Counter(_outcome(first, row) for row in votes)
    rate = wilson_interval(counts["wins"], counts["wins"] + counts["losses"])
    numbers = {outcome: counts[outcome] for outcome in OUTCOMES}
    return Tally(**numbers, win_rate=rate.value, low=rate.low, high=rate.high)


def _outcome(first: str, row: Mapping[str, Any]) -> str:
    if row["vote"] not in ("a", "b"):
        return "ties" if row["vote"] == "tie" else "both_bad"
    return "wins" if row["models"]["ab".index(row["vote"])] == first else "losses"


def vote_table(pairs: Sequence[PairVotes]) -> list[list[str]]:
    """All votes of a pair, then one line per category; then the next pair. No win rate of fewer
    than FEWEST_PAIRS decided votes.
    """
    heads = [say(f"eval.votes.{outcome}") for outcome in OUTCOMES]
    lines = [["", *heads, say("eval.votes.win_rate"), "95 %"]]
    for pair in pairs:
        for name, tally in {" ↔ ".join(pair.models): pair, **pair.by_category}.items():
            counts = [str(getattr(tally, outcome)) for outcome in OUTCOMES]
            told = [f"{tally.win_rate:.1%}", f"{tally.low:.1%} … {tally.high:.1%}"]
            if tally.wins + tally.losses < FEWEST_PAIRS:
                told = [f"n < {FEWEST_PAIRS}", ""]
            lines.append([name, *counts, *told])
    return lines
