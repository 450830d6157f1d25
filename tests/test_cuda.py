"""What only a GPU can show; everything here is skipped without one (`bench/gpu.sh` runs it)."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from cllm.fit import estimate_vram
from cllm.memory import WORKSPACE_BYTES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


def step_of(quantize: str, precision: str, rows: int, tokens: int = 1024) -> tuple[Any, Any, Any]:
    """(model, run one step -> StepStats, settings) as every program makes them."""
    from cllm.assembly import assemble
    from cllm.bench import random_row
    from cllm.config import LoraConfig, MemoryConfig, ModelConfig
    from cllm.learn.loss import sft_loss
    from cllm.learn.optim import Trainee, make_optimizer

    assembly = assemble(
        CONFIG,
        ModelConfig(quantize=quantize, precision=precision, device="cuda"),  # type: ignore[arg-type]
        MemoryConfig(checkpoint_layers=999),
        adapter=LoraConfig(rank=16, alpha=32),
        row_tokens=tokens,
    )
    model = assembly.model.train()
    optimizer = make_optimizer(model, 1e-3)
    chosen = assembly.precision
    trainee = Trainee(model, sft_loss, optimizer, chosen, chosen.scaler())
    batches = [random_row(tokens, 4096)] * rows

    def run() -> Any:
        return trainee.step(batches)

    return model, run, assembly.settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1024, 4096), (130, 200), (7, 63)])
def test_nf4_equals_the_cpu_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from cllm.model.nf4 import dequantize, dequantize_plain, quantize_nf4

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    host, card = quantize_nf4(weight), quantize_nf4(weight.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(host[:3], card[:3], strict=True))
    for kernel in (dequantize, dequantize_plain):
        assert torch.equal(kernel(card, dtype).cpu(), dequantize_plain(host, dtype))


def test_nf4_linear_gradient_equals_the_dense_layer() -> None:
    from cllm.model.nf4 import NF4Linear

    layer = NF4Linear(torch.randn(256, 512, device="cuda"))
    x = torch.randn(33, 512, device="cuda", requires_grad=True)
    grad = torch.randn(33, 256, device="cuda")
    (found,) = torch.autograd.grad(layer(x), x, grad)
    torch.testing.assert_close(found, grad @ layer.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1024, 4096), (12288, 4096), (4096, 12288)])
def test_few_rows_are_multiplied_packed_as_dequantized(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    pytest.importorskip("bitsandbytes")
    from cllm.model import nf4

    torch.manual_seed(2)
    layer = nf4.NF4Linear(torch.randn(shape, device="cuda") * 0.02).eval()
    dense = layer.dequantize(dtype)
    for rows in (1, 2, 5, 16, nf4.FEW_ROWS):
        x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
        expected = torch.nn.functional.linear(x, dense).float()
        error = (layer(x).float() - expected).abs().max() / expected.square().mean().sqrt()
        assert error < nf4._ROUNDINGS * torch.finfo(dtype).eps
    assert nf4._refusals == dict.fromkeys(nf4._refusals, "")


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_few_steps_lower_the_loss(precision: str, quantize: str) -> None:
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("no bf16 on this card")
    _, run, _ = step_of(quantize, precision, rows=1, tokens=256)
    losses = [stats.loss for stats in (run() for _ in range(12)) if not stats.skipped]
    assert len(losses) >= 6 and losses[-1] < losses[0] - 0.1


def test_fp16_follows_fp32() -> None:
    losses = {}
    for precision in ("fp32", "fp16"):
        _, run, _ = step_of("none", precision, rows=1, tokens=256)
        losses[precision] = next(
            stats.loss for stats in (run() for _ in range(16)) if not stats.skipped
        )
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_peak_is_within_five_percent_of_the_estimate(quantize: str) -> None:
    precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # The model of the case before is garbage, and cuBLAS's workspaces are no part of a step.
    gc.collect()
    torch.cuda.empty_cache()
    torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    before = torch.cuda.memory_allocated()
    _, run, settings = step_of(quantize, precision, rows=2, tokens=2048)
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    estimate = estimate_vram(CONFIG, settings)
    planned = estimate.allocated - WORKSPACE_BYTES
    assert planned / (torch.cuda.max_memory_allocated() - before) == pytest.approx(1, abs=0.05)


def test_packed_attention_equals_the_cpu() -> None:
    from cllm.model.attention import packed_attention

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 96, 64, generator=generator) for heads in (8, 2, 2))
    bounds = torch.tensor([0, 17, 60, 96], dtype=torch.int32)
    module = torch.nn.Module()
    expected, _ = packed_attention(module, query, key, value, cu_seqlens=bounds)
    found, _ = packed_attention(module, query.cuda(), key.cuda(), value.cuda(), cu_seqlens=bounds)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_what_a_capped_card_cannot_take_whole_it_takes_in_parts() -> None:
    from cllm.data.encode import Example
    from cllm.data.packing import collate
    from cllm.learn.loss import sft_loss
    from cllm.learn.optim import StepOutOfMemoryError, Trainee, make_optimizer
    from cllm.model.device import Precision

    model, _, _ = step_of("none", "fp32", rows=1, tokens=64)
    texts = torch.randint(0, 4096, (8, 512), generator=torch.Generator().manual_seed(0)).tolist()
    row = collate([Example(ids, ids) for ids in texts])
    optimizer, precision = make_optimizer(model, 0.0), Precision.choose("fp32", "cuda")

    def run(micro_tokens: int) -> tuple[float, int]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        trainee = Trainee(model, sft_loss, optimizer, precision, precision.scaler(), max_norm=0.0)
        loss = trainee.step([row], micro_tokens=micro_tokens).loss
        return loss, torch.cuda.max_memory_reserved()

    run(512)  # makes the moments
    (whole, needed), (parts, less) = run(4096), run(512)
    assert parts == pytest.approx(whole, abs=1e-5) and less < needed
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (less + needed) / 2 / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        with pytest.raises(StepOutOfMemoryError):
            run(4096)
        assert run(512)[0] == pytest.approx(whole, abs=1e-5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_streamed_offloaded_and_on_the_cpu_equal_resident_bit_for_bit() -> None:
    from cllm.bench import random_row
    from cllm.learn.loss import sft_loss
    from cllm.model.adapter import adapter_tensors
    from cllm.model.checkpoint import Placement, random_model
    from cllm.model.lora import inject_lora
    from cllm.model.offload import checkpoint_layers, embedding_on_cpu, stream_layers

    card = torch.device("cuda", torch.cuda.current_device())
    row, results = random_row(512, 4096).to(card), []
    for hosted in (False, True):
        torch.manual_seed(0)
        model: Any = random_model(
            CONFIG,
            Placement(
                dtype=torch.float16, device="cuda", quantize="nf4", stream_layers=4 if hosted else 0
            ),
        ).train()
        inject_lora(model, rank=8, alpha=16)
        checkpoint_layers(model, offload=hosted)
        if hosted:
            stream_layers(model, 4, card)
            embedding_on_cpu(model, card)
            weights = model.model.layers[0].forward.weights[0]
            assert all(host.is_pinned() for host in weights.hosts) and {
                slot.device.type for slot in weights.slots
            } == {"cuda"}
        generator = torch.Generator().manual_seed(1)
        for value in adapter_tensors(model).values():
            value.data.copy_(0.05 * torch.randn(value.shape, generator=generator))
        for _ in range(2):
            model.zero_grad()
            loss = sft_loss(model, row)
            (loss / 512).backward()
        results.append([loss.detach(), *(value.grad for value in adapter_tensors(model).values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_eight_bit_adamw_runs_and_its_moments_come_back() -> None:
    from cllm.learn.optim import make_optimizer
    from cllm.learn.snapshot import capture, restore

    results = []
    tensors: dict[str, torch.Tensor] = {}
    for resumed in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 130, device="cuda")
        optimizer = make_optimizer(model, 1e-2, weight_decay=0.1, name="adamw8bit")
        if resumed:
            restore(model, optimizer, tensors)
        for step in range(3 if resumed else 0, 6):
            if step == 3 and not resumed:
                tensors = {name: value.clone() for name, value in capture(model, optimizer).items()}
            for index, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(10 * step + index)
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert tensors["optimizer/0/state1"].dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
