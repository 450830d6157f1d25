"""BLEU and its tokenizers against sacrebleu (live) and nltk's method3 (literal values), on rows of
our own.
"""

from __future__ import annotations

from pathlib import Path

import jieba
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU as ORACLE
from sacrebleu.metrics.bleu import _get_tokenizer

from cllm.metrics import BLEU, TOKENIZERS, Score, corpus_bleu, sentence_bleu
from cllm.metrics.score import VERSION

PAIRS = [
    ("小猫在窗台上晒太阳。", ["小猫趴在窗台上晒太阳。", "窗台上的小猫晒着太阳。"]),
    ("先洗菜，再切菜，最后下锅。\n\n火不要太大！", ["先洗菜。\n再切菜，最后下锅！\n火不要太大。"]),
    (
        "用 Python 3.11 训练 8 小时，loss 降到 1.25。",
        ["用 Python 3.10 训练 6 小时，loss 降到 1.52。", "训练了 8 小时，loss 为 1.25."],
    ),
    ("他说：“走吧……”\r\n她点点头。", ["他说：“走吧。”她没有点头。"]),
    (
        "The price is $1,024.50 -- see p. 3-4, e.g. 'a&amp;b'.",
        ["The Price was $1,024.5 - see page 3, e.g. 'a&b'."],
    ),
    ("天", ["天"]),
    ("雨", ["晴", "雨雪"]),
    ("", ["空"]),
    (" \t", [""]),
]
TEXT = st.text(
    st.sampled_from("的一是天气好。，！“”…→€①あ가𠀀😀 \t\n\u3000aBc09.,-&$'%٣½"), max_size=30
)
CONFIGS = [
    {},
    {"effective_order": True},
    {"smooth": "floor", "effective_order": True},
    {"smooth": "floor", "smooth_value": 0.01},
    {"smooth": "add-k"},
    {"smooth": "add-k", "smooth_value": 0.5, "effective_order": True},
    {"smooth": "none"},
    {"max_order": 2},
    {"max_order": 6, "lowercase": True},
    *({"tokenize": name, "effective_order": True} for name in ("13a", "intl", "char", "none")),
]


def oracle(
    tokenize: str = "zh", smooth: str = "exp", max_order: int = 4, **options: object
) -> sacrebleu.BLEU:
    return ORACLE(tokenize=tokenize, smooth_method=smooth, max_ngram_order=max_order, **options)


def check(ours: Score, theirs: sacrebleu.BLEUScore) -> None:
    assert ours.value == pytest.approx(theirs.score, abs=1e-8)
    for part in ("counts", "totals", "precisions", "bp", "sys_len", "ref_len"):
        assert ours.parts[part] == pytest.approx(getattr(theirs, part), abs=1e-8), part


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_sacrebleu(config: dict[str, object]) -> None:
    for hypothesis, references in PAIRS:
        ours = sentence_bleu(hypothesis, references, **{"effective_order": False, **config})
        check(ours, oracle(**config).sentence_score(hypothesis, references))
    hypotheses = [hypothesis for hypothesis, _ in PAIRS]
    streams = [
        [references[k] if k < len(references) else None for _, references in PAIRS]
        for k in range(2)
    ]
    metric = oracle(**config)
    theirs = metric.corpus_score(hypotheses, streams)
    ours = corpus_bleu(hypotheses, streams, **config)
    check(ours, theirs)
    assert (
        ours.signature.rpartition("version:")[0]
        == str(metric.get_signature()).rpartition("version:")[0]
    )


@pytest.mark.parametrize("name", ["zh", "13a", "intl", "none", "char"])
@settings(deadline=None, max_examples=40)
@given(text=TEXT)
def test_tokenizers_equal_sacrebleu(name: str, text: str) -> None:
    tokens = [token for token in TOKENIZERS[name](text) if not token.isspace()]
    assert tokens == _get_tokenizer(name)()(text.rstrip()).split()


def test_zh_splits_the_characters_that_sacrebleu_splits() -> None:
    split = _get_tokenizer("zh")()
    characters = [
        chr(code)
        for code in [*range(0x10000), 0x20000, 0x2A6D6, 0x1F600]
        if not 0xD800 <= code < 0xE000
    ]
    for start in range(0, len(characters), 512):
        text = "".join(f"a{character}b " for character in characters[start : start + 512])
        assert TOKENIZERS["zh"](text) == split(text).split()
    assert TOKENIZERS["zh"]("a→b") == ["a", "→", "b"]
    assert TOKENIZERS["zh"]("a\U00020000b") == ["a\U00020000b"], (
        "the quirk: Extension B itself is not split"
    )


# nltk 3.10.4, sentence_bleu(..., smoothing_function=method3) * 100 over list(text) and
# list(jieba.cut(text))
METHOD3 = [
    ("小猫在窗台上晒太阳。", ["小猫趴在窗台上晒太阳。"], 75.1650114796, 42.7287006396),
    (
        "用 Python 3.11 训练 8 小时，loss 降到 1.25。",
        ["用 Python 3.10 训练 6 小时，loss 降到 1.52。"],
        77.316883521,
        54.7523566534,
    ),
    (
        "先洗菜，再切菜，最后下锅。\n\n火不要太大！",
        ["先洗菜。\n再切菜，最后下锅！\n火不要太大。", "先把菜洗好，再切。"],
        68.0043123936,
        53.580278637,
    ),
    (
        "等一等.......好了吗？\n \n好了。",
        ["等一等......好了吗？好了。"],
        69.3395566222,
        20.556680845,
    ),
    ("天", ["天"], 35.3553390593, 35.3553390593),
    ("好好好好", ["好"], 15.9735776062, 0.0),
    ("雨", ["晴"], 0.0, 0.0),
    ("\t", ["有字"], 0.0, 0.0),
]


