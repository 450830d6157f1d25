"""Files: containers, encodings, compression and everything that can be broken about them, made here
in small; then the dev files.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data import (
    Conversation,
    Message,
    Reject,
    TextOptions,
    iter_conversations,
    read_conversations,
    write_conversations,
)
from cllm.data.encoding import sniff_encoding
from cllm.messages import UserError, file_name

DEV = Path(__file__).resolve().parents[2] / "shared" / "data" / "dev"
ROWS = [
    {"instruction": f"第{n}个问题是什么？", "input": "", "output": f"这是第{n}个回答，没有别的。"}
    for n in range(1, 6)
]
TRADITIONAL = "這個問題應該這樣說：我們可以從歷史裡學到很多東西，時間會給大家一個答案。"
SIMPLIFIED = "这个问题应该这样说：我们可以从历史里学到很多东西，时间会给大家一个答案。"
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(content: str | bytes, name: str = "rows.json") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path

    return save


def dump(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def lines(rows: list[Any]) -> str:
    return "".join(dump(row) + "\n" for row in rows)


def asks(conversations: list[Conversation]) -> list[str]:
    return [conversation.messages[0].content for conversation in conversations]


ALL = [row["instruction"] for row in ROWS]
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}
CSV = "instruction,input,output\n" + "".join(
    f"{row['instruction']},,{row['output']}\n" for row in ROWS
)


JSON_FORMS = [
    lines(ROWS),
    lines(ROWS).replace("\n", "\r\n"),
    "\n\n" + lines(ROWS).replace("\n", "\n\n \n"),
    lines(ROWS).rstrip(),
    dump(ROWS),
    dump(ROWS, indent=1),
    dump(ROWS, indent=0),
    "[" + ",\n".join(dump(row) for row in ROWS) + "]",
    "[\n" + "\n,".join(dump(row) for row in ROWS) + "\n]\n",
    "\n".join(dump(row, indent=2) for row in ROWS),
    dump({f"r{n}": row for n, row in enumerate(ROWS)}),
    dump({f"r{n}": [row] for n, row in enumerate(ROWS)}, indent=2),
    dump({"data": ROWS}),
    dump({"version": "1", "data": ROWS, "licence": {"name": "x"}}, indent=2),
    '{"data": [\n' + ",\n".join(dump(row) for row in ROWS) + "\n]}",
    dump(COLUMNS),
    dump(COLUMNS, indent=2),
    lines([[row] for row in ROWS]),
]
TABLE_FORMS = [
    CSV,
    "\ufeff" + CSV,
    CSV.replace(",", "\t"),
    CSV.replace(",", ";"),
    CSV.replace("\n", "\r\n"),
    CSV.replace("\n", "\r"),
    CSV.replace("第1个问题是什么？", '"第1个问题是什么？"'),
]


def test_what_a_turn_says_besides_makes_it_no_row(save: Save) -> None:
    turns = [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答", "reference": "文件三", "summary": "短"},
    ]
    for text, name in ((dump(turns), "rows.json"), (lines([turns]), "rows.jsonl")):
        assert [len(c.messages) for c in read_conversations(save(text, name))[0]] == [2]


@pytest.mark.parametrize(
    ("content", "names"),
    [(content, ("rows.json", "rows.jsonl", "rows.csv", "rows")) for content in JSON_FORMS]
    + [(content, ("rows.csv", "rows.tsv", "rows.txt", "rows")) for content in TABLE_FORMS],
)
def test_containers_are_known_by_their_content(
    save: Save, content: str, names: tuple[str, ...]
) -> None:
    for name in names:
        for path in (save(content, name), save(gzip.compress(content.encode()), name + ".gz")):
            conversations, rejects = read_conversations(path)
            assert rejects == [], name
            assert asks(conversations) == ALL, name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030", "gbk"])
@pytest.mark.parametrize("form", [lines, dump, lambda rows: dump(rows, indent=1), lambda _: CSV])
def test_encodings(save: Save, encoding: str, form: Callable[[Any], str]) -> None:
    conversations, rejects = read_conversations(save(form(ROWS).encode(encoding), "rows.csv"))
    assert rejects == [] and asks(conversations) == ALL


def test_four_byte_gb18030(save: Save) -> None:
    rows = [
        {
            "instruction": f"㐀字和𠮷字有什么不同？我们来看第{n}个例子。",
            "output": "这是生僻字，在旧编码里要用四个字节。",
        }
        for n in range(20)
    ]
    conversations, rejects = read_conversations(save(lines(rows).encode("gb18030")))
    assert rejects == [] and asks(conversations) == [row["instruction"] for row in rows]


@pytest.mark.parametrize("form", [lines, dump])
def test_big5_is_told_from_gb18030(save: Save, form: Callable[[Any], str]) -> None:
    rows = [{"instruction": TRADITIONAL, "output": f"是的，這是第{n}個回答。"} for n in range(3)]
    conversations, rejects = read_conversations(save(form(rows).encode("big5")))
    assert rejects == [] and asks(conversations) == [TRADITIONAL] * 3


def test_traditional_text_in_gb18030_stays_gb18030() -> None:
    assert sniff_encoding(TRADITIONAL.encode("gb18030")) == "gb18030"
    assert sniff_encoding(SIMPLIFIED.encode("gb18030")) == "gb18030"
    assert sniff_encoding(TRADITIONAL.encode("big5")) == "big5hkscs"
    assert sniff_encoding(SIMPLIFIED.encode("utf-8")[:-1]) == "utf-8"


@pytest.mark.parametrize(("encoding", "text"), [("gb18030", SIMPLIFIED), ("big5", TRADITIONAL)])
def test_one_line_in_another_encoding_is_mended(save: Save, encoding: str, text: str) -> None:
    content = (
        lines(ROWS).encode()
        + dump({"instruction": text, "output": text}).encode(encoding)
        + b"\n"
        + lines(ROWS).encode()
    )
    conversations, rejects = read_conversations(save(content))
    assert rejects == [] and asks(conversations) == [*ALL, text, *ALL]


def test_a_utf8_line_in_a_gb18030_file_is_mended(save: Save) -> None:
    content = (
        lines(ROWS).encode("gb18030")
        + dump({"instruction": SIMPLIFIED, "output": SIMPLIFIED}).encode()
        + b"\n"
    )
    conversations, rejects = read_conversations(save(content))
    assert rejects == [] and asks(conversations) == [*ALL, SIMPLIFIED]


@pytest.mark.parametrize("form", [lines, dump])
def test_bytes_of_no_encoding_reject_their_row_only(save: Save, form: Callable[[Any], str]) -> None:
    content = form(ROWS).encode().replace("第3个回答".encode(), b"\xff\xfe\x80 \xff")
    conversations, rejects = read_conversations(save(content))
    assert asks(conversations) == [ALL[0], ALL[1], ALL[3], ALL[4]]
    assert [reject.reason for reject in rejects] == ["decode_error"]


BAD_LINES = [
    '{"instruction": "断了',
    "{'instruction': '引号', 'output': '不对'}",
    "# 注释",
    "[1, 2]",
    '"一句话"',
    "null",
    "12",
    '{"instruction": "多余", "output": "逗号"},',
]


@pytest.mark.parametrize("bad", BAD_LINES)
@pytest.mark.parametrize("position", [0, 2, 5])
def test_bad_lines_are_rejected_one_by_one_with_their_number(
    save: Save, bad: str, position: int
) -> None:
    good = [dump(row) for row in ROWS]
    conversations, rejects = read_conversations(
        save("\n".join([*good[:position], bad, *good[position:]]))
    )
    assert asks(conversations) == ALL
    assert [
        (reject.line, reject.reason in ("parse_error", "not_an_object")) for reject in rejects
    ] == [(position + 1, True)]
    assert rejects[0].detail and rejects[0].file.endswith("rows.json")


def test_a_file_of_bad_lines_only(save: Save) -> None:
    conversations, rejects = read_conversations(save("\n".join(BAD_LINES[:2] * 3)))
    assert conversations == [] and [reject.line for reject in rejects] == [1, 2, 3, 4, 5, 6]


def test_lines_break_at_line_feeds_only(save: Save) -> None:
    row = {"instruction": "甲\u2028乙\u2029丙\x85丁\x0b", "output": "好"}
    conversations, rejects = read_conversations(save(lines([row, *ROWS])))
    assert rejects == [] and conversations[0].messages[0].content == "甲\u2028乙\u2029丙\x85丁"
    assert [conversation.line for conversation in conversations] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("indent", [None, 1, 2])
def test_broken_arrays_yield_every_complete_row_and_one_reject(
    save: Save, indent: int | None
) -> None:
    whole = dump(ROWS, indent=indent)
    for broken in (
        whole[:-1].rstrip() + ",\n]",
        whole + "\n多余的字",
        whole + "]",
        whole[:-1].rstrip(),
        whole[:-1].rstrip() + ",",
        whole[:-1] + "}",
    ):
        conversations, rejects = read_conversations(save(broken))
        assert asks(conversations) == ALL
        assert [reject.reason for reject in rejects] == ["parse_error"]
    for cut in range(len(whole) - 12, len(whole) // 2, -7):
        conversations, rejects = read_conversations(save(whole[:cut]))
        assert asks(conversations) == ALL[: len(conversations)] and len(conversations) in (2, 3, 4)
        assert len(rejects) == 1 and rejects[0].reason == "parse_error"
        assert rejects[0].line in (
            (1,) if indent is None else (1 + 5 * len(conversations), 2 + 5 * len(conversations))
        )


def test_a_broken_element_costs_itself_only_when_rows_have_lines_of_their_own(save: Save) -> None:
    broken = dump(ROWS, indent=1).replace('"output": "这是第2个', '"output": 这是第2个')
    conversations, rejects = read_conversations(save(broken))
    assert asks(conversations) == [ALL[0], *ALL[2:]]
    assert [(reject.line, reject.reason) for reject in rejects] == [(7, "parse_error")]


def test_broken_elements_are_saved_one_by_one_however_long_the_array(save: Save) -> None:
    rows = [{"instruction": f"问{n}" + "长" * 200, "output": "答"} for n in range(6000)]
    elements = [" " + dump(row)[:-1] + (",}" if n % 3 == 0 else "}") for n, row in enumerate(rows)]
    conversations, rejects = read_conversations(save("[\n" + ",\n".join(elements) + "\n]"))
    assert [item.line for item in conversations] == [n + 2 for n in range(6000) if n % 3]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (n + 2, "parse_error") for n in range(0, 6000, 3)
    ]


def test_a_cut_wrapper_and_a_cut_object_by_key(save: Save) -> None:
    for value in ({"data": ROWS}, {f"r{n}": row for n, row in enumerate(ROWS)}):
        conversations, rejects = read_conversations(save(dump(value)[:-20]))
        assert asks(conversations) == ALL[:4]
        assert [reject.reason for reject in rejects] == ["parse_error"]


def test_an_array_of_turns_is_one_conversation(save: Save) -> None:
    turns = [
        {"role": "client", "content": "甲", "annotation": []},
        {"role": "counselor", "content": "乙"},
    ]
    for indent in (None, 2):
        conversations, rejects = read_conversations(save(dump(turns, indent=indent)))
        assert asks(conversations) == ["甲"] and rejects == []
    conversations, rejects = read_conversations(save(dump([*turns, *ROWS])))
    assert (
        asks(conversations) == ALL
        and [reject.reason for reject in rejects] == ["unknown_schema"] * 2
    )
    conversations, rejects = read_conversations(save(lines([turns, turns])))
    assert asks(conversations) == ["甲", "甲"] and rejects == []


def test_a_single_object_is_one_row(save: Save) -> None:
    for row in (
        ROWS[0],
        {"input": ["甲", "丙"], "output": ["乙", "丁"]},
        {"messages": [{"message": "甲"}, {"message": "乙"}]},
    ):
        conversations, rejects = read_conversations(save(dump(row, indent=2)))
        assert len(conversations) == 1 and rejects == []


def test_a_reject_speaks_the_language_of_its_reader(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [
        '{"instruction": "问", "output": ""}',
        '{"messages": [{"role": "老师", "content": "x"}]}',
        "[1]",
        '{"x": 1}',
        '{"instruction": "坏',
    ]
    file = save(
        "\n".join(bad) + "\n" + '{"messages": [{"role": "user", "content": "y"}]}', "rows.jsonl"
    )
    english = [reject.detail for reject in read_conversations(file)[1]]
    monkeypatch.setenv("CLLM_LANG", "zh")
    chinese = [reject.detail for reject in read_conversations(file)[1]]
    assert len(english) == len(chinese) == 6 and not any("expected" in detail for detail in chinese)
    assert all("expected" in detail for detail in english) and all(
        "应" in detail for detail in chinese
    )


@pytest.mark.parametrize("content", ["", "\n \n", "[]", "\ufeff"])
def test_no_rows(save: Save, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_conversations(save(content)) == ([], [])
    assert "no rows" in capsys.readouterr().err


def test_a_header_alone_is_no_row(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_conversations(save("instruction,output\n", "rows.csv")) == ([], [])
    assert "no rows" in capsys.readouterr().err


def test_csv_quotes_newlines_and_stray_quotes(save: Save) -> None:
    text = (
        'instruction,output\n"甲,一\n二","他说""好"""\n5" 的管子,乙\n'
        '"没有关上,丙\n丁,戊\n己\n庚,辛,多了一格\n'
    )
    conversations, rejects = read_conversations(save(text, "rows.csv"))
    assert [(asked.line, *(message.content for message in asked)) for asked in conversations] == [
        (2, "甲,一\n二", '他说"好"'),
        (4, '5" 的管子', "乙"),
        (6, "丁", "戊"),
    ]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (5, "parse_error"),
        (7, "empty_assistant"),
        (8, "parse_error"),
    ]


