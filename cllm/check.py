"""`python -m cllm.check CONFIG|FILE`: what the data is and what will be trained on, token by token,
before an hour is lost on it.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count, cycle, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.account import Look, look, verdict
from cllm.config import Config, given, is_config, load_config
from cllm.data.message import Message
from cllm.data.pairs import dialogue, sides
from cllm.data.quality import deduplicate, histogram
from cllm.data.reader import write_conversations
from cllm.data.schema import Conversation, Reject
from cllm.data.sources import unread_names, without_demo
from cllm.messages import (
    CommandLine,
    UserError,
    command,
    file_name,
    note,
    print_result,
    propose,
    say,
    to_json,
)
from cllm.plots import draw_lengths
from cllm.proposal import guess, new_config
from cllm.runs import replace_file, writing

if TYPE_CHECKING:
    from cllm.model.tokenizer import Tokenizer

IDENTITY = Path(__file__).parent / "assets" / "identity.jsonl"
REJECTS = 5  # that are shown
JOINT = "; "
SAMPLE_START, SAMPLE_END = 40, 15  # tokens that are shown of a part of the sample
ENOUGH_REASONING = 0.75  # of the rows, as Unsloth advises for Qwen3
MAX_CHARACTER_TOKENS = 4  # the bytes of one character in UTF-8
TRIAL = "preset:quick"  # whose model counts the tokens of a data file


def main(argv: list[str]) -> int:
    """Print the account, what it comes to and the next command; the last line of stdout is the
    account as JSON. Bad rows are no error: they are what this program is for. 2: none can be used.
    """
    parser = CommandLine("check")
    parser.take("target", nargs="?")
    parser.take("overrides", nargs="*", metavar="section.key=value")
    parser.take("--identity", nargs=2, metavar=("NAME", "AUTHOR"))
    for switch in ("--init", "--write", "--report", "--out"):
        parser.take(switch, type=Path, metavar="FILE")
    options = parser.parse_intermixed_args(argv)
    for path in filter(None, (options.write, options.init, options.report, options.out)):
        with writing(path):
            if path.exists():
                raise UserError("check.exists", path=path)
    if options.identity or options.out:
        return _identity(options)
    if not options.target:
        raise UserError("check.no_target")
    target, overrides = options.target, options.overrides
    chosen = is_config(target) or any(override.startswith("model.") for override in overrides)
    config = _config(target, overrides)
    first = last = look(config)
    text = _show(first, config, chosen)
    if not first.account["valid"] and (guessed := _guessed(config, first.account)):
        overrides = [*overrides, *guessed]
        if options.init:
            print(say("check.again", settings=" ".join(guessed)))
            config = _config(target, overrides)
            last = look(config)
            first.account["again"] = last.account
            text = _show(last, config, chosen)
    usable = bool(last.account["valid"])
    state, additions = verdict(config, last.account)
    print(state)
    if options.init and usable:
        told = given(target, overrides)
        proposed = new_config(config, last, options.init, told, chosen=chosen)
        replace_file(options.init, proposed.encode())
        propose(command("train", options.init, *additions))
    elif usable and is_config(target):
        propose(command("train", target, *overrides, *additions))
    elif usable or overrides != options.overrides:
        file = file_name(target)
        propose(command("check", file, *overrides, "--init", _free(Path(file).stem)))
    if options.write:
        kept = deduplicate(last.conversations) if config.data.dedup else last.conversations
        kind = "pairs" if config.preference.active else config.data.kind
        with writing(options.write):
            first.account["written"] = write_conversations(kept, options.write, kind)
    if options.report:
        _report(options.report, target, "\n".join([text, state]), last)
    for path in filter(None, (options.write, options.init if usable else None, options.report)):
        note("check.wrote", path=path)
    if options.init and not usable:
        note("check.not_written", path=options.init)
    print_result(first.account, options.json)
    return 0 if usable else 2


def _identity(options: argparse.Namespace) -> int:
    """Write rows that teach a model its name and its author, and say what comes next."""
    names = [name.strip() for name in options.identity or ()]
    if not all(name and name.isprintable() for name in names):
        raise UserError("check.names")
    others = (options.target, options.write, options.init, options.report)
    if not names or not options.out or any(others):
        raise UserError("check.identity")
    name, author = names
    rows = map(json.loads, IDENTITY.read_text(encoding="utf-8").splitlines())
    said = ([text.format(name=name, author=author) for text in row] for row in rows)
    turns = (tuple(map(Message, cycle(("user", "assistant")), texts)) for texts in said)
    with writing(options.out):
        written = write_conversations(map(Conversation, turns), options.out)
    note("check.wrote", path=options.out)
    source = f"data.train={file_name(options.out)}"
    propose(command("train", "preset:identity", source))
    print_result({"written": written}, options.json)
    return 0


def _config(target: str, overrides: list[str]) -> Config:
    """The config `target`, or the defaults with the data file `target`."""
    if not is_config(target):
        own = [f"data.train={to_json(file_name(target))}", 'data.eval=""']
        own += ["train.row_tokens=2048", "train.tokens_per_step=0"]
        return _config(TRIAL, [*own, *overrides])
    config = load_config(target, overrides)
    return replace(config, data=without_demo(config.data, pairs=config.preference.active))


def _free(stem: str) -> str:
    """The first name of a config for such data that no file here has."""
    names = chain([f"{stem}.toml"], (f"{stem}-{number}.toml" for number in count(2)))
    return next(name for name in names if not Path(name).exists())


def _guessed(config: Config, account: dict[str, Any]) -> list[str]:
    """What would make the rows readable, as overrides; says it, or how to name the columns. Nothing
    for a mixture.
    """
    if len(config.data.train) > 1 or config.data.train[0].columns:
        return []
    names, settings = guess(config.data.train[0].path)
    shown = f"{', '.join(names):.200}"
    if not settings:
        if "unknown_schema" in account["rejects"]:
            print(say("check.no_guess", names=shown))
        return []
    meant = ", ".join(f"{key.rpartition('.')[2]} = {value}" for key, value in settings.items())
    print(say("check.guess", names=shown, meant=meant))
    return [f"data.{key}={value}" for key, value in settings.items()]


def _show(seen: Look, config: Config, chosen: bool) -> str:
    """Print the account for people, with a sample; returns it."""
    account, tokenizer = seen.account, seen.tokenizer
    facts = {"model": config.model.path, "qwen": f"{account['qwen_tokens']:,}"}
    if tokenizer:
        code = "check.counted" if chosen or not account["valid"] else "check.counted_on_trial"
        lines = [say(code, template=tokenizer.template.name, **facts)]
    else:
        lines = [say("check.estimate", **facts)]
    lines += _summary(account)
    shown = seen.conversations
    if tokenizer and config.preference.active:
        both = [item for item in shown if len(sides(item)) == 2][:1]
        for side in sides(both[0]) if both else []:
            lines += _sample([dialogue(both[0], side)], tokenizer)
    elif tokenizer:
        lines += _sample(shown, tokenizer)
    text = "\n".join(lines)
    green = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(text.replace("⟦", "\033[32m").replace("⟧", "\033[0m") if green else text)
    return text


def _summary(account: dict[str, Any]) -> list[str]:
    """The account in few lines: what is nothing to worry about is in the JSON."""
    lines = _rows(account)
    read_as = {Path(file).name: names for file, names in account["read_as"].items() if names}
    if read_as and account["valid"]:
        lines[0] += JOINT + say("check.read_as", schemas=_listed(read_as))
    if "eval" in account:
        lines += [say("check.eval"), *_indented(_rows(account["eval"]))]
    if "replay_from" in account:
        lines += [say("check.replay_from"), *_indented(_rows(account["replay_from"]))]
    if "replay" in account:
        lines.append(say("check.replay", count=account["replay"]))
    if account["unread"]:
        lines.append(say("data.unread", names=unread_names(account["unread"])))
    if not account["valid"]:
        return lines
    told = [
        say("check.duplicates", **account["duplicates"]),
        say("check.languages", counts=_named(account["languages"])),
        say("check.leaks", count=account["leaks"]) if account["leaks"] else "",
    ]
    lines.append(JOINT.join(filter(None, told)))
    findings = {**account["findings"], "boilerplate": account["boilerplate"], **account["personal"]}
    for name, located in findings.items():
        if located["count"]:
            places = ", ".join(located["examples"])
            finding = say(f"check.finding.{name}", count=located["count"], places=places)
            lines += _indented([finding])
    for unit in filter(account.get, ("characters", "tokens")):
        numbers = _named(account[unit])
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
    return lines


def _rows(account: dict[str, Any]) -> list[str]:
    """How many rows there are, and REJECTS of the rejected ones, none with the words of another:
    one of each reason, then further ones of the commonest.
    """
    lines = [say("check.rows", **{key: account[key] for key in ("rows", "valid", "rejected")})]
    rejects = account["rejects"]
    different = {
        reason: list({example["detail"]: example for example in entry["examples"][::-1]}.values())
        for reason, entry in rejects.items()
    }
    ranked = sorted(
        (number, place, reason)
        for place, reason in enumerate(rejects)
        for number in range(len(different[reason]))
    )
    shown = Counter(reason for _, _, reason in ranked[:REJECTS])
    for reason, examples in different.items():
        mend = say(f"check.mend.{reason}")
        chosen = examples[::-1][: shown[reason]]
        lines += _indented([say("check.reject", **example, mend=mend) for example in chosen])
    left = {reason: entry["count"] - shown[reason] for reason, entry in rejects.items()}
    more = [say("check.more", count=n, reason=reason) for reason, n in left.items() if n]
    return lines + _indented([JOINT.join(more)] * bool(more))


def _indented(lines: list[str]) -> list[str]:
    return ["  " + line for line in lines]


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _named(values: dict[str, Any]) -> str:
    """Languages, or figures of lengths, under their names in the reader's language."""
    return _listed({say(f"check.name.{key}"): value for key, value in values.items()})


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


def _report(path: Path, title: str, text: str, seen: Look) -> None:
    """One self-contained page: the counts, what was printed, and the plot of lengths."""
    account, picture = seen.account, io.BytesIO()
    unit = "tokens" if seen.tokenizer else "characters"
    draw_lengths(seen.lengths, picture, unit, account.get("limit", 0))
    image = base64.b64encode(picture.getvalue()).decode()
    counts = {key: account[key] for key in ("rows", "valid", "rejected")}
    counts |= {"exact": account["duplicates"]["exact"], "near": account["duplicates"]["near"]}
    counts[unit] = sum(seen.lengths)
    cards = {say(f"check.card.{key}"): f"<strong>{n:,}</strong>" for key, n in counts.items()}
    shown = "".join(f"<div>{number} {label}</div>" for label, number in cards.items())
    body = html.escape("\n".join([text, *histogram(seen.lengths)]))
    page = say("check.page", title=html.escape(title), image=image, body=body, cards=shown)
    replace_file(path, page.replace("⟦", "<b>").replace("⟧", "</b>").encode())


if __name__ == "__main__":
    from cllm.__main__ import run

    sys.exit(run("check"))
