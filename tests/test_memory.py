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

from cllm import memory
from cllm.config import LoraConfig, MemoryConfig, ModelConfig, load_config
from cllm.fit import fit, make_plan, plan_training, row_flops, row_seconds
from cllm.memory import GIB, MIB, Settings, conversion_bytes, estimate_vram, nf4_parts
from cllm.messages import UserError
from cllm.plan import settings_of
from cllm.shapes import SHAPES, find_shape, known_shape, shape_of

if TYPE_CHECKING:
    from cllm.assembly import Assembly

PUBLISHED = json.loads(SHAPES.read_text(encoding="utf-8"))
PARAMETERS = {  # billions, as the model cards say
    "THUDM/chatglm3-6b": 6.24, "THUDM/glm-4-9b-chat": 9.40, "Qwen/Qwen-7B": 7.72, "Qwen/Qwen2.5-7B": 7.62, "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-4B": 4.02, "Qwen/Qwen3-8B": 8.19, "Qwen/Qwen3-32B": 32.76,
    "Qwen/Qwen3.5-4B": 4.206, "baichuan-inc/Baichuan2-7B-Base": 7.51, "01-ai/Yi-6B": 6.06,
    "internlm/internlm2-7b": 7.74, "meta-llama/Llama-3.1-8B": 8.03, "google/gemma-3-270m": 0.268, "openai-community/gpt2": 0.1244,
}  # fmt: skip
# 2 layers of every architecture in memory.ARCHITECTURES, wide enough for activations to outweigh
# bookkeeping
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
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_5_text": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "gpt2": {
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 8,
        "n_positions": 256,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
}
COMMON = {
    "vocab_size": 160, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


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
            rank=settings.rank, alpha=16, dropout=0.05 * settings.dropout, dora=settings.dora
        ),
        row_tokens=settings.row_tokens,
        optimizer=settings.optimizer,
    )
    assembly.model.train()
    return assembly


def slot_bytes(model: Any) -> int:
    """Bytes of the two slots that streamed layers pass through."""
    weights = (getattr(layer.forward, "weights", None) for layer in model.base_model.modules())
    streaming = next((pair[0] for pair in weights if pair), None)
    return sum(slot.nbytes for slot in streaming.slots) if streaming else 0


def census(config: dict[str, Any], settings: Settings) -> tuple[int, int]:
    """(bytes of parameters, buffers and slots; peak of one accumulated step on top of them, which
    ends before AdamW makes its moments).
    """
    from cllm.data.encode import Example
    from cllm.data.packing import collate
    from cllm.learn.loss import sft_loss
    from cllm.learn.optim import Trainee, make_optimizer
    from cllm.learn.proof import peak_storage_bytes, storage_bytes

    assembly = assembled(config, settings)
    model, precision = assembly.model, assembly.precision
    trainee = Trainee(
        model,
        lambda m, b: sft_loss(m, b, settings.chunk_bytes),
        make_optimizer(model, 1e-4, name=settings.optimizer),
        precision,
        precision.scaler(),
    )
    # two: attention's outputs are put together
    long, short = [3 + i % 100 for i in range(settings.row_tokens - 8)], list(range(8))
    single = config["model_type"] == "qwen3_5_text"  # recurrent layers take one
    row = collate(
        [Example(long + short, long + short)]
        if single
        else [Example(long, long), Example(short, short)]
    )
    held = storage_bytes([*model.parameters(), *model.buffers()]) + slot_bytes(model)
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
    slots = slot_bytes(model)
    estimate = estimate_vram(shape_of(config), settings)
    items = estimate.items
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    rotary = {
        b.data_ptr()
        for name, b in model.named_buffers()
        if "inv_freq" in name or "embed_scale" in name
    }
    frozen += [b for b in model.buffers() if b.data_ptr() not in rotary]
    loaded = items["linears"] + items["embedding"] + items["head"] + items["norms"] + estimate.host
    # biases lie in the slots too; tensors are aligned in a buffer, its end is not
    slack = 2048 if settings.stream_layers else 0
    assert abs(loaded - storage_bytes(frozen) - slots) <= slack
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
    *((kind, {}) for kind in TINY if kind != "qwen3_5_text"),
    *(
        ("llama", change)
        for change in (
            {"precision": "fp32"},
            {"precision": "fp16"},
            {"checkpoint_layers": 0},
            {"checkpoint_layers": 1},
        )
    ),
    ("glm", {"quantize": "none"}),
    ("qwen3", {"precision": "fp32", "quantize": "none", "checkpoint_layers": 0}),
    ("llama", {"row_tokens": 32}),
    ("llama", {"chunk_bytes": 2**13}),
    *(
        ("llama", {"chunk_bytes": 2**21, "vocab": 8000, "precision": precision})
        for precision in ("fp32", "bf16")
    ),
    ("gpt2", {"checkpoint_layers": 0}),
    ("llama", {"dropout": True}),
    ("glm", {"dropout": True, "checkpoint_layers": 0}),
    ("llama", {"dora": True}),
    ("glm", {"dora": True, "checkpoint_layers": 0}),
    ("llama", {"offload_inputs": True}),
    ("llama", {"mlp_tile_tokens": 64}),
    ("llama", {"mlp_tile_tokens": 64, "checkpoint_layers": 0}),
    ("llama", {"stream_layers": 4, "checkpoint_layers": 0}),
    ("qwen3", {"stream_layers": 5, "offload_inputs": True, "mlp_tile_tokens": 48}),
    ("llama", {"head": "int8", "vocab": 4000}),
    ("llama", {"embedding": "cpu", "precision": "fp32"}),
]


