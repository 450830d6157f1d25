"""`cllm.train` from the command line inwards: a run from file to adapter, exact resume, and every
refusal in one line.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOTH_KINDS
from conftest import demo_rows as rows
from safetensors.torch import load_file, save_file

from cllm.__main__ import run
from cllm.config import load_config
from cllm.corpus import read_corpus
from cllm.data.encode import Example
from cllm.evaluate.answers import draw
from cllm.learn.log import CLOCK_FIELDS, RunLog
from cllm.messages import UserError
from cllm.runs import read_metrics
from cllm.train import Training

ROOT = Path(__file__).parents[1]


def adapter_bytes(run_directory: Path) -> bytes:
    return (run_directory / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(run_directory: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k not in CLOCK_FIELDS}
        for row in read_metrics(run_directory / "metrics.jsonl")
    ]


def test_a_run_from_file_to_adapter(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", [str(config)]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out.strip().split("\n")[-1])
    directory = tmp_path / "runs" / "a"
    assert summary["run"] == str(directory) and summary["steps"] == 6
    assert f"python -m cllm.chat {directory}" in err and "reference:" in err
    for name in (
        "config.toml",
        "manifest.json",
        "metrics.jsonl",
        "loss.png",
        "eval.json",
        "samples.jsonl",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "snapshots/step-000006/manifest.json",
    ):
        assert (directory / name).stat().st_size > 0, name
    steps = [row for row in read_metrics(directory / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6] and steps[-1]["loss"] < steps[0][
        "loss"
    ]
    assert {"lr", "grad_norm", "tokens", "supervised_tokens", *CLOCK_FIELDS} <= set(steps[0])
    scores = json.loads((directory / "eval.json").read_text(encoding="utf-8"))
    assert scores["adapter"]["loss"] < scores["base"]["loss"]
    assert set(scores) == {"copy", "majority", "base", "adapter", "drawn"}
    samples = [
        json.loads(line)
        for line in (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(samples) == 4 and {"messages", "reference", "base", "adapter"} <= set(samples[0])
    held_out = read_corpus(load_config(config), accept_rejects=False).held_out
    assert scores["drawn"] == draw(len(held_out), 4, load_config(config).train.seed)
    assert scores["drawn"] != [0, 1, 2, 3], "not the first ones of a sorted file"
    asked = [held_out[number].messages[0].content for number in scores["drawn"]]
    assert asked == [sample["messages"][0]["content"] for sample in samples]
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert f"4 of {len(held_out)} held-out conversations" in page and "6 steps" in page
    assert load_config(directory / "config.toml") == load_config(config)
    # a second run never writes into the first
    before = adapter_bytes(directory)
    assert run("train", [str(config), "train.steps=1", "eval.samples=0"]) == 0
    assert json.loads(capsys.readouterr().out.strip().split("\n")[-1])["run"] == f"{directory}-2"
    assert adapter_bytes(directory) == before


def test_the_adapter_directory_renders_the_trained_token_ids(config: Path) -> None:
    from cllm.data import read_conversations
    from cllm.model.tokenizer import load_tokenizer

    training = Training(load_config(config))
    training.learner.save(training.run)
    conversation = read_conversations(config.parent / "data.jsonl")[0][0]
    reloaded = load_tokenizer(training.run / "adapter")
    for tokenizer in (training.learner.tokenizer, reloaded):
        ids, labels = tokenizer.encode_segments(tokenizer.segments(conversation))
        prompt = tokenizer.encode_chat(conversation.messages[:-1])
        assert ids[: len(prompt)] == prompt and all(
            label == -100 for label in labels[: len(prompt)]
        )
        assert (
            tokenizer.decode([i for i in ids[len(prompt) :] if i not in tokenizer.stop_ids]).strip()
            == conversation.messages[-1].content
        )
    assert reloaded.encode_chat(
        conversation.messages[:-1]
    ) == training.learner.tokenizer.encode_chat(conversation.messages[:-1])
    assert reloaded.stop_ids == training.learner.tokenizer.stop_ids


@BOTH_KINDS
def test_resume_is_bit_exact(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("train", [str(config), "eval.samples=0"]) == 0
    interrupted = f"run.dir={tmp_path / 'runs' / 'b'}"
    log_step = RunLog.step
    for stop_at, name in ((2, "SIGINT"), (3, "SIGTERM"), (5, "SIGHUP")):

        def step(
            self: RunLog,
            values: dict,
            at: int = stop_at,
            number: int = getattr(signal, name, signal.SIGINT),
        ) -> None:
            log_step(self, values)
            if values["step"] == at:
                signal.raise_signal(number)

        monkeypatch.setattr(RunLog, "step", step)
        arguments = [str(config), "eval.samples=0", interrupted] + (
            [] if stop_at == 2 else ["--resume"]
        )
        assert run("train", arguments) == 130
    monkeypatch.setattr(RunLog, "step", log_step)
    assert run("train", [str(config), "eval.samples=0", interrupted, "--resume"]) == 0
    assert not (tmp_path / "runs" / "b-2").exists()
    assert adapter_bytes(tmp_path / "runs" / "b") == adapter_bytes(tmp_path / "runs" / "a")
    assert metrics(tmp_path / "runs" / "b") == metrics(tmp_path / "runs" / "a")


def test_ctrl_c_saves_and_says_how_to_resume(config: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "cllm.train",
        str(config),
        "train.steps=100000",
        "eval.every=100000",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "CLLM_LANG": "en"}
    )
    assert process.stderr
    for line in process.stderr:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130
    run_directory = config.parent / "runs" / "a"
    assert "stopping after this step" in rest
    assert rest.endswith(f"  python -m cllm.train {run_directory} --resume\n")
    assert list((config.parent / "runs" / "a" / "snapshots").glob("step-*"))


def test_a_torn_snapshot_is_named_and_the_one_before_is_used(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", [str(config), "eval.samples=0"]) == 0
    newest = tmp_path / "runs" / "a" / "snapshots" / "step-000006" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    before = adapter_bytes(tmp_path / "runs" / "a")
    assert run("train", [str(config), "eval.samples=0", "--resume"]) == 0
    assert (
        "step-000006 is damaged (state.safetensors does not match its manifest)"
        in capsys.readouterr().err
    )
    assert adapter_bytes(tmp_path / "runs" / "a") == before


def test_resume_refuses_other_settings_and_other_data(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", [str(config), "eval.samples=0"]) == 0
    with (config.parent / "data.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"instruction": "新的", "output": "一行"}\n')
    assert run("train", [str(config), "lora.rank=8", "--resume"]) == 2
    error = capsys.readouterr().err
    assert "lora.rank: 4 -> 8" in error and "data_sha256 differs" in error


def test_harmless_changes_are_listed_and_others_need_leave(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", [str(config), "eval.samples=0"]) == 0
    assert run("train", [str(config), "eval.samples=1", "run.keep=3", "--resume"]) == 0
    assert (
        "changed since the run was started: eval.samples: 0 -> 1; run.keep: 2 -> 3"
        in capsys.readouterr().err
    )
    assert run("train", [str(config), "train.steps=8", "run.keep=3", "--resume"]) == 2
    assert "train.steps: 6 -> 8" in capsys.readouterr().err
    assert (
        run("train", [str(config), "train.steps=8", "run.keep=3", "--resume", "--allow-changes"])
        == 0
    )
    directory = tmp_path / "runs" / "a"
    changes = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["changes"]
    assert changes == [
        "eval.samples: 0 -> 1",
        "run.keep: 2 -> 3",
        "train.steps: 6 -> 8",
        "eval.samples: 1 -> 4",
    ]
    assert (
        load_config(directory / "config.toml").train.steps == 8
        and metrics(directory)[-1]["step"] == 8
    )
    assert (
        run(
            "train",
            [
                str(config),
                "train.steps=8",
                "run.keep=3",
                "lora.rank=8",
                "--resume",
                "--allow-changes",
            ],
        )
        == 2
    )
    assert "snapshot does not belong to this model" in capsys.readouterr().err
    assert load_config(directory / "config.toml").lora.rank == 4  # still what its snapshots are of


def test_a_snapshot_is_due_by_time_and_one_writer_holds_the_run(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(
        load_config(
            config, ["run.snapshot_minutes=1e-9", "run.keep=9", "eval.samples=0", "train.steps=4"]
        )
    )
    assert [path.name for path in (training.run / "snapshots").iterdir()] == ["step-000000"]
    training.loop()
    assert len(list((training.run / "snapshots").iterdir())) == 5
    assert run("train", [str(config), "--resume"]) == 2
    assert "is being written by another process (pid" in capsys.readouterr().err
    training.close()


def test_a_full_disk_ends_in_one_line_and_the_snapshots_stay(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    training = Training(load_config(config, ["eval.samples=0"]))
    (training.run / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(.*No space left"):
        training.loop()
    training.close()
    (training.run / "metrics.jsonl").unlink()
    assert run("train", [str(config), "eval.samples=0", "--resume"]) == 0


def test_early_stop_keeps_the_best_adapter(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "train.steps=60",
        "train.learning_rate=0.3",
        "train.schedule=constant",
        "eval.every=2",
        "eval.patience=2",
        "eval.samples=0",
    ]
    assert run("train", [str(config), *options]) == 0
    assert "stopped early" in capsys.readouterr().err
    rows_ = read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")
    losses = [row["eval_loss"] for row in rows_ if "eval_loss" in row]
    result = json.loads((tmp_path / "runs" / "a" / "eval.json").read_text(encoding="utf-8"))
    assert result["adapter"]["loss"] == pytest.approx(min(losses[1:]), rel=1e-5) and losses[
        -1
    ] > min(losses[1:])


def test_held_out_rows_are_measured_once_an_evaluation(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllm.evaluate import answers

    plain, calls = answers.held_out_loss, []

    def counted(*arguments: Any) -> float:
        calls.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(answers, "held_out_loss", counted)
    assert run("train", [str(config), "eval.samples=0"]) == 0
    told = [row for row in metrics(tmp_path / "runs" / "a") if "eval_loss" in row]
    assert len(calls) == len(told) > 0


def test_init_from_continues_an_adapter_as_it_is(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", [str(config), "eval.samples=0"]) == 0
    init_from = f"lora.init_from={tmp_path / 'runs' / 'a'}"
    capsys.readouterr()
    training = Training(load_config(config, [init_from]))
    assert "is continued" not in capsys.readouterr().err
    training.learner.save(training.run)
    training.close()
    rank, alpha = training.config.lora.rank, training.config.lora.alpha
    other = Training(load_config(config, [init_from, f"lora.rank={rank + 3}", "lora.alpha=5"]))
    other.close()
    assert f"lora.rank {rank + 3} -> {rank}, lora.alpha 5.0 -> {alpha}" in capsys.readouterr().err
    stored = load_config(other.run / "config.toml").lora
    assert (stored.rank, stored.alpha) == (rank, alpha)
    first, second = (
        load_file(tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors")
        for name in ("a", "a-2")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("tracker", "files"), [("tensorboard", "events.out.*"), ("swanlab", "*")])
def test_trackers_write_with_their_real_package(
    config: Path, tmp_path: Path, tracker: str, files: str
) -> None:
    pytest.importorskip(tracker)
    assert (
        run("train", [str(config), f"log.tracker={tracker}", "train.steps=2", "eval.samples=0"])
        == 0
    )
    assert any(
        path.stat().st_size
        for path in (tmp_path / "runs" / "a" / tracker).rglob(files)
        if path.is_file()
    )


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run("train", arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and not out
    return err


def test_bad_input_is_one_clear_line_and_leaves_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, junk, silent = (tmp_path / name for name in ("empty.json", "junk.jsonl", "silent.jsonl"))
    empty.write_text("[]", encoding="utf-8")
    good = json.dumps({"instruction": "问", "output": "答"}, ensure_ascii=False)
    junk.write_text(
        "\n".join([good, "{broken", '{"foo": 1}', good.replace("问", "二")]), encoding="utf-8"
    )
    silent.write_text(
        json.dumps({"instruction": "很长的问题" * 60, "output": "答"}, ensure_ascii=False),
        encoding="utf-8",
    )
    cases = {
        (str(tmp_path / "none.toml"),): "cannot read the config",
        (str(config), "data.train=missing.jsonl"): "missing.jsonl",
        (str(config), f"data.train={empty}"): "no usable conversation",
        (str(config), "train.stepz=3"): "did you mean 'steps'?",
        (str(config), f"model.path={tmp_path / 'nowhere'}"): "nowhere",
        (str(config), f"data.train={junk}"): "junk.jsonl:2: parse_error",
        (str(config), f"data.train={silent}", "data.held_out=0"): "longer than a row of 128 tokens",
        (str(config), "lora.targets=['nothing']"): "matches no linear layer",
        (str(config), "model.template=nonsense"): "nonsense",
        (str(config), "--resume"): "no usable snapshot",
    }
    for arguments, expected in cases.items():
        error = refused(list(arguments), capsys)
        assert expected in error, f"{arguments}: {error}"
    assert not (tmp_path / "runs").exists()


def test_config_and_data_errors_come_before_torch_is_loaded(config: Path) -> None:
    code = (
        "import sys; from cllm.__main__ import run; code = run('train', sys.argv[1:]);"
        "assert 'torch' not in sys.modules, 'torch was loaded'; sys.exit(code)"
    )
    for override in ("data.train=missing.jsonl", "lora.rnk=3"):
        result = subprocess.run(
            [sys.executable, "-c", code, str(config), override],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and result.stderr.count("\n") <= 2, result.stderr


def test_rejects_over_a_fifth_can_be_accepted(config: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(20)) + "{broken\n" * 10,
        encoding="utf-8",
    )
    with pytest.raises(UserError, match=r"33% of the rows were rejected \(10\)"):
        Training(load_config(config, [f"data.train={mixed}"]))
    assert (
        len(
            Training(
                load_config(config, [f"data.train={mixed}"]), accept_rejects=True
            ).learner.encoded.rows.examples
        )
        == 16
    )


def test_a_diverging_run_names_the_first_module(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(
            "train",
            [
                str(config),
                "train.learning_rate=1e30",
                "train.max_norm=0",
                "train.steps=50",
                "eval.every=100",
            ],
        )
        == 2
    )
    error = capsys.readouterr().err
    assert "is not finite" in error and "first at: model.layers" in error


def test_a_rate_of_a_thousand_ends_and_never_beating_the_base_is_said(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("train", [str(config), "train.learning_rate=1e3", "eval.samples=0"]) == 2
    assert (
        "loss or gradient is not finite" in capsys.readouterr().err
        and not (tmp_path / "runs" / "a" / "adapter").exists()
    )
    worse = itertools.count(5)
    monkeypatch.setattr("cllm.evaluate.answers.held_out_loss", lambda *_: float(next(worse)))
    assert run("train", [str(config), "eval.samples=0", "train.steps=1"]) == 0
    assert "no evaluation was better than the base's own (5.000)" in capsys.readouterr().err


def test_a_base_with_nan_is_named_and_nothing_is_overwritten(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", [str(config), "eval.samples=0"]) == 0
    before = adapter_bytes(tmp_path / "runs" / "a")
    base, broken = Path(load_config(config).model.path), tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for setting in ("model.quantize=none", "model.quantize=nf4"):
        assert run("train", [str(config), f"model.path={broken}", setting]) == 2
        assert "model.layers.1.mlp.down_proj.weight holds NaN" in capsys.readouterr().err
    assert (
        adapter_bytes(tmp_path / "runs" / "a") == before
        and not (tmp_path / "runs" / "a-2" / "adapter").exists()
    )


def test_nothing_to_learn_and_nothing_learned_both_fail(config: Path) -> None:
    training = Training(load_config(config, ["data.held_out=0"]))
    masked = [
        Example(e.input_ids, [-100] * len(e.labels)) for e in training.learner.encoded.rows.examples
    ]
    training.learner.encoded.rows.examples = masked
    with pytest.raises(UserError, match="step 1: the loss is exactly 0"):
        training.loop()
    still = Training(
        load_config(config, ["data.held_out=0", "train.learning_rate=0", "train.steps=1"])
    )
    still.loop()
    with pytest.raises(UserError, match="the adapter is the same after 1 steps"):
        still.finish()
    assert not (still.run / "adapter").exists()


def test_less_data_than_a_step_and_a_sequence_longer_than_a_row(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.jsonl"
    made = [*rows(4), {"instruction": "很长的问题" * 60, "output": "答"}]
    few.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8"
    )
    assert (
        run(
            "train",
            [
                str(config),
                f"data.train={few}",
                "data.held_out=0",
                "train.tokens_per_step=1024",
                "train.steps=2",
            ],
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "left out too_long 1" in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_as_data_cannot_hang_the_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl" in refused([str(config), f"data.train={tmp_path / 'pipe.jsonl'}"], capsys)


def test_a_jump_of_the_loss_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, 30)
    for step in range(1, 31):
        loss = 7.5 if step == 20 else 2.0 + 0.3 * (step % 3)
        log.step(
            {
                "step": step,
                "loss": loss,
                "lr": 1e-4,
                "grad_norm": 1.0,
                "tokens": 1,
                "tokens_per_second": 1.0,
                "peak_memory_bytes": 0,
            }
        )
    spikes = [line for line in capsys.readouterr().err.splitlines() if "jumped" in line]
    assert len(spikes) == 1 and spikes[0].startswith(
        "step 20: the loss jumped to 7.500; of the last 19 steps none was above 2.600"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the proof forks")
@pytest.mark.parametrize("kind", [[], ["--preference"]], ids=["sft", "preference"])
def test_killed_runs_end_as_if_nothing_had_happened(kind: list[str]) -> None:
    counts = ["--kills", "2", "--flips", "1", "--disk", "0"]
    command = [sys.executable, "bench/crash.py", *counts, *kind]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert (
        done.returncode == 0
        and report["kill"]["identical"] == 2
        and report["flip"]["named"] == report["flip"]["identical"] == 1
    ), report


def test_mixture_weights_and_continued_pretraining(config: Path, tmp_path: Path) -> None:
    half = f"data.train=[{{path={json.dumps(str(tmp_path / 'data.jsonl'))}, weight=1.5}}]"
    assert (
        len(Training(load_config(config, [half, "data.held_out=0"])).learner.encoded.rows.examples)
        == 60
    )
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(
            json.dumps({"text": f"第{n}段文字。"}, ensure_ascii=False) + "\n" for n in range(20)
        ),
        encoding="utf-8",
    )
    training = Training(
        load_config(
            config, [f"data.train={texts}", "data.kind=text", "data.held_out=0", "eval.samples=0"]
        )
    )
    assert len(training.learner.encoded.rows.examples) == 20
    assert training.loop() > 0 and training.finish() == {}
