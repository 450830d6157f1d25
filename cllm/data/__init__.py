"""Conversations: files -> rows -> conversations -> segments -> examples -> packed rows. Names are loaded when first used."""

from typing import TYPE_CHECKING

from cllm import on_first_use

if TYPE_CHECKING:
    from cllm.data.reader import iter_conversations, read_conversations, write_conversations
    from cllm.data.schema import Conversation, Message, Reject
    from cllm.data.template import TEMPLATES, Segment, Template, render
    from cllm.data.text import TextOptions

__all__ = ["TEMPLATES", "Conversation", "Message", "Reject", "Segment", "Template", "TextOptions"]
__all__ += ["iter_conversations", "read_conversations", "render", "write_conversations"]
_HOMES = dict.fromkeys(__all__[:7], "schema") | dict.fromkeys(__all__[7:], "reader")
_HOMES |= dict.fromkeys(("TEMPLATES", "Segment", "Template", "render"), "template") | {"TextOptions": "text"}
__getattr__ = on_first_use(__name__, _HOMES)
