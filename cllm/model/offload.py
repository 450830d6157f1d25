"""Gradient checkpointing of our own: a layer keeps its input only and is computed again in the backward.

Reference: Chen et al., arXiv:1604.06174; equal in gradients to `torch.utils.checkpoint`, dropout included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Checkpoint(torch.autograd.Function):
    """forward: run(hidden) without a graph. backward: the generators as they were, run again, differentiate."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], hidden: Tensor, *parameters: Tensor) -> Tensor:
        device = hidden.device.type
        ctx.run, ctx.parameters = run, parameters
        ctx.rng = torch.get_rng_state(), torch.cuda.get_rng_state(hidden.device) if device == "cuda" else None
        ctx.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.save_for_backward(hidden)
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        device, enabled, dtype = ctx.autocast
        cpu_state, cuda_state = ctx.rng
        with torch.random.fork_rng(devices=[hidden.device] if cuda_state is not None else []), torch.enable_grad():
            torch.set_rng_state(cpu_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state, hidden.device)
            inputs = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                output = ctx.run(inputs)
        wanted = [inputs, *ctx.parameters] if inputs.requires_grad else list(ctx.parameters)
        found = torch.autograd.grad(output, wanted, gradients[0], allow_unused=True)
        return (None, *found) if inputs.requires_grad else (None, None, *found)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers of a Transformers causal LM: the longest ModuleList of its base model."""
    base = getattr(model, "base_model", model)
    return max((m for m in base.children() if isinstance(m, nn.ModuleList)), key=len)


def checkpoint_layers(model: nn.Module, count: int = -1) -> int:
    """Recompute the first `count` decoder layers in the backward (-1: all, 0: none); returns how many. May be called again.

    The first layers are taken because their activations live longest. Inactive without gradients, so evaluation pays nothing.
    """
    layers = decoder_layers(model)
    chosen = len(layers) if count < 0 else min(count, len(layers))
    for index, layer in enumerate(layers):
        layer.__dict__.pop("forward", None)
        if index < chosen:
            layer.forward = _checkpointed(layer, layer.forward)
    return chosen


def _checkpointed(layer: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parameters = [p for p in layer.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not (parameters or hidden_states.requires_grad):
            return forward(hidden_states, *args, **kwargs)
        again = lambda hidden: forward(hidden, *args, **kwargs)  # noqa: E731
        output: Tensor = _Checkpoint.apply(again, hidden_states, *parameters)  # type: ignore[no-untyped-call]
        return output

    return run
