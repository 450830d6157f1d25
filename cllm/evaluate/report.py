"""What an evaluation shows: tables, their legend and a verdict for the terminal and the page,
eval.json, samples.jsonl, scores.png and one report.html that needs no other file.
"""

from __future__ import annotations

import base64
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from jinja2 import Environment

from cllm import __version__
from cllm.config import load_config
from cllm.evaluate.answers import KEPT, METRICS, MOST_RISE
from cllm.evaluate.results import (
    Evaluation,
    Exam,
    Gap,
    Sample,
    SystemScores,
    by_strength,
    document,
    strength_of,
)
from cllm.learn.log import draw_curve, duration
from cllm.messages import language, note, say, speaking, table, to_json
from cllm.metrics import BLEU, FEWEST_PAIRS, ROUGE
from cllm.plots import draw_scores, draw_strengths
from cllm.runs import read_metrics, turned

SCORES = ("bleu-zh", "rouge-l-char", "bleu-4", "rouge-l", "exact")
FALLING = ("loss", "general-ppl")
"""Less is better."""
COLUMNS = (*FALLING, *SCORES)
EXPLAINED = ("copy", "majority", "base", "adapter", *FALLING, "exact", "p")
SIGNIFICANT = 0.05
SHOWN = 20  # samples at either end
OTHERS = 1000  # samples between them
LONGER = 1.2  # times the chosen answers' length that is worth a word
_REPORT = Path(__file__).parents[1] / "assets" / "report.html"
LANGUAGES = {"zh": "中文", "en": "English"}
Table = list[list[str]]


class Shown(NamedTuple):
    """A table as people see it."""

    title: str
    rows: Table
    legend: Sequence[str] = ()


@dataclass(frozen=True)
class About:
    """What was evaluated, on what."""

    base: str
    data: str
    """A file; empty: what the run held out."""
    template: str
    device: torch.device


def number(value: float | None, decimals: int = 1, sign: str = "") -> str:
    """With so many decimals and commas between thousands; nothing for None."""
    return "" if value is None else f"{value:{sign},.{decimals}f}"


def named(term: str) -> str:
    """A system or a metric in the reader's language; `base 4-shot` keeps its number."""
    name, _, rest = term.partition(" ")
    return " ".join(filter(None, [say(f"eval.name.{name}"), rest]))


def score_table(results: Evaluation) -> Shown:
    """One line a system, then what the adapter changed: difference to the base, its 95 % interval,
    p-value, where there are enough answers.
    """
    systems = results.systems
    columns = [c for c in COLUMNS if any(c in system.scores for system in systems.values())]
    decimals = [3 if c == "loss" else 1 for c in columns]
    arrows = [f"{named(c)} {'↓' if c in FALLING else '↑'}" for c in columns]
    lines = [["", *arrows]]
    for name, system in systems.items():
        cells = [number(system.scores.get(c), d) for c, d in zip(columns, decimals, strict=True)]
        lines.append([named(name), *cells])
    terms = {*systems, *columns}
    gaps = systems["adapter"].versus_base if "adapter" in systems else {}
    if gaps:
        changes = [(gaps.get(c, Gap(None)), d) for c, d in zip(columns, decimals, strict=True)]
        told = [number(gap.difference, d, "+") for gap, d in changes]
        lines.append([say("eval.difference"), *told])
        if any(gap.p is not None for gap, _ in changes):
            few = f"n < {FEWEST_PAIRS}"
            bounds = [
                few if gap.p is None else f"{number(gap.low, d, '+')} … {number(gap.high, d, '+')}"
                for gap, d in changes
            ]
            lines.append([say("eval.interval"), *bounds])
            lines.append(["p", *(few if gap.p is None else f"{gap.p:.3f}" for gap, _ in changes)])
            terms.add("p")
    legend = [say(f"eval.explain.{term}") for term in EXPLAINED if term in terms]
    counts, n = results.counts, results.n
    others = ", ".join(f"{named(c)} n = {counts[c]}" for c in columns if counts.get(c, n) != n)
    title = say("eval.title", n=n or "?")
    return Shown(f"{title} ({others})" if others else title, lines, legend)


