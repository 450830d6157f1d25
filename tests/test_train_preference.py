"""Preference tuning in the one loop: two passes equal one, a pair in two rows, SFT's peak, exact
resume, ranks, memory that runs out, and bad input in one line.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import demo_rows, pairs_config
from safetensors.torch import load_file
from test_learn_loss import FP32, adapted, gradients
from test_train import ROOT, metrics

from cllm.__main__ import run
from cllm.config import PreferenceConfig
from cllm.data.encode import Example
from cllm.data.packing import PackedBatch, PackedRows
from cllm.evaluate.report import warn_of_length
from cllm.evaluate.results import Evaluation, Sample
from cllm.learn import preference_loss, row_nll, sft_loss
from cllm.learn.dist import World
from cllm.learn.log import RunLog
from cllm.learn.optim import Trainee, make_optimizer
from cllm.learn.preference import LOSSES, Preference
from cllm.learn.proof import peak_bytes
from cllm.messages import say


def pair_examples(count: int, seed: int = 0) -> list[Example]:
    """Two answers to each of `count` prompts: chosen, rejected, chosen, …"""
    draw = random.Random(seed)
    listed = []
    for _ in range(count):
        prompt = [draw.randrange(3, 96) for _ in range(draw.randrange(3, 8))]
        for _ in range(2):
            answer = [draw.randrange(3, 96) for _ in range(draw.randrange(1, 14))]
            labels = [-100] * len(prompt) + answer
            listed.append(Example(prompt + answer, labels))
    return listed


def step_rows(examples: list[Example], row_tokens: int, **options: Any) -> list[PackedBatch]:
    rows = PackedRows(
        examples, row_tokens, numbers=list(range(len(examples))), step_rows=99, **options
    )
    return rows.take(len(rows))


def trainee(model: Any, settings: PreferenceConfig, reference: torch.Tensor) -> Trainee:
    return Trainee(
        model,
        sft_loss,
        make_optimizer(model, 1e-3),
        FP32,
        FP32.scaler(),
        0.0,
        Preference(settings, reference, row_nll),
    )


def step_gradients(model: Any, work: Trainee, rows: list[PackedBatch], **options: Any) -> Any:
    """(loss, gradients) of a step; the optimizer's own change is kept from happening."""
    kept: list[torch.Tensor] = []
    work.optimizer.step = lambda *_, **__: kept.append(gradients(model))  # type: ignore[method-assign]
    stats = work.step(rows, **options)
    return stats, kept[0]


