"""`resolve`: the order of places, and hubs that break off, lie or are away, played by a server on
127.0.0.1.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from cllm.messages import UserError
from cllm.model import source
from cllm.model.source import RemoteFile, fetch_file, resolve, wanted

WEIGHTS = bytes(range(256)) * 5000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.model": b"pieces",
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"old",
    "README.md": b"# text",
}


class Hub:
    """A Hugging Face endpoint and a ModelScope on one port. `cut_bytes`: each answer with weights
    ends after so many bytes.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None, str | None]] = []
        self.cut_bytes = len(WEIGHTS)
        self.wrong_sha256 = False
        self.down: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def sha256(self, content: bytes) -> str:
        return "0" * 64 if self.wrong_sha256 else hashlib.sha256(content).hexdigest()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(
            (request.path, request.headers.get("Range"), request.headers.get("Authorization"))
        )
        url = urlsplit(request.path)
        kind = "modelscope" if url.path.startswith("/scope") else "hf"
        if kind in self.down:
            request.send_error(503, "down")
        elif url.path == "/api/models/org/name/tree/main":
            listing: Any = [{"type": "directory", "path": "onnx", "size": 0}]
            for name, content in FILES.items():
                lfs = (
                    {"lfs": {"oid": self.sha256(content), "size": len(content)}}
                    if content is WEIGHTS
                    else {}
                )
                listing.append(
                    {"type": "file", "path": name, "size": len(content), "oid": "git", **lfs}
                )
            self.send(request, json.dumps(listing).encode())
        elif url.path == "/scope/api/v1/models/org/name/repo/files":
            files = [
                {"Path": name, "Size": len(content), "Sha256": self.sha256(content), "Type": "blob"}
                for name, content in FILES.items()
            ]
            self.send(request, json.dumps({"Data": {"Files": files}}).encode())
        elif url.path == "/scope/api/v1/models/org/name/repo":
            self.send(request, FILES[parse_qs(url.query)["FilePath"][0]])
        elif url.path.startswith("/org/name/resolve/main/"):
            self.send(request, FILES[url.path.rsplit("/", 1)[1]])
        else:
            request.send_error(404, "not here")

    def send(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        request.wfile.write(content[start:][: self.cut_bytes])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "MODELSCOPE", f"{hub.url}/scope")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_local_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny-zh") == source.ASSETS / "tiny-zh"
    for name in ("tiny-zh", "org/name"):
        Path(name).mkdir(parents=True)
        assert resolve(name) == Path(name)
    Path("x.gguf").touch()
    assert (
        resolve("x.gguf") == Path("x.gguf")
        and resolve(str(tmp_path / "x.gguf")) == tmp_path / "x.gguf"
    )
    assert not hub.requests


def test_caches_of_other_tools(hub: Hub, tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--org--na.me" / "snapshots" / "abc"
    scope = tmp_path / "ms" / "models" / "org" / "na___me"
    for directory in (snapshot, scope):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}", encoding="utf-8")
        (directory / "model.safetensors").touch()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc", encoding="utf-8")
    assert resolve("org/na.me") == snapshot
    assert resolve("modelscope:org/na.me") == scope
    (snapshot / "model.safetensors").unlink()  # a broken-off download is no model
    assert resolve("org/na.me") == scope


@pytest.mark.parametrize("name", ["org/name", "hf:org/name", "modelscope:org/name"])
def test_download(name: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = resolve(name)
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        ".complete",
    }
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    asked = [url for url, *_ in hub.requests]
    assert all(url.startswith("/scope") == name.startswith("modelscope") for url in asked)
    # the second time nothing is asked
    assert resolve(name) == path and len(hub.requests) == len(asked)
    assert "127.0.0.1" in capsys.readouterr().err


def test_resume_after_a_cut(hub: Hub) -> None:
    hub.cut_bytes = 500_000
    path = resolve("org/name")
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [bytes_ for url, bytes_, _ in hub.requests if url.endswith("model.safetensors")]
    assert ranges == [None, "bytes=500000-", "bytes=1000000-"]


