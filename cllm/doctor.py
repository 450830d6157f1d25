"""`python -m cllm.bench --doctor`: what of this machine helps or hinders a training, each finding
with the command that mends it.

Needs nothing but the standard library to start, so that it answers before torch is installed
(`python tools/doctor.py`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cllm.messages import language, say

GIB = 2**30
DISK_GIB = 20  # an 8B checkpoint in 16 bits, and a run
HUBS = {
    "Hugging Face": os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
    "hf-mirror": "https://hf-mirror.com",
    "ModelScope": "https://modelscope.cn",
}
PACKAGES = (
    "transformers",
    "safetensors",
    "sentencepiece",
    "numpy",
    "jieba",
    "gradio",
    "matplotlib",
    "gguf",
)
MARKS = {"ok": "✓", "note": "·", "bad": "✗"}


class Finding(NamedTuple):
    """`state`: "ok", "note" (slower or narrower than it could be) or "bad" (something will not
    work); `mend` is a command or "".
    """

    topic: str
    state: str
    found: str
    mend: str = ""


def _judge(topic: str, good: bool, found: str, mend: str, *, worst: str = "note") -> Finding:
    """ok, or `worst` with what mends it."""
    return Finding(topic, "ok", found) if good else Finding(topic, worst, found, mend)


def _python() -> Iterator[Finding]:
    supported = (3, 10) <= sys.version_info < (3, 14)
    yield _judge("python", supported, platform.python_version(), say("doctor.python"), worst="bad")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    names = ", ".join(
        missing or (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    )
    yield _judge(
        "packages",
        not missing,
        say("doctor.missing", names=names) if missing else names,
        "pip install -e .",
        worst="bad",
    )


def _driver() -> str:
    """The NVIDIA driver's version and its card, if it answers."""
    try:
        command = [
            "nvidia-smi",
            "--query-gpu=driver_version,name,memory.total",
            "--format=csv,noheader",
        ]
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            .stdout.strip()
            .replace("\n", "; ")
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def _torch() -> Iterator[Finding]:
    driver = _driver()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of it does not load
        yield Finding(
            "torch", "bad", f"{type(error).__name__}: {error}", "pip install torch==2.13.0"
        )
        return
    build = (
        f"{torch.__version__}, CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"{torch.__version__}, CPU"
    )
    if torch.cuda.is_available():
        yield Finding("torch", "ok", build)
        yield from _cards(torch, driver)
    elif driver and torch.version.cuda:
        yield Finding(
            "torch",
            "bad",
            say("doctor.old_driver", build=build, driver=driver),
            say("doctor.old_driver.mend"),
        )
    elif driver:
        yield Finding(
            "torch",
            "bad",
            say("doctor.cpu_build", build=build, driver=driver),
            say("doctor.cpu_build.mend"),
        )
    else:
        wsl = (
            "microsoft" in platform.release().lower()
            and not Path("/usr/lib/wsl/lib/libcuda.so.1").exists()
        )
        yield Finding(
            "torch", "note", say("doctor.no_gpu", build=build), say("doctor.wsl") if wsl else ""
        )


def _cards(torch: Any, driver: str) -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        card, (free, total) = (
            torch.cuda.get_device_properties(index),
            torch.cuda.mem_get_info(index),
        )
        bf16 = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if index == torch.cuda.current_device()
            else card.major >= 8
        )
        found = say(
            "doctor.card",
            name=card.name,
            total=f"{total / GIB:.1f}",
            free=f"{free / GIB:.1f}",
            capability=f"{card.major}.{card.minor}",
            precision="bf16" if bf16 else "fp16",
            driver=driver.split(",")[0] or "?",
        )
        yield _judge(f"cuda:{index}", total - free <= GIB, found, say("doctor.crowded"))
    if sys.platform == "win32":
        yield Finding("windows", "note", say("doctor.spill"), say("doctor.spill.mend"))


def _bitsandbytes() -> Iterator[Finding]:
    try:
        module = importlib.import_module("bitsandbytes")
        yield Finding("bitsandbytes", "ok", module.__version__)
    # a driver, a missing library, a wrong build: it raises what it likes
    except Exception as error:
        yield Finding(
            "bitsandbytes",
            "note",
            f"{type(error).__name__}: {error}".split("\n")[0][:200],
            say("doctor.bitsandbytes"),
        )


def _machine() -> Iterator[Finding]:
    for name, folder in (("disk", Path.cwd()), ("cache", Path.home())):
        free = shutil.disk_usage(folder).free / GIB
        found = say("doctor.disk", folder=folder, free=f"{free:.0f}")
        yield _judge(name, free >= DISK_GIB, found, say("doctor.disk.mend", need=DISK_GIB))
    encoding = (sys.stdout.encoding or "?").lower()
    readable = encoding.replace("-", "").startswith(("utf", "gb", "cp936"))
    mend = "set PYTHONUTF8=1" if sys.platform == "win32" else "export PYTHONUTF8=1 LANG=C.UTF-8"
    yield _judge(
        "console", readable, say("doctor.console", encoding=encoding, language=language()), mend
    )


def _reach(url: str) -> str:
    """ "" if the host answers at all, else why not."""
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "cllm"})
        urllib.request.urlopen(request, timeout=4).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def _hubs() -> Iterator[Finding]:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield Finding("hubs", "note", say("doctor.offline"))
        return
    with ThreadPoolExecutor() as pool:
        reasons = dict(zip(HUBS, pool.map(_reach, HUBS.values()), strict=True))
    mirror = (
        say("doctor.hub") if reasons["hf-mirror"] else "export HF_ENDPOINT=https://hf-mirror.com"
    )
    for name, reason in reasons.items():
        yield _judge(
            name,
            not reason,
            f"{HUBS[name]} {reason}".strip(),
            mirror if name == "Hugging Face" else "",
        )


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _torch,
    _bitsandbytes,
    _machine,
    _hubs,
)


def examine() -> list[Finding]:
    """Run every check; prints each finding as it comes, with its command below it."""
    findings = []
    for check in CHECKS:
        for finding in check():
            print(f"{MARKS[finding.state]} {finding.topic:<13} {finding.found}")
            if finding.mend:
                print(f"{'':15} → {finding.mend}")
            findings.append(finding)
    return findings
