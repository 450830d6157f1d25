"""cllm on a CUDA device that computes nothing: memory by PyTorch's own allocator, launches, waits,
and whether every program runs to its end. No number here is a GPU measurement.

    PYTHON=CUVENV/bin/python bench/null_gpu.sh [--only steps|programs] [--filter TEXT] [--out FILE]

`steps`: two optimizer steps of published shapes with random weights, on a card of sm_89 and one of
sm_75. `programs`: train -> resume -> eval -> chat -> export -> bench on a tiny checkpoint of every
family, the CPU's kernels computing into the device's memory. Needs a CUDA build of torch and a C
compiler (tools/nullgpu). Writes {"programs": [one object a run], …} into
bench/results/null-gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cllm import memory  # noqa: E402
from cllm.__main__ import ALLOCATOR  # noqa: E402
from cllm.messages import UserError  # noqa: E402

RESULT = ROOT / "bench" / "results" / "null-gpu.json"
CONTEXT_MIB = memory.CONTEXT_BYTES // memory.MIB
ROWS = (2048, 8192)
SEQUENCES = 4  # of a row, as in packed data
MODELS = {
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "chatglm3-6b": "THUDM/chatglm3-6b",
    "qwen-7b": "Qwen/Qwen-7B",
    "baichuan2-7b": "baichuan-inc/Baichuan2-7B-Base",
    "yi-6b": "01-ai/Yi-6B",
}
LARGE = {"qwen3-14b": "Qwen/Qwen3-14B", "qwen3-32b": "Qwen/Qwen3-32B"}
PLAIN = ["model.quantize=nf4", "lora.rank=16"]
SAVINGS = [
    *PLAIN,
    "memory.checkpoint_layers=999",
    "memory.offload_inputs=true",
    "memory.stream_layers=999",
    "memory.mlp_tile_tokens=1024",
    "memory.chunk_mib=32",
    "memory.embedding=cpu",
    "model.head=int8",
]
SETTINGS = {
    "planned": PLAIN,
    "recomputed": [*PLAIN, "memory.checkpoint_layers=999"],
    "every saving": SAVINGS,
    "dropout": [*PLAIN, "memory.checkpoint_layers=999", "lora.dropout=0.05"],
    "dora": [*PLAIN, "memory.checkpoint_layers=999", "lora.dora=true"],
}


class Card(NamedTuple):
    """A null card."""

    capability: str
    gib: float = 8

    @property
    def environment(self) -> dict[str, str]:
        return {
            "NULLGPU_CC": self.capability,
            "NULLGPU_GIB": str(self.gib),
            "NULLGPU_CONTEXT_MIB": str(CONTEXT_MIB),
        }

    def __str__(self) -> str:
        return f"sm_{self.capability.replace('.', '')}, {self.gib:g} GiB"


ADA, TURING = Card("8.9"), Card("7.5")


class Step(NamedTuple):
    """Two optimizer steps of a published shape."""

    model: str
    tokens: int
    setting: str
    card: Card


def steps() -> Iterator[Step]:
    """The presets as planned and with every saving, at both lengths on both cards; what else the
    bytes depend on at one length; larger models streamed.
    """
    for card in (ADA, TURING):
        for setting in ("planned", "every saving"):
            yield from (Step(m, n, setting, card) for m in MODELS.values() for n in ROWS)
        for setting in ("dropout", "dora"):
            yield from (Step(m, ROWS[0], setting, card) for m in MODELS.values())
    yield from (Step(m, ROWS[0], "recomputed", ADA) for m in MODELS.values())
    yield from (Step(m, n, "every saving", ADA) for m in LARGE.values() for n in ROWS)


def run_step(step: Step, environment: dict[str, str]) -> dict[str, Any]:
    """One step in a process of its own, on the card if the plan fits it, else on a large one."""
    overrides = SETTINGS[step.setting]
    command = ["bench/null_gpu.py", "--child", step.model, str(step.tokens), *overrides]
    for card in (step.card, step.card._replace(gib=96)):
        budget = f"memory.budget_gib={card.gib if card.gib < 96 else 0}"
        done, seconds = under_null([*command, budget], card, environment, "harmless")
        refused = done.returncode == 2 and "[memory." in done.stderr
        if not refused:
            break
    report = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return {
        "command": " ".join([*command, budget]),
        "setting": step.setting,
        "card": str(card),
        "exit_code": done.returncode,
        "seconds": round(seconds, 1),
        **report,
        **({} if done.returncode == 0 else {"stderr": done.stderr.strip().splitlines()[-3:]}),
    }


def child(model: str, tokens: int, overrides: list[str]) -> None:
    """Inside the null device: build, one step for the moments, one that is counted."""
    import nullgpu
    import torch

    from cllm.bench import ROWS_PER_STEP, Subject, random_row
    from cllm.config import load_config
    from cllm.data.encode import Example
    from cllm.data.packing import collate
    from cllm.learn.proof import peak_bytes
    from cllm.model import nf4
    from cllm.model.offload import checkpoint_layers

    # Scales are computed on the host, which takes most of the time, and no value matters here.
    def no_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = -(-len(absmax) // nf4.GROUP)
        return torch.zeros(len(absmax), dtype=torch.uint8), torch.zeros(groups + 1)

    nf4._quantize_absmax = no_scales
    name, original = memory.find_config(model)
    config = load_config(os.devnull, [f"train.row_tokens={tokens}", *overrides])
    torch.cuda.reset_peak_memory_stats()
    subject = Subject(config, name, original, tokens)
    loading = torch.cuda.max_memory_allocated()
    settings, trainee = subject.settings(tokens), subject.trainee
    checkpoint_layers(trainee.model, settings.checkpoint_layers, offload=settings.offload_inputs)
    ids = random_row(tokens // SEQUENCES, subject.shape.vocab).input_ids.tolist()
    rows = [collate([Example(ids, ids)] * SEQUENCES)] * ROWS_PER_STEP
    trainee.step(rows)
    nullgpu.reset()
    trainee.step(rows)
    counters = nullgpu.counters()
    allocated = peak_bytes(lambda: trainee.step(rows), trainee.model, trainee.optimizer)
    reserved = torch.cuda.max_memory_reserved()
    planned = memory.estimate_vram(subject.shape, settings)
    print(
        json.dumps(
            {
                "model": name,
                "row_tokens": tokens,
                "precision": settings.precision,
                "recomputed_layers": settings.checkpoint_layers,
                "max_memory_allocated": allocated,
                "max_memory_reserved": reserved,
                "loading_peak": loading,
                "planned": planned.allocated,
                "planned_with_context": planned.total,
                "plan_ratio": planned.allocated / allocated,
                "with_context_gib": (reserved + memory.CONTEXT_BYTES) / memory.GIB,
                "launches_per_step": counters["launch"] + counters["blas"],
                "host_reads_per_step": counters["waits"],
                "rows_per_step": ROWS_PER_STEP,
            }
        )
    )


def under_null(
    arguments: list[str], card: Card, environment: dict[str, str], values: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    """`python arguments` on the card; its output and seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(ROOT / "tools" / "nullgpu" / "run"), *arguments],
        cwd=ROOT,
        env={**environment, **card.environment, "NULLGPU_VALUES": values},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=1800,
    )
    return done, time.perf_counter() - start


