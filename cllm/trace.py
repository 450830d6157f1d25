"""What a training step holds, from the step itself: the trainer's model, without values.

The model is put together as for a run (`cllm.assembly`) on the meta device, whose tensors have
sizes and no bytes, and one row goes forth and back through the trainer's loss, once with every
layer kept and once with every layer recomputed. A census of storages notes what each layer leaves
for its backward and how much more lives while it computes. Layers are alike, so a few of them are
traced and stand for the rest. Nothing here knows an architecture.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from cllm.data import cache
from cllm.data.packing import PackedBatch
from cllm.learn.loss import sft_loss
from cllm.learn.proof import Census, Section, storage_bytes
from cllm.memory import SEGMENTS_GROW, Settings
from cllm.messages import UserError, to_json
from cllm.model import attention
from cllm.model.attention import Card
from cllm.model.checkpoint import Placement, random_model
from cllm.model.device import Precision
from cllm.model.lora import inject_lora, linear_shape
from cllm.model.offload import checkpoint_layers, decoder_layers, layer_pieces, tile_mlp
from cllm.serve.cache import cache_bytes

META = torch.device("meta")
LONG = 4096  # tokens: from four times as many on a row is not traced itself
SECOND = 8  # tokens of a row's second sequence


class Layer(NamedTuple):
    """Bytes and operations of one decoder layer in a step; or of the head and the loss, which are
    like a last layer that leaves nothing.
    """

    left: int
    """Bytes that wait for its backward; the first layer's include its gradient."""
    forward: int
    """Most bytes while it computes, beyond what the layers below it left."""
    backward: int
    """Most bytes in its backward, beyond what it and the layers below it left."""
    flops: int
    largest: int
    """Bytes of the largest tensor that it makes."""


class Weights(NamedTuple):
    """Bytes of what is on the device for the whole run."""

    linears: list[int]
    """Of each layer's frozen linears."""
    packed: list[int]
    """The same in the buffer that they are streamed in."""
    embedding: int
    head: int
    """0: it is the embedding."""
    rest: int
    """Norms, biases, experts and whatever else is frozen."""
    trained: list[int]
    """Numbers of each adapter tensor."""
    token: int
    """Of one token's keys and values."""
    largest: int
    """Bytes of the largest tensor before it is quantized, what may be stored as one taken so."""


def traced(config: Mapping[str, Any], settings: Settings, recompute: bool) -> list[Layer]:
    """The layers, and last the loss, of a step on one row with all layers kept, or all recomputed,
    of a model by its config.json. A row too long to be traced itself is on the parabola through
    three shorter ones.

    What is only a place or a choice of layers is left to `cllm.fit`. Raises UserError for a model
    whose code does not run without values.
    """
    text, settings = to_json(dict(config)), _neutral(settings)
    least = max(LONG, 8 * settings.mlp_tile_tokens)
    if settings.row_tokens <= 4 * least:
        return [Layer(*layer) for layer in _facts(text, settings, recompute)]
    lengths = [least, 2 * least, 4 * least]
    passes = [_facts(text, replace(settings, row_tokens=n), recompute) for n in lengths]
    curves = np.polyfit(lengths, np.reshape(passes, (len(lengths), -1)), 2)
    numbers = np.rint(np.polyval(curves, settings.row_tokens)).astype(int)
    return [Layer(*layer) for layer in numbers.reshape(-1, len(Layer._fields)).tolist()]


def weighed(config: Mapping[str, Any], settings: Settings) -> Weights:
    """What the model weighs with its adapter, as it is held for training."""
    return Weights(*_facts(to_json(dict(config)), replace(_neutral(settings), **_OF_A_ROW)))


def _neutral(settings: Settings) -> Settings:
    """Without what does not change a pass, so that one stands for many settings."""
    return replace(
        settings,
        checkpoint_layers=-1,
        optimizer="adamw",
        offload_inputs=False,
        stream_layers=0,
        embedding="device",
    )


@lru_cache(512)
def _facts(config: str, settings: Settings, recompute: bool | None = None) -> Any:
    """The weights, or a pass with all layers kept or recomputed; in the data cache, too, so that a
    second start traces nothing.
    """

    def make() -> cache.Entry:
        weights, model, alike = _built(config, replace(settings, **_OF_A_ROW))
        return {}, weights if recompute is None else _trace(model, alike, settings, recompute)

    versions = (torch.__version__, transformers.__version__, sys.platform)
    return cache.recall(cache.key_of(config, settings, recompute, *versions), make)[1]


_OF_A_ROW: dict[str, Any] = {"row_tokens": 0, "chunk_bytes": 0, "mlp_tile_tokens": 0}
"""Settings that a model on the meta device does not depend on."""


