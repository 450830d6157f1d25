"""What the API sends: choices of both endpoints, whole or as server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cllm.messages import UserError, to_json
from cllm.model.tokenizer import Tokenizer
from cllm.model.vocabulary import token_bytes
from cllm.serve.answer import Answer, ModelError
from cllm.serve.guard import error_response
from cllm.serve.reply import Reply
from cllm.serve.sampling import Logprob


@dataclass(frozen=True)
class Choices:
    """The answers to one request, `n` to each prompt, in the shape of one of the two endpoints, and
    the head of all that is sent; of a chat's the parts that each consists of.
    """

    answers: list[Answer]
    replies: list[Reply]
    tokenizer: Tokenizer
    n: int
    head: dict[str, Any]

    @property
    def chat(self) -> bool:
        """Whether a conversation is answered, not a text continued."""
        return bool(self.replies)

    def take(self, index: int, piece: str | None) -> list[dict[str, Any]]:
        """What the next piece of an answer, None at its end, adds to a stream."""
        if not self.chat:
            return [{"text": piece}] if piece else []
        reply = self.replies[index]
        deltas = reply.push(piece or "", last=piece is None)
        if reply.full:  # nothing more is wanted
            self.answers[index].cancel()
        return [{"delta": delta} for delta in deltas]

    def reason(self, index: int) -> str:
        """Why an answer ended, in OpenAI's words."""
        reason = self.answers[index].finish_reason
        return self.replies[index].finish_reason(reason) if self.chat else reason

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


def completion(response: Choices) -> dict[str, Any]:
    """All that was answered, as one object."""
    said: list[dict[str, Any]]
    if response.chat:
        said = [{"message": reply.message()} for reply in response.replies]
    else:
        said = [{"text": answer.text} for answer in response.answers]
    choices = [
        response.choice(index, what, response.reason(index)) for index, what in enumerate(said)
    ]
    kind = "chat.completion" if response.chat else "text_completion"
    return {**response.head, "object": kind, "choices": choices, "usage": response.usage()}


async def pieces(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, str | None], None]:
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


async def events(response: Choices, usage: bool) -> AsyncIterator[str]:
    """Server-sent events: the roles, the pieces, the reasons, the usage if asked for, [DONE]."""

    def event(choices: list[dict[str, Any]]) -> str:
        kind = "chat.completion.chunk" if response.chat else "text_completion"
        chunk = {**response.head, "object": kind, "choices": choices}
        if usage:
            chunk["usage"] = None if choices else response.usage()
        return f"data: {to_json(chunk)}\n\n"

    try:
        for index in range(len(response.replies)):
            role = {"role": "assistant", "content": ""}
            yield event([response.choice(index, {"delta": role}, None)])
        async with aclosing(pieces(response.answers)) as coming:
            async for index, piece in coming:
                for said in response.take(index, piece):
                    yield event([response.choice(index, said, None)])
                if piece is None:
                    said = {"delta": {}} if response.chat else {"text": ""}
                    yield event([response.choice(index, said, response.reason(index))])
        if usage:
            yield event([])
    except (ModelError, UserError) as error:
        status = 400 if isinstance(error, UserError) else 500
        yield f"data: {bytes(error_response(status, str(error.args[0])).body).decode()}\n\n"
    yield "data: [DONE]\n\n"
