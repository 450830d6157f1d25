"""What learns: the model with its adapter, its optimizer, and the rows that it learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cllm import replay
from cllm.advice import EXPONENTS, FEW_CONVERSATIONS, OTHER, TINY_RATE, advised_rate, width
from cllm.assembly import Assembly, assemble
from cllm.config import Config, TrainConfig, differences
from cllm.corpus import Encoded, encode_corpus, source_names, tokenizer_of
from cllm.data import cache
from cllm.data.packing import PackedBatch
from cllm.data.sources import Data, replay_count, replayed
from cllm.learn.dist import World
from cllm.learn.ladder import Ladder
from cllm.learn.log import AnswerCount
from cllm.learn.loss import row_nll, sft_loss
from cllm.learn.optim import StepOutOfMemoryError, Trainee, check_optimizer, make_optimizer
from cllm.learn.preference import Preference
from cllm.learn.snapshot import adapter_fingerprint, capture, restore
from cllm.messages import UserError, note
from cllm.metrics import wilson_interval
from cllm.model.adapter import adapter_tensors, save_adapter
from cllm.model.checkpoint import original_config
from cllm.model.device import choose_device, out_of_memory, release_memory
from cllm.model.lora import lora_layers
from cllm.model.nf4 import QuantizedLinear
from cllm.model.offload import checkpoint_layers, embedding_on_cpu
from cllm.model.source import resolve
from cllm.model.tokenizer import Tokenizer
from cllm.runs import base_fingerprint, replace_files, writing

if TYPE_CHECKING:
    from cllm.evaluate.results import Evaluation


def trainee_of(config: Config, assembly: Assembly) -> Trainee:
    """What learns from rows, with [train]'s optimizer."""
    model, precision = assembly.model, assembly.precision
    names = source_names(config)
    by_source = torch.zeros(len(names), device=assembly.device)
    return Trainee(
        model,
        partial(sft_loss, chunk_bytes=assembly.settings.chunk_bytes, by_source=by_source),
        make_optimizer(
            model,
            config.train.rate,
            weight_decay=config.train.weight_decay,
            plus_ratio=config.lora.plus_ratio,
            name=config.train.optimizer,
        ),
        precision,
        precision.scaler(),
        config.train.max_norm,
        names=names,
        by_source=by_source,
    )


