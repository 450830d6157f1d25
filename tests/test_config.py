"""The config: cllm.toml shows every key, round trip, and every mistake reported at once with file
and line.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.config import PRESETS, Config, Source, load_config, to_toml
from cllm.messages import UserError

ROOT = Path(__file__).parents[1]


def test_cllm_toml_names_every_key() -> None:
    text = (ROOT / "cllm.toml").read_text(encoding="utf-8")
    load_config(ROOT / "cllm.toml")
    for section in dataclasses.fields(Config):
        block = text.split(f"\n[{section.name}]\n", 1)[1].split("\n[", 1)[0]
        for key in dataclasses.fields(getattr(Config(), section.name)):
            assert f"\n{key.name} = " in "\n" + block or f"\n# {key.name} = " in block, (
                f"cllm.toml lacks {section.name}.{key.name}"
            )


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.toml")), ids=lambda p: p.stem)
def test_presets_load(preset: Path) -> None:
    config = load_config(f"preset:{preset.stem}", ["data.train=x.jsonl"])
    assert config.data.train == (Source(path="x.jsonl"),)


def test_effective_config_reads_back_equal(tmp_path: Path) -> None:
    overrides = [
        'data.train=[{path="a b.json", weight=0.5, columns={user="问\\"题"}}, {path="c"}]',
        'lora.targets=["q_proj", "v_proj"]',
        "train.learning_rate=1e-3",
        'data.columns={user="0", assistant="{A}\\n{B}"}',
        "run.dir=runs\\windows",
        r'data.convert="a\u0001\u001f\u007f\t\n\r\b\f\"\\.jsonl"',
    ]
    config = load_config(ROOT / "cllm.toml", overrides)
    assert config.data.train[0] == Source(path="a b.json", weight=0.5, columns={"user": '问"题'})
    assert config.run.dir == "runs\\windows"
    (tmp_path / "c.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("问题", "问题"),
        ("客服 回复", "客服 回复"),
        ("a=b = c", "a=b = c"),
        ("0", "0"),
        ("1e5", "1e5"),
        ("true", "true"),
        ("2024-01-01", "2024-01-01"),
        ("{A} = {B}", "{A} = {B}"),
        ("[备注]", "[备注]"),
        ("[1]", "[1]"),
        ("# 号", "# 号"),
        ("", ""),
        ('"问 题"', "问 题"),
        ("'问题'", "问题"),
        (r'"{A}\n{B}"', "{A}\n{B}"),
    ],
)
def test_a_column_is_named_in_bare_words(word: str, meant: str) -> None:
    config = load_config(ROOT / "cllm.toml", [f"data.columns.user={word}"])
    assert config.data.columns == {"user": meant}


@given(st.text(st.characters(exclude_characters="\"'\r\n", codec="utf-8"), max_size=12))
def test_any_words_without_quotes_are_taken_as_they_are(words: str) -> None:
    # each kind of setting that takes words: an entry of a table, a text, a text or a list
    overrides = [f"data.columns.user={words}", f"data.convert={words}"]
    data = load_config(os.devnull, overrides).data
    assert (data.columns, data.convert) == ({"user": words}, words)


@pytest.mark.parametrize(
    ("files", "paths"),
    [
        ("my.jsonl", ["my.jsonl"]),
        ("2024", ["2024"]),
        ("我的 数据/a.csv", ["我的 数据/a.csv"]),
        (r"C:\Users\me\new\x.jsonl", [r"C:\Users\me\new\x.jsonl"]),
        (r'"C:\Users\me\x.jsonl"', [r"C:\Users\me\x.jsonl"]),
        ("[a.jsonl, 我的 数据/b.csv]", ["a.jsonl", "我的 数据/b.csv"]),
        ('["a.jsonl", "b,c.csv"]', ["a.jsonl", "b,c.csv"]),
        (r'["C:\Users\a.jsonl", D:\b.csv]', [r"C:\Users\a.jsonl", r"D:\b.csv"]),
    ],
)
def test_files_are_named_in_bare_words(files: str, paths: list[str]) -> None:
    data = load_config(ROOT / "cllm.toml", [f"data.train={files}"]).data
    assert [source.path for source in data.train] == paths


def test_what_is_no_text_stays_a_number_a_switch_or_a_list() -> None:
    overrides = [
        "train.steps=7",
        "train.epochs=2",
        "lora.dora=true",
        "lora.targets=[q_proj, v_proj]",
    ]
    config = load_config(ROOT / "cllm.toml", overrides)
    assert (config.train.steps, config.train.epochs, config.lora.dora) == (7, 2.0, True)
    assert config.lora.targets == ["q_proj", "v_proj"]
    assert load_config(ROOT / "cllm.toml", ["lora.targets=q_proj"]).lora.targets == "q_proj"
    for wrong in ("train.steps=seven", "train.steps=1.5", "lora.dora=1", "model.head=16"):
        with pytest.raises(UserError, match=wrong.split("=")[0]):
            load_config(ROOT / "cllm.toml", [wrong])


@pytest.mark.parametrize("table", ["{user=问题, assistant=客服 回复}", "问题", "[a]"])
def test_a_table_whose_quotes_a_shell_took_is_answered_with_a_form_that_works(table: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(ROOT / "cllm.toml", [f"data.columns={table}"])
    told = str(refused.value)
    words = re.findall(r"data\.columns\.\w+=\w+", told)
    columns = load_config(ROOT / "cllm.toml", words).data.columns
    assert columns == {"user": "question", "assistant": "answer"}
    assert not {'"', "'"} & set("".join(words))


@pytest.mark.parametrize(
    "line",
    [
        r'train = "C:\Users\me\x.jsonl"',
        r'train = "C:\temp\new.jsonl"',
        r'eval = "D:\data\test.jsonl"',
        r'train = "C:\data\"',
    ],
)
def test_a_windows_path_in_double_quotes_is_answered_with_its_line(
    line: str, tmp_path: Path
) -> None:
    file = tmp_path / "my.toml"
    file.write_text(f"# mine\n[data]\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"my\.toml:3: .*single quotes") as refused:
        load_config(file)
    assert str(refused.value).count("\n") <= 1
    file.write_text(f"[data]\n{line}\n".replace('"', "'"), encoding="utf-8")
    assert "\\" in str(load_config(file).data)
    with pytest.raises(UserError, match=r"broken\.toml is not valid TOML"):
        (tmp_path / "broken.toml").write_text("[data]\ntrain = a b\n", encoding="utf-8")
        load_config(tmp_path / "broken.toml")


def test_one_column_is_named_on_the_command_line() -> None:
    config = load_config(
        ROOT / "cllm.toml",
        ["data.columns={user='题', assistant='好'}", "data.columns.rejected=坏答案"],
    )
    assert config.data.columns == {"user": "题", "assistant": "好", "rejected": "坏答案"}
    config = load_config(ROOT / "cllm.toml", ["data.columns.rejected=坏答案"])
    assert config.data.columns == {"rejected": "坏答案"}


def test_every_mistake_at_once_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        "[model]\npath = 3\n[lora]\nrnk = 8\ndropout = 1.5\n[train]\nepochs = true\nschedule = 'cosin'\n[trian]\nx = 1\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError) as caught:
        load_config(path, ["eval.everyy=3", "nonsense", "memory.budget_gib=-1"])
    text = str(caught.value)
    for expected in (
        "bad.toml:2: model.path must be str, found 3",
        "bad.toml:4: unknown key lora.rnk; did you mean 'rank'?",
        "bad.toml:5: lora.dropout = 1.5 is outside 0 … 0.99",
        "bad.toml:7: train.epochs must be float, found True",
        "bad.toml:8: train.schedule must be 'cosine' | 'linear' | 'constant', found 'cosin'",
        "bad.toml:9: unknown key trian; did you mean 'train'?",
        "eval.everyy=3: unknown key eval.everyy; did you mean 'every'?",
        "'nonsense' is no override",
        "memory.budget_gib = -1.0 is outside 0 … inf",
    ):
        assert expected in text, text
    assert text.startswith("error [config.invalid]: 9 mistake(s)")


def test_unreadable_and_broken_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.toml: No such file"):
        load_config(tmp_path / "nothing.toml")
    (tmp_path / "broken.toml").write_text("[model\npath=", encoding="utf-8")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(tmp_path / "broken.toml")
    with pytest.raises(UserError, match="no preset 'qwen9'"):
        load_config("preset:qwen9")
    with pytest.raises(UserError, match=r"tokens_per_step must be at least train\.row_tokens"):
        load_config(ROOT / "cllm.toml", ["train.row_tokens=4096", "train.tokens_per_step=1024"])


def test_a_damaged_config_of_a_run_is_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[model\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.toml is not valid TOML"):
        load_config(tmp_path)
    (tmp_path / "config.toml").write_text("[model]\npth = 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.toml:2: unknown key"):
        load_config(tmp_path)


def test_a_preference_loss_brings_its_own_rate_where_none_is_written(tmp_path: Path) -> None:
    file = tmp_path / "short.toml"
    file.write_text('[preference]\nloss = "dpo"\n', encoding="utf-8")
    plain, train = load_config(file, ["preference.loss=none"]).train, load_config(file).train
    assert (plain.learning_rate, plain.epochs, plain.warmup) == (2e-4, 3.0, 0.03)
    assert (train.learning_rate, train.epochs, train.warmup) == (5e-6, 1.0, 0.1)
    assert load_config("preset:qwen3-4b", ["preference.loss=dpo"]).train.learning_rate == 5e-6
    written = load_config(file, ["train.epochs=2", "train.learning_rate=1e-5"]).train
    assert (written.learning_rate, written.epochs, written.warmup) == (1e-5, 2.0, 0.1)
    for wrong in ("train=1", "preference=1"):
        file.write_text(f"{wrong}\n", encoding="utf-8")
        with pytest.raises(UserError, match=wrong[:5]):
            load_config(file, ["preference.loss=dpo"] if wrong == "train=1" else [])


def test_what_no_preference_loss_goes_with_is_said_at_once() -> None:
    with pytest.raises(UserError, match="5e-6"):
        load_config("preset:qwen3-4b", ["preference.loss=dpo", "train.learning_rate=auto"])
    overrides = 'preference.loss="orpo" data.truncate="prompt" lora.dropout=0.1 data.kind="text"'
    with pytest.raises(UserError) as refused:
        load_config(ROOT / "cllm.toml", overrides.split())
    text = str(refused.value)
    for key in ("data.truncate", "lora.dropout", "data.kind", "preference.sft = 1"):
        assert key in text, key
    for wrong in ("beta=0", "label_smoothing=0.5", "ld_alpha=1.5", "sft=-1", 'loss="sigmoid"'):
        with pytest.raises(UserError, match=wrong.split("=")[0]):
            load_config(ROOT / "cllm.toml", [f"preference.{wrong}"])


def test_a_data_file_in_place_of_a_config_is_told_how_to_get_one(tmp_path: Path) -> None:
    rows = {
        "my.jsonl": b'{"instruction": "a", "output": "b"}\n',
        "my.csv": "问,答\n".encode("gb18030"),
    }
    for name, content in rows.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"cllm\.check .*--init my\.toml"):
            load_config(tmp_path / name)
