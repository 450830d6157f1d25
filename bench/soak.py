"""Many clients for a while; a third leave midway, malformed bodies between: `python bench/soak.py
RUN [--requests 2000] [--clients 32]`.

Every client asks for greedy answers to its own questions, so that an answer of another client would
be seen. Afterwards nothing may run or wait, the server must still answer, and the memory may not
have grown by more than 5 % over its least since the third of ten waves (allocators need that long
to settle). The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from pathlib import Path

import httpx
import uvicorn

from cllm.assembly import open_model
from cllm.serve.api import build_app
from cllm.serve.guard import Guard
from cllm.serve.ui import mount_page

WAVES = 10
MALFORMED = (
    b"",
    b"{",
    b"[]",
    b'{"messages": 1}',
    b"\xff\xfe\x00",
    b"[" * 5000,
    b" " * 300_000,
    b'{"messages": [{"role": "user"}], "n": 99}',
)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


async def client(
    number: int,
    http: httpx.AsyncClient,
    requests: int,
    counts: dict[str, int],
    expected: dict[str, str],
) -> None:
    chance = random.Random(f"{number} {sum(counts.values())}")
    for _ in range(requests):
        kind = chance.choice(("whole", "stream", "leave", "leave", "stream", "malformed"))
        question = f"第{number}位客人问：{'你好' * (number % 5 + 1)}"
        body = {
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 48,
            "stream": kind != "whole",
        }
        counts[kind] = counts.get(kind, 0) + 1
        if kind == "malformed":
            answer = await http.post(
                "/v1/chat/completions",
                content=chance.choice(MALFORMED),
                headers={"content-type": "application/json"},
            )
            assert answer.status_code in (400, 413), answer.status_code
            continue
        text, done = "", kind != "stream"
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            if kind == "whole":
                text = json.loads(await response.aread())["choices"][0]["message"]["content"]
            pieces, leave_after = 0, chance.randrange(1, 12)
            async for line in response.aiter_lines() if kind != "whole" else no_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                    pieces += 1
                done = done or line == "data: [DONE]"
                if kind == "leave" and pieces >= leave_after:
                    break
        assert done, "a stream did not end"
        known = (
            expected.setdefault(question, text) if kind != "leave" else expected.get(question, text)
        )
        assert known.startswith(text) if kind == "leave" else known == text, (question, known, text)


async def no_lines():  # type: ignore[no-untyped-def]
    """An empty asynchronous iterator."""
    return
    yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    loaded = open_model(arguments.run)
    engine = loaded.engine()
    server = uvicorn.Server(
        uvicorn.Config(
            Guard(mount_page(build_app(loaded, engine), loaded, engine)),
            port=7898,
            log_level="error",
        )
    )
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    counts: dict[str, int] = {}
    expected: dict[str, str] = {}

    async def wave(requests: int) -> None:
        async with httpx.AsyncClient(
            base_url="http://127.0.0.1:7898", timeout=600, limits=httpx.Limits(max_connections=64)
        ) as http:
            shares = [
                requests // arguments.clients + (n < requests % arguments.clients)
                for n in range(arguments.clients)
            ]
            await asyncio.gather(
                *(client(n, http, share, counts, expected) for n, share in enumerate(shares))
            )

    start = time.perf_counter()
    resident = []
    for _ in range(WAVES):
        asyncio.run(wave(arguments.requests // WAVES))
        resident.append(resident_bytes())
    deadline = time.monotonic() + 60
    while (engine.stats()["running"] or engine.stats()["waiting"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    stats = engine.stats()
    assert not stats["running"] and not stats["waiting"] and not engine.batch.cache.layers, stats
    for path in ("/health", "/v1/models", "/"):
        assert httpx.get(f"http://127.0.0.1:7898{path}").status_code == 200, path
    assert sum(counts.values()) == arguments.requests, counts
    assert resident[-1] < 1.05 * min(resident[2:]), f"memory grew: {resident}"
    server.should_exit = True
    engine.close()
    result = {
        "requests": sum(counts.values()),
        **counts,
        "clients": arguments.clients,
        "seconds": round(time.perf_counter() - start, 1),
    }
    result |= {
        "command": " ".join(["python", "bench/soak.py", *sys.argv[1:]]),
        "steps": stats["steps"],
        "memory_bytes": resident,
    }
    result |= {"generated_tokens": stats["generated_tokens"], "questions_checked": len(expected)}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
