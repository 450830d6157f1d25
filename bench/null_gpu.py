"""cllm on a CUDA device that computes nothing: memory by PyTorch's own allocator, launches, waits,
and whether every program runs to its end. No number here is a GPU measurement.

    PYTHON=CUVENV/bin/python bench/null_gpu.sh [--only steps|programs|edges] [--filter TEXT]
        [--out FILE]

`steps`: two optimizer steps of published shapes with random weights, on a card of sm_89 and one of
sm_75. `programs`: train -> resume -> eval -> chat -> export -> bench on a tiny checkpoint of every
family, the CPU's kernels computing into the device's memory. `edges`: what a card or its host may
lack. Needs a CUDA build of torch and a C
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
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import readme_table  # noqa: E402

from cllm import fit, memory, shapes  # noqa: E402
from cllm.__main__ import ALLOCATOR  # noqa: E402

RESULT = ROOT / "bench" / "results" / "null-gpu.json"
CONTEXT_MIB = memory.CONTEXT_BYTES // memory.MIB
ROWS = (2048, 8192)
SEQUENCES = 4  # of a row, as in packed data
PRESETS = (
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
    "THUDM/chatglm3-6b",
    "Qwen/Qwen-7B",
    "baichuan-inc/Baichuan2-7B-Base",
    "01-ai/Yi-6B",
)
LARGE = (
    "Qwen/Qwen3-32B"  # its streamed weights leave a host of 24 GiB no room for long rows' inputs
)
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
    "longest": [*SAVINGS[:-1], "train.optimizer=adamw8bit"],
    "dropout": [*PLAIN, "memory.checkpoint_layers=999", "lora.dropout=0.05"],
    "dora": [*PLAIN, "memory.checkpoint_layers=999", "lora.dora=true"],
}


BUDGET_GIB = 8.0


class Card(NamedTuple):
    """A null card: large, so that what does not fit 8 GiB can be measured too; what fits is capped
    there, as a card of 8 GiB would.
    """

    capability: str
    gib: float = 96

    @property
    def environment(self) -> dict[str, str]:
        return {
            "NULLGPU_CC": self.capability,
            "NULLGPU_GIB": str(self.gib),
            "NULLGPU_CONTEXT_MIB": str(CONTEXT_MIB),
        }

    def __str__(self) -> str:
        return f"sm_{self.capability.replace('.', '')}"


ADA, TURING = Card("8.9"), Card("7.5")


class Build(NamedTuple):
    """A published shape, put together once and trained on rows of several lengths."""

    model: str
    setting: str
    card: Card
    rows: tuple[int, ...] = ROWS

    @property
    def name(self) -> str:
        return f"{self.model} {self.setting} {self.card}"


def builds() -> Iterator[Build]:
    """The presets as planned and with every saving, at both lengths on both cards; what else the
    bytes depend on at one length; larger models streamed; the README's table.
    """
    for card in (ADA, TURING):
        for setting in ("planned", "every saving"):
            yield from (Build(model, setting, card) for model in PRESETS)
        for setting in ("dropout", "dora"):
            yield from (Build(model, setting, card, ROWS[:1]) for model in PRESETS)
    yield Build("Qwen/Qwen3-14B", "every saving", ADA)
    yield Build(LARGE, "every saving", ADA, ROWS[:1])
    for model in readme_table.MODELS:
        plain, saving = readme_table.longest_rows(model)
        yield Build(model, "recomputed", ADA, (*ROWS, plain) if plain else ROWS)
        if model != LARGE:
            yield Build(model, "longest", ADA, (saving,))


def run_build(build: Build, environment: dict[str, str]) -> list[dict[str, Any]]:
    """One result for each row length, from a process of their own."""
    rows = ",".join(map(str, build.rows))
    command = ["bench/null_gpu.py", "--child", build.model, rows, *SETTINGS[build.setting]]
    done, seconds = under_null(command, {**environment, **build.card.environment}, "harmless")
    head = {
        "build": build.name,
        "command": " ".join(command),
        "setting": build.setting,
        "card": f"{build.card}, {BUDGET_GIB:g} GiB",
        "exit_code": done.returncode,
        "seconds": round(seconds, 1),
    }
    reports = [json.loads(text) for text in done.stdout.splitlines() if text.startswith('{"model"')]
    if done.returncode:
        head["stderr"] = done.stderr.strip().splitlines()[-3:]
    return [{**head, **report} for report in reports] or [head]


def child(model: str, rows: list[int], overrides: list[str]) -> None:
    """Inside the null device: build once; for each length one step for the moments, and one that
    is measured.
    """
    import torch

    from cllm.bench import BenchModel
    from cllm.config import load_config
    from cllm.model import nf4

    # Scales are computed on the host, which takes most of the time, and no value matters here.
    def no_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = -(-len(absmax) // nf4.GROUP)
        return torch.zeros(len(absmax), dtype=torch.uint8), torch.zeros(groups + 1)

    nf4._quantize_absmax = no_scales
    memory.SEGMENTS_GROW = "expandable_segments" in os.environ["PYTORCH_CUDA_ALLOC_CONF"]
    name, original = shapes.find_config(model)
    lengths = [f"train.row_tokens={min(rows)}", f"train.tokens_per_step={max(rows)}"]
    config = load_config(os.devnull, [*lengths, *overrides])
    torch.cuda.reset_peak_memory_stats()
    bench_model = BenchModel(config, name, original, min(rows))
    loading = torch.cuda.max_memory_allocated()
    for tokens in rows:
        print(json.dumps({**measured(bench_model, tokens), "loading_peak": loading}), flush=True)


def measured(model: Any, tokens: int) -> dict[str, Any]:
    """What a step on rows of `tokens` takes, at the settings that an 8 GiB card would plan."""
    import nullgpu
    import torch

    from cllm.bench import ROWS_PER_STEP, random_row
    from cllm.data.encode import Example
    from cllm.data.packing import collate
    from cllm.learn.proof import peak_bytes
    from cllm.model.device import cap_allocator
    from cllm.model.offload import checkpoint_layers

    trainee = model.trainee
    asked = model.config.memory.checkpoint_layers
    wanted = replace(model.assembly.settings, row_tokens=tokens, checkpoint_layers=asked)
    budget = int(BUDGET_GIB * memory.GIB)
    fewest = fit.fewest_recomputed(model.original, wanted, budget) if asked < 0 else asked
    settings = replace(wanted, checkpoint_layers=fewest)
    planned = fit.estimate_vram(model.original, settings)
    fits = planned.total <= budget
    torch.cuda.empty_cache()
    cap_allocator(BUDGET_GIB if fits else 0, model.assembly.device)
    layers, offload = settings.checkpoint_layers, settings.offload_inputs
    checkpoint_layers(trainee.model, layers, offload=offload)
    ids = random_row(
        tokens // SEQUENCES, trainee.model.config.get_text_config().vocab_size
    ).input_ids.tolist()
    rows = [collate([Example(ids, ids)] * SEQUENCES)] * ROWS_PER_STEP
    trainee.step(rows)
    counters: dict[str, int] = {}

    def counted() -> None:
        nullgpu.reset()
        trainee.step(rows)
        counters.update(nullgpu.counters())

    allocated = peak_bytes(counted, trainee.model, trainee.optimizer)
    reserved = torch.cuda.max_memory_reserved()
    return {
        "model": model.name,
        "row_tokens": tokens,
        "precision": settings.precision,
        "recomputed_layers": layers,
        "fits_8_gib": fits,
        "max_memory_allocated": allocated,
        "max_memory_reserved": reserved,
        "planned": planned.allocated,
        "planned_with_context": planned.total,
        "plan_ratio": planned.allocated / allocated,
        "with_context_gib": (reserved + memory.CONTEXT_BYTES) / memory.GIB,
        "launches_per_step": counters["launch"] + counters["blas"],
        "host_reads_per_step": counters["waits"],
        "rows_per_step": ROWS_PER_STEP,
    }


def under_null(
    arguments: list[str], environment: dict[str, str], values: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    """`python arguments` on the card that `environment` describes; its output and seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(ROOT / "tools" / "nullgpu" / "run"), *arguments],
        cwd=ROOT,
        env={
            **environment,
            "NULLGPU_VALUES": values,
            # Where no value matters, none is copied: 8,192 tokens would fill the host's memory.
            "NULLGPU_COPY": "0" if values == "harmless" else "1",
        },
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
    folder.mkdir()
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


