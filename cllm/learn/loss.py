"""The one loss primitive: token negative log-likelihood that never builds full logits, and the SFT
objective on it.

Knows a model only as "hidden states, then a head"; the head runs where there is a label, chunk by
chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cllm.data.encode import IGNORE_INDEX
from cllm.data.packing import PackedBatch, without_waiting
from cllm.model.attention import row_arguments
from cllm.model.device import autocast, autocast_dtype
from cllm.model.head import output_head

Tile = tuple[slice, Tensor, Tensor | None]
"""Some rows of a head: which, their dense weight, their bias."""
CHUNK_BYTES = 128 * 2**20
_TILE = 2**25  # weights of an int8 head dequantized at a time: 64 MiB in 16 bits, twice
# of a chunk, this much at a time is looked at in float32: it stays in the processor's cache
_FP32_BYTES = 16 * 2**20


def token_nll(
    hidden: Tensor,
    lm_head: nn.Module,
    labels: Tensor,
    chunk_bytes: int = CHUNK_BYTES,
    supervised: Tensor | None = None,
) -> Tensor:
    """-log softmax(lm_head(hidden_t))[labels_t] for every position; exact in value and gradient for
    any later weighting.

    Shapes: hidden (T, D), labels (T,) int64; result (T,) nats in float32, 0 at IGNORE_INDEX. Labels
    are what position t predicts (already shifted). `supervised` (S,) int64: the positions that have
    one; without it they are read from the device, for which the host waits. At most `chunk_bytes`
    of logits live at once.
    With a frozen bare head, dense or int8 (dequantized in tiles), the unit gradient (softmax -
    onehot) W is formed in the forward and scaled in the backward; any other head is recomputed
    chunk by chunk there.
    """
    kept = (labels != IGNORE_INDEX).nonzero().squeeze(1) if supervised is None else supervised
    result = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    if kept.numel() == 0:
        return result + hidden.sum() * 0.0  # keeps the graph connected
    chosen, targets = hidden[kept], labels[kept]
    bare = type(lm_head) is nn.Linear or hasattr(lm_head, "tiles")
    if bare and not any(p.requires_grad for p in lm_head.parameters()):
        frozen: Any = _FrozenHeadNll
        nll = frozen.apply(chosen, lm_head, targets, chunk_bytes)
    else:
        rows = max(1, chunk_bytes // (6 * _vocabulary(lm_head)))
        parts = zip(chosen.split(rows), targets.split(rows), strict=True)
        nll = torch.cat(
            [checkpoint(_chunk_nll, lm_head, h, t, use_reentrant=False) for h, t in parts]
        )
    return result.index_put((kept,), nll)


def _vocabulary(head: nn.Module) -> int:
    return int(next(size for m in head.modules() if (size := vars(m).get("out_features"))))


def _chunk_nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _logits(hidden: Tensor, vocabulary: int, tiles: Iterable[Tile]) -> Tensor:
    logits = hidden.new_empty(0)
    for part, weight, bias in tiles:
        if len(weight) == vocabulary:
            return F.linear(hidden, weight, bias)
        logits = logits if logits.numel() else hidden.new_empty(len(hidden), vocabulary)
        torch.mm(hidden, weight.T, out=logits[:, part])
        if bias is not None:
            logits[:, part] += bias
    return logits


class _FrozenHeadNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Any, targets: Tensor, chunk_bytes: int) -> Tensor:
        vocabulary, device = head.out_features, hidden.device.type
        quantized = hasattr(head, "tiles")
        dtype = hidden.dtype if quantized else head.weight.dtype
        if quantized:
            dtype = autocast_dtype(hidden.device) or dtype

        def tiles() -> Iterable[Tile]:
            if quantized:
                return head.tiles(dtype, _TILE)  # type: ignore[no-any-return]
            return [(slice(None), head.weight, head.bias)]

        rows = max(1, min(len(targets), chunk_bytes // (vocabulary * dtype.itemsize)))
        inner = max(1, _FP32_BYTES // (4 * vocabulary))
        # float16 cannot hold small probabilities: the unit gradient is formed 256 times larger and
        # scaled back.
        scale = 256.0 if dtype == torch.float16 else 1.0
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        unit = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), rows):
            span = slice(start, start + rows)
            with autocast(device, None):
                logits = _logits(hidden[span].to(dtype), vocabulary, tiles())
                blocks = range(0, len(logits), inner)
                # Without values (`cllm.trace`) two say what they take; there is no product in them.
                for low in blocks[:2] if hidden.is_meta else blocks:
                    block = logits[low : low + inner]
                    target = targets[span][low : low + inner, None]
                    exact = block.float()
                    normalizer = exact.logsumexp(1, keepdim=True)
                    nll[span][low : low + inner] = (normalizer - exact.gather(1, target))[:, 0]
                    if unit is not None:
                        minus_one = torch.full_like(normalizer, -1.0)
                        exact.sub_(normalizer).exp_().scatter_add_(1, target, minus_one)
                        block.copy_(exact.mul_(scale))
                if unit is not None:
                    parts = ((logits[:, part] @ weight).float() for part, weight, _ in tiles())
                    unit[span] = reduce(Tensor.add_, parts).div_(scale)
            del logits, block, exact  # or they would live until the next chunk's logits are made
        ctx.save_for_backward(unit)
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (unit,) = ctx.saved_tensors
        return unit * gradients[0].to(unit.dtype)[:, None], None, None, None


def row_nll(model: Any, batch: PackedBatch, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """token_nll (T,) of one packed row under `model`, a Transformers causal LM with "cllm"
    attention.
    """
    embedding = model.get_input_embeddings().weight
    output = model.base_model(
        input_ids=without_waiting(batch.input_ids, embedding.device)[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        **row_arguments(model, batch.cu_seqlens, batch.device_seqlens),
    )
    hidden = output.last_hidden_state[0]
    return token_nll(hidden, output_head(model), batch.labels, chunk_bytes, batch.supervised)


def sft_loss(
    model: nn.Module,
    batch: PackedBatch,
    chunk_bytes: int = CHUNK_BYTES,
    by_source: Tensor | None = None,
) -> Tensor:
    """Summed nats over the row's supervised tokens (scalar float32), each times its weight if the
    row has any; divide by `batch.weight` for the mean. Those of each of the row's sources are added
    to `by_source`, (sources,) float32.
    """
    nll = row_nll(model, batch, chunk_bytes)
    if by_source is not None and batch.sources is not None:
        by_source.index_add_(0, batch.sources, nll.detach())
    return (nll if batch.weights is None else nll * batch.weights).sum()
