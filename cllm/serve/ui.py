"""The web page, in Gradio 6: chat, compare two answers blind, watch a training run, watch the
machine. Chinese or English by the browser.

Loads nothing from other hosts. Model text is sanitised Markdown under the guard's
Content-Security-Policy: no script of it runs.
"""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
import asyncio
import hashlib
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from cllm.assembly import Loaded
from cllm.data.message import Message
from cllm.messages import UserError, messages, to_json
from cllm.model.adapter import WEIGHTS_FILE
from cllm.serve.answer import Answer, ModelError, chat_sampling
from cllm.serve.engine import Engine
from cllm.serve.monitor import QUIET, count_sessions, monitor_tab, training_tab
from cllm.serve.sampling import Sampling

# of a streamed answer: smooth to the eye, and 16 readers do not slow the engine down
REFRESH_SECONDS = 0.06
CSS = """
.gradio-container { max-width: 64rem !important; width: 100% !important; margin: auto !important; }
.field {
  border: 1px solid var(--border-color-primary) !important; border-radius: var(--radius-lg);
}
.cost p {
  color: var(--body-text-color-subdued); font-size: .8rem; text-align: right; min-height: 1.2rem;
}
"""
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
# setting -> (lowest, highest, step) of its slider, in the order on the page
SLIDERS = {
    "max_new_tokens": (1, 4096, 1),
    "temperature": (0, 2, 0.05),
    "top_p": (0.05, 1, 0.05),
    "top_k": (1, 200, 1),
    "min_p": (0, 0.5, 0.01),
    "repetition_penalty": (0.8, 2, 0.05),
}
SETTINGS = (*SLIDERS, "seed")
FIELD: dict[str, Any] = {
    "show_label": False,
    "container": False,
    "elem_classes": "field",
    "min_width": 120,
}
"""What every text box has: a border and nothing around it."""
VOTES = ("a", "b", "tie", "bad")
_votes = threading.Lock()
Turns = list[dict[str, Any]]


def mount_page(api: Any, loaded: Loaded, engine: Engine) -> Any:
    """An ASGI application: the API where its paths are, so that what it does not know is refused in
    its own shape, else the page.
    """
    from fastapi import FastAPI

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    english, chinese = (
        {
            code.removeprefix("ui."): texts[i]
            for code, texts in messages().items()
            if code.startswith("ui.")
        }
        for i in (0, 1)
    )
    t = gr.I18n(en=english, zh=chinese)
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
        path = scope.get("path", "")
        for_api = path.startswith("/v1/") or path in ("/health", "/openapi.json")
        await (api if for_api else page)(scope, receive, send)

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
            watch_run = training_tab(t, (loaded.home or Path("runs/-")).parent)
        with gr.Tab(t("monitor")) as monitor:
            watch_machine = monitor_tab(t, engine, count_sessions(page))
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
    box = gr.Textbox(placeholder=t("ask"), max_lines=8, autofocus=True, submit_btn=True, **FIELD)
    knobs = _knobs(t, loaded)

    async def respond(
        request: gr.Request, history: Turns, name: str, system: str | None, *values: Any
    ) -> AsyncIterator[tuple[Turns, str]]:
        language = int(request.headers.get("accept-language", "").lower().startswith("zh"))
        said = _messages(history, system or "")
        history.append({"role": "assistant", "content": ""})
        with _shown_errors():
            answer = Answer(engine, loaded.tokenizer, said, _sampling(values), loaded.models[name])
            async for _ in _watched([answer]):
                history[-1]["content"] = answer.text
                yield history, messages()["ui.cost"][language].format(**answer.cost())

    def busy() -> Any:
        return gr.Textbox(submit_btn=False, stop_btn=True)

    def idle() -> Any:
        return gr.Textbox(submit_btn=True, stop_btn=False)

    def ask(words: str, history: Turns) -> tuple[Any, Turns]:
        return gr.Textbox("", submit_btn=False, stop_btn=True), [*history, _user(words)]

    def again(history: Turns, data: gr.RetryData) -> tuple[Any, Turns]:
        return busy(), history[: _index(data) + 1]

    def edited(history: Turns, data: gr.EditData) -> tuple[Any, Turns]:
        return busy(), [*history[: _index(data)], _user(data.value)]

    answers = []
    for start in (
        box.submit(ask, [box, chatbot], [box, chatbot], **QUIET),
        chatbot.retry(again, chatbot, [box, chatbot], **QUIET),
        chatbot.edit(edited, chatbot, [box, chatbot], **QUIET),
    ):
        answers.append(start.success(respond, [chatbot, *knobs], [chatbot, cost], **QUIET))
        answers[-1].then(idle, None, box, **QUIET)
    box.stop(idle, None, box, cancels=answers, **QUIET)
    return knobs


