"""What the tabs of the page share: their fields, the settings, and answers as they come."""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import gradio as gr

from cllm.assembly import Loaded
from cllm.data.message import Message
from cllm.messages import UserError, messages
from cllm.model.tokenizer import Tokenizer
from cllm.runs import read_metrics
from cllm.serve.answer import Answer, asked_to_think, chat_sampling
from cllm.serve.guard import preferred
from cllm.serve.sampling import Sampling

# of a streamed answer: smooth to the eye, and 16 readers do not slow the engine down
REFRESH_SECONDS = 0.06
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""What every event of the page has: no endpoint of its own, and nothing that flickers."""
EACH: dict[str, Any] = {**QUIET, "trigger_mode": "multiple"}
"""What an event has that comes while its last one is at work; Gradio would leave it out."""
# setting -> (lowest, highest, step) of its slider, in the order on the page
SLIDERS = {
    "max_new_tokens": (1, 4096, 1),
    "temperature": (0, 2, 0.05),
    "top_p": (0.05, 1, 0.05),
    "top_k": (1, 200, 1),
    "min_p": (0, 0.5, 0.01),
    "repetition_penalty": (0.8, 2, 0.05),
    "strength": (0, 2, 0.05),
}
KEPT = 20  # system prompts of one's own, and of the run's
SETTINGS = (*SLIDERS, "seed")
FIELD: dict[str, Any] = {
    "show_label": False,
    "container": False,
    "elem_classes": "field",
    "min_width": 120,
}
"""What every text box has: a border and nothing around it."""
LATEX: list[dict[str, str | bool]] = [
    {"left": left, "right": right, "display": display}
    for left, right, display in (
        ("$$", "$$", True),
        ("\\[", "\\]", True),
        ("$", "$", False),
        ("\\(", "\\)", False),
    )
]
Turns = list[dict[str, Any]]
"""A conversation as Gradio's Chatbot has it."""


def user_turn(words: str) -> dict[str, Any]:
    """A question as a turn of a conversation."""
    return {"role": "user", "content": words}


def knobs_of(t: Any, page: Any, loaded: Loaded) -> list[Any]:
    """Which model, the system prompt, whether it thinks, and the sampling parameters, in the order
    that `asked_of` takes them.
    """
    usual, template = chat_sampling(), loaded.tokenizer.template
    knobs = [choice(list(loaded.models))]
    with gr.Accordion(t("settings"), open=False):
        kept = gr.BrowserState([], storage_key="cllm-prompts", secret="cllm")
        with gr.Row(equal_height=True):
            presets = gr.Dropdown([], label=t("prompts"), min_width=220)
            system = gr.Textbox(label=t("system"), lines=2, scale=2, min_width=220)
        keep = gr.Button(t("keep_prompt"), size="sm")
        thinking = gr.Checkbox(
            template.thinking == "keep", label=t("thinking"), visible=template.switches
        )
        knobs += [system, thinking]
        with gr.Row():
            for name, (lowest, highest, step) in SLIDERS.items():
                start = getattr(usual, name)
                knobs.append(
                    gr.Slider(lowest, highest, start, step=step, label=t(name), min_width=220)
                )
            # a number field would turn no number into 0 when it is shown
            knobs.append(gr.Textbox("", max_lines=1, label=t("seed"), min_width=220))
    trained = _system_prompts(loaded)

    def listed(request: gr.Request, prompts: list[str] | None) -> Any:
        ours = texts_for(request)["ui.prompts.ours"].split("\n")
        names = dict.fromkeys([*(prompts or []), *trained, *ours])
        return gr.Dropdown(choices=[(name[:80], name) for name in names], value=None)

    def kept_too(words: str | None, prompts: list[str] | None) -> list[str]:
        return [*dict.fromkeys([*filter(None, [(words or "").strip()]), *(prompts or [])])][:KEPT]

    page.load(listed, kept, presets, **QUIET)
    presets.input(lambda words: words, presets, system, **QUIET)
    keep.click(kept_too, [system, kept], kept, **QUIET).then(listed, kept, presets, **QUIET)
    return knobs


