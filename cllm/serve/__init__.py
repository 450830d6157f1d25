"""Answering: a run or a bare model opened once, decoded by the engine, read by eval, the terminal, the page and the API."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cllm.serve.load import Loaded, open_beside, open_model

__all__ = ["Loaded", "open_beside", "open_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.load"), name)
