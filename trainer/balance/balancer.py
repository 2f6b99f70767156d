"""Counts of all ranks -> rule -> biases, once per optimizer step; and what became of the experts.

Letters: M MoE layers of the model, E experts, S sums of a layer (balance/stats.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.balance.guard import Guard
from trainer.balance.losses import LossWeights
from trainer.balance.stats import RoutingStats, collect_required, routing_metrics

COLLAPSED_SHARE = 0.1  # of the even share: an expert with less over the tail of a run has collapsed
TAIL_SHARE = 0.1  # of the steps: the tail
# What a tail must hold to be judged (docs/balancing.md, "Collapse and the verdict").
# Tokens: a balanced expert falls under COLLAPSED_SHARE with a probability of less than CHANCE, by Chernoff's
# bound for Poisson counts. Tokens come in clusters: the variance of counts is CLUSTER times their mean.
# Steps: a tail of so many begins when the rule has had time to act.
CHANCE, CLUSTER = 1e-6, 30
LEAST_TOKENS = math.ceil(
    CLUSTER * -math.log(CHANCE) / (1 - COLLAPSED_SHARE + COLLAPSED_SHARE * math.log(COLLAPSED_SHARE))
)
LEAST_STEPS = 15

Observer = Callable[[int, RoutingStats], None]


class Experts(NamedTuple):
    """What a step made of them, on the host; float64."""

    load_ME: Tensor  # [even shares]
    bias_ME: Tensor  # [score] after the step
    gain_M: Tensor | None = None  # [1/score]; None: no margins were counted


Watcher = Callable[[int, Experts], None]


class Balancer(nn.Module):
    """Moves the biases of all MoE layers by one rule, once per optimizer step, after the weights.

    A layer is any module with the buffers of `stats.register_routing_buffers` and an int `top_k`. `group`:
    the ranks that saw other tokens; None when this process saw them all. `rule`: None leaves the biases where
    they are. `guard` watches. `observers` are shown each step's sums, `watchers` what became of the experts,
    on the host. `required`: count required biases even if the rule asks for none.

    The state dict holds what a resumed run needs besides the biases: the rule's memory, the last loads, and
    the counts of the run's tail, on which the verdict rests.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        rule: nn.Module | None,
        *,
        steps: int,
        group: dist.ProcessGroup | None = None,
        guard: Guard | None = None,
        observers: Sequence[Observer] = (),
        required: bool = False,
    ):
        super().__init__()
        self.layers = tuple(layers)  # not submodules: their state belongs to the model
        self.rule, self.group, self.guard, self.observers = rule, group, guard, tuple(observers)
        self.watchers: tuple[Watcher, ...] = ()
        for layer in self.layers if required or getattr(rule, "needs_required", False) else ():
            collect_required(layer)
        self.rate = 1.0  # on the rule's step, set by the program
        num_experts, on = (
            (layers[0].expert_bias_E.numel(), layers[0].expert_bias_E.device) if layers else (0, None)
        )
        shape_ME = (len(layers), num_experts)
        self.register_buffer("load_ME", torch.ones(shape_ME, dtype=torch.float32, device=on))
        self.register_buffer("tail_step", torch.tensor(0))  # where the counts below began
        self.register_buffer("tail_counts_ME", torch.zeros(shape_ME, dtype=torch.int64, device=on))
        # steps, sums of MaxVio and floor
        self.register_buffer("tail_3", torch.zeros(3, dtype=torch.float64, device=on))
        self.end_at(steps)

    def end_at(self, steps: int) -> None:
        """Sets the number of steps of the run. If that moves the tail, the counts of the old tail are
        dropped.
        """
        self.steps, self.first_tail_step = steps, steps - max(1, round(TAIL_SHARE * steps)) + 1
        if self.tail_step != self.first_tail_step:
            self.tail_step.fill_(self.first_tail_step)
            self.tail_counts_ME.zero_()
            self.tail_3.zero_()

    def set(self, *, rate: float, loss_weights: LossWeights, label_share: float = 1.0) -> None:
        """What the program wants from the next step: a factor on the rule's step, and the losses.

        label_share: of the labels of the whole step, the part that masks leave; all ranks give the same.
        """
        self.rate = rate
        for layer in self.layers:
            layer.loss_weights = loss_weights
            layer.label_share.fill_(label_share)

    def load_state_dict(self, state_dict: dict[str, Tensor], *args, **kwargs):
        """If the number of steps has changed, so has the tail: `end_at` drops the counts of the old one."""
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self._share_load()
        self.end_at(self.steps)
        return result

    @torch.no_grad()
    def step(self, step: int) -> dict[str, float]:
        """Sums -> all ranks -> rule -> biases. `step` counts from 1. Returns this step's metrics."""
        if not self.layers:
            return {}
        sums_MS = torch.stack([layer.routing_sums_S for layer in self.layers])
        if self.group is not None:
            dist.all_reduce(sums_MS, group=self.group)
        return self.update(step, RoutingStats.from_sums(sums_MS, self.bias_ME, top_k=self.layers[0].top_k))

    def discard(self) -> None:
        """Drops what was counted since the last step: the step was not applied."""
        for layer in self.layers:
            layer.routing_sums_S.zero_()

    @property
    def bias_ME(self) -> Tensor:
        return torch.stack([layer.expert_bias_E for layer in self.layers])

    @torch.no_grad()
    def update(self, step: int, stats: RoutingStats) -> dict[str, float]:
        """The second half of `step`: rule -> biases -> metrics. Waits once for a GPU."""
        for observe in self.observers:
            observe(step, stats)
        bias_ME = self.bias_ME
        if self.rule is not None:
            bias_ME += self.rule(stats, bias_ME) * self.rate
        metrics = routing_metrics(stats, bias_ME) | self._stability(stats)
        watched = self._watched(stats, bias_ME)
        parts = [torch.stack(list(metrics.values())), bias_ME.isfinite().all(-1).double(), stats.load_ME]
        values, is_finite_M, load_ME, *watched = on_host([*parts, *watched])  # the one wait
        if not is_finite_M.all():
            what = (
                f"step {step}: {type(self.rule).__name__} gives MoE layer {int(is_finite_M.argmin())} "
                "biases that are not finite"
            )
            raise FloatingPointError(f"{what}; the biases were not touched")
        for layer, bias_E in zip(self.layers, bias_ME, strict=True):
            layer.expert_bias_E.copy_(bias_E)
            layer.routing_sums_S.zero_()
        self.load_ME.copy_(stats.load_ME)
        self._share_load()
        if step >= self.first_tail_step:
            self.tail_counts_ME += stats.counts_ME
            one = torch.ones_like(metrics["balance/floor"])
            self.tail_3 += torch.stack([one, metrics["balance/max_violation"], metrics["balance/floor"]])
        scalars = dict(zip(metrics, values.tolist(), strict=True))
        if self.guard is not None:
            scalars |= self.guard.watch(step, load_ME, scalars)
        for watch in self.watchers:
            watch(step, Experts(load_ME, *watched))
        return scalars

    def _watched(self, stats: RoutingStats, bias_ME: Tensor) -> list[Tensor]:
        """What only watchers ask for: biases, and the gain if margins were counted."""
        if not self.watchers:
            return []
        return [bias_ME, *([stats.gain_M] if stats.margins_MW is not None else [])]

    def _share_load(self) -> None:
        for layer, load_E in zip(self.layers, self.load_ME, strict=True):
            layer.load_E.copy_(load_E)

    def _stability(self, stats: RoutingStats) -> dict[str, Tensor]:
        """Per MoE layer: the rule's step over the largest stable one."""
        if not hasattr(self.rule, "stability_M"):
            return {}
        return {f"balance/stability/{m}": s.double() for m, s in enumerate(self.rule.stability_M(stats))}

    def verdict(self) -> "Verdict":
        """What became of the experts over the tail of the run."""
        num_steps, max_violation, floor = self.tail_3.tolist()
        even_M1 = self.tail_counts_ME.double().mean(-1, keepdim=True)
        collapsed_ME = self.tail_counts_ME < COLLAPSED_SHARE * even_M1
        return Verdict(
            starved=[(m, e) for m, e in collapsed_ME.nonzero().tolist()],
            num_experts=self.tail_counts_ME.numel(),
            num_steps=int(num_steps),
            num_tokens=even_M1.min().item() if len(even_M1) else 0.0,
            max_violation=max_violation / max(num_steps, 1),
            floor=floor / max(num_steps, 1),
        )


