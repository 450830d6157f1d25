"""A run, an adapter directory or a bare model -> one copy of the weights with its tokenizer, ready
to answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from cllm.config import ModelConfig, load_config
from cllm.learn.optim import Precision
from cllm.messages import UserError
from cllm.model.adapter import CONFIG_FILE, load_adapter, load_beside
from cllm.model.checkpoint import load_model, open_checkpoint, split_rows
from cllm.model.source import resolve
from cllm.model.tokenizer import Tokenizer, load_tokenizer, with_trained_end
from cllm.serve.engine import Engine


class Loaded(NamedTuple):
    """One copy of the weights, frozen, with the adapter injected if there is one (gate 0 is the
    base).
    """

    model: nn.Module
    tokenizer: Tokenizer
    home: Path | None
    """The run's directory (or the adapter's, if it stands alone); None: a bare model."""
    base_name: str
    precision: Precision

    beside: tuple[Path, ...] = ()
    """Directories of further adapters of the same base."""

    @property
    def adapters(self) -> dict[str, Path]:
        """What clients call an adapter, its run's name, and its directory; in the order of the
        gates' numbers.
        """
        homes = [*filter(None, [self.home]), *self.beside]
        taken = ["base", *(home.name for home in homes)]
        return {
            f"{home.name}-{i}" if home.name in taken[:i] else home.name: home
            for i, home in enumerate(homes, 1)
        }

    @property
    def models(self) -> dict[str, int]:
        """Name of every adapter, and of the base, and the number that the engine knows it by."""
        return {**{name: i for i, name in enumerate(self.adapters, 1)}, "base": 0}

    @property
    def adapter_name(self) -> str | None:
        """The first adapter's."""
        return next(iter(self.adapters), None)

    def engine(self) -> Engine:
        """The engine for this model, with its stop ids and its number format."""
        stop_ids, pad_id = self.tokenizer.stop_ids, self.tokenizer.pad_id
        return Engine(
            self.model, stop_ids=stop_ids, pad_id=pad_id, autocast=self.precision.autocast
        )


class Located(NamedTuple):
    """What a name stands for: `[model]` of the run (else the defaults), the adapter's directory if
    any, the base it stands on.
    """

    config: ModelConfig
    adapter: Path | None
    base_name: str


def locate(name: str | Path) -> Located:
    """A run directory, an adapter directory (ours or PEFT's) or a bare model (`tiny-zh`, a path, a
    hub name); nothing is loaded.

    Raises UserError for a run without an adapter and for an adapter without a base.
    """
    run = Path(name)
    is_run = (run / "config.toml").is_file()
    config = load_config(run / "config.toml").model if is_run else ModelConfig()
    folder = next((path for path in (run / "adapter", run) if (path / CONFIG_FILE).is_file()), None)
    if is_run and folder is None:
        raise UserError("run.no_adapter", run=run)
    if folder is None:
        return Located(config, None, str(name))
    base_name = (
        json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get(
            "base_model_name_or_path"
        )
        or ""
    )
    if not base_name:
        raise UserError("adapter.no_base", path=folder / CONFIG_FILE)
    return Located(config, folder, base_name)


def open_tokenizer(found: Located) -> Tokenizer:
    """The adapter's tokenizer, with the template it was trained with, whatever a config says; else
    the base's.
    """
    if found.adapter is not None and any(found.adapter.glob("*token*")):
        return load_tokenizer(found.adapter)
    return load_tokenizer(
        resolve(found.base_name), template=found.config.template, thinking=found.config.thinking
    )


def open_model(
    name: str | Path,
    *,
    precision: str = "",
    device: str = "auto",
    quantize: str = "",
    adapter: bool = True,
) -> Loaded:
    """Open what `locate` finds. A run is opened as it was trained unless `precision` or `quantize`
    (of the base; its head is then 16-bit) say otherwise; anything else in "auto" precision, not
    quantized. adapter=False: its base alone, with its tokenizer. Raises UserError as `locate`, and
    what loading raises.
    """
    found = locate(name)
    config, folder = found.config, found.adapter
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = Precision.choose(precision or config.precision, device)
    tokenizer = open_tokenizer(found)
    base = resolve(found.base_name)
    quantized = "nf4" if (quantize or config.quantize) == "nf4" else None
    model = load_model(
        base,
        dtype=chosen.weights,
        device=device,
        quantize=quantized,
        head="16bit" if quantize else config.head,
    )
    tokenizer = tokenizer if folder else with_trained_end(tokenizer, model)
    chosen.prepare(model)
    if folder is not None:
        if adapter:
            load_adapter(model, folder, dropout=0.0, split=split_rows(open_checkpoint(base)))
        folder = folder.resolve().parent if folder.name == "adapter" else folder.resolve()
    return Loaded(model.eval().requires_grad_(False), tokenizer, folder, found.base_name, chosen)


def open_beside(loaded: Loaded, name: str | Path) -> Loaded:
    """One more adapter over the same copy of the weights. Raises UserError unless it has the same
    base and the same template.
    """
    found = locate(name)
    if (
        found.adapter is None
        or loaded.home is None
        or resolve(found.base_name) != resolve(loaded.base_name)
    ):
        raise UserError("serve.beside", name=name, base=found.base_name, other=loaded.base_name)
    if open_tokenizer(found).template != loaded.tokenizer.template:
        raise UserError("serve.beside_template", name=name)
    split = split_rows(open_checkpoint(resolve(found.base_name)))
    load_beside(loaded.model, found.adapter, dropout=0.0, split=split)
    home = found.adapter.resolve()
    return loaded._replace(
        model=loaded.model.eval(),
        beside=(*loaded.beside, home.parent if home.name == "adapter" else home),
    )
