"""The doctor: every finding is made on this machine; cards, drivers and hubs that it lacks are
played.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cllm import doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_LANG", "en")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_it_runs_before_anything_is_installed() -> None:
    # -S: no site-packages, so no torch and no other package is there.
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "tools" / "doctor.py")],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if sys.version_info < (3, 11):
        return  # tomli is a package there
    assert done.returncode == 0, done.stderr
    findings = {f["topic"]: f for f in json.loads(done.stdout.splitlines()[-1])["findings"]}
    assert (
        findings["torch"]["state"] == "bad"
        and findings["torch"]["mend"] == "pip install torch==2.13.0"
    )
    assert (
        findings["packages"]["mend"] == "pip install -e ." and findings["hubs"]["state"] == "note"
    )


def test_python_310_needs_no_tomli_of_its_own() -> None:
    """Simulated: this Python's tomllib is hidden, and there is no tomli but pip's."""
    hidden = (
        "import sys; sys.version_info = (3, 10, 12, 'final', 0); sys.path.insert(0, 'tools'); "
        "sys.modules['tomllib'] = sys.modules['tomli'] = None; "
    )
    plain, with_pips = (
        subprocess.run(
            [sys.executable, "-c", f"{hidden}import {module}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        for module in ("cllm.messages", "doctor")
    )
    assert plain.returncode and "tomli" in plain.stderr
    assert with_pips.returncode == 0, with_pips.stderr
    assert json.loads(with_pips.stdout.splitlines()[-1])["findings"]


def test_here_nothing_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    findings = {f.topic: f for f in doctor.examine()}
    assert (
        findings["packages"].state == findings["python"].state == "ok"
        and findings["torch"].state != "bad"
    )
    assert len(capsys.readouterr().out.splitlines()) == len(findings) + sum(
        bool(f.mend) for f in findings.values()
    )


def fake_torch(*, cuda: str | None, available: bool, free: int = 7, capability: int = 8) -> Any:
    card = SimpleNamespace(name="RTX 4060", major=capability, minor=9)
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: 1,
            get_device_properties=lambda _: card,
            current_device=lambda: 0,
            mem_get_info=lambda _: (free * doctor.GIB, 8 * doctor.GIB),
            is_bf16_supported=lambda including_emulation: capability >= 8,
        ),
    )


@pytest.mark.parametrize(
    ("torch", "driver", "state", "words"),
    [
        (fake_torch(cuda=None, available=False), "", "note", "no NVIDIA card"),
        (
            fake_torch(cuda=None, available=False),
            "580.1, RTX 4060, 8188 MiB",
            "bad",
            "pip install torch==2.13.0 --index-url INDEX",
        ),
        (
            fake_torch(cuda="13.0", available=False),
            "470.1, RTX 4060, 8188 MiB",
            "bad",
            "update the NVIDIA driver",
        ),
    ],
)
def test_a_card_that_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch, torch: Any, driver: str, state: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    (finding,) = doctor._torch()
    assert finding.state == state and words in finding.found + finding.mend


@pytest.mark.parametrize(
    ("free", "capability", "state", "precision"), [(7.5, 8, "ok", "bf16"), (5, 7, "note", "fp16")]
)
def test_a_card(
    monkeypatch: pytest.MonkeyPatch, free: int, capability: int, state: str, precision: str
) -> None:
    monkeypatch.setitem(
        sys.modules,
        "torch",
        fake_torch(cuda="13.0", available=True, free=free, capability=capability),
    )
    monkeypatch.setattr(doctor, "_driver", lambda: "580.1, RTX 4060, 8188 MiB")
    monkeypatch.setattr(sys, "platform", "win32")
    build, card, windows, recurrent = doctor._torch()
    assert (
        build.state == "ok"
        and card.state == state
        and precision in card.found
        and "580.1" in card.found
    )
    assert "Sysmem Fallback" in windows.mend
    assert recurrent.state == "note" and "pip install flash-linear-attention" in recurrent.mend
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    assert list(doctor._torch())[3] == doctor.Finding("recurrent", "ok", "ok")


def test_hubs_name_who_failed_and_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "refused" in doctor._reach("http://127.0.0.1:9")
    monkeypatch.setattr(doctor, "_reach", lambda url: "timed out" if "huggingface" in url else "")
    found = {f.topic: f for f in doctor._hubs()}
    assert (
        found["Hugging Face"].mend.startswith("export HF_ENDPOINT=")
        and "timed out" in found["Hugging Face"].found
    )
    assert found["ModelScope"].state == "ok" and not found["ModelScope"].mend


def test_a_full_disk_and_an_ascii_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * doctor.GIB))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="ascii"))
    disk, cache, console = doctor._machine()
    assert (
        disk.state == cache.state == console.state == "note"
        and "CLLM_CACHE" in disk.mend
        and "PYTHONUTF8" in console.mend
    )


@pytest.mark.parametrize(("ram", "state"), [(31.7, "ok"), (7.7, "ok"), (3.8, "note")])
def test_little_ram_is_said(monkeypatch: pytest.MonkeyPatch, ram: float, state: str) -> None:
    assert doctor._ram_bytes() > doctor.GIB // 4  # this machine's
    monkeypatch.setattr(doctor, "_ram_bytes", lambda: int(ram * doctor.GIB))
    (finding,) = doctor._memory()
    assert finding.state == state and f"{ram} GiB" in finding.found
    assert ("--no-check" in finding.mend) == (state == "note")


def play_windows(monkeypatch: pytest.MonkeyPatch, *, long_paths: int | None, temp: str) -> None:
    """Windows' registry, kernel32 and temporary folder, as far as the doctor asks them."""

    def query(key: str, name: str) -> tuple[int, int]:
        assert key.endswith(r"Control\FileSystem") and name == "LongPathsEnabled"
        if long_paths is None:
            raise FileNotFoundError
        return long_paths, 4

    def installed(kibibytes: Any) -> None:
        kibibytes._obj.value = 16 * 2**20

    registry = SimpleNamespace(
        HKEY_LOCAL_MACHINE=0, OpenKey=lambda _root, place: place, QueryValueEx=query
    )
    kernel = SimpleNamespace(GetPhysicallyInstalledSystemMemory=installed)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "winreg", registry)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: temp)


