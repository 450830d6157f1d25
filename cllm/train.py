"""`python -m cllm.train cllm.toml`: from a config to an adapter. The loop reads top to bottom in
`Training.loop`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.advice import more_steps, verdict
from cllm.config import Config, differences, is_config, load_config, to_toml
from cllm.corpus import read_corpus
from cllm.data.sources import without_demo
from cllm.memory import GIB
from cllm.messages import CommandLine, UserError, command, note, print_result, propose, to_json
from cllm.runs import Progress, last_run, read_metrics, refuse_missing, turned

if TYPE_CHECKING:
    from cllm.data.packing import PackedBatch
    from cllm.learn.optim import StepStats

MAX_BAD_STEPS = 20
FOREIGN = (LookupError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError)
"""What reading another program's state raises."""
STATE_SECTIONS = ("model", "lora", "data", "train", "preference")
"""Settings that decide what the next step does: a resumed run must agree on them."""
RESUMABLE = ("run.unwritable", "train.memory", "dist.lost")
"""Ends of a run after which it can go on from its snapshots, once their cause is mended."""


class Training:
    """One run: its data and its model, put together, and the loop over them.

    Everything that can be refused without weights is refused before they are loaded.
    """

    def __init__(
        self,
        config: Config,
        *,
        accept_rejects: bool = False,
        allow_changes: bool = False,
        resume: Path | None = None,
    ) -> None:
        self.allow_changes = allow_changes
        self.progress = Progress()
        self.interrupted = False
        self.saved_at = time.monotonic()
        corpus = read_corpus(config, accept_rejects=accept_rejects)
        # Here, because torch takes seconds to load: mistakes in the data are said before.
        from cllm.learner import Learner

        self.learner = Learner(config, corpus, resume)
        self.config = self.learner.config
        self._plan_steps()
        with contextlib.ExitStack() as resources:
            self._open_run(resume, resources)
            self.close = resources.pop_all().close  # gives the run directory back

    # ------------------------------------------------------------------ before the first step

    def _plan_steps(self) -> None:
        train, encoded = self.config.train, self.learner.encoded
        per_epoch = encoded.rows.steps(encoded.rows_per_step)
        self.total = train.steps or max(1, round(train.epochs * per_epoch))
        times = max(5, round(self.total / per_epoch))
        self.eval_every = self.config.eval.every or max(1, -(-self.total // times))
        self.snapshot_every = self.config.run.snapshot_every or self.eval_every

    def _open_run(self, resume: Path | None, resources: contextlib.ExitStack) -> None:
        """A new run with its config and manifest, or the newest whole snapshot of an old one; rank
        0 writes, all agree.
        """
        from cllm.learn.snapshot import adapter_fingerprint
        from cllm.runs import base_fingerprint, changes_since, locked, new_run

        base_sha256 = base_fingerprint(self.learner.base)
        hashes = {"data_sha256": self.learner.encoded.sha256, "checkpoint_sha256": base_sha256}
        self.untrained = adapter_fingerprint(self.learner.model)
        own = to_json([hashes, self.untrained]).encode()
        if self.learner.world.share(own) != own:
            raise UserError("dist.differs", rank=self.learner.world.rank)
        self.run = resume or Path(self.config.run.dir)
        changes: list[str] = []
        if self.learner.world.rank == 0:
            self.run = resume or new_run(self.config.run.dir)
            resources.enter_context(locked(self.run))
            if resume:
                changed = differences(load_config(self.run / "config.toml"), self.config)
                allow = self.allow_changes
                changes = changes_since(resume, changed, hashes, vital=STATE_SECTIONS, allow=allow)
            else:
                self._write_manifest(hashes, changes)
        self._announce()
        if resume:
            self._restore()
            if changes:  # not before it has succeeded
                self._write_manifest(hashes, changes)
            code = "train.resumed" if self.progress.step < self.total else "train.complete"
            note(code, run=self.run, step=self.progress.step, total=self.total)
        else:
            self.learner.refer_to(None)
            self._snapshot()

    def _announce(self) -> None:
        """Where the run goes, on what, and how long it is."""
        from cllm.model.device import free_bytes

        rows, device = self.learner.encoded.rows, self.learner.assembly.device
        free = f", {free_bytes(device) / GIB:.1f} GiB free" if device.type == "cuda" else ""
        note(
            "train.start",
            run=self.run,
            device=f"{device}{free}",
            epochs=f"{self.total / rows.steps(self.learner.encoded.rows_per_step):.3g}",
            steps=self.total,
            every=self.eval_every,
        )

    def _write_manifest(self, hashes: dict[str, str], changes: list[str]) -> None:
        """config.toml and manifest.json of a new run, or of a resumed one that was changed."""
        import torch

        from cllm import replay
        from cllm.runs import manifest_of, replace_file

        device = self.learner.assembly.device
        manifest = manifest_of(
            torch.cuda.get_device_name(device) if device.type == "cuda" else "",
            {
                "ranks": self.learner.world.size,
                "seed": self.config.train.seed,
                "steps": self.total,
                "precision": self.learner.assembly.precision.name,
                "template": self.learner.tokenizer.template.name,
                "changes": changes,
                **hashes,
            },
        )
        replace_file(self.run / "config.toml", to_toml(self.config).encode())
        replace_file(self.run / "manifest.json", manifest)
        if self.learner.answers:
            replace_file(self.run / replay.FILE, self.learner.answers)

    def _restore(self) -> None:
        """Back to the newest whole snapshot, on every rank rank 0's."""
        from safetensors.torch import load

        from cllm.learn.snapshot import load_snapshot
        from cllm.runs import replace_file

        files = load_snapshot(self.run) if self.learner.world.rank == 0 else (b"", b"", b"")
        state_json, tensors, metrics = map(self.learner.world.share, files)
        try:
            state = json.loads(state_json)
            self.progress = Progress.restored(state)
            epoch, row = map(int, state["rows"])
            self.learner.restore_scaler(state["scaler"])
            self.learner.apply(type(self.learner.ladder).restored(state["ladder"]))
            self.learner.encoded.rows.seek(epoch, row)
            if state.get("measure", self.learner.measure) != self.learner.measure:
                self.progress = Progress(self.progress.step, bad=self.progress.bad)
        except FOREIGN as error:
            problem = f"{type(error).__name__}: {error}"
            raise UserError("snapshot.foreign", count=1, problems=problem) from error
        self.learner.restore(load(tensors))
        if self.learner.world.rank == 0:
            replace_file(self.run / "metrics.jsonl", metrics)

    # ------------------------------------------------------------------ the loop

    def loop(self) -> float | None:
        """Train to the last step, an early stop or an interruption; returns the last training
        loss, of a run that was finished before its last recorded one.
        """
        from cllm.learn.dist import stop_on_signal
        from cllm.learn.log import RunLog, last_loss, open_tracker, peak_memory_bytes
        from cllm.runs import writing

        if self.learner.world.rank == 0:
            tracker = open_tracker(self.config.log.tracker, self.run)
            self.log = RunLog(self.run, self.total, tracker)
        # Dropout would make the two passes of a preference step differ.
        self.learner.model.train(not self.config.preference.active)
        if self.learner.assembly.budget:
            self._prove()
        start = time.perf_counter()
        loss = last_loss(self.run / "metrics.jsonl") if self.learner.world.rank == 0 else None
        with stop_on_signal() as signals:
            while not self.interrupted:
                due = self._evaluation_due() and self.progress.evaluated != self.progress.step
                if due and self.learner.encoded.held_rows:
                    self._evaluate()
                if self.progress.step >= self.total or self._stopped_early():
                    break
                began = time.perf_counter()
                stats = self._step()  # None: memory ran out, once more with less
                if stats is not None:
                    loss = loss if stats.skipped else stats.loss
                    row = {
                        "step": self.progress.step,
                        "lr": self.rate,
                        **stats.figures(),
                        "tokens_per_second": stats.tokens / (time.perf_counter() - began),
                        "peak_memory_bytes": peak_memory_bytes(self.learner.assembly.device),
                        "seconds": time.perf_counter() - start,
                    }
                    if self.learner.world.rank == 0:
                        with writing(self.log.path):
                            self.log.step(row)
                self.interrupted = self.learner.world.any(bool(signals))
                if self.interrupted or self._snapshot_due():
                    self._snapshot()
        return loss

    def _prove(self) -> None:
        """The plan on the largest rows, before anything is learned; what does not fit, on any
        rank, steps down as any step does.
        """
        while True:
            rows, detail = self.learner.prove()
            if not self.learner.world.any(bool(detail)):
                return
            self._step_down(rows, detail or "another rank")

    def _step(self) -> StepStats | None:
        """One optimizer step. None if memory ran out: the state is as before (or at the last
        snapshot), and less will be used.
        """
        from cllm.learn.optim import StepOutOfMemoryError, learning_rate, set_learning_rate

        train, rows, progress = self.config.train, self.learner.encoded.rows, self.progress
        position = rows.state
        self.rate = learning_rate(
            progress.step + 1,
            self.total,
            train.rate,
            schedule=train.schedule,
            warmup=round(train.warmup * self.total),
        )
        set_learning_rate(self.learner.trainee.optimizer, self.rate)
        batches = rows.take(self.learner.encoded.rows_per_step)
        try:
            stats = self.learner.trainee.step(
                batches,
                world=self.learner.world,
                seed=f"{train.seed}/{progress.step}",
                micro_tokens=self.learner.ladder.micro_tokens,
            )
        except StepOutOfMemoryError as error:
            detail, altered = str(error), error.altered
        else:
            progress.step += 1
            progress.bad = progress.bad + 1 if stats.skipped else 0
            hopeless = progress.bad >= MAX_BAD_STEPS or not self.learner.trainee.scaler.is_enabled()
            if stats.skipped and hopeless:
                self._refuse_nonfinite(batches)
            if stats.loss == 0.0 and not stats.preference:
                raise UserError("train.zero_loss", step=progress.step)
            return stats
        rows.state = position
        if altered:
            self._restore()
        self._step_down(batches, detail)
        return None

    def _step_down(self, rows: Sequence[PackedBatch], detail: str) -> None:
        """Use less memory from now on; said, and saved for the next start."""
        ladder = self.learner.ladder.down(rows, shorten=self.allow_changes)
        if ladder is None:
            raise UserError("train.memory", detail=detail)
        shown = ", ".join(f"{name} {value}" for name, value in asdict(ladder).items())
        note("train.step_down", step=self.progress.step + 1, detail=detail, ladder=shown)
        self.learner.apply(ladder)
        self._snapshot()

    def _evaluation_due(self) -> bool:
        return self.progress.step % self.eval_every == 0 or self.progress.step == self.total

    def _snapshot_due(self) -> bool:
        minutes = self.config.run.snapshot_minutes
        late = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return late or self.progress.step % self.snapshot_every == 0 or self._evaluation_due()

    def _stopped_early(self) -> bool:
        patience = self.config.eval.patience
        if patience and self.progress.stale >= patience:
            note("train.early", step=self.progress.step, patience=patience)
            return True
        return False

    def _refuse_nonfinite(self, batches: Sequence[PackedBatch]) -> None:
        from cllm.learn.optim import first_nonfinite

        precision = self.learner.assembly.precision
        names = (
            first_nonfinite(self.learner.model, batch, self.learner.trainee.objective, precision)
            for batch in batches
        )
        raise UserError(
            "train.nonfinite",
            step=self.progress.step,
            bad=self.progress.bad,
            module=next((name for name in names if name), "?"),
            precision=precision.name,
        )

    def _snapshot(self) -> None:
        from cllm.learn.snapshot import save_snapshot

        self.saved_at = time.monotonic()
        if self.learner.world.rank:
            return
        state = {
            "rows": self.learner.encoded.rows.state,
            "scaler": self.learner.trainee.scaler.state_dict(),
            "ladder": asdict(self.learner.ladder),
            "measure": self.learner.measure,
            **asdict(self.progress),
        }
        tensors = self.learner.capture()
        save_snapshot(self.run, self.progress.step, tensors, state, keep=self.config.run.keep)

    def _evaluate(self) -> None:
        """Held-out loss (on rank 0, for all), the best adapter so far, one answer to look at."""
        from cllm.runs import writing

        learner, progress = self.learner, self.progress
        measured, figures = learner.held_out() if learner.world.rank == 0 else (0.0, {})
        held = {f"eval_{name}": value for name, value in figures.items()}
        held["eval_n"] = len(learner.encoded.held_out)
        loss = float(learner.world.share(repr(measured).encode()))
        improved = progress.best is None or loss < progress.best
        progress.evaluated = progress.step
        progress.stale = 0 if improved else progress.stale + 1
        progress.best = loss if improved else progress.best
        if learner.world.rank:
            return
        if improved and progress.step:
            learner.save(self.run)
        self.log.break_line()
        with writing(self.log.path):
            self.log.write({"step": progress.step, "eval_loss": loss, "best": improved, **held})
        note("train.eval_loss", step=progress.step, loss=f"{loss:.3f}{' *' * improved}")
        if self.config.data.kind == "chat":
            self._show_an_answer()

    def _show_an_answer(self) -> None:
        """One held-out question, what the adapter answers, and the reference."""
        from cllm.evaluate.answers import answer_of, generate, question_of, unless_memory_is_short

        learner = self.learner
        held_out = learner.encoded.held_out
        shown = held_out[(self.progress.step // self.eval_every) % len(held_out)]
        question, reference = question_of(shown), answer_of(shown)
        with unless_memory_is_short(learner.engine):
            answers = generate(
                learner.engine, learner.tokenizer, [question], strengths=[1.0], max_new_tokens=48
            )
            texts = (question.messages[-1].words, answers[0], reference)
            lines = [text.replace("\n", " ")[:60] for text in texts]
            note("train.eval", question=lines[0], answer=lines[1], reference=lines[2])

    # ------------------------------------------------------------------ after the last step

    def finish(self, more: str = "") -> dict[str, Any]:
        """Put the best adapter back, answer the held-out questions with and without it, write and
        return the scores; say what it came to. `more`: the command that gives more steps.
        """
        from cllm.learn.snapshot import adapter_fingerprint
        from cllm.runs import writing

        with writing(self.run / "loss.png"):
            self.log.close()
        if adapter_fingerprint(self.learner.model) == self.untrained:
            raise UserError("train.unchanged", steps=self.progress.step)
        if not (self.run / "adapter").is_dir():
            if self.progress.best is not None:
                note("train.no_better", loss=f"{self.progress.best:.3f}")
            self.learner.save(self.run)
        self.learner.load(self.run)
        if self.learner.encoded.held_rows:
            return self._final_scores(more)
        note("train.unmeasured")
        return {}

    def _final_scores(self, more: str) -> dict[str, Any]:
        from cllm.evaluate.report import About, summary, warn_of_length, write_results
        from cllm.evaluate.results import document
        from cllm.runs import writing

        learner = self.learner
        results = learner.evaluated()
        if self.config.preference.active:
            warn_of_length(results)
        template, device = learner.tokenizer.template.name, learner.assembly.device
        about = About(self.config.model.path, "", template, device)
        with writing(self.run / "eval.json"):
            write_results(self.run, results, about)
        print(summary(results))
        if over := turned(read_metrics(self.run / "metrics.jsonl")):
            print(over, file=sys.stderr)
            more = ""
        held_out, steps = len(learner.encoded.held_out), self.progress.step
        print(verdict(results, held_out, steps, more), file=sys.stderr)
        return document(results)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandLine("train")
    parser.take("config", nargs="?", metavar="CONFIG|preset:NAME|RUN")
    parser.take("overrides", nargs="*", metavar="section.key=value")
    parser.take("--resume", action="store_true")
    parser.take("--accept-rejects", action="store_true")
    parser.take("--allow-changes", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.config is None:
        raise UserError("train.no_config")
    return arguments


def main(argv: list[str]) -> int:
    """Train as the config, or the one of an earlier run, says; the last line on stdout is {"run",
    "steps", "loss", "eval"}. Under torchrun rank 0 speaks.
    """
    arguments = _arguments(argv)
    if not is_config(arguments.config):
        needs = "snapshots/*step-*" if arguments.resume else "config.toml"
        refuse_missing(Path(arguments.config), needs)
    config = load_config(arguments.config, arguments.overrides)
    config = replace(config, data=without_demo(config.data, pairs=config.preference.active))
    resume = None
    if arguments.resume:
        named = Path(arguments.config)
        resume = last_run(str(named), alone=True) if named.is_dir() else last_run(config.run.dir)
        if not config.train.tokens_per_step and (file := resume / "config.toml").is_file():
            stored = load_config(file).train.tokens_per_step  # what 0 came to
            config = replace(config, train=replace(config.train, tokens_per_step=stored))
    training = Training(
        config,
        accept_rejects=arguments.accept_rejects,
        allow_changes=arguments.allow_changes,
        resume=resume,
    )
    with contextlib.closing(training):
        return _train(training, arguments)


def _train(training: Training, arguments: argparse.Namespace) -> int:
    """The loop and what comes after it; an end that can be resumed says with what command."""
    again = command("train", training.run, "--resume")
    words = (arguments.config, *arguments.overrides)
    settings, encoded = training.config.train, training.learner.encoded
    pairs = training.config.preference.active  # more epochs of them are learned by heart
    more = "" if pairs else more_steps(settings, encoded, training.total, words)
    try:
        loss = training.loop()
        training.learner.world.leave()
        if training.learner.world.rank:
            return 130 if training.interrupted else 0
        if training.interrupted:
            training.log.close()
            note("train.interrupted", step=training.progress.step, total=training.total)
            propose(again)
            return 130
        results = training.finish(more)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        propose(again)
        raise
    except UserError as error:
        if error.code not in RESUMABLE:
            raise
        print(f"\n{error}", file=sys.stderr)
        propose(again)
        return 2
    run, config = training.run, training.config
    note("train.done", run=run)
    propose(
        command("chat", run),
        *([command("eval", run, "--data", config.data.eval)] if config.data.eval else []),
        command("export", run, "--to", "ollama", Path("out") / run.name),
    )
    result = {"run": str(run), "steps": training.progress.step, "loss": loss, "eval": results}
    print_result(result, arguments.json)
    return 0


if __name__ == "__main__":
    from cllm.__main__ import run

    sys.exit(run("train"))
