"""OpenAI's chat API over the engine.

Written after https://platform.openai.com/docs/api-reference/chat: request and response shapes,
server-sent events, errors.
"""

# No `from __future__ import annotations`: FastAPI must be able to evaluate the annotations of the
# functions in `build_app`.
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cllm.assembly import Loaded
from cllm.data import message
from cllm.data.template import Template
from cllm.data.text import RowError
from cllm.data.tools import Parts, Tools, opened
from cllm.messages import UserError, say, to_json
from cllm.model.chat_template import tool_style
from cllm.model.tokenizer import Tokenizer
from cllm.serve.answer import Answer, ModelError, asked_to_think, chat_sampling
from cllm.serve.engine import Engine
from cllm.serve.guard import error_response
from cllm.serve.reply import Reply
from cllm.serve.sampling import LIMITS, MAX_TOP_K

MAX_WAITING = 64


class Strict(BaseModel):
    """A part of a request: no value is converted from another type."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """One piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message of a conversation; `developer` counts as system."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None

    def plain(self) -> message.Message:
        text = self.content or ""
        if isinstance(text, list):
            text = "".join(part.text for part in text)
        role = "system" if self.role == "developer" else self.role
        try:
            called = [self.function_call] if self.function_call else []
            calls = message.read_calls([*(self.tool_calls or []), *called])
        except RowError as error:
            raise UserError("serve.call", detail=error.args[1]) from error
        return message.Message(role, text, self.reasoning_content or "", calls)


class Function(Strict):
    """A tool by name; offered it has a description and a JSON schema of its arguments."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[\w.:-]+$", max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    """An offered tool, or the one that is to be called."""

    type: Literal["function"]
    function: Function


class StreamOptions(Strict):
    """Whether the last event of a stream tells the usage."""

    include_usage: bool = False


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# strict, but JSON Schema's integers include 57.0, which some languages write for 57
Whole = BeforeValidator(_whole)
TokenCount = Annotated[int, Field(ge=1, le=LIMITS["max_new_tokens"][1]), Whole]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(Strict):
    """What is understood of OpenAI's request, and three sampling parameters more."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K), Whole] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    seed: Annotated[int, Whole] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    n: Annotated[Literal[1], Whole] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None


# Of the fields that are not understood, those pass that never change an answer, and the others
# where they are empty or say what happens anyway.
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention"
    " cache_salt priority request_id stream_interval keep_alive".split()
)
USUAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "modalities": (["text"],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "best_of": (1,),
    "length_penalty": (1,),
    "typical_p": (1,),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
}


THINKING: dict[bool, tuple[Any, ...]] = {
    True: (True, {"type": "enabled"}, {"enable_thinking": True}),
    False: (False, {"type": "disabled"}, {"enable_thinking": False}, "none"),
}


def _thinking(fields: Mapping[str, Any], template: Template) -> bool:
    """Whether the answer is to be thought out first: as a field says, where the template can be
    asked, else as it was trained.
    """
    names = ("chat_template_kwargs", "enable_thinking", "thinking", "reasoning_effort")
    asked = [fields[name] for name in names if fields.get(name) is not None]
    wanted = [mode for mode, ways in THINKING.items() if any(way in ways for way in asked)]
    usual = template.thinking == "keep"
    return wanted[0] if template.switches and len(wanted) == 1 else usual


def _unsupported(fields: Mapping[str, Any], thinking: bool) -> list[str]:
    """The names of fields that ask for another answer than what is sampled, with `thinking` or
    without.
    """
    names = ("chat_template_kwargs", "enable_thinking", "thinking")
    usual = USUAL | dict.fromkeys(names, ({}, *THINKING[thinking]))
    return [
        name
        for name, value in fields.items()
        if name not in HARMLESS
        and value is not None
        and (value not in usual[name] if name in usual else bool(value))
    ]


# of errors that are found behind the request's shape: the field that is at fault
PARAMS = {
    "serve.call": "messages",
    "serve.tool_choice": "tool_choice",
    "serve.unforced": "tool_choice",
    "template.no_tools": "tools",
    "template.no_calls": "tools",
    "template.drops": "tools",
    "template.token": "tools",
}


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