def _system_prompts(loaded: Loaded) -> list[str]:
    """Those that the run's held-out samples have."""
    rows = read_metrics(loaded.home / "samples.jsonl") if loaded.home else []
    first = (row["messages"][0] for row in rows)
    return [*dict.fromkeys(m["content"] for m in first if m["role"] == "system")][:KEPT]


def choice(names: list[str]) -> Any:
    """One of the names; not shown if there is only one."""
    return gr.Radio(
        names, value=names[0], show_label=False, container=False, visible=len(names) > 1
    )


def asked_of(loaded: Loaded, values: Sequence[Any]) -> tuple[Tokenizer, list[Message], Sampling]:
    """The knobs' values but the model's: how it is asked, thinking or not, what comes first, and
    the settings. Raises UserError for a seed that is no number.
    """
    system, thinking, *values = values
    settings = dict(zip(SETTINGS, values, strict=True))
    seed = str(settings["seed"] or "").strip()
    if seed and not seed.isdecimal():
        raise UserError("ui.no_seed", found=seed)
    sampling = chat_sampling(**settings | {"seed": int(seed) if seed else None})
    words, tokenizer = (system or "").strip(), asked_to_think(loaded.tokenizer, bool(thinking))
    return tokenizer, [Message("system", words)] if words else [], sampling


def language_of(request: Any) -> str:
    """The browser's: `zh` or `en`."""
    return preferred(request.headers.get("accept-language", "")) or "en"


def texts_for(request: Any) -> dict[str, str]:
    """The page's texts in the browser's language."""
    chinese = language_of(request) == "zh"
    return {code: texts[chinese] for code, texts in messages().items()}


Watch = Callable[[list[Answer]], AsyncIterator[bool]]


class Wanted:
    """Which pages wait for an answer. One that is not wanted any more ends by itself: Gradio's own
    way to cancel closes the page's stream of events, and whatever else was on its way is lost.
    """

    def __init__(self) -> None:
        # session -> set when its answer has ended
        self._ends: dict[str | None, asyncio.Event | None] = {}

    def waits(self, request: gr.Request) -> bool:
        return request.session_hash in self._ends

    def ask(self, request: gr.Request) -> None:
        """The page waits from now on."""
        self._ends[request.session_hash] = None

    @contextmanager
    def answering(self, request: gr.Request) -> Iterator[Watch | None]:
        """Decodes the answers for which the page waits, as `watched`, while it does; None if it
        does not wait, or is being answered.
        """
        session = request.session_hash
        if session not in self._ends or self._ends[session] is not None:
            yield None
            return
        ended = self._ends[session] = asyncio.Event()

        async def watch(answers: list[Answer]) -> AsyncIterator[bool]:
            async with aclosing(watched(answers)) as looks:
                async for done in looks:
                    if self._ends.get(session) is not ended:
                        return
                    yield done

        try:
            yield watch
        finally:
            ended.set()
            if self._ends.get(session) is ended:
                del self._ends[session]

    @asynccontextmanager
    async def instead(self, request: gr.Request) -> AsyncIterator[Watch]:
        """Decodes other answers for the page than those that come."""
        await self.drop(request)
        self.ask(request)
        with self.answering(request) as watch:
            assert watch is not None  # asked for just now
            yield watch

    async def drop(self, request: gr.Request) -> None:
        """The page does not wait; returns once nothing is decoded for it."""
        if (ended := self._ends.pop(request.session_hash, None)) is not None:
            await ended.wait()


async def watched(answers: list[Answer]) -> AsyncGenerator[bool, None]:
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
        await asyncio.gather(*tasks)  # of two failures the second is not left behind
        yield True
    finally:
        for answer in answers:
            answer.cancel()
