"""Fitting a training, or answering, into a budget of device memory: longest rows, fewest recomputed
layers, what to save on, and what that costs in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from cllm.memory import (
    GIB,
    MIB,
    Settings,
    VramEstimate,
    estimate_answering,
    estimate_vram,
    is_quantized,
    kept_bytes,
    recomputed_layers,
    stored_bytes,
)
from cllm.messages import UserError, note
from cllm.shapes import Shape

ROW_STEP = 128  # tokens: granularity of the longest row


class Hardware(NamedTuple):
    """Rates that a roofline needs; the defaults are an 8 GB desktop card's, sustained: nobody's
    measurement.
    """

    flops: float = 30e12
    """16-bit operations per second."""
    bandwidth: float = 250e9
    """Bytes per second of the device's memory."""
    link: float = 12e9
    """Bytes per second between host and device."""


PAPER = Hardware()


def row_flops(shape: Shape, s: Settings) -> float:
    """Operations of one row: 2 per weight and token in the forward, in the gradient of the input
    and where a layer is recomputed; the head twice (its gradient is formed in the forward); causal
    attention half of 4 T^2 per query channel, 2.5 times that in its backward.
    """
    passes = 2 + len(recomputed_layers(shape, s)) / shape.layers
    weights = sum(i * o for i, o in shape.linears().values())
    attention = (
        2
        * s.row_tokens
        * min(shape.window or s.row_tokens, s.row_tokens)
        * shape.heads
        * shape.head_dim
        * (passes + 1.5)
    )
    # one more forward
    tiled = (
        shape.layers
        * 3
        * shape.hidden
        * shape.intermediate
        * (0 < s.mlp_tile_tokens < s.row_tokens)
    )
    head = (4 if s.head == "16bit" else 6) * shape.vocab * shape.hidden
    return shape.layers * attention + s.row_tokens * (
        2 * passes * shape.layers * weights + 2 * tiled + head
    )


def crossing_bytes(shape: Shape, s: Settings) -> int:
    """What crosses between host and device per row: streamed weights and offloaded layer inputs
    twice, embedding rows not counted.
    """
    resident = estimate_vram(shape, replace(s, stream_layers=0, offload_inputs=False))
    return 2 * (estimate_vram(shape, s).host - resident.host)


def row_seconds(shape: Shape, s: Settings, hardware: Hardware = PAPER) -> float:
    """Roofline estimate of one row: operations at full rate, then bytes that are only moved; no
    launch overhead.

    NF4 weights are read, and written and read again in 16 bits, in every pass; what autograd keeps
    of a layer is written and read. What waits in host memory crosses the link twice, hidden behind
    the computation as far as that lasts.
    """
    linears = list(shape.linears().values())
    weights = sum(i * o for i, o in linears)
    stored = sum(stored_bytes(shape, s, weights)) + 2 * s.width * weights * is_quantized(shape, s)
    moved = (2 * shape.layers + len(recomputed_layers(shape, s))) * (
        stored + 2 * sum(kept_bytes(shape, s, linears))
    )
    computed = (
        row_flops(shape, s) / hardware.flops * (1 if s.width == 2 else 2)
        + moved / hardware.bandwidth
    )
    return max(computed, crossing_bytes(shape, s) / hardware.link)


class Step(NamedTuple):
    """One rung of the ladder, on top of those before."""

    change: str
    """`section.key=value`, as the command line takes it."""
    settings: Settings
    total: int
    slowdown: float
    """Estimated seconds per token over those of the settings asked for."""


class Plan(NamedTuple):
    """How settings stand to a budget."""

    estimate: VramEstimate
    fits: bool
    longest_row: int
    """Tokens of the longest row that fits with these settings; 0: none."""
    checkpoint_layers: int
    """The fewest recomputed layers that fit (fewer is faster); -1: none do."""
    settings: Settings
    """As asked for, -1 layers replaced by these fewest."""
    ladder: list[Step]
    """If it does not fit: what would help, cheapest first."""


