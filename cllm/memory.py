"""What the bytes of a training depend on, and what PyTorch and CUDA take beside them: values only,
no torch.

How many bytes a step takes is traced (`cllm.trace`) and fitted into a budget (`cllm.fit`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from cllm.config import LoraConfig, MemoryConfig, ModelConfig, PrecisionName
from cllm.messages import say

MIB, GIB = 2**20, 2**30
CONTEXT_BYTES = 450 * MIB  # CUDA context and libraries
WORKSPACE_BYTES = 20 * MIB  # cuBLAS's, which PyTorch's allocator gives it (bench/null_gpu.sh)
FRAGMENTATION_BYTES = 250 * MIB  # at least; or as much as the largest block (bench/null_gpu.sh)
WHOLE_SEGMENTS_BYTES = GIB  # the same where segments cannot grow, as on Windows
SEGMENTS_GROW = sys.platform == "linux"  # where `cllm.__main__.ALLOCATOR` says so


@dataclass(frozen=True, slots=True)
class Settings:
    """What the bytes depend on besides the shape; the values mean what they mean in cllm.toml."""

    row_tokens: int = 2048
    quantize: str = "none"
    precision: PrecisionName = "bf16"
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    checkpoint_layers: int = -1
    chunk_bytes: int = 128 * MIB
    device: str = "cuda"
    head: str = "16bit"
    optimizer: str = "adamw"
    offload_inputs: bool = False
    stream_layers: int = 0
    mlp_tile_tokens: int = 0
    embedding: str = "auto"
    dropout: bool = False
    dora: bool = False

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        memory: MemoryConfig,
        lora: LoraConfig | None,
        *,
        row_tokens: int,
        precision: PrecisionName,
        device: str,
        optimizer: str = "adamw",
    ) -> Settings:
        """What a config's sections come to; precision and device as they were resolved, of a stored
        adapter the very layers (`cllm.assembly.adapter_of`).
        """
        adapter = lora or LoraConfig()
        targets = adapter.targets
        return cls(
            row_tokens,
            model.quantize,
            precision,
            adapter.rank if lora else 0,
            targets if isinstance(targets, str) else tuple(targets),
            checkpoint_layers=memory.checkpoint_layers,
            chunk_bytes=memory.chunk_mib * MIB,
            device=device,
            head=model.head,
            optimizer=optimizer,
            offload_inputs=memory.offload_inputs,
            stream_layers=memory.stream_layers,
            mlp_tile_tokens=memory.mlp_tile_tokens,
            embedding=memory.embedding,
            dropout=adapter.dropout > 0,
            dora=adapter.dora,
        )


@dataclass(frozen=True, slots=True)
class VramEstimate:
    """Bytes by item at the peak; `moment` says which one that is: "loss", "kept_layer" or
    "recomputed_layer".
    """

    items: dict[str, int]
    moment: str
    host: int
    """Bytes in host memory instead: streamed layers, the embedding, offloaded layer inputs."""
    conversion: int
    """Bytes of host memory that reading the weights takes beside what stays: the largest tensor
    as it may be stored, where q, k and v or gate and up are one, and a streamed write's.
    """
    crossing: int
    """Bytes that cross between host and device per row, embedding rows not counted."""
    flops: int
    """Operations of one row, forth and back."""

    @property
    def total(self) -> int:
        """Bytes on the device, CUDA context and fragmentation included."""
        return sum(self.items.values())

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` should show: all but context and fragmentation."""
        return self.total - self.items["context"] - self.items["fragmentation"]

    def table(self) -> str:
        """One line per item in MiB, and the total."""
        mebibytes = {
            name: f"{size / MIB:>10,.1f}"
            for name, size in {**self.items, "total": self.total}.items()
        }
        return say("memory.table", **mebibytes, moment=say(f"memory.moment.{self.moment}"))


def streamed_layers(layers: int, count: int) -> list[int]:
    """Which `count` of `layers` are streamed: spread evenly, so that a copy hides behind as many
    resident layers as there are.
    """
    count = min(count, layers)
    return [(2 * i + 1) * layers // (2 * count) for i in range(count)]
