"""What one QLoRA step of a published model's shape takes of a card, by others and by us, measured
without a card.

    PYTHON=CUVENV/bin/python python bench/null_gpu_peers.py [--only ours] [--out FILE]

Each case is a process of its own on the null device (tools/nullgpu) with 80 GiB, so that a peak
above 8 GiB can be read; where allocated memory fits 8 GiB and reserved memory does not, a second
run on 8 GiB decides. Weights are random: allocator, launches and waits do not depend on them. Rank
16 on all linears, bf16, one sequence per micro-batch, two micro-batches a step, NF4 with double
quantization for the peers (the QLoRA recipe, their smallest). The second of two steps is counted;
the peak is the larger one's.

The peers' model holds what `from_pretrained(load_in_4bit)` leaves behind: the class on the meta
device, every linear but the head a `Linear4bit` whose `Params4bit` bitsandbytes itself made, the
rest in bf16. `--check` compares its bytes, tensor by tensor, with a small checkpoint that
`from_pretrained` loaded. Ours is `ours`: the step of `cllm.train` without its files.

CUVENV needs the packages of tools/nullgpu/README.md and peft, accelerate, bitsandbytes and, for the
cases named "trl", trl and datasets.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODELS = ("Qwen3-8B", "chatglm3-6b")
TOKENS = (2048, 4096)
MICRO_BATCHES, RANK = 2, 16
GIB = 2**30
CONTEXT_GIB = 0.25  # the null device's default
SETTINGS: dict[str, tuple[str, ...]] = {
    "peft": ("plain", "checkpointing"),
    "trl": ("plain", "checkpointing"),
    "ours": ("plain", "recomputed", "streamed"),
}
PACKAGES = {
    "peft": ("torch", "transformers", "peft", "bitsandbytes", "accelerate"),
    "trl": ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl"),
    "ours": ("torch", "transformers", "bitsandbytes"),
}


def four_bit(original: dict[str, Any]) -> Any:
    """A random model as `from_pretrained` with an NF4 `BitsAndBytesConfig` holds it."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import nn

    from cllm.model.checkpoint import Placement, random_model

    model: Any = random_model(original, Placement(dtype=torch.bfloat16, device="meta"))
    model.set_attn_implementation("sdpa")
    head = model.get_output_embeddings()
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or linear is head:
            continue
        replacement = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        weight = torch.zeros(linear.weight.shape, dtype=torch.bfloat16, device="cuda")
        replacement.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to("cuda")
        replacement.bias = linear.bias
        model.set_submodule(name, replacement)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    empty = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cuda")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = (
                        nn.Parameter(empty, requires_grad=False) if is_parameter else empty
                    )
    model.is_loaded_in_4bit = True
    return model


def rows(tokens: int, vocabulary: int) -> list[dict[str, Any]]:
    """Sequences of `tokens` random ids, all of them supervised."""
    from cllm.bench import random_row

    ids = random_row(tokens, vocabulary).input_ids.tolist()
    return [{"input_ids": ids, "labels": ids}] * (2 * MICRO_BATCHES)


def arguments(folder: str, checkpointing: bool) -> dict[str, Any]:
    """What both of the others' trainers are told; the rest are their defaults."""
    return {
        "output_dir": folder,
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_checkpointing": checkpointing,
        "bf16": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def second_step(run: Callable[[Any], object]) -> None:
    """Run a trainer with a callback that forgets the counters before the second step."""
    import nullgpu
    from transformers import TrainerCallback

    class Counted(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nullgpu.reset()
            NoKernel.launches = 0

    run(Counted())


def peft(original: dict[str, Any], tokens: int, setting: str, folder: str) -> None:
    """Transformers' Trainer, PEFT and bitsandbytes, as PEFT's guide to quantization has it."""
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments

    checkpointing = setting == "checkpointing"
    model = prepare_model_for_kbit_training(
        four_bit(original), use_gradient_checkpointing=checkpointing
    )
    model = get_peft_model(model, lora())
    data = [
        {name: torch.tensor(ids) for name, ids in row.items()}
        for row in rows(tokens, model.config.vocab_size)
    ]
    settings = TrainingArguments(**arguments(folder, checkpointing))
    second_step(
        lambda counted: Trainer(
            model=model, args=settings, train_dataset=data, callbacks=[counted]
        ).train()
    )


class NoKernel:
    """In place of a Triton kernel, which needs a card: TRL's write into tensors that they are
    handed and allocate nothing. Its launches are counted here.
    """

    launches = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        NoKernel.launches += 1
        return lambda *args, **options: None


def trl(original: dict[str, Any], tokens: int, setting: str, folder: str) -> None:
    """TRL's SFTTrainer with its default loss, which takes the head in tiles."""
    import pyarrow
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    from trl.kernels import chunked_logprob

    chunked_logprob._forward_kernel = chunked_logprob._backward_kernel = NoKernel()
    model = four_bit(original)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"<end>": 0}, merges=[])),
        eos_token="<end>",
        pad_token="<end>",
    )
    settings = SFTConfig(
        **arguments(folder, setting == "checkpointing"),
        max_length=tokens,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are ids already
    )
    table = pyarrow.Table.from_pylist(rows(tokens, model.config.vocab_size))
    data = Dataset(table, fingerprint="rows")  # named: it would be pickled for one
    second_step(
        lambda counted: SFTTrainer(
            model=model,
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora(),
            callbacks=[counted],
        ).train()
    )


