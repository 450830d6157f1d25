"""Anonymous memory of `tools/convert.py` on a random ChatGLM3-shaped checkpoint of 600 MB in 100 MB
shards.

    python bench/convert_memory.py [--bin] [--out bench/results/convert_memory.json]

Anonymous pages (RssAnon) count, not mapped files. A thread of the converting process samples
/proc/self/status every 2 ms; the baseline is taken after torch, Transformers and the converter are
imported. Threshold: 250 MB above it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from load_memory import cut, layout, sampled, size_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
THRESHOLD_BYTES = 250_000_000
SHARD_BYTES = 100_000_000
SIZES = (2048, 6848, 4, 24576)
"""hidden, ffn, layers, vocabulary: half of ChatGLM3's width, so that one tensor fills a shard at
most
"""


def write_checkpoint(directory: Path, as_bin: bool) -> int:
    """Random bf16 shards with an index; returns the bytes written."""
    import torch
    from safetensors.torch import save_file

    config, shapes = layout(*SIZES)
    weight_map: dict[str, str] = {}
    suffix, index = (
        ("bin", "pytorch_model.bin.index.json")
        if as_bin
        else ("safetensors", "model.safetensors.index.json")
    )
    for number, part in enumerate(cut(shapes, SHARD_BYTES)):
        file, shard = (
            f"part-{number:05d}.{suffix}",
            {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in part.items()},
        )
        if as_bin:
            torch.save(shard, directory / file)
        else:
            save_file(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    (directory / index).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return size_of(shapes)


def convert_measured(source: Path, out: Path) -> dict[str, float]:
    """Run the tool in this (fresh) process and sample its memory."""
    sys.path.insert(0, str(ROOT / "tools"))
    import convert
    import torch
    import transformers

    import cllm.model.checkpoint  # noqa: F401

    transformers.AutoModelForCausalLM, transformers.GlmForCausalLM, torch.__version__  # noqa: B018
    return sampled(lambda: convert.main([str(source), str(out)]), 0.002)


def main() -> int:
    """Write the checkpoint, convert it in a fresh process, record the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bin", action="store_true", help="pickle shards instead of safetensors")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "convert_memory.json"
    )
    parser.add_argument("--measure", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(convert_measured(*map(Path, options.measure))))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "chatglm3"
        source.mkdir()
        total = write_checkpoint(source, options.bin)
        command = [
            sys.executable,
            __file__,
            "--measure",
            str(source),
            str(Path(scratch) / "native"),
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = json.loads(output.splitlines()[-1])
    result = {
        **{
            "command": f"python bench/convert_memory.py{' --bin' if options.bin else ''}",
            "machine": platform.platform(),
        },
        **{
            "checkpoint_bytes": total,
            "largest_tensor_bytes": 2 * max(map(math.prod, layout(*SIZES)[1].values())),
        },
        **{
            "threshold_bytes": THRESHOLD_BYTES,
            "within": measured["above_bytes"] < THRESHOLD_BYTES,
            **measured,
        },
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["within"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
