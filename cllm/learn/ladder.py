"""What to give up when memory runs out, one rung at a time: speed first, then, only if that is
allowed, the length of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cllm.data.packing import PackedBatch

MIN_ROW_TOKENS = 64


@dataclass(frozen=True)
class Ladder:
    """How a step is computed at present."""

    micro_tokens: int
    """Most tokens of a micro-batch: longer packed rows are computed in parts."""
    row_tokens: int
    """Tokens of a packed row. Smaller ones change the data; everything else gives the same
    result.
    """
    offload_inputs: bool = False
    """Inputs of all layers wait in host memory, and the layers are recomputed."""
    embedding_on_cpu: bool = False

    @classmethod
    def restored(cls, values: dict[str, Any]) -> Ladder:
        """From a snapshot's state.json. Raises LookupError, TypeError or ValueError."""
        micro_tokens, row_tokens = int(values["micro_tokens"]), int(values["row_tokens"])
        on_cpu = bool(values["embedding_on_cpu"])
        return cls(micro_tokens, row_tokens, bool(values["offload_inputs"]), on_cpu)

    def down(self, rows: Sequence[PackedBatch], *, shorten: bool) -> Ladder | None:
        """The next rung after `rows` did not fit; None if nothing is left (shorter rows only if
        `shorten`).
        """
        longest = _longest(rows, self.micro_tokens)
        if _longest(rows, longest // 2) < longest:
            return replace(self, micro_tokens=longest // 2)
        if not self.offload_inputs:
            return replace(self, offload_inputs=True)
        if not self.embedding_on_cpu:
            return replace(self, embedding_on_cpu=True)
        return (
            replace(self, row_tokens=self.row_tokens // 2)
            if shorten and self.row_tokens >= 2 * MIN_ROW_TOKENS
            else None
        )


def _longest(rows: Sequence[PackedBatch], limit: int) -> int:
    return max(len(part.input_ids) for row in rows for part in row.split(limit))
