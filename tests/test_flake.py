"""The flake, offline: it parses, agrees with its lock, evaluates and opens its shell on a stub of
nixpkgs (tests/nix-stub).

That the pinned nixpkgs itself evaluates is not proven here: it cannot be fetched. Skipped where
there is no `nix`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SYSTEMS = ("x86_64-linux", "aarch64-linux", "aarch64-darwin")
pytestmark = pytest.mark.skipif(shutil.which("nix") is None, reason="needs nix (Debian: nix-bin)")


def nix(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    settings = (
        "experimental-features = nix-command flakes\n"
        "build-users-group =\nsandbox = false\nsubstituters ="
    )
    command = (
        [arguments[0]] if arguments[0] == "nix-instantiate" else ["nix", "--offline", arguments[0]]
    )
    return subprocess.run(
        [*command, *arguments[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "NIX_CONFIG": settings},
    )


@pytest.fixture(scope="module")
def flake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the flake, locked to the stub."""
    folder = tmp_path_factory.mktemp("flake")
    shutil.copytree(ROOT / "tests" / "nix-stub", folder / "stub")
    (folder / "cllm").mkdir()
    shutil.copy(ROOT / "flake.nix", folder / "cllm")
    locked = nix(
        "flake",
        "lock",
        "--override-input",
        "nixpkgs",
        f"path:{folder}/stub",
        f"path:{folder}/cllm",
        cwd=folder,
    )
    assert locked.returncode == 0, locked.stderr
    return folder / "cllm"


def test_it_parses_and_agrees_with_its_lock(tmp_path: Path) -> None:
    shutil.copy(ROOT / "flake.nix", tmp_path)
    shutil.copy(ROOT / "flake.lock", tmp_path)
    assert nix("nix-instantiate", "--parse", "flake.nix", cwd=tmp_path).returncode == 0
    agreed = nix("flake", "metadata", "--no-update-lock-file", f"path:{tmp_path}", cwd=tmp_path)
    assert agreed.returncode == 0, agreed.stderr
    text = (tmp_path / "flake.nix").read_text(encoding="utf-8")
    lock = json.loads((tmp_path / "flake.lock").read_text(encoding="utf-8"))
    revision = lock["nodes"]["nixpkgs"]["locked"]["rev"]
    other = text.replace(revision, revision[::-1])
    assert other != text
    (tmp_path / "flake.nix").write_text(other, encoding="utf-8")
    assert (
        nix(
            "flake", "metadata", "--no-update-lock-file", f"path:{tmp_path}", cwd=tmp_path
        ).returncode
        != 0
    )


def test_every_system_evaluates(flake: Path) -> None:
    checked = nix("flake", "check", "--no-build", f"path:{flake}", cwd=flake)
    assert checked.returncode == 0, checked.stderr
    for system in SYSTEMS:
        evaluated = nix(
            "eval", "--raw", f"path:{flake}#devShells.{system}.default.drvPath", cwd=flake
        )
        assert evaluated.stdout.endswith("-shell.drv"), evaluated.stderr


def test_a_misspelling_fails(flake: Path, tmp_path: Path) -> None:
    shutil.copytree(flake, tmp_path / "cllm")
    text = (flake / "flake.nix").read_text(encoding="utf-8")
    misspelt = re.sub(r"pkgs\.python", "pkgs.pyhton", text, count=1)
    (tmp_path / "cllm" / "flake.nix").write_text(misspelt, encoding="utf-8")
    failed = nix(
        "eval",
        "--raw",
        f"path:{tmp_path}/cllm#devShells.x86_64-linux.default.drvPath",
        cwd=tmp_path,
    )
    assert failed.returncode != 0 and "pyhton" in failed.stderr


def test_the_shell_opens_and_makes_the_environment(flake: Path, tmp_path: Path) -> None:
    hook = nix(
        "eval", "--raw", f"path:{flake}#devShells.x86_64-linux.default.shellHook", cwd=flake
    ).stdout
    (tmp_path / "hook.sh").write_text(hook, encoding="utf-8")
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "-s", "bash", tmp_path / "hook.sh"]).returncode == 0
    for name in ("requirements.lock", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    # A uv that writes down how it was called stands in for the real one, which would fetch 5 GB.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").write_text(
        '#!/bin/bash\necho "$@" >> calls\nmkdir -p .venv\n', encoding="utf-8"
    )
    (tmp_path / "bin" / "uv").chmod(0o755)
    command = f'export PATH="{tmp_path}/bin:$PATH"\n{hook}\necho "$LD_LIBRARY_PATH"'
    for _ in range(2):  # the second time the lock is the same, so nothing is made
        shell = nix("develop", f"path:{flake}", "-c", "bash", "-c", command, cwd=tmp_path)
        assert shell.returncode == 0 and "/run/opengl-driver/lib" in shell.stdout, shell.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text("utf-8").splitlines()]
    assert [call[:2] for call in calls] == [
        ["venv", "--clear"],
        ["pip", "install"],
        ["pip", "install"],
    ]
    locked, project = calls[1], calls[2]
    assert "--require-hashes" in locked and locked[-2:] == ["-r", "requirements.lock"]
    assert project[project.index("-c") + 1] == "constraints.txt" and "-e" in project
