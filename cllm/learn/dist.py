"""Several GPUs, several machines: this process's place among torchrun's, and the few collectives
that training needs.

    torchrun --nproc-per-node 2 -m cllm.train cllm.toml

Every rank holds the whole frozen base; only the adapter's gradients travel. What must be the same
everywhere (the run, a snapshot, a held-out loss) is rank 0's, shared as bytes. FSDP is not built:
NF4 bases are small enough to be held whole.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from cllm.messages import UserError, note, say

TIMEOUT_SECONDS = 1800
"""How long a rank waits for the others; rank 0 evaluates alone meanwhile."""


class World:
    """Rank `rank` of `size`; a world of one needs no process group and every method returns at
    once.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")

    @classmethod
    def join(cls, device: torch.device) -> World:
        """The world of torchrun's environment, each rank of a machine on its own GPU; without
        torchrun a world of one.

        Raises UserError under a launcher that shards parameters: FSDP and DeepSpeed are not built.
        """
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            if os.environ.get(name, "").lower() == "true":
                raise UserError("dist.sharded", name=name)
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(device=device)
        cuda = device.type == "cuda"
        if cuda:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        world = cls(int(os.environ["RANK"]), size, device)
        with world._peers():
            dist.init_process_group(
                "nccl" if cuda else "gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS)
            )
        return world

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor becomes its sum over the ranks, in place."""
        if self.size > 1:
            with self._peers():
                for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                    work.wait()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank."""
        if self.size == 1:
            return flag
        count = torch.tensor(float(flag), device=self.device)
        self.sum_([count])
        return bool(count)

    def share(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        if self.size == 1:
            return data
        shared = [data]
        with self._peers():
            dist.broadcast_object_list(shared, 0, device=self.device)
        return shared[0]

    def leave(self) -> None:
        """Called at a clean end; after a failure the process just ends, as waiting for lost peers
        could take forever.
        """
        if self.size > 1:
            dist.destroy_process_group()

    @contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # PyTorch's DistError among them
            raise RuntimeError(
                say("dist.lost", rank=self.rank, size=self.size, detail=str(error).split("\n")[0])
            ) from error


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collects Ctrl-C, SIGTERM and a closed terminal, so that the work at hand can end and be
    saved; a second one stops at once. A signal that this process was started to ignore (`nohup`)
    stays ignored.
    """
    seen: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        note("train.stopping")

    before = {}
    # the last is Windows' Ctrl-Break; not every system has all
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
