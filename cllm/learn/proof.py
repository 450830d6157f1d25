"""What a step really takes: the census of storages, the allocator's cap, and the proof of a plan on
the longest row before training.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cllm.data.packing import PackedBatch
from cllm.learn.optim import Objective, Precision, train_step
from cllm.learn.snapshot import capture, restore
from cllm.memory import CONTEXT_BYTES, GIB, VramEstimate
from cllm.messages import UserError, note


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


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
            old = {
                t.untyped_storage()._cdata
                for t in tree_leaves((args, kwargs))
                if isinstance(t, torch.Tensor)
            }
            for storage in (
                t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)
            ):
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
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    state = [
        t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)
    ]
    return storage_bytes([*model.parameters(), *model.buffers(), *state]) + peak_storage_bytes(run)


def cap_allocator(budget_gib: float, device: torch.device | str) -> int:
    """Keep PyTorch within `budget_gib` less the CUDA context (0: within what is free); returns the
    budget in bytes.

    On the CPU nothing can be capped, and 0 means no budget.
    """
    budget = int(budget_gib * GIB)
    if torch.device(device).type != "cuda":
        return budget
    free, total = torch.cuda.mem_get_info(device)  # makes the context, so free is without it
    usable = min(free, budget - CONTEXT_BYTES) if budget else free
    torch.cuda.set_per_process_memory_fraction(max(0.0, usable / total), device)
    return usable + CONTEXT_BYTES


def choose_device(name: str) -> str:
    """ "auto": the GPU if torch can use one, else the CPU. Raises UserError for a GPU that is asked
    for and cannot be used.
    """
    if name.startswith("cuda"):
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # no driver, an old one, a build for CPUs
            raise UserError(
                "memory.no_gpu", device=name, reason=str(error).strip().splitlines()[0]
            ) from error
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def prove(
    model: nn.Module,
    rows: list[PackedBatch],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    max_norm: float,
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
    own = copy.deepcopy(scaler)
    before = {name: tensor.clone() for name, tensor in capture(model, optimizer).items()}
    how: dict[str, Any] = {
        "precision": precision,
        "scaler": own,
        "max_norm": max_norm,
        "micro_tokens": micro_tokens,
    }
    try:
        train_step(model, rows[0].split(1)[-1:], objective, optimizer, **how)
        peak = peak_bytes(
            lambda: train_step(model, rows, objective, optimizer, **how), model, optimizer
        )
    finally:
        restore(model, optimizer, before)
    values = {"row": len(rows[0].input_ids), "peak": f"{peak / GIB:.3f}"}
    if peak + (plan.items["context"] if plan else 0) > budget:
        raise UserError("memory.over", **values, budget=f"{budget / GIB:.3f}")
    planned, ratio = (
        (f"{plan.allocated / GIB:.3f}", f"{peak / plan.allocated:.0%}") if plan else ("?", "?")
    )
    note("memory.proven", **values, plan=planned, ratio=ratio)
    return peak
