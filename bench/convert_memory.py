"""Anonymous memory of `tools/convert.py` on a random ChatGLM3-shaped checkpoint of 600 MB in 100 MB shards.

    python bench/convert_memory.py [--bin] [--out bench/results/convert_memory.json]

Anonymous pages (RssAnon) count, not mapped files. A thread of the converting process samples /proc/self/status every 2 ms; the
baseline is taken after torch, Transformers and the converter are imported. Threshold: 250 MB above it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
THRESHOLD_BYTES = 250_000_000
SHARD_BYTES = 100_000_000
CONFIG = {
    **{"model_type": "chatglm", "architectures": ["ChatGLMModel"], "padded_vocab_size": 24576, "hidden_size": 2048},
    **{"ffn_hidden_size": 6848, "num_layers": 4, "num_attention_heads": 16, "kv_channels": 128, "seq_length": 8192},
    **{"multi_query_attention": True, "multi_query_group_num": 2, "layernorm_epsilon": 1e-5, "add_qkv_bias": True},
    **{"add_bias_linear": False, "rmsnorm": True, "original_rope": True, "post_layer_norm": True, "rope_ratio": 1},
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of the original layout; half of ChatGLM3's width, so that a shard of 100 MB holds any tensor."""
    hidden, ffn, vocab = CONFIG["hidden_size"], CONFIG["ffn_hidden_size"], CONFIG["padded_vocab_size"]
    assert isinstance(hidden, int) and isinstance(ffn, int) and isinstance(vocab, int)
    rows = hidden + 2 * 2 * 128
    found: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    layer = 0
    while sum(2 * _numel(shape) for shape in found.values()) + 2 * vocab * hidden < 600_000_000:
        prefix = f"transformer.encoder.layers.{layer}."
        found |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attention.query_key_value.weight": (rows, hidden),
            f"{prefix}self_attention.query_key_value.bias": (rows,),
            f"{prefix}self_attention.dense.weight": (hidden, hidden),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            f"{prefix}mlp.dense_4h_to_h.weight": (hidden, ffn),
        }
        layer += 1
    CONFIG["num_layers"] = layer
    return found | {"transformer.encoder.final_layernorm.weight": (hidden,), "transformer.output_layer.weight": (vocab, hidden)}


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def write_checkpoint(directory: Path, as_bin: bool) -> int:
    """Random bf16 shards with an index; returns the bytes written."""
    import torch
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    shard, size, count, total = {}, 0, 0, 0
    suffix, index = ("bin", "pytorch_model.bin.index.json") if as_bin else ("safetensors", "model.safetensors.index.json")
    todo = list(shapes().items())
    for position, (name, shape) in enumerate(todo):
        shard[name] = torch.randn(shape, dtype=torch.bfloat16)
        size += shard[name].nbytes
        following = 2 * _numel(todo[position + 1][1]) if position + 1 < len(todo) else SHARD_BYTES
        if size + following > SHARD_BYTES:
            file = f"part-{count:05d}.{suffix}"
            if as_bin:
                torch.save(shard, directory / file)
            else:
                save_file(shard, directory / file)
            weight_map |= dict.fromkeys(shard, file)
            count, total, size, shard = count + 1, total + size, 0, {}
    (directory / index).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return total


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system's /proc has no RssAnon")


def convert_measured(source: Path, out: Path) -> dict[str, float]:
    """Run the tool in this (fresh) process and sample its memory."""
    sys.path.insert(0, str(ROOT / "tools"))
    import convert
    import torch
    import transformers

    import cllm.model.checkpoint  # noqa: F401

    transformers.AutoModelForCausalLM, transformers.GlmForCausalLM, torch.__version__  # noqa: B018
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    baseline = anonymous_bytes()
    thread = threading.Thread(target=sample)
    thread.start()
    begin = time.perf_counter()
    convert.main([str(source), str(out)])
    seconds = time.perf_counter() - begin
    done.set()
    thread.join()
    return {"baseline_bytes": baseline, "peak_bytes": peak[0], "above_bytes": peak[0] - baseline, "seconds": round(seconds, 2)}


def main() -> int:
    """Write the checkpoint, convert it in a fresh process, record the figures."""
    import subprocess

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", action="store_true", help="pickle shards instead of safetensors")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "convert_memory.json")
    parser.add_argument("--measure", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(convert_measured(*map(Path, options.measure))))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "chatglm3"
        source.mkdir()
        total = write_checkpoint(source, options.bin)
        command = [sys.executable, __file__, "--measure", str(source), str(Path(scratch) / "native")]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = json.loads(output.splitlines()[-1])
    result = {
        **{"command": f"python bench/convert_memory.py{' --bin' if options.bin else ''}", "machine": platform.platform()},
        **{"checkpoint_bytes": total, "largest_tensor_bytes": 2 * max(map(_numel, shapes().values()))},
        **{"threshold_bytes": THRESHOLD_BYTES, "within": measured["above_bytes"] < THRESHOLD_BYTES, **measured},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["within"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
