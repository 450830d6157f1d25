"""`python -m cllm.check CONFIG|FILE`: what the data is and what will be trained on, token by token,
before an hour is lost on it.
"""

from __future__ import annotations

import argparse
import base64
import html
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from statistics import correlation, mean
from typing import TYPE_CHECKING, Any

from cllm.config import Config, is_config, load_config
from cllm.corpus import tokenizer_of
from cllm.data.pairs import dialogue, sides
from cllm.data.quality import NEAR_LIMIT, counts, deduplicate, histogram, leaks, quality
from cllm.data.reader import Unread, sample_rows, write_conversations
from cllm.data.schema import Conversation, Reject
from cllm.data.sources import BUILT_IN, divide, read_file, read_sources, unread_names, without_demo
from cllm.messages import UserError, file_name, note, print_result, say, to_json
from cllm.plots import draw_lengths

if TYPE_CHECKING:
    from cllm.model.tokenizer import Tokenizer

REJECTS = 5  # that are shown
JOINT = "; "
SAMPLE_START, SAMPLE_END = 40, 15  # tokens that are shown of a part of the sample
ENOUGH_REASONING = 0.75  # of the rows, as Unsloth advises for Qwen3
MAX_CHARACTER_TOKENS = 4  # the bytes of one character in UTF-8
TRIAL = "preset:quick"  # whose model counts the tokens of a data file
RECOMMENDED = "preset:qwen3-4b"  # as in the README
MIN_ROW, MAX_ROW = 512, 4096  # tokens, of the rows that --init proposes
ASKING = "question query prompt ask instruction input content source src title 问 题 输入".split()
REPLYING = "answer response reply output completion summary target tgt 答 复 输出".split()


def main(argv: list[str]) -> int:
    """Print the account; the last line of stdout is it as JSON. Bad rows are no error: they are
    what this program is for.
    """
    parser = argparse.ArgumentParser(prog="cllm.check", description=say("check.help"))
    parser.add_argument("target", help=say("check.help.target"))
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help=say("check.help.overrides")
    )
    for option in ("init", "write", "report"):
        parser.add_argument(
            f"--{option}", type=Path, metavar="FILE", help=say(f"check.help.{option}")
        )
    parser.add_argument("--json", action="store_true", help=say("usage.json"))
    options = parser.parse_args(argv)
    files = list(filter(None, (options.write, options.init, options.report)))
    for path in files:
        if path.exists():
            raise UserError("check.exists", path=path)
    config = _config(options.target, options.overrides)
    config = replace(config, data=without_demo(config.data, pairs=config.preference.active))
    unread: Unread = {}
    pairs = config.preference.active
    groups, rejects = read_sources(config.data, unread, pairs=pairs)
    tokenizer = _tokenizer(config)
    account, lengths = _account(config, groups, rejects, unread, tokenizer)
    conversations = list(chain(*groups))
    if pairs and conversations:
        account["pairs"] = _length_bias(conversations, tokenizer)
    lines = _summary(account)
    if tokenizer and pairs:
        both = [item for item in conversations if len(sides(item)) == 2][:1]
        for side in sides(both[0]) if both else []:
            lines += _sample([dialogue(both[0], side)], tokenizer)
    elif tokenizer:
        lines += _sample(conversations, tokenizer)
    text = "\n".join(lines)
    green = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(text.replace("⟦", "\033[32m").replace("⟧", "\033[0m") if green else text)
    if options.write:
        kept = deduplicate(conversations) if config.data.dedup else conversations
        kind = "pairs" if pairs else config.data.kind
        account["written"] = write_conversations(kept, options.write, kind)
    if options.init:
        chosen = is_config(options.target) or config.model != load_config(TRIAL).model
        proposal = (config, config.train.row_tokens, "chosen") if chosen else _recommended(config)
        proposed = _new_config(config, account, options.init, *proposal)
        options.init.write_text(proposed, encoding="utf-8")
    if options.report:
        body = "\n".join([text, *histogram(lengths)])
        _report(options.report, options.target, body, lengths, account.get("limit", 0))
    for path in files:
        note("check.wrote", path=path)
    print_result(account, options.json)
    return 0


