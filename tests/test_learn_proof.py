"""The census, and the proof of a plan: it measures, refuses, and leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cllm import train
from cllm.fit import estimate_vram
from cllm.learn.optim import Trainee, make_optimizer
from cllm.learn.proof import peak_storage_bytes, prove, storage_bytes
from cllm.memory import GIB, Settings
from cllm.messages import UserError
from cllm.model.device import Precision, cap_allocator, choose_device
from cllm.shapes import find_config

CPU = torch.device("cpu")


def test_census_counts_storages_not_tensors() -> None:
    before = torch.ones(1000)

    def run() -> None:
        first = torch.zeros(256)  # 1 KiB
        view = first[10:]
        second = view + 1  # 984 bytes
        before.mul_(2)
        del first, view
        assert second.sum() > 0

    assert peak_storage_bytes(run) == 1024 + 984
    assert storage_bytes([before, before[:10], torch.zeros(3)]) == 4000 + 12


def run(folder: Path, *overrides: str) -> tuple[list[dict[str, object]], bytes]:
    """Losses and gradient norms of a tiny run, and its adapter."""
    data = folder.with_suffix(".jsonl")
    rows = [
        {"instruction": f"第{i}个数用数字怎么写？", "output": f"{i}，就是{i}。" * 3}
        for i in range(60)
    ]
    data.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    settings = [
        f"data.train={data}",
        "data.eval=",
        "data.held_out=0",
        "eval.samples=0",
        "train.steps=2",
        "train.row_tokens=256",
    ]
    settings += ["train.tokens_per_step=512", f"run.dir={folder}", *overrides]
    assert train.main(["cllm.toml", *settings]) == 0
    steps = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    numbers = [{key: row[key] for key in ("step", "loss", "grad_norm", "lr")} for row in steps]
    return numbers, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_is_the_same_bit_for_bit_with_and_without_the_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("lora.dropout=0.1", "memory.checkpoint_layers=1")
    plain = run(tmp_path / "plain", *how)
    assert "plan" not in capsys.readouterr().err
    proven = run(tmp_path / "proven", *how, "memory.budget_gib=1")
    said = capsys.readouterr().err
    assert "plan 0." in said and "of 1.00 GiB" in said and "the longest row" in said
    assert plain == proven


def test_automatic_layers_follow_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(256, precision="fp32", checkpoint_layers=2, device="cpu")
    budget = estimate_vram(find_config("cllm/assets/tiny-zh")[1], settings).total / GIB
    run(tmp_path / "run", f"memory.budget_gib={1.05 * budget}", "memory.checkpoint_layers=-1")
    assert "2 of 4 layers recomputed" in capsys.readouterr().err


def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cllm.assembly.load_model", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", "memory.budget_gib=0.01")
    assert (
        error.value.code in ("memory.too_big", "memory.hopeless")
        and not (tmp_path / "run").exists()
    )


def test_a_step_over_budget_is_refused_and_put_back() -> None:
    from cllm.bench import random_row

    model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
    optimizer, precision = make_optimizer(model, 0.1), Precision.choose("fp32", "cpu")
    before = [p.clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)

    def objective(m, b):
        return torch.nn.functional.cross_entropy(
            torch.dropout(m(b.input_ids), 0.1, True), b.input_ids, reduction="sum"
        )

    trainee = Trainee(model, objective, optimizer, precision, scaler)
    with pytest.raises(UserError) as error:
        prove(trainee, [random_row(32, 50)], plan=None, budget=1000)
    assert error.value.code == "memory.over"
    assert prove(trainee, [random_row(32, 50)], plan=None, budget=GIB) > 50 * 8 * 4 * 2  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and not optimizer.state
    assert torch.equal(generator, torch.get_rng_state()) and scaler.get_scale() == 8.0


def test_a_gpu_that_is_not_there_is_named_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=r"model\.device=cpu") as error:
        choose_device("cuda:0")
    assert "\n" not in str(error.value)
    assert choose_device("auto") == choose_device("cpu") == CPU
    assert cap_allocator(2.0, CPU) == 2 * GIB and cap_allocator(0.0, CPU) == 0


def test_a_card_without_bf16_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    with pytest.raises(UserError, match=r"model\.precision=auto"):
        Precision.choose("bf16", "cuda")
    assert Precision.choose("auto", "cuda").name == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert Precision.choose("auto", "cuda").name == Precision.choose("bf16", "cuda").name == "bf16"
