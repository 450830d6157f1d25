"""The guard around everything that this process serves, and errors in OpenAI's shape."""

import hmac
import re
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cllm.messages import say, speaking, to_json

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
ANY = frozenset({"0.0.0.0", "::"})
"""Hosts that listen in every network."""
BODY_BYTES = 4 * 2**20
UPLOAD = "/gradio_api/upload"
COOKIE = "cllm_key"
# The page's own scripts and styles are inline; nothing comes from, or goes to, another host:
# neither fonts nor model text.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; "
    "script-src 'self' 'unsafe-inline'; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'self'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
ERROR_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    413: "request_too_large",
    429: "rate_limit_exceeded",
}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    error = {"message": message, "type": kind, "param": param}
    body = to_json({"error": {**error, "code": code or ERROR_CODES.get(status)}})
    # what a request quotes may hold half surrogate pairs
    content = body.encode("utf-8", "replace")
    return Response(content, status, headers, "application/json")


def preferred(languages: str) -> str:
    """The first of Chinese and English in an Accept-Language header, "" for neither."""
    match = re.search(r"(?:^|,)\s*(zh|en)\b", languages.lower())
    return match[1] if match else ""


class Guard:
    """ASGI middleware: key, Host and Origin, JSON only, small bodies, and headers that keep a page
    from loading anything else.

    Without a key only a loopback Host is answered, because a foreign page can reach this port by
    DNS rebinding. `/?key=K` turns the key into a cookie; clients send it as `Authorization: Bearer
    K`. Only /health needs none.
    """

    def __init__(self, app: ASGIApp, key: str = "") -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass; bodies are read whole first, so that a missing Content-Length
        hides nothing.
        """
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request = Request(scope, receive)
        with speaking(preferred(request.headers.get("accept-language", ""))):
            return await self._answer(request, receive, guarded)

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        refusal = self._refusal(request)
        whole: list[Message] = []
        if refusal is None and request.method not in ("GET", "HEAD", "OPTIONS"):
            body = b""
            try:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > BODY_BYTES:
                        limit = BODY_BYTES // 1024
                        refusal = error_response(413, say("serve.body", limit=limit))
                        break
            except ClientDisconnect:
                return None
            whole = [{"type": "http.request", "body": body}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return await (refusal or self.app)(request.scope, replay, send)

    def _refusal(self, request: Request) -> Response | None:
        """What answers instead of the application, if something must."""
        headers = request.headers
        path = request.scope["path"]  # not request.url's, which begins with the Host header
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.key and re.sub(r":\d+$", "", host).strip("[]") not in LOOPBACK:
            return error_response(403, say("serve.host", host=host))
        if origin and origin.partition("//")[2] != host:
            return error_response(403, say("serve.origin", origin=origin))
        if self.key and path != "/health":
            if path == "/" and self._is_key(request.query_params.get("key", "")):
                redirect = RedirectResponse("/", 303)
                redirect.set_cookie(COOKIE, self.key, max_age=31536000, httponly=True)
                return redirect
            bearer = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not self._is_key(bearer or request.cookies.get(COOKIE, "")):
                return error_response(401, say("serve.key"))
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        # a form of another site gets no further, as its Origin says so; the page's uploads do
        kinds = ["application/json", *["multipart/form-data"] * (bool(origin) and path == UPLOAD)]
        if request.method == "POST" and has_body and kind not in kinds:
            return error_response(415, say("serve.json"))
        return None

    def _is_key(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self.key.encode())
