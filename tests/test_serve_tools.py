"""Tools and thinking through the API: an engine that says what a test writes down, everything round
it real.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import open_tiny

from cllm.assembly import Loaded
from cllm.data import tools as formats
from cllm.data.message import Call, Message, block_of
from cllm.data.schema import Conversation
from cllm.data.template import TEMPLATES
from cllm.data.tools import TOOL_STYLES, Tools, parse
from cllm.messages import UserError, to_json
from cllm.model.chat_template import call_tokens, tool_style
from cllm.model.tokenizer import Tokenizer, load_tokenizer
from cllm.serve.api import build_app
from cllm.serve.reply import Reply
from cllm.serve.sampling import Listener, Request, Sampling

CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "几点",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
OTHER = {"type": "function", "function": {"name": "other"}}
ASK = [{"role": "user", "content": "几点了？"}]
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "北京"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>'


class Scripted:
    """An engine whose answers are written down; `prompt` is what it was asked."""

    max_tokens, healthy = 4096, True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.text, self.reason = tokenizer, "", "stop"
        self.later: list[str] = []  # what further answers say
        self.waiting: list[Any] = []
        self.prompt: list[int] = []

    def submit(
        self, prompt: list[int], sampling: Sampling, adapter: int, listener: Listener | None = None
    ) -> Request:
        self.prompt = prompt
        request = Request(prompt, sampling, adapter, listener)
        for id in self.tokenizer.encode(self.text, markup=True):
            request.put(id)
        request.finish(self.reason)
        self.text = self.later.pop(0) if self.later else self.text
        return request


class Api:
    """The API over a scripted engine; `says` asks it once whole and once as a stream, and finds
    both the same.
    """

    def __init__(self, loaded: Loaded, tokenizer: Tokenizer) -> None:
        self.engine = Scripted(tokenizer)
        assembly = replace(loaded.assembly, tokenizer=tokenizer)
        self.loaded = replace(loaded, assembly=assembly)
        self.client = TestClient(build_app(self.loaded, self.engine), base_url="http://localhost")

    def post(self, **body: Any) -> Any:
        return self.client.post("/v1/chat/completions", json={"messages": ASK} | body)

    def says(self, text: str, **body: Any) -> dict[str, Any]:
        self.engine.text = text
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        choice: dict[str, Any] = answer.json()["choices"][0]
        for call in choice["message"].get("tool_calls", []):
            assert call.pop("id").startswith("call_")
        assert self.streamed(**body) == choice
        return choice

    def streamed(self, **body: Any) -> dict[str, Any]:
        """The choice that a client puts together from the deltas."""
        message: dict[str, Any] = {}
        reason, calls = None, list[dict[str, Any]]()
        lines = self.post(stream=True, **body).text.split("\n\n")
        for line in lines[:-2]:
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            reason, delta = choice["finish_reason"], choice["delta"]
            for part in delta.pop("tool_calls", []):
                if part["index"] == len(calls):
                    assert part.pop("id").startswith("call_") and not part["function"]["arguments"]
                    calls.append({key: part[key] for key in ("type", "function")})
                else:
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
            for key, value in delta.items():
                message[key] = message.get(key, "") + value
        if calls:
            message |= {"tool_calls": calls, "content": message["content"] or None}
        return {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}

    def asked(self) -> str:
        """The prompt with its control tokens."""
        return "".join(map(self.loaded.tokenizer.piece, self.engine.prompt))

    def refused(self, param: str, **body: Any) -> str:
        answer = self.post(**body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == param, error
        return str(error["message"])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return open_tiny(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def api(loaded: Loaded) -> Api:
    return Api(loaded, loaded.tokenizer)


@pytest.fixture
def written_in(loaded: Loaded) -> Callable[..., Api]:
    """An API whose model was trained in another template of ours."""

    def made(name: str, **changes: Any) -> Api:
        template = replace(TEMPLATES[name], prefix="", end="<|im_end|>", **changes)
        return Api(loaded, replace(loaded.tokenizer, template=template))

    return made


def called(message: dict[str, Any]) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in message["tool_calls"]]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def test_a_call_is_a_call_and_tools_are_rendered_as_in_training(api: Api, loaded: Loaded) -> None:
    tools = [CLOCK, OTHER]
    choice = api.says(f"我看看。\n{CALL}\n{SECOND}", tools=tools)
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls" and message["content"] == "我看看。"
    assert called(message) == [("clock", {"zone": "北京"}), ("other", {})]
    row = Conversation((Message("user", "几点了？"),), tools=to_json(tools))
    assert api.engine.prompt == loaded.tokenizer.encode_chat(row)
    strict = {"type": "function", "function": {**CLOCK["function"], "strict": True}}
    api.says(CALL, tools=[strict, OTHER])
    assert api.engine.prompt == loaded.tokenizer.encode_chat(row)
    assert api.says(CALL, tools=tools)["message"]["content"] is None


def test_the_whole_loop_is_rendered_as_in_training(api: Api, loaded: Loaded) -> None:
    made = api.says(CALL, tools=[CLOCK])["message"]
    made["tool_calls"][0]["id"] = "call_1"
    result = {"role": "tool", "tool_call_id": "call_1", "content": "八点"}
    choice = api.says("现在八点。", tools=[CLOCK], messages=[*ASK, made, result])
    assert choice["message"]["content"] == "现在八点。" and choice["finish_reason"] == "stop"
    calls = (Call("clock", {"zone": "北京"}),)
    turns = (
        Message("user", "几点了？"),
        Message("assistant", "", "", calls),
        Message("tool", "八点"),
    )
    talk = Conversation(turns, tools=to_json([CLOCK]))
    assert api.engine.prompt == loaded.tokenizer.encode_chat(talk)


def test_only_the_first_call_where_calls_are_not_parallel(api: Api) -> None:
    choice = api.says(f"{CALL}\n{SECOND}", tools=[CLOCK, OTHER], parallel_tool_calls=False)
    assert called(choice["message"]) == [("clock", {"zone": "北京"})]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("body", [{}, {"tools": [CLOCK], "tool_choice": "none"}, {"tools": []}])
def test_without_tools_a_call_is_words(api: Api, body: dict[str, Any], loaded: Loaded) -> None:
    choice = api.says(f"{CALL}\n", **body)
    assert choice["message"] == {"role": "assistant", "content": f"{CALL}\n"}
    assert choice["finish_reason"] == "stop"
    assert api.engine.prompt == loaded.tokenizer.encode_chat([Message("user", "几点了？")])


def test_what_is_cut_off_is_words(api: Api) -> None:
    api.engine.reason = "length"
    try:
        choice = api.says(CALL[:-20], tools=[CLOCK])
        assert choice["message"]["content"] == CALL[:-20] and choice["finish_reason"] == "length"
        assert api.says(f"{CALL}\n{SECOND[:-20]}", tools=[CLOCK])["finish_reason"] == "length"
    finally:
        api.engine.reason = "stop"
    choice = api.says(f"嗯{CALL}", tools=[CLOCK], stop="zone")
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("choice", "begun"),
    [
        ("required", '<tool_call>\n{"name": "'),
        (
            {"type": "function", "function": {"name": "clock"}},
            '<tool_call>\n{"name": "clock", "arguments":',
        ),
    ],
)
def test_a_call_that_must_be_is_begun(api: Api, choice: Any, begun: str) -> None:
    tools = [CLOCK, OTHER]
    said = api.says(CALL.removeprefix(begun), tools=tools, tool_choice=choice)
    assert api.asked().endswith(f"<|im_start|>assistant\n{begun}")
    assert called(said["message"]) == [("clock", {"zone": "北京"})]
    assert api.says("…", tools=tools, tool_choice=choice)["message"]["content"] == f"{begun}…"


def test_a_choice_that_cannot_be_is_refused(api: Api, written_in: Callable[..., Api]) -> None:
    named = {"type": "function", "function": {"name": "gone"}}
    assert "gone" in api.refused("tool_choice", tools=[CLOCK], tool_choice=named)
    for tools in ({}, {"tools": []}):
        api.refused("tool_choice", tool_choice="required", **tools)
        api.refused("tool_choice", tool_choice=named, **tools)
    api.refused("tool_choice", tools=[CLOCK], tool_choice="sometimes")
    custom = {"type": "custom", "custom": {"name": "clock"}}
    for field, body in (
        ("tools.0.type", {"tools": [custom]}),
        ("tool_choice.type", {"tools": [CLOCK], "tool_choice": custom}),
    ):
        said = api.refused(field, **body)
        assert "'custom'" in said and "Tool" not in said
    assert "clock, other" in written_in("glm4").refused(
        "tool_choice", tools=[CLOCK, OTHER], tool_choice="required"
    )
    said = written_in("glm4").says('{"zone": "a"}', tools=[CLOCK], tool_choice="required")
    assert called(said["message"]) == [("clock", {"zone": "a"})]


@pytest.mark.parametrize("made_up", ["", "\nObservation: 九点\nThought: 好\nFinal Answer: 九点"])
def test_a_react_answer_ends_before_a_result_of_its_own(
    written_in: Callable[..., Api], made_up: str
) -> None:
    """The format's own stop string, where tools are offered, beside those of the request."""
    api = written_in("chatml", tools="react")
    call = 'Thought: 我看看。\nAction: clock\nAction Input: {"zone": "北京"}'
    said = api.says(call + made_up, tools=[CLOCK])
    assert said["finish_reason"] == "tool_calls"
    assert called(said["message"]) == [("clock", {"zone": "北京"})]
    assert said["message"]["content"] == "Thought: 我看看。"
    assert (
        api.says("一\n二\nObservation: 三", tools=[CLOCK], stop=["二"])["message"]["content"]
        == "一\n"
    )
    assert api.says(call + made_up)["message"]["content"] == call + made_up


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": {"name": ""}}],
        [{"type": "function", "function": {"name": "a\nb"}}],
        [{"type": "function", "function": {"name": "a" * 65}}],
        [{"type": "function", "function": {"name": "a", "parameters": "x"}}],
        [{"type": "function"}],
        [5],
        "clock",
    ],
)
def test_what_is_no_list_of_tools_is_refused(api: Api, tools: Any) -> None:
    answer = api.post(tools=tools)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("tools")


