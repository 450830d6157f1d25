"""The web page, in Gradio 6: chat, compare two answers blind, watch a training run, watch the
machine. Chinese or English by the browser.

Loads nothing from other hosts. Model text is sanitised Markdown under the guard's
Content-Security-Policy: no script of it runs.
"""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
import asyncio
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from cllm.assembly import Loaded
from cllm.data.schema import Message
from cllm.evaluate.report import number, score_table
from cllm.evaluate.results import Gap
from cllm.learn.log import peak_memory_bytes, read_metrics
from cllm.messages import UserError, messages
from cllm.model.adapter import WEIGHTS_FILE
from cllm.serve.answer import Answer, ModelError, chat_sampling
from cllm.serve.engine import Engine

# of a streamed answer: smooth to the eye, and 16 readers do not slow the engine down
REFRESH_SECONDS = 0.06
CSS = """
.gradio-container { max-width: 64rem !important; width: 100% !important; margin: auto !important; }
.field { border: 1px solid var(--border-color-primary) !important; border-radius: var(--radius-lg); }
.cost p { color: var(--body-text-color-subdued); font-size: .8rem; text-align: right; min-height: 1.2rem; }
"""
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
SHOWN = ("reference", "base", "adapter")  # columns of the samples
# in the sliders' order
SETTINGS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
)
VOTES = ("a", "b", "tie", "bad")
COLOURS = ("#6366f1", "#d97706")  # of the curves
_votes = threading.Lock()
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
Turns = list[dict[str, Any]]


def mount_page(api: Any, loaded: Loaded, engine: Engine) -> Any:
    """An ASGI application: the API where its paths are, so that what it does not know is refused in
    its own shape, else the page.
    """
    from fastapi import FastAPI

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    texts = {
        code.removeprefix("ui."): text
        for code, text in messages().items()
        if code.startswith("ui.")
    }
    t = gr.I18n(
        en={key: text[0] for key, text in texts.items()},
        zh={key: text[1] for key, text in texts.items()},
    )
    theme = gr.themes.Soft(font=list(FONTS), font_mono=["ui-monospace", "Consolas", "monospace"])
    page = gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        build_page(t, loaded, engine),
        path="/",
        theme=theme,
        css=CSS,
        i18n=t,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size="1kb",
    )

    async def either(scope: Any, receive: Any, send: Any) -> None:
        own = scope.get("path", "").startswith("/v1/") or scope.get("path") in (
            "/health",
            "/openapi.json",
        )
        await (api if own else page)(scope, receive, send)

    return either


def build_page(t: Any, loaded: Loaded, engine: Engine) -> Any:
    """The four tabs; `t` translates a text's key in the browser."""
    import gradio as gr

    with gr.Blocks(title="cllm", fill_height=True, analytics_enabled=False) as page, gr.Tabs():
        with gr.Tab(t("chat")) as chat:
            knobs = _chat_tab(t, loaded, engine)
        tabs = [chat]
        if loaded.home is not None:
            with gr.Tab(t("compare")) as compare:
                _compare_tab(t, loaded, engine, knobs[2:])
            tabs.append(compare)
        with gr.Tab(t("training")) as training:
            watch_run = _training_tab(t, (loaded.home or Path("runs/-")).parent)
        with gr.Tab(t("monitor")) as monitor:
            watch_machine = _monitor_tab(t, engine, _count_sessions(page))
        for tab, (refresh, inputs, outputs) in ((training, watch_run), (monitor, watch_machine)):
            timer = gr.Timer(2, active=False)  # costs nothing until its tab is opened
            timer.tick(refresh, inputs, outputs, **QUIET)
            tab.select(refresh, inputs, outputs, **QUIET).then(
                lambda: gr.Timer(active=True), None, timer, **QUIET
            )
            for other in {*tabs, training, monitor} - {tab}:
                other.select(lambda: gr.Timer(active=False), None, timer, **QUIET)
    return page.queue(default_concurrency_limit=None, max_size=256)