def on_host(parts: Sequence[Tensor]) -> list[Tensor]:
    """All of them in one transfer; float64."""
    flat = torch.cat([part.flatten().double() for part in parts]).cpu()
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """starved: (MoE layer, expert) of each expert under 10 % of the even share over the last 10 % of steps.

    An expert has collapsed if it starved over a tail that is long enough to tell: LEAST_STEPS steps, in which
    an even share is LEAST_TOKENS tokens.
    """

    starved: list[tuple[int, int]]
    num_experts: int
    num_steps: int  # of the tail
    num_tokens: float  # of the tail that an expert would have with an even share
    max_violation: float
    floor: float

    @property
    def is_known(self) -> bool:
        return not self.num_experts or (self.num_steps >= LEAST_STEPS and self.num_tokens >= LEAST_TOKENS)

    @property
    def collapsed(self) -> list[tuple[int, int]]:
        return self.starved if self.is_known else []

    @property
    def ok(self) -> bool:
        return not self.collapsed

    def __str__(self) -> str:
        if not self.is_known:
            return (
                f"balance: too short to judge ({self.num_tokens:,.0f} tokens per expert in the last "
                f"{self.num_steps} steps; {LEAST_TOKENS:,} in {LEAST_STEPS} steps are needed)"
            )
        return (
            f"balance: {'ok' if self.ok else 'FAILED'}, {len(self.collapsed)} of "
            f"{self.num_experts} experts collapsed, "
            f"MaxVio {self.max_violation:.2f} (floor {self.floor:.2f})"
        )
