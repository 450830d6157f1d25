"""The table "what fits in 8 GB" of both READMEs: bytes from bench/null_gpu.sh's runs, the longest
rows from the plan.

    python tools/readme_table.py            # rewrite the tables between the markers
    python tools/readme_table.py --check    # exit code 1 if they are out of date

Measured peaks are added once bench/results holds a GPU's report of the same model and row
(bench/gpu.sh writes it).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cllm.fit import longest_row, savings  # noqa: E402
from cllm.memory import GIB, Settings  # noqa: E402
from cllm.shapes import find_config  # noqa: E402

MODELS = (
    "Qwen/Qwen3-4B",
    "THUDM/chatglm3-6b",
    "01-ai/Yi-6B",
    "baichuan-inc/Baichuan2-7B-Base",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen-7B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-32B",
)
BUDGET_GIB = 8.0
EVERY_LAYER = 10**6
QUALITY = ("lora.rank=8", "model.head=int8")
"""Savings that change what is learned: not counted in the last column."""
BEGIN, END = "<!-- tools/readme_table.py: begin -->\n", "<!-- end -->\n"
HEADS = {
    "README.md": (
        "模型",
        "打包行 2,048 词元",
        "打包行 8,192 词元",
        "8 GiB 内最长的打包行",
        "加上不改变结果的全部省显存设置",
    ),
    "README.en.md": (
        "model",
        "packed rows of 2,048",
        "of 8,192 tokens",
        "longest packed row in 8 GiB",
        "with every saving that changes no result",
    ),
}
MEASURED = {"README.md": "实测", "README.en.md": "measured"}


def measured() -> dict[tuple[str, int], float]:
    """(model, row) -> measured peak GiB with the defaults, from every report of a GPU in
    bench/results.
    """
    found: dict[tuple[str, int], float] = {}
    for file in sorted((ROOT / "bench" / "results").glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        runs = data.get("runs", []) if isinstance(data, dict) else []
        for result in (r for run in runs if run.get("report") for r in run["report"]["results"]):
            plain = not (
                result["offload_inputs"] or result["stream_layers"] or result["mlp_tile_tokens"]
            )
            if (
                plain
                and "peak_bytes" in result
                and result["device"].startswith("cuda")
                and result["quantize"] == "nf4"
            ):
                found[result["model"], result["row_tokens"]] = result["peak_bytes"] / GIB
    return found


def null_device() -> dict[tuple[str, int], float]:
    """(model, row) -> GiB that PyTorch's allocator reserved on the null device with every layer
    recomputed, and the CUDA context.
    """
    data = json.loads((ROOT / "bench" / "results" / "null-gpu.json").read_text(encoding="utf-8"))
    return {
        (run["model"], run["row_tokens"]): run["with_context_gib"]
        for run in data["programs"]
        if run.get("setting") == "recomputed"
    }


def longest_rows(model: str) -> tuple[int, int]:
    """Tokens of the longest packed row in 8 GiB, plain and with every saving that changes no
    result; 0: none.
    """
    config, settings = find_config(model)[1], Settings(2048, "nf4", rank=16)
    *_, last = (
        step
        for step in savings(config, settings, int(BUDGET_GIB * GIB))
        if step.change not in QUALITY
    )
    saving = replace(last.settings, rank=16, head="16bit", stream_layers=EVERY_LAYER)
    plain, longest = (longest_row(config, s, BUDGET_GIB) for s in (settings, saving))
    return plain, longest


def rows(name: str) -> list[str]:
    """Lines of the table in the language of README `name`."""
    peaks, null = measured(), null_device()
    lines = ["| " + " | ".join(HEADS[name]) + " |", "|---|---:|---:|---:|---:|"]
    for model in MODELS:
        cells = [model.split("/")[1]]
        for tokens in (2048, 8192):
            taken = null[model, tokens]
            cell = f"{taken:.2f} GiB"
            cells.append(cell if taken <= BUDGET_GIB else f"*{cell}*")
            if (model, tokens) in peaks:
                cells[-1] += f" ({MEASURED[name]} {peaks[model, tokens]:.2f})"
        cells += [f"{tokens:,}" if tokens else "–" for tokens in longest_rows(model)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Rewrite or check both READMEs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if a table is out of date"
    )
    options = parser.parse_args()
    stale = []
    for name in HEADS:
        file = ROOT / name
        text = file.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        fresh = before + BEGIN + "\n".join(rows(name)) + "\n" + END + after
        stale += [name] if fresh != text else []
        if not options.check:
            file.write_text(fresh, encoding="utf-8", newline="\n")
    print(json.dumps({"out_of_date": stale}))
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
