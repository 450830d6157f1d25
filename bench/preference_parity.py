"""TRL's own losses on a tiny seeded batch: values and gradients, for
tests/test_learn_preference.py.

    pip install --no-deps trl==1.16.0 && pip install datasets
    python bench/preference_parity.py [--out tests/golden/preference_trl.json]

No trainer is built: its methods run on a stand-in that holds the settings they read, on per-token
log-probabilities instead of a model's, so that the gradient is theirs by each of them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
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

ROOT = Path(__file__).parents[1]
PAIRS, PROMPT, ANSWER = 5, 3, 9
DPO = {"dpo": "sigmoid", "ipo": "ipo", "robust": "robust", "hinge": "hinge"}


def stand_in(**settings: Any) -> Any:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
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
        trainer = stand_in(
            ld_alpha=ld_alpha,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[DPO[name]],
            loss_weights=[1.0],
            use_weighting=False,
            **{"label_smoothing": 0.0, **settings},
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
        trainer = stand_in(
            loss_type=name,
            calculate_KL=False,
            precompute_ref_logps=True,
            desirable_weight=1.0,
            undesirable_weight=1.0,
            **settings,
        )
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": mask,
            "label": torch.tensor([True] * PAIRS + [False] * PAIRS),
            "ref_logps": reference,
        }
        trainer._compute_kl_logps = lambda *_: None
        loss = KTOTrainer._compute_loss(trainer, lambda **_: outputs(log_probs), inputs, False)
    else:
        means = log_probs.sum(1) / counts
        if name == "orpo":
            losses, *_ = ORPOTrainer.odds_ratio_loss(
                stand_in(**settings), means[:PAIRS], means[PAIRS:]
            )
            loss = -losses.mean()
        else:
            gamma = settings.pop("gamma")
            trainer = stand_in(
                loss_type=name, alpha=0.0, label_smoothing=0.0, simpo_gamma=gamma, **settings
            )
            loss = CPOTrainer.cpo_loss(trainer, means[:PAIRS], means[PAIRS:])[0].mean()
    loss.backward()
    return {"loss": loss.item(), "gradient": log_probs.grad.tolist()}


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
    }
    options.out.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
