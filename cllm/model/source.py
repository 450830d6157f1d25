"""A model's name -> a local directory or `.gguf` file: built in, on disk, in a local cache, or
fetched from a hub.

Order: existing path, built-in, local caches (ours, Hugging Face's, ModelScope's), the Hugging Face
endpoint (`HF_ENDPOINT` names a mirror), ModelScope. `hf:` or `modelscope:` before the name forces
one. Hugging Face is read by its own client, ModelScope with plain HTTPS. Each file whose SHA-256
the hub publishes is compared, because neither way does so by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from cllm.messages import UserError, note

ASSETS = Path(__file__).parents[1] / "assets"
BUILT_IN = ("tiny-zh",)
HUGGING_FACE = "https://huggingface.co"
MODELSCOPE = "https://modelscope.cn"
TIMEOUT_SECONDS = 20.0
_BLOCK_BYTES = 2**20
_COMPLETE = ".complete"  # stands in a directory of ours once every file is there
_WANTED = re.compile(r"[\w.-]+\.(json|model|tiktoken|jinja)|merges\.txt|vocab\.txt")
_WEIGHTS = (re.compile(r"model[\w.-]*\.safetensors"), re.compile(r"pytorch_model[\w.-]*\.bin"))


class RemoteFile(NamedTuple):
    """One file of a hub repository; `sha256` is empty where the hub does not publish it."""

    name: str
    size_bytes: int
    sha256: str
    fetch: Callable[[Path], object]
    """Brings the file to this path. Raises whatever the hub's client raises."""


def resolve(name: str, *, download: bool = True, only: str = "") -> Path:
    """The local directory (or `.gguf` file) of a model: `tiny-zh`, a path, `org/name`,
    `hf:org/name`, `modelscope:org/name`; for somebody who needs the file `only`, that has it.

    Downloads what is not there, unless `download` or HF_HUB_OFFLINE says not to. Raises UserError
    if nothing has this name or no hub serves it: each host that failed, and the ways round it.
    """
    forced, _, identifier = name.rpartition(":")
    if forced not in ("hf", "modelscope"):
        forced, identifier = "", name
    if not forced:
        path = Path(name).expanduser()
        if name and path.exists():
            return path
        if name in BUILT_IN:
            return ASSETS / name
    # neither ./a/b nor a/b.gguf: these are paths that do not exist
    if not re.fullmatch(r"(?!\.)[\w.-]+/[\w.-]+(?<!\.gguf)", identifier):
        raise UserError("source.not_found", name=name, built_in=", ".join(BUILT_IN))
    directory = Path(os.environ.get("CLLM_CACHE", "~/.cache/cllm/models")).expanduser()
    directory /= identifier.replace("/", "--")
    if (directory / _COMPLETE).is_file() or (only and (directory / only).is_file()):
        return directory
    order = [forced] if forced else ["hf", "modelscope"]
    caches = _foreign_caches(identifier)
    for hub in order:
        if _is_complete(caches[hub]) or (only and (caches[hub] / only).is_file()):
            return caches[hub]
    if not download or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise UserError("source.offline", name=identifier)
    hubs = {
        "hf": (os.environ.get("HF_ENDPOINT") or HUGGING_FACE, _hugging_face_files),
        "modelscope": (MODELSCOPE, _modelscope_files),
    }
    failures = []
    for address, list_files in map(hubs.__getitem__, order):
        host = urlsplit(address).netloc or address
        try:
            listed = partial(list_files, address.rstrip("/"), identifier)
            return _download(listed, host, directory, only)
        except Exception as error:  # the clients pass on their HTTP libraries' own exceptions
            detail = " ".join(str(error).split())
            failures.append(f"{host}: {detail}")
            note("source.failed", name=identifier, host=host, detail=detail)
    raise UserError("source.unreachable", name=identifier, failures="; ".join(failures))


def _foreign_caches(identifier: str) -> dict[str, Path]:
    """Where huggingface_hub and modelscope would have put the model."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    hub = (
        Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
        / f"models--{identifier.replace('/', '--')}"
    )
    head = hub / "refs" / "main"
    commit = head.read_text(encoding="utf-8").strip() if head.is_file() else "main"
    scope = (
        Path(os.environ.get("MODELSCOPE_CACHE", "~/.cache/modelscope/hub")).expanduser() / "models"
    )
    organisation, name = identifier.split("/")
    return {
        "hf": hub / "snapshots" / commit,
        "modelscope": scope / organisation / name.replace(".", "___"),
    }


def _is_complete(directory: Path) -> bool:
    """Whether another tool's cache holds a config and every shard of its index."""
    from cllm.model.shards import weight_files

    try:
        return (directory / "config.json").is_file() and bool(weight_files(directory).files)
    except UserError:
        return False


