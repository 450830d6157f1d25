"""A message's parts from anybody's row to the ids: calls, reasoning, and what is trained."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.encode import IGNORE_INDEX, encode_set, rendered
from cllm.data.message import Call, Message
from cllm.data.quality import deduplicate, quality
from cllm.data.schema import Conversation, Normalizer, Reject, to_row
from cllm.data.sources import _restored, _stored
from cllm.data.template import TEMPLATES, render
from cllm.data.text import TextOptions
from cllm.evaluate.answers import with_answers
from cllm.messages import UserError
from cllm.model.tokenizer import Tokenizer, load_tokenizer

QWEN25 = Path(__file__).parents[2] / "shared" / "golden" / "tokenizer_files" / "qwen25"
TINY = Path(__file__).parents[1] / "cllm" / "assets" / "tiny-zh"
Q, A = "青岛多少度？", "二十一度。"
CALL = {"name": "weather", "arguments": {"city": "青岛"}}
TEXT = json.dumps(CALL, ensure_ascii=False)
WIRE = {"name": "weather", "arguments": '{"city": "青岛"}'}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
WEATHER = (Call("weather", {"city": "青岛"}),)


def read(row: Any, **options: Any) -> Conversation:
    result = Normalizer(options=TextOptions(**options))(row)
    assert isinstance(result, Conversation), result
    return result


def answering(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": Q}, {"role": "assistant", **message}]}


def sharegpt(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in turns], **more}


def spoken(segments: Any, *, trained: bool = True) -> str:
    return "".join(s.text for s in segments if s.supervised or not trained)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            answering(content=None, tool_calls=[{"id": "1", "type": "function", "function": WIRE}]),
            "",
        ),
        (answering(content="看看", tool_calls=[{"id": "1", "function": CALL}]), "看看"),
        (answering(content="看看", tool_calls=json.dumps([{"function": WIRE}])), "看看"),
        (answering(content="", function_call=WIRE), ""),
        (
            answering(
                content=[
                    {"type": "text", "text": "看看"},
                    {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "青岛"}},
                ]
            ),
            "看看",
        ),
        (answering(content=[{"type": "tool_call", "value": TEXT}]), ""),
        (sharegpt(("human", Q), ("function_call", TEXT)), ""),
        (sharegpt(("human", Q), ("function_call", CALL)), ""),
        (sharegpt(("human", Q), ("function_call", f"看看\n{TEXT}")), "看看"),
        (sharegpt(("human", Q), ("gpt", "看看"), ("function_call", TEXT)), "看看"),
        (sharegpt(("human", Q), ("tool_call", json.dumps(WIRE))), ""),
        (sharegpt(("human", Q), ("function-call", TEXT)), ""),
        (sharegpt(("human", Q), ("tool_calls", [CALL])), ""),
        (sharegpt(("human", Q), ("gpt", f"看看 <functioncall>{TEXT}</functioncall>")), "看看"),
        (sharegpt(("human", Q), ("gpt", TEXT), tools=TOOLS), ""),
        ({"query": Q, "answers": json.dumps([CALL]), "tools": json.dumps(TOOLS)}, ""),
        (sharegpt(("human", Q), ("gpt", f"看看<tool_call>\n{TEXT}\n</tool_call>")), "看看"),
        (sharegpt(("human", Q), ("gpt", f"<tool_call>\n{CALL}\n</tool_call>")), ""),
        ({"instruction": Q, "output": f"<tool_call>{TEXT}</tool_call>"}, ""),
        (
            {
                "chat": f"USER: {Q}\n\n\nASSISTANT: 看看 <functioncall> "
                '{"name": "weather", "arguments": \'{"city": "青岛"}\'} <|endoftext|>\n\n\n'
            },
            "看看",
        ),
    ],
)
def test_every_form_of_a_call_becomes_the_same(row: Any, words: str) -> None:
    assert read(row).messages[-1] == Message("assistant", words, "", WEATHER)


def test_gemini_s_parts_are_read() -> None:
    call = {"functionCall": {"name": "weather", "args": {"city": "青岛"}}}
    result = {"functionResponse": {"name": "weather", "response": {"degrees": 21}}}
    row = {
        "systemInstruction": {"role": "system", "parts": [{"text": "你是气象台。"}]},
        "contents": [
            {"role": "user", "parts": [{"text": Q}]},
            {"role": "model", "parts": [{"text": "看看"}, call]},
            {"role": "user", "parts": [result]},
            {"role": "model", "parts": [{"text": A}]},
        ],
    }
    assert read(row).messages == (
        Message("system", "你是气象台。"),
        Message("user", Q),
        Message("assistant", "看看", calls=(Call("weather", {"city": "青岛"}),)),
        Message("tool", '{"name": "weather", "response": {"degrees": 21}}'),
        Message("assistant", A),
    )
    row["contents"][2]["role"] = "function"
    assert read(row).messages[3].role == "tool"
    row["contents"][0]["parts"] = [{"inlineData": {"mimeType": "image/png", "data": "iVBO"}}]
    assert isinstance(Normalizer()(row), Reject)


def test_several_calls_stay_in_order_and_their_results_are_turns() -> None:
    expected = [
        Message("user", Q),
        Message("assistant", "", "", (*WEATHER, Call("clock", {}))),
        Message("tool", "21"),
        Message("tool", '{"t": 8}'),
        Message("assistant", A),
    ]
    clock = {"name": "clock", "arguments": ""}
    tagged = "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in (CALL, clock))
    results = '<tool_response>\n21\n</tool_response>\n<tool_response>\n{"t": 8}\n</tool_response>'
    for said in (
        [("function_call", [CALL, clock]), ("observation", "21"), ("observation", {"t": 8})],
        [("function_call", TEXT), ("function_call", clock), ("tool", "21"), ("function", {"t": 8})],
        [("gpt", tagged), ("tool", results)],
        [("gpt", tagged), ("user", results)],
    ):
        assert list(read(sharegpt(("human", Q), *said, ("gpt", A)))) == expected
    uses = [
        {"type": "tool_use", "id": str(i), "name": n, "input": a}
        for i, (n, a) in enumerate([("weather", {"city": "青岛"}), ("clock", {})])
    ]
    back = [
        {"type": "tool_result", "tool_use_id": "0", "content": [{"type": "text", "text": "21"}]},
        {"type": "tool_result", "tool_use_id": "1", "content": {"t": 8}},
    ]
    messages = [("user", Q), ("assistant", uses), ("user", back), ("assistant", A)]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    assert list(read(row)) == expected
    row["messages"][2]["content"].append({"type": "text", "text": "快点"})  # type: ignore[attr-defined]
    assert list(read(row)) == [*expected[:4], Message("user", "快点"), expected[4]]


@pytest.mark.parametrize(
    "row",
    [
        answering(content="", tool_calls=[{"function": {"name": "weather", "arguments": "青岛"}}]),
        answering(content="", tool_calls=[{"function": {"name": "weather", "arguments": "[1]"}}]),
        answering(content="", tool_calls=[{"function": {"arguments": "{}"}}]),
        answering(content="", tool_calls=["weather"]),
        answering(
            content="", tool_calls=[{"function": {"name": "w", "arguments": {"a": "\ud83d"}}}]
        ),
        answering(content='<tool_call>{"name": "weather", "arguments": 3}</tool_call>'),
        answering(content='<tool_call>{"name": "weather", </tool_call>'),
        sharegpt(("human", Q), ("function_call", "查一下天气")),
        sharegpt(("human", Q), ("gpt", A), tools="weather"),
        sharegpt(("human", Q), ("gpt", A), tools=[{"description": "x"}]),
        answering(content=A, weight=0.5),
        answering(content=A, loss="sometimes"),
        answering(content=A, mask=True),  # learned by some programs, not learned by others
    ],
)
def test_what_is_no_call_no_tool_and_no_flag_rejects_the_row(row: Any) -> None:
    result = Normalizer()(row, "x.json", 7)
    assert isinstance(result, Reject) and (result.line, result.reason) == (7, "invalid_text")


@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_parts_of_mixed_types_never_raise(role: str) -> None:
    parts = [2.5, {"type": "text", "text": "多云"}, None, "转晴", {"text": "。"}]
    row = {"messages": [{"role": "user", "content": Q}, {"role": role, "content": parts}]}
    row["messages"] += [{"role": "assistant", "content": A}] * (role == "tool")
    assert isinstance(Normalizer()(row, "x.json", 7), Conversation | Reject)


def test_text_about_calls_stays_text() -> None:
    for text in (
        "用 <tool_call> 和 </tool_call> 标签",
        "<tool_call></tool_call> 里写 JSON",
        f"<tool_call>{TEXT}</tool_call> 后面还有话",
    ):
        assert read(answering(content=text)).messages[-1] == Message("assistant", text)
    assert read(answering(content=TEXT)).messages[-1].content == TEXT  # nobody spoke of tools
    for blank in ("", "[]", [], None, float("nan")):
        assert read({**answering(content=A), "tools": blank}).tools == ""


@pytest.mark.parametrize(
    "row",
    [
        answering(content=A, reasoning_content="想"),
        answering(content=A, reasoning=" 想\n"),
        answering(content=A, thinking="<think>\n想\n</think>"),
        answering(content=f"<think>\n想\n</think>\n\n{A}", reasoning_content="想"),
        answering(content=[{"type": "thinking", "thinking": "想"}, {"type": "text", "text": A}]),
        answering(content=[{"type": "reasoning", "text": "想"}, {"type": "text", "text": A}]),
        {"instruction": Q, "output": A, "reasoning_content": "想"},
        {"question": Q, "answer": A, "Complex_CoT": "想"},
        {"prompt": Q, "response": A, "cot": "想"},
        {"Question": Q, "Complex_CoT": "想", "Response": A},
        {"question": Q, "answer": A, "chain_of_thought": "想"},
        answering(content=A, think="想"),
    ],
)
def test_reasoning_is_a_part_wherever_it_stands(row: Any) -> None:
    assert list(read(row)) == [Message("user", Q), Message("assistant", A, "想")]


def test_a_block_is_one_where_the_answer_begins_with_it() -> None:
    template = replace(TEMPLATES["qwen3"], thinking="keep")
    inside = "写成 <think>甲</think> 就行"
    segments = render(read(answering(content=inside)), template)
    assert spoken(segments) == f"{inside}<|im_end|>"
    assert spoken(render(read(answering(content=f"<think>想</think>{inside}")), template)) == (
        f"<think>\n想\n</think>\n\n{inside}<|im_end|>"
    )


def test_an_empty_block_is_no_part_of_an_answer() -> None:
    empty = f"<think>\n\n</think>\n\n{A}"
    for row in (answering(content=empty), {"instruction": Q, "output": empty}):
        assert list(read(row)) == [Message("user", Q), Message("assistant", A)]


def test_reasoning_without_blocks_is_left_out_or_kept_as_words() -> None:
    talk = [Message("user", Q), Message("assistant", A, "想")]
    assert spoken(render(talk, TEMPLATES["qwen"])) == f"{A}<|im_end|>"
    kept = load_tokenizer(TINY, template="chatml", thinking="keep")
    assert spoken(kept.segments(talk)) == f"<think>\n想\n</think>\n\n{A}<|im_end|>"


@pytest.mark.parametrize(
    ("flag", "off"), [("loss", False), ("weight", 0), ("train", "false"), ("loss_mask", 0)]
)
@pytest.mark.parametrize("name", ["qwen", "chatglm3", "glm4", "baichuan2", "llama2"])
def test_answers_that_are_not_trained_are_read_only(flag: str, off: object, name: str) -> None:
    row = answering(content="错的")
    row["messages"][1][flag] = off
    row["messages"] += [*answering(content="对的")["messages"]]
    bad, good = read(row), read(row | {"messages": row["messages"][2:]})
    segments = render(bad, TEMPLATES[name])
    assert "错的" in spoken(segments, trained=False) and "错的" not in spoken(segments)
    first = spoken(render(good, TEMPLATES[name]))
    opening = spoken(render(good.messages[:1], TEMPLATES[name]))  # some train the first role token
    assert spoken(segments) == first
    assert opening in first
    assert with_answers([replace(bad, messages=bad.messages[:2])]) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3", "看看\n<tool_call>\n" + TEXT + "\n</tool_call><|im_end|>"),
        (
            "qwen3.5",
            "看看\n\n<tool_call>\n<function=weather>\n<parameter=city>\n青岛\n</parameter>\n",
        ),
        ("internlm2", '看看<|action_start|><|plugin|>\n{"name": "weather", "parameters": '),
        ("glm4", '\n看看<|assistant|>weather\n{"city": "青岛"}'),
        ("chatglm3", "\n看看<|assistant|>weather\n```python\ntool_call(city='青岛')\n```"),
        ("llama3", '看看\n{"name": "weather", "parameters": {"city": "青岛"}}<|eot_id|>'),
        ("yi", '看看\nAction: weather\nAction Input: {"city": "青岛"}<|im_end|>'),
    ],
)
def test_words_beside_a_call_are_said_in_every_format(name: str, text: str) -> None:
    talk = [Message("user", Q), Message("assistant", "看看", "", WEATHER), Message("tool", "21")]
    assert text in spoken(render(talk, TEMPLATES[name]))


def test_a_format_without_a_place_for_tools_refuses_them() -> None:
    with pytest.raises(UserError, match="internlm has no place"):
        render(read({**answering(content=A), "tools": TOOLS}), TEMPLATES["internlm"])


# --- Generated rows
words = st.text(st.sampled_from('你好天气 ab\n{}"<>，1'), max_size=12).map(lambda text: f"x{text}y")
words |= st.sampled_from(["用 <tool_call> 标签", "见 <think> 一节", "<tool_response>"])
values = st.recursive(
    words | st.integers(-5, 5) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(["weather", "clock", "查询"])
calls = st.lists(
    st.builds(Call, names, st.dictionaries(st.sampled_from(["city", "日期"]), values, max_size=2)),
    min_size=1,
    max_size=3,
).map(tuple)
tools = st.lists(
    st.builds(
        lambda n, d: {"type": "function", "function": {"name": n, "description": d}}, names, words
    ),
    max_size=2,
)


@st.composite
def rows(
    draw: st.DrawFn, most_calls: int = 3, thinks: bool = True, speaks: bool = True
) -> tuple[list[Message], list[dict[str, Any]]]:
    """1-6 turns with a system text, tools, calls (`speaks`: behind words), observations, reasoning
    and flags.
    """
    talk = [Message("system", draw(words))] if draw(st.booleans()) else []
    thoughts = st.just("") | words if thinks else st.just("")
    flags = st.sampled_from([True, True, False])
    for _ in range(draw(st.integers(1, 6))):
        talk.append(Message("user", draw(words)))
        for _ in range(draw(st.sampled_from([0, 0, 1, 2])) if most_calls else 0):
            called = draw(calls)[:most_calls]
            said = draw(st.just("") | words) if speaks else ""
            talk.append(Message("assistant", said, draw(thoughts), called, draw(flags)))
            talk += [Message("tool", draw(words)) for _ in called]
        talk.append(Message("assistant", draw(words), draw(thoughts), (), draw(flags)))
    return talk, draw(tools) if most_calls else []


def row_of(talk: list[Message], tools: list[dict[str, Any]]) -> dict[str, Any]:
    return {"messages": [message.row() for message in talk], "tools": tools}


@given(rows())
@settings(max_examples=150, deadline=None)
def test_parts_survive_reading_writing_and_the_cache(
    generated: tuple[list[Message], list[dict[str, Any]]],
) -> None:
    item = read(row_of(*generated))
    assert list(item) == generated[0]
    assert Normalizer()(json.loads(json.dumps(to_row(item)))) == item
    assert _restored(np.frombuffer(_stored(item), np.uint8)) == item
    other = replace(item, messages=(*item.messages[:-1], item.messages[-1]._replace(trained=False)))
    assert len(deduplicate([item, item, other])) == 1 + (item != other)


ROWS = int(os.environ.get("CLLM_ROWS", "60"))
"""Generated rows a family: 300 in a release."""
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# published files in ../shared, or TRL's copy of a chat_template -> thinking, what the rows have
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen25": ("off", {}),
    "qwen3.jinja": ("keep", {}),
    "qwen3_5_think.jinja": ("keep", {}),
    "llama3.jinja": ("off", {"most_calls": 0, "thinks": False}),
    "llama3_1.jinja": ("off", {"most_calls": 1, "thinks": False, "speaks": False}),
}


def published_files(name: str, folder: Path) -> Path:
    """The tokenizer files of a family; a chat_template alone stands beside Qwen2.5's vocabulary."""
    files = QWEN25.parent / name
    if not QWEN25.is_dir():
        pytest.skip("needs ../shared")
    if not name.endswith(".jinja"):
        return files
    trl = importlib.util.find_spec("trl")
    if not trl or not trl.submodule_search_locations:
        pytest.skip("needs trl")
    template = Path(trl.submodule_search_locations[0]) / "chat_templates" / name
    shutil.copytree(QWEN25, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = template.read_text(encoding="utf-8")
    more = {
        "<think>": False,
        "</think>": False,
        "<tool_response>": False,
        "</tool_response>": False,
    }
    more |= dict.fromkeys(LLAMA, True) if name.startswith("llama") else {}
    added = config["added_tokens_decoder"]
    known = {entry["content"] for entry in added.values()}
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    for token, special in more.items():
        if token not in known:
            added[str(max(map(int, added)) + 1)] = {"content": token, "special": special, **plain}
    if name.startswith("llama"):
        config |= {"bos_token": LLAMA[0], "eos_token": LLAMA[-1], "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_published_chat_template(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    thinking, parts = FAMILIES[name]
    folder = published_files(name, tmp_path / "files")
    published = AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, thinking=thinking)

    compared = 0

    @given(rows(**parts))
    @settings(max_examples=ROWS, deadline=None)
    def agree(generated: tuple[list[Message], list[dict[str, Any]]]) -> None:
        nonlocal compared
        row = row_of(*generated)
        item = read(row)
        messages = [message.row() for message in item]
        apply = partial(published.apply_chat_template, tools=generated[1] or None)
        ids, labels = tokenizer.encode_segments(tokenizer.segments(item))
        assert ids == apply(messages, return_dict=False)
        answers = answered(partial(apply, tokenize=False), messages, ends)
        if answers is not None:
            assert published.decode([i for i in labels if i != IGNORE_INDEX]) == answers
            compared += 1

    ends = [published.decode([i]) for i in tokenizer.stop_ids]
    agree()
    assert compared > ROWS // 10


def answered(
    apply: Callable[..., str], messages: list[dict[str, Any]], ends: list[str]
) -> str | None:
    """What is trained of a dialogue by its chat_template alone: of each trained answer what its
    turn adds to the prompt before it, up to the end token, but for an empty block of reasoning.
    None where a template says earlier turns in another way once there are later ones.
    """
    whole, said = apply(messages), ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = apply(messages[:place], add_generation_prompt=True)
        until = apply(messages[: place + 1])
        if not (whole.startswith(until) and until.startswith(prompt)):
            return None
        turn = until[len(prompt) :]
        last = max(turn.rfind(end) + len(end) for end in ends if end in turn)
        if message.get("loss", True):
            said += re.sub(r"\A(<think>\n)?\n</think>\n\n", "", turn[:last])
    return said


@pytest.mark.skipif(not QWEN25.is_dir(), reason="needs ../shared")
def test_labels_are_the_trained_answers_and_their_ends() -> None:
    from transformers import AutoTokenizer

    published = AutoTokenizer.from_pretrained(QWEN25)
    tokenizers = [load_tokenizer(QWEN25, template=name) for name in ("auto", "native")]

    @given(rows())
    @settings(max_examples=ROWS, deadline=None)
    def agree(generated: tuple[list[Message], list[dict[str, Any]]]) -> None:
        talk, listed = generated
        row = row_of(talk, listed)
        answers = ""
        for message in talk:
            if message.role == "assistant" and message.trained:
                texts = [json.dumps(call._asdict(), ensure_ascii=False) for call in message.calls]
                tags = [f"<tool_call>\n{text}\n</tool_call>" for text in texts]
                answers += "\n".join(filter(None, [message.content, *tags])) + "<|im_end|>"
        ids = {
            tuple(tokenizer.encode_segments(tokenizer.segments(read(row)))[0])
            for tokenizer in tokenizers
        }
        assert len(ids) == 1
        for tokenizer in tokenizers:
            _, labels = tokenizer.encode_segments(tokenizer.segments(read(row)))
            assert published.decode([i for i in labels if i != IGNORE_INDEX]) == answers

    agree()


def test_written_texts_are_rewritten_in_calls_and_reasoning_too() -> None:
    call = {"name": "mail", "arguments": {"to": ["a@b.cn"]}}
    row = answering(content="", tool_calls=[{"function": call}], reasoning="写给 a@b.cn")
    message = read(row, mask_personal=True).messages[-1]
    assert message == Message("assistant", "", "写给 [EMAIL]", (Call("mail", {"to": ["[EMAIL]"]}),))
    assert quality([read(row)], [])["personal"]["EMAIL"]["count"] == 1


# --- A tokenizer's own chat_template
SPOKEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {% set w = m.content %}"
    "{% if '</think>' in w %}{% set w = w.split('</think>')[-1] %}{% endif %}{{ w }}"
    "{% if tools %}{% for c in m.tool_calls %}"
    "[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "{% if loop.first %}{{ tools | tojson }}{% endif %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {{ think }}{% endif %}"
)


def native(folder: Path, source: str) -> Tokenizer:
    """tiny-zh's vocabulary with a chat_template of its own."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return load_tokenizer(folder, template="native")


def test_a_chat_template_that_cuts_reasoning_trains_it(tmp_path: Path) -> None:
    talk = [Message("user", Q), Message("assistant", f"<think>\n想\n</think>\n\n{A}")]
    tokenizer = native(tmp_path / "a", SPOKEN)
    assert spoken(tokenizer.segments(talk)) == f"<think>\n想\n</think>\n\n{A}<|im_end|>"
    later = [*talk, Message("user", "晚上呢"), Message("assistant", "十八度。")]
    # as the prompt of the second question has it; alone it would teach to skip the thought
    assert spoken(tokenizer.segments(later)) == "十八度。<|im_end|>"
    assert "想" not in spoken(tokenizer.segments(later), trained=False)
    opened = native(tmp_path / "b", SPOKEN.replace("{{ think }}", "<think>\n"))
    assert spoken(opened.segments(talk)) == f"想\n</think>\n\n{A}<|im_end|>"
    whole = spoken(opened.segments(talk), trained=False)
    assert whole.endswith(f"assistant: <think>\n想\n</think>\n\n{A}<|im_end|>")


def test_what_a_chat_template_leaves_out_rejects_the_row_only(tmp_path: Path) -> None:
    called = [Message("user", Q), Message("assistant", "", "", WEATHER)]
    said = Conversation((Message("user", Q), Message("assistant", A)), file="x.jsonl", line=1)
    unlisted = Conversation((*called, *said.messages), file="x.jsonl", line=2)
    listed = replace(unlisted, tools=json.dumps(TOOLS), line=3)
    tokenizer = native(tmp_path / "model", SPOKEN)
    refused = rendered(unlisted, tokenizer)
    assert isinstance(refused, Reject) and (refused.line, refused.reason) == (2, "template")
    assert '[weather {"city": "青岛"}]<|im_end|>' in spoken(tokenizer.segments(listed))
    examples, kept, reasons = encode_set(
        [said, unlisted, listed], tokenizer, kind="chat", max_tokens=400
    )
    assert len(examples) == len(kept) == 2 and reasons == {"template": 1}


def test_a_special_token_inside_a_call_rejects_the_row(tmp_path: Path) -> None:
    calls = (Call("weather", {"city": "<|im_end|>"}),)
    talk = Conversation((Message("user", Q), Message("assistant", "", "", calls)))
    talk = replace(talk, tools=json.dumps(TOOLS))
    assert isinstance(rendered(talk, native(tmp_path / "model", SPOKEN)), Reject)
