"""What a run says while it goes: the console line with its ETA, metrics.jsonl, loss.png, an
optional tracker.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from cllm.messages import UserError, note, say, to_json
from cllm.plots import draw_loss
from cllm.runs import read_metrics

if TYPE_CHECKING:
    import torch

WATCHED = 20
"""Preference steps in a row that a warning takes."""
PACE_STEPS = 50
WARM = 32  # answers before it is guessed when the others come
ANSWER_SECONDS = 10
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


class LiveLine:
    """One line on stderr: on a terminal each replaces the one before, elsewhere one is printed now
    and then.
    """

    def __init__(self, seconds: float = LOGGED_SECONDS) -> None:
        self.live = sys.stderr.isatty()
        self._seconds = seconds
        self._printed = time.perf_counter()

    def show(self, line: str, *, due: bool = False, last: bool = False) -> None:
        """due: print it into a log file, too. last: leave it standing on a terminal."""
        if self.live:
            print(f"\r\033[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif due or time.perf_counter() - self._printed > self._seconds:
            print(line, file=sys.stderr, flush=True)
            self._printed = time.perf_counter()

    def leave(self) -> None:
        """Leave the line standing before something else is printed."""
        if self.live:
            print(file=sys.stderr)


class AnswerCount:
    """`3/40 answers … eta 12s` on stderr while answers are generated or measured; the first ones,
    which wait for all prompts, tell no pace. A count that goes back begins another round.
    """

    def __init__(self) -> None:
        self._line = LiveLine(ANSWER_SECONDS)
        self._warm: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        now, eta = time.perf_counter(), ""
        if self._warm is None or done <= self._warm[1]:
            self._warm = (now, done) if done >= min(WARM, total / 4) else None
        else:
            start, before = self._warm
            eta = say("eval.eta", eta=duration((now - start) / (done - before) * (total - done)))
        line = say("eval.progress", done=done, total=total)
        self._line.show(line + eta, last=done == total)


class RunLog:
    """Appends one object per step to metrics.jsonl, keeps a line on the terminal, draws
    loss.png.
    """

    def __init__(self, directory: Path, total_steps: int, tracker: Tracker | None = None) -> None:
        self.path = directory / "metrics.jsonl"
        self.total = total_steps
        self.tracker = tracker
        self._recent = deque((loss for _, loss in losses(read_metrics(self.path))), maxlen=50)
        self._steps: deque[dict[str, Any]] = deque(maxlen=PACE_STEPS)
        self._warned: set[str] = set()
        self._watched: deque[dict[str, Any]] = deque(maxlen=WATCHED)
        self._line = LiveLine()
        self.break_line = self._line.leave

    def step(self, values: dict[str, Any]) -> None:
        """Record a training step; `values` has step, loss, lr, grad_norm, tokens_per_second,
        peak_memory_bytes …
        """
        self.write(values)
        step, loss = values["step"], values["loss"]
        self._steps.append(values)
        remaining = seconds_a_step(self._steps) * (self.total - step)
        left = duration(remaining) + _clock(remaining)
        peak = values["peak_memory_bytes"] / 2**30
        line = say("log.step", total=self.total, peak=peak, left=left, **values)
        line += say("log.pairs", **values) if "margin" in values else ""
        due = step % max(1, self.total // 20) == 0 or step in (1, self.total)
        self._line.show(line, due=due, last=step == self.total)
        if len(self._recent) >= 10 and loss > 1.5 * max(self._recent) + 0.1:
            self.break_line()
            most = f"{max(self._recent):.3f}"
            note("log.spike", step=step, loss=f"{loss:.3f}", count=len(self._recent), most=most)
        if math.isfinite(loss):
            self._recent.append(loss)
        if "margin" in values:
            self._watch(values)

    def _watch(self, values: dict[str, Any]) -> None:
        """Say what goes wrong in a preference run, once each."""
        self._watched.append(values)
        if len(self._watched) < WATCHED:
            return
        falls = all(row.get("chosen_reward", 0.0) < 0 < row["margin"] for row in self._watched)
        for code, true in (
            ("log.overfit", all(row["accuracy"] == 1 for row in self._watched)),
            ("log.chosen_falls", falls),
        ):
            if true and code not in self._warned:
                self._warned.add(code)
                self.break_line()
                note(code, step=values["step"], count=WATCHED)

    def write(self, values: dict[str, Any]) -> None:
        """Append one object at once, so that a crash loses nothing and the page can follow."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(values) + "\n")
        if self.tracker:
            numbers = {
                k: float(v) for k, v in values.items() if isinstance(v, int | float) and k != "step"
            }
            self.tracker.log(numbers, int(values["step"]))

    def close(self) -> None:
        """Close the tracker and draw loss.png beside metrics.jsonl."""
        if self.tracker:
            self.tracker.close()
        draw_curve(self.path, self.path.with_name("loss.png"))


def peak_memory_bytes(device: torch.device | None) -> int:
    """Most memory taken so far: allocated on a GPU, resident in this process on the CPU or for None
    (0 where the system does not tell).
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


def _clock(seconds: float) -> str:
    """When it will be so many seconds from now, where that is worth a look at the clock."""
    return time.strftime(" (%H:%M)", time.localtime(time.time() + seconds)) * (seconds >= 100)


def duration(seconds: float) -> str:
    """12 s, 3m20, 2h05: for people."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole}s"
    if whole < 6000:
        return f"{whole // 60}m{whole % 60:02d}"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}"


def seconds_a_step(steps: Iterable[dict[str, Any]]) -> float:
    """Of training steps' objects in metrics.jsonl, the mean of the last PACE_STEPS; evaluations do
    not count.
    """
    return fmean(row["tokens"] / row["tokens_per_second"] for row in [*steps][-PACE_STEPS:])


def losses(rows: list[dict[str, Any]], key: str = "loss") -> list[tuple[int, float]]:
    """(step, loss) of a metrics.jsonl's objects; steps whose loss was not finite are left out."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def last_loss(path: Path) -> float | None:
    """The last training loss in a metrics.jsonl; None where there is none yet."""
    recorded = losses(read_metrics(path))
    return recorded[-1][1] if recorded else None


def draw_curve(metrics: Path, target: Path) -> None:
    """The losses of a metrics.jsonl as a PNG; nothing if there is none yet."""
    rows = read_metrics(metrics)
    if train := losses(rows):
        sources: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            for name, loss in row.get("sources", {}).items():
                if loss is not None:
                    sources.setdefault(name, []).append((row["step"], loss))
        draw_loss(train, losses(rows, "eval_loss"), target, sources)