@pytest.mark.parametrize(("kind", "change"), CASES, ids=lambda value: str(value))
def test_peak_is_within_five_percent_of_a_storage_census(kind: str, change: dict[str, Any]) -> None:
    """On the CPU host memory is in the census too."""
    settings = replace(
        Settings(192, "nf4", "bf16", rank=4, device="cpu"),
        **{k: v for k, v in change.items() if k != "vocab"},
    )  # type: ignore[arg-type]
    config = {
        **tiny(kind),
        **({"num_hidden_layers": 6} if settings.stream_layers or settings.offload_inputs else {}),
    }
    config |= {"vocab_size": change["vocab"]} if "vocab" in change else {}
    fixed, peak = census(config, settings)
    estimate = estimate_vram(shape_of(config), settings)
    whole = estimate.allocated - estimate.items["optimizer"] + estimate.host
    assert whole / (fixed + peak) == pytest.approx(1, abs=0.05)
    waiting = (
        estimate.host
        - estimate_vram(shape_of(config), replace(settings, offload_inputs=False)).host
    )
    alive = (
        estimate.items["activations"]
        + estimate.items["layer_inputs"]
        + estimate.items["gradients"]
        + waiting
    )
    assert alive / peak == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("size", [32, 64])
def test_recurrent_layers_are_within_ten_percent_of_a_storage_census(size: int) -> None:
    """The delta rule's bytes are fitted, not counted: at row lengths worth planning, the number of
    chunks no longer matters.
    """
    settings = Settings(384, "nf4", "bf16", rank=4, device="cpu")
    config = tiny("qwen3_5_text") | {"linear_key_head_dim": size, "linear_value_head_dim": size}
    fixed, peak = census(config, settings)
    estimate = estimate_vram(shape_of(config), settings)
    assert (estimate.allocated - estimate.items["optimizer"]) / (fixed + peak) == pytest.approx(
        1, abs=0.1
    )


