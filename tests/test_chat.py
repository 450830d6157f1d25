"""The program: the terminal's conversation, and the command line that a container runs."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serving import open_tiny, tiny_run

from cllm.assembly import Loaded, open_model
from cllm.chat import Terminal
from cllm.data.message import Message
from cllm.messages import UserError
from cllm.serve.engine import Engine
from cllm.serve.sampling import Sampling


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return open_tiny(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def engine(loaded: Loaded) -> Iterator[Engine]:
    made = loaded.engine()
    yield made
    made.close()


def talk(
    loaded: Loaded, engine: Engine, *lines: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Terminal, str]:
    monkeypatch.setattr("cllm.serve.answer.chat_sampling", lambda: Sampling(max_new_tokens=16))
    written: list[str] = []
    terminal = Terminal(loaded, engine, written.append)
    rest = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    terminal.run(read)
    return terminal, "".join(written)


def test_terminal_remembers_switches_and_forgets(
    loaded: Loaded, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.jsonl"
    lines = (
        "你好",
        "再见",
        f"/save {saved}",
        "/base",
        "你好",
        "/nonsense",
        "/system 短一点",
        "/adapter",
        "",
        "你好",
        "/quit",
        "unheard",
    )
    terminal, out = talk(loaded, engine, *lines, monkeypatch=monkeypatch)

    def answer(messages: list[tuple[str, str]], *, adapter: bool = True) -> str:
        prompt = loaded.tokenizer.encode_chat([Message(*m) for m in messages])
        return loaded.tokenizer.decode(
            loaded.engine().generate([prompt], Sampling(max_new_tokens=16), adapter)[0]
        )

    first = answer([("user", "你好")])
    dialogue = [("user", "你好"), ("assistant", first), ("user", "再见")]
    dialogue.append(("assistant", answer(dialogue)))
    row = json.loads(saved.read_text(encoding="utf-8"))
    assert [(m["role"], m["content"]) for m in row["messages"]] == dialogue
    base = answer([*dialogue, ("user", "你好")], adapter=False)
    last = answer([("system", "短一点"), ("user", "你好")])
    assert (
        terminal.messages == [Message("user", "你好"), Message("assistant", last)]
        and terminal.turns == 4
    )
    positions = [out.find(text) for text in (first, base, "/system TEXT", last)]
    assert -1 not in positions and "unheard" not in out and "tok/s" in out
    from cllm.data import read_conversations

    read = read_conversations(saved)[0][0]  # what was said can be trained on
    assert [m.role for m in read] == [role for role, _ in dialogue] and read.messages[
        2
    ].content == "再见"


def test_an_interrupted_answer_stays_as_far_as_it_came(
    loaded: Loaded, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = Sampling(max_new_tokens=511)  # a sampled answer may be too short to be interrupted
    monkeypatch.setattr("cllm.serve.answer.chat_sampling", lambda: greedy)
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    terminal = Terminal(loaded, engine, write)
    terminal.say("你好")
    assert terminal.messages[1].content.startswith("".join(written[:3])) and terminal.turns == 1
    told = re.search(r"\[(\d+) tokens, first after [\d.]+ s, (\d+) tok/s\]", written[-1])
    assert told and 3 <= int(told[1]) < 512 and int(told[2]) < 10**6


def test_terminal_shows_mistakes_and_goes_on(
    loaded: Loaded, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, out = talk(
        replace(loaded, home=None),
        engine,
        "/adapter",
        "字" * 2000,
        "/reset",
        monkeypatch=monkeypatch,
    )
    assert (
        "chat.no_adapter" in out
        and "serve.context" in out
        and terminal.turns == 0
        and terminal.name == "base"
    )


def test_open_model_names_what_is_missing(loaded: Loaded, tmp_path: Path) -> None:
    run = tmp_path / "unfinished"
    run.mkdir()
    (run / "config.toml").write_text("[model]\npath = 'tiny-zh'\n", encoding="utf-8")
    with pytest.raises(UserError, match="no adapter yet"):
        open_model(run)
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8}', encoding="utf-8"
    )
    with pytest.raises(UserError, match="base_model_name_or_path"):
        open_model(tmp_path)
    assert loaded.home is not None
    bare = open_model(loaded.base_name, device="cpu")
    assert not bare.adapters and bare.home is None
    alone = open_model(loaded.home / "adapter", device="cpu")
    assert (
        list(alone.adapters) == list(loaded.adapters) == ["demo"]
        and alone.tokenizer.template == loaded.tokenizer.template
    )


def test_a_run_is_opened_with_the_head_that_it_was_trained_with(
    loaded: Loaded, tmp_path: Path
) -> None:
    from cllm.model.int8 import Int8Linear

    run = tmp_path / "run"
    assert loaded.home is not None
    shutil.copytree(loaded.home, run)
    (run / "config.toml").write_text(
        f"[model]\npath = {json.dumps(loaded.base_name)}\nhead = 'int8'\n", encoding="utf-8"
    )
    heads = [
        open_model(run, device="cpu", quantize=quantize).model.get_output_embeddings()
        for quantize in ("", "none")
    ]  # type: ignore[operator]
    assert [type(head) for head in heads] == [Int8Linear, torch.nn.Linear]


def test_the_containers_command_line_prints_a_key_and_asks_for_it(loaded: Loaded) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert loaded.home is not None
    command = [
        sys.executable,
        "-m",
        "cllm.chat",
        str(loaded.home),
        "--host",
        "0.0.0.0",
        "--port",
        str(port),
    ]
    environment = {
        **os.environ,
        "CLLM_LANG": "en",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, encoding="utf-8")
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "open http" in line)
        key = re.search(rf"http://127\.0\.0\.1:{port}/\?key=([\w-]{{32}})", line)
        assert key is not None, line

        def status(path: str, headers: dict[str, str]) -> int:
            for _ in range(100):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                try:
                    connection.request("GET", path, headers=headers)
                    return connection.getresponse().status
                except ConnectionRefusedError:
                    import time

                    time.sleep(0.1)
            raise AssertionError("the server did not come up")

        assert status("/health", {}) == 200
        assert [
            status(path, {})
            for path in ("/", "/v1/models", "/gradio_api/info", "/config", "/?key=x")
        ] == [401] * 5
        assert status(f"/?key={key[1]}", {}) == 303
        assert status("/", {"Cookie": f"cllm_key={key[1]}", "Host": "box.lan:7860"}) == 200
        assert status("/v1/models", {"Authorization": f"Bearer {key[1]}"}) == 200
        # an open page does not keep the program from ending
        page = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        page.request("GET", "/gradio_api/heartbeat/x", headers={"Cookie": f"cllm_key={key[1]}"})
        assert page.getresponse().status == 200
        if os.name == "posix":
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0 and "Error" not in process.stderr.read()
    finally:
        process.terminate()
        process.wait(20)


def test_the_adapters_files_are_what_vllm_documents(tmp_path: Path) -> None:
    """docs/serving.en.md: one r and alpha, bias none, no modules_to_save, no DoRA, PEFT's tensor
    names, and prompts of the training's ids.
    """
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from cllm.model import inject_lora, load_model, load_tokenizer, resolve, save_adapter

    model, tokenizer = load_model(resolve("tiny-zh")), load_tokenizer(resolve("tiny-zh"))
    inject_lora(model, rank=8, alpha=16)
    save_adapter(model, tmp_path, base="tiny-zh")
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    # what vLLM requires
    assert {"r", "lora_alpha", "target_modules"} <= set(config) and isinstance(
        config["target_modules"], list
    )
    assert config["bias"] == "none" and config["modules_to_save"] is None and not config["use_dora"]
    assert not config.get("rank_pattern") and not config.get("alpha_pattern")
    told = re.search(
        r"--max-lora-rank (\d+)",
        (Path(__file__).parents[1] / "docs" / "serving.en.md").read_text(encoding="utf-8"),
    )
    assert told is not None and config["r"] <= int(told[1])
    modules = dict(model.named_modules())
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        module, part = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()  # type: ignore[union-attr]
        assert module in modules and module.rpartition(".")[2] in config["target_modules"], name
        assert tensor.shape[0 if part == "A" else 1] == config["r"]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    jinja = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    for turns in (
        [("user", "你好")],
        [("system", "短一点"), ("user", "你好"), ("assistant", "您好"), ("user", "再见")],
    ):
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = theirs.apply_chat_template(messages, chat_template=jinja, add_generation_prompt=True)[
            "input_ids"
        ]
        assert ids == tokenizer.encode_chat([Message(*turn) for turn in turns])


def test_a_taken_port_is_said_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from cllm.__main__ import run

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("chat", [str(tmp_path / "none"), "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert str(port) in told and f"--port {port + 1}" in told and "none" not in told
    for port in (-1, 65536, 99999):
        assert run("chat", [str(tmp_path / "none"), f"--port={port}"]) == 2
        told = capsys.readouterr().err
        assert "a number from 0 to 65535" in told and "none" not in told


def test_a_mistyped_run_is_told_the_runs_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllm.__main__ import run
    from cllm.model import source

    tiny_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "_download", lambda *_: pytest.fail("a hub was asked"))
    assert run("chat", ["runs/dem", "--terminal"]) == 2
    assert str(Path("runs/demo")) in capsys.readouterr().err


def test_others_are_told_an_address_they_can_reach(
    loaded: Loaded,
    engine: Engine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import uvicorn

    from cllm import chat

    monkeypatch.setattr(uvicorn.Server, "run", lambda self: setattr(self, "started", True))
    monkeypatch.setattr(chat, "_network_address", lambda: "192.168.1.7")
    chat.serve(loaded, engine, "0.0.0.0", 7860, [])
    told = capsys.readouterr().err
    assert "http://192.168.1.7:7860/?key=" in told and "http://127.0.0.1:7860/?key=" in told
    monkeypatch.undo()
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+", chat._network_address())


def test_a_long_conversation_goes_on_in_the_terminal(
    loaded: Loaded, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{n}" * 400 for n in (1, 2, 3, 4)]
    terminal, out = talk(loaded, engine, *lines, monkeypatch=monkeypatch)
    assert terminal.turns == 4 and "oldest rounds are left out" in out


def test_a_list_of_questions_is_read_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllm import assembly
    from cllm.__main__ import run

    monkeypatch.setattr(assembly, "open_model", lambda *_: pytest.fail("loaded"))
    assert run("chat", ["tiny-zh", "--questions", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_a_base_is_tried_in_4_bits_with_a_bounded_context(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cllm.__main__ import run
    from cllm.model.nf4 import NF4Linear

    opened: list[Terminal] = []
    monkeypatch.setattr(Terminal, "run", lambda self: opened.append(self))
    options = ["--terminal", "--quantize", "nf4", "--context", "96", "--precision", "bf16"]
    assert run("chat", ["tiny-zh", *options]) == 0
    assert run("chat", ["tiny-zh", "--terminal"]) == 0
    bounded, plain = opened
    layers = bounded.loaded.model.model.layers
    assert isinstance(layers[0].mlp.up_proj, NF4Linear)
    assert bounded.loaded.precision.name == "bf16"
    assert bounded.engine.max_tokens == 96 < plain.engine.max_tokens
    assert isinstance(plain.loaded.model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    capsys.readouterr()
    assert run("chat", ["tiny-zh", "--terminal", "--context", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_context_of_recurrent_layers_has_room_for_their_state() -> None:
    from conftest import tiny_config

    from cllm.assembly import assemble
    from cllm.config import MemoryConfig, ModelConfig

    hybrid = tiny_config("qwen3.5").to_dict()
    for tokens in (1, 40):
        options = {"device": "cpu", "context": tokens}
        engine = assemble(hybrid, ModelConfig(), MemoryConfig(), **options).engine()
        assert engine.row_tokens > 0 and engine.max_tokens == tokens
