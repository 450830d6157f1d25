"""`python -m cllm.train cllm.toml`: from a config to an adapter. The loop reads top to bottom in
`Training.loop`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.config import Config, differences, load_config, to_toml
from cllm.messages import UserError, note, say
from cllm.prepare import Prepared

if TYPE_CHECKING:
    from cllm.data.packing import PackedBatch
    from cllm.learn.optim import StepStats

MAX_BAD_STEPS = 20
STATE_SECTIONS = ("model", "lora", "data", "train")
"""Settings that decide what the next step does: a resumed run must agree on them."""

PROGRESS = ("step", "evaluated", "best", "stale", "bad")
"""Of a Training: steps done, the last one evaluated, the best held-out loss, evaluations since,
steps skipped in a row.
"""


class Training(Prepared):
    """One run: what was read and loaded, and the loop over it."""

    def __init__(
        self,
        config: Config,
        *,
        accept_rejects: bool = False,
        allow_changes: bool = False,
        resume: Path | None = None,
    ) -> None:
        super().__init__(config, accept_rejects=accept_rejects)
        self.allow_changes = allow_changes
        self._plan_steps()
        self.step, self.evaluated, self.best, self.stale, self.bad = 0, -1, float("inf"), 0, 0
        self.interrupted, self.saved_at = False, time.monotonic()
        with contextlib.ExitStack() as resources:
            self._open_run(resume, resources)
            self.close = resources.pop_all().close  # gives the run directory back

    # ------------------------------------------------------------------ before the first step

    def _plan_steps(self) -> None:
        train = self.config.train
        self.total = train.steps or max(
            1, round(train.epochs * len(self.rows) / self.rows_per_step)
        )
        self.eval_every = self.config.eval.every or max(1, -(-self.total // 5))
        self.snapshot_every = self.config.run.snapshot_every or self.eval_every
        if len(self.rows) < self.rows_per_step:
            note("train.small", rows=len(self.rows), step=self.rows_per_step, steps=self.total)

    def _open_run(self, resume: Path | None, resources: contextlib.ExitStack) -> None:
        """A new run with its config and manifest, or the newest whole snapshot of an old one; rank
        0 writes, all agree.
        """
        from cllm.learn.snapshot import (
            adapter_fingerprint,
            base_fingerprint,
            changes_since,
            locked,
            manifest_of,
            new_run,
            replace_file,
        )

        hashes = {"data_sha256": self.data_hash, "base_sha256": base_fingerprint(self.base)}
        self.untrained = adapter_fingerprint(self.model)
        own = json.dumps([hashes, self.untrained]).encode()
        if self.world.share(own) != own:
            raise UserError("dist.differs", rank=self.world.rank)
        self.run = resume or Path(self.config.run.dir)
        if self.world.rank == 0:
            self.run = resume or new_run(self.config.run.dir)
            resources.enter_context(locked(self.run))
            changes: list[str] = []
            if resume:
                found = differences(load_config(self.run / "config.toml"), self.config)
                changes = changes_since(
                    self.run, found, hashes, vital=STATE_SECTIONS, allow=self.allow_changes
                )
            if changes or not resume:
                manifest = manifest_of(
                    self.device,
                    ranks=self.world.size,
                    seed=self.config.train.seed,
                    steps=self.total,
                    precision=self.precision.name,
                    template=self.tokenizer.template.name,
                    changes=changes,
                    **hashes,
                )
                replace_file(self.run / "config.toml", to_toml(self.config).encode())
                replace_file(self.run / "manifest.json", manifest)
        if resume:
            self._restore()
            note("train.resumed", run=self.run, step=self.step, total=self.total)
        else:
            self._snapshot()

    def _restore(self) -> None:
        """Back to the newest whole snapshot, on every rank rank 0's."""
        from safetensors.torch import load

        from cllm.learn.ladder import Ladder
        from cllm.learn.snapshot import load_snapshot, replace_file, restore

        state_json, tensors, metrics = map(
            self.world.share, load_snapshot(self.run) if self.world.rank == 0 else [b"", b"", b""]
        )
        state = json.loads(state_json)
        try:
            ladder = Ladder(
                **{
                    name: type(value)(state["ladder"][name])
                    for name, value in asdict(self.ladder).items()
                }
            )
            for name in PROGRESS:
                setattr(self, name, type(getattr(self, name))(state[name]))
            epoch, row = map(int, state["rows"])
            self.scaler = self.precision.scaler()
            self.scaler.load_state_dict(state["scaler"])
            self.apply(ladder)
            self.rows.seek(epoch, row)
        except (
            LookupError,
            TypeError,
            ValueError,
            RuntimeError,
            OverflowError,
            AttributeError,
        ) as error:
            raise UserError(
                "snapshot.foreign", count=1, problems=f"{type(error).__name__}: {error}"
            ) from error
        restore(self.model, self.optimizer, load(tensors))
        if self.world.rank == 0:
            replace_file(self.run / "metrics.jsonl", metrics)

    # ------------------------------------------------------------------ the loop

    def loop(self) -> float:
        """Train to the last step, an early stop or an interruption; returns the last training
        loss.
        """
        from cllm.learn.dist import stop_on_signal
        from cllm.learn.log import RunLog, open_tracker, peak_memory_bytes
        from cllm.learn.snapshot import writing

        if self.world.rank == 0:
            self.log = RunLog(self.run, self.total, open_tracker(self.config.log.tracker, self.run))
        self.model.train()
        if self.budget:
            self._prove()
        loss, start = float("nan"), time.perf_counter()
        with stop_on_signal() as signals:
            while not self.interrupted:
                if self._evaluation_due() and self.held_rows and self.evaluated != self.step:
                    self._evaluate()
                if self.step >= self.total or self._stopped_early():
                    break
                began = time.perf_counter()
                stats = self._step()  # None: memory ran out, once more with less
                if stats is not None:
                    loss = loss if stats.skipped else stats.loss
                    row = {
                        "step": self.step,
                        "lr": self.rate,
                        **stats._asdict(),
                        "tokens_per_second": stats.tokens / (time.perf_counter() - began),
                        "peak_memory_bytes": peak_memory_bytes(self.device),
                        "seconds": time.perf_counter() - start,
                    }
                    if self.world.rank == 0:
                        with writing(self.log.path):
                            self.log.step(row)
                self.interrupted = self.world.any(bool(signals))
                if self.interrupted or self._snapshot_due():
                    self._snapshot()
        return loss

    def _prove(self) -> None:
        """The plan on the longest row, before anything is learned; what does not fit steps down as
        any step does.
        """
        from cllm.learn.optim import StepOutOfMemoryError
        from cllm.learn.proof import prove

        while True:
            rows = [self.rows.longest()] * min(2, self.rows_per_step)
            try:
                prove(
                    self.model,
                    rows,
                    self.objective,
                    self.optimizer,
                    precision=self.precision,
                    scaler=self.scaler,
                    max_norm=self.config.train.max_norm,
                    plan=self.planned,
                    budget=self.budget,
                    micro_tokens=self.ladder.micro_tokens,
                )
                return
            except StepOutOfMemoryError as error:
                detail = str(error)
            self._step_down(rows, detail)

    def _step(self) -> StepStats | None:
        """One optimizer step. None if memory ran out: the state is as before (or at the last
        snapshot), and less will be used.
        """
        from cllm.learn.optim import (
            StepOutOfMemoryError,
            learning_rate,
            set_learning_rate,
            train_step,
        )

        train, position = self.config.train, self.rows.state
        warmup = round(train.warmup * self.total)
        self.rate = learning_rate(
            self.step + 1, self.total, train.learning_rate, schedule=train.schedule, warmup=warmup
        )
        set_learning_rate(self.optimizer, self.rate)
        batches = self.rows.take(self.rows_per_step)
        try:
            stats = train_step(
                self.model,
                batches,
                self.objective,
                self.optimizer,
                precision=self.precision,
                scaler=self.scaler,
                max_norm=train.max_norm,
                world=self.world,
                seed=f"{train.seed}/{self.step}",
                micro_tokens=self.ladder.micro_tokens,
            )
        except StepOutOfMemoryError as error:
            detail, altered = str(error), error.altered
        else:
            self.step += 1
            self.bad = self.bad + 1 if stats.skipped else 0
            if stats.skipped and (self.bad >= MAX_BAD_STEPS or not self.scaler.is_enabled()):
                self._refuse_nonfinite(batches)
            if stats.loss == 0.0:
                raise UserError("train.zero_loss", step=self.step)
            return stats
        self.rows.state = position
        if altered:
            self._restore()
        self._step_down(batches, detail)
        return None

    def _step_down(self, rows: Sequence[PackedBatch], detail: str) -> None:
        """Use less memory from now on; said, and saved for the next start."""
        ladder = self.ladder.down(rows, shorten=self.allow_changes)
        if ladder is None:
            raise UserError("train.memory", detail=detail)
        note(
            "train.step_down",
            step=self.step + 1,
            detail=detail,
            ladder=", ".join(f"{k} {v}" for k, v in asdict(ladder).items()),
        )
        self.apply(ladder)
        self._snapshot()

    def _evaluation_due(self) -> bool:
        return self.step % self.eval_every == 0 or self.step == self.total

    def _snapshot_due(self) -> bool:
        minutes = self.config.run.snapshot_minutes
        late = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return late or self.step % self.snapshot_every == 0 or self._evaluation_due()

    def _stopped_early(self) -> bool:
        if self.config.eval.patience and self.stale >= self.config.eval.patience:
            note("train.early", step=self.step, patience=self.config.eval.patience)
            return True
        return False

    def _refuse_nonfinite(self, batches: Sequence[PackedBatch]) -> None:
        from cllm.learn.optim import first_nonfinite

        names = (
            first_nonfinite(self.model, batch, self.objective, self.precision) for batch in batches
        )
        module = next((name for name in names if name), "?")
        raise UserError(
            "train.nonfinite",
            step=self.step,
            bad=self.bad,
            module=module,
            precision=self.precision.name,
        )

    def _snapshot(self) -> None:
        from cllm.learn.snapshot import capture, save_snapshot

        self.saved_at = time.monotonic()
        state = {
            "rows": self.rows.state,
            "scaler": self.scaler.state_dict(),
            "ladder": asdict(self.ladder),
        }
        state |= {name: getattr(self, name) for name in PROGRESS}
        if self.world.rank == 0:
            save_snapshot(
                self.run,
                self.step,
                capture(self.model, self.optimizer),
                state,
                keep=self.config.run.keep,
            )

    def _evaluate(self) -> None:
        """Held-out loss (on rank 0, for all), the best adapter so far, one answer to look at."""
        from cllm.evaluate.answers import (
            answer_of,
            generate,
            held_out_loss,
            question_of,
            unless_memory_is_short,
        )
        from cllm.learn.snapshot import writing

        own = (
            held_out_loss(self.model, self.held_rows, self.precision, self.chunk_bytes)
            if self.world.rank == 0
            else 0.0
        )
        loss = float(self.world.share(repr(own).encode()))
        improved = loss < self.best
        self.best, self.stale, self.evaluated = (
            (loss, 0, self.step) if improved else (self.best, self.stale + 1, self.step)
        )
        if self.world.rank:
            return
        if improved and self.step:
            self.save_adapter()
        self.log.break_line()
        with writing(self.log.path):
            self.log.write({"step": self.step, "eval_loss": loss, "best": improved})
        note("train.eval_loss", step=self.step, loss=f"{loss:.3f}{' *' * improved}")
        if self.config.data.kind == "chat":
            shown = self.held_set[(self.step // self.eval_every) % len(self.held_set)]
            with unless_memory_is_short(self.engine):
                answer = generate(
                    self.engine,
                    self.tokenizer,
                    [question_of(shown)],
                    adapter=True,
                    max_new_tokens=48,
                )[0]
                texts = [
                    text.replace("\n", " ")[:60]
                    for text in (question_of(shown)[-1].content, answer, answer_of(shown))
                ]
                note("train.eval", question=texts[0], answer=texts[1], reference=texts[2])

    def save_adapter(self) -> None:
        """adapter/: PEFT's two files, the tokenizer and the template; complete before it replaces
        the one before.
        """
        from cllm.learn.snapshot import replace_files, writing
        from cllm.model.adapter import save_adapter

        with writing(self.run / "adapter"):
            save_adapter(self.model, self.run / "adapter.new", base=self.config.model.path)
            self.tokenizer.save(self.run / "adapter.new")
            replace_files(self.run / "adapter.new", self.run / "adapter")

    # ------------------------------------------------------------------ after the last step

    def finish(self) -> dict[str, Any]:
        """Put the best adapter back, answer the held-out questions with and without it, write and
        return the scores.
        """
        from safetensors.torch import load_file

        from cllm.evaluate.answers import compare, sequence_nll
        from cllm.evaluate.report import Progress, report, write_results
        from cllm.learn.snapshot import adapter_fingerprint, writing
        from cllm.model.adapter import adapter_tensors

        with writing(self.run / "loss.png"):
            self.log.close()
        if adapter_fingerprint(self.model) == self.untrained:
            raise UserError("train.unchanged", steps=self.step)
        if not (self.run / "adapter").is_dir():
            if self.held_rows:
                note("train.no_better", loss=f"{self.best:.3f}")
            self.save_adapter()
        best = load_file(self.run / "adapter" / "adapter_model.safetensors", device=self.device)
        for name, tensor in adapter_tensors(self.model).items():
            tensor.data.copy_(best[name])
        self.model.eval()
        if not self.held_rows:
            return {}
        settings = self.config.eval
        asked = self.held_set[: settings.samples if self.config.data.kind == "chat" else 0]
        if asked:
            note("train.answering", count=len(asked))
        held_out = functools.partial(
            sequence_nll, self.model, self.held_rows, self.precision, self.chunk_bytes
        )
        results, samples, _ = compare(
            self.engine,
            self.tokenizer,
            asked,
            held_out,
            self.precision,
            self.chunk_bytes,
            train=list(self.train_set),
            shots=settings.shots,
            max_new_tokens=settings.max_new_tokens,
            seed=self.config.train.seed,
            progress=Progress(),
        )
        with writing(self.run / "eval.json"):
            write_results(self.run, results, samples)
        print(report(results))
        return results


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cllm.train", description=say("train.help"))
    parser.add_argument("config", metavar="CONFIG|preset:NAME", help=say("train.help.config"))
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help=say("train.help.overrides")
    )
    parser.add_argument("--resume", action="store_true", help=say("train.help.resume"))
    parser.add_argument(
        "--accept-rejects", action="store_true", help=say("train.help.accept_rejects")
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help=say("train.help.allow_changes")
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    """Train as the config says; the last line on stdout is {"run", "steps", "loss", "eval"}. Under
    torchrun rank 0 speaks.
    """
    arguments = _arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    resume = None
    if arguments.resume:
        from cllm.learn.snapshot import last_run

        resume = last_run(config.run.dir)
    training = Training(
        config,
        accept_rejects=arguments.accept_rejects,
        allow_changes=arguments.allow_changes,
        resume=resume,
    )
    with contextlib.closing(training):
        loss = training.loop()
        training.world.leave()
        if training.world.rank:
            return 130 if training.interrupted else 0
        if training.interrupted:
            training.log.close()
            note(
                "train.interrupted",
                step=training.step,
                total=training.total,
                command=f"python -m cllm.train {arguments.config} --resume",
            )
            return 130
        results = training.finish()
        note("train.done", run=training.run)
        print(
            json.dumps(
                {"run": str(training.run), "steps": training.step, "loss": loss, "eval": results},
                ensure_ascii=False,
            )
        )
        return 0


if __name__ == "__main__":
    from cllm.__main__ import run

    sys.exit(run("train"))
