"""Two tabs of the page: a training run as it is written, and the machine with its engine."""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
import os
import time
from pathlib import Path
from typing import Any

import gradio as gr

from cllm.evaluate.report import named, number, score_table, verdict
from cllm.evaluate.results import scores_of
from cllm.learn.log import peak_memory_bytes, read_metrics
from cllm.messages import read_json
from cllm.serve.engine import Engine
from cllm.serve.widgets import QUIET

SHOWN = ("reference", "base", "adapter")  # columns of the samples
COLOURS = ("#6366f1", "#d97706")  # of the curves


def training_tab(t: Any, root: Path) -> tuple[Any, Any, Any]:
    """Any run beside the one that answers: loss and speed as they are written, scores before and
    after, samples.
    """
    chosen = gr.Dropdown(label=t("run"), choices=[])
    with gr.Row():
        charts = [
            gr.Markdown(label=t(key), show_label=True, container=True, sanitize_html=False)
            for key in ("loss", "speed")
        ]
    scores = gr.Dataframe(label=t("scores"))
    legend = gr.Markdown()
    samples = gr.Dataframe(label=t("samples"), headers=["", *SHOWN], wrap=True)

    def follow(name: str | None) -> tuple[Any, ...]:
        files = sorted(root.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
        names = [file.parent.name for file in reversed(files)]
        # only names from the list: no path of a reader's making
        run = root / (name if name in names else (names or ["-"])[0])
        rows, answers = read_metrics(run / "metrics.jsonl"), read_metrics(run / "samples.jsonl")
        menu = gr.Dropdown(choices=names, value=run.name if names else None)
        curves = chart(rows, ["loss", "eval_loss"]), chart(rows, ["tokens_per_second"])
        cells = [
            [row["messages"][-1]["content"], *(row.get(key, "") for key in SHOWN)]
            for row in answers[:20]
        ]
        return menu, *curves, *_scores(run / "eval.json", answers), cells

    outputs = [chosen, *charts, scores, legend, samples]
    chosen.input(follow, chosen, outputs, **QUIET)
    return follow, chosen, outputs


def _scores(file: Path, answers: list[dict[str, Any]]) -> tuple[Any, str]:
    """The table of eval.json, with the mean length of the answers where they are kept; its verdict
    and legend.
    """
    results = scores_of(read_json(file) if file.exists() else {})
    if not results.systems:
        return gr.Dataframe(value=[]), ""
    title, (header, *lines), legend = score_table(results)
    if answers:
        header.append(named("length"))
        lines.insert(0, [named("reference"), *[""] * (len(header) - 2)])
        for name, line in zip(["reference", *results.systems, *[""] * 3], lines, strict=False):
            lengths = [len(row[name]) for row in answers if name in row]
            line.append(number(sum(lengths) / len(lengths) if lengths else None))
    told = "\n- ".join([verdict(results) + "\n", *legend])
    return gr.Dataframe(headers=header, value=lines, label=title), told


def chart(rows: list[dict[str, Any]], keys: list[str]) -> str:
    """Curves over the steps as SVG: Gradio's plots and HTML evaluate strings as code, which the
    Content-Security-Policy forbids.
    """
    curves = [[(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in keys]
    points = [point for curve in curves for point in curve]
    if not points:
        return ""
    last = max(x for x, _ in points) or 1
    top = max(y for _, y in points) or 1
    shapes = [
        '<path d="M40 10V150H390" fill="none" stroke="currentColor" opacity=".4"/>',
        f'<text x="2" y="20">{top:.4g}</text><text x="2" y="152">0</text>',
        f'<text x="350" y="170">{last}</text>',
    ]
    for i, (key, curve) in enumerate(zip(keys, curves, strict=True)):
        if not curve:
            continue
        thin = curve[:: 1 + len(curve) // 400]
        path = " ".join(f"{40 + 350 * x / last:.1f},{150 - 135 * y / top:.1f}" for x, y in thin)
        line = f'points="{path}" fill="none" stroke="{COLOURS[i]}" stroke-width="1.5"'
        shapes.append(f"<polyline {line}><title>{key}</title></polyline>")
        label = f"{key} {curve[-1][1]:.4g}"
        shapes.append(f'<text x="{60 + 100 * i}" y="170" fill="{COLOURS[i]}">{label}</text>')
    style = 'width="100%" fill="currentColor" font-size="10"'
    return f'<svg viewBox="0 0 400 176" {style}>{"".join(shapes)}</svg>'


def count_sessions(page: Any) -> set[str]:
    """The open pages: added when one is loaded, taken out when its connection ends."""
    sessions: set[str] = set()

    def come(request: gr.Request) -> None:
        sessions.add(request.session_hash or "")

    def leave(request: gr.Request) -> None:
        sessions.discard(request.session_hash or "")

    page.load(come, None, None, **QUIET)
    page.unload(leave)
    return sessions


def monitor_tab(t: Any, engine: Engine, sessions: set[str]) -> tuple[Any, Any, Any]:
    """The engine and the machine, every two seconds while somebody looks."""
    import torch

    gpu = engine.device.type == "cuda"
    keys = ["sessions", "running", "waiting", "speed_now", "kv_cache", "memory", "cpu_load"]
    if gpu:
        keys += ["gpu_memory", "gpu_load"]
    with gr.Row():
        boxes = [gr.Textbox(label=t(key), interactive=False, min_width=180) for key in keys]
    last = gr.State((0.0, 0))

    def measure(before: tuple[float, int]) -> tuple[Any, ...]:
        stats, now = engine.stats(), time.monotonic()
        speed = (stats["generated_tokens"] - before[1]) / (now - before[0]) if before[0] else 0.0
        values = [
            len(sessions),
            stats["running"],
            stats["waiting"],
            f"{speed:.1f} tok/s",
            f"{stats['kv_tokens_used']:,} / {stats['kv_tokens']:,}",
            f"{peak_memory_bytes(None) / 2**30:.1f} GiB",
            f"{os.getloadavg()[0]:.1f} / {os.cpu_count()}" if hasattr(os, "getloadavg") else "-",
        ]
        if gpu:
            free, total = torch.cuda.mem_get_info(engine.device)
            values.append(f"{(total - free) / 2**30:.1f} / {total / 2**30:.1f} GiB")
            values.append(_gpu_load(engine.device))
        return (now, stats["generated_tokens"]), *values

    return measure, last, [last, *boxes]


def _gpu_load(device: Any) -> str:
    import torch

    try:
        return f"{torch.cuda.utilization(device)} %"
    # NVML's binding is missing, or raises errors of its own, which share no class
    except Exception as error:
        return f"- ({type(error).__name__})"
