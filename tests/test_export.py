"""Exports read back by others: Transformers, PEFT, the GGUF reader; what is refused; nothing half
written, nothing overwritten.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SHARED, byte_checkpoint, tiny_model
from serving import tiny_run
from torch import Tensor, nn

from cllm import assembly, export
from cllm.data.dialects import go, jinja
from cllm.data.message import Message
from cllm.data.template import TEMPLATES, render
from cllm.messages import UserError
from cllm.model.adapter import CONFIG_FILE, load_adapter, save_adapter, write_adapter
from cllm.model.checkpoint import Placement, load_model, open_checkpoint, split_rows
from cllm.model.lora import LoraSettings, inject_lora, lora_strength, merge_into
from cllm.model.merge import open_merge, write_merged
from cllm.model.tokenizer import load_tokenizer

LOCAL = Path(__file__).parent / "golden"
FAMILIES = (
    "chatglm2",
    "chatglm3",
    "chatglm3_32k",
    "baichuan2_7b",
    "qwen",
    "internlm",
    "internlm2",
    "yi",
    "gpt2",
)
CASES = [pytest.param(LOCAL / name, id=name) for name in ("chatglm3", "baichuan2_7b", "qwen")]
for family in FAMILIES:
    recorded = SHARED / "golden" / family / "dev"
    CASES.append(
        pytest.param(
            recorded,
            id=f"shared-{family}",
            marks=pytest.mark.skipif(not recorded.is_dir(), reason="needs ../shared"),
        )
    )
NATIVE = ("llama", "qwen2", "qwen3", "glm", "gemma2", "gemma3", "gpt2")
IDS = torch.arange(3, 20)[None]
VARIANTS: dict[str, dict[str, bool]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def adapted(model: nn.Module, folder: Path, base: str = "x", **options: bool) -> nn.Module:
    """`model` with a random adapter on every linear layer, which is saved in `folder`."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in inject_lora(model, rank=4, alpha=6.0, **options).values():
            layer.lora_B.normal_(std=0.02)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1.1)
    save_adapter(model, folder, base=base)
    return model


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> nn.Module:
    """Merged into `out` and loaded by Transformers alone."""
    from transformers import AutoModelForCausalLM

    out.mkdir()
    merge = {name: options.pop(name) for name in ("nf4", "strength") if name in options}
    write_merged(open_merge(base, adapter, **merge), out, **options)
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(out).eval()
    return loaded


