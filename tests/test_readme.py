"""The READMEs: two quick-start commands, the same in both languages; every file they name exists;
every program is theirs.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from cllm.__main__ import PROGRAMS

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.en.md")}


def blocks(text: str) -> list[str]:
    return re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL)


def test_quick_start_is_two_lines_and_the_same_in_both_languages() -> None:
    first = [blocks(text)[0].strip().split("\n") for text in TEXTS.values()]
    assert first[0] == first[1] and len(first[0]) == 2
    assert first[0][0].endswith("python -m cllm.train cllm.toml") and first[0][1].endswith(
        "python -m pytest"
    )


@pytest.mark.parametrize("name", TEXTS)
def test_every_named_file_exists(name: str) -> None:
    text = TEXTS[name]
    links = list(re.findall(r"\]\(([^)#:]+)\)", text))
    tree = text.rsplit("```\n", 2)[1]
    folders: list[str] = []
    for line in tree.strip().split("\n"):
        depth = (len(line) - len(line.lstrip())) // 2
        names = list(
            itertools.takewhile(re.compile(r"[\w.]+(/|\.py|\.toml)").fullmatch, line.split())
        )
        assert names, line
        folders = folders[:depth]
        links += ["/".join([*folders, part.rstrip("/")]) for part in names]
        if names[0].endswith("/"):
            folders.append(names[0].rstrip("/"))
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_every_named_program_and_preset_exists(name: str) -> None:
    for program in re.findall(r"python -m cllm\.(\w+)", TEXTS[name]):
        assert program in PROGRAMS and (ROOT / "cllm" / f"{program}.py").is_file(), program
    for preset in re.findall(r"preset:([\w.-]+)", TEXTS[name]):
        assert (ROOT / "cllm" / "assets" / "presets" / f"{preset}.toml").is_file(), preset
    for script in re.findall(r"(?:python|bash) ((?:tools|bench)/[\w./]+)", TEXTS[name]):
        assert (ROOT / script).is_file(), script