@pytest.mark.parametrize(("hypothesis", "references", "characters", "words"), METHOD3)
def test_method3_equals_nltk(
    hypothesis: str, references: list[str], characters: float, words: float
) -> None:
    assert sentence_bleu(
        hypothesis, references, tokenize="char", smooth="method3"
    ).value == pytest.approx(characters, abs=1e-8)
    assert sentence_bleu(
        hypothesis, references, tokenize="jieba", smooth="method3"
    ).value == pytest.approx(words, abs=1e-8)


@settings(deadline=None, max_examples=40)
@given(
    text=TEXT.filter(str.strip),
    references=st.lists(TEXT, max_size=3),
    tokenize=st.sampled_from(["zh", "13a", "intl", "char", "none"]),
)
def test_identity_is_100_and_reference_order_does_not_matter(
    text: str, references: list[str], tokenize: str
) -> None:
    if BLEU(tokenize).statistics(text, [""])[0]:  # 13a may leave no token, for instance of "-\n"
        assert sentence_bleu(text, [*references, text], tokenize=tokenize).value == pytest.approx(
            100
        )
    forward = sentence_bleu(text, [*references, "天气好"], tokenize=tokenize)
    assert forward == sentence_bleu(text, ["天气好", *references[::-1]], tokenize=tokenize)


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5),
    smooth=st.sampled_from(["exp", "floor", "add-k", "none", "method3"]),
)
def test_corpus_is_the_sum_of_statistics(pairs: list[tuple[str, str]], smooth: str) -> None:
    metric = BLEU("char", smooth)
    hypotheses, references = (list(side) for side in zip(*pairs, strict=True))
    totals = [
        sum(column) for column in zip(*(metric.statistics(h, [r]) for h, r in pairs), strict=True)
    ]
    score = corpus_bleu(hypotheses, [references], tokenize="char", smooth=smooth)
    assert score.parts == metric.score(totals).parts
    assert 0 <= score.value <= 100 + 1e-9


def test_prints_its_parts_and_signature() -> None:
    assert str(corpus_bleu(["今天天气好", "好"], [["今天天气很好", "好"], [None, "很好"]])) == (
        f"BLEU|nrefs:var|case:mixed|eff:no|tok:zh|smooth:exp|{VERSION} = 59.86 "
        "(counts = 6/3/2/1, totals = 6/4/3/2, precisions = 100/75/66.667/50, bp = 0.846, sys_len = 6, ref_len = 7)"
    )
    score = sentence_bleu("好", ["好"], tokenize="jieba", smooth="add-k", smooth_value=0.5)
    assert f"tok:jieba-{jieba.__version__}|smooth:add-k[0.50]" in score.signature


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("一句", [["一句"]]), "bare string or a single value, as hypotheses;"),
        ((["一句"], "一句"), "bare string or a single value, as references;"),
        ((["一句", "二"], [["一", "二"], "一句"]), r"as references\[1\];"),
        ((["一", "二"], [["一", "二"], ["一"]]), r"2 hypotheses and streams of \[2, 1\]"),
        ((["一"], []), "1 hypotheses and streams of"),
        (([], [[]]), "at least 1"),
        ((["一", "二"], [["一", None]]), r"positions \[1\]"),
        ((["一", 2], [["一", "二"]]), r"positions \[1\]"),
    ],
)
def test_corpus_mistakes_are_named(arguments: tuple[object, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus_bleu(*arguments)  # type: ignore[arg-type]


def test_sentence_and_option_mistakes_are_named() -> None:
    for hypothesis, references in [
        ("一句", "一句"),
        (["一句"], ["一句"]),
        ("一句", []),
        ("一句", [None]),
        ("一句", [["一句"]]),
    ]:
        with pytest.raises(ValueError, match="reference"):
            sentence_bleu(hypothesis, references)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown tokenize 'mecab'; choose one of: zh, 13a"):
        sentence_bleu("一", ["一"], tokenize="mecab")
    with pytest.raises(ValueError, match="unknown smooth 'method4'"):
        corpus_bleu(["一"], [["一"]], smooth="method4")


def test_wmt22_ranking_and_scores_equal_sacrebleu(shared: Path) -> None:
    folder = shared / "data" / "dev" / "nlg" / "wmt22_en-zh"
    read = {
        path.name: path.read_text(encoding="utf-8").splitlines()[:400]
        for path in folder.glob("*.zh")
    }
    streams = [read["refA.zh"], read["refB.zh"]]
    systems = sorted(name for name in read if name.startswith("hyp."))
    assert len(systems) == 3
    theirs = {name: ORACLE(tokenize="zh").corpus_score(read[name], streams) for name in systems}
    for name in systems:
        check(corpus_bleu(read[name], streams), theirs[name])
    ours = {name: corpus_bleu(read[name], streams).value for name in systems}
    assert sorted(systems, key=ours.__getitem__) == sorted(
        systems, key=lambda name: theirs[name].score
    )
