"""What a run learns from, as a model sees it: conversations read, rendered, tokenized, packed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.config import Config
from cllm.data.pairs import REJECTED_KEYS, dialogue, sides
from cllm.data.reader import list_files
from cllm.data.schema import Conversation
from cllm.data.sources import BUILT_IN, Data, prepare, unread_names
from cllm.messages import UserError, command, file_name, note, say

if TYPE_CHECKING:
    from cllm.data.cache import Slices
    from cllm.data.packing import PackedBatch, PackedRows
    from cllm.model.tokenizer import Tokenizer

MAX_REJECTED = 0.2
VOTES = "apo_zero_unpaired"
"""The loss that takes conversations with one answer, too."""


@dataclass(frozen=True)
class Encoded:
    """A corpus as packed rows of one tokenizer."""

    rows: PackedRows
    rows_per_step: int
    tokens_per_step: int
    """[train]'s, or what its 0 comes to for these tokens."""
    held_rows: list[PackedBatch]
    train: Sequence[Conversation]
    """The conversations that are in `rows`, without general ones."""
    held_out: Sequence[Conversation]
    """The conversations that are in `held_rows`."""
    sha256: str
    """Of all examples that are trained on."""
    held_sha256: str
    """Of those held out, of pairs both answers."""
    held_answers: list[PackedBatch]
    """With a preference loss: both answers of each of `held_out`."""
    answers: int
    """How many numbers the answers in `rows` and after them those in `held_answers` have."""
    answers_sha256: str
    """Of these answers and their numbers."""
    summary: str
    """How many conversations and tokens these are, and what was left out, for people."""


def read_corpus(config: Config, *, accept_rejects: bool) -> Data:
    """`prepare` for a training. Raises UserError if nothing is left, or if over a fifth was
    rejected and that is not accepted.
    """
    data = config.data
    corpus = prepare(data, pairs=config.preference.active)
    rejected = len(corpus.rejects)
    shown = [f"{r.file}:{r.line}: {r.reason}: {r.detail}" for r in corpus.rejects[:3]]
    located = "\n  ".join([str(rejected), *shown])
    if not corpus.train:
        paths = [source.path for source in data.train]
        look = command("check", paths[0])
        raise UserError("data.empty", path=", ".join(paths), rejects=located, command=look)
    if rejected > MAX_REJECTED * corpus.rows and not accept_rejects:
        share = f"{rejected / corpus.rows:.0%}"
        raise UserError("train.rejects", share=share, count=rejected, examples=located)
    if corpus.unread:
        note("data.unread", names=unread_names(corpus.unread))
    names = {name.partition(".")[0] for unread in corpus.unread.values() for name in unread}
    columns = chain.from_iterable(source.columns or data.columns for source in data.train)
    if not names.isdisjoint(REJECTED_KEYS) or (
        "rejected" in columns and not config.preference.active
    ):
        note("train.chosen_only")
    if corpus.duplicates or corpus.leaked:
        note("train.repeated", duplicates=corpus.duplicates, leaked=corpus.leaked)
    return corpus


def tokenizer_of(config: Config, base: Path) -> Tokenizer:
    """The tokenizer of `base` with the template that the config's data take."""
    from cllm.model.tokenizer import load_tokenizer

    template = "text" if config.data.kind == "text" else config.model.template
    return load_tokenizer(base, template=template, thinking=config.model.thinking)


