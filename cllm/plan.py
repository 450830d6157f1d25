"""A plan for people: what a training takes in memory, at which settings and row lengths, and how
long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from cllm.assembly import adapter_of
from cllm.config import Config, PrecisionName
from cllm.fit import Step, estimate_vram, fewest_recomputed, ladder, longest_row, savings
from cllm.memory import GIB, Settings
from cllm.messages import command, say, table

PLAN_ROWS = (512, 1024, 2048, 4096, 8192)
BUDGET_GIB = 8.0
FIRST_PASS = 1.5
"""Time of a preference step over SFT's: a forward more, at most half of a frozen base's step."""
NO_DATA_TOKENS = 10**6
"""What the time of a plan without data is for."""


def settings_of(config: Config, precision: PrecisionName, device: str) -> Settings:
    """What a training of this config comes to on such a device."""
    base = Path(config.model.path)
    return Settings.of(
        config.model,
        config.memory,
        adapter_of(config.lora, base if base.is_dir() else {}).lora,
        row_tokens=config.train.row_tokens,
        precision=precision,
        device=device,
        optimizer=config.train.optimizer,
    )


@dataclass(frozen=True)
class Workload:
    """What a config's data amount to."""

    tokens: int
    """Of one epoch."""
    fill: float = 0.0
    """Tokens over the length of all packed rows; 0: the tokens are an estimate from characters."""
    row_seconds: float | None = None
    """Of a row on this device, where it was measured."""


def show_plan(
    config: Config,
    name: str,
    original: dict[str, Any],
    work: Workload | None,
    rate: float,
    words: Sequence[str],
) -> dict[str, Any]:
    """Print the plan of one model for people: the answer with its command (`words` are what
    `cllm.train` takes for it), rows x settings, items, and time at `rate` operations a second;
    returns it for the JSON.
    """
    budget = config.memory.budget_gib or BUDGET_GIB
    limit = int(budget * GIB)
    precision = "bf16" if config.model.precision == "auto" else config.model.precision
    settings = settings_of(config, precision, "cuda")
    rungs = ladder(original, settings, limit)
    estimate, fits = rungs[0].estimate, rungs[0].total <= limit
    grid, shown = _grid(original, settings, limit)
    longest = grid[0]["longest_row"]
    _answer(config, name, original, rungs, longest, limit, words)
    print(f"\n{table(shown)}\n\n{say('bench.plan', name=name, **asdict(settings))}")
    print(estimate.table())
    host, reading = f"{estimate.host / GIB:.2f}", f"{estimate.conversion / GIB:.2f}"
    print(say("bench.host", host=host, conversion=reading))
    fewest = fewest_recomputed(original, settings, limit)
    chosen = settings
    if settings.checkpoint_layers < 0:
        chosen = replace(settings, checkpoint_layers=fewest)
        if fewest >= 0:
            print(say("bench.recomputed", fewest=fewest))
    return {
        "model": name,
        "budget_gib": budget,
        **asdict(settings),
        **asdict(estimate),
        "total": estimate.total,
        "grid": grid,
        "fits": fits,
        "longest_row": longest,
        "fewest": fewest,
        "time": _time(config, estimate_vram(original, chosen).flops, work, rate),
        "ladder": [{"total": step.total, **_figures(step)} for step in rungs[1:]],
    }


def _answer(
    config: Config,
    name: str,
    original: dict[str, Any],
    rungs: Sequence[Step],
    longest: int,
    limit: int,
    words: Sequence[str],
) -> None:
    """Say whether it fits, and what to add where it does not or for longer rows, each with its
    command.
    """
    settings = rungs[0].settings
    budget = f"{limit / GIB:g}"
    asked = {"name": name, "budget": budget, "row": f"{settings.row_tokens:,}"}
    asked["total"] = f"{rungs[0].total / GIB:.2f}"
    wanted = next((row for row in PLAN_ROWS if row > longest), 0)
    if rungs[-1].total > limit:
        least = min(step.total for step in rungs)
        print(say("bench.answer.hopeless", **asked, least=f"{least / GIB:.2f}"))
    elif len(rungs) > 1:
        changes, total = _needed(original, rungs, limit)
        print(say("bench.answer.changed", **asked, changes=" ".join(changes), least=total))
        print(_command(words, changes))
    else:
        most = f"{max(longest, settings.row_tokens):,}"
        print(say("bench.answer.fits", **asked, longest=most), _command(words, []), sep="\n")
        rungs = ladder(original, replace(settings, row_tokens=wanted), limit) if wanted else rungs
        if len(rungs) > 1 and rungs[-1].total <= limit and rungs[-1].settings.row_tokens == wanted:
            changes, total = _needed(original, rungs, limit)
            added = " ".join(changes)
            print(say("bench.answer.longer", row=f"{wanted:,}", changes=added, total=total))
            changes.append(f"train.row_tokens={wanted}")
            if 0 < config.train.tokens_per_step < wanted:
                changes.append(f"train.tokens_per_step={wanted}")
            print(_command(words, changes))
    if not config.memory.budget_gib:
        print(say("bench.display", budget=f"{BUDGET_GIB - 1:g}"))


