"""`cllm train …` and the guard around every program: one line and exit 2 for the user's mistake,
exit 1 for a fault.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback

from cllm.messages import UserError, note, say

ALLOCATOR = {"linux": "expandable_segments:True"}
"""System -> what PyTorch's CUDA allocator is told: the default one loses up to 1.7 GiB of a card to
fragmentation (bench/results/null-gpu.json). Windows has no expandable segments.
"""
PROGRAMS = ("train", "eval", "chat", "check", "bench", "export", "runs")


def run(name: str, argv: list[str] | None = None) -> int:
    """Run program `name`; returns its exit code: 0, 2 (user's mistake), 1 (fault), 130
    (interrupted) or 141 (output closed).
    """
    _configure_allocator()
    # It warns of kernels that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # a Windows console or a C locale must not crash on Chinese
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        code = int(
            importlib.import_module(f"cllm.{name}").main(sys.argv[1:] if argv is None else argv)
        )
        sys.stdout.flush()
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        note("stopped")
        return 130
    except BrokenPipeError:  # whoever reads (`| head`) has enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        traceback.print_exc()
        print(say("fault", text=f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 1


def _configure_allocator() -> None:
    """Before torch is imported, which reads it once; what the user has set stays."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if sys.platform in ALLOCATOR and not any(name in os.environ for name in names):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = ALLOCATOR[sys.platform]


def main() -> int:
    """Entry of the `cllm` console script: the first word names the program; without one they are
    listed.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("\n".join(f"{program:<8}{say(f'{program}.help')}" for program in PROGRAMS))
        return 0
    if name not in PROGRAMS:
        print(UserError("usage.program", name=name, programs=", ".join(PROGRAMS)), file=sys.stderr)
        return 2
    return run(name, sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
