"""Renew the pins that every door installs: `python tools/lock.py` (needs `uv` on the PATH and a
package index).

Writes `requirements.lock` (the default install, every version with SHA-256 hashes, for Docker and
Nix) and `constraints.txt` (the same versions and those of the test extra, without hashes, for conda
and for `pip install -e . -c constraints.txt`). Neither names an index: pip's and uv's own
configuration decides where wheels come from. `--upgrade` takes the newest versions that
pyproject.toml allows; without it versions that still fit stay.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK, CONSTRAINTS = ROOT / "requirements.lock", ROOT / "constraints.txt"
NOTE = "# Made by `python tools/lock.py`; do not edit.\n"


def compile_pins(target: Path, *options: str) -> str:
    """What uv resolves for every platform and Python 3.10 and later; `target` holds the versions to
    keep.
    """
    command = [
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
        "--universal",
        "--python-version",
        "3.10",
        "--no-header",
        "--no-annotate",
    ]
    done = subprocess.run(
        [*command, "-o", target.name, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        sys.exit(done.returncode)
    return target.read_text(encoding="utf-8").removeprefix(NOTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows"
    )
    upgrade = ["--upgrade"] * parser.parse_args().upgrade
    LOCK.write_text(NOTE + compile_pins(LOCK, "--generate-hashes", *upgrade), encoding="utf-8")
    # Constrained by the lock just written, so that both hold the same versions.
    CONSTRAINTS.write_text(
        NOTE + compile_pins(CONSTRAINTS, "--extra", "test", "-c", LOCK.name, *upgrade),
        encoding="utf-8",
    )
    print(f"{LOCK.name} and {CONSTRAINTS.name} written")


if __name__ == "__main__":
    main()
