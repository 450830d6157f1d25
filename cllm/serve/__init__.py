"""Answering: a run or a bare model opened once, decoded by the engine, read by eval, the terminal,
the page and the API.
"""

from typing import TYPE_CHECKING

from cllm import on_first_use

if TYPE_CHECKING:
    from cllm.serve.load import Loaded, open_beside, open_model

__all__ = ["Loaded", "open_beside", "open_model"]
__getattr__ = on_first_use(__name__, dict.fromkeys(__all__, "load"))
