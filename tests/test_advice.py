"""Small data: the size of a step, settings for the amount of data, what is said before a run and
after it.
"""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import demo_rows
from hypothesis import given
from hypothesis import strategies as st

from cllm.__main__ import run
from cllm.advice import FEW_CONVERSATIONS, MAX_EPOCHS, Rate, advised_rate, sized, verdict, width
from cllm.config import ENOUGH_STEPS, MAX_STEP_TOKENS, TrainConfig, load_config
from cllm.evaluate.results import Evaluation, Gap, SystemScores
from cllm.learn.dist import World
from cllm.learn.log import RunLog
from cllm.runs import read_metrics, turned
from cllm.shapes import find_config

TOKENS = st.integers(1, 10**8)
ROW = st.integers(8, 32768)


@given(TOKENS, ROW, st.floats(0.1, 50), st.integers(0, 10**5), st.integers(0, 10**5))
def test_a_step_is_as_large_as_leaves_enough_steps(
    tokens: int, row: int, epochs: float, steps: int, asked: int
) -> None:
    named = max(row, asked) if asked else 0
    train = TrainConfig(epochs=epochs, steps=steps, row_tokens=row, tokens_per_step=named)
    size = train.step_tokens(tokens)
    if named:
        assert size == named
        return
    assert row <= size <= max(row, MAX_STEP_TOKENS)
    assert size == row or epochs * tokens / size >= ENOUGH_STEPS
    assert size == replace(train, steps=0).step_tokens(tokens)  # fewer steps are not larger ones


