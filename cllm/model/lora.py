"""LoRA: low-rank adapters around frozen linear layers, and their files in PEFT's format.

Knows nothing about architectures: whatever has a dense weight (`nn.Linear`, `NF4Linear`, GPT-2's
`Conv1D`) is wrapped, never rewritten, so that base and adapter are one model. A gate per row
switches the adapter: gate 0 is the base. Plain LoRA without dropout runs through one autograd
function per linear, a gated MLP's last one with the product in front of it; `LoraLinear.fused =
False` switches to autograd. References: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA
arXiv:2402.09353; file layout and numbers as PEFT 0.21.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cllm.messages import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PIECE = 2**22  # elements of a gated MLP's product, or of a merged weight, handled at a time
GATED = (
    "LlamaMLP",
    "MistralMLP",
    "Qwen2MLP",
    "Qwen3MLP",
    "GlmMLP",
    "Glm4MLP",
    "GemmaMLP",
    "Gemma2MLP",
    "Gemma3MLP",
)
"""Classes that compute down_proj(act(gate) * up), gate and up from two linears or from one; a test
compares each.
"""
_SUFFIXES = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
}


def linear_shape(module: Any) -> tuple[int, int] | None:
    """(in, out) of a module with one dense weight (`nn.Linear`, `NF4Linear`, `Conv1D`), None for
    any other.
    """
    if isinstance(module, nn.Linear) or (
        hasattr(module, "in_features") and hasattr(module, "dequantize")
    ):
        return int(module.in_features), int(module.out_features)
    if _is_conv1d(module):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def base_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """The dense weight (out, in) of a linear layer in `dtype`: dequantized, or transposed where it
    is stored (in, out).
    """
    if isinstance(module, LoraLinear):  # another adapter of the same base
        return base_weight(module.base, dtype)
    if hasattr(module, "dequantize"):
        dense: Tensor = module.dequantize(dtype)
        return dense
    weight: Tensor = module.weight
    return (weight.T if _is_conv1d(module) else weight).to(dtype)


def _is_conv1d(module: nn.Module) -> bool:
    # By name: this layer must not import Transformers, and no other class of that name is in use.
    return type(module).__name__ == "Conv1D"


@dataclass(eq=False, slots=True)
class Gate:
    """Which rows of the batch go through the adapter; one object shared by all layers of an
    adapter. None: all of them.

    `number` tells the adapters of one base apart: 1 for the first, and for the only one.
    """

    rows: Tensor | float | None = None
    number: int = 1


class _LoraMatmul(torch.autograd.Function):
    """`layer`(x), or `layer`(act(x) * up): keeps x, up and r numbers per token; the dense weight
    and the product are made again.

    x is kept by reference, so q, k and v share it, as gate and up do. Against autograd, the forward
    makes one tensor of the output's size instead of three, the backward one of the input's instead
    of three, and a gated MLP keeps two wide tensors instead of four.
    """

    @staticmethod
    def forward(
        ctx: Any, layer: Any, act: Any, x: Tensor, up: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.layer, ctx.act, ctx.dtype = layer, act, dtype
        inputs = _inputs(x, up, act, dtype)
        bias = layer.bias
        output = F.linear(
            inputs, base_weight(layer.base, dtype), None if bias is None else bias.to(dtype)
        )
        low = F.linear(inputs, a.to(dtype))
        output.view(-1, output.shape[-1]).addmm_(
            low.view(-1, layer.rank), b.to(dtype).T, alpha=layer.scaling
        )
        ctx.save_for_backward(x, up, low, a, b)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, low, A, B = ctx.saved_tensors
        layer, dtype, grad = ctx.layer, ctx.dtype, grad.reshape(-1, grad.shape[-1])
        low_grad = (grad @ B.to(dtype)).mul_(layer.scaling)
        A_grad = (low_grad.T @ _inputs(x, up, ctx.act, dtype).reshape(-1, layer.in_features)).to(
            A.dtype
        )
        B_grad = (grad.T @ low.view(-1, layer.rank)).mul_(layer.scaling).to(B.dtype)
        if not ctx.needs_input_grad[2]:
            return None, None, None, None, A_grad, B_grad
        x_grad = (grad @ base_weight(layer.base, dtype)).addmm_(low_grad, A.to(dtype)).view(x.shape)
        if up is None:
            return None, None, x_grad.to(x.dtype), None, A_grad, B_grad
        gate_grad = torch.empty_like(x_grad)
        for gate, factor, piece, out in zip(*map(_pieces, (x, up, x_grad, gate_grad)), strict=True):
            with torch.enable_grad():
                leaf = gate.detach().requires_grad_()
                active = ctx.act(leaf)
            out.copy_(torch.autograd.grad(active, leaf, piece * factor)[0])
            piece.mul_(active.detach())  # the product's gradient becomes that of up
        return None, None, gate_grad, x_grad, A_grad, B_grad


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    flat = tensor.flatten(0, -2)
    pieces: tuple[Tensor, ...] = flat.split(max(1, _PIECE // flat.shape[1]))
    return pieces


def _inputs(x: Tensor, up: Tensor | None, act: Any, dtype: torch.dtype) -> Tensor:
    """x, or act(x) * up, in `dtype`."""
    if up is None:
        return x.to(dtype)
    product = torch.empty(x.shape, dtype=dtype, device=x.device)
    for gate, factor, out in zip(*map(_pieces, (x, up, product)), strict=True):
        torch.mul(act(gate), factor, out=out)
    return product


class LoraLinear(nn.Module):
    """y = base(x) + scaling * gate * B A dropout(x), with scaling = alpha / r (rsLoRA: alpha /
    sqrt(r)).

    Shapes: x (…, in), lora_A (r, in) Kaiming-uniform, lora_B (out, r) zero, y (…, out); adapters
    are float32 and computed in x's dtype. DoRA (`magnitude` (out,)): y = bias + m / ||W + scaling B
    A||_row * (W + scaling B A) x, the norm held constant in backward.
    """

    fused = True

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        gate: Gate | None = None,
    ) -> None:
        super().__init__()
        shape = linear_shape(base)
        if shape is None:
            raise TypeError(f"{type(base).__name__} has no dense weight to adapt")
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, dropout
        self.in_features, self.out_features = shape
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.gate = gate or Gate()
        self.lora_A = nn.Parameter(torch.empty(rank, shape[0], device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(shape[1], rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = (
            nn.Parameter(base_weight(base, torch.float32).norm(dim=1)) if dora else None
        )

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        bias: Tensor | None = getattr(self.base, "bias", None)
        return bias

    def forward(self, x: Tensor, up: Tensor | None = None, act: Any = None) -> Tensor:
        """y (…, out) of x (…, in), or of act(x) * up."""
        rows = self.gate.rows
        plain = (
            self.magnitude is not None or rows is not None or (self.dropout > 0 and self.training)
        )
        if self.fused and not plain:
            fused: Tensor = _LoraMatmul.apply(self, act, x, up, self.lora_A, self.lora_B)  # type: ignore[no-untyped-call]
            return fused
        x = x if up is None else act(x) * up
        result: Tensor = self.base(x)
        if isinstance(rows, float) and rows == 0.0:
            return result
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        update = F.linear(hidden, self.lora_B.to(x.dtype)) * self.scaling
        if self.magnitude is not None:
            with torch.no_grad():
                norm = (
                    base_weight(self.base, torch.float32)
                    + self.scaling * (self.lora_B @ self.lora_A)
                ).norm(dim=1)
            ratio = (self.magnitude / norm).to(x.dtype)
            update = (ratio - 1) * (
                result if self.bias is None else result - self.bias
            ) + ratio * update
        if isinstance(rows, Tensor):
            update = update * rows.to(update.dtype).view(-1, *[1] * (update.dim() - 1))
        return result + update


class _GatedMlp:
    """Stands for the `forward` of an MLP of `GATED` and leaves the product to its adapted
    `down_proj`.
    """

    def __init__(self, mlp: Any) -> None:
        self.mlp, self.plain = mlp, mlp.forward
        self.act = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn

    def __call__(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if not isinstance(mlp.down_proj, LoraLinear):  # merged
            return self.plain(x)  # type: ignore[no-any-return]
        fused = hasattr(mlp, "gate_up_proj")
        gate, up = (
            mlp.gate_up_proj(x).chunk(2, dim=-1) if fused else (mlp.gate_proj(x), mlp.up_proj(x))
        )
        return mlp.down_proj(gate, up, self.act)  # type: ignore[no-any-return]


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Name of the wrapped linear layer in the base model -> its LoraLinear."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }


def inject_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    rslora: bool = False,
    dora: bool = False,
) -> dict[str, LoraLinear]:
    """Freeze `model` and wrap its target linears in place; returns name -> LoraLinear.

    `targets`: "all-linear" (every linear but the head), or names: the last part(s) of a module's
    name (`q_proj`, `self_attn.q_proj`) or a glob over the whole name (`model.layers.1?.*`). Raises
    UserError for targets that match nothing.
    """
    if lora_layers(model):
        raise ValueError(
            "the model has adapters already: merge or reload the base before injecting new ones"
        )
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    linears = {
        name: m
        for name, m in model.named_modules()
        if m is not head and linear_shape(m) is not None
    }
    if targets == "all-linear":
        chosen = list(linears)
    else:
        patterns = [targets] if isinstance(targets, str) else targets
        hits = {
            p: [n for n in linears if ("." + n).endswith("." + p) or fnmatch.fnmatchcase(n, p)]
            for p in patterns
        }
        if missing := [pattern for pattern, names in hits.items() if not names]:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise UserError("lora.targets", missing=", ".join(missing), known=known)
        chosen = [name for name in linears if any(name in names for names in hits.values())]
    model.requires_grad_(False)
    gate = Gate()
    for name in chosen:
        layer = LoraLinear(
            linears[name], rank, alpha, dropout=dropout, rslora=rslora, dora=dora, gate=gate
        )
        model.set_submodule(name, layer)
    for module in model.modules():
        if type(module).__name__ in GATED and isinstance(module.down_proj, LoraLinear):
            module.forward = _GatedMlp(module)
    return lora_layers(model)


def _gate(model: nn.Module) -> Gate | None:
    # All layers of an adapter share one Gate, so any will do; further adapters are the engine's
    # business.
    return next(
        (
            module.gate
            for module in model.modules()
            if isinstance(module, LoraLinear) and module.gate.number == 1
        ),
        None,
    )


def set_gate(model: nn.Module, rows: Tensor | float | None) -> None:
    """Choose who goes through the adapter: None all rows, 0.0 none (the base), or a Tensor (B,) of
    0 and 1, one per row.
    """
    if gate := _gate(model):
        gate.rows = rows


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is its base: the reference policy, the before of
    before/after.
    """
    gate = _gate(model)
    before = gate.rows if gate else None
    set_gate(model, 0.0)
    try:
        yield
    finally:
        set_gate(model, before)


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
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does; `base` names the
    checkpoint below it.
    """
    first = next(iter(lora_layers(model).values()))
    rslora = not math.isclose(first.scaling, first.alpha / first.rank)
    own = {
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
    }
    write_adapter(
        model,
        directory,
        _parts(model),
        {**own, "use_rslora": rslora, "use_dora": first.magnitude is not None},
    )


def write_adapter(
    model: nn.Module,
    directory: str | Path,
    layers: dict[str, dict[str, Tensor]],
    settings: dict[str, Any],
) -> None:
    """PEFT's two files from layer name -> tensors; `settings` are the keys of adapter_config.json
    that describe the numbers.
    """
    last_parts = {name.rpartition(".")[2] for name in layers}
    linears = [
        n.removesuffix(".base") for n, m in model.named_modules() if linear_shape(m) is not None
    ]
    # Short names only if they select exactly what was adapted; PEFT matches a target at the end of
    # any module's name.
    exact = {name for name in linears if name.rpartition(".")[2] in last_parts} == set(layers)
    first = model.get_submodule(next(iter(layers)))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **settings,
        "target_modules": sorted(last_parts if exact else layers),
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": _is_conv1d(getattr(first, "base", first)),
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
    (folder / CONFIG_FILE).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


Split = Callable[[str, Tensor], list[tuple[str, Tensor]]]
"""(module name in the original checkpoint, rows (out, …)) -> its native modules with their rows; a
native name stays as it is.
"""


def read_adapter(
    directory: str | Path, split: Split | None = None
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """(adapter_config, layer name -> its "lora_A", "lora_B" and, for DoRA, "magnitude") of a
    directory, ours or PEFT's.

    `split` renames what was trained on an original checkpoint: the parts of a fused layer (W_pack,
    query_key_value, c_attn) share A and take their rows of B. Raises UserError, listing everything
    at once, for a damaged file and PEFT features that would change the result if ignored.
    """
    folder = Path(directory)
    config = _read_config(folder)
    problems = [
        f"{key} = {config[key]!r}"
        for key, plain in (
            ("bias", "none"),
            ("modules_to_save", None),
            ("rank_pattern", {}),
            ("alpha_pattern", {}),
        )
        if config.get(key, plain) not in (plain, None, {}, [])
    ]
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                part = next(
                    (part for part, suffix in _SUFFIXES.items() if key.endswith(suffix)), None
                )
                if part is None or not key.startswith(_PREFIX):
                    problems.append(f"unexpected tensor {key}")
                else:
                    name = key.removeprefix(_PREFIX).removesuffix(_SUFFIXES[part])
                    found.setdefault(name, {})[part] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise UserError("adapter.damaged", path=folder / WEIGHTS_FILE, detail=error) from error
    expected = {"lora_A", "lora_B"} | ({"magnitude"} if config.get("use_dora") else set())
    layers: dict[str, dict[str, Tensor]] = {}
    for name, parts in found.items():
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
    return config, layers


def check_adapter(
    model: nn.Module,
    folder: str | Path,
    config: dict[str, Any],
    layers: dict[str, dict[str, Tensor]],
) -> None:
    """Raises one UserError that lists the layers which `model` (on the meta device will do) lacks
    or has in another shape.
    """
    modules, problems = dict(model.named_modules()), []
    for name, parts in layers.items():
        shape = linear_shape(modules[name]) if name in modules else None
        if shape is None:
            problems.append(f"no linear layer {name}")
            continue
        rank = int(config["r"])
        for part, dims in (
            ("lora_A", (rank, shape[0])),
            ("lora_B", (shape[1], rank)),
            ("magnitude", (shape[1],)),
        ):
            if part in parts and tuple(parts[part].shape) != dims:
                problems.append(
                    f"{part} of {name} has shape {tuple(parts[part].shape)}, the model needs {dims}"
                )
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
    """Inject and fill the adapter of `directory`; returns name -> LoraLinear. The tensors decide
    which layers are adapted.

    Raises UserError as `read_adapter` and `check_adapter`.
    """
    config, found = read_adapter(directory, split)
    check_adapter(model, directory, config, found)
    layers = inject_lora(
        model,
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        targets=list(found),
        rslora=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout", 0.0)) if dropout is None else dropout,
        dora=bool(config.get("use_dora")),
    )
    with torch.no_grad():
        for name, parts in found.items():
            for part, tensor in parts.items():
                getattr(layers[name], part).copy_(tensor)
    return layers


def load_beside(model: nn.Module, directory: str | Path, **options: Any) -> None:
    """Load one more adapter of the same base, switched off: y = base(x) + gate_1 update_1(x) +
    gate_2 update_2(x) + …

    Its gate has the next number. `options` and errors are those of `load_adapter`.
    """
    before = lora_layers(model)
    inner = {id(layer.base) for layer in before.values()}
    outer = {name: layer for name, layer in before.items() if id(layer) not in inner}
    for name, layer in outer.items():
        bare: nn.Module = layer
        while isinstance(bare, LoraLinear):
            bare = bare.base
        model.set_submodule(name, bare)
    added = load_adapter(model, directory, **options)
    for name, layer in added.items():
        layer.base = outer.pop(name, layer.base)
        layer.gate.number, layer.gate.rows = (
            1 + max(old.gate.number for old in before.values()),
            0.0,
        )
    for name, layer in outer.items():
        model.set_submodule(name, layer)


def adapter_scaling(config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, of an adapter_config."""
    rank = int(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if (
            config["peft_type"] != "LORA"
            or int(config["r"]) < 1
            or float(config["lora_alpha"]) <= 0
        ):
            raise ValueError(
                f"peft_type {config['peft_type']}, r {config['r']}, lora_alpha {config['lora_alpha']}"
            )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            "adapter.damaged", path=folder / CONFIG_FILE, detail=f"{type(error).__name__}: {error}"
        ) from error
    return dict(config)