def _download(
    list_files: Callable[[], list[RemoteFile]], host: str, directory: Path, only: str
) -> Path:
    """Fill `directory` with what is wanted of a repository and mark it as complete, or with the
    file `only`. Of several processes one does it, and the others wait for it.
    """
    from filelock import FileLock

    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / (only or _COMPLETE)
    with FileLock(directory / ".lock"):
        if marker.is_file():
            return directory
        files = list_files()
        files = [file for file in files if file.name == only] if only else wanted(files)
        if not files:
            raise ValueError(f"the repository holds no {only}")
        gib = sum(file.size_bytes for file in files) / 2**30
        note("source.fetch", host=host, count=len(files), gib=f"{gib:.2f}", path=directory)
        for file in files:
            target = directory / file.name
            if target.is_file() and _is_right(target, file):
                continue
            target.unlink(missing_ok=True)
            file.fetch(target)
            if not _is_right(target, file):
                target.unlink()
                expected = file.sha256 or file.size_bytes
                raise OSError(f"{file.name}: the SHA-256 of what arrived is not {expected}")
        if not only:
            marker.touch()
    return directory


def wanted(files: list[RemoteFile]) -> list[RemoteFile]:
    """Config, tokenizer and weight files of the top directory; `.bin` only where there is no
    safetensors; no code.
    """
    chosen = [file for file in files if _WANTED.fullmatch(file.name)]
    for pattern in _WEIGHTS:
        if weights := [file for file in files if pattern.fullmatch(file.name)]:
            return chosen + weights
    raise ValueError("the repository holds neither model*.safetensors nor pytorch_model*.bin")


def _is_right(path: Path, file: RemoteFile) -> bool:
    """Whether the file at `path` has the size and, where known, the SHA-256 of `file`."""
    if path.stat().st_size != file.size_bytes:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as data:
        while file.sha256 and (block := data.read(_BLOCK_BYTES)):
            digest.update(block)
    return file.sha256 in ("", digest.hexdigest())


def _hugging_face_files(endpoint: str, identifier: str) -> list[RemoteFile]:
    """Source: the Hub API's model info; a large file's SHA-256 is its LFS object id."""
    if endpoint != HUGGING_FACE:
        # Xet fetches the bytes from hosts of its own, which those who need a mirror often cannot
        # reach. The client reads this once, when it is imported.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from huggingface_hub import HfApi, hf_hub_download

    # False keeps the client from sending the token that somebody has logged in with.
    token = os.environ.get("HF_TOKEN") or False
    info = HfApi(endpoint=endpoint, token=token).model_info(
        identifier, files_metadata=True, timeout=TIMEOUT_SECONDS
    )

    def fetch(target: Path) -> None:
        hf_hub_download(
            identifier,
            target.name,
            revision=info.sha,
            local_dir=target.parent,
            endpoint=endpoint,
            token=token,
        )

    return [
        RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else "", fetch)
        for file in info.siblings or ()
    ]


def _modelscope_files(address: str, identifier: str) -> list[RemoteFile]:
    """Source: the listing and download addresses that ModelScope's own client uses."""
    repository = f"{address}/api/v1/models/{identifier}/repo"
    with urllib.request.urlopen(
        f"{repository}/files?Revision=master", timeout=TIMEOUT_SECONDS
    ) as response:
        listing = json.load(response)["Data"]["Files"]
    files = []
    for entry in listing:
        if entry["Type"] == "blob":
            url = f"{repository}?Revision=master&FilePath={quote(entry['Path'])}"
            fetch = partial(_transfer, url, entry["Size"])
            files.append(RemoteFile(entry["Path"], entry["Size"], entry.get("Sha256") or "", fetch))
    return files


def _transfer(url: str, size_bytes: int, target: Path) -> None:
    """Bring `url` to `target`, going on where `<target>.incomplete` ends; Hugging Face's client
    tries again as long as something arrives.
    """
    from huggingface_hub.file_download import http_get

    part = target.with_name(target.name + ".incomplete")
    with part.open("ab") as output:
        if output.tell() > size_bytes:  # of another revision
            output.truncate(0)
            output.seek(0)
        http_get(url, output, resume_size=output.tell(), expected_size=size_bytes)
    part.replace(target)
