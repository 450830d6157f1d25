"""What data are: which rows were read and which not, what is wrong with them, how long they are for
a model.
"""

from __future__ import annotations

import math
import sys
from itertools import chain
from statistics import correlation, mean
from typing import TYPE_CHECKING, Any, NamedTuple

from cllm.config import Config
from cllm.corpus import MAX_REJECTED, tokenizer_of
from cllm.data.pairs import dialogue, sides
from cllm.data.quality import NEAR_LIMIT, counts, leaks, quality, qwen_tokens
from cllm.data.reader import Unread, list_files, sample_rows
from cllm.data.schema import Conversation, Reject
from cllm.data.sources import BUILT_IN, divide, read_file, read_sources, replay_count, replayed
from cllm.data.turns import SPECIAL_KEYS, named
from cllm.messages import UserError, file_name, note, say

if TYPE_CHECKING:
    from cllm.data.encode import Ids
    from cllm.model.tokenizer import Tokenizer

FILES_NAMED = 5
SPOILT = ("placeholder", "mojibake", "nothing")
"""Findings that would be learned as they stand."""
FEWEST, FEW = 5, 30
"""Rows that teach anything at all; and more than a name, say."""


class Look(NamedTuple):
    """What a look at the data of a config gives."""

    account: dict[str, Any]
    """Ready for JSON."""
    conversations: list[Conversation]
    lengths: list[int]
    """Of each answer with all before it: tokens, or characters without a tokenizer."""
    tokenizer: Tokenizer | None


def local_tokenizer(config: Config) -> Tokenizer | None:
    """The model's tokenizer if the model is on this machine; looking at data downloads nothing."""
    from cllm.model.checkpoint import original_config
    from cllm.model.source import resolve
    from cllm.model.tokenizer import within

    try:
        base = resolve(config.model.path, download=False)
        tokenizer = tokenizer_of(config, base)
    except UserError as error:
        note("check.no_tokens", detail=error)
        return None
    try:
        original = original_config(base)
        sizes = original.get("text_config", original)
        rows = sizes.get("padded_vocab_size", sizes.get("vocab_size"))  # ChatGLM's, everybody's
        return within(tokenizer, rows) if rows else tokenizer
    except UserError as error:  # a tokenizer alone is enough for this program
        if error.code == "tokenizer.beyond":
            print(error, file=sys.stderr)
        return tokenizer


def look(config: Config) -> Look:
    """Read the data of `config` and account for them."""
    from cllm.data.encode import IGNORE_INDEX

    pairs = config.preference.active
    unread: Unread = {}
    groups, rejects = read_sources(config.data, unread, pairs=pairs)
    conversations = list(chain(*groups))
    tokenizer = local_tokenizer(config)
    encoded: list[list[Ids]] = []
    if tokenizer:
        conversations, encoded, unsaid = _encoded(conversations, tokenizer, pairs)
        rejects = rejects + unsaid
    counted = [[len(ids) for ids, _ in answers] for answers in encoded]
    account = quality(conversations, rejects, counted, config.train.row_tokens)
    account["read_as"] = _schemas(config)
    tested: list[Conversation] = []
    if config.data.eval:
        tested, refused = read_file(config.data, config.data.eval, {}, unread, pairs=pairs)
        account["eval"] = counts(tested, refused)
    train, held_out, _ = divide(config.data, groups, tested)
    if config.data.replay:
        share, source = config.data.replay, config.data.replay_from
        account["replay"] = replay_count(share, len(train))
        if source:
            general, refused = read_file(config.data, source, {}, unread)
            account["replay"] = len(replayed(general, share, len(train), held_out))
            account["replay_from"] = counts(general, refused)
    account["unread"] = unread
    account["leaks"] = len(leaks(train[:NEAR_LIMIT], held_out[:NEAR_LIMIT]))
    trained = [
        [len(labels) - labels.count(IGNORE_INDEX) for _, labels in answers] for answers in encoded
    ]
    if tokenizer:
        stops = tokenizer.stop_ids
        account["supervised_tokens"] = sum(chain(*trained))
        account["end_token_trained"] = any(
            stops.intersection(labels) for answers in encoded for _, labels in answers
        )
        account["tokenizer"] = config.model.path
        account["template"] = tokenizer.template.name
        account["thinking"] = tokenizer.template.thinking
    if pairs and conversations:
        account["pairs"] = _length_bias(conversations, trained)
        answers = [dialogue(item, side) for item in conversations for side in sides(item)]
        account["qwen_tokens"] = qwen_tokens(answers)
    lengths = list(chain(*counted)) or [
        sum(len(turn.content) + len(turn.parts) for turn in item) for item in conversations
    ]
    return Look(account, conversations, lengths, tokenizer)


