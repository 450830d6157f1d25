"""Calls read back from answers: what each format's own text says, cut anywhere, and what is no call
at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.message import Call, Message
from cllm.data.schema import Conversation
from cllm.data.template import TEMPLATES, render
from cllm.data.tools import TOOL_STYLES, CallReader, Tools, called, opened, parse, read_tools
from cllm.messages import to_json

TOOLS: Tools = [
    {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
    {"name": "查询天气", "description": "天气"},
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [
        '"',
        "\\",
        "'''",
        "```",
        "</tool_call>",
        "\n",
        "Action:",
        "<|assistant|>clock\n",
        "{",
        "\u2028",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TYPES = {
    "NoneType": "null",
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "str": "string",
    "list": "array",
    "dict": "object",
}


def arguments_of(style: str) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments that the format can say. Qwen3.5's have no quotes: a name ends at `>`, a value at
    the end of a parameter.
    """
    if style == "qwen3.5":
        names = TEXT.filter(lambda text: text and ">" not in text and "\n" not in text)
        said = VALUES.filter(lambda value: "</parameter>" not in str(value))
        return st.dictionaries(names, said, max_size=4)
    return st.dictionaries(TEXT, VALUES, max_size=4)


def text_of(style: str, words: str, calls: tuple[Call, ...]) -> str:
    """The answer as the style writes it, its turns joined by what opens one."""
    turns = called(style, [], words, calls)
    return "<|assistant|>".join("".join(text for text, _ in turn) for turn in turns)


def with_types(tools: Tools, calls: tuple[Call, ...], way: str) -> Tools:
    """The tools with the schemas of these arguments, said in this way; where a name has two types,
    none.
    """
    typed = []
    for tool in tools:
        properties: dict[str, Any] = {}
        for call in calls:
            for key, value in call.arguments.items() if call.name == tool["name"] else ():
                schema: dict[str, Any] = {"type": TYPES[type(value).__name__]}
                if way == "nullable":
                    schema = {"type": [schema["type"], "null"]} if value != "None" else schema
                elif way == "referenced":
                    schema = {"anyOf": [{"$ref": f"#/$defs/{schema['type']}"}]}
                properties[key] = schema if properties.get(key, schema) == schema else {}
        defs = {name: {"type": name} for name in TYPES.values()}
        whole = {"type": "object", "properties": properties, "$defs": defs}
        if way == "referenced":
            whole = {"$ref": "#/$defs/whole", "$defs": {**defs, "whole": whole}}
        typed.append({**tool, "parameters": whole})
    return typed


@pytest.mark.parametrize("style", TOOL_STYLES)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_every_format_reads_back_what_it_writes(style: str, data: st.DataObject) -> None:
    names = st.sampled_from([tool["name"] for tool in TOOLS])
    # each tool once: one schema has one type for each of its arguments
    chosen = data.draw(st.lists(names, min_size=1, max_size=2, unique=True))
    calls = tuple(Call(name, data.draw(arguments_of(style))) for name in chosen)
    words = data.draw(st.sampled_from(["", "好的，我来查。", "第一行\n\n第二行"]))
    way = data.draw(st.sampled_from(["plain", "nullable", "referenced"]))
    text, tools = text_of(style, words, calls), with_types(TOOLS, calls, way)
    assert parse(style, text, tools) == (words, calls)
    for call in calls:  # and what opens a call by force is how it begins
        alone = text_of(style, "", (call,))
        for name in ("", call.name):
            assert alone.startswith("".join(part for part, _ in opened(style, name)))


@pytest.mark.parametrize(
    "name", [name for name, template in TEMPLATES.items() if template.system is not None]
)
def test_every_template_reads_back_what_it_trains(name: str) -> None:
    template = TEMPLATES[name]
    calls = (Call("clock", {"zone": "北京"}), Call("查询天气", {"日": [1, {"a": None}]}))
    for words in ("", "我看看。"):
        turns = (Message("user", "几点？"), Message("assistant", words, "", calls))
        talk = Conversation(turns, tools=to_json(TOOLS))
        question = Conversation(turns[:1], tools=talk.tools)
        whole, prompt = (
            "".join(segment.text for segment in render(chat, template, open_turn=opening))
            for chat, opening in ((talk, False), (question, True))
        )
        answer = whole.removeprefix(prompt).removesuffix(template.after)
        answer = answer.removesuffix(template.end).lstrip()
        assert parse(template.tools, answer, TOOLS) == (words, calls)


