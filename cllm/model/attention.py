"""One attention function for every model: packed rows in training, masks in generation, plain
causal batches otherwise.

Transformers calls whatever is registered under `config._attn_implementation`; ours is registered as
"cllm" (`register()`). Packed rows come with `cu_seqlens`, which the model hands through its keyword
arguments unchanged; no mask of size T x T is ever built for them. Nothing here knows about models:
what a family needs beyond that stands on the attention module itself (`sliding_window` and
`softcap` arrive as keywords, `alibi_slopes` as an attribute set at loading).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = "cllm"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax(scaling * Q K^T + mask) V, causal; with `cu_seqlens` causal inside each sequence of
    the one packed row.

    Shapes: query (B, H, Q, d), key and value (B, H_kv, K, d), H a multiple of H_kv; result (B, Q,
    H, d). `cu_seqlens` (N+1,) int: row boundaries, B = 1; sequence n is [cu_seqlens[n],
    cu_seqlens[n+1]). Without it, `attention_mask` (B, 1, Q, K) bool (True = attend) or additive
    float; without either, a causal batch whose queries are the last Q of K. `sliding_window` w:
    position i sees i-w+1 … i (a given mask already contains it). `softcap` c: scores become c
    tanh(scores / c).
    """
    slopes = getattr(module, "alibi_slopes", None)
    settings: dict[str, Any] = {
        "scaling": scaling,
        "dropout": dropout,
        "softcap": softcap,
        "slopes": slopes,
    }
    if cu_seqlens is None:
        if attention_mask is None and sliding_window is not None and key.shape[2] > sliding_window:
            attention_mask = _causal_mask(
                query.shape[2], key.shape[2], sliding_window, query.device
            )
        return _attend(query, key, value, attention_mask, **settings).transpose(1, 2), None
    # Split, not sliced: the backward of N slices fills and adds N tensors of the whole row's size.
    lengths = cu_seqlens.diff().tolist()
    parts = zip(
        query.split(lengths, dim=2),
        key.split(lengths, dim=2),
        value.split(lengths, dim=2),
        lengths,
        strict=True,
    )
    outputs = []
    for q, k, v, length in parts:
        windowed = sliding_window is not None and length > sliding_window
        mask = _causal_mask(length, length, sliding_window, query.device) if windowed else None
        outputs.append(_attend(q, k, v, mask, **settings))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


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
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    slopes: Tensor | None,
) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    if slopes is not None:
        scaling = scaling or query.shape[-1] ** -0.5
        wide = _with_alibi(query, key, value, slopes.to(query.device) / scaling)
        how: dict[str, Any] = {
            "scaling": scaling,
            "dropout": dropout,
            "softcap": softcap,
            "slopes": None,
        }
        return _attend(*wide, mask, **how)[..., : value.shape[-1]]
    if mask is None and (softcap is not None or queries not in (1, keys)):
        mask = _causal_mask(queries, keys, None, query.device)
    if mask is not None and mask.dtype != torch.bool:
        # A row without any visible key (left padding) stays finite with the dtype's minimum, not
        # with -inf.
        mask = mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
    if mask is None or softcap is None:
        how = {
            "attn_mask": mask,
            "is_causal": mask is None and queries > 1,
            "enable_gqa": key.shape[1] != query.shape[1],
        }
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, **how
        )
    groups = query.shape[1] // key.shape[1]
    scores = (
        query
        @ key.repeat_interleave(groups, 1).transpose(-1, -2)
        * (scaling or query.shape[-1] ** -0.5)
    )
    scores = torch.tanh(scores / softcap) * softcap
    low = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value.repeat_interleave(groups, 1)


def register() -> None:
    """Make "cllm" known to Transformers, as attention and as mask; may be called again.

    Without a 2-D mask and without a cache no mask is built (packed rows carry `cu_seqlens`);
    otherwise it is SDPA's.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        *args: Any,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        if attention_mask is None and q_length == kv_length:
            return None
        built: Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs
        )
        return built

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, mask)


@torch.no_grad()
def packs(model: Any) -> bool:
    """Whether a packed row keeps its sequences apart in this model: the second one's hidden states
    stay as they are when the first is another, and are those that it has alone. False for recurrent
    layers and for attention that does not ask us; such models take rows of one sequence.
    """
    was_training, device = model.training, model.get_input_embeddings().weight.device
    model.eval()
    ids, positions = torch.arange(1, 13, device=device), torch.arange(4, device=device)

    def hidden(*starts: int) -> Tensor:
        """Of the last sequence, each being four ids from `starts` on."""
        row = torch.cat([ids[start : start + 4] for start in starts])[None]
        bounds = (
            {"cu_seqlens": torch.arange(0, 4 * len(starts) + 1, 4, dtype=torch.int32)}
            if len(starts) > 1
            else {}
        )
        output = model.base_model(
            input_ids=row,
            position_ids=positions.repeat(len(starts))[None],
            use_cache=False,
            **bounds,
        )
        last: Tensor = output.last_hidden_state[0, -4:].float()
        return last

    try:
        first, second, alone = hidden(0, 8), hidden(4, 8), hidden(8)
    except ValueError:  # Transformers' own refusal, where a kernel that could is not installed
        return False
    finally:
        model.train(was_training)
    scale = float(first.abs().max())
    # The same shapes give the same numbers but for a mixture of experts; other shapes round
    # otherwise in 16 bits.
    return bool(
        (first - second).abs().max() <= 1e-3 * scale and (first - alone).abs().max() <= 0.1 * scale
    )
