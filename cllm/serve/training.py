"""The page's tab of training runs, each as it is written: where it stands, its settings, curves
(of two runs over each other), scores and answers; and another run to talk to.
"""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import chain, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import gradio as gr

from cllm.assembly import Loaded, open_beside
from cllm.config import load_config
from cllm.evaluate.report import named, number, score_table, verdict
from cllm.evaluate.results import scores_of
from cllm.learn.log import duration, losses, seconds_a_step
from cllm.messages import UserError, command, read_json, say, speaking
from cllm.plots import smoothed
from cllm.runs import described, find_runs, is_held, read_metrics, run_table
from cllm.serve.charts import COLOURS, Line, chart
from cllm.serve.compare import listed
from cllm.serve.engine import Engine
from cllm.serve.widgets import QUIET, language_of, texts_for

SYSTEMS = ("reference", "adapter", "base")  # columns of the samples
SHOWN_SAMPLES = 20


class TrainingTab:
    """`shown`: what refreshes the tab, with its inputs and outputs. `menus`: what lists the models
    that are open.
    """

    def __init__(self, t: Any, loaded: Loaded, engine: Engine, menus: Sequence[Any]) -> None:
        self.loaded, self.engine = loaded, engine
        self.root = (loaded.home or Path("runs/-")).parent
        with gr.Row():
            chosen = gr.Dropdown(label=t("run"), choices=[], min_width=220)
            over = gr.Dropdown(label=t("run_over"), choices=[], min_width=220)
        talk = gr.Button(t("talk"), size="sm", visible=loaded.home is not None)
        told = gr.Markdown(" ")
        # pixels: all columns on a wide screen, and words on a narrow one, to scroll to
        table = partial(gr.Dataframe, wrap=True, visible=False)
        known = table(show_label=False, column_widths=[210, 170, 130, 100, 100, 110, 100, 170, 120])
        standing = gr.Markdown(" ")
        with gr.Row():
            charts = []
            for _ in range(2):
                with gr.Column(min_width=320):
                    charts.append(gr.Markdown(container=True, sanitize_html=False))
        legend = gr.Markdown()
        scores = table(show_label=False, column_widths=[140, *[133] * 8])
        samples = table(label=t("samples"), column_widths=[220, *[330] * 3])
        names = gr.State([])  # that the menus list
        outputs = [names, chosen, over, known, standing, *charts, scores, legend, samples]
        self.shown = self.follow, [names, chosen, over], outputs
        for menu in (chosen, over):
            menu.input(*self.shown, **QUIET)
        self.opened = talk.click(self.talk_to, chosen, [told, *menus], **QUIET)

    def follow(
        self, request: gr.Request, before: list[str], name: str | None, other: str | None
    ) -> tuple[Any, ...]:
        """The list of the runs; the one called `name`, at first the one that answers, and the
        curves of `other` over its own. Menus that list them already are left as their reader has
        them: open, or with a part of a name typed.
        """
        names = self._names()
        usual = self.loaded.home.name if self.loaded.home else ""
        name = next((known for known in (name, usual, *names) if known in names), "")
        menus: Any = (gr.skip(),) * 2
        if names != before:
            over = gr.Dropdown([("-", ""), *names], value=other if other in names else "")
            menus = gr.Dropdown(names, value=name or None), over
        curves = {
            known: read_metrics(self.root / known / "metrics.jsonl")
            for known in (name, other)
            if known in names
        }
        texts, run = texts_for(request), self.root / (name or "-")
        rows, answers = curves.get(name, []), read_metrics(run / "samples.jsonl")
        cells = [
            [row["messages"][-1]["content"], *(row.get(system, "") for system in SYSTEMS)]
            for row in answers[:SHOWN_SAMPLES]
        ]
        charts = (
            chart(texts["ui.loss"], _losses(curves, texts)),
            chart(texts["ui.speed"], _speeds(curves)),
        )
        with speaking(language_of(request)):
            known = run_table([_facts(self.root / name) for name in names])
            scores = _scores(run / "eval.json", answers)
            standing = _standing(run, rows) if name else " "
            headers = [texts["ui.question"], *map(named, SYSTEMS)]
        return (
            names,
            *menus,
            _filled(known),
            standing,
            *(gr.update(value=drawn, visible=bool(drawn)) for drawn in charts),
            *scores,
            _filled([headers, *cells]),
        )

    def _names(self) -> list[str]:
        """The runs of the list, the one started last first: in an order that stays while they are
        written to. No other name is read: no path of a reader's making.
        """
        return [run.name for run in find_runs(self.root, needs="config.toml")]

    def talk_to(self, request: gr.Request, name: str | None) -> tuple[Any, ...]:
        """Open a run beside the others; of another base the command is told that opens it."""
        texts, told = texts_for(request), " "
        if name in self._names():
            run = self.root / name
            try:
                with speaking(language_of(request)), self.engine.paused():
                    if run.resolve() not in self.loaded.adapters.values():
                        open_beside(self.loaded, run)
                told = texts["ui.opened"].format(name=name)
            except UserError as error:
                told = f"{error.args[0]}\n\n`{command('chat', run)}`"
        return told, *listed(self.loaded)


