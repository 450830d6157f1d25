"""Conversations: files -> rows -> conversations -> segments -> examples -> packed rows. Names are
loaded when first used.
"""

from typing import TYPE_CHECKING

from cllm import on_first_use

if TYPE_CHECKING:
    from cllm.data.reader import iter_conversations, read_conversations, write_conversations
    from cllm.data.schema import Conversation, Message, Reject
    from cllm.data.template import TEMPLATES, Segment, Template, render
    from cllm.data.text import TextOptions

__all__ = ["TEMPLATES", "Conversation", "Message", "Reject", "Segment", "Template", "TextOptions"]
__all__ += ["iter_conversations", "read_conversations", "render", "write_conversations"]
_HOMES = {"Conversation": "schema", "Message": "schema", "Reject": "schema", "TextOptions": "text"}
_HOMES |= dict.fromkeys(("TEMPLATES", "Segment", "Template", "render"), "template")
__getattr__ = on_first_use(__name__, dict.fromkeys(__all__, "reader") | _HOMES)
