"""Fitting a training, or answering, into a budget of device memory: bytes at the peak, the longest
row, the fewest recomputed layers, what to save on, and what that costs in operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, compress, pairwise
from typing import Any, NamedTuple

from cllm.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION_BYTES,
    GIB,
    MIB,
    SEGMENTS_GROW,
    WHOLE_SEGMENTS_BYTES,
    WORKSPACE_BYTES,
    Settings,
    VramEstimate,
    streamed_layers,
)
from cllm.messages import UserError, note
from cllm.trace import traced, weighed

ROW_STEP = 128  # tokens: granularity of the longest row
LONGEST_ROW = 2**20
SHORTER_ROWS = (4096, 2048, 1024, 512, 256)
CONVERSION_BYTES = 75_000_000  # a streamed write's (bench/results/convert_memory.json)
Config = Mapping[str, Any]
"""A config.json, original or native."""


def recomputed_layers(settings: Settings, layers: int) -> list[bool]:
    """Whether each layer is recomputed in the backward; streamed ones are."""
    first = layers if settings.checkpoint_layers < 0 else settings.checkpoint_layers
    streamed = streamed_layers(layers, settings.stream_layers)
    return [index < first or index in streamed for index in range(layers)]


def _moment_bytes(optimizer: str, count: int) -> int:
    """AdamW's two moments of a parameter of `count` values. bitsandbytes' 8 bits are blocks of 256
    with a float each; it keeps fewer than 4,096 values in float32.
    """
    exact = optimizer == "adamw" or count < 4096
    return 8 * count if exact else 2 * (count + 4 * -(-count // 256))


def estimate_vram(config: Config, settings: Settings) -> VramEstimate:
    """Bytes at the peak of a training step on rows of `row_tokens` tokens, all of them supervised.

    Traced are weights, gradients and whatever a step makes. Not seen by that, and so added: the
    CUDA context, cuBLAS's workspace, and what the allocator loses to fragments, which is more where
    its segments cannot grow.
    """
    s, weights, cuda = settings, weighed(config, settings), settings.device.startswith("cuda")
    shared = not weights.head
    away = s.embedding == "cpu" or (
        s.embedding == "auto" and cuda and s.quantize == "nf4" and not shared
    )
    count = len(weights.linears)
    recomputed = recomputed_layers(s, count)
    # The loss is as the last layer.
    passes = [traced(config, s, again) for again in (False, True)]
    layers = [passes[again][i] for i, again in enumerate([*recomputed, recomputed[-1]])]
    # A recomputed layer leaves its input. At most two offloaded ones are on the device beside the
    # one in use.
    moved = passes[True][-2].left * s.offload_inputs
    pairs = zip(layers, [*recomputed, False], strict=True)
    left = [layer.left - moved * again for layer, again in pairs]
    here = moved * min(2, sum(recomputed))
    inputs = here + sum(compress(left, recomputed))
    alive = accumulate(left, initial=here)
    peaks = [
        max(before + layer.forward, after + layer.backward)
        for (before, after), layer in zip(pairwise(alive), layers, strict=True)
    ]
    moments = [*("recomputed_layer" if again else "kept_layer" for again in recomputed), "loss"]
    streamed = streamed_layers(count, s.stream_layers)
    packed = [weights.packed[index] for index in streamed]
    lora = 4 * sum(weights.trained)
    items = {
        "linears": sum(weights.linears)
        - sum(weights.linears[index] for index in streamed)
        + max(packed, default=0) * min(2, len(packed)),
        "embedding": 0 if away else weights.embedding,
        # The device keeps a tied matrix for the head.
        "head": weights.embedding if away and shared else weights.head,
        "norms": weights.rest,
        "lora": lora,
        "gradients": lora,
        "optimizer": sum(_moment_bytes(s.optimizer, count) for count in weights.trained),
        "layer_inputs": inputs,
        "activations": max(peaks) - inputs,
        "workspaces": WORKSPACE_BYTES * cuda,
        "context": CONTEXT_BYTES * cuda,
        "fragmentation": cuda
        * max(
            FRAGMENTATION_BYTES if SEGMENTS_GROW else WHOLE_SEGMENTS_BYTES,
            *(layer.largest for layer in layers),
        ),
    }
    # Streamed weights and offloaded layer inputs.
    waiting = sum(packed) + moved * sum(recomputed)
    return VramEstimate(
        items,
        moments[peaks.index(max(peaks))],
        waiting + away * weights.embedding,
        weights.largest + CONVERSION_BYTES,
        2 * waiting,
        sum(layer.flops for layer in layers),
    )


def estimate_answering(config: Config, settings: Settings) -> VramEstimate:
    """Bytes while prompts of `row_tokens` tokens are read without gradients, before any cache: the
    weights as in training, an adapter without gradients or moments, the widest layer's forward and
    its mask.
    """
    # A bare model is traced with the smallest adapter there is.
    settings = replace(settings, rank=max(1, settings.rank))
    trained = estimate_vram(config, settings)
    *layers, _loss = traced(config, settings, True)
    width = 4 if settings.precision == "fp32" else 2
    items = {
        **trained.items,
        "gradients": 0,
        "optimizer": 0,
        "layer_inputs": 0,
        "activations": max(layer.forward for layer in layers)
        + settings.row_tokens**2 * (1 + width),
    }
    return replace(trained, items=items, moment="answering")


class Step(NamedTuple):
    """One rung of the ladder, on top of those before."""

    change: str
    """`section.key=value`, as the command line takes it."""
    settings: Settings
    estimate: VramEstimate
    slowdown: float
    """Operations per token over those of the settings asked for."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.estimate.total


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


