"""Templates against the oracles in ../shared/templates, and what must hold for every one of
them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.message import Call, Message, with_calls
from cllm.data.schema import Conversation
from cllm.data.template import TEMPLATES, Segment, Template, render

SHARED = Path(__file__).parents[2] / "shared" / "templates"
ROLES = {"function": "assistant", "observation": "tool"}
# The oracle's README: not the models' own tool formats, and a missing blank line behind alpaca's
# system text.
OWN_TOOLS = {("chatglm3", "tool-call-system"), ("intern2", "tool-call-system")}
THINKING = {name for name, template in TEMPLATES.items() if template.thinking}


def rows(name: str) -> list[dict[str, Any]]:
    if not (SHARED / name).is_file():
        return []
    return [json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").splitlines()]


def conversation(row: dict[str, Any]) -> Conversation:
    messages = [Message(ROLES.get(m["role"], m["role"]), m["content"]) for m in row["messages"]]
    tools = row.get("tools")
    messages = [
        with_calls(message, listed=m["role"] == "function")
        for message, m in zip(messages, row["messages"], strict=True)
    ]
    if row["system"] is not None:
        messages.insert(0, Message("system", row["system"]))
    return Conversation(
        messages=tuple(messages), tools=json.dumps(tools, ensure_ascii=False) if tools else ""
    )


def text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def prompt(given: Conversation, template: Template) -> str:
    question = Conversation(messages=given.messages[:-1], tools=given.tools)
    return text(render(question, template, open_turn=True))


def chat(*words: str, system: str | None = None) -> list[Message]:
    start = [] if system is None else [Message("system", system)]
    return start + [Message("assistant" if i % 2 else "user", word) for i, word in enumerate(words)]


def trained(segments: list[Segment]) -> list[tuple[str, str | None]]:
    return [(s.text, s.target) for s in segments if s.supervised and s.text]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize(
    "row",
    [row for row in rows("dev.jsonl") if (row["template"], row["conv"]) not in OWN_TOOLS],
    ids=lambda row: f"{row['template']}-{row['conv']}",
)
def test_renders_as_llama_factory(row: dict[str, Any]) -> None:
    template, given = TEMPLATES[row["template"]], conversation(row)
    expected, opened = row["text"], row["inference_prompt"]
    if row["template"] == "alpaca" and row["system"]:
        expected, opened = (
            t.replace("### Instruction:", "\n\n### Instruction:", 1) for t in (expected, opened)
        )
    assert text(render(given, template)) == expected
    assert prompt(given, template) == opened


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize(
    "row", rows("native_dev.jsonl"), ids=lambda row: f"{row['template']}-{row['conv']}"
)
def test_renders_as_the_models_own_code(row: dict[str, Any]) -> None:
    name = {"qwen": "qwen1"}.get(row["template"], row["template"])
    given = conversation(row)
    assert prompt(given, TEMPLATES[name]) == row["inference_prompt"]
    # Qwen's script also trains other roles' markup; here only answers are
    if row["sft"] and name != "qwen1":
        merged: list[list[Any]] = []
        for segment in render(given, TEMPLATES[name]):
            label = segment.target if segment.supervised else None
            if merged and label is None and merged[-1][1:] == [segment.supervised, None]:
                merged[-1][0] += segment.text
            elif segment.text:
                merged.append([segment.text, segment.supervised, label])
        assert merged == [[part["text"], part["train"], part.get("label")] for part in row["sft"]]


@pytest.mark.parametrize("name", ["chatml", "qwen", "qwen1", "qwen2", "yi", "internlm2"])
def test_chatml_trains_the_answers_and_their_end_only(name: str) -> None:
    segments = render(chat("在吗", "在的", "几点了", "三点"), TEMPLATES[name])
    assert trained(segments) == [
        ("在的", None),
        ("<|im_end|>", None),
        ("三点", None),
        ("<|im_end|>", None),
    ]
    assert text(segments).endswith("三点<|im_end|>\n")


def test_role_tokens_end_a_turn_where_the_authors_train_them() -> None:
    words = chat("在吗", "在的", "几点了", "三点")
    assert trained(render(words, TEMPLATES["chatglm3"])) == [
        *[("\n", None), ("在的", None), ("<|user|>", None)],
        *[("\n", None), ("三点", None), ("</s>", None)],
    ]
    assert trained(render(words, TEMPLATES["glm4"]))[2] == ("<|user|>", "<|endoftext|>")
    assert trained(render(words, TEMPLATES["baichuan2"]))[:3] == [
        ("<reserved_106>", "</s>"),
        ("在的", None),
        ("<reserved_106>", "</s>"),
    ]
    with_system = render(chat("在吗", "在的", system="简短"), TEMPLATES["baichuan2"])
    assert trained(with_system) == [("在的", None), ("</s>", None)]


def test_chatglm2_numbers_rounds_and_trains_the_last_answer() -> None:
    segments = render(chat("在吗", "在的", "几点了", "三点", system="不用"), TEMPLATES["chatglm2"])
    assert (
        text(segments)
        == "[gMASK]sop[Round 1]\n\n问：在吗\n\n答：在的\n\n[Round 2]\n\n问：几点了\n\n答：三点</s>"
    )
    assert trained(segments) == [("三点", None), ("</s>", None)]


def test_system_text_by_default_given_and_empty() -> None:
    question = [Message("user", "在吗")]
    empty = [Message("system", ""), *question]
    assert "created by Alibaba" in text(render(question, TEMPLATES["qwen"]))
    assert text(render(empty, TEMPLATES["qwen"])).startswith("<|im_start|>system\n<|im_end|>\n")
    assert text(render(empty, TEMPLATES["intern2"])).startswith("<s><|im_start|>user\n")
    assert (
        text(render([Message("system", "短"), *question], TEMPLATES["llama2"]))
        == "<s>[INST] <<SYS>>\n短\n<</SYS>>\n\n在吗 [/INST]"
    )


def test_thinking_off_leaves_the_reasoning_out_and_trains_every_answer() -> None:
    words = chat(
        "一加一", "<think>\n数手指\n</think>\n\n二", "再加一", "<think>\n接着数\n</think>\n\n三"
    )
    segments = render(words, TEMPLATES["qwen3"])
    assert text(segments) == (
        "<|im_start|>user\n一加一<|im_end|>\n<|im_start|>assistant\n二<|im_end|>\n"
        "<|im_start|>user\n再加一<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n三<|im_end|>\n"
    )
    assert [part for part, _ in trained(segments)] == ["二", "<|im_end|>", "三", "<|im_end|>"]
    assert text(render(words[:3], TEMPLATES["qwen3"], open_turn=True)).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5"])
def test_thinking_kept_is_trained_where_the_template_shows_it(name: str) -> None:
    template = _with(name, thinking="keep")
    words = chat(
        "一加一", "<think>\n数手指\n</think>\n\n二", "再加一", "<think>\n接着数\n</think>\n\n三"
    )
    segments = render(words, template)
    assert text(segments) == (
        "<|im_start|>user\n一加一<|im_end|>\n<|im_start|>assistant\n二<|im_end|>\n"
        "<|im_start|>user\n再加一<|im_end|>\n<|im_start|>assistant\n<think>\n接着数\n</think>\n\n三<|im_end|>\n"
    )
    opened = "<think>\n" if name == "qwen3.5" else ""  # Qwen3.5 opens the block in the prompt
    answer = "<think>\n接着数\n</think>\n\n三<|im_end|>".removeprefix(opened)
    assert "".join(part for part, _ in trained(segments)) == answer
    assert text(render(words[:3], template, open_turn=True)).endswith(
        "<|im_start|>assistant\n" + opened
    )


def test_thinking_kept_never_trains_an_empty_block() -> None:
    segments = render(chat("一加一", "二", "再加一", "三"), _with("qwen3", thinking="keep"))
    assert "".join(part for part, _ in trained(segments)) == "二<|im_end|>三<|im_end|>"
    assert "<think>\n\n</think>\n\n三" in text(segments)


def _with(name: str, **changes: Any) -> Template:
    return replace(TEMPLATES[name], **changes)


TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {"name": "clock", "description": "看时间", "parameters": {}},
        }
    ],
    ensure_ascii=False,
)
CALL = json.dumps({"name": "clock", "arguments": {"zone": "北京"}}, ensure_ascii=False)


def tool_text(name: str, tools: str = TOOLS) -> str:
    messages = (
        Message("user", "几点"),
        Message("assistant", "", "", (Call("clock", {"zone": "北京"}),)),
        Message("tool", "三点"),
        Message("tool", "整"),
        Message("assistant", "三点整"),
    )
    return text(render(Conversation(messages=messages, tools=tools), TEMPLATES[name]))


def test_tools_in_the_formats_of_the_models() -> None:
    chatglm3 = tool_text("chatglm3")
    assert chatglm3.startswith(
        "[gMASK]sop<|system|>\nAnswer the following questions as best as you can."
    )
    assert (
        "<|assistant|>clock\n```python\ntool_call(zone='北京')\n```<|observation|>\n三点<|observation|>\n整<|assistant|>\n"
        in chatglm3
    )
    internlm2 = tool_text("internlm2")
    assert internlm2.startswith(
        '<s><|im_start|>system name=<|plugin|>\n[\n    {\n        "name": "clock"'
    )
    assert (
        '<|action_start|><|plugin|>\n{"name": "clock", "parameters": {"zone": "北京"}}'
        "<|action_end|><|im_end|>\n" in internlm2
    )
    assert "<|im_start|>environment name=<|plugin|>\n三点<|im_end|>\n" in internlm2
    qwen = tool_text("qwen3")
    assert "<tool_call>\n" + CALL + "\n</tool_call><|im_end|>\n" in qwen
    assert (
        "<|im_start|>user\n<tool_response>\n三点\n</tool_response>\n<tool_response>\n整\n</tool_response><|im_end|>\n"
        in qwen
    )
    assert "<function=clock>\n<parameter=zone>\n北京\n</parameter>\n</function>" in tool_text(
        "qwen3.5"
    )
    assert 'clock\n{"zone": "北京"}<|observation|>' in tool_text("glm4")
    assert "Action: clock\nAction Input: " in tool_text("yi")


def test_json_answers_without_tools_stay_as_they_are() -> None:
    assert text(render(chat("给我 JSON", CALL), TEMPLATES["qwen3"])).endswith(CALL + "<|im_end|>\n")
    assert "not json" not in tool_text("qwen3", tools="not json")


pieces = st.sampled_from([*"好ab \n{}[]", "<|im_end|>", "</s>", "<|user|>", "[gMASK]", "{round}"])
words = st.lists(pieces, max_size=6).map(lambda parts: f"x{''.join(parts)}x")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(max_examples=25, deadline=None)
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3), system=st.none() | words)
def test_what_holds_for_every_template(
    name: str, turns: list[tuple[str, str]], system: str | None
) -> None:
    template = TEMPLATES[name]
    messages = chat(*[word for turn in turns for word in turn], system=system)
    segments = render(messages, template)
    spoken = [m.content for m in messages if m.role != "system" or template.system]
    if system is None and template.default_system:
        spoken.insert(0, template.default_system)
    assert [s.text for s in segments if not s.markup] == spoken
    last = [s for s in segments if s.supervised][-1]
    assert (last.text, last.markup) == (template.end, True)
    opened = render(messages[:-1], template, open_turn=True)
    assert not any(s.supervised or s.target for s in opened)
    if name not in THINKING:
        assert text(segments).startswith(text(opened))
