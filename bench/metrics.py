"""cllm.metrics against the packages whose numbers it reproduces, side by side in one process.

    pip install -e . sacrebleu==2.6.0 rouge-score==0.1.2 rouge-chinese==1.0.3 nltk==3.10.4
    python bench/metrics.py [--pairs 1000] [--length 300] [--out bench/results/metrics.json]

Both sides score the same pairs (texts generated from a seed) in alternating blocks and must agree;
times are CPU seconds of this process, so that other programs on the machine disturb them less. Exit
code 1 if a ratio misses its threshold.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jieba
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction
from nltk.translate.bleu_score import sentence_bleu as nltk_sentence_bleu
from rouge_chinese import Rouge
from rouge_score.rouge_scorer import RougeScorer

from cllm import metrics
from cllm.metrics.rouge import lcs_length

WORDS = (
    "我们 今天 学习 语言 模型 训练 数据 方法 简单 结果 可以 看到 显存 不够 时候 减少 批次 长度 损失 下降 很快 但是 学习率 过大 会 发散 "
    "医生 建议 病人 多 喝水 早睡 春天 来 了 花园 里 开满 桃花 老师 问 学生 为什么 天空 是 蓝色 因为 阳光 散射 北京 上海 之间 高铁 "
    "大约 四个半小时 请 把 文件 放在 桌面 然后 打开 终端 输入 命令 公司 去年 利润 增长 合同 第三条 规定 违约 责任 由 双方 协商 解决 的 "
    "LoRA GPU Python 8GB 3.5% 1,024 v2-1 2024年"
).split()
MARKS = "，，，，。。。！？：；"


def make_pairs(number: int, length: int, seed: int = 7) -> tuple[list[str], list[str]]:
    """`number` references of `length` characters, and hypotheses with about a third of the words
    changed.
    """
    rng = random.Random(seed)
    hypotheses, references = [], []
    for _ in range(number):
        words: list[str] = []
        while sum(map(len, words)) < length:
            words += [rng.choice(WORDS) for _ in range(rng.randint(3, 9))] + [rng.choice(MARKS)]
        changed = [rng.choice(WORDS) if rng.random() < 0.35 else word for word in words]
        references.append("".join(words)[:length])
        hypotheses.append("".join(changed)[:length].ljust(length, "。"))
    return hypotheses, references


class CharacterTokenizer:
    """What rouge-score needs to see Chinese at all."""

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text if not character.isspace()]


def llama_factory(hypothesis: str, reference: str) -> dict[str, float]:
    """LLaMA-Factory 0.9.5's similarity metrics of one pair, from the packages it calls."""
    words, expected = " ".join(jieba.cut(hypothesis)), " ".join(jieba.cut(reference))
    rouge = Rouge().get_scores(words, expected)[0]
    bleu = nltk_sentence_bleu(
        [list(reference)], list(hypothesis), smoothing_function=SmoothingFunction().method3
    )
    return {name: round(part["f"] * 100, 4) for name, part in rouge.items()} | {
        "bleu-4": round(bleu * 100, 4)
    }


def seconds(function: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def agree(ours: object, theirs: object) -> bool:
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(agree, ours, theirs))
    return ours == theirs or abs(ours - theirs) < 1e-8  # type: ignore[operator]


def compare(
    name: str,
    ours: Callable[[list[str], list[str]], object],
    theirs: Callable[[list[str], list[str]], object],
    pairs: tuple[list[str], list[str]],
    threshold: float,
    blocks: int = 10,
) -> dict[str, object]:
    hypotheses, references = pairs
    spent = {"ours": 0.0, "theirs": 0.0}
    for block in range(blocks):
        part = slice(block, None, blocks)
        results = {}
        for side, function in [("ours", ours), ("theirs", theirs)][:: 1 if block % 2 else -1]:
            elapsed, results[side] = seconds(lambda: function(hypotheses[part], references[part]))  # noqa: B023
            spent[side] += elapsed
        if not agree(results["ours"], results["theirs"]):
            raise SystemExit(f"{name}: the two sides disagree in block {block}")
    ratio = spent["theirs"] / spent["ours"]
    print(
        f"{name:42} {spent['ours']:8.3f} s {spent['theirs']:8.2f} s {ratio:7.1f}x (at least {threshold:g}x)",
        flush=True,
    )
    return {
        "name": name,
        "ours_seconds": round(spent["ours"], 4),
        "theirs_seconds": round(spent["theirs"], 3),
        "ratio": round(ratio, 1),
        "threshold_ratio": threshold,
        "met": ratio >= threshold,
    }


