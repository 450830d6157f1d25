"""A call that has to be: begun by the prompt, its arguments after the tool's schema."""

from __future__ import annotations

from typing import Any

import pytest

from cllm.assembly import Loaded, open_model
from cllm.data.tools import TOOL_STYLES, opened, parse
from cllm.serve.grammar import Grammars, call_grammar
from cllm.serve.sampling import Sampling

pytest.importorskip("llguidance")

DAYS = ["今天", 'a"b\n']
TOOLS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"day": {"enum": DAYS}, "hour": {"type": "integer", "maximum": 9}},
            "required": ["day", "hour"],
            "additionalProperties": False,
        },
    },
    {"name": "weather2", "parameters": {"properties": {"x": {"type": "boolean"}}}},
    {"name": "now"},
]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return open_model("tiny-zh", device="cpu", precision="fp32")


@pytest.mark.parametrize("named", ["", "weather", "now"])
@pytest.mark.parametrize("style", TOOL_STYLES)
def test_what_follows_the_beginning_is_a_call_of_an_offered_tool(
    loaded: Loaded, style: str, named: str
) -> None:
    begun = opened(style, named)
    text = call_grammar(style, TOOLS, begun) if begun else ""
    assert bool(text) == (style not in ("qwen3.5", "chatglm3") and bool(begun))
    if not text:
        return
    grammar = Grammars(loaded.tokenizer).compile(text)
    start = "".join(part for part, _ in begun)
    sampling = Sampling(max_new_tokens=400, temperature=1.5, seed=3, grammar=grammar)
    prompts = [loaded.tokenizer.encode(f"你好{start}")] * 6
    engine = loaded.engine()
    whole = 0
    for ids in engine.generate(prompts, sampling, 0):
        answer = start + loaded.tokenizer.decode(ids)
        words, calls = parse(style, answer.removeprefix(TOOL_STYLES[style].turn), TOOLS)
        if len(ids) == sampling.max_new_tokens:
            continue
        whole += 1
        [call] = calls
        assert not words and call.name in ([named] if named else [t["name"] for t in TOOLS])
        if call.name == "weather":
            assert call.arguments["day"] in DAYS and call.arguments["hour"] <= 9
        if call.name == "now":
            assert call.arguments == {}
    assert whole >= 3
