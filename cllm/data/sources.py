"""What a run learns from: the files of the mixture read, weighted and deduplicated, and the held-out side."""

from __future__ import annotations

import random
from pathlib import Path

from cllm.config import DataConfig
from cllm.data.quality import deduplicate, split_held_out
from cllm.data.reader import read_conversations
from cllm.data.schema import Conversation, Reject
from cllm.messages import UserError

_ASSETS = Path(__file__).parents[1] / "assets"
MAX_REJECTED = 0.2
BUILT_IN = {"demo": _ASSETS / "demo.jsonl", "demo-test": _ASSETS / "demo-test.jsonl"}


def read_data(data: DataConfig, *, accept_rejects: bool = False) -> tuple[list[Conversation], list[Conversation], int]:
    """(to train on, held out, how many rows were rejected). Raises UserError if nothing is left, or a fifth was rejected unaccepted."""
    groups, rejects = read_sources(data)
    conversations = mix(data, groups)
    rows = sum(map(len, groups)) + len(rejects)
    shown = [f"{r.file}:{r.line}: {r.reason}: {r.detail}" for r in rejects[:3]]
    located = "\n  ".join([str(len(rejects)), *shown])
    if not conversations:
        raise UserError("data.empty", path=", ".join(s.path for s in data.train), rejects=located)
    if len(rejects) > MAX_REJECTED * rows and not accept_rejects:
        raise UserError("train.rejects", share=f"{len(rejects) / rows:.0%}", count=len(rejects), examples=located)
    return *hold_out(data, conversations), len(rejects)


def read_sources(data: DataConfig) -> tuple[list[list[Conversation]], list[Reject]]:
    """(conversations of each source as they stand in its files, every reject). Raises UserError for a missing or unreadable file."""
    groups: list[list[Conversation]] = []
    rejects: list[Reject] = []
    for source in data.train:
        found, bad = read_conversations(BUILT_IN.get(source.path, source.path), source.columns or data.columns or None, data.kind)
        groups.append(found)
        rejects += bad
    return groups, rejects


def mix(data: DataConfig, groups: list[list[Conversation]]) -> list[Conversation]:
    """All sources without duplicates, each conversation as often as its source's weight says (the fraction by a seeded draw)."""
    mixed: list[Conversation] = []
    for source, group in zip(data.train, groups, strict=True):
        kept = deduplicate(group) if data.dedup else group
        whole, part = divmod(source.weight, 1)
        mixed += kept * int(whole) + random.Random(source.path).sample(kept, round(part * len(kept)))
    return mixed


def hold_out(data: DataConfig, conversations: list[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out): the `eval` file, or a fraction of the conversations split off by content hash."""
    if data.eval:
        held_out, rejects = read_conversations(BUILT_IN.get(data.eval, data.eval), data.columns or None, data.kind)
        if not held_out:
            raise UserError("data.empty", path=data.eval, rejects=len(rejects))
        return conversations, held_out
    return split_held_out(conversations, data.held_out) if data.held_out else (conversations, [])