def _chat_tab(t: Any, loaded: Loaded, engine: Engine) -> list[Any]:
    """Streaming, stop, regenerate, edit; returns the settings, which Compare shares."""
    import gradio as gr

    chatbot = gr.Chatbot(
        height="62vh",
        show_label=False,
        editable="user",
        buttons=["copy"],
        feedback_options=None,
        placeholder=t("hello"),
        reasoning_tags=[("<think>", "</think>")],
    )
    cost = gr.Markdown(" ", elem_classes="cost")
    box = gr.Textbox(
        show_label=False,
        placeholder=t("ask"),
        max_lines=8,
        autofocus=True,
        submit_btn=True,
        container=False,
        elem_classes="field",
    )
    knobs = _knobs(t, loaded)

    async def respond(
        request: gr.Request, history: Turns, name: str, system: str | None, *values: Any
    ) -> AsyncIterator[tuple[Turns, str]]:
        language = int(request.headers.get("accept-language", "").lower().startswith("zh"))
        # Reasoning comes back as a titled turn of its own; no format shows it to the model again.
        kept = [
            turn
            for turn in history
            if turn["role"] != "assistant" or not (turn.get("metadata") or {}).get("title")
        ]
        said = [Message("system", system.strip())] if system and system.strip() else []
        said += [Message(turn["role"], _text(turn["content"])) for turn in kept]
        history.append({"role": "assistant", "content": ""})
        with _shown_errors():
            answer = Answer(engine, loaded.tokenizer, said, _sampling(values), loaded.models[name])
            async for _ in _watched([answer]):
                history[-1]["content"] = answer.text
                yield history, messages()["ui.cost"][language].format(**answer.cost())

    def ask(words: str, history: Turns) -> tuple[Any, Turns]:
        return gr.Textbox("", submit_btn=False, stop_btn=True), [
            *history,
            {"role": "user", "content": words},
        ]

    def again(history: Turns, data: gr.RetryData) -> tuple[Any, Turns]:
        return gr.Textbox(submit_btn=False, stop_btn=True), history[: _index(data) + 1]

    def edited(history: Turns, data: gr.EditData) -> tuple[Any, Turns]:
        turns = [*history[: _index(data)], {"role": "user", "content": data.value}]
        return gr.Textbox(submit_btn=False, stop_btn=True), turns

    starts = [
        box.submit(ask, [box, chatbot], [box, chatbot], **QUIET),
        chatbot.retry(again, chatbot, [box, chatbot], **QUIET),
        chatbot.edit(edited, chatbot, [box, chatbot], **QUIET),
    ]
    answers = [
        start.success(respond, [chatbot, *knobs], [chatbot, cost], **QUIET) for start in starts
    ]
    for event in answers:
        event.then(lambda: gr.Textbox(submit_btn=True, stop_btn=False), None, box, **QUIET)
    box.stop(
        lambda: gr.Textbox(submit_btn=True, stop_btn=False), None, box, cancels=answers, **QUIET
    )
    return knobs


def _knobs(t: Any, loaded: Loaded) -> list[Any]:
    """Which model, the system prompt and the sampling parameters, in the order that `_sampling`
    takes them.
    """
    import gradio as gr

    names, usual = list(loaded.models), chat_sampling()
    model = gr.Radio(
        names, value=names[0], show_label=False, container=False, visible=len(names) > 1
    )
    with gr.Accordion(t("settings"), open=False):
        system = gr.Textbox(label=t("system"), lines=2)
        with gr.Row():
            length = gr.Slider(1, 4096, usual.max_new_tokens, step=1, label=t("max_tokens"))
            temperature = gr.Slider(0, 2, usual.temperature, step=0.05, label=t("temperature"))
            top_p = gr.Slider(0.05, 1, usual.top_p, step=0.05, label="top-p")
        with gr.Row():
            top_k = gr.Slider(1, 200, usual.top_k, step=1, label="top-k")
            min_p = gr.Slider(0, 0.5, usual.min_p, step=0.01, label="min-p")
            penalty = gr.Slider(0.8, 2, usual.repetition_penalty, step=0.05, label=t("penalty"))
            seed = gr.Number(None, precision=0, label=t("seed"))
    return [model, system, length, temperature, top_p, top_k, min_p, penalty, seed]


