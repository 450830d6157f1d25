"""NF4 against bitsandbytes on 1,000 random matrices, and what one 4096 x 4096 weight costs: `python
bench/nf4_parity.py`.

Counts differing packed bytes, absmax codes, second-level scales and dequantized values (compared as
one row: bitsandbytes' AVX-512 kernel is wrong for rows that are a multiple of 16 but not of 64),
and the share of absmax codes that rounding to the nearest code would change. The last line of
stdout is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import bitsandbytes
import torch
from bitsandbytes import functional

from cllm.model.nf4 import GROUP, dequantize, dequantize_plain, dynamic_map, quantize_nf4

CASES = 1000


def differences() -> dict[str, int | float]:
    counts = dict.fromkeys(
        ("weights", "packed", "absmax", "scales", "values", "values_plain", "codes", "nearest"), 0
    )
    generator = torch.Generator().manual_seed(0)
    for index in range(CASES):
        rows, columns = (
            int(torch.randint(1, limit, (), generator=generator)) for limit in (200, 600)
        )
        if index % 2:
            columns = max(64, columns // 64 * 64)
        weight = torch.randn(rows, columns, generator=generator) * 10.0 ** (index % 9 - 5)
        if index % 4 == 3:
            weight *= torch.rand(rows, columns, generator=generator) < 0.3
        weight = weight.to((torch.float32, torch.bfloat16)[index // 2 % 2])
        ours = quantize_nf4(weight)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        counts["weights"] += weight.numel()
        counts["packed"] += int((ours.packed != packed.view(-1)).sum())
        counts["absmax"] += int((ours.absmax != state.absmax.view(-1)).sum())
        theirs = torch.cat([state.state2.absmax, state.offset.view(1)])
        counts["scales"] += int((ours.scales != theirs.view(torch.int32)).sum())
        state.shape = torch.Size((weight.numel(),))
        values = functional.dequantize_4bit(packed, state).view(weight.shape)
        counts["values"] += int((dequantize(ours, weight.dtype) != values).sum())
        counts["values_plain"] += int((dequantize_plain(ours, weight.dtype) != values).sum())
        absmax, first = (
            functional.quantize_4bit(weight, quant_type="nf4")[1].absmax,
            state.state2.absmax,
        )
        group = torch.nn.functional.pad(absmax - state.offset, (0, -absmax.numel() % GROUP)).view(
            -1, GROUP
        )
        code = dynamic_map(torch.device("cpu"))
        nearest = torch.bucketize(
            group / first.clamp(min=1e-38)[:, None], (code[1:] + code[:-1]) / 2
        )
        counts["codes"] += absmax.numel()
        counts["nearest"] += int(
            (nearest.view(-1)[: absmax.numel()] != state.absmax.view(-1)).sum()
        )
    return counts


def milliseconds(run: Callable[[], object], rounds: int = 5) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(1000 * min(times), 1)


def main() -> None:
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        result: dict[str, object] = {
            "bitsandbytes": bitsandbytes.__version__,
            "torch": torch.__version__,
        }
        result["differences"] = differences()
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        weight = torch.randn(4096, 4096).to(dtype)
        quantized, x = quantize_nf4(weight), torch.randn(512, 4096, dtype=dtype)
        result[f"milliseconds_{name}"] = {
            "quantize": milliseconds(lambda w=weight: quantize_nf4(w), 3),
            "quantize_bitsandbytes": milliseconds(
                lambda w=weight: functional.quantize_4bit(
                    w, quant_type="nf4", compress_statistics=True
                ),
                3,
            ),
            "dequantize": milliseconds(lambda q=quantized, d=dtype: dequantize(q, d)),
            "dequantize_plain": milliseconds(lambda q=quantized, d=dtype: dequantize_plain(q, d)),
            "matmul_512_rows": milliseconds(lambda x=x, w=weight: x @ w.T, 3),
        }
        print(name, result[f"milliseconds_{name}"], file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
