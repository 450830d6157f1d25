"""Never lose work: `python bench/crash.py [--kills 50] [--disk 10] [--flips 10] [--seed 0] [--out
bench/results/crash.json]`.

A tiny model trains 12 steps with dropout, a snapshot after each, four evaluations. Then, again and
again:
    kill   SIGKILL at a random moment (every second time: while a snapshot is being written), then --resume
    disk   its small tmpfs is filled at a random moment; the run must stop with the reason or go on; then room is made, --resume
    flip   SIGKILL, then one bit of the newest snapshot is flipped; the snapshot must be named and skipped
Each time the final adapter must be byte-identical to the uninterrupted run's, and metrics.jsonl
equal but for the three clock fields. Runs are forked from one process that has imported everything,
which saves two seconds a run (POSIX only). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["CLLM_LANG"] = "en"
# a forked child would wait for OpenMP threads that it has not got
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch  # noqa: E402
from conftest import byte_checkpoint, demo_rows, pairs_config, write_config  # noqa: E402

from cllm.__main__ import run  # noqa: E402
from cllm.learn.log import CLOCK_FIELDS  # noqa: E402
from cllm.runs import read_metrics  # noqa: E402

SETTINGS = ("eval.samples=0", "train.steps=12", "run.snapshot_every=1")
TMPFS_BYTES = 2 * 2**20


class Child:
    """One training process on `config`, its output in a file."""

    def __init__(self, config: Path, directory: Path) -> None:
        self.output = config.with_name("output.txt")
        resume = ["--resume"] if list(directory.glob("snapshots/step-*")) else []
        self.resumed = bool(resume)
        self.pid = os.fork()
        if self.pid == 0:
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = 1
            try:
                code = run(
                    "train",
                    [str(config), f"run.dir={json.dumps(str(directory))}", *SETTINGS, *resume],
                )
            finally:
                sys.stdout.flush()
                os._exit(code)
        self.status: int | None = None

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def kill(self) -> None:
        if self.running():
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        while self.running():
            time.sleep(0.002)
        assert self.status is not None
        return self.status

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


def result_of(directory: Path) -> tuple[bytes, list[dict[str, object]]]:
    """Adapter bytes and metrics without the clock fields."""
    rows = read_metrics(directory / "metrics.jsonl")
    metrics = [
        {key: value for key, value in row.items() if key not in CLOCK_FIELDS} for row in rows
    ]
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes(), metrics


class Trial(NamedTuple):
    """What is to be trained again and again, and what an uninterrupted run took and made."""

    config: Path
    folder: Path
    seed: int
    seconds: float
    expected: tuple[bytes, list[dict[str, object]]]


def finish(trial: Trial, directory: Path) -> str:
    """Resume to the end and compare; "" or what is wrong."""
    child, expected = Child(trial.config, directory), trial.expected
    if child.wait():
        return f"exit {child.status}: {child.text()[-2000:]}"
    final = Path(json.loads(child.text().splitlines()[-1])["run"])
    adapter, metrics = result_of(final)
    return (
        ""
        if (adapter, metrics) == expected
        else f"adapter {adapter == expected[0]}, metrics {metrics == expected[1]}"
    )


def writing(directory: Path) -> bool:
    return any(directory.glob("snapshots/.step-*"))


def interrupt(
    config: Path,
    directory: Path,
    chance: random.Random,
    seconds: float,
    *,
    aimed: bool,
    ready: Callable[[], bool],
) -> str:
    """Kill a run at a random moment once `ready`; says what it was doing."""
    child = Child(config, directory)
    while child.running() and not ready():
        time.sleep(0.001)
    end = time.monotonic() + chance.uniform(0, seconds)
    while child.running() and time.monotonic() < end:
        time.sleep(0.001)
    while aimed and child.running() and not writing(directory):
        pass
    child.kill()
    child.wait()
    if child.status != -signal.SIGKILL:
        return "after its end"
    if writing(directory):
        return "writing a snapshot"
    if (directory / "adapter.new").exists():
        return "writing the adapter"
    return "elsewhere" if list(directory.glob("snapshots/step-*")) else "before the first snapshot"


def kills(trial: Trial, count: int) -> dict[str, object]:
    chance, moments, wrong = random.Random(f"kill {trial.seed}"), Counter[str](), []
    number = 0
    while sum(moments.values()) < count:
        number += 1
        directory = trial.folder / f"kill-{number}"
        moment = interrupt(
            trial.config,
            directory,
            chance,
            trial.seconds,
            aimed=number % 2 == 0,
            ready=lambda: True,
        )
        if moment == "after its end":  # no kill
            continue
        moments[moment] += 1
        wrong += [problem] if (problem := finish(trial, directory)) else []
        shutil.rmtree(directory, ignore_errors=True)
    return {
        "kills": count,
        "identical": count - len(wrong),
        "moments": dict(moments),
        "wrong": wrong,
    }


def flips(trial: Trial, count: int) -> dict[str, object]:
    chance, named, wrong = random.Random(f"flip {trial.seed}"), 0, []
    for number in range(count):
        directory = trial.folder / f"flip-{number}"
        enough = lambda d=directory: len(list(d.glob("snapshots/step-*"))) > 1  # noqa: E731
        interrupt(trial.config, directory, chance, trial.seconds / 2, aimed=False, ready=enough)
        newest = max(directory.glob("snapshots/step-*"))
        files = [file for file in sorted(newest.iterdir()) if file.stat().st_size]
        target = chance.choice(files)
        data = bytearray(target.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        target.write_bytes(data)
        problem = finish(trial, directory)
        told = f"{newest} is damaged" in trial.config.with_name("output.txt").read_text(
            encoding="utf-8"
        )
        named += told
        wrong += [problem or "not named"] if problem or not told else []
        shutil.rmtree(directory)
    return {"flips": count, "named": named, "identical": count - len(wrong), "wrong": wrong}


def full_disk(trial: Trial, count: int) -> dict[str, object]:
    chance, ends, wrong = random.Random(f"disk {trial.seed}"), Counter[str](), []
    mount = trial.folder / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "cllm-crash", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        return {"skipped": "no right to mount a tmpfs"}
    try:
        for number in range(count):
            directory, filler = mount / f"disk-{number}", mount / "filler"
            child = Child(trial.config, directory)
            end = time.monotonic() + chance.uniform(0, trial.seconds)
            while child.running() and time.monotonic() < end:
                time.sleep(0.001)
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(b"x" * 4096):
                        pass
                except OSError:
                    pass
            code, text = child.wait(), child.text()
            stopped = code == 2 and "cannot be written" in text and "Traceback" not in text
            ends[
                "stopped with the reason"
                if stopped
                else "went on to the end"
                if code == 0
                else f"exit {code}"
            ] += 1
            filler.unlink()
            problem = finish(trial, directory) if stopped or code == 0 else text[-2000:]
            wrong += [problem] if problem else []
            for left in mount.iterdir():
                shutil.rmtree(left)
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    return {"runs": count, "ends": dict(ends), "identical": count - len(wrong), "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--disk", type=int, default=10)
    parser.add_argument("--flips", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preference", action="store_true", help="a run on pairs")
    parser.add_argument("--out", type=Path, help="a JSON list; the report is appended")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.preference:
            config = pairs_config(folder, byte_checkpoint(folder / "bytes"))
        else:  # texts: no time goes into answering questions
            texts = [{"text": row["instruction"] + row["output"]} for row in demo_rows()]
            config = write_config(folder, byte_checkpoint(folder / "bytes"), texts)
            settings = config.read_text(encoding="utf-8")
            config.write_text(settings.replace("[data]", '[data]\nkind = "text"'), encoding="utf-8")
        # imports what comes late
        run(
            "train",
            [
                str(config),
                f"run.dir={json.dumps(str(folder / 'first'))}",
                *SETTINGS,
                "train.steps=1",
            ],
        )
        began = time.perf_counter()
        child = Child(config, folder / "plain")
        assert child.wait() == 0, child.text()
        print(child.text(), file=sys.stderr)
        trial = Trial(
            config, folder, arguments.seed, time.perf_counter() - began, result_of(folder / "plain")
        )
        report = {
            "command": " ".join(["python bench/crash.py", *sys.argv[1:]]),
            "kill": kills(trial, arguments.kills),
            "flip": flips(trial, arguments.flips),
            "disk": full_disk(trial, arguments.disk),
            "run_seconds": round(trial.seconds, 2),
            "seconds": round(time.perf_counter() - start, 1),
            "torch": torch.__version__,
            "platform": platform.platform(),
        }
    if arguments.out:
        before = (
            json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else []
        )
        arguments.out.write_text(json.dumps([*before, report], indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return int(any(part.get("wrong") for part in (report["kill"], report["flip"], report["disk"])))


if __name__ == "__main__":
    raise SystemExit(main())
