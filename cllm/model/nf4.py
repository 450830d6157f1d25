"""NF4 with double quantization: four bits a weight, the base of QLoRA (Dettmers et al. 2023, arXiv
2305.14314).

A weight is cut, row-major, into blocks of 64. Each value becomes the nearest of sixteen normal
quantiles `CODE` times the block's largest magnitude (`absmax`); the absmax values, less their mean,
become 8-bit codes of a dynamic map in groups of 256. Per weight: 0.5 + 1/64 + 4/(64 * 256) bytes.
Packing, scales and values follow bitsandbytes 0.50's CPU backend bit for bit, on every device.

Two kernels, equal bit for bit: bitsandbytes' (if it imports and passes a probe) and plain PyTorch.
bf16, 4096 x 4096, one thread: 25 ms against 61 ms. bitsandbytes' AVX-512 kernel reads wrong scales
where the row length is a multiple of 16 but not of 64; it is therefore given such weights as one
long row.

Dequantizing reads half a byte a weight, writes two and reads two again. Where few rows are answered
(decoding) that is all of the time, so they go through bitsandbytes' product with the packed weight
instead, which on a card reads half a byte and writes none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache, reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cllm.messages import UserError, note
from cllm.model.device import autocast_dtype, out_of_memory

BLOCK = 64  # weights per absmax
GROUP = 256  # absmax values per second-level scale
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# weights converted at a time: temporaries of about 40 MB, and close to the CPU's cache
CHUNK = 2**21


class NF4Tensor(NamedTuple):
    """A quantized weight of `shape`, n values in B = ceil(n / 64) blocks and G = ceil(B / 256)
    groups.
    """

    packed: Tensor
    """(ceil(n / 2),) uint8: two codes a byte, the even element in the high half."""
    absmax: Tensor
    """(B,) uint8: codes of the dynamic map."""
    scales: Tensor
    """(G + 1,) int32: the bits of the groups' float32 scales, then of the mean. As integers,
    because module.to(bfloat16) would round floating-point buffers.
    """
    shape: tuple[int, ...]


def quantize_nf4(weight: Tensor, device: torch.device | None = None) -> NF4Tensor:
    """Quantize a floating-point weight of any shape on `device` (default: where it lies), in
    chunks: neither a float32 copy of it nor, on another device, the whole of it ever exists.

    Raises UserError if a value is inf or NaN: then the checkpoint is damaged.
    """
    device = device or weight.device
    flat = weight.detach().reshape(-1)
    count = -(-flat.numel() // BLOCK)
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=device)
    codes = torch.empty(count, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-count // GROUP) + 1, dtype=torch.int32, device=device)
    if weight.is_meta:
        return NF4Tensor(packed, codes, scales, tuple(weight.shape))
    absmax = torch.empty(count, device=device)
    whole = flat.numel() // BLOCK * BLOCK
    for start in range(0, whole, CHUNK):
        chunk = flat[start : min(start + CHUNK, whole)].to(device)
        blocks = chunk.float().view(-1, BLOCK)
        low, high = torch.aminmax(blocks, dim=1)
        largest = torch.maximum(high, -low)
        absmax[start // BLOCK :][: largest.numel()] = largest
        _pack(blocks * (1.0 / largest.clamp(min=1e-38))[:, None], packed[start // 2 :])
    # bitsandbytes divides in the last, short block, and keeps its absmax off zero
    if whole < flat.numel():
        block = flat[whole:].to(device).float()
        absmax[-1] = block.abs().amax().clamp(min=1e-38)
        _pack(block / absmax[-1], packed[whole // 2 :])
    if not absmax.isfinite().all():
        raise UserError("checkpoint.unquantizable", detail="the weight holds inf or NaN")
    # on the CPU, whatever the device: sums depend on their order
    exact_codes, exact_scales = _quantize_absmax(absmax.cpu())
    codes.copy_(exact_codes)
    scales.copy_(exact_scales.view(torch.int32))
    return NF4Tensor(packed, codes, scales, tuple(weight.shape))


def _pack(normalized: Tensor, out: Tensor) -> None:
    """Codes of values in [-1, 1], two a byte, into the first bytes of `out`; an odd one is paired
    with zero's code.
    """
    code = torch.tensor(CODE, device=out.device)
    middles = (code[1:] + code[:-1]) / 2
    codes = (
        torch.bucketize(normalized.clamp_(-1, 1), middles, out_int32=True).to(torch.uint8).view(-1)
    )
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), CODE.index(0.0))])
    out[: codes.numel() // 2] = codes[::2] << 4 | codes[1::2]


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """(256,) float32, ascending: 0, 1 and the middles of equal parts of seven decades, on both
    sides of zero. [1e-7, 1e-6] is one part, each decade above has twice as many
    (arXiv:2110.02861).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, device="cpu")
        middle = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middle + [-value for value in middle]
    return torch.tensor(sorted(values), device=device)


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) float32 -> codes (B,) uint8 and (G + 1,) float32 scales and mean.

    bitsandbytes rounds to 65,536 even steps of [-1, 1] and takes the code nearest to that step.
    True rounding to the nearest code would differ in 0.2 % of the codes; this is followed so that
    checkpoints come out the same.
    """
    code = dynamic_map(absmax.device)
    steps = -1 + 2 * torch.arange(2**16, device=absmax.device).float() / (2**16 - 1)
    nearest = torch.bucketize(steps, (code[:-1] + code[1:]) * 0.5).to(torch.uint8)
    mean = absmax.mean()
    groups = torch.nn.functional.pad(absmax - mean, (0, -absmax.numel() % GROUP)).view(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True)
    # 0 * inf where all values of a group are equal
    normalized = (groups * (1.0 / scale)).nan_to_num(0.0).clamp(-1, 1)
    codes = nearest[((normalized + 1) * 0.5 * (2**16 - 1) + 0.5).long()] * (scale > 0)
    return codes.view(-1)[: absmax.numel()], torch.cat([scale.view(-1), mean[None]])


def dequantize(weight: NF4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`weight.shape` values CODE[code] * absmax, multiplied in float32 and rounded once to
    `dtype`.
    """
    if weight.packed.is_meta:
        return torch.empty(weight.shape, dtype=dtype, device="meta")
    if dtype in _FAST_DTYPES and _bitsandbytes(weight.packed.device.type):
        return _dequantize_bitsandbytes(weight, dtype)
    return dequantize_plain(weight, dtype)


