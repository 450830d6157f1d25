"""Preference data in everybody's schemas -> conversations with a rejected answer, or a reject with
a reason; the votes of the chat page; a pair as two dialogues.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from cllm.config import DataConfig, Source
from cllm.data.message import Message
from cllm.data.pairs import PairNormalizer, dialogue, joined_votes, pair_row, prompt_size, sides
from cllm.data.schema import REASONS, Conversation, Reject
from cllm.data.sources import prepare, read_file
from cllm.messages import UserError

Q, GOOD, BAD = "怎样煮面？", "先烧水，再下面。", "不知道。"
ASK = {"role": "user", "content": Q}


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def told(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


PAIRS: dict[str, dict[str, Any]] = {
    "strings": {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    "alpaca": {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD},
    "messages": {
        "prompt": [ASK],
        "chosen": [said("assistant", GOOD)],
        "rejected": [said("assistant", BAD)],
    },
    "whole dialogues": {
        "chosen": [ASK, said("assistant", GOOD)],
        "rejected": [ASK, said("assistant", BAD)],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": Q}],
        "chosen": told(GOOD),
        "rejected": told(BAD),
    },
    "swift": {"messages": [ASK, said("assistant", GOOD)], "rejected_response": BAD},
    "swift, whole": {
        "messages": [ASK, said("assistant", GOOD)],
        "rejected_messages": [ASK, said("assistant", BAD)],
    },
    "query": {"query": Q, "response": GOOD, "rejected_response": BAD},
    "ranked": {"instruction": Q, "input": "", "output": [GOOD, "烧水。", BAD]},
    "vote": {
        "instruction": Q,
        "vote": "b",
        "models": ["base", "a"],
        "answers": [BAD, GOOD],
        "chosen": GOOD,
        "rejected": BAD,
    },
}


def read(row: object) -> Any:
    return PairNormalizer(kind="pairs")(row)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"问题": Q, "好答案": GOOD, "坏答案": BAD},
            {"user": "问题", "assistant": "好答案", "rejected": "坏答案"},
        ),
        ({"0": Q, "1": BAD, "2": GOOD}, {"user": "0", "assistant": "2", "rejected": "1"}),
        ({"题": Q, "好": GOOD, "rejected": BAD}, {"user": "题", "assistant": "好"}),
        ({"prompt": Q, "chosen": GOOD, "坏": BAD}, {"rejected": "坏"}),
        ({"instruction": Q, "output": GOOD, "坏": BAD}, {"rejected": "坏"}),
        (
            {"题": Q, "甲": GOOD, "乙": BAD},
            {"user": "{题}", "assistant": "{甲}", "rejected": "{乙}"},
        ),
    ],
)
def test_columns_name_both_answers(row: dict[str, str], columns: dict[str, str]) -> None:
    normalize = PairNormalizer(columns, "pairs")
    pair = normalize(row)
    assert isinstance(pair, Conversation), pair
    ask = Message("user", Q)
    assert pair.messages == (ask, Message("assistant", GOOD))
    assert pair.rejected == (ask, Message("assistant", BAD))
    assert not normalize.unread


def test_a_column_that_a_row_has_not_rejects_the_row_and_half_a_mapping_is_refused() -> None:
    row = PairNormalizer({"rejected": "坏"}, "pairs")({"prompt": Q, "chosen": GOOD})
    assert isinstance(row, Reject) and row.reason == "unknown_schema" and "坏" in row.detail
    with pytest.raises(UserError, match=r"data\.columns_half"):
        PairNormalizer({"user": "题"}, "pairs")


def test_what_the_page_writes_beside_a_pair_is_not_called_unread() -> None:
    normalize = PairNormalizer(kind="pairs")
    sampling = {"time": "2026-11-29", "base": "tiny-zh", "sampling": {"temperature": 0.7}}
    assert isinstance(normalize(PAIRS["vote"] | sampling), Conversation) and not normalize.unread


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_every_schema_gives_the_same_pair(row: dict[str, Any]) -> None:
    normalize = PairNormalizer(kind="pairs")
    pair = normalize(row)
    ask = Message("user", Q)
    assert pair.messages == (ask, Message("assistant", GOOD)), pair
    assert pair.rejected == (ask, Message("assistant", BAD))
    assert sides(pair) == [0, 1] and prompt_size(pair) == 1
    if "vote" not in row and "output" not in row:
        assert not normalize.unread


def test_what_stands_before_a_pair_is_common_and_not_learned() -> None:
    before = [ASK, said("assistant", "多少？"), said("user", "一碗。")]
    for row in (
        {
            "system": "短。",
            "messages": [*before, said("assistant", GOOD)],
            "rejected_response": BAD,
        },
        {"system": "短。", "messages": before, "chosen": told(GOOD), "rejected": told(BAD)},
    ):
        pair = read(row)
        for side, text in ((0, GOOD), (1, BAD)):
            one = dialogue(pair, side)
            assert [m.content for m in one] == ["短。", Q, "多少？", "一碗。", text]
            assert [m.trained for m in one if m.role == "assistant"] == [False, True]
            assert not one.rejected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": Q, "chosen": GOOD}, "no_rejected"),
        ({"instruction": Q, "output": GOOD}, "no_rejected"),
        ({"label": False}, "no_rejected"),
        ({"kto_tag": 1}, "no_rejected"),
        ({"prompt": Q, "chosen": GOOD, "rejected": " 先烧水 再下面！"}, "identical_pair"),
        ({"prompt": Q, "chosen": GOOD, "rejected": GOOD}, "identical_pair"),
        ({"prompt": Q, "chosen": GOOD, "rejected": "　"}, "empty_assistant"),
        (
            {
                "chosen": [ASK, said("assistant", GOOD)],
                "rejected": [said("user", "几点？"), said("assistant", BAD)],
            },
            "no_common_prompt",
        ),
        ({"instruction": Q, "vote": "tie", "answers": [GOOD, BAD]}, "no_winner"),
        ({"instruction": Q, "vote": "bad", "answers": [GOOD, BAD]}, "no_winner"),
    ],
)
def test_what_is_no_pair_is_rejected_with_a_code(row: dict[str, Any], reason: str) -> None:
    result = read(row)
    assert isinstance(result, Reject) and result.reason == reason and reason in REASONS


@pytest.mark.parametrize(
    ("yes", "no"), [(True, False), (1, 0), ("1", "0"), ("true", "False"), (1.0, 0.0)]
)
def test_labels_join_where_a_question_has_both(yes: Any, no: Any) -> None:
    def vote(ask: str, text: str, label: Any) -> Conversation:
        item = read({"messages": [said("user", ask), said("assistant", text)], "label": label})
        assert isinstance(item, Conversation)
        return item

    votes = [vote(Q, BAD, no), vote("甲", "乙", yes), vote(Q, GOOD, yes), vote(Q, "滚。", no)]
    votes.append(vote("甲", "乙", no))  # the same answer, for and against
    joined, rejects = joined_votes(votes)
    assert [sides(item) for item in joined] == [[0, 1], [0], [1]]
    assert joined[0] == read(PAIRS["strings"])
    assert [m.content for m in dialogue(joined[2], 1)] == [Q, "滚。"]
    assert [reject.reason for reject in rejects] == ["identical_pair"]


values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from([Q, GOOD, "", "0", "tie"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = sorted({key for row in PAIRS.values() for key in row} | {"label", "history", "tools"})


@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=5))
def test_no_row_raises(row: dict[str, Any]) -> None:
    result = read(row)
    if isinstance(result, Reject):
        assert result.reason in REASONS and result.detail
    else:
        for side in sides(result):
            one = dialogue(result, side)
            assert one.messages[-1].role == "assistant" and one.messages[-1].content
            assert {m.role for m in one} >= {"user"}
        assert sides(result)
        assert read(pair_row(result)) == result


def test_the_cache_keeps_both_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_DATA_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"{Q}{i}", "chosen": GOOD, "rejected": BAD} for i in range(9)]
    rows += [rows[0], {"prompt": f"{Q}0", "chosen": GOOD, "rejected": "别的。"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = DataConfig(train=(Source(path=str(file)),), held_out=0.2)
    first, second = (prepare(data, pairs=True) for _ in range(2))
    assert list(first.train) == list(second.train) and first.duplicates == 1
    assert all(len(sides(item)) == 2 for item in [*second.train, *second.held_out])
    assert sum(map(len, (second.train, second.held_out))) == 10
    plain = prepare(data)
    assert not any(item.rejected for item in plain.train)


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared data not available")
def test_real_files_give_all_their_pairs() -> None:
    folder = SHARED / "data" / "dev" / "preference"
    for name, expected in (
        ("dpo_zh_demo", {(0, 1): 300}),
        ("kto_en_demo_100", {(0,): 54, (1,): 46}),
    ):
        pairs, rejects = read_file(DataConfig(), str(folder / f"{name}.json"), {}, pairs=True)
        assert not rejects and Counter(tuple(sides(item)) for item in pairs) == expected
