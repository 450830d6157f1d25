"""chrF, chrF+ and chrF++ against sacrebleu, on rows of our own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.chrf import CHRF as ORACLE

from cllm.metrics import CHRF, corpus_chrf, sentence_chrf
from cllm.metrics.score import VERSION

PAIRS = [
    ("小猫在窗台上晒太阳。", ["小猫趴在窗台上晒太阳。", "窗台上的小猫晒着太阳。"]),
    (
        "用 Python 3.11 训练 8 小时，(loss) 降到 1.25。",
        ["用 Python 3.10 训练 6 小时，loss 降到 1.52。", "训练了 8 小时，loss 为 1.25."],
    ),
    ('He said: "go!" and left (quickly).', ['"Go," he said, and (quickly) left.']),
    ("天", ["天"]),
    ("雨", ["晴", ""]),
    ("", ["空"]),
    (" \t", [""]),
]
CONFIGS: list[dict[str, object]] = [
    {},
    {"word_order": 1},
    {"word_order": 2},
    {"beta": 3},
    {"char_order": 2},
]
TEXT = st.text(st.sampled_from("的一是天气好。， aBc!(.09\n"), max_size=20)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_sacrebleu(config: dict[str, object]) -> None:
    for hypothesis, references in PAIRS:
        assert sentence_chrf(hypothesis, references, **config).value == pytest.approx(
            ORACLE(**config).sentence_score(hypothesis, references).score, abs=1e-8
        )
    streams = [
        [references[k] if k < len(references) else None for _, references in PAIRS]
        for k in range(2)
    ]
    metric = ORACLE(**config)
    theirs = metric.corpus_score([hypothesis for hypothesis, _ in PAIRS], streams)
    ours = corpus_chrf([hypothesis for hypothesis, _ in PAIRS], streams, **config)
    assert ours.value == pytest.approx(theirs.score, abs=1e-8)
    assert ours.name == theirs.name
    assert (
        ours.signature.rpartition("version:")[0]
        == str(metric.get_signature()).rpartition("version:")[0]
    )


@settings(deadline=None, max_examples=60)
@given(
    text=TEXT.filter(str.strip),
    references=st.lists(TEXT, min_size=1, max_size=3),
    word_order=st.sampled_from([0, 2]),
)
def test_identity_is_100_and_reference_order_does_not_matter(
    text: str, references: list[str], word_order: int
) -> None:
    assert sentence_chrf(text, [*references, text], word_order=word_order).value == pytest.approx(
        100
    )
    forward = sentence_chrf(text, references, word_order=word_order).value
    assert forward == sentence_chrf(text, references[::-1], word_order=word_order).value
    assert forward == pytest.approx(
        ORACLE(word_order=word_order).sentence_score(text, references).score, abs=1e-8
    )


@settings(deadline=None, max_examples=40)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_corpus_is_the_sum_of_statistics(pairs: list[tuple[str, str]]) -> None:
    metric = CHRF()
    hypotheses, references = (list(side) for side in zip(*pairs, strict=True))
    totals = [
        sum(column) for column in zip(*(metric.statistics(h, [r]) for h, r in pairs), strict=True)
    ]
    assert corpus_chrf(hypotheses, [references]).value == metric.score(totals).value


def test_prints_its_parts_and_signature() -> None:
    assert str(sentence_chrf("天气好", ["天气很好"], word_order=2)) == (
        f"chrF2++|nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|{VERSION} = 28.68 (precision = 37.5, recall = 27.083)"
    )


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="write \\[reference\\]"):
        sentence_chrf("天", "天")
    with pytest.raises(ValueError, match="same length"):
        corpus_chrf(["天"], [["天", "气"]])
