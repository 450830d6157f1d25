"""The table of checkpoint families: how each original checkpoint maps onto a native Transformers
architecture.

Data only: no torch here. A family says which native class computes it, how its config.json (or GGUF
metadata) becomes the native config, and how each module is renamed or split (`conversion.convert`
does it). Adding a family is one `Family` here, in `FAMILIES` and `SUPPORTED`, one template in
assets/templates.toml and one parity test. No remote code is ever needed or executed.

Sources: the modelling code published with each checkpoint (ChatGLM2/3, GLM-4, Baichuan 1/2, Qwen,
InternLM 1/2, Yi), and llama.cpp's tensor names for GGUF. What goes wrong most easily is said beside
the rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from cllm.messages import UserError

Config = Mapping[str, Any]


class ModelShape(NamedTuple):
    """What splitting rows needs to know: query heads, key/value heads, features per head."""

    heads: int
    kv_heads: int
    head_dim: int


def shape_of(config: Any) -> ModelShape:
    """Of a native Transformers config."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(heads, getattr(config, "num_key_value_heads", None) or heads, head_dim)


class Family(NamedTuple):
    """One original checkpoint layout.

    config: original config -> keywords of the native config (None: config.json is native). rules:
    "original=native" modules (one word: the same name); a leading `*` is a layer,
    "<layers>.<number>" in the original and "model.layers.<number>" here; `?` stands for q, k and v;
    "operation:" says what happens to the rows and "+" adds a second target (`conversion.convert`).
    A module without a rule keeps its name. prefixes: (pattern, replacement) of names before the
    rules. drop: a pattern of names that are no weights.
    """

    name: str
    architecture: str
    template: str
    config: Callable[[Config], dict[str, Any]] | None = None
    layers: str = "model.layers"
    rules: str = ""
    prefixes: tuple[tuple[str, str], ...] = ()
    drop: str = r".*\.inv_freq"
    alibi: bool = False


def _pairs(names: str) -> list[tuple[str, str]]:
    """ "a=b c" -> (a, b), (c, c)."""
    return [(name.partition("=")[0], name.rpartition("=")[2]) for name in names.split()]


def _keys(family: str, config: Config, names: str, **required: object) -> dict[str, Any]:
    """The native keys of `names` ("native=original" or one word for both) and what every family
    shares.

    Raises UserError if keys are missing, or if a setting is not the one that the native class
    implements.
    """
    pairs = _pairs(names)
    if missing := sorted(key for _, key in pairs if key not in config):
        raise UserError("model.config_missing", family=family, keys=", ".join(missing))
    if wrong := [
        f"{key} = {config[key]!r}"
        for key, value in required.items()
        if config.get(key, value) != value
    ]:
        raise UserError("model.config_refused", family=family, settings=", ".join(wrong))
    tokens = config.keys() & {"bos_token_id", "eos_token_id", "pad_token_id"}
    return {
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **{key: config[key] for key in tokens},
        **{native: config[key] for native, key in pairs},
    }


def _rope(config: Config, theta: float = 10000.0, **more: object) -> dict[str, Any]:
    """`rope_parameters`: theta, and linear or dynamic scaling where config.json has it (dynamic
    acts beyond the length only).
    """
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "dynamic"):
        raise UserError(
            "model.config_refused",
            family=config.get("model_type"),
            settings=f"rope_scaling = {scaling}",
        )
    factor = {"factor": float(scaling["factor"])} if "factor" in scaling else {}
    return {
        "rope_type": kind,
        "rope_theta": float(config.get("rope_theta", theta)),
        **factor,
        **more,
    }


# --- ChatGLM2, ChatGLM3, GLM-4-9B: Glm too rotates interleaved pairs of half a head, and holds gate
# and up in one matrix.
def _chatglm(config: Config) -> dict[str, Any]:
    names = """
        vocab_size=padded_vocab_size hidden_size intermediate_size=ffn_hidden_size
        num_hidden_layers=num_layers num_attention_heads head_dim=kv_channels
        rms_norm_eps=layernorm_epsilon max_position_embeddings=seq_length
    """
    native = _keys(
        "chatglm",
        config,
        names,
        add_bias_linear=False,
        rmsnorm=True,
        original_rope=True,
        post_layer_norm=True,
        apply_residual_connection_post_layernorm=False,
        pre_seq_len=None,
        quantization_bit=0,
    )
    grouped = config.get("multi_query_attention", False)
    kv_heads = config["multi_query_group_num" if grouped else "num_attention_heads"]
    pad = config.get("pad_token_id")
    return native | {
        "num_key_value_heads": kv_heads,
        "attention_bias": bool(config.get("add_qkv_bias", False)),
        "eos_token_id": config.get("eos_token_id", 2),
        # Glm's own default, 151329, lies outside ChatGLM's vocabulary and would crash the
        # embedding.
        "pad_token_id": pad if isinstance(pad, int) and pad < config["padded_vocab_size"] else 0,
        "rope_parameters": _rope(
            {}, 10000.0 * config.get("rope_ratio", 1.0), partial_rotary_factor=0.5
        ),
    }


