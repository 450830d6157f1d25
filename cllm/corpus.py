"""What a run learns from, as a model sees it: conversations read, rendered, tokenized, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.config import Config, DataConfig, TrainConfig
from cllm.data.schema import Conversation
from cllm.data.sources import Data, prepare, unread_names
from cllm.messages import UserError, note

if TYPE_CHECKING:
    from cllm.data.packing import PackedBatch, PackedRows
    from cllm.model.tokenizer import Tokenizer

MAX_REJECTED = 0.2


@dataclass(frozen=True)
class Encoded:
    """A corpus as packed rows of one tokenizer."""

    rows: PackedRows
    rows_per_step: int
    held_rows: list[PackedBatch]
    train: Sequence[Conversation]
    """The conversations that are in `rows`."""
    held_out: Sequence[Conversation]
    """The conversations that are in `held_rows`."""
    sha256: str
    """Of all examples that are trained on."""


def read_corpus(data: DataConfig, *, accept_rejects: bool) -> Data:
    """`prepare` for a training. Raises UserError if nothing is left, or if over a fifth was
    rejected and that is not accepted.
    """
    corpus = prepare(data)
    rejected = len(corpus.rejects)
    shown = [f"{r.file}:{r.line}: {r.reason}: {r.detail}" for r in corpus.rejects[:3]]
    located = "\n  ".join([str(rejected), *shown])
    if not corpus.train:
        raise UserError("data.empty", path=", ".join(s.path for s in data.train), rejects=located)
    if rejected > MAX_REJECTED * corpus.rows and not accept_rejects:
        share = f"{rejected / corpus.rows:.0%}"
        raise UserError("train.rejects", share=share, count=rejected, examples=located)
    if corpus.unread:
        note("data.unread", names=unread_names(corpus.unread))
    if corpus.duplicates or corpus.leaked:
        note("train.repeated", duplicates=corpus.duplicates, leaked=corpus.leaked)
    return corpus


def tokenizer_of(config: Config, base: Path) -> Tokenizer:
    """The tokenizer of `base` with the template that the config's data take."""
    from cllm.model.tokenizer import load_tokenizer

    template = "text" if config.data.kind == "text" else config.model.template
    return load_tokenizer(base, template=template, thinking=config.model.thinking)


def encode_corpus(
    corpus: Data,
    tokenizer: Tokenizer,
    data: DataConfig,
    train: TrainConfig,
    *,
    row_tokens: int,
    single: bool = False,
) -> Encoded:
    """Conversations -> examples -> packed rows of `row_tokens`; `single`: one sequence a row.

    Raises UserError when nothing, or never an end token, would be trained.
    """
    from cllm.data.encode import encode_set
    from cllm.data.packing import PackedRows

    (examples, trained, refused), (held_examples, held_out, _) = (
        encode_set(side, tokenizer, kind=data.kind, max_tokens=row_tokens, truncate=data.truncate)
        for side in (corpus.train, corpus.held_out)
    )
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
    rows = PackedRows(examples, row_tokens, seed=train.seed, single=single)
    held = PackedRows(held_examples, row_tokens, single=single)
    tokens = sum(examples.sizes)
    tokens_per_row = tokens // len(rows) if single else row_tokens
    note(
        "train.data",
        train=len(examples),
        held_out=len(held_out),
        tokens=f"{tokens:,}",
        rows=len(rows),
        rejects=len(corpus.rejects),
        left_out=", ".join(f"{reason} {count}" for reason, count in refused.items()) or "0",
    )
    return Encoded(
        rows,
        max(1, train.tokens_per_step // tokens_per_row),
        held.take(len(held)),
        trained,
        held_out,
        examples.digest(),
    )
