"""Bytes of everything that lives on the device while an adapter is trained, from config.json alone:
no torch, no weights.

Describes what `cllm.train` does: a frozen base (NF4 linears, or all of it in 16 or 32 bits),
float32 LoRA with AdamW, decoder layers recomputed in the backward (all, some or none), the loss in
chunks. The peak is the largest of three moments: the loss, the backward through a kept layer, the
backward through a recomputed layer. What autograd keeps of a layer was counted tensor by tensor;
tests/test_memory.py holds the sums against a storage census of real steps. Context and
fragmentation are on paper: no card measured them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from cllm.config import LoraConfig, MemoryConfig, ModelConfig
from cllm.messages import UserError, note, say
from cllm.model import families

MIB, GIB = 2**20, 2**30
SHAPES = Path(__file__).parent / "assets" / "shapes.json"
ROW_STEP = 128  # tokens: granularity of the longest row
CONTEXT_BYTES = 450 * MIB  # CUDA context and cuBLAS workspaces
FRAGMENTATION_BYTES = 250 * MIB
CONVERSION_BYTES = 75_000_000
_LOSS_FP32_BYTES = 16 * MIB  # cllm.learn.loss looks at its chunk in float32, so much at a time
_PIECE = 2**22  # cllm.model.lora makes so many elements of a gated MLP's product at a time
_HEAD_TILE = 2**25  # cllm.learn.loss dequantizes so many weights of a quantized head at a time
_INT8_PIECE = 2**21  # cllm.model.int8 makes so many of them in float32 first

# How native architectures differ from Llama, as far as bytes go; "tied" is what an absent
# tie_word_embeddings means.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {"biased": "qkv"}, "qwen3": {"qk_norm": True}, "gemma": {"tied": True},
    "gemma3_text": {"norms": 4, "qk_norm": True, "tied": True}, "glm": {"fused_mlp": True}, "glm4": {"norms": 4, "fused_mlp": True},
    "gpt2": {"gated": False, "tied": True}, "qwen3_5_text": {"qk_norm": True, "gated_query": True, "tied": False},
}  # fmt: skip
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
        try:
            return name, dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError("model.damaged", path=file, detail=error) from error
    published: dict[str, dict[str, Any]] = json.loads(SHAPES.read_text(encoding="utf-8"))
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


class AdapterShape(NamedTuple):
    """What the bytes of an adapter depend on."""

    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    dora: bool = False

    @classmethod
    def of(cls, adapter: LoraConfig | Path | None) -> AdapterShape:
        """Of [lora], or of the adapter in a folder (then without dropout); None: no adapter.

        Raises UserError if the folder's adapter_config.json cannot be read.
        """
        if adapter is None:
            return cls(rank=0)
        if isinstance(adapter, Path):
            return cls._stored(adapter, 0.0)
        if adapter.init_from:
            run = Path(adapter.init_from)
            stored = run / "adapter" if (run / "adapter").is_dir() else run
            return cls._stored(stored, adapter.dropout)
        targets = adapter.targets
        names = targets if isinstance(targets, str) else tuple(targets)
        return cls(adapter.rank, names, adapter.dropout, adapter.dora)

    @classmethod
    def _stored(cls, folder: Path, dropout: float) -> AdapterShape:
        file = folder / "adapter_config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            targets = config["target_modules"]
            names = targets if isinstance(targets, str) else tuple(targets)
            return cls(int(config["r"]), names, dropout, bool(config.get("use_dora")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError("adapter.damaged", path=file, detail=error) from error


@dataclass(frozen=True, slots=True)
class Settings:
    """What the bytes depend on besides the shape; the values mean what they mean in cllm.toml."""

    row_tokens: int = 2048
    quantize: str = "none"
    precision: str = "bf16"
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    checkpoint_layers: int = -1
    chunk_bytes: int = 128 * MIB
    device: str = "cuda"
    head: str = "16bit"
    optimizer: str = "adamw"
    offload_inputs: bool = False
    stream_layers: int = 0
    mlp_tile_tokens: int = 0
    embedding: str = "auto"
    dropout: bool = False
    dora: bool = False

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        memory: MemoryConfig,
        adapter: AdapterShape,
        *,
        row_tokens: int,
        precision: str,
        device: str,
        optimizer: str = "adamw",
    ) -> Settings:
        """What a config's sections come to; precision and device as they were resolved."""
        return cls(
            row_tokens,
            model.quantize,
            precision,
            adapter.rank,
            adapter.targets,
            checkpoint_layers=memory.checkpoint_layers,
            chunk_bytes=memory.chunk_mib * MIB,
            device=device,
            head=model.head,
            optimizer=optimizer,
            offload_inputs=memory.offload_inputs,
            stream_layers=memory.stream_layers,
            mlp_tile_tokens=memory.mlp_tile_tokens,
            embedding=memory.embedding,
            dropout=adapter.dropout > 0,
            dora=adapter.dora,
        )

    @property
    def fused(self) -> bool:
        """Whether LoRA linears and gated MLPs run as the autograd functions of cllm.model.lora."""
        return not (self.dropout or self.dora)

    def adapts(self, name: str) -> bool:
        """Whether a linear called `name` gets an adapter; of a dotted name or a glob the last part
        decides: rather too many than none.
        """
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        return self.targets == "all-linear" or any(
            fnmatchcase(name, "*" + target.rpartition(".")[2]) for target in targets
        )

    @property
    def width(self) -> int:
        """Bytes of a number of the base and of what is computed."""
        return 4 if self.precision == "fp32" else 2

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream, which fp16 keeps in float32."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True, slots=True)
class VramEstimate:
    """Bytes by item at the peak; `moment` says which one that is: "loss", "kept_layer" or
    "recomputed_layer".
    """

    items: dict[str, int]
    moment: str
    host: int = 0
    """Bytes in host memory instead: streamed layers, the embedding, offloaded layer inputs."""

    @property
    def total(self) -> int:
        """Bytes on the device, CUDA context and fragmentation included."""
        return sum(self.items.values())

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` should show: all but context and fragmentation."""
        return self.total - self.items["context"] - self.items["fragmentation"]

    def table(self) -> str:
        """One line per item in MiB, and the total."""
        mebibytes = {
            name: f"{size / MIB:>10,.1f}"
            for name, size in {**self.items, "total": self.total}.items()
        }
        return say("memory.table", **mebibytes, moment=self.moment)


def streamed_layers(layers: int, count: int) -> list[int]:
    """Which `count` of `layers` are streamed: spread evenly, so that a copy hides behind as many
    resident layers as there are.
    """
    count = min(count, layers)
    return [(2 * i + 1) * layers // (2 * count) for i in range(count)]


def _recomputed(shape: Shape, s: Settings) -> set[int]:
    """Indices of the layers recomputed in the backward: the first `checkpoint_layers`, and those
    that are streamed.
    """
    first = range(shape.layers)[: shape.layers if s.checkpoint_layers < 0 else s.checkpoint_layers]
    return {*first, *streamed_layers(shape.layers, s.stream_layers)}


def conversion_bytes(shape: Shape) -> int:
    """Anonymous host memory that `tools/convert.py` (or loading) needs of a 16-bit original beyond
    its imports: the largest tensor as it is stored, where q, k and v or gate and up may be one, and
    what a streamed write takes (bench/results/convert_memory.json).
    """
    heads, fused = (
        (shape.heads + 2 * shape.kv_heads) * shape.head_dim,
        2 * shape.intermediate if shape.fused_mlp else shape.intermediate,
    )
    return 2 * shape.hidden * max(shape.vocab, heads, fused) + CONVERSION_BYTES


def nf4_parts(weights: int) -> tuple[int, ...]:
    """Bytes of the tensors of an NF4 weight: 4 bits a value; an 8-bit scale per 64 values; a float
    per 256 of those, and their mean.
    """
    blocks = -(-weights // 64)
    return -(-weights // 2), blocks, 4 * (-(-blocks // 256) + 1)


def _quantized(shape: Shape, s: Settings) -> bool:
    return s.quantize == "nf4" and shape.gated


def _stored(shape: Shape, s: Settings, weights: int) -> tuple[int, ...]:
    """Bytes of the tensors that hold so many weights of a linear."""
    return nf4_parts(weights) if _quantized(shape, s) else (weights * s.width,)


def _moment_bytes(s: Settings, count: int) -> int:
    """AdamW's two moments of a parameter of `count` values. bitsandbytes' 8 bits are blocks of 256
    with a float each; it keeps fewer than 4,096 values in float32.
    """
    exact = s.optimizer == "adamw" or count < 4096
    return 8 * count if exact else 2 * (count + 4 * -(-count // 256))


def estimate_vram(shape: Shape, settings: Settings) -> VramEstimate:
    """Bytes at the peak of a training step on rows of `row_tokens` tokens, all of them
    supervised.
    """
    s, linears, matrix = settings, shape.linears(), shape.vocab * shape.hidden
    nf4, cuda = _quantized(shape, s), s.device.startswith("cuda")
    kinds = (
        (shape.layers - shape.recurrent, linears),
        (shape.recurrent, shape.linears(recurrent=True)),
    )
    every = [(count, name, *size) for count, kind in kinds for name, size in kind.items()]
    weights, streamed = (
        sum(count * sum(_stored(shape, s, i * o)) for count, _, i, o in every),
        min(s.stream_layers, shape.layers),
    )
    # A streamed layer's tensors are aligned in one buffer.
    packed = sum(
        -(-size // 256) * 256 for i, o in linears.values() for size in _stored(shape, s, i * o)
    )
    adapted = [(count, i, o) for count, name, i, o in every if s.adapts(name)]
    lora = 4 * s.rank * sum(count * (i + o) for count, i, o in adapted)
    recomputed = len(_recomputed(shape, s))
    offloaded = recomputed if s.offload_inputs else 0
    shared = shape.tied and s.head == "16bit"
    away = s.embedding == "cpu" or (s.embedding == "auto" and cuda and nf4 and not shared)
    layer_input = s.row_tokens * shape.hidden * s.residual
    moments = _moments(shape, s, [size for name, size in linears.items() if s.adapts(name)])
    moment = max(moments, key=lambda name: moments[name])
    items = {
        "linears": weights * (shape.layers - streamed) // shape.layers + min(2, streamed) * packed,
        "embedding": ((0 if away else matrix) + shape.positions * shape.hidden) * s.width,
        "head": _head_bytes(shape, s, away),
        "norms": shape.unquantized() * s.width,
        "lora": lora,
        "gradients": lora,
        "optimizer": sum(
            count * (_moment_bytes(s, i * s.rank) + _moment_bytes(s, o * s.rank))
            for count, i, o in adapted
        ),
        "layer_inputs": (recomputed - offloaded + min(2, offloaded)) * layer_input,
        "activations": moments[moment],
        "context": CONTEXT_BYTES if cuda else 0,
        "fragmentation": FRAGMENTATION_BYTES if cuda else 0,
    }
    return VramEstimate(
        items, moment, streamed * packed + away * matrix * s.width + offloaded * layer_input
    )


def _head_bytes(shape: Shape, s: Settings, away: bool) -> int:
    """The output head's own: of a tied one none, unless the embedding waits in host memory."""
    matrix = shape.vocab * shape.hidden
    dense = (away if shape.tied else 1) * matrix * s.width
    return matrix + 4 * shape.vocab if s.head == "int8" else dense


def _moments(shape: Shape, s: Settings, adapted: list[tuple[int, int]]) -> dict[str, int]:
    """Moment -> bytes alive then beyond parameters, their gradients and the recomputed layers'
    inputs.
    """
    hidden, mlp = s.row_tokens * shape.hidden, s.row_tokens * shape.intermediate * s.width
    before_mlp, in_mlp, product = _kept(shape, s, adapted)
    tiled = 0 < s.mlp_tile_tokens < s.row_tokens
    if tiled:  # of the MLP one tile lives at a time, beside the gradients of the tiles' inputs
        mlp, in_mlp, product = (
            size * s.mlp_tile_tokens // s.row_tokens for size in (mlp, in_mlp, product)
        )
    # the float32 copy stands for it in bf16
    own_input = 0 if shape.gated and s.residual < 4 else s.residual * hidden
    recomputed, layer = (
        _recomputed(shape, s),
        before_mlp + (0 if tiled else in_mlp + product) + own_input,
    )
    kept = (shape.layers - len(recomputed)) * layer
    # the embedding needs no gradient, so the first norm keeps nothing
    kept -= 0 if recomputed else 4 * hidden
    moments = {"loss": kept + 4 * hidden + max(_loss(shape, s), 20 * hidden * shape.gated)}
    # Backward of the MLP's last linear: gradients of gate and up with pieces of the product (plain
    # autograd: a third of their size), or its input's with the dequantized weight. Of its first:
    # gradients of gate and up, and the weight. Of a norm behind the MLP: five float32 temporaries
    # while all of the layer is still there.
    dense = shape.hidden * shape.intermediate * s.width if _quantized(shape, s) else 0
    last = (
        2 * mlp + max(dense, mlp)
        if product
        else max(mlp + dense, 2 * mlp + 3 * min(mlp, _PIECE * s.width))
    )
    first = 2 * mlp + dense * (1 + shape.fused_mlp) + 2 * s.width * hidden // (1 + tiled) - in_mlp
    gradient = (s.residual + s.width * tiled) * hidden + max(
        last, first, product + 20 * hidden if shape.norms > 2 else 0
    )
    # Gradients on both sides of a dropout; of DoRA's result, update and their factor.
    gradient += (2 * s.dropout + 3 * s.dora) * mlp
    # the norm before the MLP, when that is done
    gradient = max(gradient, s.residual * hidden + 20 * hidden * shape.gated - in_mlp)
    if len(recomputed) < shape.layers:
        moments["kept_layer"] = kept - (0 if tiled else product) + tiled * in_mlp + gradient
    if recomputed:
        # kept layers below the uppermost recomputed one
        below = max(recomputed) + 1 - len(recomputed)
        moments["recomputed_layer"] = (
            below * layer + before_mlp + in_mlp + s.residual * hidden + gradient
        )
    return moments


def _loss(shape: Shape, s: Settings) -> int:
    """The last norm's output, the supervised part of that and its gradient, the chunk of logits and
    float32 pieces of it; or, with a quantized head, two dense tiles of that and a sum of products
    in float32.
    """
    rows = max(1, min(s.row_tokens, s.chunk_bytes // (s.width * shape.vocab)))
    block = max(1, min(rows, _LOSS_FP32_BYTES // (4 * shape.vocab)))
    pieces, following = (
        (0, 0)
        if s.width == 4
        else (4 * shape.vocab * block, 4 * shape.vocab * min(block, rows - block))
    )
    matrix = shape.vocab * shape.hidden
    tiles = 0
    if s.head == "int8":
        tiles = min(matrix, 2 * _HEAD_TILE) * s.width + 8 * rows * shape.hidden
        tiles += 4 * min(matrix, _INT8_PIECE)
    # a piece is made before the last one goes
    logits = rows * s.width * (shape.vocab + shape.hidden) + pieces + max(following, tiles)
    return 3 * s.residual * s.row_tokens * shape.hidden + logits


def _kept(shape: Shape, s: Settings, adapted: list[tuple[int, int]]) -> tuple[int, int, int]:
    """Bytes that autograd keeps of one layer: up to the MLP, in it, and its last product, freed
    early in the backward.
    """
    hidden, q, kv = (
        s.row_tokens * shape.hidden,
        s.row_tokens * shape.heads * shape.head_dim,
        s.row_tokens * shape.kv_heads * shape.head_dim,
    )
    # An RMS norm keeps a float32 copy of its input, if that is not float32 anyway; LayerNorm keeps
    # the input as it is.
    norms = (
        (4 * hidden if s.residual < 4 else 0) + 4 * (shape.norms - 1) * hidden
        if shape.gated
        else s.residual * hidden
    )
    norms += 4 * (q + kv) * shape.qk_norm
    # The norms' outputs, once for q, k, v and once for gate and up; under autocast plain autograd
    # keeps a cast for each linear.
    casts = (
        2 * s.residual
        if s.fused
        else s.width * ((5 - shape.fused_mlp) if s.precision == "fp16" else 2)
    )
    # Query, keys, values and output; where no kernel takes all sequences of a row at once, their
    # outputs are put together, which dropout keeps a copy of instead. Without flash attention a
    # GPU is given as many key heads as query heads.
    cuda = s.device != "cpu"
    flash = cuda and s.precision == "bf16" and not shape.alibi
    keys = q if cuda and not flash else kv
    together = not flash and not s.dropout
    attention = s.width * ((2 + together) * q + 2 * keys) + 4 * s.row_tokens * shape.heads
    # ALiBi rides in eight more channels of each head
    attention += s.width * 4 * 8 * s.row_tokens * shape.heads * shape.alibi
    masks = 0 < shape.window < s.row_tokens
    lora = (
        s.rank
        * s.width
        * (
            s.row_tokens * len(adapted)
            + sum(i + o for i, o in adapted) * (s.width < 4 and not s.fused)
        )
    )
    if s.dropout:
        casts = 0  # each linear keeps the dropped copy of its input instead
    plain_before, plain_mlp, plain_down = _plain(shape, s, adapted)
    wide = s.row_tokens * shape.intermediate * s.width
    lean = s.fused and shape.gated and (shape.intermediate, shape.hidden) in adapted
    # gate, up (and silu); or what GELU's formula keeps
    gates = 2 * wide if lean else (3 if shape.gated else 4) * wide
    # the delta rule in float32 and plain PyTorch, in chunks of 64 with a state each: fitted to
    # storage censuses
    if shape.recurrent:
        _, heads, key_dim, value_dim = shape.mixer
        chunked = 7.6 * key_dim + 9.5 * value_dim + 5.8 * 64 + 2.1 * key_dim * value_dim / 64
        peak = int(4 * s.row_tokens * heads * chunked)
        # beside the MLP's backward, or in its own when the MLP is done
        attention = max(attention, peak * 80 // 100, peak - 2 * gates)
    before = norms + casts * hidden + s.width * masks * s.row_tokens**2 + attention + lora
    return before + plain_before, gates + plain_mlp, plain_down + (0 if lean else wide)


def _plain(shape: Shape, s: Settings, adapted: list[tuple[int, int]]) -> tuple[int, int, int]:
    """What dropout and DoRA keep beside plain LoRA: up to the MLP, in it, and of its last linear.

    Dropout: a dropped copy of each linear's input and a mask, of a byte on a GPU, of a number on
    the CPU; the last linear's dropped input stands for the product. DoRA: the base's result and the
    adapter's update.
    """
    mask = s.dropout * (s.width if s.device == "cpu" else 1)
    copy = s.dropout * s.width + mask
    last = (shape.intermediate, shape.hidden)
    first = [(i, o) for i, o in adapted if o in (shape.intermediate, 2 * shape.intermediate)]
    before = [pair for pair in adapted if pair not in first and pair != last]
    results = 2 * s.width * s.dora

    def kept(linears: list[tuple[int, int]]) -> int:
        return s.row_tokens * sum(i * copy + o * results for i, o in linears)

    down = s.row_tokens * (shape.intermediate * mask + shape.hidden * results)
    return kept(before), kept(first), down * (last in adapted)


class Hardware(NamedTuple):
    """Rates that a roofline needs; the defaults are an 8 GB desktop card's, sustained: nobody's
    measurement.
    """

    flops: float = 30e12
    """16-bit operations per second."""
    bandwidth: float = 250e9
    """Bytes per second of the device's memory."""
    link: float = 12e9
    """Bytes per second between host and device."""


PAPER = Hardware()


def row_flops(shape: Shape, s: Settings) -> float:
    """Operations of one row: 2 per weight and token in the forward, in the gradient of the input
    and where a layer is recomputed; the head twice (its gradient is formed in the forward); causal
    attention half of 4 T^2 per query channel, 2.5 times that in its backward.
    """
    passes = 2 + len(_recomputed(shape, s)) / shape.layers
    weights = sum(i * o for i, o in shape.linears().values())
    attention = (
        2
        * s.row_tokens
        * min(shape.window or s.row_tokens, s.row_tokens)
        * shape.heads
        * shape.head_dim
        * (passes + 1.5)
    )
    # one more forward
    tiled = (
        shape.layers
        * 3
        * shape.hidden
        * shape.intermediate
        * (0 < s.mlp_tile_tokens < s.row_tokens)
    )
    head = (4 if s.head == "16bit" else 6) * shape.vocab * shape.hidden
    return shape.layers * attention + s.row_tokens * (
        2 * passes * shape.layers * weights + 2 * tiled + head
    )


def crossing_bytes(shape: Shape, s: Settings) -> int:
    """What crosses between host and device per row: streamed weights and offloaded layer inputs
    twice, embedding rows not counted.
    """
    resident = estimate_vram(shape, replace(s, stream_layers=0, offload_inputs=False))
    return 2 * (estimate_vram(shape, s).host - resident.host)


def row_seconds(shape: Shape, s: Settings, hardware: Hardware = PAPER) -> float:
    """Roofline estimate of one row: operations at full rate, then bytes that are only moved; no
    launch overhead.

    NF4 weights are read, and written and read again in 16 bits, in every pass; what autograd keeps
    of a layer is written and read. What waits in host memory crosses the link twice, hidden behind
    the computation as far as that lasts.
    """
    linears = list(shape.linears().values())
    weights = sum(i * o for i, o in linears)
    stored = sum(_stored(shape, s, weights)) + 2 * s.width * weights * _quantized(shape, s)
    moved = (2 * shape.layers + len(_recomputed(shape, s))) * (
        stored + 2 * sum(_kept(shape, s, linears))
    )
    computed = (
        row_flops(shape, s) / hardware.flops * (1 if s.width == 2 else 2)
        + moved / hardware.bandwidth
    )
    return max(computed, crossing_bytes(shape, s) / hardware.link)


class Step(NamedTuple):
    """One rung of the ladder, on top of those before."""

    change: str
    """`section.key=value`, as the command line takes it."""
    settings: Settings
    total: int
    slowdown: float
    """Estimated seconds per token over those of the settings asked for."""


class Plan(NamedTuple):
    """How settings stand to a budget."""

    estimate: VramEstimate
    fits: bool
    longest_row: int
    """Tokens of the longest row that fits with these settings; 0: none."""
    checkpoint_layers: int
    """The fewest recomputed layers that fit (fewer is faster); -1: none do."""
    settings: Settings
    """As asked for, -1 layers replaced by these fewest."""
    ladder: list[Step]
    """If it does not fit: what would help, cheapest first."""


def make_plan(shape: Shape, settings: Settings, budget_gib: float) -> Plan:
    """Fit `settings` into `budget_gib` GiB (1024^3 bytes; context and fragmentation count)."""
    budget = int(budget_gib * GIB)

    def fits(**changes: Any) -> bool:
        return estimate_vram(shape, replace(settings, **changes)).total <= budget

    def longest(low: int, high: int) -> int:
        """Of the rows of (low, high] steps, whose totals grow, the longest that fits; 0: none."""
        found = 0
        while low < high:
            middle = (low + high + 1) // 2
            found, low, high = (
                (middle, middle, high)
                if fits(row_tokens=middle * ROW_STEP)
                else (found, low, middle - 1)
            )
        return found

    # from there on rows are cut in tiles, and need less again
    tile = settings.mlp_tile_tokens // ROW_STEP
    row = ROW_STEP * (longest(tile, 2**20 // ROW_STEP) or longest(0, tile))
    fewest = next((count for count in range(shape.layers + 1) if fits(checkpoint_layers=count)), -1)
    chosen = (
        settings if settings.checkpoint_layers >= 0 else replace(settings, checkpoint_layers=fewest)
    )
    return Plan(
        estimate_vram(shape, settings),
        fits(),
        row,
        fewest,
        chosen,
        list(_ladder(shape, settings, budget)),
    )


def savings(shape: Shape, settings: Settings, budget: int) -> Iterator[Step]:
    """`settings` as they are, then every change that saves bytes, cheapest first, each on top of
    those before.
    """
    counts = range(3, shape.layers + 1)  # of streamed layers; two slots hold two anyway

    def stream(old: Settings) -> dict[str, int]:
        fitting = (
            n for n in counts if estimate_vram(shape, replace(old, stream_layers=n)).total <= budget
        )
        return {"stream_layers": next(fitting, shape.layers) if total > budget else shape.layers}

    changes: list[tuple[str, Any]] = [
        ("memory.embedding=cpu", {"embedding": "cpu"}), ("train.optimizer=adamw8bit", {"optimizer": "adamw8bit"}),
        ("memory.checkpoint_layers=-1", {"checkpoint_layers": -1}), ("memory.offload_inputs=true", {"offload_inputs": True}),
        ("model.quantize=nf4", {"quantize": "nf4"}), ("memory.chunk_mib=32", {"chunk_bytes": 32 * MIB}),
        ("memory.mlp_tile_tokens=1024", {"mlp_tile_tokens": 1024}), ("memory.stream_layers={}", stream),
        ("model.head=int8", {"head": "int8"}), ("lora.rank=8", {"rank": 8}),
    ]  # fmt: skip
    total, pace = estimate_vram(shape, settings).total, row_seconds(shape, settings)
    yield Step("", settings, total, 1.0)
    for change, found in changes:
        values = found(settings) if callable(found) else found
        changed = replace(settings, **values)
        if (new := estimate_vram(shape, changed).total) < total:
            settings, total = changed, new
            yield Step(
                change.format(*values.values()),
                settings,
                total,
                row_seconds(shape, settings) / pace,
            )


def _ladder(shape: Shape, settings: Settings, budget: int) -> Iterator[Step]:
    """As many savings as it takes to fit (none, if it does), then shorter rows."""
    pace = row_seconds(shape, settings) / settings.row_tokens
    for step in savings(shape, settings, budget):
        if step.change:
            yield step
        if step.total <= budget:
            return
    for tokens in (n for n in (4096, 2048, 1024, 512, 256) if n < settings.row_tokens):
        shorter = replace(step.settings, row_tokens=tokens)
        total = estimate_vram(shape, shorter).total
        yield Step(
            f"train.row_tokens={tokens}",
            shorter,
            total,
            row_seconds(shape, shorter) / tokens / pace,
        )
        if total <= budget:
            return


def fit(shape: Shape, settings: Settings, budget: int) -> Settings:
    """`settings` with -1 layers replaced by the fewest recomputed ones that fit `budget` bytes.

    Raises UserError, with the settings that would fit, if these do not.
    """
    plan = make_plan(shape, settings, budget / GIB)
    if plan.fits:
        return plan.settings
    values = {
        "name": shape.name,
        "need": f"{plan.estimate.total / GIB:.2f}",
        "budget": f"{budget / GIB:.2f}",
    }
    least = plan.ladder[-1].total if plan.ladder else plan.estimate.total
    if least > budget:
        raise UserError("memory.hopeless", least=f"{least / GIB:.2f}", **values)
    changes = " ".join(
        {step.change.partition("=")[0]: step.change for step in plan.ladder}.values()
    )
    raise UserError(
        "memory.too_big",
        changes=changes,
        total=f"{least / GIB:.2f}",
        longest=plan.longest_row,
        **values,
    )


def _known_shape(original: Mapping[str, Any], name: str) -> Shape | None:
    """`shape_of`, or None and a line about it for an architecture that is not known here."""
    try:
        return shape_of(original, name)
    except UserError as error:
        note("memory.unplanned", reason=error.args[0])
        return None


def plan_training(
    original: Mapping[str, Any], name: str, settings: Settings, budget: int
) -> tuple[Settings, VramEstimate | None]:
    """What a training is to use: `fit` with a line about it; no estimate without a budget, or for
    an architecture without a known shape.
    """
    shape = _known_shape(original, name) if budget else None
    if shape is None:
        return settings, None
    settings = fit(shape, settings, budget)
    estimate = estimate_vram(shape, settings)
    note(
        "memory.plan",
        total=f"{estimate.total / GIB:.2f}",
        budget=f"{budget / GIB:.2f}",
        row=settings.row_tokens,
        recomputed=len(_recomputed(shape, settings)),
        layers=shape.layers,
    )
    return settings, estimate


def estimate_answering(shape: Shape, settings: Settings) -> VramEstimate:
    """Bytes while prompts of `row_tokens` tokens are read without gradients, before any cache: the
    weights as in training, an adapter without gradients or moments, one layer's activations.
    """
    trained = estimate_vram(shape, settings)
    tokens = settings.row_tokens
    kv_heads = 2 * shape.kv_heads + 2 * shape.heads
    layer = settings.width * tokens * max(3 * shape.intermediate, kv_heads * shape.head_dim)
    stream = tokens * shape.hidden * (2 * settings.residual + 8)  # a norm computes in float32
    mask = tokens**2 * (1 + settings.width)
    dense = settings.width * shape.hidden * shape.intermediate * _quantized(shape, settings)
    items = {
        **trained.items,
        "gradients": 0,
        "optimizer": 0,
        "layer_inputs": 0,
        "activations": layer + stream + mask + dense,
    }
    return VramEstimate(items, "answering", trained.host)


def plan_answering(
    original: Mapping[str, Any], name: str, settings: Settings, budget: int
) -> tuple[Settings, VramEstimate | None]:
    """How a model is to be held for answering: with as few more streamed layers as fit `budget`
    bytes beside a prefill of `row_tokens` tokens and its keys and values; said in a line.

    No estimate without a budget, or for an architecture without a known shape.
    """
    shape = _known_shape(original, name) if budget else None
    if shape is None:
        return settings, None
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * settings.width
    room = budget - token * settings.row_tokens
    counts = [settings.stream_layers, *range(3, shape.layers + 1)]
    options = [replace(settings, stream_layers=n) for n in counts if n >= settings.stream_layers]
    fitting = (s for s in options if estimate_answering(shape, s).total <= room)
    settings = next(fitting, options[-1])
    estimate = estimate_answering(shape, settings)
    note(
        "memory.answering",
        weights=f"{(estimate.allocated - estimate.items['activations']) / GIB:.2f}",
        prefill=f"{estimate.items['activations'] / GIB:.2f}",
        row=settings.row_tokens,
        cache=f"{max(0, budget - estimate.total) / GIB:.2f}",
        tokens=f"{max(0, budget - estimate.total) // token:,}",
        budget=f"{budget / GIB:.2f}",
        streamed=min(settings.stream_layers, shape.layers),
        layers=shape.layers,
    )
    return settings, estimate
