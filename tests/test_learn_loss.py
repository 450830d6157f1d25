"""token_nll against full logits; checkpointing against plain autograd; accumulation 1 x 8 against 8
x 1; fp16 AMP against fp32.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cllm.data.encode import IGNORE_INDEX, Example
from cllm.data.packing import PackedRows, collate
from cllm.learn import loss
from cllm.learn.loss import row_nll, sft_loss, token_nll
from cllm.learn.optim import (
    Precision,
    Trainee,
    first_nonfinite,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from cllm.messages import UserError
from cllm.model.adapter import adapter_tensors
from cllm.model.attention import packs
from cllm.model.head import check_head
from cllm.model.int8 import Int8Linear
from cllm.model.lora import inject_lora
from cllm.model.offload import checkpoint_layers

FP32 = Precision.choose("fp32", "cpu")


def examples(count: int, seed: int = 0, vocabulary: int = 96) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(4, 20, (1,), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, length - 1, (1,), generator=generator))
        made.append(Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
    return made


def adapted(architecture: str = "llama", dropout: float = 0.0, seed: int = 0):  # type: ignore[no-untyped-def]
    model = tiny_model(architecture, seed)
    torch.manual_seed(1)
    inject_lora(model, rank=4, alpha=8, dropout=dropout)
    with torch.no_grad():
        for name, value in adapter_tensors(model).items():
            if "lora_B" in name:
                value.normal_(std=0.05)
    return model.train()


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


class Reads(TorchDispatchMode):
    """Operations whose result the host waits for: values, or sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dynamic = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
        if dynamic & set(func.tags) and func.overloadpacket is not torch.ops.aten.index:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_of_eight_rows_reads_the_device_three_times_at_most(precision: str) -> None:
    model = adapted()
    chosen = Precision.choose(precision, "cpu")
    chosen.prepare(model)
    assert packs(model)
    rows = [collate(examples(n, seed=n)) for n in (1, 2, 3, 1, 4, 1, 2, 5)]
    optimizer, scaler = make_optimizer(model, 1e-3), chosen.scaler()
    with Reads() as reads:
        Trainee(model, sft_loss, optimizer, chosen, scaler).step(rows)
    assert len(reads.names) <= 3, reads.names


def test_a_row_and_its_gradients_are_computed_without_reading_the_device() -> None:
    """On the meta device, where every read raises; the embedding is in host memory."""
    row = collate(examples(3))
    with torch.device("meta"):
        model = tiny_model("llama")
    model.packs_rows = True
    embedding = nn.Embedding(96, model.config.hidden_size).requires_grad_(False)
    embedding.register_forward_hook(lambda _module, _inputs, output: output.to("meta"))
    model.set_input_embeddings(embedding)
    loss = sft_loss(model, row.to("meta"))
    loss.backward()
    assert loss.shape == () and model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_a_head_that_does_more_than_is_known_is_refused() -> None:
    model = tiny_model("llama")
    check_head(model)
    check_head(tiny_model("gemma2"))  # a soft cap is known
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output * 1.5)
    check_head(model)  # part of the head itself
    model.register_forward_hook(
        lambda _module, _inputs, output: setattr(output, "logits", output.logits * 1.5)
    )
    with pytest.raises(UserError, match=r"train\.head.*LlamaForCausalLM"):
        check_head(model)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen-head", "trained-head"])
