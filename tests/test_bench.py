"""The bench program: the plan without torch, a measured step, the census itself."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cllm import bench
from cllm.__main__ import run
from cllm.config import load_config
from cllm.data.sources import prepare
from cllm.fit import estimate_vram
from cllm.memory import GIB
from cllm.messages import UserError
from cllm.model.lora import lora_layers
from cllm.plan import settings_of
from cllm.shapes import find_config


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest row that fits is sought up to 4,096 tokens: longer ones take minutes to trace."""
    monkeypatch.setattr("cllm.fit.LONGEST_ROW", 4096)


@pytest.mark.usefixtures("short_rows")
def test_plan_ends_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--plan", "Qwen/Qwen3-0.6B", "memory.budget_gib=2"]) == 0
    said = capsys.readouterr().out
    plan = json.loads(said.splitlines()[-1])["plans"][0]
    assert plan["model"] == "Qwen/Qwen3-0.6B" and plan["quantize"] == "nf4"
    assert plan["total"] == sum(plan["items"].values())
    assert "MiB" in said


def test_the_plan_answers_with_commands_that_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cllm.fit.LONGEST_ROW", 10240)
    name = "HuggingFaceTB/SmolLM2-135M"
    original = find_config(name)[1]

    def needs(config: list[str]) -> float:
        settings = settings_of(load_config(config[0], config[1:]), "bf16", "cuda")
        return estimate_vram(original, settings).total / GIB

    for budget, answer, count in (
        (1.25, "fits as configured", 2),
        (1.0, "fits with", 1),
        (0.7, "does not fit", 0),
    ):
        assert bench.main(["--plan", name, f"memory.budget_gib={budget}"]) == 0
        out, progress = capsys.readouterr()
        *lines, document = out.splitlines()
        plan = json.loads(document)["plans"][0]
        assert f"planning {name}" in progress  # it takes long where other things run
        assert answer in lines[0] and name in lines[0]
        least = min(step["total"] for step in [plan, *plan["ladder"]])
        assert (least > budget * GIB) == (answer == "does not fit")
        said = [shlex.split(line) for line in lines if line.startswith("  python -m cllm.train")]
        typed = [words[3:] for words in said]
        assert len(typed) == count
        for command in typed:
            assert needs(command) <= budget and f"memory.budget_gib={budget}" in command
            assert load_config(command[0], command[1:]).model.path == name
        fixed = (
            "preset:",
            "model.path",
            "data.train",
            "run.dir",
            "memory.budget_gib",
            "train.row_",
        )
        for word in typed[-1] if typed else ():  # nothing that is not needed
            if not word.startswith(fixed):
                assert needs([other for other in typed[-1] if other != word]) > budget, word
        text = "\n".join(lines)
        assert "recomputed_layer" not in text and "kept_layer" not in text
        assert not re.search(r"(?<![\w.=])-1\b", text) and "million tokens" in text
        assert ("time on this machine's CPU" in text) == (not torch.cuda.is_available())


@pytest.mark.usefixtures("short_rows")
def test_plan_of_a_config_follows_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.toml"
    file.write_text(
        '[model]\npath = "THUDM/chatglm3-6b"\n[lora]\nrank = 4\n[train]\nrow_tokens = 4096\n',
        encoding="utf-8",
    )
    assert (
        bench.main(
            [
                "--plan",
                str(file),
                "model.quantize=nf4",
                "memory.budget_gib=5",
                "train.tokens_per_step=4096",
            ]
        )
        == 0
    )
    plan = last_json(capsys)["plans"][0]  # type: ignore[index]
    assert (
        plan["rank"],
        plan["row_tokens"],
        plan["quantize"],
        plan["budget_gib"],
        plan["fits"],
    ) == (4, 4096, "nf4", 5.0, False)
    assert plan["ladder"][-1]["total"] <= 5 * 2**30


@pytest.mark.usefixtures("short_rows")
def test_plan_of_a_preset_needs_no_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--plan", "preset:qwen3-4b", "data.train=mine.jsonl"]) == 0
    output = capsys.readouterr()
    plan = json.loads(output.out.splitlines()[-1])["plans"][0]
    assert plan["fits"] and plan["time"]["tokens"] > 900_000 and "mine.jsonl" in output.err
    config = bench.config_of("preset:qwen3-4b", [])
    assert bench._work(config, {}, 1.0, named=False) is None
    told = capsys.readouterr().err
    assert "no data were named" in told and "data.jsonl" not in told


@pytest.mark.parametrize("loss", ["none", "dpo"])
def test_the_plan_counts_the_tokens_of_the_config_that_check_wrote(
    loss: str, tmp_path: Path
) -> None:
    data, file = tmp_path / "own.jsonl", tmp_path / "own.toml"
    row = {"prompt": "What is it?", "chosen": "It is this one. " * 9, "rejected": "这个吧。" * 20}
    rows = ({**row, "chosen": f"{n} {row['chosen']}"} for n in range(300))
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert run("check", [str(data), f"preference.loss={loss}", "--init", str(file)]) == 0
    (tokens,) = re.findall(r"# ([\d,]+) tokens, about", file.read_text(encoding="utf-8"))
    config = load_config(file)
    work = bench._work(config, {}, 1.0, named=True)
    learned = len(prepare(config.data, pairs=loss != "none").train) / 300
    assert work and work.tokens == pytest.approx(learned * int(tokens.replace(",", "")), rel=0.01)


def test_plan_of_the_built_in_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--plan"]) == 0
    assert last_json(capsys)["plans"][0]["fits"] is True  # type: ignore[index]