def verdict(config: Config, account: dict[str, Any]) -> tuple[str, list[str]]:
    """(whether the data can be trained on, what the command for that takes more)."""
    if not account["valid"]:
        code = "check.unusable" if account["rows"] else "check.nothing"
        return say(code, rows=account["rows"]), []
    after: list[str] = []
    additions: list[str] = []
    dropped = config.data.kind == "chat" and config.data.truncate == "drop"
    over = account.get("over_limit", 0) if dropped else 0
    if over == account["valid"]:
        over = 0
        row = math.ceil(account["tokens"]["max"] / 64) * 64
        additions += [f"train.row_tokens={row}", "train.tokens_per_step=0"]
        after.append(say("check.after.row"))
    if account.get("end_token_trained") is False:
        after.append(say("check.no_end"))
    if spoilt := sum(account["findings"][name]["count"] for name in SPOILT):
        after.append(say("check.after.findings", count=spoilt))
    kept = account["valid"] - over
    if kept < FEWEST:
        after.append(say("check.after.few", count=kept))
    tested = account.get("eval", {"rows": 0, "valid": 1, "rejected": 0})
    if not tested["valid"]:
        after.append(say("check.after.eval"))
    share = (account["rejected"] + tested["rejected"]) / (account["rows"] + tested["rows"])
    if share > MAX_REJECTED:
        additions.append("--accept-rejects")
        after.append(say("check.after.rejects", share=f"{share:.0%}"))
    told = [say("check.ready", count=kept)]
    if after:
        told = [say("check.usable", after="; ".join(after))]
    if over:
        told.append(say("check.left_out", count=over, limit=account["limit"]))
    if FEWEST <= kept < FEW:
        told.append(say("check.few"))
    return "; ".join(told), additions


def _encoded(
    conversations: list[Conversation], tokenizer: Tokenizer, pairs: bool
) -> tuple[list[Conversation], list[list[Ids]], list[Reject]]:
    """(the conversations that the template can say, ids and labels of each one's answers, why not
    the others).
    """
    from cllm.data.encode import batches, rendered

    said: list[Conversation] = []
    encoded: list[list[Ids]] = []
    unsaid: list[Reject] = []
    for batch in batches(conversations):
        texts = []
        for item in batch:
            answers = [dialogue(item, side) for side in sides(item)] if pairs else [item]
            segments = [rendered(answer, tokenizer) for answer in answers]
            refused = [text for text in segments if isinstance(text, Reject)]
            unsaid += refused[:1]
            if not refused:
                said.append(item)
                texts.append([text for text in segments if not isinstance(text, Reject)])
        ids = iter(tokenizer.encode_batch(chain(*texts)))
        encoded += [[next(ids) for _ in segments] for segments in texts]
    return said, encoded, unsaid


def _schemas(config: Config) -> dict[str, str]:
    """Of the first files, which known fields their first row has, or the columns that are named."""
    schemas: dict[str, str] = {}
    for source in config.data.train:
        columns = source.columns or config.data.columns
        for file in list_files(BUILT_IN.get(source.path, source.path))[:FILES_NAMED]:
            names = [f"{role} = {name}" for role, name in columns.items()]
            for row in [] if columns else sample_rows(file, 1):
                names = [name for name in named(row) if name in SPECIAL_KEYS]
            schemas[file_name(file)] = " + ".join(names)
    return schemas


def _length_bias(conversations: list[Conversation], trained: list[list[int]]) -> dict[str, float]:
    """What the answers' lengths (in trained tokens, or characters without a tokenizer) tell of
    being chosen: both means, the share of pairs with a longer chosen answer, and the correlation
    of a length with being chosen, 0 for none.
    """
    lengths = trained or [
        [len(dialogue(item, side).messages[-1].words) for side in sides(item)]
        for item in conversations
    ]
    measured = [
        dict(zip(sides(item), sizes, strict=True))
        for item, sizes in zip(conversations, lengths, strict=True)
    ]
    chosen, rejected = ([sizes[side] for sizes in measured if side in sizes] for side in (0, 1))
    longer = [sizes[0] > sizes[1] for sizes in measured if len(sizes) == 2]
    sizes, was_chosen = chosen + rejected, [1] * len(chosen) + [0] * len(rejected)
    known = len({*sizes}) > 1 and chosen and rejected
    return {
        "pairs": len(longer),
        "chosen": len(chosen) - len(longer),
        "rejected": len(rejected) - len(longer),
        "chosen_length": round(mean(chosen or [0]), 1),
        "rejected_length": round(mean(rejected or [0]), 1),
        "longer_chosen": round(mean(longer or [0]), 3),
        "correlation": round(correlation(sizes, was_chosen), 3) if known else 0.0,
    }