@pytest.mark.parametrize(
    "chunk_bytes", [1, 3 * 4 * 50, 2**27], ids=["row-by-row", "3-rows", "one-chunk"]
)
def test_chunked_equals_full_in_value_and_gradient(trainable: bool, chunk_bytes: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50)
    head.requires_grad_(trainable)
    hidden = torch.randn(11, 16, requires_grad=True)
    labels = torch.randint(0, 50, (11,))
    labels[[0, 4, 10]] = IGNORE_INDEX
    weights = torch.rand(11)  # another objective than the sum: every position has its own weight
    full = F.cross_entropy(head(hidden), labels, reduction="none", ignore_index=IGNORE_INDEX)
    wanted = torch.autograd.grad(
        (full * weights).sum(), [hidden, *([head.weight] if trainable else [])]
    )
    ours = token_nll(hidden, head, labels, chunk_bytes)
    found = torch.autograd.grad(
        (ours * weights).sum(), [hidden, *([head.weight] if trainable else [])]
    )
    torch.testing.assert_close(ours, full, rtol=1e-6, atol=1e-6)
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", [512 * 96, 2**25], ids=["tiles", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_head_equals_its_dense_twin(
    dtype: torch.dtype, tile: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 x 96, whole or in two tiles; 30 rows of logits at a time."""
    torch.manual_seed(0)
    head = Int8Linear(nn.Linear(96, 1000, bias=bias, dtype=dtype))
    dense = nn.Linear(96, 1000, bias=bias, dtype=dtype).requires_grad_(False)
    dense.weight.copy_(head.dequantize(dtype))
    if bias:
        dense.bias.copy_(head.bias)
    monkeypatch.setattr(loss, "_TILE", tile)
    assert [len(weight) for _, weight, _ in head.tiles(dtype, tile)] == (
        [512, 488] if tile < 2**25 else [1000]
    )
    hidden, labels, found = torch.randn(70, 96, dtype=dtype), torch.randint(0, 1000, (70,)), []
    for module in (dense, head):
        inputs = hidden.clone().requires_grad_()
        nll = token_nll(inputs, module, labels, 30 * 1000 * dtype.itemsize)
        (nll * torch.arange(70)).sum().backward()
        found.append((nll.detach(), inputs.grad))
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 5e-2}
    )
    torch.testing.assert_close(found[1][0], found[0][0], **tolerance)
    torch.testing.assert_close(found[1][1], found[0][1], **tolerance)
    one_call = head(hidden)
    assert torch.equal(one_call, dense(hidden))
    monkeypatch.setattr(head, "tiles", lambda dtype: type(head).tiles(head, dtype, tile))
    torch.testing.assert_close(head(hidden), one_call)
    inputs = hidden.clone().requires_grad_()
    head(inputs).sum().backward()
    torch.testing.assert_close(
        inputs.grad,
        dense.weight.sum(0).expand_as(hidden),
        rtol=2e-2,
        atol=1e-1 if dtype == torch.bfloat16 else 1e-4,
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma2"])
def test_a_model_with_a_quantized_head_trains_to_the_dense_twins_gradients(
    architecture: str,
) -> None:
    results = []
    for quantized in (True, False):
        model = adapted(architecture)
        head = Int8Linear(model.get_output_embeddings())
        dense = nn.Linear(32, 96, bias=False).requires_grad_(False)
        dense.weight.copy_(head.dequantize())
        model.set_output_embeddings(head if quantized else dense)
        value = sft_loss(model, collate(examples(4)))
        value.backward()
        results.append((value.item(), gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_float32_truth(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 1000, bias=False).requires_grad_(False)
    hidden = torch.randn(32, 64)
    labels = torch.randint(0, 1000, (32,))
    exact = hidden.clone().requires_grad_()
    half = hidden.to(dtype).requires_grad_()
    truth = token_nll(exact, head, labels)
    ours = token_nll(half, head.to(dtype), labels)
    assert (ours - truth).abs().mean() < 2e-2
    truth.sum().backward()
    ours.sum().backward()
    assert (half.grad.float() - exact.grad).norm() / exact.grad.norm() < 1e-2


def test_no_supervised_position_is_zero_and_differentiable() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    nll = token_nll(hidden, nn.Linear(8, 5).requires_grad_(False), torch.full((4,), IGNORE_INDEX))
    nll.sum().backward()
    assert nll.tolist() == [0, 0, 0, 0] and hidden.grad.abs().sum() == 0


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "glm", "gemma2", "gemma3", "gpt2"])
def test_row_nll_equals_the_models_own_logits(architecture: str) -> None:
    model = tiny_model(architecture)
    row = collate(examples(3))
    bounds = row.cu_seqlens.tolist()
    with torch.no_grad():
        ours = row_nll(model, row)
        for start, end in pairwise(bounds):
            logits = model(row.input_ids[None, start:end], use_cache=False).logits[0]
            full = F.cross_entropy(
                logits, row.labels[start:end], reduction="none", ignore_index=IGNORE_INDEX
            )
            torch.testing.assert_close(ours[start:end], full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [1, -1], ids=["first-layer", "all"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_equals_plain(architecture: str, dropout: float, layers: int) -> None:
    results = []
    for count in (0, layers):
        model = adapted(architecture, dropout)
        assert checkpoint_layers(model, count) == {0: 0, 1: 1, -1: 2}[count]
        torch.manual_seed(7)
        loss = sft_loss(model, collate(examples(4)))
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-7)


def test_checkpointing_equals_torch_and_keeps_the_random_stream() -> None:
    from torch.utils.checkpoint import checkpoint

    states = []
    for ours in (True, False):
        model = adapted(dropout=0.3)
        if ours:
            checkpoint_layers(model)
        else:
            for layer in model.model.layers:
                forward = layer.forward
                layer.forward = lambda *a, _f=forward, **k: checkpoint(
                    _f, *a, use_reentrant=False, **k
                )
        torch.manual_seed(7)
        sft_loss(model, collate(examples(4))).backward()
        states.append((gradients(model), torch.rand(3)))
    torch.testing.assert_close(states[0][0], states[1][0], rtol=1e-6, atol=1e-7)
    assert torch.equal(states[0][1], states[1][1])


def test_accumulation_1x8_equals_8x1() -> None:
    data = examples(8)
    results = []
    for groups in ([data], [[e] for e in data]):
        model = adapted()
        optimizer = make_optimizer(model, 1e-2)
        set_learning_rate(optimizer, 1e-2)
        trainee = Trainee(model, sft_loss, optimizer, FP32, FP32.scaler())
        losses = [trainee.step([collate(g) for g in groups]) for _ in range(3)]
        results.append(
            (losses, torch.cat([v.detach().flatten() for v in adapter_tensors(model).values()]))
        )
    for one, eight in zip(results[0][0], results[1][0], strict=True):
        assert math.isclose(one.loss, eight.loss, rel_tol=1e-5) and math.isclose(
            one.grad_norm, eight.grad_norm, rel_tol=1e-4
        )
        assert one.supervised_tokens == eight.supervised_tokens and one.tokens == eight.tokens
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


def curve(name: str, steps: int = 25) -> list[float]:
    precision = Precision.choose(name, "cpu")
    model = adapted().to(precision.weights)
    for value in adapter_tensors(model).values():
        value.data = value.data.float()
    precision.prepare(model)
    optimizer, scaler = make_optimizer(model, 5e-3), precision.scaler()
    set_learning_rate(optimizer, 5e-3)
    rows = PackedRows(examples(12), 64)
    trainee = Trainee(model, sft_loss, optimizer, precision, scaler)
    return [trainee.step(rows.take(2)).loss for _ in range(steps)]


def test_fp16_amp_follows_the_fp32_curve_within_two_percent() -> None:
    exact, amp = curve("fp32"), curve("fp16")
    assert exact[-1] < 0.8 * exact[0]
    worst = max(abs(a - b) / b for a, b in zip(amp, exact, strict=True))
    assert worst < 0.02, f"fp16 AMP is {worst:.1%} off somewhere"


def test_an_inf_skips_the_step_lowers_the_scale_and_is_named() -> None:
    precision = Precision.choose("fp16", "cpu")
    model = adapted().to(torch.float16)
    for value in adapter_tensors(model).values():
        value.data = value.data.float()
    precision.prepare(model)
    optimizer, scaler = make_optimizer(model, 1e-2), precision.scaler()
    row = collate(examples(3))
    model.model.layers[1].mlp.down_proj.base.weight.data[0, 0] = float("inf")
    before = copy.deepcopy([v.detach() for v in adapter_tensors(model).values()])
    scale = scaler.get_scale()
    trainee = Trainee(model, sft_loss, optimizer, precision, scaler)
    stats = trainee.step([row])
    assert stats.skipped and scaler.get_scale() == scale / 2
    assert all(
        torch.equal(a, b) for a, b in zip(before, adapter_tensors(model).values(), strict=True)
    )
    assert first_nonfinite(model, row, sft_loss, precision) == "model.layers.1.mlp.down_proj.base"
    model.model.layers[1].mlp.down_proj.base.weight.data[0, 0] = 0
    assert not trainee.step([row]).skipped
    assert first_nonfinite(model, row, sft_loss, precision) == ""


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [0.5, 1, 1, 1, 1, 1]),
    ],
)
def test_learning_rate_is_a_pure_function_of_the_step(schedule: str, expected: list[float]) -> None:
    rates = [learning_rate(step, 6, 1.0, schedule=schedule, warmup=2) for step in range(1, 7)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_lora_plus_gives_b_its_own_rate() -> None:
    model = adapted()
    optimizer = make_optimizer(model, 1e-3, plus_ratio=16)
    set_learning_rate(optimizer, 1e-3)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(16e-3 if name.endswith("lora_B") else 1e-3)
