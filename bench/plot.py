"""Draws a report of `python -m cllm.bench --out REPORT.json`, which runs this.

REPORT.png shows peak memory (dashed: the estimate) and speed over the row length, a line per model
and settings.

    bench/plot.py REPORT.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(report: dict[str, Any], target: Path) -> None:
    lines: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in report["results"]:
        if "peak_bytes" in result:
            settings = f"{result['quantize']}, {result['stream_layers']} streamed"
            lines[f"{result['model']}, {settings}"].append(result)
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="tight")
    peaks, speed = figure.subplots(1, 2)
    for number, (name, results) in enumerate(lines.items()):
        rows = [result["row_tokens"] for result in results]
        for axes, key, unit, style in (
            (peaks, "peak_bytes", 2**30, "o-"),
            (peaks, "estimate_bytes", 2**30, "--"),
            (speed, "tokens_per_second", 1, "o-"),
        ):
            values = [result[key] / unit for result in results]
            axes.plot(rows, values, style, color=f"C{number}", label=name)
    peaks.set(xlabel="row, tokens", ylabel="peak GiB (dashed: estimate)", ylim=(0, None))
    speed.set(xlabel="row, tokens", ylabel="tokens per second", ylim=(0, None))
    speed.legend(frameon=False, fontsize=7)
    figure.suptitle(report["device"])
    figure.savefig(target)


def main() -> None:
    path = Path(sys.argv[1])
    target = path.with_suffix(".png")
    draw(json.loads(path.read_text(encoding="utf-8")), target)
    print(json.dumps({"plot": str(target)}))


if __name__ == "__main__":
    main()
