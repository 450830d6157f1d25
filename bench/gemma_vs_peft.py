"""Gemma 3 270M (262k vocabulary) on the CPU, side by side with Trainer + PEFT: the same weights,
samples, adapter and losses.

    OMP_NUM_THREADS=1 python bench/gemma_vs_peft.py [--model models/gemma-3-270m-q4_k_m.gguf] [--out
    bench/results/gemma270m_vs_peft.json]

Data: 12 conversations of 30-300 tokens made of the built-in demo's questions (several turns each),
the first quarter masked, seed 0. Every step takes four of them: Trainer pads them to the longest,
as its collator does; cllm packs them into one row. Both start from the same adapter file (r = 8 on
all linears), AdamW 2e-4 constant, no weight decay, clipping at 1, float32 (bf16 is emulated on this
CPU: four times slower).

Every side runs in a process of its own. "process": VmHWM, reset after the model and adapter are
loaded, so it holds them, the interpreter and the libraries. "tensors": parameters, optimizer state
and the most bytes of other storages alive at once (a census of one more step): what
`max_memory_allocated` would show on a GPU. The claim is about both: at most 0.40 of Trainer +
PEFT's defaults, with recomputed layers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
BATCH, STEPS, RANK, ALPHA, RATE, LIMIT = 4, 3, 8, 16.0, 2e-4, 0.40
SIDES = (
    "cllm-lora",
    "cllm-lora-checkpointing",
    "cllm-qlora-checkpointing",
    "peft-lora",
    "peft-lora-checkpointing",
)


def samples(model: Path) -> list[Any]:
    """STEPS * BATCH examples whose lengths are drawn evenly from 30 to 300 tokens."""
    from cllm.data.encode import IGNORE_INDEX, Example, encode_all
    from cllm.data.reader import read_conversations
    from cllm.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model, template="plain")
    draw = random.Random(0)
    turns = read_conversations(ROOT / "cllm" / "assets" / "demo.jsonl")[0]
    draw.shuffle(turns)
    made: list[Any] = []
    for _ in range(STEPS * BATCH):
        wanted, joined = draw.randint(30, 300), turns.pop()
        while True:
            longer = replace(joined, messages=joined.messages + turns.pop().messages)
            if len(next(iter(encode_all([longer], tokenizer, max_tokens=512))).input_ids) > wanted:
                break
            joined = longer
        ids = next(iter(encode_all([joined], tokenizer, max_tokens=512))).input_ids
        made.append(Example(ids, [IGNORE_INDEX] * (len(ids) // 4) + ids[len(ids) // 4 :]))
    return made


def start_adapter(folder: Path, model: Any) -> None:
    """One adapter both sides start from; B is not zero, so that every gradient counts from the
    first step.
    """
    import torch

    from cllm.model.adapter import adapter_tensors, save_adapter
    from cllm.model.lora import inject_lora

    torch.manual_seed(0)
    inject_lora(model, rank=RANK, alpha=ALPHA)
    for name, tensor in adapter_tensors(model).items():
        if "lora_B" in name:
            tensor.data.normal_(0, 1e-3)
    save_adapter(model, folder, base="gemma")


def proc(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_high_water() -> None:
    """From here VmHWM counts anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def run_cllm(side: str, model_path: Path, adapter: Path) -> dict[str, Any]:
    """The trainer's own step on packed rows."""
    import torch

    from cllm.data.packing import collate
    from cllm.learn.loss import sft_loss
    from cllm.learn.optim import Trainee, make_optimizer
    from cllm.learn.proof import peak_bytes
    from cllm.model.adapter import load_adapter
    from cllm.model.checkpoint import Placement, load_model
    from cllm.model.device import Precision
    from cllm.model.offload import checkpoint_layers

    examples = samples(model_path)
    precision = Precision.choose("fp32", "cpu")
    model = load_model(
        model_path, Placement(dtype=torch.float32, quantize="nf4" if "qlora" in side else "none")
    ).train()
    load_adapter(model, adapter)
    checkpoint_layers(model, -1 if "checkpointing" in side else 0)
    optimizer = make_optimizer(model, RATE)
    trainee = Trainee(model, sft_loss, optimizer, precision, precision.scaler())
    rows = [collate(examples[at : at + BATCH]) for at in range(0, len(examples), BATCH)]
    loaded = proc("VmRSS")
    reset_high_water()

    def step(row: Any) -> tuple[float, float]:
        start = time.perf_counter()
        return trainee.step([row]).loss, time.perf_counter() - start

    losses, seconds = zip(*[step(row) for row in rows], strict=True)
    high, largest = proc("VmHWM"), max(rows, key=lambda row: len(row.input_ids))
    return _result(
        losses, seconds, loaded, high, peak_bytes(lambda: step(largest), model, optimizer)
    )


