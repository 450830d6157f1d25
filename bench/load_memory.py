"""Anonymous host memory while a ChatGLM3-6B-shaped checkpoint (12.5 GB) streams into NF4 on the CPU.

    python bench/load_memory.py [--divide 20] [--out bench/results/load_memory.json]

The shards are sparse files of zeros in the published layout, so they take no disk; memory and time do not depend on the values. Anonymous
pages (RssAnon) count, not mapped files; a thread samples them every 5 ms, the baseline is taken after torch, Transformers and the loader
are imported. Bound: bytes of the loaded model + 3 x the largest tensor + 0.5 GiB. `--divide 20`: a twentieth of the size, with 0.1 GiB
instead of the 0.5. Linux only.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SHARD_BYTES = 2 * 2**30
SIZES = {1: (4096, 13696, 28, 65024, 2**29), 20: (1024, 3424, 24, 16256, int(0.1 * 2**30))}
"""divide -> hidden, ffn, layers, vocabulary, slack in bytes"""


def layout(divide: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json and name -> shape as THUDM publishes them."""
    hidden, ffn, layers, vocab, _ = SIZES[divide]
    config = {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "padded_vocab_size": vocab, "hidden_size": hidden,
        "ffn_hidden_size": ffn, "num_layers": layers,
        "num_attention_heads": hidden // 128, "kv_channels": 128, "seq_length": 8192, "multi_query_attention": True,
        "multi_query_group_num": 2, "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True,
        "original_rope": True, "post_layer_norm": True, "rope_ratio": 1,
    }  # fmt: skip
    rows = hidden + 2 * 2 * 128
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for layer in range(layers):
        own = {
            "input_layernorm.weight": (hidden,), "self_attention.query_key_value.weight": (rows, hidden),
            "self_attention.query_key_value.bias": (rows,), "self_attention.dense.weight": (hidden, hidden),
            "post_attention_layernorm.weight": (hidden,), "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            "mlp.dense_4h_to_h.weight": (hidden, ffn),
        }  # fmt: skip
        shapes |= {f"transformer.encoder.layers.{layer}.{name}": shape for name, shape in own.items()}
    return config, {**shapes, "transformer.encoder.final_layernorm.weight": (hidden,), "transformer.output_layer.weight": (vocab, hidden)}


def write_checkpoint(folder: Path, divide: int) -> int:
    """Sparse safetensors shards with their index; returns the bytes they claim to hold."""
    config, shapes = layout(divide)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * math.prod(shape) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file, header, at = f"model-{number:05d}-of-{len(shards):05d}.safetensors", {}, 0
        for name, shape in shard.items():
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at := at + 2 * math.prod(shape)]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + at)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return sum(2 * math.prod(shape) for shape in shapes.values())


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(folder: Path) -> dict[str, float]:
    """Load in this (fresh) process and sample its memory."""
    import torch
    import transformers

    from cllm.learn.proof import storage_bytes
    from cllm.model.checkpoint import load_model

    transformers.AutoModelForCausalLM, transformers.GlmForCausalLM  # noqa: B018
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes())

    baseline = anonymous_bytes()
    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    model = load_model(folder, dtype=torch.bfloat16, quantize="nf4")
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    held = storage_bytes([*model.parameters(), *model.buffers()])
    return {"loaded_bytes": held, "baseline_bytes": baseline, "above_bytes": max(peak) - baseline, "seconds": round(seconds, 1)}


def run(divide: int) -> dict[str, Any]:
    """Write the checkpoint, load it in a fresh process, compare with the bound."""
    with tempfile.TemporaryDirectory() as scratch:
        total = write_checkpoint(Path(scratch), divide)
        output = subprocess.run([sys.executable, __file__, "--measure", scratch], check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = json.loads(output.splitlines()[-1])
    largest = max(2 * math.prod(shape) for shape in layout(divide)[1].values())
    bound = measured["loaded_bytes"] + 3 * largest + SIZES[divide][4]
    sizes = {"checkpoint_bytes": total, "largest_tensor_bytes": largest, "bound_bytes": bound}
    return {**sizes, **measured, "within": measured["above_bytes"] < bound}


def main() -> int:
    """Record the figures; exit code 1 if the bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divide", type=int, choices=list(SIZES), default=1, help="a twentieth of the size, for the test")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "load_memory.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    command = "python bench/load_memory.py" + (f" --divide {options.divide}" if options.divide > 1 else "")
    result = {"command": command, "machine": platform.platform(), **run(options.divide)}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["within"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
