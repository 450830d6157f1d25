"""A model put together for one device, by one function for every program: number format, budget,
plan, base, adapter, placement and tokenizer. And runs, adapters and bare models opened with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cllm.config import LoraConfig, MemoryConfig, ModelConfig, PrecisionName, Quantize, load_config
from cllm.fit import plan_answering, plan_training
from cllm.memory import Settings, VramEstimate
from cllm.messages import UserError, note
from cllm.model.adapter import (
    CONFIG_FILE,
    Split,
    adapter_config,
    load_adapter,
    load_beside,
    read_adapter,
)
from cllm.model.attention import packs
from cllm.model.checkpoint import (
    Placement,
    load_model,
    open_checkpoint,
    original_config,
    random_model,
    split_rows,
)
from cllm.model.device import Precision, cap_allocator, choose_device, out_of_memory, release_memory
from cllm.model.head import check_head
from cllm.model.lora import inject_lora
from cllm.model.offload import place
from cllm.model.source import resolve
from cllm.model.tokenizer import Tokenizer, load_tokenizer, with_trained_end, within
from cllm.runs import refuse_missing
from cllm.serve.engine import Engine

PREFILL_TOKENS = 2048
"""Prompt tokens that are computed at once: what the plan for answering leaves room for."""
EVERY_LAYER = 10**6


@dataclass(frozen=True)
class Assembly:
    """A model ready to learn or to answer, and how it was put together."""

    model: Any
    """A Transformers causal LM with "cllm" attention and, if there is one, its adapter."""
    tokenizer: Tokenizer | None
    """None for random weights."""
    device: torch.device
    """Where the model computes; a GPU with its index."""
    precision: Precision
    settings: Settings
    """Where each part lives, [memory]'s automatic values decided."""
    plan: VramEstimate | None
    """None without a budget, or for an architecture that cannot be planned."""
    budget: int
    """Bytes of the device that may be taken; 0: no limit, as on a CPU."""
    packed: bool
    """Whether sequences may share a row, as far as it is to be trained on rows."""
    context: int = 0
    """Tokens that an engine's cache may hold; 0: as many as fit."""

    def engine(self) -> Engine:
        """The engine for this model, with its stop ids, its number format and its context."""
        known = self.tokenizer
        engine = Engine(
            self.model,
            stop_ids=known.stop_ids if known else frozenset(),
            pad_id=known.pad_id if known else 0,
            autocast=self.precision.autocast,
        )
        if self.context:
            engine.kv_tokens = self.context + engine.row_tokens
        return engine


class Adapter(NamedTuple):
    """Which adapter a model gets."""

    lora: LoraConfig | None
    """What it is like; of a stored one its very layers."""
    folder: Path | None = None
    """Where its weights are."""
    split: Split | None = None
    """How its names on the original checkpoint become native ones."""


def adapter_of(adapter: LoraConfig | Path | None, source: Path | dict[str, Any]) -> Adapter:
    """[lora] for a new adapter (or the one that it continues from), or the one in a folder, for the
    base `source`. Raises UserError as `read_adapter`.
    """
    if adapter is None or (isinstance(adapter, LoraConfig) and not adapter.init_from):
        return Adapter(adapter)
    run, dropout = (
        (adapter, 0.0) if isinstance(adapter, Path) else (Path(adapter.init_from), adapter.dropout)
    )
    folder = run / "adapter" if (run / "adapter").is_dir() else run
    split = split_rows(open_checkpoint(source)) if isinstance(source, Path) else None
    settings, layers = read_adapter(folder, split)
    targets = sorted(layers)
    lora = LoraConfig(rank=settings.rank, dropout=dropout, dora=settings.dora, targets=targets)
    return Adapter(lora, folder, split)


