"""One message and its parts: how anybody's files write it, and what it becomes. Nothing before a
template turns the parts back into text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

from cllm.data.text import MAX_DEPTH, RowError, clean, is_deep, json_text, text_of
from cllm.messages import to_json

_ROLE_WORDS = {
    "system": "system developer",
    "user": "human user client usr 用户",
    "assistant": "gpt assistant bot ai model counselor 助手 function_call tool_call tool_calls",
    "tool": "tool observation function function_response tool_response tool_result ipython",
}
ROLES = {word: role for role, words in _ROLE_WORDS.items() for word in words.split()}
_CALLING = ("function_call", "tool_call", "tool_calls")  # messages that are nothing but calls
# of Swift, its later versions, OpenAI, axolotl and Megatron
FLAGS = frozenset(
    "loss loss_scale loss_weight loss_mask weight train training trainable mask".split()
)
# What was thought before an answer: beside a message's content, and as a column of a row.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "think")
THOUGHT_COLUMNS = (*THOUGHTS, "complex_cot", "inner_thought", "cot", "chain_of_thought")
_BLOCK = re.compile(r"\s*<think>(.*?)</think>\n*", re.S)
# Hermes's calls, several of them, and glaive's, one at the end
_TAGGED = re.compile(
    r"<tool_call>\s*([{\[].*?)</tool_call>|<functioncall>\s*(\{.*\})"
    r"(?:\s*</functioncall>)?\s*\Z",
    re.S,
)
_LENIENT = json.JSONDecoder(strict=False)
_JSON_START = re.compile(r"^[ \t]*[\[{]", re.M)
_QUOTED = re.compile(r"""\{\s*"name":\s*"([^"]+)",\s*"arguments":\s*'(.*)'\s*\}""", re.S)
_RESPONSES = re.compile(r"<tool_response>(.*?)</tool_response>", re.S)


class Call(NamedTuple):
    """A tool called by an answer: the function's name and its arguments as JSON's object."""

    name: str
    arguments: dict[str, Any]

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.arguments)))


class Message(NamedTuple):
    """One turn; `role` is system, user, assistant or tool.

    reasoning: what was thought before an answer; calls: the tools that the answer calls, in order
    behind its words; trained: False for an answer that is read and not learned.
    """

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    trained: bool = True

    @property
    def parts(self) -> str:
        """All but role and content as JSON; "" where a message has no more."""
        plain = self.trained and not self.reasoning and not self.calls
        return "" if plain else to_json(self[2:])

    @property
    def words(self) -> str:
        """The content, and the calls as JSON a line each: what counts and scores look at."""
        calls = [to_json(call._asdict()) for call in self.calls]
        return "\n".join(filter(None, [self.content, *calls])) if calls else self.content

    def row(self) -> dict[str, Any]:
        """The message as OpenAI and Transformers write it; arguments stay an object."""
        calls = [{"type": "function", "function": call._asdict()} for call in self.calls]
        parts: dict[str, Any] = {"reasoning_content": self.reasoning, "tool_calls": calls}
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        row |= {key: value for key, value in parts.items() if value}
        return row if self.trained else row | {"loss": False}


def restored_message(role: str, content: str, parts: str) -> Message:
    """The message of these `Message.parts`."""
    if not parts:
        return Message(role, content)
    reasoning, calls, trained = json.loads(parts)
    return Message(role, content, reasoning, tuple(Call(*call) for call in calls), trained)


def joined(turns: list[Message], message: Message) -> None:
    """Append the message, or what it adds to a neighbour of the same role that only calls."""
    if not message.calls or message.content or not turns or turns[-1].role != message.role:
        turns.append(message)
        return
    last = turns[-1]
    reasoning = "\n".join(filter(None, (last.reasoning, message.reasoning)))
    trained = last.trained and message.trained
    turns[-1] = Message(last.role, last.content, reasoning, last.calls + message.calls, trained)


