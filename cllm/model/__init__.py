"""A frozen model with adapters: find it, load it, wrap it. Nothing here imports torch until it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cllm.model.checkpoint import load_model
    from cllm.model.lora import disable_lora, inject_lora, load_adapter, merge_lora, save_adapter
    from cllm.model.source import resolve
    from cllm.model.tokenizer import load_tokenizer

__all__ = ["disable_lora", "inject_lora", "load_adapter", "load_model", "load_tokenizer", "merge_lora", "resolve", "save_adapter"]

_HOMES = {"load_model": "checkpoint", "load_tokenizer": "tokenizer", "resolve": "source"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'lora')}"), name)
