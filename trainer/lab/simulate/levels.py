"""What routes in a simulation? The trainer's own router, counters, losses and Balancer, with less and less of
a model around.

    Tiny     a small AFMoE, trained by train_step of trainer/run/step.py
    Closed   no experts: an expert that gets more tokens becomes more attractive
    Frozen   no experts, no feedback: the scores are what they are
    Replay   no router either: the sums that a training run recorded, under another rule

Letters: M MoE layers, E experts, K per token, T tokens of a step.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor, nn

from trainer import train
from trainer.balance import (
    Balancer,
    Guard,
    LossWeights,
    QuantileRule,
    RoutingStats,
    centered,
    register_routing_buffers,
    routing_sums,
)
from trainer.balance.stats import collects_required
from trainer.balance.trace import Trace
from trainer.config import BalanceConfig, ConfigError, load
from trainer.lab.simulate.config import SimulateConfig
from trainer.model.afmoe import moe_layers
from trainer.model.router import Gate, Router, Routing, count_and_balance
from trainer.run.build import loss_weights

FAULTS = ("rule", "feedback", "logits", "expert")


class Level(Protocol):
    balancer: Balancer
    notes: list[str]
    shift_step: int | None  # the first step after an abrupt change

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step, from 1. Returns its metrics."""
        ...

    def close(self) -> None: ...


class RoutingLayer(nn.Module):
    """An MoE layer without its experts; its router takes logits, for there is nothing to compute them
    from.
    """

    def __init__(self, num_experts: int, top_k: int, loss_weights: LossWeights):
        super().__init__()
        gate = Gate.Config(in_features=1, out_features=num_experts)
        self.router = Router.Config(num_experts=num_experts, top_k=top_k, route_scale=1.0, gate=gate).build()
        self.router.gate = nn.Identity()
        self.top_k, self.loss_weights = top_k, loss_weights
        register_routing_buffers(self, num_experts)

    def route(self, logits_TE: Tensor) -> Routing:
        return self.router(logits_TE.unsqueeze(0), self.expert_bias_E)

    @torch.no_grad()
    def count(self, logits_TE: Tensor) -> None:
        _, ids, scores, logits = self.route(logits_TE)
        required = collects_required(self)
        self.routing_sums_S += routing_sums(scores, logits, ids, self.expert_bias_E, required=required)


def make_rule(config: BalanceConfig, shape_ME: tuple[int, int]) -> nn.Module | None:
    with train.refusing():
        rule = instantiate(config.rule)
        return rule(shape_ME) if rule is not None else None


def make_guard(config: SimulateConfig) -> Guard:
    with train.refusing():
        return Guard((config.layers, config.experts), **vars(config.guard))


class Frozen:
    """The scores do not answer to the routing, so balance losses have nothing to push."""

    def __init__(self, *, config: SimulateConfig, seed: int):
        shape = {"num_layers": config.layers, "num_experts": config.experts, "top_k": config.top_k}
        with train.refusing():
            self.scores = instantiate(config.scores)(
                **shape, tokens=config.tokens, steps=config.steps, seed=seed
            )
        weights = loss_weights(config.balance)
        self.layers = [RoutingLayer(config.experts, config.top_k, weights) for _ in range(config.layers)]
        rule = make_rule(config.balance, (config.layers, config.experts))
        self.balancer = Balancer(self.layers, rule, steps=config.steps, guard=make_guard(config))
        self.notes, self.shift_step = [], self.scores.shift_step

    def step(self, step: int) -> dict[str, float]:
        for m, layer in enumerate(self.layers):
            logits_TE = self.scores(step, m)
            if isinstance(self.balancer.rule, ExactQuantileRule):
                self.balancer.rule.observe(layer, logits_TE)
            layer.count(logits_TE)
        return self.balancer.step(step)

    def close(self) -> None:
        pass


class ExactQuantileRule(QuantileRule):
    """The oracle of QuantileRule: the exact K/E quantile of the step's required biases. Keeps all of them:
    Frozen only.
    """

    needs_required = False

    def __init__(self, shape_ME: tuple[int, int], ema: float = 0.0):
        super().__init__(shape_ME, ema)
        self.observed: list[Tensor] = []

    def observe(self, layer: RoutingLayer, logits_TE: Tensor) -> None:
        choice_TE = torch.sigmoid(logits_TE) + layer.expert_bias_E
        alpha_T1 = choice_TE.topk(layer.top_k + 1, dim=1).values[:, -1:]
        required_TE = alpha_T1 - torch.sigmoid(logits_TE)
        rank = max(1, round(len(logits_TE) * layer.top_k / logits_TE.shape[1]))
        self.observed.append(required_TE.kthvalue(rank, dim=0).values)

    def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
        if not self.observed:
            raise ConfigError("ExactQuantileRule keeps all scores of a step; it works at level=frozen only")
        required_ME, self.observed = torch.stack(self.observed), []
        return centered((1 - self.ema) * (required_ME - bias_ME))