def programs(folder: Path, base: Path) -> dict[str, list[str]]:
    """The commands of one family, in their order; each opens what the one before left."""
    run = folder / "run"
    data = folder / "data.jsonl"
    rows = [{"instruction": f"{i}?", "output": f"It is {i}."} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = [
        *("train", os.devnull, f"model.path={base}", "model.template=chatml"),
        *("model.quantize=nf4", "model.device=cuda", f"data.train={data}", "data.held_out=0.2"),
        *("train.row_tokens=96", "train.tokens_per_step=192", "lora.rank=4", "lora.dropout=0.05"),
        *("eval.samples=2", "eval.max_new_tokens=2", "eval.shots=0", "run.keep=9"),
        *("memory.offload_inputs=true", "memory.stream_layers=3", f"run.dir={run}"),
    ]
    pairs = folder / "pairs.jsonl"
    beside = [
        {"rejected": "No.", "chosen": row["output"], "prompt": row["instruction"]} for row in rows
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in beside), encoding="utf-8")
    prefer = [
        *(*train, "train.steps=6", f"data.train={pairs}", "lora.dropout=0", "preference.loss=dpo"),
        *(f"lora.init_from={run}", f"run.dir={folder / 'prefer'}"),
    ]
    bench = ["bench", str(base), "model.device=cuda", "--rows", "64", "--steps", "1"]
    commands = {
        "train": [*train, "train.steps=6"],
        "resume": [*train, "train.steps=7", "--resume", "--allow-changes"],
        "prefer": prefer,
        "eval": ["eval", str(run), "--data", str(data), "--limit", "2", "--max-new-tokens", "2"],
        "chat": ["chat", str(run), "--terminal"],
        "export peft": ["export", str(run), str(folder / "peft"), "--to", "peft"],
        "export merged": ["export", str(run), str(folder / "merged"), "--to", "merged"],
        "bench": bench,
    }
    # No other program has ALiBi under a native name.
    if "baichuan2_13b" in base.name:
        del commands["export peft"], commands["export merged"]
    return commands


