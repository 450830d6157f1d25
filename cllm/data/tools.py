"""Tools in each model's own format: how the system turn announces them, how the assistant calls
them, and how a call is read back from an answer.

A conversation brings the tools in JSON, as OpenAI lists them. Sources: the chat code published with
each checkpoint.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from cllm.data.message import Call, read_calls
from cllm.data.text import RowError, is_deep, overlap
from cllm.messages import load_toml, to_json

Tools: TypeAlias = list[dict[str, Any]]
Parts: TypeAlias = list[tuple[str, bool]]  # (text, markup); an empty one is an edge of two strings
# (text, where a call may begin, tools) -> the calls there and where they end; None: none, or not
# yet whole
Read: TypeAlias = "Callable[[str, int, Tools], tuple[list[Call], int] | None]"
_TEXTS = load_toml("tools.toml")  # what stands before and behind the tools


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStyle:
    """One format of announcing and calling tools."""

    # (text before, text behind, tools, whether the system turn has words) -> markup, tools, markup.
    # The two texts stand in assets/tools.toml.
    announce: Callable[[str, str, Tools, bool], tuple[str, str, str]]
    # (name, arguments) -> the text of one call.
    arguments: Callable[[str, dict[str, Any]], str]
    # (what opens an answer, its words, names and texts of the calls) -> the parts of each turn.
    call: Callable[[Parts, str, list[str], list[str]], list[Parts]]
    # How calls are read from where one may begin.
    read: Read
    # What a call begins with ({}: each tool's name), `turn` included.
    opens: tuple[str, ...]
    # What stands at the end of every call; "": nothing may follow one.
    closes: str = ""
    # What an answer begins behind, where that is a part of what a call begins with.
    turn: str = ""
    # What only the one who calls the tool may write: an answer ends before it.
    stops: tuple[str, ...] = ()
    # Where the announcement stands in the system turn, or that it has a turn of its own.
    place: Literal["behind words", "before words", "own turn"] = "behind words"


def read_tools(text: str) -> Tools:
    """The functions of a `tools` JSON text, one or a list, without OpenAI's {"type": "function", …}
    wrapper and under OpenAI's names; [] if it is anything else, or too deep.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if is_deep(value):
        return []
    tools: Tools = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return []
        if "input_schema" in function:  # Anthropic's name
            function = {**function, "parameters": function["input_schema"]}
            del function["input_schema"]
        tools.append(function)
    return tools


def announced(style: str, tools: Tools, words: bool) -> tuple[str, str, str]:
    """What tells the model of its tools, in a system turn with or without words: markup, the tools,
    markup.
    """
    texts = _TEXTS.get(style, {})
    before, behind = texts.get("before", ""), texts.get("after", "")
    return TOOL_STYLES[style].announce(before, behind, tools, words)


def called(style: str, opening: Parts, words: str, calls: tuple[Call, ...]) -> list[Parts]:
    """The turns of an answer with calls, behind words or without any."""
    texts = [TOOL_STYLES[style].arguments(*call) for call in calls]
    return TOOL_STYLES[style].call(opening, words, [call.name for call in calls], texts)


def _function(tool: dict[str, Any], indent: int | None = None) -> str:
    return to_json({"type": "function", "function": tool}, indent)


def _qwen_lines(tools: Tools) -> str:
    return "".join("\n" + _function(tool) for tool in tools)


def _react_tool(tool: dict[str, Any]) -> str:
    schema = tool.get("parameters")
    properties = _part(schema, "properties")
    lines = [
        f"> Tool Name: {tool['name']}",
        f"Tool Description: {tool.get('description', '')}",
        "Tool Args:",
    ]
    for name in properties:
        value = _part(properties, name)
        line = f"  - {name} ({value.get('type', '')}"
        if name in _part(schema, "required", list):
            line += ", required"
        line += f"): {value.get('description', '')}"
        if options := _part(value, "enum", list):
            line += f", should be one of [{', '.join(map(str, options))}]"
        if items := _part(value, "items"):
            line += f", where each item should be {items.get('type', '')}"
        lines.append(line)
    return "\n".join(lines) + "\n\n"


def _python(name: str, values: dict[str, Any]) -> str:
    # the names of some tools are none in Python
    pairs = ", ".join(
        f"{key if key.isidentifier() else repr(key)}={value!r}" for key, value in values.items()
    )
    return f"```python\ntool_call({pairs})\n```"


