"""The page's tab of the machine and its engine."""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
import os
import time
from itertools import pairwise
from typing import Any

import gradio as gr

from cllm.learn.log import peak_memory_bytes
from cllm.serve.charts import COLOURS, Line, chart
from cllm.serve.engine import Engine
from cllm.serve.widgets import QUIET, texts_for

LOOKS = 150
"""Of the machine, two seconds apart, that the chart shows."""


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
    with gr.Row():
        with gr.Column(min_width=320):
            values = gr.Markdown(" ")
        with gr.Column(min_width=320):
            speeds = gr.Markdown(" ", container=True, sanitize_html=False)
    seen: Any = gr.State([])  # (seconds, generated tokens) of the last looks

    def measure(
        request: gr.Request, looks: list[tuple[float, int]]
    ) -> tuple[list[tuple[float, int]], str, str]:
        stats, texts = engine.stats(), texts_for(request)
        looks = [*looks, (time.monotonic(), stats["generated_tokens"])][-LOOKS:]
        start = looks[0][0]
        curve = [
            (round(after - start), (more - tokens) / (after - before))
            for (before, tokens), (after, more) in pairwise(looks)
        ]
        shown = {
            "sessions": len(sessions),
            "running": stats["running"],
            "waiting": stats["waiting"],
            "speed_now": f"{curve[-1][1] if curve else 0:.1f}",
            "kv_cache": f"{stats['kv_tokens_used']:,} / {stats['kv_tokens']:,}",
            "memory": f"{peak_memory_bytes(None) / 2**30:.1f} GiB",
        }
        if hasattr(os, "getloadavg"):
            shown["cpu_load"] = f"{os.getloadavg()[0]:.1f} / {os.cpu_count()}"
        if gpu:
            free, total = torch.cuda.mem_get_info(engine.device)
            shown["gpu_memory"] = f"{(total - free) / 2**30:.1f} / {total / 2**30:.1f} GiB"
            shown["gpu_load"] = _gpu_load(engine.device)
        rows = [f"| {texts[f'ui.{key}']} | {value} |" for key, value in shown.items()]
        title = texts["ui.speed"]
        return (
            looks,
            "\n".join([f"| {texts['ui.monitor']} | |", "|---|---|", *rows]),
            chart(title, [Line("", curve, COLOURS[0])]),
        )

    return measure, seen, [seen, values, speeds]


def _gpu_load(device: Any) -> str:
    import torch

    try:
        return f"{torch.cuda.utilization(device)} %"
    # NVML's binding is missing, or raises errors of its own, which share no class
    except Exception as error:
        return f"- ({type(error).__name__})"
