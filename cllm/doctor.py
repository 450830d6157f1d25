"""`python -m cllm.bench --doctor`: what of this machine helps or hinders a training, each finding
with the command that mends it.

Needs nothing but the standard library to start, so that it answers before torch is installed
(`python tools/doctor.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cllm.messages import command, language, note, propose, say

GIB = 2**30
DISK_GIB = 20  # an 8B checkpoint in 16 bits, and a run
RAM_GIB = 7  # an 8 GB machine; a 4B checkpoint in 16 bits, which an export's check holds, takes 7.5
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
# module -> distribution: the kernels of recurrent layers, which Transformers takes where they are
RECURRENT = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}
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


def _set_variable(name: str, text: str) -> str:
    """The command that sets an environment variable, for PowerShell or for a POSIX shell."""
    return f'$env:{name} = "{text}"' if sys.platform == "win32" else f"export {name}={text}"


def _python() -> Iterator[Finding]:
    supported = (3, 10) <= sys.version_info < (3, 14)
    system = "windows" if sys.platform == "win32" else "posix"
    mend = say(f"doctor.python.{system}")
    yield _judge("python", supported, platform.python_version(), mend, worst="bad")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        yield Finding("packages", "bad", say("doctor.missing", names=names), "pip install -e .")
    else:
        versions = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
        yield Finding("packages", "ok", ", ".join(versions))


def _driver() -> str:
    """The NVIDIA driver's version and its card, if it answers."""
    query = ["--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        cards = subprocess.check_output(["nvidia-smi", *query], text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return cards.strip().replace("\n", "; ")


def _torch() -> Iterator[Finding]:
    driver = _driver()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of it does not load
        mend = say("doctor.unused.cpu_build.mend") if driver else "pip install torch==2.13.0"
        yield Finding("torch", "bad", _reason(error), mend)
        return
    cuda = torch.version.cuda
    build = f"{torch.__version__}, " + (f"CUDA {cuda}" if cuda else "CPU")
    if torch.cuda.is_available():
        yield Finding("torch", "ok", build)
        yield from _cards(torch, driver)
        missing = [name for name in RECURRENT if importlib.util.find_spec(name) is None]
        state = say("doctor.missing", names=", ".join(RECURRENT[name] for name in missing))
        mend = say("doctor.recurrent", packages=" ".join(RECURRENT.values()))
        yield _judge("recurrent", not missing, state if missing else "ok", mend)
    elif driver:
        fault = "old_driver" if cuda else "cpu_build"
        state = say(f"doctor.unused.{fault}", build=build, driver=driver)
        yield Finding("torch", "bad", state, say(f"doctor.unused.{fault}.mend"))
    else:
        wsl = "microsoft" in platform.release().lower()
        unseen = wsl and not Path("/usr/lib/wsl/lib/libcuda.so.1").exists()
        mend = say("doctor.wsl") if unseen else ""
        yield Finding("torch", "note", say("doctor.no_gpu", build=build), mend)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _cards(torch: Any, driver: str) -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        figures = say(
            "doctor.card",
            name=card.name,
            total=f"{total / GIB:.1f}",
            free=f"{free / GIB:.1f}",
            capability=f"{card.major}.{card.minor}",
            precision="bf16" if card.major >= 8 else "fp16",
            driver=driver.split(",")[0] or "?",
        )
        yield _judge(f"cuda:{index}", total - free <= GIB, figures, say("doctor.crowded"))
    if sys.platform == "win32":
        yield Finding("windows", "note", say("doctor.spill"), say("doctor.spill.mend"))


def _bitsandbytes() -> Iterator[Finding]:
    try:
        module = importlib.import_module("bitsandbytes")
        yield Finding("bitsandbytes", "ok", module.__version__)
    # a driver, a missing library, a wrong build: it raises what it likes
    except Exception as error:
        yield Finding("bitsandbytes", "note", _reason(error), say("doctor.bitsandbytes"))


def _machine() -> Iterator[Finding]:
    for name, folder in (("disk", Path.cwd()), ("cache", Path.home())):
        free = shutil.disk_usage(folder).free / GIB
        space = say("doctor.disk", folder=folder, free=f"{free:.0f}")
        yield _judge(name, free >= DISK_GIB, space, say("doctor.disk.mend", need=DISK_GIB))
    encoding = (sys.stdout.encoding or "?").lower()
    readable = encoding.replace("-", "").startswith(("utf", "gb", "cp936"))
    console = say("doctor.console", encoding=encoding, language=language())
    yield _judge("console", readable, console, _set_variable("PYTHONUTF8", "1"))


def _ram_bytes() -> int:
    ctypes: Any = importlib.import_module("ctypes")
    if not hasattr(ctypes, "windll"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kibibytes = ctypes.c_ulonglong()
    ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kibibytes))
    return int(kibibytes.value) * 1024


def _memory() -> Iterator[Finding]:
    total = _ram_bytes() / GIB
    yield _judge("ram", total >= RAM_GIB, f"{total:.1f} GiB", say("doctor.ram.mend"))


def _windows() -> Iterator[Finding]:
    """What breaks downloads and compilers there: paths over 260 characters, and a temporary folder
    under a name that is not ASCII.
    """
    if sys.platform != "win32":
        return
    winreg: Any = importlib.import_module("winreg")
    place = r"SYSTEM\CurrentControlSet\Control\FileSystem"
    long = 0
    with contextlib.suppress(OSError):
        key = winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, place)
        long = winreg.QueryValueEx(key, "LongPathsEnabled")[0]
    mend = say("doctor.long_paths", place=place)
    yield _judge("long paths", bool(long), f"LongPathsEnabled = {long}", mend)
    mend = "mkdir -Force C:\\Temp; " + _set_variable("TEMP", "C:\\Temp")
    temp = tempfile.gettempdir()
    yield _judge("temp", temp.isascii(), temp, mend)


def _reach(url: str) -> str:
    """ "" if the host answers at all, else why not."""
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "cllm"})
        urllib.request.urlopen(request, timeout=4).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:  # ValueError: HF_ENDPOINT is no address
        return str(getattr(error, "reason", error))
    return ""


def _hubs() -> Iterator[Finding]:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield Finding("hubs", "note", say("doctor.offline"))
        return
    with ThreadPoolExecutor() as pool:
        reasons = dict(zip(HUBS, pool.map(_reach, HUBS.values()), strict=True))
    for name, reason in reasons.items():
        mend = ""
        if name == "Hugging Face":
            mirror = _set_variable("HF_ENDPOINT", HUBS["hf-mirror"])
            mend = say("doctor.hub") if reasons["hf-mirror"] else mirror
        yield _judge(name, not reason, f"{HUBS[name]} {reason}".strip(), mend)


def examine() -> list[Finding]:
    """Run every check; prints each finding as it comes, with its command below it, and last what it
    comes to.
    """
    findings = []
    for check in (_python, _torch, _bitsandbytes, _machine, _memory, _windows, _hubs):
        for finding in check():
            print(f"{MARKS[finding.state]} {finding.topic:<13} {finding.found}")
            if finding.mend:
                print(f"{'':15} → {finding.mend}")
            findings.append(finding)
    if bad := [finding.topic for finding in findings if finding.state == "bad"]:
        note("doctor.not_ready", topics=", ".join(bad))
    else:
        note("doctor.ready")
        propose(command("train", "preset:quick"))
    return findings