@pytest.mark.parametrize(
    "words", [["nobody/nothing"], ["tiny-zh", "model.quantise=nf4"], ["missing.toml"]]
)
def test_mistakes_are_one_line(words: list[str]) -> None:
    with pytest.raises(UserError):
        bench.main(["--plan", *words])


@pytest.mark.usefixtures("short_rows")
def test_plan_tells_time_from_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the base at hand: its tokens and its pace on this device; without: characters and a
    roofline.
    """
    data = tmp_path / "a.jsonl"
    rows = [
        {"instruction": f"第{i}个问题是什么？", "output": "答案在这里。" * 4} for i in range(40)
    ]
    data.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    file = tmp_path / "a.toml"
    train = "[train]\nrow_tokens = 64\ntokens_per_step = 128\nepochs = 2.0\n"
    text = f"{train}[data]\nheld_out = 0.0\ntrain = {json.dumps(str(data))}"
    file.write_text(text, encoding="utf-8")
    assert bench.main(["--plan", str(file)]) == 0
    time = last_json(capsys)["plans"][0]["time"]  # type: ignore[index]
    assert time["measured"] and time["exact_tokens"] and time["hours"] > 0
    assert time["tokens"] / 128 <= time["steps"] <= 1.5 * time["tokens"] / 128
    assert (
        bench.main(["--plan", str(file), "model.path=Qwen/Qwen3-0.6B", "memory.budget_gib=2"]) == 0
    )
    guess = last_json(capsys)["plans"][0]["time"]  # type: ignore[index]
    assert (
        not guess["measured"]
        and not guess["exact_tokens"]
        and 0.3 < guess["tokens"] / time["tokens"] < 2
    )


def test_measured_step_is_near_its_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    settings = ["--out", str(out), "model.precision=bf16", "model.device=cpu", "lora.rank=4"]
    assert (
        bench.main(["tiny-zh", "--layers", "1", "--rows", "32,64", "--steps", "1", *settings]) == 0
    )
    report = last_json(capsys)
    assert json.loads(out.read_text(encoding="utf-8")) == report and out.with_suffix(
        ".png"
    ).read_bytes().startswith(b"\x89PNG")
    assert [r["row_tokens"] for r in report["results"]] == [32, 64]  # type: ignore[attr-defined]
    for result in report["results"]:  # type: ignore[attr-defined]
        assert (
            result["layers"] == 1 and result["quantize"] == "nf4" and result["precision"] == "bf16"
        )
        assert result["estimate_ratio"] == pytest.approx(1, abs=0.05)
        assert result["mfu"] > 0
        assert result["tokens_per_second"] == pytest.approx(
            2 * result["row_tokens"] / result["step_seconds"]
        )


def test_what_is_measured_is_what_the_trainer_would_make() -> None:
    overrides = ["model.quantize=none", "model.device=cpu", "train.optimizer=adamw8bit"]
    config = bench.config_of("tiny-zh", [*overrides, "lora.dora=true"])
    model = bench.BenchModel(config, *bench.published(config, 1), 64)
    assert type(model.trainee.optimizer).__name__ == "AdamW8bit"
    assert all(layer.magnitude is not None for layer in lora_layers(model.trainee.model).values())


SMALL = ["tiny-zh", "--layers", "1", "--rows", "16", "--steps", "1", "model.device=cpu"]


def test_generation_is_timed_by_a_script_of_the_checkout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench.main([*SMALL, "model.quantize=none", "--generate"]) == 0
    report = last_json(capsys)
    results = report["generation"]
    assert [r["rows"] for r in results] == [1, 4, 16]  # type: ignore[attr-defined]
    for result in results:  # type: ignore[attr-defined]
        assert result["first_token_seconds"] > 0 and result["decode_tokens_per_second"] > 0
    assert results[0]["model"] == report["results"][0]["model"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("option", "missing"),
    [(["--against", "peft"], "peft_step.py"), (["--generate"], "generation.py")],
)
def test_what_bench_scripts_do_needs_the_repository(
    option: list[str], missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "SCRIPTS", tmp_path)
    with pytest.raises(UserError, match=missing) as caught:
        bench.main([*SMALL, *option])
    assert caught.value.code == "bench.script"


def test_without_the_repository_a_report_has_no_plot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SCRIPTS", tmp_path)
    out = tmp_path / "report.json"
    assert bench.main([*SMALL, "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8")) == last_json(capsys)
    assert not out.with_suffix(".png").exists()


def test_readme_tables_are_what_the_null_device_and_the_plan_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """tools/readme_table.py rewrites them; one line is planned again here."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import readme_table

    monkeypatch.setattr(readme_table, "MODELS", ("Qwen/Qwen3-4B",))
    for name in readme_table.HEADS:
        text = (readme_table.ROOT / name).read_text(encoding="utf-8")
        for line in readme_table.rows(name):
            assert line in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon")
def test_loading_into_nf4_never_holds_the_checkpoint_in_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bench/load_memory.py at a twentieth of ChatGLM3-6B: model + 3 x largest tensor + 0.1 GiB."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import load_memory

    result = load_memory.run(20)
    assert (
        result["checkpoint_bytes"] > 6e8
        and result["above_bytes"] < result["bound_bytes"] < result["checkpoint_bytes"]
    )


def test_gpu_script_says_in_one_line_that_there_is_no_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    script = Path(__file__).parents[1] / "bench" / "gpu.sh"
    done = subprocess.run(
        ["bash", str(script)],
        capture_output=True,
        text=True,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""
