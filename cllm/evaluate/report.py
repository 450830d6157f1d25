"""What an evaluation shows: tables for the terminal, eval.json, samples.jsonl, scores.png and one
report.html that needs no other file.
"""

from __future__ import annotations

import base64
import html
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from cllm.evaluate.answers import METRICS
from cllm.learn.log import LOGGED_SECONDS, draw_loss, duration
from cllm.messages import language, say, table
from cllm.metrics import BLEU, ROUGE

COLUMNS = ("loss", "general-ppl", "bleu-zh", "rouge-l-char", "bleu-4", "rouge-l", "exact")
PLOTTED = ("bleu-zh", "rouge-l-char", "bleu-4", "rouge-l", "exact")
SHOWN = 20  # samples at either end
COLOURS = ("#9bbcd8", "#d1a96b", "#1f5f99")
_PAGE = Path(__file__).parents[1] / "assets" / "report.html"
Results = dict[str, dict[str, Any]]
Samples = list[dict[str, Any]]


def number(value: float | None, sign: str = "") -> str:
    """Three decimals below 10, one above; nothing for None."""
    return "" if value is None else f"{value:{sign}.{3 if abs(value) < 10 else 1}f}"


def score_table(results: Results) -> list[list[str]]:
    """One line a system, then what the adapter changed: difference to the base, its 95 % interval,
    p-value.
    """
    columns = [c for c in COLUMNS if any(c in result for result in results.values())]
    lines = [
        ["", *columns],
        *([name, *(number(result.get(c)) for c in columns)] for name, result in results.items()),
    ]
    if gaps := results.get("adapter", {}).get("versus_base"):
        lines.append(
            [say("eval.difference"), *(number(gaps[c]["difference"], "+") for c in columns)]
        )
        lines.append(
            [
                say("eval.interval"),
                *(
                    f"{number(gaps[c]['low'], '+')} … {number(gaps[c]['high'], '+')}"
                    for c in columns
                ),
            ]
        )
        lines.append(["p", *(f"{gaps[c]['p']:.3f}" for c in columns)])
    return lines


def group_table(results: Results, key: str, metric: str) -> list[list[str]]:
    """The metric by category or by length, with the number of answers; nothing where there is only
    one group.
    """
    found = {name: result[key] for name, result in results.items() if key in result}
    groups: dict[str, Any] = next(iter(found.values()), {})
    heads = [f"{group} ({its['answers']})" for group, its in groups.items()]
    lines = [
        [say(f"eval.{key}"), *heads],
        *([name, *(number(its[g][metric]) for g in groups)] for name, its in found.items()),
    ]
    return lines if len(groups) > 1 else []


def accuracy_table(results: Results) -> list[list[str]]:
    """One line per subject, then both averages with their intervals, one column per system."""

    def cells(
        parts: Sequence[dict[str, Any]], key: str = "accuracy", interval: str = "interval"
    ) -> list[str]:
        return [f"{its[key]:.1f} [{its[interval][0]:.1f}, {its[interval][1]:.1f}]" for its in parts]

    systems = list(results.values())
    lines = [["", say("eval.questions"), say("eval.shots"), *results]]
    for name, its in systems[0]["subjects"].items():
        lines.append(
            [
                name,
                str(its["questions"]),
                str(its["shots"]),
                *cells([system["subjects"][name] for system in systems]),
            ]
        )
    lines.append([say("eval.micro"), str(systems[0]["questions"]), "", *cells(systems)])
    return [*lines, [say("eval.macro"), "", "", *cells(systems, "macro", "macro_interval")]]


def tables(results: Results) -> list[list[list[str]]]:
    """Everything that is shown as a table."""
    if "accuracy" in next(iter(results.values())):
        return [accuracy_table(results)]
    shown = (
        score_table(results),
        group_table(results, "by_category", "exact"),
        group_table(results, "by_length", "rouge-l-char"),
    )
    return [rows for rows in shown if rows]


def report(results: Results) -> str:
    """The tables for the terminal."""
    return "\n\n".join(table(rows) for rows in tables(results))


