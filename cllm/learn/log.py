"""What a run says while it goes: the console line with its ETA, metrics.jsonl, loss.png, an
optional tracker.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cllm.messages import UserError, note, to_json

if TYPE_CHECKING:
    import torch

LOGGED_SECONDS = 30
"""A log file that is no terminal gets a line at least this often."""
CLOCK_FIELDS = ("seconds", "tokens_per_second", "peak_memory_bytes")
"""Fields of metrics.jsonl that may differ between a run and its resumed twin."""


class Tracker(NamedTuple):
    """Where numbers go besides metrics.jsonl."""

    log: Callable[[dict[str, float], int], object]
    """Record the values of one step."""
    close: Callable[[], object]


def open_tracker(name: str, directory: Path) -> Tracker | None:
    """The tracker called `name` ("tensorboard", "swanlab"; "none": None). Raises UserError if its
    package is absent.
    """
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer: Any = SummaryWriter(str(directory / "tensorboard"))
            return Tracker(
                lambda values, step: [
                    writer.add_scalar(key, value, step) for key, value in values.items()
                ],
                writer.close,
            )
        if name == "swanlab":
            import swanlab

            # offline: nothing leaves this machine and no login is asked for
            swanlab.init(
                project="cllm",
                experiment_name=directory.name,
                logdir=str(directory / "swanlab"),
                mode="offline",
            )
            return Tracker(lambda values, step: swanlab.log(values, step=step), swanlab.finish)
    except ImportError as error:
        raise UserError("log.tracker", name=name) from error
    return None


class RunLog:
    """Appends one object per step to metrics.jsonl, keeps a line on the terminal, draws
    loss.png.
    """

    def __init__(self, directory: Path, total_steps: int, tracker: Tracker | None = None) -> None:
        self.path = directory / "metrics.jsonl"
        self.total = total_steps
        self.tracker = tracker
        self._recent = deque((loss for _, loss in losses(read_metrics(self.path))), maxlen=50)
        # seconds of the last steps; evaluations do not count
        self._paces: deque[float] = deque(maxlen=50)
        self._printed = time.perf_counter()
        self._live = sys.stderr.isatty()

    def step(self, values: dict[str, Any]) -> None:
        """Record a training step; `values` has step, loss, lr, grad_norm, tokens_per_second,
        peak_memory_bytes …
        """
        self.write(values)
        step = values["step"]
        self._paces.append(values["tokens"] / values["tokens_per_second"])
        remaining = sum(self._paces) / len(self._paces) * (self.total - step)
        peak = values["peak_memory_bytes"] / 2**30
        line = (
            f"step {step:>5}/{self.total}  loss {values['loss']:.3f}  lr {values['lr']:.1e}  "
            f"grad {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tok/s  "
            f"peak {peak:.2f} GiB  eta {duration(remaining)}"
        )
        due = (
            time.perf_counter() - self._printed > LOGGED_SECONDS
            or step % max(1, self.total // 20) == 0
            or step in (1, self.total)
        )
        if self._live:
            print(
                f"\r\033[K{line}",
                end="\n" if step == self.total else "",
                file=sys.stderr,
                flush=True,
            )
        elif due:
            print(line, file=sys.stderr, flush=True)
            self._printed = time.perf_counter()
        if len(self._recent) >= 10 and values["loss"] > 1.5 * max(self._recent) + 0.1:
            self.break_line()
            note(
                "log.spike",
                step=step,
                loss=f"{values['loss']:.3f}",
                count=len(self._recent),
                most=f"{max(self._recent):.3f}",
            )
        if math.isfinite(values["loss"]):
            self._recent.append(values["loss"])

    def write(self, values: dict[str, Any]) -> None:
        """Append one object at once, so that a crash loses nothing and the page can follow."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(values) + "\n")
        if self.tracker:
            numbers = {
                k: float(v) for k, v in values.items() if isinstance(v, int | float) and k != "step"
            }
            self.tracker.log(numbers, int(values["step"]))

    def break_line(self) -> None:
        """Leave the live line standing before something else is printed."""
        if self._live:
            print(file=sys.stderr)

    def close(self) -> None:
        """Close the tracker and draw loss.png beside metrics.jsonl."""
        if self.tracker:
            self.tracker.close()
        draw_loss(self.path, self.path.with_name("loss.png"))


def peak_memory_bytes(device: torch.device | None) -> int:
    """Most memory taken so far: allocated on a GPU, resident in this process on the CPU or for None (0 where
    the system does not tell).
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """12 s, 3m20, 2h05: for people."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole}s"
    return (
        f"{whole // 60}m{whole % 60:02d}"
        if whole < 6000
        else f"{whole // 3600}h{whole % 3600 // 60:02d}"
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a torn last line (a crash while writing) is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def losses(rows: list[dict[str, Any]], key: str = "loss") -> list[tuple[int, float]]:
    """(step, loss) of a metrics.jsonl's objects; steps whose loss was not finite are left out."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def last_loss(path: Path) -> float | None:
    """The last training loss in a metrics.jsonl; None where there is none yet."""
    recorded = losses(read_metrics(path))
    return recorded[-1][1] if recorded else None


def draw_loss(metrics: Path, target: Path) -> None:
    """Training loss (raw and smoothed) and held-out loss over the steps, as a PNG."""
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    train = losses(rows)
    held = losses(rows, "eval_loss")
    if not train:
        return
    smooth, value = [], train[0][1]
    for _, loss in train:
        value += 0.1 * (loss - value)
        smooth.append(value)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="tight")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="#9bbcd8", linewidth=0.8, label="train")
    axes.plot(
        [step for step, _ in train], smooth, color="#1f5f99", linewidth=1.8, label="train, smoothed"
    )
    if held:
        axes.plot(
            *zip(*held, strict=True),
            "o-",
            color="#d1652b",
            linewidth=1.8,
            markersize=5,
            label="held out",
        )
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)