def family_child(folder: Path, base: Path) -> None:
    """Inside the null device: the programs of one family, one after the other in one process."""
    import contextlib
    import io

    import torch

    from cllm import bench
    from cllm.__main__ import run
    from cllm.serve import answer

    # Kernels run on the host here: large products take minutes, a token a tenth of a second, and
    # random weights seldom end an answer.
    bench.PRODUCT["cuda"] = 256
    torch.backends.cudnn.enabled = False  # the null device has none
    as_chat = answer.chat_sampling
    answer.chat_sampling = lambda **values: as_chat(**{**values, "max_new_tokens": 8})
    for program, (name, *arguments) in programs(folder, base).items():
        sys.stdin = io.StringIO("1\n/quit\n")
        output, start = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = run(name, arguments)
        tail = output.getvalue().strip().splitlines()[-4:] if code else []
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps([program, " ".join([name, *arguments]), code, seconds, tail]), flush=True)


def run_programs(
    card: Card, environment: dict[str, str], wanted: str, results: Results
) -> Iterator[dict[str, Any]]:
    """train -> resume -> eval -> chat -> export -> bench of every family."""
    with tempfile.TemporaryDirectory() as name:
        bases = tiny_checkpoints(Path(name) / "bases")
        for family, base in bases.items():
            if wanted not in f"{family} {card}" or results.has("family_run", f"{family} {card}"):
                continue
            folder = Path(name) / family
            folder.mkdir()
            child_command = ["bench/null_gpu.py", "--family", str(folder), str(base)]
            done, _ = under_null(child_command, {**environment, **card.environment}, "host")
            ended = [json.loads(text) for text in done.stdout.splitlines() if text[:2] == '["']
            for program in programs(folder, base):
                known = next((entry for entry in ended if entry[0] == program), None)
                entry = known or [program, "", done.returncode or 1, 0.0, done.stderr[-400:]]
                yield {
                    "family": family,
                    "family_run": f"{family} {card}",
                    "program": program,
                    "command": f"python -m cllm.{entry[1]}".replace(name, "TMP"),
                    "card": str(card),
                    "exit_code": entry[2],
                    "seconds": entry[3],
                    **({"stderr": entry[4]} if entry[2] else {}),
                }


