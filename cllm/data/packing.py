"""Examples -> packed token rows: best-fit packing, a seeded shuffle per epoch, and a position that
can be saved.

A packed row holds whole sequences back to back, no padding:

    input_ids     a0 a1 a2 | b0 b1 b2 b3 | c0 c1
    position_ids   0  1  2 |  0  1  2  3 |  0  1
    labels        a1 a2  - | b1 b2 b3  - | c1  -      (the next token; - is IGNORE_INDEX)
    cu_seqlens    0 3 7 9
    supervised     0  1       3  4  5       7
"""

from __future__ import annotations

import bisect
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cllm.data.cache import Slices
from cllm.data.encode import IGNORE_INDEX, Example

# examples packed together: enough for rows over 98 % full, few enough that epochs differ
_WINDOW = 4096


@dataclass
class PackedBatch:
    """One packed row of T tokens and N sequences; the micro-batch of training."""

    input_ids: Tensor
    """(T,) int64, always in host memory: the embedding may be there too."""
    labels: Tensor
    """(T,) int64, shifted once: labels[i] is what position i predicts; IGNORE_INDEX where nothing
    is trained.
    """
    position_ids: Tensor
    """(T,) int64, restarts at 0 for each sequence."""
    supervised: Tensor
    """(S,) int64: the positions that have a label, ascending."""
    cu_seqlens: Tensor
    """(N+1,) int32, always in host memory: the attention reads its bounds there."""
    device_seqlens: Tensor | None = None
    """The same on the device, for kernels that take all sequences at once."""
    numbers: Tensor | None = None
    """(N,) int64 of preference data, always in host memory: which answer each sequence is, twice
    its conversation's number, and one more for the rejected one.
    """
    weights: Tensor | None = None
    """(T,) float32: what each position counts in the loss; None: 1."""
    sources: Tensor | None = None
    """(T,) int64 of a mixture: which source each position is of."""

    @property
    def weight(self) -> int:
        """Supervised tokens: what the loss is averaged over."""
        return len(self.supervised)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same row for a model that computes on `device`; nobody waits for the copies."""
        return replace(
            self,
            labels=without_waiting(self.labels, device),
            position_ids=without_waiting(self.position_ids, device),
            supervised=without_waiting(self.supervised, device),
            device_seqlens=without_waiting(self.cu_seqlens, device),
            weights=None if self.weights is None else without_waiting(self.weights, device),
            sources=None if self.sources is None else without_waiting(self.sources, device),
        )

    def split(self, tokens: int) -> list[PackedBatch]:
        """The same sequences in order as rows of at most `tokens` (a longer sequence stands alone);
        the losses' sum stays the same.
        """
        if len(self.input_ids) <= tokens:
            return [self]
        bounds, supervised = self.cu_seqlens, self.supervised
        cuts = [0]
        for start, end in itertools.pairwise(bounds.tolist()):
            if start > cuts[-1] and end - cuts[-1] > tokens:
                cuts.append(start)
        parts = []
        for low, high in itertools.pairwise([*cuts, len(self.input_ids)]):
            parts.append(
                PackedBatch(
                    input_ids=self.input_ids[low:high],
                    labels=self.labels[low:high],
                    position_ids=self.position_ids[low:high],
                    supervised=supervised[(supervised >= low) & (supervised < high)] - low,
                    cu_seqlens=bounds[(bounds >= low) & (bounds <= high)] - low,
                    numbers=self.numbers
                    if self.numbers is None
                    else self.numbers[(bounds[:-1] >= low) & (bounds[:-1] < high)],
                    weights=None if self.weights is None else self.weights[low:high],
                    sources=None if self.sources is None else self.sources[low:high],
                )
            )
        return parts


def without_waiting(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; a copy to a GPU goes through page-locked memory, so that the host does
    not wait for it.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(examples: Sequence[Example]) -> PackedBatch:
    """Put whole examples into one row; labels are shifted here, and only here."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    bounds = [0]
    for example in examples:
        ids += example.input_ids
        labels += [*example.labels[1:], IGNORE_INDEX]
        positions += range(len(example.input_ids))
        bounds.append(len(ids))
    return PackedBatch(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        position_ids=torch.tensor(positions),
        supervised=torch.tensor(
            [at for at, label in enumerate(labels) if label != IGNORE_INDEX], dtype=torch.int64
        ),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
    )


