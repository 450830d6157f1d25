"""What a step really takes: the census of storages, and the proof of a plan on the largest rows
before training.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cllm.data.packing import PackedBatch
from cllm.learn.optim import Trainee
from cllm.learn.snapshot import capture, restore
from cllm.memory import GIB, VramEstimate
from cllm.messages import UserError, note
from cllm.model.device import device_of


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Section(NamedTuple):
    """What happened in one part of a run."""

    alive: int
    """Bytes at its end."""
    peak: int
    flops: int
    largest: int
    """Bytes of the largest storage made."""


class Census(TorchDispatchMode):
    """Counts the storages made while it is on, on one type of device or on all, and operations as
    torch.utils.flop_counter does: of matrix products, convolutions and attention.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.sizes: dict[int, int] = {}
        self.alive = self.peak = self.largest = self.flops = 0

    def section(self) -> Section:
        """What happened since the last call."""
        section = Section(self.alive, self.peak, self.flops, self.largest)
        self.peak = self.alive
        self.flops = self.largest = 0
        return section

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool
        if asked and args[0].is_meta:
            # Nobody knows. What is asked is whether nothing is special: no padding, no packing.
            return True
        if func is torch.ops.aten._grouped_mm.default and args[0].is_meta:
            # Without values it takes bf16 only; sizes are those of any type.
            result = func(*[x.bfloat16() for x in args[:2]], *args[2:], **kwargs or {})
            result = result.to(args[0].dtype)
        else:
            result = func(*args, **kwargs or {})
        if count := flop_registry.get(func.overloadpacket):
            operations = count(*args, **(kwargs or {}), out_val=result)
            # Of causal attention's scores one half is computed, the counter takes all.
            self.flops += (
                operations // 2 if "attention" in func.overloadpacket.__name__ else operations
            )
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        old = {t.untyped_storage()._cdata for t in inputs}
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            here = not self.device or tensor.device.type == self.device
            if here and key not in old and key not in self.sizes:
                self.sizes[key] = size
                self.alive += size
                self.largest = max(self.largest, size)
                weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.alive)
        return result

    def _gone(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)


def peak_storage_bytes(run: Callable[[], object]) -> int:
    """The most bytes of storages that `run` creates and that live at once; what existed before does
    not count.
    """
    census = Census()
    with census:
        run()
    return census.peak


def peak_bytes(
    run: Callable[[], object], model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Peak while `run` runs: `max_memory_allocated` on a GPU, else what model and optimizer hold
    and a census of the rest.
    """
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    state = [t for values in optimizer.state.values() for t in values.values()]
    tensors = [t for t in state if isinstance(t, Tensor)]
    held = storage_bytes([*model.parameters(), *model.buffers(), *tensors])
    return held + peak_storage_bytes(run)


def prove(
    trainee: Trainee,
    rows: list[PackedBatch],
    *,
    plan: VramEstimate | None,
    budget: int,
    micro_tokens: int = sys.maxsize,
) -> int:
    """Peak bytes of one optimizer step on `rows`, against `plan` and `budget` bytes; everything is
    then as it was, bit for bit.

    A small step comes first, so that AdamW's moments exist at the peak. Parameters, moments and
    generators are put back; a copy of the scaler serves, as a failure spoils it. Raises UserError
    if it takes more than the budget, StepOutOfMemoryError if memory ran out.
    """
    model, optimizer = trainee.model, trainee.optimizer
    tried = replace(trainee, scaler=copy.deepcopy(trainee.scaler))
    before = {name: tensor.clone() for name, tensor in capture(model, optimizer).items()}
    try:
        tried.step(rows[0].split(1)[-1:], micro_tokens=micro_tokens)
        peak = peak_bytes(lambda: tried.step(rows, micro_tokens=micro_tokens), model, optimizer)
    finally:
        restore(model, optimizer, before)
    row = max(len(batch.input_ids) for batch in rows)
    measured = f"{peak / GIB:.3f}"
    if peak + (plan.items["context"] if plan else 0) > budget:
        raise UserError("memory.over", row=row, peak=measured, budget=f"{budget / GIB:.3f}")
    planned = f"{plan.allocated / GIB:.3f}" if plan else "?"
    ratio = f"{peak / plan.allocated:.0%}" if plan else "?"
    note("memory.proven", row=row, peak=measured, plan=planned, ratio=ratio)
    return peak