def test_tsv_without_header_and_with_raw_quotes(save: Save) -> None:
    content = '"甲"说\t乙\n"丙\t丁\n"他说""好"""\t己\n'
    conversations, rejects = read_conversations(
        save(content, "rows.tsv"), {"user": "0", "assistant": "1"}
    )
    assert rejects == []
    assert [tuple(message.content for message in asked) for asked in conversations] == [
        ('"甲"说', "乙"),
        ('"丙', "丁"),
        ('他说"好"', "己"),
    ]


def test_column_template_over_csv(save: Save) -> None:
    path = save(
        ",Question,A,B,Answer\n0,哪个是水果,苹果,石头,A\n1,哪个是石头,苹果,花岗岩,B\n", "rows.csv"
    )
    conversations, rejects = read_conversations(
        path, {"user": "{Question}\nA. {A}\nB. {B}", "assistant": "Answer"}
    )
    assert rejects == []
    assert conversations[1].messages == (
        Message("user", "哪个是石头\nA. 苹果\nB. 花岗岩"),
        Message("assistant", "B"),
    )


def test_concatenated_files(save: Save) -> None:
    first, second = dump(ROWS[0]), dump(ROWS[1])
    for content in (f"[{first}]\n[{second}]", f"\ufeff{first}\n\ufeff{second}", first + second):
        conversations, rejects = read_conversations(save(content))
        assert asks(conversations) == ALL[:2] and rejects == []


