"""The API's fields one by one: several choices, log-probabilities, plain completions, shortening,
metrics, the reader's language, answers in JSON.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_serve_api import HELLO, KEY, Server, serving

from cllm.assembly import Loaded, open_model
from cllm.data.message import Message
from cllm.serve import grammar

GREEDY = {"temperature": 0, "max_tokens": 24}
DRAWN = {"temperature": 1.2, "max_tokens": 24, "seed": 5}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return open_model("tiny-zh", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Server]:
    yield from serving(loaded)


def post(server: Server, path: str, **body: Any) -> tuple[int, Any]:
    status, _, text = server.call("POST", path, body)
    return status, json.loads(text)


def chat(server: Server, **body: Any) -> Any:
    status, answer = post(server, "/v1/chat/completions", **({"messages": HELLO} | body))
    assert status == 200, answer
    return answer


def text(server: Server, **body: Any) -> Any:
    status, answer = post(server, "/v1/completions", **body)
    assert status == 200, answer
    return answer


def refused(server: Server, path: str = "/v1/chat/completions", **body: Any) -> Any:
    body = body if "prompt" in body else {"messages": HELLO} | body
    status, answer = post(server, path, **body)
    assert status == 400, answer
    return answer["error"]


def events(server: Server, path: str, **body: Any) -> list[Any]:
    """The chunks of a stream."""
    status, _, sent = server.call("POST", path, body | {"stream": True})
    lines = [line.removeprefix("data: ") for line in sent.split("\n") if line]
    assert status == 200 and lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# --- Several choices
def test_n_choices_are_n_requests_whose_seeds_count_up(server: Server) -> None:
    several = chat(server, **DRAWN, n=4)
    single = [chat(server, **DRAWN | {"seed": 5 + i}) for i in range(4)]
    assert several["choices"] == [
        choice | {"index": i} for i, one in enumerate(single) for choice in one["choices"]
    ]
    assert len({choice["message"]["content"] for choice in several["choices"]}) > 1
    usage = [one["usage"] for one in single]
    assert several["usage"]["prompt_tokens"] == usage[0]["prompt_tokens"]
    tokens = sum(one["completion_tokens"] for one in usage)
    assert several["usage"]["completion_tokens"] == tokens
    assert several["usage"]["total_tokens"] == tokens + usage[0]["prompt_tokens"]


def test_streamed_choices_are_interleaved_and_equal_whole_ones(server: Server) -> None:
    whole = chat(server, **DRAWN, n=3, logprobs=True)
    usage = {"include_usage": True}
    body = DRAWN | {"messages": HELLO, "n": 3, "logprobs": True, "stream_options": usage}
    *chunks, last = events(server, "/v1/chat/completions", **body)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert set(order[3:9]) == {0, 1, 2}, "one after the other"
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"]["role"] == "assistant"
        said = "".join(part["delta"].get("content", "") for part in own)
        assert said == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        told = [entry for part in own for entry in (part["logprobs"] or {}).get("content", ())]
        assert told == choice["logprobs"]["content"]


# --- Log-probabilities
def test_logprobs_equal_a_forward_of_transformers(server: Server, loaded: Loaded) -> None:
    choice = chat(server, **DRAWN, logprobs=True, top_logprobs=20)["choices"][0]
    content = choice["logprobs"]["content"]
    prompt = loaded.tokenizer.encode_chat([Message("user", "你好")])
    ids = loaded.tokenizer.encode(choice["message"]["content"])
    spelled = b"".join(bytes(entry["bytes"]) for entry in content)
    assert spelled.decode("utf-8", "replace") == choice["message"]["content"]
    if len(ids) != len(content):
        pytest.skip("the answer is not the tokenizer's own spelling")
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt + ids])).logits[0].float()
    expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    for entry, id, values in zip(content, ids, expected, strict=True):
        assert abs(entry["logprob"] - values[id].item()) < 1e-4
        told = [other["logprob"] for other in entry["top_logprobs"]]
        assert torch.allclose(torch.tensor(told), values.topk(20).values, atol=1e-4)


def test_logprobs_stop_where_the_text_stops(server: Server) -> None:
    """Tokens of a stop string are not told; half characters are told with the whole one."""
    content = chat(server, **GREEDY)["choices"][0]["message"]["content"]
    for start in range(1, len(content) - 1):
        stop = content[start : start + 2]
        choice = chat(server, **GREEDY, stop=stop, logprobs=True)["choices"][0]
        said = choice["message"]["content"]
        entries = (choice["logprobs"] or {"content": []})["content"]
        spelled = b"".join(bytes(entry["bytes"]) for entry in entries).decode("utf-8", "replace")
        assert said == content[: content.index(stop)]
        # the token in which the stop string begins may begin with the answer's last words
        assert spelled.startswith(said) and len(spelled) - len(said) < 8
    assert chat(server, **GREEDY)["choices"][0]["logprobs"] is None


# --- Plain completions
def test_a_text_goes_on_without_a_template(server: Server, loaded: Loaded) -> None:
    ids = loaded.tokenizer.encode("今天天气")
    whole = text(server, prompt="今天天气", **GREEDY)
    with torch.no_grad():
        expected = loaded.model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()
    assert whole["object"] == "text_completion"
    assert whole["choices"][0]["text"] == loaded.tokenizer.decode(expected)
    assert whole["usage"]["prompt_tokens"] == len(ids)
    assert text(server, prompt=ids, **GREEDY)["choices"] == whole["choices"]
    assert len(text(server, prompt="今天天气")["choices"][0]["text"]) > 0  # 16 tokens, as OpenAI's
    assert text(server, prompt="今天天气")["usage"]["completion_tokens"] <= 16


def test_many_prompts_have_their_own_choices(server: Server) -> None:
    prompts = ["今天天气", "从前有", "1+1="]
    several = text(server, prompt=prompts, **DRAWN, n=2)
    assert [choice["index"] for choice in several["choices"]] == list(range(6))
    for index, choice in enumerate(several["choices"]):
        alone = text(server, prompt=prompts[index // 2], **DRAWN | {"seed": 5 + index})
        assert alone["choices"][0]["text"] == choice["text"]
    parts = [""] * 6
    for chunk in events(server, "/v1/completions", prompt=prompts, **DRAWN, n=2):
        for choice in chunk["choices"]:
            parts[choice["index"]] += choice["text"]
    assert parts == [choice["text"] for choice in several["choices"]]
    prompt_tokens = [text(server, prompt=p)["usage"]["prompt_tokens"] for p in prompts]
    assert several["usage"]["prompt_tokens"] == sum(prompt_tokens)


def test_the_old_shape_of_logprobs(server: Server) -> None:
    choice = text(server, prompt="今天天气", **GREEDY, logprobs=2)["choices"][0]
    told = choice["logprobs"]
    assert len({len(values) for values in told.values()}) == 1
    assert told["text_offset"][0] == 0 and told["text_offset"] == sorted(told["text_offset"])
    for token, value, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert top[token] == value == max(top.values()), "greedy"
        assert len(top) in (2, 3)
    assert "".join(told["tokens"]) == choice["text"] or "bytes:" in "".join(told["tokens"])


def test_what_is_no_prompt_is_named(server: Server, loaded: Loaded) -> None:
    size = loaded.tokenizer.vocab_size
    for prompt in (
        [size],
        [[1, 2], [size]],
        [-1],
        [],
        [[]],
        [""][:0],
        {},
        None,
        [1, "a"],
        "字" * 900,
    ):
        assert refused(server, "/v1/completions", prompt=prompt)["param"].startswith("prompt")
    for field in ({"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"messages": HELLO}):
        error = refused(server, "/v1/completions", prompt="你", **field)
        assert error["param"] == next(iter(field))
    assert text(server, prompt="\ud800", **GREEDY)


# --- Shortening
def test_the_oldest_rounds_are_left_out_on_request(server: Server) -> None:
    turn = [{"role": "user", "content": "问" * 60}, {"role": "assistant", "content": "答" * 60}]
    messages = [*turn * 12, {"role": "user", "content": "你好"}]
    for same in ({}, {"truncation": "disabled"}):
        error = refused(server, messages=messages, **same)
        assert error["param"] == "messages" and error["code"] == "context_length_exceeded"
    usage = chat(server, messages=messages, truncation="auto", **GREEDY)["usage"]
    kept = 12 - usage["left_out_rounds"]
    assert 0 < kept < 12
    short = [*turn * kept, messages[-1]]
    assert (
        chat(server, messages=short, **GREEDY)["usage"]["prompt_tokens"] == usage["prompt_tokens"]
    )
    assert "left_out_rounds" not in chat(server, truncation="auto", **GREEDY)["usage"]
    assert refused(server, messages=[{"role": "user", "content": "字" * 900}], truncation="auto")


# --- What others read
def test_models_say_how_long_a_conversation_may_be(server: Server) -> None:
    limit = server.engine.max_tokens
    for path in ("/v1/models", "/v1/models/base"):
        answer = json.loads(server.call("GET", path)[2])
        assert answer.get("data", [answer])[0]["max_model_len"] == limit


def test_errors_are_in_the_readers_language(server: Server) -> None:
    body = {"messages": HELLO, "model": "gpt-4"}
    for languages, chinese in (
        ("zh-CN,zh;q=0.9,en;q=0.8", True),
        ("de, zh", True),
        ("en-US,en;q=0.5", False),
        ("fr", False),
        ("", False),
        ("\xff,,;=", False),
    ):
        headers = {"Accept-Language": languages}
        _, _, sent = server.call("POST", "/v1/chat/completions", body, headers)
        error = json.loads(sent)["error"]
        assert ("没有" in error["message"]) == chinese and error["param"] == "model", languages
    zh = {"Accept-Language": "zh", "Host": "evil.example"}
    assert "主机" in json.loads(server.call("GET", "/v1/models", headers=zh)[2])["error"]["message"]


def test_every_refusal_is_in_the_readers_language(server: Server) -> None:
    user, zh = {"role": "user"}, {"Accept-Language": "zh"}
    for body in (
        {},
        {"messages": [{**user, "content": 5}]},
        {"messages": [{**user, "prefix": True}]},
        {"messages": HELLO, "temperature": 3},
        {"messages": HELLO, "n": 0, "max_tokens": "a", "stream": 1, "top_p": "b"},
        {"messages": [], "stop": ["", "a" * 300], "truncation": "x", "logit_bias": {"a": 1}},
    ):
        _, _, sent = server.call("POST", "/v1/chat/completions", body, zh)
        parts = json.loads(sent)["error"]["message"].split("; ")
        assert all(re.search("[\u4e00-\u9fff]", part) for part in parts), parts
    for method, path in (("GET", "/v1/nothing"), ("DELETE", "/v1/models")):
        said = json.loads(server.call(method, path, headers=zh)[2])["error"]["message"]
        assert re.search("[\u4e00-\u9fff]", said)


def read_metrics(text: str) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    }


def test_metrics_count_what_was_asked(server: Server) -> None:
    before = read_metrics(server.call("GET", "/metrics")[2])
    usage = chat(server, **GREEDY, n=2)["usage"]
    status, headers, sent = server.call("GET", "/metrics")
    after = read_metrics(sent)
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    rose = {name: after[name] - before[name] for name in after}
    assert rose["cllm_requests_total"] == rose["cllm_first_token_seconds_count"] == 2
    assert rose["cllm_prompt_tokens_total"] == 2 * usage["prompt_tokens"]
    assert rose["cllm_generated_tokens_total"] == usage["completion_tokens"]
    assert after["cllm_kv_tokens_limit"] == server.engine.kv_tokens
    assert after["cllm_requests_running"] == after["cllm_requests_waiting"] == 0


def test_prometheus_reads_the_metrics(server: Server) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    chat(server, **GREEDY)
    families = list(parser.text_string_to_metric_families(server.call("GET", "/metrics")[2]))
    kinds = {family.name: family.type for family in families}
    assert kinds["cllm_requests"] == "counter" and kinds["cllm_kv_tokens_used"] == "gauge"
    assert kinds["cllm_first_token_seconds"] == "histogram"
    buckets = [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name.endswith("_bucket")
    ]
    assert buckets == sorted(buckets) and buckets[-1] >= 1


def test_metrics_need_the_key(loaded: Loaded) -> None:
    engine = loaded.engine()
    server = Server(loaded, engine, KEY)
    try:
        assert server.call("GET", "/metrics")[0] == 401
        headers = {"Authorization": f"Bearer {KEY}"}
        assert server.call("GET", "/metrics", headers=headers)[0] == 200
    finally:
        server.close()


# --- JSON
SCHEMA = {
    "type": "object",
    "properties": {"城市": {"type": "string", "maxLength": 6}, "气温": {"type": "integer"}},
    "required": ["城市", "气温"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}


def test_without_the_library_json_is_refused_with_its_name(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = loaded.engine()
    server = Server(loaded, engine)
    try:
        for wanted in ({"type": "json_object"}, JSON):
            error = refused(server, response_format=wanted)
            assert grammar.INSTALL in error["message"] and error["param"] == "response_format"
    finally:
        server.close()
        engine.close()


def test_the_openai_client_reads_all_of_it(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="base",
        messages=HELLO,
        max_tokens=8,
        n=2,
        logprobs=True,
        top_logprobs=3,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={"5": 1},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    entry = answer.choices[0].logprobs.content[0]
    assert len(entry.top_logprobs) == 3 and math.exp(entry.logprob) <= 1
    plain = client.completions.create(model="base", prompt=["你", "我"], max_tokens=4, logprobs=1)
    assert len(plain.choices) == 2 and len(plain.choices[0].logprobs.tokens) == 4
    parts = [""] * 2
    for chunk in client.completions.create(
        model="base", prompt=["你", "我"], max_tokens=4, stream=True
    ):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert all(parts)
