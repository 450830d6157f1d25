"""Tools through the API: a short training on Chinese tool calls, then OpenAI's own client asks
held-out questions whose reference is a call, of the trained model and of its base.

    python tools/fetch_model.py gemma3-270m
    python bench/tools.py [--model models/gemma-3-270m-q4_k_m.gguf] [--template gemma]
        [--data ../shared/data/dev/chat/glaive_toolcall_zh.json] [--questions 50] [--rows 64]
        [--tokens 460] [--streams 5] [--run runs/tools] [--out bench/results/tools.json]

Needs `pip install openai`. A run that is there already is not trained again. The rows are those of
at most `--tokens` tokens that share no question with the held-out ones, those with calls first. An
answer tries to call if it holds a call that was read, or its opening.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cllm.__main__ import run  # noqa: E402
from cllm.config import DataConfig  # noqa: E402
from cllm.data.reader import write_conversations  # noqa: E402
from cllm.data.schema import Conversation  # noqa: E402
from cllm.data.sources import read_file  # noqa: E402
from cllm.data.tools import opened, read_tools  # noqa: E402
from cllm.model.source import resolve  # noqa: E402
from cllm.model.tokenizer import load_tokenizer  # noqa: E402

LONGEST = 120  # tokens of an answer
SETTINGS = (
    "model.precision=bf16 lora.rank=8 lora.alpha=16 data.eval= data.held_out=0 "
    "train.row_tokens=512 train.tokens_per_step=512 train.epochs=1 train.learning_rate=1e-3 "
    "train.warmup=0.1 eval.samples=0 eval.every=1000"
).split()


def asked(conversation: Conversation) -> dict[str, Any]:
    """The request whose reference is the conversation's first call, and that call."""
    messages = conversation.messages
    at = next(i for i, message in enumerate(messages) if message.calls)
    tools = [{"type": "function", "function": tool} for tool in read_tools(conversation.tools)]
    request = {"messages": [m.row() for m in messages[:at]], "tools": tools}
    return {"request": request, "reference": messages[at].calls[0]}


def split(options: argparse.Namespace) -> tuple[list[Conversation], list[dict[str, Any]]]:
    """(rows to train on, held-out questions)."""
    tokenizer = load_tokenizer(resolve(str(options.model)), template=options.template)
    rows, _ = read_file(DataConfig(), str(options.data), {})
    random.Random(0).shuffle(rows)
    fits = [
        row
        for row in rows
        if len(tokenizer.encode_segments(tokenizer.segments(row))[0]) <= options.tokens
    ]
    with_calls = [row for row in fits if any(message.calls for message in row)]
    held = with_calls[: options.questions]
    known = {m.content for row in held for m in row if m.role == "user"}
    left = [row for row in fits if not known & {m.content for m in row if m.role == "user"}]
    left.sort(key=lambda row: not any(message.calls for message in row))
    return left[: options.rows], [asked(row) for row in held]


def serve(home: Path) -> tuple[Any, Any]:
    """(a client of a server on this run, the server)."""
    import openai
    import uvicorn

    from cllm.assembly import open_model
    from cllm.serve.api import build_app

    loaded = open_model(home, device="cpu")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = build_app(loaded, loaded.engine())
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{port}/v1"
    return openai.OpenAI(base_url=url, api_key="none", timeout=900), server


def answered(client: Any, model: str, questions: list[dict[str, Any]]) -> list[Any]:
    """The choice of each question, greedy, some at once."""

    def ask(question: dict[str, Any]) -> Any:
        request = {"model": model, "temperature": 0, "max_tokens": LONGEST} | question["request"]
        return client.chat.completions.create(**request).choices[0]

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, questions))


def counted(choices: list[Any], questions: list[dict[str, Any]], opening: str) -> dict[str, Any]:
    """How many answers call, how many try to, how many call what the reference calls."""
    read = tried = same_name = same_call = 0
    for choice, question in zip(choices, questions, strict=True):
        calls, reference = choice.message.tool_calls or [], question["reference"]
        offered = {tool["function"]["name"] for tool in question["request"]["tools"]}
        assert all(call.function.name in offered for call in calls)
        tried += bool(calls) or opening in (choice.message.content or "")
        read += bool(calls)
        if calls and calls[0].function.name == reference.name:
            same_name += 1
            same_call += json.loads(calls[0].function.arguments) == reference.arguments
    return {
        "questions": len(choices),
        "answers_that_try_to_call": tried,
        "answers_with_a_call_read": read,
        "read_of_tried": read / tried if tried else None,
        "the_references_tool": same_name,
        "the_references_arguments_too": same_call,
        "finish_reasons": {
            reason: sum(choice.finish_reason == reason for choice in choices)
            for reason in sorted({choice.finish_reason for choice in choices})
        },
    }


