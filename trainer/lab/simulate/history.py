"""What is kept of a simulated run, in memory that does not grow with its steps?

Curves and loads are means over at most MAX_BINS bins of steps; the summary comes from running windows and
from the tail, the last fifth of the steps. Letters: M MoE layers, E experts, K per token, P probed tokens.

    churn        share of the choices of the same tokens that the step's bias update changes
    chatter      share of bias steps that reverse the one before (1/2: the biases only follow noise)
    mean_score   of the chosen experts, without bias: what balance costs the router
    ep_max_over_mean   tokens of the busiest of `ep` expert-parallel ranks over the mean
"""

import base64
import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from trainer.balance import COLLAPSED_SHARE, RoutingStats

MAX_BINS, MAX_CELLS = 500, 1_500_000  # of the curves; layers x experts x bins of the loads
TAIL_SHARE, MAX_TAIL = 0.2, 10_000  # MAX_TAIL: steps of the tail whose MaxVio is kept for the percentile
WINDOW, NEAR_FLOOR = 10, 1.25
PROBED, MAX_LOAD = 256, 4.0
HAD_SHARE = 0.5  # an expert that once had this much can be lost
TAIL_MEANS = (
    "excess",
    "bias_step_rms",
    "churn",
    "mean_score",
    "ep_max_over_mean",
    "dead_experts",
    "min_load",
    "stability",
    "gain",
    "load_cv",
)


class Probe:
    """The first tokens that a router sees in a step: their scores and what they chose."""

    def __init__(self, layer: nn.Module):
        self.layer, self.scores_PE, self.ids_PK = layer, None, None
        self.handle = layer.router.register_forward_hook(self._look)

    def _look(self, router: nn.Module, args: Any, routing: Any) -> None:
        self.scores_PE = routing.scores_BLE.detach().flatten(0, 1)[:PROBED].clone()
        self.ids_PK = routing.ids_BLK.flatten(0, 1)[:PROBED].clone()

    def mean_score(self) -> float:
        return self.scores_PE.gather(1, self.ids_PK).mean().item()

    def churn(self) -> float:
        """With the biases after the update."""
        now_PK = (self.scores_PE + self.layer.expert_bias_E).topk(self.ids_PK.shape[1], dim=1).indices
        kept = (now_PK.unsqueeze(2) == self.ids_PK.unsqueeze(1)).any(2)
        return 1 - kept.float().mean().item()


