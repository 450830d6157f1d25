"""Conversations that the browser keeps, and none of them is lost by a reload: their list, a new
one, one of them as a file.
"""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
import hashlib
import secrets
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import gradio as gr

from cllm.data.message import Message
from cllm.messages import to_json
from cllm.serve.widgets import QUIET, Turns

MAX_BYTES = 500_000
"""Of all kept conversations: the browser sends them along, and the guard refuses large bodies."""
TITLE_CHARACTERS = 40
BROWSERS = 100
"""Of so many the server knows what all their windows have kept."""


def conversation(history: Turns) -> list[Message]:
    """The turns as the model sees them: reasoning comes back as a titled turn of its own, and no
    format shows it to the model again.
    """
    said = []
    for turn in history:
        titled = (turn.get("metadata") or {}).get("title")
        if turn["role"] != "assistant" or not titled:
            parts = turn["content"]  # a list, as Gradio hands a turn back
            text = parts if isinstance(parts, str) else "".join(p.get("text", "") for p in parts)
            said.append(Message(turn["role"], text))
    return said


class History:
    """A row above the chat: which conversation is shown, a new one, the shown one as JSONL."""

    def __init__(self, t: Any) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="cllm-")  # until the program ends
        self.kept = gr.BrowserState([], storage_key="cllm", secret="cllm")
        self._browser = gr.BrowserState("", storage_key="cllm-browser", secret="cllm")
        self.shown = gr.State("")  # the name of the conversation
        self.asked = [self.shown, self.kept, self._browser]
        self._seen: dict[str, Turns] = {}  # browser -> what any of its windows has kept
        with gr.Row():
            self._menu = gr.Dropdown(
                [], show_label=False, container=False, scale=4, min_width=160, label=t("earlier")
            )
            self._new = gr.Button(t("new"), size="sm", min_width=80)
            self._file = gr.DownloadButton(
                t("download"), size="sm", min_width=80, interactive=False
            )
        self.after = [self.kept, self._file]

    def connect(self, page: Any, drop: Any, talk: list[Any], clear: Any) -> None:
        """Choosing a conversation or beginning one, by the button or by `clear`, drops what is
        being answered; `talk`: the box, the chat and the line below it.
        """
        places = [*talk, self.shown]
        chosen = [self._menu, self.kept, self._browser, talk[0]]
        page.load(lambda name: name or secrets.token_hex(8), self._browser, self._browser, **QUIET)
        page.load(self._again, chosen, [*places, self._menu], **QUIET)
        for event in (page.load, self.kept.change):
            event(_menu, [self.shown, self.kept], self._menu, **QUIET)
        for event in (self._new.click, clear):
            event(drop, None, None, **QUIET).then(
                lambda: (gr.skip(), [], " ", ""), None, places, **QUIET
            ).then(_menu, [self.shown, self.kept], self._menu, **QUIET)
        self._menu.input(drop, None, None, **QUIET).then(self._reopened, chosen, places, **QUIET)

    def keep(self, history: Turns, shown: str, kept: Turns | None, browser: str) -> tuple[Any, Any]:
        """What was said is kept, and can be downloaded."""
        said = conversation(history)
        if not said or not shown:
            return gr.skip(), gr.skip()
        # the name comes from the browser
        file = Path(self._files.name) / f"{hashlib.sha256(shown.encode()).hexdigest()[:16]}.jsonl"
        file.write_text(to_json({"messages": [m.row() for m in said]}) + "\n", encoding="utf-8")
        button = gr.DownloadButton(value=str(file), interactive=True)
        return self.kept_with(history, shown, kept, browser), button

    def name_of(self, history: Turns, shown: str, kept: Turns | None, browser: str) -> str:
        """The conversation's name; a new one where questions would be lost under it, which were
        asked in another window, or after one that is asked again.
        """
        asked = {message.content for message in conversation(history)}
        turns = _turns(shown, self._known(kept, browser))
        lost = any(role == "user" and text not in asked for role, text in turns)
        return secrets.token_hex(8) if lost or not shown else shown

    def kept_with(self, history: Turns, name: str, kept: Turns | None, browser: str) -> Turns:
        """The kept conversations of all windows with what is said in this one, the newest first."""
        turns = [[message.role, message.content] for message in conversation(history)]
        title = turns[0][1][:TITLE_CHARACTERS]
        role, text = turns[-1]
        # of a very long one the latest turns, or the end of the last
        turns = _within(turns[::-1], MAX_BYTES)[::-1] or [[role, text[-MAX_BYTES // 8 :]]]
        own = {"name": name, "title": title, "turns": turns}
        others = [item for item in self._known(kept, browser) if item["name"] != name]
        kept = [own, *_within(others, MAX_BYTES - _bytes(own))]
        if browser:  # without, it could be anybody's
            self._seen.pop(browser, None)
            self._seen[browser] = kept
            if len(self._seen) > BROWSERS:
                del self._seen[next(iter(self._seen))]
        return kept

    def _known(self, kept: Turns | None, browser: str) -> Turns:
        """What any window of the browser has kept; of two of a name the one seen last."""
        items: dict[str, Any] = {}
        for item in [*self._seen.get(browser, []), *(kept or [])]:
            items.setdefault(item["name"], item)
        return [*items.values()]

    def _reopened(
        self, name: str, kept: Turns | None, browser: str, words: str
    ) -> tuple[Any, Turns, str, str]:
        """The box, the chat, the line below it and the name."""
        turns = _turns(name, self._known(kept, browser))
        history = [{"role": role, "content": text} for role, text in turns]
        return *put_back(history, words), " ", name

    def _again(
        self, request: gr.Request, name: str | None, kept: Turns | None, browser: str, words: str
    ) -> tuple[Any, ...]:
        """A page that was loaded again shows the last conversation."""
        known = self._known(kept, browser)
        if not known or "cllm_again" not in request.cookies:
            return (gr.skip(),) * 5
        name = known[0]["name"]
        return *self._reopened(name, kept, browser, words), _menu(name, known)


def _turns(name: str, items: Turns) -> list[list[str]]:
    return next((item["turns"] for item in items if item["name"] == name), [])


def _bytes(part: Any) -> int:
    return len(to_json(part).encode("utf-8", "replace"))


def _within(parts: list[Any], room: int) -> list[Any]:
    """The first of them, as many as have room together."""
    ends = accumulate(map(_bytes, parts))
    return [part for part, end in zip(parts, ends, strict=True) if end <= room]


def put_back(history: Turns, words: str) -> tuple[str, Turns]:
    """(the box, the chat): a question without an answer goes back into its box, before the words
    that were typed since.
    """
    if not history or history[-1]["role"] != "user":
        return words, history
    question = conversation(history)[-1].content
    held = f"{words}\n".startswith(f"{question}\n")  # the box may still hold it
    return words if held else f"{question}\n{words}".strip(), history[:-1]


def _menu(shown: str, kept: Turns | None) -> Any:
    """The list of conversations, each by its first words."""
    titles = [(item["title"], item["name"]) for item in kept or []]
    names = {item["name"] for item in kept or []}
    return gr.Dropdown(choices=titles, value=shown if shown in names else None)
