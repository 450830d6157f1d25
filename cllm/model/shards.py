"""Weight files as tensors that are read one at a time: safetensors, PyTorch's zip `.bin`, GGUF. No
code in a file is run.

Shapes are known before any data is read, so that a whole checkpoint is checked first; then each
`read()` returns one tensor, and nothing of the file stays mapped once that is gone.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cllm.messages import UserError, read_json, to_json
from cllm.model import gguf

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_DEQUANTIZE_ELEMENTS = 2**22
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape, dtype


class Stored(NamedTuple):
    """One tensor of a weight file, not yet read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class WeightFiles(NamedTuple):
    """Where a checkpoint's tensors are stored."""

    files: list[Path]
    weight_map: Mapping[str, str]
    """Name of a tensor -> the file that it is read from; one without an entry: any file."""

    def stored(self) -> Iterator[Stored]:
        """All tensors, file by file; an earlier file is closed before the next is opened."""
        for file in self.files:
            for tensor in stored_tensors(file):
                if self.weight_map.get(tensor.name, file.name) == file.name:
                    yield tensor


def weight_files(path: Path) -> WeightFiles:
    """The weight files of a checkpoint directory (or the one `.gguf` file itself), safetensors
    before `.bin`, a whole file (as Transformers does) before shards, which need no index.

    Raises UserError if there is none, an index names anything but plain file names, or shards are
    missing (all listed).
    """
    if path.is_file():
        return WeightFiles([path], {})
    error = UserError("model.no_weights", path=path)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole = path / f"{stem}.{suffix}"
        if whole.is_file():
            return WeightFiles([whole], {})
        index = path / f"{whole.name}.index.json"
        weight_map = _weight_map(index) if index.is_file() else {}
        names = sorted(set(weight_map.values())) or _numbered(path, stem, suffix)
        missing = [name for name in names if not (path / name).is_file()]
        if names and not missing:
            return WeightFiles([path / name for name in names], weight_map)
        if missing:
            error = UserError("model.shard_missing", path=path, names=", ".join(missing))
    raise error


