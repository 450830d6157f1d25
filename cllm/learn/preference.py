"""Losses on pairs of answers, and the two-pass step that gives them SFT's peak.

Pass 1, without gradient, gives every answer's log-probability; the loss's derivative by each of
them is what its tokens weigh in pass 2, an SFT step on the same rows (GradCache, arXiv:2101.06983,
for a loss over summed log-probabilities: the gradient is the one-pass gradient).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("dpo", "ipo", "robust", "hinge", "orpo", "simpo", "apo_zero_unpaired")
REFERENCE_FREE = ("orpo", "simpo")


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    loss: str,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
) -> Tensor:
    """One loss per pair, (N,), of summed answer log-probabilities c, r in nats under the policy and
    c0, r0 under the reference, and token counts |c|, |r|; all (N,). No token at all counts as one.

    With a = c - c0, b = r - r0, D = a - b, s the logistic function and e = label_smoothing:

    dpo     -(1-e) log s(beta D) - e log s(-beta D)     arXiv:2305.18290 (7); e: its authors'
            conservative DPO (TRL ignores e here)
    ipo     (a/|c| - b/|r| - 1/(2 beta))^2              arXiv:2310.12036 (17), with token means as
            TRL and LLaMA-Factory, where the authors' own code sums
    robust  [-(1-e) log s(beta D) + e log s(-beta D)] / (1-2e)          arXiv:2403.00409 (8)
    hinge   max(0, 1 - beta D)                          arXiv:2305.10425 (7)
    orpo    -beta log s(log odds(c/|c|) - log odds(r/|r|)), log odds(x) = x - log(1 - e^x)
            arXiv:2403.07691 (4), (7) without its SFT term
    simpo   -log s(beta (c/|c| - r/|r|) - gamma)        arXiv:2405.14734 (6)
    apo_zero_unpaired   [1 - s(beta a)] + s(beta b)     arXiv:2408.06266 (7): two votes, summed

    Raises ValueError for another `loss`, for beta <= 0 and for label_smoothing outside [0, 0.5).
    """
    if loss not in LOSSES:
        raise ValueError(f"preference loss {loss!r}, expected one of {', '.join(LOSSES)}")
    if not beta > 0:
        raise ValueError(f"beta = {beta}, expected more than 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {label_smoothing}, expected 0 <= … < 0.5")
    a, b = chosen - reference_chosen, rejected - reference_rejected
    lengths = chosen_tokens.clamp(min=1), rejected_tokens.clamp(min=1)
    margin = beta * (a - b)
    if loss == "hinge":
        return torch.relu(1 - margin)
    if loss == "ipo":
        return (a / lengths[0] - b / lengths[1] - 1 / (2 * beta)) ** 2
    if loss == "apo_zero_unpaired":
        return torch.sigmoid(-beta * a) + torch.sigmoid(beta * b)
    if loss == "simpo":
        return -F.logsigmoid(beta * (chosen / lengths[0] - rejected / lengths[1]) - gamma)
    if loss == "orpo":
        odds = _log_odds(chosen / lengths[0]) - _log_odds(rejected / lengths[1])
        return -beta * F.logsigmoid(odds)
    kept = -(1 - label_smoothing) * F.logsigmoid(margin)
    flipped = -label_smoothing * F.logsigmoid(-margin)
    return kept + flipped if loss == "dpo" else (kept - flipped) / (1 - 2 * label_smoothing)


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^mean; a certain answer's stays finite."""
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - torch.log(-torch.expm1(mean))
