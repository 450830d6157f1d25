"""Run directories and the snapshots in them: atomic save, verified load, bit-exact resume.

A snapshot is a folder of `state.safetensors` (adapter, AdamW moments, generator states), `state.json` (everything else that decides the
next step) and `manifest.json` (size and SHA-256 of both). It is written under a temporary name, synced and renamed, so that a folder
called step-N is either whole or was altered later, which the manifest shows. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cllm.messages import UserError, note

_TENSORS, _STATE, _MANIFEST = "state.safetensors", "state.json", "manifest.json"


def new_run(directory: str | Path) -> Path:
    """Create `directory`, or the first free of `directory`-2, -3, …; an existing run is never written into."""
    wanted = Path(directory)
    candidate, number = wanted, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = wanted.with_name(f"{wanted.name}-{number}")


def find_runs(root: str | Path = "runs", *, name: str = "", needs: str = "adapter/adapter_config.json") -> list[Path]:
    """Runs under `root` that have `needs`, the one started last first; `name` finds only it and its name-2, name-3."""
    found = [path.parent for path in Path(root).glob("*/config.toml") if any(path.parent.glob(needs))]
    runs = [run for run in found if not name or re.fullmatch(re.escape(name) + r"(-\d+)?", run.name)]
    return sorted(runs, key=lambda run: ((run / "config.toml").stat().st_mtime_ns, run.name), reverse=True)


def newest_run(root: str | Path = "runs") -> Path:
    """The finished run under `root` that was started last. Raises UserError if there is none."""
    runs = find_runs(root)
    if not runs:
        raise UserError("run.none", root=root)
    return runs[0]


def capture(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters, AdamW moments and generator states as one flat dict of CPU tensors."""
    tensors = {f"parameter/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `capture`. Raises KeyError or RuntimeError if the model is another one; nothing is half restored before that."""
    trained = {f"parameter/{name}": p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name for name in tensors if name.startswith("parameter/")}
    if wrong := set(trained) ^ saved | {n for n in set(trained) & saved if trained[n].shape != tensors[n].shape}:
        raise KeyError(f"{len(wrong)} parameters differ: {', '.join(sorted(wrong)[:3])}")
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, moment = name.split("/")
            state.setdefault(int(index), {})[moment] = value
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def save_snapshot(run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int) -> Path | None:
    """Write snapshots/step-NNNNNN and drop all but the newest `keep`; a full or read-only disk costs the snapshot, not the run."""
    root = run / "snapshots"
    target, temporary = root / f"step-{step:06d}", root / f".step-{step:06d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / _TENSORS)
        (temporary / _STATE).write_text(json.dumps({"step": step, **state}, ensure_ascii=False), encoding="utf-8")
        files = {name: _fingerprint(temporary / name) for name in (_TENSORS, _STATE)}
        (temporary / _MANIFEST).write_text(json.dumps(files), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        note("snapshot.unsaved", step=step, detail=error)
        return None
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_snapshot(run: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state, tensors) of the newest snapshot that is whole; damaged ones are named and skipped. Raises UserError if none is left."""
    for path in sorted((run / "snapshots").glob("step-*"), reverse=True):
        try:
            files = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            if wrong := [name for name in (_TENSORS, _STATE) if files[name] != _fingerprint(path / name)]:
                raise ValueError(f"{', '.join(wrong)} does not match its manifest")
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            return dict(state), load_file(path / _TENSORS)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            note("snapshot.torn", path=path, detail=error)
    raise UserError("snapshot.none", path=run / "snapshots")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder for syncing
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
