"""Snapshots of a run: atomic save, verified load, bit-exact resume.

A snapshot is a folder of `state.safetensors` (adapter, AdamW moments, generator states),
`state.json` (everything else that decides the next step), `metrics.jsonl` (so far) and
`manifest.json` (size and SHA-256 of the others). It is written under a temporary name, synced and
renamed, so that a folder called step-N is either whole or was altered later, which the manifest
shows. No pickle, and no name is read from a file: a hostile snapshot can be refused, but not lead
elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from cllm.learn.optim import moment_shapes, moments, parameters_of, set_moments
from cllm.messages import UserError, note, to_json
from cllm.runs import sync

_TENSORS = "state.safetensors"
_STATE = "state.json"
_METRICS = "metrics.jsonl"
_MANIFEST = "manifest.json"
_FILES = (_TENSORS, _STATE, _METRICS)


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
    # A tensor added later must be optional, as rng/cuda is: earlier snapshots have to resume.
    expected = {f"parameter/{name}": p.shape for name, p in trained.items()} | {
        "rng/cpu": torch.get_rng_state().shape
    }
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    order = parameters_of(optimizer)
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
    target = root / f"step-{step:06d}"
    temporary = root / f".{target.name}.tmp"
    replaced = root / f".{target.name}.old"
    try:
        for left in root.glob(".step-*"):  # by a process that was killed while it wrote
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / _TENSORS)
        state_json = to_json({"step": step, **state})
        (temporary / _STATE).write_text(state_json, encoding="utf-8")
        metrics = (run / _METRICS).read_bytes() if (run / _METRICS).is_file() else b""
        (temporary / _METRICS).write_bytes(metrics)
        files = {name: _fingerprint((temporary / name).read_bytes()) for name in _FILES}
        (temporary / _MANIFEST).write_text(to_json(files), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if target.exists():
            target.rename(replaced)  # `load_snapshot` takes it back if the next line never ran
        temporary.rename(target)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        note("snapshot.unsaved", step=step, detail=error)
        return None
    # A newer one can only be damaged: the run came back to an older step.
    kept = [path for n, path in snapshots(run) if n <= step][:keep]
    for _, path in snapshots(run):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def snapshots(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every snapshot, whole or not, the newest first."""
    folders = (run / "snapshots").glob("step-*")
    named = [path for path in folders if re.fullmatch(r"step-\d{6,12}", path.name)]
    return sorted(((int(path.name[5:]), path) for path in named), reverse=True)


def load_snapshot(run: Path) -> tuple[bytes, bytes, bytes]:
    """(state.json, state.safetensors, metrics.jsonl) of the newest snapshot that is whole; damaged
    ones are named and skipped.

    Raises UserError if none is left.
    """
    root = run / "snapshots"
    for replaced in root.glob(".step-*.old"):  # killed between the two renames of a save
        target = root / replaced.name[1:-4]
        if not target.exists():
            replaced.rename(target)
    for step, path in snapshots(run):
        try:
            return _read_whole(step, path)
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
    raise UserError("snapshot.none", path=root)


def _read_whole(step: int, path: Path) -> tuple[bytes, bytes, bytes]:
    """The files of one snapshot; raises if any is not what its manifest says."""
    if (path / _MANIFEST).stat().st_size > 10_000:
        raise ValueError(f"{_MANIFEST} is too large")
    manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    # Sizes first: a file that grew without bound is not read.
    resized = [name for name in _FILES if (path / name).stat().st_size != manifest[name]["bytes"]]
    if resized:
        raise ValueError(f"{', '.join(resized)} does not match its manifest")
    files = {name: (path / name).read_bytes() for name in _FILES}
    if changed := [name for name in _FILES if manifest[name] != _fingerprint(files[name])]:
        raise ValueError(f"{', '.join(changed)} does not match its manifest")
    load(files[_TENSORS])
    if json.loads(files[_STATE])["step"] != step:
        raise ValueError(f"{_STATE} is of another step")
    return files[_STATE], files[_TENSORS], files[_METRICS]


def _fingerprint(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
