"""What a run learns from and with: rows of tokens, tokenizer, base with adapter, optimizer, engine.
`cllm.train` trains it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.config import Config
from cllm.data.sources import read_data
from cllm.memory import MIB, Settings, plan_run
from cllm.messages import UserError, note

if TYPE_CHECKING:
    from cllm.learn.ladder import Ladder
    from cllm.learn.optim import Precision
    from cllm.model.lora import LoraLinear
    from cllm.model.tokenizer import Tokenizer


def row_settings(config: Config, tokens: int, precision: str, device: str) -> Settings:
    """What the bytes of a run on rows of `tokens` depend on; precision and device as resolved by
    the caller.
    """
    model, lora, memory = config.model, config.lora, config.memory
    targets = lora.targets if isinstance(lora.targets, str) else tuple(lora.targets)
    names = ("checkpoint_layers", "offload_inputs", "stream_layers", "mlp_tile_tokens", "embedding")
    return Settings(
        tokens,
        model.quantize,
        precision,
        lora.rank,
        targets,
        chunk_bytes=memory.chunk_mib * MIB,
        device=device,
        head=model.head,
        optimizer=config.train.optimizer,
        fused=not (lora.dropout or lora.dora),
        **{name: getattr(memory, name) for name in names},
    )


def tokenizer_of(config: Config, base: Path) -> Tokenizer:
    """The tokenizer of `base` with the template that the config's data take."""
    from cllm.model.tokenizer import load_tokenizer

    template = "text" if config.data.kind == "text" else config.model.template
    return load_tokenizer(base, template=template, thinking=config.model.thinking)


def load_trainable(
    config: Config, source: Path | dict[str, Any], precision: Precision, device: str
) -> tuple[Any, dict[str, LoraLinear]]:
    """The base in `source` (a dict: a random one of that config.json) and its adapter: read ->
    convert -> quantize -> inject.
    """
    import torch

    from cllm.model.adapter import load_adapter
    from cllm.model.checkpoint import load_model, open_checkpoint, random_model, split_rows
    from cllm.model.lora import inject_lora

    how: dict[str, Any] = {
        "dtype": precision.weights,
        "device": device,
        "stream_layers": config.memory.stream_layers,
    }
    how |= {
        "quantize": None if config.model.quantize == "none" else config.model.quantize,
        "head": config.model.head,
    }
    torch.manual_seed(config.train.seed)
    model = load_model(source, **how) if isinstance(source, Path) else random_model(source, **how)
    lora = config.lora
    if lora.init_from and isinstance(source, Path):
        run = Path(lora.init_from)
        folder = run / "adapter" if (run / "adapter").is_dir() else run
        layers = load_adapter(
            model, folder, dropout=lora.dropout, split=split_rows(open_checkpoint(source))
        )
    else:
        own = ("rank", "alpha", "dropout", "targets", "rslora", "dora")
        layers = inject_lora(model, **{name: getattr(lora, name) for name in own})
    precision.prepare(model)
    return model, layers


