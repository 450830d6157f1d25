"""Whatever a file holds: nothing raises, every row ends in one place, and no text appears that the
file does not have.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cllm.data import (
    Conversation,
    Message,
    Reject,
    TextOptions,
    read_conversations,
    write_conversations,
)
from cllm.data.schema import REASONS, Normalizer
from cllm.data.turns import SCHEMA_KEYS, is_turn

QUICK = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
PIECES = [
    "甲",
    "乙。",
    "\u200b",
    "\ufeff",
    "\r\n",
    "\t",
    "\x00",
    "\u3000",
    "\ud83d",
    "\u2028",
    "无输入",
    "Human: ",
    "Assistant: ",
]
PIECES += ["[客户]", "[律师]", "a{b}", '"']
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=4).map("".join)
NAMES = "from role value human assistant q a message label tools category tool_calls turn_1".split()
KEYS = st.sampled_from([*sorted(SCHEMA_KEYS), *NAMES])
ROLE = st.sampled_from(
    "human gpt user assistant system sys usr tool observation function_call moderator".split()
)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
FIELDS = {"role": ROLE, "from": ROLE, "tool_calls": SCALAR}
FIELDS |= dict.fromkeys(["content", "value", "message", "human", "assistant"], TEXT)
TURNS = st.lists(st.fixed_dictionaries({}, optional=FIELDS), max_size=4)
JSON = st.recursive(
    SCALAR | TURNS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=6,
)
GOOD = st.fixed_dictionaries(
    {"instruction": TEXT, "output": TEXT}, optional={"input": TEXT, "system": TEXT, "history": JSON}
)
ROW = (
    st.dictionaries(KEYS, JSON | TURNS, max_size=5)
    | GOOD
    | st.fixed_dictionaries({"messages": TURNS})
)
ROWS = st.lists(ROW, min_size=1, max_size=4)
BYTES = st.binary(max_size=300) | st.lists(st.binary(max_size=30), max_size=8).map(b"\n".join)


def read_bytes(content: bytes, name: str = "rows.json") -> tuple[list[Conversation], list[Reject]]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        return read_conversations(path)


def check(result: Conversation | Reject, source: str) -> None:
    if isinstance(result, Reject):
        assert result.reason in REASONS and result.detail
        return
    assert result.messages and result.messages[-1].role == "assistant"
    for message in result:
        assert message.content == message.content.strip() != ""
        message.content.encode("utf-8")
        assert not any(bad in message.content for bad in "\r\x00\u200b\ufeff\u2060")
        for foreign in ("None", "nan", "{'", "\ufffd", "True", "inf"):
            assert foreign not in message.content or foreign in source


@QUICK
@given(row=JSON | ROW)
def test_any_row_is_a_conversation_or_a_reject(row: Any) -> None:
    for kind in ("chat", "text"):
        check(Normalizer(None, kind)(row), repr(row))
    check(
        Normalizer({"user": "{instruction}{text}", "assistant": "output", "history": "history"})(
            row
        ),
        repr(row),
    )


@QUICK
@given(rows=ROWS, indent=st.sampled_from([None, 1]))
def test_valid_and_rejected_are_all_rows(rows: list[Any], indent: int | None) -> None:
    assume(not all(map(is_turn, rows)))  # an array of nothing else is one conversation
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, rows[0]])
    conversations, rejects = read_bytes(lines.encode())
    assert len(conversations) + len(rejects) == len(rows) + 1
    listed, refused = read_bytes(json.dumps([*rows, rows[0]], indent=indent).encode())
    assert [c.messages for c in listed] == [c.messages for c in conversations]
    assert [r.reason for r in refused] == [r.reason for r in rejects]
    for result in [*conversations, *rejects]:
        check(result, repr(rows))


@QUICK
@given(content=BYTES, name=st.sampled_from(["a.json", "a.csv", "a.gz", "a"]))
def test_any_bytes_are_read_without_an_exception(content: bytes, name: str) -> None:
    conversations, rejects = read_bytes(content, name)
    for result in [*conversations, *rejects]:
        check(result, content.decode("utf-8", "replace") + content.decode("gb18030", "replace"))


@QUICK
@given(
    rows=ROWS,
    encoding=st.sampled_from(["utf-8", "gb18030", "utf-16"]),
    noise=st.binary(max_size=6),
    data=st.data(),
)
def test_damaged_files_are_read_without_an_exception(
    rows: list[Any], encoding: str, noise: bytes, data: st.DataObject
) -> None:
    forms = [
        "\n".join(json.dumps(row) for row in rows),
        json.dumps(rows),
        json.dumps(rows, indent=1),
        json.dumps({"data": rows}),
    ]
    content = data.draw(st.sampled_from(forms)).encode(encoding)
    cut = data.draw(st.integers(0, len(content)))
    for damaged in (
        content[:cut],
        content[:cut] + noise + content[cut:],
        content[:cut] + content[cut + 3 :],
    ):
        conversations, rejects = read_bytes(damaged)
        for result in [*conversations, *rejects]:
            check(
                result,
                repr(rows)
                + damaged.decode("utf-8", "replace")
                + damaged.decode("gb18030", "replace"),
            )


@QUICK
@given(rows=ROWS, kind=st.sampled_from(["chat", "text"]))
def test_writing_and_reading_again_is_the_identity(rows: list[Any], kind: str) -> None:
    conversations = [
        result for row in rows if isinstance(result := Normalizer(None, kind)(row), Conversation)
    ]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "clean.jsonl"
        assert write_conversations(conversations, path, kind) == len(conversations)
        again, rejects = read_conversations(path, kind=kind)
    assert rejects == []
    assert [(c.messages, c.category, c.tools) for c in again] == [
        (c.messages, c.category, c.tools) for c in conversations
    ]


@QUICK
@given(text=st.text(max_size=60))
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    first = Normalizer(None, "text")({"text": text})
    check(first, text)
    if isinstance(first, Conversation):
        assert Normalizer(None, "text")({"text": first.messages[0].content}) == first
    check(
        Normalizer(
            None, "text", TextOptions(fold_width=True, unescape_html=True, mask_personal=True)
        )({"text": text}),
        text,
    )


@pytest.mark.parametrize("text", ["None", " 甲", "甲\r", "", "\ud83d"])
def test_the_checks_above_can_fail(text: str) -> None:
    with pytest.raises((AssertionError, UnicodeEncodeError)):
        check(Conversation((Message("user", "甲"), Message("assistant", text))), "甲")
