"""What an evaluation shows: tables for the terminal, eval.json, samples.jsonl, scores.png and one
report.html that needs no other file.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment

from cllm.evaluate.answers import METRICS
from cllm.evaluate.results import Evaluation, Exam, Gap, Sample, SystemScores, document
from cllm.learn.log import LiveLine, draw_curve, duration
from cllm.messages import language, note, say, table, to_json
from cllm.metrics import BLEU, ROUGE
from cllm.plots import draw_scores

COLUMNS = ("loss", "general-ppl", "bleu-zh", "rouge-l-char", "bleu-4", "rouge-l", "exact")
SHOWN = 20  # samples at either end
LONGER = 1.2  # times the chosen answers' length that is worth a word
_PAGE = Path(__file__).parents[1] / "assets" / "report.html"
Table = list[list[str]]


def number(value: float | None, sign: str = "") -> str:
    """Three decimals below 10, one above; nothing for None."""
    return "" if value is None else f"{value:{sign}.{3 if abs(value) < 10 else 1}f}"


def score_table(scores: Mapping[str, Mapping[str, float]], gaps: Mapping[str, Gap]) -> Table:
    """One line a system, then what the adapter changed: difference to the base, its 95 % interval,
    p-value.
    """
    columns = [c for c in COLUMNS if any(c in of_system for of_system in scores.values())]
    lines = [["", *columns]]
    for name, of_system in scores.items():
        lines.append([name, *(number(of_system.get(c)) for c in columns)])
    if gaps:
        changes = [gaps[c] for c in columns]
        intervals = [f"{number(gap.low, '+')} … {number(gap.high, '+')}" for gap in changes]
        lines.append([say("eval.difference"), *(number(gap.difference, "+") for gap in changes)])
        lines.append([say("eval.interval"), *intervals])
        lines.append(["p", *(f"{gap.p:.3f}" for gap in changes)])
    return lines


def group_table(systems: Mapping[str, SystemScores], key: str, metric: str) -> Table:
    """The metric by category or by length, with the number of answers; nothing where there is only
    one group.
    """
    grouped = {name: getattr(system, key) for name, system in systems.items()}
    grouped = {name: groups for name, groups in grouped.items() if len(groups) > 1}
    if not grouped:
        return []
    heads = [f"{name} ({group.answers})" for name, group in next(iter(grouped.values())).items()]
    lines = [[say(f"eval.{key}"), *heads]]
    for name, groups in grouped.items():
        lines.append([name, *(number(group.scores[metric]) for group in groups.values())])
    return lines


def accuracy_table(exam: Exam) -> Table:
    """One line per subject, then both averages with their intervals, one column per system."""

    def cell(accuracy: float, interval: Sequence[float]) -> str:
        return f"{accuracy:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"

    systems = exam.systems.values()
    lines = [["", say("eval.questions"), say("eval.shots"), *exam.systems]]
    first = next(iter(systems))
    for name, subject in first.subjects.items():
        rates = [system.subjects[name] for system in systems]
        cells = [cell(rate.accuracy, rate.interval) for rate in rates]
        lines.append([name, str(subject.questions), str(subject.shots), *cells])
    micro = [cell(system.accuracy, system.interval) for system in systems]
    macro = [cell(system.macro, system.macro_interval) for system in systems]
    lines.append([say("eval.micro"), str(first.questions), "", *micro])
    return [*lines, [say("eval.macro"), "", "", *macro]]


def tables(results: Evaluation | Exam) -> list[Table]:
    """Everything that is shown as a table."""
    if isinstance(results, Exam):
        return [accuracy_table(results)]
    systems = results.systems
    scores = {name: system.scores for name, system in systems.items()}
    gaps = systems["adapter"].versus_base if "adapter" in systems else {}
    pairs = [
        ["", *results.preference],
        [say("eval.pairs"), *map(number, results.preference.values())],
    ]
    shown = (
        score_table(scores, gaps),
        pairs if results.preference else [],
        group_table(systems, "by_category", "exact"),
        group_table(systems, "by_length", "rouge-l-char"),
    )
    return [rows for rows in shown if rows]


def summary(results: Evaluation | Exam) -> str:
    """The tables for the terminal."""
    return "\n\n".join(table(rows) for rows in tables(results))


def warn_of_length(results: Evaluation) -> None:
    """Of a preference run: say so if it made answers longer than the chosen ones are."""
    adapter, base, chosen = (
        sum(len(sample.answers.get(name, sample.reference)) for sample in results.samples)
        for name in ("adapter", "base", "")
    )
    if adapter > LONGER * max(base, chosen):
        note("train.longer", times=f"{adapter / max(1, chosen):.1f}")


def write_results(folder: Path, results: Evaluation | Exam) -> None:
    """eval.json, samples.jsonl, scores.png and report.html, with the loss curve if `folder` or the
    one above it holds a run.
    """
    text = to_json(document(results), indent=1) + "\n"
    (folder / "eval.json").write_text(text, encoding="utf-8")
    lines = [to_json(sample.document()) + "\n" for sample in results.samples]
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    plots: list[Path] = []
    for run in (folder, folder.parent):
        if not plots and (run / "metrics.jsonl").is_file():
            plots.append(folder / "loss.png")
            draw_curve(run / "metrics.jsonl", plots[0])
    if isinstance(results, Evaluation) and results.samples:
        plots.append(folder / "scores.png")
        answering = results.samples[0].answers
        draw_scores({name: results.systems[name] for name in answering}, plots[-1])
    page = _page("/".join(folder.parts[-2:]), results, plots)
    (folder / "report.html").write_text(page, encoding="utf-8")


def _page(title: str, results: Evaluation | Exam, plots: Sequence[Path]) -> str:
    """The whole report as one HTML document; the template escapes every text of models and data."""
    signed = METRICS | {
        "rouge-l": ROUGE("rougeL", "jieba", "set"),
        "bleu-4": BLEU("char", "method3", effective_order=True),
    }
    page = Environment(autoescape=True).from_string(_PAGE.read_text(encoding="utf-8"))
    return page.render(
        lang=language(),
        title=say("eval.report", name=title),
        tables=tables(results),
        images={path.stem: base64.b64encode(path.read_bytes()).decode() for path in plots},
        ends=_ends(results) if isinstance(results, Evaluation) else {},
        reference=say("eval.reference"),
        notes=[say("eval.note"), *(f"{name}: {m.signature}" for name, m in signed.items())],
    )


def _ends(results: Evaluation) -> dict[str, list[Sample]]:
    """Heading -> the worst and the best answers by ROUGE-L."""
    system = "adapter" if "adapter" in results.systems else "base"
    ranked = sorted(results.samples, key=lambda sample: sample.scores[system]["rouge-l-char"])
    count = min(SHOWN, (len(ranked) + 1) // 2)
    if not count:
        return {}
    worst, best = say("eval.worst", count=count), say("eval.best", count=count)
    return {worst: ranked[:count], best: ranked[::-1][:count]}


class AnswerCount:
    """`3/40 answers … eta 12s` on stderr while an engine answers."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._line = LiveLine()

    def __call__(self, done: int, total: int) -> None:
        remaining = (time.perf_counter() - self._start) / max(1, done) * (total - done)
        line = say("eval.progress", done=done, total=total, eta=duration(remaining))
        self._line.show(line, last=done == total)
