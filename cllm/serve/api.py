"""OpenAI's API over the engine.

Written after https://platform.openai.com/docs/api-reference: request and response shapes,
server-sent events, errors.
"""

# No `from __future__ import annotations`: FastAPI must be able to evaluate the annotations of the
# functions in `build_app`.
import functools
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import accumulate
from typing import Any

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cllm.assembly import Loaded
from cllm.data.message import Message
from cllm.data.text import encodable
from cllm.data.tools import TOOL_STYLES, Parts, Tools, opened
from cllm.messages import UserError, messages, say, to_json
from cllm.model.chat_template import tool_style
from cllm.model.tokenizer import Tokenizer, load_tokenizer
from cllm.serve.answer import Answer, ModelError, asked_to_think
from cllm.serve.engine import FIRST_TOKEN_SECONDS, Engine
from cllm.serve.grammar import Grammar, Grammars, call_grammar
from cllm.serve.guard import error_response
from cllm.serve.reply import Reply
from cllm.serve.requests import (
    ASKED_TO_THINK,
    ChatRequest,
    CompletionRequest,
    Settings,
    Tool,
    thinking_of,
    unsupported,
)
from cllm.serve.responses import Choices, completion, events, pieces

MAX_WAITING = 64
# which field of the request is wrong
PARAMS = {
    "serve.context": "messages",
    "serve.empty": "messages",
    "serve.call": "messages",
    "serve.not_said": "messages",
    "serve.tool_schema": "tools",
    "serve.call_in_format": "response_format",
    "serve.thought_in_format": "response_format",
    "serve.tool_choice": "tool_choice",
    "serve.unforced": "tool_choice",
    "template.no_tools": "tools",
    "template.no_calls": "tools",
    "template.drops": "tools",
    "template.token": "tools",
    "serve.bias": "logit_bias",
    "serve.top_logprobs": "top_logprobs",
    "serve.prompt": "prompt",
    "serve.no_schema": "response_format",
    "serve.no_grammar": "response_format",
    "serve.grammar": "response_format",
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


def build_app(loaded: Loaded, engine: Engine) -> Any:
    """The FastAPI application with /health, /metrics, /v1/models, /v1/chat/completions and
    /v1/completions; models: `base` and the adapter's name.
    """
    from fastapi import FastAPI

    # FastAPI's own documentation pages load from other hosts
    app = FastAPI(title="cllm", docs_url=None, redoc_url=None)
    started = int(time.time())
    desk = _Desk(loaded, engine)
    _handle_errors(app)

    def described(name: str) -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": started, "owned_by": "cllm"}
        return {**model, "max_model_len": engine.max_tokens}

    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = engine.healthy
        return JSONResponse({"status": "ok" if healthy else "failing"}, 200 if healthy else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(_metrics(engine), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses=ERRORS)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in loaded.models]}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def get_model(name: str) -> Response:
        return JSONResponse(described(name)) if name in loaded.models else _unknown(name, loaded)

    @app.post("/v1/chat/completions", responses=ERRORS | EVENTS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await desk.respond(body, request)

    @app.post("/v1/completions", responses=ERRORS | EVENTS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await desk.respond(body, request)

    return app


def _unknown(name: str, loaded: Loaded) -> Response:
    message = say("serve.model", name=name, known=", ".join(loaded.models))
    return error_response(404, message, param="model", code="model_not_found")


class _Desk:
    """Takes the requests of both endpoints."""

    def __init__(self, loaded: Loaded, engine: Engine) -> None:
        self._loaded, self._engine = loaded, engine
        self._grammars = Grammars(loaded.tokenizer)

    @functools.cached_property
    def _plain(self) -> Tokenizer:
        return load_tokenizer(self._loaded.tokenizer.source, template="text")

    async def respond(self, body: Settings, request: Request) -> Response:
        """The whole answer, or its stream; refused before anything is computed."""
        loaded = self._loaded
        name = body.model or next(iter(loaded.models))
        if name not in loaded.models:
            return _unknown(name, loaded)
        extra = body.model_extra or {}
        thinking = thinking_of(extra, loaded.tokenizer.template)
        if fields := unsupported(extra, thinking):
            message = say("serve.unsupported", fields=", ".join(fields))
            return error_response(400, message, param=fields[0])
        if len(self._engine.waiting) >= MAX_WAITING:
            return error_response(429, say("serve.busy"), headers={"Retry-After": "5"})
        kind = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
        head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        made = await run_in_threadpool(self._answers, body, name, thinking)
        response = Choices(*made, loaded.tokenizer, body.n or 1, head)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(events(response, usage), media_type="text/event-stream")
        async with aclosing(pieces(response.answers)) as coming:
            async for index, piece in coming:
                response.take(index, piece)
                if await request.is_disconnected():
                    break
        return JSONResponse(completion(response))

    def _answers(
        self, body: Settings, name: str, thinking: bool
    ) -> tuple[list[Answer], list[Reply]]:
        """`n` to each prompt, the first one's first; their seeds count up. Of a chat also what
        tells the parts of each apart.
        """
        loaded, count = self._loaded, body.n or 1
        tokenizer, last = loaded.tokenizer, loaded.tokenizer.vocab_size - 1
        talk, tools, begun = list[Message](), Tools(), Parts()
        replies, shorten = list[Reply](), False
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if isinstance(body, CompletionRequest):
            texts = [self._ids(prompt, last) for prompt in body.prompts()]
            prompts = [ids for ids in texts for _ in range(count)]
            length = body.max_tokens or 16
            sampling = body.sampling(last, max_new_tokens=length, logprobs=body.logprobs)
        else:
            assert isinstance(body, ChatRequest)
            if body.top_logprobs and not body.logprobs:
                raise UserError("serve.top_logprobs")
            prompts = [[]] * count
            talk = [said.plain() for said in body.messages]
            shorten = body.truncation == "auto"
            tools, style, begun = _offered(body, tokenizer)
            # a call is no answer in a format
            grammar = (
                self._rest(style, tools, begun)
                if begun
                else self._grammar(body, bool(tools), thinking)
            )
            # a call that is begun, or a form, leaves no room for thoughts
            tokenizer = asked_to_think(tokenizer, thinking and not (begun or grammar))
            stop = [*stop, *TOOL_STYLES[style].stops] if tools else stop
            parallel = body.parallel_tool_calls is not False
            replies = [Reply(style, tools, parallel=parallel) for _ in prompts]
            sampling = body.sampling(
                last,
                max_new_tokens=body.max_completion_tokens or body.max_tokens,
                logprobs=body.top_logprobs or (0 if body.logprobs else None),
                grammar=grammar,
            )
        answers = []
        for index, prompt in enumerate(prompts):
            seed = None if sampling.seed is None else sampling.seed + index
            answers.append(
                Answer(
                    self._engine,
                    tokenizer,
                    talk,
                    replace(sampling, seed=seed),
                    loaded.models[name],
                    stop,
                    shorten=shorten,
                    prompt=prompt,
                    tools=to_json(tools) if tools else "",
                    begun=begun,
                )
            )
        return answers, replies

    def _ids(self, prompt: str | list[int], last: int) -> list[int]:
        """A text as evaluation encodes it: with the beginning that the vocabulary gives it."""
        if isinstance(prompt, str):
            prompt = self._plain.encode_chat([Message("user", encodable(prompt))])
        if not prompt:
            raise UserError("serve.empty")
        if (id := max(prompt)) > last:
            raise UserError("serve.prompt", id=id, last=last)
        return prompt

    def _rest(self, style: str, tools: Tools, begun: Parts) -> Grammar | None:
        """What may follow the beginning of a call; without the library, or in a format whose
        arguments are no JSON, the model decides.
        """
        text = call_grammar(style, tools, begun) if self._grammars.available else ""
        try:
            return self._grammars.compile(text) if text else None
        except UserError as error:
            raise UserError("serve.tool_schema", detail=error.args[0]) from error

    def _grammar(self, body: ChatRequest, tools: bool, thinking: bool) -> Grammar | None:
        """Of the answer, in which neither calls of tools nor thoughts that were asked for fit."""
        wanted, fields = body.response_format, body.model_extra or {}
        if wanted is None or wanted.type == "text":
            return None
        if tools:
            raise UserError("serve.call_in_format")
        if thinking and any(map(fields.get, ASKED_TO_THINK)):
            raise UserError("serve.thought_in_format")
        if wanted.type == "json_object":
            return self._grammars.compile({"type": "object"})
        if wanted.json_schema is None:
            raise UserError("serve.no_schema")
        return self._grammars.compile(wanted.json_schema.schema_)


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


def _metrics(engine: Engine) -> str:
    """Prometheus' text format."""
    stats, counts = engine.stats(), engine.first_tokens[:]
    values = (
        ("requests_total", "counter", engine.requests),
        ("prompt_tokens_total", "counter", engine.prompt_tokens),
        ("generated_tokens_total", "counter", engine.generated_tokens),
        ("requests_running", "gauge", stats["running"]),
        ("requests_waiting", "gauge", stats["waiting"]),
        ("kv_tokens_used", "gauge", stats["kv_tokens_used"]),
        ("kv_tokens_limit", "gauge", stats["kv_tokens"]),
    )
    lines = []
    for name, kind, value in values:
        lines += [f"# TYPE cllm_{name} {kind}", f"cllm_{name} {value}"]
    first = "cllm_first_token_seconds"
    lines.append(f"# TYPE {first} histogram")
    for bound, count in zip([*FIRST_TOKEN_SECONDS, "+Inf"], accumulate(counts), strict=True):
        lines.append(f'{first}_bucket{{le="{bound}"}} {count}')
    lines += [f"{first}_sum {engine.first_seconds}", f"{first}_count {sum(counts)}", ""]
    return "\n".join(lines)


def _handle_errors(app: Any) -> None:
    """Whatever is raised while a request is handled answers in OpenAI's shape."""
    from fastapi.exceptions import RequestValidationError

    async def reply(request: Request, error: Any) -> Response:
        if isinstance(error, HTTPException):
            text = _said(f"serve.http.{error.status_code}", error.detail)
            return error_response(error.status_code, text, headers=error.headers)
        if isinstance(error, RequestValidationError):
            return _refusal_of(error.errors())
        if isinstance(error, UserError):
            code = "context_length_exceeded" if error.code == "serve.context" else None
            param = PARAMS.get(error.code)
            if param == "messages" and request.url.path == "/v1/completions":
                param = "prompt"
            return error_response(400, error.args[0], param=param, code=code)
        return error_response(500, str(error))

    for kind in (RequestValidationError, HTTPException, UserError, ModelError):
        app.add_exception_handler(kind, reply)


def _said(code: str, detail: str, /, **values: object) -> str:
    """The message of this code, or else what a library says."""
    return say(code, **values) if code in messages() else detail


def _refusal_of(problems: Sequence[Any]) -> Response:
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
        said = {"messages", "tools", "tool_choice"} & {*problem["loc"]}
        if problem["type"] == "literal_error" and problem["loc"][-1] == "type" and said:
            code = "serve.tool" if place.startswith("tool") else "serve.part"
            message = say(code, place=place, kind=problem["input"])
            return error_response(400, message, param=place)
        code = f"serve.problem.{problem['type']}"
        text = _said(code, problem["msg"], **problem.get("ctx", {}))
        texts.setdefault(f"{place}: {text}".removeprefix(": "), place)
    return error_response(400, "; ".join(texts), param=next(iter(texts.values())) or None)