def merge_into(weight: Tensor, scaling: float, parts: Mapping[str, Tensor]) -> None:
    """weight (out, in) <- weight + scaling B A in place, and with DoRA's magnitude (out,) each row
    scaled to it; sums in float32.
    """
    magnitude = parts.get("magnitude")
    step = max(1, _PIECE // weight.shape[1])
    down, up = parts["lora_A"].float(), parts["lora_B"]
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        summed = weight[rows].float() + scaling * (up[rows].float() @ down)
        if magnitude is not None:
            summed *= (magnitude[rows].float() / summed.norm(dim=1))[:, None]
        weight[rows] = summed.to(weight.dtype)


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Fold every adapter into its base, in place: W <- W + scaling B A, in the base's dtype; a
    quantized base becomes a dense layer.
    """
    for name, layer in lora_layers(model).items():
        base: Any = layer.base
        quantized = hasattr(base, "dequantize")
        # a view of what is dense already
        weight = base_weight(base, torch.float32 if quantized else base.weight.dtype)
        merge_into(weight, layer.scaling, dict(layer.named_parameters(recurse=False)))
        if quantized:
            bias, base = (
                base.bias,
                nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta"),
            )
            base.weight = nn.Parameter(
                weight if bias is None else weight.to(bias.dtype), requires_grad=False
            )
            base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        model.set_submodule(name, base)
    return model
