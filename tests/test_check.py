"""`python -m cllm.check`: what is printed, the JSON line, and the files it writes; with a
byte-level tokenizer made on the spot.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import tiny_base

from cllm.__main__ import run
from cllm.advice import TINY_RATE, advised_rate
from cllm.check import main
from cllm.config import PRESETS, TrainConfig, load_config
from cllm.data import read_conversations
from cllm.proposal import guess, recommended
from cllm.shapes import published

ROWS = [{"instruction": f"第{n}个问题？", "output": f"第{n}个回答。"} for n in range(12)]
LONG = {"instruction": "长", "output": "很长。" * 2000}


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
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    *lines, document = out.rstrip("\n").split("\n")
    found = json.loads(document)
    assert code == (0 if found.get("again", found)["valid"] else 2)
    proposed = [line.strip() for line in err.split("\n") if line.startswith("  python -m ")]
    return "\n".join([*lines, *proposed]), found


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
    assert "and 4 more with unknown_schema" in text
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
        + "".join(f"{n},这是第{n}个问题？,这是第{n}个回答\n" for n in range(5)),
        encoding="utf-8",
    )
    _, found = account(capsys, path, "model.path=/nowhere", "--init", tmp_path / "my.toml")
    assert found["valid"] == 0 and found["again"]["valid"] == 5
    config = load_config(tmp_path / "my.toml")
    assert config.data.columns == {"user": "Frage", "assistant": "Antwort der Expertin"}
    assert "python -m cllm.train" in (tmp_path / "my.toml").read_text(encoding="utf-8")
    _, again = account(capsys, tmp_path / "my.toml")
    assert again["valid"] == 5


@pytest.mark.parametrize(
    ("count", "share"), [(66, 0.1), (124, 0.1), (125, 0.2), (250, 0.1), (499, 0.1), (500, 0.05)]
)
def test_as_few_are_held_out_as_a_verdict_needs(
    count: int, share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"instruction": f"第{n}个问题？", "output": f"{n * n}"} for n in range(count)]
    path.write_text("".join(map(json.dumps, rows)).replace("}{", "}\n{"), encoding="utf-8")
    account(capsys, path, "model.path=tiny-zh", "--init", tmp_path / "my.toml")
    assert load_config(tmp_path / "my.toml").data.held_out == share
    written = (tmp_path / "my.toml").read_text(encoding="utf-8")
    assert f"about {round(share * count)} conversations" in written


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
    known = published(preset.model.path)
    advised = advised_rate(known[1]) if known else None
    usual = (
        "learning_rate" not in (PRESETS / f"{name}.toml").read_text()
    )  # one that was set is kept
    half = float(f"{advised.value / 2:.2g}") if advised else 0.0  # of few conversations
    assert copied.train.rate == (half if advised and usual else preset.train.rate)
    assert copied.train.epochs == (preset.train.epochs if preset.preference.active else 10)
    assert (copied.model.path, copied.model.quantize) == (preset.model.path, preset.model.quantize)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("id\tMy Question\tsource\tGold Answer", ("My Question", "Gold Answer")),
        (
            "甲的原文足够长足够长足够长足够长足够长足够长\t乙的译文足够长足够长足够长足够长足够长足够长",
            ("0", "1"),
        ),
        ("a\tb\tc", ("b", "c")),
        ("a\tmy reply\tc", ("c", "my reply")),
        ("a\tb\tmy question", ("my question", "b")),
        ("only", ()),
    ],
)
def test_columns_are_guessed(tmp_path: Path, header: str, expected: tuple[str, ...]) -> None:
    width = header.count("\t") + 1
    body = "".join(
        "\t".join(
            [str(n), f"第{n}行的原文很长很长", f"第{n}行的译文很长"][-width:] + ["x"] * (width - 3)
        )
        + "\n"
        for n in range(9)
    )
    (tmp_path / "own.tsv").write_text(f"{header}\n{body}", encoding="utf-8")
    _, settings = guess(str(tmp_path / "own.tsv"))
    assert tuple(settings.values()) == expected


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"author": "甲", "paragraphs": ["春眠", "处处"], "title": "晓", "tags": ["春"]}, {}),
        ({"title": "一则消息", "content": "今天下了一场大雨。", "id": 3}, {}),
        ({"text": "很长的一段文字。"}, {"kind": "text"}),
        ({"text": "很长的一段文字。", "source": "书"}, {"kind": "text"}),
    ],
)
def test_nothing_is_guessed_without_confidence(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, str]
) -> None:
    rows = [
        {name: f"{part}{n}" if isinstance(part, str) else part for name, part in row.items()}
        for n in range(9)
    ]
    (tmp_path / "own.json").write_text(json.dumps(rows), encoding="utf-8")
    assert guess(str(tmp_path / "own.json"))[1] == settings


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
    proposed, preset = load_config(tmp_path / "my.toml"), load_config("preset:qwen3-4b")
    assert (proposed.model.path, proposed.model.quantize) == (
        preset.model.path,
        preset.model.quantize,
    )
    assert recommended(load_config("preset:qwen3-8b", ["train.row_tokens=2048"]))[1] == rows
    readme = (PRESETS.parents[2] / "README.md").read_text(encoding="utf-8")
    assert "推荐" in next(line for line in readme.split("\n") if "preset:qwen3-4b" in line)


def test_a_model_that_was_named_is_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Path
) -> None:
    account(capsys, data, f"model.path={base}", "--init", tmp_path / "my.toml")
    assert load_config(tmp_path / "my.toml").model.path == str(base)


def test_every_proposed_value_has_its_reason(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Path
) -> None:
    account(capsys, data, "--init", tmp_path / "my.toml")
    text = (tmp_path / "my.toml").read_text(encoding="utf-8")
    proposed = load_config(tmp_path / "my.toml")
    assert proposed.train.rate == 2.4e-4 and "(2000 / 2560)^0.0775" in text
    # 13 rows make a row of the fewest tokens
    assert "33.0 M numbers for" in text and proposed.eval.patience == 4
    assert proposed.lora == load_config("preset:qwen3-4b").lora
    account(
        capsys, data, f"model.path={base}", "train.learning_rate=0.02", "--init", tmp_path / "b"
    )
    assert load_config(tmp_path / "b").train.rate == 0.02


def test_what_somebody_chose_stays_in_a_proposal(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps([ROWS[0], ROWS[2]]), encoding="utf-8")
    words = ["train.epochs=5", "lora.rank=64", "data.replay=0.1", "data.dedup=false"]
    account(capsys, data, *words, "--init", tmp_path / "my.toml")
    proposed = load_config(tmp_path / "my.toml")
    assert (proposed.train.epochs, proposed.lora.rank) == (5, 64)
    assert (proposed.data.replay, proposed.data.dedup) == (0.1, False)
    assert (tmp_path / "my.toml").read_text(encoding="utf-8").count("as it was set") == 3
    mixture = f'[{{path="{data}",weight=2.0}},{{path="{other}"}}]'
    text = f"""
