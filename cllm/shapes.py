"""The config.json of models by name, without their weights: their sizes are kept for published
ones, and fetched for any other that a hub serves.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cllm.messages import UserError, read_json
from cllm.model.source import resolve

SHAPES = Path(__file__).parent / "assets" / "shapes.json"
DISTILLED = {
    "deepseek-r1-distill-qwen-7b": "qwen2.5-7b",
    "deepseek-r1-distill-qwen-14b": "qwen2.5-14b",
    "deepseek-r1-distill-qwen-32b": "qwen2.5-32b",
    "deepseek-r1-distill-llama-8b": "llama-3.1-8b",
    "deepseek-r1-0528-qwen3-8b": "qwen3-8b",
}
"""Models with every size of their base; the 1.5B one has a head of its own, which its base has
not.
"""


def find_config(name: str) -> tuple[str, dict[str, Any]]:
    """(name, config) of a checkpoint directory or config.json, of a published model by its name,
    whoever its owner, or of any other model as a hub has it.

    Raises UserError, with the nearest published names, where no hub serves it.
    """
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        return name, read_json(file)
    if found := published(name):
        return found
    try:
        return name, read_json(resolve(name, only="config.json") / "config.json")
    except UserError as error:
        stems = _stems(read_json(SHAPES))
        near = difflib.get_close_matches(_stem(name), stems, 3, 0.0)
        nearest = ", ".join(map(stems.__getitem__, near))
        raise UserError("memory.name", name=name, near=nearest, reason=error.args[0]) from error


def published(name: str) -> tuple[str, dict[str, Any]] | None:
    """(name, config) of a published model by its name, whoever its owner, without a hub."""
    shapes: dict[str, dict[str, Any]] = read_json(SHAPES)
    known = _stems(shapes).get(_stem(name))
    return (known, shapes[known]) if known else None


def _stems(names: Iterable[str]) -> dict[str, str]:
    return {_stem(known): known for known in names}


def _stem(name: str) -> str:
    """Owners move, and chat models have their base's shape: neither counts."""
    last = re.split("[:/]", name)[-1].lower()
    stem = re.sub(r"(-(instruct|thinking)-2507|-(base|chat|instruct|hf|it))$", "", last)
    return DISTILLED.get(stem, stem)
