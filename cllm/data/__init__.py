"""Conversations: files -> rows -> conversations -> segments -> examples -> packed rows."""

from cllm.data.message import Message
from cllm.data.reader import iter_conversations, read_conversations, write_conversations
from cllm.data.schema import Conversation, Reject
from cllm.data.template import TEMPLATES, Segment, Template, render
from cllm.data.text import TextOptions

__all__ = ["TEMPLATES", "Conversation", "Message", "Reject", "Segment", "Template", "TextOptions"]
__all__ += ["iter_conversations", "read_conversations", "render", "write_conversations"]
