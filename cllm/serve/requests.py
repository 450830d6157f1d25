"""What may be asked of the API: OpenAI's requests as models, and the fields that are not read."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cllm.data import message
from cllm.data.text import RowError
from cllm.messages import UserError
from cllm.serve.sampling import LIMITS, MAX_TOP_K


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


# Of the fields that are not understood, those pass that never change an answer, and the others
# where they are empty or say what happens anyway.
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention"
    " parallel_tool_calls cache_salt priority request_id stream_interval keep_alive".split()
)
USUAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
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


def unsupported(fields: Mapping[str, Any], thinking: bool) -> list[str]:
    """The names of fields that ask for another answer than what is sampled; `thinking`: whether
    the template keeps the reasoning.
    """
    kind = "enabled" if thinking else "disabled"
    template = {"enable_thinking": (thinking,), "thinking": ({"type": kind}, thinking)}
    usual = {**USUAL, **template, "chat_template_kwargs": ({}, {"enable_thinking": thinking})}
    return [
        name
        for name, value in fields.items()
        if name not in HARMLESS
        and value is not None
        and (value not in usual[name] if name in usual else bool(value))
    ]
