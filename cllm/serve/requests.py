"""What may be asked of the API: OpenAI's requests as models, and the fields that are not read."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from cllm.data import message
from cllm.data.template import Template
from cllm.data.text import MAX_DEPTH, RowError, is_deep
from cllm.messages import UserError
from cllm.serve.answer import chat_sampling
from cllm.serve.sampling import LIMITS, MAX_TOP_K, Sampling

MAX_PROMPTS = 64


class Strict(BaseModel):
    """A part of a request: no value is converted from another type, and a field that is not known
    is refused unless it is empty or in PASSING.
    """

    model_config = ConfigDict(
        strict=True,
        allow_inf_nan=False,
        extra="forbid",
        json_schema_extra={"additionalProperties": True},
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, part: Any) -> Any:
        if cls.model_config["extra"] != "forbid" or not isinstance(part, dict):
            return part
        if is_deep(part):
            raise PydanticCustomError("deep", "deeper than {limit} levels", {"limit": MAX_DEPTH})
        names = {field.alias or name for name, field in cls.model_fields.items()}
        return {k: v for k, v in part.items() if k in names or (v and k not in PASSING)}


class TextPart(Strict):
    """One piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message of a conversation; `developer` counts as system. A `name` is taken and not
    shown to the model, whose format has no place for one; so is the id of a call.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
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
        thought = self.reasoning_content or self.reasoning or ""
        if role != "assistant" and (thought or calls):
            raise UserError("serve.not_said", role=role)
        return message.Message(role, text, thought, calls)


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


Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0), Whole]
Biases = dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]


class JsonSchema(Strict):
    """The schema that an answer follows; OpenAI's `strict` or not, it is enforced."""

    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Strict):
    """What an answer is: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Settings(Strict):
    """What both endpoints understand of OpenAI's request, three sampling parameters more, and the
    adapter's strength.
    """

    model_config = ConfigDict(extra="allow")

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K), Whole] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    strength: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Whole] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=16), Whole] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Biases | None = None

    def sampling(self, last: int, **more: Any) -> Sampling:
        """The settings as the engine takes them, `more` besides; `last`: the highest token id."""
        values = self.model_dump(include={*LIMITS, "seed"}) | more
        if self.top_p is not None:
            values["top_p"] = max(self.top_p, LIMITS["top_p"][0])
        if self.top_k is not None and self.top_k < 1:  # vLLM's "off"
            values["top_k"] = MAX_TOP_K
        bias = {int(id): value for id, value in (self.logit_bias or {}).items()}
        if wrong := [id for id in bias if id > last]:
            raise UserError("serve.bias", id=wrong[0], last=last)
        return chat_sampling(logit_bias=tuple(bias.items()), **values)


class ChatRequest(Settings):
    """A conversation to be continued."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = None
    response_format: ResponseFormat | None = None
    truncation: Literal["auto", "disabled"] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(Settings):
    """Texts, or the ids of texts, to be continued without a template."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=5), Whole] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One for each answer."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return prompt if several else [prompt]


# Of the fields that are not understood, those pass that never change an answer, and the others
# where they are empty or say what happens anyway.
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention"
    " cache_salt priority request_id stream_interval keep_alive".split()
)
# The same of the fields in messages, tools and formats.
PASSING = frozenset(
    "name id tool_call_id annotations parsed cache_control description strict"
    " include_obfuscation".split()
)
USUAL: dict[str, tuple[Any, ...]] = {
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


ASKED_TO_THINK = ("chat_template_kwargs", "enable_thinking", "thinking")


def thinking_of(fields: Mapping[str, Any], template: Template) -> bool:
    """Whether the answer is to be thought out first: as a field says, where the template can be
    asked, else as it was trained.
    """
    names = (*ASKED_TO_THINK, "reasoning_effort")
    asked = [fields[name] for name in names if fields.get(name) is not None]
    wanted = [mode for mode, ways in THINKING.items() if any(way in ways for way in asked)]
    usual = template.thinking == "keep"
    return wanted[0] if template.switches and len(wanted) == 1 else usual


def unsupported(fields: Mapping[str, Any], thinking: bool) -> list[str]:
    """The names of fields that ask for another answer than what is sampled, with `thinking` or
    without.
    """
    usual = USUAL | dict.fromkeys(ASKED_TO_THINK, ({}, *THINKING[thinking]))
    return [
        name
        for name, value in fields.items()
        if name not in HARMLESS
        and value is not None
        and (value not in usual[name] if name in usual else bool(value))
    ]
