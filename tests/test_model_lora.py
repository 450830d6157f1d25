"""LoRA against PEFT: forward, gradients, AdamW states, files both ways; gate, merge, DoRA,
rsLoRA.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from cllm.messages import UserError
from cllm.model.adapter import adapter_tensors, load_adapter, load_beside, save_adapter
from cllm.model.lora import (
    GATED,
    LoraLinear,
    LoraSettings,
    gates,
    inject_lora,
    lora_layers,
    lora_strength,
    merge_lora,
)

IDS = torch.tensor([[5, 9, 33, 71, 20, 11, 2, 8], [7, 7, 40, 3, 90, 12, 64, 1]])
TARGETS = {"llama": "all-linear", "qwen3": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}


def pair(architecture: str, **options):  # type: ignore[no-untyped-def]
    """Our adapted model and PEFT's, with the same base and the same random adapter."""
    ours, theirs = tiny_model(architecture), tiny_model(architecture)
    inject_lora(ours, rank=4, alpha=8, targets=TARGETS[architecture], **options)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS[architecture],
        fan_in_fan_out=architecture == "gpt2",
        use_rslora=options.get("rslora", False),
        use_dora=options.get("dora", False),
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(theirs, config)
    torch.manual_seed(1)
    values = {
        key: torch.randn_like(value) * 0.1
        for key, value in adapter_tensors(ours).items()
        if "magnitude" not in key
    }
    with torch.no_grad():
        for key, value in adapter_tensors(ours).items():
            if key in values:
                value.copy_(values[key])
        peft_state = dict(theirs.named_parameters())
        for key, value in values.items():
            peft_state[key.replace(".weight", ".default.weight")].copy_(value)
    return ours, theirs


def peft_key(key: str) -> str:
    return (
        key.replace(".weight", ".default.weight")
        if "magnitude" not in key
        else key + ".default.weight"
    )


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"]
)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_forward_gradients_and_five_adamw_steps_equal_peft(
    architecture: str, options: dict, dtype: torch.dtype
) -> None:
    ours, theirs = (model.to(dtype) for model in pair(architecture, **options))
    limit = 1e-5 if dtype == torch.float32 else 1e-11
    optimizers = [
        torch.optim.AdamW(
            [p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01
        )
        for m in (ours, theirs)
    ]
    for step in range(5):
        losses = [m(input_ids=IDS, labels=IDS).loss for m in (ours, theirs)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=limit, atol=0)
        reference = dict(theirs.named_parameters())
        for key, value in adapter_tensors(ours).items():
            expected = reference[peft_key(key)].grad
            error = (value.grad - expected).norm() / expected.norm()
            # AdamW's first steps have the gradients' signs only: what a processor rounds otherwise
            # grows from step to step.
            assert error < limit * (1 + step), f"step {step}: gradient of {key} is {error:.1e} off"
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    reference = dict(theirs.named_parameters())
    for key, value in adapter_tensors(ours).items():
        expected = reference[peft_key(key)]
        assert (value - expected).norm() / expected.norm() < limit, f"{key} after 5 steps"


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_files_go_both_ways(architecture: str, options: dict, tmp_path) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = pair(architecture, **options)
    save_adapter(ours, tmp_path / "ours", base="nowhere")
    reloaded = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "ours")
    with torch.no_grad():
        assert (reloaded(IDS).logits - ours(IDS).logits).abs().max() < 1e-6
        theirs.save_pretrained(tmp_path / "theirs")
        back = tiny_model(architecture)
        load_adapter(back, tmp_path / "theirs")
        assert (back(IDS).logits - theirs(IDS).logits).abs().max() < 1e-6


