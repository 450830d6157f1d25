"""The TOML file as typed, frozen sections; `section.key=value` overrides; every mistake found is
reported at once.

Each field's comment is its documentation; `cllm.toml` shows all of them with their defaults (a test
compares the two).
"""

# No `from __future__ import annotations`: Pydantic evaluates the annotations.
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from cllm.messages import UserError, file_name, say, to_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "assets" / "presets"
# What a preference loss takes: whole answers, and two passes that agree.
_WITH_PAIRS = {"data.kind": "chat", "data.truncate": "drop", "lora.dropout": 0.0}


Quantize = Literal["none", "nf4"]
PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]
BOUNDS = {"greater_than": ">", "greater_than_equal": "≥", "less_than_equal": "≤"}
TYPES = {"model": "table", "tuple": "string or [[tables]]"}  # where Pydantic's name is not TOML's
RowTokens = Annotated[int, Field(ge=8)]


class Section(BaseModel):
    """A table of the file. No value is converted from another type, but int to float."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ModelConfig(Section):
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


class LoraConfig(Section):
    """[lora]: the adapter."""

    rank: PositiveInt = 16
    alpha: NonNegativeFloat = 32.0
    """Scale: the update is alpha / rank * B A."""
    dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    targets: str | list[str] = "all-linear"
    """`all-linear` (all but the head), or module names and globs."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    dora: bool = False
    """Learn the magnitude of each output row too."""
    plus_ratio: NonNegativeFloat = 1.0
    """LoRA+: the learning rate of B over that of A."""
    init_from: str = ""
    """A run (or adapter directory) to continue from; rank, alpha and targets are then its own."""


class Source(Section):
    """[[data.train]]: one file (or folder) of a mixture."""

    path: str = ""
    weight: NonNegativeFloat = 1.0
    """How often each conversation is seen per epoch; 0.5: every second one."""
    columns: dict[str, str] = {}


def _tables(value: Any) -> Any:
    """data.train as a tuple of tables, where it is the name of a file or a list of such."""
    rows = [value] if isinstance(value, str) else value
    if not isinstance(rows, list):
        return value
    return tuple({"path": row} if isinstance(row, str) else row for row in rows)


class DataConfig(Section):
    """[data]: what is learned from."""

    train: Annotated[tuple[Source, ...], BeforeValidator(_tables)] = (Source(path="demo"),)
    """A file, a folder, the built-in `demo`, or [[data.train]] tables with path, weight,
    columns.
    """
    eval: str = ""
    """Held-out file; empty: `held_out` of the training conversations are split off."""
    held_out: Annotated[float, Field(ge=0, le=0.9)] = 0.05
    """Fraction split off by content hash when `eval` is empty; 0: no evaluation."""
    columns: dict[str, str] = {}
    """Where the file's own names need help: user, assistant, system, history = a column (name or
    number) or "{A} … {B}".
    """
    kind: Literal["chat", "text"] = "chat"
    """`text`: continued pre-training on {"text": …} rows."""
    truncate: Literal["drop", "prompt"] = "drop"
    """Longer than a row: drop (and count), or cut the prompt from its start; the answer and its end
    token are never cut.
    """
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


class TrainConfig(Section):
    """[train]: the loop."""

    epochs: NonNegativeFloat = 3.0
    steps: NonNegativeInt = 0
    """Optimizer steps; 0: as many as `epochs` needs."""
    row_tokens: RowTokens = 2048
    """Length of a packed row = the micro-batch; also the longest sample."""
    tokens_per_step: RowTokens = 8192
    """Tokens of one optimizer step, accumulated over rows."""
    learning_rate: NonNegativeFloat = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the steps with a rising rate."""
    weight_decay: NonNegativeFloat = 0.0
    max_norm: NonNegativeFloat = 1.0
    """Gradient clipping; 0: off."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit`: AdamW's two moments in 8 bits, a quarter of their memory."""
    seed: NonNegativeInt = 42


