"""One message of a conversation and its parts; before a template nothing turns them into text."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from cllm.messages import to_json


class Call(NamedTuple):
    """A tool called by an answer: the function's name and its arguments as JSON's object."""

    name: str
    arguments: dict[str, Any]

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.arguments)))


class Message(NamedTuple):
    """One turn; `role` is system, user, assistant or tool.

    reasoning: what was thought before an answer; calls: the tools that the answer calls, in order
    behind its words; trained: False for an answer that is read and not learned.
    """

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    trained: bool = True

    @property
    def parts(self) -> str:
        """All but role and content as JSON; "" where a message has no more."""
        return "" if self[2:] == ("", (), True) else to_json(self[2:])

    def row(self) -> dict[str, Any]:
        """The message as OpenAI and Transformers write it; arguments stay an object."""
        calls = [{"type": "function", "function": call._asdict()} for call in self.calls]
        parts: dict[str, Any] = {"reasoning_content": self.reasoning, "tool_calls": calls}
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        row |= {key: value for key, value in parts.items() if value}
        return row if self.trained else row | {"loss": False}


def restored_message(role: str, content: str, parts: str) -> Message:
    """The message of these `Message.parts`."""
    if not parts:
        return Message(role, content)
    reasoning, calls, trained = json.loads(parts)
    return Message(role, content, reasoning, tuple(Call(*call) for call in calls), trained)
