"""OpenAI's API over the engine.

Written after https://platform.openai.com/docs/api-reference: request and response shapes,
server-sent events, errors.
"""

# No `from __future__ import annotations`: FastAPI must be able to evaluate the annotations of the
# functions in `build_app`.
import asyncio
import functools
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cllm.assembly import Loaded
from cllm.data import message
from cllm.messages import UserError, say, to_json
from cllm.model.tokenizer import Tokenizer, load_tokenizer
from cllm.model.vocabulary import token_bytes
from cllm.serve.answer import Answer, ModelError, encodable
from cllm.serve.engine import FIRST_TOKEN_SECONDS, Engine
from cllm.serve.grammar import Grammar, Grammars
from cllm.serve.guard import error_response
from cllm.serve.requests import (
    ChatRequest,
    CompletionRequest,
    ResponseFormat,
    Settings,
    unsupported,
)
from cllm.serve.sampling import Logprob

MAX_WAITING = 64
# which field of the request is wrong
PARAMS = {
    "serve.context": "messages",
    "serve.empty": "messages",
    "serve.call": "messages",
    "serve.bias": "logit_bias",
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


@dataclass(frozen=True)
class _Choices:
    """The answers to one request, `n` to each prompt, in the shape of one of the two endpoints, and
    the head of all that is sent.
    """

    answers: list[Answer]
    tokenizer: Tokenizer
    chat: bool
    n: int
    head: dict[str, Any]

    def choice(self, index: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        """One choice; with the log-probabilities, if asked for, of what was not sent before."""
        scored = self.answers[index].scored()
        shape = self._chat_logprobs if self.chat else self._text_logprobs
        logprobs = shape(scored) if scored else None
        return {"index": index, **said, "finish_reason": reason, "logprobs": logprobs}

    def usage(self) -> dict[str, int]:
        """Each prompt counts once; `left_out_rounds`: what a conversation was shortened by."""
        prompt = sum(answer.prompt_tokens for answer in self.answers[:: self.n])
        completion = sum(answer.tokens for answer in self.answers)
        counts = {"prompt_tokens": prompt, "completion_tokens": completion}
        counts["total_tokens"] = prompt + completion
        left_out = self.answers[0].left_out
        return counts | ({"left_out_rounds": left_out} if left_out else {})

    def _chat_logprobs(self, scored: list[tuple[int, Logprob, int]]) -> dict[str, Any]:
        def entry(id: int, value: float) -> dict[str, Any]:
            piece = token_bytes(self.tokenizer.vocabulary, id)
            return {"token": _readable(piece), "logprob": value, "bytes": list(piece)}

        content = [
            {**entry(id, logprob.value), "top_logprobs": [entry(*pair) for pair in logprob.top]}
            for id, logprob, _ in scored
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, scored: list[tuple[int, Logprob, int]]) -> dict[str, Any]:
        def name(id: int) -> str:
            return _readable(token_bytes(self.tokenizer.vocabulary, id))

        return {
            "tokens": [name(id) for id, _, _ in scored],
            "token_logprobs": [logprob.value for _, logprob, _ in scored],
            "top_logprobs": [
                {name(other): value for other, value in [*logprob.top, (id, logprob.value)]}
                for id, logprob, _ in scored
            ],
            "text_offset": [begin for _, _, begin in scored],
        }


def _readable(piece: bytes) -> str:
    """A token's text; as OpenAI writes them, the bytes of a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _completion(reply: _Choices) -> dict[str, Any]:
    choices = []
    for index, answer in enumerate(reply.answers):
        message = {"role": "assistant", "content": answer.text}
        said = {"message": message} if reply.chat else {"text": answer.text}
        choices.append(reply.choice(index, said, answer.finish_reason))
    kind = "chat.completion" if reply.chat else "text_completion"
    return {**reply.head, "object": kind, "choices": choices, "usage": reply.usage()}


async def _pieces(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, str | None], None]:
    """(which answer, its next piece) as they come; None ends one. Raises ModelError."""
    pieces = asyncio.Queue[tuple[int, str | Exception | None]]()

    async def read(index: int, answer: Answer) -> None:
        try:
            async for piece in answer:
                pieces.put_nowait((index, piece))
            pieces.put_nowait((index, None))
        except Exception as error:
            pieces.put_nowait((index, error))

    tasks = [asyncio.create_task(read(*numbered)) for numbered in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            index, piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece is None
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()
        for answer in answers:
            answer.cancel()


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
    """Takes requests of both endpoints."""

    def __init__(self, loaded: Loaded, engine: Engine) -> None:
        self._loaded, self._engine = loaded, engine
        self._grammars = Grammars(loaded.tokenizer)

    @functools.cached_property
    def _plain(self) -> Tokenizer:
        return load_tokenizer(self._loaded.tokenizer.source, template="text")

    async def respond(self, body: Settings, request: Request) -> Response:
        """The whole answer, or its stream; refused before anything is computed."""
        loaded, engine = self._loaded, self._engine
        name = body.model or next(iter(loaded.models))
        if name not in loaded.models:
            return _unknown(name, loaded)
        thinking = loaded.tokenizer.template.thinking == "keep"
        if fields := unsupported(body.model_extra or {}, thinking):
            message = say("serve.unsupported", fields=", ".join(fields))
            return error_response(400, message, param=fields[0])
        if len(engine.waiting) >= MAX_WAITING:
            return error_response(429, say("serve.busy"), headers={"Retry-After": "5"})
        chat = isinstance(body, ChatRequest)
        kind = "chatcmpl" if chat else "cmpl"
        head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        answers = await run_in_threadpool(self.answers, body, name)
        reply = _Choices(answers, loaded.tokenizer, chat, body.n or 1, head)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(_events(reply, usage), media_type="text/event-stream")
        async with aclosing(_pieces(answers)) as pieces:
            async for _ in pieces:
                if await request.is_disconnected():
                    break
        return JSONResponse(_completion(reply))

    def answers(self, body: Settings, name: str) -> list[Answer]:
        """`n` to each prompt, the first one's first; their seeds count up."""
        last = self._loaded.tokenizer.vocab_size - 1
        messages, prompts, shorten = list[message.Message](), list[list[int]]([[]]), False
        if isinstance(body, CompletionRequest):
            prompts = [self._ids(prompt, last) for prompt in body.prompts()]
            sampling = body.sampling(
                last, max_new_tokens=body.max_tokens or 16, logprobs=body.logprobs
            )
        else:
            assert isinstance(body, ChatRequest)
            messages = [said.plain() for said in body.messages]
            shorten = body.truncation == "auto"
            sampling = body.sampling(
                last,
                max_new_tokens=body.max_completion_tokens or body.max_tokens,
                logprobs=body.top_logprobs or (0 if body.logprobs else None),
                grammar=self._grammar(body.response_format),
            )
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        answers = []
        for index in range(len(prompts) * (body.n or 1)):
            seed = None if sampling.seed is None else sampling.seed + index
            answers.append(
                Answer(
                    self._engine,
                    self._loaded.tokenizer,
                    messages,
                    replace(sampling, seed=seed),
                    self._loaded.models[name],
                    stop,
                    shorten=shorten,
                    prompt=prompts[index // (body.n or 1)],
                )
            )
        return answers

    def _ids(self, prompt: str | list[int], last: int) -> list[int]:
        """A text as evaluation encodes it: with the beginning that the vocabulary gives it."""
        if isinstance(prompt, str):
            prompt = self._plain.encode_chat([message.Message("user", encodable(prompt))])
        if not prompt:
            raise UserError("serve.empty")
        if (id := max(prompt)) > last:
            raise UserError("serve.prompt", id=id, last=last)
        return prompt

    def _grammar(self, wanted: ResponseFormat | None) -> Grammar | None:
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return self._grammars.compile({"type": "object"})
        if wanted.json_schema is None:
            raise UserError("serve.no_schema")
        return self._grammars.compile(wanted.json_schema.schema_)


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

    async def reply(request: Request, error: Any) -> JSONResponse:
        if isinstance(error, HTTPException):
            return error_response(error.status_code, str(error.detail), headers=error.headers)
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
        part = "messages" in problem["loc"] and problem["loc"][-1] == "type"
        if problem["type"] == "literal_error" and part:
            return error_response(
                400, say("serve.part", place=place, kind=problem["input"]), param=place
            )
        texts.setdefault(f"{place}: {problem['msg']}".removeprefix(": "), place)
    return error_response(400, "; ".join(texts), param=next(iter(texts.values())) or None)


async def _events(reply: _Choices, usage: bool) -> AsyncIterator[str]:
    """Server-sent events: the roles, the pieces, the reasons, the usage if asked for, [DONE]."""

    def event(choices: list[dict[str, Any]]) -> str:
        kind = "chat.completion.chunk" if reply.chat else "text_completion"
        chunk = {**reply.head, "object": kind, "choices": choices}
        if usage:
            chunk["usage"] = None if choices else reply.usage()
        return f"data: {to_json(chunk)}\n\n"

    try:
        if reply.chat:
            for index in range(len(reply.answers)):
                role = {"role": "assistant", "content": ""}
                yield event([reply.choice(index, {"delta": role}, None)])
        async with aclosing(_pieces(reply.answers)) as pieces:
            async for index, piece in pieces:
                reason = reply.answers[index].finish_reason if piece is None else None
                delta = {} if piece is None else {"content": piece}
                said = {"delta": delta} if reply.chat else {"text": piece or ""}
                yield event([reply.choice(index, said, reason)])
        if usage:
            yield event([])
    except ModelError as error:
        yield f"data: {bytes(error_response(500, str(error)).body).decode()}\n\n"
    yield "data: [DONE]\n\n"
