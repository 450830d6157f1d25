"""The doors to the same environment agree: pyproject, conda, Nix, README, and what the CI script
installs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_torch_is_pinned_and_tomli_is_for_old_pythons_only() -> None:
    dependencies = {re.split(r"[\s=<>;!~\[]", d)[0]: d for d in PROJECT["dependencies"]}
    assert dependencies["torch"] == "torch==2.13.0"
    assert (
        "python_version < '3.11'" in dependencies["tomli"]
        and "Darwin" in dependencies["bitsandbytes"]
    )
    for name in ("transformers", "safetensors", "sentencepiece", "numpy", "jieba", "gradio"):
        assert name in dependencies
    assert not {"peft", "accelerate", "trl", "datasets"} & set(dependencies)


def pins(name: str) -> dict[tuple[str, str], str]:
    """(package, marker) -> version of every requirement in the file."""
    lines = [
        line.rstrip(" \\")
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if re.match(r"[a-z0-9]", line)
    ]
    found = {}
    for line in lines:
        requirement, _, marker = line.partition(" ; ")
        package, version = requirement.split("==")
        found[package, marker] = version
    return found


def test_the_lock_has_hashes_and_no_index_and_the_constraints_agree_with_it() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked, constrained = pins("requirements.lock"), pins("constraints.txt")
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
        locked = pins(name)
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
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["channels"] == ["conda-forge", "nodefaults"]
    *plain, pip = conda["dependencies"]
    assert plain == ["python=3.12", "pip"] and pip == {"pip": ["-c constraints.txt", "-e .[test]"]}


def test_nix_and_docker_install_the_lock() -> None:
    flake = (ROOT / "flake.nix").read_text(encoding="utf-8")
    locked = json.loads((ROOT / "flake.lock").read_text(encoding="utf-8"))["nodes"]["nixpkgs"][
        "locked"
    ]
    assert f"github:NixOS/nixpkgs/{locked['rev']}" in flake and locked["narHash"].startswith(
        "sha256-"
    )
    assert (
        "python312" in flake
        and "--require-hashes -r requirements.lock" in flake
        and "-c constraints.txt -e '.[test]'" in flake
    )
    docker = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert (
        "FROM python:3.12-slim" in docker
        and "--require-hashes -r chosen.lock" in docker
        and "torch==2.13.0" in docker
    )


def test_docker_copies_only_what_its_context_holds() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = re.findall(
        r"^COPY (.+) \S+$",
        (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    for name in " ".join(copied).split():
        assert f"!{name}" in ignored and (ROOT / name).exists(), name


def test_readme_names_the_supported_pythons() -> None:
    assert PROJECT["requires-python"] == ">=3.10"
    assert "Python 3.10–3.13" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Python 3.10 to 3.13" in (ROOT / "README.en.md").read_text(encoding="utf-8")


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
