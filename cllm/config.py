"""The TOML file as typed, frozen sections; `section.key=value` overrides; every mistake found is
reported at once.

Each field's comment is its documentation; `cllm.toml` shows all of them with their defaults (a test
compares the two).
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cllm.messages import UserError, file_name, say, to_json
from cllm.typed_toml import as_toml, bare_value, build, key_lines, kind_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "assets" / "presets"
# What a preference loss takes: whole answers, and two passes that agree.
_WITH_PAIRS = {
    "data.kind": "chat",
    "data.truncate": "drop",
    "data.replay": 0.0,
    "lora.dropout": 0.0,
}
# [train] where a preference loss is set and the file says nothing: SFT's rate would ruin the model.
TRAIN_ON_PAIRS = {"epochs": 1.0, "learning_rate": 5e-6, "warmup": 0.1}
ENOUGH_STEPS, MAX_STEP_TOKENS = 100, 8192  # what train.tokens_per_step = 0 aims at

Quantize = Literal["none", "nf4"]
PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]


def _at_least(low: float, default: Any, at_most: float = math.inf) -> Any:
    return field(default=default, metadata={"limits": (low, at_most)})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """[model]: the frozen base."""

    path: str = "tiny-zh"
    """Built-in `tiny-zh`, a local directory, a .gguf file, or a hub name (`Qwen/Qwen3-4B`,
    `modelscope:…`, `hf:…`).
    """
    template: str = "auto"
    """Chat template: `auto` (by model family) or a name from cllm/assets/templates.toml."""
    thinking: Literal["off", "keep"] = "off"
    """Leave the reasoning out, or train it; in models without <think> blocks as words."""
    quantize: Quantize = "none"
    """`nf4`: 4-bit base (QLoRA)."""
    head: Literal["16bit", "int8"] = "16bit"
    """`int8`: the output head in half the bytes, its perplexity within 1 %."""
    precision: PrecisionName = "auto"
    """`auto`: bf16 where the GPU has it, else fp16 with a loss scaler; fp32 on a CPU."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """[lora]: the adapter."""

    rank: int = _at_least(1, 16)
    alpha: float = _at_least(0, 32.0)
    """Scale: the update is alpha / rank * B A."""
    dropout: float = _at_least(0, 0.0, at_most=0.99)
    targets: str | list[str] = "all-linear"
    """`all-linear` (all but the head), or module names and globs."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    dora: bool = False
    """Learn the magnitude of each output row too."""
    plus_ratio: float = _at_least(0, 1.0)
    """LoRA+: the learning rate of B over that of A."""
    init_from: str = ""
    """A run (or adapter directory) to continue from; rank, alpha and targets are then its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """[[data.train]]: one file (or folder) of a mixture."""

    path: str = ""
    weight: float = _at_least(0, 1.0)
    """How often each conversation is seen per epoch; 0.5: every second one."""
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """[data]: what is learned from."""

    train: tuple[Source, ...] = (Source(path="demo"),)
    """A file, a folder, the built-in `demo`, or [[data.train]] tables with path, weight,
    columns.
    """
    eval: str = ""
    """Held-out file; empty: `held_out` of the training conversations are split off."""
    held_out: float = _at_least(0, 0.05, at_most=0.9)
    """Fraction split off by content hash when `eval` is empty; 0: no evaluation."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where the file's own names need help: user, assistant, rejected, system, history = a column
    (name or number) or "{A} … {B}".
    """
    kind: Literal["chat", "text"] = "chat"
    """`text`: continued pre-training on {"text": …} rows."""
    truncate: Literal["drop", "prompt"] = "drop"
    """Longer than a row: drop (and count), or cut the prompt from its start; the answer and its end
    token are never cut.
    """
    replay: float = _at_least(0, 0.0, at_most=0.9)
    """Share of the conversations trained on that are general ones, against forgetting."""
    replay_from: str = ""
    """A file of those; empty: the base's own answers to general questions of ours."""
    dedup: bool = True
    """Drop exact duplicates."""
    convert: str = ""
    """An OpenCC conversion of every text: `t2s` (traditional to simplified), `s2t`, …; takes `pip
    install opencc`.
    """
    fold_width: bool = False
    """Full-width ASCII and the ideographic space to half width."""
    unescape_html: bool = False
    """`&lt;` to `<`, `&#39;` to `'`, …"""
    mask_personal: bool = False
    """E-mail addresses, ID card and phone numbers become [EMAIL], [ID], [PHONE]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """[train]: the loop. With a preference loss the defaults are 1 epoch, rate 5e-6, warmup 0.1."""

    epochs: float = _at_least(0, 3.0)
    steps: int = _at_least(0, 0)
    """Optimizer steps; 0: as many as `epochs` needs."""
    row_tokens: int = _at_least(8, 2048)
    """Length of a packed row = the micro-batch; also the longest sample."""
    tokens_per_step: int = _at_least(0, 0)
    """Tokens of one optimizer step, accumulated over rows; 0: what `step_tokens` says."""
    learning_rate: float | Literal["auto"] = _at_least(0, 2e-4)
    """`auto`: what `cllm.advice.advised_rate` says of the model; the run's own file has the
    number.
    """
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = _at_least(0, 0.03, at_most=1)
    """Share of the steps with a rising rate."""
    weight_decay: float = _at_least(0, 0.0)
    max_norm: float = _at_least(0, 1.0)
    """Gradient clipping; 0: off."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit`: AdamW's two moments in 8 bits, a quarter of their memory."""
    seed: int = _at_least(0, 42)

    @property
    def rate(self) -> float:
        """`learning_rate` as a number, which `auto` is in every run."""
        assert self.learning_rate != "auto"
        return self.learning_rate

    def step_tokens(self, tokens: int) -> int:
        """`tokens_per_step`; for 0 what gives ENOUGH_STEPS in `epochs` over data of `tokens`, from
        one row to MAX_STEP_TOKENS. `steps` does not change it: fewer are not larger ones.
        """
        aimed = int(tokens * self.epochs / ENOUGH_STEPS)
        return self.tokens_per_step or max(self.row_tokens, min(MAX_STEP_TOKENS, aimed))


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceConfig:
    """[preference]: learning from pairs of answers, or from votes on single ones."""

    loss: Literal["none", "dpo", "ipo", "robust", "hinge", "orpo", "simpo", "apo_zero_unpaired"] = (
        "none"
    )
    """`none`: answers are learned (of a pair the chosen one). `apo_zero_unpaired` takes votes on
    single answers too; `cllm.learn.preference_loss` has the formulas.
    """
    beta: float = _at_least(1e-6, 0.1)
    """How much a log-probability counts; of DPO: how near the model stays to what it was."""
    label_smoothing: float = _at_least(0, 0.0, at_most=0.49)
    """`dpo`, `robust`: the share of pairs that may be the wrong way round."""
    sft: float = _at_least(0, 0.0)
    """Weight of the chosen answers' loss per token beside it; ORPO's own is 1."""
    ld_alpha: float = _at_least(0, 1.0, at_most=1)
    """What tokens beyond the shorter answer's length count; under 1 against ever longer answers."""
    gamma: float = _at_least(0, 0.5)
    """`simpo`: the margin that is asked for."""

    @property
    def active(self) -> bool:
        """Whether pairs or votes are learned from, and not answers."""
        return self.loss != "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """[eval]: the held-out set, during and after training."""

    every: int = _at_least(0, 0)
    """Steps between evaluations; 0: five times a run, of more epochs once in each."""
    patience: int = _at_least(0, 0)
    """Stop after so many evaluations without a lower loss; 0: never."""
    samples: int = _at_least(0, 200)
    """Held-out conversations answered for the table at the end, drawn by train.seed; 0: no
    generation.
    """
    shots: int = _at_least(0, 0)
    """Also answer with the base given so many training examples in the prompt."""
    max_new_tokens: int = _at_least(1, 256)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """[memory]: what may be used."""

    budget_gib: float = _at_least(0, 0.0)
    """GPU memory that the run may take; 0: what the card has free."""
    checkpoint_layers: int = _at_least(-1, -1)
    """Decoder layers recomputed in the backward: -1 as few as the budget allows (all without one),
    0 none (fastest).
    """
    chunk_mib: int = _at_least(1, 128)
    """Logits alive at once in the loss."""
    offload_inputs: bool = False
    """Inputs of recomputed layers wait in host memory."""
    stream_layers: int = _at_least(0, 0)
    """Decoder layers whose frozen weights live in host memory and pass through two slots on the
    device; each is recomputed.
    """
    mlp_tile_tokens: int = _at_least(0, 0)
    """The MLP runs in tiles of so many tokens, recomputed once more; 0: whole rows."""
    embedding: Literal["auto", "device", "cpu"] = "auto"
    """Where the input embedding lives; `auto`: in host memory beside a 4-bit base on a GPU, unless
    a 16-bit head shares it.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """[log]"""

    tracker: Literal["none", "tensorboard", "swanlab"] = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """[run]: where results go."""

    dir: str = "runs/demo"
    """If it exists, -2, -3, … is appended; nothing is overwritten."""
    snapshot_every: int = _at_least(0, 0)
    """Steps between snapshots for --resume; 0: at every evaluation."""
    snapshot_minutes: float = _at_least(0, 10.0)
    """Minutes after which a snapshot is due in any case; 0: never."""
    keep: int = _at_least(1, 2)
    """Snapshots kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole file. Programs hand each room its own section, never this."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    preference: PreferenceConfig = PreferenceConfig()
    eval: EvalConfig = EvalConfig()
    memory: MemoryConfig = MemoryConfig()
    log: LogConfig = LogConfig()
    run: RunConfig = RunConfig()


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read `path` (a file or `preset:NAME`), apply `section.key=value` overrides, check everything.

    Raises UserError listing every unknown key (with the nearest known one), wrong type and value
    out of range, each with file and line.
    """
    file, text = _read(str(path))
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = int((re.search(r"line (\d+)", str(error)) or [0, 0])[1])
        if "\\" in [*text.split("\n"), ""][line - 1]:
            raise UserError("config.backslash", where=f"{file}:{line}", detail=error) from error
        code = "config.syntax" if is_config(file) else "config.no_toml"
        raise UserError(code, path=file, detail=error) from error
    problems: list[str] = []
    where = {key: f"{file}:{line}" for key, line in key_lines(text).items()}
    for override in map(file_name, overrides):
        key, value = _override(override, problems)
        if key:
            *sections, name = key.split(".")
            table = tree
            for section in sections:
                if not isinstance(table.get(section), dict):
                    table[section] = {}
                table = table[section]
            table[name] = value
            where[key] = override
    train, preference = (tree.get(name, {}) for name in ("train", "preference"))
    tables = isinstance(train, dict) and isinstance(preference, dict)
    if tables and preference.get("loss", "none") != "none":
        tree["train"] = TRAIN_ON_PAIRS | train
    config: Config = build(
        Config,
        tree,
        "",
        lambda key: where.get(key) or where.get(key.rpartition(".")[0]) or file,
        problems,
    )
    if not problems:
        problems = _clashes(config, lambda key: where.get(key, file))
    if problems:
        raise UserError("config.invalid", count=len(problems), problems="\n  ".join(problems))
    return config


