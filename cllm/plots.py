"""Every picture, drawn with matplotlib: losses, scores and lengths."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from cllm.messages import language, messages

if TYPE_CHECKING:
    from cllm.evaluate.results import SystemScores

Curve = Sequence[tuple[int, float]]
"""(step, loss) in the order of the steps."""
PLOTTED = ("bleu-zh", "rouge-l-char", "bleu-4", "rouge-l", "exact")
COLOURS = ("#9bbcd8", "#d1a96b", "#1f5f99")
SMOOTHING = 0.1
"""Share of the newest loss in the smoothed curve of a long run."""
CHINESE_FONTS = (
    "Microsoft YaHei",
    "PingFang SC",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Hiragino Sans GB",
    "Heiti SC",
    "Droid Sans Fallback",
    "Noto Serif CJK SC",
    "SimSun",
)
"""Those that systems come with."""


@functools.cache
def _chinese_font() -> bool:
    """Whether this machine can draw Chinese; from then on charts do, beside what was set."""
    from matplotlib import font_manager, rcParams

    fonts = font_manager.fontManager
    if not _usable(fonts):  # matplotlib's list may be older than a font
        fonts.ttflist = font_manager.FontManager().ttflist
    rcParams["font.family"] = [*rcParams["font.family"], *_usable(fonts)[:1]]
    return bool(_usable(fonts))


def _usable(fonts: Any) -> list[str]:
    """Fonts with Chinese in matplotlib's list, the best first."""
    there = {font.name for font in fonts.ttflist}
    return [name for name in CHINESE_FONTS if name in there]


def _words(code: str, **values: object) -> list[str]:
    """The texts of a chart in the user's language, in English where no font has Chinese."""
    chinese = _chinese_font() and language() == "zh"  # names of models are in any language
    return messages()[code][chinese].format(**values).split("|")


def _name(name: str) -> str:
    """What a chart calls a system or a metric."""
    first, _, rest = name.partition(" ")
    return " ".join([*_words(f"eval.name.{first}"), rest]).strip()


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of two exponential moving averages, from the first loss on and from the last one
    back, so that the curve does not lag behind a falling loss.
    """
    there, back = _averages(losses), reversed(_averages(losses[::-1]))
    return [(a + b) / 2 for a, b in zip(there, back, strict=True)]


def _averages(losses: Sequence[float]) -> list[float]:
    """An exponential moving average over at most a tenth of the run, without the bias towards its
    first value: divided by the sum of the weights, as Adam's moments are.
    """
    share = max(SMOOTHING, 1 / (1 + len(losses) / 10))
    curve, value, weight = [], 0.0, 0.0
    for loss in losses:
        value += share * (loss - value)
        weight += share * (1 - weight)
        curve.append(value / weight)
    return curve


def draw_loss(
    train: Curve, held_out: Curve, target: Path, sources: Mapping[str, Curve] = MappingProxyType({})
) -> None:
    """Training loss (raw and smoothed; of a mixture each source's, too) and held-out loss over the
    steps, as a PNG.
    """
    from matplotlib.figure import Figure

    steps, losses = zip(*train, strict=True)
    step, loss, raw, smooth, measured = _words("plot.loss")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="tight")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9bbcd8", linewidth=0.8, label=raw)
    axes.plot(steps, smoothed(losses), color="#1f5f99", linewidth=1.8, label=smooth)
    for name, curve in sources.items():
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, smoothed(losses), "--", linewidth=1, label=name)
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, "o-", color="#d1652b", linewidth=1.8, ms=5, label=measured)
    axes.set(xlabel=step, ylabel=loss)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


def draw_lengths(
    lengths: Sequence[int], target: Path | IO[bytes], unit: str, limit: int = 0
) -> None:
    """A histogram of the conversations' lengths in `unit` (tokens or characters), in bins of equal
    ratio, with a line at `limit`, as a PNG.
    """
    from matplotlib.figure import Figure

    [name] = _words(f"check.unit.{unit}")
    length, conversations, line = _words("plot.lengths", unit=name, limit=limit)
    low = max(1, min(lengths, default=1))
    high = max([2 * low, *lengths])
    figure = Figure(figsize=(8, 3.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    # whole numbers: a bin without one would stand empty between the others
    edges = sorted({math.ceil(low * (high / low) ** (n / 40)) for n in range(40)})
    axes.hist(lengths, bins=[*edges, high + 1])
    if 0 < limit < 4 * high:
        axes.axvline(limit, color="tab:red", label=line)
        axes.legend()
    axes.set(xlabel=length, ylabel=conversations, xscale="log")
    axes.minorticks_off()
    axes.set_xticks(edges[::8], map(str, edges[::8]))
    figure.savefig(target)


def draw_strengths(systems: Mapping[float, SystemScores], best: float | None, target: Path) -> None:
    """The loss, with 95 % intervals where there are enough answers, and general perplexity over
    the strength of the adapter, with a line at the recommended one, as a PNG.
    """
    from matplotlib.figure import Figure

    strength, task, general = _words("plot.strengths", metric=_name("loss"))
    figure = Figure(figsize=(11, 3.8), dpi=120, layout="constrained")
    panels = zip(figure.subplots(1, 2), ("loss", "general-ppl"), (task, general), strict=True)
    for axes, name, label in panels:
        values = [system.scores[name] for system in systems.values()]
        bounds = [system.interval.get(name) for system in systems.values()]
        axes.plot([*systems], values, "o-", color=COLOURS[-1])
        if all(bounds):
            axes.fill_between([*systems], *zip(*bounds, strict=True), color=COLOURS[0], alpha=0.4)
        if best is not None:
            axes.axvline(best, color=COLOURS[1], linestyle="--")
        axes.set(xlabel=strength, ylabel=label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


def draw_scores(systems: Mapping[str, SystemScores], target: Path) -> None:
    """Bars of every answering system, with 95 % intervals where there are enough answers, and
    ROUGE-L by length of the reference, as a PNG.
    """
    from matplotlib.figure import Figure

    width = 0.8 / len(systems)
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for i, (name, system) in enumerate(systems.items()):
        scores = [system.scores[metric] for metric in PLOTTED]
        by_length = [group.scores["rouge-l-char"] for group in system.by_length.values()]
        bounds = None
        if system.interval.keys() >= {*PLOTTED}:
            bounds = [
                [abs(system.scores[metric] - system.interval[metric][side]) for metric in PLOTTED]
                for side in (0, 1)
            ]
        for axes, values, errors in zip(panels, (scores, by_length), (bounds, None), strict=True):
            places = [x + i * width for x in range(len(values))]
            colour = COLOURS[i % len(COLOURS)]
            axes.bar(
                places,
                values,
                width,
                yerr=errors,
                capsize=3,
                ecolor="#555",
                color=colour,
                label=_name(name),
            )
    lengths = next(iter(systems.values())).by_length
    counts = [f"{length}\nn={group.answers}" for length, group in lengths.items()]
    ticks = [_name(metric).replace(" ", "\n") for metric in PLOTTED], counts
    for axes, label, names in zip(panels, ("", _name("rouge-l-char")), ticks, strict=True):
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names)
        axes.set(ylabel=label, ylim=(0, None))
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(systems), frameon=False)
    figure.savefig(target)
