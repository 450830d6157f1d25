"""What to set for the amount of data at hand, and in one line what a training came to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from cllm.config import ENOUGH_STEPS, TrainConfig
from cllm.messages import command, note, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cllm.corpus import Encoded
    from cllm.evaluate.results import Evaluation

FEW_STEPS = 50
FEW_CONVERSATIONS, MAX_EPOCHS = 500, 10
"""So few may be seen so often before they are learned by heart and nothing else is."""
FEW_RATE = 0.5
"""Of the formula's rate, for so few: at all of it the held-out loss turns within the first epoch or
two, and its lowest point is higher (`bench/advice_grid.py`).
"""
ROW_UNIT, MIN_ROW = 64, 128
HARDLY = 0.9
"""A loss above this share of the base's is not a fall worth the name."""
FULL_RATE, LORA_FACTOR, WIDTH = 5e-5, 10, 2000
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
WIDTHS = ("hidden_size", "n_embd", "d_model", "n_embed")
NARROWEST, TINY_RATE = 512, 5e-3
"""Narrower models are none that the formula says anything of; they take about so much."""
OTHER = 3
"""A rate so many times higher or lower than the advised one is worth a word."""
MOST_SEQUENCES = 32
"""A LoRA learns worse from more of them in a step ("LoRA Without Regret", Schulman et al. 2025)."""


class Rate(NamedTuple):
    """A learning rate for LoRA, and the family whose fit it is: "llama", "qwen", or "" for another
    one, which gets the lower of both.
    """

    value: float
    family: str
    hidden: int

    def of(self, *, few: bool) -> float:
        """For this amount of data: of few conversations FEW_RATE of it."""
        return float(f"{FEW_RATE * self.value:.2g}") if few else self.value


def advised_rate(original: Mapping[str, Any]) -> Rate | None:
    """The learning rate for a model by its config.json, 5e-5 * 10 * (2000 / hidden) ^ p: LoRA takes
    ten times the rate of full fine-tuning, p = 0.781 for Llama and 0.0775 for Qwen (fits of
    tinker-cookbook's `get_lr`, 2025), whatever the rank, at alpha = 32. None for tiny models.
    """
    hidden = width(original)
    if hidden < NARROWEST:
        return None
    kind = str(_text_part(original).get("model_type", "")).lower()
    family = next((name for name in EXPONENTS if kind.startswith(name)), "")
    fits = [EXPONENTS[family]] if family else EXPONENTS.values()
    rate = min(FULL_RATE * LORA_FACTOR * (WIDTH / hidden) ** exponent for exponent in fits)
    return Rate(float(f"{rate:.2g}"), family, hidden)


def width(original: Mapping[str, Any]) -> int:
    """The size of a hidden state by a config.json, 0 where it does not say."""
    sizes = _text_part(original)
    return next((int(sizes[name]) for name in WIDTHS if sizes.get(name)), 0)


def _text_part(original: Mapping[str, Any]) -> dict[str, Any]:
    return {**original, **(original.get("text_config") or {})}


def sized(train: TrainConfig, conversations: int, tokens: int, longest: int) -> TrainConfig:
    """`train` for so many conversations and tokens, so that there are ENOUGH_STEPS where that can
    be: more epochs, of few conversations up to MAX_EPOCHS, and packed rows that are shorter, but
    hold the longest conversation.
    """
    most = max(train.epochs, MAX_EPOCHS) if conversations < FEW_CONVERSATIONS else train.epochs
    wanted = int(tokens * most / ENOUGH_STEPS) // ROW_UNIT * ROW_UNIT
    shortest = math.ceil(max(longest, MIN_ROW) / ROW_UNIT) * ROW_UNIT
    row = min(train.row_tokens, max(wanted, shortest))
    epochs = min(most, max(train.epochs, math.ceil(ENOUGH_STEPS * row / max(1, tokens))))
    return replace(train, epochs=float(epochs), row_tokens=row, tokens_per_step=0, steps=0)


def more_steps(train: TrainConfig, encoded: Encoded, steps: int, words: Sequence[str]) -> str:
    """The command that trains as `words` did, with the settings that give more than `steps` of
    these data, "" where none do. Too few steps are said, unless `train.steps` asks for them.
    """
    count, sizes = len(encoded.train), encoded.rows.sizes
    tokens = sum(sizes)
    better = sized(train, count, tokens, max(sizes))
    names = ("epochs", "row_tokens", "tokens_per_step", "steps")
    values = {name: getattr(better, name) for name in names}
    changes = {f"train.{n}": f"{v:g}" for n, v in values.items() if v != getattr(train, n)}
    kept = [word for word in words if word.partition("=")[0] not in changes]
    helps = better.epochs * tokens / better.step_tokens(tokens) > steps
    more = command("train", *kept, *map("=".join, changes.items())) if helps else ""
    if steps < FEW_STEPS and not train.steps:
        facts = {"steps": steps, "count": count, "tokens": tokens}
        note("train.small" if more else "train.few", **facts, command=more)
    return more


def verdict(results: Evaluation, held_out: int, steps: int, more: str) -> str:
    """Whether the adapter is better than the base on data that it has not seen, which is claimed
    only where the 95 % intervals say so; `more`: the command that would give more steps.
    """
    if rates := results.preference:
        bounds = {"low": f"{rates['accuracy_low']:.0%}", "high": f"{rates['accuracy_high']:.0%}"}
        if rates["accuracy_low"] > 0.5:
            return say("train.preferred", accuracy=f"{rates['accuracy']:.0%}", **bounds)
    base, adapter = results.systems["base"], results.systems["adapter"]
    losses = {"before": f"{base.scores['loss']:.2f}", "after": f"{adapter.scores['loss']:.2f}"}
    gap = adapter.versus_base["loss"]
    facts = {**losses, "steps": steps, "count": held_out}
    if (gap.high or 0) < 0 and not rates:
        few = more and steps < FEW_STEPS
        return say("train.learning" if few else "train.learned", **facts, command=more)
    if (gap.low or 0) > 0 and not rates:
        return say("train.worse", **facts)
    little = adapter.scores["loss"] > HARDLY * base.scores["loss"]
    if more and steps < FEW_STEPS and (gap.p is not None or little):
        return say("train.unlearned", **facts, command=more)
    return say("train.few_held_out" if gap.p is None else "train.unclear", **facts)
