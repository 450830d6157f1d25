"""One optimizer step: AdamW over the adapters (32 or 8 bits), the learning rate as a pure function
of the step, the fp16 loss scaler.

Everything here is told what to do by plain values; the loop that calls it stands in `cllm.train`.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cllm.data.packing import PackedBatch
from cllm.learn.dist import World
from cllm.messages import UserError

Result = TypeVar("Result")
Objective = Callable[[nn.Module, PackedBatch], Tensor]
"""(model, row) -> summed loss, scalar float32."""


class StepStats(NamedTuple):
    """What one optimizer step did."""

    loss: float
    """Mean nats per supervised token of the whole step."""
    grad_norm: float
    """Euclidean norm of the adapter gradients before clipping."""
    tokens: int
    supervised_tokens: int
    skipped: bool
    """The loss or the gradient was not finite: nothing was updated (and an enabled scaler lowered
    its scale).
    """


class Precision(NamedTuple):
    """How numbers are held and multiplied: weights of the base, and whether fp16 autocast with a
    scaler is on.
    """

    name: str
    weights: torch.dtype
    device: str

    @classmethod
    def choose(cls, name: str, device: str) -> Precision:
        """ "auto": bf16 where the GPU computes in it, else fp16 with a scaler; float32 on the CPU.

        Raises UserError for bf16 on a card that only emulates it."""
        if name == "auto":
            name = (
                "fp32"
                if device == "cpu"
                else "bf16"
                if torch.cuda.is_bf16_supported(including_emulation=False)
                else "fp16"
            )
        if (
            name == "bf16"
            and device == "cuda"
            and not torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            raise UserError("memory.no_bf16")
        return cls(
            name,
            {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name],
            device,
        )

    def autocast(self) -> AbstractContextManager[object]:
        """fp16 runs under autocast; bf16 and fp32 need none, the adapters follow their input."""
        return (
            torch.autocast(self.device, dtype=torch.float16)
            if self.name == "fp16"
            else nullcontext()
        )

    def scaler(self) -> torch.amp.GradScaler:
        """A scaler that is switched on for fp16 only."""
        return torch.amp.GradScaler(self.device, enabled=self.name == "fp16")

    def prepare(self, model: Any) -> None:
        """fp16: keep the residual stream in float32, where 8-bit exponents of large activations
        would overflow.
        """
        if self.name == "fp16":
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.float()  # the CPU's takes weights of its input's dtype only
            model.get_input_embeddings().register_forward_hook(
                lambda _module, _inputs, output: output.float()
            )


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
def _dynamic_map(device: torch.device, signed: bool) -> Tensor:
    """(256,) ascending: 0, 1 and seven decades, each cut into twice as many even steps as the one
    below (a sign takes half of them).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, device="cpu")
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-value for value in middles if signed]
    return torch.tensor(sorted(values), device=device)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments are 8-bit codes of a dynamic map times the largest magnitude of their
    block of 256 (arXiv:2110.02861).

    2 + 8 / 256 bytes of state per parameter instead of 8, in plain PyTorch on every device.
    Parameters of fewer than 4,096 values keep float32 moments, as in bitsandbytes. Codes are the
    nearest ones, but a second moment above zero never becomes zero, since the first would then be
    divided by eps alone.
    """

    BLOCK, SMALL = 256, 4096

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(
            params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, size, (beta1, beta2), lr = (
            self.state[parameter],
            parameter.numel(),
            group["betas"],
            group["lr"],
        )
        flat = parameter.grad.float().flatten()  # type: ignore[union-attr]
        grad = nn.functional.pad(flat, (0, -size % self.BLOCK)).view(-1, self.BLOCK)
        if not state:
            state["step"] = torch.zeros(())
        state["step"] += 1
        count = state["step"].item()
        first = self._moment(state, "exp_avg", grad).mul_(beta1).add_(grad, alpha=1 - beta1)
        second = (
            self._moment(state, "exp_avg_sq", grad)
            .mul_(beta2)
            .addcmul_(grad, grad, value=1 - beta2)
        )
        divisor = (second.sqrt() / math.sqrt(1 - beta2**count)).add_(group["eps"])
        update = (first / divisor).flatten()[:size].view(parameter.shape)
        parameter.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr / (1 - beta1**count))
        for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            self._keep(state, name, moment, exact=size < self.SMALL)

    @staticmethod
    def _moment(state: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        """A moment as float32 (blocks, 256)."""
        if f"{name}_scale" not in state:
            return state.get(name, torch.zeros_like(like))
        table = _dynamic_map(like.device, signed=name == "exp_avg")
        return table[state[name].int()].mul_(state[f"{name}_scale"])

    @staticmethod
    def _keep(state: dict[str, Tensor], name: str, moment: Tensor, exact: bool) -> None:
        if exact:
            state[name] = moment
            return
        table = _dynamic_map(moment.device, signed=name == "exp_avg")
        scale = moment.abs().amax(1, keepdim=True)
        codes = torch.bucketize(
            moment / scale.clamp(min=1e-38), (table[1:] + table[:-1]) / 2, out_int32=True
        )
        if name == "exp_avg_sq":
            codes = codes.clamp_(min=1) * (moment > 0)
        state[name], state[f"{name}_scale"] = codes.to(torch.uint8), scale

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; the codes are bytes again (torch casts all state to the parameter's
        dtype).
        """
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({n: v.to(torch.uint8) for n, v in state.items() if f"{n}_scale" in state})