def block_of(content: str) -> tuple[str, str]:
    """(reasoning, answer) of an answer that begins with a <think> block, else ("", content)."""
    if block := _BLOCK.match(content):
        return block.group(1).strip("\n"), content[block.end() :]
    return "", content


def with_block(message: Message) -> str:
    """The content behind the reasoning in the <think> block that most models write."""
    block = f"<think>\n{message.reasoning}\n</think>\n\n" if message.reasoning else ""
    return block + message.content


# --- Calls
def _parsed(text: str) -> object:
    """JSON; Python's notation, which Hermes's files have; or glaive's, whose arguments are JSON in
    single quotes. None if it is none of them.
    """
    text = clean(text)
    with suppress(ValueError, RecursionError):
        return _LENIENT.decode(text)
    if quoted := _QUOTED.fullmatch(text):
        return {"name": quoted.group(1), "arguments": quoted.group(2)}
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return None


def read_calls(value: object, *, sure: bool = True) -> tuple[Call, ...]:
    """The calls in one object or a list of them, as such or as JSON text; ids are dropped.

    sure: it must be calls. Otherwise () for anything that does not look like them. Raises RowError
    for a call without a name, with arguments that are no JSON object, or one that is too deep.
    """
    parsed = _parsed(value) if isinstance(value, str) else value
    calls = []
    for call in parsed if isinstance(parsed, list) else [parsed]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        keys = ("arguments", "parameters", *(["input", "args"] if sure else []))
        key = next((key for key in keys if isinstance(function, dict) and key in function), "")
        if not isinstance(function, dict) or "name" not in function or not (key or sure):
            if sure:
                raise RowError("row.call", "invalid_text", found=f"{call or value!r:.60}")
            return ()
        name, arguments = function["name"], function.get(key)
        if isinstance(arguments, str):
            arguments = {} if clean(arguments) in ("", "null") else _parsed(arguments)
        elif arguments is None:
            arguments = {}
        if not (isinstance(name, str) and clean(name) and isinstance(arguments, dict)):
            raise RowError("row.call", "invalid_text", found=f"{function!r:.60}")
        if is_deep(arguments):
            raise RowError("row.deep", "invalid_text", limit=MAX_DEPTH)
        clean(json_text(arguments))  # raises for what is no JSON, bytes and surrogates
        calls.append(Call(clean(name), arguments))
    return tuple(calls)


def with_calls(message: Message, *, listed: bool) -> Message:
    """The answer with the calls in its text as calls: those in <tool_call> tags, and with `listed`,
    in a row of tools, JSON behind the words. Words behind a call leave the text as it is.
    """
    if message.calls or not (listed or "call>" in message.content):
        return message
    reasoning, text = block_of(message.content)
    marks = list(_TAGGED.finditer(text))
    calls: tuple[Call, ...] = ()
    if marks and not clean(_TAGGED.sub("", text[marks[0].start() :])):
        calls = tuple(chain.from_iterable(read_calls(mark[1] or mark[2]) for mark in marks))
    elif listed and (start := _JSON_START.search(text)):
        marks = [start]
        calls = read_calls(text[start.start() :], sure=False)
    if not calls:
        return message
    return message._replace(
        content=text[: marks[0].start()],
        reasoning="\n".join(filter(None, (message.reasoning, reasoning))),
        calls=calls,
    )