def ours(original: dict[str, Any], tokens: int, setting: str, folder: str) -> None:
    """Two of our steps; nothing recomputed, every layer recomputed, or every layer streamed."""
    import nullgpu

    from cllm.assembly import EVERY_LAYER, assemble
    from cllm.bench import random_row
    from cllm.config import LoraConfig, MemoryConfig, ModelConfig
    from cllm.learn.loss import sft_loss
    from cllm.learn.optim import Trainee, make_optimizer

    streamed = setting == "streamed"
    assembly = assemble(
        original,
        ModelConfig(quantize="nf4", precision="bf16", device="cuda"),
        MemoryConfig(
            checkpoint_layers=0 if setting == "plain" else EVERY_LAYER,
            stream_layers=EVERY_LAYER if streamed else 0,
            offload_inputs=streamed,
        ),
        adapter=LoraConfig(rank=RANK, alpha=2 * RANK),
        row_tokens=tokens,
    )
    model, precision = assembly.model.train(), assembly.precision
    optimizer = make_optimizer(model, 1e-4)
    trainee = Trainee(model, sft_loss, optimizer, precision, precision.scaler())
    batches = [random_row(tokens, model.config.vocab_size)] * MICRO_BATCHES
    for _ in range(2):
        nullgpu.reset()
        trainee.step(batches)


def check() -> None:
    """`four_bit` against `from_pretrained` on a small model: the same bytes by the same names."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from cllm.model.checkpoint import Placement, random_model
    from cllm.shapes import find_config

    small = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "vocab_size": 1024,
    }
    original = find_config("Qwen3-8B")[1] | small
    with tempfile.TemporaryDirectory() as folder:
        random_model(original, Placement(dtype=torch.bfloat16)).save_pretrained(folder)  # type: ignore[operator]
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
        )

    def sizes(model: Any) -> dict[str, Any]:
        found = {name: (t.shape, t.dtype) for name, t in model.named_buffers()}
        for name, parameter in model.named_parameters():
            found[name] = (parameter.shape, parameter.dtype)
            if state := getattr(parameter, "quant_state", None):
                for part, tensor in state.as_dict().items():
                    if isinstance(tensor, torch.Tensor):
                        found[f"{name}.{part}"] = (tensor.shape, tensor.dtype)
        return found

    ours, theirs = sizes(four_bit(original)), sizes(loaded)
    different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    print(
        "\n".join(f"{name}: {ours.get(name)}, {theirs.get(name)}" for name in different) or "equal"
    )


def run_case(case: dict[str, Any]) -> None:
    """One case in this process; its figures as the last line."""
    import nullgpu
    import torch

    from cllm.shapes import find_config

    trainer = {"peft": peft, "trl": trl, "ours": ours}[case["trainer"]]
    with tempfile.TemporaryDirectory() as folder:
        trainer(find_config(case["model"])[1], case["tokens"], case["setting"], folder)
    counters = nullgpu.counters()
    figures = {
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "launches": counters["launch"] + counters["blas"] + NoKernel.launches,
        "host_waits": counters["waits"],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES[case["trainer"]]},
    }
    print(json.dumps(figures))


def start(case: dict[str, Any], gib: int) -> tuple[int, str, str]:
    """Exit status, last line of stdout and of stderr of `case` on a null card of `gib` GiB."""
    environment = os.environ | {
        "NULLGPU_GIB": str(gib),
        "NULLGPU_VALUES": "harmless",
        "NULLGPU_COPY": "0",  # or 80 GiB of it would come to lie in this machine's memory
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "CLLM_LANG": "en",
    }
    command = [str(ROOT / "tools/nullgpu/run"), __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = [(text.strip().splitlines() or [""])[-1] for text in (done.stdout, done.stderr)]
    return done.returncode, last[0], last[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", choices=SETTINGS, help="renew these cases of an existing file")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/null-gpu-peers.json")
    options = parser.parse_args()
    if options.case or options.check:
        run_case(options.case) if options.case else check()
        return
    cases = [
        {"model": model, "tokens": tokens, "trainer": trainer, "setting": setting}
        for model in MODELS
        for tokens in TOKENS
        for trainer in ([options.only] if options.only else SETTINGS)
        for setting in SETTINGS[trainer]
    ]
    results: list[dict[str, Any]] = []
    if options.only and options.out.exists():
        before = json.loads(options.out.read_text(encoding="utf-8"))["cases"]
        results = [case for case in before if case["trainer"] != options.only]
    for case in cases:
        status, figures, error = start(case, 80)
        result = case | (json.loads(figures) if status == 0 else {"exit": status, "error": error})
        if status == 0:
            # More than the card cannot run; what was reserved with room to spare is an upper bound.
            room = 8 - CONTEXT_GIB
            fits = result["reserved_gib"] <= room
            if not fits and result["allocated_gib"] <= room:
                fits = start(case, 8)[0] == 0
            result |= {"exit": 0, "fits_8_gib": fits}
        results.append(result)
        print(json.dumps(result), flush=True)
        options.out.write_text(json.dumps({"cases": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