def _compare_tab(t: Any, loaded: Loaded, engine: Engine, knobs: list[Any]) -> None:
    """One question to two models as two rows of one batch; who is who is told after the vote."""
    import gradio as gr

    pairs = {
        f"{first} ↔ {second}": [first, second] for first, second in combinations(loaded.models, 2)
    }
    pair = gr.Radio(
        list(pairs),
        value=next(iter(pairs)),
        show_label=False,
        container=False,
        visible=len(pairs) > 1,
    )
    with gr.Row(equal_height=True):
        question = gr.Textbox(
            show_label=False,
            placeholder=t("compare_ask"),
            max_lines=6,
            submit_btn=True,
            container=False,
            scale=5,
            elem_classes="field",
        )
        category = gr.Textbox(
            show_label=False,
            placeholder=t("category"),
            container=False,
            min_width=120,
            elem_classes="field",
        )
    with gr.Row():
        sides = [
            gr.Chatbot(height="44vh", label=side, buttons=["copy"], feedback_options=None)
            for side in "AB"
        ]
    with gr.Row():
        buttons = [gr.Button(t(f"vote_{vote}"), interactive=False, min_width=80) for vote in VOTES]
    verdict = gr.Markdown(" ")
    gr.Markdown(t("votes_kept"), elem_classes="cost")
    state = gr.State()

    async def duel(words: str, chosen: str, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        names = random.SystemRandom().sample(pairs[chosen], 2)
        sampling = _sampling(
            (
                *values[:-1],
                random.SystemRandom().getrandbits(31) if values[-1] is None else values[-1],
            )
        )
        with _shown_errors():
            answers = [
                Answer(
                    engine, loaded.tokenizer, [Message("user", words)], sampling, loaded.models[n]
                )
                for n in names
            ]
            async for done in _watched(answers):
                shown = [
                    [{"role": "user", "content": words}, {"role": "assistant", "content": a.text}]
                    for a in answers
                ]
                kept = {
                    "question": words,
                    "names": names,
                    "texts": [a.text for a in answers],
                    "sampling": sampling,
                }
                yield (*shown, kept, " ", *(gr.Button(interactive=done) for _ in VOTES))

    def vote(choice: str) -> Callable[[dict[str, Any], str], tuple[Any, ...]]:
        def record(kept: dict[str, Any], category: str) -> tuple[Any, ...]:
            _append_vote(choice, category, kept, loaded)
            return "**A** {} · **B** {}".format(*kept["names"]), *(
                gr.Button(interactive=False) for _ in VOTES
            )

        return record

    question.submit(duel, [question, pair, *knobs], [*sides, state, verdict, *buttons], **QUIET)
    for choice, button in zip(VOTES, buttons, strict=True):
        button.click(vote(choice), [state, category], [verdict, *buttons], **QUIET)


def _append_vote(vote: str, category: str, kept: dict[str, Any], loaded: Loaded) -> None:
    """One line of preference data, readable by its owner only; chosen and rejected stand in it if
    there is a winner.
    """
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "instruction": kept["question"],
        "vote": vote,
        "models": kept["names"],
    }
    row |= {"answers": kept["texts"], "base": loaded.base_name} | (
        {"category": category.strip()} if category.strip() else {}
    )
    row["adapter_sha256"] = {
        name: _weights_hash(loaded.adapters[name]) for name in kept["names"] if name != "base"
    }
    row["sampling"] = {key: getattr(kept["sampling"], key) for key in SETTINGS}
    if vote in ("a", "b"):
        row["chosen"], row["rejected"] = kept["texts"] if vote == "a" else kept["texts"][::-1]
    assert loaded.home is not None
    private = partial(os.open, mode=0o600)
    # lines of several voters do not mix
    with _votes, open(loaded.home / "votes.jsonl", "a", encoding="utf-8", opener=private) as out:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _weights_hash(home: Path) -> str:
    weights = next(
        path for path in (home / "adapter" / WEIGHTS_FILE, home / WEIGHTS_FILE) if path.exists()
    )
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def _training_tab(t: Any, root: Path) -> tuple[Any, Any, Any]:
    """Any run beside the one that answers: loss and speed as they are written, scores before and
    after, samples.
    """
    import gradio as gr

    chosen = gr.Dropdown(label=t("run"), choices=[])
    with gr.Row():
        charts = [
            gr.Markdown(label=t(key), show_label=True, container=True, sanitize_html=False)
            for key in ("loss", "speed")
        ]
    scores = gr.Dataframe(label=t("scores"))
    samples = gr.Dataframe(label=t("samples"), headers=["", *SHOWN], wrap=True)

    def follow(name: str | None) -> tuple[Any, ...]:
        runs = sorted(
            root.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True
        )
        names = [path.parent.name for path in runs]
        # only names from the list: no path of a reader's making
        run = root / (name if name in names else (names or ["-"])[0])
        rows = read_metrics(run / "metrics.jsonl")
        scored, answers = run / "eval.json", read_metrics(run / "samples.jsonl")
        results = json.loads(scored.read_text(encoding="utf-8")) if scored.exists() else {}
        gaps = results.get("adapter", {}).get("versus_base", {})
        header, *lines = score_table(
            ({"reference": {}} if answers else {}) | results,
            {metric: Gap(**gap) for metric, gap in gaps.items()},
        )
        if answers:
            header, lines = (
                [*header, "length"],
                [[*line, _mean_length(answers, line[0])] for line in lines],
            )
        cells = [
            [row["messages"][-1]["content"], *(row.get(key, "") for key in SHOWN)]
            for row in answers[:20]
        ]
        menu = gr.Dropdown(choices=names, value=run.name if names else None)
        return (
            menu,
            _chart(rows, ["loss", "eval_loss"]),
            _chart(rows, ["tokens_per_second"]),
            {"headers": header, "data": lines},
            cells,
        )

    outputs = [chosen, *charts, scores, samples]
    chosen.input(follow, chosen, outputs, **QUIET)
    return follow, chosen, outputs


