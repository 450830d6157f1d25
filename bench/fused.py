"""What the fused LoRA linears and gated MLP pay: one training step with and without them,
alternated in one process.

    python bench/fused.py [--rounds 3] [--out bench/results/fused.json]

A Qwen2-shaped model of two layers (hidden 1024, MLP 2816), rank 16 on all linears, one row of 4,096
tokens, loss and backward; the base in 16 or 32 bits as the device computes, and in NF4; layers kept
and recomputed. Seconds are medians of the rounds, "bytes" the most storage alive at once. Both
variants' losses are compared; tests/test_model_lora.py holds their gradients together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from cllm.bench import random_row
from cllm.learn.loss import sft_loss
from cllm.learn.proof import peak_storage_bytes
from cllm.model.checkpoint import Placement, random_model
from cllm.model.lora import LoraLinear, inject_lora
from cllm.model.offload import checkpoint_layers

CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TOKENS, RANK = 4096, 16


def measure(
    quantize: str | None, recomputed: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = random_model(CONFIG, Placement(dtype, device, quantize or "none"))
    inject_lora(model, rank=RANK, alpha=2.0 * RANK)
    checkpoint_layers(model.train(), recomputed)
    row = random_row(TOKENS, CONFIG["vocab_size"]).to(device)  # type: ignore[call-overload]

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = sft_loss(model, row, 2**27)
        loss.backward()
        return loss.item()

    found: dict[bool, dict[str, Any]] = {}
    for fused in (True, False):
        LoraLinear.fused = fused
        found[fused] = {"loss": step(), "seconds": [], "bytes": peak_storage_bytes(step)}
    for _ in range(rounds):
        for fused in (True, False):
            LoraLinear.fused = fused
            start = time.perf_counter()
            step()
            found[fused]["seconds"].append(time.perf_counter() - start)
    fused, plain = found[True], found[False]
    assert abs(fused["loss"] - plain["loss"]) < 1e-4 * plain["loss"], found
    medians = {
        name: statistics.median(side["seconds"])
        for name, side in (("fused", fused), ("plain", plain))
    }
    return {
        "base": quantize or str(dtype),
        "recomputed_layers": recomputed,
        "seconds": medians,
        "speed": medians["plain"] / medians["fused"],
        "bytes": {"fused": fused["bytes"], "plain": plain["bytes"]},
        "memory": fused["bytes"] / plain["bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    results = [
        measure(quantize, layers, arguments.rounds, device)
        for quantize in (None, "nf4")
        for layers in (0, -1)
    ]
    machine = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg(),
    }
    report = {
        "command": " ".join(["python", "bench/fused.py", *sys.argv[1:]]),
        "machine": machine,
        "tokens": TOKENS,
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
