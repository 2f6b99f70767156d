"""Which experts does a token visit? And what of that is counted and penalised in training?

Letters: B sequences, L tokens each, T = B L, D model dim, E experts, K per token, S sums of a layer
(balance/stats.py).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module

from trainer.balance import attach_loss, collects_required, count_in_backward, router_loss, routing_sums


class Gate(Linear):
    """The router's weights. They multiply in `dtype`, which is float32 also in a bfloat16 model unless
    model.router_dtype sets another; the logits are float32.

    The cast is explicit, as autocast to float32 is a no-op on a CPU.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        dtype: torch.dtype = torch.float32

    def __init__(self, config: Config):
        super().__init__(config)
        self.dtype = config.dtype

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.to(self.dtype), self.weight.to(self.dtype)).float()


class Routing(NamedTuple):
    gates_BLK: Tensor  # what the chosen experts' outputs are multiplied with
    ids_BLK: Tensor
    scores_BLE: Tensor
    logits_BLE: Tensor


class Router(Module):
    """Which experts does a token visit? The K largest of sigmoid score + bias (arXiv:2602.17004, eq. 16-18).

    The gates are the chosen scores without the bias, summing to route_scale.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        num_experts: int
        top_k: int
        route_scale: float
        gate: Gate.Config

    def __init__(self, config: Config):
        super().__init__()
        self.gate = config.gate.build()
        self.top_k, self.route_scale = config.top_k, config.route_scale

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor) -> Routing:
        logits_BLE = self.gate(x_BLD)
        scores_BLE = torch.sigmoid(logits_BLE)
        ids_BLK = (scores_BLE + expert_bias_E).topk(self.top_k, dim=-1, sorted=False).indices
        chosen_BLK = scores_BLE.gather(-1, ids_BLK)
        gates_BLK = chosen_BLK * (self.route_scale / chosen_BLK.sum(-1, keepdim=True).clamp_min(1e-20))
        return Routing(gates_BLK, ids_BLK, scores_BLE, logits_BLE)


def count_and_balance(layer: Module, routing: Routing, valid_BL: Tensor | None) -> Tensor:
    """The gates; the backward pass through them counts this microbatch and minimizes the balance losses."""
    gates_BLK, ids_BLK, scores_BLE, logits_BLE = routing
    sums_S = routing_sums(
        scores_BLE, logits_BLE, ids_BLK, layer.expert_bias_E, valid_BL, required=collects_required(layer)
    )
    gates_BLK = count_in_backward(gates_BLK, sums_S, layer.routing_sums_S)
    loss = router_loss(
        layer.loss_weights, scores_BLE, logits_BLE, ids_BLK, layer.load_E, valid_BL, layer.total
    )
    return gates_BLK if loss is None else attach_loss(gates_BLK, loss, layer.label_share)


def use_sums(routing: Routing, valid_BL: Tensor | None) -> Tensor:
    """What an evaluation wants to know of a layer, float64: tokens sent to each of E experts, tokens, and the
    sum over tokens of the largest gate's share of its token's gates. Padding is not counted.
    """
    num_experts, top_k = routing.scores_BLE.shape[-1], routing.ids_BLK.shape[-1]
    ids_TK, gates_TK = routing.ids_BLK.view(-1, top_k), routing.gates_BLK.view(-1, top_k).double()
    is_there_T1 = torch.ones_like(gates_TK[:, :1]) if valid_BL is None else valid_BL.reshape(-1, 1).double()
    counts_E = is_there_T1.new_zeros(num_experts)
    counts_E.scatter_add_(0, ids_TK.flatten(), is_there_T1.expand_as(gates_TK).flatten())
    largest_T1 = gates_TK.amax(1, keepdim=True) / gates_TK.sum(1, keepdim=True).clamp_min(1e-20)
    return torch.cat([counts_E, is_there_T1.sum(0), (largest_T1 * is_there_T1).sum(0)])
