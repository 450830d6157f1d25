"""OpenAI's chat API over the engine.

Written after https://platform.openai.com/docs/api-reference/chat: request and response shapes,
server-sent events, errors.
"""

# No `from __future__ import annotations`: FastAPI must be able to evaluate the annotations of the
# functions in `build_app`.
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cllm.assembly import Loaded
from cllm.messages import UserError, say, to_json
from cllm.serve.answer import Answer, ModelError, chat_sampling
from cllm.serve.engine import Engine
from cllm.serve.guard import error_response
from cllm.serve.requests import ChatRequest, unsupported
from cllm.serve.sampling import LIMITS, MAX_TOP_K

MAX_WAITING = 64


class ErrorDetail(BaseModel):
    """OpenAI's fields of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What the OpenAPI description says of every error."""

    error: ErrorDetail


EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
ERRORS: Any = {"default": {"description": "An error in OpenAI's shape", "model": ErrorBody}}
# up to OpenAPI 3.1 this describes one event
EVENTS: Any = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}


def _completion(answer: Answer, head: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text},
        "finish_reason": answer.finish_reason,
        "logprobs": None,
    }
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}


def build_app(loaded: Loaded, engine: Engine) -> Any:
    """The FastAPI application with /health, /v1/models and /v1/chat/completions; models: `base` and
    the adapter's name.
    """
    from fastapi import FastAPI

    # FastAPI's own documentation pages load from other hosts
    app = FastAPI(title="cllm", docs_url=None, redoc_url=None)
    started = int(time.time())
    _handle_errors(app)

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "cllm"}

    def unknown(name: str) -> Response:
        message = say("serve.model", name=name, known=", ".join(loaded.models))
        return error_response(404, message, param="model", code="model_not_found")

    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = engine.healthy
        return JSONResponse({"status": "ok" if healthy else "failing"}, 200 if healthy else 503)

    @app.get("/v1/models", responses=ERRORS)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in loaded.models]}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def get_model(name: str) -> Response:
        return JSONResponse(described(name)) if name in loaded.models else unknown(name)

    @app.post("/v1/chat/completions", responses=ERRORS | EVENTS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        name = body.model or next(iter(loaded.models))
        if name not in loaded.models:
            return unknown(name)
        thinking = loaded.tokenizer.template.thinking == "keep"
        if fields := unsupported(body.model_extra or {}, thinking):
            message = say("serve.unsupported", fields=", ".join(fields))
            return error_response(400, message, param=fields[0])
        if len(engine.waiting) >= MAX_WAITING:
            return error_response(429, say("serve.busy"), headers={"Retry-After": "5"})
        answer = await run_in_threadpool(_answer, body, name, loaded, engine)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(_events(answer, head, usage), media_type="text/event-stream")
        try:
            async for _ in answer:
                if await request.is_disconnected():
                    answer.cancel()
        finally:
            answer.cancel()
        return JSONResponse(_completion(answer, head))

    return app


def _answer(body: ChatRequest, name: str, loaded: Loaded, engine: Engine) -> Answer:
    length = body.max_completion_tokens or body.max_tokens
    values = body.model_dump(include={*LIMITS, "seed"})
    if body.top_p is not None:
        values["top_p"] = max(body.top_p, LIMITS["top_p"][0])
    if body.top_k is not None and body.top_k < 1:  # vLLM's "off"
        values["top_k"] = MAX_TOP_K
    sampling = chat_sampling(max_new_tokens=length, **values)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    messages = [message.plain() for message in body.messages]
    return Answer(engine, loaded.tokenizer, messages, sampling, loaded.models[name], stop)


def _handle_errors(app: Any) -> None:
    """Whatever is raised while a request is handled answers in OpenAI's shape."""
    from fastapi.exceptions import RequestValidationError

    async def reply(_: object, error: Any) -> JSONResponse:
        if isinstance(error, HTTPException):
            return error_response(error.status_code, str(error.detail), headers=error.headers)
        if isinstance(error, RequestValidationError):
            return _refusal_of(error.errors())
        if isinstance(error, UserError):
            code = "context_length_exceeded" if error.code == "serve.context" else None
            return error_response(400, error.args[0], code=code)
        return error_response(500, str(error))

    for kind in (RequestValidationError, HTTPException, UserError, ModelError):
        app.add_exception_handler(kind, reply)


def _refusal_of(problems: Sequence[Any]) -> JSONResponse:
    """The answer to a body that is no request: where it is wrong, without the names that pydantic
    gives to the alternatives of a field.
    """
    texts: dict[str, str] = {}
    for problem in problems:
        if problem["type"] == "json_invalid":
            detail = f"{problem['ctx']['error']}: {problem['loc'][1]}"
            return error_response(400, say("serve.no_json", detail=detail))
        place = ".".join(
            str(part) for part in problem["loc"][1:] if not re.search(r"^str$|[-\[]", str(part))
        )
        if problem["type"] == "literal_error" and problem["loc"][-1] == "type":
            return error_response(
                400, say("serve.part", place=place, kind=problem["input"]), param=place
            )
        texts.setdefault(f"{place}: {problem['msg']}".removeprefix(": "), place)
    return error_response(400, "; ".join(texts), param=next(iter(texts.values())) or None)


async def _events(answer: Answer, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Server-sent events: the role, the pieces, the reason, the usage if asked for, [DONE]."""

    def event(delta: dict[str, str] | None, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        choices = [] if delta is None else [choice]
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices}
        if usage:
            chunk["usage"] = _usage(answer) if delta is None else None
        return f"data: {to_json(chunk)}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        async for piece in answer:
            yield event({"content": piece})
        yield event({}, answer.finish_reason)
        if usage:
            yield event(None)
    except ModelError as error:
        yield f"data: {bytes(error_response(500, str(error)).body).decode()}\n\n"
    finally:
        answer.cancel()
    yield "data: [DONE]\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": total,
    }