def encode_corpus(
    corpus: Data, tokenizer: Tokenizer, config: Config, *, row_tokens: int, single: bool = False
) -> Encoded:
    """Conversations -> examples -> packed rows of `row_tokens`, with a preference loss one example
    an answer; `single`: one sequence a row.

    Raises UserError when nothing, or never an end token, would be trained.
    """
    from cllm.data.packing import PackedRows

    sides = (corpus.train, corpus.held_out, corpus.replay)
    own, held, added = (_encode_side(side, tokenizer, config, row_tokens) for side in sides)
    examples, trained, numbers, refused = own
    held_examples, held_out, held_numbers, left_out = held
    general, _, _, unfit = added
    _check_trained(corpus, tokenizer, examples, refused, row_tokens)
    # of the user's own data: general ones do not make its steps longer
    tokens_per_step = config.train.step_tokens(sum(examples.sizes))
    examples = examples + general if general else examples
    tokens = sum(examples.sizes)
    tokens_per_row = tokens // len(examples) if single else row_tokens
    rows_per_step = max(1, tokens_per_step // tokens_per_row)
    rows = PackedRows(
        examples,
        row_tokens,
        seed=config.train.seed,
        single=single,
        numbers=numbers,
        step_rows=rows_per_step,
        sources=_sources(config, trained, len(general), len(examples)),
    )
    after = [2 * len(corpus.train) + number for number in held_numbers]
    held_sha256 = held_examples.digest()
    facts = repr((numbers, examples.digest(), after, held_sha256))
    answers = PackedRows(held_examples, row_tokens, single=single, numbers=after)
    held_examples, held_out = _chosen(held_numbers, held_examples, held_out)
    held_rows = PackedRows(held_examples, row_tokens, single=single)
    return Encoded(
        rows,
        rows_per_step,
        tokens_per_step,
        held_rows.take(len(held_rows)),
        _chosen(numbers, examples, trained)[1],
        held_out,
        examples.digest(),
        held_sha256,
        answers.take(len(answers)) if held_numbers else [],
        2 * (len(corpus.train) + len(corpus.held_out)),
        hashlib.sha256(facts.encode()).hexdigest(),
        say(
            "train.summary",
            train=len({number // 2 for number in numbers}) or len(examples) - len(general),
            replay=_replay(corpus.replay, len(general)) if general else "",
            held_out=len(held_out),
            tokens=f"{tokens:,}",
            rows=len(rows),
            rejects=len(corpus.rejects),
            left_out=_counted(refused + left_out + unfit),
        ),
    )


def _replay(rows: Sequence[Conversation], count: int) -> str:
    return say("train.replay", count=count, different=len(set(map(repr, rows))))


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "0"


def source_names(config: Config) -> tuple[str, ...]:
    """The names of a mixture's sources, general rows last; () of a single one, or of pairs."""
    names = [source.path for source in config.data.train] + ["replay"] * (config.data.replay > 0)
    return () if len(names) == 1 or config.preference.active else tuple(names)


def _sources(config: Config, trained: Any, general: int, examples: int) -> list[int]:
    """The number in `source_names` of each example; none where a text may be several of them."""
    data = config.data
    if not source_names(config) or len(trained) + general != examples:
        return []
    of = {
        file_name(file): number
        for number, source in enumerate(data.train)
        for file in list_files(BUILT_IN.get(source.path, source.path))
    }
    return [of[item.file] for item in trained] + [len(data.train)] * general


def _check_trained(
    corpus: Data, tokenizer: Tokenizer, examples: Any, refused: Counter[str], row_tokens: int
) -> None:
    """Raises UserError when nothing, or never an end token, would be trained."""
    if not examples:
        raise UserError(
            "train.unsupervised"
            if refused["no_supervised_token"] or refused["template"]
            else "train.too_long",
            count=len(corpus.train),
            row=row_tokens,
            template=tokenizer.template.name,
            rows=", ".join(f"{c.file}:{c.line}" for c in corpus.train[:3]),
        )
    if not any(tokenizer.stop_ids.intersection(example.labels) for example in examples):
        raise UserError("train.no_end", template=tokenizer.template.name)


def _encode_side(
    conversations: Any, tokenizer: Tokenizer, config: Config, row_tokens: int
) -> tuple[Any, Any, list[int], Counter[str]]:
    """(examples, their conversations or dialogues, with a preference loss their numbers, what gave
    none by reason); a conversation of which an answer does not fit gives none.
    """
    from cllm.data.encode import encode_set

    data, loss, pairs = config.data, config.preference.loss, config.preference.active
    given = _answers(conversations, votes=loss == VOTES) if pairs else conversations
    if pairs and conversations and not given:
        raise UserError("train.unpaired", count=len(conversations), loss=loss)
    dialogues: Any
    examples, dialogues, refused = encode_set(
        given, tokenizer, kind=data.kind, max_tokens=row_tokens, truncate=data.truncate
    )
    if not pairs:
        return examples, dialogues, [], refused
    if alone := len(conversations) - len({number // 2 for number in given.arrays[0].tolist()}):
        refused["single_answer"] = alone
    numbers = dialogues.arrays[0][dialogues.starts].tolist()
    fit = set(numbers)
    places = [
        place
        for place, number in enumerate(numbers)
        if fit.issuperset(number // 2 * 2 + side for side in sides(conversations[number // 2]))
    ]
    return examples.pick(places), dialogues.pick(places), [numbers[i] for i in places], refused


def _chosen(numbers: list[int], examples: Any, dialogues: Any) -> tuple[Any, Any]:
    """Of answers the chosen ones; all examples and conversations without a preference loss."""
    if not numbers:
        return examples, dialogues
    places = [place for place, number in enumerate(numbers) if number % 2 == 0]
    return examples.pick(places), dialogues.pick(places)


def _answers(conversations: Any, *, votes: bool) -> Slices[Conversation]:
    """Every answer as a dialogue of its own; `votes`: those of conversations with one only, too.
    Item i's number, twice its conversation's and one more for the rejected one, is `arrays[0][i]`.
    """
    import numpy as np

    from cllm.data.cache import Slices

    numbers = [
        2 * number + side
        for number, item in enumerate(conversations)
        for side in sides(item)
        if votes or len(sides(item)) == 2
    ]
    places = np.arange(len(numbers))
    return Slices(
        lambda part: dialogue(conversations[int(part[0]) // 2], int(part[0]) % 2),
        places,
        places + 1,
        np.array(numbers, np.int64),
        key=f"{conversations.key} answers {votes}" if conversations.key else "",
    )
