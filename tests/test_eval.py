"""`cllm.eval`: base and adapter on the same questions, baselines beside them, nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cllm.__main__ import run
from cllm.data.schema import Conversation, Message
from cllm.eval import few_shot, majority, report, scores


def conversation(question: str, answer: str, category: str = "") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), category)


def test_a_run_is_evaluated_before_and_after(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", [str(config), "eval.samples=0", "train.steps=3"]) == 0
    directory = tmp_path / "runs" / "a"
    in_training = json.loads((directory / "eval.json").read_text(encoding="utf-8"))
    arguments = [str(directory), "--data", str(tmp_path / "data.jsonl"), "--limit", "6", "--max-new-tokens", "4", "--shots", "2"]
    assert run("eval", arguments) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.strip().split("\n")[-1])["eval"][str(tmp_path / "data.jsonl")]
    assert summary["rows"] == 6 and set(summary["results"]) == {"copy", "majority", "base", "base 2-shot", "adapter"}
    assert summary["results"]["adapter"]["loss"] < summary["results"]["base"]["loss"]
    folder = Path(summary["folder"])
    assert folder.parent == directory and len((folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    assert json.loads((directory / "eval.json").read_text(encoding="utf-8")) == in_training
    assert run("eval", [*arguments, "--base"]) == 0
    again = json.loads(capsys.readouterr().out.strip().split("\n")[-1])["eval"][str(tmp_path / "data.jsonl")]
    assert again["folder"] == f"{folder}-2" and "adapter" not in again["results"]
    assert again["results"]["base"] == summary["results"]["base"]


def test_a_file_without_answers_is_one_line(config: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    assert run("eval", [str(checkpoint), "--data", str(tmp_path / "empty.json")]) == 2
    assert "no conversation that ends with an answer" in capsys.readouterr().err


def test_scores_baselines_and_table() -> None:
    train = [conversation("甲", "好", "x"), conversation("乙", "好", "x"), conversation("丙", "坏", "x"), conversation("丁", "三", "y")]
    test = [conversation("戊", "好", "x"), conversation("己", "四", "y"), conversation("庚", "？", "z")]
    assert majority(train, test) == ["好", "三", ""]
    prompt = few_shot(train, test[0], 2, seed=0)
    assert len(prompt) == 5 and prompt[-1].content == "戊" and {m.content for m in prompt[1:4:2]} <= {"好", "坏"}
    perfect = scores(["今天天气很好。", "我们去公园吧。"], ["今天天气很好。", "我们去公园吧。"])
    assert perfect["exact"] == perfect["bleu-zh"] == perfect["rouge-l-char"] == 100
    half = scores(["今天天气很好。", ""], ["今天天气很好。", "我们去公园吧。"])
    assert half["exact"] == 50 and 0 < half["rouge-l-char"] <= 50
    text = report({"base": {"loss": 2.0, "exact": 0.0, "by_category": {"x": 0.0}}, "adapter": {"exact": 50.0, "by_category": {"x": 50.0}}})
    assert "base" in text and "2.000" in text and "50.0" in text
