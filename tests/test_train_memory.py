"""Out of memory is a step-down: injected at every kind of place, it ends in the adapter of an
undisturbed run, or in one clear line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOTH_KINDS
from safetensors.torch import load_file
from torch import Tensor

from cllm.__main__ import run
from cllm.config import load_config
from cllm.data.encode import Example
from cllm.data.packing import collate
from cllm.learn.ladder import Ladder
from cllm.learn.optim import Objective
from cllm.runs import read_metrics
from cllm.train import Training

OPTIONS = ["lora.dropout=0", "eval.samples=0", "run.snapshot_every=2"]


def boom() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def adapter(training: Training) -> dict[str, Tensor]:
    return load_file(training.run / "adapter" / "adapter_model.safetensors")


def finished(
    config: Path,
    disturb: Callable[[Training], None] = lambda _: None,
    *options: str,
    allow_changes: bool = False,
) -> Training:
    training = Training(load_config(config, [*OPTIONS, *options]), allow_changes=allow_changes)
    disturb(training)
    training.loop()
    training.finish()
    training.close()
    return training


def learn_from(training: Training, objective: Objective) -> None:
    """Give the training another loss."""
    training.learner.trainee = replace(training.learner.trainee, objective=objective)


def over(limit: int) -> Callable[[Training], None]:
    """The forward fits at most `limit` tokens."""

    def disturb(training: Training) -> None:
        objective = training.learner.trainee.objective
        learn_from(
            training,
            lambda model, batch: (
                boom() if len(batch.input_ids) > limit else objective(model, batch)
            ),
        )

    return disturb


def backward_once(training: Training) -> None:
    objective, state = training.learner.trainee.objective, {"left": 1}

    def failing(model: Any, batch: Any) -> Tensor:
        loss: Tensor = objective(model, batch)

        def hook(gradient: Tensor) -> Tensor:
            if training.progress.step == 3 and state["left"]:
                state["left"] = 0
                boom()
            return gradient

        loss.register_hook(hook)
        return loss

    learn_from(training, failing)


def optimizer_once(training: Training) -> None:
    step, state = training.learner.trainee.optimizer.step, {"calls": 0}

    def failing(*args: Any, **kwargs: Any) -> Any:
        state["calls"] += 1
        if state["calls"] == 4:
            # what a real one leaves behind: some parameters and moments are new already
            step(*args, **kwargs)
            boom()
        return step(*args, **kwargs)

    training.learner.trainee.optimizer.step = failing  # type: ignore[method-assign]


def until(rung: str) -> Callable[[Training], None]:
    """No forward fits before the ladder is down at `rung`."""

    def disturb(training: Training) -> None:
        objective = training.learner.trainee.objective
        learn_from(
            training,
            lambda model, batch: (
                objective(model, batch) if getattr(training.learner.ladder, rung) else boom()
            ),
        )

    return disturb


@BOTH_KINDS
def test_every_place_ends_in_the_same_adapter(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cllm.learn.loss

    expected = finished(config)
    curve = [
        row.get("loss", row.get("eval_loss"))
        for row in read_metrics(expected.run / "metrics.jsonl")
    ]
    row_nll = cllm.learn.loss.row_nll

    def evaluation(_training: Training) -> None:
        def small(model: Any, batch: Any, chunk_bytes: int) -> Tensor:
            if not torch.is_grad_enabled() and len(batch.input_ids) > 64:
                boom()
            return row_nll(model, batch, chunk_bytes)

        monkeypatch.setattr(cllm.learn.loss, "row_nll", small)

    places = {
        "forward": over(64),
        "backward": backward_once,
        "optimizer": optimizer_once,
        "embedding": until("embedding_on_cpu"),
        "evaluation": evaluation,
    }
    capsys.readouterr()
    for place, disturb in places.items():
        found = finished(config, disturb)
        said = capsys.readouterr().err
        assert (
            "did not fit into memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in said
        ) == (place != "evaluation"), place
        rows = [
            row.get("loss", row.get("eval_loss"))
            for row in read_metrics(found.run / "metrics.jsonl")
        ]
        assert rows == pytest.approx(curve, abs=1e-5), place
        worst = max(
            (a - b).abs().max().item()
            for a, b in zip(adapter(found).values(), adapter(expected).values(), strict=True)
        )
        assert worst < 1e-5, f"{place}: {worst}"
        newest = max((found.run / "snapshots").glob("step-*")) / "state.json"
        ladder = json.loads(newest.read_text(encoding="utf-8"))["ladder"]  # kept for the next start
        if place == "forward":
            assert ladder["micro_tokens"] <= 64 and not ladder["offload_inputs"]
        assert ladder["embedding_on_cpu"] == (place == "embedding") and ladder["row_tokens"] == 128


@BOTH_KINDS
def test_shorter_rows_need_leave_and_what_never_fits_ends_in_one_line(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def short_rows_only(training: Training) -> None:
        objective = training.learner.trainee.objective
        learn_from(
            training,
            lambda model, batch: (
                objective(model, batch) if training.learner.ladder.row_tokens < 128 else boom()
            ),
        )

    training = finished(config, short_rows_only, allow_changes=True)
    assert (
        training.progress.step == 6
        and training.learner.encoded.rows_per_step == 4
        and "row_tokens 64" in capsys.readouterr().err
    )
    # its ladder is taken up from the snapshot
    assert run("train", [str(config), *OPTIONS, "--resume"]) == 0
    # packed once more, in rows of 64 tokens
    assert capsys.readouterr().err.count("packed rows") == 2
    with pytest.raises(
        Exception, match=r"out of memory \(CUDA out of memory.*nothing is left to give up"
    ) as error:
        finished(config, short_rows_only)
    assert getattr(error.value, "code", "") == "train.memory"


def test_answers_that_do_not_fit_are_left_out_and_training_goes_on(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cllm.serve.engine import Engine

    monkeypatch.setattr(Engine, "_decode", lambda *_: boom())
    assert run("train", [str(config), "eval.samples=4"]) == 0
    out, err = capsys.readouterr()
    assert "no answer, as it does not fit into memory" in err and "Traceback" not in err
    scores = json.loads(out.strip().split("\n")[-1])["eval"]
    assert "exact" not in scores["adapter"] and scores["adapter"]["loss"] < scores["base"]["loss"]


def test_a_row_is_split_at_sequence_boundaries_only() -> None:
    row = collate([Example([1] * n, [-100, *[1] * (n - 1)]) for n in (5, 3, 9, 2)])
    for limit, sizes in ((99, [19]), (19, [19]), (18, [17, 2]), (9, [8, 9, 2]), (1, [5, 3, 9, 2])):
        parts = row.split(limit)
        assert [len(part.input_ids) for part in parts] == sizes and sum(
            part.weight for part in parts
        ) == row.weight
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(
                torch.cat([getattr(part, name) for part in parts]), getattr(row, name)
            )
        assert all(
            part.cu_seqlens[0] == 0 and part.cu_seqlens[-1] == len(part.input_ids) for part in parts
        )
    assert [part.cu_seqlens.tolist() for part in row.split(9)] == [[0, 5, 8], [0, 9], [0, 2]]


def test_the_ladder_gives_up_speed_before_data() -> None:
    row = collate([Example([1] * 40, [1] * 40)] * 3)
    ladder: Ladder | None = Ladder(120, 120)
    rungs = []
    while ladder := ladder.down([row], shorten=True):
        rungs.append(
            (ladder.micro_tokens, ladder.offload_inputs, ladder.embedding_on_cpu, ladder.row_tokens)
        )
    assert rungs[0] == (60, False, False, 120) and rungs[1:3] == [
        (60, True, False, 120),
        (60, True, True, 120),
    ]
    assert Ladder(60, 120, True, True).down([row], shorten=False) is None
