"""`python -m cllm.check CONFIG|FILE`: what the data is and what will be trained on, token by token,
before an hour is lost on it.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import sys
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.config import Config, load_config
from cllm.data.reader import sample_rows, write_conversations
from cllm.data.schema import Conversation, Reject
from cllm.data.sources import BUILT_IN, divide, read_file, read_sources, warn_of_demo
from cllm.messages import UserError, note, say

if TYPE_CHECKING:
    from cllm.model.tokenizer import Tokenizer

SAMPLES, SAMPLE_TOKENS = 3, 400
MAX_CHARACTER_TOKENS = 4  # the bytes of one character in UTF-8
UNITS = ("characters", "tokens")
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
    options = parser.parse_args(argv)
    for path in (options.init, options.write, options.report):
        if path and path.exists():
            raise UserError("check.exists", path=path)
    config = _config(options.target, options.overrides)
    warn_of_demo(config.data)
    groups, rejects = read_sources(config.data)
    tokenizer = _tokenizer(config)
    account, lengths = _account(config, groups, rejects, tokenizer)
    conversations = [item for group in groups for item in group]
    text = "\n".join(
        [*_summary(account, lengths), *(_samples(conversations, tokenizer) if tokenizer else [])]
    )
    green = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(text.replace("⟦", "\033[32m").replace("⟧", "\033[0m") if green else text)
    if options.write:
        from cllm.data.quality import deduplicate

        kept = deduplicate(conversations) if config.data.dedup else conversations
        account["written"] = write_conversations(kept, options.write, config.data.kind)
    if options.init:
        chosen = _is_config(options.target) or config.model != load_config(TRIAL).model
        proposal = (config, config.train.row_tokens, "chosen") if chosen else _recommended(config)
        options.init.write_text(
            _new_config(config, account, options.init, *proposal), encoding="utf-8"
        )
    if options.report:
        _report(
            options.report,
            options.target,
            text,
            lengths,
            config.train.row_tokens if tokenizer else 0,
        )
    for path in filter(None, (options.write, options.init, options.report)):
        note("check.wrote", path=path)
    print(json.dumps(account, ensure_ascii=False))
    return 0


def _is_config(target: str) -> bool:
    return target.startswith("preset:") or target.endswith(".toml")


def _config(target: str, overrides: list[str]) -> Config:
    """The config `target`, or the defaults with the data file `target`."""
    if _is_config(target):
        return load_config(target, overrides)
    given = [
        f"data.train={json.dumps(target, ensure_ascii=False)}",
        'data.eval=""',
        "train.row_tokens=2048",
        "train.tokens_per_step=8192",
    ]
    return load_config(TRIAL, [*given, *overrides])


def _tokenizer(config: Config) -> Tokenizer | None:
    """The model's tokenizer if the model is on this machine; looking at data downloads nothing."""
    from cllm.corpus import tokenizer_of
    from cllm.model.source import resolve

    try:
        return tokenizer_of(config, resolve(config.model.path, download=False))
    except UserError as error:
        note("check.no_tokens", detail=error)
        return None


def _account(
    config: Config,
    groups: list[list[Conversation]],
    rejects: list[Reject],
    tokenizer: Tokenizer | None,
) -> tuple[dict[str, Any], list[int]]:
    """(account, lengths in tokens, or in characters without a tokenizer)."""
    from cllm.data.encode import batches
    from cllm.data.quality import NEAR_LIMIT, leaks, quality, rejects_by_reason

    conversations = [item for group in groups for item in group]
    pairs = (
        (tokenizer.encode_batch(map(tokenizer.segments, batch)) for batch in batches(conversations))
        if tokenizer
        else ()
    )
    encoded = list(chain.from_iterable(pairs))
    counted = [len(ids) for ids, _ in encoded]
    account = quality(conversations, rejects, counted, config.train.row_tokens)
    tested, refused = read_file(config.data, config.data.eval, {}) if config.data.eval else ([], [])
    if config.data.eval:
        account["eval"] = {
            "rows": len(tested) + len(refused),
            "valid": len(tested),
            "rejected": len(refused),
            "rejects": rejects_by_reason(refused),
        }
    train, held_out, _ = divide(config.data, groups, tested)
    account["leaks"] = len(leaks(train[:NEAR_LIMIT], held_out[:NEAR_LIMIT]))
    if tokenizer:
        account["supervised_tokens"] = sum(
            label != -100 for _, labels in encoded for label in labels
        )
        account["end_token_trained"] = any(
            tokenizer.stop_ids.intersection(labels) for _, labels in encoded
        )
        account["template"] = tokenizer.template.name
    return account, counted or [
        sum(len(message.content) for message in item) for item in conversations
    ]


def _summary(account: dict[str, Any], lengths: list[int]) -> list[str]:
    """The account for people."""
    from cllm.data.quality import histogram

    lines = _rows(account)
    if "eval" in account:
        lines += [say("check.eval"), *("  " + line for line in _rows(account["eval"]))]
    if not account["valid"]:
        return lines
    lines += [
        say("check.duplicates", **account["duplicates"]),
        say("check.languages", counts=_counts(account["languages"])),
        say("check.boilerplate", count=account["boilerplate"]["count"]),
        say(
            "check.personal",
            counts=_counts({kind: found["count"] for kind, found in account["personal"].items()}),
        ),
        say("check.leaks", count=account["leaks"]),
        *(
            say("check.lengths", unit=say(f"check.unit.{unit}"), numbers=_counts(account[unit]))
            for unit in UNITS
            if unit in account
        ),
        *("  " + line for line in histogram(lengths)),
    ]
    if over := account.get("over_limit"):
        lines.append(
            say(
                "check.over",
                count=over,
                share=f"{over / account['valid']:.1%}",
                limit=account["limit"],
            )
        )
    if account.get("end_token_trained") is False:
        lines.append(say("check.no_end"))
    return lines