class Closed(Frozen):
    """Rich get richer. Each expert has an attraction a, added to its logits:

        a += feedback * tanh(load - 1) - forgetting * a - gate_lr * (gradient of the balance losses per token)

    feedback [logit], forgetting [1], gate_lr [logit^2], per step. Where nothing balances, small differences
    die out up to a critical feedback, forgetting over the share of its load that an expert gains per logit;
    above it they grow until an attraction is +- feedback / forgetting.

    fault: what goes wrong after a share `fault_at` of the run, for the guard to find: `rule` (biases move no
    more), `feedback` (tenfold), `logits` (grow by 2 % a step, up to twentyfold), `expert` (one of each layer
    loses 0.02 logit a step).
    """

    def __init__(
        self,
        *,
        config: SimulateConfig,
        seed: int,
        feedback: float,
        forgetting: float,
        gate_lr: float,
        fault: str | None = None,
        fault_at: float = 0.5,
    ):
        super().__init__(config=config, seed=seed)
        if fault not in (None, *FAULTS):
            raise ConfigError(f"level.fault={fault}: must be one of {', '.join(FAULTS)}, or null")
        if not 0 < fault_at < 1:
            raise ConfigError(f"level.fault_at={fault_at}: must lie in (0, 1), a share of the run")
        self.fault, self.fault_step = fault, round(fault_at * config.steps) + 1 if fault else None
        for name, value in {"feedback": feedback, "forgetting": forgetting, "gate_lr": gate_lr}.items():
            if not 0 <= value <= 1000:
                raise ConfigError(f"level.{name}={value}: must lie in [0, 1000]")
        self.feedback, self.forgetting, self.gate_lr = feedback, forgetting, gate_lr
        self.attraction_ME = torch.zeros(config.layers, config.experts)

    def step(self, step: int) -> dict[str, float]:
        gradients, since = (
            [],
            step - self.fault_step + 1 if self.fault_step and step >= self.fault_step else 0,
        )
        if since and self.fault == "rule":
            self.balancer.rule = None
        feedback = self.feedback * (10 if since and self.fault == "feedback" else 1)
        for m, layer in enumerate(self.layers):
            a_E = self.attraction_ME[m].clone().requires_grad_()
            logits_TE = self.scores(step, m) + a_E
            if since and self.fault == "logits":
                logits_TE = logits_TE * min(1.02**since, 20.0)
            if since and self.fault == "expert":
                logits_TE = logits_TE - 0.02 * since * F.one_hot(torch.tensor(m % len(a_E)), len(a_E))
            gates_BTK = count_and_balance(layer, layer.route(logits_TE), None)
            # the balance losses' own gradient is all there is
            gates_BTK.backward(torch.zeros_like(gates_BTK))
            gradients.append(a_E.grad / len(logits_TE))
        metrics = self.balancer.step(step)
        self.attraction_ME += (
            feedback * torch.tanh(self.balancer.load_ME - 1) - self.forgetting * self.attraction_ME
        )
        self.attraction_ME -= self.gate_lr * torch.stack(gradients)
        return metrics


class Tiny:
    """A real model, built and stepped by the trainer. train: its overrides; layers, experts, top_k, tokens
    come on top.
    """

    def __init__(self, *, config: SimulateConfig, seed: int, train: list[str]):
        self.run = _build(config, seed, list(train))
        self.balancer, self.notes, self.shift_step = self.run.balancer, [], None
        self.layers = moe_layers(self.run.model)

    def step(self, step: int) -> dict[str, float]:
        metrics = train.train_step(self.run, self.run.stream.next_step(self.run.config.micro_batch))
        if metrics is None or self.run.health.in_row:
            raise FloatingPointError(f"step {step} of the tiny model: {self.run.health.reason}")
        return metrics

    def close(self) -> None:
        dist.destroy_process_group()


def _build(config: SimulateConfig, seed: int, overrides: list[str]) -> train.Run:
    seq_len = load(overrides).seq_len
    if config.tokens % seq_len:
        raise ConfigError(
            f"tokens={config.tokens}: must be a multiple of the {seq_len} tokens of a sequence (level.train)"
        )
    ours = {
        "name": "tiny",
        "run_dir": config.directory,
        "seed": seed,
        "steps": config.steps,
        "model.num_dense_layers": 1,
        "model.num_layers": config.layers + 1,
        "model.num_experts": config.experts,
        "model.top_k": config.top_k,
        "global_batch": config.tokens // seq_len,
    }
    loaded = load([*overrides, *(f"{key}={value}" for key, value in ours.items())])
    loaded.balance, loaded.guard = config.balance, config.guard
    return train.build(loaded)


class Replay:
    """Recorded sums, step after step. Open loop: the counts do not answer to the replayed biases."""

    def __init__(self, *, config: SimulateConfig, seed: int, trace: str):
        with train.refusing():
            self.trace = Trace(trace)
        tokens = int(self._next(iter(self.trace)).tokens_M1[0])  # of the first step
        shape = {
            "layers": self.trace.num_layers,
            "experts": self.trace.num_experts,
            "top_k": self.trace.top_k,
            "tokens": tokens,
        }
        config.steps = min(config.steps, self.trace.num_steps)
        for name, value in shape.items():
            setattr(config, name, value)
        if config.experts % config.ep:
            raise ConfigError(f"ep={config.ep} does not divide the {config.experts} experts of {trace}")
        self.layers = [
            RoutingLayer(config.experts, config.top_k, LossWeights()) for _ in range(config.layers)
        ]
        rule = make_rule(config.balance, (config.layers, config.experts))
        if getattr(rule, "needs_required", False) and not self.trace.has_required:
            raise ConfigError(
                f"balance={config.balance.name} needs the histograms of required biases, and {trace} has "
                "none; record with balance.trace_required=true"
            )
        self.balancer = Balancer(self.layers, rule, steps=config.steps, guard=make_guard(config))
        self.steps: Iterator[RoutingStats] = iter(self.trace)
        self.notes = [
            (
                f"Open loop: the counts are those of {trace}; they do not answer to the biases of the "
                "replayed rule."
            )
        ]
        self.shift_step = None

    def step(self, step: int) -> dict[str, Any]:
        return self.balancer.update(step, self._next(self.steps))

    def _next(self, steps: Iterator[RoutingStats]) -> RoutingStats:
        try:
            return next(steps)
        except ValueError as error:  # a line that cannot be read
            raise ConfigError(str(error)) from None

    def close(self) -> None:
        pass
