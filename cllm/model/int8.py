"""Int8 with one scale a row: the output head in half of its 16-bit bytes.

An NF4 head would take a quarter. On an NF4 base of Gemma 3 270M it raises perplexity by 41 % (dev
rows; int8: 0.0 %), which is why there is none.

W[i, j] is codes[i, j] * scale[i] with scale[i] = max_j |W[i, j]| / 127, codes rounded to nearest:
the row-wise absmax quantization of LLM.int8() (arXiv 2208.07339, section 2.1), for the weight
alone; the product with x is computed in x's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from cllm.messages import UserError
from cllm.model.nf4 import CHUNK, QuantizedLinear, Tile

TILE = 2**27  # weights dequantized at a time


class Int8Linear(QuantizedLinear):
    """W in int8, quantized from a dense linear layer where that lies."""

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Raises UserError if a weight is inf or NaN: then the checkpoint is damaged."""
        super().__init__()
        weight, bias = linear.weight.detach(), linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        low, high = torch.aminmax(weight, dim=1)
        largest = torch.maximum(high, -low).float()
        if not weight.is_meta and not largest.isfinite().all():
            raise UserError("checkpoint.unquantizable", detail="the weight holds inf or NaN")
        self.register_buffer(
            "codes", torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        )
        factors = 127 / largest[:, None].clamp(min=1e-36)
        for rows, factor, codes in self._pieces(weight, factors, self.codes):
            codes.copy_((rows.float() * factor).round_())
        # The float's bits as integers, because module.to(bfloat16) would round a floating-point
        # buffer.
        self.register_buffer("scales", (largest / 127).view(torch.int32))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def _pieces(self, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Some rows of each at a time."""
        step = max(1, CHUNK // self.in_features)
        return zip(*(matrix.split(step) for matrix in matrices), strict=True)

    def tiles(self, dtype: torch.dtype, weights: int = TILE) -> Iterator[Tile]:
        """About so many weights at a time, multiplied in float32 and rounded once to `dtype`."""
        scales = self.scales.view(torch.float32)[:, None]
        step = max(1, weights // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            dense = torch.empty_like(self.codes[rows], dtype=dtype)
            pieces = self._pieces(dense, self.codes[rows], scales[rows])
            # Without values (`cllm.trace`) one says what it takes.
            for piece, codes, scale in islice(pieces, 1) if dense.is_meta else pieces:
                piece.copy_(codes * scale)
            yield rows, dense, None if self.bias is None else self.bias[rows].to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (out, in)."""
        return next(self.tiles(dtype, self.codes.numel()))[1]