class History:
    """Watches a level step by step: `observe` is shown the sums by the Balancer, `add` the metrics after the
    update.
    """

    def __init__(self, level: Any, *, steps: int, ep: int, balanced_below: float):
        self.level, self.steps, self.ep, self.balanced_below = level, steps, ep, balanced_below
        self.balancer = level.balancer
        num_layers, num_experts = self.balancer.load_ME.shape
        self.num_bins = min(steps, MAX_BINS, max(20, MAX_CELLS // (num_layers * num_experts)))
        self.curves: dict[str, Tensor] = {}
        self.bin_counts = torch.zeros(self.num_bins)
        self.load_NME = torch.zeros(self.num_bins, num_layers, num_experts)  # N bins
        self.before_ME = self.balancer.bias_ME
        self.last_step_ME = torch.zeros_like(self.before_ME)
        self.window = deque[tuple[float, float]](maxlen=WINDOW)
        self.first_tail_step = steps - max(1, round(TAIL_SHARE * steps)) + 1
        self.stride = -(-(steps - self.first_tail_step + 1) // MAX_TAIL)
        self.tail: list[dict[str, float]] = []
        self.all_excess = 0.0
        self.reversals, self.moves = 0, 0
        self.mean_load_ME = torch.ones(num_layers, num_experts)  # of about 20 steps
        self.had_share_ME = torch.zeros(num_layers, num_experts, dtype=torch.bool)
        self.num_alarms, self.first_alarm, self.collapse_step = 0, None, None
        self.reached: dict[str, int | None] = {
            "steps_to_balance": None,
            "steps_to_floor": None,
            "recovery_steps": None,
        }
        self.probes = [Probe(layer) for layer in level.layers if not hasattr(level, "trace")]
        self.balancer.observers += (self.observe,)

    def observe(self, step: int, stats: RoutingStats) -> None:
        self.bin = (step - 1) * self.num_bins // self.steps
        self.load_NME[self.bin] += stats.load_ME
        self.load_cv = stats.load_ME.std(1, correction=0).mean().item()
        self.mean_load_ME.lerp_(stats.load_ME.float(), max(1 / 20, 1 / step))
        if step >= 20:
            self.had_share_ME |= self.mean_load_ME >= HAD_SHARE
            if (
                self.collapse_step is None
                and (self.had_share_ME & (self.mean_load_ME < COLLAPSED_SHARE)).any()
            ):
                self.collapse_step = step
        ranks_MRe = stats.load_ME.unflatten(1, (self.ep, -1)).sum(-1)
        self.ep_max_over_mean = (ranks_MRe.amax(1) / ranks_MRe.mean(1).clamp_min(1e-9)).mean().item()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        bias_ME = self.balancer.bias_ME
        step_ME, self.before_ME = bias_ME - self.before_ME, bias_ME
        values = {
            name.removeprefix("balance/"): value
            for name, value in metrics.items()
            if name.startswith("balance/")
        }
        stability = [value for name, value in values.items() if name.startswith("stability/")]
        values = {name: value for name, value in values.items() if "/" not in name}
        values["excess"] = values["max_violation"] - values["floor"]
        values["load_cv"] = self.load_cv
        values["bias_step_rms"] = step_ME.square().mean().sqrt().item()
        values["ep_max_over_mean"] = self.ep_max_over_mean
        if stability:
            values["stability"] = max(stability)
        if self.probes:
            values["churn"] = sum(probe.churn() for probe in self.probes) / len(self.probes)
            values["mean_score"] = sum(probe.mean_score() for probe in self.probes) / len(self.probes)
        if metrics.get("guard/alarm"):
            self.num_alarms += 1
            self.first_alarm = self.first_alarm or step
        if "loss" in metrics:
            values["loss"] = metrics["loss"]
        for name, value in values.items():
            self.curves.setdefault(name, torch.zeros(self.num_bins, dtype=torch.float64))[self.bin] += value
        self.bin_counts[self.bin] += 1
        self.all_excess += max(0.0, values["excess"])
        self._reach(step, values)
        if step >= self.first_tail_step:
            moved_ME = (step_ME != 0) & (self.last_step_ME != 0)
            self.reversals += ((step_ME * self.last_step_ME < 0) & moved_ME).sum().item()
            self.moves += moved_ME.sum().item()
            if (step - self.first_tail_step) % self.stride == 0:
                self.tail.append(values)
        self.last_step_ME = step_ME

    def _reach(self, step: int, values: dict[str, float]) -> None:
        """Steps until the mean of a window is below a limit; the window must lie after the shift to count as
        recovery.
        """
        shift = self.level.shift_step
        if step == shift:
            self.window.clear()
        self.window.append((values["max_violation"], values["floor"]))
        if len(self.window) < WINDOW:
            return
        max_violation, floor = (sum(column) / WINDOW for column in zip(*self.window, strict=True))
        is_after = shift is not None and step >= shift
        checks = {
            "steps_to_balance": not is_after and max_violation < self.balanced_below,
            "steps_to_floor": not is_after and max_violation < NEAR_FLOOR * floor,
            "recovery_steps": is_after and max_violation < self.balanced_below,
        }
        for name, is_there in checks.items():
            if is_there and self.reached[name] is None:
                first = shift - 1 if is_after else 0
                self.reached[name] = step - WINDOW + 1 - first  # the first step of the window

    def summary(self) -> dict[str, float | None]:
        summary: dict[str, float | None] = dict(self.reached)
        if self.level.shift_step is None:
            del summary["recovery_steps"]
        summary["excess_run"] = self.all_excess / self.steps
        for name in TAIL_MEANS:
            values = [row[name] for row in self.tail if name in row]
            if values:
                summary["excess_mean" if name == "excess" else name] = sum(values) / len(values)
        excesses = sorted(row["excess"] for row in self.tail)
        summary["excess_p99"] = excesses[min(len(excesses) - 1, math.ceil(0.99 * len(excesses)) - 1)]
        summary["bias_chatter"] = self.reversals / self.moves if self.moves else 0.0
        summary |= {
            "collapse_step": self.collapse_step,
            "first_alarm": self.first_alarm,
            "alarms": float(self.num_alarms),
        }
        losses = [row["loss"] for row in self.tail if "loss" in row]
        summary |= {"loss": sum(losses) / len(losses)} if losses else {}
        return {
            name: value if value is None or math.isfinite(value) else None for name, value in summary.items()
        }

    def as_dict(self, *, with_loads: bool) -> dict[str, Any]:
        counts = self.bin_counts.double()
        ends = [-(-(i + 1) * self.steps // self.num_bins) for i in range(self.num_bins)]
        curves = {name: _rounded(total / counts) for name, total in self.curves.items()}
        loads = None
        if with_loads:
            mean_MEN = (self.load_NME / self.bin_counts.view(-1, 1, 1)).permute(1, 2, 0)
            bytes_MEN = (mean_MEN / MAX_LOAD * 255).round().clamp(0, 255).to(torch.uint8)
            layers, experts, bins = bytes_MEN.shape
            data = base64.b64encode(bytes_MEN.contiguous().numpy().tobytes()).decode()
            loads = {"layers": layers, "experts": experts, "bins": bins, "max": MAX_LOAD, "data": data}
        return {"summary": self.summary(), "steps": ends, "curves": curves, "loads": loads}


def _rounded(values: Tensor) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]
