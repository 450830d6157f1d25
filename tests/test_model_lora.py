"""LoRA against PEFT: forward, gradients, AdamW states, files both ways; gate, merge, DoRA, rsLoRA."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from cllm.messages import UserError
from cllm.model.lora import adapter_tensors, disable_lora, inject_lora, load_adapter, lora_layers, merge_lora, save_adapter, set_gate

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
    values = {key: torch.randn_like(value) * 0.1 for key, value in adapter_tensors(ours).items() if "magnitude" not in key}
    with torch.no_grad():
        for key, value in adapter_tensors(ours).items():
            if key in values:
                value.copy_(values[key])
        peft_state = dict(theirs.named_parameters())
        for key, value in values.items():
            peft_state[key.replace(".weight", ".default.weight")].copy_(value)
    return ours, theirs


def peft_key(key: str) -> str:
    return key.replace(".weight", ".default.weight") if "magnitude" not in key else key + ".default.weight"


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_forward_gradients_and_five_adamw_steps_equal_peft(architecture: str, options: dict) -> None:
    ours, theirs = pair(architecture, **options)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01) for m in (ours, theirs)]
    for step in range(5):
        losses = [m(input_ids=IDS, labels=IDS).loss for m in (ours, theirs)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
        reference = dict(theirs.named_parameters())
        for key, value in adapter_tensors(ours).items():
            expected = reference[peft_key(key)].grad
            error = (value.grad - expected).norm() / expected.norm()
            assert error < 1e-5, f"step {step}: gradient of {key} is {error:.1e} off"
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    reference = dict(theirs.named_parameters())
    for key, value in adapter_tensors(ours).items():
        expected = reference[peft_key(key)]
        assert (value - expected).norm() / expected.norm() < 1e-5, f"{key} after 5 steps"


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
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


def test_gate_mixes_base_and_adapter_rows_and_disable_restores() -> None:
    ours, _ = pair("llama")
    with torch.no_grad():
        adapted = ours(IDS).logits
        with disable_lora(ours):
            base = ours(IDS).logits
        set_gate(ours, torch.tensor([1.0, 0.0]))
        mixed = ours(IDS).logits
        set_gate(ours, None)
        assert torch.equal(ours(IDS).logits, adapted)
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(mixed, torch.stack([adapted[0], base[1]]), rtol=0, atol=1e-6)


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
    assert set(inject_lora(tiny_model("llama"), rank=2, alpha=4, targets=["q_proj", "model.layers.1.mlp.*"])) == {
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
        ({**good, "base_model.model.lm_head.weight": torch.zeros(2)}, "unexpected tensor base_model.model.lm_head.weight"),
        ({**good, "base_model.model.../../etc/passwd.lora_A.weight": torch.zeros(2, 2)}, r"no linear layer \.\./\.\./etc/passwd"),
        ({key: value for key, value in good.items() if key != first}, "missing tensor"),
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
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(print))  # PEFT's old format: never opened
    refused("not a readable LoRA adapter")
    save_file(good, weights)
    for text in ("[" * 100_000, "[]", "null", '{"peft_type": "LORA", "r": 1e999, "lora_alpha": 1}', settings.replace('"r": ', '"r": -')):
        config.write_text(text, encoding="utf-8")
        refused("not a readable LoRA adapter")
