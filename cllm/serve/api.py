"""OpenAI's chat API over the engine, and the guard around everything that this process serves.

Written after https://platform.openai.com/docs/api-reference/chat: request and response shapes,
server-sent events, errors.
"""

# No `from __future__ import annotations`: FastAPI must be able to evaluate the annotations of the
# functions in `build_app`.
import hmac
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from cllm.assembly import Loaded
from cllm.data.schema import Message
from cllm.messages import UserError, say
from cllm.serve.answer import Answer, ModelError, chat_sampling
from cllm.serve.engine import Engine
from cllm.serve.sampling import LIMITS, MAX_TOP_K

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Event, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
BODY_BYTES = 256 * 2**10
MAX_WAITING = 64
COOKIE = "cllm_key"
# The page's own scripts and styles are inline; nothing comes from, or goes to, another host:
# neither fonts nor model text.
POLICY = {
    "default-src": "'self'",
    "img-src": "'self' data: blob:",
    "script-src": "'self' 'unsafe-inline'",
    "font-src": "'self' data:",
    "style-src": "'self' 'unsafe-inline'",
    "object-src": "'none'",
    "base-uri": "'self'",
    "frame-ancestors": "'self'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{key} {value}" for key, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
ERROR_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    413: "request_too_large",
    429: "rate_limit_exceeded",
}


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    code = code or ERROR_CODES.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware: key, Host and Origin, JSON only, small bodies, and headers that keep a page
    from loading anything else.

    Without a key only a loopback Host is answered, because a foreign page can reach this port by
    DNS rebinding. `/?key=K` turns the key into a cookie; clients send it as `Authorization: Bearer
    K`. Only /health needs none.
    """

    def __init__(self, app: App, key: str = "") -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Pass on what may pass; bodies are read whole first, so that a missing Content-Length
        hides nothing.
        """
        if scope["type"] != "http":
            await (
                self.app(scope, receive, send)
                if scope["type"] == "lifespan"
                else send({"type": "websocket.close"})
            )
            return

        async def guarded(message: Event) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        refusal = self._refusal(
            scope, {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        )
        whole: list[Event] = []
        if refusal is None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            body, more = b"", True
            while more and len(body) <= BODY_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body, more = body + message.get("body", b""), message.get("more_body", False)
            whole = [{"type": "http.request", "body": body}]
            if len(body) > BODY_BYTES:
                refusal = _refuse(413, "serve.body", limit=BODY_BYTES // 1024)

        async def replay() -> Event:
            return whole.pop() if whole else await receive()

        await (refusal or self.app)(scope, replay, guarded)

    def _refusal(self, scope: Event, headers: dict[str, str]) -> App | None:
        """What answers instead of the application, if something must."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.key and re.sub(r":\d+$", "", host).strip("[]") not in LOOPBACK:
            return _refuse(403, "serve.host", host=host)
        if origin and origin.partition("//")[2] != host:
            return _refuse(403, "serve.origin", origin=origin)
        if self.key and scope["path"] != "/health":
            linked = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
            if scope["path"] == "/" and self._is_key(linked):
                cookie = f"{COOKIE}={self.key}; Path=/; HttpOnly; SameSite=Lax; Max-Age=31536000"
                return Response(status_code=303, headers={"location": "/", "set-cookie": cookie})
            cookies = dict(
                part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";")
            )
            sent = headers.get("authorization", "").removeprefix("Bearer ").strip() or cookies.get(
                COOKIE, ""
            )
            if not self._is_key(sent):
                return _refuse(401, "serve.key")
        is_json = (
            headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
        )
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        # neither a form of another site nor an upload gets further
        if scope["method"] == "POST" and has_body and not is_json:
            return _refuse(415, "serve.json")
        return None

    def _is_key(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self.key.encode())


def _refuse(
    status: int,
    message_code: str,
    *,
    param: str | None = None,
    code: str | None = None,
    **values: object,
) -> JSONResponse:
    """The response that says why; an ASGI application, too."""
    body = error_body(status, say(message_code, **values), param=param, code=code)
    return JSONResponse(body, status, {"Retry-After": "5"} if status == 429 else None)


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

    def plain(self) -> Message:
        text = (
            "".join(part.text for part in self.content)
            if isinstance(self.content, list)
            else self.content or ""
        )
        return Message("system" if self.role == "developer" else self.role, text)


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
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K), Whole] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    seed: Annotated[int, Whole] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    n: Annotated[Literal[1], Whole] | None = None


# Fields of OpenAI's that would change the answer are refused; others that are not understood are
# ignored.
UNSUPPORTED = tuple(
    "tools functions response_format logprobs top_logprobs logit_bias frequency_penalty"
    " presence_penalty audio prediction".split()
)


# What the OpenAPI description says of answers: JSON or events, and every error in one shape.
ERROR = {
    "type": "object",
    "required": ["message", "type", "param", "code"],
    "properties": {"message": {"type": "string"}},
}
ERRORS = {
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["error"], "properties": {"error": ERROR}}
        }
    }
}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
RESPONSES: Any = {
    # up to OpenAPI 3.1 this describes one event
    200: {"content": {"text/event-stream": {"schema": EVENT}}},
    "default": {"description": "An error in OpenAI's shape", **ERRORS},
}


def build_app(loaded: Loaded, engine: Engine) -> Any:
    """The FastAPI application with /health, /v1/models and /v1/chat/completions; models: `base` and
    the adapter's name.
    """
    from fastapi import FastAPI, Request

    # FastAPI's own documentation pages load from other hosts
    app = FastAPI(title="cllm", docs_url=None, redoc_url=None)
    started = int(time.time())
    _handle_errors(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = engine.healthy
        return JSONResponse({"status": "ok" if healthy else "failing"}, 200 if healthy else 503)

    @app.get("/v1/models", responses={"default": RESPONSES["default"]})
    async def list_models() -> dict[str, Any]:
        common = {"object": "model", "created": started, "owned_by": "cllm"}
        return {"object": "list", "data": [{"id": name, **common} for name in loaded.models]}

    @app.post("/v1/chat/completions", responses=RESPONSES)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        name = body.model or next(iter(loaded.models))
        if refusal := _not_served(body, name, loaded, engine):
            return refusal
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
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": answer.finish_reason,
            "logprobs": None,
        }
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}
        )

    return app


def _not_served(
    body: ChatRequest, name: str, loaded: Loaded, engine: Engine
) -> JSONResponse | None:
    """The refusal of a request for another model, for what would change the answer unseen, or one
    too many.
    """
    if name not in loaded.models:
        known = ", ".join(loaded.models)
        param, code = "model", "model_not_found"
        return _refuse(404, "serve.model", param=param, code=code, name=name, known=known)
    extra = body.model_extra or {}
    if fields := [field for field in UNSUPPORTED if extra.get(field)]:
        return _refuse(400, "serve.unsupported", param=fields[0], fields=", ".join(fields))
    return _refuse(429, "serve.busy") if len(engine.waiting) >= MAX_WAITING else None


def _answer(body: ChatRequest, name: str, loaded: Loaded, engine: Engine) -> Answer:
    sampling = chat_sampling(
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
    )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    said = [message.plain() for message in body.messages]
    return Answer(engine, loaded.tokenizer, said, sampling, loaded.models[name], stop)


def _handle_errors(app: Any) -> None:
    """Whatever is raised while a request is handled answers in OpenAI's shape."""
    from fastapi.exceptions import RequestValidationError

    async def reply(_: object, error: Any) -> JSONResponse:
        if isinstance(error, HTTPException):
            return JSONResponse(
                error_body(error.status_code, str(error.detail)), error.status_code, error.headers
            )
        if isinstance(error, RequestValidationError):
            problems = [
                (".".join(str(part) for part in e["loc"] if part != "body"), e["msg"])
                for e in error.errors()
            ]
            message = "; ".join(f"{where}: {what}" if where else what for where, what in problems)
            return JSONResponse(error_body(400, message, param=problems[0][0] or None), 400)
        if isinstance(error, UserError):
            code = "context_length_exceeded" if error.code == "serve.context" else None
            return JSONResponse(error_body(400, error.args[0], code=code), 400)
        return JSONResponse(error_body(500, str(error)), 500)

    for kind in (RequestValidationError, HTTPException, UserError, ModelError):
        app.add_exception_handler(kind, reply)


async def _events(answer: Answer, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Server-sent events: the role, the pieces, the reason, the usage if asked for, [DONE]."""

    def event(delta: dict[str, str] | None, reason: str | None = None) -> str:
        choices = (
            []
            if delta is None
            else [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
        )
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices}
        if usage:
            chunk["usage"] = _usage(answer) if delta is None else None
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        async for piece in answer:
            yield event({"content": piece})
        yield event({}, answer.finish_reason)
        if usage:
            yield event(None)
    except ModelError as error:
        yield f"data: {json.dumps(error_body(500, str(error)), ensure_ascii=False)}\n\n"
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
