"""Base and adapter -> one native checkpoint, tensor by tensor: no model is instantiated, and at
most two tensors are in memory.

W <- W + strength scaling B A (DoRA: so much of what its merge changes), summed in float32 in slices
of rows and rounded once to the base's 16-bit type. Nothing is merged into 4-bit weights, because
their grid is coarser than the update. Numbers as `cllm.model.lora.LoraLinear`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cllm.model.adapter import check_adapter, read_adapter
from cllm.model.checkpoint import Checkpoint, converted, open_native, split_rows, write_config
from cllm.model.lora import merge_into
from cllm.model.nf4 import dequantize, quantize_nf4
from cllm.model.shards import Layout, with_dtype, write_json, write_safetensors

SHARD_BYTES = 4 * 2**30


class Merge(NamedTuple):
    """What a merge reads, checked."""

    checkpoint: Checkpoint
    model: Any
    """The base's, on the meta device."""
    layout: Layout
    """Names, shapes and types to write."""
    dtype: torch.dtype
    """Of the floating-point tensors in `layout`."""
    adapter: dict[str, dict[str, Tensor]]
    scaling: float
    nf4: bool
    """The base's linears are rounded to NF4 first, as the adapter was trained on them."""
    strength: float
    """Of the adapter, as in `cllm.model.lora.Gate`."""

    @property
    def bytes(self) -> int:
        """Of the tensors in `layout`."""
        return sum(dtype.itemsize * math.prod(dims) for dims, dtype in self.layout.values())

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Native (name, tensor) pairs of `layout`, in its order, merged; the sums in `dtype`, by
        default rounded to what the base has.
        """
        head = self.model.get_output_embeddings()
        modules = dict(self.model.named_modules())
        for name, tensor in converted(self.checkpoint, self.layout):
            owner, _, leaf = name.rpartition(".")
            module = modules.get(owner)
            if self.nf4 and leaf == "weight" and type(module) is nn.Linear and module is not head:
                tensor = dequantize(quantize_nf4(tensor), torch.float32)
            if leaf == "weight" and owner in self.adapter:
                tensor = tensor.to(dtype or tensor.dtype)
                merge_into(
                    tensor if isinstance(module, nn.Linear) else tensor.T,
                    self.scaling,
                    self.adapter[owner],
                    self.strength,
                )
            yield name, tensor
            del tensor  # before the next one is read


def open_merge(base: Path, adapter: Path, *, nf4: bool = False, strength: float = 1.0) -> Merge:
    """Check base and adapter against each other before any weight is read.

    Floating-point tensors are written in the type that most of the base has (GGUF or nf4:
    bfloat16). Raises UserError as `open_native`, `read_adapter` and `check_adapter`.
    """
    checkpoint, model, layout = open_native(base)
    settings, layers = read_adapter(adapter, split_rows(checkpoint))
    check_adapter(model, adapter, settings, layers)
    sizes: Counter[torch.dtype] = Counter()
    for _, dims, dtype, _ in checkpoint.weights.stored():
        sizes[dtype] += torch.Size(dims).numel()
    dtype = torch.bfloat16 if nf4 or base.suffix == ".gguf" else sizes.most_common(1)[0][0]
    layout = with_dtype(layout, dtype)
    return Merge(checkpoint, model, layout, dtype, layers, settings.scaling, nf4, strength)


def write_merged(merge: Merge, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """config.json and safetensors shards (with an index if there is more than one) into the
    existing, empty `folder`.
    """
    shards = [Layout()]
    filled = total = 0
    for name, (dims, dtype) in merge.layout.items():
        size = dtype.itemsize * torch.Size(dims).numel()
        if shards[-1] and filled + size > shard_bytes:
            shards.append(Layout())
            filled = 0
        shards[-1][name] = (dims, dtype)
        filled += size
        total += size
    tensors = merge.tensors()
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        number = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"model{number}.safetensors"
        write_safetensors(folder / file, shard, itertools.islice(tensors, len(shard)))
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_config(merge.checkpoint, merge.model, folder, merge.dtype)