def _config(target: str, overrides: list[str]) -> Config:
    """The config `target`, or the defaults with the data file `target`."""
    if is_config(target):
        return load_config(target, overrides)
    given = [
        f"data.train={to_json(file_name(target))}",
        'data.eval=""',
        "train.row_tokens=2048",
        "train.tokens_per_step=8192",
    ]
    return load_config(TRIAL, [*given, *overrides])


def _tokenizer(config: Config) -> Tokenizer | None:
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


def _account(
    config: Config,
    groups: list[list[Conversation]],
    rejects: list[Reject],
    unread: Unread,
    tokenizer: Tokenizer | None,
) -> tuple[dict[str, Any], list[int]]:
    """(account, lengths in tokens, or in characters without a tokenizer)."""
    from cllm.data.encode import IGNORE_INDEX, Ids, batches, rendered

    conversations = everything = list(chain(*groups))
    if config.preference.active:  # of a pair the chosen answer is looked at
        conversations = [dialogue(item, sides(item)[0]) for item in everything]
    encoded: list[Ids] = []
    if tokenizer:
        said: list[Conversation] = []
        for batch in batches(conversations):
            texts = [rendered(item, tokenizer) for item in batch]
            rejects = rejects + [text for text in texts if isinstance(text, Reject)]
            pairs = [(item, t) for item, t in zip(batch, texts, strict=True) if isinstance(t, list)]
            said += [item for item, _ in pairs]
            encoded += tokenizer.encode_batch([text for _, text in pairs])
        conversations = said
    counted = [len(ids) for ids, _ in encoded]
    account = quality(conversations, rejects, counted, config.train.row_tokens)
    account["duplicates"]["exact"] = len(everything) - len(deduplicate(everything))
    tested: list[Conversation] = []
    if config.data.eval:
        tested, refused = read_file(
            config.data, config.data.eval, {}, unread, pairs=config.preference.active
        )
        account["eval"] = counts(tested, refused)
    train, held_out, _ = divide(config.data, groups, tested)
    account["unread"] = unread
    account["leaks"] = len(leaks(train[:NEAR_LIMIT], held_out[:NEAR_LIMIT]))
    if tokenizer:
        ignored = sum(labels.count(IGNORE_INDEX) for _, labels in encoded)
        stops = tokenizer.stop_ids
        account["supervised_tokens"] = sum(counted) - ignored
        account["end_token_trained"] = any(stops.intersection(labels) for _, labels in encoded)
        account["template"] = tokenizer.template.name
        account["thinking"] = tokenizer.template.thinking
    return account, counted or [
        sum(len(turn.content) + len(turn.parts) for turn in item) for item in conversations
    ]


