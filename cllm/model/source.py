"""A model's name -> a local directory or `.gguf` file: built in, on disk, in a local cache, or
fetched from a hub.

Order: existing path, built-in, local caches (ours, Hugging Face's, ModelScope's), the Hugging Face
endpoint (`HF_ENDPOINT` names a mirror), ModelScope. `hf:` or `modelscope:` before the name forces
one. Both hubs are read with plain HTTPS: every byte comes from the host that is named, transfers
resume where they stopped, and each file whose SHA-256 the hub publishes is compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from cllm.messages import UserError, note

ASSETS = Path(__file__).parents[1] / "assets"
BUILT_IN = ("tiny-zh",)
HUGGING_FACE = "https://huggingface.co"
MODELSCOPE = "https://modelscope.cn"
ATTEMPTS = 4  # transfers of one file that may break off before a host counts as failed
TIMEOUT_SECONDS = 20.0
PROGRESS_SECONDS = 5.0
_BLOCK_BYTES = 2**20
_WANTED = re.compile(r"[\w.-]+\.(json|model|tiktoken|jinja)|merges\.txt|vocab\.txt")
_WEIGHTS = (re.compile(r"model[\w.-]*\.safetensors"), re.compile(r"pytorch_model[\w.-]*\.bin"))


class RemoteFile(NamedTuple):
    """One file of a hub repository; `sha256` is empty where the hub does not publish it."""

    name: str
    size_bytes: int
    sha256: str
    url: str


def resolve(name: str) -> Path:
    """The local directory (or `.gguf` file) of a model: `tiny-zh`, a path, `org/name`,
    `hf:org/name`, `modelscope:org/name`.

    Downloads what is not there. Raises UserError if nothing has this name or no hub serves it: each
    host that failed, and the ways round it.
    """
    forced, _, identifier = (
        name.rpartition(":") if name.startswith(("hf:", "modelscope:")) else ("", "", name)
    )
    if not forced:
        path = Path(name).expanduser()
        if name and path.exists():
            return path
        if name in BUILT_IN:
            return ASSETS / name
    if (
        not re.fullmatch(r"[\w.-]+/[\w.-]+", identifier)
        or identifier.endswith(".gguf")
        or identifier.startswith(".")
    ):
        raise UserError("source.not_found", name=name, built_in=", ".join(BUILT_IN))
    own = _own_cache() / identifier.replace("/", "--")
    for cached in (own, *_foreign_caches(identifier, forced)):
        if _is_complete(cached, own):
            return cached
    endpoint = os.environ.get("HF_ENDPOINT", HUGGING_FACE).rstrip("/")
    hubs = {"hf": (endpoint, _hugging_face_files), "modelscope": (MODELSCOPE, _modelscope_files)}
    failures = []
    for base, list_files in [hubs[forced]] if forced else hubs.values():
        host = urlsplit(base).netloc or base
        try:
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
                raise OSError("HF_HUB_OFFLINE is set")
            return _download(list_files(base, identifier), identifier, own, host)
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            failures.append(f"{host}: {error}")
            note("source.failed", name=identifier, host=host, detail=error)
    raise UserError("source.unreachable", name=identifier, failures="; ".join(failures))


def _own_cache() -> Path:
    return Path(os.environ.get("CLLM_CACHE", "~/.cache/cllm/models")).expanduser()


def _foreign_caches(identifier: str, forced: str) -> list[Path]:
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
    found = {
        "hf": hub / "snapshots" / commit,
        "modelscope": scope / organisation / name.replace(".", "___"),
    }
    return [found[forced]] if forced else list(found.values())


def _is_complete(directory: Path, own: Path) -> bool:
    """Ours carries a marker; another tool's cache must hold a config and every shard of its
    index.
    """
    if directory == own or not (directory / "config.json").is_file():
        return (directory / ".complete").is_file()
    from cllm.model.shards import weight_files

    try:
        return bool(weight_files(directory))
    except UserError:
        return False


def _hugging_face_files(endpoint: str, identifier: str) -> list[RemoteFile]:
    """Source: the Hub API's tree listing; a large file's SHA-256 is its LFS object id."""
    entries = [
        entry
        for entry in _get_json(f"{endpoint}/api/models/{identifier}/tree/main")
        if entry["type"] == "file"
    ]
    address = f"{endpoint}/{identifier}/resolve/main/"
    return [
        RemoteFile(
            e["path"], e["size"], e.get("lfs", {}).get("oid", ""), address + quote(e["path"])
        )
        for e in entries
    ]


def _modelscope_files(endpoint: str, identifier: str) -> list[RemoteFile]:
    """Source: the listing and download addresses that ModelScope's own client uses."""
    repository = f"{endpoint}/api/v1/models/{identifier}/repo"
    entries = [
        e
        for e in _get_json(f"{repository}/files?Revision=master")["Data"]["Files"]
        if e["Type"] == "blob"
    ]
    address = f"{repository}?Revision=master&FilePath="
    return [
        RemoteFile(e["Path"], e["Size"], e.get("Sha256") or "", address + quote(e["Path"]))
        for e in entries
    ]