def run_peft(side: str, model_path: Path, adapter: Path) -> dict[str, Any]:
    """Trainer and PEFT with their defaults, or with gradient checkpointing switched on."""
    import torch
    from peft import PeftModel
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Trainer, TrainingArguments

    from bench.peft_step import Clock
    from cllm.learn.proof import peak_storage_bytes, storage_bytes
    from cllm.model.checkpoint import Placement, load_model

    examples = samples(model_path)
    base: Any = load_model(model_path, Placement(dtype=torch.float32)).train()
    base.set_attn_implementation("sdpa")
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)

    def collator(items: list[Any]) -> dict[str, Any]:
        ids = [torch.tensor(item["input_ids"]) for item in items]
        labels = [torch.tensor(item["labels"]) for item in items]
        mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        padded = pad_sequence(labels, batch_first=True, padding_value=-100)
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": mask,
            "labels": padded,
        }

    def trainer(batch: list[Any], folder: str) -> tuple[Trainer, Clock]:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=len(batch) // BATCH,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing="checkpointing" in side,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            train_sampling_strategy="sequential",
        )
        clock = Clock(cuda=False)
        data: Any = [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in batch]
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=collator,
            callbacks=[clock],
        ), clock

    with tempfile.TemporaryDirectory() as folder:
        run, clock = trainer(examples, folder)
        loaded = proc("VmRSS")
        reset_high_water()
        run.train()
        high = proc("VmHWM")
        state = [
            t
            for values in run.optimizer.state.values()
            for t in values.values()
            if isinstance(t, torch.Tensor)
        ]
        held = storage_bytes([*model.parameters(), *model.buffers(), *state])
        batches = [examples[at : at + BATCH] for at in range(0, len(examples), BATCH)]
        largest = max(batches, key=lambda batch: max(len(e.input_ids) for e in batch))
        run.optimizer = run.lr_scheduler = None
        # The census' trainer makes new AdamW moments during its step; those held above are the same
        # number of bytes, so one is taken off.
        peak = (
            held
            + peak_storage_bytes(lambda: trainer(largest, folder)[0].train())
            - storage_bytes(state)
        )
    return _result(clock.losses, clock.seconds, loaded, high, peak)


def _result(losses: Any, seconds: Any, loaded: int, high: int, tensors: int) -> dict[str, Any]:
    return {
        "losses": list(losses),
        "step_seconds": statistics.median(seconds),
        "loaded_bytes": loaded,
        "process_bytes": high,
        "tensor_bytes": tensors,
    }


def main() -> int:
    """Run every side, compare, write the JSON; exit code 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "gemma-3-270m-q4_k_m.gguf")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "gemma270m_vs_peft.json"
    )
    parser.add_argument("--side", nargs=2, metavar=("NAME", "ADAPTER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run = run_cllm if options.side[0].startswith("cllm") else run_peft
        print(json.dumps(run(options.side[0], options.model, Path(options.side[1]))))
        return 0
    import torch

    from cllm.data.packing import collate
    from cllm.model.checkpoint import Placement, load_model

    examples = samples(options.model)
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        start_adapter(Path(folder), load_model(options.model, Placement(dtype=torch.float32)))
        for side in SIDES:
            command = [
                sys.executable,
                __file__,
                "--model",
                str(options.model),
                "--side",
                side,
                folder,
            ]
            sides[side] = json.loads(
                subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True
                ).stdout.splitlines()[-1]
            )
            print(side, json.dumps(sides[side]), file=sys.stderr, flush=True)
    batches = [examples[at : at + BATCH] for at in range(0, len(examples), BATCH)]
    padded = [BATCH * max(len(e.input_ids) for e in batch) for batch in batches]
    mine, reference = sides["cllm-lora-checkpointing"], sides["peft-lora"]
    ratios = {
        f"{kind}: cllm-lora-checkpointing / {other}": mine[kind] / sides[other][kind]
        for kind in ("process_bytes", "tensor_bytes")
        for other in ("peft-lora", "peft-lora-checkpointing")
    }
    difference = max(
        abs(a - b) / b for a, b in zip(mine["losses"], reference["losses"], strict=True)
    )
    holds = {
        f"peak at most {LIMIT} of Trainer + PEFT defaults (process)": mine["process_bytes"]
        <= LIMIT * reference["process_bytes"],
        f"peak at most {LIMIT} of Trainer + PEFT defaults (tensors)": mine["tensor_bytes"]
        <= LIMIT * reference["tensor_bytes"],
        "losses agree to 1e-4": difference < 1e-4,
        "QLoRA's peak below LoRA's (tensors)": sides["cllm-qlora-checkpointing"]["tensor_bytes"]
        < mine["tensor_bytes"],
        "QLoRA's peak below LoRA's (process)": sides["cllm-qlora-checkpointing"]["process_bytes"]
        < mine["process_bytes"],
    }
    data = {
        "tokens": [sum(len(e.input_ids) for e in batch) for batch in batches],
        "padded_tokens": padded,
        "supervised": [collate(batch).weight for batch in batches],
        "trainer": f"{BATCH} samples padded to the longest",
        "cllm": f"the same {BATCH} samples in one packed row",
    }
    result = {
        "command": "OMP_NUM_THREADS=1 python bench/gemma_vs_peft.py",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, 1 thread",
        "torch": torch.__version__,
        "precision": "fp32",
        "rank": RANK,
        "steps": STEPS,
        "data": data,
        "sides": sides,
        "ratios": ratios,
        "largest_relative_loss_difference": difference,
        "holds": holds,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