_CHATGLM = """
    transformer.embedding.word_embeddings=model.embed_tokens
    transformer.encoder.final_layernorm=model.norm transformer.output_layer=lm_head
    *.self_attention.query_key_value=qkv:*.self_attn.?_proj
    *.self_attention.dense=*.self_attn.o_proj *.mlp.dense_h_to_4h=*.mlp.gate_up_proj
    *.mlp.dense_4h_to_h=*.mlp.down_proj *.input_layernorm *.post_attention_layernorm
"""
CHATGLM = Family(
    "chatglm", "GlmForCausalLM", "chatglm3", _chatglm, "transformer.encoder.layers", _CHATGLM
)

# --- The Llama relatives: what differs is a name, how q, k and v are packed, or the head.
_LLAMA = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps
    hidden_act
"""


def _baichuan(config: Config) -> dict[str, Any]:
    positions = config.get("max_position_embeddings", config.get("model_max_length", 4096))
    native = _keys("baichuan", config, _LLAMA)
    native |= {"max_position_embeddings": positions, "rope_parameters": _rope({})}
    # NormHead divides each row by its norm in every pass, so a tied head is not the embedding any
    # more.
    native["tie_word_embeddings"] &= config["vocab_size"] == BAICHUAN_1_VOCAB
    return native


BAICHUAN_1_VOCAB = 64000


def _baichuan_family(config: Config) -> Family:
    """All Baichuan models share one model_type: 13B (ALiBi) has no `max_position_embeddings`,
    version 1 a plain head.
    """
    alibi = "max_position_embeddings" not in config
    second = config.get("vocab_size") != BAICHUAN_1_VOCAB
    name = f"baichuan{'2' if second else ''}-{'13b' if alibi else '7b'}"
    rules = "*.self_attn.W_pack=qkv:*.self_attn.?_proj"
    if second:
        rules += " lm_head=unit_rows:lm_head"
        if config.get("tie_word_embeddings"):
            rules += " model.embed_tokens=tied_unit_rows:model.embed_tokens+lm_head"
    template = "baichuan2" if second else "baichuan"
    return Family(name, "LlamaForCausalLM", template, _baichuan, rules=rules, alibi=alibi)


def _qwen(config: Config) -> dict[str, Any]:
    names = """
        vocab_size hidden_size num_hidden_layers num_attention_heads
        rms_norm_eps=layer_norm_epsilon intermediate_size max_position_embeddings=seq_length
    """
    heads = config.get("num_attention_heads", 1)
    return _keys("qwen", config, names, no_bias=True, rotary_pct=1.0) | {
        # the original counts gate and up together
        "intermediate_size": config["intermediate_size"] // 2,
        "num_key_value_heads": heads,
        "head_dim": config.get("kv_channels", config["hidden_size"] // heads),
        # Dynamic NTK and logn are left out: the original uses them beyond seq_length only, and
        # never in training.
        "rope_parameters": _rope({}, config.get("rotary_emb_base", 10000.0)),
    }


# w1 is the up projection and w2 the gate: easy to swap.
_QWEN = """
    transformer.wte=model.embed_tokens transformer.ln_f=model.norm
    *.attn.c_attn=qkv:*.self_attn.?_proj *.attn.c_proj=*.self_attn.o_proj *.mlp.w1=*.mlp.up_proj
    *.mlp.w2=*.mlp.gate_proj *.mlp.c_proj=*.mlp.down_proj *.ln_1=*.input_layernorm
    *.ln_2=*.post_attention_layernorm
