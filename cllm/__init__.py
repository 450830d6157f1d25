"""cllm: LoRA and QLoRA fine-tuning of Chinese language models on one 8 GB GPU, in plain PyTorch."""

from collections.abc import Callable, Mapping
from typing import Any

__version__ = "0.1.0"


def on_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562) that imports its names when they are first used; homes:
    name -> module.
    """

    def load(name: str) -> Any:
        from importlib import import_module

        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load
