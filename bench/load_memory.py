"""Anonymous host memory while a ChatGLM3-6B-shaped checkpoint (12.5 GB) streams into NF4 on the
CPU.

    python bench/load_memory.py [--divide 20] [--out bench/results/load_memory.json]

The shards are sparse files of zeros in the published layout, so they take no disk; memory and time
do not depend on the values. Anonymous pages (RssAnon) count, not mapped files; a thread samples
them every 5 ms, the baseline is taken after torch, Transformers and the loader are imported. Bound:
bytes of the loaded model + 3 x the largest tensor + 0.5 GiB. `--divide 20`: a twentieth of the
size, with 0.1 GiB instead of the 0.5. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SHARD_BYTES = 2 * 2**30
SIZES = {1: (4096, 13696, 28, 65024), 20: (1024, 3424, 24, 16256)}
"""divide -> hidden, ffn, layers, vocabulary"""
SLACK_BYTES = {1: 2**29, 20: int(0.1 * 2**30)}
Shapes = dict[str, tuple[int, ...]]


def layout(hidden: int, ffn: int, layers: int, vocab: int) -> tuple[dict[str, Any], Shapes]:
    """config.json and name -> shape as THUDM publishes them."""
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "padded_vocab_size": vocab,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_layers": layers,
        "num_attention_heads": hidden // 128,
        "kv_channels": 128,
        "seq_length": 8192,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "original_rope": True,
        "post_layer_norm": True,
        "rope_ratio": 1,
    }
    rows = hidden + 2 * 2 * 128
    shapes: Shapes = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for layer in range(layers):
        own = {
            "input_layernorm.weight": (hidden,),
            "self_attention.query_key_value.weight": (rows, hidden),
            "self_attention.query_key_value.bias": (rows,),
            "self_attention.dense.weight": (hidden, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            "mlp.dense_4h_to_h.weight": (hidden, ffn),
        }
        shapes |= {
            f"transformer.encoder.layers.{layer}.{name}": shape for name, shape in own.items()
        }
    return config, {
        **shapes,
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocab, hidden),
    }


def size_of(shapes: Shapes) -> int:
    """Bytes in 16 bits."""
    return sum(2 * math.prod(shape) for shape in shapes.values())


def cut(shapes: Shapes, shard_bytes: int) -> list[Shapes]:
    """As many tensors a shard as fit."""
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and size_of(shards[-1] | {name: shape}) > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    return shards


def write_checkpoint(folder: Path, divide: int) -> int:
    """Sparse safetensors shards with their index; returns the bytes they claim to hold."""
    config, shapes = layout(*SIZES[divide])
    weight_map, shards = {}, cut(shapes, SHARD_BYTES)
    for number, shard in enumerate(shards, 1):
        file, header, at = f"model-{number:05d}-of-{len(shards):05d}.safetensors", {}, 0
        for name, shape in shard.items():
            header[name] = {
                "dtype": "BF16",
                "shape": list(shape),
                "data_offsets": [at, at := at + 2 * math.prod(shape)],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + at)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map}), encoding="utf-8"
    )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return size_of(shapes)


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system's /proc has no RssAnon")


def sampled(work: Callable[[], object], interval_seconds: float) -> dict[str, float]:
    """Anonymous bytes before `work` and at most while it runs in this process; and how long it
    takes.
    """
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(interval_seconds):
            peak = max(peak, anonymous_bytes())

    baseline, thread = anonymous_bytes(), threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return {
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "above_bytes": peak - baseline,
        "seconds": round(seconds, 2),
    }


def measure(folder: Path) -> dict[str, float]:
    """Load in this (fresh) process and sample its memory."""
    import torch
    import transformers

    from cllm.learn.proof import storage_bytes
    from cllm.model.checkpoint import Placement, load_model

    transformers.AutoModelForCausalLM, transformers.GlmForCausalLM  # noqa: B018
    loaded: list[torch.nn.Module] = []
    found = sampled(
        lambda: loaded.append(load_model(folder, Placement(dtype=torch.bfloat16, quantize="nf4"))),
        0.005,
    )
    return {"loaded_bytes": storage_bytes([*loaded[0].parameters(), *loaded[0].buffers()]), **found}


def run(divide: int) -> dict[str, Any]:
    """Write the checkpoint, load it in a fresh process, compare with the bound."""
    with tempfile.TemporaryDirectory() as scratch:
        total = write_checkpoint(Path(scratch), divide)
        output = subprocess.run(
            [sys.executable, __file__, "--measure", scratch],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    measured = json.loads(output.splitlines()[-1])
    largest = max(2 * math.prod(shape) for shape in layout(*SIZES[divide])[1].values())
    bound = measured["loaded_bytes"] + 3 * largest + SLACK_BYTES[divide]
    sizes = {"checkpoint_bytes": total, "largest_tensor_bytes": largest, "bound_bytes": bound}
    return {**sizes, **measured, "within": measured["above_bytes"] < bound}


def main() -> int:
    """Record the figures; exit code 1 if the bound does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--divide",
        type=int,
        choices=list(SIZES),
        default=1,
        help="a twentieth of the size, for the test",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "load_memory.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    command = "python bench/load_memory.py" + (
        f" --divide {options.divide}" if options.divide > 1 else ""
    )
    result = {"command": command, "machine": platform.platform(), **run(options.divide)}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["within"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
