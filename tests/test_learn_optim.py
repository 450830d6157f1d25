"""bitsandbytes' 8-bit AdamW in our step: where it runs, what it learns, its bytes, exact resume."""

from __future__ import annotations

import builtins
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from test_learn_loss import FP32, examples
from torch import nn

from cllm.data.packing import collate
from cllm.learn import optim
from cllm.learn.log import CLOCK_FIELDS
from cllm.learn.loss import sft_loss
from cllm.learn.optim import Trainee, check_optimizer, make_optimizer, set_learning_rate
from cllm.learn.snapshot import capture, restore
from cllm.messages import UserError
from cllm.model.lora import inject_lora
from cllm.runs import read_metrics

runs_here = pytest.mark.skipif(
    optim._without_8bit("cpu") != "", reason="bitsandbytes has no 8-bit optimizer here"
)


@pytest.fixture(name="without")
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has no bitsandbytes, such as a Mac."""
    imported = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError("No module named 'bitsandbytes'")
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    optim._without_8bit.cache_clear()
    yield
    optim._without_8bit.cache_clear()


def test_it_is_refused_in_one_line_where_bitsandbytes_does_not_run(without: None) -> None:
    with pytest.raises(UserError) as error:
        check_optimizer("adamw8bit", "cpu")
    assert error.value.code == "train.adamw8bit" and "No module" in str(error.value)
    with pytest.raises(UserError, match=r"train\.optimizer=adamw"):
        make_optimizer(nn.Linear(2, 2), 1e-3, name="adamw8bit")
    check_optimizer("adamw", "cpu")
    make_optimizer(nn.Linear(2, 2), 1e-3)


def trained(name: str, steps: int, rank: int) -> tuple[Any, torch.optim.Optimizer, list[float]]:
    """Rank 128 on a width of 32 makes 4,096 values and more; of smaller ones the moments stay
    float32.
    """
    model = tiny_model("llama", 0)
    torch.manual_seed(0)
    inject_lora(model, rank=rank, alpha=8)
    optimizer = make_optimizer(model.train(), 5e-3, plus_ratio=2.0, name=name)
    set_learning_rate(optimizer, 5e-3)
    return model, optimizer, run(model, optimizer, steps)


def run(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    row = [collate(examples(6))]
    trainee = Trainee(model, sft_loss, optimizer, FP32, FP32.scaler())
    return [trainee.step(row).loss for _ in range(steps)]


@runs_here
def test_it_learns_as_float32_adamw_does() -> None:
    exact, eight_bits = trained("adamw", 30, 128)[2], trained("adamw8bit", 30, 128)[2]
    assert exact[-1] < 0.7 * exact[0]
    assert max(abs(a - b) / b for a, b in zip(eight_bits, exact, strict=True)) < 0.02


@runs_here
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_and_the_rate_reach_every_group(ratio: float) -> None:
    """AdamW's first step is the group's rate times the gradient's sign."""
    torch.manual_seed(0)
    model = tiny_model("llama", 0)
    inject_lora(model, rank=128, alpha=8)
    optimizer = make_optimizer(model, 1.0, plus_ratio=ratio, name="adamw8bit")
    set_learning_rate(optimizer, 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for name in before:
        model.get_parameter(name).grad = torch.ones_like(before[name])
    optimizer.step()
    for name, old in before.items():
        rate = 1e-2 * (ratio if name.endswith("lora_B") else 1.0)
        torch.testing.assert_close(old - model.get_parameter(name), torch.full_like(old, rate))


@runs_here
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("rank", [4, 128], ids=["small", "blocks"])
def test_resume_is_bit_exact(name: str, rank: int) -> None:
    model, optimizer, _ = trained(name, 3, rank)
    tensors = {key: value.clone() for key, value in capture(model, optimizer).items()}
    assert any("absmax" in key for key in tensors) == (name == "adamw8bit" and rank == 128)
    wanted = run(model, optimizer, 3)
    for steps in (0, 2):  # into a fresh optimizer, and into one that has moments already
        other, fresh, _ = trained(name, steps, rank)
        restore(other, fresh, tensors)
        assert run(other, fresh, 3) == wanted


@runs_here
def test_the_moments_of_another_optimizer_are_refused() -> None:
    for name, other in (("adamw", "adamw8bit"), ("adamw8bit", "adamw")):
        tensors = capture(*trained(name, 1, 128)[:2])
        with pytest.raises(UserError, match="belongs to no parameter") as error:
            restore(*trained(other, 0, 128)[:2], tensors)
        assert error.value.code == "snapshot.foreign"


@runs_here
def test_a_killed_run_ends_as_if_nothing_had_happened(config: Path, tmp_path: Path) -> None:
    settings = ["eval.samples=0", "train.optimizer=adamw8bit", "lora.rank=128", "train.steps=16"]

    def command(run_dir: Path) -> list[str]:
        options = [*settings, "run.snapshot_every=1", f"run.dir={json.dumps(str(run_dir))}"]
        return [sys.executable, "-m", "cllm.train", str(config), *options]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, capture_output=True)
    process = subprocess.Popen(
        command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (killed / "snapshots" / "step-000003").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    assert process.wait() != 0
    subprocess.run([*command(killed), "--resume"], check=True, capture_output=True)
    results = []
    for directory in (whole, killed):
        rows = read_metrics(directory / "metrics.jsonl")
        adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
        results.append(
            (adapter, [{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows])
        )
    assert results[0] == results[1]
    kept = load_file(next((killed / "snapshots").glob("step-*/state.safetensors")))
    assert any(tensor.dtype == torch.uint8 for key, tensor in kept.items() if "state2" in key)
