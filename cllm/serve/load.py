"""A run, an adapter directory or a bare model -> one copy of the weights with its tokenizer, ready to answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from cllm.config import ModelConfig, load_config
from cllm.learn.optim import Precision
from cllm.messages import UserError
from cllm.model.checkpoint import load_model
from cllm.model.lora import CONFIG_FILE, load_adapter
from cllm.model.source import resolve
from cllm.model.tokenizer import Tokenizer, load_tokenizer, with_trained_end
from cllm.serve.engine import Engine


class Loaded(NamedTuple):
    """One copy of the weights, with the adapter injected if there is one (gate 0 is the base)."""

    model: nn.Module
    tokenizer: Tokenizer
    home: Path | None
    """The run's directory (or the adapter's, if it stands alone); None: a bare model."""
    base_name: str
    precision: Precision

    @property
    def adapter_name(self) -> str | None:
        """What clients call the adapter: its run's name."""
        return self.home.name if self.home else None

    def engine(self) -> Engine:
        """The engine for this model, with its stop ids and its number format."""
        stop_ids, pad_id = self.tokenizer.stop_ids, self.tokenizer.pad_id
        return Engine(self.model, stop_ids=stop_ids, pad_id=pad_id, autocast=self.precision.autocast)


def open_model(name: str | Path, *, precision: str = "", device: str = "auto", quantize: str = "") -> Loaded:
    """Open a run directory, an adapter directory (ours or PEFT's) or a bare model (`tiny-zh`, a path, a hub name).

    A run is opened as it was trained (`[model]` of its config.toml) unless `precision` or `quantize` say otherwise;
    anything else in "auto" precision, not quantized. Raises UserError for a run without an adapter and for an adapter
    without a base, and what loading raises.
    """
    run = Path(name)
    is_run = (run / "config.toml").is_file()
    config = load_config(run / "config.toml").model if is_run else ModelConfig()
    folder = next((path for path in (run / "adapter", run) if (path / CONFIG_FILE).is_file()), None)
    if is_run and folder is None:
        raise UserError("run.no_adapter", run=run)
    base_name = str(name)
    if folder is not None:
        base_name = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
        if not base_name:
            raise UserError("adapter.no_base", path=folder / CONFIG_FILE)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = Precision.choose(precision or config.precision, device)
    base = resolve(base_name)
    quantized = "nf4" if (quantize or config.quantize) == "nf4" else None
    model = load_model(base, dtype=chosen.weights, device=device, quantize=quantized)
    if folder is not None and any(folder.glob("*token*")):
        tokenizer = load_tokenizer(folder)  # with the template it was trained with, whatever a config says
    else:
        tokenizer = load_tokenizer(base, template=config.template, thinking=config.thinking)
        tokenizer = tokenizer if folder else with_trained_end(tokenizer, model)
    chosen.prepare(model)
    if folder is not None:
        load_adapter(model, folder, dropout=0.0)
        folder = folder.resolve().parent if folder.name == "adapter" else folder.resolve()
    return Loaded(model.eval(), tokenizer, folder, base_name, chosen)
