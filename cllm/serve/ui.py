"""The web page, in Gradio 6: chat, compare two answers blind, watch a training run, watch the
machine. Chinese or English by the browser.

Loads nothing from other hosts. Model text is sanitised Markdown under the guard's
Content-Security-Policy: no script of it runs.
"""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from cllm.assembly import Loaded
from cllm.messages import UserError, messages
from cllm.serve.answer import Answer, ModelError
from cllm.serve.batch import Batch
from cllm.serve.compare import KEYS, CompareTab, Questions, listed
from cllm.serve.engine import Engine
from cllm.serve.guard import BODY_BYTES
from cllm.serve.history import History, conversation, put_back
from cllm.serve.monitor import count_sessions, monitor_tab
from cllm.serve.training import TrainingTab, settings
from cllm.serve.widgets import (
    EACH,
    FIELD,
    LATEX,
    QUIET,
    Turns,
    Wanted,
    asked_of,
    knobs_of,
    texts_for,
    user_turn,
)

CSS = """
.gradio-container {
  max-width: 80rem !important; width: 100% !important; margin: auto !important;
  overflow: clip !important; /* hidden, nothing in it would be sticky */
}
.field {
  border: 1px solid var(--border-color-primary) !important; border-radius: var(--radius-lg);
}
.loaded p { font-size: .8rem; color: var(--body-text-color-subdued); margin: 0; }
.message-wrap { padding-top: 2.2rem; }
.votes { position: sticky; bottom: 0; z-index: 2; background: var(--body-background-fill); }
.side .top-panel { display: none; } /* half of a comparison cannot be cleared */
@media (max-width: 640px) {
  .loaded p + p { display: none; }
  .side { height: 26dvh !important; min-height: 0 !important; }
  .votes button { padding: .4rem .2rem; font-size: .8rem; min-width: 3.6rem !important; }
}
.cost p {
  color: var(--body-text-color-subdued); font-size: .8rem; text-align: right; min-height: 1.2rem;
}
"""
# Takes out of the box what was sent once it is being answered. The browser alone knows what was
# typed meanwhile; Gradio's own `js` is evaluated from text, which the guard's policy forbids.
SENT = """<script>
{
  let sent = "";
  const box = () => document.querySelector("#ask textarea");
  const busy = () => document.querySelector("#ask .stop-button");
  const note = event => {
    // Enter also begins a line, and ends what an input method composes
    if (event.type == "keydown" && (event.key != "Enter" || event.shiftKey || event.isComposing))
      return;
    const place = event.type == "click" ? "#ask .submit-button" : "#ask textarea";
    sent = event.target.closest(place) && !busy() ? box().value : "";
  };
  // a page that is loaded again keeps what was typed, and says so to the server
  const [visit] = performance.getEntriesByType("navigation");
  const draft = visit?.type == "reload" && sessionStorage.getItem("cllm-draft");
  document.cookie = `cllm_again=1; path=/; max-age=${visit?.type == "reload" ? 30 : 0}`;
  const restore = () => {
    if (!box()) return setTimeout(restore, 300);
    setTimeout(() => {
      if (draft && !box().value.includes(draft)) {
        box().value += (box().value && "\\n") + draft;
        box().dispatchEvent(new Event("input", {bubbles: true}));
      }
      setInterval(() => box() && sessionStorage.setItem("cllm-draft", box().value), 500);
    }, 1500);
  };
  restore();
  document.addEventListener("keydown", note, true);
  document.addEventListener("click", note, true);
  new MutationObserver(() => {
    if (!sent || !busy()) return;
    if (box().value.startsWith(sent)) {
      box().value = box().value.slice(sent.length);
      box().dispatchEvent(new Event("input", {bubbles: true}));
    }
    sent = "";
  }).observe(document, {childList: true, subtree: true});
}
</script>"""
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")


