"""Packed rows: the logits of each sequence are those it has alone, per architecture; masks equal
SDPA's and eager's.
"""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "glm", "gemma2", "gemma3", "gpt2"]


def packed(lengths: list[int]) -> dict:
    torch.manual_seed(3)
    ids = torch.randint(3, 96, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"input_ids": ids, "position_ids": positions, "cu_seqlens": bounds, "use_cache": False}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_separate(architecture: str) -> None:
    model, reference = tiny_model(architecture), tiny_model(architecture, attention="eager")
    row = packed([17, 1, 30, 8])
    with torch.no_grad():
        together = model(**row).logits[0]
        for start, end in zip(row["cu_seqlens"][:-1], row["cu_seqlens"][1:], strict=True):
            alone = reference(row["input_ids"][:, start:end], use_cache=False).logits[0]
            difference = (together[start:end] - alone).abs().max().item()
            assert difference < 1e-4, (
                f"{architecture}: sequence at {start} differs by {difference:.1e}"
            )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_batch_and_cached_decoding_equal_eager(architecture: str) -> None:
    model, reference = tiny_model(architecture), tiny_model(architecture, attention="eager")
    torch.manual_seed(4)
    ids = torch.randint(3, 96, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        theirs = reference(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        assert ((ours.logits - theirs.logits) * mask[:, :, None]).abs().max() < 1e-4
        step = {
            "input_ids": ids[:, :1],
            "attention_mask": torch.cat([mask, mask[:, -1:]], 1),
            "position_ids": positions[:, -1:] + 1,
        }
        next_ours = model(**step, past_key_values=ours.past_key_values).logits
        next_theirs = reference(**step, past_key_values=theirs.past_key_values).logits
        assert (next_ours - next_theirs).abs().max() < 1e-4


def test_what_lets_sequences_see_each_other_is_noticed() -> None:
    """Attention of its own (Bloom), a recurrent layer (Qwen3.5), attention that forgets the bounds:
    rows of one sequence.
    """
    from cllm.model.attention import packs

    for architecture, expected in (
        ("llama", True),
        ("gpt2", True),
        ("gemma3", True),
        ("bloom", False),
        ("qwen3.5", False),
    ):
        assert packs(tiny_model(architecture)) is expected, architecture
    model = tiny_model("llama").train()
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _args, given: (_args, given | {"cu_seqlens": None}), with_kwargs=True
        )
    assert packs(model) is False and model.training


def test_alibi_slopes_add_slope_times_distance() -> None:
    from cllm.model.attention import packed_attention

    torch.manual_seed(5)
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    module = torch.nn.Module()
    module.alibi_slopes = torch.tensor([0.5, 0.125])
    distance = torch.arange(6) - torch.arange(6)[:, None]
    scores = query @ key.transpose(-1, -2) * 0.5 + module.alibi_slopes[:, None, None] * distance
    expected = torch.softmax(scores.masked_fill(distance > 0, float("-inf")), -1) @ value
    plain = packed_attention(module, query, key, value, scaling=0.5)[0].transpose(1, 2)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-6)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    row = packed_attention(module, query, key, value, scaling=0.5, cu_seqlens=bounds)[0].transpose(
        1, 2
    )
    torch.testing.assert_close(row[:, :, :2], expected[:, :, :2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alibi_is_exact_over_a_long_row_and_keeps_nothing_of_its_square(dtype: torch.dtype) -> None:
    """600 positions, slopes of 5 heads (no powers of two among them): output and gradients against
    float64 with the bias written out.
    """
    from cllm.model.attention import packed_attention
    from cllm.model.checkpoint import alibi_slopes

    torch.manual_seed(6)
    module = torch.nn.Module()
    module.alibi_slopes = alibi_slopes(5)
    inputs = [torch.randn(1, 5, 600, 16).to(dtype) for _ in range(3)]
    grad = torch.randn(1, 5, 600, 16).to(dtype)
    distance = torch.arange(600) - torch.arange(600)[:, None]
    bias = module.alibi_slopes.double()[:, None, None] * distance
    results = []
    for exact in (True, False):
        q, k, v = (x.clone().to(torch.float64 if exact else dtype).requires_grad_() for x in inputs)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
        ):
            if exact:
                scores = (q @ k.transpose(-1, -2) * 0.25 + bias).masked_fill(
                    distance > 0, float("-inf")
                )
                out = torch.softmax(scores, -1) @ v
            else:
                out = packed_attention(module, q, k, v, scaling=0.25)[0].transpose(1, 2)
        results.append([out.detach(), *torch.autograd.grad(out, [q, k, v], grad.to(out.dtype))])
    assert max(kept) < 600 * 600 * 2
    for found, wanted in zip(results[1], results[0], strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), error
