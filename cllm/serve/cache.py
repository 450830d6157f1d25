"""Keys and values of the rows that are decoded together; rows join and leave between two steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from cllm.model.device import autocast_dtype


class RowLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values of all rows in preallocated buffers (rows, heads, slots,
    head_dim).

    The slots [start, end) are live. Appending writes in place; a row leaves by the last row taking
    its place; a row joins by a copy of that row alone.
    """

    rows = start = end = 0

    def _resize(self, rows: int, window: int, spare: int) -> None:
        """New buffers whose live slots end at `window`, with `spare` slots behind; zeros, as
        garbage could be NaN.
        """
        live = self.end - self.start
        kept = min(self.rows, rows)
        for i, old in enumerate(self.buffers):
            new = old.new_zeros(rows, old.shape[1], window + spare, old.shape[3])
            new[:kept, :, window - live : window] = old[:kept, :, self.start : self.end]
            self.buffers[i] = new
        self.start, self.end = window - live, window

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if dtype := autocast_dtype(key_states.device):
            # what attention computes in: kept wider, they would be cast again for every token
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [key_states[:, :, :0], value_states[:, :, :0]]
            self.rows = key_states.shape[0]
        new = key_states.shape[2]
        if self.end + new > self.buffers[0].shape[2]:
            window = self.end - self.start
            self._resize(self.rows, window, new if window == 0 else new + 64 + window // 8)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, self.end : self.end + new] = states
        self.end += new
        self.keys, self.values = (
            buffer[: self.rows, :, self.start : self.end] for buffer in self.buffers
        )
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.end - self.start

    def drop(self, index: int) -> None:
        self.rows -= 1
        for buffer in self.buffers:
            buffer[index] = buffer[self.rows]

    def join(self, other: RowLayer, index: int, length: int) -> None:
        """Append row `index` of `other`, of which the last `length` slots are its own."""
        if self.rows == self.buffers[0].shape[0] or length > self.end:
            rows = max(self.buffers[0].shape[0], self.rows + 1 + self.rows // 4)
            self._resize(rows, max(length, self.end - self.start), 64 + length // 8)
        for buffer, theirs in zip(self.buffers, other.buffers, strict=True):
            buffer[self.rows, :, self.end - length : self.end] = theirs[
                index, :, other.end - length : other.end
            ]
        self.rows += 1
        self.start = min(self.start, self.end - length)


def cache_bytes(config: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one token's keys and values, and of one row's logits (model dtype, float32 and a
    copy of that).
    """
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return (
        2 * config.num_hidden_layers * kv_heads * head_dim * dtype.itemsize,
        10 * config.vocab_size,
    )