class PreferenceConfig(Section):
    """[preference]: learning from pairs of answers, or from votes on single ones."""

    loss: Literal["none", "dpo", "ipo", "robust", "hinge", "orpo", "simpo", "apo_zero_unpaired"] = (
        "none"
    )
    """`none`: answers are learned (of a pair the chosen one). `apo_zero_unpaired` takes votes on
    single answers too; `cllm.learn.preference_loss` has the formulas.
    """
    beta: PositiveFloat = 0.1
    """How much a log-probability counts; of DPO: how near the model stays to what it was."""
    label_smoothing: Annotated[float, Field(ge=0, le=0.49)] = 0.0
    """`dpo`, `robust`: the share of pairs that may be the wrong way round."""
    sft: NonNegativeFloat = 0.0
    """Weight of the chosen answers' loss per token beside it; ORPO's own is 1."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """What tokens beyond the shorter answer's length count; under 1 against ever longer answers."""
    gamma: NonNegativeFloat = 0.5
    """`simpo`: the margin that is asked for."""

    @property
    def active(self) -> bool:
        """Whether pairs or votes are learned from, and not answers."""
        return self.loss != "none"


class EvalConfig(Section):
    """[eval]: the held-out set, during and after training."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0: five times a run."""
    patience: NonNegativeInt = 0
    """Stop after so many evaluations without a lower loss; 0: never."""
    samples: NonNegativeInt = 200
    """Held-out conversations answered for the table at the end; 0: no generation."""
    shots: NonNegativeInt = 0
    """Also answer with the base given so many training examples in the prompt."""
    max_new_tokens: PositiveInt = 256


class MemoryConfig(Section):
    """[memory]: what may be used."""

    budget_gib: NonNegativeFloat = 0.0
    """GPU memory that the run may take; 0: what the card has free."""
    checkpoint_layers: Annotated[int, Field(ge=-1)] = -1
    """Decoder layers recomputed in the backward: -1 as few as the budget allows (all without one),
    0 none (fastest).
    """
    chunk_mib: PositiveInt = 128
    """Logits alive at once in the loss."""
    offload_inputs: bool = False
    """Inputs of recomputed layers wait in host memory."""
    stream_layers: NonNegativeInt = 0
    """Decoder layers whose frozen weights live in host memory and pass through two slots on the
    device; each is recomputed.
    """
    mlp_tile_tokens: NonNegativeInt = 0
    """The MLP runs in tiles of so many tokens, recomputed once more; 0: whole rows."""
    embedding: Literal["auto", "device", "cpu"] = "auto"
    """Where the input embedding lives; `auto`: in host memory beside a 4-bit base on a GPU, unless
    a 16-bit head shares it.
    """


class LogConfig(Section):
    """[log]"""

    tracker: Literal["none", "tensorboard", "swanlab"] = "none"


class RunConfig(Section):
    """[run]: where results go."""

    dir: str = "runs/demo"
    """If it exists, -2, -3, … is appended; nothing is overwritten."""
    snapshot_every: NonNegativeInt = 0
    """Steps between snapshots for --resume; 0: at every evaluation."""
    snapshot_minutes: NonNegativeFloat = 10.0
    """Minutes after which a snapshot is due in any case; 0: never."""
    keep: PositiveInt = 2
    """Snapshots kept."""


class Config(Section):
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