[model]
path = "{base}"
template = "chatml"
[data]
train = {mixture}
[lora]
targets = ["q_proj"]
[memory]
chunk_mib = 64
[train]
epochs = 1.0
learning_rate = 2e-4
"""
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    account(capsys, tmp_path / "own.toml", "--init", tmp_path / "again.toml")
    own, again = load_config(tmp_path / "own.toml"), load_config(tmp_path / "again.toml")
    assert (again.data.train, again.model.template) == (own.data.train, "chatml")
    assert (again.lora.targets, again.memory.chunk_mib) == (["q_proj"], 64)
    assert again.train.rate == 2e-4 and again.train.epochs > 1  # a file's amount is proposed anew


def test_the_rate_of_the_model_that_counts_tokens_is_nobody_else_s(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Path
) -> None:
    account(capsys, data, f"model.path={base}", "--init", tmp_path / "tiny")
    assert load_config(tmp_path / "tiny").train.rate == TINY_RATE
    named = "model.path=Qwen/Qwen3-0.6B"
    account(capsys, data, named, "--init", tmp_path / "known")
    qwen = advised_rate({"model_type": "qwen3", "hidden_size": 1024})
    assert qwen and qwen.value == 5.3e-4
    assert load_config(tmp_path / "known").train.rate == 2.6e-4  # half, of few conversations
    pairs = tmp_path / "pairs.json"
    rows = [{"prompt": f"{n}？", "chosen": f"{n}。", "rejected": "不。"} for n in range(9)]
    pairs.write_text(json.dumps(rows), encoding="utf-8")
    account(capsys, pairs, named, "preference.loss=dpo", "--init", tmp_path / "pairs")
    assert load_config(tmp_path / "pairs").train.rate == 5e-6
    account(capsys, data, "model.path=nobody/knows", "--init", tmp_path / "unknown")
    assert load_config(tmp_path / "unknown").train.rate == TrainConfig().rate


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
    assert "<strong>20</strong> rows" in page and "<strong>7</strong> rejected" in page
    assert {file.name for file in tmp_path.iterdir()} == {data.name, "report.html"}


def test_files_are_not_overwritten_and_missing_ones_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", [str(data), "--write", str(data)]) == 2
    assert run("check", [str(tmp_path / "nowhere.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "exists already" in error and "nowhere.jsonl" in error
    assert run("check", []) == 2
    error = capsys.readouterr().err
    assert "check.no_target" in error and "--identity" not in error


@pytest.mark.parametrize("switch", ["--init", "--report", "--write", "--out"])
def test_what_cannot_be_written_is_one_line(
    switch: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--identity", "A", "B"] if switch == "--out" else [str(data)]
    for place in (data / "new", data.with_name("x" * 300)):  # no folder; a name that is too long
        assert run("check", [*source, switch, str(place)]) == 2
        error = capsys.readouterr().err
        assert "run.unwritable" in error and "--resume" not in error and "Traceback" not in error
    assert [file.name for file in data.parent.iterdir()] == [data.name]


def test_the_config_that_is_advised_is_a_new_file(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    for name in ("rows.toml", "rows-2.toml", "rows-3.toml"):
        text, _ = account(capsys, data.name)
        words = shlex.split(text.split("\n")[-1])[3:]
        assert words == [data.name, "--init", name]
        account(capsys, *words)
        assert Path(name).is_file()


def test_an_empty_file_has_an_account_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    _, found = account(capsys, tmp_path / "empty.json", "model.path=/nowhere")
    assert found["rows"] == 0
    assert run("check", [str(tmp_path / "empty.json")]) == 2
    assert 'no rows; write some such as {"instruction": ' in capsys.readouterr().out


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
    assert len(lines) <= 16 and max(map(len, lines)) < 400
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
    assert "pairs: 9; votes on single answers: 1 for, 0 against;" in text
    assert told["longer_chosen"] == pytest.approx(8 / 9, abs=1e-3)
    assert told["chosen_length"] > told["rejected_length"] and told["correlation"] > 0
    assert found["rejects"]["identical_pair"]["count"] == 1 and found["written"] == 10
    assert text.count("pairs.jsonl:1") >= 2 and "知" in text  # both answers of the first pair
    assert run("check", [str(kept), "preference.loss=dpo"]) == 0
    again = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert again["pairs"] == told and again["rejected"] == 0


def test_the_command_at_the_end_can_be_pasted_until_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of unknown columns, in a path with a space: unusable, the guess once, a config."""
    monkeypatch.chdir(tmp_path)
    Path("a b.csv").write_text(
        "编号,客户问题,客服回复\n" + "".join(f"{n},第{n}问？,第{n}答。\n" for n in range(9)),
        encoding="gb18030",
    )
    text, found = account(capsys, "a b.csv", "data.dedup=false")
    lines = text.split("\n")
    assert found["valid"] == 0 and "unusable" in lines[-2]
    assert text.count("probably user = 客户问题, assistant = 客服回复") == 1
    assert text.count("unknown_schema: ") == 1  # three rows would say the same
    program, *words = shlex.split(lines[-1].split("python -m ")[1])
    assert program == "cllm.check" and words[0] == "a b.csv" and "data.dedup=false" in words
    text, found = account(capsys, *words)
    assert found["valid"] == 9 and "ready: 9" in text.split("\n")[-2]
    assert shlex.split(text.split("\n")[-1]) == ["python", "-m", "cllm.train", "a b.toml"]
    train = load_config("a b.toml").train
    assert train.epochs == 10 and train.tokens_per_step >= train.row_tokens
    # at once, without the columns
    text, found = account(capsys, "a b.csv", "--init", "b.toml")
    assert found["valid"] == 0 and found["again"]["valid"] == 9
    guessed, named = load_config("b.toml").data, load_config("a b.toml").data
    assert guessed == replace(named, dedup=True) and not named.dedup


