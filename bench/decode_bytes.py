"""What decoding one token moves: bytes read and written by every operation of one step of the
engine, for the packed product and for the dequantized one, on the null device. No speed is
measured.

    PYTHON=CUVENV/bin/python NULLGPU_VALUES=harmless NULLGPU_COPY=0 NULLGPU_GIB=24 \
        NULLGPU_SMS=24 NULLGPU_CC=8.9 tools/nullgpu/run bench/decode_bytes.py
        [--models Qwen/Qwen3-8B THUDM/chatglm3-6b] [--prompt 512]
        [--out bench/results/decode_bytes.json]

`weights`: what the step cannot but read: every parameter and buffer of the layers and the head as
it lies, once. `cache`: keys and values of all rows. `ratio`: all bytes over these two.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "nullgpu")]

from cllm.model import nf4  # noqa: E402
from cllm.serve.engine import Engine  # noqa: E402
from cllm.serve.sampling import Sampling  # noqa: E402

ROWS = (1, 16)
LOOKUPS = {"embedding", "index_select", "gather", "index"}
"""They read of their first input as much as they write."""
OVERWRITING = {"copy_", "fill_", "zero_", "index_put_"}
"""They do not read what they write over."""


def touched(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded dimension is stored once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1
    for size, stride in sizes:
        count *= size if stride or not size else 1
    return count * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Adds up what every operation reads and writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        returns = [value.alias_info for value in func._schema.returns]
        if name.startswith(("empty", "new_empty", "detach")) or (
            returns and all(alias is not None and not alias.is_write for alias in returns)
        ):
            return outputs
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        if name in OVERWRITING or name in LOOKUPS:
            inputs = inputs[1:]
        if name in LOOKUPS:
            inputs += results
        self.bytes += sum(map(touched, [*inputs, *results]))
        return outputs


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all that a step reads of the model as it lies: all but the embedding, whose rows are
    looked up, unless it is the head as well.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    tensors: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
    left_out = None if head.__dict__.get("weight") is embedding.weight else embedding.weight
    tied = any(tensor is embedding.weight for tensor in head.parameters())
    return sum(touched(t) for t in tensors if tied or t is not left_out)


def decoded(engine: Engine, rows: int, prompt: int) -> dict[str, Any]:
    """Bytes of one step in which `rows` answers grow by a token. Where bitsandbytes dequantizes
    inside its product, the copy counts as it does outside.
    """
    import nullgpu
    from bitsandbytes.backends.cuda import ops
    from transformers import masking_utils

    vocabulary = engine.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    sampling = Sampling(max_new_tokens=8, stop_ids=frozenset())
    ids = torch.randint(vocabulary, (rows, prompt), generator=torch.Generator().manual_seed(0))
    # of unlike length, as chats are, so that there is a mask (below: its values are not here)
    for shorter, row in enumerate(ids.tolist()):
        engine.waiting.append(engine._row(row[shorter:], sampling, 1))
    while len(engine.batch.rows) < rows:
        engine.step()
    engine.step()
    nullgpu.reset()
    masked = patch.object(masking_utils, "_ignore_causal_mask_sdpa", lambda *_: rows == 1)
    inside, fallback = [0], ops._dequant_linear_fallback

    def counted(x: Tensor, packed: Tensor, shape: list[int], *rest: Any, **how: Any) -> Tensor:
        # the dense weight is written and read; its scales written, read, shifted and read again
        inside.append(round(shape[0] * shape[1] * (2 * x.element_size() + 4 * 4 / nf4.BLOCK)))
        return fallback(x, packed, shape, *rest, **how)

    product = patch.object(ops, "_dequant_linear_fallback", counted)
    with masked, product, Traffic() as traffic:
        engine.step()
    names = nullgpu.kernels().items()
    launched = {name: count for name, count in names if "4bit" in name or "antize" in name}
    layers = engine.batch.cache.layers
    cache = sum(touched(layer.keys) + touched(layer.values) for layer in layers)
    for row in [*engine.batch.rows]:
        row.cancel()
    engine.step()
    moved = {"rows": rows, "bytes": traffic.bytes + sum(inside), "cache": cache}
    return {**moved, "copies_inside": len(inside) - 1, "kernels": launched}


def measure(engine: Engine, prompt: int) -> list[dict[str, Any]]:
    """Both products at every number of rows."""
    weights = stored_bytes(engine.model)
    results = []
    for rows in ROWS:
        for product in ("packed", "dequantized"):
            few = nf4.FEW_ROWS if product == "packed" else 0
            with patch.object(nf4, "FEW_ROWS", few):
                told = decoded(engine, rows, prompt)
            ratio = told["bytes"] / (weights + told["cache"])
            results.append({**told, "product": product, "weights": weights, "ratio": ratio})
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["Qwen/Qwen3-8B", "THUDM/chatglm3-6b"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/decode_bytes.json")
    options = parser.parse_args()
    from cllm import shapes
    from cllm.assembly import assemble
    from cllm.config import LoraConfig, MemoryConfig, ModelConfig

    # Scales are computed on the host, which takes most of the time, and no value matters here.
    def no_scales(absmax: Tensor) -> tuple[Tensor, Tensor]:
        groups = -(-len(absmax) // nf4.GROUP)
        return torch.zeros(len(absmax), dtype=torch.uint8), torch.zeros(groups + 1)

    nf4._quantize_absmax = no_scales
    major, minor = torch.cuda.get_device_capability()
    report = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    here: dict[str, Any] = {"command": " ".join(["bench/decode_bytes.py", *sys.argv[1:]])}
    report[f"sm_{major}{minor}"] = here
    for wanted in options.models:
        name, original = shapes.find_config(wanted)
        assert original is not None
        built = assemble(
            original, ModelConfig(quantize="nf4"), MemoryConfig(), adapter=LoraConfig(rank=16)
        )
        built.model.eval().requires_grad_(False)
        window = (options.prompt + 256) * 2 * max(ROWS)
        engine = Engine(built.model, kv_tokens=window, autocast=built.precision.autocast)
        results = measure(engine, options.prompt)
        here[name] = {"prompt": options.prompt, "steps": results}
        print(json.dumps(here[name], indent=1), flush=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