def _get_json(url: str) -> Any:
    with _open(url) as response:
        return json.load(response)


def _open(url: str, start: int = 0) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "cllm"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    endpoint = os.environ.get("HF_ENDPOINT", HUGGING_FACE)
    if url.startswith(endpoint) and (token := os.environ.get("HF_TOKEN")):
        # Unredirected: the token is for the hub, not for the storage host that it sends us to.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)


def wanted(files: list[RemoteFile]) -> list[RemoteFile]:
    """Config, tokenizer and weight files of the top directory; `.bin` only where there is no
    safetensors; no code.
    """
    chosen = [file for file in files if _WANTED.fullmatch(file.name)]
    for pattern in _WEIGHTS:
        if weights := [file for file in files if pattern.fullmatch(file.name)]:
            return chosen + weights
    raise ValueError("the repository holds neither model*.safetensors nor pytorch_model*.bin")


def _download(offered: list[RemoteFile], identifier: str, directory: Path, host: str) -> Path:
    files = wanted(offered)
    gib = sum(file.size_bytes for file in files) / 2**30
    note(
        "source.fetch",
        name=identifier,
        host=host,
        count=len(files),
        gib=f"{gib:.2f}",
        path=directory,
    )
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        fetch_file(file, directory / file.name)
    (directory / ".complete").write_text(
        json.dumps({"name": identifier, "host": host}), encoding="utf-8"
    )
    return directory


def fetch_file(file: RemoteFile, target: Path) -> None:
    """Bring one file to `target`, resuming `<target>.incomplete`. Raises OSError if it stays short
    or its SHA-256 is wrong.
    """
    if target.is_file() and _is_right(target, file):
        return
    part = target.with_name(target.name + ".incomplete")
    detail: object = "cut"
    for _ in range(ATTEMPTS):
        start = part.stat().st_size if part.is_file() else 0
        try:
            if start < file.size_bytes or not start:
                _transfer(file, part, start)
        except (OSError, HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise
            detail = error
            continue
        if part.stat().st_size < file.size_bytes:
            continue
        if _is_right(part, file):
            part.replace(target)
            return
        part.unlink()
        if not start:
            raise OSError(
                f"{file.name}: the SHA-256 of what arrived is not {file.sha256 or file.size_bytes}"
            )
    raise OSError(f"{file.name}: broke off {ATTEMPTS} times ({detail})")


def _is_right(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size_bytes:
        return False
    if not file.sha256:
        return True
    digest = hashlib.sha256()
    with path.open("rb") as data:
        while block := data.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest() == file.sha256


def _transfer(file: RemoteFile, part: Path, start: int) -> None:
    """Append to `part` what a Range request from `start` brings (or begin anew where the host
    ignores ranges).
    """
    with (
        _open(file.url, start) as response,
        part.open("ab" if response.status == 206 else "wb") as output,
    ):
        arrived = start if response.status == 206 else 0
        shown = time.monotonic()
        while block := response.read(_BLOCK_BYTES):
            output.write(block)
            arrived += len(block)
            if time.monotonic() - shown > PROGRESS_SECONDS:
                shown = time.monotonic()
                percent = 100 * arrived // max(file.size_bytes, 1)
                print(
                    f"{file.name}  {percent:3d} %  {arrived / 2**30:.2f} GiB",
                    file=sys.stderr,
                    flush=True,
                )