def _length_bias(
    conversations: list[Conversation], tokenizer: Tokenizer | None
) -> dict[str, float]:
    """What the answers' lengths (in trained tokens, or characters without a tokenizer) tell of
    being chosen: both means, the share of pairs with a longer chosen answer, and the correlation
    of a length with being chosen, 0 for none.
    """
    from cllm.data.encode import IGNORE_INDEX, rendered

    def length(item: Conversation) -> int:
        if not tokenizer:
            return len(item.messages[-1].words)
        segments = rendered(item, tokenizer)
        labels = [] if isinstance(segments, Reject) else tokenizer.encode_segments(segments)[1]
        return len(labels) - labels.count(IGNORE_INDEX)

    measured = [
        {side: length(dialogue(item, side)) for side in sides(item)} for item in conversations
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


def _summary(account: dict[str, Any]) -> list[str]:
    """The account for people, in few lines: what is nothing to worry about is in the JSON."""
    lines = _rows(account)
    if "eval" in account:
        lines += [say("check.eval"), *_indented(_rows(account["eval"]))]
    if account["unread"]:
        lines.append(say("data.unread", names=unread_names(account["unread"])))
    if not account["valid"]:
        return lines
    personal = {kind: located["count"] for kind, located in account["personal"].items()}
    refusals = account["boilerplate"]["count"]
    told = [
        say("check.duplicates", **account["duplicates"]),
        say("check.languages", counts=_listed(account["languages"])),
        say("check.boilerplate", count=refusals) if refusals else "",
        say("check.personal", counts=_listed(personal)) if any(personal.values()) else "",
        say("check.leaks", count=account["leaks"]) if account["leaks"] else "",
    ]
    lines.append(JOINT.join(filter(None, told)))
    for unit in filter(account.get, ("characters", "tokens")):
        numbers = _listed(account[unit])
        lines.append(say("check.lengths", unit=say(f"check.unit.{unit}"), numbers=numbers))
    if "pairs" in account:
        lines.append(say("check.pairs", **account["pairs"]))
    if over := account.get("over_limit"):
        share = f"{over / account['valid']:.1%}"
        lines.append(say("check.over", count=over, share=share, limit=account["limit"]))
    if account["reasoning"] or account.get("thinking") == "keep":
        share = account["reasoning"] / account["valid"]
        few = account.get("thinking") == "keep" and share < ENOUGH_REASONING
        code = "check.reasoning_few" if few else "check.reasoning"
        lines.append(say(code, count=account["reasoning"], share=f"{share:.0%}"))
    if account.get("end_token_trained") is False:
        lines.append(say("check.no_end"))
    return lines


def _rows(account: dict[str, Any]) -> list[str]:
    """How many rows there are, and REJECTS of the rejected ones: one of each reason, then further
    ones of the commonest.
    """
    lines = [say("check.rows", **{key: account[key] for key in ("rows", "valid", "rejected")})]
    rejects = account["rejects"]
    ranked = sorted(
        (number, place, reason)
        for place, reason in enumerate(rejects)
        for number in range(len(rejects[reason]["examples"]))
    )
    shown = Counter(reason for _, _, reason in ranked[:REJECTS])
    for reason, entry in rejects.items():
        mend = say(f"check.mend.{reason}")
        examples = entry["examples"][: shown[reason]]
        lines += _indented([say("check.reject", **example, mend=mend) for example in examples])
    left = {reason: entry["count"] - shown[reason] for reason, entry in rejects.items()}
    more = [say("check.more", count=n, reason=reason) for reason, n in left.items() if n]
    return lines + _indented([JOINT.join(more)] * bool(more))


def _indented(lines: list[str]) -> list[str]:
    return ["  " + line for line in lines]


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _sample(conversations: list[Conversation], tokenizer: Tokenizer) -> list[str]:
    """The first conversation, token by token, the supervised ones ⟦so⟧; the middle of a long part
    is left out.
    """
    from cllm.data.encode import IGNORE_INDEX, rendered

    both = ((item, rendered(item, tokenizer)) for item in conversations)
    said = ((item, segments) for item, segments in both if not isinstance(segments, Reject))
    if not (sample := next(said, None)):
        return []
    item, segments = sample
    ids, labels = tokenizer.encode_segments(segments)
    trained = [label != IGNORE_INDEX for label in labels]
    numbers = {"supervised": sum(trained), "tokens": len(ids)}
    shown = []
    for supervised, run in groupby(zip(ids, trained, strict=True), key=itemgetter(1)):
        pieces = list(_pieces([id for id, _ in run], tokenizer))
        if len(pieces) > SAMPLE_START + SAMPLE_END:
            pieces[SAMPLE_START:-SAMPLE_END] = ["…"]
        text = "·".join(pieces)
        shown.append(f"⟦{text}⟧" if supervised else text)
    return [say("check.sample", file=item.file, line=item.line, **numbers), "  " + "·".join(shown)]


def _pieces(ids: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    """One text a token; tokens that are only parts of a character are shown together, as that
    character.
    """
    held: list[int] = []
    for id in ids:
        held.append(id)
        text = tokenizer.piece(id) if len(held) == 1 else tokenizer.decode(held)
        if not text.endswith("\ufffd") or len(held) == MAX_CHARACTER_TOKENS:
            yield text.replace("\n", "↵")
            held = []
    if held:
        yield tokenizer.decode(held)


def _guess_columns(path: str) -> dict[str, str]:
    """A column map for a file whose names say nothing to `cllm.data.schema`: by likeness of names,
    else the two longest texts.
    """
    rows = sample_rows(BUILT_IN.get(path, path), 50)
    names = list(dict.fromkeys(name for row in rows for name in row))
    sizes = {name: sum(len(str(row.get(name) or "")) for row in rows) for name in names}
    if len(names) < 2:
        return {}
    longest = sorted(sorted(names, key=lambda name: -sizes[name])[:2], key=names.index)
    if all(len(name) > 20 or not name for name in longest):  # the "header" is a row of its own
        ask, reply = (str(names.index(name)) for name in longest)
    else:
        asking = [name for word in ASKING for name in names if word in name.lower()]
        replying = [name for word in REPLYING for name in names if word in name.lower()]
        ask = next((name for name in (*asking, *longest) if name not in replying), longest[0])
        reply = next(name for name in (*replying, *longest) if name != ask)
    return {"user": ask, "assistant": reply}


def _recommended(config: Config) -> tuple[Config, int, str]:
    """(preset, tokens of a row, why): the recommended preset, with the longest row that the GPU
    here has room for, from MIN_ROW to MAX_ROW.
    """
    import torch

    from cllm.fit import longest_row
    from cllm.memory import GIB, Settings
    from cllm.shapes import find_config

    preset = load_config(RECOMMENDED, [f"preference.loss={config.preference.loss}"])
    if torch.cuda.is_available():
        settings = Settings(quantize=preset.model.quantize, rank=preset.lora.rank)
        free_gib = torch.cuda.mem_get_info()[0] / GIB
        _, original = find_config(preset.model.path)
        row = longest_row(original, settings, free_gib)
        if row >= MIN_ROW:
            return preset, min(row, MAX_ROW), "fits"
    return preset, config.train.row_tokens, "no_gpu"


def _new_config(
    config: Config, account: dict[str, Any], path: Path, preset: Config, row: int, why: str
) -> str:
    """A commented config for the data at hand and the model of `preset`."""
    source = config.data.train[0]
    columns = (
        source.columns
        or config.data.columns
        or ({} if account["valid"] else _guess_columns(source.path))
    )
    pairs = ", ".join(f"{role} = {to_json(name)}" for role, name in columns.items())
    unit = "tokens" if "tokens" in account else "characters"
    return say(
        "check.new_config",
        source=source.path,
        rows=account["rows"],
        valid=account["valid"],
        file=path,
        model=to_json(preset.model.path),
        why=say(f"check.why.{why}"),
        quantize=to_json(preset.model.quantize),
        train=to_json(source.path),
        columns=f"{{ {pairs} }}" if columns else "{}",
        kind=to_json(config.data.kind),
        row=row,
        longest=account[unit].get("p99", 0),
        unit=say(f"check.unit.{unit}"),
        step=max(8192, row),
        epochs=preset.train.epochs,
        rate=preset.train.learning_rate,
        loss=to_json(config.preference.loss),
        run=to_json(f"runs/{path.stem}"),
    )


def _report(path: Path, title: str, text: str, lengths: list[int], limit: int) -> None:
    """One self-contained page: what was printed and the plot of lengths; the plot also as
    lengths.png beside it.
    """
    picture = path.with_name("lengths.png")
    draw_lengths(lengths, picture, "tokens" if limit else "characters", limit)
    image = base64.b64encode(picture.read_bytes()).decode()
    page = say("check.page", title=html.escape(title), image=image, body=html.escape(text))
    path.write_text(page.replace("⟦", "<b>").replace("⟧", "</b>"), encoding="utf-8")


if __name__ == "__main__":
    from cllm.__main__ import run

    sys.exit(run("check"))
