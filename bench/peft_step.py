"""The peer of `python -m cllm.bench --against peft`: Trainer + PEFT on the same random weights,
rows and adapter sizes.

Called by cllm.bench with one JSON argument, the run's config with the base's config.json as
"original", "row_tokens" and "steps"; prints one JSON line: for Trainer's defaults ("plain")
and with gradient checkpointing, step time, tokens per second, peak (max_memory_allocated, on the
CPU the same storage census) and the first loss. The usual recipe: `prepare_model_for_kbit_training`
and bitsandbytes' Linear4bit for NF4, bf16 weights, PEFT's float32 adapters, fused AdamW.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from cllm.bench import ROWS_PER_STEP, random_row
from cllm.learn.proof import peak_storage_bytes, storage_bytes
from cllm.model.checkpoint import Placement, random_model
from cllm.model.device import Precision


class Rows(Dataset[dict[str, Any]]):
    """The same row again and again, labels unshifted as Transformers wants them."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        self.ids = random_row(tokens, vocabulary).input_ids

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids, "labels": self.ids}


class Clock(TrainerCallback):
    """Seconds of every optimizer step and the first loss."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.seconds, self.losses = cuda, [], []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        self.losses += [logs["loss"]] if logs and "loss" in logs else []


def build(spec: dict[str, Any], device: str, checkpointing: bool) -> Any:
    """The model as PEFT's own guides prepare it."""
    torch.manual_seed(spec["train"]["seed"])
    dtype = Precision.choose(spec["model"]["precision"], torch.device(device).type).weights
    model: Any = random_model(spec["original"], Placement(dtype=dtype, device=device))
    model.set_attn_implementation("sdpa")
    if spec["model"]["quantize"] == "nf4":
        from bitsandbytes.nn import Linear4bit, Params4bit

        head = model.get_output_embeddings()
        for name, linear in list(model.named_modules()):
            if type(linear) is nn.Linear and linear is not head:
                has_bias = linear.bias is not None
                new = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=has_bias,
                    compute_dtype=dtype,
                    quant_type="nf4",
                    device="meta",
                )
                new.weight = Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4"
                ).to(device)
                new.bias = linear.bias
                model.set_submodule(name, new)
        model.is_loaded_in_4bit = True
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    return get_peft_model(
        model,
        LoraConfig(
            r=spec["lora"]["rank"],
            lora_alpha=spec["lora"]["alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def measure(spec: dict[str, Any], device: str, checkpointing: bool, folder: str) -> dict[str, Any]:
    """Train `steps` + 1 steps; the first one warms up."""
    cuda = device.startswith("cuda")
    model = build(spec, device, checkpointing)

    def trainer(steps: int) -> tuple[Trainer, Clock]:
        settings: dict[str, Any] = {
            "max_steps": steps,
            "gradient_checkpointing": checkpointing,
            "seed": spec["train"]["seed"],
            "use_cpu": not cuda,
        }
        settings |= {
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "bf16": model.dtype == torch.bfloat16,
        }
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ROWS_PER_STEP,
            **settings,
        )
        clock = Clock(cuda)
        rows = Rows(spec["row_tokens"], model.config.vocab_size)
        return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock]), clock

    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run, clock = trainer(spec["steps"] + 1)
    run.train()
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = storage_bytes([*model.parameters(), *model.buffers()]) + peak_storage_bytes(
            lambda: trainer(2)[0].train()
        )
    median = statistics.median(clock.seconds[1:])
    speed = ROWS_PER_STEP * spec["row_tokens"] / median
    return {
        "step_seconds": median,
        "tokens_per_second": speed,
        "peak_bytes": peak,
        "first_loss": clock.losses[0],
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    device = spec["model"]["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        results = {
            name: measure(spec, device, name == "checkpointing", folder)
            for name in ("plain", "checkpointing")
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