def make_plan(config: Config, settings: Settings, budget_gib: float) -> Plan:
    """Fit `settings` into `budget_gib` GiB (1024^3 bytes; context and fragmentation count)."""
    budget = int(budget_gib * GIB)

    fewest = fewest_recomputed(config, settings, budget)
    chosen = (
        settings if settings.checkpoint_layers >= 0 else replace(settings, checkpoint_layers=fewest)
    )
    estimate = estimate_vram(config, settings)
    ladder = [*_ladder(config, settings, budget)]
    longest = longest_row(config, settings, budget_gib)
    return Plan(estimate, estimate.total <= budget, longest, fewest, chosen, ladder)


def fewest_recomputed(config: Config, settings: Settings, budget: int) -> int:
    """The fewest recomputed layers that fit (fewer is faster); -1: none do."""
    layers = len(weighed(config, settings).linears)
    options = (replace(settings, checkpoint_layers=n) for n in range(layers + 1))
    fitting = (s.checkpoint_layers for s in options if estimate_vram(config, s).total <= budget)
    return next(fitting, -1)


def longest_row(config: Config, settings: Settings, budget_gib: float) -> int:
    """Tokens of the longest row that fits with these settings, LONGEST_ROW at most; 0: none."""

    def total(steps: int) -> int:
        return estimate_vram(config, replace(settings, row_tokens=steps * ROW_STEP)).total

    budget, last = int(budget_gib * GIB), LONGEST_ROW // ROW_STEP
    # From there on rows are cut in tiles, and need less again.
    tile = settings.mlp_tile_tokens // ROW_STEP
    return ROW_STEP * (_longest(total, tile, last, budget) or _longest(total, 0, tile, budget))


def _longest(total: Callable[[int], int], low: int, high: int, budget: int) -> int:
    """The largest number in (low, high] whose total, which grows almost evenly, is within the
    budget; 0: none is.
    """
    if low >= high or (least := total(low + 1)) > budget:
        return 0
    fits, over, most = low + 1, high + 1, 0
    line = True
    while over - fits > 1:
        if not most:  # nothing is known to be over yet
            guess = min(2 * fits + 8, over - 1)
        else:
            guess = fits + (budget - least) * (over - fits) // (most - least)
            if guess == fits and over - fits <= fits // 20:  # by the line the next one is over
                break
            # Every second time halfway, as the line may always end on the same side.
            guess = guess if line and guess > fits else (fits + over) // 2
            line = not line
        if (bytes_ := total(guess)) <= budget:
            fits, least = guess, bytes_
        else:
            over, most = guess, bytes_
    return fits


