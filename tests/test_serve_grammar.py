"""Answers that follow a grammar: valid whatever is drawn, alone in their row, refused where the
library cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from test_serve_api import HELLO, Server, serving
from test_serve_fields import chat, events, post, refused

from cllm.assembly import Loaded, open_model
from cllm.data.message import Message
from cllm.data.tools import TOOL_STYLES, opened, parse
from cllm.messages import UserError
from cllm.serve.engine import Engine
from cllm.serve.grammar import Grammars, call_grammar
from cllm.serve.grammar import _Words as Words
from cllm.serve.sampling import Sampling

pytest.importorskip("llguidance")

WEATHER = {
    "type": "object",
    "properties": {
        "城市": {"type": "string", "maxLength": 6},
        "气温": {"type": "integer", "minimum": -40, "maximum": 50},
        "天气": {"enum": ["晴", "雨", 'a"b']},
    },
    "required": ["城市", "气温", "天气"],
    "additionalProperties": False,
}
SMALL = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9999}},
    "required": ["n"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    WEATHER,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"const": {"a": [1, None, "是"]}},
    {"type": "string", "pattern": r"^\d{4}-\d{2}$"},
    {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 0, "maximum": 1}]},
    {
        "$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}, "maxItems": 1}},
        "$ref": "#/$defs/list",
    },
]


def wanted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return open_model("tiny-zh", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def grammars(loaded: Loaded) -> Grammars:
    return Grammars(loaded.tokenizer)


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Server]:
    yield from serving(loaded)


def decode_all(engine: Engine, prompt: list[int], plans: list[Sampling]) -> list[Any]:
    rows = [engine._row(prompt, plan, 0) for plan in plans]
    engine.waiting.extend(rows)
    while not all(row.finish_reason for row in rows):
        engine.step()
    return rows


def test_answers_are_valid_beside_rows_that_are_free(loaded: Loaded, grammars: Grammars) -> None:
    """A short version of bench/grammar.py; and nobody's mask is another one's."""
    jsonschema = pytest.importorskip("jsonschema")
    prompt = loaded.tokenizer.encode_chat([Message("user", "用 JSON 回答。")])
    free = Sampling(max_new_tokens=40, temperature=1, seed=9)
    plans = [
        Sampling(max_new_tokens=200, temperature=1, seed=i, grammar=grammars.compile(schema))
        for i, schema in enumerate(SCHEMAS)
    ]
    # so little room that rows are put back and prefilled again with what they have
    for room in (None, 6 * len(prompt)):
        engine = loaded.assembly.engine()
        engine.kv_tokens = room or engine.kv_tokens
        *rows, last = decode_all(engine, prompt, [*plans, free])
        assert last.ids == decode_all(loaded.engine(), prompt, [free])[0].ids
        for row, schema in zip(rows, SCHEMAS, strict=True):
            assert row.finish_reason == "stop", (schema, row.error)
            answer = json.loads(loaded.tokenizer.decode(row.ids[len(prompt) :]))
            jsonschema.Draft202012Validator(schema).validate(answer)


DIGITS = "0123456789."


@pytest.mark.parametrize(
    ("schema", "liked", "text"),
    [
        ({"type": "number"}, DIGITS, r"-?[\d.]{1,26}([eE][+-]?\d{1,26})?"),
        ({"type": "integer"}, DIGITS, r"-?\d{1,24}"),
        ({"type": "number", "minimum": 0, "maximum": 1}, DIGITS, r"[01]\.\d{22,23}"),
        # zeros alone would never do
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "0.", r"0\.0{22}[1-9]\d*"),
        # what a schema asks for comes, and strings are not numbers
        ({"type": "number", "minimum": 1e-30, "maximum": 2e-30}, DIGITS, r"0\.0{29}[12]\d*"),
        ({"const": 10**40}, DIGITS, r"10{40}"),
        ({"type": "string", "pattern": r"^\d{40}$"}, "0", r'"0{40}"'),
        ({"type": "string", "pattern": r"^1,\d{40}$"}, DIGITS, r'"1,\d{40}"'),
        ({"type": "string", "maxLength": 50}, "0123", r'"[0-3]{50}"'),
    ],
)
def test_a_number_comes_to_an_end_and_nothing_else_is_cut(
    loaded: Loaded, grammars: Grammars, schema: dict[str, Any], liked: str, text: str
) -> None:
    """The model likes digits above all."""
    words = Words(loaded.tokenizer).tokens
    bias = tuple(
        (id, 50.0) for id, word in enumerate(words) if word and {*word} <= {*liked.encode()}
    )
    plan = Sampling(max_new_tokens=120, grammar=grammars.compile(schema), logit_bias=bias)
    [row] = decode_all(loaded.engine(), loaded.tokenizer.encode("1"), [plan])
    answer = loaded.tokenizer.decode(row.ids[1:])
    assert row.finish_reason == "stop" and re.fullmatch(text + r"\s*", answer), answer


def test_json_comes_whole_streamed_several_times_and_by_name(server: Server) -> None:
    body: dict[str, Any] = {"temperature": 1, "seed": 3, "n": 2, "max_tokens": 120}
    body["response_format"] = wanted(SMALL)
    whole = chat(server, **body)
    parts = [""] * 2
    for chunk in events(server, "/v1/chat/completions", messages=HELLO, **body):
        for choice in chunk["choices"]:
            parts[choice["index"]] += choice["delta"].get("content", "")
    for choice, text in zip(whole["choices"], parts, strict=True):
        assert choice["message"]["content"] == text and choice["finish_reason"] == "stop"
        assert 0 <= json.loads(text)["n"] <= 9999
    assert len(set(parts)) > 1


def test_any_object_and_plain_text(server: Server) -> None:
    kind = {"type": "json_object"}
    for seed in range(2):
        body = {"temperature": 1, "seed": seed, "max_tokens": 60, "response_format": kind}
        choice = chat(server, **body)["choices"][0]
        text = choice["message"]["content"]
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
    plain = chat(server, temperature=0, response_format={"type": "text"})
    assert plain["choices"] == chat(server, temperature=0)["choices"]


def test_what_max_tokens_cuts_says_so(server: Server) -> None:
    body = {"max_tokens": 2, "response_format": wanted(WEATHER)}
    choice = chat(server, **body)["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("{")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"type": "array", "uniqueItems": True},
        {"type": "string", "pattern": "("},
        {"$ref": "http://example.com/schema"},
        {"$ref": "#"},
        {"not": {}},
        {"type": "object", "required": ["a"], "properties": {"a": False}},
        nested(900),
    ],
    ids=lambda schema: json.dumps(schema)[:30],
)
def test_a_schema_that_no_answer_can_follow_is_refused(server: Server, schema: Any) -> None:
    error = refused(server, response_format=wanted(schema))
    assert error["param"] == "response_format" and "\n" not in error["message"]
    assert chat(server, max_tokens=2)


def test_malformed_formats_are_refused(server: Server) -> None:
    for value in (
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema", "json_schema": {"schema": []}},
        {"type": "json_schema", "json_schema": None},
        {"type": "xml"},
        {},
        [],
        "json_object",
    ):
        error = refused(server, response_format=value)
        assert error["param"].startswith("response_format"), value
    assert post(server, "/v1/completions", prompt="x", response_format={"type": "json_object"})[0]


def test_compiled_once_and_lark_too(loaded: Loaded, grammars: Grammars) -> None:
    assert grammars.compile(WEATHER) is grammars.compile(dict(WEATHER))
    source = 'start: "call " %json {"type": "object", "properties": {"n": {"type": "integer"}}}'
    prompt = loaded.tokenizer.encode_chat([Message("user", "你好")])
    plan = Sampling(max_new_tokens=60, temperature=1, seed=1, grammar=grammars.compile(source))
    row = decode_all(loaded.engine(), prompt, [plan])[0]
    text = loaded.tokenizer.decode(row.ids[len(prompt) :])
    assert text.startswith("call {")
    with pytest.raises(UserError, match="not supported"):
        grammars.compile("start: (")


def test_a_grammar_that_fails_ends_its_row_alone_with_the_reason(
    loaded: Loaded, grammars: Grammars
) -> None:
    prompt = loaded.tokenizer.encode_chat([Message("user", "你好")])
    engine = loaded.engine()
    plan = Sampling(max_new_tokens=30, temperature=1, seed=1, grammar=grammars.compile(WEATHER))
    rows = [engine._row(prompt, plan, 0), engine._row(prompt, Sampling(max_new_tokens=5), 0)]
    engine.waiting.extend(rows)
    engine.step()
    assert rows[0].grammar
    rows[0].grammar.advance(loaded.tokenizer.encode("天")[0])  # which no number of this JSON is
    while not all(row.finish_reason for row in rows):
        engine.step()
    assert rows[0].finish_reason == "error" and "grammar" in rows[0].error
    assert rows[1].finish_reason in ("length", "stop")


def test_the_end_is_always_one_of_the_stop_ids(loaded: Loaded, grammars: Grammars) -> None:
    """However unlikely the model finds it; and no control token is ever part of an answer."""
    prompt = loaded.tokenizer.encode_chat([Message("user", "你好")])
    ends = loaded.tokenizer.stop_ids
    bias = (*((id, -100.0) for id in ends), (1, 100.0))
    grammar = grammars.compile({"enum": ["是", "否"]})
    plan = Sampling(max_new_tokens=30, temperature=1, grammar=grammar, logit_bias=bias)
    row = decode_all(loaded.engine(), prompt, [plan])[0]
    assert row.finish_reason == "stop"
    assert loaded.tokenizer.decode(row.ids[len(prompt) :]) in ('"是"', '"否"')


# --- A call that has to be: begun by the prompt, its arguments after the tool's schema
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
