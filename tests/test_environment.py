"""The doors to the same environment agree: pyproject, conda, Nix, README, and what the CI script installs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_torch_is_pinned_and_tomli_is_for_old_pythons_only() -> None:
    dependencies = {re.split(r"[\s=<>;!~\[]", d)[0]: d for d in PROJECT["dependencies"]}
    assert dependencies["torch"] == "torch==2.13.0"
    assert "python_version < '3.11'" in dependencies["tomli"] and "Darwin" in dependencies["bitsandbytes"]
    for name in ("transformers", "safetensors", "sentencepiece", "numpy", "jieba", "gradio"):
        assert name in dependencies
    assert not {"peft", "accelerate", "trl", "datasets"} & set(dependencies)


def test_conda_gives_python_and_pip_gives_the_rest() -> None:
    yaml = pytest.importorskip("yaml")
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["channels"] == ["conda-forge", "nodefaults"]
    *plain, pip = conda["dependencies"]
    assert plain == ["python=3.12", "pip"] and pip == {"pip": ["-e .[test]"]}


def test_the_flake_locks_what_it_names() -> None:
    flake = (ROOT / "flake.nix").read_text(encoding="utf-8")
    locked = json.loads((ROOT / "flake.lock").read_text(encoding="utf-8"))["nodes"]["nixpkgs"]["locked"]
    assert f"github:NixOS/nixpkgs/{locked['rev']}" in flake and locked["narHash"].startswith("sha256-")
    assert "python312" in flake and "uv pip install -e '.[test]'" in flake


def test_readme_names_the_supported_pythons() -> None:
    assert PROJECT["requires-python"] == ">=3.10"
    assert "Python 3.10–3.13" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Python 3.10 to 3.13" in (ROOT / "README.en.md").read_text(encoding="utf-8")