def _rows(account: dict[str, Any]) -> list[str]:
    """How many rows there are, and the rejected ones by reason."""
    lines = [say("check.rows", **{key: account[key] for key in ("rows", "valid", "rejected")})]
    for reason, entry in account["rejects"].items():
        mend = say(f"check.mend.{reason}")
        lines += ["  " + say("check.reject", **example, mend=mend) for example in entry["examples"]]
        if (left := entry["count"] - len(entry["examples"])) > 0:
            lines.append("  " + say("check.more", count=left, reason=reason))
    return lines


def _counts(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _samples(conversations: list[Conversation], tokenizer: Tokenizer) -> list[str]:
    """The first conversations, token by token, the supervised ones ⟦so⟧."""
    lines = []
    for item in conversations[:SAMPLES]:
        ids, labels = tokenizer.encode_segments(tokenizer.segments(item))
        trained = [label != -100 for label in labels]
        lines.append(
            say(
                "check.sample",
                file=item.file,
                line=item.line,
                supervised=sum(trained),
                tokens=len(ids),
            )
        )
        runs = [
            (on, "·".join(_pieces([id for id, _ in run], tokenizer)))
            for on, run in groupby(
                zip(ids[:SAMPLE_TOKENS], trained, strict=False), key=lambda pair: pair[1]
            )
        ]
        lines.append(
            "  "
            + "·".join(f"⟦{run}⟧" if on else run for on, run in runs)
            + (" …" if len(ids) > SAMPLE_TOKENS else "")
        )
    return lines


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
    rows = [row for row in sample_rows(BUILT_IN.get(path, path), 50) if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    sizes = {name: sum(len(str(row.get(name) or "")) for row in rows) for name in names}
    if len(names) < 2:
        return {}
    longest = sorted(sorted(names, key=lambda name: -sizes[name])[:2], key=names.index)
    if all(len(name) > 20 or not name for name in longest):  # the "header" is a row of its own
        return {
            role: str(names.index(name))
            for role, name in zip(("user", "assistant"), longest, strict=True)
        }
    ask = next((name for word in ASKING for name in names if word in name.lower()), "")
    reply = next(
        (name for word in REPLYING for name in names if word in name.lower() and name != ask), ""
    )
    return (
        {"user": ask or longest[0], "assistant": reply or longest[1]}
        if ask != (reply or longest[1])
        else {}
    )


def _longest_row(preset: Config, free_bytes: int) -> int:
    """Tokens of the longest row with which the preset fits, at most MAX_ROW; 0 if under MIN_ROW."""
    from cllm.memory import GIB, Settings, find_shape, make_plan

    settings = Settings(quantize=preset.model.quantize, rank=preset.lora.rank)
    plan = make_plan(find_shape(preset.model.path), settings, free_bytes / GIB)
    return min(plan.longest_row, MAX_ROW) if plan.longest_row >= MIN_ROW else 0


def _recommended(config: Config) -> tuple[Config, int, str]:
    """(preset, tokens of a row, why): the recommended preset, with the longest row that the GPU
    here has room for.
    """
    import torch

    preset = load_config(RECOMMENDED)
    if torch.cuda.is_available() and (row := _longest_row(preset, torch.cuda.mem_get_info()[0])):
        return preset, row, "fits"
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
    pairs = ", ".join(f"{role} = {_quoted(name)}" for role, name in columns.items())
    unit = "tokens" if "tokens" in account else "characters"
    return say(
        "check.new_config",
        source=source.path,
        rows=account["rows"],
        valid=account["valid"],
        file=path,
        model=_quoted(preset.model.path),
        why=say(f"check.why.{why}"),
        quantize=_quoted(preset.model.quantize),
        train=_quoted(source.path),
        columns=f"{{ {pairs} }}" if columns else "{}",
        kind=_quoted(config.data.kind),
        row=row,
        longest=account[unit].get("p99", 0),
        unit=say(f"check.unit.{unit}"),
        step=max(8192, row),
        run=_quoted(f"runs/{path.stem}"),
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _report(path: Path, title: str, text: str, lengths: list[int], limit: int) -> None:
    """One self-contained page: what was printed and the plot of lengths; the plot also as
    lengths.png beside it.
    """
    from cllm.data.quality import plot_lengths

    picture = path.with_name("lengths.png")
    plot_lengths(lengths, picture, "tokens" if limit else "characters", limit)
    page = say(
        "check.page",
        title=html.escape(title),
        image=base64.b64encode(picture.read_bytes()).decode(),
        body=html.escape(text),
    )
    path.write_text(page.replace("⟦", "<b>").replace("⟧", "</b>"), encoding="utf-8")


if __name__ == "__main__":
    from cllm.__main__ import run

    sys.exit(run("check"))
