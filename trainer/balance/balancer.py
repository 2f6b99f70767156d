"""Counts of all ranks -> rule -> biases, once per optimizer step; and what became of the experts.

Letters: M MoE layers of the model, E experts, S sums of a layer (balance/stats.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.balance.guard import Guard
from trainer.balance.losses import LossWeights
from trainer.balance.rules import QuantileRule
from trainer.balance.stats import RoutingStats, collect_required, collects_required, routing_metrics

COLLAPSED_SHARE = 0.1  # of the even share: an expert with less over the tail of a run has collapsed
TAIL_SHARE = 0.1  # of the steps: the tail


Observer = Callable[[int, RoutingStats], None]


class Balancer(nn.Module):
    """Moves the biases of all MoE layers by one rule, once per optimizer step, after the weights.

    A layer is any module with the buffers of `stats.register_routing_buffers` and an int `top_k`. `group`:
    the ranks that saw other tokens; None when this process saw them all. `rule`: None leaves the biases where
    they are. `guard` watches and may act. `observers` are shown each step's sums. `required`: count required
    biases even if the rule asks for none.

    The state dict holds what a resumed run needs besides the biases: the rule's memory, the last loads, and
    the counts of the run's tail, from which the verdict is spoken.
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
        self.required = required or getattr(rule, "needs_required", False)
        self._collect(self.required)
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
        """The run has this many steps. Counts of another tail are dropped."""
        self.steps, self.first_tail_step = steps, steps - max(1, round(TAIL_SHARE * steps)) + 1
        if self.tail_step != self.first_tail_step:
            self.tail_step.fill_(self.first_tail_step)
            self.tail_counts_ME.zero_()
            self.tail_3.zero_()

    def set(self, *, rate: float, loss_weights: LossWeights, label_share: float = 1.0) -> None:
        """What the program wants from the next step: a factor on the rule's step, and the losses; the guard
        may add to these. label_share: of the labels of the whole step, the part that masks leave; all ranks
        must give the same.
        """
        self.rate = rate
        for layer in self.layers:
            layer.loss_weights = loss_weights
            layer.label_share.fill_(label_share)
        if self.guard is not None:
            self.guard.apply_loss(self.layers)

    def load_state_dict(self, state_dict: dict[str, Tensor], *args, **kwargs):
        """A run that has another number of steps now has another tail: `end_at` drops the counts of the old
        one.
        """
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self._share_load()
        if self.guard is not None:
            self._obey(int(self.guard.last_alarm))
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
        """The second half of `step`: rule -> biases -> metrics."""
        for observe in self.observers:
            observe(step, stats)
        bias_ME = self.bias_ME
        if self.guard is not None and self.guard.wants_solve(step):
            bias_ME += QuantileRule(bias_ME.shape)(stats, bias_ME)
        elif self.rule is not None:
            bias_ME += (
                self.rule(stats, bias_ME) * self.rate * (self.guard.boost() if self.guard is not None else 1)
            )
        finite_M = bias_ME.isfinite().all(-1)
        if not finite_M.all():
            what = (
                f"step {step}: {type(self.rule).__name__} gives MoE layer {finite_M.int().argmin()} "
                "biases that are not finite"
            )
            raise FloatingPointError(f"{what}; the biases were not touched")
        for layer, bias_E in zip(self.layers, bias_ME, strict=True):
            layer.expert_bias_E.copy_(bias_E)
            layer.routing_sums_S.zero_()
        self.load_ME.copy_(stats.load_ME)
        self._share_load()
        metrics = routing_metrics(stats, bias_ME) | self._stability(stats)
        if step >= self.first_tail_step:
            self.tail_counts_ME += stats.counts_ME
            one = torch.ones_like(metrics["balance/floor"])
            self.tail_3 += torch.stack([one, metrics["balance/max_violation"], metrics["balance/floor"]])
        scalars = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
        if self.guard is not None:
            scalars |= self.guard.watch(step, stats, scalars)
            self._obey(step)
        return scalars

    def _obey(self, step: int) -> None:
        """What the guard wants from the steps after this one."""
        self.guard.apply_loss(self.layers)
        self._collect(self.required or self.guard.wants_solve(step + 1))

    def _collect(self, required: bool) -> None:
        for layer in self.layers:
            if collects_required(layer) != required:
                collect_required(layer, required)

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
            collapsed=[(m, e) for m, e in collapsed_ME.nonzero().tolist()],
            num_experts=self.tail_counts_ME.numel(),
            num_steps=int(num_steps),
            max_violation=max_violation / max(num_steps, 1),
            floor=floor / max(num_steps, 1),
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """collapsed: (MoE layer, expert) of each expert under 10 % of the even share over the last 10 % of
    steps.
    """

    collapsed: list[tuple[int, int]]
    num_experts: int
    num_steps: int  # that it is about
    max_violation: float
    floor: float

    @property
    def ok(self) -> bool:
        return not self.collapsed

    def __str__(self) -> str:
        if self.num_experts and not self.num_steps:
            return "balance: not measured, no step of the run's last tenth was applied here"
        return (
            f"balance: {'ok' if self.ok else 'FAILED'}, {len(self.collapsed)} of "
            f"{self.num_experts} experts collapsed, "
            f"MaxVio {self.max_violation:.2f} (floor {self.floor:.2f})"
        )
