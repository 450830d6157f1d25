"""Every checkpoint family against its authors' recorded numbers, native ones against Transformers,
and what is refused.
"""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NATIVE, SHARED, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cllm.messages import UserError
from cllm.model.checkpoint import Placement, alibi_slopes, load_model
from cllm.model.nf4 import NF4Linear
from cllm.model.shards import stored_tensors, write_safetensors

LOCAL = Path(__file__).parent / "golden"
FAMILIES = (
    *("chatglm2", "chatglm3", "chatglm3_32k", "baichuan2_7b", "baichuan2_13b"),
    *("qwen", "internlm", "internlm2", "yi", "gpt2"),
)
CASES = [
    pytest.param(LOCAL / name, LOCAL / name / "golden.npz", id=name)
    for name in sorted(p.name for p in LOCAL.glob("*/"))
]
for family in FAMILIES:
    recorded = SHARED / "golden" / family / "dev"
    skip = pytest.mark.skipif(not recorded.is_dir(), reason="needs ../shared")
    CASES.append(pytest.param(recorded, recorded / "golden.npz", id=f"shared-{family}", marks=skip))
    CASES.append(
        pytest.param(
            recorded / "bin", recorded / "golden.npz", id=f"shared-{family}-bin", marks=skip
        )
    )


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs, use_cache=False).logits
    return result


def close(ours: Tensor, theirs: Any) -> None:
    assert torch.isfinite(ours).all()
    assert (ours - torch.as_tensor(theirs)).abs().max() < 1e-4


@pytest.mark.parametrize(("path", "arrays"), CASES)
def test_golden(path: Path, arrays: Path) -> None:
    model = load_model(path)
    golden = {name: torch.from_numpy(array) for name, array in np.load(arrays).items()}
    for length in (1, 7, 23, 40):
        if (ids := golden.get(f"len{length}_input_ids")) is not None:
            close(logits(model, input_ids=ids), golden[f"len{length}_logits"])
    with torch.no_grad():
        states = model(input_ids=golden["len7_input_ids"], output_hidden_states=True).hidden_states
    close(torch.stack(states), golden["len7_hidden_states"])
    for side in ("left", "right"):
        if f"{side}pad_input_ids" in golden:
            mask, positions = golden[f"{side}pad_attention_mask"], golden[f"{side}pad_position_ids"]
            out = logits(
                model,
                input_ids=golden[f"{side}pad_input_ids"],
                attention_mask=mask,
                position_ids=positions,
            )
            close(out * mask[..., None], golden[f"{side}pad_logits_masked"])
    if "long_input_ids" in golden:
        close(logits(model, input_ids=golden["long_input_ids"]), golden["long_logits_train"])
    assert torch.equal(
        greedy(model, golden["greedy_prompt_ids"], golden["greedy_ids"].shape[1]),
        golden["greedy_ids"],
    )


def greedy(model: nn.Module, ids: Tensor, length: int) -> Tensor:
    cache, last = None, ids
    with torch.no_grad():
        while ids.shape[1] < length:
            out = model(input_ids=last, past_key_values=cache, use_cache=True)
            cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, last], 1)
    return ids


IDS = torch.arange(3, 20)[None]


# --- Native checkpoints
@pytest.mark.parametrize("name", NATIVE)
def test_native_equals_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(name)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = load_model(tmp_path)
    ids = torch.randint(3, 96, (2, 19))
    assert (logits(ours, input_ids=ids) - logits(theirs, input_ids=ids)).abs().max() < 1e-6
    # the same weights are tied
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    assert all(p.device.type == "cpu" and p.requires_grad for p in ours.parameters())
    assert not any(b.is_meta for b in ours.buffers())


def test_text_part_of_multimodal(tmp_path: Path) -> None:
    """A published Qwen3.5 holds a vision tower and prefixes: only its language model is loaded, and
    computes the same.
    """
    import transformers as t

    torch.manual_seed(0)
    text = tiny_config("qwen3.5").to_dict()
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    whole = t.Qwen3_5ForConditionalGeneration(
        t.Qwen3_5Config(text_config=text, vision_config=vision)
    ).eval()
    whole.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert type(ours).__name__ == "Qwen3_5ForCausalLM"
    ids = torch.randint(3, 96, (1, 11))
    close(logits(ours, input_ids=ids), logits(whole, input_ids=ids))