def mount_page(api: Any, loaded: Loaded, engine: Engine, questions: Questions | None = None) -> Any:
    """An ASGI application: the API where its paths are, so that what it does not know is refused in
    its own shape, else the page; Compare asks `questions`, or those that the run has held out.
    """
    from fastapi import FastAPI

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
        build_page(t, loaded, engine, questions),
        path="/",
        theme=theme,
        css=CSS,
        head=KEYS + SENT,
        i18n=t,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size=BODY_BYTES,
    )

    paths = {route.path for route in api.routes}

    async def either(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        for_api = path.startswith("/v1/") or path in paths
        await (api if for_api else page)(scope, receive, send)

    return either


def build_page(t: Any, loaded: Loaded, engine: Engine, questions: Questions | None = None) -> Any:
    """What is loaded, and the four tabs; `t` translates a text's key in the browser."""

    def describe(request: gr.Request) -> str:
        told = texts_for(request)["ui.loaded"].format(
            models=" · ".join(name for name in loaded.models if name != "base") or "-",
            base=loaded.base_name,
            precision=loaded.precision.name,
            device=engine.device,
            context=f"{engine.max_tokens:,}",
        )
        if loaded.home is None or not (loaded.home / "config.toml").is_file():
            return told
        return f"{told}\n\n{settings(loaded.home)}"

    with gr.Blocks(
        title="cllm", fill_height=True, analytics_enabled=False, delete_cache=(3600, 86400)
    ) as page:
        header = gr.Markdown(" ", elem_classes="loaded")
        menus, opened = _tabs(t, page, loaded, engine, questions)
        for event in (page.load, opened.then):
            event(describe, None, header, **QUIET)
        page.load(lambda: listed(loaded), None, menus, **QUIET)
    return page.queue(default_concurrency_limit=None, max_size=256)


def _tabs(
    t: Any, page: Any, loaded: Loaded, engine: Engine, questions: Questions | None
) -> tuple[list[Any], Any]:
    """Chat, compare, training, monitor; returns what lists the models in them, and the event that
    opens another.
    """
    with gr.Tabs():
        with gr.Tab(t("chat")) as chat:
            knobs = ChatTab(t, page, loaded, engine).knobs
        tabs, menus = [chat], [knobs[0]]
        if loaded.home is not None:
            with gr.Tab(t("compare")) as compare:
                menus.append(CompareTab(t, page, loaded, engine, knobs[1:], questions).pair)
                menus.append(Batch(t, loaded, engine, knobs[1:]).models)
            tabs.append(compare)
        with gr.Tab(t("training")) as training:
            runs = TrainingTab(t, loaded, engine, menus)
        with gr.Tab(t("monitor")) as monitor:
            watch_machine = monitor_tab(t, engine, count_sessions(page))
        for tab, (refresh, inputs, outputs) in ((training, runs.shown), (monitor, watch_machine)):
            timer = gr.Timer(2, active=False)  # costs nothing until its tab is opened
            timer.tick(refresh, inputs, outputs, **QUIET)
            tab.select(refresh, inputs, outputs, **QUIET).then(
                lambda: gr.Timer(active=True), None, timer, **QUIET
            )
            for other in {*tabs, training, monitor} - {tab}:
                other.select(lambda: gr.Timer(active=False), None, timer, **QUIET)
    return menus, runs.opened


class ChatTab:
    """Streaming, stop, regenerate, edit, conversations that the browser keeps. `knobs`: the model,
    the system prompt and the settings, which Compare shares.
    """

    def __init__(self, t: Any, page: Any, loaded: Loaded, engine: Engine) -> None:
        self.loaded, self.engine = loaded, engine
        history = History(t)
        self.chatbot = gr.Chatbot(
            height="62dvh",
            show_label=False,
            editable="user",
            buttons=["copy"],
            feedback_options=None,
            placeholder=t("hello"),
            reasoning_tags=[("<think>", "</think>")],
            latex_delimiters=LATEX,
        )
        self.cost = gr.Markdown(" ", elem_classes="cost")
        self.box = gr.Textbox(
            placeholder=t("ask"),
            max_lines=8,
            autofocus=True,
            submit_btn=True,
            elem_id="ask",
            **FIELD,
        )
        self.knobs = knobs_of(t, page, loaded)
        self._wanted = Wanted()
        talk = [self.box, self.chatbot]
        asked, busy = [*talk, *history.asked], [*talk, history.shown, history.kept]
        self._history = history
        for start in (
            self.box.submit(self.ask, asked, busy, **QUIET),
            self.chatbot.retry(self.again, asked[1:], busy, **QUIET),
            self.chatbot.edit(self.edited, asked[1:], busy, **QUIET),
        ):
            answer = start.success(
                self.respond, [self.chatbot, *self.knobs], [self.chatbot, self.cost], **EACH
            )
            answer.then(self.settle, talk, talk, **EACH).then(
                history.keep, [self.chatbot, *history.asked], history.after, **EACH
            )
        self.box.stop(self.stop, talk, talk, **QUIET)
        history.connect(page, self._wanted.drop, [*talk, self.cost], self.chatbot.clear)

    async def respond(
        self, request: gr.Request, history: Turns, name: str, *values: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        """What is shown while an answer comes, or why none does."""
        with self._wanted.answering(request) as watch:
            if watch is None:
                yield {self.chatbot: gr.skip()}  # a handler that yields nothing empties its outputs
                return
            yield {self.cost: " "}
            texts, said = texts_for(request), conversation(history)
            turn = {"role": "assistant", "content": ""}
            try:
                tokenizer, first, sampling = asked_of(self.loaded, values)
                model, engine = self.loaded.models[name], self.engine
                answer = Answer(engine, tokenizer, first + said, sampling, model, shorten=True)
                left_out = texts["ui.left_out"].format(rounds=answer.left_out) + " · "
                async for ended in watch([answer]):
                    turn["content"] = answer.text
                    cost = left_out * bool(answer.left_out)
                    cost += texts["ui.cost"].format(**answer.cost())
                    if answer.text or ended:
                        yield {self.chatbot: [*history, turn], self.cost: cost}
            except (UserError, ModelError) as error:
                gr.Warning(str(error.args[0]), title=texts["ui.unsent"])
                yield {self.cost: str(error.args[0])}

    async def stop(self, request: gr.Request, words: str, history: Turns) -> dict[Any, Any]:
        """The answer ends, and what follows it is done; without one the page is ready."""
        if not self._wanted.waits(request):  # the server was started anew
            return self.settle(request, words, history)
        await self._wanted.drop(request)
        return {self.chatbot: gr.skip()}

    def settle(self, request: gr.Request, words: str, history: Turns) -> dict[Any, Any]:
        """Unless another answer is wanted, the page may ask; what has none is put back."""
        if self._wanted.waits(request):
            return {self.chatbot: gr.skip()}
        typed, said = put_back(history, words)
        changed = {self.chatbot: said} if said != history else {}
        value: dict[str, Any] = {"value": typed} if typed != words else {}
        return {self.box: gr.Textbox(submit_btn=True, stop_btn=False, **value)} | changed

    def busy(
        self, request: gr.Request, history: Turns, shown: str, kept: Turns | None, browser: str
    ) -> tuple[Any, Turns, str, Turns]:
        """The last question of `history` is to be answered, and is kept from now on."""
        self._wanted.ask(request)
        name = self._history.name_of(history, shown, kept, browser)
        box = gr.Textbox(submit_btn=False, stop_btn=True)
        return box, history, name, self._history.kept_with(history, name, kept, browser)

    def ask(self, request: gr.Request, words: str, history: Turns, *names: Any) -> Any:
        """What was typed is sent, unless an answer comes."""
        if self._wanted.waits(request) or not words.strip():
            return (gr.skip(),) * 4
        return self.busy(request, [*history, user_turn(words)], *names)

    async def again(
        self, request: gr.Request, data: gr.RetryData, history: Turns, *names: Any
    ) -> Any:
        """Another answer to the same question."""
        await self._wanted.drop(request)
        return self.busy(request, history[: _index(data) + 1], *names)

    async def edited(
        self, request: gr.Request, data: gr.EditData, history: Turns, *names: Any
    ) -> Any:
        """An answer to another question in its place."""
        if not str(data.value).strip():
            return (gr.skip(),) * 4
        await self._wanted.drop(request)
        return self.busy(request, [*history[: _index(data)], user_turn(data.value)], *names)


def _index(data: Any) -> int:
    return int(data.index[0] if isinstance(data.index, tuple | list) else data.index)
