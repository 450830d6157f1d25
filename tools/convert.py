"""Write any supported checkpoint (original layout, `.bin`, GGUF) once as a native one, so that
later starts are faster.

    python tools/convert.py THUDM/chatglm3-6b models/chatglm3-native [--dtype bfloat16]

Tensor by tensor: memory stays at about the largest tensor. The tokenizer and its template go along
if there is one. Exit code 2 for a mistake of yours (one line on stderr); the last line of stdout is
JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from cllm.messages import UserError
from cllm.model import load_tokenizer, resolve

if TYPE_CHECKING:
    import torch


def convert_checkpoint(path: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write the native checkpoint (config.json, one model.safetensors) into the new directory
    `out`, tensor by tensor.

    dtype: of floating-point tensors; None keeps what is stored (GGUF and NormHead become float32).
    Raises UserError if `out` exists, and as `load_model`.
    """
    from cllm.model.checkpoint import converted, open_native, write_config
    from cllm.model.shards import with_dtype, write_safetensors

    if out.exists():
        raise UserError("model.exists", path=out)
    checkpoint, model, layout = open_native(path)
    if dtype:
        layout = with_dtype(layout, dtype)
    out.mkdir(parents=True)
    part = out / "model.safetensors.incomplete"
    write_safetensors(part, layout, converted(checkpoint, layout))
    write_config(checkpoint, model, out)
    part.rename(out / "model.safetensors")


def main(argv: list[str]) -> int:
    """Convert one checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="a directory, a .gguf file, or a hub name, as [model] path takes them"
    )
    parser.add_argument("out", type=Path, help="a directory that does not exist yet")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: as stored (from GGUF: float32)",
    )
    options = parser.parse_args(argv)

    import torch

    path = resolve(options.model)
    convert_checkpoint(path, options.out, getattr(torch, options.dtype) if options.dtype else None)
    try:
        load_tokenizer(path).save(options.out)
    except UserError as error:  # the weights are written all the same
        print(error, file=sys.stderr)
    size = (options.out / "model.safetensors").stat().st_size
    print(
        json.dumps({"model": str(path), "out": str(options.out), "bytes": size}, ensure_ascii=False)
    )
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
