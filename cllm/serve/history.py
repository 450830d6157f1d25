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

MAX_BYTES = 100_000
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
        self._kept = gr.BrowserState([], storage_key="cllm", secret="cllm")
        self._shown = gr.State("")
        with gr.Row():
            self._menu = gr.Dropdown(
                [], show_label=False, container=False, scale=4, min_width=160, label=t("earlier")
            )
            self._new = gr.Button(t("new"), size="sm", min_width=80)
            self._file = gr.DownloadButton(
                t("download"), size="sm", min_width=80, interactive=False
            )

    def connect(self, page: Any, chatbot: Any, cost: Any, answers: list[Any], stopped: Any) -> None:
        """Keep what is said after each of `answers` and where one is `stopped`; choosing or
        beginning a conversation ends them.
        """
        page.load(lambda kept: _menu(kept or []), self._kept, self._menu, **QUIET)
        outputs = [self._kept, self._shown, self._menu, self._file]
        for event in (*answers, stopped):
            event.then(self._keep, [chatbot, self._kept, self._shown], outputs, **QUIET)
        self._new.click(
            lambda: ("", [], " ", None),
            None,
            [self._shown, chatbot, cost, self._menu],
            cancels=answers,
            **QUIET,
        )
        self._menu.input(
            _reopened,
            [self._menu, self._kept],
            [self._shown, chatbot, cost],
            cancels=answers,
            **QUIET,
        )

    def _keep(self, history: Turns, kept: Turns | None, shown: str) -> tuple[Any, ...]:
        said = conversation(history)
        if not said:
            return (gr.skip(),) * 4
        name = shown or secrets.token_hex(8)
        turns = [[message.role, message.content] for message in said]
        others = [item for item in kept or [] if item["name"] != name]
        title = turns[0][1][:TITLE_CHARACTERS]
        kept = [{"name": name, "title": title, "turns": turns}, *others]
        while len(to_json(kept).encode()) > MAX_BYTES:
            if len(kept) > 1:
                kept.pop()
            else:
                del turns[0]  # of a very long one the latest turns
        file = Path(self._files.name) / f"{name}.jsonl"
        file.write_text(to_json({"messages": [m.row() for m in said]}) + "\n", encoding="utf-8")
        return kept, name, _menu(kept, name), gr.DownloadButton(value=str(file), interactive=True)


def _menu(kept: Turns, shown: str | None = None) -> Any:
    """The list of conversations, each by its first words."""
    titles = [(item["title"], item["name"]) for item in kept]
    return gr.Dropdown(choices=titles, value=shown)


def _reopened(name: str, kept: Turns) -> tuple[str, Turns, str]:
    turns: list[list[str]] = next((item["turns"] for item in kept if item["name"] == name), [])
    return name, [{"role": role, "content": text} for role, text in turns], " "