def test_a_template_without_a_place_for_tools_is_named(written_in: Callable[..., Api]) -> None:
    assert "chatglm2" in written_in("chatglm2").refused("tools", tools=[CLOCK])


STRANGE: list[Any] = [
    {"properties": 5},
    {"properties": {"zone": {"type": 7, "items": True, "enum": 5}}, "required": True},
    {"properties": {"zone": {"items": [{}], "$ref": "#/properties/zone"}, "a": True}},
    {"a": "\ud83d"},
    {},
]


@pytest.mark.parametrize("style", TOOL_STYLES)
def test_strange_schemas_and_half_characters_are_answered(
    written_in: Callable[..., Api], style: str
) -> None:
    api = written_in("chatml", tools=style)
    for schema in STRANGE:
        tool = {"type": "function", "function": {"name": "clock", "parameters": schema}}
        (parts,) = formats.called(style, [], "", (Call("clock", {"zone": "5"}),))
        api.engine.text = "".join(part for part, _ in parts)
        answer = api.client.post(
            "/v1/chat/completions",
            content=json.dumps({"messages": ASK, "tools": [tool]}),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 200, answer.text
        assert called(answer.json()["choices"][0]["message"]) == [("clock", {"zone": "5"})]


def nested(depth: int) -> dict[str, Any]:
    return {"properties": {"a": nested(depth - 1)}} if depth else {}


def test_what_is_nested_too_deep_is_refused(api: Api) -> None:
    function = {"name": "clock", "parameters": nested(200)}
    said = api.refused("tools.0", tools=[{"type": "function", "function": function}])
    assert "deeper than 100" in said
    for arguments in ("[" * 20000, '{"a":' * 400 + "1" + "}" * 400):
        call = {"function": {"name": "clock", "arguments": arguments}}
        asked = [*ASK, {"role": "assistant", "tool_calls": [call]}]
        assert "tool_calls" in api.refused("messages", messages=asked)
    call = {"function": {"name": "clock", "arguments": nested(200)}}
    asked = [*ASK, {"role": "assistant", "tool_calls": [call]}]
    assert "deeper than 100" in api.refused("messages.1", messages=asked)


@pytest.mark.parametrize(
    ("place", "body"),
    [
        ("messages.0.prefix", {"messages": [{**ASK[0], "prefix": True}]}),
        ("messages", {"messages": [{**ASK[0], "reasoning": "嗯"}]}),
        ("messages", {"messages": [{**ASK[0], "tool_calls": [{"function": {"name": "a"}}]}]}),
        ("tools.0.defer_loading", {"tools": [{**CLOCK, "defer_loading": True}]}),
        (
            "response_format.schema",
            {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        ),
        ("response_format", {"response_format": {"type": "json_object"}, "tools": [CLOCK]}),
        ("response_format", {"response_format": {"type": "json_object"}, "enable_thinking": True}),
    ],
)
def test_fields_inside_that_would_change_the_answer_are_refused(
    written_in: Callable[..., Api], place: str, body: dict[str, Any]
) -> None:
    assert written_in("qwen3").refused(place, **body).startswith(f"{place}:")


def test_fields_inside_that_change_nothing_pass(api: Api, loaded: Loaded) -> None:
    said = {
        "role": "assistant",
        "content": "好",
        "refusal": None,
        "parsed": {"a": 1},
        "audio": None,
    }
    api.says("好", messages=[{**ASK[0], "name": "李"}, said, *ASK])
    turns = (Message("user", "几点了？"), Message("assistant", "好"), Message("user", "几点了？"))
    assert api.engine.prompt == loaded.tokenizer.encode_chat(turns)


def test_reasoning_goes_by_both_of_its_names(written_in: Callable[..., Api]) -> None:
    prompts, api = [], written_in("qwen3", thinking="keep")
    for name in ("reasoning_content", "reasoning"):
        made = {"role": "assistant", "content": None, "tool_calls": [], name: "先看表"}
        made["tool_calls"] = [{"function": {"name": "clock", "arguments": "{}"}}]
        api.says("好", messages=[*ASK, made, {"role": "tool", "content": "八点"}])
        prompts.append(api.asked())
    assert prompts[0] == prompts[1] and "先看表" in api.loaded.tokenizer.decode(api.engine.prompt)


def test_a_json_answer_is_no_call_where_no_tool_may_be_called(
    written_in: Callable[..., Api],
) -> None:
    pytest.importorskip("llguidance")
    text = '{"name": "clock", "parameters": {}}'
    form = {"response_format": {"type": "json_object"}, "tools": [CLOCK], "tool_choice": "none"}
    said = written_in("chatml", tools="llama3").says(text, **form)
    assert said["message"]["content"] == text


def test_a_schema_that_no_call_can_follow_is_the_tools_fault(api: Api) -> None:
    pytest.importorskip("llguidance")
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}
    tool = {"type": "function", "function": {"name": "clock", "parameters": bad}}
    assert "schema" in api.refused("tools", tools=[tool, OTHER], tool_choice="required")


def test_a_refusal_while_streaming_is_an_event(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("serve.empty")

    monkeypatch.setattr(api.engine, "submit", refuse)
    events = api.post(stream=True).text.split("\n\n")
    error = json.loads(events[-3].removeprefix("data: "))["error"]
    assert error["type"] == "invalid_request_error" and events[-2] == "data: [DONE]"


def test_a_mark_of_calls_is_read_and_shown_only_where_tools_are_offered(tmp_path: Path) -> None:
    marks = ["<|action_end|>", "<|action_start|>", "<|plugin|>"]
    tokenizer = with_specials(tmp_path, marks, "internlm2")
    assert sorted(call_tokens(tokenizer).values()) == marks
    text = '好<|action_start|><|plugin|>\n{"name": "clock", "parameters": {}}<|action_end|>'
    for calls, shown in ((True, text), (False, '好\n{"name": "clock", "parameters": {}}')):
        stream = tokenizer.stream(reply=True, calls=calls)
        ids = tokenizer.encode(text, markup=True)
        assert "".join(map(stream.push, ids)) + stream.end() == shown
    half = tokenizer.encode("好")[:2]
    stream = tokenizer.stream(calls=True)
    ids = [*half, tokenizer.vocabulary.control["<|plugin|>"]]
    assert "".join(map(stream.push, ids)) == "\ufffd<|plugin|>"


@pytest.mark.parametrize(
    "body",
    [
        {"model": "\ud800"},
        {"\ud800": 1},
        {"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]},
        {"tools": [CLOCK], "tool_choice": {"type": "\ud800"}},
        {"tools": [{"type": "\ud800"}]},
    ],
)
def test_half_characters_in_a_refusal_are_replaced(api: Api, body: dict[str, Any]) -> None:
    text = json.dumps({"messages": ASK} | body)
    headers = {"Content-Type": "application/json"}
    answer = api.client.post("/v1/chat/completions", content=text, headers=headers)
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"]


def with_specials(directory: Path, names: list[str], template: str) -> Tokenizer:
    """A tokenizer of bytes and these special tokens."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", *names])
    whole = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>")
    whole.save_pretrained(directory)
    return load_tokenizer(directory, template=template)


LISTED = """
{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif -%}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.tool_calls -%}
%s{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.mark.parametrize(
    ("written", "style"),
    [
        ("[{% for c in message.tool_calls %}{{ c.function | tojson }}{% endfor %}]", "llama3"),
        (
            "<tool_call>{% for c in message.tool_calls %}{{ c.function | tojson }}{% endfor %}"
            "</tool_call>",
            "qwen",
        ),
        ("call {% for c in message.tool_calls %}{{ c.function | tojson }}{% endfor %}", ""),
    ],
)
def test_a_models_own_template_is_read_by_the_format_that_reads_it_back(
    api: Api, written: str, style: str
) -> None:
    native = replace(TEMPLATES["chatml"], name="native", jinja=LISTED.replace("%s", written))
    tokenizer = replace(api.loaded.tokenizer, template=native)
    other = Api(api.loaded, tokenizer)
    if style:
        assert tool_style(tokenizer) == style
        call = '[{"name": "clock", "arguments": {"zone": "a"}}]'
        text = call if style == "llama3" else f"<tool_call>{call}</tool_call>"
        message = other.says(text, tools=[CLOCK])["message"]
        assert called(message) == [("clock", {"zone": "a"})]
    else:
        other.refused("tools", tools=[CLOCK])


@pytest.mark.parametrize("name", ["chatglm3", "glm4", "internlm2", "qwen25", "yi", "baichuan2"])
def test_families_own_vocabularies_bring_calls_back(name: str, shared: Path) -> None:
    found = sorted(shared.glob(f"golden/**/{name}/**/tokenizer_config.json"))
    if not found:
        pytest.skip(f"no tokenizer of {name}")
    calls = (Call("clock", {"zone": '北京 "x"\n'}), Call("other", {"n": [1, 2.5, None]}))
    tools: Tools = [CLOCK["function"], OTHER["function"]]  # type: ignore[list-item]
    for file in found:
        tokenizer = load_tokenizer(file.parent)
        for words in ("", "好的。"):
            turns = (Message("user", "几点？"), Message("assistant", words, "", calls))
            prompt = tokenizer.encode_chat(Conversation(turns[:1], tools=to_json(tools)))
            ids = tokenizer.encode_chat(Conversation(turns, tools=to_json(tools)), open_turn=False)
            assert ids[: len(prompt)] == prompt
            end = next(
                i for i, id in enumerate(ids) if i >= len(prompt) and id in tokenizer.stop_ids
            )
            stream = tokenizer.stream(reply=True, calls=True)
            text = "".join(map(stream.push, ids[len(prompt) : end])) + stream.end()
            assert parse(tool_style(tokenizer), text, tools) == (words, calls)


# --- Thinking
def test_thoughts_come_apart(api: Api, written_in: Callable[..., Api]) -> None:
    text = "<think>\n想一想。\n\n再想。\n</think>\n\n你好。"
    told = {"role": "assistant", "content": "你好。", "reasoning_content": "想一想。\n\n再想。"}
    assert api.says(text)["message"] == told
    assert api.says(f" {text}\n{CALL}", tools=[CLOCK])["message"]["content"] == "你好。"
    endless = api.says("<think>\n没完")["message"]
    assert endless == {"role": "assistant", "content": "", "reasoning_content": "没完"}
    opened = written_in("qwen3.5", thinking="keep")  # the prompt opens the block
    assert opened.says(text.removeprefix("<think>\n"))["message"] == told
    assert opened.asked().endswith("<think>\n")


@pytest.mark.parametrize(
    ("field", "thinks"),
    [
        ({}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"enable_thinking": True}, True),
        ({"thinking": {"type": "enabled"}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {}}, False),
    ],
)
def test_a_request_says_whether_to_think(
    written_in: Callable[..., Api], field: dict[str, Any], thinks: bool
) -> None:
    block = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for usual in ("off", "keep"):
        api = written_in("qwen3", thinking=usual)
        api.says("好", **field)
        asked = thinks if any(field.values()) else usual == "keep"
        assert api.asked().endswith("assistant\n" if asked else block)
    api.says("{}", tools=[CLOCK], tool_choice="required", **field)
    assert api.asked().endswith(f'{block}<tool_call>\n{{"name": "clock", "arguments":')


def test_an_answer_in_a_format_has_no_thoughts(written_in: Callable[..., Api]) -> None:
    """The mask would hold for them too."""
    pytest.importorskip("llguidance")
    api = written_in("qwen3", thinking="keep")
    api.says("{}", response_format={"type": "json_object"})
    assert api.asked().endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "field",
    [
        {"chat_template_kwargs": {"enable_thinking": True, "other": 1}},
        {"chat_template_kwargs": {"enable_thinking": "yes"}},
        {"enable_thinking": True, "reasoning_effort": "none"},
        {"enable_thinking": True, "thinking": False},
        {"reasoning_effort": "high"},
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
    ],
)
def test_what_cannot_be_asked_is_refused(
    written_in: Callable[..., Api], field: dict[str, Any]
) -> None:
    answer = written_in("qwen3", thinking="off").post(**field)
    assert answer.status_code == 400 and answer.json()["error"]["param"] in field


PARTS = [
    "<think>",
    "</think>",
    "\n",
    "\n\n",
    "想",
    "a",
    " ",
    "<thi",
    "</",
    CALL,
    "<tool_call>",
    "好",
]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=8), cuts=st.randoms())
@settings(max_examples=300, deadline=None)
def test_cut_anywhere_a_reply_is_the_same(parts: list[str], cuts: Any) -> None:
    text = "".join(parts)
    tools: Tools = [CLOCK["function"]]  # type: ignore[list-item]
    reply, at, deltas = Reply("qwen", tools), 0, list[dict[str, Any]]()
    while at < len(text):
        step = cuts.choice((1, 1, 2, 5, 30))
        deltas += reply.push(text[at : at + step])
        at += step
    deltas += reply.push("", last=True)
    whole = Reply("qwen", tools)
    whole.push(text, last=True)
    told, expected = reply.message(), whole.message()
    for call in [*told.get("tool_calls", []), *expected.get("tool_calls", [])]:
        call.pop("id")
    assert told == expected
    for key in ("content", "reasoning_content"):
        assert "".join(delta.get(key, "") for delta in deltas) == (told.get(key) or "")
    if not reply.calls and "</think>" in text:  # the same as a file's answers are read
        assert (reply.reasoning, reply.content) == block_of(text)


