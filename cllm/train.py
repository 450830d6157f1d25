"""`python -m cllm.train cllm.toml`: from a config to an adapter. The loop reads top to bottom in `Training.loop`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm.config import Config, load_config, to_toml
from cllm.data.schema import Reject
from cllm.data.sources import prepare
from cllm.messages import UserError, note, say

MAX_REJECTED = 0.2
MAX_BAD_STEPS = 20
STATE_SECTIONS = ("model", "lora", "data", "train")
"""Settings that decide what the next step does: a resumed run must agree on them."""


class Training:
    """One run: what was read and loaded, and the loop over it."""

    def __init__(self, config: Config, *, accept_rejects: bool = False, allow_changes: bool = False, resume: Path | None = None) -> None:
        self.config, self.resume, self.allow_changes = config, resume, allow_changes
        self._read(accept_rejects)
        self._encode()
        self._load()
        self._fit_rows()
        self._plan_steps()
        self.step, self.best, self.stale, self.interrupted = 0, float("inf"), 0, False
        if resume:
            self._continue(resume)
            self.run = resume
        else:
            from cllm.learn.snapshot import new_run

            self.run = new_run(config.run.dir)
            (self.run / "config.toml").write_text(to_toml(config), encoding="utf-8")
            manifest = json.dumps(self._manifest(), ensure_ascii=False, indent=1)
            (self.run / "manifest.json").write_text(manifest + "\n", encoding="utf-8")

    # ------------------------------------------------------------------ before the first step

    def _read(self, accept_rejects: bool) -> None:
        """Data and tokenizer, and everything that can be found wrong with them before weights are loaded."""
        config, data = self.config, self.config.data
        found = prepare(data)
        rejects, rows = found.rejects, found.rows
        if not found.train:
            raise UserError("data.empty", path=", ".join(s.path for s in data.train), rejects=_located(rejects))
        if len(rejects) > MAX_REJECTED * rows and not accept_rejects:
            raise UserError("train.rejects", share=f"{len(rejects) / rows:.0%}", count=len(rejects), examples=_located(rejects))
        from cllm.model.source import resolve
        from cllm.model.tokenizer import load_tokenizer

        self.rejects = len(rejects)
        self.base = resolve(config.model.path)
        template = "text" if data.kind == "text" else config.model.template
        self.tokenizer = load_tokenizer(self.base, template=template, thinking=config.model.thinking)
        self.conversations = found.train, found.held_out
        if found.duplicates or found.leaked:
            note("train.repeated", duplicates=found.duplicates, leaked=found.leaked)

    def _encode(self, *, single: bool = False) -> None:
        """Conversations -> examples -> rows; stops when nothing, or never an end token, would be trained."""
        from cllm.data.encode import encode_set
        from cllm.data.packing import PackedRows

        config, (train, held_out) = self.config, self.conversations
        how: Any = {"kind": config.data.kind, "max_tokens": config.train.row_tokens, "truncate": config.data.truncate}
        self.examples, self.train_set, refused = encode_set(train, self.tokenizer, **how)
        held_examples, self.held_set, _ = encode_set(held_out, self.tokenizer, **how)
        if not self.examples:
            code = "train.unsupervised" if refused["no_supervised_token"] else "train.too_long"
            raise UserError(code, count=len(train), row=config.train.row_tokens, template=self.tokenizer.template.name)
        if not any(self.tokenizer.stop_ids.intersection(example.labels) for example in self.examples):
            raise UserError("train.no_end", template=self.tokenizer.template.name)
        self.data_hash = self.examples.digest()
        self.rows = PackedRows(self.examples, config.train.row_tokens, seed=config.train.seed, single=single)
        held = PackedRows(held_examples, config.train.row_tokens, single=single)
        self.held_rows = held.take(len(held)) if held_examples else []
        left_out = ", ".join(f"{reason} {count}" for reason, count in refused.items()) or "0"
        tokens = sum(self.examples.sizes)
        note(
            "train.data", train=len(self.examples), held_out=len(self.held_set), tokens=f"{tokens:,}", rows=len(self.rows),
            rejects=self.rejects, left_out=left_out,
        )  # fmt: skip

    def _load(self) -> None:
        """Base, adapter, optimizer: read -> convert -> quantize -> inject."""
        import torch

        from cllm.learn.loss import sft_loss
        from cllm.learn.optim import Precision, make_optimizer
        from cllm.learn.proof import cap_allocator, choose_device
        from cllm.memory import plan_run, settings_of
        from cllm.model.checkpoint import load_model, original_config
        from cllm.model.lora import inject_lora, load_adapter
        from cllm.model.offload import place

        config = self.config
        device = self.device = choose_device(config.model.device)
        torch.manual_seed(config.train.seed)
        self.precision = Precision.choose(config.model.precision, torch.device(device).type)
        longest = len(self.rows.longest().input_ids)
        settings = settings_of(
            config.model, config.lora, config.train, config.memory, row_tokens=longest, precision=self.precision.name, device=device
        )
        self.budget = cap_allocator(config.memory.budget_gib, device)
        settings, self.planned = plan_run(original_config(self.base), config.model.path, settings, self.budget)
        quantize = None if config.model.quantize == "none" else config.model.quantize
        self.model: Any = load_model(
            self.base, dtype=self.precision.weights, device=device, quantize=quantize, head=config.model.head,
            stream_layers=config.memory.stream_layers,
        )  # fmt: skip
        lora = config.lora
        if lora.init_from:
            source = Path(lora.init_from)
            layers = load_adapter(self.model, source / "adapter" if (source / "adapter").is_dir() else source, dropout=lora.dropout)
        else:
            layers = inject_lora(
                self.model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets, rslora=lora.rslora, dora=lora.dora
            )
        self.precision.prepare(self.model)
        place(self.model, settings, device)
        self.chunk_bytes = config.memory.chunk_mib * 2**20
        self.objective = lambda model, batch: sft_loss(model, batch, self.chunk_bytes)
        self.optimizer = make_optimizer(
            self.model, config.train.learning_rate, weight_decay=config.train.weight_decay, plus_ratio=lora.plus_ratio,
            name=config.train.optimizer,
        )  # fmt: skip
        self.scaler = self.precision.scaler()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        first = next(iter(layers.values()))
        note(
            "train.model", name=config.model.path, precision=quantize or self.precision.name, rank=first.rank, linears=len(layers),
            millions=f"{trained / 1e6:.2f}", share=f"{trained / total:.1%}", device=device,
        )  # fmt: skip

    def _fit_rows(self) -> None:
        """What only the loaded model tells: whether its end token was ever trained, and whether sequences may share a row."""
        from cllm.learn.loss import check_head
        from cllm.model.attention import packs
        from cllm.model.tokenizer import with_trained_end
        from cllm.serve.engine import Engine

        with self.precision.autocast():
            check_head(self.model)
            single = not packs(self.model)
        if single:
            note("train.single", architecture=type(self.model).__name__)
        before, self.tokenizer = self.tokenizer, with_trained_end(self.tokenizer, self.model)
        if single or before is not self.tokenizer:
            self._encode(single=single)
        stop_ids, pad_id = self.tokenizer.stop_ids, self.tokenizer.pad_id
        self.engine = Engine(self.model, stop_ids=stop_ids, pad_id=pad_id, autocast=self.precision.autocast)

    def _plan_steps(self) -> None:
        train = self.config.train
        row_tokens = sum(self.examples.sizes) // len(self.rows) if self.rows.single else train.row_tokens
        self.rows_per_step = max(1, train.tokens_per_step // row_tokens)
        self.total = train.steps or max(1, round(train.epochs * len(self.rows) / self.rows_per_step))
        self.eval_every = self.config.eval.every or max(1, -(-self.total // 5))
        self.snapshot_every = self.config.run.snapshot_every or self.eval_every

    def _manifest(self) -> dict[str, Any]:
        import torch
        import transformers

        from cllm import __version__

        commit = ""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            root = Path(__file__).parent
            command = ["git", "-C", str(root), "rev-parse", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
        gpu = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else ""
        return {
            "cllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "platform": platform.platform(), "gpu": gpu, "git_commit": commit,
            "seed": self.config.train.seed, "steps": self.total, "precision": self.precision.name, "data_sha256": self.data_hash,
            "base_sha256": self._base_hash(), "template": self.tokenizer.template.name,
        }  # fmt: skip

    def _base_hash(self) -> str:
        """Of the base's file names and sizes and its config: cheap for any size, and enough to notice another checkpoint."""
        files = sorted(self.base.iterdir()) if self.base.is_dir() else [self.base]
        digest = hashlib.sha256(repr([(f.name, f.stat().st_size) for f in files if f.is_file()]).encode())
        if (self.base / "config.json").is_file():
            digest.update((self.base / "config.json").read_bytes())
        return digest.hexdigest()

    def _continue(self, run: Path) -> None:
        """Take up the newest whole snapshot; refuse other settings, data or base than it was made with."""
        from cllm.learn.snapshot import load_snapshot, restore

        before = load_config(run / "config.toml")
        changes = [
            f"{section}.{name}: {getattr(getattr(before, section), name)!r} -> {getattr(getattr(self.config, section), name)!r}"
            for section in STATE_SECTIONS
            for name in getattr(before, section).__dataclass_fields__
            if getattr(getattr(before, section), name) != getattr(getattr(self.config, section), name)
        ]
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        changes += [f"{key} differs" for key in ("data_sha256", "base_sha256") if manifest[key] != self._manifest()[key]]
        if changes and not self.allow_changes:
            raise UserError("train.changed", run=run, changes="; ".join(changes))
        state, tensors = load_snapshot(run)
        restore(self.model, self.optimizer, tensors)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.stale = state["step"], state["best"], state["stale"]
        self.rows.state = tuple(state["rows"])
        note("train.resumed", run=run, step=self.step, total=self.total)

    # ------------------------------------------------------------------ the loop

    def loop(self) -> float:
        """Train to the last step, an early stop or an interruption; returns the last training loss."""
        from cllm.learn.log import RunLog, open_tracker, peak_memory_bytes
        from cllm.learn.optim import learning_rate, set_learning_rate, train_step
        from cllm.learn.proof import prove

        train = self.config.train
        self.log = RunLog(self.run, self.total, open_tracker(self.config.log.tracker, self.run), done=self.step)
        self.model.train()
        loss, bad = float("nan"), 0
        if self.budget:
            rows = [self.rows.longest()] * min(2, self.rows_per_step)
            how: dict[str, Any] = {"precision": self.precision, "scaler": self.scaler, "max_norm": train.max_norm}
            prove(self.model, rows, self.objective, self.optimizer, plan=self.planned, budget=self.budget, **how)
        start = time.perf_counter()
        with self._until_signal():
            if self.held_rows and self._evaluation_due():
                self._evaluate()
            while self.step < self.total and not self.interrupted and not self._stopped_early():
                rate = learning_rate(
                    self.step + 1, self.total, train.learning_rate, schedule=train.schedule, warmup=round(train.warmup * self.total)
                )
                set_learning_rate(self.optimizer, rate)
                batches = self.rows.take(self.rows_per_step)
                began = time.perf_counter()
                stats = train_step(
                    self.model, batches, self.objective, self.optimizer, precision=self.precision, scaler=self.scaler,
                    max_norm=train.max_norm,
                )  # fmt: skip
                self.step += 1
                bad = bad + 1 if stats.skipped else 0
                if stats.skipped and (bad >= MAX_BAD_STEPS or not self.scaler.is_enabled()):
                    self._refuse_nonfinite(batches, bad)
                if stats.loss == 0.0:
                    raise UserError("train.zero_loss", step=self.step)
                loss = loss if stats.skipped else stats.loss
                row = {
                    "step": self.step, "loss": stats.loss, "lr": rate, "grad_norm": stats.grad_norm, "tokens": stats.tokens,
                    "supervised_tokens": stats.supervised_tokens, "skipped": stats.skipped,
                    "tokens_per_second": stats.tokens / (time.perf_counter() - began),
                    "peak_memory_bytes": peak_memory_bytes(self.device), "seconds": time.perf_counter() - start,
                }  # fmt: skip
                self.log.step(row)
                if self.interrupted or self.step % self.snapshot_every == 0 or self._evaluation_due():
                    self._snapshot()
                if self.held_rows and self._evaluation_due() and not self.interrupted:
                    self._evaluate()
        return loss

    def _evaluation_due(self) -> bool:
        return self.step % self.eval_every == 0 or self.step == self.total

    def _stopped_early(self) -> bool:
        if self.config.eval.patience and self.stale >= self.config.eval.patience:
            note("train.early", step=self.step, patience=self.config.eval.patience)
            return True
        return False

    @contextlib.contextmanager
    def _until_signal(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM let the step end and save; a second Ctrl-C stops at once."""

        def stop(number: int, _frame: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            note("train.stopping")

        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _refuse_nonfinite(self, batches: list[Any], bad: int) -> None:
        from cllm.learn.optim import first_nonfinite

        names = (first_nonfinite(self.model, batch, self.objective, self.precision) for batch in batches)
        module = next((name for name in names if name), "?")
        raise UserError("train.nonfinite", step=self.step, bad=bad, module=module, precision=self.precision.name)

    def _snapshot(self) -> None:
        from cllm.learn.snapshot import capture, save_snapshot

        state = {"rows": self.rows.state, "scaler": self.scaler.state_dict(), "best": self.best, "stale": self.stale}
        save_snapshot(self.run, self.step, capture(self.model, self.optimizer), state, keep=self.config.run.keep)

    def _evaluate(self) -> None:
        """Held-out loss, the best adapter so far, one answer to look at."""
        from cllm.evaluate.answers import answer_of, generate, held_out_loss, question_of

        loss = held_out_loss(self.model, self.held_rows, self.precision, self.chunk_bytes)
        improved = loss < self.best
        self.best, self.stale = (loss, 0) if improved else (self.best, self.stale + 1)
        if improved and self.step:
            self.save_adapter()
        self.log.break_line()
        self.log.write({"step": self.step, "eval_loss": loss, "best": improved})
        shown = self.held_set[(self.step // self.eval_every) % len(self.held_set)]
        if self.config.data.kind == "chat":
            self.model.eval()
            answer = generate(self.engine, self.tokenizer, [question_of(shown)], adapter=True, max_new_tokens=48)[0]
            self.model.train()
            texts = [text.replace("\n", " ")[:60] for text in (question_of(shown)[-1].content, answer, answer_of(shown))]
            mark = " *" if improved else ""
            note("train.eval", step=self.step, loss=f"{loss:.3f}{mark}", question=texts[0], answer=texts[1], reference=texts[2])
        else:
            note("train.eval_loss", step=self.step, loss=f"{loss:.3f}")

    def save_adapter(self) -> None:
        """adapter/: PEFT's two files, the tokenizer and the template; complete before it replaces the one before."""
        from cllm.model.lora import save_adapter

        fresh = self.run / "adapter.new"
        save_adapter(self.model, fresh, base=self.config.model.path)
        self.tokenizer.save(fresh)
        target = self.run / "adapter"
        target.mkdir(exist_ok=True)
        for file in fresh.iterdir():
            file.replace(target / file.name)
        fresh.rmdir()

    # ------------------------------------------------------------------ after the last step

    def finish(self) -> dict[str, Any]:
        """Put the best adapter back, answer the held-out questions with and without it, write and return the scores."""
        from safetensors.torch import load_file

        from cllm.evaluate.answers import answers, evaluate, losses, sequence_nll
        from cllm.evaluate.report import Progress, report, write_results
        from cllm.model.lora import adapter_tensors

        self.log.close()
        if not (self.run / "adapter").is_dir():
            self.save_adapter()
        best = load_file(self.run / "adapter" / "adapter_model.safetensors", device=self.device)
        for name, tensor in adapter_tensors(self.model).items():
            tensor.data.copy_(best[name])
        self.model.eval()
        if not self.held_rows:
            return {}
        settings = self.config.eval
        answered, systems = self.held_set[: settings.samples if self.config.data.kind == "chat" else 0], {}
        if answered:
            note("train.answering", count=len(answered))
            systems = answers(
                self.engine, self.tokenizer, answered, train=list(self.train_set), shots=settings.shots,
                max_new_tokens=settings.max_new_tokens, seed=self.config.train.seed, progress=Progress(),
            )  # fmt: skip
        model, precision, chunk_bytes = self.model, self.precision, self.chunk_bytes
        held_out = functools.partial(sequence_nll, model, self.held_rows, precision, chunk_bytes)
        results, samples = evaluate(answered, systems, losses(model, self.tokenizer, held_out, precision, chunk_bytes))
        write_results(self.run, results, samples)
        print(report(results))
        return results


def _located(rejects: list[Reject]) -> str:
    shown = [f"{r.file}:{r.line}: {r.reason}: {r.detail}" for r in rejects[:3]]
    return "\n  ".join([str(len(rejects)), *shown])


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cllm.train", description=say("train.help"))
    parser.add_argument("config", metavar="CONFIG|preset:NAME", help=say("train.help.config"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=say("train.help.overrides"))
    parser.add_argument("--resume", action="store_true", help=say("train.help.resume"))
    parser.add_argument("--accept-rejects", action="store_true", help=say("train.help.accept_rejects"))
    parser.add_argument("--allow-changes", action="store_true", help=say("train.help.allow_changes"))
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    """Train as the config says; the last line on stdout is {"run", "steps", "loss", "eval"}."""
    arguments = _arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    resume = None
    if arguments.resume:
        from cllm.learn.snapshot import find_runs

        wanted = Path(config.run.dir)
        resume = next(iter(find_runs(wanted.parent, name=wanted.name, needs="snapshots/step-*")), None)
        if resume is None:
            raise UserError("snapshot.none", path=wanted)
    training = Training(config, accept_rejects=arguments.accept_rejects, allow_changes=arguments.allow_changes, resume=resume)
    loss = training.loop()
    if training.interrupted:
        training.log.close()
        note("train.interrupted", step=training.step, total=training.total, command=f"python -m cllm.train {arguments.config} --resume")
        return 130
    results = training.finish()
    note("train.done", run=training.run)
    print(json.dumps({"run": str(training.run), "steps": training.step, "loss": loss, "eval": results}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    from cllm.__main__ import run

    sys.exit(run("train"))
