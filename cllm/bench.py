"""`python -m cllm.bench`: what training a model costs on this device, measured with the trainer's
own step; or, with `--plan`, on paper.

Peak memory is `max_memory_allocated` on a GPU; on the CPU it is a storage census: the bytes of all
tensor storages alive at once.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm import memory
from cllm.config import Config, load_config
from cllm.memory import GIB, MIB, Settings, estimate_vram, make_plan
from cllm.messages import UserError, note, say, table
from cllm.prepare import load_trainable, row_settings, tokenizer_of

if TYPE_CHECKING:
    from cllm.data.packing import PackedBatch

ASSETS = Path(__file__).parent / "assets"
PEER = Path(__file__).parents[1] / "bench" / "peft_step.py"
PLAN_ROWS = (512, 1024, 2048, 4096, 8192)
PLAN_BUDGET_GIB = 8.0
# so that gradients of earlier rows are alive at the peak, as in any accumulated step
ROWS_PER_STEP = 2
DECODE_TOKENS = 32
WARM_STEPS = 3
SLOWEST_WARM_ROW = 20.0  # seconds: a plan does not wait for more, and says "on paper"
# one or two cores: only decides whether to measure
CPU = memory.Hardware(flops=0.4e12, bandwidth=20e9)
TOKENS_PER_CHARACTER = 0.7  # of mixed Chinese text, where no tokenizer is at hand


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


class Subject:
    """One model on one device with the trainer's settings: its adapter, optimizer and step."""

    def __init__(self, config: Config, name: str, original: dict[str, Any] | None) -> None:
        import torch

        from cllm.learn.loss import sft_loss
        from cllm.learn.optim import Precision, check_optimizer, make_optimizer
        from cllm.learn.proof import cap_allocator, choose_device
        from cllm.model.offload import place
        from cllm.model.source import resolve

        device = choose_device(config.model.device)
        self.config, self.name, self.device, self.cuda = (
            config,
            name,
            torch.device(device),
            device.startswith("cuda"),
        )
        check_optimizer(config.train.optimizer, self.device.type)
        self.budget = cap_allocator(config.memory.budget_gib, device)
        self.precision = Precision.choose(config.model.precision, self.device.type)
        model, _ = load_trainable(
            config, original or resolve(config.model.path), self.precision, device
        )
        self.shape = memory.shape_of(original or model.config.to_dict(), name)
        place(model, config.memory, device)
        self.model, self.scaler = model.train(), self.precision.scaler()
        self.optimizer = make_optimizer(model, 1e-4, name=config.train.optimizer)
        self.objective = lambda model, row: sft_loss(model, row, config.memory.chunk_mib * MIB)

    def settings(self, tokens: int) -> Settings:
        """What a run on rows of `tokens` would use: as few recomputed layers as fit, if there is a
        budget and the config leaves it open.
        """
        settings = row_settings(self.config, tokens, self.precision.name, self.device.type)
        return (
            make_plan(self.shape, settings, self.budget / GIB).settings if self.budget else settings
        )

    def step(self, row: PackedBatch, rows: int = ROWS_PER_STEP) -> tuple[float, float]:
        """One optimizer step; returns its loss and seconds."""
        import torch

        from cllm.learn.optim import train_step

        start = time.perf_counter()
        how: dict[str, Any] = {"precision": self.precision, "scaler": self.scaler, "max_norm": 1.0}
        loss = train_step(self.model, [row] * rows, self.objective, self.optimizer, **how).loss
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return loss, time.perf_counter() - start

    def measure(self, tokens: int, steps: int) -> dict[str, Any]:
        """Loss of the first step, step time, speed, peak and estimate for rows of `tokens`;
        out_of_memory if it does not run.
        """
        import torch

        from cllm.learn.optim import StepOutOfMemoryError
        from cllm.learn.proof import peak_bytes
        from cllm.model.offload import checkpoint_layers

        row, settings = random_row(tokens, self.shape.vocab), self.settings(tokens)
        checkpoint_layers(self.model, settings.checkpoint_layers, offload=settings.offload_inputs)
        estimate = estimate_vram(self.shape, settings)
        result = {
            "model": self.name,
            "layers": self.shape.layers,
            **asdict(settings),
            "budget_bytes": self.budget,
            "reserved_bytes": None,
        }
        result |= {"estimate_bytes": estimate.allocated, "estimate_total_bytes": estimate.total}
        result["link_bytes"] = ROWS_PER_STEP * memory.crossing_bytes(self.shape, settings)
        try:
            result["first_loss"], _ = self.step(row)
            seconds = result["step_seconds"] = statistics.median(
                self.step(row)[1] for _ in range(steps)
            )
            peak = peak_bytes(lambda: self.step(row), self.model, self.optimizer)
        except StepOutOfMemoryError:
            return {**result, "out_of_memory": True}
        if self.cuda:
            result["reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            # and whatever else uses the card
            result["context_bytes"] = total - free - torch.cuda.memory_reserved(self.device)
        useful = (
            ROWS_PER_STEP
            * memory.row_flops(self.shape, Settings(tokens, checkpoint_layers=0))
            / seconds
        )
        result |= {
            "tokens_per_second": ROWS_PER_STEP * tokens / seconds,
            "mfu": useful / self.matmul_rate(),
        }
        return {**result, "peak_bytes": peak, "estimate_ratio": estimate.allocated / peak}

    def matmul_rate(self) -> float:
        """Operations per second of one large matrix product on this device: what MFU is a share
        of.
        """
        import torch

        size = 8192 if self.cuda else 1024
        a = torch.ones(
            size,
            size,
            dtype=torch.float16 if self.precision.name == "fp16" else self.precision.weights,
            device=self.device,
        )
        return float(
            2 * size**3 / min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=4))
        )

    def generation(self, prompt_tokens: int = 128) -> list[dict[str, Any]]:
        """Time to the first token and decoded tokens per second for 1, 4 and 16 random prompts at
        once.
        """
        from cllm.serve.engine import Engine, Sampling

        engine = Engine(self.model, autocast=self.precision.autocast)
        results = []
        for rows in (1, 4, 16):
            prompts = [
                random_row(prompt_tokens, self.shape.vocab, seed).input_ids.tolist()
                for seed in range(rows)
            ]
            # the first warms up
            how = [
                Sampling(max_new_tokens=count, stop_ids=frozenset())
                for count in (1, 1, DECODE_TOKENS)
            ]
            _, first, whole = (
                timeit.timeit(partial(engine.generate, prompts, sampling), number=1)
                for sampling in how
            )
            speed = rows * (DECODE_TOKENS - 1) / (whole - first)
            results.append(
                {
                    "model": self.name,
                    "rows": rows,
                    "first_token_seconds": first,
                    "decode_tokens_per_second": speed,
                }
            )
        return results


