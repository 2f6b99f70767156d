"""What is a step of Muon?"""

import math
from collections import defaultdict
from functools import cached_property

import torch
from torch import Tensor

from trainer.optim.plan import Item, Plan, Spread
from trainer.ranks.local import local

MAX_RATE = 1e6  # of learning and of weight decay: from there on float32 soon ends


def width_factor(rows: int, columns: int) -> float:
    """On the learning rate of a matrix: sqrt(max(1, fan_out / fan_in)) (arXiv:2602.17004, eq. 41)."""
    return math.sqrt(max(1.0, rows / columns))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised matrix by matrix (K. Jordan, "Muon", 2024; arXiv:2602.17004, section 2.5):

        M = momentum M + G;  W = (1 - lr weight_decay) W - lr width_factor orthogonalize(G + momentum M)

    The last two dims of a parameter are a matrix, all dims before them a batch. Each matrix is orthogonalised
    once: by one of the R x S ranks that hold it. What FSDP cut inside a matrix goes to that rank and comes
    back; experts that are whole on a rank never leave their replica, and replicas tell each other their
    results (trainer/optim/plan.py).

    dtype: of the orthogonalisation, and of what ranks send each other. Groups may differ in lr, momentum,
    weight_decay.
    """

    def __init__(
        self,
        params,
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            rates = (group["lr"], group["weight_decay"])
            if not all(0 <= rate <= MAX_RATE for rate in rates) or not 0 <= group["momentum"] < 1:
                raise ValueError(
                    f"optim: lr={group['lr']} and weight_decay={group['weight_decay']} must be 0 or more and "
                    f"at most {MAX_RATE:g}, momentum={group['momentum']} in [0, 1)"
                )
            if flat := [tuple(p.shape) for p in group["params"] if p.ndim < 2]:
                raise ValueError(f"Muon takes matrices, this is none: shape {flat[0]}; give it to AdamW")
        self.dtype = dtype

    @cached_property
    def plans(self) -> list["Plan"]:
        """One for each way in which parameters lie on the ranks."""
        alike = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                alike[Spread.of(p)].append(p)
        return [Plan(spread, parameters, dtype=self.dtype) for spread, parameters in alike.items()]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on every rank: collective. Raises: RuntimeError if a parameter has no gradient."""
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        for p, group in group_of.items():
            if p.grad is None:
                raise RuntimeError(
                    f"Muon: a parameter of shape {tuple(p.shape)} has no gradient; all ranks need one for it"
                )
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            local(self.state[p]["momentum_buffer"]).mul_(group["momentum"]).add_(local(p.grad))
            local(p).mul_(1 - group["lr"] * group["weight_decay"])

        def direction(item: Item) -> Tensor:
            """This rank's piece of what is to be orthogonalised."""
            p = item.parameter
            piece = item.of(local(p.grad))
            past = item.of(local(self.state[p]["momentum_buffer"]))
            return piece.add(past, alpha=group_of[p]["momentum"]).to(self.dtype)

        def apply(item: Item, update: Tensor) -> None:
            rate = group_of[item.parameter]["lr"] * width_factor(*item.shape)
            item.of(local(item.parameter)).add_(update, alpha=-rate)

        for plan in self.plans:
            plan.run(direction, apply)