def _messages(history: Turns, system: str) -> list[Message]:
    """The conversation as the model sees it: reasoning comes back as a titled turn of its own, and
    no format shows it to the model again.
    """
    said = [Message("system", system.strip())] if system.strip() else []
    for turn in history:
        titled = (turn.get("metadata") or {}).get("title")
        if turn["role"] != "assistant" or not titled:
            parts = turn["content"]  # a list, as Gradio hands a turn back
            text = parts if isinstance(parts, str) else "".join(p.get("text", "") for p in parts)
            said.append(Message(turn["role"], text))
    return said


def _user(words: str) -> dict[str, Any]:
    return {"role": "user", "content": words}


def _knobs(t: Any, loaded: Loaded) -> list[Any]:
    """Which model, the system prompt and the sampling parameters, in the order that `_sampling`
    takes them.
    """
    import gradio as gr

    usual = chat_sampling()
    knobs = [_choice(list(loaded.models))]
    with gr.Accordion(t("settings"), open=False):
        knobs.append(gr.Textbox(label=t("system"), lines=2))
        with gr.Row():
            for name, (lowest, highest, step) in SLIDERS.items():
                start = getattr(usual, name)
                knobs.append(
                    gr.Slider(lowest, highest, start, step=step, label=t(name), min_width=220)
                )
            knobs.append(gr.Number(None, precision=0, label=t("seed")))
    return knobs


@dataclass(frozen=True)
class Duel:
    """Two answers to one question, A's and B's, not voted on yet."""

    question: str
    names: list[str]
    """Of the models."""
    answers: list[str]
    sampling: Sampling


def _compare_tab(t: Any, loaded: Loaded, engine: Engine, knobs: list[Any]) -> None:
    """One question to two models as two rows of one batch; who is who is told after the vote."""
    import gradio as gr

    pairs = {
        f"{first} ↔ {second}": (first, second) for first, second in combinations(loaded.models, 2)
    }
    pair = _choice(list(pairs))
    with gr.Row(equal_height=True):
        asked = t("compare_ask")
        question = gr.Textbox(placeholder=asked, max_lines=6, submit_btn=True, scale=5, **FIELD)
        category = gr.Textbox(placeholder=t("category"), max_lines=1, **FIELD)
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
        sampling = _sampling(values)
        if sampling.seed is None:
            sampling = replace(sampling, seed=random.SystemRandom().getrandbits(31))
        said = [Message("user", words)]
        with _shown_errors():
            answers = [
                Answer(engine, loaded.tokenizer, said, sampling, loaded.models[name])
                for name in names
            ]
            async for done in _watched(answers):
                texts = [answer.text for answer in answers]
                shown = [[_user(words), {"role": "assistant", "content": text}] for text in texts]
                ready = [gr.Button(interactive=done) for _ in VOTES]
                yield *shown, Duel(words, names, texts, sampling), " ", *ready

    def vote(choice: str) -> Callable[[Duel, str], tuple[Any, ...]]:
        def record(voted: Duel, category: str) -> tuple[Any, ...]:
            _append_vote(choice, category.strip(), voted, loaded)
            told = "**A** {} · **B** {}".format(*voted.names)
            return told, *(gr.Button(interactive=False) for _ in VOTES)

        return record

    question.submit(duel, [question, pair, *knobs], [*sides, state, verdict, *buttons], **QUIET)
    for choice, button in zip(VOTES, buttons, strict=True):
        button.click(vote(choice), [state, category], [verdict, *buttons], **QUIET)


def _choice(names: list[str]) -> Any:
    """One of the names; not shown if there is only one."""
    import gradio as gr

    return gr.Radio(
        names, value=names[0], show_label=False, container=False, visible=len(names) > 1
    )


def _append_vote(vote: str, category: str, voted: Duel, loaded: Loaded) -> None:
    """One line of preference data, readable by its owner only; chosen and rejected stand in it if
    there is a winner.
    """
    row: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "instruction": voted.question,
        "vote": vote,
        "models": voted.names,
        "answers": voted.answers,
        "base": loaded.base_name,
        "adapter_sha256": {
            name: _weights_hash(loaded.adapters[name]) for name in voted.names if name != "base"
        },
        "sampling": {key: getattr(voted.sampling, key) for key in SETTINGS},
    }
    if category:
        row["category"] = category
    if vote in ("a", "b"):
        row["chosen"], row["rejected"] = voted.answers[:: 1 if vote == "a" else -1]
    assert loaded.home is not None
    private = partial(os.open, mode=0o600)
    # lines of several voters do not mix
    with _votes, open(loaded.home / "votes.jsonl", "a", encoding="utf-8", opener=private) as out:
        out.write(to_json(row) + "\n")


def _weights_hash(home: Path) -> str:
    folder = home / "adapter"  # of a run; else the adapter itself
    weights = (folder if folder.is_dir() else home) / WEIGHTS_FILE
    return hashlib.sha256(weights.read_bytes()).hexdigest()


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


def _sampling(values: tuple[Any, ...]) -> Sampling:
    return chat_sampling(**dict(zip(SETTINGS, values, strict=True)))


def _index(data: Any) -> int:
    return int(data.index[0] if isinstance(data.index, tuple | list) else data.index)
