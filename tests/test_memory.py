"""The estimate against what really lives: parameters byte for byte, the peak of a real step by
storage census.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cllm import fit as fitting
from cllm import trace
from cllm.config import LoraConfig, MemoryConfig, ModelConfig, load_config
from cllm.fit import estimate_vram, fewest_recomputed, ladder, longest_row, plan_training, savings
from cllm.memory import GIB, MIB, Settings
from cllm.messages import UserError
from cllm.plan import settings_of
from cllm.shapes import SHAPES, find_config
from cllm.trace import weighed

if TYPE_CHECKING:
    from cllm.assembly import Assembly

PUBLISHED = json.loads(SHAPES.read_text(encoding="utf-8"))
PARAMETERS = {  # billions, as the model cards say
    "THUDM/chatglm3-6b": 6.24, "THUDM/glm-4-9b-chat": 9.40, "Qwen/Qwen-7B": 7.72, "Qwen/Qwen2.5-7B": 7.62, "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-4B": 4.02, "Qwen/Qwen3-8B": 8.19, "Qwen/Qwen3-32B": 32.76,
    "Qwen/Qwen3.5-4B": 4.206, "baichuan-inc/Baichuan2-7B-Base": 7.51, "01-ai/Yi-6B": 6.06,
    "internlm/internlm2-7b": 7.74, "meta-llama/Llama-3.1-8B": 8.03, "google/gemma-3-270m": 0.268, "openai-community/gpt2": 0.1244,
}  # fmt: skip
# 3 layers of each, wide enough for activations to outweigh bookkeeping
TINY = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "glm": {"head_dim": 16, "attention_bias": True},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "gemma": {"head_dim": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_5_text": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
    },
    "gpt2": {
        "n_embd": 128,
        "n_layer": 3,
        "n_head": 8,
        "n_positions": 256,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
}
COMMON = {
    "vocab_size": 160, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def published(name: str) -> dict[str, Any]:
    return find_config(name)[1]


def tiny(kind: str) -> dict[str, Any]:
    gpt2 = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2}
    return {"model_type": kind, **(gpt2 if kind == "gpt2" else COMMON), **TINY[kind]}


def assembled(config: dict[str, Any], settings: Settings) -> Assembly:
    """A random model as every program puts it together, for training on rows of these settings."""
    import torch

    from cllm.assembly import assemble
    from cllm.model.nf4 import dequantize, quantize_nf4

    # the kernel is chosen and its tables are made before anything is counted
    dequantize(quantize_nf4(torch.ones(64)))
    targets = settings.targets
    assembly = assemble(
        config,
        ModelConfig(
            quantize=settings.quantize,  # type: ignore[arg-type]
            precision=settings.precision,  # type: ignore[arg-type]
            head=settings.head,  # type: ignore[arg-type]
            device="cpu",
        ),
        MemoryConfig(
            checkpoint_layers=settings.checkpoint_layers,
            offload_inputs=settings.offload_inputs,
            stream_layers=settings.stream_layers,
            mlp_tile_tokens=settings.mlp_tile_tokens,
            embedding=settings.embedding,  # type: ignore[arg-type]
        ),
        adapter=LoraConfig(
            rank=settings.rank,
            alpha=16,
            dropout=0.05 * settings.dropout,
            dora=settings.dora,
            targets=targets if isinstance(targets, str) else list(targets),
        ),
        row_tokens=settings.row_tokens,
        optimizer=settings.optimizer,
    )
    assembly.model.train()
    return assembly


def streaming_buffers(model: Any) -> list[Any]:
    """The host buffers of streamed layers and the two slots that they pass through."""
    weights = (getattr(layer.forward, "weights", None) for layer in model.base_model.modules())
    streaming = next((pair[0] for pair in weights if pair), None)
    return [*streaming.hosts, *streaming.slots] if streaming else []


def census(config: dict[str, Any], settings: Settings) -> tuple[int, int]:
    """(bytes of parameters, buffers and slots; peak of one accumulated step on top of them, without
    AdamW's moments).
    """
    from cllm.data.encode import Example
    from cllm.data.packing import collate
    from cllm.learn.loss import sft_loss
    from cllm.learn.optim import Trainee, make_optimizer
    from cllm.learn.proof import peak_storage_bytes, storage_bytes

    assembly = assembled(config, settings)
    model, precision = assembly.model, assembly.precision
    optimizer = make_optimizer(model, 1e-4, name=settings.optimizer)
    optimizer.step = lambda *_: None  # type: ignore[method-assign, assignment]
    trainee = Trainee(
        model,
        lambda m, b: sft_loss(m, b, settings.chunk_bytes),
        optimizer,
        precision,
        precision.scaler(),
    )
    # two: attention's outputs are put together
    long, short = [3 + i % 100 for i in range(settings.row_tokens - 8)], list(range(8))
    single = not assembly.packed  # recurrent layers take one
    row = collate(
        [Example(long + short, long + short)]
        if single
        else [Example(long, long), Example(short, short)]
    )
    held = storage_bytes([*model.parameters(), *model.buffers(), *streaming_buffers(model)])
    return held, peak_storage_bytes(lambda: trainee.step([row, row]))


@pytest.mark.parametrize(
    ("kind", "quantize"), [*((kind, "nf4") for kind in TINY), ("llama", "none"), ("glm", "none")]
)
def test_parameters_and_optimizer_are_counted_byte_for_byte(kind: str, quantize: str) -> None:
    check_fixed(kind, Settings(64, quantize, "bf16", rank=4, device="cpu"))


@pytest.mark.parametrize(
    "change",
    [
        {"head": "int8"},
        {"optimizer": "adamw8bit", "rank": 16},
        {"optimizer": "adamw8bit", "rank": 130},
        {"stream_layers": 4},
        {"embedding": "cpu"},
    ],
    ids=str,
)
def test_new_settings_are_counted_byte_for_byte(change: dict[str, Any]) -> None:
    check_fixed(
        "llama",
        replace(Settings(64, "nf4", "bf16", rank=4, device="cpu"), **change),
        num_hidden_layers=5,
    )  # type: ignore[arg-type]


def check_fixed(kind: str, settings: Settings, **sizes: int) -> None:
    """What is loaded, and the optimizer's moments after a step."""
    from cllm.learn.optim import make_optimizer
    from cllm.learn.proof import storage_bytes

    config = {**tiny(kind), **sizes}
    model = assembled(config, settings).model
    optimizer = make_optimizer(model, 1e-4, name=settings.optimizer)
    estimate = estimate_vram(config, settings)
    items = estimate.items
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    frozen += [*model.buffers(), *streaming_buffers(model)]
    loaded = items["linears"] + items["embedding"] + items["head"] + items["norms"] + estimate.host
    # biases lie in the slots too; tensors are aligned in a buffer, its end is not
    slack = 2048 if settings.stream_layers else 0
    assert abs(loaded - storage_bytes(frozen)) <= slack
    assert storage_bytes(trained) == items["lora"] == items["gradients"]
    for parameter in trained:
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    # all parameters share bitsandbytes' two code tables of 1 KiB
    moments = [
        t
        for values in optimizer.state.values()
        for name, t in values.items()
        if name != "step" and not name.startswith("qmap")
    ]
    assert storage_bytes(moments) == items["optimizer"]


CASES = [
    *((kind, {"quantize": quantize}) for kind in TINY for quantize in ("nf4", "none")),
    *((kind, {"checkpoint_layers": 0}) for kind in TINY),
    *(
        ("llama", change)
        for change in (
            {"precision": "fp32"},
            {"precision": "fp16"},
            {"precision": "fp16", "checkpoint_layers": 0},
            {"checkpoint_layers": 1},
            {"checkpoint_layers": 2},
        )
    ),
    ("qwen3", {"precision": "fp32", "quantize": "none", "checkpoint_layers": 0}),
    ("gpt2", {"precision": "fp16", "dropout": True}),
    *(("qwen3_moe", {"precision": precision}) for precision in ("fp16", "fp32")),
    ("qwen3_5_text", {"stream_layers": 3}),  # layers of two sizes
    ("llama", {"row_tokens": 32}),
    ("llama", {"chunk_bytes": 2**13}),
    *(
        ("llama", {"chunk_bytes": 2**21, "vocab": 8000, "precision": precision})
        for precision in ("fp32", "bf16")
    ),
    *(
        (kind, {change: True, "checkpoint_layers": layers})
        for kind in ("llama", "glm", "qwen3_moe", "gpt2")
        for change in ("dropout", "dora")
        for layers in (-1, 0)
    ),
    ("llama", {"offload_inputs": True}),
    ("llama", {"mlp_tile_tokens": 64}),
    ("llama", {"mlp_tile_tokens": 64, "checkpoint_layers": 0}),
    ("llama", {"stream_layers": 4, "checkpoint_layers": 0}),
    ("qwen3", {"stream_layers": 5, "offload_inputs": True, "mlp_tile_tokens": 48}),
    ("llama", {"head": "int8", "vocab": 4000}),
    ("llama", {"embedding": "cpu", "precision": "fp32"}),
    ("llama", {"rank": 33}),
    ("llama", {"targets": ("q_proj", "down_proj"), "checkpoint_layers": 1}),
]


@pytest.mark.parametrize(("kind", "change"), CASES, ids=lambda value: str(value))
def test_plan_is_within_one_percent_of_a_storage_census(kind: str, change: dict[str, Any]) -> None:
    """On the CPU host memory is in the census too."""
    settings = replace(
        Settings(192, "nf4", "bf16", rank=4, device="cpu"),
        **{k: v for k, v in change.items() if k != "vocab"},
    )  # type: ignore[arg-type]
    config = tiny(kind)
    if (settings.stream_layers or settings.offload_inputs) and "layer_types" not in config:
        config["num_hidden_layers"] = 6
    config |= {"vocab_size": change["vocab"]} if "vocab" in change else {}
    whole, alive = ratios(config, settings)
    assert whole == pytest.approx(1, abs=0.01) and alive == pytest.approx(1, abs=0.02)


def ratios(config: dict[str, Any], settings: Settings) -> tuple[float, float]:
    """Plan over census: of all bytes, and of those that the step makes."""
    fixed, peak = census(config, settings)
    estimate = estimate_vram(config, settings)
    whole = estimate.allocated - estimate.items["optimizer"] + estimate.host
    return whole / (fixed + peak), (whole - fixed) / peak


def test_plan_is_within_three_percent_of_what_pytorchs_cuda_allocator_recorded() -> None:
    """bench/null_gpu.sh's steps of one model, planned again with the settings that each was run
    with; of all models: bench/plan.py.
    """
    report = Path(__file__).parents[1] / "bench" / "results" / "null-gpu.json"
    runs = json.loads(report.read_text(encoding="utf-8"))["programs"]
    steps = [run for run in runs if "max_memory_allocated" in run]
    assert len({(run["model"], run["setting"], run["card"]) for run in steps}) >= 48
    wrong = {}
    for run in steps:
        if run["fits_8_gib"]:
            assert run["with_context_gib"] <= 8, run["build"]
        if run["model"] != "Qwen/Qwen3-4B" or run["row_tokens"] > 2048:
            continue
        config = load_config(os.devnull, run["command"].split()[4:])
        settings = replace(
            settings_of(config, run["precision"], "cuda"),
            row_tokens=run["row_tokens"],
            checkpoint_layers=run["recomputed_layers"],
        )
        planned = estimate_vram(published(run["model"]), settings)
        # Loading holds one linear in 16 bits beside the weights: so does every step, however short.
        short = estimate_vram(published(run["model"]), replace(settings, row_tokens=128))
        assert run["loading_peak"] < short.allocated, run["build"]
        ratio = planned.allocated / run["max_memory_allocated"]
        if abs(ratio - 1) > 0.03:
            wrong[run["build"], run["row_tokens"]] = round(ratio, 4)
    assert not wrong


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_the_published_number_of_parameters(name: str) -> None:
    items = estimate_vram(published(name), Settings(128, precision="fp32")).items
    bytes_ = items["linears"] + items["embedding"] + items["head"] + items["norms"]
    assert bytes_ / 4 / 1e9 == pytest.approx(PARAMETERS[name], rel=0.002)


def test_table_of_the_design_document() -> None:
    """../shared/design/MEMORY.md: MiB of NF4 linears and of one 16-bit embedding."""
    for name, linears, embedding in (
        ("chatglm3-6b", 2809, 508),
        ("Yi-6B", 2724, 500),
        ("Qwen-7B", 3186, 1187),
        ("Qwen3-8B", 3417, 1187),
    ):
        weights = weighed(published(name), Settings(quantize="nf4"))
        # with the biases
        assert sum(weights.linears) / MIB == pytest.approx(linears, abs=1)
        assert round(weights.embedding / MIB) == embedding


@pytest.mark.parametrize("name", ["THUDM/chatglm3-6b", "Qwen/Qwen3.5-4B", "google/gemma-3-270m"])
def test_total_grows_with_everything_that_costs(name: str) -> None:
    config, small = published(name), Settings(512, "nf4", rank=8)
    total = estimate_vram(config, small).total
    for change in ({"row_tokens": 1024}, {"rank": 64}, {"precision": "fp32"}, {"quantize": "none"}):
        assert estimate_vram(config, replace(small, **change)).total > total, change


def test_targets_are_the_trainers() -> None:
    config = published("Qwen3-4B")
    named = estimate_vram(config, Settings(512, targets="q_proj"))
    assert named.items["lora"] == 4 * 16 * 36 * (2560 + 4096)
    globbed = estimate_vram(config, Settings(512, targets=("model.layers.1?.*q_proj",)))
    assert globbed.items["lora"] == 4 * 16 * 10 * (2560 + 4096)


@pytest.mark.parametrize("results", ["convert_memory.json", "convert_memory_bin.json"])
def test_conversion_takes_about_its_largest_tensor(results: str) -> None:
    measured = json.loads(
        (Path(__file__).parents[1] / "bench" / "results" / results).read_text(encoding="utf-8")
    )
    sizes = {
        "padded_vocab_size": 24576,
        "hidden_size": 2048,
        "ffn_hidden_size": 6848,
        "num_layers": 4,
        "num_attention_heads": 16,
    }
    estimate = estimate_vram(PUBLISHED["THUDM/chatglm3-6b"] | sizes, Settings(64)).conversion
    assert 0.7 * estimate < measured["above_bytes"] <= 1.01 * estimate < measured["threshold_bytes"]
    # 608 MB of the real 12.5 GB
    assert (
        estimate_vram(published("chatglm3-6b"), Settings(64)).conversion
        == 2 * 65024 * 4096 + 75_000_000
    )


def test_names_match_whoever_the_owner_and_chat_models_have_the_shape_of_their_base() -> None:
    for name in ("zai-org/chatglm3-6b", "hf:THUDM/chatglm3-6b", "CHATGLM3-6B"):
        assert find_config(name)[0] == "THUDM/chatglm3-6b"
    assert find_config("modelscope:Qwen/Qwen2.5-7B-Instruct")[0] == "Qwen/Qwen2.5-7B"


def test_config_json_is_read_from_a_directory(tmp_path: Path) -> None:
    config = PUBLISHED["THUDM/chatglm3-6b"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert published(str(tmp_path)) == config
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        published(str(tmp_path))


@pytest.mark.parametrize("checkpoint_layers", [-1, 0])
def test_alibi_is_within_one_percent_of_a_storage_census(checkpoint_layers: int) -> None:
    # the lack of the latter tells Baichuan 13B from 7B
    native = {"num_key_value_heads", "max_position_embeddings"}
    config = {
        "model_type": "baichuan",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "model_max_length": 256,
    }
    config |= {key: value for key, value in COMMON.items() if key not in native}
    shared = Settings(192, "nf4", "bf16", rank=4, device="cpu")
    whole, alive = ratios(config, replace(shared, checkpoint_layers=checkpoint_layers))
    assert whole == pytest.approx(1, abs=0.01) and alive == pytest.approx(1, abs=0.02)


OTHERS: dict[str, dict[str, Any]] = {
    "phi3": {},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},  # layers lie one module deeper
    "bloom": {"n_head": 8, "n_layer": 3},  # layers give tuples, and packed rows are refused
    "gptj": {"n_embd": 128, "n_layer": 3, "n_head": 8, "n_positions": 256, "rotary_dim": 8},
    "seed_oss": {"head_dim": 16},  # dropout of its own
    # gives its router's scores, too
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {  # buffers that are stored
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "falcon": {},  # no other attention than its own
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(
    "change", [{}, {"checkpoint_layers": 0}, {"precision": "fp16", "mlp_tile_tokens": 64}], ids=str
)
def test_architectures_that_nobody_thought_of_are_planned(
    kind: str, change: dict[str, Any]
) -> None:
    config = COMMON | {"model_type": kind} | OTHERS[kind]
    shared = Settings(192, "nf4", "bf16", rank=4, device="cpu")
    whole, _ = ratios(config, replace(shared, **change))
    assert whole == pytest.approx(1, abs=0.01)


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_no_step_takes_more_than_its_plan(data: st.DataObject) -> None:
    """Random settings of tiny models, each against a census of the real step."""
    kind = data.draw(st.sampled_from(sorted(TINY)))
    layers = data.draw(st.integers(3, 7)) if kind in ("llama", "qwen3", "qwen3_moe") else 3
    chosen = Settings(
        row_tokens=data.draw(st.integers(24, 160)),
        quantize=data.draw(st.sampled_from(["none", "nf4"])),
        precision=data.draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        rank=data.draw(st.sampled_from([1, 4, 16, 40])),
        checkpoint_layers=data.draw(st.integers(-1, layers)),
        chunk_bytes=data.draw(st.sampled_from([2**14, 2**27])),
        device="cpu",
        head=data.draw(st.sampled_from(["16bit", "int8"])),
        offload_inputs=data.draw(st.booleans()),
        stream_layers=data.draw(st.sampled_from([0, 0, 3])),
        mlp_tile_tokens=data.draw(st.sampled_from([0, 64])),
        dropout=data.draw(st.booleans()),
        dora=data.draw(st.booleans()),
    )
    config = tiny(kind) | {"num_hidden_layers": layers} if layers != 3 else tiny(kind)
    fixed, peak = census(config, chosen)
    plan = estimate_vram(config, chosen)
    assert fixed + peak <= 1.01 * (plan.allocated - plan.items["optimizer"] + plan.host)


def test_a_stored_adapter_is_planned_by_its_tensors(tmp_path: Path) -> None:
    """PEFT's target_modules may be a regular expression, and [lora] has another rank."""
    from cllm.assembly import assemble
    from cllm.learn.proof import storage_bytes
    from cllm.model.adapter import CONFIG_FILE, save_adapter

    config, model, limit = tiny("qwen3"), ModelConfig(device="cpu"), MemoryConfig(budget_gib=1)
    new = LoraConfig(rank=5, targets=["q_proj", "down_proj"])
    save_adapter(assemble(config, model, limit, adapter=new, row_tokens=64).model, tmp_path)
    file = tmp_path / CONFIG_FILE
    text = file.read_text(encoding="utf-8")
    names = json.loads(text)["target_modules"]
    stored = {**json.loads(text), "target_modules": f".*\\.({'|'.join(names)})"}
    file.write_text(json.dumps(stored), encoding="utf-8")
    for adapter in (tmp_path, LoraConfig(init_from=str(tmp_path))):
        assembly = assemble(config, model, limit, adapter=adapter, row_tokens=64)
        assert assembly.plan is not None and assembly.settings.rank == 5
        trained = [p for n, p in assembly.model.named_parameters() if "lora_" in n]
        assert assembly.plan.items["lora"] == storage_bytes(trained)


def test_what_does_not_run_without_values_goes_unplanned_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control flow that depends on data."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    from cllm.assembly import assemble

    plain = LlamaMLP.forward

    def forward(self: Any, x: Any) -> Any:
        return plain(self, x) if float(x.abs().max()) >= 0 else x

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    config = tiny("llama") | {"vocab_size": 161}
    with pytest.raises(UserError) as error:
        estimate_vram(config, Settings(64, device="cpu", targets=("q_proj",)))
    assert error.value.code == "memory.untraced" and "\n" not in str(error.value)
    lora, limit = LoraConfig(targets=["q_proj"]), MemoryConfig(budget_gib=1)
    model = ModelConfig(device="cpu")
    assembly = assemble(config, model, limit, adapter=lora, row_tokens=64, name="mine")
    assert assembly.plan is None and assembly.budget == GIB
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "mine" in line]
    assert "longest row" in line


def test_a_model_whose_code_fails_with_wrapped_linears_is_refused_in_one_line() -> None:
    """MPT's builds its mask from one that it must be given."""
    from cllm.assembly import assemble

    config = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 100}
    with pytest.raises(UserError) as error:
        assemble(config, ModelConfig(), MemoryConfig(), adapter=LoraConfig(), row_tokens=64)
    assert error.value.code == "train.code" and "\n" not in str(error.value)


def test_a_config_that_lacks_sizes_is_said() -> None:
    with pytest.raises(UserError):
        estimate_vram({"model_type": "nobody"}, Settings(64))


def test_an_unknown_name_is_answered_with_the_nearest_ones() -> None:
    with pytest.raises(UserError, match="Qwen/Qwen3-8B"):
        published("Qwen/Qwen3-9B")


def test_a_second_start_traces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_DATA_CACHE", str(tmp_path))
    config, chosen = tiny("qwen2") | {"vocab_size": 170}, Settings(96, "nf4", device="cpu")
    plan = estimate_vram(config, chosen)
    trace._facts.cache_clear()
    monkeypatch.setattr(trace, "random_model", lambda *_, **__: pytest.fail("built again"))
    trace._built.cache_clear()
    assert estimate_vram(config, chosen) == plan


def test_plan_finds_the_longest_row_and_the_fewest_recomputed_layers() -> None:
    config, asked = published("Qwen3-0.6B"), Settings(2048, "nf4")
    assert len(ladder(config, asked, 3 * GIB)) == 1
    longest, fewest = longest_row(config, asked, 3.0), fewest_recomputed(config, asked, 3 * GIB)
    for tokens, inside in ((longest, True), (longest + 128, False)):
        total = estimate_vram(config, replace(asked, row_tokens=tokens)).total
        assert (total <= 3 * GIB) is inside
    for layers, inside in ((fewest, True), (fewest - 1, False)):
        total = estimate_vram(config, replace(asked, checkpoint_layers=layers)).total
        assert (total <= 3 * GIB) is inside


def test_long_rows_are_planned_from_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As exactly as if they were traced, the square of a window's mask included."""
    config = published("google/gemma-3-270m")
    asked = Settings(5000, "nf4", "fp16", checkpoint_layers=9)
    whole = estimate_vram(config, asked).total
    monkeypatch.setattr(trace, "LONG", 1024)
    assert estimate_vram(config, asked).total == pytest.approx(whole, rel=1e-3)


def test_rows_beyond_the_mlp_tile_need_less_than_those_before_it() -> None:
    config = published("glm-4-9b-chat")
    tiled = Settings(2048, "nf4", mlp_tile_tokens=4096, checkpoint_layers=0)
    # a row as long as the tile does not fit
    budget = estimate_vram(config, replace(tiled, row_tokens=4096)).total - 2**20
    row = longest_row(config, tiled, budget / GIB)
    assert row > 4096
    assert estimate_vram(config, replace(tiled, row_tokens=row)).total <= budget


def test_ladder_ends_where_it_fits_and_never_goes_up() -> None:
    config = published("Qwen3-0.6B")
    asked = Settings(8192, "none", rank=64, checkpoint_layers=0)
    _, *rungs = steps = ladder(config, asked, int(1.6 * GIB))
    totals = [step.total for step in steps]
    assert rungs and totals == sorted(totals, reverse=True)
    assert totals[-1] <= 1.6 * GIB < totals[-2]
    order = [
        "memory.embedding=cpu",
        "train.optimizer=adamw8bit",
        "memory.checkpoint_layers=-1",
        "memory.offload_inputs=true",
        "model.quantize=nf4",
    ]
    changes = [step.change for step in rungs]
    assert changes[: len(order) - 1] == [c for c in order if c in changes][: len(order) - 1]
    assert all(step.slowdown >= 0.9 for step in rungs)
    assert estimate_vram(config, rungs[-1].settings).total == totals[-1]
    hopeless, half = Settings(2048), GIB // 2
    assert longest_row(config, hopeless, 0.5) == 0
    assert fewest_recomputed(config, hopeless, half) == -1
    assert ladder(config, hopeless, half)[-1].total > half


def test_operations_and_what_crosses_the_link_are_counted() -> None:
    config = published("Qwen3-0.6B")
    kept = Settings(2048, "nf4", checkpoint_layers=0)
    again = replace(kept, checkpoint_layers=-1)
    linears = 28 * 15_728_640
    plain, recomputed = (estimate_vram(config, s).flops for s in (kept, again))
    # 2 a weight and token forth, 2 back (a frozen weight has no gradient), 2 again; of causal
    # attention half of 4 T^2 a channel forth, 2.5 times that back; rank-16 adapters beside it
    attention = 28 * 2 * 2048**2 * 2048
    assert recomputed - plain == pytest.approx(2 * 2048 * linears + attention, rel=0.05)
    head = 4 * 2048 * 151_936 * 1024
    assert plain == pytest.approx(4 * 2048 * linears + 3.5 * attention + head, rel=0.05)
    offloaded = estimate_vram(config, replace(again, offload_inputs=True)).crossing
    assert offloaded == pytest.approx(2 * 28 * 2048 * 1024 * 2, rel=0.01)
    assert estimate_vram(config, again).crossing == 0


def test_fit_recomputes_as_few_layers_as_the_budget_allows() -> None:
    config = published("Qwen3-0.6B")
    planned, _ = plan_training(config, "x", Settings(2048, "nf4"), 3 * GIB)
    chosen = planned.checkpoint_layers
    fewer = Settings(2048, "nf4", checkpoint_layers=chosen - 1)
    assert 0 < chosen < 28 and estimate_vram(config, fewer).total > 3 * GIB
    asked = Settings(2048, "nf4", checkpoint_layers=28)
    assert plan_training(config, "x", asked, 3 * GIB)[0].checkpoint_layers == 28


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    config = published("Qwen3-0.6B")
    with pytest.raises(UserError) as error:
        plan_training(config, "Qwen3-0.6B", Settings(2048, checkpoint_layers=0), 2 * GIB)
    text = str(error.value)
    assert error.value.code == "memory.too_big" and "\n" not in text and "2.00" in text
    advice = re.search(r"add (.*?) \(then", text)[1].split()  # type: ignore[index]
    assert "memory.checkpoint_layers=-1" in advice
    last = [*savings(config, Settings(2048, checkpoint_layers=0), 2 * GIB)]
    fitting = next(step for step in last if step.total <= 2 * GIB)
    assert advice[-1] == fitting.change
    with pytest.raises(UserError, match="smaller model") as error:
        plan_training(config, "Qwen3-0.6B", Settings(2048), GIB // 2)
    assert error.value.code == "memory.hopeless"


def test_a_plan_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = PUBLISHED["HuggingFaceTB/SmolLM2-135M"]
    _, estimate = plan_training(config, "x", Settings(64, device="cpu"), 8 * GIB)
    assert f"plan {estimate.total / GIB:.2f} of 8.00 GiB" in capsys.readouterr().err


def test_a_run_without_a_budget_goes_unplanned(capsys: pytest.CaptureFixture[str]) -> None:
    from cllm.assembly import open_model

    assert open_model("tiny-zh", device="cpu").assembly.plan is None
    assert "plan" not in capsys.readouterr().err


def test_where_segments_cannot_grow_more_is_left_for_fragments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bench/null_gpu.sh --allocator backend:native: 250 MiB were too few for the default one."""
    config, asked = published("Qwen3-0.6B"), Settings(2048, "nf4")
    monkeypatch.setattr(fitting, "SEGMENTS_GROW", True)
    linux = estimate_vram(config, asked)
    monkeypatch.setattr(fitting, "SEGMENTS_GROW", False)
    windows = estimate_vram(config, asked)
    assert linux.items["fragmentation"] == 250 * MIB and windows.items["fragmentation"] == GIB
    assert windows.allocated == linux.allocated


def test_table_names_every_item(monkeypatch: pytest.MonkeyPatch) -> None:
    config = published("Yi-6B")
    estimate = estimate_vram(config, Settings(2048, "nf4"))
    assert f"{estimate.total / MIB:,.1f} MiB" in estimate.table()
    assert len(estimate.table().splitlines()) == len(estimate.items) + 1
    monkeypatch.setenv("CLLM_LANG", "zh")
    assert "合计" in estimate.table()
    assert estimate.host == 64000 * 4096 * 2


def test_import_is_light() -> None:
    code = "import sys, cllm.memory; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