# --- Programs on tiny checkpoints


def add_byte_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with ChatML's tokens, for a checkpoint that has none of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def tiny_checkpoints(folder: Path) -> dict[str, Path]:
    """Family -> a tiny checkpoint: the golden ones in the authors' layout, and native ones."""
    import torch
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import NATIVE, SHARED, tiny_config

    made: dict[str, Path] = {}
    golden = [*(ROOT / "tests" / "golden").glob("*/config.json")]
    golden += [*(SHARED / "golden").glob("*/dev/config.json")]
    for file in golden:
        family = file.parent.name if file.parent.name != "dev" else file.parents[1].name
        if family not in made:
            made[family] = Path(shutil.copytree(file.parent, folder / family))
    for name in NATIVE:
        config = tiny_config(name)
        config.vocab_size = 320
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        made[name] = folder / name
    for path in made.values():
        # Their own tokenizers, where they have one, hold the words of other tests.
        for file in path.glob("*token*"):
            file.unlink()
        add_byte_tokenizer(path)
    return made


def programs(folder: Path, base: Path, capability: str) -> list[tuple[str, list[str]]]:
    """The commands of one family, in their order; each opens what the one before left."""
    run = folder / "run"
    data = folder / "data.jsonl"
    rows = [{"instruction": f"How is {i} written?", "output": f"It is {i}."} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = [
        *("-m", "cllm.train", os.devnull, f"model.path={base}", "model.template=chatml"),
        *("model.quantize=nf4", "model.device=cuda", f"data.train={data}", "data.held_out=0.2"),
        *("train.row_tokens=96", "train.tokens_per_step=192", "train.steps=2", "lora.rank=4"),
        *("lora.dropout=0.05", "eval.samples=2", "eval.max_new_tokens=4", "eval.shots=0"),
        *("memory.offload_inputs=true", "memory.stream_layers=3", f"run.dir={run}"),
    ]
    exported = [] if base.name == "baichuan2_13b" else ["merged", "peft"]
    return [
        ("train", train),
        ("resume", [*train, "--resume"]),
        ("eval", ["-m", "cllm.eval", str(run), "--data", str(data), "--limit", "2"]),
        ("chat", ["-m", "cllm.chat", str(run), "--terminal"]),
        *(
            (f"export {to}", ["-m", "cllm.export", str(run), str(folder / to), "--to", to])
            for to in exported
        ),
    ]


def run_programs(card: Card, environment: dict[str, str], wanted: str) -> Iterator[dict[str, Any]]:
    """train -> resume -> eval -> chat -> export of every family."""
    with tempfile.TemporaryDirectory() as name:
        for family, base in tiny_checkpoints(Path(name) / "bases").items():
            if wanted not in family:
                continue
            folder = Path(name) / family
            folder.mkdir()
            for program, arguments in programs(folder, base, card.capability):
                done, seconds = under_null(arguments, card, environment, "host")
                shown = " ".join(arguments).replace(name, "TMP")
                yield {
                    "family": family,
                    "program": program,
                    "command": f"python {shown}",
                    "card": str(card),
                    "exit_code": done.returncode,
                    "seconds": round(seconds, 1),
                    **({} if done.returncode == 0 else {"stderr": done.stderr.splitlines()[-4:]}),
                }


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        try:
            child(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("steps", "programs"))
    parser.add_argument("--filter", default="", help="of models, settings, families")
    parser.add_argument("--allocator", default=ALLOCATOR["linux"])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "CLLM_LANG": "en",
        "CLLM_DATA_CACHE": "",
        "PYTORCH_CUDA_ALLOC_CONF": arguments.allocator,
    }
    results: list[dict[str, Any]] = []
    if arguments.only != "programs":
        for step in steps():
            if arguments.filter not in f"{step.model} {step.tokens} {step.setting} {step.card}":
                continue
            results.append(run_step(step, environment))
            print(line(results[-1]), flush=True)
    if arguments.only != "steps":
        for card in (ADA, TURING):
            for result in run_programs(card, environment, arguments.filter):
                results.append(result)
                print(line(result), flush=True)
    written = {
        "what": "PyTorch's CUDA allocator on a device that computes nothing; no GPU measurement",
        "command": "bench/null_gpu.sh",
        "allocator": arguments.allocator,
        "context_mib": CONTEXT_MIB,
        "programs": results,
    }
    arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return int(any(result["exit_code"] for result in results))


def line(result: dict[str, Any]) -> str:
    """One run for people."""
    head = f"{result['exit_code']} {result['seconds']:6.1f} s  {result['card']}  "
    if "plan_ratio" not in result:
        what = result.get("family", result["command"])
        return f"{head}{what} {result.get('program', '')} {result.get('stderr', '')}"
    return (
        f"{head}{result['model']} {result['row_tokens']} {result['setting']}: "
        f"{result['max_memory_allocated'] / memory.GIB:.3f} GiB, plan {result['plan_ratio']:.3f}, "
        f"with context {result['with_context_gib']:.3f}, "
        f"loading {result['loading_peak'] / memory.GIB:.3f}, "
        f"{result['launches_per_step']} launches, {result['host_reads_per_step']} reads"
    )


if __name__ == "__main__":
    raise SystemExit(main())