def test_a_file_of_which_nothing_can_be_made_writes_no_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jsonl").write_text('{"a": 1}\n' * 3, encoding="utf-8")
    text, found = account(capsys, tmp_path / "own.jsonl", "--init", tmp_path / "my.toml")
    assert found["valid"] == 0 and not (tmp_path / "my.toml").exists()
    assert text.endswith("unusable: none of 3 rows can be trained on")
    assert "columns: a; name which" in text and "--init" not in text
    assert run("check", [str(tmp_path / "own.jsonl"), "--init", str(tmp_path / "my.toml")]) == 2
    assert "my.toml was not written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "overrides", "said"),
    [
        ([*ROWS, *[{"foo": 1}] * 5], [], "mending the rejected rows (29%)"),
        (ROWS, ["train.row_tokens=8", "train.tokens_per_step=8"], "longer rows"),
        (ROWS, ["data.eval=EVAL"], "a data.eval that can be read"),
        ([*ROWS, {"foo": 1}], [], "ready: 12"),
        ([*ROWS, {"instruction": "你是谁？", "output": "我叫{{name}}。"}], [], "removing 1 place"),
        (ROWS[:2], [], "adding rows: 2 teach nothing"),
        (ROWS, [], "ready: 12 conversations can be trained on; so few teach a name"),
        ([*ROWS[:8], LONG], [], "ready: 8 conversations can be trained on; 1 left out as longer"),
        ([*ROWS[:4], LONG], [], "adding rows: 4 teach nothing, a few hundred do; 1 left out"),
    ],
)
def test_what_is_left_to_do_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
    overrides: list[str],
    said: str,
) -> None:
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "eval.jsonl").write_text('{"foo": 1}\n', encoding="utf-8")
    overrides = [word.replace("EVAL", str(tmp_path / "eval.jsonl")) for word in overrides]
    text, _ = account(capsys, tmp_path / "own.jsonl", *overrides)
    assert said in text.split("\n")[-2]