def streamed(client: Any, model: str, question: dict[str, Any]) -> tuple[Any, ...]:
    """(content, [(name, arguments)], reason) put together from a stream's deltas."""
    request = {"model": model, "temperature": 0, "max_tokens": LONGEST} | question["request"]
    content, calls, reason = "", dict[int, list[str]](), ""
    for chunk in client.chat.completions.create(stream=True, **request):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for part in delta.tool_calls or []:
            call = calls.setdefault(part.index, ["", ""])
            call[0] += part.function.name or ""
            call[1] += part.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    return content, [tuple(calls[i]) for i in sorted(calls)], reason


def whole(choice: Any) -> tuple[Any, ...]:
    message = choice.message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    return message.content or "", calls, choice.finish_reason


CLOCK = {
    "type": "function",
    "function": {
        "name": "get_local_time",
        "description": "查询一个城市的当地时间",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "城市名称"}},
            "required": ["city"],
        },
    },
}


def loop(client: Any, model: str) -> list[dict[str, Any]]:
    """user -> call -> the tool's result -> answer, in words of our own."""
    messages = [{"role": "user", "content": "你好，请告诉我东京现在的当地时间。"}]
    request = {"model": model, "tools": [CLOCK], "temperature": 0, "max_tokens": 120}
    for _ in range(2):
        message = client.chat.completions.create(messages=messages, **request).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        result = '{"city": "东京", "time": "晚上8:30"}'
        called = message.tool_calls[0].id
        messages.append({"role": "tool", "tool_call_id": called, "content": result})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser()
    model = ROOT / "models/gemma-3-270m-q4_k_m.gguf"
    data = ROOT.parent / "shared/data/dev/chat/glaive_toolcall_zh.json"
    parser.add_argument("--model", type=Path, default=model)
    parser.add_argument("--template", default="gemma")
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=460)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/tools")
    parser.add_argument("--streams", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/tools.json")
    options = parser.parse_args()
    start = time.perf_counter()
    rows, questions = split(options)
    home = options.run
    if not (home / "adapter").is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        write_conversations(rows, f"{home}.jsonl")
        named = [f"model.path={options.model}", f"model.template={options.template}"]
        paths = [f"data.train={home}.jsonl", f"run.dir={home}"]
        assert run("train", ["cllm.toml", *named, *paths, *SETTINGS]) == 0
    lines = (home / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [step for step in map(json.loads, lines) if "lr" in step]
    client, server = serve(home)
    trained, base = (entry.id for entry in client.models.list())
    tokenizer = load_tokenizer(home / "adapter")
    opening = "".join(text for text, _ in opened(tokenizer.template.tools)).split("\n")[0]
    report: dict[str, Any] = {
        "command": " ".join(["python bench/tools.py", *sys.argv[1:]]),
        "rows": len(rows),
        "rows_with_calls": sum(any(message.calls for message in row) for row in rows),
        "tokens_trained": sum(step["tokens"] for step in steps),
        "training_seconds": round(steps[-1]["seconds"], 1),
        "loss_of_first_and_last_step": [steps[0]["loss"], steps[-1]["loss"]],
    }
    answers = {}
    for name in (trained, base):
        answers[name] = answered(client, name, questions)
        report["base" if name == base else "trained"] = counted(answers[name], questions, opening)
        print(json.dumps(report, ensure_ascii=False), file=sys.stderr)
    checked = questions[: options.streams]
    pairs = zip(checked, answers[trained], strict=False)
    same = [streamed(client, trained, question) == whole(choice) for question, choice in pairs]
    report["streamed_equals_whole"] = f"{sum(same)} of {len(same)}"
    report["loop"] = loop(client, trained)
    server.should_exit = True
    report["seconds"] = round(time.perf_counter() - start, 1)
    options.out.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
