"""READMEs, guides and docs/proofs: bash, cmd and PowerShell 5.1 read every command alike, and the
programs' own parsers take it; every name in them exists; both languages say the same.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from cllm.__main__ import PROGRAMS
from cllm.config import DataConfig, load_config
from cllm.data.sources import read_file
from cllm.messages import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAIRS = {
    "README.md": "README.en.md",
    "docs/guide.md": "docs/guide.en.md",
    "docs/cookbook.md": "docs/cookbook.en.md",
    "docs/proofs.md": "docs/proofs.en.md",
}
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for pair in PAIRS.items() for name in pair}
READMES = ("README.md", "README.en.md")
FOLLOWED = (*READMES, *(name for name in TEXTS if "guide" in name or "cookbook" in name))
SECTIONS = ("model", "lora", "data", "train", "eval", "memory", "log", "run")

# What all three shells hand to a program as it stands. A comma makes a list in PowerShell, brackets
# are a pattern in bash, and PowerShell cuts a flag at a dot.
PLAIN = r"[\w./:=+-]"
QUOTED = r'"[\w./:=+<>,;()\[\] -]*"'
PORTABLE = re.compile(rf"(?!-\S*\.)(?:{PLAIN}|{QUOTED})+")
EVERYWHERE = {"git", "cd", "python", "pip"}


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def lines(text: str) -> list[str]:
    """The commands of the text's blocks, one a line."""
    return [line for block in blocks(text, "bash") for line in block.strip().split("\n")]


def inline(text: str) -> list[str]:
    """`Code` in the running text."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", outside)


def commands(name: str) -> list[str]:
    """Every command for every shell: the blocks' lines, and the ones named in the text."""
    named = [code for code in inline(TEXTS[name]) if re.match(r"(python|pip) ", code)]
    return [*lines(TEXTS[name]), *named]


def portable(line: str) -> bool:
    """Whether bash, cmd and PowerShell 5.1 read the same words from the line."""
    return all(PORTABLE.fullmatch(word) for word in re.findall(r'(?:"[^"]*"|\S)+', line))


class ParsedError(Exception):
    """A program has read its command line, and stops there."""