def best_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` grouped into rows of at most `row_tokens`.

    Each item, longest first, goes into the fullest row that still takes it; ties keep the given
    order. Raises ValueError for an item longer than a row. Rows are at most 11/9 of the optimum
    (Johnson 1973).
    """
    if too_long := [n for n in lengths if n > row_tokens]:
        raise ValueError(
            f"{len(too_long)} sequences are longer than a row of {row_tokens} tokens "
            f"(longest {max(too_long)})"
        )
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(free, (lengths[index], -1))
        if at == len(free):
            rows.append([])
            left, row = row_tokens, len(rows) - 1
        else:
            left, row = free.pop(at)
        rows[row].append(index)
        bisect.insort(free, (left - lengths[index], row))
    return rows


class PackedRows:
    """An endless, seeded stream of packed rows over `examples`; epoch e's order depends only on
    (seed, e).

    `state` is (epoch, unit) of what comes next: set it, or `seek`, to continue exactly there; a
    unit is a row. `single` puts each sequence in a row of its own (architectures whose recurrent
    state would leak across a packed row). With `numbers` (PackedBatch.numbers of the examples) a
    unit is the rows of a step, at most `step_rows` or two, that hold all answers of their
    conversations. `sources`: of a mixture, the number of each example's source.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        row_tokens: int,
        *,
        seed: int = 0,
        single: bool = False,
        numbers: Sequence[int] = (),
        step_rows: int = 1,
        sources: Sequence[int] = (),
    ) -> None:
        self.examples, self.row_tokens, self.seed, self.single = examples, row_tokens, seed, single
        self.sizes = (
            examples.sizes
            if isinstance(examples, Slices)
            else [len(example.input_ids) for example in examples]
        )
        self.numbers, self.step_rows, self.sources = numbers, step_rows, sources
        self.state = (0, 0)
        self._epoch = functools.lru_cache(2)(self._order)  # of the one that runs and the first

    def __len__(self) -> int:
        """Rows in the first epoch."""
        return sum(map(len, self._epoch(0)))

    def steps(self, count: int) -> float:
        """How often `take(count)` can be called in the first epoch."""
        return len(self._epoch(0)) / (1 if self.numbers else count)

    def _order(self, epoch: int) -> list[list[list[int]]]:
        """Units of rows of indices."""
        shuffle = random.Random(f"{self.seed}/{epoch}")
        if self.numbers:
            together: dict[int, list[int]] = {}
            for index, number in enumerate(self.numbers):
                together.setdefault(number // 2, []).append(index)
            conversations = list(together.values())
            shuffle.shuffle(conversations)
            units: list[list[list[int]]] = []
            window: list[int] = []
            for answers in conversations:
                if window and len(self._packed([*window, *answers])) > self.step_rows:
                    units.append(self._packed(window))
                    window = []
                window = window + answers
            return [*units, self._packed(window)]
        order = list(range(len(self.examples)))
        shuffle.shuffle(order)
        rows: list[list[int]] = []
        for start in range(0, len(order), _WINDOW):
            rows += self._packed(order[start : start + _WINDOW])
        shuffle.shuffle(rows)
        return [[row] for row in rows]

    def _packed(self, window: list[int]) -> list[list[int]]:
        sizes = [self.row_tokens if self.single else self.sizes[i] for i in window]
        return [[window[i] for i in group] for group in best_fit(sizes, self.row_tokens)]

    def _collated(self, row: list[int]) -> PackedBatch:
        batch = collate([self.examples[i] for i in row])
        if self.numbers:
            batch.numbers = torch.tensor([self.numbers[i] for i in row])
        if self.sources:
            of = torch.tensor([self.sources[i] for i in row])
            batch.sources = of.repeat_interleave(batch.cu_seqlens.diff())
        return batch

    def take(self, count: int) -> list[PackedBatch]:
        """The next `count` rows, running on into the next epoch; of preference data as many as
        hold both answers of each conversation.
        """
        batches: list[PackedBatch] = []
        epoch, unit = self.state
        while len(batches) < count:
            units = self._epoch(epoch)
            if batches and len(batches) + len(units[unit]) > count:
                break
            batches += map(self._collated, units[unit])
            epoch, unit = (epoch, unit + 1) if unit + 1 < len(units) else (epoch + 1, 0)
        self.state = (epoch, unit)
        return batches

    def seek(self, epoch: int, unit: int) -> None:
        """Go on at that unit of that epoch. Raises IndexError if the epoch has no such unit."""
        if not 0 <= unit < len(self._epoch(epoch)):
            raise IndexError(f"epoch {epoch} has no unit {unit}")
        self.state = (epoch, unit)

    def longest(self, measure: Callable[[Iterable[int]], int] = sum) -> PackedBatch:
        """What the memory plan is proven on, of the first epoch: the row with the most tokens, or
        with `max` the row of the longest sequence, whose attention may take more.
        """
        rows = itertools.chain.from_iterable(self._epoch(0))
        return self._collated(max(rows, key=lambda row: measure(self.sizes[i] for i in row)))
