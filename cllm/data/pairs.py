"""Rows of preference data -> conversations with a rejected answer; votes on single answers; and a
pair as the two dialogues that a model sees.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from cllm.data.fields import Row
from cllm.data.message import Message
from cllm.data.schema import NEGATIVE, POSITIVE, Conversation, Normalizer, Reject, mapped, to_row
from cllm.data.text import RowError
from cllm.data.turns import LABELS, named, row_turns

REJECTED_KEYS = ("rejected", "rejected_response", "rejected_messages")
_VOTED = ("vote", "answers", "models", "base")  # in the page's votes beside the pair
_RANKED = ("output", "chosen", "response", "responses")  # of several answers the best is first


class PairNormalizer(Normalizer):
    """Rows of one source -> conversations that end in the chosen answer, beside the dialogue with
    the rejected one; a vote on a single answer has one of the two.
    """

    def _conversation(self, row: Row, file: str, line: int) -> Conversation:
        unread = self.unread
        names: list[set[str]] = []
        dialogues: list[tuple[Message, ...]] = []
        read = Conversation(())
        fields = row if "user" in self.columns else named(row)
        answer = self.columns.get("assistant", "chosen")
        for role, name in (("assistant", answer), ("rejected", "rejected")):
            if source := self.columns.get(role):
                fields = {**fields, name: mapped(row, source)}
        for side in _sides(fields, answer):
            self.unread = Counter()
            item = super()._conversation(side, file, line) if side else None
            dialogues.append(item.messages if item else ())
            names += [set(self.unread)] if item else []
            read = read if read.messages else item or read
        self.unread = unread
        self.unread.update(set.intersection(*names))
        chosen, rejected = dialogues
        pair = replace(read, messages=chosen or rejected[:-1], rejected=rejected)
        _check(pair)
        return pair


def _sides(row: Row, answer: str) -> tuple[Row, Row]:
    """The row with nothing but its chosen answer, which stands in `answer` or under one of the
    known names, and with nothing but its rejected one; {} where it has none.
    """
    key = next((key for key in REJECTED_KEYS if row.get(key)), "")
    label = next((str(row[key]).strip().lower() for key in LABELS if key in row), "")
    beside = LABELS + _VOTED if "vote" in row else LABELS
    alone = {name: value for name, value in row.items() if name not in beside}
    if key and row.get(answer):
        return alone, {**alone, answer: row[key]}
    if "vote" in row:
        raise RowError("row.no_winner", "no_winner", found=repr(row["vote"]))
    if key:
        turns = row_turns(row)
        prompt = turns[:-1] if turns and turns[-1].role == "assistant" else turns
        asked = [message.row() for message in prompt]
        return alone, {"tools": row.get("tools"), "messages": asked, "chosen": row[key]}
    for key in _RANKED:
        answers = row.get(key)
        if isinstance(answers, list) and len(answers) > 1 and isinstance(answers[0], str):
            return {**alone, key: answers[0]}, {**alone, key: answers[-1]}
    if alone and label in POSITIVE:
        return alone, {}
    if alone and label in NEGATIVE:
        return {}, alone
    raise RowError("row.no_rejected", "no_rejected", names=", ".join(REJECTED_KEYS))


def prompt_size(conversation: Conversation) -> int:
    """How many messages its two dialogues have in common; of one alone, all but the answer."""
    chosen, rejected = conversation.messages, conversation.rejected
    if len(sides(conversation)) == 1:
        return len(rejected or chosen) - 1
    pairs = enumerate(zip(chosen, rejected, strict=False))
    size = next((number for number, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    while size and not all(
        len(dialogue) > size and dialogue[size].role == "assistant"
        for dialogue in (chosen, rejected)
    ):
        size -= 1
    return size


def _check(pair: Conversation) -> None:
    """Raises RowError where two answers hardly differ, or no question is common to them."""
    if not pair.rejected:
        return
    if _folded(pair.messages) == _folded(pair.rejected):
        shown = pair.messages[-1].words[:40]
        raise RowError("row.identical_pair", "identical_pair", found=shown)
    if "user" not in [message.role for message in pair.messages[: prompt_size(pair)]]:
        shown = pair.rejected[0].content[:40]
        raise RowError("row.no_common_prompt", "no_common_prompt", found=shown)


def _folded(messages: Iterable[Message]) -> list[tuple[str, str]]:
    """Of every message its letters and digits: what two answers must differ in."""
    return [(m.role, re.sub(r"[\W_]+", "", m.reasoning + m.words).lower()) for m in messages]


def joined_votes(conversations: Iterable[Conversation]) -> tuple[list[Conversation], list[Reject]]:
    """Votes for and against answers to one question become pairs, in order; what is left of either
    stays a vote. The same answer with both votes is rejected.
    """
    joined: list[Conversation] = []
    rejects: list[Reject] = []
    waiting: dict[Any, list[int]] = {}
    for item in conversations:
        present = sides(item)
        if len(present) == 2:
            joined.append(item)
            continue
        prompt = item.messages[: prompt_size(item)]
        others = waiting.get((prompt, item.tools, 1 - present[0]), [])
        if not others:
            waiting.setdefault((prompt, item.tools, present[0]), []).append(len(joined))
            joined.append(item)
            continue
        earlier = joined[others[0]]
        good, bad = (earlier, item) if item.rejected else (item, earlier)
        try:
            pair = replace(earlier, messages=good.messages, rejected=bad.rejected)
            _check(pair)
            joined[others.pop(0)] = pair
        except RowError as error:
            rejects.append(Reject(item.file, item.line, *map(str, error.args)))
    return joined, rejects


def sides(conversation: Conversation) -> list[int]:
    """Which answers it has: 0 the chosen one, 1 the rejected one."""
    chosen = conversation.messages[-1].role == "assistant"
    return [0] * chosen + [1] * bool(conversation.rejected)


def dialogue(conversation: Conversation, side: int) -> Conversation:
    """The conversation with one of its answers, of which alone anything is learned."""
    size = prompt_size(conversation)
    messages = (conversation.messages, conversation.rejected)[side]
    prompt = (m._replace(trained=m.trained and m.role != "assistant") for m in messages[:size])
    return replace(conversation, messages=(*prompt, *messages[size:]), rejected=())


def pair_row(conversation: Conversation) -> Row:
    """The JSON object that `PairNormalizer` reads back as the same conversation."""
    dialogues = [
        to_row(replace(conversation, messages=messages))
        for messages in (conversation.messages, conversation.rejected)
    ]
    if len(present := sides(conversation)) == 1:
        return {**dialogues[present[0]], "label": present == [0]}
    chosen, rejected = (row.pop("messages") for row in dialogues)
    return {"chosen": chosen, "rejected": rejected, **dialogues[0]}
