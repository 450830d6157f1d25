"""Snapshots: whole or refused with the reason, one writer, nothing lost to a full disk, and nothing
a hostile file can reach.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from cllm.learn import snapshot
from cllm.learn.optim import make_optimizer
from cllm.learn.snapshot import capture, load_snapshot, restore, save_snapshot, snapshots
from cllm.messages import UserError
from cllm.runs import base_fingerprint, locked

ROOT = Path(__file__).parents[1]


def trained(seed: int = 0, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = make_optimizer(model, 1e-2)
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_steps(run: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        (run / "metrics.jsonl").write_text(f'{{"step": {step}}}\n', encoding="utf-8")
        assert save_snapshot(run, step, capture(*trained(step)), {"note": step}, keep=keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "snapshots").iterdir())


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    state, tensors, metrics = load_snapshot(tmp_path)
    assert json.loads(state) == {"step": 3, "note": 3} and metrics == b'{"step": 3}\n'
    model, optimizer = trained(seed=9, steps=0)
    restore(model, optimizer, load(tensors))
    drawn = torch.rand(3)
    twin, twin_optimizer = trained(3)
    assert torch.equal(drawn, torch.rand(3))
    found, expected = capture(model, optimizer), capture(twin, twin_optimizer)
    assert found.keys() == expected.keys() and all(
        torch.equal(found[k], expected[k]) for k in found if not k.startswith("rng/")
    )


def test_old_damaged_and_half_written_snapshots_go_and_the_valid_ones_stay(tmp_path: Path) -> None:
    save_steps(tmp_path, 8, 9, 10, keep=2)
    assert names(tmp_path) == ["step-000009", "step-000010"]
    (tmp_path / "snapshots" / "step-000010" / "state.json").write_text("{}", encoding="utf-8")
    (tmp_path / "snapshots" / ".step-000011.tmp").mkdir()
    # the run came back to step 9: the damaged step 10 must not be the one that is kept
    save_steps(tmp_path, 9, keep=1)
    assert names(tmp_path) == ["step-000009"]
    save_steps(tmp_path, 999_999, 1_000_000, keep=1)
    assert names(tmp_path) == ["step-1000000"]


@pytest.mark.parametrize(
    "file", ["state.safetensors", "state.json", "metrics.jsonl", "manifest.json"]
)
def test_one_flipped_bit_anywhere_is_named_and_skipped(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "snapshots" / "step-000002" / file
    for position in range(0, path.stat().st_size, max(1, path.stat().st_size // 12)):
        data = bytearray(path.read_bytes())
        data[position] ^= 4
        path.write_bytes(data)
        assert json.loads(load_snapshot(tmp_path)[0])["step"] == 1
        assert "step-000002 is damaged" in capsys.readouterr().err
        data[position] ^= 4
        path.write_bytes(data)
    path.unlink()
    assert json.loads(load_snapshot(tmp_path)[0])["step"] == 1


def rewrite(folder: Path, **files: bytes) -> None:
    """Give a snapshot these contents and the manifest that fits them, as somebody who forges one
    would.
    """
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    entries = {}
    for name in ("state.safetensors", "state.json", "metrics.jsonl"):
        data = (folder / name).read_bytes()
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize(
    "files",
    [
        {"state__safetensors": pickle.dumps(Bomb())},
        {"state__safetensors": (2**62).to_bytes(8, "little") + b"{}"},
        {"state__safetensors": (90 * 2**20).to_bytes(8, "little") + b"{" + b" " * 99},
        {"state__safetensors": b""},
        {"state__json": pickle.dumps(Bomb())},
        {"state__json": b"[" * 100_000},
        {"state__json": b"[]"},
        {"state__json": b'{"step": 7}'},
        {"state__json": b'{"step": 1e999}'},
    ],
)
def test_forged_files_are_named_and_skipped(
    files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(tmp_path, 1, 2)
    rewrite(tmp_path / "snapshots" / "step-000002", **files)
    assert json.loads(load_snapshot(tmp_path)[0])["step"] == 1
    assert "step-000002 is damaged" in capsys.readouterr().err
    assert not Path("exploded").exists()


def test_a_manifest_leads_nowhere_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, 1)
    folder = tmp_path / "snapshots" / "step-000001"
    for text in (
        '{"../../secret": {"bytes": 1, "sha256": ""}}',
        "[]",
        "null",
        '{"state.json": 3}',
        " " * 20_000,
    ):
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"no usable snapshot"):
            load_snapshot(tmp_path)
        assert "is damaged" in capsys.readouterr().err
    for name in ("step-../../x", "step-1", "step-000002.tmp", "step-" + "9" * 40):
        (tmp_path / "snapshots" / name.replace("/", "_")).mkdir()
    assert [step for step, _ in snapshots(tmp_path)] == [1]


def changed(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = capture(*trained())
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t: t.update({"parameter/0.weight": torch.zeros(4, 3)}),
            r"parameter/0.weight has shape \(4, 3\), not \(3, 4\)",
        ),
        (lambda t: t.pop("parameter/1.bias"), "parameter/1.bias is missing"),
        (
            lambda t: t.update({"parameter/../../evil": torch.zeros(1)}),
            "unexpected tensor parameter/../../evil",
        ),
        (
            lambda t: t.update({"optimizer/99/exp_avg": torch.zeros(1)}),
            "optimizer/99/exp_avg of shape",
        ),
        (
            lambda t: t.update({"optimizer/0/exp_avg": torch.zeros(4, 3)}),
            "optimizer/0/exp_avg of shape",
        ),
        (
            lambda t: t.update({"optimizer/0/exp_avg": torch.zeros(999)}),
            "optimizer/0/exp_avg of shape",
        ),
        (lambda t: t.update({"rng/cpu": torch.zeros(3, dtype=torch.uint8)}), "rng/cpu has shape"),
        (lambda t: t.clear(), "5 differences"),
    ],
)
def test_tensors_of_another_model_are_refused_and_nothing_changes(
    change: Callable[[dict[str, Tensor]], Any], reason: str
) -> None:
    model, optimizer = trained(5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=reason) as error:
        restore(model, optimizer, changed(change))
    assert error.value.code == "snapshot.foreign"
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_full_disk_costs_the_snapshot_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(tmp_path, 1)
    for code in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):

        def full(*_args: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        for function in ("save_file", "sync"):
            with monkeypatch.context() as patch:
                patch.setattr(snapshot, function, full)
                assert save_snapshot(tmp_path, 2, capture(*trained()), {}, keep=1) is None
            assert names(tmp_path) == ["step-000001"]
            assert os.strerror(code) in capsys.readouterr().err
    assert json.loads(load_snapshot(tmp_path)[0])["step"] == 1


def test_one_run_one_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        locked(tmp_path),
        pytest.raises(UserError, match=rf"another process \(pid {os.getpid()} on "),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass
    assert capsys.readouterr().err == ""
    code = f"import os, pathlib, cllm.runs as s; s.locked(pathlib.Path({str(tmp_path)!r})).__enter__(); os._exit(9)"
    gone = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    assert gone.wait() == 9
    with locked(tmp_path):
        assert f"left by a process that is gone (pid {gone.pid} on " in capsys.readouterr().err
        owner = (tmp_path / "owner").read_text(encoding="utf-8")
        assert owner.startswith(f"pid {os.getpid()} on ")
    assert not (tmp_path / "owner").exists()


def test_another_base_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 * 2**20))
    seen = {base_fingerprint(tmp_path)}
    for position in (0, 2**20, 3 * 2**20 - 1):
        data = bytearray(3 * 2**20)
        data[position] = 1
        weights.write_bytes(data)
        seen.add(base_fingerprint(tmp_path))
    weights.write_bytes(bytes(40 * 2**20))
    seen.add(base_fingerprint(tmp_path))
    weights.write_bytes(b"\1" * (40 * 2**20))  # sampled: another checkpoint differs everywhere
    seen.add(base_fingerprint(tmp_path))
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\2")
    seen.add(base_fingerprint(tmp_path))
    assert len(seen) == 7 and base_fingerprint(weights) not in seen


def test_no_other_generator_decides_anything() -> None:
    """Snapshots hold PyTorch's generators only: nobody may draw from Python's or NumPy's global
    ones.
    """
    import re

    for path in (ROOT / "cllm").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"(?<![\w.])random\.(?!Random\b)[a-z]\w*\(|(np|numpy)\.random\.(?!default_rng\()", text
        ), path
