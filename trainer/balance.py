"""How do routing counts move the router's biases, and which losses push the router itself?

Letters: M MoE layers of the model, E experts, K experts per token, B sequences, L tokens per sequence.

    counts_ME      tokens sent to each expert in one optimizer step, all ranks and microbatches   [tokens]
    violation_ME   (mean - counts) / mean: +0.2 says "this expert got 20 % too few"                [1]
    bias_ME        added to the scores when the top K are chosen, never to the gates               [score]
    step_ME        what a rule adds to the biases                                                  [score]

A rule is an nn.Module from (RoutingStats, bias_ME) to step_ME; what it remembers is a buffer. It sees sums
over the whole optimizer step, so it cannot tell how the batch was split over ranks and microbatches.
Balance losses are not rules: they act in each microbatch, through the gradient (`attach_loss`).
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

COLLAPSED_SHARE = 0.1  # of the even share: an expert with less over the tail of a run has collapsed
TAIL_SHARE = 0.1  # of the steps: the tail


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Sums over one optimizer step. counts_ME is int64: exact at any batch size."""

    counts_ME: Tensor

    @property
    def mean_M1(self) -> Tensor:
        return self.counts_ME.double().mean(-1, keepdim=True)

    @property
    def violation_ME(self) -> Tensor:
        """(mean - n_i) / mean, 0 for a layer that saw no token (arXiv:2602.17004, eq. 23); float32."""
        return ((self.mean_M1 - self.counts_ME) / self.mean_M1.clamp_min(1e-9)).float()


def centered(step_ME: Tensor) -> Tensor:
    """Top-k ignores a shift common to all experts, so none may build up (arXiv:2602.17004, eq. 22, 26)."""
    return step_ME - step_ME.mean(-1, keepdim=True)


# -- rules ----------------------------------------------------------------------------------------------


class SignRule(nn.Module):
    """b += lr * sign(violation), re-centred: Trinity Nano and Mini (arXiv:2602.17004, eq. 19-22).

    lr [score]: the report's gamma.
    """

    def __init__(self, shape_ME: tuple[int, int], lr: float):
        super().__init__()
        self.lr = lr

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        return centered(self.lr * stats.violation_ME.sign())


class SmebuRule(nn.Module):
    """Soft-clamped momentum expert bias updates: Trinity Large (arXiv:2602.17004, eq. 23-28).

    lr [score]: the report's lambda; beta: momentum; kappa: steepness of the clamp.
    """

    def __init__(self, shape_ME: tuple[int, int], lr: float, beta: float, kappa: float):
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}: must lie in [0, 1), 1 would never move a bias")
        self.lr, self.beta, self.kappa = lr, beta, kappa
        self.register_buffer("momentum_ME", torch.zeros(shape_ME, dtype=torch.float32))

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        step_ME = centered(self.lr * torch.tanh(self.kappa * stats.violation_ME))  # eq. 24-26
        self.momentum_ME.lerp_(step_ME, 1 - self.beta)  # eq. 27
        return self.momentum_ME.clone()  # eq. 28


# -- the balancer ---------------------------------------------------------------------------------------


