"""Is an expert about to be lost? The guard watches every step's routing, raises an alarm before the collapse,
and may act.

Letters: M MoE layers, E experts. Three signals, each from the sums over all ranks, so all ranks alarm at the
same step:

    starving   an expert that had its share falls below `starving` of it (running mean of its load)
    rising     MaxVio over its floor, worst layer: a fast mean exceeds `rising` times a slow one, and `excess`
    logits     the router's logits (root mean square) grow: a fast mean exceeds `logits` times a slow one

Each alarm takes the next rung of the ladder, if it has one:

    boost           the rule's steps count double, and again at a further such rung
    solve           the next step is one of quantile balancing: each bias goes at once to where the
                    step would have been even
    sequence_loss   the sequence-wise balance loss gets a weight of SEQUENCE_LOSS_WEIGHT
    stop            the run saves and ends
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from trainer.balance.stats import RoutingStats

RUNGS = ("boost", "solve", "sequence_loss", "stop")
BOOST, SEQUENCE_LOSS_WEIGHT = 2.0, 1e-2
FAST, SLOW = 1 / 20, 1 / 200  # weight of a new value in the means: they look back about 20 and 200 steps


class Guard(nn.Module):
    """enabled: False: it keeps its state and says nothing. The thresholds are those of docs/balancing.md,
    "The guard".

    grace [steps]: nothing is judged before, as biases start at zero. patience [steps]: from one alarm to the
    next.
    """

    def __init__(
        self,
        shape_ME: tuple[int, int],
        *,
        enabled: bool = True,
        grace: int = 200,
        patience: int = 50,
        starving: float = 0.3,
        rising: float = 1.5,
        excess: float = 0.5,
        logits: float = 1.5,
        ladder: Sequence[str] = (),
    ):
        super().__init__()
        if grace < 1 or patience < 1:
            raise ValueError(f"guard.grace={grace}, guard.patience={patience}: must be at least 1 step")
        if not 0 < starving < 1:
            raise ValueError(f"guard.starving={starving}: must lie in (0, 1), 1 is the even share")
        if not (rising > 1 and logits > 1 and excess > 0):
            raise ValueError(
                f"guard.rising={rising}, guard.logits={logits}: must exceed 1; guard.excess={excess}: "
                "must exceed 0"
            )
        if unknown := [rung for rung in ladder if rung not in RUNGS]:
            raise ValueError(f"guard.ladder={list(ladder)}: {unknown[0]} is no rung; use {', '.join(RUNGS)}")
        self.enabled, self.grace, self.patience, self.ladder = enabled, grace, patience, tuple(ladder)
        self.starving, self.rising, self.excess, self.logits = starving, rising, excess, logits
        self.alarms: list[str] = []  # since they were last taken
        self.register_buffer("load_ME", torch.ones(shape_ME))  # fast mean
        self.register_buffer("means_22", torch.zeros(2, 2, dtype=torch.float64))  # excess, logits: fast, slow
        self.register_buffer("seen", torch.tensor(0))  # steps
        self.register_buffer("fewest_starving", torch.tensor(shape_ME[0] * shape_ME[1]))  # since the grace
        self.register_buffer("last_alarm", torch.tensor(-(2**40)))  # step
        self.register_buffer("rung", torch.tensor(0))  # rungs taken
        self.register_buffer("solve_step", torch.tensor(-1))  # the step that is one of quantile balancing
        self.wants_stop = False  # after this step; not saved, so a run that is continued goes on

    @torch.no_grad()
    def watch(self, step: int, stats: RoutingStats, metrics: dict[str, float]) -> dict[str, float]:
        """Takes in a step; returns guard/alarm (1: raised now) and guard/rung (taken so far). Nothing if not
        enabled.
        """
        if not self.enabled:
            return {}
        self.seen += 1
        seen = self.seen.item()
        self.load_ME.lerp_(stats.load_ME.float(), max(FAST, 1 / seen))
        excess = metrics["balance/max_violation_worst_layer"] - metrics["balance/floor"]
        now_2 = self.means_22.new_tensor([excess, metrics["balance/logit_rms"]])
        for column, weight in enumerate((FAST, SLOW)):
            self.means_22[:, column].lerp_(now_2, max(weight, 1 / seen))
        reasons = self.reasons() if seen > self.grace else []
        raised, action = bool(reasons) and step - self.last_alarm.item() >= self.patience, None
        if raised:
            self.last_alarm.fill_(step)
            action = self.ladder[self.rung] if self.rung < len(self.ladder) else None
            self.rung += action is not None
            if action == "solve":
                self.solve_step.fill_(step + 1)
            then = f"; {action}" if action else ""
            self.alarms.append(f"step {step}: {', '.join(reasons)}{then}")
        self.wants_stop = action == "stop"
        return {"guard/alarm": float(raised), "guard/rung": float(self.rung)}

    def reasons(self) -> list[str]:
        (excess, excess_before), (logits, logits_before) = self.means_22.tolist()
        starving_ME = self.load_ME < self.starving
        num_starving, fewest = int(starving_ME.sum()), self.fewest_starving.item()
        self.fewest_starving.clamp_max_(num_starving)
        found = []
        if num_starving > fewest:
            layer, expert = divmod(int(self.load_ME.argmin()), self.load_ME.shape[1])
            least = f"layer {layer} expert {expert} has {self.load_ME.min():.2f} of its share"
            found.append(f"{num_starving} experts starve (before: {fewest}), {least}")
        if excess > self.excess and excess > self.rising * max(excess_before, 0.0):
            found.append(f"MaxVio over its floor rose from {excess_before:.2f} to {excess:.2f}")
        if logits > self.logits * logits_before:
            found.append(f"router logits grew from {logits_before:.2f} to {logits:.2f} (root mean square)")
        return found

    def taken(self, rung: str) -> int:
        """How often this rung was taken."""
        # no wait for a GPU without need
        return self.ladder[: self.rung.item()].count(rung) if rung in self.ladder else 0

    def boost(self) -> float:
        return BOOST ** self.taken("boost")

    def wants_solve(self, step: int) -> bool:
        """Whether this step follows the alarm that asked for a quantile solve."""
        return "solve" in self.ladder and step == self.solve_step.item()

    def apply_loss(self, layers: Sequence[nn.Module]) -> None:
        if self.taken("sequence_loss"):
            for layer in layers:
                weight = max(layer.loss_weights.sequence, SEQUENCE_LOSS_WEIGHT)
                layer.loss_weights = replace(layer.loss_weights, sequence=weight)

    def take_alarms(self) -> list[str]:
        taken, self.alarms = self.alarms, []
        return taken
