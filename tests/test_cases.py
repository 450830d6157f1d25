"""The cases of ../shared/cases: small inputs that were once read wrongly, and what each must give.
Copies in our own words stand in the other tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cllm.check import main as check
from cllm.data import Reject, read_conversations

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"


def case(name: str) -> pytest.MarkDecorator:
    """The test of the folder `name`; skipped without it."""
    return pytest.mark.skipif(not (CASES / name).is_dir(), reason=f"no {name} at hand")


# --- rows


def read(name: str, file: str) -> tuple[list[list[tuple[str, str]]], list[Reject]]:
    conversations, rejects = read_conversations(CASES / name / file)
    return [[(m.role, m.content) for m in item] for item in conversations], rejects


@case("04-multiple-choice-options")
def test_options_are_in_the_prompt() -> None:
    name = "04-multiple-choice-options"
    (question, answer), _ = read(name, "mcq.jsonl")[0]
    assert question[1].split("\n")[1:] == ["A. 维生素A", "B. 维生素C", "C. 钙"]
    assert answer == ("assistant", "A")
    assert len({turns[0] for turns in read(name, "dedup.jsonl")[0]}) == 3
    [(flat, letter)], _ = read(name, "flat-options.jsonl")
    assert "\nB. 红茶\n" in flat[1] and letter == ("assistant", "B")


@case("08-kto-label-zero")
def test_a_label_of_zero_is_negative() -> None:
    conversations, rejects = read("08-kto-label-zero", "kto.jsonl")
    assert [turns[1][1] for turns in conversations] == ["八点。"]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (1, "negative_label"),
        (3, "negative_label"),
    ]


@case("09-passage-dropped")
def test_passages_are_in_the_prompt() -> None:
    conversations, rejects = read("09-passage-dropped", "rag.jsonl")
    assert rejects == []
    for turns, passage in zip(
        conversations, ("告示：本馆", "[1] 告示：", "[1] 第十条"), strict=True
    ):
        assert passage in turns[0][1] and turns[0][1].endswith("？")


@case("10-system-and-functions-under-other-names")
def test_system_and_functions_are_read_under_other_names() -> None:
    conversations, rejects = read_conversations(
        CASES / "10-system-and-functions-under-other-names" / "sysprompt.jsonl"
    )
    assert rejects == []
    assert [item.messages[0].content for item in conversations[:2]] == [
        "你是河边茶馆的掌柜，只答一句。",
        "只答一句。",
    ]
    assert json.loads(conversations[2].tools)[0]["name"] == "clock"


@case("11-image-rows")
def test_rows_with_pictures_are_rejected_by_name() -> None:
    conversations, [reject] = read("11-image-rows", "image.jsonl")
    assert conversations == [] and reject.reason == "invalid_text" and "images" in reject.detail


@case("17-file-name-in-gbk")
@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_file_name_in_gbk_is_checked(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / os.fsdecode("数据.jsonl".encode("gbk"))
    path.write_bytes((CASES / "17-file-name-in-gbk" / "rows.jsonl").read_bytes())
    assert check([str(path)]) == 0
    out = capsys.readouterr().out
    assert "数据.jsonl:1" in out and json.loads(out.strip().split("\n")[-1])["valid"] == 1


TABLES: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("20-csv-backslash-quotes", "esc.csv", [('他说"好"', "好的"), ("路径 C:\\data", "是的")]),
    (
        "33-tsv-quoted-cells",
        "rows.tsv",
        [("列出三种水果", "苹果\n梨\n\t杏"), ('他说"好"吗', '他说"好"。')],
    ),
    (
        "33-tsv-quoted-cells",
        "unbalanced.tsv",
        [('5" 是多长', "约十二点七厘米"), ('"引号开头却不闭合', "也是正文")],
    ),
]


@pytest.mark.parametrize(("name", "file", "expected"), TABLES)
def test_tables_are_read_as_they_are_quoted(
    name: str, file: str, expected: list[tuple[str, str]]
) -> None:
    if not (CASES / name).is_dir():
        pytest.skip(f"no {name} at hand")
    conversations, rejects = read(name, file)
    assert rejects == []
    assert [(ask[1], reply[1]) for ask, reply in conversations] == expected


@case("34-history-of-dicts")
def test_history_may_be_objects_of_any_names() -> None:
    conversations, rejects = read("34-history-of-dicts", "rows.json")
    assert rejects == []
    assert [[text for _, text in turns[:-2]] for turns in conversations] == [
        ["今天开门吗？", "开。"],
        ["在吗", "在。"],
        ["在吗", "在。", "贵吗", "不贵。"],
    ]


@case("35-moss-system")
def test_meta_instruction_is_the_system_message() -> None:
    [turns], _ = read("35-moss-system", "rows.json")
    assert turns[0] == ("system", "你是一位茶馆掌柜。") and len(turns) == 3


@case("36-one-tag")
def test_a_tag_round_the_question_is_none_of_its_words() -> None:
    conversations, _ = read("36-one-tag", "rows.json")
    assert [turns[0][1] for turns in conversations] == ["这药怎么吃？", "问：几点开门？"]
