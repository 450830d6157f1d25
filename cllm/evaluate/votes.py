"""The blind votes that the chat page records: how often the adapter won."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cllm.messages import say
from cllm.metrics import wilson_interval

OUTCOMES = ("wins", "losses", "ties", "both_bad")  # of the adapter


def summarise(votes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{`wins`, `losses`, `ties`, `both_bad`, `win_rate`, `low`, `high`, `by_category`: category -> the same} of the adapter.

    The rate is wins over decided votes with Wilson's 95 % interval (Wilson 1927); ties and both bad are counted beside it.
    """
    by_category: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in votes:
        if row.get("category"):
            by_category[str(row["category"])].append(row)
    return _counted(votes) | {"by_category": {name: _counted(rows) for name, rows in sorted(by_category.items())}}


def _counted(votes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = Counter(_outcome(row) for row in votes)
    rate = wilson_interval(counts["wins"], counts["wins"] + counts["losses"])
    return {name: counts[name] for name in OUTCOMES} | {"win_rate": rate.value, "low": rate.low, "high": rate.high}


def _outcome(row: Mapping[str, Any]) -> str:
    if row["vote"] not in ("a", "b"):
        return "ties" if row["vote"] == "tie" else "both_bad"
    return "losses" if row["models"]["ab".index(row["vote"])] == "base" else "wins"


def vote_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """All votes, then one line per category."""
    lines = [["", *(say(f"eval.votes.{name}") for name in OUTCOMES), say("eval.votes.win_rate"), "95 %"]]
    for name, its in [(say("eval.votes.all"), summary), *summary["by_category"].items()]:
        lines.append([name, *(str(its[key]) for key in OUTCOMES), f"{its['win_rate']:.1%}", f"{its['low']:.1%} … {its['high']:.1%}"])
    return lines