def _completion(answer: Answer, reply: Reply, head: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": reply.message(),
        "finish_reason": reply.finish_reason(answer.finish_reason),
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
        extra = body.model_extra or {}
        thinking = _thinking(extra, loaded.tokenizer.template)
        if fields := _unsupported(extra, thinking):
            message = say("serve.unsupported", fields=", ".join(fields))
            return error_response(400, message, param=fields[0])
        if len(engine.waiting) >= MAX_WAITING:
            return error_response(429, say("serve.busy"), headers={"Retry-After": "5"})
        answer, reply = await run_in_threadpool(_answer, body, name, loaded, engine, thinking)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(
                _events(answer, reply, head, usage), media_type="text/event-stream"
            )
        try:
            async for _ in reply.deltas(answer):
                if await request.is_disconnected():
                    answer.cancel()
        finally:
            answer.cancel()
        return JSONResponse(_completion(answer, reply, head))

    return app


def _offered(body: ChatRequest, tokenizer: Tokenizer) -> tuple[Tools, str, Parts]:
    """(the tools that may be called, the style of their calls, what the answer begins with where
    one has to be).
    """
    choice, named = body.tool_choice or "auto", ""
    listed = [] if choice == "none" else body.tools or []
    tools = [tool.function.model_dump(exclude_unset=True, exclude={"strict"}) for tool in listed]
    names = [tool["name"] for tool in tools]
    if isinstance(choice, Tool):
        named = choice.function.name
    elif choice == "required" and len({*names}) == 1:
        named = names[0]
    forced = named or choice == "required"
    if forced and (named not in names if named else not names):
        known = ", ".join(names) or "-"
        raise UserError("serve.tool_choice", name=named or choice, known=known)
    style = tool_style(tokenizer) if tools else "qwen"
    begun = opened(style, named) if forced else []
    if forced and not begun:
        raise UserError("serve.unforced", known=", ".join(names))
    return tools, style, begun


def _answer(
    body: ChatRequest, name: str, loaded: Loaded, engine: Engine, thinking: bool
) -> tuple[Answer, Reply]:
    length = body.max_completion_tokens or body.max_tokens
    values = body.model_dump(include={*LIMITS, "seed"})
    if body.top_p is not None:
        values["top_p"] = max(body.top_p, LIMITS["top_p"][0])
    if body.top_k is not None and body.top_k < 1:  # vLLM's "off"
        values["top_k"] = MAX_TOP_K
    sampling = chat_sampling(max_new_tokens=length, **values)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    messages = [message.plain() for message in body.messages]
    tools, style, begun = _offered(body, loaded.tokenizer)
    # a call that is begun leaves no room for thoughts
    tokenizer = asked_to_think(loaded.tokenizer, thinking and not begun)
    offered = to_json(tools) if tools else ""
    model = loaded.models[name]
    answer = Answer(engine, tokenizer, messages, sampling, model, stop, tools=offered, begun=begun)
    return answer, Reply(style, tools, parallel=body.parallel_tool_calls is not False)


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
            return error_response(400, error.args[0], param=PARAMS.get(error.code), code=code)
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
            str(part)
            for part in problem["loc"][1:]
            if not re.search(r"^(str|Tool)$|[-\[]", str(part))
        )
        if problem["type"] == "literal_error" and problem["loc"][-1] == "type":
            code = "serve.tool" if place.startswith("tool") else "serve.part"
            message = say(code, place=place, kind=problem["input"])
            return error_response(400, message, param=place)
        texts.setdefault(f"{place}: {problem['msg']}".removeprefix(": "), place)
    return error_response(400, "; ".join(texts), param=next(iter(texts.values())) or None)


async def _events(
    answer: Answer, reply: Reply, head: dict[str, Any], usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: the role, the pieces, the reason, the usage if asked for, [DONE]."""

    def event(delta: dict[str, Any] | None, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        choices = [] if delta is None else [choice]
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices}
        if usage:
            chunk["usage"] = _usage(answer) if delta is None else None
        return f"data: {to_json(chunk)}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        async for deltas in reply.deltas(answer):
            for delta in deltas:
                yield event(delta)
        yield event({}, reply.finish_reason(answer.finish_reason))
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
