"""Tools in each model's own format: how the system turn announces them, and how the assistant calls
them.

A conversation brings the tools in JSON, as OpenAI lists them. Sources: the chat code published with
each checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from cllm.data.message import Call
from cllm.messages import load_toml, to_json

Tools: TypeAlias = list[dict[str, Any]]
Parts: TypeAlias = list[tuple[str, bool]]  # (text, markup); an empty one is an edge of two strings
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
    # Where the announcement stands in the system turn, or that it has a turn of its own.
    place: Literal["behind words", "before words", "own turn"] = "behind words"


def read_tools(text: str) -> Tools:
    """The functions of a `tools` JSON text, one or a list, without OpenAI's {"type": "function", …}
    wrapper and under OpenAI's names; [] if it is anything else.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return []
    tools: Tools = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or "name" not in function:
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
    schema = tool.get("parameters") or {}
    lines = [
        f"> Tool Name: {tool['name']}",
        f"Tool Description: {tool.get('description', '')}",
        "Tool Args:",
    ]
    for name, value in (schema.get("properties") or {}).items():
        line = f"  - {name} ({value.get('type', '')}"
        if name in (schema.get("required") or []):
            line += ", required"
        line += f"): {value.get('description', '')}"
        if value.get("enum"):
            line += f", should be one of [{', '.join(map(str, value['enum']))}]"
        if value.get("items"):
            line += f", where each item should be {value['items'].get('type', '')}"
        lines.append(line)
    return "\n".join(lines) + "\n\n"


def _python(name: str, values: dict[str, Any]) -> str:
    pairs = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return f"```python\ntool_call({pairs})\n```"


def _xml(name: str, values: dict[str, Any]) -> str:
    """Each argument on lines of its own, lists and objects as JSON."""
    text = f"<function={name}>\n"
    for key, value in values.items():
        written = to_json(value) if isinstance(value, list | dict) else str(value)
        text += f"<parameter={key}>\n{written}\n</parameter>\n"
    return text + "</function>"


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
    ),
    "qwen3.5": ToolStyle(
        announce=lambda before, behind, tools, words: (
            before,
            _qwen_lines(tools),
            behind + "\n\n" * words,
        ),
        arguments=_xml,
        call=_in_tags("\n\n"),
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
    ),
    "chatglm3": ToolStyle(
        announce=lambda before, behind, tools, words: (
            "" if words else before,
            "\n" + to_json(tools, 4),
            "",
        ),
        arguments=_python,
        call=_by_name,
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
    ),
    "react": ToolStyle(
        announce=lambda before, behind, tools, words: (
            before,
            "".join(map(_react_tool, tools)) + behind % ", ".join(tool["name"] for tool in tools),
            "",
        ),
        arguments=lambda name, values: f"Action: {name}\nAction Input: {to_json(values)}",
        call=lambda opening, words, names, texts: _as_text(opening, words, "\n".join(texts)),
    ),
}
