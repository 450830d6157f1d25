"""The config.json of published models, by name: their sizes, without a download."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cllm.messages import UserError, read_json

SHAPES = Path(__file__).parent / "assets" / "shapes.json"


def find_config(name: str) -> tuple[str, dict[str, Any]]:
    """(name, config) of a checkpoint directory or config.json, or of a published model by its name,
    whoever its owner.
    """
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        return name, read_json(file)
    published: dict[str, dict[str, Any]] = read_json(SHAPES)
    for known, config in published.items():
        if _stem(known) == _stem(name):
            return known, config
    raise UserError("memory.name", name=name, known=", ".join(published))


def _stem(name: str) -> str:
    """Owners move and chat models have their base's shape: neither counts."""
    return re.sub(r"-(base|chat|instruct|hf)$", "", re.split("[:/]", name)[-1].lower())
