"""What is offloaded, streamed or tiled changes no number: losses and gradients equal the plain
model's; and how much is where.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from test_learn_loss import examples, gradients
from torch import nn

from cllm.data.packing import collate
from cllm.learn.loss import sft_loss
from cllm.memory import streamed_layers
from cllm.model import offload
from cllm.model.adapter import adapter_tensors
from cllm.model.lora import inject_lora
from cllm.model.nf4 import NF4Linear
from cllm.model.offload import (
    checkpoint_layers,
    decoder_layers,
    embedding_on_cpu,
    stream_layers,
    tile_mlp,
)

CPU = torch.device("cpu")


def model_of(
    architecture: str = "llama", *, layers: int = 6, quantize: bool = False, dropout: float = 0.0
) -> Any:
    from transformers import AutoModelForCausalLM

    from cllm.model.attention import register

    register()
    torch.manual_seed(0)
    config: Any = tiny_config(architecture)
    config.num_hidden_layers = layers
    if architecture == "gemma3":
        config.layer_types = ["sliding_attention", "full_attention"] * (layers // 2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="cllm")
    if quantize:
        for name, module in [*model.base_model.named_modules()]:
            if type(module) is nn.Linear:
                model.base_model.set_submodule(name, NF4Linear(module.weight, module.bias))
    inject_lora(model, rank=4, alpha=8, dropout=dropout)
    for name, value in adapter_tensors(model).items():
        if "lora_B" in name:
            value.data.normal_(std=0.05)
    return model.train()


def run(model: Any, seed: int = 0) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    loss = sft_loss(model, collate(examples(4, seed)))
    loss.backward()
    return loss.item(), gradients(model)


def assert_same(found: tuple[float, torch.Tensor], wanted: tuple[float, torch.Tensor]) -> None:
    assert found[0] == wanted[0] and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_everything_at_once_is_bit_equal_to_resident(architecture: str, quantize: bool) -> None:
    model = model_of(architecture, quantize=quantize and architecture != "gpt2", dropout=0.2)
    checkpoint_layers(model)
    wanted = [run(model, seed) for seed in (0, 1)]
    checkpoint_layers(model, offload=True)
    assert stream_layers(model, 4, CPU) > 0
    embedding_on_cpu(model, CPU)
    for _ in range(2):  # the second time some layers are in the slots already
        for seed in (0, 1):
            assert_same(run(model, seed), wanted[seed])
    model.eval()
    with torch.no_grad():
        plain = model_of(architecture, quantize=quantize and architecture != "gpt2").eval()
        row = collate(examples(4))
        assert sft_loss(model, row) == sft_loss(plain, row)


def test_streamed_layers_are_spread_and_recomputed_even_if_the_others_are_not() -> None:
    assert [streamed_layers(6, n) for n in (0, 1, 2, 3, 6, 9)] == [
        [],
        [3],
        [1, 4],
        [1, 3, 5],
        [*range(6)],
        [*range(6)],
    ]
    model = model_of(quantize=True)
    wanted = run(model)
    stream_layers(model, 3, CPU)
    checkpoint_layers(model, 1)
    assert_same(run(model), wanted)


def test_two_slots_are_filled_one_layer_ahead_in_both_directions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, log = model_of(quantize=True), []
    slot_bytes = stream_layers(model, 5, CPU)
    weights = next(
        layer.forward.weights[0] for layer in decoder_layers(model) if layer.forward.weights
    )
    layer_bytes = sum(
        t.nbytes
        for m in decoder_layers(model)[0].modules()
        if isinstance(m, NF4Linear)
        for t in m.buffers()
    )
    assert (
        2 * layer_bytes
        <= slot_bytes
        == sum(s.nbytes for s in weights.slots)
        < 2 * layer_bytes + 2 * 21 * 256
    )
    acquire = weights.acquire

    def logged_copy(lane: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        log.append(
            (
                "copy",
                next(
                    i
                    for i, host in enumerate(weights.hosts)
                    if host.data_ptr() == source.data_ptr()
                ),
            )
        )
        target.copy_(source)

    def in_slots() -> list[int]:
        ranges = [(slot.data_ptr(), slot.data_ptr() + slot.nbytes) for slot in weights.slots]
        return [
            index
            for index, pieces in enumerate(weights.pieces)
            if any(
                low <= getattr(p.module, p.name).data_ptr() < high
                for p in pieces
                for low, high in ranges
            )
        ]

    def logged_acquire(index: int, step: int) -> None:
        acquire(index, step)
        log.append(("use", index))
        assert index in in_slots() and len(in_slots()) <= 2

    monkeypatch.setattr(offload._Lane, "copy", logged_copy)
    weights.acquire = logged_acquire
    run(model)
    assert log == [
        ("copy", 0),
        ("copy", 1),
        ("use", 0),
        ("copy", 2),
        ("use", 1),
        ("copy", 3),
        ("use", 2),
        ("copy", 4),
        ("use", 3),
        ("use", 4),
        ("use", 4),
        ("copy", 2),
        ("use", 3),
        ("copy", 1),
        ("use", 2),
        ("copy", 0),
        ("use", 1),
        ("use", 0),
    ]


def test_inputs_wait_in_host_memory_and_at_most_two_are_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, events = model_of(), []
    checkpoint_layers(model, offload=True)
    put, fetch, take = offload._Input.__init__, offload._Input.fetch, offload._Input.take
    alive: list[Any] = []

    def logged_put(self: Any, *args: Any) -> None:
        put(self, *args)
        self.number = len(alive)
        alive.append(self)

    def logged_fetch(self: Any) -> None:
        events.append(("fetch", self.number)) if self.back is None else None
        fetch(self)

    def logged_take(self: Any) -> torch.Tensor:
        taken = take(self)
        events.append(("take", self.number))
        assert sum(kept.back is not None for kept in alive) <= 1
        return taken

    monkeypatch.setattr(offload._Input, "__init__", logged_put)
    monkeypatch.setattr(offload._Input, "fetch", logged_fetch)
    monkeypatch.setattr(offload._Input, "take", logged_take)
    run(model)
    order = [
        ("fetch", 5),
        *[(kind, i) for n in range(4, -1, -1) for kind, i in (("fetch", n), ("take", n + 1))],
        ("take", 0),
    ]
    assert len(alive) == 6 and events == order


@pytest.mark.parametrize("tokens", [5, 16, 1000])
@pytest.mark.parametrize("architecture", ["llama", "glm", "gemma3", "gpt2"])
def test_tiled_mlp_equals_whole(architecture: str, tokens: int) -> None:
    model = model_of(architecture, layers=2)
    wanted = run(model)
    for checkpointed in (0, -1):
        checkpoint_layers(model, checkpointed)
        tile_mlp(model, tokens)
        loss, found = run(model)
        assert loss == pytest.approx(wanted[0], rel=1e-6)
        torch.testing.assert_close(found, wanted[1], rtol=1e-5, atol=1e-6)
    tile_mlp(model, 0)
    assert_same(run(model), wanted)


def test_tiles_take_less_memory() -> None:
    from cllm.learn.proof import peak_storage_bytes

    model = model_of(layers=2)
    checkpoint_layers(model)
    peaks = []
    for tokens in (0, 8):
        tile_mlp(model, tokens)
        run(model)
        peaks.append(peak_storage_bytes(lambda: run(model)))
    assert peaks[1] < 0.9 * peaks[0], peaks


def test_embedding_on_cpu_leaves_a_tied_head_where_it_is() -> None:
    model = model_of("gemma3", layers=2)
    wanted, head = run(model), model.get_output_embeddings().weight
    embedding_on_cpu(model, CPU)
    assert (
        model.get_output_embeddings().weight is head
        and model.get_input_embeddings().weight is not head
    )
    assert_same(run(model), wanted)


def test_a_run_with_everything_in_host_memory_equals_the_plain_run(
    config: Path, tmp_path: Path
) -> None:
    from cllm.__main__ import run as program
    from cllm.runs import read_metrics

    everything = "stream_layers=2 offload_inputs=true embedding=cpu mlp_tile_tokens=4096"
    losses = []
    for name, settings in (("plain", ""), ("hosted", everything)):
        options = [f"memory.{setting}" for setting in settings.split()]
        assert (
            program(
                "train",
                [
                    str(config),
                    "model.quantize=nf4",
                    "model.head=int8",
                    "train.optimizer=adamw8bit",
                    "eval.samples=0",
                    f"run.dir={tmp_path / name}",
                    *options,
                ],
            )
            == 0
        )
        losses.append(
            [
                (row.get("loss"), row.get("eval_loss"))
                for row in read_metrics(tmp_path / name / "metrics.jsonl")
            ]
        )
    assert losses[0] == losses[1] and len(losses[0]) > 6
