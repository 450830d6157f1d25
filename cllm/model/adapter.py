"""LoRA adapters as files in PEFT's format: `adapter_config.json` and
`adapter_model.safetensors`, written and read as PEFT 0.21 does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cllm.messages import UserError, read_json
from cllm.model.lora import (
    LoraLinear,
    LoraSettings,
    add_adapter,
    is_conv1d,
    linear_shape,
    lora_layers,
    target_linears,
)
from cllm.model.shards import finite, stored_tensors, write_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
}
# A model's whole state_dict has the adapter's name in it, which PEFT's own files leave out.
_KEY = re.compile(
    r"base_model\.model\.(.+)\.lora_(A|B|magnitude_vector)(?:\.(?!bias)\w+?)??(?:\.weight)?"
)
_PARTS = {"A": "lora_A", "B": "lora_B", "magnitude_vector": "magnitude"}
_UNSET: tuple[Any, ...] = ("none", None, False, {}, [])
# Fields of PEFT's LoraConfig that are read, and those that change no number of a stored adapter:
# which layers it has is what its tensors say.
_READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
_HARMLESS = (
    "auto_mapping base_model_name_or_path inference_mode target_modules exclude_modules"
    " fan_in_fan_out layers_to_transform layers_pattern megatron_core qalora_group_size"
    " runtime_config eva_config peft_version lora_dtype lorap_lr_ratio lorap_emb_lr"
).split()
# Values that change nothing where a trained adapter is loaded; the other initializations change the
# base as well, each time that PEFT loads it.
_ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "revision": ("main", "master"),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def _parts(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Layer name -> its "lora_A", "lora_B" and, for DoRA, "magnitude"."""
    return {
        name: dict(layer.named_parameters(recurse=False))
        for name, layer in lora_layers(model).items()
    }


def _under_peft_names(layers: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{_PREFIX}{name}{_SUFFIXES[part]}": tensor
        for name, parts in layers.items()
        for part, tensor in parts.items()
    }


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's key names, sharing memory with the model."""
    return _under_peft_names(_parts(model))


def save_adapter(model: nn.Module, directory: str | Path, *, base: str = "") -> None:
    """Write the adapter of `model` as PEFT does; `base` names the checkpoint below it."""
    settings = next(iter(lora_layers(model).values())).settings
    write_adapter(model, directory, _parts(model), settings, base=base)


def write_adapter(
    model: nn.Module,
    directory: str | Path,
    layers: dict[str, dict[str, Tensor]],
    settings: LoraSettings,
    *,
    base: str = "",
    within: str = "model.",
) -> None:
    """PEFT's two files from layer name -> tensors of an adapter of `model`, wrapped or not.

    `within`: what a reader calls `model.`, as where it loads the whole of a multimodal base.
    """
    last_parts = {name.rpartition(".")[2] for name in layers}
    linears = [
        name.removesuffix(".base")
        for name, module in model.named_modules()
        if linear_shape(module) is not None
    ]
    # PEFT matches a target at the end of any module's name: short names only if they select exactly
    # what was adapted.
    exact = {name for name in linears if name.rpartition(".")[2] in last_parts} == set(layers)
    short = exact and within == "model."  # a vision tower may have layers of the same short names
    first = model.get_submodule(next(iter(layers)))
    layers = {re.sub(r"^model\.", within, name): parts for name, parts in layers.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": sorted(last_parts if short else layers),
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": is_conv1d(first.base if isinstance(first, LoraLinear) else first),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # clone: fused layers share A, and safetensors writes no memory twice
    tensors = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in _under_peft_names(layers).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, config)


Split = Callable[[str, Tensor], list[tuple[str, Tensor]]]
"""(module name in the original checkpoint, rows (out, …)) -> its native modules with their rows; a
native name stays as it is.
"""


def read_adapter(
    directory: str | Path, split: Split | None = None
) -> tuple[LoraSettings, dict[str, dict[str, Tensor]]]:
    """(settings, layer name -> its "lora_A", "lora_B" and, for DoRA, "magnitude") of a directory,
    ours or PEFT's.

    `split` renames what was trained on an original checkpoint: the parts of a fused layer (W_pack,
    query_key_value, c_attn) share A and take their rows of B. Raises UserError, listing everything
    at once, for a damaged file, numbers that are not finite, and PEFT features that would change
    the result if ignored.
    """
    folder = Path(directory)
    settings = _settings(folder)
    stored = _read_tensors(folder)
    problems = []
    expected = {"lora_A", "lora_B"} | ({"magnitude"} if settings.dora else set())
    layers: dict[str, dict[str, Tensor]] = {}
    for name, parts in stored.items():
        try:
            if parts.keys() != expected:
                raise ValueError(
                    f"tensors {', '.join(sorted(parts))}, expected {', '.join(sorted(expected))}"
                )
            for part in sorted(expected - {"lora_A"}):
                for native, rows in split(name, parts[part]) if split else [(name, parts[part])]:
                    layers.setdefault(native, {"lora_A": parts["lora_A"]})[part] = rows
        except (ValueError, RuntimeError) as error:
            problems.append(f"{name}: {error}")
    if problems or not layers:
        raise UserError(
            "adapter.mismatch",
            path=folder,
            problems="; ".join(problems[:8]) or "no tensors",
            count=len(problems),
        )
    return settings, layers


def adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json in a folder. Raises UserError for every field that is not understood
    and may change the result.
    """
    config = read_json(folder / CONFIG_FILE, "adapter.damaged")
    _refuse(
        folder,
        [
            f"{key} = {value!r:.60}"
            for key, value in config.items()
            if key not in _READ
            and key not in _HARMLESS
            and value not in _UNSET
            and value not in _ALLOWED.get(key, ())
        ],
    )
    return config


def _settings(folder: Path) -> LoraSettings:
    config = adapter_config(folder)
    try:
        settings = LoraSettings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout", 0.0)),
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
        )
        if settings.rank < 1 or not 0 < settings.alpha < math.inf:
            raise ValueError(f"r {config['r']}, lora_alpha {config['lora_alpha']}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise UserError("adapter.damaged", path=folder / CONFIG_FILE, detail=detail) from error
    return settings


def _refuse(folder: Path, features: list[str]) -> None:
    if features:
        raise UserError("adapter.unsupported", path=folder, features="; ".join(features[:8]))


def _read_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Layer name -> part -> tensor. Raises UserError for a tensor that is no part of a LoRA
    layer.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        file = folder / "adapter_model.bin"
    if not file.is_file():
        raise UserError("adapter.no_weights", path=folder)
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    try:
        stored = list(stored_tensors(file))
    except UserError as error:
        raise UserError("adapter.damaged", path=file, detail=error.args[0]) from error
    for key, _, _, read in stored:
        match = _KEY.fullmatch(key)
        if match is None or _PARTS[match[2]] in layers.setdefault(match[1], {}):
            unknown.append(f"unexpected tensor {key}")
            continue
        layers[match[1]][_PARTS[match[2]]] = finite(read(), file, key)
    _refuse(folder, unknown)
    return layers


def check_adapter(
    model: nn.Module,
    folder: str | Path,
    settings: LoraSettings,
    layers: dict[str, dict[str, Tensor]],
) -> None:
    """Raises one UserError that lists the layers which `model` (on the meta device will do) lacks
    or has in another shape.
    """
    modules = dict(model.named_modules())
    problems: list[str] = []
    for name, parts in layers.items():
        module = modules.get(name)
        shape = linear_shape(module.base if isinstance(module, LoraLinear) else module)
        if shape is None:
            problems.append(f"no linear layer {name}")
            continue
        inputs, outputs = shape
        needed = {
            "lora_A": (settings.rank, inputs),
            "lora_B": (outputs, settings.rank),
            "magnitude": (outputs,),
        }
        problems += [
            f"{part} of {name} has shape {tuple(tensor.shape)}, the model needs {needed[part]}"
            for part, tensor in parts.items()
            if tensor.shape != needed[part]
        ]
    if problems:
        raise UserError(
            "adapter.mismatch", path=folder, problems="; ".join(problems[:8]), count=len(problems)
        )


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    dropout: float | None = None,
    split: Split | None = None,
) -> dict[str, LoraLinear]:
    """Freeze the model and give it the adapter of `directory`; returns name -> LoraLinear. The
    tensors decide which layers are adapted.

    dropout: None takes the file's. Raises UserError as `read_adapter` and `check_adapter`.
    """
    if lora_layers(model):
        raise ValueError("the model has an adapter already: load_beside adds another one")
    model.requires_grad_(False)
    load_beside(model, directory, dropout=dropout, split=split)
    return lora_layers(model)


def load_beside(
    model: nn.Module,
    directory: str | Path,
    *,
    dropout: float | None = None,
    split: Split | None = None,
) -> None:
    """Load one more adapter of the same base, its gate closed and with the next number. Arguments
    and errors are those of `load_adapter`.
    """
    settings, layers = read_adapter(directory, split)
    check_adapter(model, directory, settings, layers)
    if dropout is not None:
        settings = settings._replace(dropout=dropout)
    added = add_adapter(model, target_linears(model, list(layers)), settings)
    with torch.no_grad():
        for name, tensors in layers.items():
            for part, tensor in tensors.items():
                added[name].get_parameter(part).copy_(tensor)
