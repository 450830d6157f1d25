"""What is done to the logits before a token is drawn, and the log-probabilities that are told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_serve_engine import VOCAB, prompts, tiny_model

from cllm.messages import UserError
from cllm.serve.engine import Engine
from cllm.serve.sampling import Request, Sampling, sample

PROMPT = [3, 3, 7]
GENERATED = [5, 5, 5, 7, 9]
TABLE: list[tuple[dict[str, Any], dict[int, float]]] = [
    ({}, {}),
    ({"frequency_penalty": 0.5}, {5: -1.5, 7: -0.5, 9: -0.5}),
    ({"presence_penalty": 1.25}, {5: -1.25, 7: -1.25, 9: -1.25}),
    ({"frequency_penalty": -2.0, "presence_penalty": 0.5}, {5: 5.5, 7: 1.5, 9: 1.5}),
    ({"logit_bias": ((3, 4.0), (5, -100.0))}, {3: 4.0, 5: -100.0}),
    ({"logit_bias": ((5, 2.0),), "frequency_penalty": 1.0}, {5: -1.0, 7: -1.0, 9: -1.0}),
]


def row(**plan: Any) -> Request:
    """A request amid its answer."""
    request = Request(PROMPT, Sampling(**plan), 1)
    request.ids += GENERATED
    return request


def test_penalties_and_bias_are_openais_formula_and_stay_in_their_row() -> None:
    """logit -= count * frequency + (count > 0) * presence, over what was generated alone."""
    torch.manual_seed(0)
    before = torch.randn(len(TABLE), 12)
    logits = before.clone()
    sample(logits, [row(**plan) for plan, _ in TABLE])
    for i, (_, changed) in enumerate(TABLE):
        expected = before[i].clone()
        for id, change in changed.items():
            expected[id] += change
        assert torch.allclose(logits[i], expected, atol=1e-6), TABLE[i]


def test_a_bias_of_100_decides_and_of_minus_100_bans() -> None:
    engine = Engine(tiny_model())
    prompt = prompts([9])[0]
    only = Sampling(max_new_tokens=5, logit_bias=((17, 1000.0),))
    assert engine.generate([prompt], only) == [[17] * 5]
    free = engine.generate([prompt], Sampling(max_new_tokens=5))[0]
    banned = Sampling(max_new_tokens=5, logit_bias=tuple((id, -100.0) for id in set(free)))
    assert not set(engine.generate([prompt], banned)[0]) & set(free)


def test_penalties_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match="frequency_penalty = 3"):
        Sampling(frequency_penalty=3)


def test_logprobs_are_the_models_own_whatever_is_drawn() -> None:
    """Equal to a forward of Transformers to 1e-4; a row that does not ask has none."""
    model = tiny_model()
    engine = Engine(model, prefill_tokens=16)
    plans = [
        Sampling(max_new_tokens=12, logprobs=20, temperature=1.5, seed=1, frequency_penalty=1.0),
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=12, logprobs=0, logit_bias=((5, 3.0),)),
        Sampling(max_new_tokens=12, logprobs=3, temperature=1.0, seed=2, repetition_penalty=1.5),
    ]
    requests = [
        engine._row(prompt, plan, 1)
        for prompt, plan in zip(prompts([30, 8, 21, 40]), plans, strict=True)
    ]
    engine.waiting.extend(requests)
    while not all(request.finish_reason for request in requests):
        engine.step()
    assert requests[1].logprobs == []
    for request in (requests[0], *requests[2:]):
        with torch.no_grad():
            logits = model(torch.tensor([request.ids])).logits[0].float()
        expected = logits.log_softmax(-1)[request.prompt_tokens - 1 : -1]
        generated = request.ids[request.prompt_tokens :]
        assert len(request.logprobs) == len(generated) == 12
        for entry, id, values in zip(request.logprobs, generated, expected, strict=True):
            assert abs(entry.value - values[id].item()) < 1e-4
            top = values.topk(request.sampling.logprobs or 0)
            told = [value for _, value in entry.top]
            assert torch.allclose(torch.tensor(told), top.values, atol=1e-4)
            assert [id for id, _ in entry.top] == top.indices.tolist()


def test_the_most_likely_of_a_small_vocabulary_and_of_impossible_tokens() -> None:
    request = row(logprobs=20)
    sample(torch.tensor([[0.0, -math.inf, 1.0] + [-5.0] * 9]), [request])
    entry = request.logprobs[0]
    assert len(entry.top) == 12 and entry.top[-1] == (1, -9999.0)
    assert math.isclose(sum(math.exp(value) for _, value in entry.top), 1, abs_tol=1e-5)


def test_nothing_forbidden_is_drawn_by_rounding() -> None:
    """A random number next to 1 falls behind the last candidate."""
    request = row(temperature=1.0, seed=0, top_k=64)
    request.random.random = lambda: 1 - 2**-53  # type: ignore[method-assign]
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [4, 6]] = torch.tensor([1.0, 0.0])
    assert sample(logits, [request]) == [6]


def test_a_row_that_is_not_finite_ends_alone() -> None:
    """It used to fail the whole batch where it was drawn."""
    logits = torch.zeros(3, 12)
    logits[1] = math.nan
    logits[2, 4] = 50.0
    rows = [row(temperature=1.0), row(temperature=1.0), row(temperature=1.0)]
    tokens = sample(logits, rows)
    assert tokens[0] >= 0 and tokens[1:] == [-1, 4]
