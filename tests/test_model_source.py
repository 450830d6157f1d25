"""`resolve`: the order of places, and hubs that break off, lie or are away, played by a server on
127.0.0.1.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from cllm.messages import UserError
from cllm.model import source
from cllm.model.source import resolve

WEIGHTS = bytes(range(256)) * 5000
COMMIT = "c" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.model": b"pieces",
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"old",
    "README.md": b"# text",
    "onnx/config.json": b"{}",
}
MODEL = {"config.json", "model.safetensors", "tokenizer.model"}


class Asked(NamedTuple):
    """One request: the method, the path with its query, and two headers."""

    method: str
    path: str
    range: str | None
    token: str | None


class Hub:
    """A Hugging Face endpoint and a ModelScope on one port.

    cut_bytes: each answer with a file ends after so many bytes; xet: large files are said to lie in
    Xet storage; storage: the address to which downloads of large files are sent.
    """

    def __init__(self) -> None:
        self.requests: list[Asked] = []
        self.files = dict(FILES)
        self.cut_bytes = len(WEIGHTS)
        self.wrong_sha256 = self.xet = False
        self.storage = ""
        self.down: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
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
            Asked(
                request.command,
                request.path,
                request.headers.get("Range"),
                request.headers.get("Authorization"),
            )
        )
        url = urlsplit(request.path)
        kind = "modelscope" if url.path.startswith("/scope") else "hf"
        if kind in self.down:
            request.send_error(503, "down")
        elif url.path == "/api/models/org/name":
            siblings = [self.sibling(name, content) for name, content in self.files.items()]
            info = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
            self.send(request, json.dumps(info).encode())
        elif url.path == "/scope/api/v1/models/org/name/repo/files":
            files = [
                {"Path": name, "Size": len(content), "Sha256": self.sha256(content), "Type": "blob"}
                for name, content in self.files.items()
            ]
            self.send(request, json.dumps({"Data": {"Files": files}}).encode())
        elif url.path == "/scope/api/v1/models/org/name/repo":
            self.send_file(request, parse_qs(url.query)["FilePath"][0])
        elif url.path.startswith(f"/org/name/resolve/{COMMIT}/"):
            self.send_file(request, url.path.rsplit("/", 1)[1], self.storage)
        elif url.path.startswith("/storage/"):
            self.send_file(request, url.path.rsplit("/", 1)[1])
        else:
            request.send_error(404, "not here")

    def sibling(self, name: str, content: bytes) -> dict[str, Any]:
        lfs = {"sha256": self.sha256(content), "size": len(content), "pointerSize": 1}
        large = {"lfs": lfs} if content is WEIGHTS else {}
        return {"rfilename": name, "size": len(content), "blobId": "git", **large}

    def send_file(self, request: BaseHTTPRequestHandler, name: str, storage: str = "") -> None:
        content = self.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.sha256(content)}"'}
        if content is WEIGHTS and storage:
            headers["Location"] = f"{storage}/storage/{name}"
            headers["X-Linked-Size"] = str(len(content))
        if content is WEIGHTS and self.xet:
            headers["X-Xet-Hash"] = "1" * 64
            headers["X-Xet-Refresh-Route"] = f"{self.url}/xet-token"
        self.send(request, content, headers)

    def send(
        self, request: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        headers = headers or {}
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        request.send_response(302 if "Location" in headers else 206 if start else 200)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content[start:][: self.cut_bytes])

    def ranges_of(self, name: str) -> list[str | None]:
        """The Range header of each transfer of a file."""
        transfers = (asked for asked in self.requests if asked.method == "GET")
        return [asked.range for asked in transfers if asked.path.endswith(name)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    # read when the client is imported, which another test may have done
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "MODELSCOPE", f"{hub.url}/scope")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def files_of(model: Path) -> set[str]:
    return {path.name for path in model.iterdir() if not path.name.startswith(".")}


def test_a_config_json_is_fetched_alone(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    from cllm import bench
    from cllm.shapes import find_config

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **heads}
    hub.files["config.json"] = json.dumps(config).encode()
    for down in ("", "hf"):
        hub.down = {down}
        name = "modelscope:org/name" if down else "org/name"
        assert find_config(name) == (name, config)
        fetched = [asked.path for asked in hub.requests if "config.json" in asked.path]
        assert fetched and not any("safetensors" in asked.path for asked in hub.requests)
        (cached,) = source.Path(source.os.environ["CLLM_CACHE"]).iterdir()
        assert files_of(cached) == {"config.json"}
        count = len(hub.requests)
        assert bench.main(["--plan", name]) == 0 and len(hub.requests) == count, "kept"
        (cached / "config.json").unlink()
    assert f"model.path={name}" in capsys.readouterr().out
    hub.down = set()
    find_config("org/name")
    assert files_of(resolve("org/name")) == MODEL, "the rest still comes when it is wanted"


def test_a_name_that_no_hub_serves_is_answered_with_the_nearest(hub: Hub) -> None:
    from cllm.shapes import SHAPES, _stem, find_config

    hub.down = {"hf", "modelscope"}
    for known in json.loads(SHAPES.read_text(encoding="utf-8")):
        mistyped = f"nobody/{_stem(known)}x"
        with pytest.raises(UserError) as caught:
            find_config(mistyped)
        assert caught.value.code == "memory.name" and known in str(caught.value)
        assert "\n" not in str(caught.value)
    for name in ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "THUDM/GLM-4-9B-0414"):
        with pytest.raises(UserError):  # a head of its own; other layers
            find_config(name)
    same = {
        "Qwen/Qwen3-4B-Instruct-2507": "Qwen/Qwen3-4B",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "Qwen/Qwen2.5-7B",
        "google/gemma-3-270m-it": "google/gemma-3-270m",
    }
    assert {name: find_config(name)[0] for name in same} == same


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
def test_download(name: str, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    path = resolve(name)
    assert files_of(path) == MODEL
    assert all((path / file).read_bytes() == FILES[file] for file in MODEL)
    asked = [request.path for request in hub.requests]
    assert all(url.startswith("/scope") == name.startswith("modelscope") for url in asked)
    # the second time nothing is asked
    assert resolve(name) == path and len(hub.requests) == len(asked)
    assert "127.0.0.1" in capsys.readouterr().err


def test_bin_files_are_fetched_where_there_is_no_safetensors(hub: Hub) -> None:
    del hub.files["model.safetensors"]
    assert files_of(resolve("hf:org/name")) == {
        "config.json",
        "tokenizer.model",
        "pytorch_model.bin",
    }


def test_a_repository_without_weights_is_said(hub: Hub) -> None:
    hub.files = {"config.json": b"{}", "training_args.bin": b"", "x.model": b""}
    with pytest.raises(UserError, match="holds neither"):
        resolve("hf:org/name")


@pytest.mark.parametrize("hub_name", ["hf", "modelscope"])
def test_a_cut_transfer_goes_on_where_it_stopped(
    hub: Hub, hub_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Hugging Face's client keeps whole blocks only, usually of 10 MB
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.cut_bytes = 500_000
    path = resolve(f"{hub_name}:org/name")
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    first, *others = hub.ranges_of("model.safetensors")
    assert first in (None, "bytes=0-") and others == ["bytes=500000-", "bytes=1000000-"]


def test_modelscope_goes_on_in_a_later_session(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / "cache" / "org--name" / "model.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:400_000])
    assert (resolve("modelscope:org/name") / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges_of("model.safetensors") == ["bytes=400000-"]


def test_whole_files_of_a_broken_off_download_are_kept(hub: Hub) -> None:
    hub.files["tokenizer.model"] = b""  # shorter than the SHA-256 of the listing says
    listed = hub.sibling("tokenizer.model", FILES["tokenizer.model"])
    hub.sibling = lambda name, content: (  # type: ignore[method-assign]
        listed if name == "tokenizer.model" else Hub.sibling(hub, name, content)
    )
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        resolve("hf:org/name")
    hub.files["tokenizer.model"] = FILES["tokenizer.model"]
    hub.requests.clear()
    assert files_of(resolve("hf:org/name")) == MODEL
    assert not hub.ranges_of("config.json") and hub.ranges_of("tokenizer.model")


@pytest.mark.parametrize("hub_name", ["hf", "modelscope"])
def test_wrong_hash_is_not_kept(hub: Hub, hub_name: str, tmp_path: Path) -> None:
    hub.wrong_sha256 = True
    with pytest.raises(UserError, match="the SHA-256"):
        resolve(f"{hub_name}:org/name")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.wrong_sha256 = False
    assert (resolve(f"{hub_name}:org/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_part_longer_than_the_file_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / "cache" / "org--name" / "model.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS + b"of a longer revision")
    assert (resolve("modelscope:org/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_part_of_another_revision_is_told_by_its_hash(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / "cache" / "org--name" / "model.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="the SHA-256"):
        resolve("modelscope:org/name")
    assert (resolve("modelscope:org/name") / "model.safetensors").read_bytes() == WEIGHTS


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
    assert caught.value.code == "source.unreachable" and "\n" not in text
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
    with pytest.raises(UserError) as caught:
        resolve("org/name", download=False)
    assert caught.value.code == "source.offline"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        resolve("org/name")
    assert not hub.requests


@pytest.mark.parametrize(
    "name", ["no-such-model", "models/absent.gguf", "./a/b", "a/b/c", "../x", "hf:x", ""]
)
def test_no_such_name(name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert caught.value.code == "source.not_found" and not hub.requests


@pytest.mark.parametrize("endpoint", ["a mirror", ""])
def test_a_token_goes_to_the_endpoint_only(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str
) -> None:
    """Neither to the storage host that the endpoint sends to, nor to ModelScope; an empty
    HF_ENDPOINT is none.
    """
    elsewhere = hub.url.replace("127.0.0.1", "localhost")
    hub.storage = elsewhere
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(source, "MODELSCOPE", f"{elsewhere}/scope")
    if not endpoint:
        monkeypatch.setenv("HF_ENDPOINT", "")
        monkeypatch.setattr(source, "HUGGING_FACE", hub.url)
    assert (resolve("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS
    stored = [asked for asked in hub.requests if asked.path.startswith("/storage")]
    assert stored and {asked.token for asked in stored} == {None}
    assert {asked.token for asked in hub.requests if asked not in stored} == {"Bearer secret"}
    hub.requests.clear()
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "another"))
    resolve("modelscope:org/name")
    assert {asked.token for asked in hub.requests} == {None}


def test_a_login_is_not_sent_unasked(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    resolve("hf:org/name")
    assert {asked.token for asked in hub.requests} == {None}


@pytest.mark.parametrize("name", ["hf:org/name", "modelscope:org/name"])
def test_two_processes_resolve_one_model(hub: Hub, name: str) -> None:
    """Both end with a whole model, fetched once; a mirror's weights come from the mirror, although
    it says that they are in Xet storage.
    """
    hub.xet = True
    code = (
        "import sys; from cllm.model import source; source.MODELSCOPE = sys.argv[2];"
        "path = source.resolve(sys.argv[1]);"
        "print(sorted(p.name for p in path.iterdir() if p.name[0] != '.'),"
        "(path / 'model.safetensors').stat().st_size)"
    )
    command = [sys.executable, "-c", code, name, source.MODELSCOPE]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in said] == [f"{sorted(MODEL)} {len(WEIGHTS)}\n"] * 2, said
    assert len(hub.ranges_of("model.safetensors")) == 1