@given(st.integers(1, 2000), TOKENS, st.integers(1, 4000), ROW, st.floats(0.5, 20))
def test_small_data_get_more_epochs_and_shorter_rows(
    count: int, tokens: int, longest: int, row: int, epochs: float
) -> None:
    train = TrainConfig(epochs=epochs, row_tokens=row)
    better = sized(train, count, tokens, longest)
    assert better.row_tokens <= row and (better.row_tokens >= longest or longest > row)
    most = max(MAX_EPOCHS, epochs) if count < FEW_CONVERSATIONS else epochs
    assert epochs <= better.epochs <= most
    enough = better.epochs * tokens / better.step_tokens(tokens) >= ENOUGH_STEPS
    shortest = better.row_tokens in (row, max(128, -(-longest // 64) * 64))
    assert enough or (better.epochs == most and shortest)


def scores(loss: float, gap: Gap | None = None) -> SystemScores:
    return SystemScores({"loss": loss}, {}, {}, {"loss": gap} if gap else {}, {}, {}, {})


@pytest.mark.parametrize(
    ("after", "gap", "steps", "said"),
    [
        (0.15, (), 100, "held-out loss 3.90 -> 0.15 after 100 steps; 4 held out are too few"),
        (0.15, (), 20, "held-out loss 3.90 -> 0.15 after 20 steps; 4 held out are too few"),
        (3.8, (), 2, "nothing learned: 2 steps, .* try: REPEAT$"),
        (3.8, (), 100, "held-out loss 3.90 -> 3.80 after 100 steps; 4 held out are too few"),
        (3.8, (-0.2, -0.1), 100, r"learned: held-out loss 3.90 -> 3.80 \(40 held out\)$"),
        (2.1, (-1.9, -1.7), 20, "it learns, .* 3.90 -> 2.10 after only 20 steps .* try: REPEAT$"),
        (3.8, (-0.2, 0.1), 100, "not clear"),
        (3.8, (-0.2, 0.1), 2, "nothing learned: 2 steps, .* try: REPEAT$"),
        (4.0, (0.05, 0.15), 100, "worse than before"),
    ],
)
def test_learning_is_claimed_only_where_the_interval_says_so(
    after: float, gap: tuple[float, ...], steps: int, said: str
) -> None:
    measured = Gap(after - 3.9, *gap, 0.001) if gap else Gap(after - 3.9)
    results = Evaluation({"base": scores(3.9), "adapter": scores(after, measured)}, [])
    assert re.match(said, verdict(results, 40 if gap else 4, steps, "REPEAT"))


@pytest.mark.parametrize(("low", "said"), [(0.55, "learned"), (0.45, "not clear")])
def test_of_pairs_the_preference_decides(low: float, said: str) -> None:
    base, adapter = scores(3.9), scores(9.0, Gap(5, 4, 6, 0.001))
    rates = {"accuracy": 0.7, "accuracy_low": low, "accuracy_high": 0.9}
    assert verdict(
        Evaluation({"base": base, "adapter": adapter}, [], rates), 40, 100, ""
    ).startswith(said)


AUTO = ["train.tokens_per_step=0", "train.steps=0", "train.epochs=4", "eval.samples=0"]


def test_the_size_of_a_step_is_written_into_the_run_and_kept_by_a_resumed_one(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("train", [str(config), *AUTO]) == 0
    whole = load_config(tmp_path / "runs" / "a" / "config.toml").train
    assert whole.tokens_per_step == whole.row_tokens == 128  # of little data one row
    log_step = RunLog.step

    def step(self: RunLog, values: dict) -> None:
        log_step(self, values)
        if values["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "step", step)
    there = f"run.dir={tmp_path / 'runs' / 'b'}"
    assert run("train", [str(config), *AUTO, there]) == 130
    monkeypatch.undo()
    assert run("train", [str(config), *AUTO, there, "--resume"]) == 0
    adapters = [
        (tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in "ab"
    ]
    assert adapters[0] == adapters[1]
    # what another version, or other data, would come to is not asked
    assert run("train", [str(config), "train.steps=4", "eval.samples=0", f"{there}2"]) == 0
    again = [str(config), "train.steps=4", "train.tokens_per_step=0", "eval.samples=0"]
    assert run("train", [*again, f"{there}2", "--resume"]) == 0
    kept = load_config(tmp_path / "runs" / "b2" / "config.toml").train
    assert kept.tokens_per_step == 256


def test_rank_0_decides_the_size_of_a_step(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a resumed run only rank 0 can read it."""
    from cllm.corpus import read_corpus
    from cllm.learner import Learner

    monkeypatch.setattr(World, "share", lambda self, data: b"640")
    loaded = load_config(config, AUTO)
    learner = Learner(loaded, read_corpus(loaded, accept_rejects=False))
    assert learner.config.train.tokens_per_step == learner.encoded.tokens_per_step == 640
    assert learner.encoded.rows_per_step == 5


def test_too_few_steps_are_said_with_the_command_that_mends_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["train.steps=0", "train.epochs=1", "train.tokens_per_step=4096", "eval.samples=0"]
    assert run("train", [str(config), *few]) == 0
    said = capsys.readouterr().err
    line = next(line for line in said.split("\n") if "too few steps to learn from: 1," in line)
    command = line.split("take: ")[1]
    assert command.startswith(f"python -m cllm.train {config} ")
    assert command.count("train.epochs=") == command.count("train.tokens_per_step=") == 1
    assert run("train", command.split()[3:]) == 0
    out, said = capsys.readouterr()
    assert json.loads(out.strip().split("\n")[-1])["steps"] >= 50 and "too few steps" not in said
    # of two rows no setting makes more
    rows = [json.dumps(row) + "\n" for row in demo_rows(2)]
    (tmp_path / "two.jsonl").write_text("".join(rows), encoding="utf-8")
    two = [f"data.train={tmp_path / 'two.jsonl'}", "train.epochs=10", "train.tokens_per_step=0"]
    assert run("train", [str(config), *few, *two]) == 0
    assert "add rows" in capsys.readouterr().err


def test_the_demos_questions_do_not_measure_other_data(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["data.eval=demo-test", "train.steps=1", "eval.samples=0"]
    assert run("train", [str(config), *options]) == 0
    assert "demo-test" in capsys.readouterr().err
    assert load_config(tmp_path / "runs" / "a" / "config.toml").data.eval == ""


@pytest.mark.parametrize(
    ("name", "rate", "family"),
    [
        ("meta-llama/Llama-3.1-8B", 2.9e-4, "llama"),  # tinker-cookbook: 2.86e-4
        ("Qwen/Qwen3-8B", 4.7e-4, "qwen"),
        ("Qwen/Qwen3.5-4B", 4.9e-4, "qwen"),
        ("THUDM/chatglm3-6b", 2.9e-4, ""),
        ("google/gemma-3-270m", 5.5e-4, ""),
        ("openai-community/gpt2", 5.4e-4, ""),
    ],
)
def test_the_learning_rate_follows_the_formula(name: str, rate: float, family: str) -> None:
    advised = advised_rate(find_config(name)[1])
    assert advised is not None and advised[:2] == (rate, family)
    assert advised_rate({"model_type": "qwen3", "hidden_size": 256}) is None
    nested = {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3", "hidden_size": 4096}}
    assert advised_rate(nested) == Rate(4.7e-4, "qwen", 4096)
    for name in ("d_model", "n_embed"):  # MPT, BLOOM
        assert (found := advised_rate({name: 4096})) and found.hidden == 4096
    assert advised_rate({}) is None and width({}) == 0


def test_auto_is_the_formula_or_refused(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [str(config), "train.steps=1", "eval.samples=0", "train.learning_rate=auto"]
    assert run("train", options) == 2
    said = capsys.readouterr().err
    assert "llama, qwen" in said and said.count("\n") == 1
    monkeypatch.setattr("cllm.learner.advised_rate", lambda _: Rate(3e-3, "qwen", 64))
    assert run("train", options) == 0
    assert load_config(tmp_path / "runs" / "a" / "config.toml").train.learning_rate == 3e-3
    steps = read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")
    assert max(row["lr"] for row in steps if "lr" in row) == 3e-3


def test_a_rate_far_from_the_advised_one_is_said(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [str(config), "train.steps=1", "eval.samples=0"]
    assert run("train", options) == 0
    assert "learning_rate" not in capsys.readouterr().err
    # of few conversations half of it is advised
    for advised, said in ((0.014, False), (0.01, True), (5e-4, True), (0.5, True)):
        monkeypatch.setattr("cllm.learner.advised_rate", lambda _, rate=advised: Rate(rate, "", 64))
        assert run("train", options) == 0
        assert ("train.learning_rate = 0.02 is far" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([3.0, 2.0, 1.0], 0),
        ([3.0, 1.0, 2.0], 5),
        ([1.0, 2.0, 3.0], 0),
        ([2.0], 0),
        ([], 0),
        ([3.0, 1.0, 1.001], 0),
    ],
)
def test_the_step_where_a_run_began_to_overfit_is_said(losses: list[float], step: int) -> None:
    metrics = [{"step": 5 * n, "eval_loss": loss} for n, loss in enumerate(losses)]
    said = turned([{"step": 1, "loss": 0.1}, *metrics])
    assert bool(said) == bool(step) and (f"train.steps={step}" in said or not step)
    assert turned([{**row, "eval_n": 20} for row in metrics]) == said
    assert turned([{**row, "eval_n": 19} for row in metrics]) == ""  # too few to be sure


def test_held_out_rows_that_are_too_long_are_counted(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*demo_rows(3), {"instruction": "很长的问题" * 60, "output": "答"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "held.jsonl").write_text(text, encoding="utf-8")
    options = [f"data.eval={tmp_path / 'held.jsonl'}", "train.steps=1", "eval.samples=0"]
    assert run("train", [str(config), *options]) == 0
    said = capsys.readouterr().err
    assert "3 held out" in said and "left out too_long 1" in said
