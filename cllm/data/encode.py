"""Conversation -> Example: token ids with labels, and what happens to conversations longer than a
row.

Every Example's last supervised token is the end token: a conversation that does not fit is dropped,
or its prompt is cut, but never its answers.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from cllm.data import cache
from cllm.data.cache import Array, Slices
from cllm.data.message import Message
from cllm.data.reader import uncollected
from cllm.data.schema import Conversation, Reject
from cllm.data.template import Segment
from cllm.messages import UserError, note

IGNORE_INDEX = -100
"""The label of a position that is not trained (PyTorch's cross-entropy default)."""
IGNORED = array("i", [IGNORE_INDEX])
_BATCH_CHARS = 1 << 20


class Example(NamedTuple):
    """Token ids and their labels, unshifted: labels[i] is input_ids[i] (or its target) where
    trained, else IGNORE_INDEX.
    """

    input_ids: list[int]
    labels: list[int]


Ids: TypeAlias = "tuple[array[int], array[int]]"
"""An Example's ids and labels as int32."""
Refusal = Literal["too_long", "no_supervised_token", "template"]
Truncate = Literal["drop", "prompt"]


class Encoder(Protocol):
    """What encoding needs of a tokenizer: the template's segments of a conversation, and their ids
    and labels.
    """

    def segments(self, conversation: Conversation) -> list[Segment]: ...

    def encode_batch(self, batch: Iterable[Iterable[Segment]]) -> list[Ids]: ...

    def save(self, directory: Path) -> None: ...


def encode_all(
    conversations: Iterable[Conversation],
    tokenizer: Encoder,
    *,
    max_tokens: int,
    truncate: Truncate = "drop",
) -> Iterator[Example | Refusal]:
    """Of each conversation in order: its token ids and labels, at most `max_tokens` of them, or the
    reason why there are none.

    truncate="drop": a longer conversation is "too_long". truncate="prompt": its oldest rounds are
    left out, then the last user message is cut from its start; "too_long" only if the last answer
    does not fit either.
    """
    results = _encoded(conversations, tokenizer, max_tokens, truncate)
    return (
        "template"
        if isinstance(result, Reject)
        else result
        if isinstance(result, str)
        else Example(*(part.tolist() for part in result))
        for result in results
    )


def batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """The conversations in order, as many at a time as are well encoded at once."""
    batch, chars = list[Conversation](), 0
    for conversation in conversations:
        batch.append(conversation)
        chars += sum([len(m.content) + len(m.parts) for m in conversation])
        if chars > _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def rendered(conversation: Conversation, tokenizer: Encoder) -> list[Segment] | Reject:
    """The conversation's segments, or why the template cannot say it."""
    try:
        return tokenizer.segments(conversation)
    except UserError as error:
        return Reject(conversation.file, conversation.line, "template", str(error.args[0]))


def _encoded(
    conversations: Iterable[Conversation], tokenizer: Encoder, max_tokens: int, truncate: Truncate
) -> Iterator[Ids | Refusal | Reject]:
    for batch in batches(conversations):
        texts = [rendered(item, tokenizer) for item in batch]
        pairs = iter(tokenizer.encode_batch([t for t in texts if not isinstance(t, Reject)]))
        for conversation, segments in zip(batch, texts, strict=True):
            if isinstance(segments, Reject):
                yield segments
                continue
            pair = next(pairs)
            fitting: Ids | None = pair
            if len(pair[0]) > max_tokens:
                prompt = truncate == "prompt"
                fitting = _shorten(conversation, tokenizer, max_tokens) if prompt else None
            if fitting is None:
                yield "too_long"
            elif fitting[1] == IGNORED * len(fitting[1]):
                yield "no_supervised_token"
            else:
                yield fitting


def encode_set(
    conversations: Sequence[Conversation],
    tokenizer: Encoder,
    *,
    kind: Literal["chat", "text"],
    max_tokens: int,
    truncate: Truncate = "drop",
) -> tuple[Slices[Example], Sequence[Conversation], Counter[str]]:
    """(examples, the conversations that gave them, how many did not by reason); what comes out of
    the cache goes there. Says which the template cannot say.

    A pre-training text gives consecutive examples of at most `max_tokens`; only its last one has
    the end token.
    """

    @uncollected()
    def make() -> cache.Entry:
        ids, labels, sizes, kept, refused = array("i"), array("i"), [0], [], Counter[str]()
        unsaid: list[Reject] = []
        limit = max_tokens if kind == "chat" else sys.maxsize
        for number, result in enumerate(_encoded(conversations, tokenizer, limit, truncate)):
            if isinstance(result, Reject):
                unsaid.append(result)
                result = "template"
            if isinstance(result, str):
                refused[result] += 1
                continue
            kept.append(number)
            ids += result[0]
            labels += result[1]
            sizes += [
                min(max_tokens, len(result[0]) - start)
                for start in range(0, len(result[0]), max_tokens)
            ]
        flat = {"ids": np.frombuffer(ids, np.int32), "labels": np.frombuffer(labels, np.int32)}
        return {**flat, "bounds": np.cumsum(sizes), "kept": np.array(kept, np.int64)}, [
            refused,
            unsaid[:3],
        ]

    key = conversations.key if isinstance(conversations, Slices) else ""
    arrays, (refused, unsaid) = cache.recall(
        key and cache.key_of(key, kind, max_tokens, truncate, tokenizer=tokenizer), make
    )
    if unsaid:
        shown = "\n  ".join(f"{file}:{line}: {detail}" for file, line, _, detail in unsaid)
        note("data.unsaid", count=refused["template"], examples=shown)
    bounds, chosen = arrays["bounds"], arrays["kept"]
    examples = Slices(_example, bounds[:-1], bounds[1:], arrays["ids"], arrays["labels"])
    picked = (
        conversations.pick(chosen)
        if isinstance(conversations, Slices)
        else [conversations[i] for i in chosen]
    )
    return examples, picked, Counter(refused)


def _example(ids: Array, labels: Array) -> Example:
    return Example(ids.tolist(), labels.tolist())


def _shorten(conversation: Conversation, tokenizer: Encoder, max_tokens: int) -> Ids | None:
    """The conversation without its oldest rounds, then without the start of its last user message;
    None if even that is too long.
    """

    def attempt(messages: Iterable[Message]) -> Ids | None:
        shorter = replace(conversation, messages=tuple(messages))
        segments = rendered(shorter, tokenizer)
        if isinstance(segments, Reject):
            return None
        (pair,) = tokenizer.encode_batch([segments])
        return pair if len(pair[0]) <= max_tokens else None

    messages = conversation.messages
    system = [m for m in messages[:1] if m.role == "system"]
    users = [i for i, m in enumerate(messages) if m.role == "user"]
    for start in users[1:]:
        if pair := attempt([*system, *messages[start:]]):
            return pair
    if not users:
        return None
    last, rest = messages[users[-1]], messages[users[-1] + 1 :]
    # the most characters kept: longer texts hardly ever give fewer tokens
    fits, low, high = None, 1, len(last.content)
    while low <= high:
        middle = (low + high) // 2
        kept = last.content[len(last.content) - middle :]
        pair = attempt([*system, last._replace(content=kept), *rest])
        fits, low, high = (pair, middle + 1, high) if pair else (fits, low, middle - 1)
    return fits
