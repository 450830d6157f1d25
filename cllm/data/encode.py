"""Conversation -> Example: token ids with labels, and what happens to conversations longer than a row.

Every Example's last supervised token is the end token: a conversation that does not fit is dropped, or its prompt is cut, but never
its answers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

from cllm.data.schema import Conversation, Message
from cllm.data.template import Segment

IGNORE_INDEX = -100
"""The label of a position that is not trained (PyTorch's cross-entropy default)."""
_BATCH = 512  # conversations encoded at once


class Example(NamedTuple):
    """Token ids and their labels, unshifted: labels[i] is input_ids[i] (or its target) where trained, else IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]


Refusal = Literal["too_long", "no_supervised_token"]


class Encoder(Protocol):
    """What encoding needs of a tokenizer: the template's segments of a conversation, and their ids and labels."""

    def segments(self, conversation: Conversation) -> list[Segment]: ...

    def encode_batch(self, batch: Iterable[Iterable[Segment]]) -> list[tuple[list[int], list[int]]]: ...


def encode(
    conversation: Conversation, tokenizer: Encoder, *, max_tokens: int, truncate: Literal["drop", "prompt"] = "drop"
) -> Example | Refusal:
    """The conversation's token ids and labels, at most `max_tokens` of them, or the reason why there is none.

    truncate="drop": a longer conversation is "too_long". truncate="prompt": its oldest rounds are left out, then the last user
    message is cut from its start; "too_long" only if the last answer does not fit either.
    """
    return next(encode_all([conversation], tokenizer, max_tokens=max_tokens, truncate=truncate))


def encode_all(
    conversations: Iterable[Conversation], tokenizer: Encoder, *, max_tokens: int, truncate: Literal["drop", "prompt"] = "drop"
) -> Iterator[Example | Refusal]:
    """`encode` of each conversation in order, in batches that keep all cores busy."""
    source = iter(conversations)
    while batch := list(itertools.islice(source, _BATCH)):
        encoded = tokenizer.encode_batch([tokenizer.segments(conversation) for conversation in batch])
        for conversation, (ids, labels) in zip(batch, encoded, strict=True):
            example: Example | None = Example(ids, labels)
            if len(ids) > max_tokens:
                example = _shorten(conversation, tokenizer, max_tokens) if truncate == "prompt" else None
            if example is None:
                yield "too_long"
            elif all(label == IGNORE_INDEX for label in example.labels):
                yield "no_supervised_token"
            else:
                yield example


def encode_document(conversation: Conversation, tokenizer: Encoder, *, max_tokens: int) -> list[Example]:
    """A pre-training text as consecutive examples of at most `max_tokens`; only the last one has the end token."""
    ids, labels = tokenizer.encode_batch([tokenizer.segments(conversation)])[0]
    return [Example(ids[a : a + max_tokens], labels[a : a + max_tokens]) for a in range(0, len(ids), max_tokens)]


def encode_set(
    conversations: list[Conversation],
    tokenizer: Encoder,
    *,
    kind: Literal["chat", "text"],
    max_tokens: int,
    truncate: Literal["drop", "prompt"] = "drop",
) -> tuple[list[Example], list[Conversation], Counter[str]]:
    """Examples, the conversations that gave one, and how many were left out for which reason; a text may give several examples."""
    if kind == "text":
        return [e for c in conversations for e in encode_document(c, tokenizer, max_tokens=max_tokens)], conversations, Counter()
    made = list(encode_all(conversations, tokenizer, max_tokens=max_tokens, truncate=truncate))
    return (
        [m for m in made if not isinstance(m, str)],
        [c for c, m in zip(conversations, made, strict=True) if not isinstance(m, str)],
        Counter(m for m in made if isinstance(m, str)),
    )


def _shorten(conversation: Conversation, tokenizer: Encoder, max_tokens: int) -> Example | None:
    """The conversation without its oldest rounds, then without the start of its last user message; None if even that is too long."""

    def attempt(messages: Iterable[Message]) -> Example | None:
        shorter = replace(conversation, messages=tuple(messages))
        example = Example(*tokenizer.encode_batch([tokenizer.segments(shorter)])[0])
        return example if len(example.input_ids) <= max_tokens else None

    messages = conversation.messages
    system = [m for m in messages[:1] if m.role == "system"]
    users = [i for i, m in enumerate(messages) if m.role == "user"]
    for start in users[1:]:
        if example := attempt([*system, *messages[start:]]):
            return example
    if not users:
        return None
    last, rest = messages[users[-1]], messages[users[-1] + 1 :]
    fits, low, high = None, 1, len(last.content)  # the most characters kept: longer texts hardly ever give fewer tokens
    while low <= high:
        middle = (low + high) // 2
        kept = last.content[len(last.content) - middle :]
        example = attempt([*system, last._replace(content=kept), *rest])
        fits, low, high = (example, middle + 1, high) if example else (fits, low, middle - 1)
    return fits