def show_plan(
    config: Config, name: str, original: dict[str, Any], work: dict[str, Any]
) -> dict[str, Any]:
    """Print the plan of one model for people: items, rows x settings, the ladder, time; returns it
    for the JSON.
    """
    shape, budget = memory.shape_of(original, name), config.memory.budget_gib or PLAN_BUDGET_GIB
    precision = "bf16" if config.model.precision == "auto" else config.model.precision
    settings = row_settings(config, config.train.row_tokens, precision, "cuda")
    plan = make_plan(shape, settings, budget)
    estimate = plan.estimate
    print(
        say(
            "bench.plan",
            name=name,
            row=settings.row_tokens,
            quantize=settings.quantize,
            precision=precision,
            rank=settings.rank,
        )
    )
    print(estimate.table())
    grid, rows = [], [[f"GiB / {budget:g}", *map(str, PLAN_ROWS), *say("bench.grid").split("|")]]
    for step in memory.savings(shape, settings, int(budget * GIB)):
        totals = {
            n: estimate_vram(shape, replace(step.settings, row_tokens=n)).total for n in PLAN_ROWS
        }
        longest = make_plan(shape, step.settings, budget).longest_row
        grid.append(
            {
                "change": step.change,
                "slowdown": step.slowdown,
                "totals": totals,
                "longest_row": longest,
            }
        )
        rows.append(
            [
                f"+ {step.change}",
                *(f"{total / GIB:.2f}" for total in totals.values()),
                str(longest),
                f"{step.slowdown:.2f}",
            ]
        )
    print(table(rows))
    verdict = "bench.fits" if plan.fits else "bench.too_big"
    print(
        say(verdict, budget=f"{budget:g}", longest=plan.longest_row, fewest=plan.checkpoint_layers)
    )
    for step in plan.ladder:
        print(f"  {step.total / GIB:6.2f} GiB  x{step.slowdown:.2f}  {step.change}")
    return {
        "model": name,
        "budget_gib": budget,
        **asdict(settings),
        **asdict(estimate),
        "total": estimate.total,
        "grid": grid,
        "conversion": memory.conversion_bytes(shape),
        "fits": plan.fits,
        "longest_row": plan.longest_row,
        "fewest": plan.checkpoint_layers,
        "time": _time(config, shape, plan.settings, work),
        "ladder": [
            {"change": step.change, "total": step.total, "slowdown": step.slowdown}
            for step in plan.ladder
        ],
    }