def test_dtype_and_base_prefix(tmp_path: Path) -> None:
    """bf16 as stored and cast to float32; a checkpoint saved from the base model lacks `model.` and
    its tied head.
    """
    import transformers as t

    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(tiny_config("llama-tied")).to(torch.bfloat16)
    model.model.save_pretrained(tmp_path)
    ours = load_model(tmp_path, Placement(dtype=torch.bfloat16))
    ids = torch.randint(3, 96, (1, 9))
    assert ours.dtype == torch.bfloat16 and ours.model.rotary_emb.inv_freq.dtype == torch.float32
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    close(logits(load_model(tmp_path), input_ids=ids), logits(model.float(), input_ids=ids))


# --- Variants of the originals
def edited(name: str, out: Path, change: dict[str, Any], tensors: dict[str, Tensor | None]) -> Path:
    """A copy of a golden checkpoint with other settings and tensors (None: left out)."""
    out.mkdir()
    config = json.loads((LOCAL / name / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    stored = load_file(LOCAL / name / "model.safetensors") | tensors
    save_file(
        {key: tensor for key, tensor in stored.items() if tensor is not None},
        out / "model.safetensors",
    )
    return out


def test_tied_head(tmp_path: Path) -> None:
    stored = load_file(LOCAL / "qwen" / "model.safetensors")
    embedding = stored["transformer.wte.weight"]
    untied = edited("qwen", tmp_path / "untied", {}, {"lm_head.weight": embedding.clone()})
    absent = load_model(
        edited("qwen", tmp_path / "absent", {"tie_word_embeddings": True}, {"lm_head.weight": None})
    )
    close(logits(absent, input_ids=IDS), logits(load_model(untied), input_ids=IDS))
    assert absent.lm_head.weight is absent.model.embed_tokens.weight
    differing = load_model(
        edited("qwen", tmp_path / "differing", {"tie_word_embeddings": True}, {})
    )
    close(logits(differing, input_ids=IDS), logits(load_model(LOCAL / "qwen"), input_ids=IDS))
    assert differing.config.tie_word_embeddings is False


def test_tied_norm_head(tmp_path: Path) -> None:
    """Baichuan2's head is normalised even if it shares the embedding's weight, which is not."""
    model = load_model(
        edited(
            "baichuan2_7b",
            tmp_path / "tied",
            {"tie_word_embeddings": True},
            {"lm_head.weight": None},
        )
    )
    embedding = model.model.embed_tokens.weight
    assert torch.allclose(
        model.lm_head.weight, embedding / embedding.norm(dim=1, keepdim=True), atol=1e-6
    )


def test_scaled_rotary_of_internlm2(tmp_path: Path) -> None:
    """`rope_scaling` of the original config reaches the native class."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("needs ../shared")
    source = SHARED / "golden" / "internlm2" / "dev"
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | scaling), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    plain, scaled = (logits(load_model(path), input_ids=IDS) for path in (source, tmp_path))
    assert (plain - scaled).abs().max() > 1e-2  # 17 tokens are beyond 8
    short = IDS[:, :8]
    close(
        logits(load_model(tmp_path), input_ids=short), logits(load_model(source), input_ids=short)
    )


def test_alibi_slopes() -> None:
    assert torch.equal(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    # 40 heads (Baichuan2-13B): the 32 of a power of two, then every second one of 64
    forty = [2 ** (-8 * i / 32) for i in range(1, 33)] + [
        2 ** (-8 * i / 64) for i in range(1, 17, 2)
    ]
    assert torch.allclose(alibi_slopes(40), torch.tensor(forty))


# --- NF4
@pytest.mark.parametrize("name", ["chatglm3", "qwen"])
def test_quantized_while_streaming(name: str) -> None:
    ours, dense = load_model(LOCAL / name, Placement(quantize="nf4")), load_model(LOCAL / name)
    for path, module in list(dense.named_modules()):
        if type(module) is nn.Linear and module is not dense.get_output_embeddings():
            dense.set_submodule(path, NF4Linear(module.weight, module.bias))
    assert torch.equal(logits(ours, input_ids=IDS), logits(dense, input_ids=IDS))
    assert ours.state_dict().keys() == dense.state_dict().keys()
    assert type(ours.get_output_embeddings()) is nn.Linear
    assert not [name for name, parameter in ours.named_parameters() if "proj" in name]


# --- Written as a native checkpoint
@pytest.mark.parametrize("name", ["chatglm3", "baichuan2_7b", "baichuan2_13b"])
def test_converted_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from convert import convert_checkpoint
    from transformers import AutoModelForCausalLM

    convert_checkpoint(LOCAL / name, tmp_path / "native")
    expected = logits(load_model(LOCAL / name), input_ids=IDS)
    assert torch.equal(logits(load_model(tmp_path / "native"), input_ids=IDS), expected)
    if name == "baichuan2_13b":  # nobody else must load it as a Llama with rotary positions
        with pytest.raises(ValueError, match="llama-alibi"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    else:
        close(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "native"), input_ids=IDS),
            expected,
        )
    with pytest.raises(UserError, match="exists"):
        convert_checkpoint(LOCAL / name, tmp_path / "native")
    convert_checkpoint(LOCAL / name, tmp_path / "half", dtype=torch.bfloat16)
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()
    } == {torch.bfloat16}


def test_write_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6).reshape(2, 3),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.ones(0, 4),
    }
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", layout, reversed(tensors.items()))
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(
        torch.equal(read[name], tensors[name]) for name in read
    )
    stored = {item.name: item.read() for item in stored_tensors(tmp_path / "x.safetensors")}
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


# --- GGUF
GGUF_NAMES = {
    **{
        "embed_tokens": "token_embd",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
    },
    **{
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    **{
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "lm_head": "output",
        "model.norm": "output_norm",
    },
    **{
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "pre_feedforward_layernorm": "ffn_norm",
    },
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, architecture: str) -> str:
    *prefix, _ = name.rsplit(".", 1)[0].split(".")
    layer = f"blk.{prefix[2]}." if "layers" in prefix else ""
    stem = next(
        original
        for native, original in GGUF_NAMES.items()
        if name.rsplit(".", 1)[0].endswith(native)
    )
    if architecture == "gemma3" and "post_attention_layernorm" in name:
        stem = "post_attention_norm"
    return f"{layer}{stem}.{name.rsplit('.', 1)[1]}"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_gguf(architecture: str, tmp_path: Path) -> None:
    """A GGUF file as llama.cpp's converter writes it (permuted q and k, norms of Gemma plus one)
    gives the native model.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    model = tiny_model(architecture)
    config = model.config
    writer = GGUFWriter(tmp_path / "tiny.gguf", architecture)
    for key, value in {
        **{
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
        },
        **{"embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size},
        **{
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
        },
        **{
            "attention.key_length": 8,
            "attention.sliding_window": getattr(config, "sliding_window", None) or 8,
        },
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(
        f"{architecture}.rope.freq_base", 1000000.0 if architecture == "gemma3" else 10000.0
    )
    writer.add_array("tokenizer.ggml.tokens", ["<a>", "字"])
    if architecture == "gemma3":  # llama.cpp knows five sliding layers, then one full one
        config.layer_types = ["sliding_attention", "sliding_attention"]
        for layer in model.model.layers:
            layer.attention_type = layer.self_attn.layer_type = "sliding_attention"
            layer.self_attn.sliding_window, layer.self_attn.is_sliding = 8, True
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            value = tensor.clone()
            if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):
                heads = (
                    config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
                )
                value = (
                    value.reshape(heads, 2, -1, value.shape[-1])
                    .transpose(1, 2)
                    .reshape(value.shape)
                )
            if "norm" in name and architecture == "gemma3":
                value += 1
            kind = (
                GGMLQuantizationType.Q8_0
                if "v_proj.weight" in name or "up_proj" in name
                else GGMLQuantizationType.F32
            )
            data = quantize(value.numpy(), kind)
            writer.add_tensor(gguf_name(name, architecture), data, raw_dtype=kind)
            if kind == GGMLQuantizationType.Q8_0:
                from gguf import dequantize

                tensor.copy_(torch.from_numpy(dequantize(data, kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    close(logits(load_model(tmp_path / "tiny.gguf"), input_ids=IDS), logits(model, input_ids=IDS))
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:-64])
    with pytest.raises(UserError, match=r"cut\.gguf is cut short: tensor \S+weight"):
        load_model(tmp_path / "cut.gguf")
    (tmp_path / "head.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:200])
    with pytest.raises(UserError, match="header"):
        load_model(tmp_path / "head.gguf")


def test_gguf_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(40))
    with pytest.raises(UserError, match="is no GGUF file"):
        load_model(tmp_path / "x.gguf")
    key, value = b"general.architecture", b"mamba"
    header = (
        struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", len(key))
        + key
        + struct.pack("<IQ", 8, len(value))
        + value
    )
    (tmp_path / "y.gguf").write_bytes(b"GGUF" + header)
    with pytest.raises(UserError, match=r"mamba.*llama, qwen2, qwen3, gemma3"):
        load_model(tmp_path / "y.gguf")


SMOLLM2 = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(not SMOLLM2.is_file(), reason="python tools/fetch_model.py smollm2")
def test_real_weights_continue_text() -> None:
    from cllm.model.tokenizer import load_tokenizer

    model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    answer = greedy(model, ids, ids.shape[1] + 3)[0, ids.shape[1] :].tolist()
    assert tokenizer.decode(answer).strip().startswith("Paris")


# --- What is refused, and what the message says
def test_all_tensor_problems_at_once(tmp_path: Path) -> None:
    qkv = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    change = {
        "transformer.output_layer.weight": None,
        "transformer.prefix_encoder.weight": torch.ones(2),
        qkv: torch.ones(100, 64),
        "transformer.encoder.final_layernorm.weight": torch.ones(63),
    }
    with pytest.raises(UserError) as caught:
        load_model(edited("chatglm3", tmp_path / "x", {}, change))
    text = str(caught.value)
    assert caught.value.code == "model.tensors" and "4 problems" in text
    for problem in (
        "missing lm_head.weight",
        "unexpected transformer.prefix_encoder.weight",
        f"misshaped {qkv} [100, 64]",
        "misshaped transformer.encoder.final_layernorm.weight [63], expected [64]",
    ):
        assert problem in text


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (
            {"model_type": "mixformer", "architectures": ["MixFormerForCausalLM"]},
            "model.unsupported",
            "MixFormerForCausalLM.*chatglm",
        ),
        ({"model_type": "t5"}, "model.unsupported", "qwen"),
        (
            {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "x--modeling_x.OtherLM"}},
            "model.unsupported",
            "OtherLM.*qwen",
        ),
        (
            {"pre_seq_len": 128, "quantization_bit": 4},
            "model.config_refused",
            "pre_seq_len = 128, quantization_bit = 4",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "model.quantized", "gptq"),
        ({"num_attention_heads": "four"}, "model.damaged", "num_attention_heads"),
        ({"padded_vocab_size": None}, "model.damaged", "configuration"),
    ],
)
def test_config_refused(change: dict[str, Any], code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_model(edited("chatglm3", tmp_path / "x", change, {}))
    assert caught.value.code == code


def test_config_incomplete(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "chatglm", "num_layers": 2}', encoding="utf-8"
    )
    with pytest.raises(UserError, match="ffn_hidden_size, hidden_size, kv_channels"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_model(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


def test_bin_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = (LOCAL / "qwen" / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(UserError, match="holds no weights"):
        load_model(tmp_path)
    file, tensors = tmp_path / "pytorch_model.bin", load_file(LOCAL / "qwen" / "model.safetensors")
    torch.save(tensors, file)
    close(
        logits(load_model(tmp_path), input_ids=IDS),
        logits(load_model(LOCAL / "qwen"), input_ids=IDS),
    )
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="zip") as caught:
        load_model(tmp_path)
    assert caught.value.code == "model.bin_old" and "weights_only=True" in str(caught.value)
    torch.save(tensors | {"evil": Evil()}, file)
    with pytest.raises(UserError, match="code"):
        load_model(tmp_path)
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert caught.value.code == "model.bin_old" and not Path("pwned").exists()
    torch.save({"tensors": [1, 2]}, file)
    with pytest.raises(UserError, match="no dictionary of tensors"):
        load_model(tmp_path)


def test_truncated_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((LOCAL / "qwen" / "config.json").read_bytes())
    whole = (LOCAL / "qwen" / "model.safetensors").read_bytes()
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged .*not fully covered"):
        load_model(tmp_path)
    shard.write_bytes(whole[:100])
    with pytest.raises(UserError, match="header"):
        load_model(tmp_path)
    shard.unlink()
    torch.save({"b": torch.ones(99), "a": torch.ones(99)}, tmp_path / "part-1.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"b": "part-1.bin", "a": "part-1.bin"}}', encoding="utf-8")
    (tmp_path / "part-1.bin").write_bytes((tmp_path / "part-1.bin").read_bytes()[:600])
    with pytest.raises(UserError, match=r"part-1\.bin is cut short: tensor b "):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["../evil.bin", "/etc/passwd", "..", "a/b.bin", "C:evil.bin", "a\\b.bin", ""]
)
def test_shard_names_are_plain(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((LOCAL / "qwen" / "config.json").read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert caught.value.code == "model.shard_name"


def test_missing_shards_and_damaged_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((LOCAL / "qwen" / "config.json").read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}', encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"1\.safetensors, 2\.safetensors"):
        load_model(tmp_path)
    index.write_text('{"weight_map": []}', encoding="utf-8")
    with pytest.raises(UserError, match="no shard index"):
        load_model(tmp_path)


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A tiny native checkpoint and its tensors."""
    folder = tmp_path / "whole"
    tiny_model("qwen2").save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


def shard(folder: Path, *parts: dict[str, Tensor], index: dict[str, str] | None = None) -> None:
    """The checkpoint in shards, with an index if there is one."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for number, part in enumerate(parts, 1):
        save_file(part, folder / f"model-{number:05}-of-{len(parts):05}.safetensors")
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def same(folder: Path, tensors: dict[str, Tensor]) -> bool:
    state = load_model(folder).state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_the_index_decides_and_a_name_without_entry_stands_once(
    whole: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, tensors = whole
    names = sorted(tensors)
    first, second = ({name: tensors[name] for name in part} for part in (names[:3], names[3:]))
    file = "model-0000{}-of-00002.safetensors".format
    index = {name: file(1 if name in first else 2) for name in names}
    shard(folder, first, {**second, names[0]: tensors[names[0]] + 1}, index=index)
    assert same(folder, tensors)
    # a tensor that the index does not know is read as well, unless it stands twice
    del index[names[0]]
    shard(folder, first, {**second, names[0]: tensors[names[0]] + 1}, index=index)
    with pytest.raises(UserError, match=f"twice {names[0]}"):
        load_model(folder, Placement(dtype=torch.float32))
    shard(folder, first, second, index=index)
    assert same(folder, tensors)


def test_shards_without_an_index_and_an_index_without_shards(
    whole: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, tensors = whole
    index = folder / "model.safetensors.index.json"
    index.write_text('\ufeff{"weight_map": {"a": "model-00001-of-00009.safetensors"}}', "utf-8")
    assert same(folder, tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same(folder, tensors)
    (folder / "pytorch_model.bin").unlink()
    index.unlink()
    names = sorted(tensors)
    shard(folder, *({name: tensors[name] for name in names[i::3]} for i in range(3)))
    assert same(folder, tensors)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"missing: model-00002-of-00003"):
        load_model(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(
    bad: float, dtype: torch.dtype, whole: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, tensors = whole
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    name = sorted(tensors)[2]
    tensors[name].view(-1)[-1] = bad
    save_file(tensors, folder / "model.safetensors")
    for quantize in (None, "nf4"):
        with pytest.raises(UserError, match=f"tensor {name} holds") as caught:
            load_model(folder, Placement(quantize=quantize or "none"))
        assert caught.value.code == "model.not_finite"
    # the largest numbers of the type are numbers
    tensors[name].view(-1)[-1] = torch.finfo(dtype).max
    tensors[name].view(-1)[0] = torch.finfo(dtype).min
    save_file(tensors, folder / "model.safetensors")
    load_model(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_named(
    suffix: str, dtype: torch.dtype, whole: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, tensors = whole
    name = sorted(tensors)[2]
    tensors[name] = tensors[name].to(dtype)
    (folder / "model.safetensors").unlink()
    if suffix == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}: fp8"):
        load_model(folder)


@pytest.mark.parametrize("entry", [None, {}, []])
def test_no_quantization_is_none(entry: object, whole: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = whole
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_bytes(json.dumps({**config, "quantization_config": entry}).encode("utf-8-sig"))
    assert same(folder, tensors)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "header"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "header"),
        ({"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}, "F9"),
        ({"dtype": "F32", "shape": [2]}, "data_offsets"),
        (7, "header"),
    ],
)
def test_damaged_header(entry: Any, words: str, tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match=words) as caught:
        list(stored_tensors(tmp_path / "x.safetensors"))
    assert caught.value.code == "model.damaged"
