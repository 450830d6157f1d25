"""`cllm.eval`: base and adapter on the same questions, losses, intervals, multiple choice, votes,
the report; nothing overwritten.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.__main__ import run
from cllm.data.encode import IGNORE_INDEX, Example
from cllm.data.message import Message
from cllm.data.packing import collate
from cllm.data.schema import Conversation
from cllm.evaluate import answers as module
from cllm.evaluate.answers import (
    GENERAL,
    Asking,
    draw,
    example_nll,
    held_out_loss,
    majority,
    recommend,
    score,
    sequence_nll,
    value,
)
from cllm.evaluate.choice import LETTERS, letter_ids, log_likelihoods, read_subjects
from cllm.evaluate.report import About, score_table, strength_table, summary, verdict, write_results
from cllm.evaluate.results import Evaluation, Strength, SystemScores
from cllm.evaluate.votes import summarise
from cllm.learn.log import AnswerCount
from cllm.model import load_model, load_tokenizer
from cllm.model.device import Precision
from cllm.serve.engine import Engine
from tests.conftest import tiny_model

CPU = Precision.choose("fp32", "cpu")
ABOUT = About("tiny-zh", "a.jsonl", "chatml", torch.device("cpu"))
Capture = pytest.CaptureFixture[str]


def conversation(question: str, answer: str, category: str = "") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), category)


def last_line(capsys: Capture) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.strip().split("\n")[-1]))


@pytest.fixture
def trained(config: Path, tmp_path: Path) -> Path:
    assert run("train", [str(config), "eval.samples=0", "train.steps=3"]) == 0
    return tmp_path / "runs" / "a"


def test_a_run_is_evaluated_before_and_after(
    trained: Path, tmp_path: Path, capsys: Capture
) -> None:
    in_training = json.loads((trained / "eval.json").read_text(encoding="utf-8"))
    expected = {"loss", "general-ppl", "interval", "n", "versus_base"}
    assert set(in_training["adapter"]) == expected and "drawn" not in in_training
    data = str(tmp_path / "data.jsonl")
    arguments = [
        str(trained),
        "--data",
        data,
        "--limit",
        "6",
        "--max-new-tokens",
        "4",
        "--shots",
        "2",
    ]
    assert run("eval", arguments) == 0
    out, said = capsys.readouterr()
    assert re.search(r"[1-6] of the 6 questions in \S+data\.jsonl were trained on", said)
    summary = json.loads(out.strip().split("\n")[-1])["eval"][data]
    results, folder = summary["results"], Path(summary["folder"])
    assert summary["rows"] == 6 and set(results) == {
        "copy",
        "majority",
        "base",
        "base 2-shot",
        "adapter",
    }
    assert "adapter - base" in out and "95 % interval" in out
    gap = results["adapter"]["versus_base"]["loss"]
    assert gap["difference"] == pytest.approx(results["adapter"]["loss"] - results["base"]["loss"])
    assert gap["low"] is gap["high"] is gap["p"] is None, "six answers tell nothing"
    assert "loss" not in results["adapter"]["interval"] and "too few to tell (n = 6)" in out
    assert results["adapter"]["n"]["loss"] == results["adapter"]["n"]["exact"] == 6
    general = results["adapter"]["versus_base"]["general-ppl"]
    assert general["low"] < general["high"] < 0 and general["p"] < 0.05
    low, high = results["adapter"]["interval"]["general-ppl"]
    assert low < results["adapter"]["general-ppl"] < high
    assert [group["answers"] for group in results["base"]["by_category"].values()] == [3, 3]
    assert (
        folder.parent == trained
        and json.loads((folder / "eval.json").read_text(encoding="utf-8")) == results
    )
    samples = [
        json.loads(line)
        for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(samples) == 6 and set(samples[0]["scores"]) == {"base", "base 2-shot", "adapter"}
    assert {"rouge-l-char", "bleu-4", "exact", "loss"} <= samples[0]["scores"]["adapter"].keys()
    page = (folder / "report.html").read_text(encoding="utf-8")
    english, chinese = page.split("<main")[1:]
    for words, half in (("worst", english), ("最差", chinese)):
        assert half.count("data:image/png;base64,") == 2 and samples[0]["reference"] in half
        assert words in half
    from cllm.plots import _chinese_font

    same = re.findall('base64,[^"]+', english) == re.findall('base64,[^"]+', chinese)
    assert same == (not _chinese_font()), "each half has pictures of its language"
    assert not re.search(r"(src|href)=\"(?!data:)|<script.*src|https?:", page), (
        "the page needs nothing but itself"
    )
    for fact in (data, "3 steps", "rank 4", torch.__version__, "n = 6"):
        assert fact in page
    assert json.loads((trained / "eval.json").read_text(encoding="utf-8")) == in_training
    assert run("eval", [*arguments, "--base"]) == 0
    again = last_line(capsys)["eval"][data]
    assert again["folder"] == f"{folder}-2" and "adapter" not in again["results"]
    assert again["results"]["base"] == results["base"], (
        "alone, the base answers as it does in one batch with the adapter"
    )


def test_strengths_are_answered_beside_base_and_adapter_which_stay_as_they_are(
    trained: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = str(tmp_path / "data.jsonl")
    arguments = [str(trained), "--data", data, "--max-new-tokens", "4"]
    assert run("eval", arguments) == 0
    plain = last_line(capsys)["eval"][data]["results"]
    assert run("eval", [*arguments, "--strengths", "1.25,0,0.5,1"]) == 0
    summary = last_line(capsys)["eval"][data]
    swept, folder = summary["results"], Path(summary["folder"])
    assert {name: swept[name] for name in plain} == plain, "to the last bit"
    named = ["base", "adapter 0.5", "adapter", "adapter 1.25"]
    assert [name for name in swept if name in named] == named
    assert swept.keys() - plain.keys() == {"adapter 0.5", "adapter 1.25", "strength"}
    for metric in ("loss", "general-ppl"):
        assert len({swept[name][metric] for name in named}) == 4
    assert swept["base"]["loss"] > swept["adapter 0.5"]["loss"] > swept["adapter"]["loss"]
    found = swept["strength"]
    assert 0 <= found["share"] <= 1
    sample = json.loads((folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert sample["scores"].keys() == {*named}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 * 3 and (folder / "strengths.png").is_file()
    assert "Strength of the adapter" in page and "<td>1.25</td>" in page
    assert run("eval", [*arguments, "--strengths", "0.5", "--limit", "4"]) == 0
    out = capsys.readouterr().out
    assert "Strength of the adapter" in out and "recommended strength" not in out
    assert out.count("too few to tell (n = 4)") == 2


def swept(losses: list[float], perplexity: list[float], n: int = 40) -> Evaluation:
    """Base, 0.5, adapter and 1.5 with these losses: half of the answers 1 above, half below."""
    asked = [conversation("问", "好")] * n
    tables = {}
    for name, reached, ppl in zip(
        ("base", "adapter 0.5", "adapter", "adapter 1.5"), losses, perplexity, strict=True
    ):
        rows = [[reached + (-1, 1)[i % 2], 1.0] for i in range(n)]
        tables[name] = {"loss": rows, "general-ppl": [[math.log(ppl), 1.0]] * 3}
    found = recommend(tables)
    assert found is not None
    results = score(asked, {}, {})
    systems = {
        name: SystemScores(
            {metric: value(metric, rows) for metric, rows in table.items()},
            {},
            {"exact": n},
            {},
            {},
            {},
            {},
        )
        for name, table in tables.items()
    }
    return replace(results, systems=systems, strength=found)


def test_the_recommended_strength_keeps_the_gain_at_half_the_rise() -> None:
    best = swept([8, 4, 3.9, 3.9], [10, 11, 13, 16])
    assert best.strength is not None and best.strength.recommended == 0.5
    assert best.strength.share == 1 and best.strength.interval == [0.5, 0.5]
    (shown,) = strength_table(best)
    assert shown.rows[1:] == [
        ["0", "8.000", "0 %", "10.0", "0 %"],
        ["0.5", "4.000", "98 %", "11.0", "33 %"],
        ["1", "3.900", "100 %", "13.0", "100 %"],
        ["1.5", "3.900", "100 %", "16.0", "200 %"],
    ]
    assert (
        "recommended strength 0.5 (95 % interval 0.5 … 0.5; of 1,000 resamples" in shown.legend[1]
    )
    for losses, perplexity in (
        ([8, 5, 3.9, 3.9], [10, 11, 13, 16]),  # too little of the gain
        ([8, 4, 3.9, 3.9], [10, 12, 13, 16]),  # too much of the rise
        ([8, 8.1, 8.2, 9], [10, 11, 13, 16]),  # no gain
    ):
        none = swept(losses, perplexity)
        assert none.strength is not None and none.strength.recommended is None
        assert "no strength is recommended" in strength_table(none)[0].legend[1]
    free = swept([8, 5, 3.9, 3.9], [10, 9, 9, 8])  # nothing was forgotten
    assert free.strength is not None and free.strength.recommended == 1
    few = swept([8, 4, 3.9, 3.9], [10, 11, 13, 16], n=19)
    assert few.strength == Strength(0.5, [], None)
    assert "too few to tell (n = 19)" in strength_table(few)[0].legend[1]


def test_an_interval_of_the_strength_is_that_of_its_resamples() -> None:
    """An answer in two is better by little at 1 than at 0.5: which of them keeps 95 % is chance."""
    rows = {"base": [0.0] * 40, "adapter 0.5": [0.9, 1.0] * 20, "adapter": [1.0] * 40}
    tables = {
        name: {"loss": [[1.0 - f, 1.0] for f in reached], "general-ppl": [[1.0, 1.0]]}
        for name, reached in rows.items()
    }
    found = recommend(tables)
    assert found is not None and found.interval == [0.5, 1.0] and found.share == 1
    assert recommend({name: tables[name] for name in ("base", "adapter")}) is None


def test_test_data_are_read_as_the_run_reads_its_own(
    config: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = ["eval.samples=0", "train.steps=1", "data.fold_width=true"]
    assert run("train", [str(config), *options]) == 0
    wide = {"instruction": "ＡＢＣ是什么？", "output": "字母ＤＥＦ。"}
    rows = [json.dumps(wide, ensure_ascii=False), json.dumps({"instruction": "没有回答"})]
    data = tmp_path / "wide.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    capsys.readouterr()
    arguments = ["--data", str(data), "--max-new-tokens", "2"]
    assert run("eval", [str(tmp_path / "runs" / "a"), *arguments]) == 0
    captured = capsys.readouterr()
    folder = Path(json.loads(captured.out.splitlines()[-1])["eval"][str(data)]["folder"])
    (sample,) = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(sample)["messages"][0]["content"] == "ABC是什么?"
    assert json.loads(sample)["reference"] == "字母DEF。"
    assert "1 rows of" in captured.err and f"{data}:2" in captured.err


def test_mistakes_are_one_line(
    config: Path, tmp_path: Path, checkpoint: Path, capsys: Capture
) -> None:
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    assert run("eval", [str(checkpoint), "--data", str(tmp_path / "empty.json")]) == 2
    assert "no conversation that ends with an answer" in capsys.readouterr().err
    assert run("eval", [str(tmp_path), "--votes"]) == 2
    assert "has no votes" in capsys.readouterr().err
    sweep = ["--data", str(tmp_path / "empty.json"), "--strengths"]
    assert run("eval", [str(checkpoint), *sweep, "0.5"]) == 2
    assert "--strengths needs an adapter" in capsys.readouterr().err
    for wrong in ("", "0.5,", "2.01", "nan", "half", "0.5;1"):
        assert run("eval", [str(checkpoint), *sweep, wrong]) == 2
        told = capsys.readouterr().err
        assert "is no strength of the adapter" in told and told.count("\n") == 1
    assert run("eval", [str(checkpoint), "--task", "mmlu-csv", "--data", str(tmp_path)]) == 2
    assert "no answered questions in test/*.csv" in capsys.readouterr().err
    for words in ([str(checkpoint)], []):
        assert run("eval", words) == 2
        assert "--data FILE, or --votes" in capsys.readouterr().err


def test_data_that_was_trained_on_may_be_gone(
    trained: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "data.jsonl").rename(tmp_path / "moved.jsonl")
    assert (
        run(
            "eval",
            [
                str(trained),
                "--data",
                str(tmp_path / "moved.jsonl"),
                "--limit",
                "2",
                "--max-new-tokens",
                "2",
            ],
        )
        == 0
    )
    captured = capsys.readouterr()
    assert "no majority baseline" in captured.err and "majority" not in captured.out


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(3, 96, (length,), generator=generator).tolist() for length in (5, 30, 2, 17)
    ]
    return [
        Example(
            ids,
            [IGNORE_INDEX, *ids[1:]]
            if len(ids) > 5
            else [IGNORE_INDEX] * (len(ids) - 1) + ids[-1:],
        )
        for ids in rows
    ]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_losses_equal_full_logits_in_chunks_and_when_memory_ends(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = (
        tiny_model(architecture),
        tiny_model(architecture, attention="eager").requires_grad_(False),
    )
    expected = []
    for ids, labels in examples():
        logits = reference(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        target = torch.tensor(labels[1:])
        expected.append(
            [
                float(F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")),
                int((target >= 0).sum()),
            ]
        )
    for chunk_bytes in (2**20, 1000):  # 1000 bytes: two positions at a time
        assert torch.allclose(
            torch.tensor(example_nll(model, examples(), CPU, chunk_bytes)),
            torch.tensor(expected),
            atol=1e-4,
        )
    row = collate(examples())
    mean = sum(nats for nats, _ in expected) / sum(tokens for _, tokens in expected)
    assert held_out_loss(model, [row], CPU, 2**20) == pytest.approx(mean, abs=1e-5)
    whole = module.row_nll

    def small_machine(model: Any, batch: Any, chunk_bytes: int) -> torch.Tensor:
        if len(batch.input_ids) > 20:
            raise torch.OutOfMemoryError("no")
        return whole(model, batch, chunk_bytes)

    monkeypatch.setattr(module, "row_nll", small_machine)
    split = sequence_nll(model.train(), [row], CPU, 2**20)
    assert model.training and split[1] == [0.0, 0.0], "the sequence of 30 tokens fits no more"
    assert torch.allclose(
        torch.tensor(split[:1] + split[2:]), torch.tensor(expected[:1] + expected[2:]), atol=1e-4
    )
    monkeypatch.setattr(module, "row_nll", lambda *_: [][0])
    with pytest.raises(IndexError):
        sequence_nll(model, [row], CPU, 2**20)


def test_general_texts() -> None:
    lines = GENERAL.read_text(encoding="utf-8").splitlines()
    assert 40 <= len(lines) == len(set(lines)) <= 60
    assert all(len(re.findall("[\u4e00-\u9fff]", line)) > 15 for line in lines)


def test_scores_groups_baselines_and_tables() -> None:
    train = [
        conversation("甲", "好", "x"),
        conversation("乙", "好", "x"),
        conversation("丙", "坏", "x"),
        conversation("丁", "三", "y"),
    ]
    test = [
        conversation("戊", "好", "x"),
        conversation("己", "四", "y"),
        conversation("庚", "？", "z"),
    ]
    assert majority(train, test) == ["好", "三", ""]
    prompt = Asking(train).few_shot(test[0], 2).messages
    assert (
        len(prompt) == 5
        and prompt[-1].content == "戊"
        and {m.content for m in prompt[1:4:2]} <= {"好", "坏"}
    )
    asked = [
        conversation("一", "今天天气很好。", "x"),
        conversation("二", "我们去公园吧。" * 3, "y"),
    ]
    systems = {"base": ["今天", ""], "adapter": ["今天天气很好。", "我们去公园吧。"]}
    losses = {
        "base": {"loss": [[4.0, 2.0], [8.0, 2.0]]},
        "adapter": {"loss": [[2.0, 2.0], [2.0, 2.0]]},
    }
    results = score(asked, systems, losses)
    base, adapter = results.systems["base"], results.systems["adapter"]
    assert base.scores["loss"] == 3 and adapter.versus_base["loss"].difference == -2
    assert adapter.scores["exact"] == 50 and base.scores["exact"] == 0
    by_length = {key: group.scores["exact"] for key, group in adapter.by_length.items()}
    by_category = {key: group.scores["exact"] for key, group in adapter.by_category.items()}
    assert by_length == {"5-8": 100, "17-32": 0} and by_category == {"x": 100, "y": 0}
    first, second = results.samples
    assert first.scores["adapter"]["rouge-l-char"] == 100 and second.scores["base"]["bleu-4"] == 0
    assert "loss" not in first.scores["adapter"]
    text = summary(results)
    for part in ("adapter - base", "-2.000", "50.0", "5-8 (1)", "Exact by category"):
        assert part in text
    aligned = score(asked, systems, losses, losses_of_answers=True).samples
    assert [sample.scores["base"]["loss"] for sample in aligned] == [2, 4]


def strict(text: str) -> Any:
    """JSON as other readers take it: no NaN, no Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_loss_too_large_for_a_perplexity_is_null_in_the_files(tmp_path: Path) -> None:
    asked = [conversation("一", "好"), conversation("二", "坏")]
    huge = {"loss": [[900.0, 1.0]] * 2, "general-ppl": [[800.0, 1.0], [900.0, 1.0]]}
    usual = {"loss": [[1.0, 1.0]] * 2, "general-ppl": [[2.0, 1.0], [3.0, 1.0]]}
    answers = {"base": ["好", "坏"], "adapter": ["好", "坏"]}
    results = score(asked, answers, {"base": usual, "adapter": huge}, losses_of_answers=True)
    write_results(tmp_path, results, ABOUT)
    written = strict((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert written["adapter"]["general-ppl"] is None and written["adapter"]["loss"] == 900
    assert written["base"]["general-ppl"] == pytest.approx(math.exp(2.5))
    gap = written["adapter"]["versus_base"]["general-ppl"]
    assert gap["difference"] is None
    for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        assert strict(line)["scores"]["adapter"]["loss"] == 900
    assert "general perplexity" in summary(results)


def test_the_report_escapes_what_models_and_data_say(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&$tables {{ title }} 汉字"
    asked = [conversation(evil, evil, evil), conversation("一", "二")]
    write_results(tmp_path, score(asked, {"base": [evil, ""]}, {}), ABOUT)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        page.count("<script") == 1
        and page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;$tables {{ title }} 汉字") >= 4
    )
    assert "The worst answers (1)" in page and "The best answers (1)" in page


def answered(adapter: str, base: str = "坏", n: int = 40, loss: float = 1.0) -> Evaluation:
    """`n` questions that the adapter answers so, with losses per token."""
    asked = [conversation(f"第{i}问", "好的，没问题。") for i in range(n)]
    texts = {"copy": [f"第{i}问" for i in range(n)], "base": [base] * n, "adapter": [adapter] * n}
    measured = {
        name: {"loss": [[nats, 1.0]] * n, "general-ppl": [[nats, 1.0]] * 30}
        for name, nats in (("base", 2.0), ("adapter", loss))
    }
    return score(asked, texts, measured)


def test_the_verdict_says_what_the_figures_say() -> None:
    better = verdict(answered("好的，没问题。"))
    assert "than base and than copying in all 5 scores (n = 40)" in better
    assert "worse in" in verdict(answered("坏", base="好的，没问题。"))
    assert "no clear difference in" in verdict(answered("坏"))
    forgot = verdict(answered("好的，没问题。", loss=3.0))
    assert "forgotten" in forgot and "rose from 7.4 to 20.1" in forgot and "forgotten" not in better
    bare = answered("好的，没问题。")
    del bare.systems["adapter"]
    assert verdict(bare) == ""


@given(n=st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_below_twenty_answers_nothing_is_claimed(n: int) -> None:
    results = answered("好的，没问题。", n=n)
    few = "too few to tell" in verdict(results)
    shown = score_table(results)
    assert few == (n < 20) and f"n = {n}" in shown.title and f"n = {n}" in verdict(results)
    gap = results.systems["adapter"].versus_base["exact"]
    assert (gap.p is None) == (gap.low is None) == ("exact" not in results.systems["base"].interval)
    assert (gap.p is None) == few and gap.difference == 100


@pytest.mark.parametrize("language", ["en", "zh"])
def test_tables_speak_the_readers_language(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_LANG", language)
    shown = score_table(answered("好的，没问题。"))
    names = [*shown.rows[0], *(row[0] for row in shown.rows)]
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", name)) for name in names)
    assert chinese == 0 if language == "en" else chinese > 7
    heads = shown.rows[0][1:]
    assert all(
        ("↓" in head) == (column < 2) and head[-1] in "↓↑" for column, head in enumerate(heads)
    )
    decimals = [
        {len(cell.partition(".")[2]) for cell in column if re.fullmatch(r"[\d.,+-]+", cell)}
        for column in zip(*(row for row in shown.rows[1:-2]), strict=True)
    ]
    assert all(len(kinds) <= 1 for kinds in decimals), "a column has one number of decimals"


@given(total=st.integers(0, 300), wanted=st.integers(0, 300), seed=st.integers(0, 9))
def test_questions_are_drawn_from_all_and_by_the_seed(total: int, wanted: int, seed: int) -> None:
    drawn = draw(total, wanted, seed)
    assert drawn == draw(total, wanted, seed) == sorted(set(drawn))
    assert len(drawn) == min(total, wanted) and set(drawn) <= set(range(total))
    if total > 100 and 10 < wanted < total / 2:
        assert drawn[-1] > total / 2, "not the first ones"


def test_no_answer_stands_at_both_ends_of_the_report(tmp_path: Path) -> None:
    for n in (1, 2, 5, 39, 41, 60):
        asked = [conversation(f"问{i}。", "好" * (i + 1)) for i in range(n)]
        write_results(tmp_path, score(asked, {"base": ["好"] * n}, {}), ABOUT)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        for half in page.split("<main")[1:]:  # in English, then in Chinese
            assert [half.count(f"问{i}。") for i in range(n)] == [1] * n


def test_an_eta_is_told_once_the_pace_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The first answer waits for all prompts: 10 s; then 20 answers a second."""
    clock = iter([0.0, *(10 + i / 20 for i in range(786))] + [60.0] * 9)
    monkeypatch.setattr("cllm.learn.log.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("cllm.learn.log.sys.stderr.isatty", lambda: True, raising=False)
    counted = AnswerCount()
    for done in range(1, 787):
        counted(done, 786)
    lines = capsys.readouterr().err.split("\r")
    assert not any("eta" in line for line in lines[:30])
    told = [line for line in lines if "eta" in line]
    assert len(told) > 700 and not any("m" in line.split("eta")[1] for line in told)
    for done in (1, 786, 786):  # further rounds of the same count
        counted(done, 786)
    assert "eta" not in capsys.readouterr().err


# --- Multiple choice
def exam(root: Path, style: str, questions: int = 3) -> Path:
    """Two subjects as C-Eval or CMMLU lay them out."""
    head = {"ceval": "id,question,A,B,C,D,answer,explanation", "cmmlu": ",Question,A,B,C,D,Answer"}[
        style
    ]
    for split, count in (("dev", 5), ("val" if style == "ceval" else "test", questions)):
        (root / split).mkdir(parents=True)
        for subject in ("college_physics", "my_own") if style == "ceval" else ("anatomy", "my_own"):
            name = f"{subject}_{split}.csv" if style == "ceval" else f"{subject}.csv"
            end = ",略" if style == "ceval" else ""
            rows = []
            for i in range(count):
                question = f"{split}{subject[0]}第{i}问，请选出最合适的一项"
                rows.append(f'{i},"{question}",甲{i},乙,丙,丁,{LETTERS[i % 4]}{end}')
            (root / split / name).write_text(
                "\ufeff" + "\n".join([head, *rows]) + "\n", encoding="utf-8"
            )
    if style == "ceval":  # its test answers are not published
        (root / "test").mkdir()
        (root / "test" / "my_own_test.csv").write_text(
            "id,question,A,B,C,D\n0,问,甲,乙,丙,丁\n", encoding="utf-8"
        )
    return root


def test_the_prompts_are_the_official_ones(tmp_path: Path) -> None:
    ceval, own = read_subjects(exam(tmp_path / "ceval", "ceval"), 5)
    assert (
        ceval.header == "以下是中国关于大学物理考试的单项选择题，请选出其中的正确答案。\n\n"
        and own.name in own.header
    )
    assert (
        ceval.shots[1] == "devc第1问，请选出最合适的一项\nA. 甲1\nB. 乙\nC. 丙\nD. 丁\n答案：B\n\n"
        and len(ceval.shots) == 5
    )
    assert ceval.questions[
        2
    ] == "valc第2问，请选出最合适的一项\nA. 甲2\nB. 乙\nC. 丙\nD. 丁\n答案：" and ceval.answers == [
        "A",
        "B",
        "C",
    ]
    cmmlu, _ = read_subjects(exam(tmp_path / "cmmlu", "cmmlu"), 2, limit=1)
    assert (
        cmmlu.header == "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
        and len(cmmlu.shots) == 2
    )
    assert cmmlu.questions == [
        "题目：testa第0问，请选出最合适的一项\nA. 甲0\nB. 乙\nC. 丙\nD. 丁\n答案是："
    ]
    (tmp_path / "cmmlu" / "test" / "anatomy.csv").write_text(
        ",Question,A,B,C,D,Answer\n0,问,甲,乙,丙,丁,E\n", encoding="utf-8"
    )
    for shots, message in [
        (5, "answer = 'E'"),
        (6, "has 5 solved examples for anatomy, 6 are needed"),
    ]:
        with pytest.raises(Exception, match=message):
            read_subjects(tmp_path / "cmmlu", shots)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "glm"])
def test_log_likelihoods_equal_transformers_forward(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reference = (
        Engine(tiny_model(architecture), kv_tokens=100_000),
        tiny_model(architecture, attention="eager"),
    )
    generator = torch.Generator().manual_seed(2)
    start = torch.randint(3, 96, (40,), generator=generator).tolist()
    prompts = [
        start + torch.randint(3, 96, (length,), generator=generator).tolist()
        for length in (9, 1, 14, 5, 9)
    ]
    letters = [10, 20, 30, 40]
    expected = [
        reference(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[letters].tolist()
        for ids in prompts
    ]
    assert torch.allclose(
        torch.tensor(log_likelihoods(engine, prompts, letters)), torch.tensor(expected), atol=1e-4
    )
    engine.kv_tokens = 1  # one at a time
    assert torch.allclose(
        torch.tensor(log_likelihoods(engine, prompts[::-1], letters)),
        torch.tensor(expected[::-1]),
        atol=1e-4,
    )
    assert torch.allclose(
        torch.tensor(log_likelihoods(engine, prompts[1:2], letters)),
        torch.tensor(expected[1:2]),
        atol=1e-4,
    )


def test_out_of_memory_halves_the_batch_of_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    from cllm.evaluate import choice

    engine, whole = Engine(tiny_model("llama"), kv_tokens=100_000), choice._hidden
    prompts = [[5, 6, 7, 8 + i] for i in range(7)]
    expected = log_likelihoods(engine, prompts, [10, 20, 30, 40])

    def small_machine(engine: Engine, rows: list[list[int]], cache: Any) -> torch.Tensor:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no")
        return whole(engine, rows, cache)

    monkeypatch.setattr(choice, "_hidden", small_machine)
    assert torch.allclose(
        torch.tensor(log_likelihoods(engine, prompts, [10, 20, 30, 40])),
        torch.tensor(expected),
        atol=1e-5,
    )


def test_a_run_sits_an_exam(
    trained: Path, tmp_path: Path, checkpoint: Path, capsys: Capture
) -> None:
    data = exam(tmp_path / "cmmlu", "cmmlu", questions=10)
    assert run("eval", [str(trained), "--task", "mmlu-csv", "--data", str(data)]) == 0
    summary = last_line(capsys)["eval"][str(data)]
    base, adapter = summary["results"]["base"], summary["results"]["adapter"]
    assert (
        base["questions"] == 20
        and set(base["subjects"]) == {"anatomy", "my_own"}
        and "accuracy" in adapter["versus_base"]
    )
    assert base["macro"] == pytest.approx(
        sum(its["accuracy"] for its in base["subjects"].values()) / 2
    )
    assert (
        base["interval"][0] <= base["accuracy"] <= base["interval"][1]
        and base["macro_interval"][0] <= base["macro"]
    )
    shots = base["subjects"]["anatomy"]["shots"]
    assert 0 < shots < 5, "512 positions do not hold five shots of three bytes a character"
    samples = [
        json.loads(line)
        for line in (Path(summary["folder"]) / "samples.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    page = (Path(summary["folder"]) / "report.html").read_text(encoding="utf-8")
    assert "mean of subjects (macro)" in page and "adapter - base" in page
    assert "BLEU" not in page and "<img" not in page, "nothing of another thing"
    assert "n = 20" in page and "accuracy" in page
    right = sum(
        max(row["log_likelihoods"]["base"], key=row["log_likelihoods"]["base"].get) == row["answer"]
        for row in samples
    )
    assert 100 * right / 20 == pytest.approx(base["accuracy"])
    subject = read_subjects(data, shots)[0]
    tokenizer, model = load_tokenizer(checkpoint, template="text"), load_model(checkpoint)
    ids = tokenizer.encode_chat(
        [Message("user", subject.header + "".join(subject.shots) + subject.questions[0])]
    )
    expected = (
        model(input_ids=torch.tensor([ids]))
        .logits[0, -1]
        .log_softmax(-1)[letter_ids(tokenizer, "答案是：")]
    )
    assert samples[0]["log_likelihoods"]["base"] == pytest.approx(
        dict(zip(LETTERS, expected.tolist(), strict=True)), abs=1e-4
    )
    assert samples[0]["log_likelihoods"]["adapter"] != samples[0]["log_likelihoods"]["base"]
    asked = [str(trained), "--task", "mmlu-csv", "--data", str(data), "--strengths", "0.5"]
    assert run("eval", asked) == 0
    again = last_line(capsys)["eval"][str(data)]["results"]
    assert [*again] == ["base", "adapter 0.5", "adapter"]
    assert (again["base"], again["adapter"]) == (base, adapter)


# --- Votes
def test_votes_are_counted_per_pair_of_models(tmp_path: Path, capsys: Capture) -> None:
    votes = [
        ("a", "r", "base", "x"),
        ("b", "base", "r", "x"),
        ("b", "r", "base", "y"),
        ("tie", "r", "base", ""),
        ("bad", "base", "r", "y"),
    ]
    votes += [
        ("a", "s", "r", "x"),
        ("b", "r", "s", "x"),
        ("a", "r", "s", "z"),
        ("tie", "s", "r", "z"),
    ]
    rows = [
        {"vote": vote, "models": [a, b], "category": category} for vote, a, b, category in votes
    ]
    (tmp_path / "votes.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"torn', encoding="utf-8"
    )
    assert run("eval", [str(tmp_path), "--votes"]) == 0
    told = capsys.readouterr().out
    assert told.count("n < 20") == 6 and "%" not in told.splitlines()[1], "four votes tell nothing"
    against_base, adapters = json.loads(told.splitlines()[-1])["votes"]
    assert against_base["models"] == ["r", "base"] and adapters["models"] == ["r", "s"]
    assert [against_base[key] for key in ("wins", "losses", "ties", "both_bad")] == [2, 1, 1, 1]
    assert (
        against_base["win_rate"] == pytest.approx(2 / 3)
        and 0.2 < against_base["low"] < 0.3
        and 0.9 < against_base["high"] < 1
    )
    assert [against_base["by_category"][key]["wins"] for key in "xy"] == [2, 0]
    # An adapter can lose against another one; the base takes no part in that.
    assert [adapters[key] for key in ("wins", "losses", "ties", "both_bad")] == [1, 2, 1, 0]
    assert [
        (adapters["by_category"][key]["wins"], adapters["by_category"][key]["losses"])
        for key in "xz"
    ] == [(0, 2), (1, 0)]
    first, then = map(asdict, summarise(list(reversed(rows))))
    assert (first, then) == (against_base, adapters), (
        "the order of the votes and of A and B does not matter"
    )
    (undecided,) = summarise([{"vote": "tie", "models": ["base", "r"]}])
    assert undecided.ties == 1 and (undecided.low, undecided.high) == (0, 1)
    assert not math.isnan(undecided.win_rate)