def test_gate_mixes_base_and_adapter_rows_and_strength_restores() -> None:
    ours, _ = pair("llama")
    with torch.no_grad():
        adapted = ours(IDS).logits
        with lora_strength(ours, 0):
            base = ours(IDS).logits
        gates(ours)[1].rows = torch.tensor([1.0, 0.0])
        mixed = ours(IDS).logits
        gates(ours)[1].rows = None
        assert torch.equal(ours(IDS).logits, adapted)
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(mixed, torch.stack([adapted[0], base[1]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strength", [0, 0.3, 1, 1.6])
@pytest.mark.parametrize(
    "options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_at_a_strength_equals_the_gate_at_it(
    architecture: str, options: dict[str, bool], strength: float
) -> None:
    """For all rows, and for one row beside the base and the adapter; 0 and 1 are these to the
    bit.
    """
    ours, _ = pair(architecture, **options)
    with torch.no_grad():
        for layer in lora_layers(ours).values():
            if layer.magnitude is not None:
                layer.magnitude.mul_(1.1)
        adapted = ours(IDS).logits
        with lora_strength(ours, 0):
            base = ours(IDS).logits
        with lora_strength(ours, strength):
            gated = ours(IDS).logits
        assert gates(ours)[1].rows is None and not torch.equal(base, adapted)
        gates(ours)[1].set([strength, 1.0, 0.0], torch.device("cpu"))
        mixed = ours(IDS[[0, 1, 1]]).logits
        merged = merge_lora(ours, strength)(IDS).logits
    if strength in (0, 1):
        assert torch.equal(gated, adapted if strength else base)
    together = torch.stack([gated[0], adapted[1], base[1]])
    torch.testing.assert_close(mixed, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, gated, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("second", [{}, {"dora": True}], ids=["lora", "dora"])
def test_adapters_of_one_base_add_up_and_the_first_keeps_its_names(
    second: dict, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is on more layers than the first; with both gates open a layer's output is its
    base's and both updates.
    """
    monkeypatch.setattr(LoraLinear, "fused", fused)
    models = []
    for number, options in enumerate([{"targets": ["q_proj", "down_proj"]}, second]):
        models.append(tiny_model("llama"))
        torch.manual_seed(number)
        for layer in inject_lora(models[-1], rank=2 + number, alpha=8, **options).values():
            torch.nn.init.normal_(layer.lora_B, std=0.3)
        save_adapter(models[-1], tmp_path / str(number))
    both = tiny_model("llama")
    load_adapter(both, tmp_path / "0")
    names = {name for name, _ in models[0].named_parameters()}
    assert names == {name for name, _ in both.named_parameters()}
    load_beside(both, tmp_path / "1")
    assert names - {name for name, _ in both.named_parameters()} == {
        name for name in names if name.endswith("_proj.weight")
    }
    switch = gates(both)
    assert list(switch) == [1, 2] and switch[2].closed
    layers = [lora_layers(model)["model.layers.0.self_attn.q_proj"] for model in (*models, both)]
    x = torch.randn(2, 5, 32)
    first, further, together = layers
    base = first.base(x)
    for rows in ((None, 0.0), (0.0, None), (None, None), (0.0, 0.0)):
        switch[1].rows, switch[2].rows = rows
        wanted = base
        for layer, gate in zip((first, further), rows, strict=True):
            wanted = wanted + (layer(x) - base if gate is None else 0)
        torch.testing.assert_close(together(x), wanted, rtol=1e-5, atol=1e-6)
        alone = {(None, 0.0): models[0], (0.0, None): models[1]}.get(rows)
        if alone is not None:
            with torch.no_grad():
                assert (both(IDS).logits - alone(IDS).logits).abs().max() < 1e-6
    with pytest.raises(ValueError, match="several adapters"):
        merge_lora(both)
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(both, tmp_path / "0")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merge_keeps_the_logits(architecture: str, dora: bool) -> None:
    ours, _ = pair(architecture, dora=dora)
    with torch.no_grad():
        before = ours(IDS).logits
        merged = merge_lora(ours)
        assert not lora_layers(merged)
        assert (merged(IDS).logits - before).abs().max() < 1e-5


def test_all_linear_leaves_out_the_head_and_base_is_frozen() -> None:
    model = tiny_model("llama")
    names = inject_lora(model, rank=2, alpha=4)
    assert len(names) == 2 * 7 and "lm_head" not in names
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{part}" for name in names for part in ("lora_A", "lora_B")
    }
    with pytest.raises(ValueError, match="adapters already"):
        inject_lora(model, rank=2, alpha=4)


def test_targets_by_name_and_glob_and_a_miss_is_one_error_with_all_of_them() -> None:
    assert set(
        inject_lora(
            tiny_model("llama"), rank=2, alpha=4, targets=["q_proj", "model.layers.1.mlp.*"]
        )
    ) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    }
    with pytest.raises(UserError, match=r"query, W_pack matches no linear.*q_proj"):
        inject_lora(tiny_model("llama"), rank=2, alpha=4, targets=["q_proj", "query", "W_pack"])


def test_a_foreign_adapter_is_refused_with_every_reason(tmp_path) -> None:  # type: ignore[no-untyped-def]
    ours, _ = pair("llama")
    save_adapter(ours, tmp_path)
    with pytest.raises(UserError, match=r"no linear layer model\.layers\.0"):
        load_adapter(tiny_model("gpt2"), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match="not a readable LoRA adapter"):
        load_adapter(tiny_model("llama"), tmp_path)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter(tiny_model("llama"), tmp_path / "nothing")


def test_hostile_adapter_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    ours, _ = pair("llama")
    save_adapter(ours, tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    good, settings = load_file(weights), config.read_text(encoding="utf-8")
    first = next(iter(good))

    def refused(reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            load_adapter(tiny_model("llama"), tmp_path)

    for tensors, reason in (
        ({**good, first: good[first].T.contiguous()}, "has shape"),
        (
            {**good, "base_model.model.lm_head.weight": torch.zeros(2)},
            "unexpected tensor base_model.model.lm_head.weight",
        ),
        (
            {
                **good,
                **{
                    f"base_model.model.../../etc/passwd.{n}.weight": torch.zeros(2, 2)
                    for n in ("lora_A", "lora_B")
                },
            },
            r"no linear layer \.\./\.\./etc/passwd",
        ),
        (
            {key: value for key, value in good.items() if key != first},
            "tensors lora_B, expected lora_A, lora_B",
        ),
        ({}, "no tensors"),
    ):
        save_file(tensors, weights)
        refused(reason)
    for data in (
        pickle.dumps(print),
        (2**62).to_bytes(8, "little"),
        (99 * 2**20).to_bytes(8, "little") + b"{",
        b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}  ',
    ):
        weights.write_bytes(data)
        refused("not a readable LoRA adapter")
    weights.unlink()
    # PEFT's old format: no code in it is run
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(print))
    refused("not a readable LoRA adapter")
    save_file(good, weights)
    for text in (
        "[" * 100_000,
        "[]",
        "null",
        '{"peft_type": "LORA", "r": 1e999, "lora_alpha": 1}',
        settings.replace('"r": ', '"r": -'),
    ):
        config.write_text(text, encoding="utf-8")
        refused("not a readable LoRA adapter")


# What PEFT's fields may hold besides their defaults, and whether an adapter with it is read.
OTHER_VALUES: dict[str, tuple[bool, Any]] = {
    "task_type": (False, "SEQ_CLS"),
    "peft_type": (False, "LOHA"),
    "auto_mapping": (True, {"base_model_class": "LlamaForCausalLM", "parent_library": "x"}),
    "peft_version": (True, "0.99"),
    "base_model_name_or_path": (True, "somewhere"),
    "revision": (False, "0123abc"),
    "inference_mode": (True, True),
    "exclude_modules": (True, ["lm_head"]),
    "lora_dropout": (True, 0.5),
    "layers_to_transform": (True, [0, 1]),
    "layers_pattern": (True, ["layers"]),
    "megatron_core": (True, "other"),
    "eva_config": (True, {"rho": 2.0}),
    "qalora_group_size": (True, 8),
    "runtime_config": (True, {"ephemeral_gpu_offload": True}),
}
WRITTEN = {"r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "fan_in_fan_out"}
"""Fields that other tests compare with PEFT."""


@pytest.mark.parametrize("name", [field.name for field in fields(LoraConfig)])
def test_a_setting_of_pefts_is_computed_or_refused_by_name(name: str, tmp_path: Path) -> None:
    if name in WRITTEN:
        return
    ours, theirs = pair("llama")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    read, value = OTHER_VALUES.get(name, (False, {"all": 1} if name != "bias" else "all"))
    file.write_text(json.dumps({**config, name: value}), encoding="utf-8")
    model = tiny_model("llama")
    if not read:
        with pytest.raises(UserError, match=name):
            load_adapter(model, tmp_path)
        return
    load_adapter(model, tmp_path)
    model.eval()
    torch.testing.assert_close(model(IDS).logits, ours.eval()(IDS).logits)


@pytest.mark.parametrize("how", [True, False, "gaussian", "eva", "orthogonal"])
def test_initializations_that_leave_the_base_are_read(how: object, tmp_path: Path) -> None:
    ours, _ = pair("llama")
    save_adapter(ours, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "init_lora_weights": how}), encoding="utf-8")
    load_adapter(tiny_model("llama"), tmp_path)
    for other in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "of tomorrow"):
        file.write_text(json.dumps({**config, "init_lora_weights": other}), encoding="utf-8")
        with pytest.raises(UserError, match=f"init_lora_weights = '{other}'"):
            load_adapter(tiny_model("llama"), tmp_path)


def test_settings_of_other_programs_pass_while_they_are_off(tmp_path: Path) -> None:
    ours, _ = pair("llama")
    save_adapter(ours, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    off = {"enable_lora": None, "merge_weights": False, "tomorrow": {}, "lorap_emb_lr": 1e-6}
    file.write_text("\ufeff" + json.dumps({**config, **off}), encoding="utf-8")
    load_adapter(tiny_model("llama"), tmp_path)
    file.write_text(json.dumps({**config, "tomorrow": True}), encoding="utf-8")
    with pytest.raises(UserError, match="tomorrow = True"):
        load_adapter(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_adapter_that_is_not_finite_is_refused(bad: float, tmp_path: Path) -> None:
    ours, _ = pair("llama")
    save_adapter(ours, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = list(tensors)[3]
    tensors[name].view(-1)[1] = bad
    save_file(tensors, weights)
    with pytest.raises(UserError, match=f"tensor {name}") as caught:
        load_adapter(tiny_model("llama"), tmp_path)
    assert caught.value.code == "model.not_finite"


def test_names_of_a_whole_state_dict_and_pytorchs_format_are_read(tmp_path: Path) -> None:
    _, theirs = pair("llama", dora=True)
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.unlink()
    state = {key: value for key, value in theirs.state_dict().items() if "lora_" in key}
    torch.save(state, tmp_path / "adapter_model.bin")
    model = tiny_model("llama")
    load_adapter(model, tmp_path)
    model.eval()
    torch.testing.assert_close(model(IDS).logits, theirs.eval()(IDS).logits)
    first = next(key for key in state if ".default." in key)
    state[first.replace(".default.", ".second.")] = state[first]
    torch.save(state, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"second"):
        load_adapter(tiny_model("llama"), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"adapter\.no_weights"):
        load_adapter(tiny_model("llama"), tmp_path)


def random_layer(kind: str, dtype: torch.dtype) -> LoraLinear:
    from transformers.pytorch_utils import Conv1D

    from cllm.model.nf4 import NF4Linear

    torch.manual_seed(2)
    base: torch.nn.Module = torch.nn.Linear(96, 70, dtype=dtype)
    if kind == "nf4":
        base = NF4Linear(base.weight, base.bias)  # type: ignore[arg-type]
    if kind == "conv1d":
        base = Conv1D(70, 96).to(dtype)
    layer = LoraLinear(base.requires_grad_(False), LoraSettings(4, 12.0))
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def outcome(
    layer: torch.nn.Module, inputs: list[torch.Tensor], *rest: object
) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    wanted = [*leaves, *(p for p in layer.parameters() if p.requires_grad)]
    result = layer(*leaves, *rest)
    torch.manual_seed(5)
    return [
        result.detach(),
        *torch.autograd.grad(result, wanted, torch.randn(result.shape).bfloat16().to(result.dtype)),
    ]


def distances(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    return [
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(found, wanted, strict=True)
    ]


@pytest.mark.parametrize("gated", [False, True], ids=["linear", "gated"])
@pytest.mark.parametrize("kind", ["dense", "nf4", "conv1d"])
def test_fused_equals_autograd(kind: str, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 to 1e-6; bf16 within 1e-2 of the float32 truth (norm-relative), on average no further
    than 1.1 times plain autograd.
    """
    monkeypatch.setattr("cllm.model.lora._PIECE", 96 * 7)  # several pieces and a short one
    torch.manual_seed(0)
    exact = [torch.randn(2, 33, 96) for _ in range(1 + gated)]
    rest = [torch.nn.SiLU()] if gated else []
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for fused in (True, False):
            layer = random_layer(kind, torch.bfloat16).to(dtype)
            layer.lora_A.data, layer.lora_B.data = (
                random_layer(kind, dtype).float().get_parameter(n).data
                for n in ("lora_A", "lora_B")
            )
            layer.fused = fused
            results[dtype, fused] = outcome(layer, [x.bfloat16().to(dtype) for x in exact], *rest)
            assert [t.dtype for t in results[dtype, fused][-2:]] == [torch.float32] * 2
    assert max(distances(results[torch.float32, True], results[torch.float32, False])) < 1e-6
    ours, theirs = (
        distances(results[torch.bfloat16, fused], results[torch.float32, False])
        for fused in (True, False)
    )
    assert max(ours) < 1e-2 and sum(ours) <= 1.1 * sum(theirs), (ours, theirs)


@pytest.mark.parametrize("name", GATED)
def test_a_gated_mlp_equals_its_own_forward(name: str) -> None:
    import transformers

    family = name.removesuffix("MLP")
    module = __import__(
        f"transformers.models.{family.lower()}.modeling_{family.lower()}", fromlist=[name]
    )
    config = getattr(
        transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    )(hidden_size=32, intermediate_size=48)
    torch.manual_seed(0)
    mlp = getattr(module, name)(config)
    plain = mlp.forward
    inject_lora(mlp, rank=2, alpha=4)
    for parameter in mlp.parameters():
        parameter.data.normal_(std=0.2)
    x = torch.randn(2, 5, 32)
    found = outcome(mlp, [x])
    mlp.forward = plain
    assert max(distances(found, outcome(mlp, [x]))) < 1e-6
    LoraLinear.fused = False
    try:
        assert max(distances(found, outcome(mlp, [x]))) < 1e-6
    finally:
        LoraLinear.fused = True
    merge_lora(mlp)
    assert torch.isfinite(mlp(x)).all()


def kept_bytes(run) -> int:  # type: ignore[no-untyped-def]
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.update({t.data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        result = run()
    assert result.requires_grad
    return sum(storages.values())


def test_a_gated_mlp_keeps_two_wide_tensors_instead_of_four(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    inject_lora(model, rank=2, alpha=4)
    model.requires_grad_(False)
    for value in adapter_tensors(model).values():
        value.requires_grad_()
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 1000, 32)
    ours = kept_bytes(lambda: mlp(x))
    monkeypatch.setattr(LoraLinear, "fused", False)
    plain = kept_bytes(lambda: mlp(x))
    wide = 1000 * 64 * 4
    assert plain - ours > 1.9 * wide and ours < 2.6 * wide + x.nbytes