def assemble(
    source: Path | dict[str, Any],
    model: ModelConfig,
    memory: MemoryConfig,
    *,
    device: torch.device | str = "",
    adapter: LoraConfig | Path | None = None,
    row_tokens: int = 0,
    optimizer: str = "adamw",
    tokenizer: Tokenizer | None = None,
    name: str = "",
    seed: int = 0,
    context: int = 0,
    formats: Sequence[Quantize] = (),
) -> Assembly:
    """Put the checkpoint `source` (a dict: random weights of that config.json) together.

    device: default [model]'s. adapter: [lora] for a new one (or the one that it continues from), a
    folder for a trained one. row_tokens: to be trained on rows of so many tokens with `optimizer`;
    0: to answer, with at most `context` tokens in the cache (0: as many as fit). `name` is what
    messages call the model, `seed` decides what is random. formats: see `plan_answering`.

    What does not fit the budget on paper is refused before weights are read (training), or held in
    host memory (answering); memory that runs out all the same moves layers to the host. Raises
    UserError, also as `choose_device`, `load_model` and `load_adapter` do.
    """
    target = choose_device(device or model.device)
    precision = Precision.choose(model.precision, target)
    budget = cap_allocator(memory.budget_gib, target)
    chosen = adapter_of(adapter, source)
    settings = Settings.of(
        model,
        memory,
        chosen.lora,
        row_tokens=row_tokens or PREFILL_TOKENS,
        precision=precision.name,
        device=target.type,
        optimizer=optimizer,
    )
    original = source if isinstance(source, dict) else original_config(source)
    if tokenizer is not None and isinstance(source, Path):
        tokenizer = within(tokenizer, open_checkpoint(source).config.vocab_size)
    plan = None
    if budget:
        try:
            if row_tokens:
                settings, plan = plan_training(original, name or model.path, settings, budget)
            else:
                settings, plan = plan_answering(original, settings, budget, context, formats)
        except UserError as error:
            # It only runs with values: its longest row is tried before the first step.
            if error.code != "memory.untraced":
                raise
            note("memory.unplanned", name=name or model.path, reason=error.args[0])
    torch.manual_seed(seed)
    built, settings = _build(source, chosen, settings, precision, target)
    if tokenizer is not None and not isinstance(adapter, Path):
        tokenizer = with_trained_end(tokenizer, built)
    packed = bool(row_tokens) and _rows_may_be_shared(built, precision)
    return Assembly(built, tokenizer, target, precision, settings, plan, budget, packed, context)


def _rows_may_be_shared(model: Any, precision: Precision) -> bool:
    """Raises UserError for a model whose logits are not its head's."""
    # Adapters are made in training mode, and dropout would look like an unknown head.
    model.eval()
    with precision.autocast():
        check_head(model)
        shared = packs(model)
    if not shared:
        note("train.single", architecture=type(model).__name__)
    return shared


def _build(
    source: Path | dict[str, Any],
    adapter: Adapter,
    settings: Settings,
    precision: Precision,
    device: torch.device,
) -> tuple[Any, Settings]:
    """The placed model, and the settings that it took: out of memory, once more with everything in
    host memory that can wait there.
    """
    try:
        return _load(source, adapter, settings, precision, device), settings
    except Exception as error:
        if not out_of_memory(error):
            raise
        detail = str(error).split("\n")[0] or type(error).__name__
        on_device = isinstance(error, torch.OutOfMemoryError)
    # Outside of the handler: the traceback holds on to the tensors that were in the way.
    release_memory()
    least = replace(settings, stream_layers=EVERY_LAYER, embedding="cpu")
    if not on_device or settings == least:
        raise UserError("memory.load", detail=detail)
    note("memory.load_step_down", detail=detail)
    return _build(source, adapter, least, precision, device)


def _load(
    source: Path | dict[str, Any],
    adapter: Adapter,
    settings: Settings,
    precision: Precision,
    device: torch.device,
) -> Any:
    """Read -> convert -> quantize -> inject -> place."""
    read: Any = random_model if isinstance(source, dict) else load_model
    model = read(
        source,
        Placement(
            precision.weights,
            device,
            settings.quantize,
            settings.head,
            settings.stream_layers,
            settings.embedding,
        ),
    )
    if adapter.lora:
        _add_adapter(model, adapter, adapter.lora)
    else:
        model.requires_grad_(False)  # it only answers; what is frozen can wait in host memory
    precision.prepare(model)
    place(model, settings, device)
    return model


def _add_adapter(model: Any, adapter: Adapter, lora: LoraConfig) -> None:
    if adapter.folder:
        load_adapter(model, adapter.folder, dropout=lora.dropout, split=adapter.split)
        return
    inject_lora(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        rslora=lora.rslora,
        dora=lora.dora,
    )


# --- Runs, adapters and bare models


@dataclass(frozen=True)
class Loaded:
    """One copy of the weights, frozen, with its adapters injected (gate 0 is the base)."""

    assembly: Assembly
    home: Path | None
    """The run's directory (or the adapter's, if it stands alone); None: a bare model."""
    base_name: str
    beside: list[Path] = field(default_factory=list)
    """Directories of further adapters of the same base, which `open_beside` adds to."""

    @property
    def model(self) -> Any:
        return self.assembly.model

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.assembly.tokenizer is not None
        return self.assembly.tokenizer

    @property
    def precision(self) -> Precision:
        return self.assembly.precision

    @property
    def adapters(self) -> dict[str, Path]:
        """What clients call an adapter, its run's name, and its directory; in the order of the
        gates' numbers.
        """
        homes = [*filter(None, [self.home]), *self.beside]
        taken = ["base", *(home.name for home in homes)]
        numbered = enumerate(homes, 1)
        return {
            f"{home.name}-{i}" if home.name in taken[:i] else home.name: home
            for i, home in numbered
        }

    @property
    def models(self) -> dict[str, int]:
        """Name of every adapter, and of the base, and the number that the engine knows it by."""
        return {**{name: i for i, name in enumerate(self.adapters, 1)}, "base": 0}

    def engine(self) -> Engine:
        """The engine for this model, with its stop ids and its number format."""
        return self.assembly.engine()