def within(name: str, function: Callable[[], object], limit: float) -> dict[str, object]:
    best = min(seconds(function)[0] for _ in range(3))
    print(f"{name:42} {best:8.4f} s (under {limit:g} s)", flush=True)
    return {
        "name": name,
        "ours_seconds": round(best, 4),
        "limit_seconds": limit,
        "met": best < limit,
    }


def run(number: int, length: int) -> list[dict[str, object]]:
    pairs = make_pairs(number, length)
    warm_up = make_pairs(3, 40, seed=8)
    jieba.setLogLevel(logging.WARNING)
    scorer = RougeScorer(["rougeL"], tokenizer=CharacterTokenizer())
    rouge_l = metrics.ROUGE("rougeL", tokenize="char")
    contests = [
        (
            "corpus BLEU zh / sacrebleu",
            lambda hyps, refs: metrics.corpus_bleu(hyps, [refs]).value,
            lambda hyps, refs: sacrebleu.BLEU(tokenize="zh").corpus_score(hyps, [refs]).score,
            5.0,
        ),
        (
            "ROUGE-L characters / rouge-score",
            lambda hyps, refs: [
                100 * f for _, _, f, _ in metrics.corpus_statistics(rouge_l, hyps, [refs])
            ],
            lambda hyps, refs: [
                100 * scorer.score(r, h)["rougeL"].fmeasure for h, r in zip(hyps, refs, strict=True)
            ],
            100.0,
        ),
        (
            "generation_scores / LLaMA-Factory's way",
            lambda hyps, refs: [
                list(metrics.generation_scores(h, r).values())
                for h, r in zip(hyps, refs, strict=True)
            ],
            lambda hyps, refs: [
                list(llama_factory(h, r).values()) for h, r in zip(hyps, refs, strict=True)
            ],
            5.0,
        ),
    ]
    results = []
    for name, ours, theirs, threshold in contests:
        ours(*warm_up), theirs(*warm_up)
        results.append(compare(name, ours, theirs, pairs, threshold))
    (long_hyp,), (long_ref,) = make_pairs(1, 5000, seed=9)
    uncached = lcs_length.__wrapped__
    results.append(
        within(
            "LCS of 5,000 x 5,000 characters",
            lambda: uncached(tuple(long_hyp), tuple(long_ref)),
            0.05,
        )
    )
    bleu = metrics.BLEU()
    system_a, system_b = (
        metrics.corpus_statistics(bleu, texts, [pairs[1]])
        for texts in (pairs[0], pairs[1][1:] + pairs[1][:1])
    )
    test = f"paired bootstrap, 1,000 resamples of {number:,} pairs"
    results.append(
        within(
            test,
            lambda: metrics.paired_bootstrap(bleu.score, system_a, system_b, resamples=1000),
            1.0,
        )
    )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "metrics.json"
    )
    options = parser.parse_args()
    results = run(options.pairs, options.length)
    packages = ["numpy", "jieba", "sacrebleu", "rouge-score", "rouge-chinese", "nltk"]
    report = {
        "command": f"python bench/metrics.py --pairs {options.pairs} --length {options.length}",
        "measured": "CPU seconds of one process, both sides in alternating blocks of the same pairs",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "machine": platform.machine(),
        "results": results,
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    options.out.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(report, ensure_ascii=False))
    return 0 if all(result["met"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
