"""What a run learns from: the files of the mixture read, deduplicated, divided and weighted; kept
in the cache as they come out.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from cllm.config import DataConfig
from cllm.data.encoding import sniff_encoding
from cllm.data.message import Message, restored_message
from cllm.data.pairs import joined_votes
from cllm.data.quality import deduplicate, repeated_questions, split_held_out
from cllm.data.reader import Unread, list_files, read_conversations, sample_rows, uncollected
from cllm.data.schema import Conversation, Reject
from cllm.data.text import RowError, TextOptions
from cllm.data.turns import named, row_turns
from cllm.messages import UserError, command, file_name, language, note

SHOWN = 8  # names in one line
_ASSETS = Path(__file__).parents[1] / "assets"
BUILT_IN = {"demo": _ASSETS / "demo.jsonl", "demo-test": _ASSETS / "demo-test.jsonl"}


class Data(NamedTuple):
    """Both sides of a run's data, and what became of the other rows."""

    train: Sequence[Conversation]
    held_out: Sequence[Conversation]
    rejects: list[Reject]
    rows: int
    """Of all files; before duplicates are dropped and weights multiply."""
    duplicates: int
    leaked: int
    """Held-out questions that are asked in training too."""
    unread: Unread
    replay: Sequence[Conversation] = ()
    """General ones that are trained on beside `train`."""


def read_file(
    data: DataConfig,
    path: str,
    columns: dict[str, str],
    unread: Unread | None = None,
    *,
    pairs: bool = False,
) -> tuple[list[Conversation], list[Reject]]:
    """One file, folder or built-in set, with the options of [data]; `pairs`: of preference. Raises
    UserError if it is missing or unreadable.
    """
    options = TextOptions(
        **{field.name: getattr(data, field.name) for field in fields(TextOptions)}
    )
    source, mapping = BUILT_IN.get(path, path), columns or data.columns or None
    if not pairs:
        return read_conversations(source, mapping, data.kind, options, unread)
    conversations, rejects = read_conversations(source, mapping, "pairs", options, unread)
    joined, contradicted = joined_votes(conversations)
    return joined, rejects + contradicted


def read_questions(path: str | Path) -> list[list[Message]]:
    """What the rows of a data file ask, or the lines of a .txt file: each question after what was
    said before it, whether the row has an answer or not. Raises UserError if there is none.
    """
    files = list_files(path)  # says so where there is none
    if files[0].suffix.lower() == ".txt":
        raw = files[0].read_bytes()
        lines = raw.decode(sniff_encoding(raw), "replace").splitlines()
        asked = [[Message("user", line.strip())] for line in lines if line.strip()]
    else:
        rows = sample_rows(path, sys.maxsize)
        asked = [said for row in rows if (said := _asked(row))]
    if not asked:
        raise UserError("data.no_questions", path=file_name(path))
    return asked


def _asked(row: dict[str, Any]) -> list[Message]:
    """A row up to its last question; of an unknown schema its only text."""
    try:
        turns = row_turns(named(row))
    except RowError:
        texts = [text for text in row.values() if isinstance(text, str) and text.strip()]
        turns = [Message("user", texts[0])] if len(texts) == 1 else []
    while turns and (turns[-1].role != "user" or not turns[-1].content.strip()):
        turns.pop()
    return turns


def read_sources(
    data: DataConfig, unread: Unread, *, pairs: bool = False
) -> tuple[list[list[Conversation]], list[Reject]]:
    """(conversations of each source as they stand in its files, every reject); fields that were
    not read are counted in `unread`.
    """
    read = [
        read_file(data, source.path, source.columns, unread, pairs=pairs) for source in data.train
    ]
    return [found for found, _ in read], [reject for _, rejects in read for reject in rejects]


def unread_names(unread: Unread) -> str:
    """The fields that were not read in any file, the commonest first, with their rows."""
    total = sum(map(Counter, unread.values()), Counter())
    shown = [f"{name} ({count:,})" for name, count in total.most_common(SHOWN)]
    return ", ".join(shown) + " …" * (len(total) > SHOWN)


def without_demo(data: DataConfig, *, pairs: bool = False) -> DataConfig:
    """`data`, with a share held out in place of the built-in demo's questions where other data are
    learned from, or pairs, which the demo has not; that is said.
    """
    learned = any(source.path in BUILT_IN for source in data.train)
    if data.eval not in BUILT_IN or (learned and not pairs):
        return data
    note("data.demo_eval", eval=data.eval)
    return replace(data, eval="")


