"""Packed rows: the logits of each sequence are those it has alone, per architecture; masks equal
SDPA's and eager's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model
from torch import nn

from cllm.model import attention
from cllm.model.attention import Card, card_of, flash_takes, packed_attention, packs, row_arguments

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


class ElsewhereEmbedding(nn.Module):
    """An embedding on another device than the layers; here every id has the same vector."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    @property
    def weight(self) -> torch.Tensor:
        return torch.empty(96, self.features, device="meta")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert ids.device.type == "meta"
        return torch.ones(*ids.shape, self.features)


def test_positions_go_where_the_layers_compute_not_where_the_embedding_is() -> None:
    model = tiny_model("llama")
    model.set_input_embeddings(ElsewhereEmbedding(model.config.hidden_size))
    assert packs(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lengths", [[30], [17, 1, 30]], ids=["one", "three"])
def test_a_packed_forward_reads_nothing_back(architecture: str, lengths: list[int]) -> None:
    """On the meta device, where every read of a value raises; the bounds are on the host."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            tiny_config(architecture), attn_implementation=attention.ATTENTION
        )
    model.packs_rows = True
    row = packed(lengths)
    bounds = row.pop("cu_seqlens")
    on_device = {name: row.pop(name).to("meta") for name in ("input_ids", "position_ids")}
    output = model(**on_device, **row, **row_arguments(model, bounds, bounds.to("meta")))
    output.logits.sum().backward()
    assert output.logits.shape == (1, sum(lengths), 96)


ADA, TURING = Card("cuda", (8, 9), True), Card("cuda", (7, 5), True)


@pytest.mark.parametrize(
    ("card", "dtype", "head_dim", "masked", "expected"),
    [
        (ADA, torch.bfloat16, 128, False, True),
        (ADA, torch.float16, 256, False, True),
        (ADA, torch.bfloat16, 128, True, False),
        (ADA, torch.float32, 128, False, False),
        (ADA, torch.bfloat16, 208, False, False),
        (ADA, torch.bfloat16, 288, False, False),
        (TURING, torch.float16, 128, False, False),
        (ADA._replace(flash=False), torch.bfloat16, 128, False, False),
        (card_of(torch.device("cpu")), torch.bfloat16, 128, False, False),
    ],
)
def test_flash_takes_what_sdpa_gives_it(
    card: Card, dtype: torch.dtype, head_dim: int, masked: bool, expected: bool
) -> None:
    assert flash_takes(card, dtype, head_dim, masked=masked) is expected


def heads(dtype: torch.dtype = torch.float32, length: int = 24) -> list[torch.Tensor]:
    torch.manual_seed(7)
    return [torch.randn(1, n, length, 16, dtype=dtype, requires_grad=True) for n in (4, 2, 2)]


@pytest.mark.parametrize("window", [None, 5])
def test_no_other_kernel_than_flash_gets_grouped_heads(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Of SDPA's other kernels only the one that holds all scores takes them before PyTorch 2.14."""
    query, key, value = heads()
    expected, _ = packed_attention(nn.Module(), query, key, value, sliding_window=window)
    calls: list[bool] = []
    plain = F.scaled_dot_product_attention

    def recorded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(q.shape[1] == k.shape[1] == v.shape[1] and not options["enable_gqa"])
        return plain(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(attention, "card_of", lambda _device: TURING)
    output, _ = packed_attention(nn.Module(), query, key, value, sliding_window=window)
    torch.testing.assert_close(output, expected)
    assert calls == [True]


@pytest.mark.parametrize("card", [TURING, ADA])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_decoded_token_repeats_no_keys(
    monkeypatch: pytest.MonkeyPatch, card: Card, mask: str, softcap: float | None
) -> None:
    """Grouped heads of one position equal those of keys repeated by hand, and keys and values go
    into the product as they lie in the cache.
    """
    torch.manual_seed(8)
    query, key, value = (torch.randn(3, n, q, 16) for n, q in ((6, 1), (2, 20), (2, 20)))
    visible = torch.rand(3, 1, 1, 20) < 0.7
    visible[..., -1] = True
    given = {"none": None, "bool": visible, "float": visible.logical_not() * -1e9}[mask]
    scores = query @ key.repeat_interleave(3, 1).transpose(2, 3) / 4
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask != "none":
        scores = scores.masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) @ value.repeat_interleave(3, 1)).transpose(1, 2)
    repeated: list[bool] = []
    repeat = torch.Tensor.repeat_interleave
    monkeypatch.setattr(
        torch.Tensor, "repeat_interleave", lambda *how: repeated.append(True) or repeat(*how)
    )
    monkeypatch.setattr(attention, "card_of", lambda _device: card)
    output, _ = packed_attention(nn.Module(), query, key, value, given, softcap=softcap)
    torch.testing.assert_close(output, expected)
    assert not repeated


def sequence_by_sequence(extra: int) -> Any:
    """A stand-in for `varlen_attn` whose windows see `extra` positions too many."""

    def varlen_attn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        assert max_q == max_k == cu_seq_q.diff().max() and window_size[1] == 0
        outputs = []
        lengths = cu_seq_q.diff().tolist()
        for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
            distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
            visible = distance >= 0
            if window_size[0] >= 0:
                visible &= distance <= window_size[0] + extra
            rows = (x.transpose(0, 1)[None] for x in (q, k, v))
            output = F.scaled_dot_product_attention(
                *rows, attn_mask=visible, scale=scale, enable_gqa=enable_gqa
            )
            outputs.append(output[0].transpose(0, 1))
        calls.append(len(outputs))
        return torch.cat(outputs)

    calls: list[int] = []
    varlen_attn.calls = calls  # type: ignore[attr-defined]
    return varlen_attn


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kernel", ["right", "wrong", "absent"])
def test_one_launch_takes_all_sequences_where_it_equals_them_alone(
    monkeypatch: pytest.MonkeyPatch, window: int | None, kernel: str
) -> None:
    """Tried once with values and gradients; a kernel that differs is said and not used."""
    seqlens = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
    query, key, value = heads(torch.bfloat16)
    options: dict[str, Any] = {"cu_seqlens": seqlens, "sliding_window": window}
    expected, _ = packed_attention(nn.Module(), query, key, value, **options)
    expected_grads = torch.autograd.grad(expected.square().sum(), (query, key, value))
    varlen_attn = sequence_by_sequence(extra=kernel == "wrong")
    module = pytest.importorskip("torch.nn.attention.varlen")
    if kernel == "absent":
        monkeypatch.delattr(module, "varlen_attn")
    else:
        monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    notes: list[str] = []
    monkeypatch.setattr(attention, "note", lambda code, **_: notes.append(code))
    monkeypatch.setattr(attention, "card_of", lambda _device: ADA)
    attention.varlen_equals_sdpa.cache_clear()
    try:
        output, _ = packed_attention(
            nn.Module(), query, key, value, device_seqlens=seqlens, **options
        )
        tried = len(varlen_attn.calls)
        packed_attention(nn.Module(), query, key, value, device_seqlens=seqlens, **options)
    finally:
        attention.varlen_equals_sdpa.cache_clear()
    grads = torch.autograd.grad(output.square().sum(), (query, key, value))
    for ours, plain in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert (ours.float() - plain.float()).norm() < 0.02 * plain.float().norm()
    assert len(varlen_attn.calls) - tried == (kernel == "right")
    assert notes == ([] if kernel == "right" else ["attention.varlen"])


def test_alibi_slopes_add_slope_times_distance() -> None:
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