def _chart(rows: list[dict[str, Any]], keys: list[str]) -> str:
    """Curves over the steps as SVG: Gradio's plots and HTML evaluate strings as code, which the
    Content-Security-Policy forbids.
    """
    curves = {
        key: [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        for key in keys
    }
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    last, top = max(x for x, _ in points) or 1, max(y for _, y in points) or 1
    shapes = '<path d="M40 10V150H390" fill="none" stroke="currentColor" opacity=".4"/>'
    shapes += f'<text x="2" y="20">{top:.4g}</text><text x="2" y="152">0</text><text x="350" y="170">{last}</text>'
    for i, (key, colour) in enumerate(zip(keys, COLOURS, strict=False)):
        if curve := curves[key]:
            thin = curve[:: 1 + len(curve) // 400]
            path = " ".join(f"{40 + 350 * x / last:.1f},{150 - 135 * y / top:.1f}" for x, y in thin)
            shapes += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"><title>{key}</title></polyline>'
            shapes += (
                f'<text x="{60 + 100 * i}" y="170" fill="{colour}">{key} {curve[-1][1]:.4g}</text>'
            )
    return (
        f'<svg viewBox="0 0 400 176" width="100%" fill="currentColor" font-size="10">{shapes}</svg>'
    )


def _count_sessions(page: Any) -> set[str]:
    """The open pages: added when one is loaded, taken out when its connection ends."""
    import gradio as gr

    sessions: set[str] = set()

    def come(request: gr.Request) -> None:
        sessions.add(request.session_hash or "")

    def leave(request: gr.Request) -> None:
        sessions.discard(request.session_hash or "")

    page.load(come, None, None, **QUIET)
    page.unload(leave)
    return sessions


def _monitor_tab(t: Any, engine: Engine, sessions: set[str]) -> tuple[Any, Any, Any]:
    """The engine and the machine, every two seconds while somebody looks."""
    import gradio as gr
    import torch

    gpu = engine.device.type == "cuda"
    keys = [
        "sessions",
        "running",
        "waiting",
        "speed_now",
        "kv_cache",
        "memory",
        "cpu_load",
        *(["gpu_memory", "gpu_load"] if gpu else []),
    ]
    with gr.Row():
        boxes = [gr.Textbox(label=t(key), interactive=False, min_width=180) for key in keys]
    last = gr.State((0.0, 0))

    def measure(before: tuple[float, int]) -> tuple[Any, ...]:
        stats, now = engine.stats(), time.monotonic()
        speed = (stats["generated_tokens"] - before[1]) / (now - before[0]) if before[0] else 0.0
        cpu = f"{os.getloadavg()[0]:.1f} / {os.cpu_count()}" if hasattr(os, "getloadavg") else "-"
        cache = f"{stats['kv_tokens_used']:,} / {stats['kv_tokens']:,}"
        values = [len(sessions), stats["running"], stats["waiting"], f"{speed:.1f} tok/s", cache]
        values += [f"{peak_memory_bytes(None) / 2**30:.1f} GiB", cpu]
        if gpu:
            free, total = torch.cuda.mem_get_info(engine.device)
            values += [
                f"{(total - free) / 2**30:.1f} / {total / 2**30:.1f} GiB",
                _gpu_load(engine.device),
            ]
        return (now, stats["generated_tokens"]), *values

    return measure, last, [last, *boxes]


def _gpu_load(device: Any) -> str:
    import torch

    try:
        return f"{torch.cuda.utilization(device)} %"
    # NVML's binding is missing, or its own errors, which share no class: a GPU's part does not tell
    except Exception as error:
        return f"- ({type(error).__name__})"


async def _watched(answers: list[Answer]) -> AsyncIterator[bool]:
    """Decode all answers at once; yields False now and then and True at the end. Closing it frees
    their rows.
    """

    async def drain(answer: Answer) -> None:
        async for _ in answer:
            pass

    tasks = [asyncio.create_task(drain(answer)) for answer in answers]
    try:
        while (await asyncio.wait(tasks, timeout=REFRESH_SECONDS))[1]:
            yield False
        for task in tasks:
            task.result()
        yield True
    finally:
        for answer in answers:
            answer.cancel()


@contextmanager
def _shown_errors() -> Iterator[None]:
    """What users can mend, and what the model failed at, as a notice on the page."""
    import gradio as gr

    try:
        yield
    except (UserError, ModelError) as error:
        raise gr.Error(str(error.args[0]), duration=20, print_exception=False) from error


def _sampling(values: tuple[Any, ...]) -> Any:
    return chat_sampling(**dict(zip(SETTINGS, values, strict=True)))


def _text(content: Any) -> str:
    """The words of a turn: Gradio hands them back as a list of parts."""
    return (
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    )


def _index(data: Any) -> int:
    return int(data.index[0] if isinstance(data.index, tuple | list) else data.index)


def _mean_length(answers: Turns, system: str) -> str:
    """Characters of an answer, on average; nothing for systems whose answers are not kept."""
    lengths = [len(row[system]) for row in answers if system in row]
    return number(sum(lengths) / len(lengths) if lengths else None)