def _time(
    config: Config, shape: memory.Shape, settings: Settings, work: dict[str, Any]
) -> dict[str, Any]:
    """Tokens, steps and hours of the run; of a million tokens, if there is no data. Prints them."""
    train, fill = config.train, work.get("fill", 1.0)
    rows_per_step, seconds = (
        max(1, train.tokens_per_step // train.row_tokens),
        work.get("row_seconds"),
    )
    wanted = work["tokens"] * train.epochs if work else 10**6
    steps = (train.steps if work else 0) or max(
        1, round(wanted / (rows_per_step * train.row_tokens * fill))
    )
    tokens = steps * rows_per_step * train.row_tokens * fill
    hours = steps * rows_per_step * (seconds or memory.row_seconds(shape, settings) * fill) / 3600
    result = {
        "tokens": round(tokens),
        "exact_tokens": "fill" in work,
        "steps": steps,
        "hours": hours,
        "measured": seconds is not None,
    }
    values = {
        "tokens": f"{tokens:,.0f}",
        "steps": steps,
        "hours": f"{hours:.2f}",
        "speed": f"{tokens / hours / 3600:,.0f}",
    }
    print(say("bench.time.measured" if seconds else "bench.time.roofline", **values))
    return result


def _work(config: Config, original: dict[str, Any]) -> dict[str, Any]:
    """What a config's data amount to: tokens per epoch and how full rows are; with the base at
    hand, seconds of a row on this device.
    """
    from cllm.data.sources import prepare

    train = prepare(config.data).train
    if not ((ASSETS / config.model.path).is_dir() or Path(config.model.path).exists()):
        return {
            "tokens": round(
                TOKENS_PER_CHARACTER * sum(len(m.content) for c in train for m in c.messages)
            )
        }
    import torch

    from cllm.data.encode import encode_set
    from cllm.data.packing import PackedRows
    from cllm.model.source import resolve

    row_tokens, tokenizer = (
        config.train.row_tokens,
        tokenizer_of(config, resolve(config.model.path)),
    )
    examples = encode_set(
        train,
        tokenizer,
        kind=config.data.kind,
        max_tokens=row_tokens,
        truncate=config.data.truncate,
    )[0]
    rows, tokens = PackedRows(examples, row_tokens, seed=config.train.seed), sum(examples.sizes)
    work: dict[str, Any] = {"tokens": tokens, "fill": tokens / (len(rows) * row_tokens)}
    settings = row_settings(config, row_tokens, "fp32", "cpu")
    if (
        torch.cuda.is_available()
        or memory.row_seconds(memory.shape_of(original), settings, CPU) < SLOWEST_WARM_ROW
    ):
        note("bench.timing", steps=WARM_STEPS)
        subject = Subject(config, config.model.path, None)
        work["row_seconds"] = statistics.median(
            [subject.step(row, 1)[1] for row in rows.take(WARM_STEPS + 1)][1:]
        )
    return work


def _config(name: str, overrides: list[str]) -> Config:
    """The config named, or the defaults for a model's name or directory: NF4, as on a small
    card.
    """
    if name.startswith("preset:") or name.endswith(".toml"):
        return load_config(name, overrides)
    return load_config(
        os.devnull,
        [f"model.path={json.dumps(name, ensure_ascii=False)}", "model.quantize=nf4", *overrides],
    )


def _original(config: Config, layers: int) -> tuple[str, dict[str, Any]]:
    built_in = ASSETS / config.model.path / "config.json"
    if config.model.path.endswith(".gguf"):
        from cllm.model.checkpoint import original_config

        name, original = config.model.path, original_config(Path(config.model.path))
    else:
        name, original = memory.find_config(
            str(built_in) if built_in.is_file() else config.model.path
        )
    key = next(
        (key for key in ("num_layers", "n_layer", "num_hidden_layers") if key in original),
        "num_hidden_layers",
    )
    return (config.model.path if built_in.is_file() else name), {
        **original,
        key: layers,
    } if layers else original


def _peer(config: Config, original: dict[str, Any], tokens: int, steps: int) -> dict[str, Any]:
    """The same model, rows and adapter under Trainer and PEFT, in a process of its own."""
    if not PEER.is_file():
        raise UserError("bench.peer", path=PEER)
    keys = ("quantize", "precision", "device")
    spec = {
        "config": original,
        "row_tokens": tokens,
        "steps": steps,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
    }
    spec |= {"seed": config.train.seed, **{key: getattr(config.model, key) for key in keys}}
    done = subprocess.run(
        [sys.executable, str(PEER), json.dumps(spec)],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise UserError("bench.peer_failed", code=done.returncode)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cllm.bench", description=say("bench.help"))
    parser.add_argument(
        "subjects",
        nargs="*",
        metavar="CONFIG|preset:NAME|MODEL|section.key=value",
        help=say("bench.help.subjects"),
    )
    parser.add_argument("--plan", action="store_true", help=say("bench.help.plan"))
    parser.add_argument("--random-init", action="store_true", help=say("bench.help.random_init"))
    parser.add_argument("--layers", type=int, default=0, help=say("bench.help.layers"))
    parser.add_argument(
        "--rows",
        type=lambda text: [int(n) for n in text.split(",")],
        metavar="N,N",
        help=say("bench.help.rows"),
    )
    parser.add_argument("--steps", type=int, default=5, help=say("bench.help.steps"))
    parser.add_argument("--generate", action="store_true", help=say("bench.help.generate"))
    parser.add_argument("--out", type=Path, help=say("bench.help.out"))
    parser.add_argument("--doctor", action="store_true", help=say("bench.help.doctor"))
    parser.add_argument("--against", choices=["peft"], help=say("bench.help.against"))
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    """Measure (or plan) every subject; the last line on stdout is {"device", "results", …} or
    {"plans"}.
    """
    arguments = _arguments(argv)
    if arguments.doctor:
        from cllm.doctor import examine

        print(
            json.dumps(
                {"findings": [finding._asdict() for finding in examine()]}, ensure_ascii=False
            )
        )
        return 0
    overrides = [subject for subject in arguments.subjects if "=" in subject]
    names = [name for name in arguments.subjects if "=" not in name] or ["tiny-zh"]
    configs = [_config(name, overrides) for name in names]
    if arguments.plan:
        plans = []
        for given, config in zip(names, configs, strict=True):
            published = _original(config, arguments.layers)
            work = (
                _work(config, published[1])
                if given.startswith("preset:") or given.endswith(".toml")
                else {}
            )
            plans.append(show_plan(config, *published, work))
        print(json.dumps({"plans": plans}))
        return 0
    report: dict[str, Any] = {"device": "", "results": [], "generation": []}
    for config in configs:
        random, rows = (
            arguments.random_init or arguments.layers or arguments.against,
            arguments.rows or [config.train.row_tokens],
        )
        name, original = (
            _original(config, arguments.layers) if random else (config.model.path, None)
        )
        peers = [
            _peer(config, original, tokens, arguments.steps)
            if arguments.against and original
            else {}
            for tokens in rows
        ]
        note("bench.building", name=name)
        subject = Subject(config, name, original)
        report |= _machine(subject.device)
        report["results"] += [
            {**subject.measure(tokens, arguments.steps), "peft": peer}
            for tokens, peer in zip(rows, peers, strict=True)
        ]
        report["generation"] += subject.generation() if arguments.generate else []
        del subject
        gc.collect()
    print(_table(report))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        _plot(report, arguments.out.with_suffix(".png"))
    print(json.dumps(report))
    return 0


def _machine(device: Any) -> dict[str, Any]:
    import torch
    import transformers

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
    }
    if device.type != "cuda":
        return {"device": f"{platform.machine()}, {torch.get_num_threads()} threads", **versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "device_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        **versions,
    }


def _plot(report: dict[str, Any], target: Path) -> None:
    """Peak memory (dashed: the estimate) and speed over the row length, a line per model and
    settings.
    """
    from matplotlib.figure import Figure

    lines: dict[str, list[dict[str, Any]]] = {}
    for r in (r for r in report["results"] if "peak_bytes" in r):
        lines.setdefault(
            f"{r['model']}, {r['quantize']}, {r['stream_layers']} streamed", []
        ).append(r)
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="tight")
    peaks, speed = figure.subplots(1, 2)
    for number, (name, rows) in enumerate(lines.items()):
        for axes, key, unit, style in (
            (peaks, "peak_bytes", GIB, "o-"),
            (peaks, "estimate_bytes", GIB, "--"),
            (speed, "tokens_per_second", 1, "o-"),
        ):
            axes.plot(
                [r["row_tokens"] for r in rows],
                [r[key] / unit for r in rows],
                style,
                color=f"C{number}",
                label=name,
            )
    peaks.set(xlabel="row, tokens", ylabel="peak GiB (dashed: estimate)", ylim=(0, None))
    speed.set(xlabel="row, tokens", ylabel="tokens per second", ylim=(0, None))
    speed.legend(frameon=False, fontsize=7)
    figure.suptitle(report["device"])
    figure.savefig(target)


