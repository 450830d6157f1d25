"""ROUGE by both definitions and LLaMA-Factory's numbers against literal values of the packages, on
rows of our own.
"""

from __future__ import annotations

import jieba
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cllm.metrics import ROUGE, corpus_score, generation_scores, rouge, sentence_bleu, sentence_chrf
from cllm.metrics.rouge import _lcs_positions, lcs_length
from cllm.metrics.score import VERSION

CAT = ("小猫在窗台上晒太阳。", ["小猫趴在窗台上晒太阳。"])
STEPS = (
    "先洗菜，再切菜，最后下锅。\n\n火不要太大！",
    ["先洗菜。\n再切菜，最后下锅！\n火不要太大。", "先把菜洗好，再切。"],
)
DOTS = ("等一等.......好了吗？\n \n好了。", ["等一等......好了吗？好了。"])
MIXED = (
    "用 Python 3.11 训练 8 小时，loss 降到 1.25。",
    ["用 Python 3.10 训练 6 小时，loss 降到 1.52。"],
)
LOOP = ("好好好好", ["好"])
QUOTES = ("他说：“走吧……”\r\n她点点头。", ["他说：“走吧。”她没有点头。"])

# rouge-score 0.1.2, score_multi, F * 100 of rouge1, rouge2, rougeL, rougeLsum: over characters,
# over jieba's words
CLIPPED = [
    (CAT, [95.2380952381, 84.2105263158, 95.2380952381, 95.2380952381], [80, 50, 80, 80]),
    (
        STEPS,
        [94.7368421053, 72.2222222222, 84.2105263158, 94.7368421053],
        [92.8571428571, 61.5384615385, 78.5714285714, 92.8571428571],
    ),
    (
        DOTS,
        [96.9696969697, 96.7741935484, 96.9696969697, 96.9696969697],
        [85.7142857143, 66.6666666667, 85.7142857143, 85.7142857143],
    ),
    (
        MIXED,
        [92.8571428571, 74.0740740741, 89.2857142857, 89.2857142857],
        [72.7272727273, 40, 72.7272727273, 72.7272727273],
    ),
    (LOOP, [40, 0, 40, 40], [0, 0, 0, 0]),
    (
        QUOTES,
        [78.5714285714, 61.5384615385, 78.5714285714, 78.5714285714],
        [75, 54.5454545455, 75, 75],
    ),
]
# rouge-chinese 1.0.3 against the first reference, F * 100 of rouge-1, rouge-2, rouge-l
SETS = [
    (CAT, [95.2380947392, 84.2105258172, 95.2380947392], [79.9999995, 49.9999995, 79.9999995]),
    (STEPS, [99.9999995, 76.9230764234, 80.9523804524], [99.9999995, 66.6666661667, 74.9999995]),
    (
        DOTS,
        [94.1176465606, 81.8181813223, 91.4285709322],
        [87.4999995078, 53.3333328533, 82.352940692],
    ),
    (
        MIXED,
        [93.6170207768, 74.0740735741, 89.2857137857],
        [72.7272722273, 39.9999995, 72.7272722273],
    ),
    (LOOP, [99.9999995, 0, 39.99999968], [0, 0, 0]),
    (
        QUOTES,
        [87.9999995008, 61.5384610385, 78.5714280714],
        [81.8181813182, 54.5454540455, 74.9999995],
    ),
]
LLAMA_FACTORY = [  # rouge-1, rouge-2, rouge-l, bleu-4 of the first reference
    (CAT, [80.0, 50.0, 80.0, 75.165]),
    (STEPS, [100.0, 66.6667, 75.0, 65.476]),
    (DOTS, [87.5, 53.3333, 82.3529, 69.3396]),
    (MIXED, [72.7273, 40.0, 72.7273, 77.3169]),
    (LOOP, [0.0, 0.0, 0.0, 15.9736]),
    (QUOTES, [81.8182, 54.5455, 75.0, 40.325]),
    (("天", ["天"]), [100.0, 0.0, 100.0, 35.3553]),
    ((" \n", ["有字"]), [0.0, 0.0, 0.0, 0.0]),
    (("有字", [""]), [0.0, 0.0, 0.0, 0.0]),
]
Pair = tuple[str, list[str]]
TOKENS = st.text(st.sampled_from("天气好很。"), max_size=12)
LINES = st.text(st.sampled_from("天气好很。\n"), max_size=16)


@pytest.mark.parametrize(("pair", "characters", "words"), CLIPPED)
def test_clipped_counts_equal_rouge_score(
    pair: Pair, characters: list[float], words: list[float]
) -> None:
    for tokenize, expected in [("char", characters), ("jieba", words)]:
        scores = rouge(*pair, tokenize=tokenize)
        assert list(scores) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        assert [score.value for score in scores.values()] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("pair", "characters", "words"), SETS)
def test_sets_equal_rouge_chinese(pair: Pair, characters: list[float], words: list[float]) -> None:
    for tokenize, expected in [("char", characters), ("jieba", words)]:
        scores = rouge(pair[0], pair[1][:1], tokenize=tokenize, counts="set")
        assert [score.name for score in scores.values()] == [
            "rouge-chinese-1",
            "rouge-chinese-2",
            "rouge-chinese-l",
        ]
        assert [score.value for score in scores.values()] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("pair", "expected"), LLAMA_FACTORY)
