"""`python -m cllm.train cllm.toml`: from a config to an adapter. The loop reads top to bottom in
`Training.loop`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.config import Config, differences, load_config, to_toml
from cllm.corpus import read_corpus
from cllm.messages import CommandLine, UserError, note, to_json

if TYPE_CHECKING:
    from cllm.data.packing import PackedBatch
    from cllm.learn.optim import StepStats

MAX_BAD_STEPS = 20
FOREIGN = (LookupError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError)
"""What reading another program's state raises."""
STATE_SECTIONS = ("model", "lora", "data", "train", "preference")
"""Settings that decide what the next step does: a resumed run must agree on them."""


@dataclass
class Progress:
    """How far a run has come; kept in its snapshots."""

    step: int = 0
    """Optimizer steps done."""
    evaluated: int = -1
    """The last step that was evaluated."""
    best: float | None = None
    """The lowest held-out loss so far."""
    stale: int = 0
    """Evaluations since the lowest loss."""
    bad: int = 0
    """Steps skipped in a row."""

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Progress:
        """From a snapshot's state.json. Raises LookupError, TypeError or ValueError."""
        best = None if state["best"] in (None, float("inf")) else float(state["best"])
        step, evaluated = int(state["step"]), int(state["evaluated"])
        return cls(step, evaluated, best, int(state["stale"]), int(state["bad"]))


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
        self.config = config
        self.allow_changes = allow_changes
        self.progress = Progress()
        self.interrupted = False
        self.saved_at = time.monotonic()
        corpus = read_corpus(config, accept_rejects=accept_rejects)
        # Here, because torch takes seconds to load: mistakes in the data are said before.
        from cllm.learner import Learner

        self.learner = Learner(config, corpus)
        self._plan_steps()
        with contextlib.ExitStack() as resources:
            self._open_run(resume, resources)
            self.close = resources.pop_all().close  # gives the run directory back

    # ------------------------------------------------------------------ before the first step

    def _plan_steps(self) -> None:
        train, encoded = self.config.train, self.learner.encoded
        per_epoch = encoded.rows.steps(encoded.rows_per_step)
        self.total = train.steps or max(1, round(train.epochs * per_epoch))
        self.eval_every = self.config.eval.every or max(1, -(-self.total // 5))
        self.snapshot_every = self.config.run.snapshot_every or self.eval_every
        if len(encoded.rows) < encoded.rows_per_step:
            note(
                "train.small", rows=len(encoded.rows), step=encoded.rows_per_step, steps=self.total
            )

    def _open_run(self, resume: Path | None, resources: contextlib.ExitStack) -> None:
        """A new run with its config and manifest, or the newest whole snapshot of an old one; rank
        0 writes, all agree.
        """
        from cllm.learn.snapshot import adapter_fingerprint
        from cllm.runs import base_fingerprint, locked, new_run

        base_sha256 = base_fingerprint(self.learner.base)
        hashes = {"data_sha256": self.learner.encoded.sha256, "checkpoint_sha256": base_sha256}
        self.untrained = adapter_fingerprint(self.learner.model)
        own = to_json([hashes, self.untrained]).encode()
        if self.learner.world.share(own) != own:
            raise UserError("dist.differs", rank=self.learner.world.rank)
        self.run = resume or Path(self.config.run.dir)
        if self.learner.world.rank == 0:
            self.run = resume or new_run(self.config.run.dir)
            resources.enter_context(locked(self.run))
            self._write_manifest(hashes, resumed=resume is not None)
        if resume:
            self._restore()
            note("train.resumed", run=self.run, step=self.progress.step, total=self.total)
        else:
            self.learner.refer_to(None)
            self._snapshot()

    def _write_manifest(self, hashes: dict[str, str], *, resumed: bool) -> None:
        """config.toml and manifest.json of a new run, or of a resumed one that was changed."""
        import torch

        from cllm.runs import changes_since, manifest_of, replace_file

        changes: list[str] = []
        if resumed:
            changed = differences(load_config(self.run / "config.toml"), self.config)
            allow = self.allow_changes
            changes = changes_since(self.run, changed, hashes, vital=STATE_SECTIONS, allow=allow)
            if not changes:
                return
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
        from cllm.learn.optim import StepOutOfMemoryError
        from cllm.learn.proof import prove

        while True:
            stored = self.learner.encoded.rows
            rows = [stored.longest(), stored.longest(max)]  # tokens, and tokens of one sequence
            detail = ""
            try:
                prove(
                    self.learner.trainee,
                    rows,
                    plan=self.learner.assembly.plan,
                    budget=self.learner.assembly.budget,
                    micro_tokens=self.learner.ladder.micro_tokens,
                )
            except StepOutOfMemoryError as error:
                detail = str(error)
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
            train.learning_rate,
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
            tokenizer = learner.tokenizer
            answers = generate(
                learner.engine, tokenizer, [question], adapter=True, max_new_tokens=48
            )
            texts = (question.messages[-1].words, answers[0], reference)
            lines = [text.replace("\n", " ")[:60] for text in texts]
            note("train.eval", question=lines[0], answer=lines[1], reference=lines[2])

    # ------------------------------------------------------------------ after the last step

    def finish(self) -> dict[str, Any]:
        """Put the best adapter back, answer the held-out questions with and without it, write and
        return the scores.
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
        return self._final_scores() if self.learner.encoded.held_rows else {}

    def _final_scores(self) -> dict[str, Any]:
        from cllm.evaluate.answers import Asking, draw, evaluate, sequence_nll
        from cllm.evaluate.report import About, AnswerCount, summary, warn_of_length, write_results
        from cllm.evaluate.results import document
        from cllm.runs import writing

        learner, settings = self.learner, self.config.eval
        encoded, precision = learner.encoded, learner.assembly.precision
        wanted = settings.samples if self.config.data.kind == "chat" else 0
        drawn = draw(len(encoded.held_out), wanted, self.config.train.seed)
        asked = [encoded.held_out[number] for number in drawn]
        if asked:
            note("train.answering", count=len(asked))
        results = evaluate(
            learner.engine,
            learner.tokenizer,
            asked,
            functools.partial(
                sequence_nll, learner.model, encoded.held_rows, precision, learner.chunk_bytes
            ),
            precision,
            learner.chunk_bytes,
            Asking(
                list(encoded.train),
                settings.shots,
                settings.max_new_tokens,
                self.config.train.seed,
                AnswerCount(),
            ),
        )
        if self.config.preference.active:
            results = replace(results, preference=learner.held_out()[1])
            warn_of_length(results)
        if 0 < len(results.samples) < len(encoded.held_out):
            results = replace(results, drawn=drawn)
        template, device = learner.tokenizer.template.name, learner.assembly.device
        about = About(self.config.model.path, "", template, device)
        with writing(self.run / "eval.json"):
            write_results(self.run, results, about)
        print(summary(results))
        return document(results)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandLine("train")
    parser.take("config", metavar="CONFIG|preset:NAME")
    parser.take("overrides", nargs="*", metavar="section.key=value")
    parser.take("--resume", action="store_true")
    parser.take("--accept-rejects", action="store_true")
    parser.take("--allow-changes", action="store_true")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    """Train as the config says; the last line on stdout is {"run", "steps", "loss", "eval"}. Under
    torchrun rank 0 speaks.
    """
    arguments = _arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    resume = None
    if arguments.resume:
        from cllm.runs import last_run

        resume = last_run(config.run.dir)
    training = Training(
        config,
        accept_rejects=arguments.accept_rejects,
        allow_changes=arguments.allow_changes,
        resume=resume,
    )
    with contextlib.closing(training):
        loss = training.loop()
        training.learner.world.leave()
        if training.learner.world.rank:
            return 130 if training.interrupted else 0
        steps = training.progress.step
        if training.interrupted:
            training.log.close()
            again = shlex.join([arguments.config, *arguments.overrides])
            command = f"python -m cllm.train {again} --resume"
            note("train.interrupted", step=steps, total=training.total, command=command)
            return 130
        results = training.finish()
        note("train.done", run=training.run)
        print(to_json({"run": str(training.run), "steps": steps, "loss": loss, "eval": results}))
        return 0


if __name__ == "__main__":
    from cllm.__main__ import run

    sys.exit(run("train"))