def test_plan_is_within_three_percent_of_what_pytorchs_cuda_allocator_recorded() -> None:
    """bench/null_gpu.sh's steps, planned again with the settings that each was run with."""
    report = Path(__file__).parents[1] / "bench" / "results" / "null-gpu.json"
    runs = json.loads(report.read_text(encoding="utf-8"))["programs"]
    steps = [run for run in runs if "max_memory_allocated" in run]
    assert len({(run["model"], run["setting"], run["card"]) for run in steps}) >= 48
    wrong = {}
    for run in steps:
        config = load_config(os.devnull, run["command"].split()[4:])
        settings = replace(
            settings_of(config, run["precision"], "cuda"),
            row_tokens=run["row_tokens"],
            checkpoint_layers=run["recomputed_layers"],
        )
        planned = estimate_vram(find_shape(run["model"]), settings)
        ratio = planned.allocated / run["max_memory_allocated"]
        if abs(ratio - 1) > 0.03:
            wrong[run["build"], run["row_tokens"]] = round(ratio, 4)
        if run["fits_8_gib"]:
            assert run["with_context_gib"] <= 8, run["build"]
    assert not wrong


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_shapes_have_the_published_number_of_parameters(name: str) -> None:
    items = estimate_vram(find_shape(name), Settings(precision="fp32")).items
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
        items = estimate_vram(find_shape(name), Settings(quantize="nf4", embedding="device")).items
        assert (
            round(items["linears"] / MIB) == linears
            and round(items["embedding"] / MIB) == embedding
        )
    assert nf4_parts(4096 * 4096) == (4096 * 4096 // 2, 4096 * 64, 4 * 1024 + 4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_grows_with_everything_that_costs(name: str) -> None:
    shape, small = find_shape(name), Settings(512, "nf4", rank=8)
    total = estimate_vram(shape, small).total
    for change in ({"row_tokens": 1024}, {"rank": 64}, {"precision": "fp32"}, {"quantize": "none"}):
        # GPT-2's Conv1D stays dense
        if name != "openai-community/gpt2" or "quantize" not in change:
            assert estimate_vram(shape, replace(small, **change)).total > total, change


def test_one_target_may_be_named_without_a_list() -> None:
    shape = find_shape("Qwen3-4B")
    named = estimate_vram(shape, Settings(targets="q_proj"))
    for target in ("self_attn.q_proj", "model.layers.*.q_proj"):  # as the trainer takes them
        assert named == estimate_vram(shape, Settings(targets=(target,)))
    assert named == estimate_vram(shape, Settings(targets=("q_proj",))) and named.items[
        "lora"
    ] == 4 * 16 * 36 * (2560 + 4096)


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
    estimate = conversion_bytes(shape_of(PUBLISHED["THUDM/chatglm3-6b"] | sizes))
    assert 0.7 * estimate < measured["above_bytes"] <= 1.01 * estimate < measured["threshold_bytes"]
    # 608 MB of the real 12.5 GB
    assert conversion_bytes(find_shape("chatglm3-6b")) == 2 * 65024 * 4096 + 75_000_000


def test_names_match_whoever_the_owner_and_chat_models_have_the_shape_of_their_base() -> None:
    for name in ("zai-org/chatglm3-6b", "hf:THUDM/chatglm3-6b", "CHATGLM3-6B"):
        assert find_shape(name).name == "THUDM/chatglm3-6b"
    assert find_shape("modelscope:Qwen/Qwen2.5-7B-Instruct").name == "Qwen/Qwen2.5-7B"


def test_config_json_is_read_from_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(PUBLISHED["THUDM/chatglm3-6b"]), encoding="utf-8"
    )
    assert replace(find_shape(str(tmp_path)), name="") == replace(
        find_shape("chatglm3-6b"), name=""
    )
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        find_shape(str(tmp_path))


