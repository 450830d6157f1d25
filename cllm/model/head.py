"""The output head of a causal LM: what turns its last hidden states into logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cllm.messages import UserError


class ScaledHead(nn.Module):
    """lm_head followed by what some architectures do to its logits: c tanh(x / c) (Gemma 2) or a
    factor (Granite, Cohere).
    """

    def __init__(self, head: nn.Module, softcap: float | None, factor: float) -> None:
        super().__init__()
        self.head = head
        self.softcap = softcap
        self.factor = factor

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden) * self.factor
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


def output_head(model: Any) -> nn.Module:
    """What turns the last hidden states of a Transformers model into its logits: the bare lm_head
    wherever that is the truth.
    """
    head: nn.Module = model.get_output_embeddings()
    config = model.config
    softcap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = getattr(config, "logit_scale", None) or 1.0 / divisor
    return head if softcap is None and factor == 1.0 else ScaledHead(head, softcap, factor)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raises UserError if the model's logits are not `output_head` of its last hidden states (its
    loss would be another one), or its code fails, as where it reads the weight of a linear itself.
    """
    was_training = model.training
    model.eval()  # dropout would make two passes differ
    # ids are read where the embedding lives, which may be host memory
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(1, 5, device=device)[None]
    try:
        output = model.base_model(input_ids=ids, use_cache=False)
        hidden = getattr(output, "last_hidden_state", None)
        logits = model(input_ids=ids, use_cache=False).logits.float()
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise UserError("train.code", architecture=type(model).__name__, detail=detail) from error
    model.train(was_training)
    if hidden is not None:
        difference = (output_head(model)(hidden).float() - logits).abs().max()
        # A base with NaN is told by the first step, with the module that it comes from.
        if (difference <= 0.01 * logits.abs().max()) | difference.isnan():
            return
    raise UserError("train.head", architecture=type(model).__name__)
