"""Duplicates, the held-out split, leakage, languages, and the account of a data set."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.data import Conversation, Message, Reject
from cllm.data.quality import (
    FAULTS,
    deduplicate,
    histogram,
    language,
    leaks,
    near_duplicates,
    percentiles,
    quality,
    qwen_tokens,
    split_held_out,
)
from cllm.plots import draw_lengths


def talk(ask: str, reply: str = "好的。", line: int = 0, **more: str) -> Conversation:
    return Conversation(
        (Message("user", ask), Message("assistant", reply)), file="own.json", line=line, **more
    )


MANY = [talk(f"第{n}个问题", f"第{n}个回答", n) for n in range(2000)]
WORDS = "山水云月花鸟风雪江河湖海松竹梅兰春夏秋冬东南西北红黄蓝绿琴棋书画诗酒茶"


def sentence(seed: int, size: int = 60) -> str:
    return "".join(random.Random(seed).choices(WORDS, k=size))


def test_exact_duplicates_keep_the_first() -> None:
    rows = [
        talk("甲", line=1),
        talk("乙", line=2),
        talk("甲", line=3),
        talk("甲", "不", line=4),
        talk("甲", line=5, tools="[1]"),
    ]
    assert [row.line for row in deduplicate(rows)] == [1, 2, 4, 5]


def test_messages_do_not_run_into_one_another() -> None:
    one = Conversation((Message("user", "甲user乙"), Message("assistant", "丙")))
    two = Conversation((Message("user", "甲"), Message("user", "乙"), Message("assistant", "丙")))
    assert len(deduplicate([one, two])) == 2


def test_the_split_is_stable_and_duplicates_stay_together() -> None:
    train, held = split_held_out([*MANY, *MANY[:500]], 0.1)
    assert len(train) + len(held) == 2500
    assert 0.07 < len(held) / 2500 < 0.13
    assert {row.messages for row in train}.isdisjoint(row.messages for row in held)
    fewer_train, fewer_held = split_held_out(MANY[::-1][:700], 0.1)
    assert {row.messages for row in fewer_held} <= {row.messages for row in held}
    assert {row.messages for row in fewer_train} <= {row.messages for row in train}
    assert split_held_out(MANY, 0.1, seed=1)[1] != split_held_out(MANY, 0.1)[1]


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.999])
def test_neither_side_of_a_small_split_is_empty(fraction: float) -> None:
    for start in range(20):
        train, held = split_held_out([*MANY[start : start + 2]] * 2, fraction)
        assert len(train) == len(held) == 2
    assert split_held_out(MANY[:1], fraction)[1:] in (([],), (MANY[:1],))


def test_a_fraction_of_nothing_and_of_everything() -> None:
    assert split_held_out(MANY, 0.0) == (MANY, [])
    assert split_held_out(MANY, 1.0) == ([], MANY)
    assert split_held_out([], 0.5) == ([], [])


def test_near_duplicates_are_found_and_others_are_not() -> None:
    texts = [sentence(n) for n in range(300)]
    changed = texts[7][:30] + "改" + texts[7][31:]
    spaced = " ".join(texts[11])
    cut = texts[13][:30]
    assert near_duplicates([*texts, changed, spaced, cut, texts[3]]) == [
        (300, 7),
        (301, 11),
        (303, 3),
    ]


def test_near_duplicates_of_short_and_empty_texts() -> None:
    assert near_duplicates(["", "", "甲", "甲", "甲乙", " "]) == [(3, 2)]


def test_the_threshold_is_the_jaccard_similarity_of_trigrams() -> None:
    first, second = "abcdefghij", "abcdefghiX"  # 8 trigrams each, 7 in common: 7 / 9
    assert near_duplicates([first, second], threshold=7 / 9) == [(1, 0)]
    assert near_duplicates([first, second], threshold=7 / 9 + 0.01) == []


def test_leaks_name_the_training_row() -> None:
    train = [talk(sentence(n), line=n) for n in range(50)]
    test = [
        talk(sentence(900)),
        talk(sentence(20), "另一个回答"),
        talk(sentence(30)[:-1] + "了"),
        talk(sentence(900)),
    ]
    assert leaks(train, test) == [(1, 20), (2, 30)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("这个问题应该怎么回答？", "simplified"),
        ("這個問題應該怎麼回答？", "traditional"),
        ("用 Python 写一个函数，计算两个数的和。", "simplified"),
        ("What is the capital of France?", "english"),
        ("3.14159", "other"),
        ("", "other"),
    ],
)
def test_languages(text: str, expected: str) -> None:
    assert language(text) == expected


def test_percentiles_and_histogram() -> None:
    values = list(range(1, 101))
    assert percentiles(values) == {
        "min": 1,
        "p50": 51,
        "p90": 91,
        "p99": 100,
        "max": 100,
        "mean": 50.5,
    }
    lines = histogram(values)
    assert sum(int(line.split()[-1]) for line in lines) == 100
    assert histogram([]) == [] and percentiles([]) == {}
    assert len(histogram([5] * 10 + [100_000])) <= 13


def test_the_account() -> None:
    rows = [
        talk("请给这个人写一封邮件", "写给 li@example.com 的信。", 1, category="写作"),
        talk("你是谁", "作为一个人工智能语言模型，我没有名字。", 2),
        talk("你是谁", "作为一个人工智能语言模型，我没有名字。", 3),
        talk("Who wrote this?", "An engineer \ufffd wrote it.", 4),
    ]
    rejects = [Reject("own.json", n, "parse_error", "断了") for n in range(5, 10)] + [
        Reject("own.json", 10, "empty_user", "空")
    ]
    account = quality(
        rows, rejects, token_lengths=[[len(row.messages[1].content)] for row in rows], max_tokens=16
    )
    assert (account["rows"], account["valid"], account["rejected"]) == (10, 4, 6)
    assert list(account["rejects"]) == ["parse_error", "empty_user"]
    assert account["rejects"]["parse_error"]["count"] == 5
    assert [example["line"] for example in account["rejects"]["parse_error"]["examples"]] == [
        5,
        6,
        7,
    ]
    assert account["duplicates"] == {"exact": 1, "near": 0}
    assert account["languages"] == {"simplified": 3, "english": 1}
    assert account["boilerplate"] == {"count": 2, "examples": ["own.json:2", "own.json:3"]}
    assert account["personal"]["EMAIL"]["count"] == 1 and account["personal"]["PHONE"]["count"] == 0
    assert account["replacement_characters"] == 1
    assert account["categories"] == {"写作": 1}
    assert account["limit"] == 16 and account["over_limit"] == 4
    json.dumps(account)


def test_the_account_of_nothing() -> None:
    account = quality([], [])
    assert account["rows"] == 0 and account["characters"] == {}


def test_lengths_are_plotted(tmp_path: Path) -> None:
    draw_lengths([1, 2, 3, 50], tmp_path / "lengths.png", "tokens", 40)
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("lengths", [[], [0, 0], [7], [1, 6012]])
def test_a_plot_in_chinese_lacks_no_character(
    tmp_path: Path, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLLM_LANG", "zh")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that its font lacks
        draw_lengths(lengths, tmp_path / "lengths.png", "tokens", 40)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("placeholder", "我叫{{name}}", True),
        ("placeholder", "我叫{姓名}，<COMPANY_NAME>做的", True),
        ("placeholder", r"$\\frac{ab}{cd}$ 和 x^{ij}，{a}，${ab}", False),
        ("mojibake", "锟斤拷", True),
        ("mojibake", "cafÃ© au lait", True),
        ("mojibake", "你好".encode().decode("latin-1"), True),
        ("mojibake", "un café et un marché\u00a0», größer, señor", False),
        ("html", "1 &lt; 2 &#39;x&#39;", True),
        ("html", "AT&T 和 R&D; a && b", False),
    ],
)
def test_faults_are_found_and_ordinary_texts_are_not(name: str, text: str, found: bool) -> None:
    assert bool(FAULTS[name].search(text)) == found


def test_an_outlier_leaves_the_other_bins_filled() -> None:
    lines = histogram([*range(20, 86), 6012])
    assert sum(int(line.split()[-1]) for line in lines) == 67
    assert sum(int(line.split()[-1]) > 0 for line in lines) == len(lines) >= 4


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
def test_every_value_is_in_its_bin(values: list[int]) -> None:
    lines = histogram(values)
    for line in lines:
        low, high = (int(part) for part in line.split()[0].split("-"))
        inside = sum(low <= max(1, value) <= max(1, high) for value in values)
        assert inside == int(line.split()[-1])


def test_what_qwen_would_take_grows_with_the_text() -> None:
    short, long = [talk("你好", "好")], [talk("你好", "好" * 100)]
    assert qwen_tokens([]) == 0 < qwen_tokens(short) < qwen_tokens(long) < 100
