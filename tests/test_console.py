"""What a person sees: the first lines of a run, how a program ends, and what is typed next."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import BOTH_KINDS

from cllm import messages
from cllm.__main__ import PROGRAMS, main, run
from cllm.config import load_config
from cllm.learn.log import CLOCK_FIELDS, RunLog
from cllm.messages import UserError, command, shell
from cllm.runs import described, locked, read_metrics
from cllm.train import Training

PACKAGE = Path(messages.__file__).parent


def proposed(text: str) -> list[list[str]]:
    """The commands that were said, split as a shell splits them."""
    return [shlex.split(line) for line in re.findall(r"^  (\w\S+ .*)$", text, re.MULTILINE)]


def state_of(directory: Path) -> tuple[bytes, list[dict]]:
    """The adapter's bytes, and the metrics without the clock."""
    rows = read_metrics(directory / "metrics.jsonl")
    adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    return adapter, [{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log_step = RunLog.step

    def interrupting(self: RunLog, values: dict) -> None:
        log_step(self, values)
        if values["step"] == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "step", interrupting)


# --- What is typed next
@BOTH_KINDS
def test_the_command_after_an_interruption_goes_on_with_that_very_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    overrides = ["train.steps=5", "eval.every=2", "eval.samples=0", "train.seed=7"]
    assert run("train", [str(config), *overrides]) == 0
    directory = tmp_path / "我的 runs" / "客服 (1)"
    directory.mkdir(parents=True)  # so that the run is the second of its name
    (directory / "config.toml").write_text("", encoding="utf-8")
    capsys.readouterr()
    with monkeypatch.context() as patched:
        interrupt_at(3, patched)
        assert run("train", [str(config), *overrides, f"run.dir={directory}"]) == 130
    [command] = proposed(capsys.readouterr().err)
    assert command[:3] == ["python", "-m", "cllm.train"]
    (tmp_path / "elsewhere.toml").write_text("", encoding="utf-8")
    assert run("train", command[3:]) == 0
    resumed = directory.with_name("客服 (1)-2")
    assert state_of(resumed) == state_of(tmp_path / "runs" / "a")
    assert len(list(directory.parent.iterdir())) == 2


def test_a_named_run_without_snapshots_is_not_taken_for_a_later_one(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    training = Training(load_config(config))
    training.close()
    empty = config.parent / "runs" / "b"
    empty.mkdir()
    (empty / "config.toml").write_text((training.run / "config.toml").read_text("utf-8"), "utf-8")
    assert run("train", [str(empty), "--resume"]) == 2
    assert "snapshot.none" in capsys.readouterr().err


def test_a_run_as_config_starts_a_new_run_with_its_settings(config: Path) -> None:
    assert run("train", [str(config), "train.steps=2", "eval.samples=0"]) == 0
    first = config.parent / "runs" / "a"
    assert run("train", [str(first)]) == 0
    assert load_config(f"{first}-2") == load_config(first)
    assert state_of(Path(f"{first}-2")) == state_of(first)


@pytest.mark.parametrize("code", ["train.memory", "run.unwritable"])
def test_other_ends_that_can_be_resumed_say_the_command_too(
    code: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(self: Training) -> None:
        raise UserError(code, path="x", detail="full")

    monkeypatch.setattr(Training, "_step", fail)
    assert run("train", [str(config), "eval.samples=0"]) == 2
    error = capsys.readouterr().err
    [command] = proposed(error)
    assert error.index(code) < error.index("--resume\n")
    monkeypatch.undo()
    assert run("train", command[3:]) == 0


def test_a_second_ctrl_c_says_the_command_too(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(self: Training) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_step", stop)
    assert run("train", [str(config)]) == 130
    assert proposed(capsys.readouterr().err)[0][-1] == "--resume"


def test_ctrl_c_before_the_first_step_is_said(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(self: Training) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_plan_steps", stop)
    assert run("train", [str(config)]) == 130
    assert capsys.readouterr().err.strip().endswith("Ctrl-C")
    assert not (config.parent / "runs").exists()


def test_after_training_the_commands_are_of_this_run_and_work(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    held_out = f"data.eval={config.parent / 'data.jsonl'}"
    assert run("train", [str(config), "train.steps=2", held_out, "run.dir=runs/甲 乙"]) == 0
    chat, evaluate, export = proposed(capsys.readouterr().err)
    assert chat == ["python", "-m", "cllm.chat", "runs/甲 乙"]
    assert run("eval", [*evaluate[3:], "--limit", "2"]) == 0
    assert proposed(capsys.readouterr().err) == [chat]
    assert export[2] == "cllm.export" and export[3] == chat[3] and export[-1] == "out/甲 乙"
    assert run("train", [str(config), "train.steps=1", "eval.samples=0", "data.eval="]) == 0
    programs = [words[2] for words in proposed(capsys.readouterr().err)]
    assert programs == ["cllm.chat", "cllm.export"]  # no file to evaluate on is known


def test_words_are_quoted_for_the_shell_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["python", "runs/我的", "runs/我的 run", "a;b", "it's", "x=1", "A&B", "$HOME"]
    assert shlex.split(shell(*words)) == words
    monkeypatch.setattr(sys, "platform", "win32")
    words[1:3] = [r"D:\数据\我的", r"D:\我的 数据\a"]
    # cmd and PowerShell: what is not plain stands in double quotes, which no name holds
    read = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', shell(*words))]
    assert read == words and "'" not in shell(*words).replace('"it\'s"', "")
    assert command("chat", r"D:\我的 数据\a") == r'python -m cllm.chat "D:\我的 数据\a"'


@pytest.mark.parametrize(
    ("words", "program"), [("preset:quick train.steps=3", "train"), ("tiny-zh", "check")]
)
def test_a_measurement_says_how_to_train_what_was_measured(
    words: str, program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("cllm.bench._measure", lambda *_: None)
    assert run("bench", words.split()) == 0
    [command] = proposed(capsys.readouterr().err)
    assert command[2] == f"cllm.{program}"
    if program == "train":
        assert command[3:] == words.split()
    else:
        assert command[3:] == ["my.jsonl", "--init", "my.toml", f"model.path={words}"]


# --- JSON for programs
PRINT = """
import sys
from cllm.messages import print_result
print_result({"a": 1}, "--json" in sys.argv)
"""


def on_a_terminal(command: list[str], cwd: Path) -> str:
    """What the command writes to stdout where that is a terminal."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    done = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, cwd=cwd)
    os.close(theirs)
    written = b""
    while True:
        try:
            written += (piece := os.read(ours, 4096))
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
    os.close(ours)
    assert done.wait(120) == 0
    return written.decode("utf-8").replace("\r\n", "\n")


@pytest.mark.parametrize("program", ["function", "check", "bench --doctor", "runs"])
def test_json_is_for_pipes_and_for_who_asks(program: str, config: Path) -> None:
    directory = config.parent / "runs" / "a"
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text("", encoding="utf-8")
    name, *options = program.split()
    arguments = [*options, *([str(config)] if name == "check" else [])]
    command = [sys.executable, "-m", f"cllm.{name}", *arguments]
    if name == "function":
        command = [sys.executable, "-c", PRINT]
    assert "\n{" not in "\n" + on_a_terminal(command, config.parent)
    asked = on_a_terminal([*command, "--json"], config.parent).splitlines()[-1]
    piped = subprocess.run(command, capture_output=True, text=True, cwd=config.parent, check=True)
    assert json.loads(asked).keys() == json.loads(piped.stdout.splitlines()[-1]).keys()


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_has_the_one_way_to_end(name: str, capsys: pytest.CaptureFixture) -> None:
    text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    assert "print_result(" in text and "print(to_json" not in text
    with pytest.raises(SystemExit):
        run(name, ["--help"])
    assert "--json" in capsys.readouterr().out


# --- The first lines
def test_a_run_says_first_where_it_goes_and_how_long(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("train", [str(config), "eval.samples=0", "train.steps=0", "train.epochs=2"]) == 0
    assert run("train", [str(config), "eval.samples=0", "train.steps=0", "train.epochs=2"]) == 0
    error = capsys.readouterr().err
    line = r"^run (.*) · cpu · (\S+) epochs = (\d+) steps .* (\d+)$"
    first, second = re.findall(line, error, re.MULTILINE)
    assert first[0] == str(config.parent / "runs" / "a") and second[0] == f"{first[0]}-2"
    assert (first[1], first[3]) == ("2", "3") and f" {first[2]}/{first[2]} " in error
    assert error.index("run ") < error.index("step ")


def test_when_it_will_be_done_is_told_by_the_clock(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    values = {"step": 1, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens": 100}
    RunLog(tmp_path, 61).step({**values, "tokens_per_second": 10.0, "peak_memory_bytes": 0})
    assert re.search(r"eta 10m00 \(\d\d:\d\d\)$", capsys.readouterr().err.strip())


def test_a_steps_line_is_in_the_readers_language(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"step": 1, "loss": 1.5, "lr": 2e-4, "grad_norm": 0.5, "margin": 0.25, "accuracy": 0.5}
    values |= {"tokens": 100, "tokens_per_second": 1234.0, "peak_memory_bytes": 2**29}
    lines = {
        "en": "step     1/9  loss 1.500  lr 2.0e-04  grad 0.50  1,234 tok/s  peak 0.50 GiB  eta 1s"
        "  margin 0.250  accuracy 50%",
        "zh": "第     1/9 步  损失 1.500  学习率 2.0e-04  梯度 0.50  1,234 词元/秒  峰值 0.50 GiB"
        "  还需 1s  差距 0.250  判断正确 50%",
    }
    for language, line in lines.items():
        monkeypatch.setenv("CLLM_LANG", language)
        RunLog(tmp_path, 9).step(values)
        assert capsys.readouterr().err == f"{line}\n"


# --- Programs
def test_without_a_word_the_programs_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["cllm"])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PROGRAMS)
    assert all(len(line.split()) > 3 for line in lines)
    monkeypatch.setattr(sys, "argv", ["cllm", "trian"])
    assert main() == 2 and "train" in capsys.readouterr().err


def test_training_without_a_config_is_one_line_with_an_example(
    capsys: pytest.CaptureFixture,
) -> None:
    assert run("train", []) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "python -m cllm.train my.toml" in error


@pytest.mark.parametrize(
    ("line", "english", "chinese"),
    [
        ("export", "lacks RUN, OUT, --to", "缺少 RUN, OUT, --to"),
        (
            "export a b --to gguf --type q3",
            "--type cannot be 'q3'; choose from",
            "--type 不能是 'q3'",
        ),
        ("chat --prot 1", "unknown on the command line: --prot", "不认识的内容：--prot"),
        ("chat --port x", "--port takes a whole number, not 'x'", "--port 应为整数，而不是 'x'"),
        ("check --init", "--init takes another number", "--init 后面的值的个数不对"),
    ],
)
def test_a_wrong_command_line_is_one_line_in_the_users_language(
    line: str,
    english: str,
    chinese: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, *words = line.split()
    for language, told in (("en", english), ("zh", chinese)):
        monkeypatch.setenv("CLLM_LANG", language)
        assert run(program, words) == 2
        error = capsys.readouterr().err
        assert told in error and f"python -m cllm.{program} --help" in error
        assert error.count("\n") == 1


# --- The list of runs
def test_the_runs_of_a_folder_are_listed_as_what_they_are(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run("train", [str(config), "train.steps=2"]) == 0
    with monkeypatch.context() as patched:
        interrupt_at(1, patched)
        assert run("train", [str(config), "eval.samples=0"]) == 130
    runs = tmp_path / "runs"
    for number, name in enumerate(("broken", "a-2", "a")):
        (runs / name).mkdir(exist_ok=True)
        file = runs / name / "config.toml"
        text = "[model\n" if name == "broken" else file.read_text(encoding="utf-8")
        file.write_text(text, encoding="utf-8")
        os.utime(file, (1000 + number, 1000 + number))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["cllm", "runs", str(runs)])
    assert main() == 0
    out, err = capsys.readouterr()
    listed = json.loads(out.splitlines()[-1])["runs"]
    assert [Path(row["run"]).name for row in listed] == ["a", "a-2", "broken"]
    assert [row["state"] for row in listed] == ["finished", "unfinished", "broken"]
    finished, unfinished, _ = listed
    scores = json.loads((runs / "a" / "eval.json").read_text(encoding="utf-8"))["adapter"]
    assert finished["score"] == pytest.approx(scores["rouge-l-char"])
    assert finished["eval_loss"] == pytest.approx(scores["loss"], rel=1e-4)
    assert (finished["step"], finished["steps"]) == (2, 2)
    assert (unfinished["step"], unfinished["steps"]) == (1, 6)
    assert finished["data"] == "data.jsonl" and finished["base"] in out
    files = [file for file in (runs / "a").rglob("*") if file.is_file()]
    assert finished["bytes"] == sum(file.stat().st_size for file in files)
    assert proposed(err) == [["python", "-m", "cllm.chat", str(runs / "a")]]
    with locked(runs / "a-2"):
        assert described(runs / "a-2")["state"] == "training"
    # the name that a killed process left says nothing
    (runs / "a-2" / "owner").write_text("pid 1 on x\n", encoding="utf-8")
    assert described(runs / "a-2")["state"] == "unfinished"


def test_a_folder_without_runs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("runs", [str(tmp_path)]) == 2
    error = capsys.readouterr().err
    (advised,) = re.findall(r"python -m cllm\.train (\S+)", error)
    assert error.count("\n") == 1 and advised.startswith("preset:") and load_config(advised)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "lock").touch()
    assert run("runs", [str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]["state"] == "broken"


# --- Exports
NAMED = [
    ("我的", "my-3863c722"),
    ("客服", "my-3cac4d72"),
    ("My Run", "my-run"),
    ("客服v2", "v2-e50f87fa"),
    ("a_b.c-1", "a_b.c-1"),
]


@pytest.mark.parametrize(("name", "model"), NAMED)
def test_an_export_says_what_reads_it(name: str, model: str, tmp_path: Path) -> None:
    from cllm.export import next_commands

    out = tmp_path / name
    out.mkdir()
    (out / "adapter_config.json").write_text('{"r": 24}', encoding="utf-8")

    def commands(to: str, kind: str = "q8_0") -> list[list[str]]:
        return [shlex.split(line) for line in next_commands(out, to, kind, Path("the base"))]

    create, talk = commands("ollama")
    assert create == ["ollama", "create", model, "-f", str(out / "Modelfile")]
    assert talk == ["ollama", "run", model]
    assert commands("gguf") == [["llama-cli", "-m", str(out / "model.gguf")]]
    quantize = ["llama-quantize", str(out / "model.gguf"), str(out / "model-Q4_K_M.gguf"), "Q4_K_M"]
    assert commands("gguf", "bf16")[1] == quantize
    smaller = commands("ollama", "f16")[2]
    assert smaller[:5] == ["ollama", "create", f"{model}-q4_k_m", "-q", "q4_K_M"]
    assert smaller[5:] == create[3:]
    assert commands("merged") == [["vllm", "serve", str(out)]]
    [vllm] = commands("peft")
    assert vllm[:3] == ["vllm", "serve", "the base"]
    assert vllm[3:6] == ["--enable-lora", "--max-lora-rank", "32"]
    assert vllm[6:] == ["--lora-modules", f"{model}={out}", "--tokenizer", str(out)]
    copied = next_commands(out, "peft", "f16", Path("the base"), native=False)
    convert, served = map(shlex.split, copied)
    assert convert == ["python", "tools/convert.py", "the base", f"{out}-base"]
    assert served == ["vllm", "serve", f"{out}-base", *vllm[3:]]
    template = out / "chat_template.jinja"
    template.touch()
    assert commands("peft") == [[*vllm, "--chat-template", str(template)]]


def test_foreign_libraries_are_silent(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cllm.train", str(config), "eval.samples=0", "train.steps=1"]
    trained = subprocess.run(command, capture_output=True, text=True, check=True)
    export = [sys.executable, "-m", "cllm.export", str(tmp_path / "runs" / "a"), "--to", "merged"]
    exported = subprocess.run([*export, str(tmp_path / "x")], capture_output=True, text=True)
    examine = [sys.executable, "-m", "cllm.bench", "--doctor"]
    examined = subprocess.run(examine, capture_output=True, text=True, check=True)
    assert exported.returncode == 0, exported.stderr
    for done in (trained, exported, examined):
        for chatter in ("Loading weights", "kernels-community", "Warning", "it/s]"):
            assert chatter not in done.stderr + done.stdout, done.stderr


# --- Names and files in errors
def test_a_run_that_is_not_there_is_not_asked_of_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for program in (["chat"], ["eval", "--data", "demo"], ["export", "--to", "peft", "out"]):
        name, *options = program
        assert run(name, ["runs/nope", *options]) == 2
        assert "run.none" in capsys.readouterr().err
    assert run("export", ["nosuch", "--to", "peft", "out"]) == 2
    assert "no finished run under runs" in capsys.readouterr().err
    adapter = tmp_path / "runs" / "mine" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    (adapter.parent / "config.toml").write_text("", encoding="utf-8")
    for program, wrong in (("chat", "runs/nope"), ("chat", "mine"), ("export", "nosuch")):
        assert run(program, [wrong, *(["--to", "peft", "out"] if program == "export" else [])]) == 2
        error = capsys.readouterr().err
        assert "run.missing" in error and "runs/mine" in error


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_training_names_the_runs_there_are_the_likeliest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, resume: list
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", ["runs/nope", *resume]) == 2
    assert "run.none" in capsys.readouterr().err
    for name in ("other", "service-2", "demo"):
        snapshot = tmp_path / "runs" / name / "snapshots" / "step-000001"
        snapshot.mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").write_text("", encoding="utf-8")
    assert run("train", ["runs/servce-2", *resume]) == 2
    error = capsys.readouterr().err
    assert "run.missing" in error
    assert error.index("runs/service-2") < min(error.index("runs/demo"), error.index("runs/other"))


def test_commands_in_errors_are_quoted_and_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("我的 数据 (1).jsonl").write_text('{"x": 1}\n', encoding="utf-8")
    name = "我的 数据 (1).jsonl"
    for program in (
        ["train", str(config), f"data.train={name}"],
        ["train", str(config), f"data.eval={name}"],
        ["eval", "tiny-zh", "--data", name],
    ):
        assert run(program[0], program[1:]) == 2
        error = capsys.readouterr().err
        (command,) = re.findall(r"python -m cllm\.check (?:'[^']*'|\S+)", error)
        assert shlex.split(command)[3:] == [name]


@pytest.mark.parametrize("mapped", ["data", "source"])
def test_eval_reads_a_file_with_the_columns_of_its_run_if_it_has_them(
    mapped: str, config: Path, tmp_path: Path
) -> None:
    from cllm.eval import _read

    columns = {"user": "客户 问题", "assistant": "回复"}
    named = tmp_path / "test.jsonl"
    row = {"客户 问题": "几点开门？", "回复": "九点。"}
    named.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    usual = tmp_path / "usual.jsonl"
    usual.write_text('{"instruction": "问", "output": "答"}\n', encoding="utf-8")
    words = [f"data.columns.{role}={name}" for role, name in columns.items()]
    if mapped == "source":
        table = ", ".join(f'{role} = "{name}"' for role, name in columns.items())
        words = [f'data.train=[{{path = "x.csv", columns = {{{table}}}}}]']
    settings = load_config(config, words)
    for file, question in ((named, "几点开门？"), (usual, "问")):
        arguments = SimpleNamespace(columns="", limit=0)
        (conversation,) = _read(str(file), settings, arguments)
        assert conversation.messages[0].content == question
    arguments = SimpleNamespace(columns="user=回复,assistant=客户 问题", limit=0)
    (conversation,) = _read(str(named), settings, arguments)
    assert conversation.messages[0].content == "九点。"


def test_a_run_is_listed_while_its_files_come_and_go(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(load_config(config))
    walk = os.walk

    def vanishing(folder: Path) -> list:
        return [(place, folders, [*names, "gone"]) for place, folders, names in walk(folder)]

    monkeypatch.setattr(os, "walk", vanishing)
    facts = described(training.run)
    training.close()
    assert facts["state"] == "training" and facts["bytes"] > 1000


def test_free_memory_of_a_card_is_said_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import torch

    rows = SimpleNamespace(steps=lambda per_step: 20)
    learner = SimpleNamespace(
        encoded=SimpleNamespace(rows=rows, rows_per_step=1),
        assembly=SimpleNamespace(device=torch.device("cuda", 0)),
    )
    monkeypatch.setattr("cllm.model.device.free_bytes", lambda device: 7 * 2**30)
    parts = SimpleNamespace(learner=learner, run=Path("runs/my-2"), total=60, eval_every=12)
    Training._announce(parts)
    line = capsys.readouterr().err
    assert all(part in line for part in ("runs/my-2", "cuda:0", "7.0 GiB", "3 epochs", "60", "12"))