def test_generation_scores_equal_llama_factory(pair: Pair, expected: list[float]) -> None:
    assert generation_scores(pair[0], pair[1][0]) == dict(
        zip(["rouge-1", "rouge-2", "rouge-l", "bleu-4"], expected, strict=True)
    )


def table(hypothesis: str, reference: str) -> list[list[int]]:
    """The textbook's quadratic table."""
    rows = [[0] * (len(hypothesis) + 1) for _ in range(len(reference) + 1)]
    for i, expected in enumerate(reference):
        for j, found in enumerate(hypothesis):
            rows[i + 1][j + 1] = (
                rows[i][j] + 1 if expected == found else max(rows[i][j + 1], rows[i + 1][j])
            )
    return rows


@settings(deadline=None, max_examples=200)
@given(hypothesis=TOKENS, reference=TOKENS)
def test_bit_parallel_lcs_equals_the_table(hypothesis: str, reference: str) -> None:
    rows = table(hypothesis, reference)
    assert lcs_length(tuple(hypothesis), tuple(reference)) == rows[-1][-1]
    i, j, path = len(reference), len(hypothesis), []
    while i and j:
        if reference[i - 1] == hypothesis[j - 1]:
            i, j = i - 1, j - 1
            path.append(i)
        elif rows[i][j - 1] > rows[i - 1][j]:
            j -= 1
        else:
            i -= 1
    assert _lcs_positions(tuple(hypothesis), tuple(reference)) == path


def test_lcs_of_long_texts() -> None:
    shorter, longer = tuple("天气" * 1000), tuple("天很气" * 1000)
    assert lcs_length(shorter, longer) == lcs_length(longer, shorter) == 2000


@settings(deadline=None, max_examples=60)
@given(text=LINES.filter(str.strip), references=st.lists(LINES, min_size=1, max_size=3))
def test_identity_is_100_and_reference_order_does_not_matter(
    text: str, references: list[str]
) -> None:
    scores = rouge(text, [*references, text], tokenize="char")
    present = scores if len(text.replace("\n", "")) > 1 else scores.keys() - {"rouge2"}
    assert [scores[kind].value for kind in present] == pytest.approx([100.0] * len(present))
    forward, backward = (
        rouge(text, order, tokenize="char") for order in (references, references[::-1])
    )
    assert [score.value for score in forward.values()] == [
        score.value for score in backward.values()
    ]


def test_a_corpus_score_is_the_mean_over_pairs() -> None:
    metric = ROUGE("rouge1", "char")
    score = corpus_score(metric, ["天气好", "好"], [["天气很好", "差"]])
    assert score.value == pytest.approx((100 * 6 / 7 + 0) / 2)
    assert score.parts == pytest.approx({"precision": 50, "recall": 37.5})


def test_empty_texts_score_0_and_signatures_name_the_choices() -> None:
    for counts in ("clipped", "set"):
        for hypothesis, reference in [("", ""), ("", "天"), ("天", ""), ("\n\u3000", "天")]:
            assert {
                score.value for score in rouge(hypothesis, [reference], counts=counts).values()
            } == {0}
    assert str(rouge("天气好", ["天气很好"], tokenize="char")["rougeL"]) == (
        f"rougeL|nrefs:1|tok:char|counts:clipped|{VERSION} = 85.71 (precision = 100, recall = 75)"
    )
    assert (
        f"tok:jieba-{jieba.__version__}|counts:set"
        in rouge("天", ["天"], counts="set")["rouge1"].signature
    )


@settings(deadline=None, max_examples=60)
@example(hypothesis=" ", reference=" ", tokenize="zh")
@given(
    hypothesis=st.text(max_size=30),
    reference=st.text(max_size=30),
    tokenize=st.sampled_from(["zh", "13a", "intl", "none", "char", "jieba"]),
)
def test_any_text_has_a_score_and_an_empty_one_scores_0(
    hypothesis: str, reference: str, tokenize: str
) -> None:
    for pair in ((hypothesis, reference), (reference, "")):
        *rouges, bleu4 = generation_scores(*pair).values()
        found = [
            *rouges,
            *(score.value for score in rouge(pair[0], [pair[1]], tokenize=tokenize).values()),
        ]
        found += [
            sentence_bleu(pair[0], [pair[1]], tokenize=tokenize).value,
            sentence_chrf(pair[0], [pair[1]], word_order=2).value,
        ]
        assert all(0 <= value <= 100 + 1e-9 for value in [*found, bleu4])
        assert (pair[0] and pair[1]) or bleu4 == 0
        assert (pair[0].strip() and pair[1].strip()) or not any(found), found


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="write \\[reference\\]"):
        rouge("天", "天")
    with pytest.raises(ValueError, match="unknown counts 'sets'; choose one of: clipped, set"):
        rouge("天", ["天"], counts="sets")
    with pytest.raises(ValueError, match="unknown kind 'rougeLsum'"):
        ROUGE("rougeLsum", counts="set")
    with pytest.raises(ValueError, match="each pair needs a string"):
        generation_scores(["天"], "天")  # type: ignore[arg-type]
