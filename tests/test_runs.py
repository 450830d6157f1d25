"""Run directories: made, locked, told apart, and those of an earlier commit opened and resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cllm.__main__ import run
from cllm.assembly import open_model
from cllm.learn.snapshot import load_snapshot, save_snapshot, snapshots
from cllm.messages import UserError, to_json
from cllm.runs import base_fingerprint, new_run
from cllm.serve.engine import Sampling

EARLIER = Path(__file__).parent / "earlier_run"


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the earlier run's folder, which is the current one."""
    folder = Path(shutil.copytree(EARLIER, tmp_path / "earlier"))
    monkeypatch.chdir(folder)
    return folder


def test_a_run_of_an_earlier_commit_opens_and_answers(earlier: Path) -> None:
    loaded = open_model("kept/a")
    prompt = loaded.tokenizer.encode("1")
    outputs = loaded.engine().generate([prompt] * 2, Sampling(max_new_tokens=3), [0, 1])
    assert all(len(ids) <= 3 for ids in outputs) and loaded.home == earlier / "kept" / "a"


def test_a_run_of_an_earlier_commit_resumes_to_the_same_state(earlier: Path) -> None:
    assert run("train", ["run.toml", "--resume", "eval.samples=0"]) == 0
    expected = load_file(earlier / "after_step_4.safetensors")
    reached = load_file(earlier / "kept" / "a" / "snapshots" / "step-000004" / "state.safetensors")
    assert reached.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.startswith("rng/"):
            torch.testing.assert_close(reached[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_finished_run_that_is_resumed_ends_with_valid_json(
    earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", ["run.toml", "--resume", "eval.samples=0"]) == 0
    printed, said = capsys.readouterr()
    first = json.loads(printed.strip().split("\n")[-1])
    assert "resuming" in said and "nothing is left to train" not in said
    assert run("train", ["run.toml", "--resume", "eval.samples=0"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    printed, said = capsys.readouterr()
    assert "has taken all its 4 steps: nothing is left to train" in said and "resuming" not in said
    last = printed.strip().split("\n")[-1]
    again = json.loads(last, parse_constant=refuse)
    assert again["steps"] == first["steps"] == 4 and again["loss"] == first["loss"]


def test_json_has_no_number_that_is_none() -> None:
    value = {"a": float("nan"), "b": [float("inf"), 1.5, "中"], "c": (-float("inf"), True, None)}
    assert json.loads(to_json(value)) == {
        "a": None,
        "b": [None, 1.5, "中"],
        "c": [None, True, None],
    }


def test_a_new_run_never_writes_into_an_old_one(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "a"
    assert [new_run(wanted).name for _ in range(3)] == ["a", "a-2", "a-3"]


@pytest.mark.parametrize("obstacle", ["file", "dangling link"])
def test_where_no_run_can_be_made_that_is_said(tmp_path: Path, obstacle: str) -> None:
    runs = tmp_path / "runs"
    if obstacle == "file":
        runs.write_text("", encoding="utf-8")
    else:
        runs.symlink_to(tmp_path / "nowhere")
    code = (
        "import sys; from cllm.runs import new_run; from cllm.messages import UserError\n"
        "try: new_run(sys.argv[1])\n"
        "except UserError as error: print(error.code)"
    )
    command = [sys.executable, "-c", code, str(runs / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "run.unwritable", done.stderr


def test_the_same_checkpoint_from_another_mirror_has_the_same_fingerprint(tmp_path: Path) -> None:
    base = Path(shutil.copytree(EARLIER / "base", tmp_path / "one"))
    mirror = Path(shutil.copytree(base, tmp_path / "two"))
    (mirror / "README.md").write_text("of another host", encoding="utf-8")
    (mirror / "configuration.json").write_text("{}", encoding="utf-8")
    (mirror / ".complete").write_text("{}", encoding="utf-8")
    assert base_fingerprint(base) == base_fingerprint(mirror)
    config = json.loads((mirror / "config.json").read_text(encoding="utf-8"))
    (mirror / "config.json").write_text(json.dumps(config | {"rope_theta": 5}), encoding="utf-8")
    assert base_fingerprint(base) != base_fingerprint(mirror)


def test_the_only_snapshot_survives_a_kill_between_two_renames(tmp_path: Path) -> None:
    state, tensors = {"n": 1}, {"parameter/a": torch.ones(2)}
    save_snapshot(tmp_path, 3, tensors, state, keep=1)
    folder = tmp_path / "snapshots"
    (folder / "step-000003").rename(folder / ".step-000003.old")  # and then the process was killed
    assert snapshots(tmp_path) == []
    assert json.loads(load_snapshot(tmp_path)[0])["n"] == 1
    assert save_snapshot(tmp_path, 3, tensors, {"n": 2}, keep=1) is not None
    assert json.loads(load_snapshot(tmp_path)[0])["n"] == 2
    assert [path.name for path in folder.iterdir()] == ["step-000003"]


def test_a_run_without_a_snapshot_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="snapshot"):
        load_snapshot(tmp_path)
