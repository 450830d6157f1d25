"""The page's tab of the machine and its engine."""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
import os
import time
from typing import Any

import gradio as gr

from cllm.learn.log import peak_memory_bytes
from cllm.serve.engine import Engine
from cllm.serve.widgets import QUIET


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
