"""Every picture, drawn with matplotlib: loss.png, scores.png and lengths.png."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.messages import language, messages

if TYPE_CHECKING:
    from cllm.evaluate.results import SystemScores

Curve = Sequence[tuple[int, float]]
"""(step, loss) in the order of the steps."""
PLOTTED = ("bleu-zh", "rouge-l-char", "bleu-4", "rouge-l", "exact")
# files of Windows, macOS and Linux
CHINESE_FONTS = (
    "msyh.ttc",
    "simhei.ttf",
    "PingFang.ttc",
    "STHeiti Medium.ttc",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "NotoSerifCJK-Regular.ttc",
)
COLOURS = ("#9bbcd8", "#d1a96b", "#1f5f99")
SMOOTHING = 0.1
"""Share of the newest loss in the smoothed curve."""


def draw_loss(train: Curve, held_out: Curve, target: Path) -> None:
    """Training loss (raw and smoothed) and held-out loss over the steps, as a PNG."""
    from matplotlib.figure import Figure

    steps, losses = zip(*train, strict=True)
    smooth, value = [], losses[0]
    for loss in losses:
        value += SMOOTHING * (loss - value)
        smooth.append(value)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="tight")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9bbcd8", linewidth=0.8, label="train")
    axes.plot(steps, smooth, color="#1f5f99", linewidth=1.8, label="train, smoothed")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, "o-", color="#d1652b", linewidth=1.8, ms=5, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


def chinese_font() -> str:
    """The name of a font of this machine that has Chinese characters; "" for none."""
    from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager

    files = {Path(file).name: file for file in findSystemFonts()}
    file = next((files[name] for name in CHINESE_FONTS if name in files), "")
    if file:
        fontManager.addfont(file)  # its own list may be older than the font
    return FontProperties(fname=file).get_name() if file else ""


def draw_lengths(lengths: Sequence[int], target: Path, unit: str, limit: int = 0) -> None:
    """A histogram of the conversations' lengths in `unit` ("tokens" or "characters"), in bins of
    equal ratio, with a line at `limit`, as a PNG; in the reader's language if a font is there.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    font = chinese_font() if language() == "zh" else ""
    low = max(1, min(lengths, default=1))
    high = max([2 * low, *lengths])
    with rc_context({"font.sans-serif": [font, "DejaVu Sans"]} if font else {}):
        figure = Figure(figsize=(8, 3.5), dpi=110, layout="constrained")
        axes = figure.subplots()
        # whole numbers: a bin without one would stand empty between the others
        edges = sorted({math.ceil(low * (high / low) ** (n / 40)) for n in range(40)})
        axes.hist(lengths, bins=[*edges, high + 1])
        if 0 < limit < 4 * high:
            shown = messages()["plot.limit"][bool(font)].format(limit=limit)
            axes.axvline(limit, color="tab:red", label=shown)
            axes.legend()
        labels = [messages()[code][bool(font)] for code in (f"plot.{unit}", "plot.conversations")]
        axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log")
        axes.minorticks_off()
        axes.set_xticks(edges[::8], map(str, edges[::8]))
        figure.savefig(target)


def draw_scores(systems: Mapping[str, SystemScores], target: Path) -> None:
    """Bars of every answering system with 95 % intervals, and ROUGE-L by length of the reference,
    as a PNG.
    """
    from matplotlib.figure import Figure

    width = 0.8 / len(systems)
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for i, (name, system) in enumerate(systems.items()):
        scores = [system.scores[metric] for metric in PLOTTED]
        by_length = [group.scores["rouge-l-char"] for group in system.by_length.values()]
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
                label=name,
            )
    lengths = next(iter(systems.values())).by_length
    counts = [f"{length}\nn={group.answers}" for length, group in lengths.items()]
    titles = "scores with 95 % intervals", "rouge-l-char by characters of the reference"
    for axes, title, names in zip(panels, titles, (PLOTTED, counts), strict=True):
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names)
        axes.set(title=title, ylim=(0, None))
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(systems), frameon=False)
    figure.savefig(target)
