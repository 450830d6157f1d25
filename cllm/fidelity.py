"""Whether an export still is the trained model: the same held-out rows and prompts through both,
one whole model at a time, under the run's [memory].
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cllm.assembly import EVERY_LAYER, locate, open_model
from cllm.config import MemoryConfig
from cllm.data.encode import Example, encode_all
from cllm.data.message import Message
from cllm.data.schema import Conversation
from cllm.messages import UserError, note, say, table, to_json
from cllm.model.device import Precision, device_of, free_bytes, out_of_memory, release_memory
from cllm.model.lora import lora_strength
from cllm.model.offload import decoder_layers, embedding_on_cpu, move, stream_layers
from cllm.model.tokenizer import Tokenizer
from cllm.serve.engine import Engine
from cllm.serve.sampling import Sampling

LIMITS = {
    "q8_0": (0.97, 0.0116),
    "q5_1": (0.9, 0.160),
    "q5_0": (0.9, 0.208),
    "q4_1": (0.0, 0.664),
    "q4_0": (0.0, 0.899),
}
"""GGUF type -> least share of positions with an equal choice, largest mean KL in nats: a quarter
above what llama.cpp loses of SmolLM2-135M (bench/results/gguf_types.json), since small models lose
most. A KL from 1/2 on allows every choice, so that of 4 bits only the KL itself decides.
"""
LIMIT = (0.99, 1e-3)
"""The same of every other export."""
FEW = 3
"""Misses to be expected of so few positions that chance may make another of them."""
CONVERSATIONS = 16
POSITIONS = 512
SAMPLES = 3
SAMPLE_TOKENS = 32


class Measured(NamedTuple):
    """What one model says of the held-out rows and prompts."""

    log_probabilities: Tensor
    """(N, V) at supervised positions."""
    labels: Tensor
    """(N,)"""
    answers: list[str]
    """Greedy ones."""


class DifferentError(UserError):
    """The export is not the trained model."""


def measure(
    engine: Engine,
    examples: Sequence[Example],
    prompts: Sequence[list[int]],
    tokenizer: Tokenizer,
    strength: float = 1.0,
) -> Measured:
    """Log-probabilities of at most `POSITIONS` labels, and greedy answers to the prompts, the
    adapter at `strength`.
    """
    rows, labels = [], []
    room = POSITIONS
    with torch.no_grad(), engine.autocast(), lora_strength(engine.model, strength):
        for example in examples:
            supervised = [i for i, label in enumerate(example.labels[1:]) if label >= 0]
            positions = torch.tensor(supervised[:room], dtype=torch.int64)
            if not len(positions):
                continue
            ids = torch.tensor([example.input_ids], device=engine.device)
            logits = engine.model(input_ids=ids, use_cache=False).logits[0]
            chosen = logits[positions.to(logits.device)]
            rows.append(chosen.float().log_softmax(-1).cpu())
            labels.append(torch.tensor(example.labels)[positions + 1])
            room -= len(positions)
    answers = engine.generate(prompts, Sampling(SAMPLE_TOKENS, strength=strength))
    return Measured(torch.cat(rows), torch.cat(labels), [tokenizer.decode(a) for a in answers])


def differences(trained: Measured, exported: Measured, largest_kl: float) -> dict[str, Any]:
    """KL(trained || exported) in nats and top-1 agreement, means over positions; the share of
    positions with an equal choice; perplexity of both; the answers side by side.

    The export's choice b counts as equal to the trained model's choice a also where p_a - p_b <=
    sqrt(2 `largest_kl`): 16-bit rounding decides such ties, and only there can a distribution
    within that KL of p put b first. (q_b >= q_a gives p_a - p_b <= 2 TV(p, q), and Pinsker's
    inequality TV <= sqrt(KL / 2).) None from a KL of 1/2 on, which allows every choice.
    """
    margin = math.sqrt(2 * largest_kl)
    p, q = trained.log_probabilities, exported.log_probabilities
    answers = zip(trained.answers, exported.answers, strict=True)
    a, b = p.argmax(-1, keepdim=True), q.argmax(-1, keepdim=True)
    ahead = p.gather(1, a).exp() - p.gather(1, b).exp()
    return {
        "positions": len(trained.labels),
        "mean_kl": float((p.exp() * (p - q)).sum(-1).double().mean()),
        "top1_agreement": float((a == b).double().mean()),
        "equal_choices": float((ahead <= margin).double().mean()) if margin < 1 else None,
        "perplexity_trained": _perplexity(trained),
        "perplexity_exported": _perplexity(exported),
        "samples": [{"trained": a, "exported": b} for a, b in answers],
    }


def _perplexity(measured: Measured) -> float:
    chosen = measured.log_probabilities.gather(1, measured.labels[:, None])
    return math.exp(min(700.0, float(-chosen.double().mean())))


def _reopen(
    folder: Path,
    to: str,
    memory: MemoryConfig,
    precision: Precision,
    device: torch.device,
    questions: Sequence[list[Message]],
) -> tuple[Any, list[list[int]]]:
    """(the export as its readers see it, the ids that its own tokenizer and template give each
    question).
    """
    if to == "merged":
        return _as_transformers_reads(folder, precision, device, questions)
    exported = open_model(
        folder if to == "peft" else folder / "model.gguf",
        precision=precision.name,
        device=device,
        quantize="none",
        memory=memory,
    )
    return exported.model, [exported.tokenizer.encode_chat(question) for question in questions]


def _as_transformers_reads(
    folder: Path, precision: Precision, device: torch.device, questions: Sequence[list[Message]]
) -> tuple[Any, list[list[int]]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading files that lie here
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=precision.weights, local_files_only=True
    )
    model.eval().requires_grad_(False)
    precision.prepare(model)
    _move(model, device)
    reader = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    turns = [[message.row() for message in question] for question in questions]
    return model, [
        list(reader.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))
        for turn in turns
    ]


def _move(model: Any, device: torch.device) -> None:
    """Onto the device; what does not fit there streams its layers from host memory."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if device.type != "cuda" or size < 0.8 * free_bytes(device):
        model.to(device)
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().to(device), requires_grad=False)
    inside = {id(module) for module in decoder_layers(model).modules()}
    for module in model.modules():
        if id(module) not in inside and module is not embedding:
            move(module, device)
    stream_layers(model, EVERY_LAYER, device)
    embedding_on_cpu(model, device)


