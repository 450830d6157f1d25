"""Losses on pairs of answers, and the two-pass step that gives them SFT's peak.

Pass 1, without gradient, gives every answer's log-probability; the loss's derivative by each of
them is what its tokens weigh in pass 2, an SFT step on the same rows (GradCache, arXiv:2101.06983,
for a loss over summed log-probabilities: the gradient is the one-pass gradient).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.config import PreferenceConfig
from cllm.data.packing import PackedBatch
from cllm.learn.dist import World
from cllm.model.device import device_of

LOSSES = get_args(get_type_hints(PreferenceConfig)["loss"])[1:]  # all but "none"
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


@dataclass(frozen=True)
class Weighed:
    """A step's rows for pass 2, and what pass 1 has seen."""

    rows: Sequence[PackedBatch]
    loss: float
    figures: dict[str, float]
    conversations: int = 0


@dataclass(frozen=True)
class Preference:
    """What the rows of a step weigh: pass 1 of two."""

    settings: PreferenceConfig
    reference: Tensor
    """(answers,) float64 in host memory, by PackedBatch.numbers: log-probability of each answer
    under the policy at step 0, with [preference]'s `ld_alpha`.
    """
    token_nll: Callable[[nn.Module, PackedBatch], Tensor]
    """(model, row) -> (T,) nats, 0 where nothing is trained."""

    @torch.no_grad()
    def nats(
        self,
        model: nn.Module,
        rows: Sequence[PackedBatch],
        autocast: Callable[[], AbstractContextManager[Any]],
        world: World,
        micro_tokens: int = sys.maxsize,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """(2, N) float64: summed nats of each sequence of the rows in order, with what is beyond
        the shorter answer's length times `ld_alpha` (arXiv:2409.06411), and plain.

        Row i is computed on rank i mod world; the others' columns are 0 here. `progress(done, of
        how many)` is called for each of its sequences.
        """
        device, column = device_of(model), 0
        sizes = [len(row.cu_seqlens) - 1 for row in rows]
        sums = torch.zeros(2, sum(sizes), dtype=torch.float64, device=device)
        for index, (row, shared) in enumerate(zip(rows, _shared(rows).split(sizes), strict=True)):
            if index % world.size != world.rank:
                column += sizes[index]
                continue
            one = torch.ones(sizes[index])
            tempered = _weigh(row, one, 0 * one, shared, self.settings.ld_alpha)
            for part in tempered.split(micro_tokens):
                lengths = part.cu_seqlens.diff().tolist()
                part = part.to(device)
                with autocast():
                    nll = self.token_nll(model, part).double()
                weighed = nll if part.weights is None else nll * part.weights
                for pair in zip(weighed.split(lengths), nll.split(lengths), strict=True):
                    sums[:, column] = torch.stack([values.sum() for values in pair])
                    column += 1
                    if progress:
                        progress(column, len(sums[0]))
        return sums

    def weighed(self, rows: Sequence[PackedBatch], nats: Tensor) -> Weighed:
        """The rows with the loss's derivative by each token as its weight; `nats` from the
        method of that name, of all ranks, in host memory.

        The loss is the mean over conversations, plus `sft` times the chosen answers' mean per
        token. A vote on a single answer counts only its own half of `apo_zero_unpaired`.
        """
        settings = self.settings
        numbers = _numbers(rows)
        conversations, place = (numbers // 2).unique(return_inverse=True)
        tokens = torch.cat([_tokens(row)[1] for row in rows])

        def table(values: Tensor) -> Tensor:
            cells = torch.zeros(len(conversations), 2, dtype=torch.float64)
            cells[place, numbers % 2] = values.double()
            return cells

        policy, reference, lengths = table(-nats[0]), table(self.reference[numbers]), table(tokens)
        with torch.enable_grad():
            losses = preference_loss(
                *policy.requires_grad_().T,
                *reference.T,
                *lengths.T,
                loss=settings.loss,
                beta=settings.beta,
                label_smoothing=settings.label_smoothing,
                gamma=settings.gamma,
            )
            (gradient,) = torch.autograd.grad(losses.mean(), policy)
        policy = policy.detach()
        chosen = numbers % 2 == 0
        sft = settings.sft / max(1, int(tokens[chosen].sum()))
        sizes = [len(row.cu_seqlens) - 1 for row in rows]
        weights = -gradient[place, numbers % 2]
        parts = (part.split(sizes) for part in (weights, sft * chosen, _shared(rows)))
        weighed = [
            _weigh(row, weight, plain, shared, settings.ld_alpha)
            for row, weight, plain, shared in zip(rows, *parts, strict=True)
        ]
        # the half of a vote that was not cast says 1/2 and has no gradient
        loss = losses.detach().mean() - (lengths == 0).sum() / 2 / len(losses)
        loss += sft * nats[1][chosen].sum()
        return Weighed(weighed, float(loss), self._figures(policy, reference, lengths), len(losses))

    def _figures(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> dict[str, float]:
        """What is logged of (conversations, 2) tables: log-probabilities in nats, lengths in
        tokens, rewards beta (log p - log p_ref) or without a reference beta log p / tokens.

        kl: e^d - 1 - d, d = log(p_ref / p) per token, over the answers (Schulman's k3 on the data's
        own answers): how far the model has gone.
        """
        present, per_token = lengths > 0, lengths.clamp(min=1)
        gone = policy - reference
        free = self.settings.loss in REFERENCE_FREE
        rewards = self.settings.beta * (policy / per_token if free else gone)
        margins = rewards[:, 0] - rewards[:, 1]
        d = -(gone / per_token)[present]
        means = {
            f"{side}_{name}": values[:, column][present[:, column]].mean()
            for name, values in (("logp", policy), ("reward", rewards), ("tokens", lengths))
            for column, side in enumerate(("chosen", "rejected"))
            if present[:, column].any()
        }
        figures = {
            "margin": margins.mean(),
            "accuracy": (margins > 0).double().mean(),
            **means,
            "kl": (d.exp() - 1 - d).mean(),
        }
        return {name: float(value) for name, value in figures.items()}


def _numbers(rows: Sequence[PackedBatch]) -> Tensor:
    return torch.cat([row.numbers for row in rows if row.numbers is not None])


def _tokens(row: PackedBatch) -> tuple[Tensor, Tensor]:
    """(which sequence each supervised position is in, how many each sequence has)."""
    sequence = torch.bucketize(row.supervised, row.cu_seqlens[1:].long(), right=True)
    return sequence, torch.bincount(sequence, minlength=len(row.cu_seqlens) - 1)


def _shared(rows: Sequence[PackedBatch]) -> Tensor:
    """(N,) of every sequence of the rows: tokens of its conversation's shorter answer."""
    tokens = torch.cat([_tokens(row)[1] for row in rows])
    _, place = (_numbers(rows) // 2).unique(return_inverse=True)
    shortest = torch.full((len(tokens),), sys.maxsize)
    return shortest.scatter_reduce(0, place, tokens, "amin")[place]


def _weigh(
    row: PackedBatch, weight: Tensor, plain: Tensor, shared: Tensor, ld_alpha: float
) -> PackedBatch:
    """The row with `weight` (N,) at each sequence's first `shared` tokens, `ld_alpha` times it at
    the others, and `plain` (N,) added to both.
    """
    sequence, tokens = _tokens(row)
    rank = torch.arange(len(sequence)) - (tokens.cumsum(0) - tokens)[sequence]
    share = torch.where(rank < shared[sequence], 1.0, ld_alpha)
    weights = torch.zeros(len(row.labels))
    weights[row.supervised] = (weight[sequence] * share + plain[sequence]).float()
    return replace(row, weights=weights)
