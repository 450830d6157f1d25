"""Packed rows: nothing lost, nothing split, order from the seed alone, a position that continues
exactly.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cllm.data.encode import IGNORE_INDEX, Example
from cllm.data.packing import PackedRows, best_fit, collate


def test_collate_draws_the_picture_of_the_docstring() -> None:
    a, b = Example([1, 2, 3], [IGNORE_INDEX, 2, 3]), Example([4, 5], [IGNORE_INDEX, 5])
    row = collate([a, b])
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert row.labels.tolist() == [2, 3, IGNORE_INDEX, 5, IGNORE_INDEX]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert row.cu_seqlens.tolist() == [0, 3, 5] and row.cu_seqlens.dtype == torch.int32
    assert row.supervised.tolist() == [0, 1, 3] and row.weight == 3


@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_keeps_every_item_once_within_capacity(lengths: list[int]) -> None:
    rows = best_fit(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    # two half-empty rows would have been joined
    assert sum(sum(lengths[i] for i in row) <= 25 for row in rows) <= 1


def test_best_fit_is_tight_and_refuses_what_cannot_fit() -> None:
    assert best_fit([6, 5, 5, 4], 10) == [[0, 3], [1, 2]]
    with pytest.raises(ValueError, match="1 sequences are longer than a row of 10"):
        best_fit([11, 3], 10)


def stream(seed: int = 0, single: bool = False) -> PackedRows:
    return PackedRows(
        [Example([i] * (1 + i % 7), [i] * (1 + i % 7)) for i in range(40)],
        16,
        seed=seed,
        single=single,
    )


def test_an_epoch_holds_every_sequence_once_and_epochs_differ() -> None:
    rows = stream()
    epochs = []
    for _ in range(2):
        batches = rows.take(len(rows))
        starts = [int(b.input_ids[s]) for b in batches for s in b.cu_seqlens[:-1].tolist()]
        assert sorted(starts) == list(range(40))
        epochs.append(starts)
    assert epochs[0] != epochs[1]
    assert rows.state == (2, 0)


def test_the_order_depends_on_the_seed_and_a_saved_state_continues_exactly() -> None:
    first, second = stream(), stream()
    first.take(7)
    second.state = first.state
    left, right = first.take(20), second.take(20)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(left, right, strict=True))
    assert [b.input_ids.tolist() for b in stream(1).take(5)] != [
        b.input_ids.tolist() for b in stream(0).take(5)
    ]


def test_single_rows_for_recurrent_models_and_the_longest_row() -> None:
    rows = stream(single=True)
    assert len(rows) == 40 and all(len(b.cu_seqlens) == 2 for b in rows.take(40))
    assert len(stream().longest().input_ids) == 16


def test_the_row_of_the_longest_sequence_is_not_always_the_one_with_most_tokens() -> None:
    rows = PackedRows([Example([1] * n, [1] * n) for n in (8, 5, 5)], 10)
    assert rows.longest().cu_seqlens.diff().tolist() == [5, 5]
    assert rows.longest(max).cu_seqlens.diff().tolist() == [8]


def test_ids_and_bounds_stay_on_the_host() -> None:
    row = collate([Example([1, 2, 3], [1, 2, 3]), Example([4, 5], [4, 5])]).to("meta")
    on_host = (row.input_ids, row.cu_seqlens)
    on_device = (row.labels, row.position_ids, row.supervised, row.device_seqlens)
    assert [t.device.type for t in on_host] == ["cpu"] * 2
    assert [t.device.type for t in on_device if t is not None] == ["meta"] * 4
