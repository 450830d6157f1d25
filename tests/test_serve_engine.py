"""The engine's promise: whatever the batch, every request gets what it would have got alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cllm.messages import UserError
from cllm.model.adapter import load_adapter, load_beside, save_adapter
from cllm.model.attention import ATTENTION, register
from cllm.model.lora import Gate, gates, inject_lora, lora_layers, merge_lora
from cllm.serve.engine import Engine
from cllm.serve.sampling import Sampling

VOCAB = 211
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen3": COMMON,
    "glm": COMMON,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
    "gemma3_text": COMMON
    | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


def tiny_model(name: str = "llama", *, adapter: bool = True) -> Any:
    """A random model whose logits are far apart, so that greedy answers do not hang on rounding."""
    register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[name](**SHAPES[name]), attn_implementation=ATTENTION
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    if adapter:
        for layer in inject_lora(model, rank=4, alpha=8).values():
            torch.nn.init.normal_(layer.lora_B, std=0.3)
    return model.eval()


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def alone(
    model: Any, prompt: list[int], new_tokens: int, *, adapter: bool = True, **options: Any
) -> list[int]:
    first = gates(model).get(1, Gate())
    first.rows = None if adapter else 0.0
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
    )
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        generation_config=settings,
    )
    first.rows = None
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_staggered_mixed_requests_equal_sequential_generate(name: str) -> None:
    model = tiny_model(name)
    lengths = [5, 700, 17, 64, 33, 300, 8, 120, 5, 41, 250, 19, 77, 6, 150, 28]
    budgets = [24, 9, 40, 12, 30, 10, 26, 14, 3, 22, 11, 35, 16, 31, 13, 1]
    requests = list(zip(prompts(lengths), budgets, [i % 3 != 0 for i in range(16)], strict=True))
    engine = Engine(model, prefill_tokens=128)
    streams = []
    rows_seen = 0
    # one more request every second step, in the midst of the others' decoding
    for prompt, budget, adapter in requests:
        row = engine._row(prompt, Sampling(max_new_tokens=budget), adapter)
        engine.waiting.append(row)
        streams.append(row)
        engine.step()
        engine.step()
        rows_seen = max(rows_seen, len(engine.batch.rows))
    while engine.batch.rows or engine.prefill or engine.waiting:
        engine.step()
        rows_seen = max(rows_seen, len(engine.batch.rows))
    assert rows_seen >= 8
    for stream, (prompt, budget, adapter) in zip(streams, requests, strict=True):
        expected = alone(model, prompt, budget, adapter=adapter)
        assert list(stream) == expected, (name, len(prompt), adapter)
        assert stream.finish_reason == "length"
    assert any(alone(model, p, 8) != alone(model, p, 8, adapter=False) for p, _, _ in requests[:4])


def test_generate_keeps_order_and_stop_ids_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model().train()
    batch = prompts([30, 4, 90, 12, 55, 7])
    free = Engine(model).generate(batch, Sampling(max_new_tokens=20))
    stop = free[2][6]
    seen: list[tuple[int, int]] = []
    engine = Engine(model, stop_ids=frozenset({stop}))
    stopped = engine.generate(
        batch, Sampling(max_new_tokens=20), progress=lambda *done: seen.append(done)
    )
    assert stopped == [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert engine.generate(batch, Sampling(max_new_tokens=20, stop_ids=frozenset())) == free
    assert seen[-1] == (6, 6) and seen == sorted(seen)
    gates = [True, False, True, False, True, False]
    model.eval()
    expected = [alone(model, p, 20, adapter=gate) for p, gate in zip(batch, gates, strict=True)]
    assert Engine(model).generate(batch, Sampling(max_new_tokens=20), gates) == expected
    model.train()
    engine.generate(batch[:1], Sampling(max_new_tokens=2))
    assert all(module.training for module in model.modules())
    assert {id(layer.gate) for layer in lora_layers(model).values()} == {
        id(engine.gates[1])
    } and engine.gates[1].rows is None
    assert Engine(model).generate([], Sampling()) == []


@pytest.mark.parametrize("name", SHAPES)
def test_the_head_sees_whole_rows_of_the_last_positions_only(name: str) -> None:
    """Of a slice of several rows, PyTorch multiplies each with its own copy of the head (bf16 on a
    CPU: a thousand times as slow).
    """
    model, seen = tiny_model(name), []
    model.lm_head.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].is_contiguous(), tuple(inputs[0].shape)))
    )
    Engine(model, stop_ids=frozenset(), pad_id=0).generate(
        [[3, 4, 5, 6], [7, 8], [9] * 6], Sampling(max_new_tokens=3)
    )
    assert seen and all(whole and shape[1] == 1 for whole, shape in seen)


def test_keys_and_values_are_kept_as_attention_computes_them() -> None:
    """A model in float32 under autocast, as on cards without bf16."""
    engine = Engine(
        tiny_model(adapter=False),
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        stop_ids=frozenset(),
    )
    engine.waiting.append(engine._row(prompts([5])[0], Sampling(max_new_tokens=4), 0))
    engine.step()
    layers: Any = engine.batch.cache.layers
    assert {buffer.dtype for layer in layers for buffer in layer.buffers} == {torch.bfloat16}


def test_a_small_budget_preempts_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    batch = prompts([20, 35, 8, 50, 13, 28])
    sampling = Sampling(max_new_tokens=40)
    roomy = Engine(model)
    expected = roomy.generate(batch, sampling)
    monkeypatch.setattr("cllm.serve.engine.HEADROOM_TOKENS", 4)
    tight = Engine(model, kv_tokens=3 * (60 + roomy.row_tokens))
    prefilled: list[int] = []
    new_batch = tight._new_batch
    monkeypatch.setattr(
        tight, "_new_batch", lambda rows: prefilled.append(len(rows)) or new_batch(rows)
    )
    assert tight.generate(batch, sampling) == expected
    assert sum(prefilled) > len(batch)


def test_sampled_rows_do_not_depend_on_their_neighbours() -> None:
    model = tiny_model()
    batch = prompts([20, 35, 8, 50])
    sampling = Sampling(
        max_new_tokens=15,
        temperature=1.0,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        seed=7,
    )
    together = Engine(model).generate(batch, sampling)
    for i, prompt in enumerate(batch):
        single = Sampling(
            max_new_tokens=15,
            temperature=1.0,
            top_k=20,
            top_p=0.9,
            min_p=0.01,
            repetition_penalty=1.1,
            seed=7 + i,
        )
        assert Engine(model).generate([prompt], single) == [together[i]]
    other = Engine(model).generate(batch, Sampling(max_new_tokens=15, temperature=1.0, seed=8))
    assert other != together


def test_sampling_follows_transformers_distribution() -> None:
    """Frequencies of 4,000 draws against the probabilities that Transformers' own processors
    leave.
    """
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    from cllm.serve.sampling import Request, sample

    torch.manual_seed(1)
    logits = torch.randn(1, 50) * 2
    ids = logits[0].topk(3).indices.tolist()
    cases = [
        Sampling(temperature=0.7, top_k=10),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=1.2, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    ]
    for case in cases:
        chain = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(case.repetition_penalty),
                TemperatureLogitsWarper(case.temperature),
                TopKLogitsWarper(case.top_k),
                TopPLogitsWarper(case.top_p),
                MinPLogitsWarper(case.min_p),
            ]
        )
        expected = torch.softmax(chain(torch.tensor([ids]), logits.clone())[0], dim=-1)
        rows = [Request(ids, case, True) for _ in range(4000)]
        drawn = (
            torch.bincount(torch.tensor(sample(logits.repeat(4000, 1), rows)), minlength=50) / 4000
        )
        assert (drawn[expected == 0] == 0).all(), case
        assert (drawn - expected).abs().max() < 0.03, (case, (drawn - expected).abs().max())
    assert sample(torch.tensor([[0.0, float("nan")]]), [Request([0], Sampling(), True)]) == [-1]


def test_submit_streams_from_the_thread_and_cancel_frees_the_row() -> None:
    model = tiny_model()
    engine = Engine(model)
    first, second, third = prompts([6, 40, 9])
    expected = alone(model, second, 12, adapter=False), alone(model, third, 10)
    heard: list[int | None] = []
    ended = threading.Event()

    def listen(token: int | None) -> None:
        heard.append(token)
        if token is None:
            ended.set()

    endless = engine.submit(first, Sampling(max_new_tokens=900))
    listening = engine.submit(second, Sampling(max_new_tokens=12), False, listen)
    answer = list(engine.submit(third, Sampling(max_new_tokens=10)))
    assert ended.wait(20) and heard == [*expected[0], None]
    assert listening.finish_reason == "length"
    assert answer == expected[1]
    # while the thread runs
    assert engine.generate([third], Sampling(max_new_tokens=10)) == [answer]
    endless.cancel()
    received = list(endless)
    assert endless.finish_reason == "cancelled" and len(received) < 900
    assert (
        engine.stats()["running"] == 0
        and engine.stats()["waiting"] == 0
        and not engine.batch.cache.layers
    )
    running = engine.submit(first, Sampling(max_new_tokens=900))
    engine.close()
    list(running)
    assert running.finish_reason == "cancelled"
    late = engine.submit(first, Sampling())
    assert list(late) == [] and late.finish_reason == "cancelled"


def test_a_failure_ends_what_runs_and_the_engine_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model()
    engine = Engine(model)
    forward, calls = model.forward, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("device lost")
        return forward(*args, **kwargs)

    model.forward = failing
    stream = engine.submit(prompts([5])[0], Sampling(max_new_tokens=50))
    assert len(list(stream)) == 3
    assert stream.finish_reason == "error" and "device lost" in stream.error
    assert engine.stats()["healthy"] is False and "device lost" in capsys.readouterr().err
    assert len(list(engine.submit(prompts([5])[0], Sampling(max_new_tokens=50)))) == 50
    assert engine.stats()["healthy"] is True
    engine.close()
    calls.clear()
    with pytest.raises(RuntimeError, match="device lost"):
        Engine(model).generate(prompts([5, 6]), Sampling(max_new_tokens=50))


def test_out_of_memory_halves_the_budget_and_loses_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model()
    batch, sampling = prompts([20, 35, 8, 50]), Sampling(max_new_tokens=20)
    expected = Engine(model).generate(batch, sampling)
    forward = model.forward

    def limited(**kwargs: Any) -> Any:
        if kwargs["attention_mask"].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**kwargs)

    model.forward = limited
    limit = 150
    engine = Engine(model, kv_tokens=4000)
    assert engine.generate(batch, sampling) == expected
    assert engine.kv_tokens < 4000 and "out of memory" in capsys.readouterr().err
    limit = 30
    with pytest.raises(RuntimeError, match="not enough memory"):
        Engine(model).generate(batch, sampling)


def test_requests_that_cannot_run_are_refused() -> None:
    engine = Engine(tiny_model())
    with pytest.raises(UserError, match="empty"):
        engine.submit([], Sampling())
    with pytest.raises(UserError, match="1024"):
        engine.generate([[1] * 5, [1] * 1024], Sampling())
    assert not engine.waiting
    # up to the model's last position
    assert len(engine.generate([[1] * 1020], Sampling(max_new_tokens=50))[0]) == 4
    with pytest.raises(UserError) as caught:
        Sampling(max_new_tokens=0, temperature=-1, top_p=0, top_k=0, min_p=2, repetition_penalty=0)
    assert all(
        key in str(caught.value)
        for key in (
            "max_new_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
        )
    )


def test_recurrent_models_run_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    register()
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen3_5ForCausalLM._from_config(config, attn_implementation=ATTENTION).eval()
    engine = Engine(model, prefill_tokens=16)
    assert "Qwen3_5ForCausalLM" in capsys.readouterr().err
    batch = prompts([20, 5, 40])
    assert engine.generate(batch, Sampling(max_new_tokens=8)) == [alone(model, p, 8) for p in batch]


def test_two_engines_on_one_model_do_not_disturb_each_others_gate() -> None:
    model = tiny_model()
    asked = prompts([9, 9, 9, 9])
    expected = {
        adapter: [alone(model, prompt, 40, adapter=adapter) for prompt in asked]
        for adapter in (True, False)
    }
    serving, other = Engine(model), Engine(model)
    streams = [serving.submit(prompt, Sampling(max_new_tokens=40)) for prompt in asked]
    try:
        assert other.generate(asked, Sampling(max_new_tokens=40), adapter=False) == expected[False]
        assert [list(stream) for stream in streams] == expected[True]
    finally:
        serving.close()


def test_rows_of_a_batch_have_strengths_of_their_own() -> None:
    """Each answers as alone in a model into which the adapter was merged at that strength."""
    asked = prompts([9, 30, 5, 17, 12])
    strengths = [0.0, 0.4, 1.0, 1.7, 0.4]
    plans = [Sampling(max_new_tokens=16, strength=strength) for strength in strengths]
    together = Engine(tiny_model()).generate(asked, plans)
    for prompt, strength, answer in zip(asked, strengths, together, strict=True):
        assert alone(merge_lora(tiny_model(), strength), prompt, 16) == answer
    one = Engine(tiny_model()).generate(asked[:1], Sampling(max_new_tokens=16, strength=0.4))
    assert one != together[:1], "a strength changes what is said"
    base = Engine(tiny_model()).generate(asked[1:2], plans[1], 0)
    assert base == [alone(tiny_model(), asked[1], 16, adapter=False)], "the base has none"


def test_two_adapters_and_their_base_answer_in_one_batch(tmp_path: Path) -> None:
    asked = prompts([9, 30, 5, 17, 12, 8])
    numbers = [1, 2, 0, 2, 1, 0]
    expected: dict[int, list[list[int]]] = {}
    for number, options in (
        (1, {"targets": ["q_proj", "v_proj", "down_proj"]}),
        (2, {"dora": True}),
    ):
        model = tiny_model(adapter=False)
        torch.manual_seed(number)
        for layer in inject_lora(model, rank=2 + number, alpha=8, **options).values():
            torch.nn.init.normal_(layer.lora_B, std=0.3)
        save_adapter(model, tmp_path / str(number))
        expected[number] = [alone(model, prompt, 16) for prompt in asked]
        expected[0] = [alone(model, prompt, 16, adapter=False) for prompt in asked]
    # each of them as the first, with fewer and with more layers than the other
    for order in ("12", "21"):
        model = tiny_model(adapter=False)
        load_adapter(model, tmp_path / order[0])
        load_beside(model, tmp_path / order[1])
        # switched off until it is asked for
        assert [alone(model, prompt, 16) for prompt in asked] == expected[int(order[0])]
        chosen = [number and 1 + order.index(str(number)) for number in numbers]
        answers = Engine(model).generate(asked, Sampling(max_new_tokens=16), chosen)
        assert answers == [expected[number][i] for i, number in enumerate(numbers)]
    assert expected[0] != expected[1] != expected[2]
