"""LoRA: low-rank adapters around frozen linear layers.

Knows nothing about architectures: whatever has a dense weight (`nn.Linear`, `NF4Linear`, GPT-2's
`Conv1D`) is wrapped, never rewritten, so that a base and its adapters are one model. Each adapter
has a gate per row; gate 0 is the base. A plain adapter without dropout runs through one autograd
function per linear, a gated MLP's last one with the product in front of it; `LoraLinear.fused =
False` switches to autograd. References: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA
arXiv:2402.09353; numbers as PEFT 0.21. Files: `cllm.model.adapter`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cllm.messages import UserError
from cllm.model.device import autocast_dtype, device_of

_PIECE = 2**22  # elements of a gated MLP's product, or of a merged weight, handled at a time
GATED = "LlamaMLP MistralMLP Qwen2MLP Qwen3MLP GlmMLP Glm4MLP GemmaMLP Gemma2MLP Gemma3MLP".split()
"""Classes that compute down_proj(act(gate) * up), gate and up from two linears or from one; a test
compares each.
"""


def linear_shape(module: Any) -> tuple[int, int] | None:
    """(in, out) of a module with one dense weight (`nn.Linear`, `NF4Linear`, `Conv1D`), None for
    any other.
    """
    if isinstance(module, nn.Linear) or (
        hasattr(module, "in_features") and hasattr(module, "dequantize")
    ):
        return int(module.in_features), int(module.out_features)
    if is_conv1d(module):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def base_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """The dense weight (out, in) of a linear layer in `dtype`: dequantized, or transposed where it
    is stored (in, out).
    """
    if hasattr(module, "dequantize"):
        dense: Tensor = module.dequantize(dtype)
        return dense
    weight: Tensor = module.weight
    return (weight.T if is_conv1d(module) else weight).to(dtype)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, whose weight is stored (in, out)."""
    # By name: this layer must not import Transformers, and no other class of that name is in use.
    return type(module).__name__ == "Conv1D"


@dataclass(eq=False, slots=True)
class Gate:
    """How much of an adapter the rows of the batch get; one object shared by all its layers.

    `rows`: None for all of it, 0.0 for nothing, or a Tensor (B,) of strengths: 0 is the base, 1 the
    adapter, what lies between and beyond is base + strength * (adapter - base), layer by layer.
    `number` tells the adapters of one base apart: 1 for the first, and for the only one.
    """

    rows: Tensor | float | None = None
    number: int = 1

    @property
    def closed(self) -> bool:
        """No row goes through."""
        return isinstance(self.rows, float) and self.rows == 0.0

    def set(self, strengths: Sequence[float], device: torch.device) -> None:
        """Row i gets the adapter at strengths[i], all rows at the only one."""
        alike = {*strengths}
        mixed = torch.tensor(strengths, device=device)
        self.rows = None if alike == {1} else 0.0 if alike == {0} else mixed


