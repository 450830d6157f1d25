"""The cases in ../shared/cases: inputs from public reports, and what must come of each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cllm.check import main as check
from cllm.data.encode import IGNORE_INDEX, rendered
from cllm.data.reader import read_conversations
from cllm.data.schema import Conversation, Reject
from cllm.model.tokenizer import Tokenizer, load_tokenizer
from cllm.serve.requests import ChatMessage

SHARED = Path(__file__).parents[2] / "shared"
CASES = SHARED / "cases"
pytestmark = pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="needs ../shared")


def case(name: str) -> Path:
    """The only data file of a case."""
    (file,) = (SHARED / "cases" / name).glob("*.json*")
    return file


# --- parts: a message carries its parts
QWEN25 = SHARED / "golden" / "tokenizer_files" / "qwen25"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "青岛"}}\n</tool_call><|im_end|>'


def conversations(name: str) -> list[Conversation]:
    read, rejects = read_conversations(case(name))
    assert not rejects
    return read


def trained(tokenizer: Tokenizer, item: Conversation) -> str:
    segments = rendered(item, tokenizer)
    assert isinstance(segments, list), segments
    ids, labels = tokenizer.encode_segments(segments)
    return "".join(
        tokenizer.piece(i) for i, x in zip(ids, labels, strict=True) if x != IGNORE_INDEX
    )


def whole(tokenizer: Tokenizer, item: Conversation) -> str:
    return "".join(segment.text for segment in tokenizer.segments(item))


def with_template(folder: Path, text: str) -> Path:
    """Qwen2.5's tokenizer files with another chat_template."""
    shutil.copytree(QWEN25, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = text
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def account(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = check(list(arguments))
    found = dict(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert code == (0 if found["valid"] else 2)
    return found


@pytest.mark.parametrize("template", ["auto", "native"])
def test_01_openai_tool_calls(template: str) -> None:
    (item,) = conversations("01-openai-tool-calls")
    tokenizer = load_tokenizer(QWEN25, template=template)
    assert trained(tokenizer, item) == CALL + "二十一度。<|im_end|>"
    row = json.loads(case("01-openai-tool-calls").read_text(encoding="utf-8"))
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"city": "青岛"}
    from transformers import AutoTokenizer

    published = AutoTokenizer.from_pretrained(QWEN25)
    ids = published.apply_chat_template(row["messages"], tools=row["tools"], return_dict=False)
    assert tokenizer.encode_segments(tokenizer.segments(item))[0] == ids


def test_02_reasoning_fields(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(QWEN25, template="qwen3", thinking="keep")
    thoughts = ["先看门口的告示", "告示写了营业到十点", "先找地图"]
    for item, thought in zip(conversations("02-reasoning-fields"), thoughts, strict=True):
        block = f"<think>\n{thought}\n</think>\n\n"
        assert trained(tokenizer, item) == block + item.messages[-1].content + "<|im_end|>"
    assert account(capsys, str(case("02-reasoning-fields")))["reasoning"] == 3


def test_03_per_message_loss_flags() -> None:
    tokenizer = load_tokenizer(QWEN25)
    for item, answer in zip(
        conversations("03-per-message-loss-flags"), ("八点。", "十点。", "在河边。"), strict=True
    ):
        assert trained(tokenizer, item) == f"{answer}<|im_end|>"
        assert "错误的回答。" in whole(tokenizer, item)


def test_13_tool_call_tags_in_text() -> None:
    (item,) = conversations("13-tool-call-tags-in-text")
    tokenizer = load_tokenizer(QWEN25)
    ids, labels = tokenizer.encode_segments(tokenizer.segments(item))
    assert len(ids) == 53 and labels.count(151657) == 1
    assert tokenizer.encode("<tool_call>") == [151657]


def test_14_glaive_chat() -> None:
    spoken, calling = conversations("14-glaive-chat")
    tokenizer = load_tokenizer(QWEN25)
    assert trained(tokenizer, spoken) == "八点。<|im_end|>"
    text = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'
    assert trained(tokenizer, calling) == text
    assert spoken.messages[0].content == "你可以调用函数。"
    assert "8:00" not in whole(tokenizer, calling)  # nobody answers behind the result


def test_18_api_history_tool_calls() -> None:
    request = json.loads(case("18-api-history-tool-calls").read_text(encoding="utf-8"))
    messages = [ChatMessage(**message).plain() for message in request["messages"]]
    segments = load_tokenizer(QWEN25).segments(messages, open_turn=True)
    call = '{"name": "clock", "arguments": {"where": "teahouse"}}'
    text = "".join(segment.text for segment in segments)
    assert f"<tool_call>\n{call}\n</tool_call><|im_end|>" in text


def test_23_call_with_thought_or_text_arguments() -> None:
    thoughtful, as_text, empty = conversations("23-call-with-thought-or-text-arguments")
    tokenizer = load_tokenizer(QWEN25, template="qwen3", thinking="keep")
    for item in (thoughtful, as_text):
        assert CALL in trained(tokenizer, item)
    assert "要查天气" in trained(tokenizer, thoughtful)
    assert '"arguments": {}}' in trained(tokenizer, empty)
    assert trained(load_tokenizer(QWEN25), thoughtful) == CALL + "二十一度。<|im_end|>"


def test_25_chat_template_that_cuts_reasoning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "25-chat-template-that-cuts-reasoning"
    text = (SHARED / "cases" / name / "chat_template.txt").read_text(encoding="utf-8")
    model = with_template(tmp_path / "model", text)
    tokenizer = load_tokenizer(model)
    thoughtful, plain = conversations(name)
    assert trained(tokenizer, thoughtful) == "<think>\n看告示\n</think>\n\n八点。<|im_end|>"
    assert trained(tokenizer, plain) == "十点。<|im_end|>"
    assert account(capsys, str(case(name)), f"model.path={model}")["rejected"] == 0


def test_32_tools_unknown_to_the_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    model = with_template(tmp_path / "model", text)
    file = case("32-tools-unknown-to-the-chat-template")
    (item,) = conversations("32-tools-unknown-to-the-chat-template")
    refused = rendered(item, load_tokenizer(model))
    assert isinstance(refused, Reject) and refused.line == 1 and "tools" in refused.detail
    said = account(capsys, str(file), f"model.path={model}")
    assert said["rejects"]["template"]["count"] == 1 and said["valid"] == 0


# --- rows


def turns_of(name: str, file: str) -> tuple[list[list[tuple[str, str]]], list[Reject]]:
    read, rejects = read_conversations(SHARED / "cases" / name / file)
    return [[(m.role, m.content) for m in item] for item in read], rejects


def test_04_options_are_in_the_prompt() -> None:
    name = "04-multiple-choice-options"
    (question, answer), _ = turns_of(name, "mcq.jsonl")[0]
    assert question[1].split("\n")[1:] == ["A. 维生素A", "B. 维生素C", "C. 钙"]
    assert answer == ("assistant", "A")
    assert len({turns[0] for turns in turns_of(name, "dedup.jsonl")[0]}) == 3
    [(flat, letter)], _ = turns_of(name, "flat-options.jsonl")
    assert "\nB. 红茶\n" in flat[1] and letter == ("assistant", "B")


def test_08_a_label_of_zero_is_negative() -> None:
    read, rejects = turns_of("08-kto-label-zero", "kto.jsonl")
    assert [turns[1][1] for turns in read] == ["八点。"]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (1, "negative_label"),
        (3, "negative_label"),
    ]


def test_09_passages_are_in_the_prompt() -> None:
    read, rejects = turns_of("09-passage-dropped", "rag.jsonl")
    assert rejects == []
    for turns, passage in zip(read, ("告示：本馆", "[1] 告示：", "[1] 第十条"), strict=True):
        assert passage in turns[0][1] and turns[0][1].endswith("？")


def test_10_system_and_functions_are_read_under_other_names() -> None:
    read, rejects = read_conversations(
        SHARED / "cases" / "10-system-and-functions-under-other-names" / "sysprompt.jsonl"
    )
    assert rejects == []
    assert [item.messages[0].content for item in read[:2]] == [
        "你是河边茶馆的掌柜，只答一句。",
        "只答一句。",
    ]
    assert json.loads(read[2].tools)[0]["name"] == "clock"


def test_11_rows_with_pictures_are_rejected_by_name() -> None:
    read, [reject] = turns_of("11-image-rows", "image.jsonl")
    assert read == [] and reject.reason == "invalid_text" and "images" in reject.detail


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_17_a_file_name_in_gbk_is_checked(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / os.fsdecode("数据.jsonl".encode("gbk"))
    path.write_bytes((SHARED / "cases" / "17-file-name-in-gbk" / "rows.jsonl").read_bytes())
    assert check([str(path)]) == 0
    out = capsys.readouterr().out
    assert "数据.jsonl:1" in out and json.loads(out.strip().split("\n")[-1])["valid"] == 1


TABLES: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("20-csv-backslash-quotes", "esc.csv", [('他说"好"', "好的"), ("路径 C:\\data", "是的")]),
    (
        "33-tsv-quoted-cells",
        "rows.tsv",
        [("列出三种水果", "苹果\n梨\n\t杏"), ('他说"好"吗', '他说"好"。')],
    ),
    (
        "33-tsv-quoted-cells",
        "unbalanced.tsv",
        [('5" 是多长', "约十二点七厘米"), ('"引号开头却不闭合', "也是正文")],
    ),
]


@pytest.mark.parametrize(("name", "file", "expected"), TABLES)
def test_tables_are_read_as_they_are_quoted(
    name: str, file: str, expected: list[tuple[str, str]]
) -> None:
    read, rejects = turns_of(name, file)
    assert rejects == []
    assert [(ask[1], reply[1]) for ask, reply in read] == expected


def test_34_history_may_be_objects_of_any_names() -> None:
    read, rejects = turns_of("34-history-of-dicts", "rows.json")
    assert rejects == []
    assert [[text for _, text in turns[:-2]] for turns in read] == [
        ["今天开门吗？", "开。"],
        ["在吗", "在。"],
        ["在吗", "在。", "贵吗", "不贵。"],
    ]


def test_35_meta_instruction_is_the_system_message() -> None:
    [turns], _ = turns_of("35-moss-system", "rows.json")
    assert turns[0] == ("system", "你是一位茶馆掌柜。") and len(turns) == 3


def test_36_a_tag_round_the_question_is_none_of_its_words() -> None:
    read, _ = turns_of("36-one-tag", "rows.json")
    assert [turns[0][1] for turns in read] == ["这药怎么吃？", "问：几点开门？"]


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
    (home / "addtok" / "model.safetensors").write_bytes(b"damaged")  # said before weights are read
    _, said = program("cllm.train", "preset:quick", *overrides, cwd=home, code=2)
    assert "tokenizer.beyond" in said


def test_26_an_export_checked_on_few_tokens(tmp_path: Path) -> None:
    """The tiny random ChatGLM3, with rows for its published tokenizer: near-ties are the rule."""
    import torch
    from safetensors.torch import load_file, save_file

    source = CASES / "26-export-check-of-few-tokens"
    base = tmp_path / "base"
    shutil.copytree(SHARED / "golden" / "tokenizer_files" / "chatglm3", base)
    golden = Path(__file__).parent / "golden" / "chatglm3"
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    weights, rows = load_file(golden / "model.safetensors"), 65024
    torch.manual_seed(0)
    for name, weight in weights.items():
        if weight.shape[0] == config["padded_vocab_size"]:
            weights[name] = torch.randn(rows, weight.shape[1]) * weight.std()
    save_file(weights, base / "model.safetensors")
    config["padded_vocab_size"] = rows
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = (f"data.train={source / 'rows.jsonl'}", "model.path=base", "train.steps=2")
    program("cllm.train", "preset:quick", *settings, "data.eval=", "run.dir=runs/glm", cwd=tmp_path)
    _, said = program("cllm.export", "runs/glm", "out", "--to", "gguf", cwd=tmp_path)
    assert "0/4" not in said and list((tmp_path / "out").glob("*.gguf"))


@pytest.mark.parametrize("name", ["empty", "list", "bom"])
def test_an_adapter_config_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(CASES / "16-adapter-config-unreadable" / name, folder)
    for argv in (("cllm.chat", "--terminal", name), ("cllm.export", name, "out", "--to", "peft")):
        _, said = program(*argv, cwd=tmp_path, code=2)
        # the one with the byte-order mark is read: it lacks target_modules, or weights beside it
        assert "adapter_config.json" in said and ("adapter.damaged" in said or name == "bom")


def test_a_finished_run_that_is_resumed_prints_json(home: Path) -> None:
    printed, _ = program("cllm.train", "run.toml", "--resume", cwd=home)
    assert last_json(printed)["run"]


def test_the_shard_index_decides(home: Path) -> None:
    import torch

    from cllm.model.checkpoint import load_model

    run(str(CASES / "22-shard-index-not-followed" / "make.py"), "merged", cwd=home)
    whole, stale = (load_model(home / name) for name in ("merged", "stale"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, stale.state_dict()[name]), name


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
