"""`python -m cllm.check`: what is printed, the JSON line, and the files it writes; with a
byte-level tokenizer made on the spot.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import tiny_base

from cllm.__main__ import run
from cllm.check import _guess_columns, main
from cllm.config import PRESETS, load_config
from cllm.data import read_conversations

ROWS = [{"instruction": f"第{n}个问题？", "output": f"第{n}个回答。"} for n in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    bad = ['{"instruction": "断', '{"instruction": "空", "output": ""}', *['{"foo": 1}'] * 5]
    path.write_text(
        "\n".join([*(json.dumps(row, ensure_ascii=False) for row in [*ROWS, ROWS[0]]), *bad]),
        encoding="utf-8",
    )
    return path


def account(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, dict[str, Any]]:
    assert main([str(word) for word in argv]) == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    return "\n".join(lines[:-1]), json.loads(lines[-1])


def test_bad_rows_are_located_explained_and_counted(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, found = account(capsys, data, "model.path=/nowhere/at/all")
    assert (found["rows"], found["valid"], found["rejected"]) == (20, 13, 7)
    assert {reason: entry["count"] for reason, entry in found["rejects"].items()} == {
        "unknown_schema": 5,
        "parse_error": 1,
        "empty_assistant": 1,
    }
    assert f"{data}:14: parse_error: " in text
    assert f"{data}:15: empty_assistant: " in text and "expected text; give it an answer" in text
    assert "and 2 more with unknown_schema" in text
    assert found["duplicates"]["exact"] == 1
    assert "tokens" not in found


def test_the_samples_show_what_is_trained(
    base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, found = account(
        capsys, data, f"model.path={base}", "model.template=chatml", "train.row_tokens=40"
    )
    sample = next(line for line in text.split("\n") if "⟦" in line and "|im_start|" in line)
    trained = "".join(part.split("⟧")[0] for part in sample.split("⟦")[1:])
    assert "<|im_end|>" in trained and "<|im_start|>" not in trained
    assert found["end_token_trained"] is True and found["template"] == "chatml"
    assert (
        found["limit"] == 40
        and found["over_limit"] == 13
        and "13 (100.0%) are longer than train.row_tokens = 40" in text
    )
    assert "characters per conversation: min" in text and "tokens per conversation: min" in text
    assert 0 < found["supervised_tokens"] < found["total_tokens"]


def test_bytes_of_one_character_are_shown_as_the_character(
    base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, _ = account(capsys, data, f"model.path={base}", "model.template=chatml")
    assert "第·0·个·回·答·。" in text and "\ufffd" not in text


def test_long_names_of_a_file_without_header_are_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.tsv").write_text(
        "".join(f"{'原文' * 200}{n}\t译文{n}\n" for n in range(3)), encoding="utf-8"
    )
    text, found = account(capsys, tmp_path / "own.tsv", "model.path=/nowhere")
    assert found["rejected"] == 2 and max(map(len, text.split("\n"))) < 300


def test_questions_of_the_eval_file_in_the_training_set_are_counted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text(
        "".join(
            json.dumps({**row, "output": "别的"}, ensure_ascii=False) + "\n" for row in ROWS[:3]
        ),
        encoding="utf-8",
    )
    text, found = account(capsys, data, "model.path=/nowhere", f"data.eval={test}")
    assert found["leaks"] == 3 and "3 held-out questions are in the training set too" in text


def test_nothing_is_downloaded_to_look_at_data(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    text, found = account(capsys, data, "model.path=some/model")
    assert "tokens" not in found and "characters per conversation" in text


def test_the_cleaned_set_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = account(capsys, data, "model.path=/nowhere", "--write", tmp_path / "clean.jsonl")
    conversations, rejects = read_conversations(tmp_path / "clean.jsonl")
    assert found["written"] == len(conversations) == 12 and rejects == []


def test_a_config_is_written_that_trains_on_this_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.csv"
    path.write_text(
        "id,Frage,Antwort der Expertin\n"
        + "".join(f"{n},这是第{n}个问题？,这是回答\n" for n in range(5)),
        encoding="utf-8",
    )
    _, found = account(capsys, path, "model.path=/nowhere", "--init", tmp_path / "my.toml")
    assert found["valid"] == 0
    config = load_config(tmp_path / "my.toml")
    assert config.data.columns == {"user": "Frage", "assistant": "Antwort der Expertin"}
    assert "python -m cllm.train" in (tmp_path / "my.toml").read_text(encoding="utf-8")
    _, again = account(capsys, tmp_path / "my.toml")
    assert again["valid"] == 5


@pytest.mark.parametrize("name", sorted(file.stem for file in PRESETS.glob("*.toml")))
def test_a_preset_takes_one_s_own_file_and_is_copied_with_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.csv"
    path.write_text(
        "question,answer,rejected\n" + "".join(f"{n},这是第{n}个回答,不\n" for n in range(5)),
        encoding="utf-8",
    )
    preset = load_config(f"preset:{name}", [f"data.train={path}"])
    assert preset.data.train[0].path == str(path)
    _, found = account(
        capsys,
        f"preset:{name}",
        f"data.train={path}",
        'data.eval=""',
        "--init",
        tmp_path / "my.toml",
    )
    copied = load_config(tmp_path / "my.toml")
    assert found["valid"] == 5 and copied.data.train == preset.data.train
    assert copied.preference.loss == preset.preference.loss
    for setting in ("epochs", "learning_rate"):
        assert getattr(copied.train, setting) == getattr(preset.train, setting), setting
    assert (copied.model.path, copied.model.quantize) == (preset.model.path, preset.model.quantize)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            "id\tMy Question\tsource\tGold Answer",
            {"user": "My Question", "assistant": "Gold Answer"},
        ),
        (
            "甲的原文足够长足够长足够长足够长足够长足够长\t乙的译文足够长足够长足够长足够长足够长足够长",
            {"user": "0", "assistant": "1"},
        ),
        ("a\tb\tc", {"user": "b", "assistant": "c"}),
        ("a\tmy reply\tc", {"user": "c", "assistant": "my reply"}),
        ("a\tb\tmy question", {"user": "my question", "assistant": "b"}),
        ("only", {}),
    ],
)
def test_columns_are_guessed(tmp_path: Path, header: str, expected: dict[str, str]) -> None:
    width = header.count("\t") + 1
    body = "".join(
        "\t".join(
            [str(n), f"第{n}行的原文很长很长", f"第{n}行的译文很长"][-width:] + ["x"] * (width - 3)
        )
        + "\n"
        for n in range(9)
    )
    (tmp_path / "own.tsv").write_text(f"{header}\n{body}", encoding="utf-8")
    assert _guess_columns(str(tmp_path / "own.tsv")) == expected


@pytest.mark.parametrize(("free_gib", "rows"), [(0, 2048), (2, 2048), (7.2, 4096)])
def test_the_model_that_the_readme_recommends_is_proposed(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    free_gib: float,
    rows: int,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(free_gib))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (int(free_gib * 2**30), 0))
    account(capsys, data, "--init", tmp_path / "my.toml")
    proposed, recommended = load_config(tmp_path / "my.toml"), load_config("preset:qwen3-4b")
    assert (proposed.model.path, proposed.model.quantize) == (
        recommended.model.path,
        recommended.model.quantize,
    )
    assert proposed.train.row_tokens == rows
    readme = (PRESETS.parents[2] / "README.md").read_text(encoding="utf-8")
    assert "推荐" in next(line for line in readme.split("\n") if "preset:qwen3-4b" in line)


def test_a_model_that_was_named_is_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Path
) -> None:
    account(capsys, data, f"model.path={base}", "--init", tmp_path / "my.toml")
    assert load_config(tmp_path / "my.toml").model.path == str(base)


def test_rejected_rows_of_the_eval_file_are_located_too(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test.jsonl"
    rows = [{"instruction": "第3个问题？", "output": "&#32;"}, {"foo": 1}]
    test.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    overrides = ["model.path=/nowhere", f"data.eval={test}"]
    text, found = account(capsys, data, *overrides)
    counts = {key: found["eval"][key] for key in ("rows", "valid", "rejected")}
    assert counts == {"rows": 2, "valid": 1, "rejected": 1} and found["rejected"] == 7
    assert f"{test}:2: unknown_schema: " in text
    # the run's options rewrite both sides: of this answer nothing is left
    _, found = account(capsys, data, *overrides, "data.unescape_html=true")
    assert found["eval"]["rejects"].keys() == {"empty_assistant", "unknown_schema"}


def test_the_report_is_one_page(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    account(capsys, data, "model.path=/nowhere", "--report", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "parse_error" in page and "http" not in page
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"


def test_files_are_not_overwritten_and_missing_ones_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", [str(data), "--write", str(data)]) == 2
    assert run("check", [str(tmp_path / "nowhere.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "exists already" in error and "nowhere.jsonl" in error


def test_an_empty_file_has_an_account_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    _, found = account(capsys, tmp_path / "empty.json", "model.path=/nowhere")
    assert found["rows"] == 0


def test_output_that_nobody_reads_any_more_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "问", "output": "答"}\n', encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "cllm.check", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout and program.stderr
        program.stdout.close()
        said = program.stderr.read()
    assert program.returncode == 141 and "Traceback" not in said and "BrokenPipe" not in said


def test_fields_that_are_not_read_are_named_in_ten_lines(
    data: Path, capsys: pytest.CaptureFixture[str], base: Path
) -> None:
    rows = [json.dumps({**row, "note": "别忘了", "id": "1"}, ensure_ascii=False) for row in ROWS]
    broken = ['{"a"', "3", '{"messages": []}', '{"instruction": "", "output": "好"}'] * 9
    data.write_text("\n".join([*rows, *broken]), encoding="utf-8")
    text, found = account(capsys, data, f"model.path={base}", "model.template=chatml")
    assert found["unread"] == {str(data): {"note": 12}} and "note (12)" in text
    lines = text.split("\n")
    assert len(lines) <= 14 and max(map(len, lines)) < 400
    assert all(f"{data}:{line}: " in text for line in (13, 14, 15, 16))  # one of each reason
    assert "8 more with parse_error" in text or "7 more with parse_error" in text


def test_a_quiet_account_is_ten_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    text, _ = account(capsys, path, f"model.path={base}", "model.template=chatml")
    assert len(text.split("\n")) <= 10


def test_a_pair_with_another_rejected_answer_is_no_duplicate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "几点？", "chosen": "三点整", "rejected": bad} for bad in ("甲", "乙", "甲")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run("check", [str(file), "preference.loss=dpo"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["duplicates"]["exact"] == 1


def test_pairs_show_length_bias_and_both_answers_token_by_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"怎样煮第{i}碗面？", "chosen": "先烧水，再下面。" * 3, "rejected": "不知道。"}
        for i in range(8)
    ]
    rows += [
        {"prompt": "几点？", "chosen": "好。", "rejected": "现在不能告诉你。" * 4},
        {"prompt": "几点？", "completion": "三点。", "label": True},
        {"prompt": "去哪？", "chosen": "去", "rejected": "去。"},
    ]
    file, kept = tmp_path / "pairs.jsonl", tmp_path / "kept.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = [str(file), "preference.loss=dpo", "--write", str(kept)]
    assert run("check", options) == 0
    text = capsys.readouterr().out
    found = json.loads(text.strip().split("\n")[-1])
    told = found["pairs"]
    assert (told["pairs"], told["chosen"], told["rejected"]) == (9, 1, 0)
    assert told["longer_chosen"] == pytest.approx(8 / 9, abs=1e-3)
    assert told["chosen_length"] > told["rejected_length"] and told["correlation"] > 0
    assert found["rejects"]["identical_pair"]["count"] == 1 and found["written"] == 10
    assert text.count("pairs.jsonl:1") >= 2 and "知" in text  # both answers of the first pair
    assert run("check", [str(kept), "preference.loss=dpo"]) == 0
    again = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert again["pairs"] == told and again["rejected"] == 0
