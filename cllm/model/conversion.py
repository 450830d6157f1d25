"""Tensors of an original checkpoint under native names and shapes, by their family's rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cllm.model import families
from cllm.model.families import Family, ModelShape


def convert(
    name: str, tensor: Tensor, family: Family, shape: ModelShape
) -> list[tuple[str, Tensor]]:
    """The native (name, tensor) pairs of one original tensor; none if it is dropped. Works on meta
    tensors too.

    Views where possible; only norms and NormHead compute, in float32 where precision matters.
    Raises ValueError or RuntimeError if rows that are to be split do not fit `shape`.
    """
    operation, targets = families.rename(name, family)
    parts = _OPERATIONS[operation](tensor, shape) if operation else [tensor] * len(targets)
    return list(zip(targets, parts, strict=True))


def _qkv(tensor: Tensor, shape: ModelShape) -> Sequence[Tensor]:
    """Rows are [heads * head_dim | kv_heads * head_dim | kv_heads * head_dim]."""
    rows = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    return torch.split(tensor, rows)


def _qkv_grouped(tensor: Tensor, shape: ModelShape) -> Sequence[Tensor]:
    """Rows are [kv_heads, heads / kv_heads + 2, head_dim]: the queries of a group, then its key,
    then its value.
    """
    queries = shape.heads // shape.kv_heads
    groups = tensor.reshape(shape.kv_heads, queries + 2, shape.head_dim, *tensor.shape[1:])
    return [part.reshape(-1, *tensor.shape[1:]) for part in groups.split([queries, 1, 1], dim=1)]


def _unit_rows(tensor: Tensor) -> Tensor:
    """Each row by its norm, in float32; in place, because a head is as large as a tensor gets."""
    rows = tensor.to(torch.float32, copy=True)
    return rows.div_(rows.norm(dim=1, keepdim=True).clamp_min_(1e-12))


def _unpermute(tensor: Tensor, heads: int) -> Sequence[Tensor]:
    """llama.cpp stores rotary pairs side by side, [d/2, 2] within a head; Transformers' halves are
    [2, d/2].
    """
    return [tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)]


_OPERATIONS: dict[str, Callable[[Tensor, ModelShape], Sequence[Tensor]]] = {
    "qkv": _qkv,
    "qkv_grouped": _qkv_grouped,
    "unit_rows": lambda tensor, shape: [_unit_rows(tensor)],
    "tied_unit_rows": lambda tensor, shape: [tensor, _unit_rows(tensor)],
    "unpermute_q": lambda tensor, shape: _unpermute(tensor, shape.heads),
    "unpermute_k": lambda tensor, shape: _unpermute(tensor, shape.kv_heads),
    "minus_one": lambda tensor, shape: [tensor - 1.0],
}
