"""Run directories: a new one, the newest one, who may write into it, and what it was made from.
`python -m cllm.runs [DIR]` lists them.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cllm.config import load_config
from cllm.messages import (
    CommandLine,
    UserError,
    command,
    note,
    print_result,
    propose,
    read_json,
    say,
    table,
    to_json,
)
from cllm.metrics import FEWEST_PAIRS

RISEN = 1.01
"""A held-out loss so many times its lowest has turned; less is how it comes about."""
_SAMPLES = 64
_SAMPLE_BYTES = 2**16
_FINGERPRINTED = re.compile(
    r"config\.json|.*\.(safetensors|bin|gguf|model|tiktoken)|.*\.index\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt"
)


@dataclass
class Progress:
    """How far a run has come; kept in its snapshots."""

    step: int = 0
    """Optimizer steps done."""
    evaluated: int = -1
    """The last step that was evaluated."""
    best: float | None = None
    """The lowest held-out loss so far."""
    stale: int = 0
    """Evaluations since the lowest loss."""
    bad: int = 0
    """Steps skipped in a row."""

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Progress:
        """From a snapshot's state.json. Raises LookupError, TypeError or ValueError."""
        best = None if state["best"] in (None, float("inf")) else float(state["best"])
        step, evaluated = int(state["step"]), int(state["evaluated"])
        return cls(step, evaluated, best, int(state["stale"]), int(state["bad"]))


def new_run(directory: str | Path) -> Path:
    """Create `directory`, or the first free of `directory`-2, -3, …; an existing run is never
    written into. Raises UserError where none can be made.
    """
    wanted = Path(directory)
    number = 1
    candidate = wanted
    with writing(wanted):
        wanted.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                candidate.mkdir()
                return candidate
            except FileExistsError:
                number += 1
                candidate = wanted.with_name(f"{wanted.name}-{number}")


def find_runs(
    root: str | Path = "runs", *, name: str = "", needs: str = "adapter/adapter_config.json"
) -> list[Path]:
    """Runs under `root` that have `needs`, the one started last first; `name` admits only the runs
    called so, with or without -2, -3.
    """
    with_config = [path.parent for path in Path(root).glob("*/config.toml")]
    named = re.compile(re.escape(name) + r"(-\d+)?" if name else ".*")
    runs = [run for run in with_config if named.fullmatch(run.name) and any(run.glob(needs))]
    started = {run: (run / "config.toml").stat().st_mtime_ns for run in runs}
    return sorted(runs, key=lambda run: (started[run], run.name), reverse=True)


def last_run(directory: str, *, alone: bool = False) -> Path:
    """The run to resume: of `directory` and (unless it stands `alone`) its -2, -3, …, the one
    started last that has a snapshot. Raises UserError if none has.
    """
    wanted = Path(directory)
    if os.environ.get("RANK", "0") != "0":
        return wanted  # rank 0 reads and writes it; another machine may not even see it
    runs = find_runs(wanted.parent, name=wanted.name, needs="snapshots/*step-*")
    runs = [run for run in runs if not alone or run == wanted]
    if not runs:
        raise UserError("snapshot.none", path=wanted)
    return runs[0]


def refuse_missing(
    run: Path, needs: str = "adapter/adapter_config.json", *, hub: bool = True
) -> None:
    """Raises UserError where `run` can only be a run that is not there, naming those that have
    `needs`, the likeliest first. `hub`: whether it may be a model's name instead.
    """
    if run.exists():
        return
    alone = run.parent == Path()
    root = Path("runs") if alone else run.parent
    others = find_runs(root, needs=needs)
    if others and (not (hub and alone) or "runs" / run in others):
        names = {other.name: other for other in others}
        near = difflib.get_close_matches(run.name, names, 5, 0.0)
        known = ", ".join(str(names[name]) for name in near)
        raise UserError("run.missing", run=run, known=known)
    if not hub or run.parts[:-1] == ("runs",):
        raise UserError("run.none", root=root)