class Edge(NamedTuple):
    """A state of the machine that a program must get through, or say in one line."""

    name: str
    environment: dict[str, str]
    overrides: list[str]
    said: str
    """Part of what the program says, which shows that it got there."""
    exit_code: int = 0


STREAMED = ["memory.stream_layers=3", "memory.offload_inputs=true"]
EDGES = (
    Edge("no host memory to pin", {"NULLGPU_PIN_GIB": "0"}, STREAMED, "could not be page-locked"),
    Edge("second of two cards", {"NULLGPU_DEVICES": "2"}, ["model.device=cuda:1"], "· cuda:1 ·"),
    Edge("no such card", {}, ["model.device=cuda:1"], "there is no cuda:1", exit_code=2),
    Edge(
        "memory runs out while loading",
        {"NULLGPU_GIB": "0.441"},
        [],
        "out of memory while loading",
        exit_code=2,
    ),
)


def run_edges(environment: dict[str, str], results: Results) -> Iterator[dict[str, Any]]:
    """`cllm.train` of a family that the plan does not know, in each of these states."""
    with tempfile.TemporaryDirectory() as name:
        base = tiny_checkpoints(Path(name) / "bases")["internlm3"]
        for edge in EDGES:
            if results.has("edge", edge.name):
                continue
            folder = Path(name) / edge.name.replace(" ", "-")
            folder.mkdir()
            train = programs(folder, base)["train"]
            command = ["-m", "cllm.train", *train[1:], *edge.overrides, "train.steps=1"]
            states = {**environment, **ADA.environment, **edge.environment}
            done, seconds = under_null(command, states, "host")
            output = done.stderr + done.stdout
            right = done.returncode == edge.exit_code and edge.said in output
            yield {
                "edge": edge.name,
                "command": f"python {' '.join(command)}".replace(name, "TMP"),
                "card": str(ADA),
                "exit_code": int(not right),
                "program_exit_code": done.returncode,
                "said": next((line for line in output.splitlines() if edge.said in line), ""),
                "seconds": round(seconds, 1),
                **({} if right else {"stderr": output[-600:]}),
            }


def main() -> int:
    if sys.argv[1:2] == ["--family"]:
        family_child(Path(sys.argv[2]), Path(sys.argv[3]))
        return 0
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], [int(n) for n in sys.argv[3].split(",")], sys.argv[4:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("steps", "programs", "edges"))
    parser.add_argument("--filter", default="", help="of models, settings, families, cards")
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
    results = Results(arguments.out, arguments.allocator)
    for build in builds() if arguments.only in (None, "steps") else ():
        if arguments.filter in build.name and not results.has("build", build.name):
            results.add(run_build(build, environment))
    for card in (ADA, TURING) if arguments.only in (None, "programs") else ():
        for result in run_programs(card, environment, arguments.filter, results):
            results.add([result])
    for result in run_edges(environment, results) if arguments.only in (None, "edges") else ():
        results.add([result])
    return int(any(result["exit_code"] for result in results.runs))


class Results:
    """The JSON of all runs, written after each; what succeeded in an earlier call is kept."""

    def __init__(self, path: Path, allocator: str) -> None:
        self.path = path
        self.allocator = allocator
        earlier = json.loads(path.read_text(encoding="utf-8"))["programs"] if path.is_file() else []
        self.runs: list[dict[str, Any]] = [run for run in earlier if not run["exit_code"]]

    def has(self, key: str, name: str) -> bool:
        return any(run.get(key) == name for run in self.runs)

    def add(self, runs: list[dict[str, Any]]) -> None:
        self.runs += runs
        for run in runs:
            print(line(run), flush=True)
        written = {
            "what": "PyTorch's CUDA allocator on a device that computes nothing; no measurement",
            "command": "bench/null_gpu.sh",
            "allocator": self.allocator,
            "context_mib": CONTEXT_MIB,
            "programs": self.runs,
        }
        self.path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def line(result: dict[str, Any]) -> str:
    """One run for people."""
    head = f"{result['exit_code']} {result['seconds']:6.1f} s  {result['card']}  "
    if "plan_ratio" not in result:
        what = result.get("family") or result.get("edge") or result["command"]
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