# --- Merging
@pytest.mark.parametrize("path", CASES)
def test_every_family_merged_equals_the_adapter_in_transformers(path: Path, tmp_path: Path) -> None:
    expected = logits(adapted(load_model(path), tmp_path / "adapter"))
    assert (expected - logits(load_model(path))).abs().max() > 1e-3
    assert (
        logits(merged(path, tmp_path / "adapter", tmp_path / "out")) - expected
    ).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "variant"),
    [*((name, "lora") for name in NATIVE), *product(("llama", "gpt2"), ("rslora", "dora"))],
)
def test_native_models_in_shards_rslora_dora_conv1d_and_tied_heads(
    name: str, variant: str, tmp_path: Path
) -> None:
    tiny_model(name).save_pretrained(tmp_path / "base")
    expected = logits(
        adapted(load_model(tmp_path / "base"), tmp_path / "adapter", **VARIANTS[variant])
    )
    out = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", shard_bytes=40_000)
    assert (logits(out) - expected).abs().max() < 1e-5
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_merged_into_the_weights_that_qlora_trained_on(tmp_path: Path) -> None:
    """Dequantized NF4 in bf16 is what an NF4 run computes with, up to one rounding; the 16-bit base
    is further away.
    """
    path = LOCAL / "qwen"
    trained = adapted(load_model(path, Placement(quantize="nf4")), tmp_path / "adapter")
    plain = merged(path, tmp_path / "adapter", tmp_path / "plain")
    exact = merged(path, tmp_path / "adapter", tmp_path / "nf4", nf4=True)
    assert next(exact.parameters()).dtype == torch.bfloat16
    near, far = ((logits(m.float()) - logits(trained)).abs().mean() for m in (exact, plain))
    assert near < 0.2 * far


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strength", [0.0, 0.35, 1.5])
def test_merged_at_a_strength_equals_the_gate_at_it(
    variant: str, strength: float, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = adapted(load_model(tmp_path / "base"), tmp_path / "adapter", **VARIANTS[variant])
    with lora_strength(model, strength):
        expected = logits(model)
    out = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", strength=strength)
    assert (logits(out) - expected).abs().max() < 1e-5 < (logits(model) - expected).abs().max()


def test_norm_head_and_a_half_precision_base_stay_in_their_type(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(LOCAL / "baichuan2_7b", tmp_path / "base")
    stored = {
        k: v.to(torch.bfloat16)
        for k, v in load_file(tmp_path / "base" / "model.safetensors").items()
    }
    save_file(stored, tmp_path / "base" / "model.safetensors")
    expected = logits(adapted(load_model(tmp_path / "base"), tmp_path / "adapter"))
    out = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {p.dtype for p in out.parameters()} == {torch.bfloat16}
    assert (logits(out.float()) - expected).abs().max() < 0.05


def test_an_adapter_for_another_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    adapted(tiny_model("llama"), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"has shape \(4, 32\), the model needs"):
        open_merge(LOCAL / "qwen", tmp_path / "adapter")


# --- PEFT
def test_peft_reads_the_export_and_rslora_is_baked_into_alpha(tmp_path: Path) -> None:
    from peft import PeftModel

    base = byte_checkpoint(tmp_path / "base")
    model = adapted(load_model(base), tmp_path / "adapter", base=str(base), rslora=True)
    expected = logits(model)
    assert run(tmp_path / "adapter", "peft", tmp_path / "out") == 0
    settings = json.loads((tmp_path / "out" / CONFIG_FILE).read_text(encoding="utf-8"))
    assert settings["use_rslora"] is False and math.isclose(settings["lora_alpha"], 6.0 * 2)
    theirs = PeftModel.from_pretrained(load_model(base), tmp_path / "out")
    assert (logits(theirs) - expected).abs().max() < 1e-6
    assert run(tmp_path / "adapter", "peft", tmp_path / "half", "--strength", "0.5") == 0
    theirs = PeftModel.from_pretrained(load_model(base), tmp_path / "half")
    with lora_strength(model, 0.5):
        assert (logits(theirs) - logits(model)).abs().max() < 1e-6
    adapted(load_model(base), tmp_path / "dora", base=str(base), dora=True)
    with pytest.raises(UserError, match="DoRA"):
        run(tmp_path / "dora", "peft", tmp_path / "dora-out")
    assert not (tmp_path / "dora-out").exists()


FUSED: dict[str, tuple[str, Callable[[str], list[str]]]] = {
    "baichuan2_7b": (
        "model.layers.{}.self_attn.W_pack",
        lambda i: [f"model.layers.{i}.self_attn.{p}_proj" for p in "qkv"],
    ),
    "chatglm3": (
        "transformer.encoder.layers.{}.self_attention.query_key_value",
        lambda i: [f"model.layers.{i}.self_attn.{p}_proj" for p in "qkv"],
    ),
    "qwen": (
        "transformer.h.{}.attn.c_attn",
        lambda i: [f"model.layers.{i}.self_attn.{p}_proj" for p in "qkv"],
    ),
}


def fused_adapter(name: str, tmp_path: Path, dora: bool = False) -> int:
    """A random adapter on the fused names, in `tmp_path`/adapter, and the checkpoint that it makes,
    in changed; returns the layers.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(LOCAL / name, tmp_path / "changed")
    stored = load_file(LOCAL / name / "model.safetensors")
    torch.manual_seed(2)
    layers: dict[str, dict[str, Tensor]] = {}
    for fused in (
        fused for i in range(9) if f"{(fused := FUSED[name][0].format(i))}.weight" in stored
    ):
        weight = stored[f"{fused}.weight"].float()
        parts = {
            "lora_A": torch.randn(4, weight.shape[1]) * 0.1,
            "lora_B": torch.randn(weight.shape[0], 4) * 0.1,
        }
        summed = weight + 1.5 * parts["lora_B"] @ parts["lora_A"]
        if dora:
            parts["magnitude"] = weight.norm(dim=1) * 1.2
            summed *= (parts["magnitude"] / summed.norm(dim=1))[:, None]
        stored[f"{fused}.weight"] = summed
        layers[fused] = parts
    save_file(stored, tmp_path / "changed" / "model.safetensors")
    settings = LoraSettings(rank=4, alpha=6.0, dora=dora)
    write_adapter(_named(layers), tmp_path / "adapter", layers, settings, base=str(LOCAL / name))
    return len(layers)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_an_adapter_on_fused_names_loads_split(name: str, dora: bool, tmp_path: Path) -> None:
    """W' = W + s B A on the fused rows, computed on the original checkpoint's own tensors, against
    the adapter on the native model.
    """
    count, native = fused_adapter(name, tmp_path, dora), load_model(LOCAL / name)
    loaded = load_adapter(
        native, tmp_path / "adapter", split=split_rows(open_checkpoint(LOCAL / name))
    )
    assert count == len(native.model.layers)  # type: ignore[union-attr, arg-type]
    assert set(loaded) == {n for i in range(count) for n in FUSED[name][1](str(i))}
    assert (logits(native) - logits(load_model(tmp_path / "changed"))).abs().max() < 1e-4
    # in float64: how a processor rounds is no part of it
    out = merged(LOCAL / name, tmp_path / "adapter", tmp_path / "out")
    assert (logits(out.double()) - logits(native.double())).abs().max() < 1e-5


def test_training_goes_on_from_an_adapter_on_fused_names(
    config: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from cllm.config import load_config
    from cllm.train import Training

    fused_adapter("qwen", tmp_path)
    base = Path(shutil.copytree(LOCAL / "qwen", tmp_path / "base"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / file, base)
    training = Training(
        load_config(config, [f"model.path={base}", f"lora.init_from={tmp_path / 'adapter'}"])
    )
    assert (
        logits(training.learner.model.eval()) - logits(load_model(tmp_path / "changed"))
    ).abs().max() < 1e-4
    first = training.learner.model.model.layers[0].self_attn
    assert (
        torch.equal(first.q_proj.lora_A, first.v_proj.lora_A) and first.q_proj.lora_A.requires_grad
    )


def _named(layers: dict[str, dict[str, Tensor]]) -> nn.Module:
    """A module tree with a linear layer under each name, which is all that writing an adapter looks
    at.
    """
    root = nn.Module()
    for name, parts in layers.items():
        owner, (*path, leaf) = root, name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(
            leaf,
            nn.Linear(
                parts["lora_A"].shape[1], parts["lora_B"].shape[0], bias=False, device="meta"
            ),
        )
    return root


# --- GGUF
VOCABULARY = {
    "ggml.tokens": ["a"],
    "ggml.eos_token_id": 1,
    "ggml.bos_token_id": 2,
    "ggml.padding_token_id": 0,
}


def written(name: str, kind: str, folder: Path) -> tuple[nn.Module, Any]:
    """A tiny model with an adapter, and the merge of it that was written to `folder`/x.gguf. From a
    base in bf16: what is summed must not be rounded to its type on the way to a finer one.
    """
    from cllm.model.gguf import place, write_gguf

    tiny_model(name).bfloat16().save_pretrained(folder / "base")
    model = adapted(load_model(folder / "base"), folder / "adapter")
    merge = open_merge(folder / "base", folder / "adapter")
    config = merge.checkpoint.config
    placed = place(config, merge.layout, kind)
    tensors = merge.tensors(torch.float32)
    write_gguf(folder / "x.gguf", config, placed, tensors, kind, VOCABULARY)
    return model, merge


# how far a logit of these tiny random models moves at most
ERRORS = {"f32": 1e-5, "f16": 2e-2, "q8_0": 0.5, "q5_1": 2, "q5_0": 2, "q4_1": 3, "q4_0": 3}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "f32"),
        ("qwen2", "f32"),
        ("qwen3", "f16"),
        ("glm", "f32"),
        *product(["llama"], ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
    ],
)
def test_gguf_read_back(name: str, kind: str, tmp_path: Path) -> None:
    expected = logits(written(name, kind, tmp_path)[0])
    error = (logits(load_model(tmp_path / "x.gguf")) - expected).abs().max()
    assert error < ERRORS[kind]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_gguf_holds_the_bytes_that_ggufs_own_quantizer_makes(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    """Tensor by tensor: vectors in float32, rows of no whole block in f16, the head (or the
    embedding that it is tied to) of 4 and 5 bits in 8.
    """
    from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, quantize

    from cllm.model.gguf import TYPES, place

    _, merge = written("llama-tied" if tied else "llama", kind, tmp_path)
    placed = place(merge.checkpoint.config, merge.layout, kind)
    native = {stored.ggml_name: name for name, stored in placed.items()}
    merged_tensors = {name: tensor.clone() for name, tensor in merge.tensors(torch.float32)}
    reader = GGUFReader(tmp_path / "x.gguf")
    stored_in = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert stored_in.keys() == native.keys()
    for tensor in reader.tensors:
        expected = merged_tensors[native[tensor.name]]
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):  # rotary pairs side by side
            heads = merge.checkpoint.config
            count = (
                heads.num_attention_heads if "attn_q" in tensor.name else heads.num_key_value_heads
            )
            halves = expected.reshape(count, 2, -1, expected.shape[1])
            expected = halves.transpose(1, 2).reshape(expected.shape)
        as_bytes = quantize(expected.float().numpy(), tensor.tensor_type).tobytes()
        assert tensor.data.tobytes() == as_bytes, tensor.name
    asked = GGMLQuantizationType[kind.upper()]
    head = "token_embd.weight" if tied else "output.weight"
    small = kind.startswith(("q4", "q5"))
    assert stored_in[head] == (GGMLQuantizationType.Q8_0 if small else asked)
    assert stored_in["blk.0.ffn_up.weight"] == asked
    assert stored_in["blk.0.attn_norm.weight"] == GGMLQuantizationType.F32
    said = reader.fields["general.file_type"].contents()
    assert LlamaFileType(said).name.removeprefix("MOSTLY_").removeprefix("ALL_") == kind.upper()
    assert len(TYPES) == 8


@pytest.mark.parametrize("to", ["gguf", "merged"])
def test_the_size_is_said_before_and_whether_the_card_holds_it(
    to: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(kind: str) -> str:
        out = tmp_path / f"{kind}-{torch.cuda.is_available()}"
        options = ["--type", kind] if to == "gguf" else []
        assert run(trained, to, out, "--no-check", *options) == 0
        said = capsys.readouterr().err
        [line] = [line for line in said.splitlines() if "of weights" in line]
        size = sum(file.stat().st_size for file in out.glob("model*"))
        assert abs(float(line.split(" GiB")[0].split()[-1]) - size / 2**30) < 0.01
        return said

    assert "8 GiB" in told("f16")
    card = SimpleNamespace(total_memory=450 * 2**20)  # CUDA's own context fills it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(assembly, "choose_device", lambda _: torch.device("cpu"))
    assert "--type q4_0" in told("q8_0")
    assert ("--type q4_0" in told("q4_0")) == (to == "merged")  # to whom it is no news


def test_rows_of_no_whole_block_stay_f16(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType

    from cllm.model.gguf import place

    _, merge = written("llama", "q4_1", tmp_path)
    odd = {name: ((*dims[:-1], 40), dtype) for name, (dims, dtype) in merge.layout.items()}
    placed = place(merge.checkpoint.config, odd, "q4_1")
    kinds = {name: stored.kind for name, stored in placed.items()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == GGMLQuantizationType.F16
    assert kinds["lm_head.weight"] == GGMLQuantizationType.F16
    assert kinds["model.norm.weight"] == GGMLQuantizationType.F32


def test_gguf_refuses_what_llama_cpp_would_compute_differently(tmp_path: Path) -> None:
    from cllm.model.gguf import architecture

    config = tiny_model("gemma3").config
    config.architectures = ["Gemma3ForCausalLM"]
    with pytest.raises(UserError, match="layer_types"):
        architecture(config)
    config.architectures = ["GPT2LMHeadModel"]
    with pytest.raises(UserError, match=r"GPT2LMHeadModel.*known: llama, qwen2"):
        architecture(config)


# --- The program
def run(source: Path, to: str, out: Path, *more: str) -> int:
    return export.main([str(source), "--to", to, str(out), *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-zh with a random adapter, as an adapter directory."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    base = Path(export.__file__).parent / "assets" / "tiny-zh"
    adapted(load_model(base), folder, base="tiny-zh")
    load_tokenizer(base).save(folder)
    return folder


def prompt_behind_api(loaded: Any, talk: list[Message]) -> list[int]:
    """The token ids that a request for `talk` to /v1 hands to the engine."""
    from fastapi.testclient import TestClient

    from cllm.serve.api import build_app

    engine, seen = loaded.engine(), []
    submit = engine.submit
    engine.submit = lambda prompt, *rest, **named: [
        seen.append(prompt),
        submit(prompt, *rest, **named),
    ][1]
    try:
        body = {"messages": [message.row() for message in talk], "max_tokens": 2}
        answer = TestClient(build_app(loaded, engine), base_url="http://127.0.0.1").post(
            "/v1/chat/completions", json=body
        )
        assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == len(seen[0])
    finally:
        engine.close()
    return list(seen[0])


def test_a_choice_between_equals_is_no_difference_but_a_decided_one_is() -> None:
    """Two of a thousand flips: one of a tie that a KL of 1e-3 allows, one of a decided position."""
    from cllm.fidelity import Measured, differences

    def measured(*rows: tuple[float, float, float]) -> Measured:
        return Measured(torch.tensor(rows).log(), torch.zeros(len(rows), dtype=torch.int64), [])

    sure, tie, flipped = (0.8, 0.1, 0.1), (0.41, 0.39, 0.2), (0.395, 0.405, 0.2)
    figures = differences(measured(sure, tie), measured(sure, flipped), 1e-3)
    assert figures["top1_agreement"] == 0.5 and figures["equal_choices"] == 1
    assert figures["mean_kl"] < 1e-3
    figures = differences(measured(sure, sure), measured(sure, (0.1, 0.8, 0.1)), 1e-3)
    assert figures["top1_agreement"] == figures["equal_choices"] == 0.5
    # At the margin itself: sqrt(2 * 0.0032) = 0.08.
    wider = measured((0.44, 0.37, 0.19)), measured((0.37, 0.44, 0.19))
    assert differences(*wider, 0.0032)["equal_choices"] == 1
    assert differences(*wider, 0.0020)["equal_choices"] == 0
    # From 1/2 on no choice could be told from another.
    assert differences(*wider, 0.5)["equal_choices"] is None


def test_limits_of_few_bits_are_a_quarter_above_what_a_real_model_lost() -> None:
    from cllm.fidelity import LIMITS

    file = Path(export.__file__).parents[1] / "bench" / "results" / "gguf_types.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["results"]["smolrun"]
    lost = {row["type"]: row["mean_kl"] for row in rows}
    for kind, (share, largest_kl) in LIMITS.items():
        assert largest_kl == pytest.approx(1.25 * lost[kind], rel=0.005)
        assert (share > 0) == (largest_kl < 0.5)


def test_of_few_positions_one_decides_nothing_and_of_many_the_share_does() -> None:
    from cllm.fidelity import may_be

    assert may_be(1.0, 1, 0.99) and may_be(7 / 8, 8, 0.99) and may_be(61 / 62, 62, 0.99)
    assert not may_be(0.0, 4, 0.99) and not may_be(0.5, 8, 0.99)
    assert may_be(0.99, 512, 0.99) and not may_be(0.97, 512, 0.99) and may_be(0.97, 512, 0.97)
    assert not may_be(506 / 512, 512, 0.99)  # of so many the limit is what it was


def test_merged_program_checks_and_the_template_contract_holds(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    from cllm.assembly import open_model

    out = tmp_path / "out"
    assert run(trained, "merged", out) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["check"]
    assert report["passed"] and report["top1_agreement"] >= 0.99 and report["mean_kl"] < 1e-3
    assert report["prompts_equal"] == report["prompts"] == 16
    assert (
        json.loads((out / "fidelity.json").read_text(encoding="utf-8"))["positions"]
        == report["positions"]
        > 100
    )
    tokenizer, talk = (
        load_tokenizer(trained),
        [
            Message("system", "短"),
            Message("user", "你好"),
            Message("assistant", "好"),
            Message("user", "再见"),
        ],
    )
    fed, labels = tokenizer.encode_segments(
        tokenizer.segments([*talk, Message("assistant", "再见")])
    )
    loaded = open_model(out)
    served = loaded.tokenizer.encode_chat(talk)
    assert prompt_behind_api(loaded, talk) == served
    assert fed[: len(served)] == served and labels[len(served)] >= 0
    theirs = AutoTokenizer.from_pretrained(out)
    assert (
        theirs.apply_chat_template(
            [m.row() for m in talk], add_generation_prompt=True, return_dict=False
        )
        == served
    )
    assert set(GenerationConfig.from_pretrained(out).eos_token_id) == tokenizer.stop_ids
    with pytest.raises(UserError, match="not overwritten"):
        run(trained, "merged", out)


@pytest.mark.parametrize(("to", "kind"), [("gguf", "f16"), ("ollama", "q4_0"), ("gguf", "q5_1")])
def test_gguf_program(
    trained: Path, to: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(trained, to, tmp_path / "out", "--type", kind) == 0
    told = capsys.readouterr().out
    assert ("without ties" in told) == (kind != "q4_0")
    report = json.loads(told.splitlines()[-1])["check"]
    assert report["passed"] and report["prompts_equal"] == 16
    assert (report["equal_choices"] is None) == (kind == "q4_0")
    ours, back = load_tokenizer(trained), load_tokenizer(tmp_path / "out" / "model.gguf")
    text = "姜静琳住在渔歌市，2024 年 Hello!\n"
    assert back.encode(text) == ours.encode(text) and back.stop_ids == ours.stop_ids
    if to == "ollama":
        modelfile = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
        assert (
            modelfile.startswith("FROM ./model.gguf\nTEMPLATE")
            and 'PARAMETER stop "<|im_end|>"' in modelfile
        )


@pytest.mark.parametrize("to", ["merged", "peft", "gguf"])
def test_an_export_at_a_strength_is_compared_with_the_run_at_it(
    trained: Path, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {}
    for strength in ("0.5", "1"):
        assert run(trained, to, tmp_path / strength, "--strength", strength) == 0
        reports[strength] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert reports[strength]["strength"] == float(strength)
    half, whole = (report["check"] for report in reports.values())
    assert half["passed"] and half["mean_kl"] < 1e-3
    assert abs(half["perplexity_trained"] - whole["perplexity_trained"]) > 0.01
    with pytest.raises(UserError, match=r"'2\.5' is no strength of the adapter"):
        run(trained, to, tmp_path / "out", "--strength", "2.5")


@pytest.mark.parametrize("to", ["merged", "peft"])
def test_a_half_precision_run_is_checked_in_the_numbers_it_was_trained_in(
    to: str, tmp_path: Path
) -> None:
    source = tiny_run(tmp_path)
    with (source / "config.toml").open("a", encoding="utf-8") as file:
        file.write("precision = 'fp16'\n")
    assert run(source, to, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "fidelity.json").read_text(encoding="utf-8"))
    assert report["passed"] and len(report["samples"]) == 3


def test_an_export_beyond_the_limits_is_not_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllm.model import merge

    # a merge that scales the adapter wrongly
    monkeypatch.setattr(
        merge, "merge_into", lambda weight, scaling, *rest: merge_into(weight, 20 * scaling, *rest)
    )
    with pytest.raises(UserError, match="differs from the trained model") as caught:
        run(trained, "merged", tmp_path / "out")
    assert caught.value.code == "export.differs"
    with pytest.raises(UserError, match="differs from the trained model"):
        run(trained, "gguf", tmp_path / "out", "--type", "q5_1")
    assert list(tmp_path.iterdir()) == []
    assert run(trained, "merged", tmp_path / "out", "--no-check") == 0


@pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE")
def test_a_full_disk_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the write fails midway, in the real code,
    in a process of its own.
    """
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))\n"
        "from cllm.__main__ import run; sys.exit(run('export', sys.argv[1:]))"
    )
    for to in ("merged", "gguf"):
        command = [
            sys.executable,
            "-c",
            code,
            str(trained),
            "--to",
            to,
            str(tmp_path / "out"),
            "--no-check",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "cannot write" in done.stderr, done.stderr
        assert list(tmp_path.iterdir()) == []


def test_alibi_and_a_run_without_an_adapter_are_refused(tmp_path: Path) -> None:
    adapted(
        load_model(LOCAL / "baichuan2_13b"), tmp_path / "adapter", base=str(LOCAL / "baichuan2_13b")
    )
    load_tokenizer(Path(export.__file__).parent / "assets" / "tiny-zh").save(tmp_path / "adapter")
    with pytest.raises(UserError, match="ALiBi"):
        run(tmp_path / "adapter", "merged", tmp_path / "out", "--no-check")
    with pytest.raises(UserError, match="no adapter"):
        run(LOCAL / "qwen", "merged", tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "option", "value"),
    [("merged", "--type", "q4_0"), ("peft", "--type", "f16"), ("peft", "--into", "16bit")],
)
def test_an_option_that_changes_nothing_is_refused(to: str, option: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{option} changes nothing of --to {to}"):
        run(Path("nosuch"), to, Path("out"), option, value)


def test_what_is_smaller_is_not_said_to_the_smallest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kind, advised in (("", 1), ("q8_0", 1), ("q4_0", 0)):
        export._say_size(2**40, kind)
        said = capsys.readouterr().err
        assert "does not hold" in said and said.count("q4_0 takes less") == advised


# --- Templates in other languages
TALKS = [
    [Message("user", "你好")],
    [
        Message("system", "短 "),
        Message("user", " 你好\n"),
        Message("assistant", "好"),
        Message("user", "再见"),
    ],
    [Message("system", ""), Message("user", "a")],
    [
        Message("user", "a"),
        Message("assistant", "<think>\n想\n</think>\n\n 答 "),
        Message("user", "c"),
        Message("assistant", "<think>\n想\n</think>\n\n答"),
    ],
    [
        Message("user", "a"),
        Message("assistant", "答", "想"),
        Message("user", "c"),
        Message("assistant", "写成 <think>甲</think> 就行", "想\n再想"),
    ],
    [Message("system", "s"), Message("user", "a"), Message("system", "t"), Message("user", "b")],
    [
        Message("system", "s"),
        Message("assistant", "hi"),
        Message("assistant", ""),
        Message("user", "x"),
    ],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_jinja_renders_what_training_rendered(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = TEMPLATES[name]
    for variant in (
        replace(template, thinking=mode)
        for mode in (("off", "keep") if template.thinking else ("", "text"))
    ):
        for talk, opened in product(TALKS, (True, False)):
            ours = "".join(segment.text for segment in render(talk, variant, open_turn=opened))
            given = {
                "conversations": [[m.row() for m in talk]],
                "chat_template": jinja(variant),
                "add_generation_prompt": opened,
            }
            assert render_jinja_template(**given)[0][0] == ours


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize(
    "name", ["baichuan2", "chatglm3", "glm4", "internlm2", "qwen", "qwen25", "yi"]
)
def test_published_tokenizers_give_the_same_ids_in_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from cllm.model.tokenizer import portable

    tokenizer = load_tokenizer(SHARED / "golden" / "tokenizer_files" / name)
    tokenizer.save(tmp_path)
    portable(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("你好，世界 2024", "Hello  world 123\n\n x", "  a"):
        assert (
            theirs.encode(text, add_special_tokens=False)
            == tokenizer.encode(text)
            == load_tokenizer(tmp_path).encode(text)
        )
    # which encodes words apart from markup
    assert bool(tokenizer.chat_template) == (name != "chatglm3")
    for talk in TALKS[:2] if tokenizer.chat_template else []:
        ids = theirs.apply_chat_template(
            [m.row() for m in talk], add_generation_prompt=True, return_dict=False
        )
        assert ids == tokenizer.encode_chat(talk)


def test_ollama_refuses_numbered_rounds() -> None:
    assert "<|im_start|>assistant" in go(TEMPLATES["qwen"])
    with pytest.raises(UserError, match="chatglm2"):
        go(TEMPLATES["chatglm2"])


# --- llama.cpp itself
def test_llama_cpp_generates_the_same_tokens(trained: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    assert run(trained, "gguf", tmp_path / "out", "--no-check", "--type", "f32") == 0
    tokenizer, model = (
        load_tokenizer(trained),
        load_model(Path(export.__file__).parent / "assets" / "tiny-zh"),
    )
    load_adapter(model, trained)
    prompt = tokenizer.encode_chat([Message("user", "姜静琳住在哪里？")])
    theirs = llama_cpp.Llama(
        str(tmp_path / "out" / "model.gguf"),
        n_ctx=128,
        n_threads=1,
        verbose=False,
        type_k=0,
        type_v=0,
    )
    text = "姜静琳住在渔歌市，2024 年 Hello!\n"
    assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    got = []
    for token in theirs.generate(prompt, temp=0.0, repeat_penalty=1.0):
        got.append(token)
        if len(got) == 32:
            break
    ids = torch.tensor([prompt])
    with torch.no_grad():
        while ids.shape[1] < len(prompt) + 32:
            ids = torch.cat(
                [ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1
            )
    assert got == ids[0, len(prompt) :].tolist()


# --- Memory: the short version of bench/export_memory.py
@pytest.mark.skipif(os.name == "nt", reason="reads the peak from the kernel by resource")
def test_merging_stays_near_the_largest_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import export_memory  # type: ignore[import-not-found]

    size, largest = export_memory.build(tmp_path, hidden=512, layers=12, vocabulary=16000)
    found = export_memory.measure(tmp_path, "16bit")
    assert size > 5 * largest
    assert found["peak_bytes"] < found["imports_bytes"] + 3 * largest + 100 * 10**6


def test_no_lora_is_proposed_where_vllm_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = byte_checkpoint(tmp_path / "base")
    size = json.loads((base / "config.json").read_text("utf-8"))["vocab_size"]
    config = tiny_model("gpt2").config
    config.vocab_size = size
    type(tiny_model("gpt2"))(config).save_pretrained(base)
    adapted(load_model(base), tmp_path / "adapter", base=str(base))
    load_tokenizer(base, template="chatml").save(tmp_path / "adapter")
    for to, proposed in (("peft", 0), ("merged", 1)):
        assert run(tmp_path / "adapter", to, tmp_path / to, "--no-check") == 0
        assert capsys.readouterr().err.count("vllm serve") == proposed