def newest_run(root: str | Path = "runs") -> Path:
    """The finished run under `root` that was started last. Raises UserError if there is none."""
    runs = find_runs(root)
    if not runs:
        raise UserError("run.none", root=root)
    return runs[0]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full or read-only disk becomes one line that says so (UserError); what was complete before
    stays as it was.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError("run.unwritable", path=path, detail=error) from error


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """One run directory, one writer: the operating system's lock on run/lock. run/owner names the
    process and its host.

    Raises UserError while another process holds the lock. The lock of a process that died is free;
    the name it left is told.
    """
    from filelock import FileLock, Timeout

    owner_file = run / "owner"
    lock = FileLock(run / "lock", timeout=0)
    with writing(run):
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError("run.locked", run=run, owner=_owner(owner_file)) from error
    try:
        if owner := _owner(owner_file):
            note("run.stale_lock", run=run, owner=owner)
        with writing(run):
            owner_file.write_text(f"pid {os.getpid()} on {socket.gethostname()}\n", "utf-8")
        yield
        owner_file.unlink(missing_ok=True)
    finally:
        lock.release()


def _owner(file: Path) -> str:
    return file.read_text("utf-8", "replace").strip()[:200] if file.is_file() else ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a torn last line (a crash while writing) is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def turned(metrics: Iterable[Mapping[str, Any]]) -> str:
    """At which step of a run's metrics the held-out loss was lowest, and what to change, "" where
    it is not a hundredth higher at the end, or so few are held out that it says little.
    """
    held = [
        (row["eval_loss"], row["step"])
        for row in metrics
        if "eval_loss" in row and row.get("eval_n", FEWEST_PAIRS) >= FEWEST_PAIRS
    ]
    best, last = min(held, default=(0.0, 0)), (held or [(0.0, 0)])[-1]
    if last[0] < RISEN * best[0] or not best[1]:
        return ""
    losses = {"lowest": f"{best[0]:.3f}", "later": f"{last[0]:.3f}"}
    return say("train.turned", step=best[1], last=last[1], **losses)


def manifest_of(gpu: str, facts: dict[str, Any]) -> bytes:
    """manifest.json: `facts` of the run, and the versions, system, GPU and git commit that explain
    its result.
    """
    import torch
    import transformers

    from cllm import __version__

    commit = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
        commit = done.stdout.strip()
    manifest = {
        "cllm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git_commit": commit,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": gpu,
        **facts,
    }
    return (to_json(manifest, indent=1) + "\n").encode()


def base_fingerprint(base: Path) -> str:
    """SHA-256 over names, sizes and bytes of the base's config, weights and tokenizer files; of a
    file over 4 MiB, 64 samples of 64 KiB spread evenly over it.

    Other files (README, a mirror's own bookkeeping) differ between hosts of the same checkpoint.
    """
    digest = hashlib.sha256()
    paths = [base]
    if base.is_dir():
        paths = sorted(path for path in base.iterdir() if _FINGERPRINTED.fullmatch(path.name))
    for path in paths:
        size = path.stat().st_size
        digest.update(repr((path.name, size)).encode())
        with path.open("rb") as file:
            last = max(size - _SAMPLE_BYTES, (_SAMPLES - 1) * _SAMPLE_BYTES)
            for index in range(_SAMPLES):
                file.seek(index * last // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def changes_since(
    run: Path,
    settings: dict[str, str],
    hashes: dict[str, str],
    *,
    vital: tuple[str, ...],
    allow: bool,
) -> list[str]:
    """Every change since `run` was started, earlier ones first: `settings` ("section.key" -> "old
    -> new") and other `hashes` than those in its manifest.

    Raises UserError for those that the run's state depends on, hashes and `vital` sections, unless
    they are allowed.
    """
    path = run / "manifest.json"
    manifest = read_json(path, "config.unreadable")
    changes = {key: f"{key}: {change}" for key, change in settings.items()}
    for key, value in hashes.items():
        if manifest.get(key, value) != value:
            changes[key] = f"{key} differs"
    breaking = [
        text for key, text in changes.items() if key in hashes or key.partition(".")[0] in vital
    ]
    if breaking and not allow:
        raise UserError("train.changed", run=run, changes="; ".join(breaking))
    if changes:
        note("train.changes", changes="; ".join(changes.values()))
    return [*manifest.get("changes", []), *changes.values()]


