"""schemathesis against the API: `python bench/fuzz.py [--examples 100] [--out FILE]`, with `pip
install schemathesis`.

Serves a tiny random model with its page and lets schemathesis (all its checks: schema-valid
requests are accepted, invalid ones refused, statuses, content types and bodies as described, no
server errors) loose on what /openapi.json says. Answers are cut at 4 tokens, so that the time goes
into requests. Exit code: schemathesis' own; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import httpx
import uvicorn
from pydantic import ConfigDict, Field

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from serving import open_tiny  # noqa: E402 - after the path

from cllm.serve.answer import chat_sampling  # noqa: E402
from cllm.serve.api import build_app  # noqa: E402
from cllm.serve.guard import Guard  # noqa: E402
from cllm.serve.requests import (  # noqa: E402
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Strict,
    Tool,
)
from cllm.serve.ui import mount_page  # noqa: E402


class Spoken(ChatMessage):
    """What a call has to be, the schema does not say."""

    content: Annotated[str, Field(max_length=20)] | None = None
    reasoning_content: None = None  # of the assistant alone
    reasoning: None = None
    tool_calls: None = None
    function_call: None = None


class Few(ChatRequest):
    """No schema can say that 1,024 messages are too long for this model of 1,024 positions, which
    ids it has, which unknown fields are harmless, that top_logprobs needs logprobs, that a tool has
    to be offered to be called, and which schemas the library knows (400): here all that are allowed
    fit.
    """

    model_config = ConfigDict(extra="forbid")
    messages: Annotated[list[Spoken], Field(min_length=1, max_length=3)]  # type: ignore[assignment]
    logit_bias: None = None  # type: ignore[assignment]
    logprobs: Literal[True] = True  # type: ignore[assignment]
    tools: Annotated[list[Tool], Field(max_length=1)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: None = None


class Short(CompletionRequest):
    """The same of texts."""

    model_config = ConfigDict(extra="forbid")
    prompt: Annotated[str, Field(min_length=1, max_length=99)]  # type: ignore[assignment]
    logit_bias: None = None  # type: ignore[assignment]


def closed(kind: type[Strict]) -> None:
    """The schema of this part of a request, and of all derived from it, without unknown fields."""
    if kind.model_config["extra"] == "forbid":
        kind.model_config["json_schema_extra"] = {"additionalProperties": False}
    for derived in kind.__subclasses__():
        closed(derived)


def short(**values: Any) -> Any:
    return chat_sampling(**{**values, "max_new_tokens": min(values["max_new_tokens"] or 4, 4)})


def main() -> int:
    closed(Strict)
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--phases", default="examples,coverage,fuzzing,stateful")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    brief = patch("cllm.serve.requests.chat_sampling", short)
    fewer = patch.multiple("cllm.serve.api", ChatRequest=Few, CompletionRequest=Short)
    with tempfile.TemporaryDirectory() as folder, brief, fewer:
        loaded = open_tiny(Path(folder))
        engine = loaded.engine()
        app = Guard(mount_page(build_app(loaded, engine), loaded, engine))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        program = [
            Path(sys.executable).with_name("schemathesis"),
            "run",
            f"{url}/openapi.json",
            "--checks",
            "all",
            "--no-color",
        ]
        # Only what OpenAI's API has: the page's own routes are not described.
        options = [
            "--max-examples",
            str(arguments.examples),
            "--phases",
            arguments.phases,
            "--request-timeout",
            "60",
            "--seed",
            "1",
        ]
        start = time.perf_counter()
        done = subprocess.run(
            [*program, *options], stdout=subprocess.PIPE, encoding="utf-8", cwd=folder, check=False
        )
        seconds = time.perf_counter() - start
        alive = httpx.get(f"{url}/health").status_code == 200 and httpx.get(url).status_code == 200
        print(done.stdout, file=sys.stderr)
        server.should_exit = True
        engine.close()
    counted = re.search(r"(\d+) generated", done.stdout)
    result = {
        "command": " ".join(["python", "bench/fuzz.py", *sys.argv[1:]]),
        "exit_code": done.returncode,
        "seconds": round(seconds, 1),
    }
    result |= {
        "requests": int(counted[1]) if counted else 0,
        "healthy_afterwards": alive,
        "summary": done.stdout[done.stdout.find("SUMMARY") :],
    }
    if arguments.out:
        arguments.out.write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    print(json.dumps(result, ensure_ascii=False))
    return done.returncode or int(not alive)


if __name__ == "__main__":
    raise SystemExit(main())