def test_duplicate_keys_nan_and_escapes(save: Save) -> None:
    content = (
        '{"instruction": "甲", "instruction": "乙", "input": NaN, "output": "\\ud83d\\ude00"}\n'
        '{"instruction": "甲", "output": "\\ud83d"}\n'
    )
    conversations, rejects = read_conversations(
        save(content + '{"instruction": "甲", "output": ' + "9" * 5000 + "}\n")
    )
    assert conversations[0].messages == (Message("user", "乙"), Message("assistant", "😀"))
    assert [reject.reason for reject in rejects] == ["invalid_text", "parse_error"]


def test_raw_control_characters_in_strings_are_accepted(save: Save) -> None:
    conversations, rejects = read_conversations(
        save('{"instruction": "甲\t乙\x01", "output": "丙"}\n' + lines(ROWS))
    )
    assert rejects == [] and conversations[0].messages[0].content == "甲\t乙"


def test_deep_nesting_is_one_reject(save: Save) -> None:
    for content in (
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"instruction": ' + "[" * 600 + "]" * 600 + ', "output": "好"}',
    ):
        conversations, rejects = read_conversations(save(content))
        assert conversations == [] and len(rejects) == 1


def test_a_cut_gzip_keeps_the_rows_before_the_cut(save: Save) -> None:
    for size, least in ((2000, 1000), (40, 20)):
        content = gzip.compress(
            "".join(
                dump({**ROWS[0], "id": random.Random(n).random()}) + "\n" for n in range(size)
            ).encode()
        )
        conversations, rejects = read_conversations(
            save(content[: len(content) * 3 // 4], "rows.jsonl.gz")
        )
        assert len(conversations) >= least
        assert [reject.reason for reject in rejects][-1] == "decode_error" and len(rejects) <= 2


def test_a_directory_is_read_in_order(tmp_path: Path, save: Save) -> None:
    (tmp_path / "b").mkdir()
    save(lines(ROWS[1:]), "b/2.jsonl")
    save(dump(ROWS[:1]), "a.json")
    save("# 说明", "README.md")
    conversations, rejects = read_conversations(tmp_path)
    assert rejects == [] and asks(conversations) == ALL
    assert conversations[0].file.endswith("a.json") and conversations[1].line == 1


def test_missing_files_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json") as caught:
        read_conversations(tmp_path / "nowhere.json")
    assert caught.value.code == "data.missing_file"
    with pytest.raises(UserError) as caught:
        read_conversations(tmp_path)
    assert caught.value.code == "data.empty_directory"


@pytest.mark.parametrize(
    ("magic", "word"),
    [(b"PK\x03\x04\x14", "Excel"), (b"BZh91AY", "bzip2"), (b"PAR1\x15\x04", "Parquet")],
)
def test_binary_files_say_what_they_are(save: Save, magic: bytes, word: str) -> None:
    conversations, rejects = read_conversations(save(magic + bytes(range(256)) * 40, "rows.csv"))
    assert conversations == [] and len(rejects) == 1
    assert rejects[0].reason == "parse_error" and word in rejects[0].detail


def test_text_that_begins_like_parquet_is_text(save: Save) -> None:
    assert asks(read_conversations(save("PAR1{}\n" + lines(ROWS)))[0]) == ALL


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    conversations, rejects = read_conversations(path)
    assert rejects == [] and asks(conversations) == ALL
    path.write_bytes(path.read_bytes()[:-20])
    assert [reject.reason for reject in read_conversations(path)[1]] == ["parse_error"]


def test_pieces_of_any_size_give_the_same_rows(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, escapes and characters cut by a chunk's end must be put together again."""
    rows = [
        {"instruction": "长" * random.Random(n).randrange(1, 400), "output": f'好{n}\\"\n', "n": n}
        for n in range(200)
    ]
    forms = {
        "lines": lines(rows),
        "array": dump(rows),
        "pretty": dump(rows, indent=1),
        "object": dump({"data": rows}),
        "numbers": dump([*rows, 123456, 7]),
    }
    for content in forms.values():
        path = save(content)
        expected = list(iter_conversations(path))
        for size in (64, 1000, 4097):
            monkeypatch.setattr("cllm.data.encoding.CHUNK_BYTES", size)
            monkeypatch.setattr("cllm.data.reader.HEAD_BYTES", size)
            assert list(iter_conversations(path)) == expected


def test_many_rows_on_one_line_are_told_apart(save: Save) -> None:
    _, rejects = read_conversations(save(dump([*ROWS, {"a": 1}])))
    assert "row 6" in rejects[0].detail


def test_writing_and_reading_is_the_identity(tmp_path: Path, save: Save) -> None:
    tool = {
        "conversations": [
            {"from": f, "value": v}
            for f, v in (
                ("system", "短"),
                ("human", "甲"),
                ("function_call", '{"name": "查", "arguments": {}}'),
                ("observation", "乙"),
                ("gpt", "丙"),
            )
        ],
        "tools": "[ ]",
    }
    conversations, _ = read_conversations(
        save(
            lines(
                [
                    *ROWS,
                    tool,
                    {"question": "Human: 甲 Assistant: 乙", "answer": "丁", "class": "类"},
                ]
            )
        )
    )
    assert write_conversations(conversations, tmp_path / "clean.jsonl") == len(conversations) == 7
    again, rejects = read_conversations(tmp_path / "clean.jsonl")
    assert rejects == []
    assert [(c.messages, c.category, c.tools) for c in again] == [
        (c.messages, c.category, c.tools) for c in conversations
    ]


def test_options_reach_the_rows(save: Save) -> None:
    conversations, _ = read_conversations(
        save(lines([{"instruction": "ＡＢ", "output": "好"}])), options=TextOptions(fold_width=True)
    )
    assert asks(conversations) == ["AB"]


def test_iterating_streams(save: Save) -> None:
    stream = iter_conversations(save(lines([*ROWS, {"a": 1}])))
    assert isinstance(next(stream), Conversation)
    assert isinstance(list(stream)[-1], Reject)


COUNTS: dict[str, dict[str, int]] = {
    "instruct/alpaca_zh_train.json": {"empty_assistant": 5},
    "instruct/belle_eval_set.jsonl": {"empty_assistant": 369},
    "chat/sharegpt_zh_300.jsonl": {"no_assistant": 1, "empty_assistant": 1},
    "preference/kto_en_demo_100.json": {"negative_label": 46},
    "poetry/quan_tang_shi_0_trad.json": {"unknown_schema": 600},
    "poetry/song_ci_300.json": {"unknown_schema": 280},
}
MAPPED = {
    "nlg/csl_title": {"user": "1", "assistant": "2"},
    "nlg/classical": {"user": "0", "assistant": "1"},
    "bench/cmmlu": {"user": "{Question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}", "assistant": "Answer"},
}


@pytest.mark.skipif(not DEV.exists(), reason="the dev files are not at hand")
def test_every_dev_file_is_read_with_the_counts_of_its_readme() -> None:
    for entry in json.loads((DEV / "manifest.json").read_text(encoding="utf-8")):
        name = entry["path"]
        if "wmt22" in name:  # plain text for the metrics
            continue
        columns = next(
            (mapping for start, mapping in MAPPED.items() if name.startswith(start)), None
        )
        conversations, rejects = read_conversations(DEV / name, columns)
        assert Counter(reject.reason for reject in rejects) == COUNTS.get(name, {}), name
        assert len(conversations) + len(rejects) == entry["rows"], name
    poems, rejects = read_conversations(
        DEV / "poetry/song_ci_300.json", {"assistant": "paragraphs"}, kind="text"
    )
    assert (len(poems), rejects) == (280, [])


def said(path: Path, columns: dict[str, str] | None = None) -> list[tuple[str, ...]]:
    conversations, rejects = read_conversations(path, columns)
    assert rejects == []
    return [tuple(message.content for message in asked) for asked in conversations]


CELL = st.text(st.sampled_from('茶水"\t\n,;\\ab'), max_size=6).map(lambda text: f"字{text}尾")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5),
    delimiter=st.sampled_from(",\t;"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_a_spreadsheet_writes_is_read_back(
    rows: list[tuple[str, str]], delimiter: str, quoting: Any
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting).writerows([("问题", "回答"), *rows])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / ("rows.tsv" if delimiter == "\t" else "rows.csv")
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
        assert said(path) == rows


def test_a_cell_in_quotes_holds_tabs_and_line_ends(save: Save) -> None:
    text = '问题\t答案\r\n列两样茶\t"红茶\r\n\t绿茶"\r\n"他说""好""吗"\t他说"好"。\r\n'
    assert said(save(text, "rows.tsv")) == [
        ("列两样茶", "红茶\n\t绿茶"),
        ('他说"好"吗', '他说"好"。'),
    ]


@pytest.mark.parametrize("mark", ["\t", ","])
def test_quotes_that_never_pair_are_text(save: Save, mark: str) -> None:
    rows = [('5" 是多长', "约十三厘米"), ('"只开不关', "也是字"), ("别的", '"又一个'), ("末", "了")]
    text = "".join(mark.join(row) + "\n" for row in [("问题", "答案"), *rows])
    assert said(save(text, "rows.csv")) == rows


def test_sentences_that_a_quote_spans_stay_rows_of_their_own(save: Save) -> None:
    text = '"Go," he said.\t“走。”\n"Go!"\t“走！”\nHe left.\t"他走了。\nShe stayed.\t她留下了。"\n'
    assert said(save(text, "pairs.tsv"), {"user": "0", "assistant": "1"}) == [
        ('"Go," he said.', "“走。”"),
        ('"Go!"', "“走！”"),
        ("He left.", '"他走了。'),
        ("She stayed.", '她留下了。"'),
    ]


def test_backslashes_before_quotes_are_read_where_a_file_is_written_so(save: Save) -> None:
    text = 'question,answer\n"他说\\"好\\"","C:\\\\茶\\n"\n"甲,\\"乙\\"","丙"\n'
    assert said(save(text, "rows.csv")) == [('他说"好"', "C:\\茶\\n"), ('甲,"乙"', "丙")]
    text = 'question,context,answer\n"问",\\N,"他说\\"好\\""\n'  # MySQL's null
    assert said(save(text, "rows.csv")) == [("问", '他说"好"')]
    text = 'question,answer\n"路径 C:\\茶\\","他说""好"""\n'
    assert said(save(text, "rows.csv")) == [("路径 C:\\茶\\", '他说"好"')]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
@pytest.mark.parametrize("raw", ["数据".encode("gb18030"), b"\xff\xfe1"])
def test_a_file_name_that_is_no_utf8_is_read_and_shown(tmp_path: Path, raw: bytes) -> None:
    folder = tmp_path / "目录"
    folder.mkdir()
    path = folder / os.fsdecode(raw + b".jsonl")
    path.write_text(lines([*ROWS, {"a": 1}]), encoding="utf-8")
    shown = file_name(path)
    shown.encode()
    for place in (path, shown, folder):  # as the shell hands it over, as it is shown, from above
        conversations, rejects = read_conversations(place)
        assert asks(conversations) == ALL
        assert {item.file for item in (*conversations, *rejects)} == {shown}