def replace_file(path: Path, data: bytes) -> None:
    """`path` has either its old content or all of `data`, whenever the process ends; who may read
    it stays.
    """
    fresh = path.with_name(f".{path.name}.new")
    with writing(path):
        fresh.touch()
        if path.exists():
            shutil.copymode(path, fresh)
        fresh.write_bytes(data)
        sync(fresh)
        fresh.replace(path)


def replace_files(fresh: Path, target: Path) -> None:
    """Move every file of `fresh`, once it is on the disk, over its namesake in `target`."""
    target.mkdir(exist_ok=True)
    for file in fresh.iterdir():
        sync(file)
        file.replace(target / file.name)
    fresh.rmdir()


def sync(path: Path) -> None:
    """Onto the disk, not only to the operating system."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder for syncing
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- The program
def described(run: Path) -> dict[str, Any]:
    """What a run directory holds, for the list: `state` is training, finished, unfinished (it can
    be resumed) or broken. `score` is the adapter's rouge-l-char, `bytes` what it takes on the disk.
    """
    config_file, scores = run / "config.toml", run / "eval.json"
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    step = max((row["step"] for row in rows), default=0)
    started = (config_file if config_file.is_file() else run).stat().st_mtime
    facts = {
        "run": str(run),
        "base": "",
        "data": "",
        "step": step,
        "steps": None,
        "eval_loss": min(losses, default=None),
        "score": None,
        "bytes": _size(run),
        "started": datetime.fromtimestamp(started).isoformat(" ", "minutes"),
        "state": "broken",
    }
    with contextlib.suppress(UserError):  # of what cannot be read
        config = load_config(config_file)
        facts["base"] = config.model.path
        facts["data"] = ", ".join(Path(source.path).name for source in config.data.train)
        facts["steps"] = read_json(run / "manifest.json").get("steps")
        if scores.is_file():
            facts["score"] = read_json(scores).get("adapter", {}).get("rouge-l-char")
        if is_held(run):
            facts["state"] = "training"
        elif scores.is_file() or (step == facts["steps"] and (run / "adapter").is_dir()):
            facts["state"] = "finished"
        elif any(run.glob("snapshots/*step-*")):
            facts["state"] = "unfinished"
    return facts


def run_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The columns' names, and a line for each described run."""
    lines = [say("runs.columns").split("|")]
    for row in rows:
        loss, score = (
            "-" if row[key] is None else f"{row[key]:.{digits}f}"
            for key, digits in (("eval_loss", 3), ("score", 1))
        )
        steps = f"{row['step']}/{row['steps'] or '?'}"
        size, state = f"{row['bytes'] / 2**20:,.1f} MiB", say(f"runs.{row['state']}")
        line = [Path(row["run"]).name, row["base"], row["data"], steps, loss, score, size]
        lines.append([*line, row["started"], state])
    return lines


def _size(folder: Path) -> int:
    """Bytes of all files; a run that is training takes some away meanwhile."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += Path(place, name).stat().st_size
    return size


def is_held(run: Path) -> bool:
    """Whether a process writes into the run; one that died has left its name, but not its lock."""
    from filelock import FileLock

    try:
        if (run / "owner").is_file():
            FileLock(run / "lock", timeout=0).acquire().lock.release()
    except OSError:  # filelock's Timeout, too
        return True
    return False


def main(argv: list[str]) -> int:
    """Print the runs of a folder, the newest first; the last line of stdout is {"runs"}."""
    parser = CommandLine("runs")
    parser.take("root", nargs="?", default="runs", type=Path, metavar="DIR")
    arguments = parser.parse_args(argv)
    root = arguments.root
    runs = find_runs(root, needs="config.toml")
    # of a process that was killed before it wrote anything
    runs += sorted({file.parent for file in root.glob("*/lock")} - {*runs})
    if not runs:
        raise UserError("run.none", root=root)
    rows = [described(run) for run in runs]
    print(table(run_table(rows)))
    newest = rows[0]["run"]
    if rows[0]["state"] == "finished":
        propose(command("chat", newest))
    elif rows[0]["state"] == "unfinished":
        propose(command("train", newest, "--resume"))
    print_result({"runs": rows}, arguments.json)
    return 0


if __name__ == "__main__":
    from cllm.__main__ import run as run_program

    raise SystemExit(run_program("runs"))
