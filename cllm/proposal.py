"""A config for data at hand: which columns hold question and answer, the model that fits here, and
settings for the amount of data.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from cllm.account import Look
from cllm.advice import (
    EXPONENTS,
    FEW_CONVERSATIONS,
    MOST_SEQUENCES,
    TINY_RATE,
    advised_rate,
    sized,
    width,
)
from cllm.config import TRAIN_ON_PAIRS, Config, Given, TrainConfig, load_config
from cllm.data.fields import is_metadata
from cllm.data.reader import sample_rows
from cllm.data.sources import BUILT_IN
from cllm.messages import UserError, command, say, to_json
from cllm.metrics.significance import FEWEST_PAIRS
from cllm.typed_toml import as_toml

RECOMMENDED = "preset:qwen3-4b"  # as in the README
MIN_ROW, MAX_ROW = 512, 4096  # tokens, of the rows that are proposed
# Evaluations without a lower loss after which a run on few rows ends: few held-out rows are noisy,
# and two of them ended runs in which the loss fell again.
FEW_PATIENCE = 4
SAMPLED = 50  # rows that are looked at for their columns
# shares of the rows where a column of texts has one, and different ones
FILLED, DISTINCT = 0.9, 0.5
LONG_NAME = 20  # characters; a header of longer ones is a row
PROSE = "，。？！；,?!;"
ASKING = "question query prompt ask instruction input content source src title 问 题 输入".split()
REPLYING = "answer response reply output completion summary target tgt 答 复 输出".split()
NO_ANSWER = ("author", "title", "name")
RATE = "learning_rate"
DECIDED = {"model.path", "data.train", "data.columns", "data.kind", "train.learning_rate"}
"""What the proposal has from the config, or has its own reason for."""
ADVISED = {
    *("train.epochs", "train.steps", "train.row_tokens", "train.tokens_per_step"),
    *("data.held_out", "eval.patience", "run.dir"),
}
"""What is proposed anew for the amount of data, unless the command line says it."""


def guess(path: str) -> tuple[list[str], dict[str, str]]:
    """(the names in the file, what makes its rows readable as `data.…` settings), by likeness of
    names, else where there are just two columns of texts; nothing where that is not clear.
    """
    rows = sample_rows(BUILT_IN.get(path, path), SAMPLED)
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = {
        name: [text for row in rows if isinstance(text := row.get(name), str) and text.strip()]
        for name in names
    }
    full = [name for name in names if len(texts[name]) >= FILLED * len(rows)]
    heads = [name for name in full if not _is_text(name)]
    replying = [name for word in REPLYING for name in heads if word in name.lower()]
    asking = [name for word in ASKING for name in heads if word in name.lower()]
    asking = [name for name in asking if name not in replying]
    if "text" in full and not replying:
        return names, {"kind": "text"}
    by_name = asking[:1] + replying[:1]
    rest = [name for name in full if name not in (asking + replying) and _varies(texts, name)]
    longest = sorted(full, key=lambda name: -sum(map(len, texts[name])))[:2]
    if len(longest) == 2 and len(by_name) < 2 and any(map(_is_text, longest)):
        pair = [str(number) for number in sorted(map(names.index, longest))]
        names = [str(number) for number in range(len(names))]  # the "header" is a row of its own
    elif asking and replying:
        pair = by_name
    elif len(by_name) + len(rest) == 2:
        pair = by_name + rest if asking else rest + by_name
    else:
        return names, {}
    return names, {"columns.user": pair[0], "columns.assistant": pair[1]}


def _is_text(name: str) -> bool:
    long = len(name) > LONG_NAME and not (name.isascii() and name.isidentifier())
    return long or not name or not set(PROSE).isdisjoint(name)


def _varies(texts: dict[str, list[str]], name: str) -> bool:
    """Whether a column that says nothing by its name holds texts, neither numbers nor labels."""
    words = [text for text in texts[name] if not text.strip().isdigit()]
    labels = is_metadata(name) or name.lower() in NO_ANSWER
    return not labels and len(set(words)) >= DISTINCT * len(texts[name])


def recommended(config: Config) -> tuple[Config, int, str]:
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


def _original(config: Config) -> dict[str, Any]:
    """The config.json of the model, {} where it is not on this machine and not published."""
    from cllm.model.checkpoint import original_config
    from cllm.model.source import resolve
    from cllm.shapes import published

    with contextlib.suppress(UserError):
        return original_config(resolve(config.model.path, download=False))
    return (published(config.model.path) or ("", {}))[1]


def _rate(config: Config, original: dict[str, Any], told: Given, *, few: bool) -> tuple[float, str]:
    """(learning rate, what it rests on): the one that was set, for this model; else of answers what
    the formula says of this amount of data.
    """
    advised, rate, pairs = advised_rate(original), config.train.learning_rate, config.preference
    name, other_model = f"train.{RATE}", "model.path" in told.words
    if rate != "auto" and (name in told.words or (name in told.file and not other_model)):
        return rate, say("check.why.set")
    if pairs.active:
        return TRAIN_ON_PAIRS["learning_rate"], say("check.why.rate_pairs")
    if advised is None:
        tiny = width(original) > 0
        rate = TINY_RATE if tiny else TrainConfig().rate
        return rate, say(f"check.why.rate_{'tiny' if tiny else 'usual'}")
    code = "rate" if advised.family else "rate_other"
    exponents = ", ".join(f"{name} {exponent}" for name, exponent in EXPONENTS.items())
    facts = {"family": advised.family, "hidden": advised.hidden, "exponents": exponents}
    why = say(f"check.why.{code}", **facts, exponent=EXPONENTS.get(advised.family))
    return advised.of(few=few), say("check.why.rate_few", why=why) if few else why


def _why_rank(preset: Config, original: dict[str, Any], tokens: int) -> str:
    """Whether the adapter has a number for each of the `tokens` that are trained; "" where its size
    is not known.
    """
    from cllm.memory import Settings
    from cllm.trace import weighed

    if not original or preset.lora.targets != "all-linear":
        return ""
    settings = Settings(quantize=preset.model.quantize, rank=preset.lora.rank)
    try:
        numbers = sum(weighed(original, settings).trained)
    except UserError:  # a family that cannot be weighed
        return ""
    code = "rank" if numbers >= tokens else "rank_small"
    return say(f"check.why.{code}", numbers=f"{numbers / 1e6:.1f}", tokens=f"{tokens:,}")


def _sized(
    train: TrainConfig, config: Config, own: set[str], seen: Look, tokens: int
) -> tuple[TrainConfig, int]:
    """(`train`, tokens of a step) for the data at hand; the command line's `own` settings stay."""
    count, answers = max(1, seen.account["valid"]), not config.preference.active
    if answers:
        whole = [length for length in seen.lengths if length <= train.row_tokens]  # or left out
        longest = 0 if config.data.kind == "text" else max(whole, default=0)
        train = sized(train, count, tokens, longest)
    train = replace(train, **{name: getattr(config.train, name) for name in own})
    step = train.step_tokens(tokens)
    if answers and not train.tokens_per_step:  # few sequences, whole rows
        step = min(step, MOST_SEQUENCES * tokens // count)
        step = max(1, step // train.row_tokens) * train.row_tokens
    return train, step


def new_config(config: Config, seen: Look, path: Path, told: Given, *, chosen: bool) -> str:
    """A commented config for the data at hand; `chosen`: for the model of `config`, else for the
    recommended one. What somebody chose stays, but for what a file says of ADVISED.
    """
    preset, row, why = (
        (config, config.train.row_tokens, "chosen") if chosen else recommended(config)
    )
    account, count = seen.account, seen.account["valid"]
    tokens = account["total_tokens"] if chosen and "tokens" in account else account["qwen_tokens"]
    lengths = account.get("tokens") or account["characters"]
    original = _original(preset)
    chats = config.data.kind != "text" and not config.preference.active
    few = chats and count < FEW_CONVERSATIONS
    rate, why_rate = _rate(config, original, told, few=few)
    # the smallest share that most likely gives a verdict; few conversations are needed for training
    wanted = 1.25 * FEWEST_PAIRS
    held_out = next((share for share in (0.05, 0.1, 0.2) if share * count >= wanted), 0.1)
    own = {key.removeprefix("train.") for key in told.words if key.startswith("train.")} - {RATE}
    train, step = _sized(replace(preset.train, row_tokens=row), config, own, seen, tokens)
    sources, more = config.data.train, train.epochs > preset.train.epochs
    alone = len(sources) == 1 and sources[0].weight == 1
    columns = sources[0].columns if alone else {}
    learned = (1 - held_out * (not config.data.eval)) * tokens * train.epochs
    text = say(
        "check.new_config",
        source=", ".join(source.path for source in sources),
        rows=account["rows"],
        valid=count,
        command=command("train", path),
        model=to_json(preset.model.path),
        why=say(f"check.why.{why}"),
        quantize=to_json(preset.model.quantize),
        train=as_toml(sources[0].path if alone else sources),
        columns=as_toml(columns or config.data.columns),
        kind=to_json(config.data.kind),
        held_out=held_out,
        held=max(1, round(held_out * count)),
        row=train.row_tokens,
        longest=lengths["p99"],
        unit=say(f"check.unit.{'tokens' if 'tokens' in account else 'characters'}"),
        step=step,
        steps=train.steps or max(1, round(learned / step)),
        tokens=f"{tokens:,}",
        epochs=train.epochs,
        seen=say("check.why.few", count=count) if more and "epochs" not in own else "",
        rate=f"{rate:g}",
        why_rate=why_rate,
        rank=preset.lora.rank,
        alpha=preset.lora.alpha,
        why_rank=_why_rank(preset, original, account.get("supervised_tokens", tokens)),
        sequences=max(1, round(step * count / max(1, tokens))),
        patience=FEW_PATIENCE if few else 0,
        loss=to_json(config.preference.loss),
        run=to_json(f"runs/{path.stem}"),
    )
    return _with_chosen(text, config, told)


def _with_chosen(text: str, config: Config, told: Given) -> str:
    """The proposal with the settings that somebody chose and that it has otherwise."""
    sections = dict(re.findall(r"^\[(\w+)\]\n(.*?)(?=^\[|\Z)", text, re.M | re.S))
    head = text[: text.index("[")]
    for key in sorted(told.words | (told.file - ADVISED)):
        section, _, name = key.partition(".")
        if not name or "." in name or key in DECIDED:
            continue
        value = as_toml(getattr(getattr(config, section), name))
        line = f"{name} = {value}  # {say('check.why.set')}"
        body = sections.get(section, "").rstrip("\n")
        if found := re.search(rf"^{name} = (.*?)(?=  #|$).*$", body, re.M):
            body = body if found[1] == value else body[: found.start()] + line + body[found.end() :]
        elif value != as_toml(getattr(getattr(Config(), section), name)):
            body = f"{body}\n{line}".lstrip("\n")
        if body:
            sections[section] = body
    parts = (f"[{section}]\n{body.rstrip()}\n" for section, body in sections.items())
    return head + "\n".join(parts)