def _xml(name: str, values: dict[str, Any]) -> str:
    """Each argument on lines of its own, lists and objects as JSON."""
    text = f"<function={name}>\n"
    for key, value in values.items():
        written = to_json(value) if isinstance(value, list | dict) else str(value)
        text += f"<parameter={key}>\n{written}\n</parameter>\n"
    return text + "</function>"


# --- Read back
def _offered(values: list[Any], tools: Tools) -> list[Call] | None:
    """The values as calls; None if one is no call of these tools, or JSON cannot say its
    arguments.
    """
    try:
        calls = list(read_calls(values))
    except (RowError, ValueError, RecursionError):
        return None
    return calls if calls and {c.name for c in calls} <= {tool["name"] for tool in tools} else None


def _json_value(text: str, at: int = 0) -> tuple[Any, int]:
    """The value behind blanks, and where it ends. Raises ValueError or RecursionError."""
    return _JSON.raw_decode(text, _BLANKS.match(text, at).end())  # type: ignore[union-attr]


def _no_number(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity, which are no JSON


_JSON = json.JSONDecoder(strict=False, parse_constant=_no_number)
_BLANKS = re.compile(r"\s*")
_STRING = r"""'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*\""""
_PYTHON = re.compile(  # up to the first closing bracket with a fence behind it outside of strings
    # the vocabulary puts a blank before a text encoded apart
    rf"<\|assistant\|>([^\n]+)\n *```python\ntool_call\(((?:{_STRING}|[^'\"])*?)\)\s*```",
    re.S,
)
# A value as JSON has it holds no = outside of its strings.
_KEYWORD = re.compile(rf"({_STRING})(\s*=)?|(?<![^,])([^,=()\[\]{{}}'\"]+)=", re.S)
_FUNCTION = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\s*")
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>(?=\s*(?:<parameter=|</function>))\s*", re.S
)
_FUNCTION_END = re.compile(r"</function>\s*(?:</tool_call>|\Z)")


def _json_calls(opening: str, closing: str) -> Read:
    """Reads JSON between two patterns: objects or lists of them that say name and arguments, or
    arguments alone behind an opening that captures the name.
    """
    begin, end = re.compile(opening), re.compile(closing)

    def read(text: str, start: int, tools: Tools) -> tuple[list[Call], int] | None:
        if not (opened := begin.match(text, start)):
            return None
        values: list[Any] = []
        at, closed = opened.end(), None
        try:
            while not closed:
                value, at = _json_value(text, at)
                values += value if isinstance(value, list) else [value]
                closed = end.match(text, at)
        except (ValueError, RecursionError):
            return None
        if begin.groups:
            values = [{"name": opened[1], "arguments": value} for value in values]
        calls = _offered(values, tools)
        return (calls, closed.end()) if calls else None

    return read


def _read_python(text: str, start: int, tools: Tools) -> tuple[list[Call], int] | None:
    """ChatGLM3's call: literals as keywords of a Python call, read as a dictionary's, so that a
    name need be none of Python's; nothing is executed.
    """
    if not (match := _PYTHON.match(text, start)):
        return None

    def entry(pair: re.Match[str]) -> str:
        name = repr(pair[3].strip()) if pair[3] else pair[1]
        return f"{name}:" if pair[2] or pair[3] else name

    try:
        values = ast.literal_eval(f"{{{_KEYWORD.sub(entry, match[2])}}}")
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return None
    calls = _offered([{"name": match[1], "arguments": values}], tools)
    return (calls, match.end()) if calls else None


def _read_xml(text: str, start: int, tools: Tools) -> tuple[list[Call], int] | None:
    """Qwen3.5's call. Its values have no quotes, so types come from the tool's schema: a string
    where it may be one (but None where that may be, too), else JSON or Python's words for it;
    without a type JSON if that is a list or an object, else a string. A string that goes on like
    the end of a parameter is cut there.
    """
    if not (function := _FUNCTION.match(text, start)):
        return None
    tool = next((tool for tool in tools if tool["name"] == function[1]), {})
    whole = _part(tool, "parameters")
    schemas = _part(_target(whole, whole) or whole, "properties")
    values, at = {}, function.end()
    while pair := _PARAMETER.match(text, at):
        values[pair[1]] = _typed(pair[2], _part(schemas, pair[1]), whole)
        at = pair.end()
    calls = _offered([{"name": function[1], "arguments": values}], tools)
    closed = _FUNCTION_END.match(text, at)
    return (calls, closed.end()) if calls and closed else None


def _part(schema: object, key: str, kind: type = dict) -> Any:
    """A part of a schema, whatever a client calls one: empty where it is not of this kind."""
    part = schema.get(key) if isinstance(schema, dict) else None
    return part if isinstance(part, kind) else kind()