def group_table(systems: Mapping[str, SystemScores], key: str, metric: str) -> list[Shown]:
    """The metric by category or by length, with the number of answers; nothing where there is only
    one group.
    """
    grouped = {name: getattr(system, key) for name, system in systems.items()}
    grouped = {name: groups for name, groups in grouped.items() if len(groups) > 1}
    if not grouped:
        return []
    heads = [f"{name} ({group.answers})" for name, group in next(iter(grouped.values())).items()]
    lines = [["", *heads]]
    for name, groups in grouped.items():
        lines.append([named(name), *(number(group.scores[metric]) for group in groups.values())])
    n = sum(group.answers for group in next(iter(grouped.values())).values())
    return [Shown(say(f"eval.{key}", n=n), lines)]


def strength_table(results: Evaluation) -> list[Shown]:
    """A line for each strength: what it gains and what it makes forget, as shares of what the
    adapter does; below it the recommended one.
    """
    found = results.strength
    if found is None:
        return []
    scores = {place: system.scores for place, system in by_strength(results.systems).items()}
    columns = {"loss": -1, "general-ppl": 1}
    lines = [["", *(head for c in columns for head in (named(c), say("eval.strength.share")))]]
    for place, reached in scores.items():
        cells = [f"{place:g}"]
        for metric, sign in columns.items():
            change, whole = (sign * (s[metric] - scores[0][metric]) for s in (reached, scores[1]))
            cells.append(number(reached[metric], 3 if metric == "loss" else 1))
            cells.append(f"{100 * change / whole + 0:.0f} %" if whole > 0 else "")  # no "-0 %"
        lines.append(cells)
    if found.share is None:
        told = say("eval.few", n=results.n, fewest=FEWEST_PAIRS)
    else:
        told = say(
            "eval.strength.none" if found.recommended is None else "eval.strength.best",
            best=f"{found.recommended or 0:g}",
            interval=" … ".join(f"{bound:g}" for bound in found.interval),
            share=number(100 * found.share, 0),
            kept=number(100 * KEPT, 0),
            rise=number(100 * MOST_RISE, 0),
        )
    return [Shown(say("eval.strength"), lines, [say("eval.strength.explain"), told])]


def accuracy_table(exam: Exam) -> Shown:
    """One line per subject, then both averages with their intervals and what the adapter changed;
    one column per system.
    """

    def cell(accuracy: float, interval: Sequence[float]) -> str:
        bounds = " … ".join(number(bound) for bound in interval)
        return f"{accuracy:.1f} [{bounds}]" if bounds else f"{accuracy:.1f}"

    systems = exam.systems.values()
    names = [named(name) for name in exam.systems]
    lines = [["", say("eval.questions"), say("eval.shots"), *names]]
    for name, subject in exam.systems["base"].subjects.items():
        rates = [system.subjects[name] for system in systems]
        cells = [cell(rate.accuracy, rate.interval) for rate in rates]
        lines.append([name, str(subject.questions), str(subject.shots), *cells])
    micro = [cell(system.accuracy, system.interval) for system in systems]
    macro = [cell(system.macro, system.macro_interval) for system in systems]
    lines.append([say("eval.micro"), str(exam.n), "", *micro])
    lines.append([say("eval.macro"), "", "", *macro])
    if "adapter" in exam.systems:
        gap = exam.systems["adapter"].versus_base["accuracy"]
        changed = number(gap.difference, 1, "+")
        if gap.p is not None:
            changed += f" [{number(gap.low, 1, '+')} … {number(gap.high, 1, '+')}]"
        told = "" if gap.p is None else f"p {gap.p:.3f}"
        cells = [changed * (name == "adapter") for name in exam.systems]
        lines.append([say("eval.difference"), "", told, *cells])
    return Shown(say("eval.title", n=exam.n), lines, [say("eval.explain.accuracy")])


def tables(results: Evaluation | Exam) -> list[Shown]:
    """Everything that is shown as a table."""
    if isinstance(results, Exam):
        return [accuracy_table(results)]
    shown = [score_table(results)]
    if pairs := results.preference:
        rows = [["", *pairs], ["", *(number(value, 3) for value in pairs.values())]]
        shown.append(Shown(say("eval.pairs", n=results.counts["loss"]), rows))
    return [
        *shown,
        *group_table(results.systems, "by_category", "exact"),
        *group_table(results.systems, "by_length", "rouge-l-char"),
        *strength_table(results),
    ]


