"""`python -m cllm.export RUN --to merged|peft|gguf|ollama OUT`: a run in the form other programs
read, compared with the trained model.

Merging streams tensor by tensor, so that memory stays near the largest tensor; the check afterwards
holds one whole model at a time. Everything is written beside OUT and renamed last: what bears the
name OUT is whole, and passed its check.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.data.schema import Conversation
from cllm.messages import (
    CommandLine,
    UserError,
    note,
    print_result,
    propose,
    read_json,
    shell,
    strength,
    to_json,
)

if TYPE_CHECKING:
    from cllm.assembly import Located
    from cllm.model.merge import Merge
    from cllm.model.tokenizer import Tokenizer

GGUF = ("gguf", "ollama")
TARGETS = ("merged", "peft", *GGUF)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that its --max-lora-rank takes
COMPARED = 64  # conversations that a check chooses its rows and prompts from


def write(
    merge: Merge, tokenizer: Tokenizer, located: Located, folder: Path, to: str, kind: str
) -> None:
    """The export in the new directory `folder`; `kind`: number format of a GGUF file. Raises
    UserError for what the target cannot hold, before anything is written.
    """
    from cllm.model.merge import write_merged
    from cllm.model.tokenizer import portable, within

    if merge.checkpoint.family.alibi:
        raise UserError("export.alibi", base=located.base_name)
    tokenizer = within(tokenizer, merge.checkpoint.config.vocab_size)
    if to in GGUF:
        _write_gguf(merge, tokenizer, folder, kind, ollama=to == "ollama")
        return
    if to == "peft":
        _write_peft(merge, located, folder)
    else:
        _say_size(merge.bytes)
        folder.mkdir(parents=True)
        write_merged(merge, folder)
        stops = {
            "eos_token_id": sorted(tokenizer.stop_ids),
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": tokenizer.bos_id,
        }
        text = to_json(stops, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    tokenizer.save(folder)
    portable(tokenizer, folder)


def _say_size(size: int, kind: str = "") -> None:
    """How many bytes of weights will be written, and whether this machine's card holds them beside
    CUDA's context; without one, whether the plan's does, and if not what of another `kind` would.
    """
    import torch

    from cllm.memory import CONTEXT_BYTES, GIB
    from cllm.plan import BUDGET_GIB

    card = BUDGET_GIB
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0).total_memory / GIB
    left = card - (size + CONTEXT_BYTES) / GIB
    figures = {"gib": f"{size / GIB:.2f}", "card": f"{card:.0f}", "left": f"{left:.1f}"}
    note("export.size" if left > 0 else "export.size.too_big", **figures)
    if left <= 0 and kind != "q4_0":
        note("export.size.smaller")


def _write_gguf(
    merge: Merge, tokenizer: Tokenizer, folder: Path, kind: str, *, ollama: bool
) -> None:
    import torch

    from cllm.data.dialects import go
    from cllm.model.gguf import place, write_gguf

    config = merge.checkpoint.config
    placed = place(config, merge.layout, kind)
    keys = tokenizer.to_gguf(config.vocab_size)
    template = go(tokenizer.template) if ollama else ""
    _say_size(sum(math.prod(stored.shape) for stored in placed.values()), kind)
    folder.mkdir(parents=True)
    # float32, so that the writer alone rounds: a 16-bit base would round the sums before
    tensors = merge.tensors(torch.float32)
    write_gguf(folder / "model.gguf", config, placed, tensors, kind, keys)
    if template:
        (folder / "Modelfile").write_text(_modelfile(tokenizer, template), encoding="utf-8")


def _write_peft(merge: Merge, located: Located, folder: Path) -> None:
    from cllm.model.adapter import read_adapter, write_adapter
    from cllm.model.checkpoint import original_config
    from cllm.model.lora import LoraSettings

    assert located.adapter is not None
    base_name = located.base_name
    settings, _ = read_adapter(located.adapter)
    if settings.dora:
        raise UserError("export.dora", path=located.adapter)
    path, family, config, _ = merge.checkpoint
    within = "model."
    if family.config:
        note("export.native_names", base=base_name)
    elif original_config(path).get("model_type") != config.model_type:  # it is the text part's
        within = "model.language_model."
        note("export.language_model", base=base_name, within=within)
    # The factor is baked into alpha: llama.cpp's converter knows alpha / r only.
    baked = LoraSettings(settings.rank, merge.scaling * settings.rank)
    # The strength is not: of alpha 0 llama.cpp makes 1.
    for parts in merge.adapter.values():
        parts["lora_B"] = parts["lora_B"] * merge.strength
    write_adapter(merge.model, folder, merge.adapter, baked, base=base_name, within=within)


def _modelfile(tokenizer: Tokenizer, template: str) -> str:
    names = sorted(tokenizer.vocabulary.name(id) for id in tokenizer.stop_ids)
    system = tokenizer.template.default_system
    lines = ["FROM ./model.gguf", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {to_json(name)}" for name in names]
    lines += [f'SYSTEM """{system}"""'] if system else []
    return "\n".join(lines) + "\n"


def held_out_of(run: Path) -> list[Conversation]:
    """The run's held-out conversations (an adapter without a run: the built-in ones) that end with
    an answer.
    """
    from cllm.config import load_config
    from cllm.data.reader import read_conversations
    from cllm.data.sources import BUILT_IN, prepare
    from cllm.evaluate.answers import with_answers

    if (run / "config.toml").is_file():
        data = prepare(load_config(run / "config.toml").data)
        conversations = (data.held_out or data.train)[:COMPARED]
    else:
        conversations, _ = read_conversations(BUILT_IN["demo-test"])
    return with_answers(conversations)[:COMPARED]


def next_commands(out: Path, to: str, kind: str, base: Path, *, native: bool = True) -> list[str]:
    """What reads the export in `out` of an adapter of `base`, as command lines; what makes Q4_K_M
    of a GGUF file whose `kind` is not quantized yet; and what makes the copy whose layers an
    adapter names, where `base` is not `native`.
    """
    folder = out.resolve().name
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.lower()).strip("._-") or "my"
    if not folder.isascii():  # what was left out would tell two of them apart
        name += f"-{zlib.crc32(os.fsencode(folder)):08x}"
    if to in GGUF:
        file = out / "model.gguf"
        commands = [shell("llama-cli", "-m", file)]
        smaller = shell("llama-quantize", file, out / "model-Q4_K_M.gguf", "Q4_K_M")
        if to == "ollama":
            of_file = ("-f", out / "Modelfile")
            commands = [shell("ollama", "create", name, *of_file), shell("ollama", "run", name)]
            smaller = shell("ollama", "create", f"{name}-q4_k_m", "-q", "q4_K_M", *of_file)
        return commands if kind.startswith("q") else [*commands, smaller]
    if to == "merged":
        return [shell("vllm", "serve", out)]
    rank = read_json(out / "adapter_config.json")["r"]
    rank = next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)
    options = ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"{name}={out}"]
    options += ["--tokenizer", out]  # or prompts are the base's ids, not the training's
    if (template := out / "chat_template.jinja").is_file():
        options += ["--chat-template", template]
    if native:
        return [shell("vllm", "serve", base, *options)]
    copy = out.with_name(f"{out.name}-base")
    convert = shell("python", "tools/convert.py", base, copy)
    return [convert, shell("vllm", "serve", copy, *options)]


def _arguments(argv: list[str]) -> argparse.Namespace:
    from cllm.model.gguf import TYPES

    parser = CommandLine("export")
    parser.take("run", metavar="RUN")
    parser.take("out", metavar="OUT", type=Path)
    parser.take("--to", choices=TARGETS, required=True)
    parser.take("--into", choices=("16bit", "dequantized-nf4"))
    parser.take("--type", choices=tuple(TYPES))
    parser.take("--strength", type=strength, default=1.0, metavar="S")
    parser.take("--check", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args(argv)
    for option, targets in (("type", GGUF), ("into", ("merged", *GGUF))):
        if getattr(arguments, option) and arguments.to not in targets:
            known = ", ".join(targets)
            raise UserError("export.unused", option=option, to=arguments.to, known=known)
    return arguments


def main(argv: list[str]) -> int:
    """Write, check, rename; the last line of stdout is JSON. What was written is kept, and that is
    said, where the check itself could not run; only an export that differs is removed.
    """
    arguments = _arguments(argv)
    from cllm.assembly import locate, open_tokenizer
    from cllm.fidelity import DifferentError, check
    from cllm.model.device import out_of_memory
    from cllm.model.merge import open_merge
    from cllm.runs import refuse_missing

    out, run, to, kind = arguments.out, arguments.run, arguments.to, arguments.type or "f16"
    if out.exists():
        raise UserError("model.exists", path=out)
    refuse_missing(Path(run), hub=False)
    located = locate(run)
    if located.adapter is None:
        raise UserError("run.no_adapter", run=run)
    into = arguments.into or ("dequantized-nf4" if located.model.quantize == "nf4" else "16bit")
    nf4 = into == "dequantized-nf4" and to != "peft"
    held_out = held_out_of(Path(run)) if arguments.check else []
    if arguments.check and not held_out:
        raise UserError("export.no_data", run=run)
    base = located.base()
    tokenizer = open_tokenizer(located)
    part = out.with_name(f"{out.name}.incomplete-{os.getpid()}")
    report = None
    try:
        try:
            merge = open_merge(base, located.adapter, nf4=nf4, strength=arguments.strength)
            write(merge, tokenizer, located, part, to, kind)
        except OSError as error:
            raise UserError("export.disk", path=out, detail=error) from error
        try:
            if held_out:
                report = check(run, part, to, kind, nf4, held_out, arguments.strength)
        except DifferentError:
            raise
        except Exception as error:
            part.rename(out)
            if not (isinstance(error, UserError) or out_of_memory(error)):
                raise
            detail = str(error).split("\n")[0] or type(error).__name__
            raise UserError("export.unchecked", path=out, detail=detail) from error
        size = sum(file.stat().st_size for file in part.iterdir())
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    note("export.written", path=out, gib=f"{size / 2**30:.2f}")
    native = not merge.checkpoint.family.config
    if to != "peft" or merge.checkpoint.config.model_type != "gpt2":  # vLLM has no LoRA for it
        propose(*next_commands(out, to, kind, base, native=native))
    result = {"run": run, "to": to, "strength": arguments.strength, "out": str(out), "bytes": size}
    print_result({**result, "check": report}, arguments.json)
    return 0


if __name__ == "__main__":
    from cllm.__main__ import run as run_program

    raise SystemExit(run_program("export"))
