"""One request to the engine: how its answer is sampled, where its ids go, and the next id from
logits.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cllm.messages import UserError
from cllm.serve.grammar import Grammar

MAX_TOP_K = 1024
LIMITS = {
    "max_new_tokens": (1, 2**31),
    "temperature": (0, 10),
    "top_p": (1e-6, 1),
    "top_k": (1, MAX_TOP_K),
    "min_p": (0, 1),
    "repetition_penalty": (0.1, 10),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "strength": (0, 2),
}
Listener = Callable[[int | None], None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row is continued. Order as in vLLM: grammar, logit bias, repetition penalty,
    frequency and presence penalty, temperature, top-k, top-p, min-p.

    `temperature` 0 is greedy. Candidates are always the `top_k` (1 … 1024) most likely tokens, with
    their probabilities renormalised; then the smallest set whose probability reaches `top_p`
    (nucleus sampling, arXiv:1904.09751); then those with at least `min_p` times the best one's
    probability (arXiv:2407.01082). `repetition_penalty` is CTRL's (arXiv:1909.05858), over the
    prompt too; the next two are OpenAI's, over the c times that a token was generated: logit -= c *
    frequency_penalty + (c > 0) * presence_penalty. `logit_bias` is added to the logits of its ids.
    `logprobs` asks for the log-probabilities of each token and of so many of the most likely ones,
    by the model's own distribution, before all of this. `seed` None draws one. `stop_ids` None
    means the engine's; the empty set never stops early. `strength` is the adapter's, as in
    `cllm.model.lora.Gate`. Raises UserError naming every value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 64
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    seed: int | None = None
    stop_ids: frozenset[int] | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        wrong = [
            f"{key} = {value} ({low} … {high})"
            for key, (low, high) in LIMITS.items()
            if not low <= (value := getattr(self, key)) <= high
        ]
        if wrong:
            raise UserError("serve.sampling", problems="; ".join(wrong))


class Logprob(NamedTuple):
    """The natural logarithm of a token's probability, and the most likely ids with theirs."""

    value: float
    top: list[tuple[int, float]]


class Request:
    """One request and the token ids of its answer: iterate over it in any thread. Stop ids are not
    among them. `logprobs`, if asked for, has the entry of an id before the id comes.

    With `listener`, every id and finally None go to that function instead, called in the engine's
    thread. After the end `finish_reason` is "stop", "length", "cancelled" or "error" (then `error`
    says why).
    """

    def __init__(
        self, prompt: list[int], sampling: Sampling, adapter: int, listener: Listener | None = None
    ) -> None:
        # `ids` is the prompt and what was generated; while decoding, the last of them is not in the
        # cache yet.
        self.ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self.sampling = sampling
        self.adapter = adapter
        self.random = random.Random(sampling.seed)
        self.grammar = sampling.grammar.start() if sampling.grammar else None
        self.logprobs: list[Logprob] = []
        self.created = time.perf_counter()
        self.finish_reason = ""
        self.error = ""
        self.cancelled = False
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.put = listener or self._queue.put

    def __iter__(self) -> Iterator[int]:
        return iter(self._queue.get, None)

    def cancel(self) -> None:
        """Free the row before the next step; may be called from any thread, also after the end."""
        self.cancelled = True

    def finish(self, reason: str, error: str = "") -> None:
        """Called by the engine, once."""
        self.finish_reason, self.error = reason, error
        self.put(None)

    @property
    def remaining(self) -> int:
        """How many ids may still come."""
        return self.sampling.max_new_tokens - (len(self.ids) - self.prompt_tokens)


def sample(logits: Tensor, rows: Sequence[Request]) -> list[int]:
    """The next token of every row from logits (B, V), which are overwritten; -1 where they are not
    finite.
    """
    asked = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    logprobs = logits[asked].log_softmax(-1).clamp(min=-9999) if asked else logits[:0]
    for scores, row in zip(logits, rows, strict=True):
        _adjust(scores, row)
    best = logits.max(dim=-1)
    tokens = best.indices
    if drawn := [i for i, row in enumerate(rows) if row.sampling.temperature > 0]:
        tokens[drawn] = _draw(logits[drawn], [rows[i] for i in drawn])
    ids: list[int] = torch.where(best.values.isfinite(), tokens, -1).tolist()
    for i, values in zip(asked, logprobs, strict=True):
        top = values.topk(min(rows[i].sampling.logprobs or 0, len(values)))
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        rows[i].logprobs.append(Logprob(values[ids[i]].item(), pairs))
    for row, id in zip(rows, ids, strict=True):
        if row.grammar and id >= 0:
            row.grammar.advance(id)
    return ids


def _adjust(logits: Tensor, row: Request) -> None:
    """Everything before the temperature, to one row's logits (V,)."""
    plan = row.sampling
    if row.grammar:
        row.grammar.mask(logits)
    if plan.logit_bias:
        biased, bias = zip(*plan.logit_bias, strict=True)
        logits[list(biased)] += torch.tensor(bias, device=logits.device)
    if plan.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.ids)), device=logits.device)
        score = logits[seen]
        logits[seen] = torch.where(
            score > 0, score / plan.repetition_penalty, score * plan.repetition_penalty
        )
    if plan.frequency_penalty or plan.presence_penalty:
        generated = torch.tensor(row.ids[row.prompt_tokens :], dtype=torch.long)
        used, counts = generated.unique(return_counts=True)
        penalty = counts * plan.frequency_penalty + plan.presence_penalty
        logits[used.to(logits.device)] -= penalty.to(logits.device)


def _draw(logits: Tensor, rows: Sequence[Request]) -> Tensor:
    """One token per row (S,) by inverting the cumulative distribution of its candidates at the
    row's own random number.

    Only the top-k are sorted: sorting 16 x 262,144 logits takes 400 ms on a CPU, `topk(64)` 8 ms.
    """
    plans = [row.sampling for row in rows]
    settings = [
        [s.temperature, s.top_p, s.top_k, s.min_p, row.random.random()]
        for s, row in zip(plans, rows, strict=True)
    ]
    temperature, top_p, top_k, min_p, point = torch.tensor(settings, device=logits.device).T[
        ..., None
    ]
    values, candidates = logits.topk(min(logits.shape[-1], max(s.top_k for s in plans)))
    scores = (values - values[:, :1]) / temperature.clamp(min=1e-4)
    scores = scores.masked_fill(
        torch.arange(values.shape[1], device=logits.device) >= top_k, float("-inf")
    )
    probabilities = torch.softmax(scores, dim=-1)
    more_likely = probabilities.cumsum(-1) - probabilities
    kept = (more_likely < top_p) & (probabilities >= min_p * probabilities[:, :1])
    kept &= probabilities > 0  # rounding must not draw what a grammar forbids
    cumulative = (probabilities * kept).cumsum(-1)
    index = torch.searchsorted(cumulative, point * cumulative[:, -1:], right=True)
    last = (kept.sum(-1, keepdim=True) - 1).clamp(min=0)  # nothing is kept of a row of NaN
    return candidates.gather(1, index.clamp(max=last))[:, 0]
