"""Every value of ../shared/metrics of the kinds that cllm reproduces, to 1e-8."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cllm.metrics import (
    TOKENIZERS,
    Score,
    corpus_bleu,
    corpus_chrf,
    generation_scores,
    rouge,
    sentence_bleu,
    sentence_chrf,
)
from cllm.metrics.score import VERSION

EFFECTIVE = {"effective_order": True}
BLEU: dict[str, dict[str, Any]] = {
    "zh_floor_eff": {"smooth": "floor", **EFFECTIVE},
    "zh_floor0.01": {"smooth": "floor", "smooth_value": 0.01},
    "zh_addk_eff": {"smooth": "add-k", **EFFECTIVE},
    "zh_addk0.5": {"smooth": "add-k", "smooth_value": 0.5},
    "zh_none": {"smooth": "none"},
    "zh_none_eff": {"smooth": "none", **EFFECTIVE},
    "zh_exp_eff_n2": {"max_order": 2, **EFFECTIVE},
    "zh_exp_n6": {"max_order": 6},
}
for _name in ("zh", "13a", "intl", "char", "none"):
    BLEU |= {
        f"{_name}_exp": {"tokenize": _name},
        f"{_name}_exp_eff": {"tokenize": _name, **EFFECTIVE},
        f"{_name}_lc": {"tokenize": _name, "lowercase": True, **EFFECTIVE},
    }
CHRF: dict[str, dict[str, Any]] = {
    "chrf": {},
    "chrf+": {"word_order": 1},
    "chrf++": {"word_order": 2},
    "chrf_beta3": {"beta": 3},
    "chrf_c2": {"char_order": 2},
}
PARTS = ("counts", "totals", "precisions", "bp", "sys_len", "ref_len")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[dict[str, Any]]:
    return read(shared / "metrics" / "dev.jsonl")


def near(expected: object) -> object:
    return pytest.approx(expected, abs=1e-8)


def check_bleu(score: Score, expected: dict[str, Any]) -> None:
    assert score.value == near(expected["score"])
    for part in PARTS:
        assert score.parts[part] == near(expected[part]), part


def triples(scores: dict[str, Score]) -> Iterator[list[float]]:
    for score in scores.values():
        yield [score.parts["precision"] / 100, score.parts["recall"] / 100, score.value / 100]


def test_bleu(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for name, expected in row["oracle"]["sacrebleu"].items():
            check_bleu(
                sentence_bleu(row["hyp"], row["refs"], **{"effective_order": False, **BLEU[name]}),
                expected,
            )


def test_nltk_and_chatglm3(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for unit in ("char", "jieba"):
            score = sentence_bleu(row["hyp"], row["refs"], tokenize=unit, smooth="method3")
            assert score.value / 100 == near(row["oracle"]["nltk"][f"{unit}_method3"])
        score = sentence_bleu(
            row["hyp"].strip(), [row["refs"][0].strip()], tokenize="jieba", smooth="method3"
        )
        assert score.value / 100 == near(row["oracle"]["chatglm3_finetune"]["bleu-4"])


def test_chrf(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for name, options in CHRF.items():
            assert sentence_chrf(row["hyp"], row["refs"], **options).value == near(
                row["oracle"]["chrf"][name]
            ), name


def test_tokens(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for name, expected in row["oracle"].get("tokens", {}).items():
            assert TOKENIZERS[name](row["hyp"]) == expected
        if "ref_tokens_jieba" in row["oracle"]:
            assert TOKENIZERS["jieba"](row["refs"][0]) == row["oracle"]["ref_tokens_jieba"]


def test_rouge_score(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for unit in ("char", "jieba"):
            scores = rouge(row["hyp"], row["refs"], tokenize=unit)
            ours = dict(zip(scores, triples(scores), strict=True))
            for kind, expected in row["oracle"]["rouge_score"][unit].items():
                assert ours[kind] == near(expected), kind
        lines = row["oracle"]["rouge_score"].get("char_zhsent")
        if lines:
            hypothesis, *references = (
                re.sub(r"([。！？])(?!\n)", r"\1\n", text) for text in (row["hyp"], *row["refs"])
            )
            scores = rouge(hypothesis, references, tokenize="char")
            assert next(triples({"rougeLsum": scores["rougeLsum"]})) == near(lines["rougeLsum"])


def test_rouge_chinese(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for unit in row["oracle"]["rouge_chinese"].keys() & {"char", "jieba"}:
            expected = row["oracle"]["rouge_chinese"][unit]
            scores = rouge(row["hyp"], row["refs"][:1], tokenize=unit, counts="set")
            want = (
                [[0.0] * 3] * 3
                if "error" in expected
                else [expected[kind] for kind in ("rouge-1", "rouge-2", "rouge-l")]
            )
            assert list(triples(scores)) == [near(triple) for triple in want]


def test_llama_factory(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert generation_scores(row["hyp"], row["refs"][0]) == row["oracle"]["llamafactory"], row[
            "id"
        ]


def test_corpora(rows: list[dict[str, Any]], shared: Path) -> None:
    by_id = {row["id"]: row for row in rows}
    for corpus in read(shared / "metrics" / "dev_corpus.jsonl"):
        pairs = [by_id[name] for name in corpus["ids"]]
        hypotheses = [pair["hyp"] for pair in pairs]
        if corpus["mode"] == "llamafactory-mean":
            scores = [generation_scores(pair["hyp"], pair["refs"][0]) for pair in pairs]
            assert {
                kind: sum(score[kind] for score in scores) / len(scores) for kind in scores[0]
            } == near(corpus["mean"])
            continue
        depth = 1 if corpus["mode"] == "first-ref" else max(len(pair["refs"]) for pair in pairs)
        streams = [[dict(enumerate(pair["refs"])).get(k) for pair in pairs] for k in range(depth)]
        for name, expected in corpus["sacrebleu"].items():
            score = corpus_bleu(hypotheses, streams, **BLEU[name])
            check_bleu(score, expected)
            assert score.signature.replace(VERSION, "version:2.6.0") == expected["signature"]
        for name, options in CHRF.items():
            score = corpus_chrf(hypotheses, streams, **options)
            assert score.value == near(corpus["chrf"][name]["score"])
            assert (
                score.signature.replace(VERSION, "version:2.6.0")
                == corpus["chrf"][name]["signature"]
            )