def check(
    run: str,
    folder: Path,
    to: str,
    kind: str,
    nf4: bool,
    held_out: list[Conversation],
    strength: float = 1.0,
) -> dict[str, Any]:
    """The fidelity report, against the run at `strength`, also written into `folder`; where the GPU
    has no room, on the CPU.

    Raises DifferentError beyond the limits, or if any prompt comes out differently.
    """
    limits = LIMITS.get(kind if to in ("gguf", "ollama") else "", LIMIT)
    compared = partial(_compared, run, folder, to, nf4, held_out, limits[1], strength)
    try:
        report = compared(device="")
    except Exception as error:
        if not out_of_memory(error) or not torch.cuda.is_initialized():
            raise
        detail = str(error).split("\n")[0]
        report = {}
    if not report:
        release_memory()
        note("export.check_on_cpu", detail=detail)
        report = compared(device="cpu")
    equal, prompts = report["prompts_equal"], report["prompts"]
    report["limits"] = limits
    report["passed"] = (
        may_be(report["equal_choices"] or 0.0, report["positions"], limits[0])
        and report["mean_kl"] <= limits[1]
        and equal in (None, prompts)
    )
    (folder / "fidelity.json").write_text(to_json(report, indent=1) + "\n", encoding="utf-8")
    print(summary(report))
    if not report["passed"]:
        share = report["equal_choices"]
        raise DifferentError(
            "export.differs",
            kl=f"{report['mean_kl']:.2g}",
            most=limits[1],
            agreement="-" if share is None else f"{share:.1%}",
            equal=equal,
            prompts=prompts,
        )
    return report


def may_be(share: float, positions: int, limit: float) -> bool:
    """Whether `share` of the positions is `limit`; or, of so few that not even FEW misses are to be
    expected, whether so many may come out by chance where `limit` is the true share: the exact
    binomial test at 2.5 %, so that one of a dozen positions decides nothing.
    """
    misses, rate = round((1 - share) * positions), 1 - limit
    if share >= limit or positions * rate >= FEW:
        return share >= limit
    fewer = (math.comb(positions, k) * rate**k * limit ** (positions - k) for k in range(misses))
    return 1 - sum(fewer) >= 0.025


def _compared(
    run: str,
    folder: Path,
    to: str,
    nf4: bool,
    held_out: list[Conversation],
    largest_kl: float,
    strength: float,
    *,
    device: str,
) -> dict[str, Any]:
    """Figures of the trained model and of the export on the same device."""
    trained = open_model(run, device=device, quantize="nf4" if nf4 else "none")
    engine, tokenizer = trained.engine(), trained.tokenizer
    limit = min(2048, engine.positions)
    encoded = encode_all(held_out, tokenizer, max_tokens=limit, truncate="prompt")
    examples = [e for e in encoded if not isinstance(e, str)][:CONVERSATIONS]
    if not examples:
        raise UserError("export.nothing_to_compare", rows=len(held_out), limit=limit)
    questions = [list(c.messages[:-1]) for c in held_out[:CONVERSATIONS]]
    expected = [tokenizer.encode_chat(question) for question in questions]
    prompts = [ids for ids in expected if len(ids) < engine.max_tokens][:SAMPLES]
    before = measure(engine, examples, prompts, tokenizer, strength)
    precision, target = trained.precision, trained.assembly.device
    del trained, engine  # one model at a time
    gc.collect()
    release_memory()
    memory = locate(run).memory
    # A format that no chat_template can say reaches other programs in PEFT's form only.
    told = questions if to == "peft" or tokenizer.chat_template else []
    model, ids = _reopen(folder, to, memory, precision, target, told)
    exported = Engine(
        model, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id, autocast=precision.autocast
    )
    report = differences(before, measure(exported, examples, prompts, tokenizer), largest_kl)
    equal = sum(ours == theirs for ours, theirs in zip(expected, ids, strict=False))
    return {
        **report,
        "prompts": len(expected),
        "prompts_equal": equal if ids else None,
        "trained_on": "nf4" if nf4 else "16bit",
        "device": str(device_of(model)),
    }


def summary(report: dict[str, Any]) -> str:
    """For people: the figures, then each answer before and after."""
    shown = f"{report['prompts_equal']}/{report['prompts']}"
    if report["prompts_equal"] is None:
        shown = say("export.no_template")
    before, after = report["perplexity_trained"], report["perplexity_exported"]
    rows = [
        ["", say("export.figures.trained"), say("export.figures.exported")],
        [say("export.figures.perplexity"), f"{before:.4f}", f"{after:.4f}"],
        [say("export.figures.kl"), "", f"{report['mean_kl']:.2e}"],
        [say("export.figures.top1"), "", f"{report['top1_agreement']:.2%}"],
        [say("export.figures.prompts"), "", shown],
    ]
    if (equal := report["equal_choices"]) is not None:
        rows.insert(-1, [say("export.figures.equal"), "", f"{equal:.2%}"])
    samples = [f"< {sample['trained']!r}\n> {sample['exported']!r}" for sample in report["samples"]]
    return "\n".join([table(rows), *samples])
