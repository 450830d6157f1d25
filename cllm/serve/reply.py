"""What an answer says, told apart while it comes: reasoning, words, calls, as OpenAI's deltas."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from cllm.data.text import overlap
from cllm.data.tools import CallReader, Tools
from cllm.messages import to_json
from cllm.serve.answer import Answer

OPEN, CLOSE = "<think>", "</think>"


class Reply:
    """The parts of an answer: a leading <think> block is reasoning, calls of `tools` in this style
    are calls, everything else is content. Joined they are the same however the answer is cut.

    parallel=False: what follows the first call is left out.
    """

    def __init__(self, style: str, tools: Tools, *, parallel: bool = True) -> None:
        self._reader = CallReader(style, tools)
        self._parallel = parallel
        self._place = "start"  # then in the "block", "behind" it, and in the "words"
        self._held = ""
        self.content = self.reasoning = ""
        self.calls: list[dict[str, Any]] = []

    @property
    def full(self) -> bool:
        """Whether nothing more is wanted."""
        return bool(self.calls) and not self._parallel

    async def deltas(self, answer: Answer) -> AsyncIterator[list[dict[str, Any]]]:
        """The deltas that each piece of the answer brings; the answer ends where nothing more is
        wanted.
        """
        async for piece in answer:
            yield self.push(piece)
            if self.full:
                answer.cancel()
        yield self.push("", last=True)

    def push(self, piece: str, *, last: bool = False) -> list[dict[str, Any]]:
        """The deltas that are certain now."""
        self._held += piece
        told: list[dict[str, Any]] = []
        if self._place == "start":
            text = self._held.lstrip()
            if text.startswith(OPEN):
                self._place, self._held = "block", text[len(OPEN) :]
            elif last or not OPEN.startswith(text):
                self._place = "words"
        if self._place == "block":
            told += self._think(last)
        if self._place == "behind":
            self._held = self._held.lstrip("\n")
            self._place = "words" if self._held else "behind"
        if self._place == "words" and not self.full:
            for part in self._reader.push(self._held, last=last):
                told += self._words(part) if isinstance(part, str) else self._call(*part)
                if self.full:
                    break
            self._held = ""
        return told

    def _think(self, last: bool) -> list[dict[str, Any]]:
        """What of the block is out; blank lines at both of its ends are not of it."""
        thought, closed, rest = self._held.partition(CLOSE)
        if not closed and not last:
            thought = thought[: len(thought) - overlap(thought, [CLOSE])]
        start = thought if self.reasoning else thought.lstrip("\n")
        text = start.rstrip("\n")
        self._held = self._held[len(thought) - len(start) + len(text) :]
        if closed:
            self._place, self._held = "behind", rest
        self.reasoning += text
        return [{"reasoning_content": text}] if text else []

    def _words(self, text: str) -> list[dict[str, Any]]:
        self.content += text
        return [{"content": text}]

    def _call(self, name: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """A call's two deltas: its name, and its arguments in one piece."""
        head = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        text, place = to_json(arguments), {"index": len(self.calls)}
        self.calls.append({**head, "function": {"name": name, "arguments": text}})
        first = {**place, **head, "function": {"name": name, "arguments": ""}}
        rest = {**place, "function": {"arguments": text}}
        return [{"tool_calls": [first]}, {"tool_calls": [rest]}]

    def message(self) -> dict[str, Any]:
        """The whole as a message."""
        content = self.content or ("" if not self.calls else None)
        parts = {"reasoning_content": self.reasoning, "tool_calls": self.calls}
        told = {key: value for key, value in parts.items() if value}
        return {"role": "assistant", "content": content, **told}

    def finish_reason(self, reason: str) -> str:
        """OpenAI's name of the reason why the answer ended."""
        return "tool_calls" if self.calls and (self.full or reason == "stop") else reason