class _LoraMatmul(torch.autograd.Function):
    """base(x) + scaling B A x, or the same of act(x) * up: keeps x, up and r numbers per token; the
    dense weight and the product are made again.

    x is kept by reference, so q, k and v share it, as gate and up do. Against autograd, the forward
    makes one tensor of the output's size instead of three, the backward one of the input's instead
    of three, and a gated MLP keeps two wide tensors instead of four.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Any,
        scaling: float,
        act: Any,
        x: Tensor,
        up: Tensor | None,
        *low_rank: Tensor,
    ) -> Tensor:
        A, B = low_rank
        dtype = autocast_dtype(x.device) or x.dtype
        ctx.base, ctx.scaling, ctx.act, ctx.dtype = base, scaling, act, dtype
        inputs = _product(x, up, act, dtype)
        output: Tensor = base(inputs)
        low = F.linear(inputs, A.to(dtype))
        output.view(-1, len(B)).addmm_(low.view(-1, len(A)), B.to(dtype).T, alpha=scaling)
        ctx.save_for_backward(x, up, low, A, B)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, low, A, B = ctx.saved_tensors
        rank, columns = A.shape
        grad = grad.reshape(-1, len(B))
        low_grad = (grad @ B.to(ctx.dtype)).mul_(ctx.scaling)
        inputs = _product(x, up, ctx.act, ctx.dtype).reshape(-1, columns)
        A_grad = (low_grad.T @ inputs).to(A.dtype)
        del inputs
        B_grad = (grad.T @ low.view(-1, rank)).mul_(ctx.scaling).to(B.dtype)
        x_grad = up_grad = None
        if ctx.needs_input_grad[3]:
            x_grad = grad @ base_weight(ctx.base, ctx.dtype)
            x_grad = x_grad.addmm_(low_grad, A.to(ctx.dtype)).view(x.shape)
            if up is None:
                x_grad = x_grad.to(x.dtype)
            else:
                up_grad = x_grad
                x_grad = torch.empty_like(up_grad)
                pieces = zip(*map(_pieces, (x, up, up_grad, x_grad)), strict=True)
                for gate, factor, product_grad, out in pieces:
                    with torch.enable_grad():
                        leaf = gate.detach().requires_grad_()
                        active = ctx.act(leaf)
                    out.copy_(torch.autograd.grad(active, leaf, product_grad * factor)[0])
                    product_grad.mul_(active.detach())  # it becomes that of up
        return None, None, None, x_grad, up_grad, A_grad, B_grad


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    flat = tensor.flatten(0, -2)
    pieces: tuple[Tensor, ...] = flat.split(max(1, _PIECE // flat.shape[1]))
    return pieces


def _product(x: Tensor, up: Tensor | None, act: Any, dtype: torch.dtype) -> Tensor:
    """x, or act(x) * up, in `dtype`."""
    if up is None:
        return x.to(dtype)
    product = torch.empty(x.shape, dtype=dtype, device=x.device)
    for gate, factor, out in zip(*map(_pieces, (x, up, product)), strict=True):
        torch.mul(act(gate), factor, out=out)
    return product


class LoraSettings(NamedTuple):
    """An adapter's hyperparameters, as in PEFT's LoraConfig."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @property
    def scaling(self) -> float:
        """alpha / r; rsLoRA: alpha / sqrt(r)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LowRank(nn.Module):
    """One adapter's part in one linear layer: scaling * B A dropout(x).

    Shapes: x (…, in), lora_A (r, in) Kaiming-uniform, lora_B (out, r) zero; float32, computed in
    x's dtype. DoRA has a `magnitude` (out,), which starts as the norms of the base's rows.
    """

    magnitude: nn.Parameter | None

    def __init__(self, base: nn.Module, settings: LoraSettings, gate: Gate) -> None:
        super().__init__()
        shape = linear_shape(base)
        if shape is None:
            raise TypeError(f"{type(base).__name__} has no dense weight to adapt")
        inputs, outputs = shape
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.settings, self.scaling, self.gate = settings, settings.scaling, gate
        A = torch.empty(settings.rank, inputs, device=device, dtype=torch.float32)
        B = torch.zeros(outputs, settings.rank, device=device, dtype=torch.float32)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = None
        if settings.dora:
            self.magnitude = nn.Parameter(base_weight(base, torch.float32).norm(dim=1))

    @property
    def fusible(self) -> bool:
        """Plain LoRA for all rows: `_LoraMatmul` computes it."""
        drops = self.settings.dropout > 0 and self.training
        return self.magnitude is None and self.gate.rows is None and not drops

    def update(self, x: Tensor, result: Tensor, base: nn.Module) -> Tensor:
        """What the adapter adds to `result` = base(x), both (…, out).

        DoRA: base and adapter together are bias + m / ||W + scaling B A||_row * (W + scaling B A)
        x, the norm held constant in backward.
        """
        dropped = F.dropout(x, self.settings.dropout, self.training)
        hidden = F.linear(dropped, self.lora_A.to(x.dtype))
        update = F.linear(hidden, self.lora_B.to(x.dtype)) * self.scaling
        if self.magnitude is not None:
            ratio = (self.magnitude / self._row_norms(base)).to(result.dtype)
            bias: Tensor | None = getattr(base, "bias", None)
            linear = result if bias is None else result - bias
            update = (ratio - 1) * linear + ratio * update
        if isinstance(self.gate.rows, Tensor):
            rows = self.gate.rows.to(update.dtype)
            update = update * rows.view(-1, *[1] * (update.dim() - 1))
        return update

    @torch.no_grad()
    def _row_norms(self, base: nn.Module) -> Tensor:
        """||W + scaling B A||_row (out,), some rows at a time: whole, three float32 matrices of the
        base's size would be alive.
        """
        weight = base_weight(base, torch.float32)
        norms = torch.empty_like(self.lora_B[:, 0])
        step = max(1, _PIECE // weight.shape[1])
        pieces = (tensor.split(step) for tensor in (weight, self.lora_B, norms))
        for rows, B, out in zip(*pieces, strict=True):
            out.copy_((rows + self.scaling * (B @ self.lora_A)).norm(dim=1))
        return norms


class LoraLinear(LowRank):
    """y = base(x) + the updates of its adapters whose gates are not closed.

    The layer is its own first adapter, so that this one's parameters are called `lora_A`, `lora_B`
    and `magnitude` in snapshots; `beside` holds further ones.
    """

    fused = True

    def __init__(self, base: nn.Module, settings: LoraSettings, gate: Gate | None = None) -> None:
        super().__init__(base, settings, gate or Gate())
        self.base = base
        self.beside = nn.ModuleList()

    @property
    def adapters(self) -> list[LowRank]:
        """All adapters of the layer, the first one first."""
        further: Any = self.beside
        return [self, *further]

    def forward(self, x: Tensor, up: Tensor | None = None, act: Any = None) -> Tensor:
        """y (…, out) of x (…, in), or of act(x) * up."""
        active = [adapter for adapter in self.adapters if not adapter.gate.closed]
        if self.fused and len(active) == 1 and active[0].fusible:
            only = active[0]
            fused: Tensor = _LoraMatmul.apply(  # type: ignore[no-untyped-call]
                self.base, only.scaling, act, x, up, only.lora_A, only.lora_B
            )
            return fused
        if up is not None:
            x = act(x) * up
        base_result: Tensor = self.base(x)
        result = base_result
        for adapter in active:
            result = result + adapter.update(x, base_result, self.base)
        return result


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
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        return mlp.down_proj(gate, up, self.act)  # type: ignore[no-any-return]


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Name of the wrapped linear layer in the base model -> its LoraLinear."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }


def gates(model: nn.Module) -> dict[int, Gate]:
    """Number -> gate of every adapter of the model."""
    adapters = (adapter for layer in lora_layers(model).values() for adapter in layer.adapters)
    return {adapter.gate.number: adapter.gate for adapter in adapters}


def inject_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
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
    names = target_linears(model, targets)
    model.requires_grad_(False)
    add_adapter(model, names, LoraSettings(rank, alpha, dropout, rslora, dora))
    return lora_layers(model)


def target_linears(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The names of the linears that `targets` of `inject_lora` selects, in the model's order."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [
        name
        for name, module in model.named_modules()
        if module is not head
        and (isinstance(module, LoraLinear) or linear_shape(module) is not None)
    ]
    if targets == "all-linear":
        return linears
    selected: set[str] = set()
    missing = []
    for pattern in [targets] if isinstance(targets, str) else targets:
        named = {
            name
            for name in linears
            if f".{name}".endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)
        }
        selected |= named
        if not named:
            missing.append(pattern)
    if missing:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise UserError("lora.targets", missing=", ".join(missing), known=known)
    return [name for name in linears if name in selected]


def add_adapter(
    model: nn.Module, names: Iterable[str], settings: LoraSettings
) -> dict[str, LowRank]:
    """Give the linears called `names` one more adapter with the next number, closed unless it is
    the model's first; returns name -> its part there.
    """
    number = 1 + max(gates(model), default=0)
    gate = Gate(rows=None if number == 1 else 0.0, number=number)
    parts: dict[str, LowRank] = {}
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, LoraLinear):
            parts[name] = LowRank(module.base, settings, gate)
            module.beside.append(parts[name])
        else:
            parts[name] = LoraLinear(module, settings, gate)
            model.set_submodule(name, parts[name])
    for module in model.modules():
        plain = type(module).__name__ in GATED and not isinstance(module.forward, _GatedMlp)
        if plain and isinstance(module.down_proj, LoraLinear):
            module.forward = _GatedMlp(module)
    return parts


@contextmanager
def lora_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Inside this context the first adapter has this strength; at 0 a model without others is its
    base.
    """
    gate = gates(model).get(1, Gate())
    before = gate.rows
    gate.set([strength], device_of(model))
    try:
        yield
    finally:
        gate.rows = before


