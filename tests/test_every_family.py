"""On the tiny model of every family, dense and NF4: packed rows, LoRA on every linear, a training
step, merging, exact resume.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import NATIVE, SHARED, tiny_config
from safetensors.torch import load
from torch import Tensor, nn

from cllm.data.encode import Example
from cllm.data.packing import PackedRows
from cllm.learn.loss import row_nll, sft_loss
from cllm.learn.optim import Trainee, make_optimizer
from cllm.learn.snapshot import capture, load_snapshot, restore, save_snapshot
from cllm.model.attention import packs
from cllm.model.checkpoint import Placement, load_model
from cllm.model.device import Precision
from cllm.model.lora import inject_lora, merge_lora
from cllm.model.offload import checkpoint_layers
from cllm.runs import read_metrics

LOCAL = Path(__file__).parent / "golden"
RECURRENT = ("qwen3.5",)
ORIGINALS = (
    *("chatglm2", "chatglm3", "chatglm3_32k", "glm4_9b", "baichuan2_7b", "baichuan2_13b"),
    *("qwen", "internlm", "internlm2", "yi", "gpt2"),
)
CASES = [
    (name, quantize)
    for name in (*(f"original-{family}" for family in ORIGINALS), *NATIVE)
    for quantize in (None, "nf4")
]
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def find(name: str, home: Path) -> Path:
    """The directory of a golden checkpoint in its original layout, or of a native one with random
    weights.
    """
    family = name.removeprefix("original-")
    if family == "glm4_9b":  # ChatGLM3's layout with another rotary base and three end tokens
        return glm4(home / name)
    if family != name:
        found = next(
            (
                path
                for path in (LOCAL / family, SHARED / "golden" / family / "dev")
                if path.is_dir()
            ),
            None,
        )
        return found or pytest.skip("needs ../shared")
    config = tiny_config(name)
    if not (home / name).is_dir():
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        # larger than the default 0.02, so that differences between tokens are visible
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
        model.save_pretrained(home / name)
    return home / name


def glm4(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    config = json.loads((LOCAL / "chatglm3" / "config.json").read_text(encoding="utf-8"))
    config |= {"rope_ratio": 500, "eos_token_id": [2, 3, 4], "architectures": ["ChatGLMModel"]}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "model.safetensors").write_bytes(
        (LOCAL / "chatglm3" / "model.safetensors").read_bytes()
    )
    return path


def adapted(path: Path, quantize: str | None, *, filled: bool = False) -> Any:
    """The model with LoRA on every linear; filled: with adapters that do something."""
    model = load_model(path, Placement(quantize=quantize or "none"))
    linears = sum(type(m).__name__ in ("Linear", "NF4Linear", "Conv1D") for m in model.modules())
    torch.manual_seed(1)
    layers = inject_lora(model, rank=2, alpha=4.0)
    assert len(layers) == linears - 1  # all but the head
    if quantize and any(type(m) is nn.Linear for m in model.modules()):
        assert (
            any(type(layer.base).__name__ == "NF4Linear" for layer in layers.values())
            or "GPT2" in type(model).__name__
        )
    with torch.no_grad():
        for layer in layers.values() if filled else ():
            layer.lora_B.normal_(std=0.05)
    return model


@pytest.mark.parametrize("name", [name for name, quantize in CASES if quantize is None])
def test_fp16_with_a_float32_residual_stream_follows_float32(name: str, home: Path) -> None:
    rows = PackedRows([Example(list(range(3, 12)), list(range(3, 12)))], 20).take(1)
    losses: dict[str, float] = {}
    for kind in ("fp32", "fp16"):
        precision = Precision.choose(kind, "cpu")
        model = load_model(find(name, home), Placement(dtype=precision.weights))
        inject_lora(model, rank=2, alpha=4.0)
        precision.prepare(model)
        optimizer = make_optimizer(model, 1e-3)
        trainee = Trainee(model, sft_loss, optimizer, precision, precision.scaler())
        for _ in range(16):  # the scaler may have to find its scale first
            stats = trainee.step(rows)
            losses.setdefault(kind, stats.loss)
            if not stats.skipped:
                break
        assert not stats.skipped
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_a_recurrent_model_trains_on_rows_of_one_sequence(
    config: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """cllm.train end to end on a tiny Qwen3.5: every row holds one sequence, a step as many as its
    tokens ask for, and it learns.
    """
    import shutil

    from transformers import AutoModelForCausalLM

    from cllm.config import load_config
    from cllm.train import Training

    hybrid = tiny_config("qwen3.5")
    hybrid.vocab_size, hybrid.eos_token_id = 512, 0
    AutoModelForCausalLM.from_config(hybrid).save_pretrained(tmp_path / "hybrid")
    for file in checkpoint.glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / "hybrid" / file.name)
    training = Training(
        load_config(
            config, [f"model.path={tmp_path / 'hybrid'}", "train.steps=3", "eval.samples=0"]
        )
    )
    with contextlib.closing(training):
        assert all(
            len(row.cu_seqlens) == 2
            for row in [*training.learner.encoded.rows.take(8), *training.learner.encoded.held_rows]
        )
        examples = training.learner.encoded.rows.examples
        mean = sum(len(example.input_ids) for example in examples) / len(examples)
        assert training.learner.encoded.rows_per_step == max(1, int(256 // mean)) > 2
        training.learner.encoded.rows.state = (0, 0)
        loss = training.loop()
    losses = [row["loss"] for row in read_metrics(training.run / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 3 and loss == losses[-1] < losses[0]


def logits(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, use_cache=False, **more).logits[0]
    return result


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert torch.isfinite(ours).all()
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize(("name", "quantize"), CASES)
def test_packed_rows_loss_and_merge(name: str, quantize: str | None, home: Path) -> None:
    """A packed row equals its sequences apart, the loss is that of the model's own logits, merging
    keeps the logits to 1e-5.
    """
    model = adapted(find(name, home), quantize, filled=True)
    first, second = IDS[:, :6], IDS[:, 6:]
    apart = [logits(model, first), logits(model, second)]
    positions = torch.cat([torch.arange(6), torch.arange(11)])[None]
    bounds = torch.tensor([0, 6, 17], dtype=torch.int32)
    assert packs(model) is (name not in RECURRENT)
    if packs(model):
        close(logits(model, IDS, position_ids=positions, cu_seqlens=bounds), torch.cat(apart), 1e-5)
    examples = [Example(ids[0].tolist(), ids[0].tolist()) for ids in (first, second)]
    rows = PackedRows(examples, 64, single=not packs(model))
    assert len(rows) == 1 + (name in RECURRENT)
    ours = sum(row_nll(model, row).sum() for row in rows.take(len(rows)))
    theirs = sum(
        F.cross_entropy(out[:-1], ids[0, 1:], reduction="sum")
        for out, ids in zip(apart, (first, second), strict=True)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    close(logits(merge_lora(model), first), apart[0], 1e-5)


@pytest.mark.parametrize(("name", "quantize"), CASES)
def test_a_step_learns_and_a_resumed_one_is_the_same(
    name: str, quantize: str | None, home: Path, tmp_path: Path
) -> None:
    path = find(name, home)
    precision = Precision.choose("fp32", "cpu")

    def start() -> tuple[Any, Any, PackedRows]:
        model = adapted(path, quantize)
        checkpoint_layers(model, 1)
        examples = [
            Example(list(range(n, n + 9)), [-100] * 3 + list(range(n + 3, n + 9)))
            for n in range(3, 43, 10)
        ]
        return (
            model.train(),
            make_optimizer(model, 5e-3),
            PackedRows(examples, 20, single=not packs(model)),
        )

    def step(model: Any, optimizer: Any, rows: PackedRows) -> float:
        trainee = Trainee(model, sft_loss, optimizer, precision, precision.scaler())
        return trainee.step(rows.take(len(rows))).loss

    model, optimizer, rows = start()
    losses = [step(model, optimizer, rows), step(model, optimizer, rows)]
    assert losses[1] < losses[0]
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert all(key.rpartition(".")[2] in ("lora_A", "lora_B") for key in trained)
    assert all(value.abs().max() > 0 for key, value in trained.items() if key.endswith("lora_B"))
    save_snapshot(tmp_path, 2, capture(model, optimizer), {"rows": rows.state}, keep=1)
    losses.append(step(model, optimizer, rows))

    again, its_optimizer, its_rows = start()
    state, tensors, _ = load_snapshot(tmp_path)
    restore(again, its_optimizer, load(tensors))
    its_rows.state = tuple(json.loads(state)["rows"])
    assert step(again, its_optimizer, its_rows) == losses[2]
    resumed = dict(again.named_parameters())
    assert all(torch.equal(value, resumed[key]) for key, value in trained.items())
