"""What stands beside question and answer is in the prompt, rejects the row or is counted: no text
of a row vanishes unsaid.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cllm.data import Conversation, Reject, read_conversations
from cllm.data.fields import METADATA, is_metadata
from cllm.data.reader import Unread
from cllm.data.schema import Normalizer
from cllm.data.turns import SPECIAL_KEYS

Q, A = "哪一种是红茶？", "祁门的那种。"
TURNS = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
QA = [("user", Q), ("assistant", A)]
BEFORE = [("user", "在吗"), ("assistant", "在。")]


def read(row: Any, columns: dict[str, str] | None = None) -> tuple[Conversation | Reject, set[str]]:
    normalize = Normalizer(columns)
    return normalize(row, "own.json", 3), set(normalize.unread)


def turns(row: Any) -> list[tuple[str, str]]:
    result, _ = read(row)
    assert isinstance(result, Conversation), result
    return [(message.role, message.content) for message in result]


PASSAGE = "祁门红茶产于安徽祁门一带，是红茶中的名品，香气似花似果，又有人说像蜜糖，人称祁门香。"
LISTED = "A. 祁红\nB. 龙井"


@pytest.mark.parametrize(
    "options",
    [
        {"options": {"A": "祁红", "B": "龙井"}},
        {"options": ["祁红", "龙井"]},
        {"choices": ["A. 祁红", "B. 龙井"]},
        {"option": "A. 祁红\nB. 龙井"},
        {"options": '["祁红", "龙井"]'},
        {"choices": {"text": ["祁红", "龙井"], "label": ["A", "B"]}},
        {"options": [{"key": "A", "value": "祁红"}, {"key": "B", "value": "龙井"}]},
        {"options": [{"A": "祁红"}, {"B": "龙井"}]},
        {"opa": "祁红", "opb": "龙井"},
        {"A": "祁红", "B": "龙井", "C": "", "D": None},
        {"option_a": "祁红", "Option_B": "龙井"},
        {"选项A": "祁红", "选项B": "龙井"},
    ],
)
def test_options_stand_behind_the_question(options: dict[str, Any]) -> None:
    for row in ({"question": Q, "answer": "A"}, {"instruction": Q, "input": "", "output": "A"}):
        assert turns(row | options) == [("user", f"{Q}\n{LISTED}"), ("assistant", "A")]
        assert read(row | options)[1] == set()
        asked = {key: f"{Q}\n{LISTED}" if text == Q else text for key, text in row.items()}
        assert turns(asked | options)[0] == ("user", f"{Q}\n{LISTED}")


def test_options_and_passages_belong_to_a_conversation_s_only_question() -> None:
    row = {
        "messages": [{"role": "system", "content": "短"}, *TURNS],
        "context": "一段",
        "A": "祁红",
    }
    asked = turns(row | {"B": "龙井"})
    assert asked[1] == ("user", f"参考资料：\n一段\n\n{Q}\n{LISTED}")
    assert read({"messages": TURNS * 2, "context": "一段"})[1] == {"context"}


def test_an_answer_that_names_a_column_or_a_place_names_the_letter() -> None:
    assert turns({"question": Q, "opa": "祁红", "opb": "龙井", "answer": "opb"})[1][1] == "B"
    assert turns({"question": Q, "choices": ["祁红", "龙井"], "answer": 1})[1][1] == "B"
    assert turns({"question": "几个？", "answer": 1})[1][1] == "1"
    assert read({"question": Q, "choices": ["祁红", "龙井"], "answer": "1"})[1] == set()
    assert turns({"question": Q, "choices": ["祁红", "龙井"], "answer": "1"})[1][1] == "B"
    assert turns({"question": Q, "choices": ["1", "2"], "answer": "2"})[1][1] == "2"
    beyond, _ = read({"question": Q, "choices": ["祁红", "龙井"], "answer": 2})
    assert isinstance(beyond, Reject)  # of a file that counts from 1
    words = "祁红和龙井，哪个是红茶？"  # without letters, an answer in letters says nothing
    row = {"question": words, "options": ["祁红", "龙井"]}
    assert turns(row | {"answer": "A"})[0][1] == f"{words}\n{LISTED}"
    assert turns(row | {"answer": "祁红"})[0][1] == words


@pytest.mark.parametrize("key", ["context", "passage", "reference", "references", "Context"])
def test_passages_stand_before_the_question_under_a_heading(key: str) -> None:
    for row in ({"question": Q, "answer": A}, {"prompt": Q, "response": A}):
        assert turns(row | {key: "祁红产自祁门。"}) == [
            ("user", f"参考资料：\n祁红产自祁门。\n\n{Q}"),
            ("assistant", A),
        ]
    row = {"instruction": Q, "output": A, key: ["甲文", {"title": "乙", "text": "乙文"}]}
    assert turns(row)[0][1] == f"参考资料：\n[1] 甲文\n[2] 乙 乙文\n\n{Q}"
    assert turns({"question": Q, "answer": A, key: "Tea."})[0][1] == f"Reference:\nTea.\n\n{Q}"
    assert turns({"question": Q, "answer": A, key: f"{Q}"}) == QA
    assert read({"question": Q, "answer": A, key: "https://example.org/a"})[1] == {key}


def test_a_passage_that_is_the_question_or_the_answer_is_none() -> None:
    assert turns({"context": Q, "target": A}) == QA
    assert turns({"question": Q, "reference": A}) == QA
    result, unread = read(
        {"context": "一段", "question": Q, "answer": A}, {"user": "question", "assistant": "answer"}
    )
    assert isinstance(result, Conversation) and result.messages[0].content == Q
    assert unread == {"context"}  # a column mapping says what is in the prompt


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "看图", "output": A, "images": ["a.jpg"]},
        {"messages": TURNS, "image": "a.jpg"},
        {"question": Q, "answer": A, "video": {"path": "a.mp4"}},
        {"question": Q, "answer": A, "Audios": ["a.wav"]},
        {"question": "<image>\n这是什么？", "answer": A},
        {"question": Q, "answer": A, "image_paths": ["a.jpg"]},
        {"question": Q, "answer": A, "img": "a.jpg"},
        {"question": Q, "answer": A, "image_base64": "iVBORw0KGgo="},
        {"messages": [TURNS[0] | {"images": ["a.jpg"]}, TURNS[1]]},
        {"question": "<ImageHere>这是什么？", "answer": A},
        {"question": "Picture 1: <img>image.jpg</img>这是什么？", "answer": A},
        {"question": "<|image_pad|>这是什么？", "answer": A},
        {"instruction": "这个 <image> 里有什么？", "output": A},
        {
            "conversations": [
                {"from": "human", "value": "<video>讲了什么？"},
                {"from": "gpt", "value": A},
            ]
        },
    ],
)
def test_what_cannot_be_seen_or_heard_rejects_the_row_by_name(row: dict[str, Any]) -> None:
    result, _ = read(row)
    assert isinstance(result, Reject) and result.reason == "invalid_text"
    assert any(word in result.detail.lower() for word in ("image", "img", "video", "audios"))
    if "question" in row and "Audios" not in row:  # a mapping is by the names in the file
        mapped, _ = read(row, {"user": "question", "assistant": "answer"})
        assert isinstance(mapped, Reject) and mapped.detail == result.detail


@pytest.mark.parametrize("nothing", [None, "", [], float("nan")])
def test_a_field_without_a_picture_is_no_picture(nothing: Any) -> None:
    assert turns({"instruction": Q, "output": A, "images": nothing}) == QA
    assert turns({"instruction": "怎样用 <video> 标签？", "output": A})[1] == QA[1]


@pytest.mark.parametrize("label", [False, "false", "False", 0, "0", 0.0, -1])
def test_negative_labels(label: Any) -> None:
    result, _ = read({"prompt": Q, "completion": A, "label": label})
    assert isinstance(result, Reject) and result.reason == "negative_label"
    assert isinstance(read({"prompt": Q, "completion": A, "label": 1})[0], Conversation)
    tagged, _ = read({"prompt": Q, "completion": A, "kto_tag": label})
    assert isinstance(tagged, Reject) and "kto_tag" in tagged.detail


@pytest.mark.parametrize("flag", ["weight", "loss", "train", "Weight", "loss_mask"])
@pytest.mark.parametrize("row", [{"instruction": Q, "output": A}, {"messages": TURNS}])
def test_a_row_s_own_flag_is_read_or_counted(row: dict[str, Any], flag: str) -> None:
    for off in (0, False, "false", "0.0"):
        result, _ = read(row | {flag: off})
        assert isinstance(result, Reject) and result.reason == "negative_label"
    for on in (1, True, "1.0", None, ""):
        assert turns(row | {flag: on}) == QA and read(row | {flag: on})[1] == set()
    for other in (0.5, 1.73, [0, 1]):  # a weight that is not used, a loss once measured, a mask
        assert turns(row | {flag: other}) == QA
        assert read(row | {flag: other})[1] == {flag.lower()}


def test_numbered_options_keep_their_numbers() -> None:
    for names in (("option1", "option2"), ("choice1", "choice2"), ("Option_1", "Option_2")):
        row = dict(zip(names, ("祁红", "龙井"), strict=True))
        said = turns({"question": Q, **row, "answer": "2"})
        assert said == [("user", f"{Q}\n1. 祁红\n2. 龙井"), ("assistant", "2")]


@pytest.mark.parametrize(
    "key", ["system_prompt", "sys", "meta_instruction", "System", "System Prompt", "system-message"]
)
def test_the_system_message_has_several_names(key: str) -> None:
    for row in ({"instruction": Q, "output": A}, {"messages": TURNS}, {"prompt": Q, "response": A}):
        assert turns(row | {key: "短答"}) == [("system", "短答"), *QA]
        assert turns({"system": None} | row | {key: "短答"}) == [("system", "短答"), *QA]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": TURNS[0], "completion": TURNS[1]},
        {"prompt": json.dumps(TURNS[:1]), "completion": A},
        {"prompt": Q, "response": [{"role": "assistant", "content": A}]},
        {"prompt": Q, "response": TURNS},
        {"instruction": TURNS[:1], "output": A},
        {"input": TURNS[:1], "output": TURNS[1:]},
        {"question": Q, "answer": {"from": "gpt", "value": A}},
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": []},
        {"prompt": Q, "chosen": json.dumps(TURNS), "rejected": ""},
        {"messages": json.dumps(TURNS)},
        {"conversations": json.dumps([{"from": "human", "value": Q}, {"from": "gpt", "value": A}])},
        {"INSTRUCTION": Q, "INPUT": "", "OUTPUT": A},
        {"Question ": Q, "Answer": A},
        {"Q": Q, "A": A},
        {"user": Q, "assistant": A},
        {"id": 3, "row": {"instruction": Q, "output": A}},
        {"id": "3", "json": json.dumps({"question": Q, "answer": A})},
        {"text": json.dumps({"messages": TURNS})},
        {"instruction": f" <user>: {Q}", "output": A},
        {"instruction": f"<human>{Q}</human>", "output": A},
        {"instruction": f"<user>{Q}", "output": f" <bot>：{A}"},
        {"instruction": f"[用户]: {Q}", "output": f"【助手】：{A}"},
        {"instruction": Q, "output": A, "system": "", "OUTPUT": ""},
        {"Conversations": [{"From": "human", "Value": Q}, {"From": "gpt", "Value": A}]},
        {"dialogue": TURNS},
        {"turns": json.dumps(TURNS)},
        {"data": [{"question": Q, "answer": A}]},
        {"Question": Q, "Response": A},
        {"messages": [{"role": "user", "text": Q}, {"role": "model", "text": A}]},
    ],
)
def test_messages_and_rows_are_read_wherever_they_stand(row: dict[str, Any]) -> None:
    assert turns(row) == QA
    assert read(row)[1] <= {"rejected"}


def test_messages_in_a_place_for_text_are_never_joined() -> None:
    for row in (
        {"instruction": "接着说", "input": TURNS[:1], "output": A},
        {"messages": [{"role": "user", "content": [{"role": "user", "content": Q}]}, TURNS[1]]},
        {"title": TURNS, "ask": "", "answer": A} | {"ask": [TURNS]},
    ):
        assert isinstance(read(row)[0], Reject), row


@pytest.mark.parametrize(
    "history",
    [
        [["在吗", "在。"]],
        {"user": "在吗", "assistant": "在。"},
        [{"query": "在吗", "response": "在。"}],
        [{"user": "在吗", "assistant": "在。"}],
        [{"question": "在吗", "answer": "在。"}],
        [{"instruction": "在吗", "input": "", "output": "在。"}],
        [{"prompt": "在吗", "completion": "在。"}],
        [{"Q": "在吗", "A": "在。"}],
        [{"human": "在吗", "gpt": "在。"}],
        [{"role": "user", "content": "在吗"}, {"role": "assistant", "content": "在。"}],
        [[{"role": "user", "content": "在吗"}, {"role": "assistant", "content": "在。"}]],
        [["user", "在吗"], ["assistant", "在。"]],
        "Human: 在吗\nAssistant: 在。",
        '[{"query": "在吗", "response": "在。"}]',
    ],
)
def test_history_may_be_pairs_of_any_kind(history: Any) -> None:
    assert turns({"instruction": Q, "output": A, "history": history}) == [*BEFORE, *QA]
    if isinstance(history, list) and len(history) == 1 and history[0] != "user":
        mixed = [*history, ["贵吗", "不贵。"]]
        more = [("user", "贵吗"), ("assistant", "不贵。")]
        assert turns({"query": Q, "response": A, "history": mixed}) == [*BEFORE, *more, *QA]


@pytest.mark.parametrize(
    "text",
    [
        "问：几点开门？",
        "<用户手册>怎么写？",
        "<user>一<user>二",
        "【用户】协议是什么？",
        "User: 你好",
        "[1] 甲文",
        "用户: 与 客户 何异？",
    ],
)
def test_a_word_that_is_no_tag_stays(text: str) -> None:
    assert turns({"instruction": text, "output": A}) == [("user", text), ("assistant", A)]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"instruction": Q, "output": A, "note": "别忘了"}, {"note"}),
        (
            {"instruction": Q, "output": A, "source": PASSAGE, "url": f"https://a/{'b' * 50}"},
            {"source"},
        ),
        ({"messages": [TURNS[0] | {"meta": {"note": PASSAGE}}, TURNS[1]]}, {"messages.note"}),
        ({"instruction": Q, "output": A, "notes": ["", {"deep": [" 深 "]}]}, {"notes.deep"}),
        ({"instruction": Q, "output": A, "note": " ", "score": 3, "flag": True, "x": []}, set()),
        (
            {"instruction": Q, "output": A, "id": "a1", "question_type": "知识", "sourceUrl": "x"},
            set(),
        ),
        ({"messages": TURNS, "persona": "掌柜"}, {"persona"}),
        ({"messages": [TURNS[0] | {"mood": "急"}, TURNS[1]]}, {"messages.mood"}),
        ({"messages": [*TURNS, {"role": "user", "content": "还有一句"}]}, {"messages.content"}),
        ({"messages": TURNS, "instruction": "另一个问题"}, {"instruction"}),
        ({"prompt": Q, "chosen": A, "rejected": "不知道"}, {"rejected"}),
        ({"instruction": {"text": Q, "extra": "附注"}, "output": A}, {"instruction.extra"}),
        ({"instruction": Q, "output": [A, "次好"]}, {"output"}),
        ({"question": Q, "answer": A, "std_answer": "标准"}, {"std_answer"}),
        ({"instruction": Q, "output": A, "note": "None", "again": Q}, set()),
        ({"title": "茶事", "ask": Q, "answer": A}, {"title"}),
    ],
)
def test_text_that_is_not_read_is_counted_under_its_name(row: Any, names: set[str]) -> None:
    result, unread = read(row)
    assert isinstance(result, Conversation) and unread == names


def test_names_given_twice_are_reported(tmp_path: Path) -> None:
    def counted(name: str, text: str) -> tuple[list[Conversation], Unread]:
        unread: Unread = {}
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        conversations, rejects = read_conversations(path, unread=unread)
        assert rejects == [] and unread.keys() <= {str(path)}
        return conversations, unread.get(str(path), {})

    twice = '{"question": "甲", "question": "乙", "answer": "丙"}'
    for name, text in (("a.jsonl", twice), ("a.json", f"[{twice},\n{twice}]")):
        conversations, unread = counted(name, text)
        assert conversations[0].messages[0].content == "乙"
        assert unread == {"question (1)": len(conversations)}
    assert counted("b.jsonl", twice.replace("甲", "乙"))[1] == {}
    inner = '{"messages": [{"role": "user", "content": "甲", "content": "乙"}, %s]}'
    assert counted("c.jsonl", inner % json.dumps(TURNS[1]))[1] == {"messages.content (1)": 1}
    cell = (inner % json.dumps(TURNS[1])).removeprefix('{"messages": ').removesuffix("}")
    assert counted("e.jsonl", json.dumps({"messages": cell}))[1] == {"messages.content (1)": 1}
    quoted = json.dumps({"question": '说 {"a": 1, "a": 2}', "answer": "好"}, ensure_ascii=False)
    assert counted("d.jsonl", quoted)[1] == {}
    table = "question,answer,answer\n甲,乙,丙\n丁,,戊\n"
    conversations, unread = counted("a.csv", table)
    assert [item.messages[1].content for item in conversations] == ["丙", "戊"]
    assert unread == {"answer (1)": 1}


@pytest.mark.parametrize(
    "document",
    [
        {"records": [{"question": Q, "answer": A}] * 2},
        {"RECORDS": [{"Question": Q, "Answer": A}] * 2},
        {"version": "1", "题目": [{"question": Q, "answer": A}] * 2},
        {"code": 0, "data": {"total": 2, "items": [{"question": Q, "answer": A}] * 2}},
        {"Data": [{"question": Q, "answer": A}] * 2, "info": "x"},
        {"a1": {"question": Q, "answer": A}, "a2": {"question": Q, "answer": A}},
        {"Question": [Q, Q], "Answer": [A, A]},
    ],
)
def test_rows_are_taken_out_of_any_wrapper(tmp_path: Path, document: Any) -> None:
    path = tmp_path / "rows.json"
    for indent in (None, 1):
        path.write_text(json.dumps(document, ensure_ascii=False, indent=indent), encoding="utf-8")
        conversations, rejects = read_conversations(path)
        assert rejects == []
        assert [[(m.role, m.content) for m in item] for item in conversations] == [QA, QA]


# --- whatever a row holds

WORD = st.text(st.sampled_from("春夏秋冬山水风云日月xyz"), min_size=2, max_size=5).map("字".__add__)
KEY = st.sampled_from(sorted(SPECIAL_KEYS | {"note", "title", "Context", "OPTIONS", "opa", "sys"}))
VALUE = st.recursive(
    WORD,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            KEY | st.sampled_from(["text", "role", "content", "from", "value"]), inner
        )
    ),
    max_leaves=4,
)
SEEDS = [
    {"instruction": "甲", "input": "乙", "output": "丙"},
    {"question": "甲", "answer": "乙", "context": "丙", "options": {"A": "丁", "B": "戊"}},
    {"prompt": "甲", "response": "乙", "history": [["丙", "丁"]], "system": "戊"},
    {"prompt": "甲", "chosen": "乙", "rejected": "丙"},
    {"messages": [dict(turn) for turn in TURNS]},
    {"conversations": [{"from": "human", "value": "甲"}, {"from": "gpt", "value": "乙"}]},
    {"conversation": [{"human": "甲", "assistant": "乙"}, {"human": "丙", "assistant": "丁"}]},
]


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, part in value.items() if not is_metadata(key) for text in texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in texts(part)]
    return [value] if isinstance(value, str) else []


@settings(
    max_examples=600,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(seed=st.sampled_from(SEEDS), changes=st.dictionaries(KEY, VALUE, max_size=3), data=st.data())
def test_no_text_of_a_row_is_lost(
    seed: dict[str, Any], changes: dict[str, Any], data: st.DataObject
) -> None:
    row = json.loads(json.dumps(seed)) | changes
    for name in ("messages", "conversations", "conversation"):
        if name in row and isinstance(row[name], list) and data.draw(st.booleans()):
            row[name].insert(data.draw(st.integers(0, 2)), data.draw(VALUE))
    result, unread = read(row)
    if isinstance(result, Reject):
        assert result.detail
        return
    said = json.dumps([result.messages, result.tools], ensure_ascii=False)
    for name, value in row.items():
        counted = any(one == name or one.startswith(f"{name}.") for one in unread)
        for text in () if is_metadata(name) else texts(value):
            assert text in said or counted, (name, text, unread)


def test_no_text_of_ten_thousand_damaged_rows_is_lost() -> None:
    lose_nothing = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "data.py"))[
        "lose_nothing"
    ]
    seen = lose_nothing(10_000)
    assert seen["rows"] == 10_000 and seen["valid"] > 4000 and seen["with_unread"] > 800


def test_metadata_names_are_no_fields() -> None:
    assert not METADATA & {name.lower() for name in SPECIAL_KEYS}
    for name in (
        "id",
        "question_type",
        "conversationId",
        "source_lang",
        "Unnamed: 0",
        "",
        "meta_info",
        "编号",
    ):
        assert is_metadata(name)
    for name in ("note", "内容", "context", "explanation", "title", "hint", "persona", "0"):
        assert not is_metadata(name)
