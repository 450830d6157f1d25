"""One optimizer step: AdamW over the adapters (32 or 8 bits), the learning rate as a pure function
of the step, the fp16 loss scaler.

Everything here is told what to do by plain values; the loop that calls it stands in `cllm.train`.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from cllm.data.packing import PackedBatch
from cllm.learn.dist import World
from cllm.learn.preference import Preference, Weighed
from cllm.messages import UserError
from cllm.model.device import Precision, out_of_memory

Result = TypeVar("Result")
Objective = Callable[[nn.Module, PackedBatch], Tensor]
"""(model, row) -> summed loss, scalar float32."""


class StepStats(NamedTuple):
    """What one optimizer step did."""

    loss: float
    """Mean nats per supervised token of the whole step, or its mean preference loss."""
    grad_norm: float
    """Euclidean norm of the adapter gradients before clipping."""
    tokens: int
    supervised_tokens: int
    skipped: bool
    """The loss or the gradient was not finite: nothing was updated (and an enabled scaler lowered
    its scale).
    """
    preference: Mapping[str, float] = MappingProxyType({})
    """`Weighed.figures` of a step on preference data."""
    sources: Mapping[str, float] = MappingProxyType({})
    """Of a mixture: mean nats per supervised token of each source that the step has."""

    def figures(self) -> dict[str, Any]:
        """Everything by its name."""
        values: dict[str, Any] = self._asdict()
        values |= values.pop("preference")
        if not self.sources:
            del values["sources"]
        return values


def learning_rate(
    step: int, total: int, peak: float, *, schedule: str = "cosine", warmup: int = 0
) -> float:
    """Rate of step 1…total: linear warm-up to `peak` over `warmup` steps, then cosine or linear to
    zero after `total`, or constant.
    """
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / max(1, total - warmup)
    if schedule == "constant":
        return peak
    return peak * (
        1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    )


@cache
def _without_8bit(device: str) -> str:
    """Why bitsandbytes' 8-bit AdamW does not run on `device`; "" where a probe's step is right."""
    try:
        from bitsandbytes.optim import AdamW8bit

        # bitsandbytes keeps the moments of fewer than 4,096 values in float32
        probe = nn.Parameter(torch.zeros(4096, device=device))
        probe.grad = torch.ones_like(probe)
        AdamW8bit([probe], lr=1.0, weight_decay=0.0).step()
        # AdamW's first step is the learning rate times the gradient's sign
        right = torch.allclose(probe, -torch.ones_like(probe), rtol=1e-3)
    # a driver, a missing library, a wrong build: whatever goes wrong inside is not fatal
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if right else "its first step is not AdamW's"


def check_optimizer(name: str, device: str) -> None:
    """Raises UserError for "adamw8bit" where bitsandbytes does not run."""
    if name == "adamw8bit" and (reason := _without_8bit(device)):
        raise UserError("train.adamw8bit", device=device, reason=reason)


def make_optimizer(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    plus_ratio: float = 1.0,
    name: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over what requires a gradient; name="adamw8bit": bitsandbytes', its
    moments 8-bit codes in blocks of 256 (arXiv:2110.02861).

    LoRA+ (arXiv:2402.12354): lora_B learns `plus_ratio` times faster. Raises UserError as
    `check_optimizer`.
    """
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    check_optimizer(name, trained[0][1].device.type)
    fast = [p for key, p in trained if key.endswith("lora_B")]
    slow = [p for key, p in trained if not key.endswith("lora_B")]
    groups = [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": plus_ratio}]
    groups = [g for g in groups if g["params"]]
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        eight_bits: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, weight_decay=weight_decay)
        return eight_bits
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What it updates, in its groups' order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def moment_shapes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, torch.Size]:
    """Name -> shape of what the optimizer keeps of `parameter` from its first step on."""
    shape, scalar = parameter.shape, torch.Size()
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": scalar, "exp_avg": shape, "exp_avg_sq": shape}
    shapes = {"step": scalar, "state1": shape, "state2": shape}
    if parameter.numel() < 4096:
        return shapes
    blocks = torch.Size([-(-parameter.numel() // 256)])
    return {**shapes, "absmax1": blocks, "absmax2": blocks}


def moments(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """What the optimizer keeps of each parameter, in its groups' order; nothing before a step."""
    kept: list[dict[str, Tensor]] = []
    for parameter in parameters_of(optimizer):
        state = optimizer.state.get(parameter, {})
        names = [name for name in moment_shapes(optimizer, parameter) if name in state]
        # bitsandbytes' step is an int
        kept.append({name: torch.as_tensor(state[name]) for name in names})
    return kept


def set_moments(optimizer: torch.optim.Optimizer, kept: list[dict[str, Tensor]]) -> None:
    """The inverse of `moments`."""
    optimizer.state.clear()
    for parameter, tensors in zip(parameters_of(optimizer), kept, strict=True):
        if not tensors:
            continue
        state: dict[str, Any] = {
            name: tensor.to(parameter.device, copy=True) for name, tensor in tensors.items()
        }
        optimizer.state[parameter] = state
        if "state1" in state:
            state["step"] = int(state["step"])
        if "absmax1" in state:
            # the two code tables are constants, one of each for all parameters
            tables: dict[str, Tensor] = optimizer.name2qmap  # type: ignore[attr-defined]
            for number, name in ((1, "dynamic"), (2, "udynamic")):
                tables[name] = tables[name].to(parameter.device)
                state[f"qmap{number}"] = tables[name]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its LoRA+ ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


class StepOutOfMemoryError(Exception):
    """A step did not fit, on this rank or another; no gradient is left. `altered`: parameters and
    moments may be half updated.
    """

    def __init__(self, detail: str, *, altered: bool) -> None:
        super().__init__(detail)
        self.altered = altered


@dataclass(frozen=True)
class Trainee:
    """What learns: a model with its objective, optimizer and number format."""

    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    precision: Precision
    scaler: torch.amp.GradScaler
    max_norm: float = 1.0
    preference: Preference | None = None
    """With it a step takes two passes: `cllm.learn.preference`."""
    names: tuple[str, ...] = ()
    """Of the sources of a mixture."""
    by_source: Tensor | None = None
    """(names,) where `objective` adds up each one's nats."""

    def step(
        self,
        rows: Sequence[PackedBatch],
        *,
        world: World | None = None,
        seed: str = "",
        micro_tokens: int = sys.maxsize,
    ) -> StepStats:
        """One update from the rows of a step: the summed loss over all of them divided by their
        supervised tokens.

        So 1 x 8 rows equal 8 x 1, and row i, computed on rank i mod world, equals one rank. A row
        longer than `micro_tokens` is computed in parts. Dropout depends on (`seed`, i) only;
        without a seed it goes on from the generator's state. A step whose loss or gradient is not
        finite changes no parameter and is reported as skipped. Raises StepOutOfMemoryError, on
        every rank, if memory ran out on one.
        """
        world = world or World()
        scaler = self.scaler
        trained = parameters_of(self.optimizer)
        weight = sum(batch.weight for batch in rows)
        measured = self._measured(rows, world, micro_tokens)
        divisor = 1 if self.preference else max(1, weight)
        total = torch.zeros((), device=trained[0].device)
        sums = total.new_zeros(0) if self.by_source is None else self.by_source.zero_()

        def gradients() -> None:
            for index in range(world.rank, len(rows), world.size):
                if seed:
                    torch.manual_seed(random.Random(f"{seed}/{index}").getrandbits(63))
                for part in measured.rows[index].split(micro_tokens):
                    with self.precision.autocast():
                        loss = self.objective(self.model, part.to(total.device)) / divisor
                    scaler.scale(loss).backward()
                    total.add_(loss.detach())
            if self.preference:  # pass 2 has its gradient, not its value
                total.fill_(0.0 if world.rank else measured.loss)

        def update() -> tuple[float, float, bool, list[float]]:
            scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(trained, self.max_norm or math.inf)
            # the step's one wait for the device
            mean, grad_norm, *nats = torch.cat([torch.stack([total, norm]), sums]).tolist()
            skipped = not (math.isfinite(mean) and math.isfinite(grad_norm))
            if scaler.is_enabled() or not skipped:
                # an enabled scaler skips by itself when it saw an inf or nan
                scaler.step(self.optimizer)
                scaler.update()
            return mean, grad_norm, skipped, nats

        try:
            _in_memory(gradients, world, altered=False)
            if world.size > 1:
                world.sum_([total, sums, *map(_gradient, trained)])
            mean, grad_norm, skipped, nats = _in_memory(update, world, altered=True)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(batch.input_ids) for batch in rows)
        sources = self._means(rows, nats)
        return StepStats(mean, grad_norm, tokens, weight, skipped, measured.figures, sources)

    def _means(self, rows: Sequence[PackedBatch], nats: list[float]) -> dict[str, float]:
        """Mean nats per supervised token of each source that is in the rows."""
        counts = Counter[int]()
        for row in rows:
            if row.sources is not None:
                counts.update(row.sources[row.supervised].tolist())
        return {self.names[source]: nats[source] / counts[source] for source in sorted(counts)}

    def _measured(self, rows: Sequence[PackedBatch], world: World, micro_tokens: int) -> Weighed:
        """Pass 1 of a step on preference data; any others' rows as they are."""
        preference, autocast = self.preference, self.precision.autocast
        if preference is None:
            return Weighed(rows, 0.0, {})

        def measure() -> Tensor:
            return preference.nats(self.model, rows, autocast, world, micro_tokens)

        nats = _in_memory(measure, world, altered=False)
        world.sum_([nats])
        return preference.weighed(rows, nats.cpu())


def _gradient(parameter: Tensor) -> Tensor:
    """Its gradient, zeros on a rank without a row in this step."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _in_memory(work: Callable[[], Result], world: World, *, altered: bool) -> Result:
    """`work()`; out of memory on any rank becomes StepOutOfMemoryError on all of them, so that none
    waits for the others' gradients.
    """
    detail = ""
    try:
        result = work()
    except Exception as error:
        if not out_of_memory(error):
            raise
        detail = str(error).split("\n")[0] or type(error).__name__
    if world.any(bool(detail)):
        raise StepOutOfMemoryError(detail or "another rank", altered=altered)
    return result


def first_nonfinite(
    model: nn.Module, batch: PackedBatch, objective: Objective, precision: Precision
) -> str:
    """Name of the first module, in order of execution, whose output has an inf or nan for `batch`;
    else of the gradients; else "".
    """
    watched = {
        module: name
        for name, module in model.named_modules()
        # an adapted linear computes its base without calling it
        if hasattr(module, "lora_A") or not list(module.children())
    }
    nonfinite: list[str] = []

    def watch(module: nn.Module, _inputs: object, output: object) -> None:
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if not nonfinite and module in watched and not all(t.isfinite().all() for t in tensors):
            nonfinite.append(watched[module])

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(trained.values())).device
    with register_module_forward_hook(watch), precision.autocast():
        loss = objective(model, batch.to(device))
    if not nonfinite:
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None and not gradient.isfinite().all():
                return f"gradient of {name}"
    return next(iter(nonfinite), "")
