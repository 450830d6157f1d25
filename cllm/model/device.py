"""Where a model computes, in which number format, and how much of the device it may take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cllm.config import PrecisionName
from cllm.memory import CONTEXT_BYTES, GIB, MIB
from cllm.messages import UserError, note

SEGMENT_BYTES = 20 * MIB  # what PyTorch's allocator takes from CUDA at a time


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes products in on `device`, None where it is off."""
    kind = _autocasting(device.type)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextmanager
def autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Products on this type of device are computed in `dtype`; None: in what they are given."""
    casts = _MetaAutocast() if device == "meta" else nullcontext()
    kind, enabled = _autocasting(device), dtype is not None
    # Its cache would hold a 16-bit copy of every adapter until the row's forward ends.
    with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False), casts:
        yield


def _autocasting(device: str) -> str:
    """The type of device whose autocast holds: PyTorch has none for tensors without values, and the
    CPU's stands for it.
    """
    return "cpu" if device == "meta" else device


class _MetaAutocast(TorchFunctionMode):
    """Casts tensors without values as the CPU's autocast says."""

    CAST: ClassVar = set("linear conv1d matmul __matmul__ mm bmm addmm baddbmm".split())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = autocast_dtype(torch.device("meta"))
        if dtype and func.__name__ in self.CAST:
            args = [x.to(dtype) if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


class Precision(NamedTuple):
    """How numbers are held and multiplied: the base's weights, and whether fp16 autocast with a
    scaler is on.
    """

    name: PrecisionName
    weights: torch.dtype
    device: str
    """The device's type: "cpu" or "cuda"."""

    @classmethod
    def choose(cls, name: PrecisionName, device: torch.device | str) -> Precision:
        """ "auto": bf16 where the GPU computes in it, else fp16 with a scaler; float32 on the CPU.

        Raises UserError for bf16 on a card that only emulates it.
        """
        kind = torch.device(device).type
        native_bf16 = kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "auto":
            name = "fp32" if kind == "cpu" else "bf16" if native_bf16 else "fp16"
        if name == "bf16" and not native_bf16:
            raise UserError("memory.no_bf16")
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return cls(name, dtypes[name], kind)

    def autocast(self) -> AbstractContextManager[object]:
        """fp16 runs under autocast; bf16 and fp32 need none, the adapters follow their input."""
        if self.name != "fp16":
            return nullcontext()
        return autocast(self.device, torch.float16)

    def scaler(self) -> torch.amp.GradScaler:
        """A scaler that is switched on for fp16 only."""
        return torch.amp.GradScaler(self.device, enabled=self.name == "fp16")

    def prepare(self, model: Any) -> None:
        """fp16: keep the residual stream in float32, where large activations would overflow."""
        if self.name != "fp16":
            return
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()  # the CPU's takes weights of its input's dtype only
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda _module, _inputs, output: output.float())


def choose_device(name: torch.device | str) -> torch.device:
    """The device called `name`, a GPU always with its index, which becomes the current one.

    "auto": the GPU if torch can use one, else the CPU; where only the build of torch stands in the
    way, that is said. Raises UserError for a GPU that is asked for and cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and not torch.backends.cuda.is_built() and _nvidia_driver():
            note("memory.cpu_build", torch=torch.__version__)
    try:
        device = torch.device(name)
        if device.type != "cuda":
            return device
        torch.cuda.init()
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            raise UserError("memory.no_card", device=name, count=torch.cuda.device_count())
        torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:  # no driver, an old one, a build for CPUs
        reason = str(error).strip().splitlines()[0]
        raise UserError("memory.no_gpu", device=name, reason=reason) from error
    return device


def _nvidia_driver() -> bool:
    """Whether an NVIDIA driver is installed on this system."""
    windows = Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvcuda.dll"
    known = (Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1"), windows)
    return bool(shutil.which("nvidia-smi")) or any(path.exists() for path in known)


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: parameters that wait in host memory do not count."""
    devices = (p.device for p in model.parameters() if p.device.type != "cpu")
    return next(devices, torch.device("cpu"))


def cap_allocator(budget_gib: float, device: torch.device) -> int:
    """Keep PyTorch within `budget_gib` less the CUDA context and a segment (0: within what is
    free); returns the budget in bytes.

    On the CPU nothing can be capped, and 0 means no budget.
    """
    budget = int(budget_gib * GIB)
    if device.type != "cuda":
        return budget
    # The call makes the context, so what it reports as free is without it.
    free, total = torch.cuda.mem_get_info(device)
    # What this process holds already, as when a second model is opened, is its own to use.
    free += torch.cuda.memory_reserved(device)
    usable = min(free, budget - CONTEXT_BYTES) if budget else free
    # PyTorch holds the cap against what is asked for, then takes whole segments.
    cap = max(0, usable - SEGMENT_BYTES)
    torch.cuda.set_per_process_memory_fraction(cap / total, device)
    return usable + CONTEXT_BYTES


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that PyTorch can still allocate, under the cap of `cap_allocator`."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    cap = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free, cap - reserved) + reserved - torch.cuda.memory_allocated(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device, or the host, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's allocator and cuBLAS have no exception class of their own.
    marks = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(mark in str(error) for mark in marks)


def release_memory() -> None:
    """Give what the allocator holds and nobody uses back to the device; nothing without one."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
