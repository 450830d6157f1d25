"""8-bit AdamW: against bitsandbytes, against float32 AdamW on a real objective, its bytes, and
exact resume.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_learn_loss import FP32, adapted, examples
from torch import nn

from cllm.data.packing import collate
from cllm.learn.loss import sft_loss
from cllm.learn.optim import AdamW8bit, _dynamic_map, make_optimizer, set_learning_rate, train_step
from cllm.learn.snapshot import capture, restore


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(
        _dynamic_map(torch.device("cpu"), signed), functional.create_dynamic_map(signed=signed)
    )


def test_thirty_steps_against_bitsandbytes_and_float32() -> None:
    """From bitsandbytes' own state a step equals its step to 1e-6; over thirty steps ours stays
    nearer to float32 AdamW than it does.

    (Its CPU kernel rounds moments to 65,536 even steps before it looks for the nearest code.)
    Parameters of 64 x 130 (a short last block), 4,096 and 4,095 values (float32 moments there as
    here), with weight decay.
    """
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start = [torch.randn(64, 130), torch.randn(4096), torch.randn(4095)]
    ours, theirs, exact = ([nn.Parameter(t.clone()) for t in start] for _ in range(3))
    how: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    mine, other, truth = (
        AdamW8bit(ours, **how),
        bnb.optim.AdamW8bit(theirs, **how),
        torch.optim.AdamW(exact, **how),
    )
    for _ in range(30):
        for p, q, r in zip(ours, theirs, exact, strict=True):
            p.grad = torch.randn_like(p) * torch.rand(p.shape) ** 2
            q.grad, r.grad = p.grad.clone(), p.grad.clone()
        for optimizer in (mine, other, truth):
            optimizer.step()
    for p, q, r, begin in zip(ours, theirs, exact, start, strict=True):
        length = (r - begin).norm()
        assert (p - r).norm() / length < (0.025 if p.numel() >= 4096 else 1e-6) and (
            p - r
        ).norm() <= (q - r).norm()
    for p, q in zip(ours, theirs, strict=True):
        state, reference = mine.state[p], other.state[q]
        for name, code, scale in (
            ("exp_avg", "state1", "absmax1"),
            ("exp_avg_sq", "state2", "absmax2"),
        ):
            flat = nn.functional.pad(reference[code].flatten(), (0, -p.numel() % 256))
            state[name] = flat.view(-1, 256)
            if scale in reference:
                state[f"{name}_scale"] = reference[scale][:, None].clone()
        p.data.copy_(q.data)
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    before = [p.detach().clone() for p in ours]
    mine.step()
    other.step()
    for p, q, begin in zip(ours, theirs, before, strict=True):
        assert (p - q).norm() / (q - begin).norm() < 1e-5


def test_a_moment_takes_its_nearest_code_and_never_becomes_zero() -> None:
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name in ("exp_avg", "exp_avg_sq"):
        moment = torch.randn(20, 256) * 10 ** torch.linspace(-3, 3, 20)[:, None]
        moment = moment.square() if name == "exp_avg_sq" else moment
        moment[3, :7] = 0.0
        moment[4] = 0.0
        moment[5, 0] = 1e-12
        AdamW8bit._keep(state, name, moment, exact=False)
        back = AdamW8bit._moment(state, name, moment)
        scale, table = (
            moment.abs().amax(1, keepdim=True),
            _dynamic_map(torch.device("cpu"), signed=name == "exp_avg"),
        )
        nearest = (moment[..., None] - scale[..., None] * table).abs().amin(-1)
        assert ((back - moment).abs() <= nearest + 1e-6 * scale).all()
        assert torch.equal(back[moment == 0], torch.zeros_like(back[moment == 0]))
    assert (back[moment > 0] > 0).all() and state["exp_avg_sq"].dtype == torch.uint8


def trained(name: str, steps: int) -> tuple[Any, torch.optim.Optimizer, list[float]]:
    torch.manual_seed(0)
    model = adapted()
    optimizer = make_optimizer(model, 5e-3, name=name)
    set_learning_rate(optimizer, 5e-3)
    return model, optimizer, run(model, optimizer, steps)


def run(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    row = [collate(examples(6))]
    return [
        train_step(
            model, row, sft_loss, optimizer, precision=FP32, scaler=FP32.scaler(), max_norm=1.0
        ).loss
        for _ in range(steps)
    ]


def test_it_learns_as_float32_adamw_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # the tiny model's adapters would keep float32 moments
    monkeypatch.setattr(AdamW8bit, "SMALL", 0)
    exact, ours = trained("adamw", 30)[2], trained("adamw8bit", 30)[2]
    assert exact[-1] < 0.7 * exact[0]
    assert max(abs(a - b) / b for a, b in zip(ours, exact, strict=True)) < 0.01


def test_state_bytes() -> None:
    parameter = nn.Parameter(torch.randn(64, 1024))
    parameter.grad = torch.randn_like(parameter)
    optimizer = AdamW8bit([parameter], 1e-3)
    optimizer.step()
    assert sum(t.nbytes for t in optimizer.state[parameter].values()) == 2 * 65536 + 2 * 256 * 4 + 4


@pytest.mark.parametrize("small", [0, 10**9], ids=["8bit", "float32"])
def test_resume_is_bit_exact(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdamW8bit, "SMALL", small)
    model, optimizer, _ = trained("adamw8bit", 3)
    tensors = {name: value.clone() for name, value in capture(model, optimizer).items()}
    wanted = run(model, optimizer, 3)
    other = adapted(seed=0)
    fresh = make_optimizer(other, 5e-3, name="adamw8bit")
    set_learning_rate(fresh, 5e-3)
    restore(other, fresh, tensors)
    assert run(other, fresh, 3) == wanted
