"""Every schema family and every dirt class of the data rules, on rows of our own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.message import ROLES, Call, Message
from cllm.data.schema import REASONS, Conversation, Normalizer, Reject, to_row
from cllm.data.text import TextOptions
from cllm.messages import UserError

Q, A = "海水为什么是咸的？", "因为河流把盐分带进了海里。"
QA = [("user", Q), ("assistant", A)]


def read(
    row: Any, columns: dict[str, str] | None = None, kind: str = "chat", **options: Any
) -> Conversation | Reject:
    return Normalizer(columns, kind, TextOptions(**options))(row, "own.json", 3)


def turns(row: Any, columns: dict[str, str] | None = None, **options: Any) -> list[tuple[str, str]]:
    result = read(row, columns, **options)
    assert isinstance(result, Conversation), result
    return [(message.role, message.content) for message in result]


def reason(row: Any, columns: dict[str, str] | None = None, kind: str = "chat") -> str:
    result = read(row, columns, kind)
    assert isinstance(result, Reject), result
    assert result.reason in REASONS
    assert result.detail
    assert (result.file, result.line) == ("own.json", 3)
    return result.reason


def sharegpt(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in turns], **more}


def xtuner(*turns: tuple[str | None, str, str]) -> dict[str, Any]:
    return {
        "conversation": [
            {"system": system, "input": ask, "output": reply} for system, ask, reply in turns
        ]
    }


def openai(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": who, "content": what} for who, what in turns], **more}


MOSS = {
    "turn_10": {"Human": "<|Human|>: 丙<eoh>\n", "MOSS": "<|MOSS|>: 丁<eom>\n"},
    "turn_2": {
        "Human": "<|Human|>: 甲<eoh>\n",
        "Inner Thoughts": "<|Inner Thoughts|>: 想一想<eot>\n",
        "Commands": "<|Commands|>: 查(甲)<eoc>\n",
        "Tool Responses": "<|Results|>: 无<eor>\n",
        "MOSS": "<|MOSS|>: 乙<eom>\n",
    },
}
FOUR = [("user", "甲"), ("assistant", "乙"), ("user", "丙"), ("assistant", "丁")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": Q, "input": "", "output": A}, QA),
        (
            {"instruction": "翻译", "input": "sea", "output": "海"},
            [("user", "翻译\nsea"), ("assistant", "海")],
        ),
        ({"instruction": "", "input": Q, "output": A}, QA),
        ({"instruction": Q, "input": Q, "output": A}, QA),
        ({"instruction": Q, "output": A}, QA),
        ({"instruction": Q, "input": None, "output": A}, QA),
        ({"instruction": Q, "input": float("nan"), "output": A, "history": float("nan")}, QA),
        (
            {"instruction": Q, "input": "", "output": A, "system": "答得短些。"},
            [("system", "答得短些。"), *QA],
        ),
        ({"instruction": "丙", "output": "丁", "history": [["甲", "乙"]]}, FOUR),
        ({"instruction": Q, "output": A, "history": ""}, QA),
        ({"instruction": Q, "output": A, "history": []}, QA),
        ({"instruction": Q, "output": A, "history": None}, QA),
        ({"instruction": "丙", "output": "丁", "history": '[["甲", "乙"]]'}, FOUR),
        (
            {"指令": "翻译", "输入": "sea", "输出": "海"},
            [("user", "翻译\nsea"), ("assistant", "海")],
        ),
        ({"问题": Q, "回答": A}, QA),
        ({"問題": Q, "回答": A}, QA),
        ({"prompt": Q, "response": A}, QA),
        ({"prompt": "丙", "response": "丁", "history": [["甲", "乙"]]}, FOUR),
        ({"query": Q, "response": A}, QA),
        ({"question": Q, "answer": A, "id": 7}, QA),
        ({"question": Q, "std_answer": A, "class": "常识"}, QA),
        ({"question": Q, "reference": A}, QA),
        ({"question": Q, "answer": None, "reference": A}, QA),
        ({"input": Q, "target": A, "kind": "问答"}, QA),
        ({"content": Q, "summary": A}, QA),
        ({"context": Q, "target": A}, QA),
        ({"riddle": Q, "answer": A}, QA),
        ({"ask": Q, "answer": A, "title": "海水"}, QA),
        ({"ask": "无", "answer": A, "title": Q}, QA),
        (sharegpt(("human", Q), ("gpt", A)), QA),
        (
            {
                "conversations": [
                    {"role": "user", "content": Q},
                    {"role": "assistant", "content": A},
                ]
            },
            QA,
        ),
        (
            sharegpt(("human", ["第一行", "第二行"]), ("gpt", A)),
            [("user", "第一行\n第二行"), QA[1]],
        ),
        (openai(("system", "短"), ("User", Q), ("assistant", A)), [("system", "短"), *QA]),
        (
            openai(
                ("user", [{"type": "text", "text": Q}]),
                ("assistant", [{"type": "text", "value": A}]),
            ),
            QA,
        ),
        (
            openai(
                ("user", Q),
                (
                    "assistant",
                    [{"type": "reasoning", "value": "先想"}, {"type": "text", "value": A}],
                ),
            ),
            QA,
        ),
        (
            {
                "conversation": [
                    {"human": "甲", "assistant": "乙"},
                    {"human": "丙", "assistant": "丁"},
                ],
                "category": "闲聊",
            },
            FOUR,
        ),
        (xtuner(("短", "甲", "乙"), (None, "丙", "丁")), [("system", "短"), *FOUR]),
        (xtuner(("短", "甲", "乙"), (" 短", "丙", "丁")), [("system", "短"), *FOUR]),
        (xtuner(("", "甲", "乙"), ("", "丙", "丁")), FOUR),
        (
            {"conversation_id": "1", "meta_instruction": "你是助手", "num_turns": 2, "chat": MOSS},
            [("system", "你是助手"), *FOUR],
        ),
        (
            {"instruction": "改写", "instances": [{"input": "甲", "output": "乙"}]},
            [("user", "改写\n甲"), ("assistant", "乙")],
        ),
        ({"input": ["甲", "丙"], "output": ["乙", "丁"]}, FOUR),
        ({"input": ["甲", "丙", "戊"], "output": ["乙", "丁"]}, FOUR),
        ({"paragraph": [{"q": "甲", "a": "乙"}, {"q": "丙", "a": "丁"}]}, FOUR),
        (
            {
                "name": "电影",
                "messages": [{"message": "甲"}, {"message": "乙", "attrs": [{"name": "x"}]}],
            },
            FOUR[:2],
        ),
        ({"text": "Human: 甲\nAssistant: 乙\nHuman: 丙\nAssistant: 丁"}, FOUR),
        ({"text": "Human: 甲 Assistant: 乙"}, FOUR[:2]),
        ({"text": "<user>: 甲 <bot>: 乙 <user>: 丙 <bot>: 丁"}, FOUR),
        ({"conversations": ["[客户] 甲", "[律师] 乙", "[客户] 丙", "[律师] 丁"]}, FOUR),
        ({"conversation": "[客户]甲[律师]乙"}, FOUR[:2]),
        (
            {
                "instruction": "Human:甲\nAssistant:乙\nHuman:丙\nAssistant:",
                "input": "",
                "output": "丁",
            },
            FOUR,
        ),
        ({"dialogue": "<human>: 甲 <bot>: 乙", "source": "网络"}, FOUR[:2]),
        ({"conversation": "第一场", "instruction": Q, "output": A}, QA),
        ({"prompt": Q, "chosen": A, "rejected": "不知道。"}, QA),
        ({"instruction": Q, "input": "", "chosen": A, "rejected": "不知道。"}, QA),
        (
            {"system": "短", "question": Q, "chosen": A, "rejected": "不知道。"},
            [("system", "短"), *QA],
        ),
        (
            sharegpt(
                ("human", Q),
                chosen={"from": "gpt", "value": A},
                rejected={"from": "gpt", "value": "不"},
            ),
            QA,
        ),
        (
            {
                "prompt": Q,
                "chosen": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}],
                "rejected": [],
            },
            QA,
        ),
        (
            {
                "prompt": [{"role": "user", "content": Q}],
                "chosen": [{"role": "assistant", "content": A}],
            },
            QA,
        ),
        (
            {
                "chosen": "\n\nHuman: 甲\n\nAssistant: 乙",
                "rejected": "\n\nHuman: 甲\n\nAssistant: 不",
            },
            FOUR[:2],
        ),
        (openai(("user", Q), ("assistant", A), label=True), QA),
        ([{"instruction": Q, "output": A}], QA),
        (openai(("client", Q), ("counselor", A))["messages"], QA),
        ({"instruction": Q, "output": [A, "次好的答案"]}, QA),
        ({"instruction": ["写诗", "要押韵"], "output": A}, [("user", "写诗\n要押韵"), QA[1]]),
    ],
)
def test_every_family_becomes_the_same_conversation(
    row: Any, expected: list[tuple[str, str]]
) -> None:
    assert turns(row) == expected


@pytest.mark.parametrize(
    "word", "无输入 <noinput> <无输入> （无输入） 没有输入 无需输入 不适用 N/A None 无".split()
)
def test_no_input_words_count_as_empty(word: str) -> None:
    assert turns({"instruction": Q, "input": f" {word}\n", "output": A}) == QA
    assert reason({"instruction": "", "input": word, "output": A}) == "empty_user"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"instruction": Q}, Q),
        ({"text": Q}, Q),
        ({"content": Q}, Q),
        ({"value": {"text": Q}}, Q),
        ({"instruction": "  ", "text": Q}, Q),
        ({"instruction": None, "value": Q}, Q),
        ([Q], Q),
        ([{"text": [Q]}], Q),
        (42, "42"),
        (-1.5, "-1.5"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        ('{"instruction": "原样"}', '{"instruction": "原样"}'),
        ("{'a': None}", "{'a': None}"),
    ],
)
def test_nested_values_and_numbers(value: object, expected: str) -> None:
    assert turns({"instruction": value, "output": A})[0] == ("user", expected)


def test_a_whole_row_inside_instruction_is_the_row() -> None:
    assert turns({"instruction": {"instruction": Q, "input": "", "output": A}}) == QA
    assert turns({"instruction": [{"instruction": Q, "output": A}], "output": ""}) == QA
    # not a row: its text
    assert turns({"instruction": {"instruction": Q, "text": "x"}, "output": A}) == QA


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "", "input": "", "output": A}, "empty_user"),
        ({"instruction": "\u200b\u3000", "output": A}, "empty_user"),
        ({"instruction": Q, "output": ""}, "empty_assistant"),
        ({"instruction": Q, "output": None}, "empty_assistant"),
        ({"instruction": Q}, "empty_assistant"),
        ({"question": Q, "std_answer": " "}, "empty_assistant"),
        ({"instruction": Q, "output": {}}, "invalid_text"),
        ({"instruction": Q, "output": {"foo": "bar"}}, "invalid_text"),
        ({"instruction": Q, "output": True}, "invalid_text"),
        ({"instruction": Q, "output": float("inf")}, "invalid_text"),
        ({"instruction": Q, "output": "\ud83d"}, "invalid_text"),
        ({"instruction": Q, "output": "\udce4"}, "decode_error"),
        ({"instruction": Q, "output": A, "history": [["甲", ""]]}, "empty_turn"),
        ({"instruction": Q, "output": A, "history": ["甲"]}, "unknown_schema"),
        (sharegpt(("human", Q)), "no_assistant"),
        ({"conversations": []}, "no_assistant"),
        ({"messages": None}, "no_assistant"),
        (sharegpt(("gpt", A), ("human", Q), ("gpt", A)), "role_order"),
        (sharegpt(("human", Q), ("gpt", A), ("gpt", A)), "role_order"),
        (sharegpt(("human", Q), ("human", Q), ("gpt", A)), "role_order"),
        (sharegpt(("narrator", Q), ("gpt", A)), "unknown_role"),
        (sharegpt((None, Q), ("gpt", A)), "unknown_role"),
        (
            {
                "conversations": [
                    {"human": "甲", "assistant": ""},
                    {"human": "丙", "assistant": "丁"},
                ]
            },
            "empty_turn",
        ),
        (
            openai(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", A)),
            "invalid_text",
        ),
        ({"messages": ["甲", 3]}, "unknown_schema"),
        ({"messages": ["甲", "乙"]}, "unknown_schema"),
        ({"messages": [{"speaker": "甲"}]}, "unknown_schema"),
        ({"chat": {"turn_1": {"Human": "甲"}}}, "empty_assistant"),
        ({"author": "李白", "paragraphs": ["床前明月光"]}, "unknown_schema"),
        ({"text": "一段预训练文本。"}, "unknown_schema"),
        ({"instruction": Q, "context": "", "response": A}, "unknown_schema"),
        ({"conversation": "第一场"}, "unknown_schema"),
        ({"instances": ["甲"]}, "unknown_schema"),
        ({}, "unknown_schema"),
        ([], "not_an_object"),
        ([1, 2], "not_an_object"),
        (None, "not_an_object"),
        ("Human: 甲 Assistant: 乙", "not_an_object"),
        (3, "not_an_object"),
        (openai(("user", Q), ("assistant", A), label=False), "negative_label"),
        ({"prompt": Q, "completion": A, "label": "false"}, "negative_label"),
        ({"prompt": Q, "chosen": "", "rejected": A}, "empty_assistant"),
    ],
)
def test_every_reason(row: Any, expected: str) -> None:
    assert reason(row) == expected


def test_turns_after_the_last_answer_are_trimmed() -> None:
    said = [
        {"from": "human", "value": Q},
        {"from": "gpt", "value": A},
        {"from": "human", "value": "谢谢"},
    ]
    assert turns({"conversations": said}) == QA


WEATHER = Message("assistant", "", "", (Call("weather", {"city": "青岛"}),))


def test_tool_turns_are_calls_and_tools_stay_verbatim() -> None:
    call, tools = '{"name": "weather", "arguments": {"city": "青岛"}}', '[{"name": "weather"}]'
    said = [("human", Q), ("function_call", call), ("observation", '{"t": 21}'), ("gpt", A)]
    result = read(
        {"conversations": [{"from": who, "value": what} for who, what in said], "tools": tools}
    )
    assert isinstance(result, Conversation)
    assert result.tools == tools
    assert [message.role for message in result] == ["user", "assistant", "tool", "assistant"]
    assert result.messages[1] == WEATHER
    listed = read(openai(("user", Q), ("assistant", A), tools=[{"name": "天气"}]))
    assert isinstance(listed, Conversation) and json.loads(listed.tools) == [{"name": "天气"}]


def test_openai_tool_calls_are_kept_and_several_results_may_follow() -> None:
    calls = [{"id": "1", "function": {"name": "weather", "arguments": '{"city": "青岛"}'}}]
    row = {
        "messages": [
            {"role": "user", "content": Q},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": {"t": 21}},
            {"role": "tool", "content": "晴"},
            {"role": "assistant", "content": A},
        ]
    }
    said = turns(row)
    assert read(row).messages[1] == WEATHER  # type: ignore[union-attr]
    assert said[2:] == [("tool", '{"t": 21}'), ("tool", "晴"), ("assistant", A)]


def test_sys_beside_usr_answers() -> None:
    assert turns(openai(("usr", Q), ("sys", A))) == QA
    assert turns(openai(("sys", "短"), ("user", Q), ("bot", A)))[0] == ("system", "短")


def test_prompts_that_quote_a_dialogue_stay_as_they_are() -> None:
    quoted = "Human: 你好\nAssistant: 你好！\n总结上面的对话"
    assert turns({"instruction": quoted, "output": A}) == [("user", quoted), ("assistant", A)]
    assert turns({"instruction": "问：1+1=？\n答：", "output": "2"})[0] == (
        "user",
        "问：1+1=？\n答：",
    )
    assert turns({"instruction": "[任务] 写诗", "output": A})[0] == ("user", "[任务] 写诗")


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("\ufeff甲\u200b乙\u2060丙\x00\x1b\x7f", "甲乙丙"),
        ("甲\r\n乙\r丙\t丁", "甲\n乙\n丙\t丁"),
        ("\u3000\xa0 甲 \u2028\n", "甲"),
        ("👩\u200d🌾\ufe0f 甲\u2028乙\x85丙", "👩\u200d🌾\ufe0f 甲\u2028乙\x85丙"),
        ("ＡＢＣ１２３　&lt;&#39; 臺灣", "ＡＢＣ１２３　&lt;&#39; 臺灣"),
        ("\ufffd 原有", "\ufffd 原有"),
    ],
)
def test_what_is_removed_and_what_stays(dirty: str, expected: str) -> None:
    assert turns({"instruction": dirty, "output": A})[0][1] == expected
    assert (
        turns(
            {"messages": [{"role": "user", "content": dirty}, {"role": "assistant", "content": A}]}
        )[0][1]
        == expected
    )


def test_options_are_off_by_default_and_work_when_asked_for() -> None:
    row = {
        "instruction": "ＡＢＣ　１&lt;2",
        "output": "邮箱 li@example.com 电话 13800138000 证件 110101199003074258",
    }
    assert turns(row)[0][1] == "ＡＢＣ　１&lt;2"
    rewritten = turns(row, unescape_html=True, fold_width=True, mask_personal=True)
    assert rewritten == [("user", "ABC 1<2"), ("assistant", "邮箱 [EMAIL] 电话 [PHONE] 证件 [ID]")]


def test_traditional_to_simplified_uses_opencc() -> None:
    pytest.importorskip("opencc")
    assert turns({"instruction": "臺灣的龍", "output": A}, convert="t2s")[0][1] == "台湾的龙"
    with pytest.raises(UserError, match="t2s"):
        Normalizer(options=TextOptions(convert="no-such-table"))


def test_category_is_the_rows_own() -> None:
    for key in ("task", "category", "class"):
        result = read({"question": Q, "answer": A, key: "常识"})
        assert isinstance(result, Conversation) and result.category == "常识"


def test_columns_by_name_index_and_template() -> None:
    row = {"Question": Q, "A": "盐", "B": 2, "Answer": "A", "dept": "海洋"}
    result = read(
        row, {"user": "{Question}\nA. {A}\nB. {B}", "assistant": "Answer", "category": "dept"}
    )
    assert isinstance(result, Conversation)
    assert result.messages == (Message("user", f"{Q}\nA. 盐\nB. 2"), Message("assistant", "A"))
    assert result.category == "海洋"
    assert turns([Q, A], {"user": "0", "assistant": "1"}) == QA
    assert turns(
        {"q": "丙", "a": "丁", "h": [["甲", "乙"]], "s": "短"},
        {"user": "q", "assistant": "a", "history": "h", "system": "s"},
    ) == [("system", "短"), *FOUR]
    assert reason({"q": Q}, {"user": "q", "assistant": "a"}) == "unknown_schema"
    assert reason({"q": "", "a": A}, {"user": "{q}", "assistant": "a"}) == "empty_user"
    assert reason({"q": Q, "a": A}, {"user": "{q}\n{typo}", "assistant": "a"}) == "unknown_schema"
    assert turns({"question": Q, "answer": A, "dept": "x"}, {"category": "dept"}) == QA


def test_wrong_mappings_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="answer"):
        Normalizer({"user": "q", "answer": "a"})
    with pytest.raises(UserError, match="both"):
        Normalizer({"user": "q"})


def test_pre_training_text() -> None:
    result = read({"text": " 一段\r\n文本 ", "category": "百科"}, kind="text")
    assert isinstance(result, Conversation)
    assert result.messages == (Message("assistant", "一段\n文本"),) and result.category == "百科"
    assert reason({"text": ""}, kind="text") == "empty_assistant"
    assert reason({"instruction": Q, "output": A}, kind="text") == "unknown_schema"
    poem = read({"paragraphs": ["床前", "明月"]}, {"assistant": "paragraphs"}, kind="text")
    assert isinstance(poem, Conversation) and poem.messages[0].content == "床前\n明月"


def test_deep_nesting_is_a_reject() -> None:
    deep: Any = Q
    for _ in range(5000):
        deep = {"text": deep}
    assert reason({"instruction": deep, "output": A}) == "invalid_text"


DIRTY = ["甲\r\n", " \u200b乙", "", "无", "\ud800", "[客户] 甲 [律师] 乙", "<user>: 甲"]
DIRTY += ["<think>想</think>丁", "<image>", "看 <image>", "<tool_call>", "SYSTEM: 短"]
CLEAN = st.sampled_from([Q, A, "Human: 甲\nAssistant:", *DIRTY])
VALUE = CLEAN | st.sampled_from([None, 0, False, [], {}, {"text": "戊"}, ["己", "庚"]])
TURN = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from([*ROLES]), "content": VALUE}),
    st.fixed_dictionaries({"value": CLEAN, "from": st.sampled_from(["human", "gpt"]), "id": VALUE}),
    st.fixed_dictionaries({"human": CLEAN, "assistant": VALUE}),
    st.fixed_dictionaries({"system": CLEAN, "input": CLEAN, "output": CLEAN}),
    st.tuples(CLEAN, CLEAN).map(list),
)
FIELD = st.sampled_from("instruction input output question answer system history".split())
ROWS = st.dictionaries(FIELD | st.sampled_from(["category", "id", "问题", "note"]), VALUE)


@settings(max_examples=600, deadline=None)
@given(
    row=ROWS,
    turns=st.lists(TURN, max_size=3),
    name=st.sampled_from(["messages", "history", "conversation", ""]),
    columns=st.sampled_from([{}, {"user": "question", "assistant": "answer", "system": "note"}]),
    texts=st.booleans(),
)
def test_the_short_way_gives_what_the_long_way_gives(
    row: dict[str, Any], turns: list[Any], name: str, columns: dict[str, str], texts: bool
) -> None:
    """A row of plain texts takes a short way; with a blank `tools` it takes the long one."""
    row |= {"instruction": Q, "output": A} if texts and not columns else {}
    row |= {"question": Q, "answer": A, "note": ""} if texts and columns else {}
    row |= {name: turns} if name else {}
    short, long = Normalizer(columns), Normalizer(columns)
    result, expected = short(row), long({**row, "tools": ""})
    if isinstance(expected, Reject):
        assert isinstance(result, Reject)
    else:
        assert result == expected
        # the long way also sees that the words of a field stand elsewhere
        few, many = ({name.partition(".")[0] for name in way.unread} for way in (long, short))
        assert few <= many <= {*row}


def test_to_row_reads_back_as_the_same() -> None:
    result = read(
        {"instruction": Q, "output": A, "category": "常识", "system": "短", "tools": "[]"}
    )
    assert isinstance(result, Conversation)
    assert read(json.loads(json.dumps(to_row(result)))) == result
