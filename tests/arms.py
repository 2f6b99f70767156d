"""Every arm of configs/balance/, and a small lab to try each in: the trainer's router, counters and Balancer,
no experts.

The gate's weights are multiples of 1/64 and its inputs of 1/8: sums of their products are exact in any order,
so a token's logits are the same bits however the batch is cut. What differs then is the bookkeeping's doing.

Letters: M layers, B sequences, L tokens each, D dim, E experts, K experts per token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from trainer.balance import (
    NO_LOSSES,
    Balancer,
    LossWeights,
    RoutingStats,
    register_routing_buffers,
    routing_sums,
)
from trainer.config import CONFIG_DIR
from trainer.model.router import Gate, Router, count_and_balance

ARMS = sorted(path.stem for path in Path(CONFIG_DIR, "balance").glob("*.yaml"))
DIM = 16


@cache
def arm_config(name: str) -> Any:
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        return compose(f"balance/{name}").balance.rule


def make_rule(name: str, shape_ME: tuple[int, int], **changes) -> nn.Module | None:
    config = arm_config(name)
    return None if config is None else instantiate(config, **changes)(shape_ME)


RULES = [name for name in ARMS if arm_config(name) is not None]


class GatedLayer(nn.Module):
    """An MoE layer without its experts; experts with higher numbers are more popular."""

    def __init__(self, num_experts: int, top_k: int, *, seed: int = 0, loss_weights: LossWeights = NO_LOSSES):
        super().__init__()
        gate = Gate.Config(in_features=DIM, out_features=num_experts)
        self.router = Router.Config(num_experts=num_experts, top_k=top_k, route_scale=1.0, gate=gate).build()
        weight_ED = (
            torch.randint(-32, 33, (num_experts, DIM), generator=torch.Generator().manual_seed(seed)) / 64
        )
        # of the input that is always 1
        weight_ED[:, 0] = (torch.linspace(-1, 1, num_experts) * 64).round() / 64
        self.router.gate.weight.data.copy_(weight_ED)
        self.top_k, self.loss_weights = top_k, loss_weights
        register_routing_buffers(self, num_experts)

    def forward(self, x_BLD: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        return count_and_balance(self, self.router(x_BLD, self.expert_bias_E), valid_BL)

    @property
    def counts_E(self) -> Tensor:
        return self.routing_sums_S[: self.expert_bias_E.numel()]


def batch(step: int, sequences: int = 8, length: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    x_BLD = torch.randint(-8, 9, (sequences, length, DIM), generator=generator) / 8
    x_BLD[..., 0] = 1
    return x_BLD


@dataclass
class Lab:
    layers: list[GatedLayer]
    balancer: Balancer
    metrics: list[dict[str, float]] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)  # after each step, (M, E)
    loads: list[Tensor] = field(default_factory=list)  # of each step, (M, E)
    gradients: list[Tensor] = field(default_factory=list)  # of the gates' weights in each step, (M, E, D)

    def step(self, feed: Callable[["Lab", Tensor], None], x_BLD: Tensor) -> None:
        """One optimizer step: `feed` runs the layers, forward and backward; the gates' weights stay."""
        feed(self, x_BLD)
        weights = [layer.router.gate.weight for layer in self.layers]
        self.gradients.append(
            torch.stack([torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights])
        )
        for weight in weights:
            weight.grad = None
        self.metrics.append(self.balancer.step(len(self.metrics) + 1))
        self.biases.append(self.balancer.bias_ME)
        self.loads.append(self.balancer.load_ME.clone())

    def run(self, feed: Callable[["Lab", Tensor], None], steps: Iterable[int]) -> "Lab":
        for step in steps:
            self.step(feed, batch(step))
        return self


def make_lab(
    name: str,
    *,
    layers: int = 2,
    experts: int = 16,
    top_k: int = 2,
    loss_weights: LossWeights = NO_LOSSES,
    **options,
) -> Lab:
    """options: of the Balancer."""
    gated = [GatedLayer(experts, top_k, seed=seed, loss_weights=loss_weights) for seed in range(layers)]
    return Lab(gated, Balancer(gated, make_rule(name, (layers, experts)), steps=6, **options))


def train(lab: Lab, x_BLD: Tensor, valid_BL: Tensor | None = None) -> None:
    """Forward and backward of one microbatch. What padding computes is in no loss."""
    for layer in lab.layers:
        gates_BLK = layer(x_BLD, valid_BL)
        gates_BLK = gates_BLK if valid_BL is None else gates_BLK * valid_BL.unsqueeze(-1)
        gates_BLK.square().sum().backward()


def stats_of(scores_MTE: Tensor, bias_ME: Tensor, *, top_k: int) -> RoutingStats:
    """All that can be counted, of scores as they are."""
    ids_MTK = (scores_MTE + bias_ME.unsqueeze(1)).topk(top_k).indices
    logits_MTE = scores_MTE.logit()
    sums = [
        routing_sums(*layer, required=True)
        for layer in zip(scores_MTE, logits_MTE, ids_MTK, bias_ME, strict=True)
    ]
    return RoutingStats.from_sums(torch.stack(sums), bias_ME, top_k=top_k)


def times(stats: RoutingStats, factor: int) -> RoutingStats:
    """The same batch, `factor` times."""
    names = ("counts_ME", "margins_MW", "logits_M1", "required_MEH")
    return replace(stats, **{name: factor * getattr(stats, name) for name in names})
