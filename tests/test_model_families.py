"""The table of families: which one a config.json belongs to, the native config it gives, and the
names of its tensors.
"""

from __future__ import annotations

from typing import Any

import pytest

from cllm.data.template import TEMPLATES
from cllm.messages import UserError
from cllm.model.families import (
    CHATGLM,
    FAMILIES,
    GGUF,
    GPT2,
    INTERNLM2,
    NATIVE,
    QWEN,
    SUPPORTED,
    Family,
    family_of,
    rename,
)

BAICHUAN = {
    **{
        "model_type": "baichuan",
        "vocab_size": 125696,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "rms_norm_eps": 1e-6,
    },
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu", "pad_token_id": 0},
}
GLM4 = {
    **{
        "model_type": "chatglm",
        "padded_vocab_size": 151552,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "num_layers": 40,
    },
    **{
        "num_attention_heads": 32,
        "kv_channels": 128,
        "layernorm_epsilon": 1.5625e-07,
        "seq_length": 131072,
        "rope_ratio": 500,
    },
    **{
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
        "add_bias_linear": False,
    },
    **{"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329},
}


def native(config: dict[str, Any]) -> dict[str, Any]:
    family = family_of(config)
    assert family is not None and family.config is not None
    return family.config(config)


def test_every_family_is_complete() -> None:
    for family in (*FAMILIES.values(), *GGUF.values(), NATIVE):
        assert family.template == "auto" or family.template in TEMPLATES
    for name in FAMILIES:
        assert name == "llama-alibi" or name in SUPPORTED


@pytest.mark.parametrize(
    ("change", "name", "alibi", "norm_head"),
    [
        ({"max_position_embeddings": 4096}, "baichuan2-7b", False, True),
        ({"model_max_length": 4096}, "baichuan2-13b", True, True),
        ({"max_position_embeddings": 4096, "vocab_size": 64000}, "baichuan-7b", False, False),
        ({"model_max_length": 4096, "vocab_size": 64000}, "baichuan-13b", True, False),
    ],
)
def test_baichuan_variants(change: dict[str, Any], name: str, alibi: bool, norm_head: bool) -> None:
    """One model_type: ALiBi shows by the missing key, the head of version 1 by its vocabulary."""
    family = family_of(BAICHUAN | change)
    assert family is not None and (family.name, family.alibi) == (name, alibi)
    assert rename("lm_head.weight", family) == (
        "unit_rows" if norm_head else "",
        ["lm_head.weight"],
    )
    assert family.template == ("baichuan2" if norm_head else "baichuan")
    assert native(BAICHUAN | change)["max_position_embeddings"] == 4096


def test_tied_head_of_baichuan() -> None:
    tied = BAICHUAN | {"max_position_embeddings": 4096, "tie_word_embeddings": True}
    family = family_of(tied)
    assert family is not None
    expected = ("tied_unit_rows", ["model.embed_tokens.weight", "lm_head.weight"])
    assert rename("model.embed_tokens.weight", family) == expected
    assert native(tied)["tie_word_embeddings"] is False
    assert native(tied | {"vocab_size": 64000})["tie_word_embeddings"] is True


def test_glm4_and_chatglm() -> None:
    config = native(GLM4)
    assert config["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 5000000.0,
        "partial_rotary_factor": 0.5,
    }
    assert (config["num_key_value_heads"], config["head_dim"], config["vocab_size"]) == (
        2,
        128,
        151552,
    )
    assert (config["pad_token_id"], config["eos_token_id"]) == (151329, [151329, 151336, 151338])
    older = native(
        GLM4 | {"padded_vocab_size": 65024, "multi_query_attention": False, "rope_ratio": 1}
    )
    # 151329 would lie outside the embedding
    assert older["pad_token_id"] == 0 and older["num_key_value_heads"] == 32
    assert older["rope_parameters"]["rope_theta"] == 10000.0


def test_qwen_counts_its_width_twice() -> None:
    config = {
        **{
            "model_type": "qwen",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        **{
            "intermediate_size": 11008,
            "layer_norm_epsilon": 1e-6,
            "seq_length": 8192,
            "rotary_emb_base": 10000,
        },
        "max_position_embeddings": 32768,
    }
    assert native(config)["intermediate_size"] == 5504
    # the trained length, not the promised one
    assert native(config)["max_position_embeddings"] == 8192
    with pytest.raises(UserError, match="no_bias = False"):
        native(config | {"no_bias": False})


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, {"rope_type": "default", "rope_theta": 1e6}),
        (
            {"type": "dynamic", "factor": 2},
            {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
        ),
        (
            {"rope_type": "linear", "factor": 4},
            {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
        ),
    ],
)
def test_rope_scaling(scaling: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    llama = BAICHUAN | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000,
    }
    config = llama | {"model_type": "internlm2", "rope_scaling": scaling}
    assert native(config)["rope_parameters"] == expected
    with pytest.raises(UserError, match="yarn"):
        native(config | {"rope_scaling": {"type": "yarn"}})


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "qwen3"}, {"model_type": None}, {"architectures": ["Q"]}]
)
def test_native_has_no_family(config: dict[str, Any]) -> None:
    assert family_of(config) is None


@pytest.mark.parametrize(
    ("family", "name", "operation", "targets"),
    [
        (CHATGLM, "transformer.rotary_pos_emb.inv_freq", "", []),
        (
            CHATGLM,
            "transformer.encoder.layers.27.self_attention.query_key_value.bias",
            "qkv",
            [f"model.layers.27.self_attn.{part}_proj.bias" for part in "qkv"],
        ),
        (QWEN, "transformer.h.3.mlp.w2.weight", "", ["model.layers.3.mlp.gate_proj.weight"]),
        (
            INTERNLM2,
            "model.layers.0.feed_forward.w3.weight",
            "",
            ["model.layers.0.mlp.up_proj.weight"],
        ),
        (GPT2, "h.1.attn.bias", "", []),
        (GPT2, "transformer.h.1.attn.masked_bias", "", []),
        (GPT2, "h.1.attn.c_attn.bias", "", ["transformer.h.1.attn.c_attn.bias"]),
        (GPT2, "lm_head.weight", "", ["lm_head.weight"]),
        (
            NATIVE,
            "model.language_model.layers.0.mlp.up_proj.weight",
            "",
            ["model.layers.0.mlp.up_proj.weight"],
        ),
        (NATIVE, "language_model.model.norm.weight", "", ["model.norm.weight"]),
        (NATIVE, "language_model.lm_head.weight", "", ["lm_head.weight"]),
        (NATIVE, "model.visual.blocks.0.norm1.weight", "", []),
        (NATIVE, "model.layers.0.self_attn.rotary_emb.inv_freq", "", []),
        (NATIVE, "layers.0.mlp.up_proj.weight", "", ["model.layers.0.mlp.up_proj.weight"]),
        (
            GGUF["llama"],
            "blk.12.attn_k.weight",
            "unpermute_k",
            ["model.layers.12.self_attn.k_proj.weight"],
        ),
        (
            GGUF["gemma3"],
            "blk.0.ffn_norm.weight",
            "minus_one",
            ["model.layers.0.pre_feedforward_layernorm.weight"],
        ),
        (GGUF["qwen2"], "blk.0.attn_q.bias", "", ["model.layers.0.self_attn.q_proj.bias"]),
        # unknown to the model, so it will be refused
        (GGUF["llama"], "rope_freqs.weight", "", ["rope_freqs.weight"]),
    ],
)
def test_rename(family: Family, name: str, operation: str, targets: list[str]) -> None:
    assert rename(name, family) == (operation, targets)