class Located(NamedTuple):
    """What a name stands for."""

    model: ModelConfig
    """[model] of the run, else the defaults."""
    memory: MemoryConfig
    """[memory] of the run, else the defaults."""
    adapter: Path | None
    """The adapter's directory, if there is one."""
    base_name: str

    def base(self) -> Path:
        """Where the base is, by `resolve`; an error says which adapter names it."""
        try:
            return resolve(self.base_name)
        except UserError as error:
            if self.adapter is None:
                raise
            file = self.adapter / CONFIG_FILE
            raise UserError(
                "adapter.base", path=file, name=self.base_name, reason=error.args[0]
            ) from error


def locate(name: str | Path) -> Located:
    """A run directory, an adapter directory (ours or PEFT's) or a bare model (`tiny-zh`, a path, a
    hub name); nothing is loaded.

    Raises UserError for a run without an adapter and for an adapter without a base.
    """
    run = Path(name)
    model, memory = ModelConfig(), MemoryConfig()
    is_run = (run / "config.toml").is_file()
    if is_run:
        config = load_config(run / "config.toml")
        model, memory = config.model, config.memory
    folders = (path for path in (run / "adapter", run) if (path / CONFIG_FILE).is_file())
    folder = next(folders, None)
    if is_run and folder is None:
        raise UserError("run.no_adapter", run=run)
    if folder is None:
        refuse_missing(run)  # a mistyped run is not asked of hubs
        return Located(model, memory, None, str(name))
    base_name = adapter_config(folder).get("base_model_name_or_path") or ""
    if not base_name:
        raise UserError("adapter.no_base", path=folder / CONFIG_FILE)
    return Located(model, memory, folder, base_name)


def open_tokenizer(located: Located) -> Tokenizer:
    """The adapter's tokenizer, with the template it was trained with, whatever a config says; else
    the base's.
    """
    if located.adapter is not None and any(located.adapter.glob("*token*")):
        return load_tokenizer(located.adapter)
    template, thinking = located.model.template, located.model.thinking
    return load_tokenizer(located.base(), template=template, thinking=thinking)


def open_model(
    name: str | Path,
    *,
    precision: PrecisionName | None = None,
    device: torch.device | str = "",
    quantize: Quantize | None = None,
    memory: MemoryConfig | None = None,
    adapter: bool = True,
    context: int = 0,
    formats: Sequence[Quantize] = (),
) -> Loaded:
    """Open what `locate` finds, under the same [memory] and budget as it was trained (or under
    `memory`).

    A run is opened as it was trained unless `precision`, `device` or `quantize` (of the base; its
    head is then 16-bit) say otherwise; anything else in "auto" precision, not quantized or, on a
    budget, in the first of `formats` that fits. adapter=False: its base alone, with its tokenizer.
    Raises UserError as `locate` and `assemble`.
    """
    located = locate(name)
    model = located.model
    if precision:
        model = replace(model, precision=precision)
    if quantize:
        model = replace(model, quantize=quantize, head="16bit")
    assembly = assemble(
        located.base(),
        model,
        memory or located.memory,
        device=_device_here(device or model.device),
        adapter=located.adapter if adapter else None,
        tokenizer=open_tokenizer(located),
        name=located.base_name,
        context=context,
        formats=() if located.adapter else formats,
    )
    assembly.model.eval().requires_grad_(False)
    return Loaded(assembly, _home(located.adapter), located.base_name)


def _device_here(name: torch.device | str) -> torch.device:
    """The device, or the best one here where this machine lacks the one that a run names."""
    try:
        return choose_device(name)
    except UserError as error:
        note("memory.other_device", reason=error.args[0])
        return choose_device("auto")


def _home(adapter: Path | None) -> Path | None:
    if adapter is None:
        return None
    folder = adapter.resolve()
    return folder.parent if folder.name == "adapter" else folder


def open_beside(loaded: Loaded, name: str | Path) -> None:
    """One more adapter over the same copy of the weights; not while an engine takes a step
    (`Engine.paused`). Raises UserError unless it has the same base and the same template.
    """
    located = locate(name)
    base = located.base()
    home = _home(located.adapter)
    if not (located.adapter and home and loaded.home) or base != resolve(loaded.base_name):
        raise UserError("serve.beside", name=name, base=located.base_name, other=loaded.base_name)
    if open_tokenizer(located).template != loaded.tokenizer.template:
        raise UserError("serve.beside_template", name=name)
    split = split_rows(open_checkpoint(base))
    load_beside(loaded.model, located.adapter, dropout=0.0, split=split)
    loaded.model.eval()
    loaded.beside.append(home)
