"""How near the memory plan comes: to a storage census of real steps of tiny models on the CPU, and
to PyTorch's CUDA allocator in the runs of bench/results/null-gpu.json.

    python bench/plan.py [--out bench/results/plan.json]

`formula` in the second table is what the closed formulas said that the trace replaced, as these
runs recorded it. Takes some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from test_memory import TINY, ratios, tiny  # noqa: E402

from cllm.config import load_config  # noqa: E402
from cllm.fit import estimate_vram  # noqa: E402
from cllm.memory import MIB, Settings  # noqa: E402
from cllm.plan import settings_of  # noqa: E402
from cllm.shapes import find_config  # noqa: E402

ROWS = (512, 2048, 8192)
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"quantize": "none", "checkpoint_layers": 0},
    "QLoRA": {"quantize": "nf4"},
    "every saving": {
        "quantize": "nf4",
        "head": "int8",
        "embedding": "cpu",
        "offload_inputs": True,
        "stream_layers": 3,
        "mlp_tile_tokens": 256,
        "chunk_bytes": 32 * MIB,
    },
}


def censuses() -> list[dict[str, Any]]:
    """Plan over census of every tiny model, setting and row length."""
    found = []
    for kind in TINY:
        for case, change in CASES.items():
            for tokens in ROWS:
                positions = "n_positions" if kind == "gpt2" else "max_position_embeddings"
                layers = {} if "layer_types" in TINY[kind] else {"num_hidden_layers": 6}
                config = tiny(kind) | {positions: tokens} | layers
                settings = Settings(row_tokens=tokens, rank=8, device="cpu", **change)
                whole, alive = ratios(config, settings)
                row = {"architecture": kind, "setting": case, "row_tokens": tokens}
                found.append({**row, "plan_to_census": whole, "of_the_step": alive})
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def allocated() -> list[dict[str, Any]]:
    """Formula and trace over the allocator's peak of every step on the null device."""
    report = json.loads((ROOT / "bench" / "results" / "null-gpu.json").read_text(encoding="utf-8"))
    found = []
    for run in (run for run in report["programs"] if "max_memory_allocated" in run):
        config = load_config(os.devnull, run["command"].split()[4:])
        settings = replace(
            settings_of(config, run["precision"], "cuda"),
            row_tokens=run["row_tokens"],
            checkpoint_layers=run["recomputed_layers"],
        )
        planned = estimate_vram(find_config(run["model"])[1], settings).allocated
        peak = run["max_memory_allocated"]
        names = ("model", "setting", "card", "precision", "row_tokens", "recomputed_layers")
        ratio = {"formula": run["planned"] / peak, "trace": planned / peak}
        found.append({name: run[name] for name in names} | {"allocated": peak} | ratio)
    return found


def main() -> int:
    """Write both tables; the last line is the extremes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "plan.json")
    options = parser.parse_args()
    start = time.perf_counter()
    on_cpu, on_null = censuses(), allocated()
    of_census = [row["plan_to_census"] for row in on_cpu]
    of_allocator = [row["trace"] for row in on_null]
    summary = {
        "census": [min(of_census), max(of_census)],
        "allocator": [min(of_allocator), max(of_allocator)],
        "seconds": round(time.perf_counter() - start),
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report = {"command": "python bench/plan.py", **versions, **summary}
    report |= {"censuses": on_cpu, "allocator_runs": on_null}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