def parse(program: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program's own parser read `words`. Raises UserError where it refuses them."""

    def then_stop(read: Any) -> Any:
        def wrapper(self: argparse.ArgumentParser, argv: Sequence[str]) -> NoReturn:
            read(self, argv)
            raise ParsedError

        return wrapper

    with monkeypatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            original = getattr(argparse.ArgumentParser, method)
            # parse_args stays whole inside parse_intermixed_args, which does not call it
            patch.setattr(argparse.ArgumentParser, method, then_stop(original))
        with pytest.raises(ParsedError):
            importlib.import_module(f"cllm.{program}").main(list(words))


@pytest.mark.parametrize(
    "line",
    [
        "pip install -e . && python -m cllm.train cllm.toml",
        "pip install -e '.[test]'",
        "pip install -e .[test]",
        "python -m cllm.check my.jsonl   # what can be read",
        "vllm serve BASE \\",
        "echo $HOME",
        "a; b",
        "python -m cllm.bench --rows 512,1024",
    ],
)
def test_what_some_shell_reads_otherwise_is_noticed(line: str) -> None:
    assert not portable(line)


@pytest.mark.parametrize("name", FOLLOWED)
def test_every_command_is_the_same_in_every_shell(name: str) -> None:
    assert len(commands(name)) > 7
    for line in commands(name):
        assert portable(line), line
    assert {line.split()[0] for line in commands(name)} <= EVERYWHERE


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_programs_own_parsers_take_every_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in commands(name):
        words = shlex.split(line)
        match words:
            case ["python", "-m", module, *rest] if module.startswith("cllm."):
                program = module.removeprefix("cllm.")
                assert program in PROGRAMS, line
                parse(program, rest, monkeypatch)
            case ["python", script, *_] if script.endswith(".py"):
                assert (ROOT / script).is_file(), line


def test_a_flag_that_does_not_exist_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--terminals"):
        parse("chat", ["runs/my", "--terminals"], monkeypatch)


@pytest.mark.parametrize("name", FOLLOWED)
def test_presets_overrides_scripts_and_links_are_real(name: str) -> None:
    codes = [*inline(TEXTS[name]), *lines(TEXTS[name])]
    words = [word for code in codes for word in code.split()]
    settings = [word for word in words if re.match(rf"({'|'.join(SECTIONS)})\.\w+=", word)]
    assert settings
    load_config(os.devnull, settings)
    for word in words:
        if word.startswith("preset:"):
            load_config(word)
        if re.fullmatch(r"(tools|bench|deploy|docs|cllm)/[\w./-]+\.\w+", word):
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("name", READMES)
def test_pip_installs_what_the_project_declares(name: str) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {r.name: r for r in map(requirements.Requirement, project["dependencies"])}
    for line in commands(name):
        words = shlex.split(line)
        if words[:2] != ["pip", "install"]:
            continue
        for word in words[2:]:
            if word.startswith(".["):
                assert set(word[2:-1].split(",")) <= set(project["optional-dependencies"]), line
            elif "==" in word or ">=" in word:
                wanted = requirements.Requirement(word)
                assert wanted.specifier == declared[wanted.name].specifier, line


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_test_and_result_exists(name: str) -> None:
    folder = (ROOT / name).parent
    links = re.findall(r"\]\(([^)#:]+)\)", TEXTS[name])
    assert links and all((folder / link).exists() for link in links)
    for code in inline(TEXTS[name]):
        if name.startswith("docs/proofs") and re.fullmatch(r"[\w.-]+\.json", code):
            assert (ROOT / "bench" / "results" / code).is_file(), code
        if re.fullmatch(r"tests/\w+\.py", code):
            assert (ROOT / code).is_file(), code


@pytest.mark.parametrize(("chinese", "english"), PAIRS.items())
def test_both_languages_have_the_same_commands_names_and_figures(
    chinese: str, english: str
) -> None:
    first, second = TEXTS[chinese], TEXTS[english]
    for kind in ("bash", "json"):
        assert blocks(first, kind) == blocks(second, kind)
    named = [{code for code in inline(text) if "columns" not in code} for text in (first, second)]
    assert named[0] == named[1]
    figures = [set(re.findall(r"\d+(?:[.,]\d+)+", text)) for text in (first, second)]
    assert figures[0] == figures[1]


def test_ci_runs_the_quick_start_as_it_stands() -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extraction = next(line for line in script.split("\n") if line.startswith("mapfile"))
    done = subprocess.run(
        ["bash", "-c", f"{extraction}\nprintf '%s\\n' \"${{commands[@]}}\""],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    section = TEXTS["README.md"].partition("\n## 快速开始\n")[2]
    assert done.stdout.splitlines() == blocks(section, "bash")[0].splitlines()
    assert "python -m cllm.train cllm.toml" in done.stdout and "python -m pytest" in done.stdout


@pytest.mark.parametrize("name", READMES)
def test_the_example_rows_are_read(name: str, tmp_path: Path) -> None:
    (block,) = blocks(TEXTS[name], "json")
    file = tmp_path / "my.jsonl"
    file.write_text(block, encoding="utf-8")
    conversations, rejects = read_file(DataConfig(), str(file), {})
    assert not rejects and len(conversations) == len(block.strip().split("\n"))
    assert any(message.role == "system" for talk in conversations for message in talk.messages)


def tree_of_architecture() -> set[str]:
    """Every path of the file tree in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.partition("## File tree")[2].split("```\n")[1]
    folders: list[str] = []
    paths = set()
    for line in tree.splitlines():
        name, _, role = line.strip().partition(" ")
        assert role.strip() or name.endswith("/"), line
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        path = "/".join([*folders, name.rstrip("/")])
        assert path not in paths, line
        paths.add(path)
        folders.append(name.rstrip("/"))
    return paths


def test_the_file_tree_is_the_repositorys() -> None:
    named = tree_of_architecture()
    assert not [path for path in named if not (ROOT / path).exists()]
    shown = ("cllm/**/*.py", "tools/**/*", "bench/*.*", "docs/*.md", "deploy/**/*")
    files = (file for pattern in shown for file in ROOT.glob(pattern) if file.is_file())
    present = {file.relative_to(ROOT).as_posix() for file in files if file.suffix != ".pyc"}
    assert not present - named