def savings(
    config: Config, settings: Settings, budget: int, rows: tuple[int, ...] = ()
) -> Iterator[Step]:
    """`settings` as they are, then every change that saves bytes, cheapest first, each on top of
    those before; shorter `rows` last.
    """
    # of streamed layers; two slots hold two anyway
    counts = range(3, len(weighed(config, settings).linears) + 1)

    def stream(old: Settings) -> dict[str, int]:
        some = (replace(old, stream_layers=n) for n in counts)
        fitting = (s.stream_layers for s in some if estimate_vram(config, s).total <= budget)
        over = estimate.total > budget
        return {"stream_layers": next(fitting, counts[-1]) if over else counts[-1]}

    changes: list[tuple[str, Any]] = [
        ("memory.embedding=cpu", {"embedding": "cpu"}),
        ("train.optimizer=adamw8bit", {"optimizer": "adamw8bit"}),
        ("memory.checkpoint_layers=-1", {"checkpoint_layers": -1}),
        ("memory.offload_inputs=true", {"offload_inputs": True}),
        ("model.quantize=nf4", {"quantize": "nf4"}),
        ("memory.chunk_mib=32", {"chunk_bytes": 32 * MIB}),
        ("memory.mlp_tile_tokens=1024", {"mlp_tile_tokens": 1024}),
        ("memory.stream_layers={}", stream if counts else {}),
        ("model.head=int8", {"head": "int8"}),
        ("lora.rank=8", {"rank": 8}),
        *(("train.row_tokens={}", {"row_tokens": n}) for n in rows if n < settings.row_tokens),
    ]
    estimate = estimate_vram(config, settings)
    pace = estimate.flops / settings.row_tokens
    yield Step("", settings, estimate, 1.0)
    for change, setting in changes:
        values = setting(settings) if callable(setting) else setting
        changed = replace(settings, **values)
        changed_estimate = estimate_vram(config, changed)
        if changed_estimate.total < estimate.total:
            settings, estimate = changed, changed_estimate
            slowdown = estimate.flops / settings.row_tokens / pace
            yield Step(change.format(*values.values()), settings, estimate, slowdown)


def _ladder(config: Config, settings: Settings, budget: int) -> Iterator[Step]:
    """As many savings as it takes to fit (none, if it does), then shorter rows."""
    for step in savings(config, settings, budget, SHORTER_ROWS):
        if step.change:
            yield step
        if step.total <= budget:
            return


def fit(config: Config, name: str, settings: Settings, budget: int) -> Settings:
    """`settings` with -1 layers replaced by the fewest recomputed ones that fit `budget` bytes.

    Raises UserError, with the settings that would fit, if these do not.
    """
    if estimate_vram(config, settings).total <= budget:
        if settings.checkpoint_layers < 0:
            fewest = fewest_recomputed(config, settings, budget)
            settings = replace(settings, checkpoint_layers=fewest)
        return settings
    plan = make_plan(config, settings, budget / GIB)
    values = {
        "name": name,
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


def plan_training(
    config: Config, name: str, settings: Settings, budget: int
) -> tuple[Settings, VramEstimate]:
    """What a training is to use: `fit` with a line about it."""
    settings = fit(config, name, settings, budget)
    estimate = estimate_vram(config, settings)
    recomputed = recomputed_layers(settings, len(weighed(config, settings).linears))
    note(
        "memory.plan",
        total=f"{estimate.total / GIB:.2f}",
        budget=f"{budget / GIB:.2f}",
        row=settings.row_tokens,
        recomputed=sum(recomputed),
        layers=len(recomputed),
    )
    return settings, estimate


def plan_answering(
    config: Config, settings: Settings, budget: int
) -> tuple[Settings, VramEstimate]:
    """How a model is to be held for answering: with as few more streamed layers as fit `budget`
    bytes beside a prefill of `row_tokens` tokens and its keys and values; said in a line.
    """
    weights = weighed(config, settings)
    layers, token = len(weights.linears), weights.token
    room = budget - token * settings.row_tokens
    counts = [settings.stream_layers, *range(3, layers + 1)]
    options = [replace(settings, stream_layers=n) for n in counts if n >= settings.stream_layers]
    fitting = (s for s in options if estimate_answering(config, s).total <= room)
    settings = next(fitting, options[-1])
    estimate = estimate_answering(config, settings)
    note(
        "memory.answering",
        weights=f"{(estimate.allocated - estimate.items['activations']) / GIB:.2f}",
        prefill=f"{estimate.items['activations'] / GIB:.2f}",
        row=settings.row_tokens,
        cache=f"{max(0, budget - estimate.total) / GIB:.2f}",
        tokens=f"{max(0, budget - estimate.total) // token:,}",
        budget=f"{budget / GIB:.2f}",
        streamed=min(settings.stream_layers, layers),
        layers=layers,
    )
    return settings, estimate
