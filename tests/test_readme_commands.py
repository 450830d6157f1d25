"""Every command of the README and the guide that needs neither a GPU nor a hub nor a container, run
in their order on a small file.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from cllm.__main__ import run

ROOT = Path(__file__).parents[1]
# a hub, an exam's files, votes, a server, this very test
ELSEWHERE = ("CMMLU", "--votes", "--host", "-m pytest", "cllm.toml")
PAGES = [
    f"{page}{language}"
    for page in ("README", "docs/guide", "docs/preference", "docs/cookbook")
    for language in (".md", ".en.md")
]
SMALL = (
    "model.path=tiny-zh train.steps=2 train.row_tokens=128 train.tokens_per_step=128 "
    "eval.samples=2 eval.max_new_tokens=4"
).split()


def commands(name: str) -> list[list[str]]:
    """Program and arguments of each `python -m cllm.…` line in the text's bash blocks."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.strip().split("\n")
    ]
    ours = [
        line
        for line in lines
        if line.startswith("python -m cllm.") and not any(word in line for word in ELSEWHERE)
    ]
    return [shlex.split(line)[2:] for line in ours]


def write_votes(path: Path) -> None:
    """Votes as the page writes them."""
    from cllm.assembly import open_model
    from cllm.data.message import Message
    from cllm.serve.compare import Duel, append_vote
    from cllm.serve.sampling import Sampling

    loaded = open_model(path.parent)
    for number in range(24):
        asked = [Message("user", f"第{number}号仓库？")]
        duel = Duel(asked, ["base", "my"], ["不知道。", f"河东{number}街。"], Sampling())
        append_vote("tie" if number % 8 == 0 else "b", duel, loaded)


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_work_in_their_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = commands(name)
    assert len(named) >= 4 and named == commands(name.replace(".en", ""))
    if name.endswith(".en.md"):
        return  # the same commands
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cllm.fit.LONGEST_ROW", 4096)  # longer rows take minutes to trace
    for file, count in (
        ("my.jsonl", 40),
        ("test.jsonl", 4),
        ("more.jsonl", 40),
        ("general.jsonl", 4),
    ):
        rows = [
            {"instruction": f"第{i}号仓库在哪里？", "output": f"第{i}号仓库在河东{i + 1}街。"}
            for i in range(count)
        ]
        (tmp_path / file).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    (tmp_path / "table.csv").write_text("问题,答复\n几号？,十号。\n", encoding="utf-8")
    for module, *arguments in named:
        program = module.removeprefix("cllm.")
        if program == "check" and "votes.jsonl" in arguments[0]:
            write_votes(tmp_path / arguments[0])
        if program == "train":
            arguments += SMALL
        if program == "chat":
            if "--terminal" not in arguments:
                continue  # serves until it is stopped
            monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
        assert run(program, arguments) == 0, " ".join([module, *arguments])
        json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("name", ["docs/cookbook.md", "docs/cookbook.en.md"])
def test_every_example_row_is_read(name: str, tmp_path: Path) -> None:
    from cllm.config import DataConfig
    from cllm.data.sources import read_file

    blocks = re.findall(r"```json\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        file, unread = tmp_path / "rows.jsonl", {}
        file.write_text(block, encoding="utf-8")
        data = DataConfig(kind="text" if '{"text"' in block else "chat")
        conversations, rejects = read_file(data, str(file), {}, unread)
        assert len(conversations) == len(block.strip().split("\n")) and not rejects
        assert not unread