def make_optimizer(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    plus_ratio: float = 1.0,
    name: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), or name="adamw8bit", over what requires a gradient; LoRA+
    (arXiv:2402.12354): lora_B learns `plus_ratio` times faster.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast = [p for name, p in trained if name.endswith("lora_B")]
    slow = [p for name, p in trained if not name.endswith("lora_B")]
    groups = [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": plus_ratio}]
    groups = [g for g in groups if g["params"]]
    if name == "adamw8bit":
        return AdamW8bit(groups, lr, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


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


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device, or the host, has no memory left."""
    # The CPU's allocator and cuBLAS have no exception class of their own.
    said = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in said
    )


def train_step(
    model: nn.Module,
    batches: Sequence[PackedBatch],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    max_norm: float,
    world: World | None = None,
    seed: str = "",
    micro_tokens: int = sys.maxsize,
) -> StepStats:
    """One update from the rows of a step: the summed loss over all of them divided by their
    supervised tokens.

    So 1 x 8 rows equal 8 x 1, and row i, computed on rank i mod world, equals one rank. A row
    longer than `micro_tokens` is computed in parts. Dropout depends on (`seed`, i) only; without a
    seed it goes on from the generator's state. A step whose loss or gradient is not finite changes
    no parameter and is reported as skipped. Raises StepOutOfMemoryError, on every rank, if memory
    ran out on one.
    """
    world = world or World()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    weight = sum(batch.weight for batch in batches)
    total = torch.zeros((), device=trained[0].device)

    def gradients() -> None:
        for index in range(world.rank, len(batches), world.size):
            if seed:
                torch.manual_seed(random.Random(f"{seed}/{index}").getrandbits(63))
            for part in batches[index].split(micro_tokens):
                with precision.autocast():
                    loss = objective(model, part.to(total.device)) / max(1, weight)
                scaler.scale(loss).backward()
                total.add_(loss.detach())

    def update() -> tuple[float, float, bool]:
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, max_norm if max_norm > 0 else math.inf)
        mean, grad_norm = torch.stack([total, norm]).tolist()  # the step's one wait for the device
        skipped = not (math.isfinite(mean) and math.isfinite(grad_norm))
        if scaler.is_enabled() or not skipped:
            scaler.step(optimizer)  # an enabled scaler skips by itself when it saw an inf or nan
            scaler.update()
        return mean, grad_norm, skipped

    try:
        _in_memory(gradients, world, altered=False)
        if world.size > 1:
            for p in trained:  # a rank without a row in this step
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            world.sum_([total, *(p.grad for p in trained)])
        mean, grad_norm, skipped = _in_memory(update, world, altered=True)
    finally:
        optimizer.zero_grad(set_to_none=True)
    return StepStats(mean, grad_norm, sum(len(b.input_ids) for b in batches), weight, skipped)


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
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensors = [
                t
                for t in (output if isinstance(output, tuple) else [output])
                if isinstance(t, Tensor)
            ]
            if not found and any(
                not torch.isfinite(t).all() for t in tensors if t.is_floating_point()
            ):
                found.append(name)

        return hook

    def watched(module: nn.Module) -> bool:
        # an adapted linear computes its base without calling it
        return hasattr(module, "lora_A") or not list(module.children())

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if watched(module)
    ]
    device = next(p.device for p in model.parameters() if p.requires_grad)
    try:
        with precision.autocast():
            loss = objective(model, batch.to(device))
        if not found:
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            bad = (
                name
                for name, g in zip(named, gradients, strict=True)
                if g is not None and not torch.isfinite(g).all()
            )
            found += [f"gradient of {name}" for name in bad][:1]
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""