"""
QWEN = Family("qwen", "Qwen2ForCausalLM", "qwen1", _qwen, "transformer.h", _QWEN)


def _llama(
    family: str, *, theta: float = 10000.0, bias: bool = False
) -> Callable[[Config], dict[str, Any]]:
    def native(config: Config) -> dict[str, Any]:
        return _keys(family, config, f"{_LLAMA} max_position_embeddings") | {
            "num_key_value_heads": config.get("num_key_value_heads"),
            "attention_bias": bool(config.get("bias", bias)),
            "rope_parameters": _rope(config, theta),
        }

    return native


_INTERNLM2 = """
    model.tok_embeddings=model.embed_tokens output=lm_head
    *.attention.wqkv=qkv_grouped:*.self_attn.?_proj *.attention.wo=*.self_attn.o_proj
    *.feed_forward.w1=*.mlp.gate_proj *.feed_forward.w3=*.mlp.up_proj
    *.feed_forward.w2=*.mlp.down_proj *.attention_norm=*.input_layernorm
    *.ffn_norm=*.post_attention_layernorm
"""
_YI = "*.ln1=*.input_layernorm *.ln2=*.post_attention_layernorm"
INTERNLM = Family("internlm", "LlamaForCausalLM", "internlm", _llama("internlm", bias=True))
INTERNLM2 = Family(
    "internlm2", "LlamaForCausalLM", "internlm2", _llama("internlm2"), rules=_INTERNLM2
)
YI = Family("yi", "LlamaForCausalLM", "yi", _llama("yi", theta=5000000.0), rules=_YI)

# --- Native checkpoints: leftovers to drop, and prefixes under which the same names are found.
_NO_BASE = ((r"^(?=(?:wte|wpe|h|ln_f)\.)", "transformer."),)
# causal-mask buffers; not c_attn.bias
_MASKS = r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)"
GPT2 = Family("gpt2", "GPT2LMHeadModel", "plain", prefixes=_NO_BASE, drop=_MASKS)
# what tools/convert.py makes of 13B
LLAMA_ALIBI = Family("llama-alibi", "LlamaForCausalLM", "baichuan2", alibi=True)
_TEXT_PART = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(?:model\.)?language_model\.(?:model\.)?", "model."),
    (r"^(?=(?:embed_tokens|layers|norm)\.)", "model."),
)
_NO_TEXT = r".*\.inv_freq|(?:model\.)?(?:visual|vision_tower|multi_modal_projector|mtp)\..*"
NATIVE = Family("native", "", "auto", prefixes=_TEXT_PART, drop=_NO_TEXT)


# --- GGUF: llama.cpp's names.
def _gguf(metadata: Config) -> dict[str, Any]:
    """GGUF metadata without the architecture's prefix, with `tensors`, -> native config."""
    names = """
        hidden_size=embedding_length intermediate_size=feed_forward_length
        num_hidden_layers=block_count num_attention_heads=attention.head_count
        max_position_embeddings=context_length rms_norm_eps=attention.layer_norm_rms_epsilon
    """
    native = _keys("GGUF", metadata, names)
    heads = native["num_attention_heads"]
    tensors = metadata["tensors"]
    embedding = tensors.get("token_embd.weight")
    rope: dict[str, Any] = {"rope_theta": metadata.get("rope.freq_base", 10000.0)}
    if metadata.get("rope.scaling.type", "none") != "none":
        rope["rope_scaling"] = {
            "type": metadata["rope.scaling.type"],
            "factor": metadata.get("rope.scaling.factor", 1.0),
        }
    return native | {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "head_dim": metadata.get("attention.key_length", native["hidden_size"] // heads),
        "vocab_size": embedding.shape[0] if embedding else 0,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "rope_parameters": _rope(rope),
    }


def _gguf_chatglm(metadata: Config) -> dict[str, Any]:
    native = _gguf(metadata)
    turned = metadata.get("rope.dimension_count", native["head_dim"] // 2) / native["head_dim"]
    native["rope_parameters"]["partial_rotary_factor"] = turned
    native["pad_token_id"] = native["pad_token_id"] or 0
    return native


def gemma3_layer_types(layers: int) -> list[str]:
    """Every sixth layer sees the whole sequence."""
    return [
        "sliding_attention" if layer % 6 else "full_attention" for layer in range(1, layers + 1)
    ]


def _gguf_gemma3(metadata: Config) -> dict[str, Any]:
    native = _gguf(metadata)
    rope = {"full_attention": native["rope_parameters"], "sliding_attention": _rope({})}
    return native | {
        "sliding_window": metadata.get("attention.sliding_window", 512),
        "layer_types": gemma3_layer_types(native["num_hidden_layers"]),
        "rope_parameters": rope,
        "query_pre_attn_scalar": native["head_dim"],
    }


_LINEARS = """
    token_embd=model.embed_tokens output=lm_head *.attn_v=*.self_attn.v_proj
    *.attn_output=*.self_attn.o_proj *.ffn_gate=*.mlp.gate_proj *.ffn_up=*.mlp.up_proj
    *.ffn_down=*.mlp.down_proj
"""
_QK = "*.attn_q=*.self_attn.q_proj *.attn_k=*.self_attn.k_proj"
# for ggml's own rotary
_LLAMA_QK = "*.attn_q=unpermute_q:*.self_attn.q_proj *.attn_k=unpermute_k:*.self_attn.k_proj"
_NORMS = (
    "output_norm=model.norm *.attn_norm=*.input_layernorm *.ffn_norm=*.post_attention_layernorm"
)
_QK_NORMS = "*.attn_q_norm=*.self_attn.q_norm *.attn_k_norm=*.self_attn.k_norm"
_GEMMA_NORMS = f"""
    {_QK_NORMS} output_norm=model.norm *.attn_norm=*.input_layernorm
    *.ffn_norm=*.pre_feedforward_layernorm *.post_attention_norm=*.post_attention_layernorm
    *.post_ffw_norm=*.post_feedforward_layernorm
"""
_GLM_UP = "*.ffn_up=*.mlp.gate_up_proj"
_ONE_LESS = _GEMMA_NORMS.replace("=", "=minus_one:")  # stored as 1 + w
GGUF = {
    architecture: Family(
        f"gguf-{architecture}", native, template, config, "blk", f"{more} {_LINEARS}"
    )
    for architecture, native, template, config, more in (
        ("llama", "LlamaForCausalLM", "auto", _gguf, f"{_LLAMA_QK} {_NORMS}"),
        ("qwen2", "Qwen2ForCausalLM", "qwen", _gguf, f"{_QK} {_NORMS}"),
        ("qwen3", "Qwen3ForCausalLM", "qwen3", _gguf, f"{_QK} {_NORMS} {_QK_NORMS}"),
        ("gemma3", "Gemma3ForCausalLM", "gemma", _gguf_gemma3, f"{_QK} {_ONE_LESS}"),
        (
            "chatglm",
            "GlmForCausalLM",
            "chatglm3",
            _gguf_chatglm,
            f"{_QK} {_GLM_UP} {_NORMS} *.attn_qkv=qkv:*.self_attn.?_proj",
        ),
    )
}

FAMILIES = {
    family.name: family for family in (CHATGLM, QWEN, INTERNLM, INTERNLM2, YI, GPT2, LLAMA_ALIBI)
}
SUPPORTED = (
    "baichuan (7B, 13B; 1 and 2), chatglm (ChatGLM2, ChatGLM3, GLM-4-9B), gpt2, internlm, "
    "internlm2, qwen (1), yi"
)


def family_of(config: Config) -> Family | None:
    """The family of a config.json by its `model_type`, or None: then the checkpoint is native or
    unknown.
    """
    kind = str(config.get("model_type", "")).lower()
    return _baichuan_family(config) if kind == "baichuan" else FAMILIES.get(kind)


def rename(name: str, family: Family) -> tuple[str, list[str]]:
    """(operation or "", native names) of the original tensor `name`; no native name: it is
    dropped.
    """
    if re.fullmatch(family.drop, name):
        return "", []
    for pattern, replacement in family.prefixes:
        name = re.sub(pattern, replacement, name)
    for expression, operation, targets in _compiled(family.layers, family.rules):
        if match := expression.fullmatch(name):
            layer, leaf = f"model.layers.{match[1]}", match.groups()[-1]
            return operation, [target.replace("*", layer) + leaf for target in targets]
    return "", [name]


@cache
def _compiled(layers: str, rules: str) -> list[tuple[re.Pattern[str], str, list[str]]]:
    compiled = []
    for source, target in _pairs(rules):
        operation, _, names = target.rpartition(":")
        expression = (
            re.escape(source).replace(r"\*", re.escape(layers) + r"\.(\d+)") + r"(\.weight|\.bias)"
        )
        targets = [names.replace("?", part) for part in "qkv"] if "?" in names else names.split("+")
        compiled.append((re.compile(expression), operation, targets))
    return compiled
