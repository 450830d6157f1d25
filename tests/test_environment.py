"""The doors to the same environment agree: pyproject, its lock and constraints, conda, Docker and
the READMEs. (Nix: test_flake.py.)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_what_is_installed_where() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    declared = {r.name: r for r in map(requirements.Requirement, PROJECT["dependencies"])}
    assert [specifier.operator for specifier in declared["torch"].specifier] == ["=="]
    on = {"python_version": "3.10", "platform_system": "Linux"}
    assert declared["tomli"].marker.evaluate(on)
    assert not declared["tomli"].marker.evaluate({**on, "python_version": "3.11"})
    assert declared["bitsandbytes"].marker.evaluate({**on, "platform_system": "Windows"})
    assert not declared["bitsandbytes"].marker.evaluate({**on, "platform_system": "Darwin"})
    assert not {"peft", "accelerate", "trl", "datasets"} & set(declared)


def pins(file: Path) -> dict[tuple[str, str], str]:
    """(package, marker) -> version of every requirement in the file."""
    versions = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if re.match(r"[a-z0-9]", line):
            requirement, _, marker = line.rstrip(" \\").partition(" ; ")
            package, version = requirement.split("==")
            versions[package, marker] = version
    return versions


def test_the_lock_has_hashes_and_no_index_and_the_constraints_agree_with_it() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked, constrained = pins(ROOT / "requirements.lock"), pins(ROOT / "constraints.txt")
    assert "://" not in text and "--index" not in text and len(locked) > 50
    for block in re.split(r"\n(?=[a-z0-9])", text.split("\n", 1)[1]):
        assert "--hash=sha256:" in block, block
    assert not {package for package, _ in locked} - {package for package, _ in constrained}
    versions: dict[str, set[str]] = {}
    for (package, _), version in constrained.items():
        versions.setdefault(package, set()).add(version)
    for (package, _), version in locked.items():
        assert version in versions[package], package


def test_the_lock_is_what_pyproject_allows() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    for name, wanted in (
        ("requirements.lock", PROJECT["dependencies"]),
        ("constraints.txt", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]),
    ):
        locked = pins(ROOT / name)
        for dependency in map(requirements.Requirement, wanted):
            versions = [
                version
                for (package, _), version in locked.items()
                if package == dependency.name.lower()
            ]
            assert versions and all(
                dependency.specifier.contains(version) for version in versions
            ), (name, str(dependency), versions)


def test_conda_gives_python_and_pip_gives_the_rest() -> None:
    yaml = pytest.importorskip("yaml")
    specifiers = pytest.importorskip("packaging.specifiers")
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *plain, pip = conda["dependencies"]
    version = {name.partition("=")[0]: name.partition("=")[2] for name in plain}
    assert set(version) == {"python", "pip"}
    assert specifiers.SpecifierSet(PROJECT["requires-python"]).contains(version["python"])
    options = dict(line.split(" ", 1) for line in pip["pip"])
    assert (ROOT / options["-c"]).is_file()
    extra = re.fullmatch(r"\.\[(\w+)\]", options["-e"])
    assert extra and extra[1] in PROJECT["optional-dependencies"]


def instructions(word: str) -> list[str]:
    """What follows `word` in the Dockerfile, continued lines joined."""
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line[len(word) + 1 :] for line in text.splitlines() if line.startswith(f"{word} ")]


def test_docker_builds_on_a_python_that_is_supported() -> None:
    specifiers = pytest.importorskip("packaging.specifiers")
    (image,) = instructions("FROM")
    version = re.fullmatch(r"python:(3\.\d+)(-\w+)?", image)
    assert version and specifiers.SpecifierSet(PROJECT["requires-python"]).contains(version[1])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_docker_installs_the_lock(device: str, tmp_path: Path) -> None:
    """The image's own install step, run by its own shell; a `pip` that notes its arguments and the
    requirements that it was to read stands in for the real one.
    """
    if shutil.which("sh") is None or shutil.which("awk") is None:
        pytest.skip("needs sh and awk")
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text('#!/bin/sh\necho "$@" >> calls\n', encoding="utf-8")
    pip.chmod(0o755)
    install = next(step for step in instructions("RUN") if "pip install" in step)
    search = f"{pip.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": search, "DEVICE": device, "TORCH_INDEX": "INDEX"}
    subprocess.run(["sh", "-ec", install], cwd=tmp_path, env=environment, check=True)
    calls = [call.split() for call in (tmp_path / "calls").read_text("utf-8").splitlines()]
    *before, last = calls
    chosen = pins(tmp_path / last[last.index("-r") + 1])
    locked = pins(ROOT / "requirements.lock")
    assert "--require-hashes" in last and "--no-deps" in last
    if device == "cuda":
        assert not before and chosen == locked
        return
    ((*_, torch),) = before
    assert torch.removeprefix("torch==") in {
        v for (name, _), v in locked.items() if name == "torch"
    }
    assert "INDEX" in before[0]
    left_out = {name for name, _ in set(locked) - set(chosen)}
    assert "torch" in left_out and set(chosen.items()) <= set(locked.items())
    assert all(re.match(r"torch$|triton$|nvidia-|cuda-", name) for name in left_out), left_out


def test_docker_copies_only_what_its_context_holds() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for copied in instructions("COPY"):
        *names, _ = copied.split()
        for name in names:
            assert f"!{name}" in ignored and (ROOT / name).exists(), name


def test_applying_the_kubernetes_file_leaves_the_key_alone_that_its_comment_creates() -> None:
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "deploy" / "kubernetes" / "cllm.yaml").read_text(encoding="utf-8")
    documents = list(yaml.safe_load_all(text))
    assert "Secret" not in {document["kind"] for document in documents}
    (deployment,) = (document for document in documents if document["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (variable,) = (entry for entry in container["env"] if entry["name"] == "CLLM_KEY")
    key = variable["valueFrom"]["secretKeyRef"]
    command = f"kubectl create secret generic {key['name']} --from-literal={key['key']}="
    assert command in text


@pytest.mark.parametrize("name", ["README.md", "README.en.md"])
def test_the_readme_starts_with_the_oldest_supported_python(name: str) -> None:
    specifiers = pytest.importorskip("packaging.specifiers")
    supported = specifiers.SpecifierSet(PROJECT["requires-python"])
    named = re.search(r"Python 3\.(\d+)\D+3\.(\d+)", (ROOT / name).read_text(encoding="utf-8"))
    assert named
    oldest, newest = int(named[1]), int(named[2])
    assert supported.contains(f"3.{oldest}") and supported.contains(f"3.{newest}")
    assert not supported.contains(f"3.{oldest - 1}")
