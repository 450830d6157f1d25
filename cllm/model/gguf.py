"""GGUF files: the header read in one pass over plain bytes, and a whole file written tensor by
tensor.

Transformers' `gguf_file=` gives the same weights and ids, but holds the whole model in float32:
3.3 GB and 45 s for Gemma 3 270M (bench/gguf_parity.py) where reading tensor by tensor takes 1.5 GB
and 9 s, so an 8B file would need over 32 GB. The `gguf` package's reader makes numpy views of every
vocabulary entry (20 s and 700 MB for 262,000 tokens) where a string array is read in one sweep
here.

Writing, tensor names, quantization and dequantization are the `gguf` package's. Format: ggml's
docs/gguf.md, versions 2 and 3; conventions as in llama.cpp's converter.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from cllm.messages import UserError
from cllm.model.families import GGUF, gemma3_layer_types, shape_of

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType
    from torch import Tensor

# value type -> struct code; 8 is a string, 9 an array
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}


class TensorInfo(NamedTuple):
    """What the header says of a tensor."""

    shape: tuple[int, ...]
    """In PyTorch's order."""
    ggml_type: int
    offset: int
    """Of its first byte in the file."""


class Header(NamedTuple):
    """Metadata (key -> Python value) and tensors (name -> TensorInfo) of one file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Parse the header of `path`. Raises UserError if it is no GGUF file of version 2 or 3, or is
    cut within its header.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError("model.no_gguf", path=path)
        try:
            version, tensor_count, key_count = struct.unpack("<IQQ", file.read(20))
            if version not in (2, 3):
                detail = f"GGUF version {version}, not 2 or 3"
                raise UserError("model.damaged", path=path, detail=detail)
            metadata = {_string(file): _value(file, *_unpack(file, "I")) for _ in range(key_count)}
            relative = {_string(file): _tensor_info(file) for _ in range(tensor_count)}
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError) as error:
            raise UserError("model.truncated", path=path, tensor="(header)") from error
        alignment = metadata.get("general.alignment", 32)
        start = -(-file.tell() // alignment) * alignment
    tensors = {name: info._replace(offset=start + info.offset) for name, info in relative.items()}
    return Header(metadata, tensors)


def _tensor_info(file: BinaryIO) -> TensorInfo:
    """The next tensor's, its offset counted from where the data start."""
    (dimensions,) = _unpack(file, "I")
    shape = _unpack(file, "Q" * dimensions)
    return TensorInfo(shape[::-1], *_unpack(file, "IQ"))


def _unpack(file: BinaryIO, codes: str) -> tuple[Any, ...]:
    layout = "<" + codes
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    raw = file.read(length)
    if len(raw) < length:
        raise struct.error("string is cut")
    return raw.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _string(file)
    if kind == 9:
        item, count = _unpack(file, "IQ")
        if item in _SCALARS:
            return list(_unpack(file, f"{count}{_SCALARS[item]}"))
        return [_value(file, item) for _ in range(count)]
    return _unpack(file, _SCALARS[kind])[0]


# --- Writing
# general.file_type of what the package can quantize; k-quants need llama.cpp
TYPES = {"f32": 0, "bf16": 32, "f16": 1, "q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
_SLICE = 2**22  # weights converted at a time


def architecture(config: Any) -> str:
    """llama.cpp's name for a native config. Raises UserError for classes and settings that it would
    compute differently.
    """
    native = (config.architectures or ["?"])[0]
    name = next((name for name, family in GGUF.items() if family.architecture == native), "")
    rope = getattr(config, "rope_parameters", None) or {}
    # one dictionary, or one of each kind of layer
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    wrong = [str(kind) for kind in kinds if kind not in (None, "default", "linear", "dynamic")]
    if name == "gemma3" and config.layer_types != gemma3_layer_types(config.num_hidden_layers):
        wrong.append("layer_types")
    if wrong or not name:
        detail = ", ".join(wrong) or "-"
        raise UserError("export.gguf", architecture=native, detail=detail, known=", ".join(GGUF))
    return name


def _shape(config: Any, arch: str) -> dict[str, Any]:
    """The model's keys. Dynamic rotary scaling is left out: it acts beyond the trained length
    only.
    """
    heads, kv_heads, head_dim = shape_of(config)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }
    if rope.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if arch == "gemma3":
        keys["attention.sliding_window"] = config.sliding_window
    return {f"{arch}.{key}": value for key, value in keys.items()}


