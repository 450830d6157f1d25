"""Fitting a training, or answering, into a budget of device memory: bytes at the peak, the longest
row, the fewest recomputed layers, what to save on, and what that costs in operations.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, compress, pairwise
from typing import Any, NamedTuple

from cllm.config import Quantize
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
from cllm.model.checkpoint import embedding_waits
from cllm.trace import Layer, traced, weighed

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


def _peak(layers: list[Layer], recomputed: list[bool], moved: int) -> tuple[str, int, int]:
    """The moment of a step at which most bytes are alive beyond weights and gradients, these bytes,
    and those of the inputs of recomputed layers, of each of which `moved` bytes wait in host
    memory.
    """
    pairs = zip(layers, [*recomputed, False], strict=True)
    left = [layer.left - moved * again for layer, again in pairs]
    # At most two offloaded inputs are on the device beside the one in use.
    here = moved * min(2, sum(recomputed))
    alive = accumulate(left, initial=here)
    peaks = [
        max(before + layer.forward, after + layer.backward)
        for (before, after), layer in zip(pairwise(alive), layers, strict=True)
    ]
    moments = [*("recomputed_layer" if again else "kept_layer" for again in recomputed), "loss"]
    peak = max(peaks)
    return moments[peaks.index(peak)], peak, here + sum(compress(left, recomputed))


def estimate_vram(config: Config, settings: Settings) -> VramEstimate:
    """Bytes at the peak of a training step on rows of `row_tokens` tokens, all of them supervised.

    Traced are weights, gradients and whatever a step makes. Not seen by that, and so added: the
    CUDA context, cuBLAS's workspace, and what the allocator loses to fragments, which is more where
    its segments cannot grow.
    """
    s = settings
    weights = weighed(config, s)
    cuda = s.device.startswith("cuda")
    shared = not weights.head
    away = embedding_waits(s, shared=shared)
    count = len(weights.linears)
    recomputed = recomputed_layers(s, count)
    # The loss is as the last layer.
    passes = {again: traced(config, s, again) for again in {*recomputed}}
    layers = [passes[again][i] for i, again in enumerate([*recomputed, recomputed[-1]])]
    # A recomputed layer leaves its input.
    moved = passes[True][-2].left if s.offload_inputs and any(recomputed) else 0
    moment, peak, inputs = _peak(layers, recomputed, moved)
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
        "activations": peak - inputs,
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
        moment,
        waiting + away * weights.embedding,
        weights.largest + CONVERSION_BYTES,
        2 * waiting,
        sum(layer.flops for layer in layers),
    )


def _with_adapter(settings: Settings) -> Settings:
    """A bare model is traced with the smallest adapter there is: what is trained is not frozen."""
    return replace(settings, rank=max(1, settings.rank))


def estimate_answering(config: Config, settings: Settings) -> VramEstimate:
    """Bytes while prompts of `row_tokens` tokens are read without gradients, before any cache: the
    weights as in training, an adapter without gradients or moments, the widest layer's forward and
    its mask.
    """
    settings = _with_adapter(settings)
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


def _first_fitting(
    config: Config,
    settings: Settings,
    budget: int,
    name: str,
    values: Sequence[Any],
    estimate: Callable[[Config, Settings], VramEstimate] = estimate_vram,
) -> Settings:
    """`settings` with the first of `values` for the setting `name` that fits, else the last."""
    options = [replace(settings, **{name: value}) for value in values]
    return next((s for s in options if estimate(config, s).total <= budget), options[-1])


def fewest_recomputed(config: Config, settings: Settings, budget: int) -> int:
    """The fewest recomputed layers that fit (fewer is faster); -1: none do."""
    counts = [*range(len(weighed(config, settings).linears) + 1), -1]
    return _first_fitting(config, settings, budget, "checkpoint_layers", counts).checkpoint_layers


def decided(config: Config, settings: Settings, budget: int) -> Settings:
    """`settings` with -1 layers replaced by the fewest recomputed ones that fit."""
    if settings.checkpoint_layers >= 0:
        return settings
    return replace(settings, checkpoint_layers=fewest_recomputed(config, settings, budget))


def longest_row(config: Config, settings: Settings, budget_gib: float) -> int:
    """Tokens of the longest row that fits with these settings, LONGEST_ROW at most; 0: none."""

    def over(steps: int) -> bool:
        row = replace(settings, row_tokens=steps * ROW_STEP)
        return estimate_vram(config, row).total > budget_gib * GIB

    # From there on rows are cut in tiles, and need less again.
    tile = settings.mlp_tile_tokens // ROW_STEP
    for low, high in ((tile, LONGEST_ROW // ROW_STEP), (0, tile + 1)):
        fits = bisect_left(range(high), True, low + 1, key=over) - 1
        if fits > low:
            return ROW_STEP * fits
    return 0


def savings(
    config: Config, settings: Settings, budget: int, rows: tuple[int, ...] = ()
) -> Iterator[Step]:
    """`settings` as they are, then every change that saves bytes, cheapest first, each on top of
    those before; shorter `rows` last. Of several values the first that fits is taken, or the last.
    """
    layers = len(weighed(config, settings).linears)
    changes: list[tuple[str, str, Sequence[Any]]] = [
        ("memory.embedding=cpu", "embedding", ["cpu"]),
        ("train.optimizer=adamw8bit", "optimizer", ["adamw8bit"]),
        ("memory.checkpoint_layers=-1", "checkpoint_layers", [-1]),
        ("memory.offload_inputs=true", "offload_inputs", [True]),
        ("model.quantize=nf4", "quantize", ["nf4"]),
        ("memory.chunk_mib=32", "chunk_bytes", [32 * MIB]),
        ("memory.mlp_tile_tokens=1024", "mlp_tile_tokens", [1024]),
        # two slots hold two anyway
        ("memory.stream_layers={}", "stream_layers", range(3, layers + 1)),
        ("model.head=int8", "head", ["int8"]),
        ("lora.rank=8", "rank", [8]),
        ("train.row_tokens={}", "row_tokens", [n for n in rows if n < settings.row_tokens]),
    ]
    step = Step("", settings, estimate_vram(config, settings), 1.0)
    pace = step.estimate.flops / settings.row_tokens
    yield step
    for change, name, values in changes:
        # What fits already shows all that there is to save.
        wanted = values if step.total > budget else values[-1:]
        if not wanted:
            continue
        changed = _first_fitting(config, step.settings, budget, name, wanted)
        estimate = estimate_vram(config, changed)
        if estimate.total < step.total:
            change = change.format(getattr(changed, name))
            step = Step(change, changed, estimate, estimate.flops / changed.row_tokens / pace)
            yield step


def ladder(config: Config, settings: Settings, budget: int) -> list[Step]:
    """`settings`, then as many savings as it takes to fit, and shorter rows."""
    steps = []
    for step in savings(config, settings, budget, SHORTER_ROWS):
        steps.append(step)
        if step.total <= budget:
            break
    return steps


def plan_training(
    config: Config, name: str, settings: Settings, budget: int
) -> tuple[Settings, VramEstimate]:
    """What a training is to use: `settings`, `decided`, with a line about it.

    Raises UserError, with the settings that would fit, if these do not.
    """
    steps = ladder(config, settings, budget)
    asked, least = steps[0].total, steps[-1].total
    limit = f"{budget / GIB:.2f}"
    if asked > budget:
        fits = least <= budget
        raise UserError(
            "memory.too_big" if fits else "memory.hopeless",
            name=name,
            need=f"{asked / GIB:.2f}",
            budget=limit,
            least=f"{least / GIB:.2f}",
            changes=" ".join(step.change for step in steps[1:]),
            longest=longest_row(config, settings, budget / GIB) if fits else 0,
        )
    settings = decided(config, settings, budget)
    estimate = estimate_vram(config, settings)
    recomputed = recomputed_layers(settings, len(weighed(config, settings).linears))
    note(
        "memory.plan",
        total=f"{estimate.total / GIB:.2f}",
        budget=limit,
        row=settings.row_tokens,
        recomputed=sum(recomputed),
        layers=len(recomputed),
    )
    return settings, estimate


def plan_answering(
    config: Config,
    settings: Settings,
    budget: int,
    context: int = 0,
    formats: Sequence[Quantize] = (),
) -> tuple[Settings, VramEstimate]:
    """How a model is to be held for answering: with as few more streamed layers as fit `budget`
    bytes beside a prefill of `row_tokens` tokens and the keys and values of `context` (0: of the
    prefill); said in a line. `formats`: in the first of them, finest first, that fits whole.
    """
    weights = weighed(config, _with_adapter(settings))
    layers, token = len(weights.linears), weights.token
    room = budget - token * (context or settings.row_tokens)
    if formats:
        need = budget - room + estimate_answering(config, settings).total
        settings = _first_fitting(config, settings, room, "quantize", formats, estimate_answering)
        if settings.quantize == "nf4":
            note("memory.nf4", need=f"{need / GIB:.2f}", budget=f"{budget / GIB:.2f}")
    least = settings.stream_layers
    counts = [least, *range(max(3, least), layers + 1)]
    settings = _first_fitting(config, settings, room, "stream_layers", counts, estimate_answering)
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
