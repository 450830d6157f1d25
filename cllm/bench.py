"""`python -m cllm.bench`: what training a model costs on this device, measured with the trainer's own step; or, with `--plan`, on paper.

Peak memory is `max_memory_allocated` on a GPU; on the CPU it is a storage census: the bytes of all tensor storages alive at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.config import Config, load_config
from cllm.memory import GIB, MIB, Settings, estimate_vram, find_config, make_plan, shape_of
from cllm.messages import UserError, note, say, table

if TYPE_CHECKING:
    from torch import Tensor

    from cllm.data.packing import PackedBatch

ASSETS = Path(__file__).parent / "assets"
PEER = Path(__file__).parents[1] / "bench" / "peft_step.py"
PLAN_ROWS = (512, 1024, 2048, 4096, 8192)
PLAN_BUDGET_GIB = 8.0
ROWS_PER_STEP = 2  # so that gradients of earlier rows are alive at the peak, as in any accumulated step
DECODE_TOKENS = 32


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def peak_storage_bytes(run: Callable[[], object]) -> int:
    """The most bytes of storages that `run` creates and that live at once; what existed before does not count."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Census(TorchDispatchMode):
        alive, peak = 0, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for storage in (t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)):
                if storage._cdata not in old and storage._cdata not in known:
                    known[storage._cdata] = storage.nbytes()
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage._cdata)
            self.peak = max(self.peak, self.alive)
            return result

        def gone(self, key: int) -> None:
            self.alive -= known.pop(key)

    known: dict[int, int] = {}
    census: Any = Census()  # type: ignore[no-untyped-call]
    with census:
        run()
    return int(census.peak)


def random_row(tokens: int, vocabulary: int, seed: int = 0) -> PackedBatch:
    """One sequence of random ids that fills a row, every token supervised: the most expensive row there is."""
    import torch

    from cllm.data.encode import Example
    from cllm.data.packing import collate

    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return collate([Example(ids, ids)])


class Subject:
    """One model on one device with the trainer's settings: its adapter, optimizer and step."""

    def __init__(self, config: Config, name: str, original: dict[str, Any] | None) -> None:
        import torch

        from cllm.learn.loss import sft_loss
        from cllm.learn.optim import Precision, make_optimizer
        from cllm.model.checkpoint import load_model, random_model
        from cllm.model.lora import inject_lora
        from cllm.model.offload import checkpoint_layers
        from cllm.model.source import resolve

        device = config.model.device if config.model.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.config, self.name, self.device, self.cuda = config, name, torch.device(device), device.startswith("cuda")
        self.context_bytes = _cap(config.memory.budget_gib, self.device) if self.cuda else 0
        self.precision = Precision.choose(config.model.precision, self.device.type)
        how: dict[str, Any] = {"dtype": self.precision.weights, "device": self.device}
        how["quantize"] = None if config.model.quantize == "none" else config.model.quantize
        torch.manual_seed(config.train.seed)
        model: Any = random_model(original, **how) if original else load_model(resolve(config.model.path), **how)
        self.shape = shape_of(original or model.config.to_dict(), name)
        lora = config.lora
        inject_lora(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets, rslora=lora.rslora)
        self.precision.prepare(model)
        checkpoint_layers(model, config.memory.checkpoint_layers)
        self.model, self.optimizer, self.scaler = model.train(), make_optimizer(model, 1e-4), self.precision.scaler()
        self.objective = lambda model, row: sft_loss(model, row, config.memory.chunk_mib * MIB)

    def step(self, row: PackedBatch) -> tuple[float, float]:
        """One optimizer step; returns its loss and seconds."""
        import torch

        from cllm.learn.optim import train_step

        start = time.perf_counter()
        how: dict[str, Any] = {"precision": self.precision, "scaler": self.scaler, "max_norm": 1.0}
        loss = train_step(self.model, [row] * ROWS_PER_STEP, self.objective, self.optimizer, **how).loss
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return loss, time.perf_counter() - start

    def measure(self, tokens: int, steps: int) -> dict[str, Any]:
        """Loss of the first step, step time, speed, peak and estimate for rows of `tokens`; out_of_memory if it does not run."""
        import torch

        row = random_row(tokens, self.shape.vocab)
        settings = settings_of(self.config, tokens, self.precision.name, self.device.type)
        estimate = estimate_vram(self.shape, settings)
        result = {"model": self.name, "layers": self.shape.layers, **asdict(settings), "context_bytes": self.context_bytes}
        result |= {"estimate_bytes": estimate.allocated, "estimate_total_bytes": estimate.total, "reserved_bytes": None}
        try:
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            result["first_loss"], _ = self.step(row)
            result["step_seconds"] = statistics.median(self.step(row)[1] for _ in range(steps))
            if self.cuda:
                peak = torch.cuda.max_memory_allocated(self.device)
                result["reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
            else:
                state = [t for s in self.optimizer.state.values() for t in s.values()]
                peak = storage_bytes([*self.model.parameters(), *self.model.buffers(), *state])
                peak += peak_storage_bytes(lambda: self.step(row))
        except torch.cuda.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            return {**result, "out_of_memory": True}
        speed = ROWS_PER_STEP * tokens / result["step_seconds"]
        return {**result, "tokens_per_second": speed, "peak_bytes": peak, "estimate_ratio": estimate.allocated / peak}

    def generation(self, prompt_tokens: int = 128) -> list[dict[str, Any]]:
        """Time to the first token and decoded tokens per second for 1, 4 and 16 random prompts at once."""
        from cllm.serve.engine import Engine, Sampling

        engine = Engine(self.model, autocast=self.precision.autocast)
        results = []
        for rows in (1, 4, 16):
            prompts = [random_row(prompt_tokens, self.shape.vocab, seed).input_ids.tolist() for seed in range(rows)]
            seconds = []
            for count in (1, 1, DECODE_TOKENS):  # the first warms up
                start = time.perf_counter()
                engine.generate(prompts, Sampling(max_new_tokens=count, stop_ids=frozenset()))
                seconds.append(time.perf_counter() - start)
            speed = rows * (DECODE_TOKENS - 1) / (seconds[2] - seconds[1])
            results.append({"model": self.name, "rows": rows, "first_token_seconds": seconds[1], "decode_tokens_per_second": speed})
        return results


def _cap(budget_gib: float, device: Any) -> int:
    """Bytes of the CUDA context; the allocator is kept within the budget less these."""
    import torch

    torch.zeros((), device=device)
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    if budget_gib:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (budget_gib * GIB - context) / total), device)
    return int(context)


