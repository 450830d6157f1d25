"""TRL's own losses: values and gradients, for tests/test_learn_preference.py.

    pip install --no-deps trl==1.16.0 && pip install datasets accelerate
    python bench/preference_parity.py [--out tests/golden/preference_trl.json]

First on a tiny seeded batch of per-token log-probabilities, so that the gradient is theirs by each
of them; then on a tiny Qwen2, whose gradients by parameter are printed beside those of cllm's own
two-pass step on packed rows. A trainer is never built, which would want a tokenizer and data sets:
its own methods run on an instance that holds the settings they read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.utils import add_fused_lm_head

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_learn_preference import our_step, seeded, tiny_policy, token_pairs  # noqa: E402

from cllm.config import PreferenceConfig  # noqa: E402
from cllm.data.encode import IGNORE_INDEX  # noqa: E402

PAIRS, PROMPT, ANSWER = 5, 3, 9
DPO = {"dpo": "sigmoid", "ipo": "ipo", "robust": "robust", "hinge": "hinge"}


def trainer_of(kind: type, **settings: Any) -> Any:
    """A trainer without its constructor."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        gather_for_metrics=lambda x: x,
        gather=lambda x: x,
        autocast=nullcontext,
    )
    made = object.__new__(kind)
    vars(made).update(
        accelerator=accelerator,
        model=torch.nn.Module(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ref_model=None,
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        padding_value=0,
        pad_token_id=0,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(made).update(settings)
    return made


def dpo_trainer(name: str, beta: float, label_smoothing: float, sft: float, **more: Any) -> Any:
    return trainer_of(
        DPOTrainer,
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type="reverse_kl",
        loss_types=[DPO[name], "sft"],
        loss_weights=[1.0, sft],
        use_weighting=False,
        **more,
    )


def kto_trainer(name: str, beta: float) -> Any:
    return trainer_of(
        KTOTrainer,
        beta=beta,
        loss_type=name,
        calculate_KL=False,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )


def simpo_trainer(beta: float, gamma: float, sft: float) -> Any:
    return trainer_of(
        CPOTrainer,
        beta=beta,
        loss_type="simpo",
        alpha=0.0,
        label_smoothing=0.0,
        simpo_gamma=gamma,
        cpo_alpha=sft,
    )


def outputs(log_probs: Tensor) -> Any:
    zero = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zero, mean_logits=zero, is_top1=zero.bool())


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """(2 PAIRS, PROMPT + ANSWER) log-probabilities and masks, first the chosen answers; lengths
    from 1 token to ANSWER.
    """
    generator = torch.Generator().manual_seed(18)
    shape = (2 * PAIRS, PROMPT + ANSWER)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, length in enumerate([9, 4, 1, 7, 5, 3, 9, 6, 2, 5]):
        mask[row, PROMPT : PROMPT + length] = 1
    log_probs = -(torch.rand(shape, generator=generator, dtype=torch.float64) * 4 + 0.01)
    reference = -(torch.rand(shape, generator=generator, dtype=torch.float64) * 4 + 0.01)
    return {
        "mask": mask,
        "log_probs": (log_probs * mask)[:, 1:].to(dtype),
        "reference": (reference * mask)[:, 1:].to(dtype),
    }


def theirs(name: str, settings: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    """Loss (a mean over the pairs; of KTO over the votes) and its gradient by each token."""
    tensors = batch(dtype)
    log_probs = tensors["log_probs"].requires_grad_()
    reference, mask = tensors["reference"].sum(1), tensors["mask"]
    counts = mask.sum(1)
    ids, ld_alpha = torch.zeros_like(mask), settings.pop("ld_alpha", None)
    if name in DPO:
        if ld_alpha is not None:
            shared = torch.minimum(*counts.chunk(2)).repeat(2)[:, None]
            weights = torch.where(mask[:, 1:].cumsum(1) <= shared, 1.0, ld_alpha).to(dtype)
            reference = (tensors["reference"] * weights).sum(1)
        trainer = dpo_trainer(
            name, **{"label_smoothing": 0.0, "sft": 0.0, "ld_alpha": ld_alpha, **settings}
        )
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": mask,
            "ref_chosen_logps": reference[:PAIRS],
            "ref_rejected_logps": reference[PAIRS:],
        }
        loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs(log_probs), inputs, False)
    elif name == "apo_zero_unpaired":
        trainer = kto_trainer(name, **settings)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": mask,
            "label": torch.tensor([True] * PAIRS + [False] * PAIRS),
            "ref_logps": reference,
        }
        loss = KTOTrainer._compute_loss(trainer, lambda **_: outputs(log_probs), inputs, False)
    else:
        means = log_probs.sum(1) / counts
        if name == "orpo":
            losses, *_ = ORPOTrainer.odds_ratio_loss(
                trainer_of(ORPOTrainer, **settings), means[:PAIRS], means[PAIRS:]
            )
            loss = -losses.mean()
        else:
            trainer = simpo_trainer(sft=0.0, **settings)
            loss = CPOTrainer.cpo_loss(trainer, means[:PAIRS], means[PAIRS:])[0].mean()
    loss.backward()
    return {"loss": loss.item(), "gradient": log_probs.grad.tolist()}


