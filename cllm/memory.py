"""Bytes of everything that lives on the device while an adapter is trained, from config.json alone:
no torch, no weights.

Describes what `cllm.train` does: a frozen base (NF4 linears, or all of it in 16 or 32 bits),
float32 LoRA with AdamW, decoder layers recomputed in the backward (all, some or none), the loss in
chunks. The peak is the largest of three moments: the loss, the backward through a kept layer, the
backward through a recomputed layer. What autograd keeps of a layer was counted tensor by tensor;
tests/test_memory.py holds the sums against a storage census of real steps, bench/null_gpu.sh
against PyTorch's CUDA allocator. Context and fragmentation are on paper: no card measured them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from cllm.config import LoraConfig, MemoryConfig, ModelConfig
from cllm.messages import UserError, read_json, say
from cllm.shapes import Shape

MIB, GIB = 2**20, 2**30
CONTEXT_BYTES = 450 * MIB  # CUDA context and libraries
WORKSPACE_BYTES = 20 * MIB  # cuBLAS's, which PyTorch's allocator gives it (bench/null_gpu.sh)
FRAGMENTATION_BYTES = 250 * MIB  # at least; or as much as the largest block (bench/null_gpu.sh)
WHOLE_SEGMENTS_BYTES = GIB  # the same where segments cannot grow, as on Windows
SEGMENTS_GROW = sys.platform == "linux"  # where `cllm.__main__.ALLOCATOR` says so
CONVERSION_BYTES = 75_000_000
_LOSS_FP32_BYTES = 16 * MIB  # cllm.learn.loss looks at its chunk in float32, so much at a time
_PIECE = 2**22  # cllm.model.lora makes so many elements of a gated MLP's product at a time
_HEAD_TILE = 2**25  # cllm.learn.loss dequantizes so many weights of a quantized head at a time
_INT8_PIECE = 2**21  # cllm.model.int8 makes so many of them in float32 first


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
            return cls.of_folder(adapter, 0.0)
        if adapter.init_from:
            run = Path(adapter.init_from)
            stored = run / "adapter" if (run / "adapter").is_dir() else run
            return cls.of_folder(stored, adapter.dropout)
        targets = adapter.targets
        names = targets if isinstance(targets, str) else tuple(targets)
        return cls(adapter.rank, names, adapter.dropout, adapter.dora)

    @classmethod
    def of_folder(cls, folder: Path, dropout: float) -> AdapterShape:
        """Of the adapter in a folder, by its adapter_config.json."""
        file = folder / "adapter_config.json"
        try:
            config = read_json(file, "adapter.damaged")
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


def recomputed_layers(shape: Shape, s: Settings) -> set[int]:
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


def is_quantized(shape: Shape, s: Settings) -> bool:
    """Whether the linears are NF4: GPT-2's never are."""
    return s.quantize == "nf4" and shape.gated