def settings_of(config: Config, row_tokens: int, precision: str, device: str) -> Settings:
    """What the estimate needs of a config; precision and device resolved by the caller."""
    targets = config.lora.targets if isinstance(config.lora.targets, str) else tuple(config.lora.targets)
    how, chunk = config.memory.checkpoint_layers, config.memory.chunk_mib * MIB
    return Settings(row_tokens, config.model.quantize, precision, config.lora.rank, targets, how, chunk, device)


def show_plan(config: Config, name: str, original: dict[str, Any]) -> dict[str, Any]:
    """Print the plan of one model for people; returns it for the JSON."""
    shape, budget = shape_of(original, name), config.memory.budget_gib or PLAN_BUDGET_GIB
    precision = "bf16" if config.model.precision == "auto" else config.model.precision
    settings = settings_of(config, config.train.row_tokens, precision, "cuda")
    plan, estimate = make_plan(shape, settings, budget), estimate_vram(shape, settings)
    totals = {tokens: estimate_vram(shape, replace(settings, row_tokens=tokens)).total for tokens in PLAN_ROWS}
    print(say("bench.plan", name=name, row=settings.row_tokens, quantize=settings.quantize, precision=precision, rank=settings.rank))
    print(estimate.table())
    print(say("bench.totals", totals="  ".join(f"{tokens}: {total / GIB:.2f}" for tokens, total in totals.items())))
    verdict = "bench.fits" if plan.fits else "bench.too_big"
    print(say(verdict, budget=f"{budget:g}", longest=plan.longest_row, fewest=plan.checkpoint_layers))
    for code, changed, total in plan.ladder:
        print(f"  {total / GIB:6.2f} GiB  {say(code, tokens=changed.row_tokens)}")
    result = {"model": name, "budget_gib": budget, **asdict(settings), **asdict(estimate), "total": estimate.total, "totals": totals}
    ladder = [{"change": code, "total": total} for code, _, total in plan.ladder]
    return {**result, "fits": plan.fits, "longest_row": plan.longest_row, "fewest": plan.checkpoint_layers, "ladder": ladder}


def _config(name: str, overrides: list[str]) -> Config:
    """The config named, or the defaults for a model's name or directory: NF4, as on a small card."""
    if name.startswith("preset:") or name.endswith(".toml"):
        return load_config(name, overrides)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.toml"
        file.write_text(f'[model]\npath = {json.dumps(name)}\nquantize = "nf4"\n', encoding="utf-8")
        return load_config(file, overrides)


def _original(config: Config, layers: int) -> tuple[str, dict[str, Any]]:
    built_in = ASSETS / config.model.path / "config.json"
    name, original = find_config(str(built_in) if built_in.is_file() else config.model.path)
    key = next((key for key in ("num_layers", "n_layer", "num_hidden_layers") if key in original), "num_hidden_layers")
    return (config.model.path if built_in.is_file() else name), {**original, key: layers} if layers else original


