"""Training without a model zoo or a trainer class: loss, optimizer step, snapshots, log."""

from cllm.learn.loss import row_nll, sft_loss, token_nll
from cllm.learn.preference import preference_loss

__all__ = ["preference_loss", "row_nll", "sft_loss", "token_nll"]