def stored_bytes(shape: Shape, s: Settings, weights: int) -> tuple[int, ...]:
    """Bytes of the tensors that hold so many weights of a linear."""
    return nf4_parts(weights) if is_quantized(shape, s) else (weights * s.width,)


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
    nf4, cuda = is_quantized(shape, s), s.device.startswith("cuda")
    kinds = (
        (shape.layers - shape.recurrent, linears),
        (shape.recurrent, shape.linears(recurrent=True)),
    )
    every = [(count, name, *size) for count, kind in kinds for name, size in kind.items()]
    weights, streamed = (
        sum(count * sum(stored_bytes(shape, s, i * o)) for count, _, i, o in every),
        min(s.stream_layers, shape.layers),
    )
    # A streamed layer's tensors are aligned in one buffer.
    packed = sum(
        -(-size // 256) * 256 for i, o in linears.values() for size in stored_bytes(shape, s, i * o)
    )
    adapted = [(count, i, o) for count, name, i, o in every if s.adapts(name)]
    lora = 4 * s.rank * sum(count * (i + o) for count, i, o in adapted)
    recomputed = len(recomputed_layers(shape, s))
    offloaded = recomputed if s.offload_inputs else 0
    shared = shape.tied and s.head == "16bit"
    away = s.embedding == "cpu" or (s.embedding == "auto" and cuda and nf4 and not shared)
    layer_input = s.row_tokens * shape.hidden * s.residual
    moments = _moments(shape, s, [size for name, size in linears.items() if s.adapts(name)])
    moment = max(moments, key=lambda name: moments[name])
    whole = not 0 < s.mlp_tile_tokens < s.row_tokens
    widest = max(4 * shape.hidden, 4 * shape.heads * shape.head_dim)
    block = s.row_tokens * max(widest, whole * s.width * shape.intermediate)
    least = FRAGMENTATION_BYTES if SEGMENTS_GROW else WHOLE_SEGMENTS_BYTES
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
        "workspaces": WORKSPACE_BYTES if cuda else 0,
        "context": CONTEXT_BYTES if cuda else 0,
        "fragmentation": cuda * max(block, least),
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
    before_mlp, in_mlp, product = kept_bytes(shape, s, adapted)
    tiled = 0 < s.mlp_tile_tokens < s.row_tokens
    if tiled:  # of the MLP one tile lives at a time, beside the gradients of the tiles' inputs
        mlp, in_mlp, product = (
            size * s.mlp_tile_tokens // s.row_tokens for size in (mlp, in_mlp, product)
        )
    # the float32 copy stands for it in bf16
    own_input = 0 if shape.gated and s.residual < 4 else s.residual * hidden
    recomputed, layer = (
        recomputed_layers(shape, s),
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
    dense = shape.hidden * shape.intermediate * s.width if is_quantized(shape, s) else 0
    last = (
        2 * mlp + max(dense, mlp)
        if product
        else max(mlp + dense, 2 * mlp + 3 * min(mlp, _PIECE * s.width))
    )
    first = 2 * mlp + dense * (1 + shape.fused_mlp) + 2 * s.width * hidden // (1 + tiled) - in_mlp
    around = (1 + tiled) * s.residual * hidden  # the layer's, and those of the tiles' inputs
    gradient = around + max(last, first, product + 20 * hidden if shape.norms > 2 else 0)
    # Gradients on both sides of a dropout; of DoRA's result, update and their factor.
    gradient += (2 * s.dropout + 3 * s.dora) * mlp
    # the norm before the MLP, when that and its input are done
    norm = 20 * hidden * shape.gated - in_mlp - s.fused * shape.gated * s.residual * hidden
    gradient = max(gradient, s.residual * hidden + norm)
    # The queries' norm, when attention's backward and that of the keys are done.
    if shape.qk_norm:
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        norms = s.row_tokens * ((18 + s.width) * queries - 4 * keys)
        gradient = max(gradient, norms - attention_bytes(shape, s) - in_mlp)
    if len(recomputed) < shape.layers:
        moments["kept_layer"] = kept - (0 if tiled else product) + tiled * in_mlp + gradient
    if recomputed:
        # kept layers below the uppermost recomputed one
        below = max(recomputed) + 1 - len(recomputed)
        # A recomputed MLP's last linear makes its product and its output beside the weight.
        output = s.width * shape.hidden * (s.mlp_tile_tokens if tiled else s.row_tokens)
        again = around + mlp + dense + output
        moments["recomputed_layer"] = below * layer + before_mlp + in_mlp + max(gradient, again)
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


def kept_bytes(shape: Shape, s: Settings, adapted: list[tuple[int, int]]) -> tuple[int, int, int]:
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
    attention = attention_bytes(shape, s)
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


def attention_bytes(shape: Shape, s: Settings) -> int:
    """What autograd keeps of attention: query, keys, values, output and a number a score row.

    Where no kernel takes all sequences of a row at once, their outputs are put together, which
    dropout keeps a copy of instead. Without flash attention a GPU is given as many key heads as
    query heads. GLM, which rotates part of a head, keeps one more query.
    """
    q = s.row_tokens * shape.heads * shape.head_dim
    cuda = s.device != "cpu"
    flash = cuda and s.precision == "bf16" and not shape.alibi
    keys = q if cuda and not flash else s.row_tokens * shape.kv_heads * shape.head_dim
    queries = 2 + (not flash and not s.dropout) + (cuda and shape.fused_mlp)
    return s.width * (queries * q + 2 * keys) + 4 * s.row_tokens * shape.heads


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
    dense = settings.width * shape.hidden * shape.intermediate * is_quantized(shape, settings)
    items = {
        **trained.items,
        "gradients": 0,
        "optimizer": 0,
        "layer_inputs": 0,
        "activations": layer + stream + mask + dense,
    }
    return VramEstimate(items, "answering", trained.host)