def _command(words: Sequence[str], changes: Sequence[str]) -> str:
    """The training of `words` with `changes`, which replace what they say of the same settings."""
    changed = {change.partition("=")[0] for change in changes}
    kept = [word for word in words if word.partition("=")[0] not in changed]
    return f"  {command('train', *kept, *changes)}"


def _needed(original: dict[str, Any], rungs: Sequence[Step], limit: int) -> tuple[list[str], str]:
    """Those of a ladder's savings without which it does not fit, and the GiB that it then takes;
    the costliest are left out first.
    """
    fields = {
        after.change: {
            key: value
            for key, value in asdict(after.settings).items()
            if value != getattr(before.settings, key)
        }
        for before, after in pairwise(rungs)
    }
    total = rungs[-1].total
    for change in [step.change for step in rungs[-2:0:-1]]:
        fewer = {key: value for key, value in fields.items() if key != change}
        settings = replace(
            rungs[0].settings, **{k: v for f in fewer.values() for k, v in f.items()}
        )
        taken = estimate_vram(original, settings).total
        if taken <= limit:
            fields, total = fewer, taken
    return [*fields], f"{total / GIB:.2f}"


def _figures(step: Step) -> dict[str, Any]:
    """A saving and what it costs, for the JSON."""
    crossing = step.estimate.crossing
    return {"change": step.change, "slowdown": step.slowdown, "crossing": crossing}


def _grid(
    original: dict[str, Any], settings: Settings, limit: int
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """For each saving, on top of those before it: bytes at the usual row lengths, and the longest
    row that fits; the same as a table for people.
    """
    heads = say("bench.grid").split("|")
    grid, rows = [], [[heads[0], *(f"{n:,}  " for n in PLAN_ROWS), *heads[1:]]]
    for step in savings(original, settings, limit):
        lengths = {n: replace(step.settings, row_tokens=n) for n in PLAN_ROWS}
        totals = {n: estimate_vram(original, row).total for n, row in lengths.items()}
        longest = longest_row(original, step.settings, limit / GIB)
        grid.append({**_figures(step), "totals": totals, "longest_row": longest})
        key = step.change.partition("=")[0]
        label = say(f"bench.saving.{key}") if key else say("bench.as_configured")
        sizes = [f"{size / GIB:.2f} {' ✓'[size <= limit]}" for size in totals.values()]
        crossing = f"{step.estimate.crossing / GIB:.1f}" if step.estimate.crossing else "–"
        most = f"{longest:,}" if longest else "–"
        rows.append([f"{label}  {step.change}", *sizes, most, f"x{step.slowdown:.2f}", crossing])
    return grid, rows


def _time(config: Config, flops: int, work: Workload | None, rate: float) -> dict[str, Any]:
    """Tokens, steps and hours of the run at `flops` operations a row; of a million tokens, if there
    is no data. Prints them.
    """
    train = config.train
    step = train.step_tokens(work.tokens if work else NO_DATA_TOKENS)
    rows_per_step = max(1, step // train.row_tokens)
    fill = work.fill if work and work.fill else 1.0
    step_tokens = rows_per_step * train.row_tokens * fill
    wanted = work.tokens * train.epochs if work else NO_DATA_TOKENS
    steps = train.steps if work and train.steps else max(1, round(wanted / step_tokens))
    measured = work.row_seconds if work else None
    row_seconds = measured or flops / rate * fill
    passes = FIRST_PASS if config.preference.active else 1.0
    tokens, seconds = steps * step_tokens, steps * rows_per_step * row_seconds * passes
    print(
        say(
            "bench.time.measured" if measured else "bench.time.operations",
            tokens=f"{tokens:,.0f}",
            steps=steps,
            hours=f"{seconds / 3600:.2f}",
            speed=f"{tokens / seconds:,.0f}",
            rate=f"{rate / 1e12:.2f}",
        )
    )
    if not (measured or torch.cuda.is_available()):
        print(say("bench.time.cpu"))
    if not work:
        print(say("bench.time.no_data"))
    return {
        "tokens": round(tokens),
        "exact_tokens": bool(work and work.fill),
        "steps": steps,
        "hours": seconds / 3600,
        "measured": measured is not None,
    }