def _numbered(path: Path, stem: str, suffix: str) -> list[str]:
    """The names of all shards of which at least one is there."""
    pattern = re.compile(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{suffix}")
    totals = {match[1] for file in path.glob("*") if (match := pattern.fullmatch(file.name))}
    return [
        f"{stem}-{number:05}-of-{total}.{suffix}"
        for total in sorted(totals)
        for number in range(1, int(total) + 1)
    ]


def write_json(path: Path, value: object) -> None:
    """Write what `read_json` reads, for people too."""
    path.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError("model.damaged", path=index, detail="no shard index")
    if wrong := [name for name in weight_map.values() if not _is_plain(name)]:
        raise UserError("model.shard_name", path=index, names=", ".join(map(repr, wrong)))
    return weight_map


def _is_plain(name: object) -> bool:
    """A file name without any directory, drive or parent part, on every system."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return PurePosixPath(name).name == name and PureWindowsPath(name).name == name


def stored_tensors(file: Path) -> Iterator[Stored]:
    """The tensors of one weight file in the order of the file. Raises UserError if the file is cut,
    old, or carries code.
    """
    if file.suffix == ".safetensors":
        return _safetensors(file)
    return _gguf(file) if file.suffix == ".gguf" else _zip_pickle(file)


def _safetensors(file: Path) -> Iterator[Stored]:
    try:
        # Opened once, as every opening reads the whole header.
        opened: Any = safe_open(file, "pt")
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
        stored = [(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except SafetensorError as error:
        raise UserError("model.damaged", path=file, detail=error) from error
    for name, shape, kind in stored:
        _refuse_packed(file, name, kind, DTYPES)
        yield Stored(name, shape, DTYPES[kind], partial(opened.get_tensor, name))


def _refuse_packed(file: Path, name: str, dtype: object, known: Iterable[object]) -> None:
    """float8, and what is packed into unsigned integers, mean nothing without their scales."""
    if dtype not in known and re.match("F[468]|U|torch", str(dtype)):
        kind = re.sub("F8|torch.float8", "fp8", str(dtype))
        raise UserError("model.quantized", path=file, method=f"{name}: {kind}")


def finite(tensor: Tensor, file: Path, name: str) -> Tensor:
    """The tensor. Raises UserError if it holds NaN or an infinity; `aminmax` passes on both, reads
    once and needs no memory.
    """
    floating = tensor.is_floating_point() and tensor.numel()
    if floating and not all(map(math.isfinite, tensor.aminmax())):
        raise UserError("model.not_finite", path=file, tensor=name)
    return tensor


def _zip_pickle(file: Path) -> Iterator[Stored]:
    """`torch.load` with weights_only (its unpickler knows tensors, not code) and mmap (nothing is
    read but the pickle).
    """
    with file.open("rb") as data:
        if data.read(4) != b"PK\x03\x04":
            raise UserError("model.bin_old", path=file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError("model.bin_code", path=file) from error
    except (RuntimeError, OSError) as error:
        raise UserError("model.truncated", path=file, tensor=_first_indexed(file)) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, Tensor) for tensor in tensors.values()
    ):
        raise UserError("model.damaged", path=file, detail="no dictionary of tensors")
    for name, tensor in tensors.items():
        _refuse_packed(file, name, tensor.dtype, DTYPES.values())
        yield Stored(name, tuple(tensor.shape), tensor.dtype, tensor.clone)


def _first_indexed(file: Path) -> str:
    """A zip's directory stands at its end, so a cut one loses every tensor: the first that the
    index puts into this file.
    """
    index = file.parent / "pytorch_model.bin.index.json"
    names: Mapping[str, str] = read_json(index)["weight_map"] if index.is_file() else {}
    return next((name for name, shard in names.items() if shard == file.name), "(zip directory)")


def _gguf(file: Path) -> Iterator[Stored]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = file.stat().st_size
    for name, (shape, ggml_type, offset) in gguf.read_header(file).tensors.items():
        try:
            kind = GGMLQuantizationType(ggml_type)
            block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        except ValueError as error:
            raise UserError("model.damaged", path=file, detail=f"{name}: {error}") from error
        row_bytes = shape[-1] // block_elements * block_bytes
        if offset + torch.Size(shape[:-1]).numel() * row_bytes > size:
            raise UserError("model.truncated", path=file, tensor=name)
        yield Stored(
            name, shape, torch.float32, partial(_dequantized, file, offset, shape, kind, row_bytes)
        )


def _dequantized(
    file: Path, offset: int, shape: tuple[int, ...], kind: GGMLQuantizationType, row_bytes: int
) -> Tensor:
    import numpy as np
    from gguf import dequantize

    rows, width = torch.Size(shape[:-1]).numel(), shape[-1]
    tensor = torch.empty(rows, width)
    for part in tensor.split(max(1, _DEQUANTIZE_ELEMENTS // width)):
        data = np.fromfile(file, np.uint8, len(part) * row_bytes, offset=offset)
        part.copy_(torch.from_numpy(dequantize(data.reshape(-1, row_bytes), kind)))
        offset += data.nbytes
    return tensor.reshape(shape)


def with_dtype(layout: Layout, dtype: torch.dtype) -> Layout:
    """The layout with this type for all floating-point tensors."""
    return {
        name: (shape, dtype if stored.is_floating_point else stored)
        for name, (shape, stored) in layout.items()
    }


def write_safetensors(path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one safetensors file tensor by tensor: its `layout` is known first, the `tensors` come
    in any order.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in layout.items():
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            if tensor.numel():
                file.write(_bytes(tensor.to(layout[name][1]).contiguous()))
            del tensor  # before the next one is read
        file.truncate(8 + len(text) + end)


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor, as a buffer."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
