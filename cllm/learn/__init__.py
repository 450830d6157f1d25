"""Training without a model zoo or a trainer class: loss, optimizer step, snapshots, log."""

from cllm.learn.loss import row_nll, sft_loss, token_nll

__all__ = ["row_nll", "sft_loss", "token_nll"]