def _for_llama_cpp(name: str, tensor: Tensor, config: Any, arch: str) -> Tensor:
    """What llama.cpp expects: rotary pairs of Llama side by side (the reverse of `unpermute_q`),
    Gemma's norms as 1 + w.
    """
    if arch == "gemma3" and name.endswith("norm.weight"):
        return tensor.float() + 1.0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = name.split(".")[-2]
    if arch != "llama" or module not in heads:
        return tensor
    halves = tensor.reshape(heads[module], 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _encoded(
    tensor: Tensor, kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """The bytes of `tensor` as ggml stores `kind`, converted a slice of rows at a time."""
    import numpy as np
    from gguf import quantize

    rows = tensor.reshape(-1, tensor.shape[-1])
    encoded = np.empty((len(rows), shape[-1]), np.uint8)
    step = max(1, _SLICE // tensor.shape[-1])
    for start in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[start : start + step].float().numpy())
        encoded[start : start + step] = quantize(block, kind).view(np.uint8)
    return encoded.reshape(shape)


class Placed(NamedTuple):
    """How one tensor is stored."""

    ggml_name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Of its bytes."""


def place(config: Any, layout: Mapping[str, Any], kind: str) -> dict[str, Placed]:
    """Native name -> how it is stored in a file of `kind`, one of `TYPES`, in `layout`'s order.

    As llama.cpp's quantizer does: vectors stay float32, rows that a block of 32 does not divide
    become f16, and in a file of 4 or 5 bits the output head, or the embedding that is tied to it,
    has more: q8_0 here, where llama.cpp takes q6_K, which the package cannot write. Raises
    UserError for a model that llama.cpp does not know.
    """
    from gguf import (
        GGML_QUANT_SIZES,
        MODEL_ARCH_NAMES,
        GGMLQuantizationType,
        get_tensor_name_map,
        quant_shape_to_byte_shape,
    )

    arch = architecture(config)
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    placed = {}
    for name, (dims, _) in layout.items():
        if tied and name == "lm_head.weight":
            continue
        stored = GGMLQuantizationType[kind.upper()] if len(dims) > 1 else GGMLQuantizationType.F32
        if name == head and kind.startswith(("q4", "q5")):
            stored = GGMLQuantizationType.Q8_0
        if dims[-1] % GGML_QUANT_SIZES[stored][0]:
            stored = GGMLQuantizationType.F16
        ggml_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ggml_name is None:
            raise UserError("export.gguf", architecture=arch, detail=name, known=", ".join(GGUF))
        placed[name] = Placed(ggml_name, stored, tuple(quant_shape_to_byte_shape(dims, stored)))
    return placed


def write_gguf(
    path: Path,
    config: Any,
    placed: Mapping[str, Placed],
    tensors: Iterable[tuple[str, Tensor]],
    kind: str,
    tokenizer: Mapping[str, Any],
) -> None:
    """Write native (name, tensor) pairs, in the order of `placed` (`place` of the same `kind`), and
    the `tokenizer.` keys (`cllm.model.tokenizer.Tokenizer.to_gguf`).
    """
    import numpy as np
    from gguf import GGUFWriter

    arch = architecture(config)
    writer = GGUFWriter(path, arch)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    keys = {"general.file_type": TYPES[kind], "general.quantization_version": 2}
    keys |= {f"tokenizer.{key}": value for key, value in tokenizer.items()}
    for key, value in (_shape(config, arch) | keys).items():
        adders[type(value)](key, value)
    for name, stored, shape in placed.values():
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors:
            if name in placed:
                _, stored, shape = placed[name]
                expected = _for_llama_cpp(name, tensor, config, arch)
                writer.write_tensor_data(_encoded(expected, stored, shape))
            del tensor  # before the next one is read
    finally:
        writer.close()