@pytest.mark.parametrize("checkpoint_layers", [-1, 0])
def test_alibi_within_five_percent_of_a_storage_census(checkpoint_layers: int) -> None:
    # the lack of the latter tells Baichuan 13B from 7B
    native = {"num_key_value_heads", "max_position_embeddings"}
    config = {
        "model_type": "baichuan",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "model_max_length": 256,
    }
    config |= {key: value for key, value in COMMON.items() if key not in native}
    settings = Settings(
        192, "nf4", "bf16", rank=4, device="cpu", checkpoint_layers=checkpoint_layers
    )
    estimate = estimate_vram(shape_of(config), settings)
    _, peak = census(config, settings)
    assert find_shape("Baichuan2-13B-Base").alibi and shape_of(config).alibi
    assert sum(
        estimate.items[name] for name in ("activations", "layer_inputs", "gradients")
    ) / peak == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({}, "'?'"),
        (
            {"model_type": "llama", "hidden_size": 8},
            "num_hidden_layers, vocab_size, num_attention_heads",
        ),
    ],
)
def test_unknown_shapes_are_refused_in_one_line(config: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as error:
        shape_of(config, "X")
    assert part in str(error.value) and "\n" not in str(error.value)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="Qwen/Qwen3-8B"):
        find_shape("nobody/nothing")


def test_plan_finds_the_longest_row_and_the_fewest_recomputed_layers() -> None:
    shape, settings = find_shape("Qwen3-4B"), Settings(2048, "nf4")
    plan = make_plan(shape, settings, 8.0)
    assert plan.fits and not plan.ladder
    for tokens, inside in ((plan.longest_row, True), (plan.longest_row + 128, False)):
        assert (
            estimate_vram(shape, replace(settings, row_tokens=tokens)).total <= 8 * GIB
        ) is inside
    for layers, inside in ((plan.checkpoint_layers, True), (plan.checkpoint_layers - 1, False)):
        assert (
            estimate_vram(shape, replace(settings, checkpoint_layers=layers)).total <= 8 * GIB
        ) is inside


def test_rows_beyond_the_mlp_tile_need_less_than_those_before_it() -> None:
    shape = find_shape("glm-4-9b-chat")
    settings = Settings(2048, "nf4", mlp_tile_tokens=4096, checkpoint_layers=0)
    # a row as long as the tile does not fit
    budget = estimate_vram(shape, replace(settings, row_tokens=4096)).total - 2**20
    plan = make_plan(shape, settings, budget / GIB)
    assert (
        plan.longest_row > 4096
        and estimate_vram(shape, replace(settings, row_tokens=plan.longest_row)).total <= budget
    )


def test_ladder_ends_where_it_fits_and_never_goes_up() -> None:
    shape = find_shape("chatglm3-6b")
    plan = make_plan(shape, Settings(8192, "none", rank=64, checkpoint_layers=0), 6.0)
    totals = [plan.estimate.total, *(step.total for step in plan.ladder)]
    assert (
        not plan.fits
        and totals == sorted(totals, reverse=True)
        and totals[-1] <= 6 * GIB < totals[-2]
    )
    order = [
        "memory.embedding=cpu",
        "train.optimizer=adamw8bit",
        "memory.checkpoint_layers=-1",
        "memory.offload_inputs=true",
        "model.quantize=nf4",
    ]
    assert [step.change for step in plan.ladder[:5]] == order and all(
        step.slowdown >= 1 for step in plan.ladder
    )
    assert estimate_vram(shape, plan.ladder[-1].settings).total == totals[-1]
    hopeless = make_plan(find_shape("Qwen3-32B"), Settings(2048), 2.0)
    assert (
        hopeless.longest_row == 0
        and hopeless.checkpoint_layers == -1
        and hopeless.ladder[-1].total > 2 * GIB
    )


def test_recomputing_costs_a_forward_and_nf4_costs_traffic() -> None:
    shape, settings = find_shape("Qwen3-4B"), Settings(2048, "none", checkpoint_layers=0)
    plain, recomputed = (
        row_flops(shape, settings),
        row_flops(shape, replace(settings, checkpoint_layers=-1)),
    )
    layers = sum(i * o for i, o in shape.linears().values()) * shape.layers
    assert plain == pytest.approx(4 * 2048 * (layers + shape.vocab * shape.hidden), rel=0.15)
    assert recomputed - plain == pytest.approx(2 * 2048 * layers, rel=0.1)
    assert (
        row_seconds(shape, replace(settings, quantize="nf4"))
        > row_seconds(shape, settings)
        > plain / 30e12
    )