FRAGMENTS = [
    *(text_of(style, "", (Call("clock", {"zone": "a"}),)) for style in TOOL_STYLES),
    *(text_of(style, "嗯", (Call("gone", {}), Call("clock", {}))) for style in TOOL_STYLES),
    *["<tool_call>", "</tool_call>", "<function=clock>", "</function>", "Action: clock\n", "\n"],
    *["{", "}", "[", "]", " ", "\n\n"],
    *["<|assistant|>", "<|action_start|><|plugin|>", "<|action_end|>", "```", "tool_call(", ")"],
    *['{"name": "clock", "arguments": {', '"zone": 1e999', "NaN", "…", "  ", "好", "<tool", '"'],
]


@pytest.mark.parametrize("style", TOOL_STYLES)
@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=8), cuts=st.randoms())
@settings(max_examples=150, deadline=None)
def test_cut_anywhere_an_answer_says_the_same(style: str, parts: list[str], cuts: Any) -> None:
    text = "".join(parts)
    reader, told, at = CallReader(style, TOOLS), [], 0
    while at < len(text):
        step = cuts.choice((1, 1, 2, 5, 30))
        told += reader.push(text[at : at + step])
        at += step
    told += reader.push("", last=True)
    words, calls = parse(style, text, TOOLS)
    assert "".join(part for part in told if isinstance(part, str)) == words
    assert tuple(part for part in told if isinstance(part, Call)) == calls
    if not calls:  # word for word
        assert words == text


NO_CALLS = {
    "qwen": [
        '<tool_call>\n{"name": "gone", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "clock", "arguments": {"a": 1}\n</tool_call>',
        '<tool_call>\n{"name": "clock", "arguments": "x"}\n</tool_call>',
        '<tool_call>\n{"name": "clock", "arguments": {"a": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "clock", "arguments": {"a": 1e999}}\n</tool_call>',
        '<tool_call>\n{"name": "clock", "arguments": {"a": "\\ud800"}}\n</tool_call>',
        '<tool_call>\n{"name": ["clock"], "arguments": {}}\n</tool_call>',
        "<tool_call>" + "[" * 100_000,
        "<tool_call>\n</tool_call> ",
        "a <tool_call",
    ],
    "qwen3.5": [
        "<tool_call>\n<function=gone>\n</function>\n</tool_call>",
        "<tool_call>\n<function=clock>\n<parameter=a>\n1\n</function>\n</tool_call>",
        "<tool_call>\n<function=clock>\nwords\n</function>\n</tool_call>",
        "<tool_call>\n<function=clock>\n" + "<parameter=a>\n1\n</parameter>\n" * 40,
    ],
    "chatglm3": [
        "clock\n```python\ntool_call(zone=open('/tmp/x', 'w'))\n```",
        "clock\n```python\ntool_call('北京')\n```",
        "clock\n```python\ntool_call(**{'zone': 1})\n```",
        "clock\n```python\nexit(zone=1)\n```",
        "clock\n```python\ntool_call(zone={1, 2})\n```",
        "clock\n```python\ntool_call(zone=b'x')\n```",
        "clock\n```python\n1 + 1)\n```",
        "clock\n```python\ntool_call(zone=" + "(" * 5000 + ")\n```",
        "gone\n```python\ntool_call()\n```",
    ],
    "glm4": ['gone\n{"zone": 1}', "clock\n[1]", "clock\n5", "clock 北京", "钟\nclock\n{}"],
    "internlm2": ['<|action_start|><|plugin|>\n{"name": "gone", "parameters": {}}<|action_end|>'],
    "llama3": [
        '{"name": "clock", "parameters": {}} 是调用',
        '{"name": "小明", "age": 5}',
        '[{"name": "clock", "parameters": {}}, {"name": "gone", "parameters": {}}]',
        "[1, 2]",
        '见 {"name": "clock", "parameters": {}}',
    ],
    "react": ["Action: clock", "Action: gone\nAction Input: {}", "Action: clock\nAction Input: x"],
}


