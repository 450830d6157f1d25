"""The mixture: weights, columns, duplicates, the held-out side, leakage; and the cache that makes a
second start tokenize nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_encode import Characters

from cllm.config import Config, DataConfig, Source
from cllm.corpus import read_corpus
from cllm.data import cache, sources
from cllm.data.encode import Ids, encode_set
from cllm.data.schema import Conversation
from cllm.data.sources import Data, prepare
from cllm.messages import UserError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, rows: list[Any]) -> str:
        path = tmp_path / name
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        return str(path)

    return write


def rows(first: int, last: int) -> list[dict[str, str]]:
    return [{"instruction": f"第{n}个问题", "output": f"第{n}个回答"} for n in range(first, last)]


def config(*train: str | Source, **more: Any) -> DataConfig:
    tables = tuple(item if isinstance(item, Source) else Source(path=item) for item in train)
    return DataConfig(train=tables, **{"held_out": 0.0, **more})


def asked(side: Any) -> list[str]:
    return [item.messages[0].content for item in side]


def test_weights_multiply_the_training_side_only(write: Write) -> None:
    big, small = write("big.jsonl", rows(0, 100)), write("small.jsonl", rows(100, 140))
    found = prepare(
        config(Source(path=big, weight=0.5), Source(path=small, weight=2.5), held_out=0.2)
    )
    held = asked(found.held_out)
    assert len(set(held)) == len(held) and set(held).isdisjoint(asked(found.train))
    left = 100 - sum(name in held for name in asked(prepare(config(big)).train))
    own = 40 - (len(held) - (100 - left))
    counts = [asked(found.train).count(f"第{n}个问题") for n in range(140)]
    assert set(counts[:100]) == {0, 1} and sum(counts[:100]) == round(0.5 * left)
    assert set(counts[100:]) <= {0, 2, 3} and sum(counts[100:]) == 2 * own + round(0.5 * own)
    assert (found.rows, found.duplicates, found.rejects) == (140, 0, [])


def test_every_file_has_its_own_columns(write: Write) -> None:
    one = Source(
        path=write("one.jsonl", [{"Q": "甲", "A": "乙"}]), columns={"user": "Q", "assistant": "A"}
    )
    two = Source(
        path=write("two.jsonl", [{"ask me": "丙", "say": "丁"}]),
        columns={"user": "ask me", "assistant": "say"},
    )
    assert asked(prepare(config(one, two, write("three.jsonl", rows(0, 1)))).train) == [
        "甲",
        "丙",
        "第0个问题",
    ]


def test_duplicates_are_dropped_across_files_and_counted(write: Write) -> None:
    one, two = write("one.jsonl", rows(0, 6) + rows(0, 2)), write("two.jsonl", rows(4, 8))
    found = prepare(config(one, two))
    assert asked(found.train) == [f"第{n}个问题" for n in range(8)] and found.duplicates == 4
    kept = prepare(config(one, two, dedup=False))
    assert len(kept.train) == 12 and kept.duplicates == 0


@pytest.mark.parametrize("dedup", [True, False])
def test_the_held_out_side_is_stable_and_duplicates_never_straddle_it(
    write: Write, dedup: bool
) -> None:
    before = prepare(config(write("a.jsonl", rows(0, 300)), held_out=0.1, dedup=dedup))
    more = [*rows(300, 500), *rows(0, 300)[::-1], *rows(0, 40)]
    after = prepare(config(write("b.jsonl", more), held_out=0.1, dedup=dedup))
    assert set(asked(before.held_out)) <= set(asked(after.held_out))
    assert set(asked(before.train)) <= set(asked(after.train))
    assert (
        set(asked(after.train)).isdisjoint(asked(after.held_out)) and 20 < len(before.held_out) < 45
    )


def test_the_only_conversation_is_trained_on(write: Write) -> None:
    for number in range(8):
        found = prepare(config(write("one.jsonl", rows(number, number + 1)), held_out=0.9))
        assert (len(found.train), len(found.held_out)) == (1, 0)


def test_an_eval_file_is_the_held_out_side_and_leaks_are_counted(write: Write) -> None:
    train = write("train.jsonl", [*rows(0, 20), {"instruction": "只有这里", "output": ""}])
    test = write(
        "test.jsonl",
        [*rows(18, 24), {"instruction": " 第3个 问题", "output": "别的回答"}, {"foo": 1}],
    )
    found = prepare(config(train, eval=test, held_out=0.5))
    assert (len(found.train), len(found.held_out), found.leaked, found.rows) == (20, 7, 3, 29)
    assert [reject.reason for reject in found.rejects] == ["empty_assistant", "unknown_schema"]
    with pytest.raises(UserError) as caught:
        prepare(config(train, eval=write("bad.jsonl", [{"foo": 1}])))
    assert caught.value.code == "data.empty"


@pytest.mark.parametrize(("train", "warned"), [("own", True), ("demo", False)])
def test_the_demo_s_test_set_says_nothing_about_other_data(
    write: Write, capsys: pytest.CaptureFixture[str], train: str, warned: bool
) -> None:
    path = write("own.jsonl", rows(0, 4)) if train == "own" else train
    prepare(config(path, eval="demo-test"))
    assert ("demo-test" in capsys.readouterr().err) == warned


def test_the_options_of_the_config_rewrite_the_texts(write: Write) -> None:
    path = write("rows.jsonl", [{"instruction": "ＡＢ&lt;c", "output": "写信给 li@example.com"}])
    assert [m.content for m in prepare(config(path)).train[0]] == [
        "ＡＢ&lt;c",
        "写信给 li@example.com",
    ]
    found = prepare(config(path, fold_width=True, unescape_html=True, mask_personal=True))
    assert [m.content for m in found.train[0]] == ["AB<c", "写信给 [EMAIL]"]


def test_a_missing_opencc_is_one_clear_line(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opencc", None)
    with pytest.raises(UserError, match="pip install opencc"):
        prepare(config(write("rows.jsonl", rows(0, 2)), convert="t2s"))


def test_texts_for_pre_training(write: Write) -> None:
    path = write("text.jsonl", [{"text": "长" * 25}, {"text": "短"}, *rows(0, 1)])
    found = prepare(config(path, kind="text"))
    assert [len(item.messages[0].content) for item in found.train] == [25, 1]
    assert [reject.reason for reject in found.rejects] == ["unknown_schema"]
    refused = prepare(config(path))
    assert len(refused.train) == 1 and 'kind = "text"' in refused.rejects[0].detail


# --- the cache


class Fitted(Characters):
    """A tokenizer that can be told from others, and counts what it encodes."""

    def __init__(self, name: str = "chatml") -> None:
        super().__init__(name)
        self.encoded = 0

    def encode_batch(self, batch: Any) -> list[Ids]:
        batch = list(batch)
        self.encoded += len(batch)
        return super().encode_batch(batch)

    def save(self, directory: Path) -> None:
        (directory / "template.json").write_text(repr(self.template), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLLM_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def started(
    data: DataConfig, tokenizer: Fitted, **more: Any
) -> tuple[Data, list[Any], list[Conversation], dict[str, int]]:
    """The data stage of a run, as plain values."""
    found = prepare(data)
    how = {"kind": "chat", "max_tokens": 150, "truncate": "drop", **more}
    examples, kept, refused = encode_set(found.train, tokenizer, **how)  # type: ignore[arg-type]
    sides = {side: list(getattr(found, side)) for side in ("train", "held_out", "replay")}
    plain = found._replace(**sides)
    return plain, list(examples), list(kept), dict(refused)


def test_a_second_start_reads_and_tokenizes_nothing(
    write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [{"foo": 1}, {"instruction": "长" * 300, "output": "好"}]
    data, tokenizer = (
        config(write("rows.jsonl", rows(0, 30) + rows(0, 3) + bad), held_out=0.2),
        Fitted(),
    )
    cold = started(data, tokenizer)
    assert (
        tokenizer.encoded == len(cold[0].train)
        and cold[3] == {"too_long": 1}
        and cold[0].duplicates == 3
    )
    # nothing half-written is left
    assert sorted(file.suffix for file in folder.iterdir()) == [".safetensors"] * 2
    monkeypatch.setattr(
        sources, "read_conversations", lambda *_: pytest.fail("a file was read again")
    )
    fresh = Fitted()
    assert started(data, fresh) == cold and fresh.encoded == 0
    for nothing in ("", "none"):  # Windows has no empty variables
        monkeypatch.setenv("CLLM_DATA_CACHE", nothing)
        with pytest.raises(pytest.fail.Exception):
            started(data, fresh)


def test_whatever_decides_the_result_makes_it_anew(write: Write, folder: Path) -> None:
    path = write("rows.jsonl", rows(0, 9))
    started(config(path), Fitted())
    for data, name, more in (
        (config(path), "chatml", {"max_tokens": 140}),
        (config(path), "chatml", {"truncate": "prompt"}),
        (config(path), "plain", {}),
        (config(path, fold_width=True), "chatml", {}),
        (
            config(Source(path=path, columns={"user": "output", "assistant": "instruction"})),
            "chatml",
            {},
        ),
        (config(Source(path=path, weight=2.0)), "chatml", {}),
        (config(path, held_out=0.3), "chatml", {}),
    ):
        tokenizer = Fitted(name)
        started(data, tokenizer, **more)
        assert tokenizer.encoded > 0, (data, more)
    write("rows.jsonl", [*rows(0, 8), {"instruction": "第8个问题", "output": "第8个回复"}])
    tokenizer = Fitted()
    assert (
        started(config(path), tokenizer)[0].train[8].messages[1].content == "第8个回复"
        and tokenizer.encoded == 9
    )


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "foreign"])
def test_damaged_entries_are_made_again(write: Write, folder: Path, damage: str) -> None:
    data = config(write("rows.jsonl", rows(0, 30)))
    cold = started(data, Fitted())
    for file in folder.iterdir():
        content = bytearray(file.read_bytes())
        spot = len(content) * 3 // 4
        content[spot] ^= 1
        damaged = {
            "cut": content[:spot],
            "flipped": content,
            "emptied": b"",
            "foreign": b"{}" * 50,
        }[damage]
        file.write_bytes(damaged)
    tokenizer = Fitted()
    assert started(data, tokenizer) == cold and tokenizer.encoded == 30
    assert started(data, Fitted()) == cold


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CLLM_DATA_CACHE", write("file", []) + "/inside")
    assert len(started(config(write("rows.jsonl", rows(0, 5))), Fitted())[1]) == 5
    assert "cannot be kept" in capsys.readouterr().err


def test_the_oldest_entries_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 3000)
    for number in range(4):
        cache.recall(f"entry{number}", lambda: ({"numbers": np.zeros(200, np.int32)}, {}))
        for file in folder.iterdir():  # a file system's clock is coarse
            os.utime(file, (file.stat().st_mtime - 10,) * 2)
    assert sorted(file.stem for file in folder.iterdir()) == ["entry2", "entry3"]


def test_what_killed_writers_left_behind_is_removed(folder: Path) -> None:
    folder.mkdir()
    old, fresh = folder / "entry.123", folder / "entry.456"
    for piece in (old, fresh):
        piece.write_bytes(b"half")
    hours_ago = fresh.stat().st_mtime - 2 * cache.STALE_SECONDS
    os.utime(old, (hours_ago, hours_ago))
    cache.recall("whole", lambda: ({"numbers": np.zeros(2, np.int32)}, {}))
    assert {file.name for file in folder.iterdir()} == {"entry.456", "whole.safetensors"}


def test_slices_are_a_sequence(write: Write) -> None:
    train = prepare(config(write("rows.jsonl", rows(0, 5)))).train
    assert (
        asked(train[1:3]) == ["第1个问题", "第2个问题"]
        and asked(train)[-1] == asked([train[-1]])[0]
    )
    with pytest.raises(IndexError):
        train[5]


def test_fields_that_are_not_read_are_said_at_every_start(
    write: Write, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = [{**row, "note": "别忘了", "id": "a", "hint": ""} for row in rows(0, 12)]
    one, two = write("one.jsonl", noted), write("two.jsonl", [{**noted[0], "hint": "想想"}])
    data = config(one, eval=two)
    for _ in range(2):  # the second time from the cache
        found = read_corpus(Config(data=data), accept_rejects=False)
        assert found.unread == {one: {"note": 12}, two: {"note": 1, "hint": 1}}
        assert "note (13), hint (1)" in capsys.readouterr().err
    assert len(list(folder.iterdir())) == 1