def verdict(results: Evaluation | Exam) -> str:
    """One sentence: in which scores the adapter is better than the base and than copying the
    question, or that there are too few answers to tell; nothing without an adapter.
    """
    if "adapter" not in results.systems:
        return ""
    gaps = {"base": results.systems["adapter"].versus_base}
    if isinstance(results, Evaluation):
        gaps["copy"] = results.systems["adapter"].versus_copy
    clear, compared = [], []
    for rival, changes in gaps.items():
        scores = [c for c in (*SCORES, "accuracy") if c in changes] or [*changes][:1]
        told: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
        for score in scores:
            gap = changes[score]
            if gap.p is None:
                return say("eval.few", n=results.n, fewest=FEWEST_PAIRS)
            rises = (gap.difference or 0) > 0
            kind = "better" if rises != (score in FALLING) else "worse"
            told["unclear" if gap.p >= SIGNIFICANT else kind].append(named(score))
        if scores and len(told["better"]) == len(scores):
            clear.append(named(rival))
            every = say("eval.every", count=len(scores)) if len(scores) > 1 else told["better"][0]
        elif scores:
            parts = (say(f"eval.is.{kind}", scores=", ".join(n)) for kind, n in told.items() if n)
            compared.append(say("eval.beside", rival=named(rival), parts=", ".join(parts)))
    if clear:
        rivals = say("eval.and").join(clear)
        compared.insert(0, say("eval.better", rivals=rivals, scores=every))
    then = say("eval.then")
    sentence = f"{then.join(compared)} (n = {results.n})" if compared else ""
    forgot = gaps["base"].get("general-ppl", Gap(None))
    worse = (forgot.difference or 0) > 0 and (forgot.p or 1) < SIGNIFICANT
    if isinstance(results, Evaluation) and worse:
        before, after = (
            number(results.systems[name].scores["general-ppl"]) for name in ("base", "adapter")
        )
        return sentence + then + say("eval.forgot", before=before, after=after)
    return sentence


def summary(results: Evaluation | Exam) -> str:
    """The tables with their legends for the terminal, and the verdict last."""
    parts = ["\n".join([f"{s.title}", table(s.rows), *s.legend]) for s in tables(results)]
    return "\n\n".join(filter(None, [*parts, verdict(results)]))


def warn_of_length(results: Evaluation) -> None:
    """Of a preference run: say so if it made answers longer than the chosen ones are."""
    adapter, base, chosen = (
        sum(len(sample.answers.get(name, sample.reference)) for sample in results.samples)
        for name in ("adapter", "base", "")
    )
    if adapter > LONGER * max(base, chosen):
        note("train.longer", times=f"{adapter / max(1, chosen):.1f}")


def write_results(folder: Path, results: Evaluation | Exam, about: About) -> None:
    """eval.json, samples.jsonl, scores.png and report.html, with the loss curve if `folder` or the
    one above it holds a run.
    """
    text = to_json(document(results), indent=1) + "\n"
    (folder / "eval.json").write_text(text, encoding="utf-8")
    lines = [to_json(sample.document()) + "\n" for sample in results.samples]
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    runs = [run for run in (folder, folder.parent) if (run / "config.toml").is_file()]
    title, own = "/".join(folder.parts[-2:]), language()
    with TemporaryDirectory() as other:
        pages = {}
        for spoken in dict.fromkeys([own, *LANGUAGES]):
            with speaking(spoken):
                plots = _plots(results, runs, folder if spoken == own else Path(other))
                pages[spoken] = _page(title, results, plots, _facts(results, about, runs))
    report = Environment(autoescape=True).from_string(_REPORT.read_text(encoding="utf-8"))
    text = report.render(pages=pages, languages=LANGUAGES)
    (folder / "report.html").write_text(text, encoding="utf-8")