class Balancer(nn.Module):
    """Moves the biases of all MoE layers by one rule, once per optimizer step, after the weights.

    A layer is any module with the buffers `tokens_per_expert_E` (int64, this rank's tokens since the last
    step) and `expert_bias_E` (float32), and an int `top_k`. `group`: the ranks that saw other tokens; None
    when this process saw them all. `rule`: None leaves the biases where they are.

    The state dict holds what a resumed run needs besides the biases: the rule's memory and the counts of
    the run's tail, from which the verdict is spoken.
    """

    def __init__(
        self, layers: list[nn.Module], rule: nn.Module | None, *, steps: int, group: dist.ProcessGroup | None = None
    ):
        super().__init__()
        self.layers = tuple(layers)  # not submodules: their state belongs to the model
        self.rule, self.group = rule, group
        self.first_tail_step = steps - max(1, round(TAIL_SHARE * steps)) + 1
        num_experts = layers[0].expert_bias_E.numel() if layers else 0
        device = layers[0].expert_bias_E.device if layers else None
        self.register_buffer("tail_step", torch.tensor(self.first_tail_step))  # where the counts below began
        self.register_buffer("tail_counts_ME", torch.zeros(len(layers), num_experts, dtype=torch.int64, device=device))
        self.register_buffer("tail_3", torch.zeros(3, dtype=torch.float64, device=device))  # steps, sums of MaxVio and floor

    def load_state_dict(self, state_dict: dict[str, Tensor], *args, **kwargs):
        """A run that is given more steps has another tail: counts of the old one are dropped."""
        result = super().load_state_dict(state_dict, *args, **kwargs)
        if self.tail_step != self.first_tail_step:
            self.tail_step.fill_(self.first_tail_step)
            self.tail_counts_ME.zero_()
            self.tail_3.zero_()
        return result

    @torch.no_grad()
    def step(self, step: int) -> dict[str, float]:
        """Counts -> all ranks -> rule -> biases. `step` counts from 1. Returns this step's metrics."""
        if not self.layers:
            return {}
        counts_ME = torch.stack([layer.tokens_per_expert_E for layer in self.layers])
        bias_ME = torch.stack([layer.expert_bias_E for layer in self.layers])
        if self.group is not None:
            dist.all_reduce(counts_ME, group=self.group)
        stats = RoutingStats(counts_ME)
        if self.rule is not None:
            bias_ME += self.rule(stats, bias_ME)
        for layer, bias_E in zip(self.layers, bias_ME, strict=True):
            layer.expert_bias_E.copy_(bias_E)
            layer.tokens_per_expert_E.zero_()
        metrics = routing_metrics(stats, bias_ME, top_k=self.layers[0].top_k)
        if step >= self.first_tail_step:
            self.tail_counts_ME += counts_ME
            one = torch.ones_like(metrics["balance/floor"])
            self.tail_3 += torch.stack([one, metrics["balance/max_violation"], metrics["balance/floor"]])
        return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))

    def verdict(self) -> "Verdict":
        """What became of the experts over the tail of the run."""
        num_steps, max_violation, floor = self.tail_3.tolist()
        even_M1 = self.tail_counts_ME.double().mean(-1, keepdim=True)
        collapsed_ME = self.tail_counts_ME < COLLAPSED_SHARE * even_M1
        return Verdict(
            collapsed=[(m, e) for m, e in collapsed_ME.nonzero().tolist()],
            num_experts=self.tail_counts_ME.numel(),
            max_violation=max_violation / max(num_steps, 1),
            floor=floor / max(num_steps, 1),
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """collapsed: (MoE layer, expert) of each expert under 10 % of the even share over the last 10 % of steps."""

    collapsed: list[tuple[int, int]]
    num_experts: int
    max_violation: float
    floor: float

    @property
    def ok(self) -> bool:
        return not self.collapsed

    def __str__(self) -> str:
        return (
            f"balance: {'ok' if self.ok else 'FAILED'}, {len(self.collapsed)} of {self.num_experts} experts collapsed, "
            f"MaxVio {self.max_violation:.2f} (floor {self.floor:.2f})"
        )


def routing_metrics(stats: RoutingStats, bias_ME: Tensor, *, top_k: int) -> dict[str, Tensor]:
    """Scalars (float64) of one step; every violation and load is relative to the even share.

    floor: MaxVio that independent tokens would show by chance alone, sqrt(2 ln E (1 - K/E) / mean count);
    figures from different batch sizes are comparable only above it.
    """
    num_experts = bias_ME.shape[-1]
    load_ME = stats.counts_ME / stats.mean_M1.clamp_min(1e-9)
    share_ME = load_ME / num_experts
    excess_M = load_ME.amax(-1) - 1  # MaxVio (arXiv:2602.17004, eq. 42)
    floor_M1 = (2 * math.log(num_experts) * (1 - top_k / num_experts) / stats.mean_M1.clamp_min(1e-9)).sqrt()
    entropy_M = torch.special.entr(share_ME).sum(-1) / max(math.log(num_experts), 1e-9)
    return {
        "balance/max_violation": excess_M.mean(),
        "balance/max_violation_worst_layer": excess_M.amax(),
        "balance/floor": floor_M1.mean(),
        "balance/min_load": load_ME.amin(),
        "balance/dead_experts": (stats.counts_ME == 0).sum().double(),
        "balance/entropy": entropy_M.mean(),
        "balance/bias_rms": bias_ME.double().square().mean().sqrt(),
    }


# -- losses on the router -------------------------------------------------------------------------------


def sequence_balance_loss(scores_BLE: Tensor, ids_BLK: Tensor, valid_BL: Tensor | None = None) -> Tensor:
    """sum_i f_i P_i of each sequence, times its tokens, summed over sequences (arXiv:2602.17004, eq. 29-32).

    1.0 per token when every expert gets the same share; the report's alpha is the caller's weight.
    scores_BLE: sigmoid scores without bias. valid_BL: False for padding, which is left out; None: no padding.
    """
    num_experts, top_k = scores_BLE.shape[-1], ids_BLK.shape[-1]
    share_BLE = scores_BLE / scores_BLE.sum(-1, keepdim=True)
    valid_BL = torch.ones_like(ids_BLK[..., 0], dtype=torch.bool) if valid_BL is None else valid_BL
    weight_BLK = valid_BL.unsqueeze(-1).expand_as(ids_BLK).to(scores_BLE.dtype)
    chosen_BE = scores_BLE.new_zeros(len(scores_BLE), num_experts).scatter_add_(1, ids_BLK.flatten(1), weight_BLK.flatten(1))
    num_tokens_B1 = valid_BL.sum(1, keepdim=True).clamp_min(1)
    f_BE = chosen_BE * num_experts / (top_k * num_tokens_B1)  # eq. 30
    P_sum_BE = (share_BLE * valid_BL.unsqueeze(-1)).sum(1)  # eq. 31-32 times the tokens
    return (f_BE * P_sum_BE).sum()


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like_loss = loss.new_ones(())
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x: Tensor) -> tuple[Tensor, Tensor]:
        return grad_x, ctx.like_loss


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Returns x unchanged; the backward pass through it also minimizes the scalar `loss`."""
    return _AttachLoss.apply(x, loss)


class _CountInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts_E: Tensor, into_E: Tensor) -> Tensor:
        ctx.counts_E, ctx.into_E = counts_E, into_E
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x: Tensor) -> tuple[Tensor, None, None]:
        ctx.into_E.add_(ctx.counts_E)
        return grad_x, None, None


def count_in_backward(x: Tensor, counts_E: Tensor, into_E: Tensor) -> Tensor:
    """Returns x unchanged; the backward pass through it adds counts_E to into_E.

    A backward pass runs each node once however often activation checkpointing repeats the forward, and an
    evaluation has none: tokens are counted exactly when they train.
    """
    return _CountInBackward.apply(x, counts_E, into_E)