def _target(schema: object, whole: object) -> Any:
    """What a part refers to in the whole schema, {} where it does not."""
    start, *steps = _part(schema, "$ref", str).split("/")
    return functools.reduce(_part, steps, whole) if start == "#" else {}


def _types(schema: object, whole: object) -> set[str]:
    """The JSON types that a part of the whole schema allows; none where it does not say."""
    types, seen, parts = set[str](), set[int](), [schema]
    for part in parts:
        if id(part) in seen:  # a type that refers to itself
            continue
        seen.add(id(part))
        named = [_part(part, "type", str), *_part(part, "type", list)]
        types.update(name for name in named if isinstance(name, str) and name)
        for several in ("anyOf", "oneOf", "allOf"):
            parts += _part(part, several, list)
        if target := _target(part, whole):
            parts.append(target)
    return types


def _typed(text: str, schema: object, whole: object) -> Any:
    types = _types(schema, whole)
    if text == "None" and "null" in types:
        return None
    if "string" in types or (not types and text.lstrip()[:1] not in ("[", "{")):
        return text
    try:
        value, end = _json_value({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text
    return text if text[end:].strip() else value


class CallReader:
    """Words and calls of an answer that arrives piece by piece: the same however it is cut. What is
    no call of these tools is words, as it stands; blanks before a call and behind the last are not.
    """

    def __init__(self, style: str, tools: Tools) -> None:
        self._style, self._tools = TOOL_STYLES[style], tools
        names = [tool["name"] for tool in tools]
        self._opens = {text.replace("{}", name) for text in self._style.opens for name in names}
        self._opening = re.compile("|".join(map(re.escape, self._opens)) or "(?!)")
        self._text = self._style.turn
        self._done = 0  # what stands before is out
        self._seen = 0  # and before this a call has begun and not ended
        self._called = False  # and nothing was said since

    def push(self, piece: str, *, last: bool = False) -> list[str | Call]:
        """What is certain now, in order; `last`: nothing follows."""
        self._text += piece
        said: list[str | Call] = []
        at, size = self._done, len(self._text)
        while match := self._opening.search(self._text, at):
            # a long call is read where it may have ended, not at every piece
            closes, read = self._style.closes, None
            behind = max(match.start(), self._seen - len(closes))
            if last or (closes and self._text.find(closes, behind) >= 0):
                read = self._style.read(self._text, match.start(), self._tools)
            if read and (last or read[1] < size):
                said += [*filter(None, [self._words(match.start()).rstrip()]), *read[0]]
                self._done = at = read[1]
                self._called = True
            elif last:
                at = match.end()
            else:
                self._seen = self._seen if read else size
                break
        stop = match.start() if match else size
        if last:
            words = self._words(size)
            words = words if words.strip() or not self._called else ""
        else:
            words = self._words(min(stop, size - overlap(self._text, self._opens))).rstrip()
        if words:
            self._called = False
            said.append(words)
            self._done = max(self._done, len(self._style.turn)) + len(words)
        return said

    def _words(self, stop: int) -> str:
        return self._text[max(self._done, len(self._style.turn)) : stop]


def parse(style: str, text: str, tools: Tools) -> tuple[str, tuple[Call, ...]]:
    """(words, calls) of a whole answer, calls of these tools only."""
    said = CallReader(style, tools).push(text, last=True)
    words = "".join(part for part in said if isinstance(part, str))
    return words, tuple(part for part in said if isinstance(part, Call))


def opened(style: str, name: str = "") -> Parts:
    """What every call begins with, or every one of this tool: a model that finds it at the end of
    its prompt writes the rest. Nothing of a format whose calls begin with the name.
    """
    pair = Call(name or "a", {}), Call(name or "b", {"c": 1})
    turns = [called(style, [], "", (call,))[0] for call in pair]
    texts = ["".join(text for text, _ in turn) for turn in turns]
    # `{` and a blank are one token with what follows
    size, parts = len(os.path.commonprefix(texts).rstrip("{(< ")), []
    for text, markup in turns[0]:
        parts.append((text[:size], markup))
        size = max(0, size - len(text))
    return parts if parts[0][0] else []


# --- The formats
def _in_tags(space: str) -> Callable[[Parts, str, list[str], list[str]], list[Parts]]:
    """Each call in tags; `space` stands between the words and the first."""

    def call(opening: Parts, words: str, names: list[str], texts: list[str]) -> list[Parts]:
        parts = [*opening, (words, False)] if words else list(opening)
        for number, text in enumerate(texts):
            before = "\n" if number else space * (words[-1:] not in ("", "\n"))
            parts += [(f"{before}<tool_call>\n", True), (text, False), ("\n</tool_call>", True)]
        return [parts]

    return call


def _by_name(opening: Parts, words: str, names: list[str], texts: list[str]) -> list[Parts]:
    """The words in a turn, then each call in a turn that opens with the tool's name, in place of
    what opens an answer.
    """
    pairs = zip(names, texts, strict=True)
    calls = [[(f"{name}\n", False), ("", True), (text, False)] for name, text in pairs]
    return [[*opening, (words, False)], *calls] if words else calls


def _as_text(opening: Parts, words: str, text: str) -> list[Parts]:
    """The calls' text on a line behind the words."""
    return [[*opening, ("\n".join(filter(None, (words.rstrip("\n"), text))), False)]]


TOOL_STYLES = {
    "qwen": ToolStyle(
        announce=lambda before, behind, tools, words: (
            "\n\n" * words + before,
            _qwen_lines(tools),
            behind,
        ),
        arguments=lambda name, values: to_json({"name": name, "arguments": values}),
        call=_in_tags("\n"),
        read=_json_calls("<tool_call>", r"\s*(?:</tool_call>|\Z)"),
        opens=("<tool_call>",),
        closes="</tool_call>",
    ),
    "qwen3.5": ToolStyle(
        announce=lambda before, behind, tools, words: (
            before,
            _qwen_lines(tools),
            behind + "\n\n" * words,
        ),
        arguments=_xml,
        call=_in_tags("\n\n"),
        read=_read_xml,
        opens=("<tool_call>",),
        closes="</tool_call>",
        place="before words",
    ),
    "glm4": ToolStyle(
        announce=lambda before, behind, tools, words: (
            before,
            "".join(f"\n\n## {tool['name']}\n\n{to_json(tool, 4)}{behind}" for tool in tools),
            "",
        ),
        arguments=lambda name, values: to_json(values),
        call=_by_name,
        read=_json_calls(r"<\|assistant\|>(.+)\n", ""),
        opens=("<|assistant|>{}\n",),
        closes="}",
        turn="<|assistant|>",
    ),
    "chatglm3": ToolStyle(
        announce=lambda before, behind, tools, words: (
            "" if words else before,
            "\n" + to_json(tools, 4),
            "",
        ),
        arguments=_python,
        call=_by_name,
        read=_read_python,
        opens=("<|assistant|>{}\n",),
        closes="\n```",  # in a string a line's end stands as \n
        turn="<|assistant|>",
    ),
    "internlm2": ToolStyle(
        announce=lambda before, behind, tools, words: ("", to_json(tools, 4), ""),
        arguments=lambda name, values: to_json({"name": name, "parameters": values}),
        call=lambda opening, words, names, texts: [
            [
                *opening,
                *([(words, False)] if words else []),
                ("<|action_start|><|plugin|>\n", True),
                ("\n".join(texts), False),
                ("<|action_end|>", True),
            ]
        ],
        read=_json_calls(r"<\|action_start\|>\s*<\|plugin\|>", r"\s*(?:<\|action_end\|>|\Z)"),
        opens=("<|action_start|>",),
        closes="<|action_end|>",
        place="own turn",
    ),
    "llama3": ToolStyle(
        announce=lambda before, behind, tools, words: (
            before,
            "".join(_function(tool, 4) + "\n\n" for tool in tools),
            "",
        ),
        arguments=lambda name, values: to_json({"name": name, "parameters": values}),
        call=lambda opening, words, names, texts: _as_text(
            opening, words, texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
        ),
        read=_json_calls(r"\n", r"\s*\Z"),
        opens=('\n{"name"', '\n{"type"', '\n[{"name"', '\n[{"type"'),
        turn="\n",
    ),
    "react": ToolStyle(
        announce=lambda before, behind, tools, words: (
            before,
            "".join(map(_react_tool, tools)) + behind % ", ".join(tool["name"] for tool in tools),
            "",
        ),
        arguments=lambda name, values: f"Action: {name}\nAction Input: {to_json(values)}",
        call=lambda opening, words, names, texts: _as_text(opening, words, "\n".join(texts)),
        read=_json_calls(r"\nAction:[ \t]*(.+?)[ \t]*\n\s*Action Input:", ""),
        opens=("\nAction:",),
        closes="}",
        turn="\n",
        stops=("\nObservation:",),
    ),
}