def _plots(results: Evaluation | Exam, runs: Sequence[Path], folder: Path) -> list[Path]:
    """The pictures of these results, drawn into the folder."""
    if not isinstance(results, Evaluation):
        return []
    plots: list[Path] = []
    for run in runs[:1]:
        plots.append(folder / "loss.png")
        draw_curve(run / "metrics.jsonl", plots[0])
    if results.samples:
        plots.append(folder / "scores.png")
        answering = (n for n in results.samples[0].answers if strength_of(n) in (None, 0, 1))
        draw_scores({name: results.systems[name] for name in answering}, plots[-1])
    if found := results.strength:
        plots.append(folder / "strengths.png")
        draw_strengths(by_strength(results.systems), found.recommended, plots[-1])
    return plots


def _facts(results: Evaluation | Exam, about: About, runs: Sequence[Path]) -> dict[str, str]:
    """What was evaluated, when, on what, and how the adapter came to be: label -> text."""
    device = about.device
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    facts = {
        "base": about.base,
        "data": about.data,
        "template": about.template,
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{name}; cllm {__version__}, {versions}",
    }
    for run in runs[:1]:
        config = load_config(run / "config.toml")
        trained_on = ", ".join(source.path for source in config.data.train)
        if isinstance(results, Evaluation) and not about.data:
            facts["data"] = say(
                "eval.held_out",
                data=config.data.eval or trained_on,
                drawn=results.n,
                count=results.counts["loss"],
                seed=config.train.seed,
            )
        metrics = read_metrics(run / "metrics.jsonl")
        steps = [row for row in metrics if "loss" in row]
        tokens = sum(row["tokens"] for row in steps)
        facts["trained"] = say(
            "eval.trained",
            data=trained_on,
            steps=len(steps),
            tokens=f"{tokens:,}",
            time=duration(sum(row["tokens"] / row["tokens_per_second"] for row in steps)),
        )
        facts["settings"] = say(
            "eval.settings",
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            rate=config.train.rate,
            row=config.train.row_tokens,
            step=f"{tokens / max(1, len(steps)):,.0f}",
            quantize=config.model.quantize,
        )
        facts["curve"] = turned(metrics)
    return {say(f"eval.fact.{key}"): text for key, text in facts.items() if text}


def _page(
    title: str, results: Evaluation | Exam, plots: Sequence[Path], facts: Mapping[str, str]
) -> dict[str, Any]:
    """What report.html shows, in the language that is spoken; its template escapes every text of
    models and data.
    """
    samples = results.samples if isinstance(results, Evaluation) else []
    signed = METRICS | {
        "rouge-l": ROUGE("rougeL", "jieba", "set"),
        "bleu-4": BLEU("char", "method3", effective_order=True),
    }
    signatures = [f"{named(name)}: {metric.signature}" for name, metric in signed.items()]
    systems = [*samples[0].answers] if samples else []
    return {
        "title": say("eval.report", name=title),
        "verdict": verdict(results),
        "facts": facts,
        "tables": tables(results),
        "images": {
            say(f"eval.caption.{path.stem}"): base64.b64encode(path.read_bytes()).decode()
            for path in plots
            if path.is_file()
        },
        "ends": _ends(samples, "adapter" if "adapter" in results.systems else "base"),
        "categories": sorted({sample.category for sample in samples} - {""}),
        "say": {name: say(f"eval.{name}") for name in ("search", "all_categories", "matching")},
        "named": {name: named(name) for name in ["reference", *systems]},
        "notes": [say("eval.beside_name"), *signatures] if samples else [],
    }


def _ends(samples: Sequence[Sample], system: str) -> list[tuple[str, list[Sample]]]:
    """Headings with the worst and the best answers by ROUGE-L, and those between."""
    ranked = sorted(samples, key=lambda sample: sample.scores[system]["rouge-l-char"])
    count = min(SHOWN, (len(ranked) + 1) // 2)
    best = max(count, len(ranked) - count)
    parts = {"worst": ranked[:count], "best": ranked[best:][::-1], "others": ranked[count:best]}
    return [
        (say(f"eval.{part}", count=len(rows)), rows[:OTHERS])
        for part, rows in parts.items()
        if rows
    ]
