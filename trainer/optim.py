"""Which parameter gets which optimizer, at which rate, when?

An optimizer factory is a function of the model (`configs/optim/*.yaml` names it by `_target_`) that returns
something with torch.optim.Optimizer's interface; that is Muon's seam. A schedule is a function of
(step, steps) that scales every group's peak rate; it has no state, so a resumed run needs none.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

Schedule = Callable[[int, int], float]


def adamw(model: nn.Module, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW on every parameter; weight decay on matrices only, never on norm gains.

    lr: peak rate, reached where the schedule is 1.
    """
    if lr < 0 or eps <= 0 or weight_decay < 0 or len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(
            f"optim: lr={lr} and weight_decay={weight_decay} must be 0 or more, eps={eps} above 0, "
            f"betas={list(betas)} two numbers in [0, 1)"
        )
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    for group in groups:
        group["peak_lr"] = lr
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Every group gets factor times its peak rate. Returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    return optimizer.param_groups[0]["lr"]


def warmup_stable_decay(step: int, steps: int, *, warmup: int, decay: float, final: float) -> float:
    """Factor on the peak rate at `step` (from 1 to `steps`): linear up over `warmup` steps, flat, linear down to
    `final` over the last `decay` share of the steps. The shorter of the two ramps wins where they overlap."""
    _check(warmup=warmup, final=final)
    if not 0 <= decay <= 1:
        raise ValueError(f"schedule.decay={decay}: a share of the steps, between 0 and 1")
    up = min(1.0, step / warmup) if warmup else 1.0
    decay_steps = decay * steps
    down = min(1.0, (steps - step + 1) / decay_steps) if decay_steps else 1.0
    return min(up, final + (1 - final) * down)


def warmup_cosine(step: int, steps: int, *, warmup: int, final: float) -> float:
    """Factor on the peak rate at `step`: linear up over `warmup` steps, then half a cosine down to `final` at `steps`."""
    _check(warmup=warmup, final=final)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def _check(*, warmup: int, final: float) -> None:
    if warmup < 0:
        raise ValueError(f"schedule.warmup={warmup}: [steps], 0 or more")
    if not 0 <= final <= 1:
        raise ValueError(f"schedule.final={final}: a share of the peak rate, between 0 and 1")