def divide(
    data: DataConfig, groups: list[list[Conversation]], given: list[Conversation]
) -> tuple[list[Conversation], list[Conversation], int]:
    """(train, held out, duplicates dropped) of the sources' conversations; held out is what is
    given, else a share by content hash.

    Then each source's training side is weighted: a conversation is in it as often as the weight
    says, a fraction by a seeded draw.
    """
    everything = list(chain(*groups))
    kept = deduplicate(everything) if data.dedup else everything
    rest, held_out = (kept, given) if data.eval else split_held_out(kept, data.held_out)
    if not rest and not data.eval:  # of a single conversation nothing can be held out
        rest, held_out = kept, []
    trained, train = set(map(id, rest)), []
    for source, group in zip(data.train, groups, strict=True):
        own = [item for item in group if id(item) in trained]
        train += _weighted(own, source.weight, source.path)
    return train, held_out, len(everything) - len(kept)


def _weighted(items: list[Conversation], weight: float, seed: str) -> list[Conversation]:
    whole, part = divmod(weight, 1)
    return items * int(whole) + random.Random(seed).sample(items, round(part * len(items)))


def replay_count(share: float, train: int) -> int:
    """How many general conversations are `share` of all beside `train` others; at least one."""
    return max(1, round(train * share / (1 - share)))


def replayed(
    general: Sequence[Conversation], share: float, train: int, held_out: Sequence[Conversation]
) -> list[Conversation]:
    """`replay_count` of the general conversations, too few of them several times; none asks what a
    held-out one does; [] if none is left.
    """
    asked = set(map(id, repeated_questions(held_out, general)))
    fresh = [item for item in general if id(item) not in asked]
    if not fresh:
        return []
    return _weighted(fresh, replay_count(share, train) / len(fresh), "replay")


def _unusable(code: str, path: str, **facts: object) -> UserError:
    return UserError(code, path=path, command=command("check", path), **facts)


def prepare(data: DataConfig, *, pairs: bool = False) -> Data:
    """The data that [data] names (`pairs`: of preference), from the cache if nothing has changed.
    Raises UserError as `read_file`, and for an empty eval file.
    """
    data = without_demo(data, pairs=pairs)
    import numpy as np

    from cllm.data import cache

    @uncollected()
    def make() -> cache.Entry:
        unread: Unread = {}
        groups, rejects = read_sources(data, unread, pairs=pairs)
        given: list[Conversation] = []
        refused: list[Reject] = []
        if data.eval:
            given, refused = read_file(data, data.eval, {}, unread, pairs=pairs)
        if data.eval and not given:
            raise _unusable("data.empty", data.eval, rejects=len(refused))
        train, held_out, dropped = divide(data, groups, given)
        rejects += refused
        rows, general = sum(map(len, groups)) + len(given), list[Conversation]()
        if data.replay_from:
            general, refused = read_file(data, data.replay_from, {}, unread)
            rejects, rows = rejects + refused, rows + len(general)
            general = replayed(general, data.replay, len(train), held_out)
            if not general:
                raise _unusable("data.no_replay_rows", data.replay_from)
        texts = [_stored(item) for item in (*train, *held_out, *general)]
        arrays = {
            "text": np.frombuffer(b"".join(texts), np.uint8),
            "bounds": np.cumsum([0, *map(len, texts)]),
        }
        return arrays, [
            [len(train), len(train) + len(held_out)],
            rejects,
            rows + len(rejects),
            dropped,
            len(repeated_questions(train, held_out)),
            unread,
        ]

    paths = [source.path for source in data.train]
    paths += filter(None, (data.eval, data.replay_from))
    key = cache.key_of(
        data,
        pairs,
        language(),
        files=[file for path in paths for file in list_files(BUILT_IN.get(path, path))],
    )
    arrays, (sizes, rejects, *counts) = cache.recall(key, make)
    text, bounds = arrays["text"], arrays["bounds"]
    train, held_out, general = (
        cache.Slices(
            _restored, bounds[low:high], bounds[low + 1 : high + 1], text, key=f"{key} {low}:{high}"
        )
        for low, high in itertools.pairwise([0, *sizes, len(bounds) - 1])
    )
    found = Data(train, held_out, [Reject(*reject) for reject in rejects], *counts)
    return found._replace(replay=general)


def _stored(item: Conversation) -> bytes:
    """Fields parted by NUL, which no message holds; the tools, which may, come last."""
    fields = (
        f"{3 * len(item.messages)} {3 * len(item.rejected)}",
        item.category,
        item.file,
        str(item.line),
        *chain.from_iterable((m.role, m.content, m.parts) for m in chain(item, item.rejected)),
        item.tools,
    )
    return "\x00".join(fields).encode("utf-8", "surrogatepass")


def _restored(text: Any) -> Conversation:
    count, rest = text.tobytes().decode("utf-8", "surrogatepass").split("\x00", 1)
    size, others = map(int, count.split())
    category, file, line, *said, tools = rest.split("\x00", 3 + size + others)
    messages = tuple(map(restored_message, said[::3], said[1::3], said[2::3]))
    rejected = messages[size // 3 :]
    return Conversation(messages[: size // 3], category, tools, file, int(line), rejected)
