"""One attention function for every model: packed rows in training, masks in generation, plain
causal batches otherwise.

Transformers calls whatever is registered under `config._attn_implementation`; ours is registered as
"cllm" (`register()`). Packed rows come with `cu_seqlens`, which the model hands through its keyword
arguments unchanged; no mask of size T x T is ever built for them. Nothing here knows about models:
what a family needs beyond that stands on the attention module itself (`sliding_window` and
`softcap` arrive as keywords, `alibi_slopes` as an attribute set at loading).
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.messages import note
from cllm.model.device import autocast_dtype, device_of

ATTENTION = "cllm"


class Card(NamedTuple):
    """What decides which attention kernels a device has."""

    type: str
    capability: tuple[int, int]
    flash: bool
    """PyTorch was built with flash attention; wheels for Windows are not."""


REFUSALS = (ValueError, RuntimeError, TypeError)
"""What a model that cannot take packed rows raises: Transformers itself, where a kernel that could
is not installed, or code that expects another mask.
"""
traced_card = Card("cuda", (8, 0), True)
"""The card whose kernels tensors on the meta device stand for (`cllm.trace`)."""


def card_of(device: torch.device) -> Card:
    """The card that `device` names."""
    if device.type == "meta":
        return traced_card
    if device.type != "cuda":
        return Card(device.type, (0, 0), False)
    capability = torch.cuda.get_device_capability(device)
    return Card("cuda", capability, torch.backends.cuda.is_flash_attention_available())


def flash_takes(card: Card, dtype: torch.dtype, head_dim: int, *, masked: bool = False) -> bool:
    """Whether SDPA gives a call to its flash kernel (PyTorch 2.11 to 2.14).

    The others are the memory-efficient kernel, which before 2.14 wants as many key as query heads,
    and the plain products, which hold all T x T scores. Flash trains no heads of 193 to 224
    features on sm_86 and later.
    """
    fits = head_dim <= 192 or 224 < head_dim <= 256
    half = dtype in (torch.float16, torch.bfloat16)
    return card.flash and card.capability >= (8, 0) and half and fits and not masked


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    device_seqlens: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax(scaling * Q K^T + mask) V, causal; with `cu_seqlens` causal inside each sequence of
    the one packed row.

    Shapes: query (B, H, Q, d), key and value (B, H_kv, K, d), H a multiple of H_kv; result (B, Q,
    H, d). `cu_seqlens` (N+1,) int, on the host: row boundaries, B = 1; sequence n is
    [cu_seqlens[n], cu_seqlens[n+1]). `device_seqlens`: the same in int32 beside the query, for the
    kernel that takes all sequences at once. Without them, `attention_mask` (B, 1, Q, K) bool (True
    = attend) or additive float; without either, a causal batch whose queries are the last Q of K.
    `sliding_window` w: position i sees i-w+1 … i (a given mask already contains it). `softcap` c:
    scores become c tanh(scores / c).
    """
    if dtype := autocast_dtype(query.device):
        # the kernel is chosen for what SDPA would cast to
        query, key, value = (x.to(dtype) for x in (query, key, value))
    slopes = getattr(module, "alibi_slopes", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = partial(_attend, scale=scale, dropout=dropout, softcap=softcap, slopes=slopes)
    if cu_seqlens is None:
        mask = _mask(query, key, attention_mask, sliding_window)
        return attend(query, key, value, mask).transpose(1, 2), None
    lengths = cu_seqlens.diff().tolist()
    longest = max(lengths)
    window = sliding_window if sliding_window and longest > sliding_window else None
    plain = softcap is None and slopes is None and not dropout and key.shape == value.shape
    if device_seqlens is not None and plain and (window or len(lengths) > 1):
        call = query.device, query.dtype, query.shape[-1], key.shape[1] != query.shape[1]
        if _has_varlen(*call[:3]) and (query.is_meta or varlen_equals_sdpa(*call)):
            return _varlen(query, key, value, device_seqlens, longest, scale, window), None
    # Split, not sliced: the backward of N slices fills and adds N tensors of the whole row's size.
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [attend(q, k, v, _mask(q, k, None, window)) for q, k, v in parts]
    return (torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]).transpose(1, 2), None


