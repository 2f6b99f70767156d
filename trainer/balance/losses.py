"""Which losses push the router itself, and how do they and the counts travel with the backward pass?

Letters: B sequences, L tokens each, E experts, K experts per token. All losses are sums over tokens that are
1.0 per token when every expert gets the same share (the z-loss: in squared logits); the caller's weight is
the literature's alpha. f_i is the load of expert i, 1 = even share; P_i the mean of its normalised score.

    sequence   sum_i f_i P_i over each sequence           arXiv:2602.17004, eq. 29-32; arXiv:2412.19437
    switch     the same over the microbatch of a rank      arXiv:2101.03961, eq. 4-6
    batch      f of the last optimizer step, all ranks     arXiv:2501.11873, where f is of this step so far
    z          (logsumexp of the logits)^2                 arXiv:2202.08906, eq. 5
"""

from collections.abc import Callable
from dataclasses import make_dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Total = Callable[[Tensor], Tensor]


def as_they_are(sums: Tensor) -> Tensor:
    return sums


def sequence_balance_loss(
    scores_BLE: Tensor, ids_BLK: Tensor, valid_BL: Tensor | None = None, total: Total = as_they_are
) -> Tensor:
    """sum_i f_i P_i of each sequence, times its tokens, summed over sequences (arXiv:2602.17004, eq. 29-32).

    1.0 per token when every expert gets the same share; the report's alpha is the caller's weight.
    scores_BLE: sigmoid scores without bias. valid_BL: False for padding, which is left out; None: no padding.
    total: sums counts over whoever has other tokens of the same sequences. The loss is that of the tokens
    here; f_i has no gradient, so nothing else need be known of the others.
    """
    num_experts = scores_BLE.shape[-1]
    share_BLE = normalized(scores_BLE)
    valid_BL = torch.ones_like(ids_BLK[..., 0], dtype=torch.bool) if valid_BL is None else valid_BL
    weight_BLK = valid_BL.unsqueeze(-1).expand_as(ids_BLK).to(scores_BLE.dtype)
    chosen_BE = scores_BLE.new_zeros(len(scores_BLE), num_experts).scatter_add_(
        1, ids_BLK.flatten(1), weight_BLK.flatten(1)
    )
    chosen_BE = total(chosen_BE)
    f_BE = chosen_BE * num_experts / chosen_BE.sum(1, keepdim=True).clamp_min(1)  # eq. 30
    P_sum_BE = (share_BLE * valid_BL.unsqueeze(-1)).sum(1)  # eq. 31-32 times the tokens
    return (f_BE * P_sum_BE).sum()


def normalized(scores_BLE: Tensor) -> Tensor:
    """Each token's scores over their sum. The limit is the router's: all scores may underflow, and 1 / tiny
    overflow.
    """
    return scores_BLE / scores_BLE.sum(-1, keepdim=True).clamp_min(1e-20)


def switch_balance_loss(
    scores_BLE: Tensor, ids_BLK: Tensor, valid_BL: Tensor | None = None, total: Total = as_they_are
) -> Tensor:
    """E sum_i f_i P_i of the whole microbatch, times its tokens; it sees the microbatch of one rank, or of
    those that share its rows, by definition.
    """
    valid_BL = None if valid_BL is None else valid_BL.reshape(1, -1)
    scores_BLE, ids_BLK = scores_BLE.flatten(0, 1)[None], ids_BLK.flatten(0, 1)[None]
    return sequence_balance_loss(scores_BLE, ids_BLK, valid_BL, total)


def batch_balance_loss(scores_BLE: Tensor, load_E: Tensor, valid_BL: Tensor | None = None) -> Tensor:
    """sum_i f_i P_i with f of the last optimizer step over all ranks, times the tokens.

    f carries no gradient, so a step late it needs no communication here, and cannot tell how the batch is
    split.
    """
    # the shares sum to 1; so written, even loads give no gradient at all
    loss_BL = 1 + normalized(scores_BLE) @ (load_E - 1)
    return (loss_BL if valid_BL is None else loss_BL * valid_BL).sum()


def router_z_loss(logits_BLE: Tensor, valid_BL: Tensor | None = None) -> Tensor:
    """logsumexp over experts, squared, summed over tokens."""
    loss_BL = logits_BLE.logsumexp(-1).square()
    return (loss_BL if valid_BL is None else loss_BL * valid_BL).sum()


class Routed(NamedTuple):
    """A microbatch as its router saw it. load_E: of the last optimizer step. total: as of
    sequence_balance_loss.
    """

    scores_BLE: Tensor
    logits_BLE: Tensor
    ids_BLK: Tensor
    load_E: Tensor
    valid_BL: Tensor | None
    total: Total


# A further loss is a line here, and a field with its name, like entropy_loss_weight, in RouterLossWeights
# (trainer/config/schema.py).
LOSSES: dict[str, Callable[[Routed], Tensor]] = {
    "sequence": lambda r: sequence_balance_loss(r.scores_BLE, r.ids_BLK, r.valid_BL, r.total),
    "switch": lambda r: switch_balance_loss(r.scores_BLE, r.ids_BLK, r.valid_BL, r.total),
    "batch": lambda r: batch_balance_loss(r.scores_BLE, r.load_E, r.valid_BL),
    "z": lambda r: router_z_loss(r.logits_BLE, r.valid_BL),
}
_Weights = make_dataclass("_Weights", [(name, float, 0.0) for name in LOSSES], frozen=True, kw_only=True)


class LossWeights(_Weights):
    """The weight of each loss by its name in LOSSES; 0: it is off."""


NO_LOSSES = LossWeights()


def router_loss(
    weights: LossWeights,
    scores_BLE: Tensor,
    logits_BLE: Tensor,
    ids_BLK: Tensor,
    load_E: Tensor,
    valid_BL: Tensor | None,
    total: Total = as_they_are,
) -> Tensor | None:
    """The weighted sum; None if all weights are 0. load_E: of the last optimizer step."""
    routed = Routed(scores_BLE, logits_BLE, ids_BLK, load_E, valid_BL, total)
    terms = [weight * LOSSES[name](routed) for name, weight in vars(weights).items() if weight]
    return sum(terms[1:], terms[0]) if terms else None


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.grad_loss = loss.new_ones(()) * scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_x, ctx.grad_loss, None


def attach_loss(x: Tensor, loss: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Returns x unchanged; the backward pass through it also minimizes the scalar `scale * loss`."""
    return _AttachLoss.apply(x, loss, scale)


class _CountInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sums_S: Tensor, into_S: Tensor) -> Tensor:
        ctx.sums_S, ctx.into_S = sums_S, into_S
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x: Tensor) -> tuple[Tensor, None, None]:
        ctx.into_S.add_(ctx.sums_S)
        return grad_x, None, None


def count_in_backward(x: Tensor, sums_S: Tensor, into_S: Tensor) -> Tensor:
    """Returns x unchanged; the backward pass through it adds sums_S to into_S.

    A backward pass runs each node once however often activation checkpointing repeats the forward, and an
    evaluation has none: tokens are counted exactly when they train.
    """
    return _CountInBackward.apply(x, sums_S, into_S)
