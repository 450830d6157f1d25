"""Packed rows: the logits of each sequence are those it has alone, per architecture; masks equal SDPA's and eager's."""

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
            assert difference < 1e-4, f"{architecture}: sequence at {start} differs by {difference:.1e}"


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
        step = {"input_ids": ids[:, :1], "attention_mask": torch.cat([mask, mask[:, -1:]], 1), "position_ids": positions[:, -1:] + 1}
        next_ours = model(**step, past_key_values=ours.past_key_values).logits
        next_theirs = reference(**step, past_key_values=theirs.past_key_values).logits
        assert (next_ours - next_theirs).abs().max() < 1e-4


def test_what_lets_sequences_see_each_other_is_noticed() -> None:
    """Attention of its own (Bloom), a recurrent layer (Qwen3.5), attention that forgets the bounds: rows of one sequence."""
    from cllm.model.attention import packs

    for architecture, expected in (("llama", True), ("gpt2", True), ("gemma3", True), ("bloom", False), ("qwen3.5", False)):
        assert packs(tiny_model(architecture)) is expected, architecture
    model = tiny_model("llama").train()
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _module, _args, given: (_args, given | {"cu_seqlens": None}), with_kwargs=True)
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
    row = packed_attention(module, query, key, value, scaling=0.5, cu_seqlens=bounds)[0].transpose(1, 2)
    torch.testing.assert_close(row[:, :, :2], expected[:, :, :2], rtol=1e-5, atol=1e-6)
