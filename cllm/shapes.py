"""Sizes of published models, from a config.json alone: no torch, no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.messages import UserError, note, read_json
from cllm.model import families

SHAPES = Path(__file__).parent / "assets" / "shapes.json"

# How native architectures differ from Llama, as far as bytes go; "tied" is what an absent
# tie_word_embeddings means.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"biased": "qkv"},
    "qwen3": {"qk_norm": True},
    "gemma": {"tied": True},
    "gemma3_text": {"norms": 4, "qk_norm": True, "tied": True},
    "glm": {"fused_mlp": True},
    "glm4": {"norms": 4, "fused_mlp": True},
    "gpt2": {"gated": False, "tied": True},
    "qwen3_5_text": {"qk_norm": True, "gated_query": True, "tied": False},
}
_GPT2_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a causal LM as its native Transformers class computes it."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    """Head and embedding are one matrix."""
    biased: str = ""
    """Which of q, k, v, o have a bias."""
    norms: int = 2
    """Norms over the hidden size per layer."""
    qk_norm: bool = False
    fused_mlp: bool = False
    """Gate and up are one matrix."""
    gated: bool = True
    """SwiGLU and RMS norms; else GPT-2: learned positions, one matrix for q, k, v, biases
    everywhere, never quantized.
    """
    positions: int = 0
    window: int = 0
    alibi: bool = False
    gated_query: bool = False
    """Queries come with a gate for the attention's output (Qwen3.5)."""
    recurrent: int = 0
    """Layers with a gated delta rule in place of attention."""
    mixer: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Of these: key heads, value heads, sizes of a key and a value head."""

    def linears(self, *, recurrent: bool = False) -> dict[str, tuple[int, int]]:
        """Name -> (in, out) of the linears of one decoder layer, with attention or a gated delta
        rule.
        """
        d, f, q, kv = (
            self.hidden,
            self.intermediate,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        if not self.gated:
            return {
                "c_attn": (d, 3 * d),
                "attn.c_proj": (d, d),
                "c_fc": (d, f),
                "mlp.c_proj": (f, d),
            }
        mlp = (
            {"gate_up_proj": (d, 2 * f)}
            if self.fused_mlp
            else {"gate_proj": (d, f), "up_proj": (d, f)}
        )
        if recurrent:
            keys, values, key_dim, value_dim = self.mixer
            wide = values * value_dim
            mixer = {
                "in_proj_qkv": (d, 2 * keys * key_dim + wide),
                "in_proj_z": (d, wide),
                "in_proj_b": (d, values),
            }
            mixer |= {"in_proj_a": (d, values), "out_proj": (wide, d)}
        else:
            mixer = {
                "q_proj": (d, q * (1 + self.gated_query)),
                "k_proj": (d, kv),
                "v_proj": (d, kv),
                "o_proj": (q, d),
            }
        return {**mixer, **mlp, "down_proj": (f, d)}

    def unquantized(self) -> int:
        """Parameters of all norms, biases and convolutions."""
        norm = self.hidden if self.gated else 2 * self.hidden  # LayerNorm has a bias
        biases = sum(
            out
            for name, (_, out) in self.linears().items()
            if not self.gated or (name[0] in self.biased and name[1] == "_")
        )
        keys, values, key_dim, value_dim = self.mixer
        # the convolution first
        recurrent = 4 * (2 * keys * key_dim + values * value_dim) + 2 * values + value_dim
        mixers = (
            self.recurrent * recurrent
            + (self.layers - self.recurrent) * 2 * self.head_dim * self.qk_norm
        )
        return self.layers * (self.norms * norm + biases) + mixers + norm


def shape_of(config: Mapping[str, Any], name: str = "") -> Shape:
    """The shape behind a config.json, original (ChatGLM, Qwen 1, Baichuan, InternLM, Yi) or native.

    Raises UserError for an architecture whose bytes are not known here (mixtures of experts among
    them) and for missing sizes.
    """
    family = families.family_of(config)
    native: Mapping[str, Any] = config.get("text_config", config)
    kind = str(native.get("model_type", "")).replace("llama_alibi", "llama")
    if family is not None and family.config is not None:
        kind, native = (
            family.architecture.removesuffix("ForCausalLM").lower(),
            family.config(config),
        )
    if kind not in ARCHITECTURES:
        raise UserError(
            "memory.architecture",
            name=name or kind,
            kind=kind or "?",
            known=", ".join(ARCHITECTURES),
        )
    sizes: dict[str, Any] = {
        **native,
        **{ours: native[gpt2] for gpt2, ours in _GPT2_KEYS.items() if native.get(gpt2)},
    }
    get = sizes.get
    keys = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
    if missing := [key for key in keys if not isinstance(get(key), int)]:
        raise UserError("memory.config", name=name or kind, missing=", ".join(missing))
    layers, hidden, vocab, heads = (sizes[key] for key in keys)
    traits = ARCHITECTURES[kind]
    common: dict[str, Any] = {
        "tied": get("tie_word_embeddings", traits.get("tied", False)),
        "biased": ("qkv" if kind.startswith("glm") else "qkvo")
        if get("attention_bias")
        else traits.get("biased", ""),
        "window": get("sliding_window") or 0 if get("use_sliding_window", True) else 0,
        "positions": get("n_positions") or 0,
        "alibi": family is not None and family.alibi,
        "recurrent": list(get("layer_types") or ()).count("linear_attention"),
        "mixer": tuple(
            get(f"linear_{key}") or 0
            for key in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        ),
    }
    return Shape(
        name=name or kind,
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        heads=heads,
        intermediate=get("intermediate_size") or 4 * hidden,
        kv_heads=get("num_key_value_heads") or heads,
        head_dim=get("head_dim") or hidden // heads,
        **{**traits, **common},
    )


def find_config(name: str) -> tuple[str, dict[str, Any]]:
    """(name, config) of a checkpoint directory or config.json, or of a published model by its name,
    whoever its owner.
    """
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        return name, read_json(file)
    published: dict[str, dict[str, Any]] = read_json(SHAPES)
    for known, config in published.items():
        if _stem(known) == _stem(name):
            return known, config
    raise UserError("memory.name", name=name, known=", ".join(published))


def _stem(name: str) -> str:
    """Owners move and chat models have their base's shape: neither counts."""
    return re.sub(r"-(base|chat|instruct|hf)$", "", re.split("[:/]", name)[-1].lower())


def find_shape(name: str) -> Shape:
    """`shape_of` what `find_config` finds."""
    known, config = find_config(name)
    return shape_of(config, known)


def known_shape(original: Mapping[str, Any], name: str) -> Shape | None:
    """`shape_of`, or None and a line about it for an architecture that is not known here."""
    try:
        return shape_of(original, name)
    except UserError as error:
        note("memory.unplanned", reason=error.args[0])
        return None