def merge_into(
    weight: Tensor, scaling: float, parts: Mapping[str, Tensor], strength: float = 1.0
) -> None:
    """weight (out, in) <- weight + strength (merged - weight) in place, where merged is weight +
    scaling B A, with DoRA's magnitude (out,) each row scaled to it; sums in float32.
    """
    magnitude = parts.get("magnitude")
    step = max(1, _PIECE // weight.shape[1])
    A, B = parts["lora_A"].float(), parts["lora_B"]
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        base = weight[rows].float()
        summed = base + scaling * (B[rows].float() @ A)
        if magnitude is not None:
            summed *= (magnitude[rows].float() / summed.norm(dim=1))[:, None]
        weight[rows] = base.lerp(summed, strength).to(weight.dtype)


@torch.no_grad()
def merge_lora(model: nn.Module, strength: float = 1.0) -> nn.Module:
    """Fold the adapter into its base at `strength`, in place: as `merge_into`, in the base's dtype;
    a quantized base becomes a dense layer.

    Raises ValueError if the model has several adapters.
    """
    if len(gates(model)) > 1:
        raise ValueError("several adapters: which of them is to be merged is not known")
    for name, layer in lora_layers(model).items():
        base: Any = layer.base
        quantized = hasattr(base, "dequantize")
        # a view of what is dense already
        weight = base_weight(base, torch.float32 if quantized else base.weight.dtype)
        merge_into(weight, layer.scaling, dict(layer.named_parameters(recurse=False)), strength)
        if quantized:
            bias = base.bias
            outputs, inputs = weight.shape
            base = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
            base.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                base.bias = nn.Parameter(bias, requires_grad=False)
                base.to(bias.dtype)
        model.set_submodule(name, base)
    return model