@contextmanager
def _said() -> Iterator[None]:
    """What an architecture's code raises without values, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError("memory.untraced", reason=reason) from error


@lru_cache(8)
@_said()
def _built(config: str, settings: Settings) -> tuple[Weights, Any, list[int]]:
    """What the whole model weighs; the model with its adapter on the meta device, less the layers
    that are like another one; and for every layer of the whole the one that it is like.
    """
    precision = Precision.choose(settings.precision, META)
    model: Any = random_model(
        json.loads(config),
        Placement(
            dtype=precision.weights, device=META, quantize=settings.quantize, head=settings.head
        ),
    )
    if settings.rank:
        inject_lora(
            model,
            rank=settings.rank,
            alpha=1,
            dropout=0.1 * settings.dropout,
            targets=settings.targets,
            dora=settings.dora,
        )
    precision.prepare(model)
    model.packs_rows = True
    weights = _weigh(model)
    layers = decoder_layers(model)
    types = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(layers)
    trains = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    kinds = [
        (any(trains[:index]), kind, [(n, t.shape, t.dtype) for n, t in layer.state_dict().items()])
        for index, (kind, layer) in enumerate(zip(types, layers, strict=False))
    ]
    # The first layer's input needs no gradient, so it stands for itself only.
    alike = [0, *(kinds.index(kind, 1) for kind in kinds[1:])]
    del layers[max(alike) + 1 :]
    attention.traced_card = _card(settings)
    try:
        with Census("meta"):
            sft_loss(model, _row(SECOND, SECOND))
    except attention.REFUSALS:
        model.packs_rows = False
    return weights, model.train(), alike


def _weigh(model: Any) -> Weights:
    pieces = [layer_pieces(layer) for layer in decoder_layers(model)]
    linears = [sum(piece.stop - piece.start for piece in of_layer) for of_layer in pieces]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tensors = [*model.parameters(), *model.buffers()]
    frozen = storage_bytes(t for t in tensors if not t.requires_grad)
    ends = storage_bytes([embedding, *head.parameters(), *head.buffers()])
    sizes: dict[tuple[str, int], int] = {("", 0): embedding.numel()}
    for name, module in model.named_modules():
        if shape := linear_shape(module):
            # Those beside each other that read the same may be stored as one: q, k, v; gate, up.
            beside = name.removesuffix(".base").rpartition(".")[0], shape[0]
            sizes[beside] = sizes.get(beside, 0) + shape[0] * shape[1]
    return Weights(
        linears,
        [of_layer[-1].stop for of_layer in pieces],
        embedding.nbytes,
        ends - embedding.nbytes,
        frozen - sum(linears) - ends,
        [p.numel() for p in tensors if p.requires_grad],
        cache_bytes(model.config.get_text_config(), embedding.dtype)[0],
        2 * max(sizes.values()),
    )


def _card(settings: Settings) -> Card:
    """The card that is planned for: one that computes in bf16 has flash attention, an older one has
    not, nor have the wheels for Windows.
    """
    if settings.device == "cpu":
        return Card("cpu", (0, 0), False)
    if settings.precision == "bf16":
        return Card("cuda", (8, 0), SEGMENTS_GROW)
    return Card("cuda", (7, 5), False)


def _row(*lengths: int) -> PackedBatch:
    """A row of sequences, every token supervised."""
    ids = torch.empty(sum(lengths), dtype=torch.int64, device=META)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackedBatch(ids, ids, ids, ids, bounds, bounds.to(META))


@_said()
def _trace(model: Any, alike: list[int], settings: Settings, recompute: bool) -> list[Layer]:
    """One row forth and back, the gradients of the row before it in place."""
    attention.traced_card = card = _card(settings)
    # Packed sequences that go through attention one after the other are put together again.
    tokens = settings.row_tokens
    apart = model.packs_rows and tokens > SECOND and not card.flash
    row = _row(tokens - SECOND, SECOND) if apart else _row(tokens)
    checkpoint_layers(model, -1 if recompute else 0)
    tile_mlp(model, settings.mlp_tile_tokens)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    layers = {*decoder_layers(model)}
    census = Census("meta")
    forward: list[Section] = []
    backward: list[Section] = []

    def ended(module: nn.Module, _inputs: object, output: Any) -> None:
        if module not in layers:
            return
        forward.append(census.section())
        # When its gradient is there, the backward of this layer begins.
        first = next(t for t in tree_leaves(output) if isinstance(t, Tensor))
        if first.requires_grad:
            first.register_hook(lambda _gradient: backward.append(census.section()))

    precision = Precision.choose(settings.precision, META)
    with census, register_module_forward_hook(ended):
        with precision.autocast():
            loss = sft_loss(model, row, settings.chunk_bytes)
        loss.backward()
        backward.append(census.section())
    head = backward[0]
    # Below the first adapter nothing has a backward.
    backward += [Section(0, 0, 0, 0)] * (1 + len(forward) - len(backward))
    # What waits for a backward is what is there when it begins and not when the one below does.
    alive = [section.alive for section in reversed(backward[:-1])]
    measured = [
        Layer(
            after - before,
            ahead.peak - before,
            back.peak - after,
            ahead.flops + back.flops,
            max(ahead.largest, back.largest),
        )
        for before, after, ahead, back in zip(
            [0, *alive], alive, forward, reversed(backward[1:]), strict=False
        )
    ]
    end = Layer(0, head.peak - alive[-1], 0, head.flops, head.largest)
    return [*(measured[index] for index in alike), end]
