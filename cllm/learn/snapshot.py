"""Run directories, who may write into one, and the snapshots in them: atomic save, verified load,
bit-exact resume.

A snapshot is a folder of `state.safetensors` (adapter, AdamW moments, generator states),
`state.json` (everything else that decides the next step), `metrics.jsonl` (so far) and
`manifest.json` (size and SHA-256 of the others). It is written under a temporary name, synced and
renamed, so that a folder called step-N is either whole or was altered later, which the manifest
shows. No pickle, and no name is read from a file: a hostile snapshot can be refused, but not lead
elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from cllm.learn.optim import moment_shapes, moments, set_moments
from cllm.messages import UserError, note

_TENSORS, _STATE, _METRICS, _MANIFEST = (
    "state.safetensors",
    "state.json",
    "metrics.jsonl",
    "manifest.json",
)
_FILES = (_TENSORS, _STATE, _METRICS)
# beyond the text, so that Windows lets others read who holds it
_LOCK, _LOCKED_BYTE = "lock", 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


def new_run(directory: str | Path) -> Path:
    """Create `directory`, or the first free of `directory`-2, -3, …; an existing run is never
    written into.
    """
    wanted = Path(directory)
    candidate, number = wanted, 1
    while True:
        try:
            with writing(wanted):
                candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = wanted.with_name(f"{wanted.name}-{number}")


def find_runs(
    root: str | Path = "runs", *, name: str = "", needs: str = "adapter/adapter_config.json"
) -> list[Path]:
    """Runs under `root` that have `needs`, the one started last first; `name` finds only it and its
    name-2, name-3.
    """
    found = [
        path.parent for path in Path(root).glob("*/config.toml") if any(path.parent.glob(needs))
    ]
    runs = [
        run for run in found if not name or re.fullmatch(re.escape(name) + r"(-\d+)?", run.name)
    ]
    return sorted(
        runs, key=lambda run: ((run / "config.toml").stat().st_mtime_ns, run.name), reverse=True
    )


def last_run(directory: str) -> Path:
    """The run to resume: of `directory` and its -2, -3, …, the one started last that has a
    snapshot. Raises UserError if none has.
    """
    wanted = Path(directory)
    if os.environ.get("RANK", "0") != "0":
        return wanted  # rank 0 reads and writes it; another machine may not even see it
    found = find_runs(wanted.parent, name=wanted.name, needs="snapshots/step-*")
    if not found:
        raise UserError("snapshot.none", path=wanted)
    return found[0]


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
    try:
        yield
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        raise UserError("run.unwritable", path=path, detail=error) from error


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """One run directory, one writer: the operating system's lock on run/lock, which names its
    owner's pid and host.

    Raises UserError while another process holds it. The lock of a process that died is free; the
    name it left is told.
    """
    with writing(run):
        handle = os.open(run / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        owner = os.read(handle, 200).decode("utf-8", "replace").strip()
        try:
            _lock(handle)
        except (BlockingIOError, PermissionError) as error:
            raise UserError("run.locked", run=run, owner=owner) from error
        if owner:
            note("run.stale_lock", run=run, owner=owner)
        with writing(run):
            os.write(
                handle, f"pid {os.getpid()} on {socket.gethostname()}\n".ljust(len(owner)).encode()
            )
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.lseek(handle, 0, os.SEEK_SET)


def manifest_of(device: str, **facts: Any) -> bytes:
    """manifest.json: `facts` of the run, and the versions, system, GPU and git commit that explain
    its result.
    """
    import transformers

    from cllm import __version__

    commit = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    manifest = {
        "cllm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git_commit": commit,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else "",
        **facts,
    }
    return (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode()


def base_fingerprint(base: Path) -> str:
    """SHA-256 over the base's file names, sizes and bytes; of a file over 4 MiB, 64 samples of 64
    KiB spread evenly over it.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in (base.iterdir() if base.is_dir() else [base]) if p.is_file()):
        size = path.stat().st_size
        digest.update(repr((path.name, size)).encode())
        with path.open("rb") as file:
            last = max(size - _SAMPLE_BYTES, (_SAMPLES - 1) * _SAMPLE_BYTES)
            for index in range(_SAMPLES):
                file.seek(index * last // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def changes_since(
    run: Path, found: dict[str, str], hashes: dict[str, str], *, vital: tuple[str, ...], allow: bool
) -> list[str]:
    """Every change since `run` was started, earlier ones first: `found` ("section.key" -> "old ->
    new") and other `hashes`.

    Raises UserError for those that the run's state depends on, hashes and `vital` sections, unless
    they are allowed.
    """
    try:
        manifest = dict(json.loads((run / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError("config.unreadable", path=run / "manifest.json", detail=error) from error
    changes = {key: f"{key}: {change}" for key, change in found.items()}
    changes |= {
        key: f"{key} differs" for key, value in hashes.items() if manifest.get(key) != value
    }
    breaking = [
        text for key, text in changes.items() if key in hashes or key.partition(".")[0] in vital
    ]
    if breaking and not allow:
        raise UserError("train.changed", run=run, changes="; ".join(breaking))
    if changes:
        note("train.changes", changes="; ".join(changes.values()))
    return [*manifest.get("changes", []), *changes.values()]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the trained parameters: whether training changed anything at all."""
    digest = hashlib.sha256()
    for parameter in trained_parameters(model).values():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def capture(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters, the optimizer's moments and PyTorch's generator states (nothing else
    draws) as one flat dict of CPU tensors.
    """
    tensors = {f"parameter/{name}": p.detach() for name, p in trained_parameters(model).items()}
    for index, kept in enumerate(moments(optimizer)):
        tensors |= {f"optimizer/{index}/{name}": value for name, value in kept.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `capture`. Raises UserError, naming what differs, if the tensors are another
    model's; nothing is changed before.
    """
    trained = trained_parameters(model)
    expected = {f"parameter/{name}": p.shape for name, p in trained.items()} | {
        "rng/cpu": torch.get_rng_state().shape
    }
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    order = [p for group in optimizer.param_groups for p in group["params"]]
    state: list[dict[str, Tensor]] = [{} for _ in order]
    for name, value in tensors.items():
        if name in expected:
            if value.shape != expected[name]:
                wrong.append(f"{name} has shape {tuple(value.shape)}, not {tuple(expected[name])}")
        elif match := re.fullmatch(r"optimizer/(\d{1,9})/(\w+)", name):
            index = int(match[1])
            shapes = moment_shapes(optimizer, order[index]) if index < len(order) else {}
            if shapes.get(match[2]) != value.shape:
                wrong.append(f"{name} of shape {tuple(value.shape)} belongs to no parameter")
            else:
                state[index][match[2]] = value
        elif name != "rng/cuda":
            wrong.append(f"unexpected tensor {name}")
    if wrong:
        raise UserError("snapshot.foreign", count=len(wrong), problems="; ".join(wrong[:3]))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"parameter/{name}"])
    set_moments(optimizer, state)
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def save_snapshot(
    run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int
) -> Path | None:
    """Write snapshots/step-NNNNNN and drop all but the newest `keep`; a full or read-only disk
    costs the snapshot, not the run.
    """
    root = run / "snapshots"
    target, temporary = root / f"step-{step:06d}", root / f".step-{step:06d}.tmp"
    try:
        for left in root.glob(".step-*"):  # by a process that was killed while it wrote
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / _TENSORS)
        (temporary / _STATE).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        (temporary / _METRICS).write_bytes(
            (run / _METRICS).read_bytes() if (run / _METRICS).is_file() else b""
        )
        files = {name: _fingerprint((temporary / name).read_bytes()) for name in _FILES}
        (temporary / _MANIFEST).write_text(json.dumps(files), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if target.exists():
            target.rename(root / f".{target.name}.old")
        temporary.rename(target)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        note("snapshot.unsaved", step=step, detail=error)
        return None
    # a newer one can only be damaged: the run came back to an older step
    kept = [path for n, path in snapshots(run) if n <= step][:keep]
    for _, path in snapshots(run):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(root / f".{target.name}.old", ignore_errors=True)
    return target


def snapshots(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every snapshot, whole or not, the newest first."""
    found = [
        (int(match[1]), path)
        for path in (run / "snapshots").glob("step-*")
        if (match := re.fullmatch(r"step-(\d{6,12})", path.name))
    ]
    return sorted(found, reverse=True)


def load_snapshot(run: Path) -> tuple[bytes, bytes, bytes]:
    """(state.json, state.safetensors, metrics.jsonl) of the newest snapshot that is whole; damaged
    ones are named and skipped.

    Raises UserError if none is left.
    """
    for step, path in snapshots(run):
        try:
            if (path / _MANIFEST).stat().st_size > 10_000:
                raise ValueError(f"{_MANIFEST} is too large")
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            if wrong := [
                name for name in _FILES if (path / name).stat().st_size != manifest[name]["bytes"]
            ]:
                raise ValueError(f"{', '.join(wrong)} does not match its manifest")
            files = {name: (path / name).read_bytes() for name in _FILES}
            if wrong := [name for name in _FILES if manifest[name] != _fingerprint(files[name])]:
                raise ValueError(f"{', '.join(wrong)} does not match its manifest")
            load(files[_TENSORS])
            if json.loads(files[_STATE])["step"] != step:
                raise ValueError(f"{_STATE} is of another step")
            return files[_STATE], files[_TENSORS], files[_METRICS]
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            SafetensorError,
            RecursionError,
            MemoryError,
        ) as error:
            note("snapshot.torn", path=path, detail=error)
    raise UserError("snapshot.none", path=run / "snapshots")


def _fingerprint(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def replace_file(path: Path, data: bytes) -> None:
    """`path` has either its old content or all of `data`, whenever the process ends."""
    fresh = path.with_name(f".{path.name}.new")
    with writing(path):
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
