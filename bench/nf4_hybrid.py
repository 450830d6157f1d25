"""What NF4 costs a hybrid of recurrent layers (Qwen3.5) and a plain one (Qwen3) of the same sizes:
KL of the logits against float32, beside bfloat16's.

    python bench/nf4_hybrid.py --json bench/results/nf4_hybrid.json

Random weights, since no published Qwen3.5 is at hand without a hub: this says what the structure
does, not what the published weights lose.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,  # wide enough for logits that are not all alike
    "tie_word_embeddings": True,
}
HYBRID: dict[str, Any] = {
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}


def measure(config: Any, seed: int, folder: Path) -> dict[str, float]:
    """Mean KL in nats of one random model."""
    from transformers import AutoModelForCausalLM

    from cllm.model import load_model
    from cllm.model.checkpoint import Placement

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    ids = torch.randint(3, SIZES["vocab_size"], (2, 96))

    def log_probabilities(placement: Placement) -> Tensor:
        with torch.no_grad():
            logits: Tensor = load_model(folder, placement)(input_ids=ids, use_cache=False).logits
        return logits.float().log_softmax(-1)

    exact = log_probabilities(Placement())

    def kl(other: Tensor) -> float:
        return float((exact.exp() * (exact - other)).sum(-1).mean())

    return {
        "nf4": kl(log_probabilities(Placement(quantize="nf4"))),
        "bf16": kl(log_probabilities(Placement(dtype=torch.bfloat16))),
    }


def main(argv: list[str]) -> int:
    """Three seeds of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    from transformers import CONFIG_MAPPING

    configs = {
        "qwen3.5": CONFIG_MAPPING["qwen3_5_text"](**SIZES, **HYBRID),
        "qwen3": CONFIG_MAPPING["qwen3"](**SIZES),
    }
    results = {}
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = [measure(config, seed, Path(folder)) for seed in range(3)]
    document = {"command": "python bench/nf4_hybrid.py", "mean_kl": results}
    print(json.dumps(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