def _filled(table: list[list[str]]) -> dict[str, Any]:
    """A table of the page, which is not there without lines."""
    headers, *lines = table
    return gr.update(value={"headers": headers, "data": lines}, visible=bool(lines))


def _facts(run: Path) -> dict[str, Any]:
    """What `described` says, found out anew only where the run was written to since."""
    files = run, run / "metrics.jsonl", run / "eval.json"
    return _described(run, is_held(run), *(f.stat().st_mtime_ns for f in files if f.exists()))


_described = lru_cache(256)(lambda run, *_seen: described(run))


def _short(name: str) -> str:
    return name if len(name) < 30 else f"{name[:14]}…{name[-14:]}"


def _standing(run: Path, rows: list[dict[str, Any]]) -> str:
    """What the run is doing, how far it has come, and its settings."""
    facts = _facts(run)
    step, total = facts["step"], facts["steps"] or 0
    steps = [row for row in rows if "tokens_per_second" in row]
    held_out = losses(rows, "eval_loss")
    parts = [say(f"runs.{facts['state']}"), say("ui.step", step=step, total=total or "?")]
    if facts["state"] == "training" and steps:
        parts.append(say("ui.left", left=duration(seconds_a_step(steps) * (total - step))))
    if facts["state"] == "unfinished":
        parts.append(f"`{command('train', run, '--resume')}`")
    if steps:
        parts.append(duration(steps[-1]["seconds"]))
    if held_out:
        best_step, best = min(held_out, key=itemgetter(1))
        first = f"{held_out[0][1]:.3f}"
        parts.append(say("ui.held_out", first=first, best=f"{best:.3f}", step=best_step))
    return f"**{run.name}** · {' · '.join(parts)}\n\n{settings(run)}"


def settings(run: Path) -> str:
    """The config, as far as it makes runs differ."""
    try:
        config = load_config(run / "config.toml")
    except UserError as error:
        return str(error)
    values = {
        "model.path": Path(config.model.path).name,
        "model.quantize": config.model.quantize,
        "data.train": " + ".join(Path(source.path).name for source in config.data.train),
        "lora.rank": config.lora.rank,
        "train.learning_rate": f"{config.train.rate:g}",
        "train.epochs": f"{config.train.epochs:g}" if not config.train.steps else "none",
        "train.steps": config.train.steps or "none",
        "train.row_tokens": config.train.row_tokens,
        "train.tokens_per_step": config.train.tokens_per_step,
        "preference.loss": config.preference.loss,
    }
    return " · ".join(f"{key} `{value}`" for key, value in values.items() if value != "none")


def _scores(file: Path, answers: list[dict[str, Any]]) -> tuple[Any, str]:
    """The table of eval.json, with the mean length of the answers where they are kept; its verdict
    and legend.
    """
    results = scores_of(read_json(file) if file.exists() else {})
    if not results.systems:
        return _filled([[]]), ""
    shown = score_table(results)
    header, *lines = shown.rows
    legend = [*shown.legend, *[say("eval.explain.length")] * bool(answers)]
    if answers:
        header.append(named("length"))
        lines.insert(0, [named("reference"), *[""] * (len(header) - 2)])
        names = chain(["reference", *results.systems], repeat(""))
        for line, name in zip(lines, names, strict=False):
            lengths = [len(row[name]) for row in answers if name in row]
            line.append(number(sum(lengths) / len(lengths) if lengths else None))
    told = "\n- ".join([f"**{shown.title}** {verdict(results)}\n", *legend])
    return _filled([header, *lines]), told


def _losses(runs: dict[str, list[dict[str, Any]]], texts: dict[str, str]) -> list[Line]:
    """Raw and smoothed training losses and held-out losses, of the second run dashed."""
    lines = []
    for (run, rows), dashed in zip(runs.items(), (False, True), strict=False):
        name = _short(run)
        if points := losses(rows):
            steps, values = zip(*points, strict=True)
            smooth = list(zip(steps, smoothed(values), strict=True))
            lines.append(Line("", points, COLOURS[0], faint=True))
            lines.append(
                Line(f"{name} {texts['ui.train_loss']}", smooth, COLOURS[0], dashed=dashed)
            )
        if points := losses(rows, "eval_loss"):
            lines.append(Line(f"{name} {texts['ui.eval_loss']}", points, COLOURS[1], dashed=dashed))
    return lines


def _speeds(runs: dict[str, list[dict[str, Any]]]) -> list[Line]:
    return [
        Line(_short(name), losses(rows, "tokens_per_second"), COLOURS[dashed], dashed=dashed)
        for (name, rows), dashed in zip(runs.items(), (False, True), strict=False)
    ]
