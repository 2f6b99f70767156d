"""Which parameter gets which optimizer, at which peak rate?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from trainer.optim.momentum import MAX_RATE, Muon
from trainer.ranks.local import local, trained


class Optimizers:
    """Several torch optimizers as one. The rates that they come with are their peak rates."""

    def __init__(self, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]):
        self.optimizers = (
            (optimizers,) if isinstance(optimizers, torch.optim.Optimizer) else tuple(optimizers)
        )
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        # fused optimizers do not say that they have changed a weight, nor do those that write to `.data`
        increment_version([p for group in self.param_groups for p in group["params"]])

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def set_learning_rate(self, factor: float) -> dict[str, float]:
        """Every group gets factor times its peak rate. Returns the rates by name: lr of the first optimizer,
        lr_<name> of each further one."""
        rates = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
            first = optimizer.param_groups[0]
            rates[f"lr_{type(optimizer).__name__.lower()}" if rates else "lr"] = first["lr"]
        return rates


class AdamW(torch.optim.AdamW):
    """torch's, on what each rank holds of a parameter: it works element by element, and DTensor would derive
    where every operand of one operator over all parameters lies.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return has_complex


def adamw(
    model: nn.Module, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW on every parameter; weight decay on matrices only, never on norm gains.

    lr: peak rate, reached where the program's factor is 1.
    """
    return _adamw(trained(model), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def muon(
    model: nn.Module,
    *,
    lr: float,
    adamw_lr: float,
    momentum: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    dtype: str | None = None,
    router: str = "muon",
) -> Sequence[torch.optim.Optimizer]:
    """Muon on hidden matrices, experts and their router included; AdamW on embedding, output head and norm
    gains.

    lr, adamw_lr: peak rates. dtype: of the orthogonalisation; null: bfloat16 on a GPU, float32 on a CPU.
    router: muon | adamw.
    """
    if router not in ("muon", "adamw"):
        raise ValueError(f"optim.router={router}: must be muon or adamw")
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"optim.dtype={dtype}: must be float32, bfloat16 or null")
    from trainer.model.afmoe import Head  # these import torchtitan, which nobody needs who only asks for keys
    from trainer.model.router import Gate

    by_adamw = (nn.Embedding, Head) if router == "muon" else (nn.Embedding, Head, Gate)
    owners = {
        p: module for module in model.modules() for p in module.parameters(recurse=False) if p.requires_grad
    }
    hidden = [p for p, module in owners.items() if p.ndim >= 2 and not isinstance(module, by_adamw)]
    others = [p for p in owners if p not in set(hidden)]
    rates = {"lr": adamw_lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    optimizers: list[torch.optim.Optimizer] = [_adamw(others, **rates)] if others else []
    if hidden:
        on_cpu = hidden[0].device.type == "cpu"
        in_dtype = getattr(torch, dtype or ("float32" if on_cpu else "bfloat16"))
        optimizers.insert(
            0, Muon(hidden, lr=lr, momentum=momentum, weight_decay=weight_decay, dtype=in_dtype)
        )
    return optimizers


def _adamw(
    parameters: list[Tensor], *, lr: float, betas: Sequence[float], eps: float, weight_decay: float
) -> AdamW:
    sound = 0 <= lr <= MAX_RATE and 1e-30 <= eps <= 1 and 0 <= weight_decay <= MAX_RATE
    if not sound or len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(
            f"optim: lr={lr} and weight_decay={weight_decay} must be 0 or more and at most {MAX_RATE:g}, "
            f"eps={eps} at least 1e-30 and at most 1, betas={list(betas)} two numbers in [0, 1)"
        )
    matrices = [p for p in parameters if p.ndim >= 2]
    gains = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=tuple(betas), eps=eps, fused=True
    )
