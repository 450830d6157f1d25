"""Tools in each model's own format: how the system turn announces them, and how the assistant calls
them.

A conversation brings both in JSON: the tools as OpenAI lists them, a call as {"name": …,
"arguments": {…}}, one or a list. Sources: the chat code published with each checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

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
    arguments: Callable[[str, Any], str]
    # (what opens an answer, names, texts of the calls) -> the parts of each turn.
    call: Callable[[Parts, list[str], list[str]], list[Parts]]
    # Where the announcement stands in the system turn, or that it has a turn of its own.
    place: Literal["behind words", "before words", "own turn"] = "behind words"


def read_tools(text: str) -> Tools:
    """The functions of a `tools` JSON text, without OpenAI's {"type": "function", …} wrapper; [] if
    it is none.
    """
    tools = [tool.get("function", tool) for tool in _listed(text) if isinstance(tool, dict)]
    return [tool for tool in tools if isinstance(tool, dict) and "name" in tool]


def read_calls(content: str) -> list[tuple[str, Any]]:
    """(name, arguments) of each call, if the content is function calls in JSON, else []."""
    calls = []
    for call in _listed(content):
        keys = call.keys() & {"arguments", "parameters"} if isinstance(call, dict) else ()
        if not keys or "name" not in call:
            return []
        calls.append((call["name"], call[min(keys)]))
    return calls


def _listed(text: str) -> list[Any]:
    """The elements of a JSON list, or the one value that is none; [] if it is no JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return []
    return value if isinstance(value, list) else [value]


def announced(style: str, tools: Tools, words: bool) -> tuple[str, str, str]:
    """What tells the model of its tools, in a system turn with or without words: markup, the tools,
    markup.
    """
    texts = _TEXTS.get(style, {})
    before, behind = texts.get("before", ""), texts.get("after", "")
    return TOOL_STYLES[style].announce(before, behind, tools, words)


def called(style: str, opening: Parts, content: str) -> list[Parts]:
    """The turns of an answer that is nothing but calls; [] for any other."""
    calls = read_calls(content)
    texts = [TOOL_STYLES[style].arguments(*call) for call in calls]
    return TOOL_STYLES[style].call(opening, [name for name, _ in calls], texts) if calls else []


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


def _python(name: str, values: Any) -> str:
    if not isinstance(values, dict):
        return to_json(values)
    pairs = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return f"```python\ntool_call({pairs})\n```"


def _xml(name: str, values: Any) -> str:
    """Each argument on lines of its own, lists and objects as JSON."""
    text = f"<function={name}>\n"
    for key, value in values.items() if isinstance(values, dict) else ():
        written = to_json(value) if isinstance(value, list | dict) else str(value)
        text += f"<parameter={key}>\n{written}\n</parameter>\n"
    return text + "</function>"


def _in_tags(opening: Parts, names: list[str], texts: list[str]) -> list[Parts]:
    parts = list(opening)
    for number, text in enumerate(texts):
        tag = "\n" * bool(number) + "<tool_call>\n"
        parts += [(tag, True), (text, False), ("\n</tool_call>", True)]
    return [parts]


def _by_name(opening: Parts, names: list[str], texts: list[str]) -> list[Parts]:
    """Each call in a turn that opens with the tool's name, in place of what opens an answer."""
    pairs = zip(names, texts, strict=True)
    return [[(f"{name}\n", False), ("", True), (text, False)] for name, text in pairs]


TOOL_STYLES = {
    "qwen": ToolStyle(
        announce=lambda before, behind, tools, words: (
            "\n\n" * words + before,
            _qwen_lines(tools),
            behind,
        ),
        arguments=lambda name, values: to_json({"name": name, "arguments": values}),
        call=_in_tags,
    ),
    "qwen3.5": ToolStyle(
        announce=lambda before, behind, tools, words: (
            before,
            _qwen_lines(tools),
            behind + "\n\n" * words,
        ),
        arguments=_xml,
        call=_in_tags,
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
        call=lambda opening, names, texts: [
            [
                *opening,
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
        call=lambda opening, names, texts: [
            [*opening, (texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]", False)]
        ],
    ),
    "react": ToolStyle(
        announce=lambda before, behind, tools, words: (
            before,
            "".join(map(_react_tool, tools)) + behind % ", ".join(tool["name"] for tool in tools),
            "",
        ),
        arguments=lambda name, values: f"Action: {name}\nAction Input: {to_json(values)}",
        call=lambda opening, names, texts: [[*opening, ("\n".join(texts), False)]],
    ),
}
