"""preference_loss, and the two-pass step of a tiny model, against TRL 1.16's own values and
gradients (`bench/preference_parity.py` wrote them); what the loss does at its edges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_learn_loss import FP32
from test_train_preference import pair_examples, step_gradients, step_rows, trainee
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from cllm.config import PreferenceConfig
from cllm.data.encode import IGNORE_INDEX, Example
from cllm.learn import preference_loss
from cllm.learn.dist import World
from cllm.learn.preference import LOSSES
from cllm.model.attention import register
from cllm.model.lora import inject_lora

TRL: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "preference_trl.json").read_text(encoding="utf-8")
)


def sums(log_probs: Tensor, mask: Tensor, ld_alpha: float) -> Tensor:
    counts = mask.sum(1)
    shared = torch.minimum(*counts.chunk(2)).repeat(2)[:, None]
    return (log_probs * torch.where(mask.cumsum(1) <= shared, 1.0, ld_alpha)).sum(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-5), ("float32", 1e-4)])
@pytest.mark.parametrize("case", TRL["cases"], ids=lambda case: case["loss"])
def test_values_and_gradients_are_trls(case: dict[str, Any], dtype: str, tolerance: float) -> None:
    mask = torch.tensor(TRL["mask"])
    log_probs, reference = (
        torch.tensor(TRL[name], dtype=getattr(torch, dtype)) for name in ("log_probs", "reference")
    )
    log_probs.requires_grad_()
    numbers = dict(case["settings"])
    ld_alpha = numbers.pop("ld_alpha", 1.0)
    answers = sums(log_probs, mask, ld_alpha).chunk(2)
    references = sums(reference, mask, ld_alpha).chunk(2)
    losses = preference_loss(
        *answers, *references, *mask.sum(1).chunk(2), loss=case["loss"], **numbers
    )
    assert losses.shape == answers[0].shape and losses.dtype == log_probs.dtype
    # KTO's mean is over votes, of which a pair has two
    loss = losses.mean() / (2 if case["loss"] == "apo_zero_unpaired" else 1)
    loss.backward()
    assert abs(loss.item() - case[dtype]["loss"]) < tolerance * max(1, abs(case[dtype]["loss"]))
    theirs = torch.tensor(case[dtype]["gradient"], dtype=log_probs.dtype)
    assert ((log_probs.grad - theirs) * mask).abs().max() < tolerance * theirs.abs().max()


def tiny_policy(dtype: torch.dtype, *, lora: bool) -> Any:
    """A Qwen2 of one layer as `seeded` 0 makes it, its adapters or all of it trained."""
    register()
    model: Any = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=24,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            attn_implementation="cllm",
        )
    )
    seeded(model, 1)
    if lora:
        inject_lora(model, rank=1, alpha=2)
    seeded(model.to(dtype), 0)
    return model.eval()


@torch.no_grad()
def seeded(model: Any, seed: int) -> None:
    """Fill what is trained with the same numbers on every machine."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1.6 * drawn - 0.8)


def token_pairs(prompt: int) -> list[Example]:
    """Five pairs of answers of unequal lengths to prompts of `prompt` tokens."""
    pairs = []
    for place, example in enumerate(pair_examples(5)):
        asked = [1 + place // 2] * prompt
        answer = [token % 24 for token in example.labels if token != IGNORE_INDEX]
        pairs.append(Example(asked + answer, [IGNORE_INDEX] * prompt + answer))
    return pairs


def our_step(
    settings: PreferenceConfig, prompt: int, dtype: torch.dtype, *, lora: bool
) -> tuple[float, Tensor]:
    """(loss, gradients) of the trainer's own step on packed rows, from the model of
    `seeded` 0 to that of `seeded` 2.
    """
    model = tiny_policy(dtype, lora=lora)
    rows = step_rows(token_pairs(prompt), 24)
    work = trainee(model, settings, torch.empty(0))
    nats = work.preference.nats(model, rows, FP32.autocast, World())  # type: ignore[union-attr]
    numbers = torch.cat([row.numbers for row in rows])  # type: ignore[misc]
    reference = torch.zeros(10, dtype=torch.float64).index_copy(0, numbers, -nats[0])
    seeded(model, 2)
    stats, gradient = step_gradients(model, trainee(model, settings, reference), rows)
    return stats.loss, gradient


@pytest.mark.parametrize("case", TRL["on_model"], ids=lambda case: case["settings"]["loss"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-5), ("float32", 1e-4)])
def test_a_step_of_a_model_is_trls(case: dict[str, Any], dtype: str, tolerance: float) -> None:
    settings = PreferenceConfig(**case["settings"])
    value, ours = our_step(settings, case["prompt"], getattr(torch, dtype), lora=True)
    theirs = torch.tensor(case["gradient"], dtype=torch.float64)
    assert value == pytest.approx(case["loss"], rel=tolerance)
    assert (ours.double() - theirs).abs().max() < tolerance * theirs.abs().max()


EDGES = [0.0, -1e-12, -1.0, -1e4, -1e30]


@settings(deadline=None)
@given(
    st.sampled_from(LOSSES),
    st.lists(st.tuples(*[st.sampled_from(EDGES)] * 4, *[st.integers(0, 9)] * 2), max_size=4),
    st.sampled_from([1e-3, 0.1, 10.0]),
)
def test_any_margin_is_finite_and_so_is_its_gradient(
    loss: str, pairs: list[tuple[float, ...]], beta: float
) -> None:
    # the square of IPO alone may leave float32
    columns = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 6).T
    columns.requires_grad_()
    losses = preference_loss(*columns, loss=loss, beta=beta)
    losses.sum().backward()
    assert losses.shape == (len(pairs),) and losses.isfinite().all()
    assert columns.grad[:4].isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"loss": "none"}, {"loss": "sigmoid"}, {"beta": 0.0}, {"label_smoothing": 0.5}]
)
def test_what_is_no_loss_is_refused(wrong: dict[str, Any]) -> None:
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match=str(*wrong.values())):
        preference_loss(*[zero] * 6, **{"loss": "robust", **wrong})


def test_label_smoothing_of_dpo_is_its_authors_not_trls() -> None:
    c, r, zero, one = torch.tensor([-3.0]), torch.tensor([-9.0]), torch.zeros(1), torch.ones(1)
    smoothed = preference_loss(c, r, zero, zero, one, one, loss="dpo", label_smoothing=0.2)
    margin = torch.tensor(0.6)
    assert smoothed.item() == pytest.approx(
        (0.8 * torch.log1p(torch.exp(-margin)) + 0.2 * torch.log1p(torch.exp(margin))).item()
    )
