"""A plan for people: what a training takes in memory, at which settings and row lengths, and how
long.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cllm.assembly import adapter_of
from cllm.config import Config, PrecisionName
from cllm.fit import Step, decided, estimate_vram, fewest_recomputed, ladder, longest_row, savings
from cllm.memory import GIB, Settings
from cllm.messages import say, table

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
    config: Config, name: str, original: dict[str, Any], work: Workload | None, rate: float
) -> dict[str, Any]:
    """Print the plan of one model for people: items, rows x settings, the ladder, and time at
    `rate` operations a second; returns it for the JSON.
    """
    budget = config.memory.budget_gib or BUDGET_GIB
    limit = int(budget * GIB)
    precision = "bf16" if config.model.precision == "auto" else config.model.precision
    settings = settings_of(config, precision, "cuda")
    asked, *changes = ladder(original, settings, limit)
    estimate, fits = asked.estimate, asked.total <= limit
    print(say("bench.plan", name=name, **asdict(settings)))
    print(estimate.table())
    host, reading = f"{estimate.host / GIB:.2f}", f"{estimate.conversion / GIB:.2f}"
    print(say("bench.host", host=host, conversion=reading))
    grid = _grid(original, settings, budget)
    longest = longest_row(original, settings, budget)
    fewest = fewest_recomputed(original, settings, limit)
    state = "bench.fits" if fits else "bench.too_big"
    print(say(state, budget=f"{budget:g}", longest=longest, fewest=fewest))
    for step in changes:
        print(
            say("bench.rung", total=f"{step.total / GIB:6.2f}", **_price(step), change=step.change)
        )
    chosen = decided(original, settings, limit)
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
        "ladder": [{"total": step.total, **_figures(step)} for step in changes],
    }


def _figures(step: Step) -> dict[str, Any]:
    """A saving and what it costs, for the JSON."""
    crossing = step.estimate.crossing
    return {"change": step.change, "slowdown": step.slowdown, "crossing": crossing}


def _price(step: Step) -> dict[str, str]:
    """What a saving costs, for people."""
    return {"slowdown": f"{step.slowdown:.2f}", "crossing": f"{step.estimate.crossing / GIB:.1f}"}


def _grid(original: dict[str, Any], settings: Settings, budget: float) -> list[dict[str, Any]]:
    """For each saving, on top of those before it: bytes at the usual row lengths, and the longest
    row that fits. Prints them as a table.
    """
    grid, rows = [], [[f"GiB / {budget:g}", *map(str, PLAN_ROWS), *say("bench.grid").split("|")]]
    for step in savings(original, settings, int(budget * GIB)):
        lengths = {n: replace(step.settings, row_tokens=n) for n in PLAN_ROWS}
        totals = {n: estimate_vram(original, row).total for n, row in lengths.items()}
        longest = longest_row(original, step.settings, budget)
        grid.append({**_figures(step), "totals": totals, "longest_row": longest})
        sizes = [f"{total / GIB:.2f}" for total in totals.values()]
        rows.append([f"+ {step.change}", *sizes, str(longest), *_price(step).values()])
    print(table(rows))
    return grid


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
    return {
        "tokens": round(tokens),
        "exact_tokens": bool(work and work.fill),
        "steps": steps,
        "hours": seconds / 3600,
        "measured": measured is not None,
    }
