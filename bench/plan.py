"""How near the memory plan comes: to a storage census of real steps of tiny models on the CPU, and
to PyTorch's CUDA allocator in the runs of bench/results/null-gpu.json.

    python bench/plan.py [--formulas CHECKOUT] [--out bench/results/plan.json]

`formula` is what the closed formulas said that the trace replaced: in the second table as these
runs recorded it, in the first by the code of commit bfe9f9e in the directory CHECKOUT (`git
worktree add`), for the architectures that it knew. Takes some twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
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
FORMULAS = """
import json, sys
from cllm.memory import Settings, estimate_vram
from cllm.messages import UserError
from cllm.shapes import shape_of

for config, settings in json.load(sys.stdin):
    try:
        plan = estimate_vram(shape_of(config), Settings(**settings))
        print(plan.allocated - plan.items["optimizer"] + plan.host)
    except UserError:
        print(0)
"""
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


def tried(kind: str, case: str, tokens: int) -> tuple[dict[str, Any], Settings]:
    """A tiny model's config.json and the settings that it is planned and run with."""
    positions = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    layers = {} if "layer_types" in TINY[kind] else {"num_hidden_layers": 6}
    config = tiny(kind) | {positions: tokens} | layers
    return config, Settings(row_tokens=tokens, rank=8, device="cpu", **CASES[case])


def censuses() -> list[dict[str, Any]]:
    """Plan over census of every tiny model, setting and row length."""
    found = []
    for kind in TINY:
        for case in CASES:
            for tokens in ROWS:
                config, settings = tried(kind, case, tokens)
                whole, alive = ratios(config, settings)
                row = {"architecture": kind, "setting": case, "row_tokens": tokens}
                found.append({**row, "plan_to_census": whole, "of_the_step": alive})
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def by_formulas(rows: list[dict[str, Any]], checkout: Path) -> None:
    """Adds what the closed formulas said over the census, where they knew the architecture."""
    cases = [tried(row["architecture"], row["setting"], row["row_tokens"]) for row in rows]
    done = subprocess.run(
        [sys.executable, "-c", FORMULAS],
        input=json.dumps([(config, asdict(settings)) for config, settings in cases]),
        cwd=checkout,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for row, (config, settings), formula in zip(
        rows, cases, map(int, done.stdout.split()), strict=True
    ):
        plan = estimate_vram(config, settings)
        planned = plan.allocated - plan.items["optimizer"] + plan.host
        row["formula_to_census"] = formula / planned * row["plan_to_census"] if formula else None


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
    parser.add_argument("--formulas", type=Path, metavar="CHECKOUT")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "plan.json")
    options = parser.parse_args()
    start = time.perf_counter()
    on_cpu, on_null = censuses(), allocated()
    if options.formulas:
        by_formulas(on_cpu, options.formulas)
    of_census = [row["plan_to_census"] for row in on_cpu]
    of_allocator = [row["trace"] for row in on_null]
    summary = {
        "census": [min(of_census), max(of_census)],
        "allocator": [min(of_allocator), max(of_allocator)],
        "seconds": round(time.perf_counter() - start),
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    command = "python bench/plan.py" + " --formulas CHECKOUT" * bool(options.formulas)
    report = {"command": command, **versions, **summary}
    report |= {"censuses": on_cpu, "allocator_runs": on_null}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