def is_config(name: str) -> bool:
    """Whether a command line names a config, not a model or a data file."""
    return name.startswith("preset:") or name.endswith(".toml")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read `path` (a file or `preset:NAME`), apply `section.key=value` overrides, check everything.

    Raises UserError listing every unknown key (with the nearest known one), wrong type and value
    out of range, each with file and line.
    """
    file, text = _read(str(path))
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError("config.syntax", path=file, detail=error) from error
    problems: list[str] = []
    where = {key: f"{file}:{line}" for key, line in _key_lines(text).items()}
    for override in map(file_name, overrides):
        key, value = _override(override, problems)
        if key:
            section, _, name = key.partition(".")
            if not isinstance(tree.get(section), dict):
                tree[section] = {}
            tree[section][name] = value
            where[key] = override
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        told = {}  # by key, because each alternative of a type has an error of its own
        for problem in error.errors():
            names = (part for part in problem["loc"] if isinstance(part, str))
            key = ".".join(name for name in names if name not in ("str", "list[str]"))
            place = where.get(key) or where.get(key.rpartition(".")[0]) or file
            told[key] = _told(place, key, problem)
        problems += told.values()
    if not problems:
        problems = _clashes(config, lambda key: where.get(key, file))
    if problems:
        raise UserError("config.invalid", count=len(problems), problems="\n  ".join(problems))
    return config


def _clashes(config: Config, where: Callable[[str], str]) -> list[str]:
    """What is wrong about settings that do not go together."""
    row = config.train.row_tokens
    problems: list[str] = []
    if config.train.tokens_per_step < row:
        problems.append(say("config.row", where=where("train.tokens_per_step"), row=row))
    if config.preference.active:
        for key, value in _WITH_PAIRS.items():
            section, _, name = key.partition(".")
            if getattr(getattr(config, section), name) != value:
                problems.append(
                    say("config.pairs", where=where(key), key=key, value=to_json(value))
                )
    if config.preference.loss == "orpo" and not config.preference.sft:
        problems.append(say("config.orpo", where=where("preference.loss")))
    return problems


def _read(path: str) -> tuple[str, str]:
    if path.startswith("preset:"):
        file = PRESETS / f"{path[7:]}.toml"
        if not file.is_file():
            known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.toml")))
            raise UserError("config.preset", name=path[7:], known=known)
    else:
        file = Path(path)
    try:
        return path, file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        detail = getattr(error, "strerror", None) or error
        raise UserError("config.unreadable", path=path, detail=detail) from error


def _key_lines(text: str) -> dict[str, int]:
    """Dotted key -> its line; tomllib itself keeps none."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.split("\n"), 1):
        if match := re.match(r"\s*\[\[?\s*([\w.\-]+)\s*\]\]?", line):
            section = match[1]
            lines.setdefault(section, number)
        elif match := re.match(r"\s*([\w.\-\"]+)\s*=", line):
            name = match[1].replace('"', "")
            lines[f"{section}.{name}" if section else name] = number
    return lines


def _override(text: str, problems: list[str]) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        problems.append(say("config.override", text=text))
        return "", None
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value  # an unquoted string


def _told(where: str, key: str, problem: Any) -> str:
    """One of Pydantic's errors in our words."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        tables = {"": Config(), **dict(Config()), "data.train": Source()}
        table, _, name = key.rpartition(".")
        known = [part for part, _ in tables[table]]
        near = difflib.get_close_matches(name, known, 1, 0.5)
        names = ", ".join(known)
        hint = say("config.nearest", name=near[0]) if near else say("config.known", names=names)
        return say("config.unknown", where=where, key=key, hint=hint)
    if kind in BOUNDS:
        bounds = f"{BOUNDS[kind]} {next(iter(context.values()))}"
        return say("config.range", where=where, key=key, value=value, bounds=bounds)
    kind = kind.removesuffix("_type")
    expected = context.get("expected") or TYPES.get(kind, kind)
    return say("config.type", where=where, key=key, expected=expected, found=repr(value))


def differences(before: Config, after: Config) -> dict[str, str]:
    """`section.key` -> "old -> new" for every setting that differs."""
    return {
        f"{name}.{key}": f"{old!r} -> {new!r}"
        for name, section in after
        for key, new in section
        if (old := getattr(getattr(before, name), key)) != new
    }


def to_toml(config: Config) -> str:
    """The effective configuration as TOML that `load_config` reads back to an equal value."""
    lines = []
    for name, section in config:
        lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in section), ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool | str):
        # the one character that only TOML escapes
        return to_json(value).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        pairs = ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return (
        _toml(value.model_dump(exclude_defaults=True)) if isinstance(value, Source) else repr(value)
    )
