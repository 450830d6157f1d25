"""Two processes with gloo on the CPU: the same curve as one, snapshots for any number of ranks, a
clean end when one dies.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BOTH_KINDS
from safetensors.torch import load_file

from cllm.__main__ import run
from cllm.learn.dist import World
from cllm.messages import UserError
from cllm.runs import read_metrics

ROOT = Path(__file__).parents[1]


def start(arguments: list[str], **environment: str) -> list[subprocess.Popen[str]]:
    """Two ranks of `cllm.train`, with what torchrun would put into their environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        **os.environ,
        "CLLM_LANG": "en",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "cllm.train", *arguments],
            cwd=ROOT,
            text=True,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
        )
        for rank in (0, 1)
    ]


def curve(directory: Path) -> list[tuple[int, float]]:
    return [
        (row["step"], row["loss"] if "loss" in row else row["eval_loss"])
        for row in read_metrics(directory / "metrics.jsonl")
    ]


def assert_same(found: Path, expected: Path) -> None:
    a, b = curve(found), curve(expected)
    assert [step for step, _ in a] == [step for step, _ in b]
    worst = max(abs(x - y) for (_, x), (_, y) in zip(a, b, strict=True))
    assert worst < 1e-5, worst
    one, two = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (found, expected)
    )
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-4


@BOTH_KINDS
def test_two_ranks_follow_one_and_their_snapshot_goes_on_with_one(
    config: Path, tmp_path: Path
) -> None:
    # dropout is on
    options = [
        "model.quantize=nf4",
        "train.tokens_per_step=384",
        "eval.samples=0",
        "run.snapshot_every=1",
        "run.keep=9",
    ]
    assert run("train", [str(config), *options]) == 0
    twice = tmp_path / "runs" / "twice"
    ranks = start([str(config), *options, f"run.dir={twice}"])
    (out, err), (silent_out, silent_err) = (rank.communicate(timeout=300) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], err + silent_err
    assert (
        json.loads(out.splitlines()[-1])["steps"] == 6
        and "cllm" not in silent_out
        and "step" not in silent_err
    )
    assert_same(twice, tmp_path / "runs" / "a")
    for step in (4, 5, 6):
        for file in (twice / "snapshots" / f"step-{step:06d}").iterdir():
            file.unlink()
    assert run("train", [str(config), *options, f"run.dir={twice}", "--resume"]) == 0
    assert_same(twice, tmp_path / "runs" / "a")


def test_when_a_rank_dies_the_other_says_so_and_ends(config: Path) -> None:
    ranks = start([str(config), "train.steps=100000", "eval.every=100000"])
    assert ranks[0].stderr
    for line in ranks[0].stderr:
        if line.startswith("step"):
            ranks[1].send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            break
    rest = ranks[0].stderr.read()
    assert ranks[0].wait(60) == 1 and "rank 0 of 2 lost the others" in rest and "--resume" in rest
    ranks[1].wait(60)
    assert (config.parent / "runs" / "a" / "snapshots" / "step-000000").is_dir()


def test_launchers_that_shard_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        UserError, match="ACCELERATE_USE_FSDP is set, but parameters are not sharded here"
    ):
        World.join("cpu")


def test_a_world_of_one_waits_for_nobody() -> None:
    world = World.join("cpu")
    world.sum_([])
    assert (world.rank, world.size, world.share(b"x"), world.any(True), world.any(False)) == (
        0,
        1,
        b"x",
        True,
        False,
    )


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    code = """if True:
        import os, signal
        from cllm.learn.dist import stop_on_signal
        with stop_on_signal() as seen:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        print(seen == [signal.SIGTERM], signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
    """
    done = subprocess.run(
        ["sh", "-c", 'trap \'\' HUP; exec "$0" -c "$1"', sys.executable, code],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "True"], done.stderr