def test_openais_own_client_calls_and_streams(loaded: Loaded) -> None:
    openai = pytest.importorskip("openai")
    api = Api(loaded, loaded.tokenizer)
    client = openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=api.client)
    api.engine.text = f"我看看。\n{CALL}\n{SECOND}"
    request = {"model": "demo", "messages": ASK, "tools": [CLOCK, OTHER]}
    whole = client.chat.completions.create(**request).choices[0]
    assert [call.function.name for call in whole.message.tool_calls] == ["clock", "other"]
    with client.chat.completions.stream(**request) as stream:
        last = stream.get_final_completion().choices[0]
    assert last.finish_reason == whole.finish_reason == "tool_calls"
    assert last.message.content == whole.message.content == "我看看。"
    assert [call.function.arguments for call in last.message.tool_calls] == [
        call.function.arguments for call in whole.message.tool_calls
    ]


@pytest.mark.parametrize("page", ["docs/cookbook.md", "docs/cookbook.en.md"])
def test_the_cookbooks_loop_runs(
    page: str, api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    openai = pytest.importorskip("openai")
    real = openai.OpenAI
    local = {"base_url": "http://localhost/v1", "http_client": api.client}
    monkeypatch.setattr(openai, "OpenAI", lambda **given: real(**given | local))
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = (block for block in blocks if "tools=" in block)
    api.engine.text = CALL.replace("zone", "city")
    api.engine.later = ["现在八点半。"]
    exec(block.replace('"my"', '"demo"'), {})
    assert capsys.readouterr().out == "现在八点半。\n"
    assert "北京 20:30" in api.loaded.tokenizer.decode(api.engine.prompt)
