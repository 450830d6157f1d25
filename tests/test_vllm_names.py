"""An adapter's names under vLLM, which leaves out in silence what it has no module for: every name
of the PEFT export must land on a linear layer of the class that serves the base.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file

from cllm import export
from cllm.assembly import locate
from cllm.config import PRESETS
from cllm.model.adapter import load_adapter, save_adapter
from cllm.model.checkpoint import load_model, open_checkpoint, split_rows
from cllm.model.lora import inject_lora
from cllm.model.merge import open_merge

TABLE = json.loads((Path(__file__).parent / "golden" / "vllm_names.json").read_text("utf-8"))
CLASSES: dict[str, dict[str, Any]] = TABLE["classes"]
# preset -> (the native class of its base as vLLM serves it, a tiny model of that kind)
SERVED = {
    "baichuan2-7b": ("LlamaForCausalLM", "llama"),
    "chatglm3-6b": ("GlmForCausalLM", "glm"),
    "distilgpt2": ("GPT2LMHeadModel", "gpt2"),
    "qwen-7b": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3-4b": ("Qwen3ForCausalLM", "qwen3"),
    "identity": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3-8b": ("Qwen3ForCausalLM", "qwen3"),
    "yi-6b": ("LlamaForCausalLM", "llama"),
    "qwen3.5-0.8b": ("Qwen3_5ForConditionalGeneration", "qwen3.5"),
    "qwen3.5-2b": ("Qwen3_5ForConditionalGeneration", "qwen3.5"),
    "qwen3.5-4b": ("Qwen3_5ForConditionalGeneration", "qwen3.5"),
}
WITHOUT_A_HUB = {"quick", "preference"}  # the built-in model, and a base of the table
WHOLE = (
    "Qwen3_5ForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
)


def whole(architecture: str) -> Any:
    """A tiny multimodal model of this class."""
    import transformers as t

    text = {"Qwen3_5": "qwen3.5", "Gemma3": "gemma3", "Mistral3": "llama"}
    values = tiny_config(text[architecture.partition("For")[0]]).to_dict()
    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16}
    if architecture.startswith("Qwen"):
        vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": 32}
    else:
        vision |= {"num_attention_heads": 2, "num_hidden_layers": 1}
        vision |= {"image_size": 28, "patch_size": 14}
    if architecture.startswith("Mistral"):
        values |= {"model_type": "mistral", "head_dim": 8}
        vision |= {"model_type": "pixtral", "head_dim": 8}
    native: Any = getattr(t, architecture)
    tied = architecture.startswith("Gemma")
    values["tie_word_embeddings"] = tied
    config = native.config_class(text_config=values, vision_config=vision, tie_word_embeddings=tied)
    return native(config)


def exported(base: Path, folder: Path) -> tuple[set[str], Path]:
    """The names in a PEFT export of an adapter of every linear layer, and where it is."""
    torch.manual_seed(1)
    model = load_model(base)
    with torch.no_grad():
        for layer in inject_lora(model, rank=4, alpha=6.0).values():
            layer.lora_B.normal_(std=0.2)
    save_adapter(model, folder / "adapter", base=str(base))
    merge = open_merge(base, folder / "adapter")
    export._write_peft(merge, locate(folder / "adapter"), folder / "out")
    return set(load_file(folder / "out" / "adapter_model.safetensors")), folder / "out"


def lands(key: str, served: dict[str, Any]) -> bool:
    """Whether vLLM's class has a module for the tensor `key`: its prefix renamed as its mapper does
    (one rename after the other), its last part a linear layer or one of those packed in it.
    """
    match = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key)
    assert match is not None, key
    name = match[1]
    for prefix, other in served["prefixes"].items():
        if name.startswith(prefix):
            name = name.replace(prefix, other, 1)
    layer = re.fullmatch(re.escape(served["layers"]) + r"\.\d+\.(.+)\.(\w+)", name)
    if layer is None:
        return False
    for linear in served["linears"]:
        owner, _, leaf = linear.rpartition(".")
        if owner == layer[1] and layer[2] in served["packs"].get(leaf, [leaf]):
            return True
    return False


def test_the_table_has_the_class_of_every_preset() -> None:
    assert {path.stem for path in PRESETS.glob("*.toml")} == SERVED.keys() | WITHOUT_A_HUB
    assert {architecture for architecture, _ in SERVED.values()} <= CLASSES.keys()


@pytest.mark.parametrize(
    ("architecture", "tiny"), sorted({pair for pair in SERVED.values() if pair[1] != "qwen3.5"})
)
def test_every_presets_adapter_lands(architecture: str, tiny: str, tmp_path: Path) -> None:
    tiny_model(tiny).save_pretrained(tmp_path / "base")
    keys, _ = exported(tmp_path / "base", tmp_path)
    served = CLASSES[architecture]
    if not served["lora"]:  # vLLM refuses aloud: docs/serving.md sends it through a merge
        return
    assert keys and all(lands(key, served) for key in keys), keys


@pytest.mark.parametrize("architecture", WHOLE)
def test_the_text_part_of_a_multimodal_base_is_named_as_in_the_whole(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    base = whole(architecture).eval()
    base.save_pretrained(tmp_path / "base")
    keys, out = exported(tmp_path / "base", tmp_path)
    served = CLASSES[architecture]
    assert keys and all(lands(key, served) for key in keys), keys
    inside = {key.replace(".language_model.", ".", 1) for key in keys}
    if architecture != "Mistral3ForConditionalGeneration":  # whose mapper takes both
        assert not any(lands(key, served) for key in inside)
    assert "model.language_model." in capsys.readouterr().err
    # PEFT finds each of them in the whole model, and nothing else; we still read it for the part.
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(base, out)
    placed = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert {name.replace(".default", "") for name in placed} == keys
    ids = torch.randint(3, 90, (1, 9))
    with torch.no_grad():
        ours = load_model(tmp_path / "base")
        split = split_rows(open_checkpoint(tmp_path / "base"))
        plain = ours(input_ids=ids).logits
        load_adapter(ours, out, split=split)
        changed = ours(input_ids=ids).logits
        assert (changed - plain).abs().max() > 1e-3
        assert (changed - theirs(input_ids=ids).logits).abs().max() < 1e-4


# --- Against vLLM's source, where it is installed (its code is read, not run)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM's source")
@pytest.mark.parametrize("architecture", CLASSES)
def test_the_table_is_what_vllm_says(architecture: str) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    served = CLASSES[architecture]
    file = Path(spec.origin).parent.parent / served["file"]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    if architecture == "GlmForCausalLM":  # served by Transformers' class
        assert "SupportsLoRA" in map(ast.unparse, classes["Base"].bases)
        return
    lines, seen = [architecture], 0
    while seen < len(lines):
        lines += [ast.unparse(base) for base in getattr(classes.get(lines[seen]), "bases", [])]
        seen += 1
    text = "\n".join(ast.unparse(classes[name]) for name in lines if name in classes)
    if architecture == "Qwen3_5ForConditionalGeneration":  # its parent's mapper, and deletions
        assert "Qwen3VLForConditionalGeneration.hf_to_vllm_mapper | " in text
    else:
        assert ("SupportsLoRA" in lines) == served["lora"]
        for prefix, other in served.get("prefixes", {}).items():
            assert f"'{prefix}': '{other}'" in text
    for packed, parts in served.get("packs", {}).items():
        if packed.startswith("in_proj") or architecture != "Qwen3_5ForConditionalGeneration":
            assert f"'{packed}': {parts!r}" in text
