"""How fast the engine serves: 16 chats at once against one `generate` after the other and
Transformers' own continuous batching.

    python bench/serving.py models/SmolLM2-135M-Instruct.Q4_1.gguf [--tokens 128] [--rounds 3]
    [--precision bf16] [--out FILE]

One process, the variants alternate; medians over the rounds. Greedy, no stop ids, so that every
variant makes the same number of tokens. With one thread (OMP_NUM_THREADS=1) rates are per second of
CPU time, so that a busy machine does not decide the ratios; with more, and on a GPU, per second of
wall time. FILE keeps the results of other models and precisions. A CPU without bf16 units
(`bf16_units` in the result) computes bf16 several times slower than fp32. `overhead_ms` is the
engine's time outside the model's forward, per generated token. The API part asks 16 streaming
clients at once over real sockets and subtracts the engine's own time to the first text of the same
request; `--rounds 0` does only this part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from cllm.assembly import Loaded, open_model
from cllm.data.message import Message
from cllm.serve.engine import Engine
from cllm.serve.sampling import Sampling

CHATS = 16
PORT = 7899
clock = (
    time.perf_counter
    if torch.cuda.is_available() or torch.get_num_threads() > 1
    else time.process_time
)
TOPICS = "天气 历史 数学 厨艺 旅行 音乐 编程 物理 诗歌 健康 电影 体育 花草 汽车 法律 童年".split()


def questions() -> list[str]:
    """Sixteen questions of 6 to about 50 characters."""
    return [
        f"请谈谈{topic}。" + f"说说你对{topic}的看法，举两个例子，并说明理由。" * (i % 3)
        for i, topic in enumerate(TOPICS)
    ]


def sequential(model: Any, prompts: list[list[int]], tokens: int) -> float:
    config = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    start = clock()
    with torch.no_grad():
        for prompt in prompts:
            model.generate(torch.tensor([prompt], device=model.device), generation_config=config)
    return len(prompts) * tokens / (clock() - start)


def continuous(model: Any, prompts: list[list[int]], tokens: int) -> float:
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    start = clock()
    blocks = 2 * sum(-(-(len(prompt) + tokens) // 256) for prompt in prompts)
    # as many prefill tokens as ours
    cache = ContinuousBatchingConfig(page_size=256, num_blocks=blocks, max_batch_tokens=256)
    outputs = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=cache
    )
    made = sum(len(output.generated_tokens) for output in outputs.values())
    return made / (clock() - start)


def engine_rate(engine: Engine, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """(tokens per second, milliseconds outside the forward per token)."""
    inside = 0.0
    forward = engine.model.forward

    def timed(**kwargs: Any) -> Any:
        nonlocal inside
        begin = clock()
        output = forward(**kwargs)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        inside += clock() - begin
        return output

    engine.model.forward = timed
    start = clock()
    engine.generate(prompts, Sampling(max_new_tokens=tokens, stop_ids=frozenset()), adapter=False)
    seconds = clock() - start
    engine.model.forward = forward
    return len(prompts) * tokens / seconds, 1000 * (seconds - inside) / (len(prompts) * tokens)


def ask_all(tokens: int) -> list[float]:
    """Seconds until the first text of each question, sixteen streaming clients at once, on bare
    sockets: a client library takes longer to send a request than the server to answer it.
    """

    async def ask(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: str, length: int
    ) -> float:
        messages = [{"role": "user", "content": question}]
        body = json.dumps(
            {
                "model": "base",
                "messages": messages,
                "temperature": 0,
                "max_tokens": length,
                "stream": True,
            }
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{PORT}\r\nContent-Type: application/json\r\n"
        start, first = time.perf_counter(), 0.0
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while (line := await reader.readline()).strip() != b"data: [DONE]":
            assert line, "the server hung up"
            if (
                not first
                and line.startswith(b"data: {")
                and json.loads(line[6:])["choices"][0]["delta"].get("content")
            ):
                first = time.perf_counter() - start
        await reader.readuntil(b"\r\n0\r\n\r\n")
        return first

    async def all_at_once() -> list[float]:
        sockets = [await asyncio.open_connection("127.0.0.1", PORT) for _ in range(CHATS)]
        # connections are kept, as clients do between turns
        await asyncio.gather(*(ask(*socket, "你好", 1) for socket in sockets))
        return list(
            await asyncio.gather(
                *(
                    ask(*socket, question, tokens)
                    for socket, question in zip(sockets, questions(), strict=True)
                )
            )
        )

    return asyncio.run(all_at_once())


def first_texts(loaded: Loaded, engine: Engine, tokens: int) -> dict[str, float]:
    """Seconds until the first text of an answer, of 16 streaming clients at once: the engine's,
    from `submit` to the token that completes the text (a Chinese character may take three), and the
    same request's through HTTP, from sending to receiving. Medians.
    """
    import uvicorn

    from cllm.serve.api import build_app
    from cllm.serve.guard import Guard

    started, times, ids = (
        dict[tuple[int, ...], float](),
        defaultdict[tuple[int, ...], list[float]](list),
        {},
    )
    submit = engine.submit

    def timed(prompt: list[int], sampling: Sampling, adapter: int, listener: Any) -> Any:
        key = tuple(prompt)

        def heard(token: int | None) -> None:
            times[key].append(time.perf_counter())
            listener(token)

        started[key] = time.perf_counter()
        ids[key] = submit(prompt, sampling, adapter, heard)
        return ids[key]

    def until_text(key: tuple[int, ...]) -> float:
        decoder = loaded.tokenizer.stream(reply=True)
        index = next(i for i, token in enumerate(ids[key].ids[len(key) :]) if decoder.push(token))
        return times[key][index] - started[key]

    server = uvicorn.Server(
        uvicorn.Config(
            Guard(build_app(loaded, engine)), port=PORT, log_level="error", timeout_keep_alive=600
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    engine.submit = timed  # type: ignore[method-assign, assignment]
    # as elsewhere, so not under this interpreter's lock
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:
        api = clients.submit(ask_all, tokens).result()
    engine.submit = submit  # type: ignore[method-assign]
    server.should_exit = True
    thread.join()
    own = [
        until_text(tuple(loaded.tokenizer.encode_chat([Message("user", question)])))
        for question in questions()
    ]
    between = [through - inside for through, inside in zip(api, own, strict=True)]
    named = {"engine": own, "api": api, "api_minus_engine": between}
    return {name: statistics.median(values) for name, values in named.items()} | {
        "api_minus_engine_max": max(between)
    }


def bf16_units() -> bool:
    """Whether the CPU multiplies bf16 matrices itself."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bool(
        {"amx_bf16", "avx512_bf16"} & set(info.read_text(encoding="utf-8").split())
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    loaded = open_model(arguments.model, precision=arguments.precision)
    engine = loaded.engine()
    prompts = [
        loaded.tokenizer.encode_chat([Message("user", question)]) for question in questions()
    ]
    model: Any = loaded.model
    rates: dict[str, list[float]] = {
        "sequential": [],
        "engine": [],
        "continuous_batching": [],
        "overhead_ms": [],
    }
    for round_ in range(arguments.rounds):
        model.set_attn_implementation("sdpa")
        rates["sequential"].append(sequential(model, prompts, arguments.tokens))
        model.set_attn_implementation("cllm")
        rate, overhead = engine_rate(engine, prompts, arguments.tokens)
        rates["engine"].append(rate)
        rates["overhead_ms"].append(overhead)
        model.set_attn_implementation("sdpa")
        rates["continuous_batching"].append(continuous(model, prompts, arguments.tokens))
        print(
            f"round {round_}: " + "  ".join(f"{k} {v[-1]:.2f}" for k, v in rates.items()),
            file=sys.stderr,
        )
    model.set_attn_implementation("cllm")
    firsts = first_texts(loaded, engine, arguments.tokens)
    engine.close()
    result: dict[str, Any] = {
        "command": " ".join(["python", "bench/serving.py", *sys.argv[1:]]),
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(engine.device),
            "torch": torch.__version__,
            "bf16_units": bf16_units(),
            "load": os.getloadavg(),
        },
        "chats": CHATS,
        "new_tokens": arguments.tokens,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "first_text_seconds": firsts,
    }
    if arguments.rounds:
        medians = {key: statistics.median(values) for key, values in rates.items()}
        result |= {
            "tokens_per_second": {
                key: values for key, values in rates.items() if key != "overhead_ms"
            },
            "engine_over_sequential": medians["engine"] / medians["sequential"],
            "engine_over_continuous_batching": medians["engine"] / medians["continuous_batching"],
            "overhead_ms_per_token": medians["overhead_ms"],
        }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        results = (
            json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
        )
        results[
            f"{Path(arguments.model).stem} {arguments.precision}"
            + (", API alone" if not arguments.rounds else "")
        ] = result
        arguments.out.write_text(
            json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
