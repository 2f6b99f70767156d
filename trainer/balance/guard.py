"""Is an expert about to be lost? The guard watches each step's routing and raises an alarm before the loss.

Letters: M MoE layers, E experts. Three signals, each from the sums over all ranks, so all ranks alarm at the
same step:

    starving   an expert that had its share falls below `starving` of it (running mean of its load)
    rising     MaxVio over its floor, worst layer: a fast mean exceeds `rising` times a slow one, and `excess`
    logits     the router's logits (root mean square) grow: a fast mean exceeds `logits` times a slow one

An alarm changes nothing in the run. With `stop` it asks the run to save and to end.
"""

import torch
from torch import Tensor, nn

FAST, SLOW = 1 / 20, 1 / 200  # weight of a new value in the means: they look back about 20 and 200 steps


class Guard(nn.Module):
    """Its memory lies on the host: a step's values come to it with the step's metrics, in one transfer.

    enabled: False: the guard keeps its state and says nothing. The thresholds are explained in
    docs/balancing.md, "The guard". grace [steps]: nothing is judged before, as biases start at zero.
    patience [steps]: from one alarm to the next. stop: an alarm ends the run.
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
        stop: bool = False,
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
        self.enabled, self.grace, self.patience, self.stop = enabled, grace, patience, stop
        self.starving, self.rising, self.excess, self.logits = starving, rising, excess, logits
        self.alarms: list[str] = []  # since they were last taken
        self.register_buffer("load_ME", torch.ones(shape_ME))  # fast mean
        self.register_buffer("means_22", torch.zeros(2, 2, dtype=torch.float64))  # excess, logits: fast, slow
        self.register_buffer("seen", torch.tensor(0))  # steps
        self.register_buffer("fewest_starving", torch.tensor(shape_ME[0] * shape_ME[1]))  # since the grace
        self.register_buffer("last_alarm", torch.tensor(-(2**40)))  # step
        self.wants_stop = False  # after this step; not saved, so a run that is continued goes on

    @torch.no_grad()
    def watch(self, step: int, load_ME: Tensor, metrics: dict[str, float]) -> dict[str, float]:
        """Takes in a step; returns guard/alarm (1: raised now). Nothing if not enabled.

        load_ME: of the step, relative to the even share, on the host.
        """
        if not self.enabled:
            return {}
        self.seen += 1
        seen = self.seen.item()
        self.load_ME.lerp_(load_ME.float(), max(FAST, 1 / seen))
        excess = metrics["balance/max_violation_worst_layer"] - metrics["balance/floor"]
        now_2 = self.means_22.new_tensor([excess, metrics["balance/logit_rms"]])
        for column, weight in enumerate((FAST, SLOW)):
            self.means_22[:, column].lerp_(now_2, max(weight, 1 / seen))
        reasons = self.reasons() if seen > self.grace else []
        is_alarm = bool(reasons) and step - self.last_alarm.item() >= self.patience
        if is_alarm:
            self.last_alarm.fill_(step)
            self.alarms.append(f"step {step}: {', '.join(reasons)}{'; stop' if self.stop else ''}")
        self.wants_stop = is_alarm and self.stop
        return {"guard/alarm": float(is_alarm)}

    def reasons(self) -> list[str]:
        (excess, excess_before), (logits, logits_before) = self.means_22.tolist()
        starving_ME = self.load_ME < self.starving
        num_starving, fewest = int(starving_ME.sum()), self.fewest_starving.item()
        self.fewest_starving.clamp_max_(num_starving)
        reasons = []
        if num_starving > fewest:
            layer, expert = divmod(int(self.load_ME.argmin()), self.load_ME.shape[1])
            least = f"layer {layer} expert {expert} has {self.load_ME.min():.2f} of its share"
            reasons.append(f"{num_starving} experts starve (before: {fewest}), {least}")
        if excess > self.excess and excess > self.rising * max(excess_before, 0.0):
            reasons.append(f"MaxVio over its floor rose from {excess_before:.2f} to {excess:.2f}")
        if logits > self.logits * logits_before:
            reasons.append(f"router logits grew from {logits_before:.2f} to {logits:.2f} (root mean square)")
        return reasons

    def take_alarms(self) -> list[str]:
        taken, self.alarms = self.alarms, []
        return taken