def _table(report: dict[str, Any]) -> str:
    rows, lines = [say("bench.columns").split("|")], []
    for r in report["results"]:
        ran = "peak_bytes" in r
        measured = (
            [
                (r["tokens_per_second"], 0),
                (r["step_seconds"], 2),
                (100 * r["mfu"], 1),
                (r["peak_bytes"] / GIB, 3),
            ]
            if ran
            else []
        )
        cells = [f"{value:,.{digits}f}" for value, digits in measured] or [
            "",
            "",
            "",
            say("bench.out_of_memory"),
        ]
        ratio = f"{r['estimate_ratio']:.3f}" if ran else ""
        rows.append(
            [
                r["model"],
                str(r["layers"]),
                str(r["row_tokens"]),
                *cells,
                f"{r['estimate_bytes'] / GIB:.3f}",
                ratio,
            ]
        )
        for setting, peer in r["peft"].items() if ran else ():
            memory, speed = (
                r["peak_bytes"] / peer["peak_bytes"],
                r["tokens_per_second"] / peer["tokens_per_second"],
            )
            how = {
                "peak": f"{peer['peak_bytes'] / GIB:.3f}",
                "memory": f"{memory:.2f}",
                "speed": f"{speed:.2f}",
            }
            lines.append(say("bench.against", row=r["row_tokens"], setting=setting, **how))
    for g in report["generation"]:
        first, speed = f"{g['first_token_seconds']:.3f}", f"{g['decode_tokens_per_second']:.1f}"
        lines.append(say("bench.generation", rows=g["rows"], first=first, speed=speed))
    return "\n".join([table(rows), *lines])


if __name__ == "__main__":
    from cllm.__main__ import run

    sys.exit(run("bench"))