def test_resume_in_a_later_session(hub: Hub) -> None:
    hub.cut_bytes = 100_000  # four attempts are not enough
    with pytest.raises(UserError, match="broke off 4 times"):
        resolve("hf:org/name")
    hub.cut_bytes = len(WEIGHTS)
    hub.requests.clear()
    assert (resolve("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS
    assert [bytes_ for url, bytes_, _ in hub.requests if url.endswith("model.safetensors")] == [
        "bytes=400000-"
    ]


def test_wrong_hash_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.wrong_sha256 = True
    with pytest.raises(UserError, match=r"model\.safetensors: the SHA-256"):
        resolve("hf:org/name")
    assert not list((tmp_path / "cache").rglob("model.safetensors*"))


def test_stale_part_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    """The rest of another revision's file: the SHA-256 tells, and the file is fetched once from its
    beginning.
    """
    (tmp_path / "model.safetensors.incomplete").write_bytes(b"x" * 1000)
    file = RemoteFile(
        "model.safetensors",
        len(WEIGHTS),
        hub.sha256(WEIGHTS),
        f"{hub.url}/org/name/resolve/main/model.safetensors",
    )
    fetch_file(file, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert [bytes_ for _, bytes_, _ in hub.requests] == ["bytes=1000-", None]


def test_modelscope_when_the_endpoint_is_down(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.down.add("hf")
    assert (resolve("org/name") / "model.safetensors").read_bytes() == WEIGHTS
    assert "503" in capsys.readouterr().err


def test_everything_fails(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.down.update(("hf", "modelscope"))
    # nobody listens on the discard port
    monkeypatch.setattr(source, "MODELSCOPE", "http://127.0.0.1:9/scope")
    with pytest.raises(UserError) as caught:
        resolve("org/name")
    text = str(caught.value)
    assert caught.value.code == "source.unreachable"
    for words in (
        urlsplit(hub.url).netloc,
        "127.0.0.1:9",
        "503",
        "path of a local copy",
        "modelscope:org/name",
        "HF_ENDPOINT",
    ):
        assert words in text
    with pytest.raises(UserError) as caught:
        resolve("hf:org/absent")
    assert "127.0.0.1:9" not in str(caught.value)


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        resolve("org/name")
    assert not hub.requests


@pytest.mark.parametrize(
    "name", ["no-such-model", "models/absent.gguf", "./a/b", "a/b/c", "../x", "hf:x", ""]
)
def test_no_such_name(name: str, hub: Hub) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert caught.value.code == "source.not_found" and not hub.requests


def test_token_goes_to_the_endpoint_only(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(source, "MODELSCOPE", hub.url.replace("127.0.0.1", "localhost") + "/scope")
    resolve("hf:org/name")
    assert {token for *_, token in hub.requests} == {"Bearer secret"}
    hub.requests.clear()
    (source._own_cache() / "org--name" / ".complete").unlink()
    resolve("modelscope:org/name")
    assert {token for *_, token in hub.requests} == {None}


def test_wanted() -> None:
    def names(*offered: str) -> list[str]:
        return [file.name for file in wanted([RemoteFile(name, 1, "", "") for name in offered])]

    assert names(
        "a.py",
        "config.json",
        "pytorch_model-1.bin",
        "training_args.bin",
        "vocab.txt",
        "x/config.json",
    ) == ["config.json", "vocab.txt", "pytorch_model-1.bin"]
    assert names(
        "model-00001-of-00002.safetensors", "pytorch_model.bin", "qwen.tiktoken", "..\\x.json"
    ) == ["qwen.tiktoken", "model-00001-of-00002.safetensors"]
    with pytest.raises(ValueError, match="holds neither"):
        wanted([RemoteFile("config.json", 1, "", "")])
