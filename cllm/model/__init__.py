"""A frozen model with adapters: find it, load it, wrap it. Nothing here imports torch until it is
used.
"""

from typing import TYPE_CHECKING

from cllm import on_first_use

if TYPE_CHECKING:
    from cllm.model.adapter import load_adapter, save_adapter
    from cllm.model.checkpoint import load_model
    from cllm.model.lora import inject_lora, lora_strength, merge_lora
    from cllm.model.source import resolve
    from cllm.model.tokenizer import load_tokenizer

__all__ = [
    "inject_lora",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "lora_strength",
    "merge_lora",
    "resolve",
    "save_adapter",
]
_HOMES = {
    "load_adapter": "adapter",
    "load_model": "checkpoint",
    "load_tokenizer": "tokenizer",
    "resolve": "source",
    "save_adapter": "adapter",
}
__getattr__ = on_first_use(__name__, dict.fromkeys(__all__, "lora") | _HOMES)
