"""The page's charts: SVG as text, for Gradio's plots and HTML evaluate strings as code, which the
Content-Security-Policy forbids.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from cllm.plots import Curve

COLOURS = ("#6366f1", "#d97706")
DOTS = 60  # of a curve, which say their value when pointed at
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 440, 240, 56, 14, 34
LEGEND = "display:flex;flex-wrap:wrap;gap:0 1em;overflow-wrap:anywhere;font-size:14px"
# a narrow chart is a small one: its numbers grow in it, so that they are 12 px high on a phone
STYLE = "overflow:visible;font-size:max(11px,29.6px - 4cqw)"


class Line(NamedTuple):
    """A curve of a chart."""

    label: str
    points: Curve
    colour: str
    faint: bool = False
    dashed: bool = False


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def chart(title: str, lines: Sequence[Line]) -> str:
    """Curves over steps or seconds, from 0 up; a point says its value where one points at it."""
    from matplotlib.ticker import MaxNLocator

    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
    last, top = (max(values) or 1 for values in zip(*points, strict=True))
    bottom, right = HEIGHT - BOTTOM, WIDTH - 12

    def x(step: float) -> float:
        return LEFT + (right - LEFT) * step / last

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * value / top

    shapes, legend = [], [f"<b>{html.escape(title)}</b>"]
    for tick in (tick for tick in ticks.tick_values(0, top) if tick <= top):
        shapes.append(
            f'<path d="M{LEFT} {y(tick):.1f}H{right}" stroke="currentColor" opacity=".15"/>'
            f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in (tick for tick in ticks.tick_values(0, last) if tick <= last):
        place = f'x="{x(tick):.1f}" y="{HEIGHT - 10}"'
        shapes.append(f'<text {place} text-anchor="middle">{_number(tick)}</text>')
    for line in filter(attrgetter("points"), lines):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line.points)
        dashes, opacity = ("6 4" if line.dashed else "none"), (0.3 if line.faint else 1)
        stroke = f'stroke="{line.colour}" stroke-dasharray="{dashes}" opacity="{opacity}"'
        shapes.append(f'<polyline points="{path}" fill="none" stroke-width="2" {stroke}/>')
        if line.faint:
            continue
        label = html.escape(line.label)
        for step, value in line.points[:: 1 + len(line.points) // DOTS]:
            dot = f'cx="{x(step):.1f}" cy="{y(value):.1f}" r="7" fill="transparent"'
            shapes.append(
                f"<circle {dot}><title>{label}: {_number(value)} ({step})</title></circle>"
            )
        key = f'<span style="color:{line.colour}">{"┅" if line.dashed else "━"}</span>'
        legend.append(f"<span>{key} {label} {_number(line.points[-1][1])}</span>")
    style = f'width="100%" fill="currentColor" font-size="12" style="{STYLE}"'
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {style}>{"".join(shapes)}</svg>'
    words = f'<div style="{LEGEND}">{"".join(legend)}</div>'
    return f'<div style="container-type:inline-size">{words}{drawn}</div>'
