"""One table of messages: both languages complete, same fields, every code used, every used code
there.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import string
from pathlib import Path

import pytest

from cllm.config import load_config
from cllm.messages import UserError, language, messages, read_json, say, table, to_json

PACKAGE = Path(__file__).parents[1] / "cllm"


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("code", messages())
def test_both_languages_say_the_same_fields(code: str) -> None:
    english, chinese = messages()[code]
    assert fields(english) == fields(chinese)
    assert english and chinese and not re.search("[\u4e00-\u9fff]", english)
    words = re.sub(r"\{[^}]*\}", "", english)  # some are fields and punctuation only
    assert re.search("[\u4e00-\u9fff]", chinese) or not re.search("[A-Za-z]", words), (
        f"{code} is not translated"
    )


def used_codes() -> dict[str, set[str]]:
    """Every literal code given to say, note, UserError, RowError -> the keywords of one call; and
    the helps of the programs' command lines.
    """
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if 'CommandLine("' in text:
            options = re.findall(r'\.take\(\s*"-*([\w-]+)"', text)
            for switches in re.findall(r"for switch in \((.*)\)", text):
                options += re.findall(r'"--([\w-]+)"', switches)
            names = ["", *(f".{option.replace('-', '_')}" for option in options)]
            helps = {f"{path.stem}.help{name}": set[str]() for name in names}
            assert helps.keys() <= messages().keys()
            found |= helps
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(
                node.func, "id", getattr(node.func, "attr", "")
            ) in ("say", "note", "UserError", "RowError"):
                for constant in ast.walk(node.args[0]) if node.args else ():
                    if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                        named = {k.arg or "**" for k in node.keywords}
                        if "**" not in named and isinstance(node.args[0], ast.Constant):
                            assert named == fields(messages()[constant.value][0]), (
                                f"{path.name}:{node.lineno} {constant.value}"
                            )
                        found[constant.value] = named
    return found


def test_every_call_fills_its_fields_and_no_message_is_dead() -> None:
    codes = used_codes()
    sources = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    # f"check.mend.{reason}": the codes with this beginning
    made = set(re.findall(r'"([a-z_]+\.(?:[a-z_]+\.)*)(?=["{])', sources))

    def said(code):
        return (
            code in codes or f'"{code}"' in sources or any(code.startswith(start) for start in made)
        )

    dead = [code for code in messages() if not said(code) and code != "error"]
    assert not dead, f"nobody says: {dead}"


def test_language_follows_the_setting_then_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_LANG", "zh")
    assert language() == "zh" and "配置" in say("config.unreadable", path="x", detail="y")
    monkeypatch.setenv("CLLM_LANG", "en")
    assert (
        str(UserError("config.syntax", path="x", detail="y"))
        == "error [config.syntax]: x is not valid TOML: y"
    )
    monkeypatch.delenv("CLLM_LANG")
    for key in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert language() == "zh"
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert language() == "en"


def test_errors_of_the_operating_system_are_told_in_the_users_language(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLLM_LANG", "zh")
    for code in ("ENOENT", "EACCES", "EISDIR", "ENOSPC", "ENAMETOOLONG", "EADDRINUSE"):
        error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "f")
        told = say("config.unreadable", path="x", detail=error)
        assert error.strerror not in told and "None" not in told
    for error in (OSError("only words"), OSError(errno.EXDEV, "only words")):
        assert "only words" in say("config.unreadable", path="x", detail=error)
    with pytest.raises(UserError, match="没有这个文件"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="没有这个文件"):
        load_config(tmp_path / "x.toml")


def test_table_counts_full_width_characters_as_two() -> None:
    assert table([["名", "a"], ["x", "10"]]) == "名   a\nx   10"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_of_other_people_is_read(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes('{"值": [1, null]}'.encode(encoding))
    assert read_json(file) == {"值": [1, None]}


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"null", b"7", b'"x"', b'{"a": ', b"\xff\xff\xff", b"\xb9\xfa", b"[" * 100_000],
)
def test_json_that_cannot_be_read_is_one_error_with_its_path(
    content: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    for code in ("model.damaged", "adapter.damaged"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json") as caught:
            read_json(file, code)
        file.unlink()
        assert caught.value.code == code
        with pytest.raises(UserError, match=r"x\.json"):
            read_json(file, code)


def test_json_is_written_in_one_place() -> None:
    """`to_json` alone, which writes null for what is not finite; the others write no numbers."""
    writers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"json\.dumps?\(", path.read_text(encoding="utf-8"))
    }
    assert writers <= {"messages.py", "bench.py", "data/text.py", "data/cache.py"}
    assert to_json({"a": [float("nan"), float("inf"), 1.5]}) == '{"a": [null, null, 1.5]}'