def test_the_tokenizer_is_named_and_what_qwen_would_take(
    data: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, found = account(capsys, data)
    first = text.split("\n")[0]
    assert "tiny-zh" in first and f"{found['qwen_tokens']:,}" in first and "model.path=" in first
    text, _ = account(capsys, data, f"model.path={base}", "model.template=chatml")
    assert text.split("\n")[0] == f"tokens are counted with {base}, template chatml"


def test_findings_have_a_place_and_an_option_that_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        ("你好？", "你好！很高兴见到你。"),
        ("你好?", "你好！很高兴见到你。"),
        ("问一", "我叫{{name}}。"),
        ("问二", "写信给 li@example.com 吧"),
        ("问三", "锟斤拷烫烫烫"),
        ("问四", "nan"),
        ("问五", "1 &lt; 2，对吗"),
        ("问六", "作为一个AI，我不能回答。"),
        ("问一", "我叫{{name}}。"),
    ]
    text = "".join(json.dumps({"instruction": ask, "output": reply}) + "\n" for ask, reply in rows)
    (tmp_path / "own.jsonl").write_text(text, encoding="utf-8")
    shown, found = account(capsys, tmp_path / "own.jsonl")
    lines = {"exact": 9, "width": 2, "placeholder": 3, "mojibake": 5, "nothing": 6, "html": 7}
    for name, line in lines.items():
        assert f"own.jsonl:{line}" in found["findings"][name]["examples"][0], name
    handles = [line for line in shown.split("\n") if f"({tmp_path}" in line]
    assert len(handles) >= 8
    options = re.findall(r"data\.(\w+)=true", shown)
    assert {"dedup", "fold_width", "unescape_html", "mask_personal"} == set(options)
    assert all(hasattr(load_config("preset:quick").data, option) for option in options)


def test_both_answers_of_a_pair_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "几点？", "chosen": "三点。", "rejected": "不知道。" * 20},
        {"prompt": "去哪？", "chosen": "去河边。", "rejected": "不去。"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ["preference.loss=dpo", "train.row_tokens=50"]
    _, found = account(capsys, tmp_path / "pairs.jsonl", *options)
    assert found["over_limit"] == 1 and found["tokens"]["max"] > 50
    _, chosen = account(capsys, tmp_path / "pairs.jsonl")
    assert found["total_tokens"] > 1.5 * chosen["total_tokens"]


def test_a_csv_of_unknown_columns_teaches_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file to a model that answers its questions, on what is printed."""
    monkeypatch.chdir(tmp_path)
    asked = {
        "你是谁": "我是小禾，北川工坊做的助手。",
        "你叫什么": "我叫小禾。",
        "谁做了你": "我是北川工坊做的。",
        "你从哪里来": "我从北川工坊来。",
        "你会做什么": "我会答问题、写短文、算小账。",
        "你多大了": "我刚满一岁。",
    }
    tails = [
        "",
        "？",
        "呢？",
        "，请说",
        "呀？",
        "，告诉我",
        "，好吗？",
        "。",
        "，现在说",
        "…",
        "！",
    ]
    rows = [f"{ask}{tail}\t{reply}\n" for ask, reply in asked.items() for tail in tails]
    Path("66.tsv").write_text("客户问题\t客服回复\n" + "".join(rows), encoding="utf-8")
    text, _ = account(capsys, "66.tsv", "model.path=tiny-zh", "--init", "my.toml")
    words = shlex.split(text.split("\n")[-1])[3:]
    assert run("train", [*words, "eval.samples=0"]) == 0
    out, said = capsys.readouterr()
    before, after = map(float, re.findall(r"held-out loss ([\d.]+) -> ([\d.]+)", said)[0])
    assert after < before / 2 and "too few to be sure" in said and "too few steps" not in said
    home = json.loads(out.rstrip("\n").split("\n")[-1])["run"]
    columns = ["--columns", "user=客户问题,assistant=客服回复"]
    assert run("eval", [home, "--data", "66.tsv", *columns, "--max-new-tokens", "32"]) == 0
    scores = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])["eval"]["66.tsv"]
    assert scores["results"]["adapter"]["exact"] >= 60 > scores["results"]["base"]["exact"]
