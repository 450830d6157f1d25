"""From messages to the text of an answer, piece by piece: what the terminal, the page and the API
all read from.

Incomplete UTF-8 and what may become a stop string are held back; user text never becomes special
tokens (the tokenizer's rule).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from cllm.data.message import Message
from cllm.data.schema import Conversation
from cllm.data.template import Segment
from cllm.data.text import encodable, overlap
from cllm.messages import UserError
from cllm.model.tokenizer import Tokenizer
from cllm.serve.engine import Engine
from cllm.serve.sampling import Listener, Logprob, Request, Sampling

ANSWER_SHARE = 4
"""A shortened conversation leaves the answer one part in so many of the context."""


class ModelError(Exception):
    """The engine failed on this request; the text says why."""


class Answer:
    """One request, submitted when iterated: `for piece in answer` in a thread, `async for piece in
    answer` in an event loop.

    tools: those that may be called, as JSON; the text then has the control tokens of calls. begun:
    what the answer begins with.
    `shorten`: the oldest rounds of a conversation that does not fit are left out, `left_out` of
    them, so that an answer has room. `prompt`: ids that are continued as they are, instead of
    messages. Raises UserError where the last question alone is too long.

    Afterwards `finish_reason` is "stop", "length" or "cancelled"; raises ModelError if the engine
    failed. Closing the iterator early frees the row.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        sampling: Sampling,
        adapter: int = 1,
        stop: Sequence[str] = (),
        *,
        shorten: bool = False,
        prompt: Sequence[int] = (),
        tools: str = "",
        begun: Sequence[tuple[str, bool]] = (),
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._adapter = adapter
        self._stop = tuple(stop)
        clean = [
            m._replace(content=encodable(m.content), reasoning=encodable(m.reasoning))
            for m in messages
        ]
        forced = [Segment(text, False, markup) for text, markup in begun]

        def encoded() -> list[int]:
            chat = Conversation(tuple(clean), tools=encodable(tools))
            turns = tokenizer.segments(chat, open_turn=True)
            return tokenizer.encode_segments([*turns, *forced])[0]

        self.prompt = list(prompt) or encoded()
        self.left_out = 0
        reserve = min(sampling.max_new_tokens, engine.max_tokens // ANSWER_SHARE) * shorten
        while shorten and len(self.prompt) > engine.max_tokens - max(1, reserve):
            roles = [message.role for message in clean]
            first = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
            if "user" not in roles[first + 1 :]:  # the last question, with less room for its answer
                break
            second = roles.index("user", first + 1)
            del clean[first:second]
            self.left_out += 1
            self.prompt = encoded()
        if len(self.prompt) >= engine.max_tokens:  # known before anything is streamed
            raise UserError("serve.context", tokens=len(self.prompt), limit=engine.max_tokens)
        self._decoder = tokenizer.stream(reply=not (prompt or begun), calls=bool(tools))
        for id in prompt[-16:]:  # what goes on with it may begin with a blank
            self._decoder.push(id)
        # Qwen3.5's prompt opens the reasoning
        opened = not prompt and tokenizer.decode(self.prompt[-16:]).rstrip().endswith("<think>")
        self._held = "<think>\n" if opened else "".join(text for text, _ in begun)
        self._begins: list[int] = []  # where the text of each token begins
        self._scored = 0
        self._cancelled = False
        self._request: Request | None = None
        self.text = ""
        self.finish_reason = ""
        self.prompt_tokens = len(self.prompt)
        self.tokens = 0
        self.first_seconds = 0.0
        self.started = time.perf_counter()

    def cancel(self) -> None:
        """Stop decoding and free the row, from any thread; what was decoded so far stays in
        `text`.
        """
        self._cancelled = True
        if self._request is not None:
            self._request.cancel()

    def cost(self) -> dict[str, Any]:
        """The fields of chat.cost and ui.cost: tokens of prompt and answer, seconds until the first
        one, tokens per second so far.
        """
        speed = self.tokens / max(time.perf_counter() - self.started, 1e-9)
        return {
            "prompt": self.prompt_tokens,
            "tokens": self.tokens,
            "context": f"{self.prompt_tokens + self.tokens:,} / {self._engine.max_tokens:,}",
            "first": f"{self.first_seconds:.2f}",
            "speed": f"{speed:.0f}",
        }

    def _submit(self, listener: Listener | None = None) -> Request:
        request = self._engine.submit(self.prompt, self._sampling, self._adapter, listener)
        request.cancelled = self._cancelled
        self._request = request
        return request

    def __iter__(self) -> Iterator[str]:
        request = self._submit()
        try:
            for token in itertools.chain(request, [None]):
                if piece := self._take(request, token):
                    yield piece
        finally:
            request.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue[int | None]()

        def listener(token: int | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(tokens.put_nowait, token)

        request = self._submit(listener)
        try:
            token: int | None = 0
            while token is not None:
                token = await tokens.get()
                if piece := self._take(request, token):
                    yield piece
        finally:
            request.cancel()

    def _take(self, request: Request, token: int | None) -> str:
        """Text that is certain to belong to the answer now that `token` came, or None, the end."""
        if token is None and request.finish_reason == "error":
            raise ModelError(request.error)
        if self.finish_reason:  # a stop string came before
            return ""
        if token is None:
            piece = self._release(self._decoder.end(), last=True)
            self.finish_reason = self.finish_reason or request.finish_reason
            return piece
        self._begins.append(len(self.text) + len(self._held))
        self.tokens += 1
        self.first_seconds = self.first_seconds or time.perf_counter() - self.started
        return self._release(self._decoder.push(token))

    def scored(self) -> list[tuple[int, Logprob, int]]:
        """(id, log-probabilities, where its text begins) of each token whose text came since the
        last call; nothing unless the sampling asks for them.
        """
        if self._request is None or self._sampling.logprobs is None:
            return []
        ended = self.finish_reason and not self._held  # not by a stop string, which stays behind
        start = self._scored
        while self._scored < self.tokens and (ended or self._begins[self._scored] < len(self.text)):
            self._scored += 1
        ids = self._request.ids[self.prompt_tokens :]
        return [
            (ids[i], self._request.logprobs[i], self._begins[i]) for i in range(start, self._scored)
        ]

    def _release(self, text: str, last: bool = False) -> str:
        """What of held and new text cannot be part of a stop string; a whole one ends the answer
        before it.
        """
        self._held += text
        places = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        keep = min(places, default=len(self._held))
        if places:
            self.finish_reason = "stop"
            self.cancel()
        elif not last:
            keep -= overlap(self._held, self._stop)
        piece, self._held = self._held[:keep], self._held[keep:]
        self.text += piece
        return piece


def asked_to_think(tokenizer: Tokenizer, think: bool) -> Tokenizer:
    """The tokenizer whose prompts ask for reasoning, or for none, where its template can."""
    template = replace(tokenizer.template, thinking="keep" if think else "off")
    return replace(tokenizer, template=template) if tokenizer.template.switches else tokenizer


def chat_sampling(**values: Any) -> Sampling:
    """The terminal's, the page's and the API's defaults; values that are None stay at them."""
    defaults = Sampling(max_new_tokens=512, temperature=0.3, top_p=0.9, top_k=50)
    return replace(defaults, **{key: value for key, value in values.items() if value is not None})