def make_plan(shape: Shape, settings: Settings, budget_gib: float) -> Plan:
    """Fit `settings` into `budget_gib` GiB (1024^3 bytes; context and fragmentation count)."""
    budget = int(budget_gib * GIB)

    def fits(**changes: Any) -> bool:
        return estimate_vram(shape, replace(settings, **changes)).total <= budget

    def longest(low: int, high: int) -> int:
        """Of the rows of (low, high] steps, whose totals grow, the longest that fits; 0: none."""
        found = 0
        while low < high:
            middle = (low + high + 1) // 2
            found, low, high = (
                (middle, middle, high)
                if fits(row_tokens=middle * ROW_STEP)
                else (found, low, middle - 1)
            )
        return found

    # from there on rows are cut in tiles, and need less again
    tile = settings.mlp_tile_tokens // ROW_STEP
    row = ROW_STEP * (longest(tile, 2**20 // ROW_STEP) or longest(0, tile))
    fewest = next((count for count in range(shape.layers + 1) if fits(checkpoint_layers=count)), -1)
    chosen = (
        settings if settings.checkpoint_layers >= 0 else replace(settings, checkpoint_layers=fewest)
    )
    return Plan(
        estimate_vram(shape, settings),
        fits(),
        row,
        fewest,
        chosen,
        list(_ladder(shape, settings, budget)),
    )


def savings(shape: Shape, settings: Settings, budget: int) -> Iterator[Step]:
    """`settings` as they are, then every change that saves bytes, cheapest first, each on top of
    those before.
    """
    counts = range(3, shape.layers + 1)  # of streamed layers; two slots hold two anyway

    def stream(old: Settings) -> dict[str, int]:
        fitting = (
            n for n in counts if estimate_vram(shape, replace(old, stream_layers=n)).total <= budget
        )
        return {"stream_layers": next(fitting, shape.layers) if total > budget else shape.layers}

    changes: list[tuple[str, Any]] = [
        ("memory.embedding=cpu", {"embedding": "cpu"}),
        ("train.optimizer=adamw8bit", {"optimizer": "adamw8bit"}),
        ("memory.checkpoint_layers=-1", {"checkpoint_layers": -1}),
        ("memory.offload_inputs=true", {"offload_inputs": True}),
        ("model.quantize=nf4", {"quantize": "nf4"}),
        ("memory.chunk_mib=32", {"chunk_bytes": 32 * MIB}),
        ("memory.mlp_tile_tokens=1024", {"mlp_tile_tokens": 1024}),
        ("memory.stream_layers={}", stream),
        ("model.head=int8", {"head": "int8"}),
        ("lora.rank=8", {"rank": 8}),
    ]
    total, pace = estimate_vram(shape, settings).total, row_seconds(shape, settings)
    yield Step("", settings, total, 1.0)
    for change, found in changes:
        values = found(settings) if callable(found) else found
        changed = replace(settings, **values)
        if (new := estimate_vram(shape, changed).total) < total:
            settings, total = changed, new
            yield Step(
                change.format(*values.values()),
                settings,
                total,
                row_seconds(shape, settings) / pace,
            )


def _ladder(shape: Shape, settings: Settings, budget: int) -> Iterator[Step]:
    """As many savings as it takes to fit (none, if it does), then shorter rows."""
    pace = row_seconds(shape, settings) / settings.row_tokens
    for step in savings(shape, settings, budget):
        if step.change:
            yield step
        if step.total <= budget:
            return
    for tokens in (n for n in (4096, 2048, 1024, 512, 256) if n < settings.row_tokens):
        shorter = replace(step.settings, row_tokens=tokens)
        total = estimate_vram(shape, shorter).total
        yield Step(
            f"train.row_tokens={tokens}",
            shorter,
            total,
            row_seconds(shape, shorter) / tokens / pace,
        )
        if total <= budget:
            return


def fit(shape: Shape, settings: Settings, budget: int) -> Settings:
    """`settings` with -1 layers replaced by the fewest recomputed ones that fit `budget` bytes.

    Raises UserError, with the settings that would fit, if these do not.
    """
    plan = make_plan(shape, settings, budget / GIB)
    if plan.fits:
        return plan.settings
    values = {
        "name": shape.name,
        "need": f"{plan.estimate.total / GIB:.2f}",
        "budget": f"{budget / GIB:.2f}",
    }
    least = plan.ladder[-1].total if plan.ladder else plan.estimate.total
    if least > budget:
        raise UserError("memory.hopeless", least=f"{least / GIB:.2f}", **values)
    changes = " ".join(
        {step.change.partition("=")[0]: step.change for step in plan.ladder}.values()
    )
    raise UserError(
        "memory.too_big",
        changes=changes,
        total=f"{least / GIB:.2f}",
        longest=plan.longest_row,
        **values,
    )


def plan_training(shape: Shape, settings: Settings, budget: int) -> tuple[Settings, VramEstimate]:
    """What a training is to use: `fit` with a line about it."""
    settings = fit(shape, settings, budget)
    estimate = estimate_vram(shape, settings)
    note(
        "memory.plan",
        total=f"{estimate.total / GIB:.2f}",
        budget=f"{budget / GIB:.2f}",
        row=settings.row_tokens,
        recomputed=len(recomputed_layers(shape, settings)),
        layers=shape.layers,
    )
    return settings, estimate


def plan_answering(shape: Shape, settings: Settings, budget: int) -> tuple[Settings, VramEstimate]:
    """How a model is to be held for answering: with as few more streamed layers as fit `budget`
    bytes beside a prefill of `row_tokens` tokens and its keys and values; said in a line.
    """
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * settings.width
    room = budget - token * settings.row_tokens
    counts = [settings.stream_layers, *range(3, shape.layers + 1)]
    options = [replace(settings, stream_layers=n) for n in counts if n >= settings.stream_layers]
    fitting = (s for s in options if estimate_answering(shape, s).total <= room)
    settings = next(fitting, options[-1])
    estimate = estimate_answering(shape, settings)
    note(
        "memory.answering",
        weights=f"{(estimate.allocated - estimate.items['activations']) / GIB:.2f}",
        prefill=f"{estimate.items['activations'] / GIB:.2f}",
        row=settings.row_tokens,
        cache=f"{max(0, budget - estimate.total) / GIB:.2f}",
        tokens=f"{max(0, budget - estimate.total) // token:,}",
        budget=f"{budget / GIB:.2f}",
        streamed=min(settings.stream_layers, shape.layers),
        layers=shape.layers,
    )
    return settings, estimate
