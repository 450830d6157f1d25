"""What was read and tokenized before, kept by content, so that a second start parses and tokenizes
nothing.

An entry is one safetensors file of arrays: nothing in it can run. Its name is the hash of all that
decides what is in it, it carries a checksum, and it is renamed into place when it is whole; an
entry that is missing, cut or altered is made again. Entries stand in `$CLLM_DATA_CACHE`, else
~/.cache/cllm/data ("none", or empty, keeps nothing); the latest used MAX_BYTES stay.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from cllm.messages import note

MAX_BYTES = 4 << 30
STALE_SECONDS = 3600  # no writer takes so long: it was killed, and its file is a piece
_PACKAGE = Path(__file__).parents[1]
# bytes to conversations to ids, and a model to what its step holds
_CODE = ("learn/*.py", "memory.py", "model/*.py", "trace.py", "data/*.py", "assets/t*.toml")
T = TypeVar("T")
Array: TypeAlias = "np.ndarray[Any, Any]"
Arrays: TypeAlias = Mapping[str, Array]
Entry: TypeAlias = tuple[Arrays, Any]
"""Arrays, and facts that JSON can hold."""


class Slices(Sequence[T]):
    """Items that lie one after another in flat arrays, each made when it is asked for: item i is
    `make` of every array's part i.

    starts, ends: (N,) where the parts begin and end. It takes a tenth of the memory of Python
    objects, and is stored as it is.
    """

    def __init__(
        self, make: Callable[..., T], starts: Array, ends: Array, *arrays: Array, key: str = ""
    ) -> None:
        self.make, self.starts, self.ends, self.arrays, self.key = make, starts, ends, arrays, key

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self.starts[index], self.ends[index]
        return self.make(*(array[start:end] for array in self.arrays))

    def pick(self, indices: Array | list[int]) -> Slices[T]:
        """The items at these indices, as lazy as these."""
        return Slices(self.make, self.starts[indices], self.ends[indices], *self.arrays)

    def __add__(self, other: Slices[T]) -> Slices[T]:
        """These items and after them others that are made alike."""
        shift = len(self.arrays[0])
        starts, ends = (
            np.concatenate([own, added + shift])
            for own, added in ((self.starts, other.starts), (self.ends, other.ends))
        )
        both = map(np.concatenate, zip(self.arrays, other.arrays, strict=True))
        return Slices(self.make, starts, ends, *both)

    @property
    def sizes(self) -> list[int]:
        """How long each item's part is."""
        return list((self.ends - self.starts).tolist())

    def digest(self) -> str:
        """A hash of all items."""
        return _hashed(self.starts, self.ends, *self.arrays)


def _hashed(*parts: str | Array | Path) -> str:
    """Of texts, arrays and files' contents; each part's end counts, so that none runs into the
    next.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        elif isinstance(part, str):
            digest.update(part.encode("utf-8", "surrogatepass"))
        else:
            digest.update(np.ascontiguousarray(part).data)
        digest.update(digest.digest())
    return digest.hexdigest()


def key_of(*facts: object, files: Sequence[Path] = (), tokenizer: Any = None) -> str:
    """The name of an entry: the hash of `facts` by their repr, of files by name and content, of a
    tokenizer, and of this package's code.
    """
    with tempfile.TemporaryDirectory() as saved:
        if tokenizer:
            tokenizer.save(Path(saved))  # whatever decides its ids
        parts: list[str | Path] = [repr(facts), _code()]
        for file in sorted(Path(saved).iterdir()):
            parts += [file.name, file]
        for file in files:
            parts += [str(file), file]
        return _hashed(*parts)


@functools.cache
def _code() -> str:
    return _hashed(*(file for pattern in _CODE for file in sorted(_PACKAGE.glob(pattern))))


def recall(key: str, make: Callable[[], Entry]) -> Entry:
    """The entry `key`, made and kept where there is none, or no whole one; an empty key is not
    kept.
    """
    folder = os.environ.get("CLLM_DATA_CACHE", "~/.cache/cllm/data")
    if not key or folder in ("", "none"):
        return make()
    path = Path(folder).expanduser() / f"{key}.safetensors"
    entry = _load(path)
    if entry is None:
        entry = make()
        try:
            _save(path, *entry)
        # a full or read-only disk costs the next start its time, and this one nothing
        except OSError as error:
            note("data.uncached", path=path.parent, cause=error)
    return entry


def _load(path: Path) -> Entry | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        path.touch()
        if arrays.pop("checksum").tobytes().decode() != _hashed(
            *(arrays[name] for name in sorted(arrays))
        ):
            return None
        facts = json.loads(arrays.pop("facts").tobytes())
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return arrays, facts


def _save(path: Path, arrays: Arrays, facts: object) -> None:
    from safetensors.numpy import save_file

    whole = {**arrays, "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    whole["checksum"] = np.frombuffer(
        _hashed(*(whole[name] for name in sorted(whole))).encode(), np.uint8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    save_file(whole, fresh)
    fresh.replace(path)
    with contextlib.suppress(FileNotFoundError):  # another process makes room, too
        _make_room(path.parent)


def _make_room(folder: Path) -> None:
    """Remove what killed writers left behind, and the entries unused for longest."""
    for piece in folder.glob("*.[0-9]*"):
        if time.time() - piece.stat().st_mtime > STALE_SECONDS:
            piece.unlink()
    left = MAX_BYTES
    for entry in sorted(folder.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime):
        left -= entry.stat().st_size
        if left < 0:
            entry.unlink()