def padded(prompt: int) -> dict[str, Tensor]:
    """`token_pairs` as TRL's collators lay them: the chosen answers, then the rejected ones."""
    pairs = token_pairs(prompt)
    pairs = pairs[::2] + pairs[1::2]
    longest = max(len(pair.input_ids) for pair in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, pair in enumerate(pairs):
        length = len(pair.input_ids)
        ids[row, :length] = torch.tensor(pair.input_ids)
        attention[row, :length] = 1
        completion[row, prompt:length] = 1
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


def on_model(
    settings: PreferenceConfig, prompt: int, dtype: torch.dtype, *, lora: bool
) -> tuple[float, dict[str, Tensor]]:
    """TRL's loss and its gradient by parameter: the reference is the model of `seeded` 0, the
    policy that of `seeded` 2; attention is PyTorch's on padded rows.
    """
    model = tiny_policy(dtype, lora=lora)
    model.config._attn_implementation = "sdpa"
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    inputs = padded(prompt)
    if settings.loss in DPO:
        trainer = dpo_trainer(
            settings.loss,
            settings.beta,
            settings.label_smoothing,
            settings.sft,
            ld_alpha=settings.ld_alpha,
        )
        trainer.model = model
        chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
        inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        seeded(model, 2)
        loss = trainer._compute_loss(model, inputs, False)
    elif settings.loss == "apo_zero_unpaired":
        trainer = kto_trainer(settings.loss, settings.beta)
        trainer.model = model
        half = len(inputs["input_ids"]) // 2
        inputs |= {"label": torch.tensor([True] * half + [False] * half)}
        inputs |= {"ref_logps": trainer.compute_ref_log_probs(model, inputs)[0]}
        seeded(model, 2)
        # a mean over votes, of which a pair has two
        loss = 2 * trainer._compute_loss(model, inputs, False)
    else:
        seeded(model, 2)
        if settings.loss == "orpo":
            trainer = trainer_of(ORPOTrainer, beta=settings.beta)
        else:
            trainer = simpo_trainer(settings.beta, settings.gamma, settings.sft)
        ids = inputs["input_ids"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
        named = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "labels": labels}
        halves = {
            f"{side}_{name}": half
            for name, values in named.items()
            for side, half in zip(("chosen", "rejected"), values.chunk(2), strict=True)
        }
        loss, _ = trainer.get_batch_loss_metrics(model, halves)
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), trained


def beside(settings: PreferenceConfig, prompt: int, *, lora: bool) -> dict[str, Any]:
    """Their float64 step; prints what ours in float64 and in float32 are away from it: the loss,
    and the parameter whose gradient is furthest from theirs, each relative to its own.
    """
    value, theirs = on_model(settings, prompt, torch.float64, lora=lora)
    told = [f"{settings.loss:18}{'lora' if lora else 'all':5}"]
    for dtype in (torch.float64, torch.float32):
        loss, flat = our_step(settings, prompt, dtype, lora=lora)
        parts = flat.double().split([gradient.numel() for gradient in theirs.values()])
        away = {
            name: float((part - gradient.flatten()).norm() / gradient.norm())
            for (name, gradient), part in zip(theirs.items(), parts, strict=True)
            # a softmax over keys does not see their bias: its gradient is noise
            if not name.endswith("k_proj.bias")
        }
        worst = max(away, key=away.__getitem__)
        told.append(f"{dtype}: loss {abs(loss / value - 1):.1e}, {worst} {away[worst]:.1e}")
    print("  ".join(told))
    gradient = torch.cat([part.flatten() for part in theirs.values()])
    return {"loss": value, "gradient": [float(f"{number:.8g}") for number in gradient.tolist()]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "tests/golden/preference_trl.json")
    options = parser.parse_args()
    tensors = batch(torch.float64)
    cases = [
        ("dpo", {"beta": 0.1}),
        ("dpo", {"beta": 0.7}),
        ("dpo", {"beta": 0.3, "ld_alpha": 0.4}),
        ("ipo", {"beta": 0.1}),
        ("robust", {"beta": 0.2, "label_smoothing": 0.1}),
        ("hinge", {"beta": 0.1}),
        ("orpo", {"beta": 0.1}),
        ("simpo", {"beta": 2.0, "gamma": 1.0}),
        ("apo_zero_unpaired", {"beta": 0.3}),
    ]
    # ORPO's token mean is over prompt and answer: equal where the prompt's one token is no target
    steps = [
        (3, {"loss": "dpo", "beta": 0.1}),
        (3, {"loss": "dpo", "beta": 0.3, "ld_alpha": 0.4, "sft": 0.5}),
        (3, {"loss": "ipo", "beta": 0.1}),
        (3, {"loss": "robust", "beta": 0.2, "label_smoothing": 0.1}),
        (3, {"loss": "hinge", "beta": 0.1}),
        (1, {"loss": "orpo", "beta": 0.1, "sft": 1.0}),
        (3, {"loss": "simpo", "beta": 2.0, "gamma": 1.0, "sft": 0.5}),
        (3, {"loss": "apo_zero_unpaired", "beta": 0.3}),
    ]
    on_models = []
    for prompt, values in steps:
        settings = PreferenceConfig(**values)
        beside(settings, prompt, lora=False)
        on_models.append(
            {"settings": values, "prompt": prompt, **beside(settings, prompt, lora=True)}
        )
    document = {
        "trl": trl.__version__,
        "mask": tensors["mask"][:, 1:].tolist(),
        "log_probs": tensors["log_probs"].tolist(),
        "reference": tensors["reference"].tolist(),
        "cases": [
            {
                "loss": name,
                "settings": settings,
                "float64": theirs(name, dict(settings), torch.float64),
                "float32": theirs(name, dict(settings), torch.float32),
            }
            for name, settings in cases
        ],
        "on_model": on_models,
    }
    options.out.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
