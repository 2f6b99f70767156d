"""How do routing counts move the biases? One class per rule; configs/balance/ has one file per choice.

A rule is an nn.Module from (RoutingStats, bias_ME) to step_ME [score], what to add to the biases; its memory
is buffers. v is the violation (mean - n_i) / mean of an expert, G = -dv/db the gain of a layer's router
(RoutingStats.gain_M). A rule may have `needs_required = True` to be given the histogram of required biases,
and `stability_M(stats)`: its step over the largest stable one, per layer; at 1 the biases oscillate without
end.
"""

import math

import torch
from torch import Tensor, nn

from trainer.balance.stats import RoutingStats, centered

SMALLEST, LARGEST = 1e-12, 1e6  # of a rate: beyond them float32 gives 0, or what is not a number


def _above_zero(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: must be above 0 and finite")
        if not SMALLEST <= value <= LARGEST:
            raise ValueError(f"{name}={value}: must lie in [{SMALLEST:g}, {LARGEST:g}], float32 ends beyond")


def _below_one(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value}: must lie in [0, 1), 1 would never move a bias")


class SignRule(nn.Module):
    """b += lr * sign(v), re-centred: Trinity Nano and Mini (arXiv:2602.17004, eq. 19-22; arXiv:2408.15664).

    lr [score]: the report's gamma.
    """

    def __init__(self, shape_ME: tuple[int, int], lr: float):
        super().__init__()
        _above_zero(lr=lr)
        self.lr = lr

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        return centered(self.lr * stats.violation_ME.sign())


class LinearRule(nn.Module):
    """b += lr * v, not clamped: fast, and unstable once lr G > 2 (tried and left in arXiv:2602.17004, section
    2.2).

    lr [score].
    """

    def __init__(self, shape_ME: tuple[int, int], lr: float):
        super().__init__()
        _above_zero(lr=lr)
        self.lr = lr

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        return centered(self.lr * stats.violation_ME)

    def stability_M(self, stats: RoutingStats) -> Tensor:
        return self.lr * stats.gain_M / 2


class RmsRule(nn.Module):
    """b += lr * v / rms(v): every layer moves by the same lr, in proportion within the layer (J. Su, "MoE
    tour").

    lr [score]: the root mean square of a layer's step.
    """

    def __init__(self, shape_ME: tuple[int, int], lr: float):
        super().__init__()
        _above_zero(lr=lr)
        self.lr = lr

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        violation_ME = stats.violation_ME
        rms_M1 = violation_ME.square().mean(-1, keepdim=True).sqrt()
        return centered(self.lr * violation_ME / rms_M1.clamp_min(1e-9))


class PidRule(nn.Module):
    """b = kp v + ki sum(v) + kd (v - v before): a proportional-integral-derivative controller, as steps.

    kp, ki, kd [score]. LongCat-Flash's mu (K/E - share) is the integral part alone, with ki = mu K/E.
    """

    def __init__(self, shape_ME: tuple[int, int], kp: float, ki: float, kd: float):
        super().__init__()
        _above_zero(ki=ki)
        if not (0 <= kp <= LARGEST and 0 <= kd <= LARGEST):
            raise ValueError(f"kp={kp}, kd={kd}: must be 0 or more and at most {LARGEST:g}")
        self.kp, self.ki, self.kd = kp, ki, kd
        self.register_buffer("before_ME", torch.zeros(shape_ME, dtype=torch.float32))
        self.register_buffer("before_that_ME", torch.zeros(shape_ME, dtype=torch.float32))

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        v_ME, v1_ME, v2_ME = stats.violation_ME, self.before_ME, self.before_that_ME
        step_ME = self.kp * (v_ME - v1_ME) + self.ki * v_ME + self.kd * (v_ME - 2 * v1_ME + v2_ME)
        self.before_that_ME.copy_(v1_ME)
        self.before_ME.copy_(v_ME)
        return centered(step_ME)


class SmebuRule(nn.Module):
    """Soft-clamped momentum expert bias updates: Trinity Large (arXiv:2602.17004, eq. 23-28).

    lr [score]: the report's lambda; beta: momentum; kappa: steepness of the clamp.
    """

    def __init__(self, shape_ME: tuple[int, int], lr: float, beta: float, kappa: float):
        super().__init__()
        _above_zero(lr=lr, kappa=kappa)
        _below_one(beta=beta)
        self.lr, self.beta, self.kappa = lr, beta, kappa
        self.register_buffer("momentum_ME", torch.zeros(shape_ME, dtype=torch.float32))

    def lr_M1(self, stats: RoutingStats) -> Tensor | float:
        return self.lr

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        step_ME = centered(self.lr_M1(stats) * torch.tanh(self.kappa * stats.violation_ME))  # eq. 24-26
        self.momentum_ME.lerp_(step_ME, 1 - self.beta)  # eq. 27
        return self.momentum_ME.clone()  # eq. 28

    def stability_M(self, stats: RoutingStats) -> Tensor:
        """lambda kappa G (1 - beta) / (2 (1 + beta)): the linearised loop b += m is stable below 1."""
        return self.lr * self.kappa * stats.gain_M * (1 - self.beta) / (2 * (1 + self.beta))


class SmebuGainRule(SmebuRule):
    """SMEBU whose lambda each layer finds by itself: lambda = rho / (kappa G), G measured from its router's
    margins.

    rho: the share of a small violation that one step takes away (before momentum), whatever E, K, batch or
    the spread of the scores. memory: of the running mean of G. max_lr [score]: limit of lambda, for routers
    whose scores hardly ever meet.
    """

    def __init__(
        self,
        shape_ME: tuple[int, int],
        rho: float,
        beta: float,
        kappa: float,
        memory: float = 0.9,
        max_lr: float = 0.1,
    ):
        _above_zero(rho=rho, max_lr=max_lr)
        super().__init__(shape_ME, lr=max_lr, beta=beta, kappa=kappa)
        _below_one(memory=memory)
        self.rho, self.memory = rho, memory
        self.register_buffer("gain_M", torch.zeros(shape_ME[0], dtype=torch.float32))

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        known_M, now_M = self.gain_M, stats.gain_M
        mean_M = torch.where(known_M > 0, self.memory * known_M + (1 - self.memory) * now_M, now_M)
        self.gain_M.copy_(torch.where(now_M > 0, mean_M, known_M))
        return super().forward(stats, bias_ME)

    def lr_M1(self, stats: RoutingStats) -> Tensor:
        return (self.rho / (self.kappa * self.gain_M.clamp_min(1e-9))).clamp_max(self.lr).unsqueeze(-1)

    def stability_M(self, stats: RoutingStats) -> Tensor:
        """With this step's G against the lambda of its running mean."""
        lr_M = self.lr_M1(stats).squeeze(-1)
        return lr_M * self.kappa * stats.gain_M * (1 - self.beta) / (2 * (1 + self.beta))


class QuantileRule(nn.Module):
    """Quantile balancing: b becomes the bias with which K/E of the tokens would have chosen the expert (J.
    Su).

    From a histogram of the whole step, not from samples. ema: share of the old bias that is kept; 0: none.
    """

    needs_required = True

    def __init__(self, shape_ME: tuple[int, int], ema: float = 0.0):
        super().__init__()
        _below_one(ema=ema)
        self.ema = ema

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        return centered((1 - self.ema) * (stats.required_quantile_ME - bias_ME))


class SmebuQuantileRule(nn.Module):
    """A clamped momentum step towards the quantile target q: Delta = lr tanh(rate (q - b) / lr), m as in
    SMEBU.

    lr [score]: the largest step; rate: share of a small distance that one step covers; beta: momentum.
    """

    needs_required = True

    def __init__(self, shape_ME: tuple[int, int], lr: float, rate: float, beta: float):
        super().__init__()
        _above_zero(lr=lr, rate=rate)
        _below_one(beta=beta)
        self.lr, self.rate, self.beta = lr, rate, beta
        self.register_buffer("momentum_ME", torch.zeros(shape_ME, dtype=torch.float32))

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        distance_ME = centered(stats.required_quantile_ME - bias_ME)
        step_ME = centered(self.lr * torch.tanh(self.rate * distance_ME / self.lr))
        self.momentum_ME.lerp_(step_ME, 1 - self.beta)
        return self.momentum_ME.clone()

    def stability_M(self, stats: RoutingStats) -> Tensor:
        """The distance answers a bias one to one, whatever the layer."""
        return torch.full_like(stats.gain_M, self.rate * (1 - self.beta) / (2 * (1 + self.beta)))
