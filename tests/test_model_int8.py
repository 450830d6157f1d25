"""The int8 head's codes and values against bitsandbytes' row-wise quantization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import byte_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from cllm.config import load_config
from cllm.messages import UserError
from cllm.model import int8
from cllm.model.checkpoint import Placement, load_model
from cllm.model.int8 import Int8Linear


def linear(weight: torch.Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight.data = weight
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_values_equal_bitsandbytes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(int8, "CHUNK", 7 * 96)  # 50 rows in pieces of seven
    weight = (
        torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-4, 2, 50)[:, None]
    ).to(dtype)
    weight[3] = 1e-3
    codes, largest, _ = functional.int8_vectorwise_quant(weight.float())
    head = Int8Linear(linear(weight))
    assert torch.equal(head.codes, codes)
    wanted = codes * (largest / 127)[:, None]
    assert torch.equal(head.dequantize(), wanted) and torch.equal(
        head.dequantize(dtype), wanted.to(dtype)
    )
    # half a step, and float32's rounding
    assert (head.dequantize() - weight.float()).abs().amax(1).le(largest / 253).all()


def test_a_row_of_zeros_stays_zero_and_nan_is_refused() -> None:
    weight = torch.zeros(4, 8)
    assert torch.equal(Int8Linear(linear(weight)).dequantize(), weight)
    weight[1, 2] = torch.nan
    with pytest.raises(UserError, match="inf or NaN"):
        Int8Linear(linear(weight))


def test_it_keeps_its_values_when_the_model_changes_its_type() -> None:
    head = Int8Linear(linear(torch.randn(20, 8)))
    before = head.dequantize()
    assert torch.equal(head.to(torch.bfloat16).dequantize(), before)


@pytest.mark.parametrize(
    ("damaged", "how"), [("lm_head", {"head": "int8"}), ("gate_proj", {"quantize": "nf4"})]
)
def test_a_checkpoint_with_nan_is_refused_in_one_line(
    damaged: str, how: dict[str, str], tmp_path: Path
) -> None:
    file = byte_checkpoint(tmp_path / "base") / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if damaged in name:
            tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.not_finite"):
        load_model(file.parent, Placement(**how))  # type: ignore[arg-type]


def test_a_head_in_four_bits_is_no_setting(config: Path) -> None:
    assert load_config(config, ["model.head=int8"]).model.head == "int8"
    with pytest.raises(UserError, match="head"):
        load_config(config, ["model.head=nf4"])
    with pytest.raises(ValueError, match="head = 'nf4'"):
        load_model(config, Placement(head="nf4"))
