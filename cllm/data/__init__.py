"""Conversations: files -> rows -> conversations -> segments -> examples -> packed rows. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cllm.data.reader import iter_conversations, read_conversations, write_conversations
    from cllm.data.schema import Conversation, Message, Reject
    from cllm.data.template import TEMPLATES, Segment, Template, render
    from cllm.data.text import TextOptions

__all__ = [
    "TEMPLATES",
    "Conversation",
    "Message",
    "Reject",
    "Segment",
    "Template",
    "TextOptions",
    "iter_conversations",
    "read_conversations",
    "render",
    "write_conversations",
]
_HOME = dict.fromkeys(("iter_conversations", "read_conversations", "write_conversations"), "reader")
_HOME |= dict.fromkeys(("Conversation", "Message", "Reject"), "schema")
_HOME |= dict.fromkeys(("TEMPLATES", "Segment", "Template", "render"), "template") | {"TextOptions": "text"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
