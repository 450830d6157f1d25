"""The length policy and the invariant: every kept example's last supervised token is the end
token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.encode import IGNORE_INDEX, Example, Ids, encode_all, encode_set
from cllm.data.message import Message
from cllm.data.schema import Conversation
from cllm.data.template import TEMPLATES, Segment, render

END = 0


class Characters:
    """One id per character, END for the template's end token."""

    def __init__(self, name: str = "chatml") -> None:
        self.template = TEMPLATES[name]

    def segments(self, conversation: Conversation) -> list[Segment]:
        return render(conversation, self.template)

    def encode_batch(self, batch: Iterable[Iterable[Segment]]) -> list[Ids]:
        return [self._encode(list(segments)) for segments in batch]

    def _encode(self, segments: list[Segment]) -> Ids:
        pairs = [
            (id, id if s.supervised else IGNORE_INDEX)
            for s in segments
            for id in ([END] if s.markup and s.text == self.template.end else map(ord, s.text))
        ]
        return array("i", [id for id, _ in pairs]), array("i", [label for _, label in pairs])

    def text(self, example: Example) -> str:
        return "".join("<|im_end|>" if id == END else chr(id) for id in example.input_ids)


def conversation(*words: str, system: str = "") -> Conversation:
    start = [Message("system", system)] if system else []
    return Conversation(
        messages=(
            *start,
            *(Message("assistant" if i % 2 else "user", word) for i, word in enumerate(words)),
        )
    )


def encode(
    conversation: Conversation,
    tokenizer: Characters,
    max_tokens: int,
    truncate: Literal["drop", "prompt"] = "drop",
) -> Example | str:
    return next(encode_all([conversation], tokenizer, max_tokens=max_tokens, truncate=truncate))


def kept(result: Example | str) -> Example:
    assert isinstance(result, Example), result
    return result


def test_labels_are_the_answer_and_its_end() -> None:
    example = kept(encode(conversation("问", "答案"), Characters(), max_tokens=100))
    assert [label for label in example.labels if label != IGNORE_INDEX] == [
        ord("答"),
        ord("案"),
        END,
    ]
    assert all(
        label in (IGNORE_INDEX, id)
        for id, label in zip(example.input_ids, example.labels, strict=True)
    )


def test_exactly_the_limit_is_kept_and_one_more_is_dropped() -> None:
    whole = kept(encode(conversation("问", "答"), Characters(), max_tokens=100))
    length = len(whole.input_ids)
    assert encode(conversation("问", "答"), Characters(), max_tokens=length) == whole
    assert encode(conversation("问", "答"), Characters(), max_tokens=length - 1) == "too_long"


def test_truncating_leaves_out_the_oldest_rounds_first_but_not_the_system_text() -> None:
    long = conversation("旧问" * 20, "旧答", "新问", "新答", system="规矩")
    wanted = kept(encode(conversation("新问", "新答", system="规矩"), Characters(), max_tokens=500))
    assert encode(long, Characters(), max_tokens=len(wanted.input_ids), truncate="prompt") == wanted


def test_truncating_cuts_the_start_of_the_last_question() -> None:
    tokenizer = Characters()
    whole = kept(encode(conversation("0123456789", "答"), tokenizer, max_tokens=500))
    shorter = kept(
        encode(
            conversation("0123456789", "答"),
            tokenizer,
            max_tokens=len(whole.input_ids) - 4,
            truncate="prompt",
        )
    )
    assert tokenizer.text(shorter) == tokenizer.text(whole).replace("0123456789", "456789")


def test_an_answer_that_does_not_fit_is_too_long_all_the_same() -> None:
    assert (
        encode(conversation("问", "答" * 80), Characters(), max_tokens=60, truncate="prompt")
        == "too_long"
    )


def test_nothing_to_train_is_a_reason() -> None:
    only_a_question = Conversation(messages=(Message("user", "问"),))
    assert encode(only_a_question, Characters(), max_tokens=100) == "no_supervised_token"


def test_a_question_is_never_cut_to_nothing() -> None:
    bare = kept(encode(conversation("", "答"), Characters(), max_tokens=500))
    assert (
        encode(
            conversation("问题", "答"),
            Characters(),
            max_tokens=len(bare.input_ids),
            truncate="prompt",
        )
        == "too_long"
    )


def test_a_document_is_split_into_rows_that_hold_all_of_it() -> None:
    document = Conversation(messages=(Message("assistant", "长" * 25),))
    pieces = encode_set([document], Characters("text"), kind="text", max_tokens=10)[0]
    assert [len(piece.input_ids) for piece in pieces] == [10, 10, 6]
    assert [id for piece in pieces for id in piece.labels] == [ord("长")] * 25 + [END]


def test_many_are_encoded_in_order() -> None:
    many = [conversation(f"问{i}", "答" * (i % 3) * 40) for i in range(1100)]  # more than one batch
    results = list(encode_all(many, Characters(), max_tokens=100))
    assert results == [encode(one, Characters(), max_tokens=100) for one in many]
    assert results.count("too_long") == len([i for i in range(1100) if i % 3 == 2])


@pytest.mark.parametrize("truncate", ["drop", "prompt"])
@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.text("好x", max_size=30), min_size=1, max_size=3), limit=st.integers(20, 200)
)
def test_a_kept_example_fits_and_ends_with_the_end_token(
    truncate: Literal["drop", "prompt"], words: list[str], limit: int
) -> None:
    turns = [part for word in words for part in (word, word + "答")]
    result = encode(conversation(*turns), Characters(), max_tokens=limit, truncate=truncate)
    if not isinstance(result, str):
        assert len(result.input_ids) == len(result.labels) <= limit
        assert [label for label in result.labels if label != IGNORE_INDEX][-1] == END
        assert Characters().text(result).endswith(f"{turns[-1]}<|im_end|>\n")