# --- A message with a role
def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether an answer is learned, by the flags that files put on messages."""
    for name in sorted(FLAGS.intersection(message)):
        value = message[name]
        word = "" if value is None or value != value else str(value).strip().lower()
        if name == "mask" and word:
            raise RowError("row.mask", "invalid_text", found=f"{value!r:.30}")
        if word in ("0", "0.0", "false"):
            return False
        if word not in ("", "1", "1.0", "true"):
            raise RowError("row.flag", "invalid_text", name=name, found=f"{value!r:.30}")
    return True


def _result(part: Mapping[str, Any]) -> str:
    """What a tool gave back, of a typed part."""
    keys = "content output value text result functionResponse function_response".split()
    value = next((part[key] for key in keys if part.get(key) is not None), "")
    if isinstance(value, list) and all(isinstance(p, dict) and "text" in p for p in value):
        return text_of(value, "text")
    return json_text(value) if isinstance(value, dict | list) else text_of(value, "content")


def _of_parts(role: str, parts: list[Any]) -> list[Message]:
    """The messages in a list of typed parts: words, reasoning and calls one after another; the
    result of a tool is a turn of its own.
    """
    turns = [Message(role, "")]
    for part in parts:
        kind = "text"
        if isinstance(part, dict):  # Gemini's have a functionCall in place of a type
            named = (key for key in part if key.startswith("function"))
            kind = part.get("type", next(named, kind))
        content, reasoning, calls = "", "", tuple[Call, ...]()
        if kind in ("reasoning", "thinking"):
            reasoning = text_of(part, kind)
        elif kind in ("text", "input_text", "output_text"):
            content = text_of(part, "text")
        elif not isinstance(kind, str) or not re.search("tool|function|observation", kind):
            raise RowError("row.part", "invalid_text", kind=f"{kind!r:.30}")
        elif re.search("(?i)result|output|response|observation", kind):
            turns += [Message("tool", _result(part)), Message(role, "")]
            continue
        else:
            calls = read_calls(part.get("value", part.get("text", part.get(kind, part))))
        last = turns[-1]
        turns[-1] = Message(
            role,
            "\n".join(filter(None, (last.content, content))),
            "\n".join(filter(None, (last.reasoning, reasoning))),
            last.calls + calls,
        )
    said = [turn for turn in turns if turn != Message(role, "")]
    return said or turns


def read_message(word: str, message: Mapping[str, Any]) -> list[Message]:
    """What a message says whose role is this word of `ROLES`: mostly one, or several where results
    of tools stand among its parts.
    """
    role = ROLES[word]
    key = "content" if "content" in message else "value" if "value" in message else "text"
    key = key if key in message else "parts"  # Gemini's
    value = message.get(key)
    if isinstance(value, str) and role == "user" and _RESPONSES.match(value.strip()):
        role = "tool" if not clean(_RESPONSES.sub("", value)) else role  # Hermes's and Qwen's
    if len(message) == 2 and type(value) is str and role != "tool" and word not in _CALLING:
        return [Message(role, value)]  # most messages there are
    parts = value if isinstance(value, list) and any(isinstance(p, dict) for p in value) else []
    typed = any("type" in part or key == "parts" for part in parts if isinstance(part, dict))
    if role == "tool" and isinstance(value, dict | list) and not typed:
        return [Message(role, json_text(value))]
    if role == "tool" and isinstance(value, str) and not clean(_RESPONSES.sub("", value)):
        results = _RESPONSES.findall(value) or [value]  # Hermes's tags
        return [Message(role, result) for result in results]
    if word in _CALLING and isinstance(value, dict | list):
        turns = [Message(role, "", "", read_calls(value))]
    else:
        turns = _of_parts(role, parts) if parts else [Message(role, text_of(value, key))]
    if role != "assistant":
        return turns
    if word in _CALLING:
        turns[-1] = with_calls(turns[-1], listed=True)
        if not turns[-1].calls:
            raise RowError("row.call", "invalid_text", found=f"{turns[-1].content!r:.60}")
    thoughts = (text_of(message[name], name) for name in THOUGHTS if message.get(name))
    if thought := next(filter(clean, thoughts), ""):
        turns[0] = turns[0]._replace(reasoning=thought)
    for name in ("tool_calls", "function_call"):
        if (calls := message.get(name)) and calls == calls:
            joined(turns, Message(role, "", "", read_calls(calls)))
    if not is_trained(message):
        turns = [turn._replace(trained=turn.role != role) for turn in turns]
    return turns
