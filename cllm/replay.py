"""What a model is to keep while it learns something else: its own answers to general questions of
ours, sampled once before training by the base without its adapter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cllm.data import cache
from cllm.data.message import Message, block_of
from cllm.data.schema import Conversation, to_row
from cllm.learn.log import AnswerCount
from cllm.messages import note, to_json
from cllm.model.tokenizer import Tokenizer
from cllm.serve.engine import Engine
from cllm.serve.sampling import Sampling

QUESTIONS = Path(__file__).parent / "assets" / "questions.txt"
MAX_ANSWERS = 4
"""Of a question; who wants more rows gets these again."""
MAX_TOKENS = 512
FILE = "replay.jsonl"
"""In a run: where its answers stand, for --resume."""


def own_answers(
    engine: Engine, tokenizer: Tokenizer, count: int, row_tokens: int, facts: Sequence[object]
) -> bytes:
    """`count` or a few more of the base's answers as JSON Lines, from the cache if it gave them
    before (`facts`: what decides them beside the questions). Those that do not end within a row are
    left out, for they would teach not to end; so there may be fewer.
    """
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines() * MAX_ANSWERS
    prompts = [tokenizer.encode_chat([Message("user", question)]) for question in questions]
    most = min(row_tokens, engine.max_tokens)
    rooms = [min(MAX_TOKENS, most - len(prompt)) for prompt in prompts]
    sampling = Sampling(max_new_tokens=max(1, *rooms), temperature=0.7, top_p=0.9)

    def make() -> cache.Entry:
        rows: list[str] = []
        size = count + count // 4 + 4  # some will be cut
        for start in range(0, len(prompts), size):
            if len(rows) >= count:
                break
            asked = prompts[start : start + size]
            note("replay.answering", count=len(asked))
            outputs = engine.generate(
                asked, replace(sampling, seed=start), adapter=0, progress=AnswerCount()
            )
            for number, ids in enumerate(outputs, start):
                item = _conversation(questions[number], tokenizer.decode(ids).strip())
                if len(ids) < rooms[number] and item.messages[1].content:
                    rows.append(to_json(to_row(item)) + "\n")
        return {"text": np.frombuffer("".join(rows).encode(), np.uint8)}, None

    key = cache.key_of("replay", *facts, prompts, rooms, count, sampling)
    return cache.recall(key, make)[0]["text"].tobytes()


def _conversation(question: str, text: str) -> Conversation:
    """Question and answer; where the prompt opens the reasoning, the text only closes it."""
    opened = "</think>" in text and "<think>" not in text
    reasoning, words = block_of("<think>" * opened + text)
    return Conversation((Message("user", question), Message("assistant", words, reasoning)))


def conversations(text: bytes) -> list[Conversation]:
    """The conversations of `own_answers`."""
    rows = [json.loads(line) for line in text.splitlines()]
    return [
        Conversation(
            tuple(
                Message(turn["role"], turn["content"], turn.get("reasoning_content", ""))
                for turn in row["messages"]
            ),
            file=FILE,
            line=number,
        )
        for number, row in enumerate(rows, 1)
    ]
