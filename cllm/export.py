"""`python -m cllm.export RUN --to merged|peft|gguf|ollama OUT`: a run in the form other programs
read, compared with the trained model.

Merging streams tensor by tensor, so that memory stays near the largest tensor; the check afterwards
holds one whole model at a time. Everything is written beside OUT and renamed last: what bears the
name OUT is whole, and passed its check.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.data.schema import Conversation, Message
from cllm.messages import UserError, note, say, table

if TYPE_CHECKING:
    import torch

    from cllm.data.encode import Example
    from cllm.learn.optim import Precision
    from cllm.model.tokenizer import Tokenizer
    from cllm.serve.engine import Engine
    from cllm.serve.load import Located

TARGETS = ("merged", "peft", "gguf", "ollama")
LIMITS = {"q8_0": (0.97, 1e-2)}  # least top-1 agreement, largest mean KL in nats; anything else:
LIMIT = (0.99, 1e-3)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that its --max-lora-rank takes
CONVERSATIONS, POSITIONS, SAMPLES, SAMPLE_TOKENS = 16, 512, 3, 32


# --- Writing
def write(
    found: Located, base: Path, tokenizer: Tokenizer, folder: Path, to: str, *, nf4: bool, kind: str
) -> None:
    """The export in the new directory `folder`. Raises UserError for what the target cannot hold,
    before anything is written.
    """
    import torch

    from cllm.data.dialects import go
    from cllm.model.adapter import read_adapter, write_adapter
    from cllm.model.gguf import architecture, write_gguf
    from cllm.model.lora import LoraSettings
    from cllm.model.merge import open_merge, write_merged
    from cllm.model.tokenizer import portable

    assert found.adapter is not None
    merge = open_merge(base, found.adapter, nf4=nf4)
    if merge.checkpoint.family.alibi:
        raise UserError("export.alibi", base=found.base_name)
    config = merge.checkpoint.config
    if to in ("gguf", "ollama"):
        architecture(config)
        keys, modelfile = (
            tokenizer.to_gguf(config.vocab_size),
            go(tokenizer.template) if to == "ollama" else "",
        )
        folder.mkdir(parents=True)
        # float32, so that the writer alone rounds: a 16-bit base would round the sums before
        write_gguf(
            folder / "model.gguf", config, merge.layout, merge.tensors(torch.float32), kind, keys
        )
        if modelfile:
            (folder / "Modelfile").write_text(_modelfile(tokenizer, modelfile), encoding="utf-8")
        return
    if to == "peft":
        settings, _ = read_adapter(found.adapter)
        if settings.dora:
            raise UserError("export.dora", path=found.adapter)
        if merge.checkpoint.family.config:
            note("export.native_names", base=found.base_name)
        # the factor is baked into alpha: llama.cpp's converter knows alpha / r only
        rank = settings.rank
        note(
            "export.vllm",
            base=found.base_name,
            rank=next((r for r in VLLM_RANKS if r >= rank), rank),
        )
        baked = LoraSettings(rank, merge.scaling * rank)
        write_adapter(merge.model, folder, merge.adapter, baked, base=found.base_name)
    else:
        folder.mkdir(parents=True)
        write_merged(merge, folder)
        stops = {
            "eos_token_id": sorted(tokenizer.stop_ids),
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": tokenizer.bos_id,
        }
        (folder / "generation_config.json").write_text(
            json.dumps(stops, indent=2) + "\n", encoding="utf-8"
        )
    tokenizer.save(folder)
    portable(tokenizer, folder)


def _modelfile(tokenizer: Tokenizer, template: str) -> str:
    names = sorted(tokenizer.vocabulary.name(id) for id in tokenizer.stop_ids)
    system = tokenizer.template.default_system
    lines = [
        "FROM ./model.gguf",
        f'TEMPLATE """{template}"""',
        *(f"PARAMETER stop {json.dumps(name)}" for name in names),
    ]
    return "\n".join([*lines, *([f'SYSTEM """{system}"""'] if system else [])]) + "\n"


# --- Checking
def measure(
    engine: Engine, examples: Sequence[Example], prompts: Sequence[list[int]], tokenizer: Tokenizer
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """((N, V) log-probabilities at supervised positions, their (N,) labels, greedy answers)."""
    import torch

    from cllm.serve.engine import Sampling

    rows, labels, room = [], [], POSITIONS
    with torch.no_grad(), engine.autocast():
        for example in examples:
            wanted = torch.tensor(
                [i for i, label in enumerate(example.labels[1:]) if label >= 0][:room]
            )
            if room and len(wanted):
                logits = engine.model(
                    input_ids=torch.tensor([example.input_ids], device=engine.device),
                    use_cache=False,
                ).logits[0]
                rows.append(logits[wanted.to(engine.device)].float().log_softmax(-1).cpu())
                labels.append(torch.tensor(example.labels)[wanted + 1])
                room -= len(wanted)
    outputs = engine.generate(prompts, Sampling(max_new_tokens=SAMPLE_TOKENS))
    return torch.cat(rows), torch.cat(labels), [tokenizer.decode(ids) for ids in outputs]


def compare(
    trained: tuple[Any, Any, list[str]], exported: tuple[Any, Any, list[str]]
) -> dict[str, Any]:
    """KL(trained || exported) in nats and top-1 agreement, means over positions; perplexity of
    both; the answers side by side.
    """
    (p, labels, before), (q, _, after) = trained, exported
    perplexity = [
        math.exp(float(-logps.gather(1, labels[:, None]).double().mean())) for logps in (p, q)
    ]
    return {
        "positions": len(labels),
        "mean_kl": float((p.exp() * (p - q)).sum(-1).double().mean()),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "perplexity_trained": perplexity[0],
        "perplexity_exported": perplexity[1],
        "samples": [{"trained": a, "exported": b} for a, b in zip(before, after, strict=True)],
    }


def reopen(
    folder: Path, to: str, precision: Precision, questions: Sequence[list[Message]]
) -> tuple[Any, list[Any]]:
    """(the export as its readers see it, the ids that its own tokenizer and template give each
    question).
    """
    from cllm.serve import open_model

    if to != "merged":
        file = folder if to == "peft" else folder / "model.gguf"
        loaded = open_model(
            file, precision=precision.name, device=precision.device, quantize="none"
        )
        known = to == "peft" or loaded.tokenizer.chat_template
        return loaded.model, [
            loaded.tokenizer.encode_chat(question) for question in questions
        ] if known else []
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=precision.weights, local_files_only=True)
        .to(precision.device)
        .eval()
    )
    precision.prepare(model)
    reader = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    turns = [[m._asdict() for m in question] for question in questions if reader.chat_template]
    return model, [
        reader.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        for turn in turns
    ]


def check(
    run: str, folder: Path, to: str, kind: str, nf4: bool, held_out: list[Conversation]
) -> dict[str, Any]:
    """The fidelity report: the trained model first, then the export, one at a time. Raises
    UserError beyond the limits.
    """
    from cllm.data.encode import encode_all
    from cllm.serve import open_model
    from cllm.serve.engine import Engine

    loaded = open_model(run, quantize="nf4" if nf4 else "none")
    engine, tokenizer, precision = loaded.engine(), loaded.tokenizer, loaded.precision
    limit = min(2048, engine.positions)
    examples = [
        e
        for e in encode_all(held_out, tokenizer, max_tokens=limit, truncate="prompt")
        if not isinstance(e, str)
    ][:CONVERSATIONS]
    if not examples:
        raise UserError("export.nothing_to_compare", rows=len(held_out), limit=limit)
    questions = [list(c.messages[:-1]) for c in held_out[:CONVERSATIONS]]
    expected = [tokenizer.encode_chat(question) for question in questions]
    prompts = [ids for ids in expected if len(ids) < engine.max_tokens][:SAMPLES]
    trained = measure(engine, examples, prompts, tokenizer)
    del loaded, engine
    gc.collect()
    model, ids = reopen(folder, to, precision, questions)
    exported = Engine(
        model, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id, autocast=precision.autocast
    )
    report = compare(trained, measure(exported, examples, prompts, tokenizer))
    equal = sum(list(a) == b for a, b in zip(ids, expected, strict=False))
    report |= {
        "prompts": len(expected),
        "prompts_equal": equal if ids else None,
        "trained_on": "nf4" if nf4 else "16bit",
    }
    agreement, kl = report["limits"] = LIMITS.get(kind if to in ("gguf", "ollama") else "", LIMIT)
    report["passed"] = (
        report["top1_agreement"] >= agreement and report["mean_kl"] <= kl and (not ids or equal > 0)
    )
    (folder / "fidelity.json").write_text(
        json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    print(summary(report))
    if not report["passed"]:
        raise UserError(
            "export.differs",
            kl=f"{report['mean_kl']:.2g}",
            agreement=f"{report['top1_agreement']:.1%}",
            equal=equal,
            prompts=len(expected),
        )
    return report


def summary(report: dict[str, Any]) -> str:
    """For people: the figures, then each answer before and after."""
    shown = (
        say("export.no_template")
        if report["prompts_equal"] is None
        else f"{report['prompts_equal']}/{report['prompts']}"
    )
    lines = [
        [
            say("export.figures.perplexity"),
            f"{report['perplexity_trained']:.4f}",
            f"{report['perplexity_exported']:.4f}",
        ],
        [say("export.figures.kl"), "", f"{report['mean_kl']:.2e}"],
        [say("export.figures.top1"), "", f"{report['top1_agreement']:.2%}"],
        [say("export.figures.prompts"), "", shown],
    ]
    header = ["", say("export.figures.trained"), say("export.figures.exported")]
    samples = [f"< {sample['trained']!r}\n> {sample['exported']!r}" for sample in report["samples"]]
    return "\n".join([table([header, *lines]), *samples])


def held_out_of(run: Path) -> list[Conversation]:
    """The run's held-out conversations (an adapter without a run: the built-in ones) that end with
    an answer.
    """
    from cllm.config import load_config
    from cllm.data.reader import read_conversations
    from cllm.data.sources import BUILT_IN, prepare

    if (run / "config.toml").is_file():
        data = prepare(load_config(run / "config.toml").data)
        conversations = list((data.held_out or data.train)[: 4 * CONVERSATIONS])
    else:
        conversations, _ = read_conversations(BUILT_IN["demo-test"])
    return [c for c in conversations if len(c.messages) > 1 and c.messages[-1].role == "assistant"][
        : 4 * CONVERSATIONS
    ]


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cllm.export", description=say("export.help"))
    parser.add_argument("run", metavar="RUN", help=say("export.help.run"))
    parser.add_argument("out", metavar="OUT", type=Path, help=say("export.help.out"))
    parser.add_argument("--to", choices=TARGETS, required=True, help=say("export.help.to"))
    parser.add_argument(
        "--into", choices=("16bit", "dequantized-nf4"), help=say("export.help.into")
    )
    parser.add_argument(
        "--type",
        choices=("f32", "f16", "bf16", "q8_0"),
        default="f16",
        help=say("export.help.type"),
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=say("export.help.check"),
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Write, check, rename; the last line of stdout is JSON."""
    arguments = _arguments(argv)
    from cllm.model.source import resolve
    from cllm.serve.load import locate, open_tokenizer

    out, run = arguments.out, Path(arguments.run)
    if out.exists():
        raise UserError("model.exists", path=out)
    found = locate(run)
    if found.adapter is None:
        raise UserError("run.no_adapter", run=run)
    nf4 = (
        found.config.quantize == "nf4"
        if arguments.into is None
        else arguments.into == "dequantized-nf4"
    )
    nf4 = nf4 and arguments.to != "peft"
    held_out = held_out_of(run) if arguments.check else []
    if arguments.check and not held_out:
        raise UserError("export.no_data", run=run)
    base, tokenizer = resolve(found.base_name), open_tokenizer(found)
    part = out.with_name(f"{out.name}.incomplete-{os.getpid()}")
    try:
        try:
            write(found, base, tokenizer, part, arguments.to, nf4=nf4, kind=arguments.type)
        except OSError as error:
            raise UserError("export.disk", path=out, detail=error) from error
        report = (
            check(arguments.run, part, arguments.to, arguments.type, nf4, held_out)
            if arguments.check
            else None
        )
        size = sum(file.stat().st_size for file in part.iterdir())
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    note("export.written", path=out, gib=f"{size / 2**30:.2f}")
    print(
        json.dumps(
            {
                "run": arguments.run,
                "to": arguments.to,
                "out": str(out),
                "bytes": size,
                "check": report,
            },
            ensure_ascii=False,
        )
    )
    return 0


if __name__ == "__main__":
    from cllm.__main__ import run as run_program

    raise SystemExit(run_program("export"))
