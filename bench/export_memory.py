"""Peak host memory of a merge: a synthetic checkpoint of about 600 MB, and the bound largest tensor
x 3 + 1 GiB.

    python bench/export_memory.py --json bench/results/export_memory.json

The merge runs in a process of its own, whose peak resident set is read from the kernel, imports of
torch and Transformers included. Two limits are judged: the bound itself, and a sharper one that a
bound of 1 GiB would hide: 100 MB above largest x 3 and what the imports alone take. POSIX only
(resource). Exit code 1 if a limit is broken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
MERGE = """
import json, resource, sys
from pathlib import Path
import torch, transformers
from transformers import LlamaForCausalLM
from cllm.model.merge import open_merge, write_merged
torch.empty(8, 8) @ torch.empty(8, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
base, adapter, out, nf4 = sys.argv[1:]
Path(out).mkdir()
write_merged(open_merge(Path(base), Path(adapter), nf4=nf4 == "nf4"), Path(out), shard_bytes=200 * 2**20)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"imports_bytes": before * 1024, "peak_bytes": after * 1024}))
"""


def build(folder: Path, hidden: int, layers: int, vocabulary: int) -> tuple[int, int]:
    """A bf16 Llama of random bytes and a rank-16 adapter; (bytes of the checkpoint, bytes of its
    largest tensor).
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cllm.model.adapter import save_adapter
    from cllm.model.lora import inject_lora
    from cllm.model.shards import write_safetensors

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layout = {
        name: (tuple(tensor.shape), torch.bfloat16) for name, tensor in model.state_dict().items()
    }
    (folder / "base").mkdir(parents=True)
    config.save_pretrained(folder / "base")
    torch.manual_seed(0)
    file = folder / "base" / "model.safetensors"
    write_safetensors(
        file,
        layout,
        ((name, torch.randn(shape, dtype=dtype) * 0.02) for name, (shape, dtype) in layout.items()),
    )
    for layer in inject_lora(model, rank=16, alpha=32.0).values():
        for part in ("lora_A", "lora_B"):
            setattr(layer, part, torch.nn.Parameter(torch.randn(getattr(layer, part).shape) * 0.01))
    save_adapter(model, folder / "adapter", base=str(folder / "base"))
    largest = max(torch.Size(shape).numel() for shape, _ in layout.values()) * 2
    return file.stat().st_size, largest


def measure(folder: Path, mode: str) -> dict[str, int]:
    """The peak of one merge in a fresh process."""
    command = [
        sys.executable,
        "-c",
        MERGE,
        str(folder / "base"),
        str(folder / "adapter"),
        str(folder / f"out-{mode}"),
        mode,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str]) -> int:
    """Build, merge both ways, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--vocabulary", type=int, default=32000)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size, largest = build(folder, options.hidden, options.layers, options.vocabulary)
        runs = {mode: measure(folder, mode) for mode in ("16bit", "nf4")}
    bound = 3 * largest + 2**30
    result: dict[str, object] = {
        "command": "python bench/export_memory.py " + " ".join(argv),
        "checkpoint_bytes": size,
        "largest_tensor_bytes": largest,
        "bound_bytes": bound,
    }
    right = True
    for mode, found in runs.items():
        sharp = found["imports_bytes"] + 3 * largest + 100 * 10**6
        right = right and found["peak_bytes"] <= min(bound + 100 * 10**6, sharp)
        result[mode] = {**found, "sharp_limit_bytes": sharp}
    result["right"] = right
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