def _mask(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, window: int | None
) -> Tensor | None:
    """What SDPA is given as mask; None: causal, the queries being all positions or the last one."""
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None or not attention_mask.numel():
        windowed = window is not None and keys > window
        if not windowed and queries in (1, keys):
            return None
        return _causal_mask(queries, keys, window, query.device)
    if attention_mask.dtype == torch.bool:
        return attention_mask
    # A row without any visible key (left padding) stays finite with the dtype's minimum, not with
    # -inf.
    return attention_mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)


def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(Q, K) bool; the queries are the last Q of the K positions."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(
        keys, device=device
    )
    visible = distance >= 0
    return visible & (distance < window) if window is not None else visible


def _with_alibi(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ALiBi adds slope * (k - q) to a score; softmax ignores what is constant in k, and slope * k
    is an inner product of its own.

    It takes four more channels (eight for the kernels' alignment) instead of an (H, Q, K) bias:
    slope and position are each cut in two parts that 8 bits of mantissa hold, so that bf16 is as
    exact as float32, where a bf16 bias would merge neighbouring positions.
    """
    high = slopes.to(query.dtype)
    low = (slopes - high.to(slopes.dtype)).to(query.dtype)
    position = torch.arange(key.shape[2], device=key.device)
    parts = [position // 256 * 256, position % 256]
    factors = F.pad(torch.stack([high, high, low, low], 1), (0, 4))[:, None]
    positions = F.pad(torch.stack(parts * 2, 1).to(key.dtype), (0, 4))
    query, key = (
        torch.cat([x, more.expand(*x.shape[:-1], 8)], -1)
        for x, more in ((query, factors), (key, positions))
    )
    return query, key, F.pad(value, (0, 8))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout: float,
    softcap: float | None,
    slopes: Tensor | None,
) -> Tensor:
    """(B, H, Q, d) of one batch or sequence, by the kernel that needs least memory."""
    heads, features, groups = query.shape[:-1], value.shape[-1], query.shape[1] // key.shape[1]
    causal = mask is None and query.shape[2] > 1
    if query.shape[2] == 1 and slopes is None:
        # Of one new token, the heads that share a key head are asked as positions of that head:
        # keys and values need not be repeated.
        query, groups = query.reshape(len(query), key.shape[1], groups, -1), 1
    if slopes is not None:
        query, key, value = _with_alibi(query, key, value, slopes.to(query.device) / scale)
    card = card_of(query.device)
    flash = flash_takes(card, query.dtype, query.shape[-1], masked=mask is not None)
    if groups > 1 and (softcap is not None or (card.type == "cuda" and not flash)):
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is not None:
        if causal:
            mask = _causal_mask(query.shape[2], key.shape[2], None, query.device)
        weights = _capped_weights(query, key, mask, scale, softcap)
        return (F.dropout(weights, dropout) @ value)[..., :features].reshape(*heads, -1)
    # With dropout the CPU's is the kernel of all scores, as without values.
    if query.is_meta and not (card.type == "cpu" and dropout):
        output = _traced_sdpa(flash, query, key, value, mask, dropout, causal, scale)
        return output[..., :features].reshape(*heads, -1)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output[..., :features].reshape(*heads, -1)


def _traced_sdpa(
    flash: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float,
) -> Tensor:
    """SDPA by the kernel that `traced_card` would choose, where the meta device takes the one that
    holds all scores. Keeps and makes what that kernel does, without values.
    """
    aten = torch.ops.aten
    bias = None if mask is None else mask.to(query.dtype)
    outputs: Any
    if traced_card.type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        outputs = kernel(query, key, value, dropout, causal, attn_mask=bias, scale=scale)
    elif flash:
        kernel = aten._scaled_dot_product_flash_attention
        outputs = kernel(query, key, value, dropout, causal, False, scale=scale)
    else:
        wide = None if bias is None else bias.expand(1, query.shape[1], -1, -1)
        kernel = aten._scaled_dot_product_efficient_attention
        outputs = kernel(query, key, value, wide, True, dropout, causal, scale=scale)
    output: Tensor = outputs[0]
    return output


def _capped_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Softmax of capped scores, written out: no kernel of SDPA has them."""
    scores = torch.tanh(query @ key.transpose(-1, -2) * scale / softcap) * softcap
    if mask is not None:
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """(1, T, H, d) of all sequences of a packed row in one launch; needs a flash kernel."""
    from torch.nn.attention.varlen import varlen_attn

    output: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        seqlens,
        seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    row: Tensor = output[None]
    return row


def _has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return flash_takes(card_of(device), dtype, head_dim) and not head_dim % 8


@cache
def varlen_equals_sdpa(
    device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool
) -> bool:
    """Whether `_varlen` gives SDPA's values and gradients on this card, with and without a window.

    Three sequences are tried. What differs, raises or is not in this PyTorch is said and not used.
    """
    if not _has_varlen(device, dtype, head_dim):
        return False
    seqlens = torch.tensor([0, 3, 43, 64], dtype=torch.int32)
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> Tensor:
        shape = (1, heads, 64, head_dim)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def values(output: Tensor) -> Tensor:
        gradients = torch.autograd.grad(output, (query, key, value), grad)
        return torch.cat([x.flatten().float() for x in (output, *gradients)])

    try:
        with torch.inference_mode(False), torch.enable_grad():
            query, grad = random(4).requires_grad_(), random(4).transpose(1, 2)
            key, value = (random(2 if grouped else 4).requires_grad_() for _ in "kv")
            differences = []
            for window in (None, 8):
                plain, _ = packed_attention(
                    nn.Module(), query, key, value, cu_seqlens=seqlens, sliding_window=window
                )
                scale = head_dim**-0.5
                fast = _varlen(query, key, value, seqlens.to(device), 40, scale, window)
                wanted = values(plain)
                differences.append((values(fast) - wanted).norm() / wanted.norm())
            # Rounding to bfloat16 is below 0.01, one key too many in a window above 0.1.
            reason = "" if torch.stack(differences).max() < 0.03 else "other values"
    except Exception as error:
        reason = str(error).split("\n")[0]
    if reason:
        note("attention.varlen", reason=reason)
    return not reason


def register() -> None:
    """Make "cllm" known to Transformers, as attention and as mask; may be called again.

    Without a 2-D mask and without a cache no mask is built (packed rows carry `cu_seqlens`);
    otherwise it is SDPA's.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(**arguments: Any) -> Any:
        plain = arguments.get("attention_mask") is None
        if plain and arguments["q_length"] == arguments["kv_length"]:
            return None
        return sdpa_mask(**arguments)

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, mask)


def row_arguments(
    model: Any, cu_seqlens: Tensor, device_seqlens: Tensor | None
) -> dict[str, Tensor]:
    """What a model's forward is given for a packed row beside its ids and positions.

    The mask is empty and never looked at: Transformers hands masks of four dimensions on as they
    are, and without one it reads back from the device whether positions start again. A row of one
    sequence needs nothing, and models that `packs` did not accept may refuse it.
    """
    if len(cu_seqlens) == 2 and not getattr(model, "packs_rows", False):
        return {}
    bounds = {"cu_seqlens": cu_seqlens, "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool)}
    return bounds if device_seqlens is None else bounds | {"device_seqlens": device_seqlens}


@torch.no_grad()
def packs(model: Any) -> bool:
    """Whether a packed row keeps its sequences apart in this model: the second one's hidden states
    stay as they are when the first is another, and are those that it has alone. False for recurrent
    layers and for attention that does not ask us; such models take rows of one sequence.

    The answer stays on the model as `packs_rows`, for `row_arguments`.
    """
    # The embedding may be in host memory: ids go there, positions to where the layers compute.
    ids = torch.arange(1, 13, device=model.get_input_embeddings().weight.device)
    device = device_of(model)
    was_training = model.training
    model.eval()

    def hidden(*starts: int) -> Tensor:
        """Of the last sequence, each being four ids from `starts` on."""
        seqlens = torch.arange(0, 4 * len(starts) + 1, 4, dtype=torch.int32)
        output = model.base_model(
            input_ids=torch.cat([ids[start : start + 4] for start in starts])[None],
            position_ids=torch.arange(4, device=device).repeat(len(starts))[None],
            use_cache=False,
            **row_arguments(model, seqlens, seqlens.to(device)),
        )
        last: Tensor = output.last_hidden_state[0, -4:].float()
        return last

    model.packs_rows = False
    try:
        alone = hidden(8)
        first, second = hidden(0, 8), hidden(4, 8)
    except REFUSALS:
        return False
    finally:
        model.train(was_training)
    # The same shapes give the same numbers but for a mixture of experts; other shapes round
    # otherwise in 16 bits.
    limits = first.abs().max() * torch.tensor([1e-3, 0.1], device=device)
    differences = torch.stack([(first - other).abs().max() for other in (second, alone)])
    apart = bool((differences <= limits).all())
    model.packs_rows = apart
    return apart
