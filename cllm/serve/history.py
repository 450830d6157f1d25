"""Conversations that the browser keeps, and none of them is lost by a reload: their list, a new
one, one of them as a file.
"""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
import secrets
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from cllm.data.message import Message
from cllm.messages import to_json
from cllm.serve.widgets import QUIET, Turns

MAX_BYTES = 500_000
"""Of all kept conversations: the browser sends them along, and the guard refuses large bodies."""
TITLE_CHARACTERS = 40


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
        places, chosen = [*talk, self.shown], [self._menu, self.kept, talk[0]]
        page.load(lambda name: name or secrets.token_hex(8), self._browser, self._browser, **QUIET)
        page.load(_again, chosen, [*places, self._menu], **QUIET)
        for event in (page.load, self.kept.change):
            event(_menu, [self.shown, self.kept], self._menu, **QUIET)
        for event in (self._new.click, clear):
            event(drop, None, None, **QUIET).then(
                lambda: (gr.skip(), [], " ", ""), None, places, **QUIET
            ).then(_menu, [self.shown, self.kept], self._menu, **QUIET)
        self._menu.input(drop, None, None, **QUIET).then(_reopened, chosen, places, **QUIET)

    def keep(self, history: Turns, shown: str, kept: Turns | None, browser: str) -> tuple[Any, Any]:
        """What was said is kept, and can be downloaded."""
        said = conversation(history)
        if not said or not shown:
            return gr.skip(), gr.skip()
        file = Path(self._files.name) / f"{shown}.jsonl"
        file.write_text(to_json({"messages": [m.row() for m in said]}) + "\n", encoding="utf-8")
        button = gr.DownloadButton(value=str(file), interactive=True)
        return self.kept_with(history, shown, kept, browser), button

    def kept_with(self, history: Turns, name: str, kept: Turns | None, browser: str) -> Turns:
        """The kept conversations of all windows with what is said in this one, the newest first."""
        turns = [[message.role, message.content] for message in conversation(history)]
        known = [*self._seen.get(browser, []), *(kept or [])]  # of two the one seen last
        others = {item["name"]: item for item in known[::-1] if item["name"] != name}
        title = turns[0][1][:TITLE_CHARACTERS]
        kept = [{"name": name, "title": title, "turns": turns}, *[*others.values()][::-1]]
        while len(to_json(kept).encode()) > MAX_BYTES:
            if len(kept) > 1:
                kept.pop()
            else:
                del turns[0]  # of a very long one the latest turns
        self._seen[browser] = kept
        return kept


def put_back(history: Turns, words: str) -> tuple[str, Turns]:
    """(the box, the chat): a question without an answer goes back into its box, before the words
    that were typed since.
    """
    if not history or history[-1]["role"] != "user":
        return words, history
    question = conversation(history)[-1].content
    # the box may still hold it
    return words if words.startswith(question) else f"{question}\n{words}".strip(), history[:-1]


def _menu(shown: str, kept: Turns | None) -> Any:
    """The list of conversations, each by its first words."""
    titles = [(item["title"], item["name"]) for item in kept or []]
    names = {item["name"] for item in kept or []}
    return gr.Dropdown(choices=titles, value=shown if shown in names else None)


def _again(request: gr.Request, name: str | None, kept: Turns, words: str) -> tuple[Any, ...]:
    """A page that was loaded again shows its last conversation."""
    if not kept or "cllm_again" not in request.cookies:
        return (gr.skip(),) * 5
    return *_reopened(kept[0]["name"], kept, words), _menu(kept[0]["name"], kept)


def _reopened(name: str, kept: Turns, words: str) -> tuple[Any, Turns, str, str]:
    """The box, the chat, the line below it and the name."""
    turns: list[list[str]] = next((item["turns"] for item in kept if item["name"] == name), [])
    history = [{"role": role, "content": text} for role, text in turns]
    return *put_back(history, words), " ", name