def _peer(config: Config, original: dict[str, Any], tokens: int, steps: int) -> dict[str, Any]:
    """The same model, rows and adapter under Trainer and PEFT, in a process of its own."""
    if not PEER.is_file():
        raise UserError("bench.peer", path=PEER)
    keys = ("quantize", "precision", "device")
    spec = {"config": original, "row_tokens": tokens, "steps": steps, "rank": config.lora.rank, "alpha": config.lora.alpha}
    spec |= {"seed": config.train.seed, **{key: getattr(config.model, key) for key in keys}}
    done = subprocess.run([sys.executable, str(PEER), json.dumps(spec)], stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError("bench.peer_failed", code=done.returncode)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cllm.bench", description=say("bench.help"))
    parser.add_argument("subjects", nargs="*", metavar="CONFIG|preset:NAME|MODEL|section.key=value", help=say("bench.help.subjects"))
    parser.add_argument("--plan", action="store_true", help=say("bench.help.plan"))
    parser.add_argument("--random-init", action="store_true", help=say("bench.help.random_init"))
    parser.add_argument("--layers", type=int, default=0, help=say("bench.help.layers"))
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], metavar="N,N", help=say("bench.help.rows"))
    parser.add_argument("--steps", type=int, default=5, help=say("bench.help.steps"))
    parser.add_argument("--generate", action="store_true", help=say("bench.help.generate"))
    parser.add_argument("--doctor", action="store_true", help=say("bench.help.doctor"))
    parser.add_argument("--against", choices=["peft"], help=say("bench.help.against"))
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    """Measure (or plan) every subject; the last line on stdout is {"device", "results", …} or {"plans"}."""
    arguments = _arguments(argv)
    if arguments.doctor:
        from cllm.doctor import examine

        print(json.dumps({"findings": [finding._asdict() for finding in examine()]}, ensure_ascii=False))
        return 0
    overrides = [subject for subject in arguments.subjects if "=" in subject]
    configs = [_config(name, overrides) for name in arguments.subjects if "=" not in name] or [_config("tiny-zh", overrides)]
    if arguments.plan:
        print(json.dumps({"plans": [show_plan(config, *_original(config, arguments.layers)) for config in configs]}))
        return 0
    report: dict[str, Any] = {"device": "", "results": [], "generation": []}
    for config in configs:
        random, rows = arguments.random_init or arguments.layers or arguments.against, arguments.rows or [config.train.row_tokens]
        name, original = _original(config, arguments.layers) if random else (config.model.path, None)
        peers = [_peer(config, original, tokens, arguments.steps) if arguments.against and original else {} for tokens in rows]
        note("bench.building", name=name)
        subject = Subject(config, name, original)
        report |= _machine(subject.device)
        report["results"] += [{**subject.measure(tokens, arguments.steps), "peft": peer} for tokens, peer in zip(rows, peers, strict=True)]
        report["generation"] += subject.generation() if arguments.generate else []
        del subject
        gc.collect()
    print(_table(report))
    print(json.dumps(report))
    return 0


def _machine(device: Any) -> dict[str, Any]:
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "platform": platform.platform()}
    if device.type != "cuda":
        return {"device": f"{platform.machine()}, {torch.get_num_threads()} threads", **versions}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "device_bytes": properties.total_memory, "cuda": torch.version.cuda, **versions}


def _table(report: dict[str, Any]) -> str:
    rows, lines = [say("bench.columns").split("|")], []
    for r in report["results"]:
        ran = "peak_bytes" in r
        measured = [(r["tokens_per_second"], 0), (r["step_seconds"], 2), (r["peak_bytes"] / GIB, 3)] if ran else []
        cells = [f"{value:,.{digits}f}" for value, digits in measured] or ["", "", say("bench.out_of_memory")]
        ratio = f"{r['estimate_ratio']:.3f}" if ran else ""
        rows.append([r["model"], str(r["layers"]), str(r["row_tokens"]), *cells, f"{r['estimate_bytes'] / GIB:.3f}", ratio])
        for setting, peer in r["peft"].items() if ran else ():
            memory, speed = r["peak_bytes"] / peer["peak_bytes"], r["tokens_per_second"] / peer["tokens_per_second"]
            how = {"peak": f"{peer['peak_bytes'] / GIB:.3f}", "memory": f"{memory:.2f}", "speed": f"{speed:.2f}"}
            lines.append(say("bench.against", row=r["row_tokens"], setting=setting, **how))
    for g in report["generation"]:
        first, speed = f"{g['first_token_seconds']:.3f}", f"{g['decode_tokens_per_second']:.1f}"
        lines.append(say("bench.generation", rows=g["rows"], first=first, speed=speed))
    return "\n".join([table(rows), *lines])


if __name__ == "__main__":
    from cllm.__main__ import run

    sys.exit(run("bench"))