def one_pass(
    model: Any, examples: list[Example], settings: PreferenceConfig, reference: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Every answer alone with a graph of its own: the formula, without anything of the step."""
    tempered, plain, tokens = [], [], []
    for place, example in enumerate(examples):
        (row,) = PackedRows([example], 99).take(1)
        (other,) = PackedRows([examples[place ^ 1]], 99).take(1)
        nll = row_nll(model, row)[row.supervised]
        shared = min(len(nll), other.weight)
        tempered.append(-(nll[:shared].sum() + settings.ld_alpha * nll[shared:].sum()))
        plain.append(nll.sum())
        tokens.append(len(nll))
    sums, counts = torch.stack(tempered).double(), torch.tensor(tokens)
    losses = preference_loss(
        sums[::2],
        sums[1::2],
        reference[::2],
        reference[1::2],
        counts[::2],
        counts[1::2],
        loss=settings.loss,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        gamma=settings.gamma,
    )
    loss = losses.mean() + settings.sft * torch.stack(plain[::2]).sum() / counts[::2].sum()
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("ld_alpha", [1.0, 0.4])
@pytest.mark.parametrize("loss", LOSSES)
def test_two_passes_over_packed_rows_equal_one_over_single_answers(
    loss: str, ld_alpha: float
) -> None:
    examples = pair_examples(5)
    settings = PreferenceConfig(
        loss=loss,  # type: ignore[arg-type]
        beta=0.3,
        label_smoothing=0.1,
        sft=0.5,
        ld_alpha=ld_alpha,
    )
    model = adapted()
    reference = (
        torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 40
    )
    value, truth = one_pass(model, examples, settings, reference)
    model.zero_grad()
    for row_tokens, micro in ((200, 10**6), (24, 10**6), (64, 20)):
        rows = step_rows(examples, row_tokens)
        stats, ours = step_gradients(
            model, trainee(model, settings, reference), rows, micro_tokens=micro
        )
        assert stats.loss == pytest.approx(value, rel=1e-5)
        assert (ours - truth).norm() < 1e-5 * truth.norm(), row_tokens
    rows = step_rows(examples, 24)
    assert any(
        len({int(n) // 2 for n in row.numbers}) > len(row.numbers) / 2  # type: ignore[union-attr]
        for row in rows
    )  # a pair lay in two rows


def test_a_vote_is_its_half_and_says_nothing_of_the_other() -> None:
    examples = pair_examples(2)
    model = adapted()
    settings = PreferenceConfig(loss="apo_zero_unpaired", beta=0.3)
    reference = torch.full((8,), -30.0, dtype=torch.float64)
    rows = PackedRows([examples[0], examples[3]], 99, numbers=[0, 3], step_rows=9).take(1)
    stats, ours = step_gradients(model, trainee(model, settings, reference), rows)
    (good,), (bad,) = (PackedRows([examples[i]], 99).take(1) for i in (0, 3))
    model.zero_grad()
    a, b = (-row_nll(model, row).sum() + 30 for row in (good, bad))
    loss = (1 - torch.sigmoid(0.3 * a) + torch.sigmoid(0.3 * b)) / 2
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    truth = gradients(model)
    assert (ours - truth).norm() < 1e-5 * truth.norm()


def test_both_answers_are_in_one_step_and_every_pair_once_an_epoch() -> None:
    examples = pair_examples(40)
    for step, row_tokens, single in ((1, 24, False), (3, 40, False), (4, 40, True)):
        rows = PackedRows(
            examples, row_tokens, numbers=list(range(80)), step_rows=step, single=single, seed=3
        )
        seen: list[int] = []
        steps = int(rows.steps(step))
        while len(seen) < 80:
            batch = rows.take(step)
            numbers = torch.cat([row.numbers for row in batch]).tolist()  # type: ignore[misc]
            assert len(batch) <= max(step, 2) and {n ^ 1 for n in numbers} == set(numbers)
            seen += numbers
            steps -= 1
        assert sorted(seen) == list(range(80)) and rows.state == (1, 0) and steps >= 0
        rows.seek(0, int(rows.steps(step)) - 1)
        assert rows.take(step)


def test_the_peak_is_sfts() -> None:
    examples = pair_examples(60)
    rows = step_rows(examples, 256)
    peaks = {}
    for name in ("none", "dpo"):
        model = adapted()
        settings = PreferenceConfig(loss="dpo", sft=0.1, ld_alpha=0.5)
        work = trainee(model, settings, torch.empty(0))
        measure = partial(work.preference.nats, model, rows, FP32.autocast, World())  # type: ignore[union-attr]
        nats = measure()
        numbers = torch.cat([row.numbers for row in rows])  # type: ignore[misc]
        reference = torch.zeros(120, dtype=torch.float64).index_copy(0, numbers, -nats[0])
        work = trainee(model, settings, reference)
        if name == "none":
            work = Trainee(model, sft_loss, work.optimizer, FP32, FP32.scaler())
        work.step(rows)
        peaks[name] = peak_bytes(lambda: work.step(rows), model, work.optimizer)  # noqa: B023
        if name == "dpo":
            peaks["reference"] = peak_bytes(measure, model, work.optimizer)
    assert peaks["dpo"] <= 1.02 * peaks["none"] and peaks["reference"] <= peaks["none"]


# ---------------------------------------------------------------------- the program


@pytest.fixture()
def pairs(tmp_path: Path, checkpoint: Path) -> Path:
    """`config` with pairs and a preference loss."""
    return pairs_config(tmp_path, checkpoint)


def test_a_run_on_pairs_from_file_to_adapter(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", [str(pairs), "train.learning_rate=0.1", "train.steps=20"]) == 0
    summary = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    directory = tmp_path / "runs" / "a"
    assert summary["steps"] == 20
    rows = metrics(directory)
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy is its reference
    assert abs(steps[0]["margin"]) < 1e-4
    figures = "accuracy chosen_logp rejected_logp chosen_tokens rejected_tokens kl".split()
    assert {*figures} <= set(steps[0]) and steps[-1]["kl"] > 0
    held = [row for row in rows if "eval_loss" in row]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"] and held[-1]["eval_accuracy"] > 0.5
    assert summary["eval"]["adapter"]["loss"] > 0
    told = summary["eval"]["preference"]
    assert told["accuracy_low"] <= told["accuracy"] <= told["accuracy_high"] and told["margin"] > 0
    assert told == json.loads((directory / "eval.json").read_text(encoding="utf-8"))["preference"]
    reference = load_file(directory / "snapshots" / "step-000020" / "state.safetensors")
    assert reference["reference"].isfinite().all()


def test_the_reference_is_measured_once_and_kept(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllm.learner import Learner

    monkeypatch.setenv("CLLM_DATA_CACHE", str(tmp_path / "cache"))
    options = [str(pairs), "eval.samples=0", "train.steps=2"]
    assert run("train", options) == 0
    measured = Learner._answer_nats
    monkeypatch.setattr(Learner, "_answer_nats", lambda _: pytest.fail("measured again"))
    assert run("train", options) == 0
    assert metrics(tmp_path / "runs" / "a") == metrics(tmp_path / "runs" / "a-2")
    monkeypatch.setattr(Learner, "_answer_nats", measured)
    init = f"lora.init_from={tmp_path / 'runs' / 'a'}"
    assert run("train", [*options, init]) == 0  # another policy at step 0, another reference
    first, third = (
        load_file(tmp_path / "runs" / name / "snapshots" / "step-000000" / "state.safetensors")
        for name in ("a", "a-3")
    )
    assert not torch.equal(first["reference"], third["reference"])
    (start, *_) = metrics(tmp_path / "runs" / "a-3")
    assert start["eval_margin"] == pytest.approx(0, abs=1e-4)


def test_early_stop_keeps_the_best_adapter(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train.steps=60", "train.learning_rate=0.3", "train.schedule=constant"]
    options += ["eval.every=2", "eval.patience=2", "eval.samples=0"]
    assert run("train", [str(pairs), *options]) == 0
    assert "stopped early" in capsys.readouterr().err
    held = [row for row in metrics(tmp_path / "runs" / "a") if "eval_loss" in row]
    best = min(range(len(held)), key=lambda number: held[number]["eval_loss"])
    assert held[best]["best"] and best == len(held) - 3


def test_the_plan_is_sfts_and_counts_both_answers(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = []
    for loss in ("none", "dpo"):
        options = ["--plan", str(pairs), "train.steps=0", f"preference.loss={loss}"]
        assert run("bench", options) == 0
        (plan,) = json.loads(capsys.readouterr().out.strip().split("\n")[-1])["plans"]
        plans.append(plan)
    sft, dpo = plans
    assert sft["items"] == dpo["items"] and sft["fits"] == dpo["fits"]
    assert sft["longest_row"] == dpo["longest_row"]
    assert dpo["time"]["tokens"] > 1.6 * sft["time"]["tokens"]


def test_what_is_measured_goes_one_by_one_where_memory_is_short(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllm.learner import Learner

    monkeypatch.setenv("CLLM_DATA_CACHE", "none")  # or the second run finds the first's reference
    options = [str(pairs), "eval.samples=0", "train.steps=2"]
    assert run("train", options) == 0
    whole, refused = Learner._token_nll, []

    def short(self: Learner, model: Any, batch: PackedBatch) -> torch.Tensor:
        if len(batch.input_ids) > 64 and self.trainee.preference.reference.numel() == 0:  # type: ignore[union-attr]
            refused.append(batch)
            raise torch.OutOfMemoryError("no")
        return whole(self, model, batch)

    monkeypatch.setattr(Learner, "_token_nll", short)
    assert run("train", options) == 0 and refused
    for ours, theirs in zip(*(metrics(tmp_path / "runs" / n) for n in ("a", "a-2")), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"accuracy": 1.0, "margin": 0.2, "chosen_reward": 0.1}, "only over-fit"),
        ({"accuracy": 0.9, "margin": 0.2, "chosen_reward": -0.1}, "preference.sft"),
        ({"accuracy": 0.9, "margin": 0.2, "chosen_reward": 0.1}, ""),
    ],
)
def test_what_goes_wrong_is_said_once_with_what_to_do(
    values: dict[str, float], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, 60)
    usual = {"loss": 0.6, "lr": 1e-5, "grad_norm": 1.0, "tokens": 9, "tokens_per_second": 9.0}
    for step in range(1, 61):
        log.step({"step": step, **usual, "peak_memory_bytes": 0, **values})
    said = capsys.readouterr().err
    assert said.count("for 20 steps" if "sft" in code else code or "step    60/60") == 1
    assert ("preference.sft" in said) == (code == "preference.sft")


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"instruction": "问", "output": "答"}], [], "no_rejected"),
        ([{"prompt": "问", "chosen": "答", "rejected": "答。"}], [], "identical_pair"),
        ([{"instruction": "问", "vote": "tie", "answers": ["甲", "乙"]}], [], "no_winner"),
        ([{"prompt": "问", "completion": "答", "label": True}], [], "apo_zero_unpaired"),
        (
            [{"prompt": "问" * 300, "chosen": "答", "rejected": "不"}],
            ["data.held_out=0"],
            "longer than a row",
        ),
        (
            [{"prompt": "问", "chosen": "答", "rejected": "不"}],
            ["lora.dropout=0.1"],
            "lora.dropout",
        ),
        ([{"prompt": "问", "chosen": "答", "rejected": "不"}], ["preference.beta=-1"], "beta"),
    ],
)
def test_bad_input_is_one_clear_line_before_weights_are_loaded(
    pairs: Path,
    tmp_path: Path,
    rows: list[dict[str, Any]],
    options: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("cllm.learner.assemble", lambda *_, **__: pytest.fail("weights are loaded"))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    assert run("train", [str(pairs), *options]) == 2
    out, err = capsys.readouterr()
    assert expected in err and "Traceback" not in err and not out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("form", ["text", "messages"])
def test_sft_on_pairs_learns_the_chosen_answers_and_says_so(
    form: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if form == "messages":
        file = tmp_path / "data.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["rejected"] = [{"role": "assistant", "content": row["rejected"]}]
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = [str(pairs), "preference.loss=none", "eval.samples=0", "train.steps=2"]
    assert run("train", options) == 0
    assert "chosen answers are learned" in capsys.readouterr().err
    assert "margin" not in metrics(tmp_path / "runs" / "a")[1]


def test_votes_on_single_answers_train_with_the_loss_that_takes_them(
    pairs: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": row["instruction"], "completion": row["output"], "label": number % 3 > 0}
        for number, row in enumerate(demo_rows())
    ]
    rows += [{"prompt": "写出数字1", "completion": "一一", "label": 0}]  # a pair with a good one
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    options = [str(pairs), "preference.loss=apo_zero_unpaired", "eval.samples=2"]
    assert run("train", options) == 0
    rows = metrics(tmp_path / "runs" / "a")
    held = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert held[0] == pytest.approx(0.5, abs=1e-4) and held[-1] < held[0]


def test_the_demos_test_set_has_no_pairs_so_a_share_is_held_out(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """cllm.toml evaluates on it, and a user sets no more than data.train and the loss."""
    options = ["data.eval=demo-test", "data.held_out=0.2", "train.steps=1", "eval.samples=0"]
    assert run("train", [str(pairs), *options]) == 0
    said = capsys.readouterr().err
    assert "demo-test" in said and "try: " not in said  # few pairs are not to be seen more often
    assert [row for row in metrics(tmp_path / "runs" / "a") if "eval_loss" in row]


@pytest.mark.parametrize(("answer", "said"), [("好好好好好好", True), ("好好", False)])
def test_answers_that_grow_longer_than_the_chosen_ones_are_said(
    answer: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = Sample("", [], "好好", {"base": "好", "adapter": answer}, {})
    warn_of_length(Evaluation({}, [sample]))
    assert ("3.0 times" in capsys.readouterr().err) is said


def test_a_reference_is_of_the_very_answers(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others held out, or others numbered, are measured anew: at step 0 the policy is its
    reference, which makes every loss ln 2.
    """
    monkeypatch.setenv("CLLM_DATA_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for name, held in (("one", rows[:4]), ("other", rows[4:8])):
        told = [{**row, "instruction": f"{name}: {row['instruction']}"} for row in held]
        text = "".join(json.dumps(row) + "\n" for row in told)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    options = [str(pairs), "train.steps=1", "eval.samples=0"]
    assert run("train", [*options, f"data.eval={json.dumps(str(tmp_path / 'one.jsonl'))}"]) == 0
    other = f"data.eval={json.dumps(str(tmp_path / 'other.jsonl'))}"
    assert run("train", [*options, other]) == 0
    long = {**rows[0], "instruction": "long " * 400}  # dropped, and all after it move up
    text = "".join(json.dumps(row) + "\n" for row in [long, *rows])
    data.write_text(text, encoding="utf-8")
    assert run("train", [*options, other]) == 0
    for name in ("a", "a-2", "a-3"):
        told = metrics(tmp_path / "runs" / name)
        assert told[0]["eval_loss"] == pytest.approx(0.6931, abs=1e-3), name
        (step,) = [row for row in told if "loss" in row]
        assert step["loss"] == pytest.approx(0.6931, abs=1e-3), name


@pytest.mark.parametrize("changed", ["answers", "number", "ld_alpha=0.5", "quantize=nf4"])
def test_a_resumed_run_has_the_reference_of_its_very_answers(
    changed: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLLM_DATA_CACHE", "none")
    options = [str(pairs), "eval.samples=0", "train.learning_rate=0.05"]
    assert run("train", [*options, "train.steps=2"]) == 0
    data = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    if changed == "answers":
        rows = [{**row, "rejected": f"{row['rejected']}错"} for row in rows]
    elif changed == "number":
        rows = [{"prompt": "新问题", "chosen": "好", "rejected": "坏"}, *rows]
    else:
        options.append(f"{'model' if 'quantize' in changed else 'preference'}.{changed}")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run("train", [*options, "train.steps=3", "--resume", "--allow-changes"]) == 0
    assert run("train", [*options, "train.steps=0", "train.epochs=1"]) == 0  # from step 0
    resumed, fresh = (
        load_file(max((tmp_path / "runs" / name / "snapshots").iterdir()) / "state.safetensors")
        for name in ("a", "a-2")
    )
    assert torch.equal(resumed["reference"], fresh["reference"])


def test_a_step_that_is_taken_back_after_a_change_keeps_its_reference(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot it goes back to has the reference of other answers; what would be measured now
    is of a policy that has learned.
    """
    monkeypatch.setenv("CLLM_DATA_CACHE", "none")
    options = [str(pairs), "eval.samples=0", "train.learning_rate=0.05"]
    assert run("train", [*options, "train.steps=2"]) == 0
    options += ["preference.ld_alpha=0.5", "train.steps=4"]
    updates: list[float] = []

    def short(parameters: Any, max_norm: float) -> torch.Tensor:
        updates.append(max_norm)
        if len(updates) == 1:
            raise torch.OutOfMemoryError("no")
        return clip(parameters, max_norm)

    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", short)
    assert run("train", [*options, "--resume", "--allow-changes"]) == 0 and len(updates) == 3
    assert run("train", options) == 0  # from step 0
    resumed, fresh = (
        load_file(tmp_path / "runs" / name / "snapshots" / "step-000004" / "state.safetensors")
        for name in ("a", "a-2")
    )
    assert torch.equal(resumed["reference"], fresh["reference"])


@pytest.mark.parametrize("changed", ["loss", "held-out rows"])
def test_a_best_loss_of_another_measure_keeps_no_adapter_from_being_saved(
    changed: str, pairs: Path, tmp_path: Path
) -> None:
    """IPO starts at 25, DPO at 0.69: what was learned after the change was thrown away."""
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text("utf-8").splitlines()]
    for name, end in (("easy", ""), ("hard", "?!" * 20)):
        told = [{**row, "instruction": f"{name} {row['instruction']}"} for row in rows[:4]]
        told = [{**row, "chosen": f"{row['chosen']}{end}"} for row in told]
        text = "".join(json.dumps(row) + "\n" for row in told)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    kind = "dpo" if changed == "loss" else "none"
    options = [str(pairs), f"preference.loss={kind}", "eval.samples=0", "train.learning_rate=0.01"]
    files = (json.dumps(str(tmp_path / name)) for name in ("easy.jsonl", "hard.jsonl"))
    easy, hard = (f"data.eval={file}" for file in files)
    assert run("train", [*options, easy, "train.steps=4"]) == 0
    first = load_file(tmp_path / "runs" / "a" / "adapter" / "adapter_model.safetensors")
    change = [hard] if changed == "held-out rows" else [easy, "preference.loss=ipo"]
    again = [*options, *change, "train.steps=8", "--resume", "--allow-changes"]
    assert run("train", again) == 0
    held = [row for row in metrics(tmp_path / "runs" / "a") if "eval_loss" in row]
    least = min(row["eval_loss"] for row in held if row["step"] >= 4)
    assert [row["best"] for row in held if row["eval_loss"] == least] == [True]
    last = load_file(tmp_path / "runs" / "a" / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_sft_on_a_mapped_rejected_column_says_what_is_learned(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "named.jsonl"
    rows = [{"题": f"第{n}问", "好": "对", "坏": "错"} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = "data.columns={user='题', assistant='好', rejected='坏'}"
    options = [f"data.train={json.dumps(str(path))}", columns, "train.steps=1", "eval.samples=0"]
    for loss in ("none", "dpo"):
        assert run("train", [str(pairs), *options, f"preference.loss={loss}"]) == 0
        said = capsys.readouterr().err
        assert (say("train.chosen_only") in said) == (loss == "none")


def test_single_votes_that_a_loss_on_pairs_leaves_out_are_counted(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    votes = [{"prompt": f"第{n}个问题", "completion": "好", "label": n} for n in (0, 1, 1)]
    with (tmp_path / "data.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**vote, "n": n}) + "\n" for n, vote in enumerate(votes))
    options = ["data.held_out=0", "data.dedup=false", "train.steps=1", "eval.samples=0"]
    assert run("train", [str(pairs), *options]) == 0
    assert "single_answer 3" in capsys.readouterr().err


def test_a_score_of_scripted_votes_makes_the_liked_answer_common() -> None:
    command = [sys.executable, "bench/preference_votes.py", "--votes", "20", "--held", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    report = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, report
    assert report["short_after"] >= report["short_before"] + 0.2
    assert report["votes"]["a"] + report["votes"]["b"] == 20
