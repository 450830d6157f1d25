"""The cases of ../shared/cases, which say what came out and what should: each gives now what its
README expects. Skipped without them; rows of our own words stand in the other files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"


def case(name: str) -> Any:
    """Skip the test where the case's folder is not there."""
    return pytest.mark.skipif(not (CASES / name).is_dir(), reason=f"needs shared/cases/{name}")


# --- what meets the model


def program(*argv: str, cwd: Path, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a program that ends with `code` and never with a traceback."""
    return run("-m", *argv, cwd=cwd, code=code)


def run(*argv: str, cwd: Path, code: int = 0) -> tuple[str, str]:
    """The same of Python's arguments."""
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        input="",
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of tiny-zh, runs/res, and merged, its export."""
    folder = tmp_path_factory.mktemp("meets")
    source = CASES / "21-finished-run-resumed"
    for name in ("rows.jsonl", "run.toml"):
        shutil.copyfile(source / name, folder / name)
    program("cllm.train", "run.toml", cwd=folder)
    program(*("cllm.export", "runs/res", "merged", "--to", "merged", "--no-check"), cwd=folder)
    return folder


def last_json(text: str) -> Any:
    """The last line, by rules that know no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text.splitlines()[-1], parse_constant=refuse)


@case("06-pissa-olora-adapter")
@pytest.mark.parametrize("kind", ["pissa", "olora", "alora"])
def test_adapters_that_change_the_base_or_a_part_of_the_tokens(kind: str, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from cllm.assembly import open_model
    from cllm.messages import UserError
    from cllm.model.source import resolve

    options: dict[str, Any] = {"init_lora_weights": kind}
    if kind == "alora":
        options = {"init_lora_weights": False, "alora_invocation_tokens": [80, 90]}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(resolve("tiny-zh"), dtype=torch.float32)
    settings = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
    )
    get_peft_model(base, settings).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "tiny-zh"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    feature = "alora_invocation_tokens" if kind == "alora" else f"init_lora_weights = '{kind}'"
    with pytest.raises(UserError, match=feature):
        open_model(tmp_path, precision="fp32")


@case("15-ids-beyond-the-embedding")
def test_ids_beyond_the_embedding(home: Path) -> None:
    source = CASES / "15-ids-beyond-the-embedding"
    run(str(source / "make.py"), "runs/res", cwd=home)
    rows = str(source / "newtok.jsonl")
    _, said = program("cllm.check", rows, "model.path=addtok", cwd=home)
    assert "【新词】 (2268)" in said
    overrides = (f"data.train={rows}", "model.path=addtok", "train.steps=2", "data.eval=")
    for argv in (("cllm.train", "preset:quick", *overrides), ("cllm.chat", "--terminal", "addtok")):
        _, said = program(*argv, cwd=home, code=2)
        assert "tokenizer.beyond" in said and "<extra> (2267)" in said


@case("16-adapter-config-unreadable")
@pytest.mark.parametrize("name", ["empty", "list", "bom"])
def test_an_adapter_config_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(CASES / "16-adapter-config-unreadable" / name, folder)
    for argv in (("cllm.chat", "--terminal", name), ("cllm.export", name, "out", "--to", "peft")):
        _, said = program(*argv, cwd=tmp_path, code=2)
        # the one with the byte-order mark is read: it lacks target_modules, or weights beside it
        assert "adapter_config.json" in said and ("adapter.damaged" in said or name == "bom")


@case("21-finished-run-resumed")
def test_a_finished_run_that_is_resumed_prints_json(home: Path) -> None:
    printed, _ = program("cllm.train", "run.toml", "--resume", cwd=home)
    assert last_json(printed)["run"]