def _clashes(config: Config, where: Callable[[str], str]) -> list[str]:
    """What is wrong about settings that do not go together."""
    row = config.train.row_tokens
    problems: list[str] = []
    for key, path in _paths(config):
        if re.search(r"[\x00-\x1f]", path):  # such as the tab that "C:\temp" holds
            problems.append(say("config.backslash", where=where(key), detail=repr(path)))
    if 0 < config.train.tokens_per_step < row:
        problems.append(say("config.row", where=where("train.tokens_per_step"), row=row))
    if config.preference.active and config.train.learning_rate == "auto":
        problems.append(say("config.pairs_rate", where=where("train.learning_rate")))
    if config.data.replay and config.data.kind == "text" and not config.data.replay_from:
        problems.append(say("config.replay", where=where("data.replay")))
    if config.data.replay_from and not config.data.replay:
        problems.append(say("config.replay_from", where=where("data.replay_from")))
    if config.preference.active:
        for key, value in _WITH_PAIRS.items():
            section, _, name = key.partition(".")
            if getattr(getattr(config, section), name) != value:
                needed = to_json(value)
                problems.append(say("config.pairs", where=where(key), key=key, value=needed))
    if config.preference.loss == "orpo" and not config.preference.sft:
        problems.append(say("config.orpo", where=where("preference.loss")))
    return problems