class Prepared:
    """Read, encoded and loaded as the config says; everything that can be refused without weights
    is refused before they are loaded.
    """

    def __init__(self, config: Config, *, accept_rejects: bool) -> None:
        self.config, self.single = config, False
        self._read(accept_rejects)
        from cllm.learn.ladder import Ladder

        self.ladder = Ladder(
            config.train.row_tokens,
            config.train.row_tokens,
            offload_inputs=config.memory.offload_inputs,
        )
        self._encode()
        self._load()
        self._fit_rows()

    def _read(self, accept_rejects: bool) -> None:
        """Data and tokenizer, and everything that can be found wrong with them before weights are
        loaded.
        """
        config = self.config
        found = read_data(config.data, accept_rejects=accept_rejects)
        self.conversations, self.rejects = (found.train, found.held_out), len(found.rejects)
        if found.duplicates or found.leaked:
            note("train.repeated", duplicates=found.duplicates, leaked=found.leaked)
        from cllm.model.source import resolve

        self.base = resolve(config.model.path)
        self.tokenizer = tokenizer_of(config, self.base)

    def _encode(self) -> None:
        """Conversations -> examples -> rows; stops when nothing, or never an end token, would be
        trained.
        """
        from cllm.data.encode import encode_set
        from cllm.data.packing import PackedRows

        config, (train, held_out), row_tokens = (
            self.config,
            self.conversations,
            self.ladder.row_tokens,
        )
        how: Any = {
            "kind": config.data.kind,
            "max_tokens": row_tokens,
            "truncate": config.data.truncate,
        }
        self.examples, self.train_set, refused = encode_set(train, self.tokenizer, **how)
        held_examples, self.held_set, _ = encode_set(held_out, self.tokenizer, **how)
        if not self.examples:
            code = "train.unsupervised" if refused["no_supervised_token"] else "train.too_long"
            rows = ", ".join(f"{c.file}:{c.line}" for c in train[:3])
            raise UserError(
                code,
                count=len(train),
                row=row_tokens,
                template=self.tokenizer.template.name,
                rows=rows,
            )
        if not any(
            self.tokenizer.stop_ids.intersection(example.labels) for example in self.examples
        ):
            raise UserError("train.no_end", template=self.tokenizer.template.name)
        self.data_hash = self.examples.digest()
        self.rows = PackedRows(
            self.examples, row_tokens, seed=config.train.seed, single=self.single
        )
        held = PackedRows(held_examples, row_tokens, single=self.single)
        self.held_rows = held.take(len(held)) if held_examples else []
        left_out = ", ".join(f"{reason} {count}" for reason, count in refused.items()) or "0"
        tokens = sum(self.examples.sizes)
        self.rows_per_step = max(
            1,
            config.train.tokens_per_step
            // (tokens // len(self.rows) if self.single else row_tokens),
        )
        note(
            "train.data",
            train=len(self.examples),
            held_out=len(self.held_set),
            tokens=f"{tokens:,}",
            rows=len(self.rows),
            rejects=self.rejects,
            left_out=left_out,
        )

    def _load(self) -> None:
        """What the plan makes of the budget; base, adapter, optimizer."""
        import torch

        from cllm.learn.dist import World
        from cllm.learn.loss import sft_loss
        from cllm.learn.optim import Precision, check_optimizer, make_optimizer
        from cllm.learn.proof import cap_allocator, choose_device
        from cllm.model.checkpoint import original_config
        from cllm.model.offload import place

        config = self.config
        self.world = World.join(choose_device(config.model.device))
        device = self.device = self.world.device
        check_optimizer(config.train.optimizer, torch.device(device).type)
        self.precision = Precision.choose(config.model.precision, torch.device(device).type)
        settings = row_settings(
            config, len(self.rows.longest().input_ids), self.precision.name, device
        )
        self.budget = cap_allocator(config.memory.budget_gib, device)
        settings, self.planned = plan_run(
            original_config(self.base), config.model.path, settings, self.budget
        )
        self.model, layers = load_trainable(config, self.base, self.precision, device)
        place(self.model, settings, device)
        self.chunk_bytes = config.memory.chunk_mib * MIB
        self.objective = lambda model, batch: sft_loss(model, batch, self.chunk_bytes)
        self.optimizer = make_optimizer(
            self.model,
            config.train.learning_rate,
            weight_decay=config.train.weight_decay,
            plus_ratio=config.lora.plus_ratio,
            name=config.train.optimizer,
        )
        self.scaler = self.precision.scaler()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        first, precision = (
            next(iter(layers.values())),
            self.precision.name if config.model.quantize == "none" else config.model.quantize,
        )
        note(
            "train.model",
            name=config.model.path,
            precision=precision,
            rank=first.settings.rank,
            linears=len(layers),
            millions=f"{trained / 1e6:.2f}",
            share=f"{trained / total:.1%}",
            device=device,
        )

    def _fit_rows(self) -> None:
        """What only the loaded model tells: whether its end token was ever trained, and whether
        sequences may share a row.
        """
        from cllm.learn.loss import check_head
        from cllm.model.attention import packs
        from cllm.model.tokenizer import with_trained_end
        from cllm.serve.engine import Engine

        # adapters are made in training mode, and dropout would look like a head that is not known
        self.model.eval()
        with self.precision.autocast():
            check_head(self.model)
            self.single = not packs(self.model)
        if self.single:
            note("train.single", architecture=type(self.model).__name__)
        before, self.tokenizer = self.tokenizer, with_trained_end(self.tokenizer, self.model)
        if self.single or before is not self.tokenizer:
            self._encode()
        stop_ids, pad_id = self.tokenizer.stop_ids, self.tokenizer.pad_id
        self.engine = Engine(
            self.model, stop_ids=stop_ids, pad_id=pad_id, autocast=self.precision.autocast
        )

    def apply(self, ladder: Ladder) -> None:
        """Make the model and the rows what `ladder` says; may be called again."""
        import torch

        from cllm.model.offload import checkpoint_layers, embedding_on_cpu

        before, self.ladder = self.ladder, ladder
        if ladder.offload_inputs:
            checkpoint_layers(self.model, -1, offload=True)
        if ladder.embedding_on_cpu:
            embedding_on_cpu(self.model, self.device)
        if ladder.row_tokens != before.row_tokens:
            (epoch, row), count = self.rows.state, len(self.rows)
            self._encode()
            self.rows.seek(epoch, row * len(self.rows) // count)
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