@case("22-shard-index-not-followed")
def test_the_shard_index_decides(home: Path) -> None:
    import torch

    from cllm.model.checkpoint import load_model

    run(str(CASES / "22-shard-index-not-followed" / "make.py"), "merged", cwd=home)
    whole, stale = (load_model(home / name) for name in ("merged", "stale"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, stale.state_dict()[name]), name


@case("29-checkpoint-refused")
def test_checkpoints_that_others_read(home: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from cllm.messages import UserError
    from cllm.model.checkpoint import load_model

    tensors = load_file(home / "merged" / "model.safetensors")
    text = (home / "merged" / "config.json").read_text(encoding="utf-8")
    names = list(tensors)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(home / "merged", tmp_path / name))

    null, leftover, shards, fp8, bom = map(copy, ("null", "leftover", "shards", "fp8", "bom"))
    config = json.dumps({**json.loads(text), "quantization_config": None})
    (null / "config.json").write_text(config, encoding="utf-8")
    shutil.copyfile(
        CASES / "29-checkpoint-refused" / "index.json", leftover / "model.safetensors.index.json"
    )
    (shards / "model.safetensors").unlink()
    for number, part in ((1, names[:5]), (2, names[5:])):
        file = shards / f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file)
    (bom / "config.json").write_text("\ufeff" + text, encoding="utf-8")
    for folder in (null, leftover, shards, bom):
        load_model(folder)
    tensors[names[0]] = tensors[names[0]].to(torch.float8_e4m3fn)
    save_file(tensors, fp8 / "model.safetensors")
    with pytest.raises(UserError, match="fp8"):
        load_model(fp8)


@case("27-adapter-messages")
def test_adapters_say_what_they_are(home: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from cllm.assembly import open_model
    from cllm.messages import UserError

    def changed(name: str) -> Path:
        return Path(shutil.copytree(home / "runs" / "res" / "adapter", tmp_path / name))

    def refused(folder: Path, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            open_model(folder)
        assert all(word in str(caught.value) for word in words)
        assert "trained on" not in str(caught.value)

    def configure(folder: Path, **fields: Any) -> None:
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(config | fields), encoding="utf-8")

    ranks, whole, named, old, elsewhere = map(changed, "abcde")
    tensors = load_file(ranks / "adapter_model.safetensors")
    configure(ranks, rank_pattern={"q_proj": 4})
    refused(ranks, "rank_pattern", "PEFT")
    key = "base_model.model.model.embed_tokens.weight"
    save_file({**tensors, key: torch.zeros(2, 2)}, whole / "adapter_model.safetensors")
    refused(whole, "embed_tokens.weight")
    # what PEFT itself would read is read
    renamed = {name.replace(".weight", ".default.weight"): part for name, part in tensors.items()}
    save_file(renamed, named / "adapter_model.safetensors")
    open_model(named)
    (old / "adapter_model.safetensors").unlink()
    refused(old, "adapter_model.safetensors")
    torch.save(tensors, old / "adapter_model.bin")
    open_model(old)
    source = (CASES / "27-adapter-messages" / "e-adapter_config.json").read_text(encoding="utf-8")
    configure(elsewhere, **json.loads(source))
    (elsewhere / "tokenizer.json").unlink(missing_ok=True)
    refused(elsewhere, "/data/someone/Qwen2.5-7B-Instruct", "base_model_name_or_path")


@case("30-api-parameters-that-change-nothing")
def test_api_parameters(tmp_path: Path) -> None:
    from serving import open_tiny
    from starlette.testclient import TestClient

    from cllm.serve.api import build_app

    loaded = open_tiny(tmp_path)
    engine = loaded.engine()
    try:
        client = TestClient(build_app(loaded, engine))
        source = CASES / "30-api-parameters-that-change-nothing" / "requests.jsonl"
        for line in source.read_text(encoding="utf-8").splitlines():
            body = json.loads(line)
            answer = client.post("/v1/chat/completions", json=body)
            refused = isinstance(body["messages"][0]["content"], list) or "guided_json" in body
            assert answer.status_code == (400 if refused else 200), answer.text
        name = client.get("/v1/models").json()["data"][0]["id"]
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    finally:
        engine.close()