class Learner:
    """A model put together for training, and its rows; what it is made of may get smaller.

    Rows are encoded before weights are loaded, so that data which cannot be trained on are refused
    at once; they are encoded again if the loaded model tells more: that its end token was never
    trained, that sequences may not share a row, or what it answers itself (`cllm.replay`), which
    the run `resume` already has.
    """

    def __init__(self, config: Config, corpus: Data, resume: Path | None = None) -> None:
        self.config = config
        self.corpus = corpus
        row_tokens = config.train.row_tokens
        self.ladder = Ladder(row_tokens, row_tokens, offload_inputs=config.memory.offload_inputs)
        self.base = resolve(config.model.path)
        self._set_rate()
        tokenizer = tokenizer_of(config, self.base)
        self.single, self.said = False, ""
        self.encoded = self._encode(tokenizer)
        self.world = World.join(choose_device(config.model.device))
        # What 0 came to is written into the run, and stays when the rows get shorter; of a resumed
        # run only rank 0 can read it.
        step = int(self.world.share(str(self.encoded.tokens_per_step).encode()))
        train = replace(self.config.train, tokens_per_step=step)
        self.config = config = replace(config, train=train)
        check_optimizer(config.train.optimizer, self.world.device.type)
        asks = config.data.replay and not config.data.replay_from
        self.assembly = assemble(
            self.base,
            config.model,
            config.memory,
            device=self.world.device,
            adapter=config.lora,
            # its own answers may fill rows
            row_tokens=row_tokens if asks else len(self.encoded.rows.longest().input_ids),
            optimizer=config.train.optimizer,
            tokenizer=tokenizer,
            seed=config.train.seed,
        )
        self.trainee = trainee_of(config, self.assembly)
        if config.lora.init_from:
            self._continue()
        self._introduce()
        self.single = not self.assembly.packed
        other_step = step != self.encoded.tokens_per_step
        self.engine = self.assembly.engine()
        self.answers = self._answers(resume) if asks else b""
        if self.single or other_step or asks or self.tokenizer is not tokenizer:
            self.encoded = self._encode(self.tokenizer)

    @property
    def model(self) -> Any:
        return self.assembly.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's, with an end token that the base knows."""
        assert self.assembly.tokenizer is not None
        return self.assembly.tokenizer

    @property
    def chunk_bytes(self) -> int:
        """Logits alive at once in the loss."""
        return self.assembly.settings.chunk_bytes

    def _set_rate(self) -> None:
        """`auto` becomes a number; one that is far from it is said."""
        train, original = self.config.train, original_config(self.base)
        advised = advised_rate(original)
        if train.learning_rate == "auto":
            if not (advised and advised.family):
                families = ", ".join(EXPONENTS)
                usual = TINY_RATE if width(original) else TrainConfig().rate
                likely = f"{advised.value if advised else usual:g}"
                raise UserError("train.no_rate", families=families, likely=likely)
            self.config = replace(self.config, train=replace(train, learning_rate=advised.value))
        elif advised and not self.config.preference.active and not self.config.lora.init_from:
            value = advised.of(few=len(self.corpus.train) < FEW_CONVERSATIONS)
            if not 1 / OTHER <= train.learning_rate / value <= OTHER:
                note("train.other_rate", rate=f"{train.learning_rate:g}", advised=value)

    def _encode(self, tokenizer: Tokenizer) -> Encoded:
        row_tokens = self.ladder.row_tokens
        encoded = encode_corpus(
            self.corpus, tokenizer, self.config, row_tokens=row_tokens, single=self.single
        )
        if encoded.summary != self.said:
            self.said = encoded.summary
            note("train.data", summary=encoded.summary)
        return encoded

    def _answers(self, resume: Path | None) -> bytes:
        """The base's own answers, rank 0's for all, and `corpus` with them."""
        corpus, config, text = self.corpus, self.config, b""
        share, row_tokens = config.data.replay, config.train.row_tokens
        stored = resume / replay.FILE if resume else None
        if stored and stored.is_file():  # which only rank 0 may see
            text = stored.read_bytes()
        elif self.world.rank == 0:
            count = replay_count(share, len(corpus.train))
            facts = base_fingerprint(self.base), config.model
            text = replay.own_answers(self.engine, self.tokenizer, count, row_tokens, facts)
        text = self.world.share(text)
        general = replay.conversations(text)
        mixed = replayed(general, share, len(corpus.train), corpus.held_out)
        if not mixed:
            raise UserError("data.no_replay", count=len(general))
        self.corpus = corpus._replace(replay=mixed)
        return text

    def refer_to(self, reference: Tensor | None) -> None:
        """With a preference loss: learn against these log-probabilities by PackedBatch.numbers;
        None: the policy's as it is, from the cache where it was measured before.
        """
        settings = self.config.preference
        if not settings.active:
            return
        # measured without a reference of its own
        self.trainee = replace(
            self.trainee, preference=Preference(settings, torch.empty(0), self._token_nll)
        )
        if reference is None:
            policy = (base_fingerprint(self.base), adapter_fingerprint(self.model))
            facts = (self._reference_of().tolist(), *policy, self.assembly.settings)
            # ranks on machines of their own may not have the same entries
            key = cache.key_of("reference", facts) if self.world.size == 1 else ""
            arrays, _ = cache.recall(key, lambda: ({"nats": self._answer_nats()}, None))
            reference = -torch.from_numpy(arrays["nats"].copy())
        preference = Preference(settings, reference, self._token_nll)
        self.trainee = replace(self.trainee, preference=preference)

    def _reference_of(self) -> Tensor:
        """SHA-256 of what decides a reference beside the adapter, (32,) uint8."""
        model, ld_alpha = self.config.model, self.config.preference.ld_alpha
        facts = f"{self.encoded.answers_sha256} {model} {ld_alpha}".encode()
        return torch.tensor(list(hashlib.sha256(facts).digest()), dtype=torch.uint8)

    def _token_nll(self, model: Any, batch: PackedBatch) -> Tensor:
        return row_nll(model, batch, self.chunk_bytes)

    def _answer_nats(self) -> Any:
        stored = self.encoded.rows
        position = stored.state
        stored.seek(0, 0)
        rows = [*stored.take(len(stored)), *self.encoded.held_answers]
        stored.seek(*position)
        nats = torch.zeros(self.encoded.answers, dtype=torch.float64)
        numbers = [row.numbers for row in rows if row.numbers is not None]
        progress = None if self.world.rank else AnswerCount()
        nats[torch.cat(numbers)] = self._measured(rows, self.world, progress)[0]
        return nats.numpy()

    def _measured(
        self, rows: Sequence[PackedBatch], world: World, progress: AnswerCount | None = None
    ) -> Tensor:
        """`Preference.nats` of all ranks, in host memory."""
        assert self.trainee.preference is not None
        measure = partial(
            self.trainee.preference.nats, self.model, rows, self.assembly.precision.autocast, world
        )
        try:
            nats = measure(self.ladder.micro_tokens, progress)
        except Exception as error:
            if not out_of_memory(error):
                raise
            nats = None
        if nats is None:  # here, not in the handler: the traceback holds on to the failed tensors
            release_memory()
            nats = measure(1, progress)
        world.sum_([nats])
        return nats.cpu()

    @property
    def measure(self) -> str:
        """What decides the held-out loss beside the model: the lowest of another is none."""
        return f"{self.encoded.held_sha256} {self.config.preference}"

    def held_out(self) -> tuple[float, dict[str, float]]:
        """The held-out loss, and with a preference loss what else its answers tell."""
        from cllm.evaluate.answers import held_out_loss

        encoded = self.encoded
        if preference := self.trainee.preference:
            nats = self._measured(encoded.held_answers, World())
            weighed = preference.weighed(encoded.held_answers, nats)
            right = round(weighed.figures["accuracy"] * weighed.conversations)
            rate = wilson_interval(right, weighed.conversations)
            bounds = {"accuracy_low": rate.low, "accuracy_high": rate.high}
            return weighed.loss, dict(weighed.figures) | bounds
        rows, precision = encoded.held_rows, self.assembly.precision
        return held_out_loss(self.model, rows, precision, self.chunk_bytes), {}

    def evaluated(self) -> Evaluation:
        """Base and adapter on the same held-out conversations, their losses and answers."""
        from cllm.evaluate.answers import Asking, draw, evaluate, sequence_nll

        config, encoded, precision = self.config, self.encoded, self.assembly.precision
        settings, seed = config.eval, config.train.seed
        wanted = settings.samples if config.data.kind == "chat" else 0
        drawn = draw(len(encoded.held_out), wanted, seed)
        if drawn:
            note("train.answering", count=len(drawn))
        results = evaluate(
            self.engine,
            self.tokenizer,
            [encoded.held_out[number] for number in drawn],
            partial(sequence_nll, self.model, encoded.held_rows, precision, self.chunk_bytes),
            precision,
            self.chunk_bytes,
            Asking([*encoded.train], settings.shots, settings.max_new_tokens, seed, AnswerCount()),
        )
        if config.preference.active:
            results = replace(results, preference=self.held_out()[1])
        some = 0 < len(drawn) < len(encoded.held_out)
        return replace(results, drawn=drawn) if some else results

    def prove(self) -> tuple[list[PackedBatch], str]:
        """(the largest rows: most tokens, and most of one sequence; why a step on them does not fit
        the plan's budget, "" if it does). Nothing is learned.
        """
        from cllm.learn.proof import prove

        stored = self.encoded.rows
        rows = [stored.longest(), stored.longest(max)]
        try:
            prove(
                self.trainee,
                rows,
                plan=self.assembly.plan,
                budget=self.assembly.budget,
                micro_tokens=self.ladder.micro_tokens,
            )
        except StepOutOfMemoryError as error:
            return rows, str(error)
        return rows, ""

    def capture(self) -> dict[str, Tensor]:
        """What a snapshot keeps as tensors."""
        tensors = capture(self.model, self.trainee.optimizer)
        if preference := self.trainee.preference:
            tensors |= {"reference": preference.reference, "reference_of": self._reference_of()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `capture`; the reference of other answers is measured anew. Raises
        UserError as `cllm.learn.snapshot.restore`.
        """
        reference = tensors.pop("reference", None)
        kept_of = tensors.pop("reference_of", torch.empty(0))
        if self.trainee.preference is None:  # else a step is taken back
            same = kept_of.equal(self._reference_of())
            self.refer_to(reference if same else None)  # the policy is still that of step 0
        restore(self.model, self.trainee.optimizer, tensors)

    def _continue(self) -> None:
        """[lora] becomes what the adapter is like that it continues from, and that is said."""
        asked, like = self.config, next(iter(lora_layers(self.model).values())).settings
        lora = replace(
            asked.lora, rank=like.rank, alpha=like.alpha, rslora=like.rslora, dora=like.dora
        )
        self.config = replace(asked, lora=lora)
        if changes := differences(asked, self.config):
            told = ", ".join(f"{name} {values}" for name, values in changes.items())
            note("lora.continued", path=lora.init_from, changes=told)

    def _introduce(self) -> None:
        """One line about the model and its adapter."""
        layers = lora_layers(self.model)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        quantized = (m for m in self.model.modules() if isinstance(m, QuantizedLinear))
        total = sum(p.numel() for p in self.model.parameters())
        total += sum(linear.in_features * linear.out_features for linear in quantized)
        quantize, precision = self.config.model.quantize, self.assembly.precision.name
        note(
            "train.model",
            name=self.config.model.path,
            precision=precision if quantize == "none" else quantize,
            rank=next(iter(layers.values())).settings.rank,
            linears=len(layers),
            millions=f"{trained / 1e6:.2f}",
            share=f"{trained / total:.1%}",
            device=self.assembly.device,
        )

    def apply(self, ladder: Ladder) -> None:
        """Make the model and the rows what `ladder` says; may be called again."""
        before = self.ladder
        self.ladder = ladder
        if ladder.offload_inputs:
            checkpoint_layers(self.model, -1, offload=True)
        if ladder.embedding_on_cpu and not before.embedding_on_cpu:
            embedding_on_cpu(self.model, self.assembly.device)
        if ladder.row_tokens != before.row_tokens:
            rows = self.encoded.rows
            epoch, unit = rows.state
            self.encoded = self._encode(self.tokenizer)
            reached = unit * self.encoded.rows.steps(1) // rows.steps(1)
            self.encoded.rows.seek(epoch, int(reached))
        release_memory()

    def restore_scaler(self, state: dict[str, Any]) -> None:
        """A scaler as it was when `state` was taken."""
        scaler = self.assembly.precision.scaler()
        scaler.load_state_dict(state)
        self.trainee = replace(self.trainee, scaler=scaler)

    def save(self, run: Path) -> None:
        """run/adapter/: PEFT's two files, the tokenizer and the template; complete before it
        replaces the one before.
        """
        with writing(run / "adapter"):
            save_adapter(self.model, run / "adapter.new", base=self.config.model.path)
            self.tokenizer.save(run / "adapter.new")
            replace_files(run / "adapter.new", run / "adapter")

    def load(self, run: Path) -> None:
        """The model becomes what run/adapter/ holds."""
        saved = load_file(run / "adapter" / "adapter_model.safetensors")
        for name, tensor in adapter_tensors(self.model).items():
            tensor.data.copy_(saved[name])
        self.model.eval()