def test_fit_recomputes_as_few_layers_as_the_budget_allows() -> None:
    shape = find_shape("Qwen3-4B")
    chosen = fit(shape, Settings(2048, "nf4"), 8 * GIB).checkpoint_layers
    assert (
        0 < chosen < 36
        and estimate_vram(shape, Settings(2048, "nf4", checkpoint_layers=chosen - 1)).total
        > 8 * GIB
    )
    assert fit(shape, Settings(2048, "nf4", checkpoint_layers=36), 8 * GIB).checkpoint_layers == 36


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    shape = find_shape("Qwen3-4B")
    with pytest.raises(UserError) as error:
        fit(shape, Settings(2048, checkpoint_layers=0), 5 * GIB)
    text = str(error.value)
    assert error.value.code == "memory.too_big" and "\n" not in text and "5.00" in text
    advice = re.search(r"add (.*?) \(then", text)[1].split()  # type: ignore[index]
    assert {"memory.checkpoint_layers=-1", "model.quantize=nf4"} < set(advice)
    how = {"checkpoint_layers": -1, "optimizer": "adamw8bit", "offload_inputs": True}
    assert (
        len(advice) == 4
        and estimate_vram(shape, Settings(2048, "nf4", embedding="device", **how)).total <= 5 * GIB
    )  # type: ignore[arg-type]
    with pytest.raises(UserError, match="smaller model") as error:
        fit(shape, Settings(2048), GIB)
    assert error.value.code == "memory.hopeless"


def test_an_unknown_architecture_goes_unplanned_and_a_plan_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert known_shape({"model_type": "qwen3_moe"}, "x") is None
    assert "qwen3_moe" in capsys.readouterr().err
    shape = known_shape(PUBLISHED["HuggingFaceTB/SmolLM2-135M"], "x")
    assert shape is not None
    _, estimate = plan_training(shape, Settings(64, device="cpu"), 8 * GIB)
    assert f"plan {estimate.total / GIB:.2f} of 8.00 GiB" in capsys.readouterr().err


def test_a_run_without_a_budget_goes_unplanned(capsys: pytest.CaptureFixture[str]) -> None:
    from cllm.assembly import open_model

    assert open_model("tiny-zh", device="cpu").assembly.plan is None
    assert "plan" not in capsys.readouterr().err


def test_where_segments_cannot_grow_more_is_left_for_fragments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bench/null_gpu.sh --allocator backend:native: 250 MiB were too few for the default one."""
    shape, settings = find_shape("THUDM/chatglm3-6b"), Settings(2048, "nf4")
    monkeypatch.setattr(memory, "SEGMENTS_GROW", True)
    linux = estimate_vram(shape, settings)
    monkeypatch.setattr(memory, "SEGMENTS_GROW", False)
    windows = estimate_vram(shape, settings)
    assert linux.items["fragmentation"] == 250 * MIB and windows.items["fragmentation"] == GIB
    assert windows.allocated == linux.allocated


def test_table_names_every_item(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = estimate_vram(find_shape("Yi-6B"), Settings(2048, "nf4"))
    assert f"{estimate.total / MIB:,.1f} MiB" in estimate.table()
    assert len(estimate.table().splitlines()) == len(estimate.items) + 1
    monkeypatch.setenv("CLLM_LANG", "zh")
    assert "合计" in estimate.table()
    on_cpu = estimate_vram(
        find_shape("Yi-6B"), Settings(2048, "nf4", device="cpu", embedding="cpu")
    ).total
    # On a CPU the outputs of a row's sequences are put together: one query more is kept.
    together = 2048 * 4096 * 2
    assert on_cpu == estimate.allocated - estimate.items["workspaces"] + together
    assert estimate.host == 64000 * 4096 * 2


def test_import_is_light() -> None:
    code = "import sys, cllm.memory; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