def write_results(folder: Path, results: Results, samples: Samples) -> None:
    """eval.json, samples.jsonl, scores.png and report.html, with the loss curve if `folder` or the
    one above it holds a run.
    """
    (folder / "eval.json").write_text(
        json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
    answered = [sample for sample in samples if "scores" in sample]
    plots = []
    if run := next(
        (path for path in (folder, folder.parent) if (path / "metrics.jsonl").is_file()), None
    ):
        draw_loss(run / "metrics.jsonl", folder / "loss.png")
        plots.append(folder / "loss.png")
    if answered:
        draw_scores(results, folder / "scores.png")
        plots.append(folder / "scores.png")
    (folder / "report.html").write_text(
        _page("/".join(folder.parts[-2:]), results, answered, plots), encoding="utf-8"
    )


def draw_scores(results: Results, target: Path) -> None:
    """Bars of every answering system with 95 % intervals, and ROUGE-L by length of the reference,
    as a PNG.
    """
    from matplotlib.figure import Figure

    systems = {
        name: result
        for name, result in results.items()
        if name not in ("copy", "majority") and "by_length" in result
    }
    lengths, width = results["base"]["by_length"], 0.8 / len(systems)
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for i, (name, result) in enumerate(systems.items()):
        bars = (
            [result[metric] for metric in PLOTTED],
            [its["rouge-l-char"] for its in result["by_length"].values()],
        )
        bounds = [
            [abs(result[metric] - result["interval"][metric][side]) for metric in PLOTTED]
            for side in (0, 1)
        ]
        for axes, values, errors in zip(panels, bars, (bounds, None), strict=True):
            places = [x + i * width for x in range(len(values))]
            axes.bar(
                places,
                values,
                width,
                yerr=errors,
                capsize=3,
                ecolor="#555",
                color=COLOURS[i % len(COLOURS)],
                label=name,
            )
    counts = [f"{group}\nn={its['answers']}" for group, its in lengths.items()]
    titles = "scores with 95 % intervals", "rouge-l-char by characters of the reference"
    for axes, title, names in zip(panels, titles, (PLOTTED, counts), strict=True):
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names)
        axes.set(title=title, ylim=(0, None))
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(systems),
        frameon=False,
    )
    figure.savefig(target)


def _page(title: str, results: Results, samples: Samples, plots: Sequence[Path]) -> str:
    """The whole report as one HTML document; every text of models and data is escaped."""
    system = "adapter" if "adapter" in results else "base"
    ranked = sorted(samples, key=lambda sample: sample["scores"][system]["rouge-l-char"])
    ends = min(SHOWN, (len(ranked) + 1) // 2)
    images = "".join(
        f'<img alt="{p.stem}" src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}">'
        for p in plots
    )
    halves = (
        (say("eval.worst", count=ends), ranked[:ends]),
        (say("eval.best", count=ends), ranked[::-1][:ends]),
    )
    cards = "".join(
        f"<section><h2>{head}</h2>{''.join(_card(sample) for sample in part)}</section>"
        for head, part in halves
        if part
    )
    signed = METRICS | {
        "rouge-l": ROUGE("rougeL", "jieba", "set"),
        "bleu-4": BLEU("char", "method3", effective_order=True),
    }
    notes = [say("eval.note"), *(f"{name}: {metric.signature}" for name, metric in signed.items())]
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        lang=language(),
        title=html.escape(say("eval.report", name=title)),
        tables="".join(map(_html_table, tables(results))),
        images=images,
        samples=cards,
        notes="".join(f"<p>{html.escape(text)}</p>" for text in notes),
    )


def _html_table(rows: list[list[str]]) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _card(sample: dict[str, Any]) -> str:
    """One question with the reference and every system's answer beside each other."""
    question = "\n".join(
        m["content"] if m["role"] == "user" else f"{m['role']}: {m['content']}"
        for m in sample["messages"]
    )
    cells = [(say("eval.reference"), sample["reference"])]
    cells += [
        (f"{name} · {its['rouge-l-char']:.0f}", sample[name])
        for name, its in sample["scores"].items()
    ]
    columns = "".join(
        f"<div><b>{html.escape(head)}</b><p>{html.escape(text)}</p></div>" for head, text in cells
    )
    return f'<article><p class="q">{html.escape(question)}</p><div class="row">{columns}</div></article>'


class Progress:
    """`3/40 answers … eta 12s` on stderr: a live line on a terminal, else one every half minute."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._live = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._last > (2 if self._live else LOGGED_SECONDS) or (
            self._live and done == total
        ):
            eta = duration((now - self._start) / max(1, done) * (total - done))
            line = say("eval.progress", done=done, total=total, eta=eta)
            before, end = ("\r\033[K", "" if done < total else "\n") if self._live else ("", "\n")
            print(f"{before}{line}", end=end, file=sys.stderr, flush=True)
            self._last = now