@pytest.mark.parametrize("value", [None, 0, 1])
def test_windows_long_paths_and_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, value: int | None
) -> None:
    assert not list(doctor._windows())  # elsewhere there is nothing to say
    temp = r"C:\Users\me\Temp" if value else r"C:\Users\小明\Temp"
    play_windows(monkeypatch, long_paths=value, temp=temp)
    paths, folder = doctor._windows()
    assert paths.state == folder.state == ("ok" if value else "note")
    assert bool(paths.mend) == bool(folder.mend) == (not value)
    if not value:
        assert r"HKLM:\SYSTEM\CurrentControlSet\Control\FileSystem LongPathsEnabled 1" in paths.mend
        assert folder.mend == 'mkdir -Force C:\\Temp; $env:TEMP = "C:\\Temp"'
    (ram,) = doctor._memory()
    assert ram.found == "16.0 GiB"


def test_it_ends_with_a_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.examine()
    assert "python -m cllm.train preset:quick" in capsys.readouterr().err
    bad = [doctor.Finding("torch", "bad", "?", "pip install torch")]
    monkeypatch.setattr(doctor, "_torch", lambda: bad)
    doctor.examine()
    error = capsys.readouterr().err
    assert "torch" in error and "preset:quick" not in error


def test_what_mends_windows_runs_in_powershell(monkeypatch: pytest.MonkeyPatch) -> None:
    """PowerShell 5.1 has neither `&&` nor `export`, and no `set` that programs see."""
    play_windows(monkeypatch, long_paths=0, temp=r"C:\Users\小明\Temp")
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="ascii"))
    monkeypatch.setattr(doctor, "_reach", lambda url: "timed out" if "huggingface" in url else "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for check in (doctor._python, doctor._machine, doctor._windows, doctor._hubs):
        for finding in check():
            assert not re.search(r"&&|\bexport |\bset ", finding.mend), finding
    mends = {f.topic: f.mend for check in (doctor._machine, doctor._hubs) for f in check()}
    assert mends["console"] == '$env:PYTHONUTF8 = "1"'
    assert mends["Hugging Face"] == '$env:HF_ENDPOINT = "https://hf-mirror.com"'