def dequantize_plain(weight: NF4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dequantize` in plain PyTorch: each byte fetches its two float32 values from a 256-entry
    table as one int64.
    """
    scales = weight.scales.view(torch.float32)
    device = weight.packed.device
    absmax = dynamic_map(device).index_select(0, weight.absmax.int())
    absmax = absmax * scales[:-1].repeat_interleave(GROUP)[: len(absmax)] + scales[-1]
    count = torch.Size(weight.shape).numel()
    out = torch.empty(2 * len(weight.packed), dtype=dtype, device=device)
    for start in range(0, count, CHUNK):
        codes = weight.packed[start // 2 : (start + CHUNK) // 2].int()
        values = _pairs(device).index_select(0, codes).view(torch.float32)
        whole = values.numel() // BLOCK
        values[: whole * BLOCK].view(whole, BLOCK).mul_(absmax[start // BLOCK :][:whole, None])
        values[whole * BLOCK :].mul_(absmax[-1])
        out[start : start + values.numel()] = values
    return out[:count].view(weight.shape)


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256,) int64: the bits of the two float32 values of each byte."""
    code = torch.tensor(CODE, device=device)
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], 1).view(torch.int64).view(-1)


_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dequantize_bitsandbytes(weight: NF4Tensor, dtype: torch.dtype) -> Tensor:
    operators = torch.ops.bitsandbytes
    scales = weight.scales.view(torch.float32)
    table = dynamic_map(weight.absmax.device)
    absmax = operators.dequantize_blockwise(weight.absmax, scales[:-1], table, GROUP, torch.float32)
    # one long row: see the module's docstring
    long = (2 * len(weight.packed),)
    shape = weight.shape if weight.shape[-1] % BLOCK == 0 else long
    values: Tensor = operators.dequantize_4bit(
        weight.packed, absmax + scales[-1], BLOCK, "nf4", shape, dtype
    )
    return values.view(-1)[: torch.Size(weight.shape).numel()].view(weight.shape)


@cache
def _bitsandbytes(device: str) -> bool:
    """Whether bitsandbytes imports and equals the plain kernel bit for bit on probes here; else say
    why not.
    """
    try:
        import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

        values = torch.arange(6400.0, device=device).sin()
        weights = (values.view(80, 80), values.view(50, 128), values[:35].view(5, 7))
        probes = [quantize_nf4(weight) for weight in weights]
        equal = all(
            torch.equal(_dequantize_bitsandbytes(probe, dtype), dequantize_plain(probe, dtype))
            for probe in probes
            for dtype in _FAST_DTYPES
        )
        reason = "" if equal else "its values differ from NF4's definition"
    # a driver, a missing library, a wrong build: whatever goes wrong inside is not fatal
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason:
        note("nf4.plain", reason=reason)
    return not reason


FEW_ROWS = 64
"""Up to so many rows are multiplied with the packed weight; from which number on a dequantized copy
pays is calibrated in bitsandbytes, card by card.
"""
# largest difference from the dequantized product, in units of its root mean square: a few roundings
# of an output five times as large; never below what sums in another order come to in float32
_ROUNDINGS, _SUM_ERROR = 8, 1e-4


def _packed_product(x: Tensor, weight: NF4Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b (…, out) from the packed weight, whose rows are whole blocks."""
    scales = weight.scales.view(torch.float32)
    product: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        x,
        weight.packed,
        weight.shape,
        scales[:-1],
        BLOCK,
        "nf4",
        bias,
        absmax_8bit=weight.absmax,
        absmax_code=dynamic_map(x.device),
        absmax_offset=scales[-1],
    )
    return product


_refusals: dict[tuple[torch.device, torch.dtype, tuple[int, ...]], str] = {}


def _multiplies_packed(weight: NF4Tensor, dtype: torch.dtype) -> bool:
    """Whether `_packed_product` is here and agrees with the dequantized product for weights of this
    shape, tried on the first of them; else say why not.
    """
    device = weight.packed.device
    key = device, dtype, weight.shape
    if weight.shape[1] % BLOCK or not _bitsandbytes(device.type):
        return False
    if key not in _refusals:
        inputs = torch.arange(FEW_ROWS * weight.shape[1], device=device).float().sin()
        x = inputs.view(FEW_ROWS, -1).to(dtype)
        product = nn.functional.linear(x, dequantize(weight, dtype))
        expected = product.float()
        tolerance = max(_ROUNDINGS * torch.finfo(dtype).eps, _SUM_ERROR)
        limit = tolerance * expected.square().mean().sqrt()
        try:
            # one, few and many rows have kernels of their own, each with and without a bias
            close = [
                (_packed_product(x[:rows], weight, bias) - expected[:rows] - added).abs().max()
                <= limit
                for rows in (1, FEW_ROWS // 8, FEW_ROWS)
                for bias, added in ((None, 0), (product[0], expected[0]))
            ]
            reason = "" if all(close) else "its values differ from the dequantized product's"
        # whatever else goes wrong inside is not fatal
        except Exception as error:
            if out_of_memory(error):
                raise  # says nothing of the kernel
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason and reason not in _refusals.values():
            note("nf4.product", reason=reason)
        _refusals[key] = reason
    return not _refusals[key]


Tile = tuple[slice, Tensor, Tensor | None]
"""Some rows of a weight: which, their dense weight, their bias."""


class _FrozenMatmul(torch.autograd.Function):
    """x W^T + b with a frozen W: keeps a reference to the module only, and dequantizes W again in
    the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.tiles = linear.tiles
        return linear.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        parts = (grad[..., rows] @ weight for rows, weight, _ in ctx.tiles(grad.dtype))
        return reduce(Tensor.add_, parts), None


class QuantizedLinear(nn.Module, ABC):
    """y = x W^T + b with W (out, in) frozen and quantized, b (out,) frozen; computed and returned
    in the dtype of x.

    Under autocast x is cast to autocast's dtype first, as for nn.Linear.
    """

    in_features: int
    out_features: int
    bias: Tensor | None

    @abstractmethod
    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        """All rows, dequantized some at a time."""

    def product(self, x: Tensor) -> Tensor:
        """The output (…, out) in the dtype of x (…, in), without gradients."""
        parts = [nn.functional.linear(x, weight, bias) for _, weight, bias in self.tiles(x.dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(autocast_dtype(x.device) or x.dtype)
        return cast(Tensor, _FrozenMatmul.apply(x, self))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class NF4Linear(QuantizedLinear):
    """W in NF4, quantized from a dense weight (out, in) on `device` (default: where the weight
    lies). Raises UserError if a value is inf or NaN.
    """

    packed: Tensor
    absmax: Tensor
    scales: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # What stays, however small, is made before the large tensors that go: behind those it would
        # keep the heap from shrinking, by 150 MB for bench/load_memory.py --divide 20.
        for name in ("packed", "absmax", "scales", "bias"):
            self.register_buffer(name, torch.empty(0, device="meta"))
        self.packed, self.absmax, self.scales, _ = quantize_nf4(weight, device)
        self.bias = None if bias is None else bias.detach().clone()

    @property
    def stored(self) -> NF4Tensor:
        """The weight as it lies."""
        shape = (self.out_features, self.in_features)
        return NF4Tensor(self.packed, self.absmax, self.scales, shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (out, in)."""
        return dequantize(self.stored, dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        """The whole weight at once."""
        bias = None if self.bias is None else self.bias.to(dtype)
        yield slice(None), self.dequantize(dtype), bias

    def product(self, x: Tensor) -> Tensor:
        """Of few rows while answering, with the weight as it lies."""
        few = x.numel() <= FEW_ROWS * self.in_features and not (self.training or x.is_meta)
        if few and _multiplies_packed(weight := self.stored, x.dtype):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return _packed_product(x, weight, bias)
        return super().product(x)
