"""What a step really takes: the census of storages, and the proof of a plan on the largest rows
before training.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def peak_storage_bytes(run: Callable[[], object]) -> int:
    """The most bytes of storages that `run` creates and that live at once; what existed before does
    not count.
    """

    class Census(TorchDispatchMode):
        alive, peak = 0, 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            old = {t.untyped_storage()._cdata for t in inputs}
            outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            for storage in (t.untyped_storage() for t in outputs):
                if storage._cdata not in old and storage._cdata not in known:
                    known[storage._cdata] = storage.nbytes()
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage._cdata)
            self.peak = max(self.peak, self.alive)
            return result

        def gone(self, key: int) -> None:
            self.alive -= known.pop(key)

    known: dict[int, int] = {}
    census: Any = Census()  # type: ignore[no-untyped-call]
    with census:
        run()
    return int(census.peak)


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