@pytest.mark.parametrize(
    ("style", "text"), [(style, text) for style, texts in NO_CALLS.items() for text in texts]
)
def test_what_is_no_call_stays_word_for_word(style: str, text: str) -> None:
    assert parse(style, text, TOOLS) == (text, ())
    assert parse(style, f"嗯\n{text}", TOOLS) == (f"嗯\n{text}", ())


@pytest.mark.parametrize("style", TOOL_STYLES)
def test_a_long_call_is_not_read_at_every_piece(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    real = TOOL_STYLES[style]
    counted = replace(real, read=lambda *given: reads.append(1) or real.read(*given))
    monkeypatch.setitem(TOOL_STYLES, style, counted)
    reader, call = CallReader(style, TOOLS), Call("clock", {"zone": "(\n" * 500})
    said = [part for piece in text_of(style, "", (call,)) for part in reader.push(piece)]
    assert [*said, *reader.push("", last=True)] == [call] and len(reads) < 9


def test_a_broken_call_does_not_hide_the_next() -> None:
    good = text_of("qwen", "", (Call("clock", {"zone": "a"}),))
    bad = good.replace("clock", "gone")
    assert parse("qwen", f"{bad}\n{good}\n{bad}", TOOLS) == (
        f"{bad}\n{bad}",
        (Call("clock", {"zone": "a"}),),
    )


def test_chatglm3s_vocabulary_puts_a_blank_before_the_fence() -> None:
    text = text_of("chatglm3", "", (Call("clock", {"zone": ")\n```"}),))
    blank = text.replace("\n```python", "\n ```python")
    assert parse("chatglm3", blank, TOOLS) == parse("chatglm3", text, TOOLS)
    assert parse("chatglm3", blank, TOOLS)[1] == (Call("clock", {"zone": ")\n```"}),)


def test_chatglm3s_arguments_need_no_names_of_pythons() -> None:
    text = "clock\n```python\ntool_call(from=1, user-id='a=b', a b = [2, 'x=']\n)\n```"
    said = {"from": 1, "user-id": "a=b", "a b": [2, "x="]}
    assert parse("chatglm3", text, TOOLS) == ("", (Call("clock", said),))


def test_values_without_quotes_are_of_the_schemas_types() -> None:
    kinds = {
        "i": {"type": "integer"},
        "s": {"type": "string"},
        "b": {"type": "boolean"},
        "n": {"type": ["number", "null"]},
        "u": {"anyOf": [{"type": "array"}, {"type": "null"}]},
        "either": {"type": ["integer", "string"]},
        "odd": "no schema",
        "odder": {"type": 5},
        "oddest": {"anyOf": [{"type": [{}]}]},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "circle": {"$ref": "#/properties/circle"},
    }
    tools: Tools = [{"name": "f", "parameters": {"properties": kinds}}]
    said = {"i": "5", "s": "5", "b": "True", "n": "None", "u": "[5]", "either": "5", "odd": "5"}
    said |= {"free": "5", "list": '["a", 1]', "code": "[not json"}
    said |= {"odder": "5", "oddest": "5", "maybe": "None", "circle": "5"}
    text = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in said.items())
    whole = f"<tool_call>\n<function=f>\n{text}</function>\n</tool_call>"
    assert parse("qwen3.5", whole, tools)[1][0].arguments == {
        "i": 5,
        "s": "5",
        "b": True,
        "n": None,
        "u": [5],
        "either": "5",
        "odd": "5",
        "free": "5",
        "list": ["a", 1],
        "code": "[not json",
        "odder": "5",
        "oddest": "5",
        "maybe": None,
        "circle": "5",
    }
    wrong = whole.replace(">\n5\n<", ">\n5 六\n<")  # what is no number stays as it was said
    assert parse("qwen3.5", wrong, tools)[1][0].arguments["i"] == "5 六"
    for odd in ({"parameters": None}, {"parameters": []}, {"parameters": {"properties": [1]}}):
        assert parse("qwen3.5", whole, [{"name": "f", **odd}])[1][0].arguments["i"] == "5"


def test_without_tools_nothing_is_a_call() -> None:
    assert read_tools('[{"name": ["a"]}]') == []
    for style in TOOL_STYLES:
        text = text_of(style, "好", (Call("clock", {}),)) + " \n"
        assert parse(style, text, []) == (text, ())
