"""The blind votes that the chat page records: for each pair of models, how often the first one
won.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cllm.messages import say
from cllm.metrics import wilson_interval

OUTCOMES = ("wins", "losses", "ties", "both_bad")  # of the pair's first model
Votes = Sequence[Mapping[str, Any]]


def summarise(votes: Votes) -> list[dict[str, Any]]:
    """For each pair of models {`models`: [first, second], `wins`, `losses`, `ties`, `both_bad`,
    `win_rate`, `low`, `high`, `by_category`: category -> the same counts} of the first, most votes
    first. In a pair with the base, the base is the second; two adapters stand in the order of their
    names.

    The rate is wins over decided votes with Wilson's 95 % interval (Wilson 1927); ties and both bad
    are counted beside it.
    """
    pairs: defaultdict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in votes:
        pairs[tuple(sorted(row["models"], key=lambda name: (name == "base", name)))].append(row)
    return [
        _of_pair(pair, rows)
        for pair, rows in sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def _of_pair(pair: tuple[str, ...], votes: Votes) -> dict[str, Any]:
    by_category: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in votes:
        if row.get("category"):
            by_category[str(row["category"])].append(row)
    counted = {name: _counted(pair[0], rows) for name, rows in sorted(by_category.items())}
    return {"models": list(pair)} | _counted(pair[0], votes) | {"by_category": counted}


def _counted(first: str, votes: Votes) -> dict[str, Any]:
    counts = Counter(_outcome(first, row) for row in votes)
    rate = wilson_interval(counts["wins"], counts["wins"] + counts["losses"])
    return {name: counts[name] for name in OUTCOMES} | {
        "win_rate": rate.value,
        "low": rate.low,
        "high": rate.high,
    }


def _outcome(first: str, row: Mapping[str, Any]) -> str:
    if row["vote"] not in ("a", "b"):
        return "ties" if row["vote"] == "tie" else "both_bad"
    return "wins" if row["models"]["ab".index(row["vote"])] == first else "losses"


def vote_table(summary: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """All votes of a pair, then one line per category; then the next pair."""
    lines = [
        ["", *(say(f"eval.votes.{name}") for name in OUTCOMES), say("eval.votes.win_rate"), "95 %"]
    ]
    for pair in summary:
        for name, its in [(" ↔ ".join(pair["models"]), pair), *pair["by_category"].items()]:
            lines.append(
                [
                    name,
                    *(str(its[key]) for key in OUTCOMES),
                    f"{its['win_rate']:.1%}",
                    f"{its['low']:.1%} … {its['high']:.1%}",
                ]
            )
    return lines
