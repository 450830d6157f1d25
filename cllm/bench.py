"""`python -m cllm.bench`: what training a model costs on this device, measured with the trainer's
own step; or, with `--plan`, on paper.

Peak memory is `max_memory_allocated` on a GPU; on the CPU it is a storage census: the bytes of all
tensor storages alive at once. What other trainers need, how fast the model answers, and the plot
are scripts of a checkout's bench/.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import timeit
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm import shapes
from cllm.config import PRESETS, Config, is_config, load_config
from cllm.corpus import encode_corpus, read_corpus, tokenizer_of
from cllm.data.pairs import dialogue, sides
from cllm.data.quality import qwen_tokens
from cllm.memory import GIB
from cllm.messages import (
    CommandLine,
    UserError,
    command,
    note,
    print_result,
    propose,
    say,
    table,
    to_json,
)
from cllm.plan import Workload, settings_of, show_plan

if TYPE_CHECKING:
    import torch

    from cllm.data.packing import PackedBatch

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = Path(__file__).parents[1] / "bench"
PEFT, GENERATION, PLOT = "peft_step.py", "generation.py", "plot.py"
# so that gradients of earlier rows are alive at the peak, as in any accumulated step
ROWS_PER_STEP = 2
WARM_STEPS = 3
PRODUCT = {"cuda": 8192, "cpu": 1024}  # rows and columns of the matrices that the rate is of
SLOWEST_WARM_ROW = 20.0  # seconds: a plan does not wait for more, and says "on paper"
Record = dict[str, Any]
"""A JSON object: a config.json, or one result of the report."""


def random_row(tokens: int, vocabulary: int, seed: int = 0) -> PackedBatch:
    """One sequence of random ids that fills a row, every token supervised: the most expensive row
    there is.
    """
    import torch

    from cllm.data.encode import Example
    from cllm.data.packing import collate

    ids = torch.randint(
        0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return collate([Example(ids, ids)])


class BenchModel:
    """One model on one device with the trainer's settings: its adapter, optimizer and step."""

    def __init__(self, config: Config, name: str, original: Record | None, row_tokens: int) -> None:
        from cllm.assembly import assemble
        from cllm.learner import trainee_of
        from cllm.model.checkpoint import original_config
        from cllm.model.source import resolve

        source = original or resolve(config.model.path)
        self.config = config
        self.name = name
        self.assembly = assemble(
            source,
            config.model,
            config.memory,
            adapter=config.lora,
            row_tokens=row_tokens,
            optimizer=config.train.optimizer,
            name=name,
            seed=config.train.seed,
        )
        self.cuda = self.assembly.device.type == "cuda"
        self.original = original_config(source) if isinstance(source, Path) else source
        self.trainee = trainee_of(config, self.assembly)
        self.trainee.model.train()

    def step(self, row: PackedBatch, rows: int = ROWS_PER_STEP) -> tuple[float, float]:
        """One optimizer step; returns its loss and seconds."""
        import torch

        start = time.perf_counter()
        loss = self.trainee.step([row] * rows).loss
        if self.cuda:
            torch.cuda.synchronize(self.assembly.device)
        return loss, time.perf_counter() - start

    def measure(self, tokens: int, steps: int) -> Record:
        """Loss of the first step, step time, speed, peak and estimate for rows of `tokens`, with as
        few recomputed layers as fit, if there is a budget and the config leaves it open;
        out_of_memory if it does not run.
        """
        import torch

        from cllm import fit
        from cllm.learn.optim import StepOutOfMemoryError
        from cllm.learn.proof import peak_bytes
        from cllm.model.offload import checkpoint_layers, decoder_layers

        model = self.trainee.model
        budget = self.assembly.budget
        layers = self.config.memory.checkpoint_layers
        settings = replace(self.assembly.settings, row_tokens=tokens, checkpoint_layers=layers)
        if budget:
            settings = fit.decided(self.original, settings, budget)
        row = random_row(tokens, self.assembly.model.config.get_text_config().vocab_size)
        checkpoint_layers(model, settings.checkpoint_layers, offload=settings.offload_inputs)
        estimate = fit.estimate_vram(self.original, settings)
        result = {
            "model": self.name,
            "layers": len(decoder_layers(model)),
            **asdict(settings),
            "budget_bytes": budget,
            "reserved_bytes": None,
            "estimate_bytes": estimate.allocated,
            "estimate_total_bytes": estimate.total,
            "link_bytes": ROWS_PER_STEP * estimate.crossing,
        }
        try:
            result["first_loss"], _ = self.step(row)
            seconds = statistics.median(self.step(row)[1] for _ in range(steps))
            peak = peak_bytes(lambda: self.step(row), model, self.trainee.optimizer)
        except StepOutOfMemoryError:
            return {**result, "out_of_memory": True}
        if self.cuda:
            device = self.assembly.device
            result["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            free, total = torch.cuda.mem_get_info(device)
            # and whatever else uses the card
            result["context_bytes"] = total - free - torch.cuda.memory_reserved(device)
        kept = replace(settings, checkpoint_layers=0, stream_layers=0, mlp_tile_tokens=0)
        needed = ROWS_PER_STEP * fit.estimate_vram(self.original, kept).flops
        return {
            **result,
            "step_seconds": seconds,
            "tokens_per_second": ROWS_PER_STEP * tokens / seconds,
            "mfu": needed
            / seconds
            / matmul_rate(self.assembly.device, self.assembly.precision.weights),
            "peak_bytes": peak,
            "estimate_ratio": estimate.allocated / peak,
        }


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large matrix product on a device: what MFU is a share of."""
    import torch

    size = PRODUCT[device.type]
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=4)
    return float(2 * size**3 / min(seconds))


# --- On paper
def _work(config: Config, original: Record, rate: float, named: bool) -> Workload | None:
    """The config's data in tokens, encoded with the base's tokenizer if it is at hand; then rows
    are timed on this device, too, unless that would take long. None: the data are not there yet,
    which somebody `named` or which are a preset's placeholder.
    """
    try:
        corpus = read_corpus(config, accept_rejects=True)
    except UserError as error:
        if error.code != "data.missing_file":
            raise
        note("bench.no_data", reason=error.args[0] if named else say("bench.unnamed"))
        return None
    if not ((ASSETS / config.model.path).is_dir() or Path(config.model.path).exists()):
        answers = [dialogue(item, side) for item in corpus.train for side in sides(item)]
        return Workload(qwen_tokens(answers))
    import torch

    from cllm.fit import estimate_vram
    from cllm.model.source import resolve

    length = config.train.row_tokens
    tokenizer = tokenizer_of(config, resolve(config.model.path))
    encoded = encode_corpus(corpus, tokenizer, config, row_tokens=length)
    note("train.data", summary=encoded.summary)
    rows = encoded.rows
    tokens = sum(rows.sizes)
    work = Workload(tokens, tokens / (len(rows) * length))
    on_cpu = estimate_vram(original, settings_of(config, "fp32", "cpu")).flops / rate
    if not torch.cuda.is_available() and on_cpu >= SLOWEST_WARM_ROW:
        return work
    note("bench.timing", steps=WARM_STEPS)
    model = BenchModel(config, config.model.path, None, length)
    seconds = [model.step(row, 1)[1] for row in rows.take(WARM_STEPS + 1)]
    return replace(work, row_seconds=statistics.median(seconds[1:]))


# --- The program
def config_of(name: str, overrides: list[str]) -> Config:
    """The config named, or the defaults for a model's name or directory: NF4, as on a small
    card.
    """
    if is_config(name):
        return load_config(name, overrides)
    path = f"model.path={json.dumps(name, ensure_ascii=False)}"
    return load_config(os.devnull, [path, "model.quantize=nf4", *overrides])


def _training(name: str, known: str, row_tokens: int) -> list[str]:
    """What `cllm.train` takes for a config, or for a model that is `known` so: its preset, or one
    of another model, with the rows of the plan.
    """
    if is_config(name):
        return [name]
    path = name if "/" in name or known == name else known
    words = ["preset:qwen3-4b", f"model.path={path}", f"run.dir=runs/{Path(path).name}"]
    for preset in sorted(PRESETS.glob("*.toml"), reverse=True):
        trained = load_config(preset).model
        if trained.path == path:
            words = [f"preset:{preset.stem}"]
            if trained.quantize == "none":
                words.append("model.quantize=nf4")  # as a name alone is planned
    return [*words, f"train.row_tokens={row_tokens}"]


def published(config: Config, layers: int) -> tuple[str, Record]:
    """(name, config.json) of the config's model, as published or with so many `layers`."""
    name = config.model.path
    built_in = ASSETS / name / "config.json"
    if name.endswith(".gguf"):
        from cllm.model.checkpoint import original_config

        original = original_config(Path(name))
    elif built_in.is_file():
        _, original = shapes.find_config(str(built_in))
    else:
        known, original = shapes.find_config(name)
        if known.rpartition("/")[2].lower() != name.rpartition("/")[2].lower():
            note("bench.same_shape", name=name, known=known)
        name = known
    if layers:
        keys = ("num_layers", "n_layer", "num_hidden_layers")
        original = {**original, next((k for k in keys if k in original), keys[-1]): layers}
    return name, original


def script(name: str) -> Path:
    """A script of bench/. Raises UserError where this is no checkout."""
    path = SCRIPTS / name
    if not path.is_file():
        raise UserError("bench.script", path=path)
    return path


def run_script(name: str, arguments: list[str]) -> Any:
    """Run a script of bench/ in a process of its own; returns its last line, which is JSON."""
    command = [sys.executable, str(script(name)), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError("bench.script_failed", name=name, code=done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `models` are its configs and models, `overrides` the rest."""
    parser = CommandLine("bench")
    parser.take("words", nargs="*", metavar="CONFIG|preset:NAME|MODEL|section.key=value")
    for switch in ("--plan", "--random-init", "--generate", "--doctor"):
        parser.take(switch, action="store_true")
    parser.take("--layers", type=int, default=0)
    parser.take("--rows", type=lambda text: [int(n) for n in text.split(",")], metavar="N,N")
    parser.take("--steps", type=int, default=5)
    parser.take("--out", type=Path)
    parser.take("--against", choices=["peft"])
    arguments = parser.parse_intermixed_args(argv)
    arguments.overrides = [word for word in arguments.words if "=" in word]
    arguments.models = [word for word in arguments.words if "=" not in word] or ["tiny-zh"]
    return arguments


def bench_model(config: Config, arguments: argparse.Namespace, row_tokens: int) -> BenchModel:
    """The config's model as the command line asks for it: random weights of its published shape, or
    the checkpoint itself.
    """
    name, original = config.model.path, None
    if arguments.random_init or arguments.layers or arguments.against:
        name, original = published(config, arguments.layers)
    note("bench.building", name=name)
    return BenchModel(config, name, original, row_tokens)


def main(argv: list[str]) -> int:
    """Measure (or plan) every model; the last line on stdout is {"device", "results", …} or
    {"plans"}.
    """
    arguments = parse(argv)
    if arguments.doctor:
        from cllm.doctor import examine

        findings = [finding._asdict() for finding in examine()]
        print_result({"findings": findings}, arguments.json)
        return 0
    configs = {name: config_of(name, arguments.overrides) for name in arguments.models}
    if arguments.plan:
        from cllm.model.device import Precision, choose_device

        device = choose_device("auto")
        rate = matmul_rate(device, Precision.choose("auto", device).weights)
        plans = []
        for name, config in configs.items():
            known, original = published(config, arguments.layers)
            note("bench.planning", name=known)
            mine = any(word.startswith("data.train=") for word in arguments.overrides)
            named = mine or not name.startswith("preset:")
            work = _work(config, original, rate, named) if is_config(name) else None
            words = _training(name, known, config.train.row_tokens)
            words = [*words, *(word for word in arguments.overrides if word not in words)]
            if not work and not mine:
                words.append("data.train=my.jsonl")
            plans.append(show_plan(config, known, original, work, rate, words))
        print_result({"plans": plans}, arguments.json)
        return 0
    if arguments.generate:
        script(GENERATION)  # before anything is measured
    report: Record = {"device": "", "results": [], "generation": []}
    for config in configs.values():
        _measure(config, arguments, report)
    if arguments.generate:
        report["generation"] = run_script(GENERATION, argv)
    print(_table(report))
    if arguments.out:
        arguments.out.write_text(to_json(report, indent=1) + "\n", encoding="utf-8")
        if (SCRIPTS / PLOT).is_file():
            run_script(PLOT, [str(arguments.out)])
    named = arguments.models[-1]
    train = command("train", named, *arguments.overrides)
    model = f"model.path={named}"
    init = command("check", "my.jsonl", "--init", "my.toml", model, *arguments.overrides)
    propose(train if is_config(named) else init)
    print_result(report, arguments.json)
    return 0


def _measure(config: Config, arguments: argparse.Namespace, report: Record) -> None:
    """Add one model's results to the report. Its peers run first, while the memory is theirs; what
    comes after finds all of it free.
    """
    from cllm.model.device import release_memory

    rows = arguments.rows or [config.train.row_tokens]
    peers: list[Record] = [{} for _ in rows]
    if arguments.against:
        original = published(config, arguments.layers)[1]
        for i, tokens in enumerate(rows):
            request = {"original": original, "row_tokens": tokens, "steps": arguments.steps}
            peers[i] = run_script(PEFT, [to_json({**asdict(config), **request})])
    model = bench_model(config, arguments, min(rows))
    report |= _machine(model.assembly.device)
    for tokens, peer in zip(rows, peers, strict=True):
        report["results"].append({**model.measure(tokens, arguments.steps), "peft": peer})
    del model
    gc.collect()
    release_memory()


def _machine(device: Any) -> Record:
    import torch
    import transformers

    machine = {
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["device"] = properties.name
        machine |= {"device_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return machine


def _table(report: Record) -> str:
    """The measured rows as a table, then a line for each peer and each number of answers."""
    rows, lines = [say("bench.columns").split("|")], []
    for r in report["results"]:
        measured = ["", "", "", say("bench.out_of_memory")]
        ratio = ""
        if "peak_bytes" in r:
            measured = [
                f"{r['tokens_per_second']:,.0f}",
                f"{r['step_seconds']:,.2f}",
                f"{100 * r['mfu']:,.1f}",
                f"{r['peak_bytes'] / GIB:,.3f}",
            ]
            ratio = f"{r['estimate_ratio']:.3f}"
            lines += [_against(r, setting, peer) for setting, peer in r["peft"].items()]
        sizes = [str(r["layers"]), str(r["row_tokens"])]
        rows.append([r["model"], *sizes, *measured, f"{r['estimate_bytes'] / GIB:.3f}", ratio])
    for g in report["generation"]:
        first, speed = f"{g['first_token_seconds']:.3f}", f"{g['decode_tokens_per_second']:.1f}"
        lines.append(say("bench.generation", rows=g["rows"], first=first, speed=speed))
    return "\n".join([table(rows), *lines])


def _against(result: Record, setting: str, peer: Record) -> str:
    return say(
        "bench.against",
        row=result["row_tokens"],
        setting=setting,
        peak=f"{peer['peak_bytes'] / GIB:.3f}",
        memory=f"{result['peak_bytes'] / peer['peak_bytes']:.2f}",
        speed=f"{result['tokens_per_second'] / peer['tokens_per_second']:.2f}",
    )


if __name__ == "__main__":
    from cllm.__main__ import run

    sys.exit(run("bench"))