def _paths(config: Config) -> list[tuple[str, str]]:
    """(key, path) of every setting that names a file or a folder."""
    data = config.data
    paths = [("data.train", source.path) for source in data.train]
    paths += [("data.eval", data.eval), ("data.replay_from", data.replay_from)]
    paths.append(("model.path", config.model.path))
    return [*paths, ("lora.init_from", config.lora.init_from), ("run.dir", config.run.dir)]


def is_config(name: str) -> bool:
    """Whether a command line names a config, not a model or a data file."""
    return name.startswith("preset:") or name.endswith(".toml")


def _read(path: str) -> tuple[str, str]:
    if path.startswith("preset:"):
        file = PRESETS / f"{path[7:]}.toml"
        if not file.is_file():
            raise UserError(
                "config.preset",
                name=path[7:],
                known=", ".join(sorted(p.stem for p in PRESETS.glob("*.toml"))),
            )
    else:
        file = Path(path)
        if file.is_dir():  # a run
            file /= "config.toml"
            path = str(file)
    try:
        return path, file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("config.unreadable", path=path, detail=error) from error


def _override(text: str, problems: list[str]) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        problems.append(say("config.override", text=text))
        return "", None
    return key.strip(), bare_value(kind_of(Config, key.strip()), value)


class Given(NamedTuple):
    """Which settings somebody chose, as "section.key"."""

    file: frozenset[str]
    words: frozenset[str]
    """By overrides."""


def given(path: str, overrides: Sequence[str]) -> Given:
    """What the config `path` says, and what overrides do; nothing of a data file."""
    file = key_lines(_read(path)[1]) if is_config(path) else ()
    return Given(frozenset(file), frozenset(word.partition("=")[0].strip() for word in overrides))


def differences(before: Config, after: Config) -> dict[str, str]:
    """`section.key` -> "old -> new" for every setting that differs."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    return {
        f"{s}.{k}": f"{old[s][k]!r} -> {value!r}"
        for s in new
        for k, value in new[s].items()
        if old[s][k] != value
    }


def to_toml(config: Config) -> str:
    """The effective configuration as TOML that `load_config` reads back to an equal value."""
    parts = []
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        lines = [
            f"{item.name} = {as_toml(getattr(values, item.name))}"
            for item in dataclasses.fields(values)
        ]
        parts.append("\n".join([f"[{section.name}]", *lines, ""]))
    return "\n".join(parts)
