"""Expert balancing: how routing counts move the routers' biases, and which losses push the routers
themselves.

stats (what is counted) -> rules (biases), losses (gradients) -> balancer (once per step). Imports `records`
only.
"""

from trainer.balance.balancer import COLLAPSED_SHARE, Balancer, Experts, Verdict
from trainer.balance.guard import Guard
from trainer.balance.losses import (
    NO_LOSSES,
    LossWeights,
    attach_loss,
    batch_balance_loss,
    count_in_backward,
    router_loss,
    router_z_loss,
    sequence_balance_loss,
    switch_balance_loss,
)
from trainer.balance.rules import (
    LinearRule,
    PidRule,
    QuantileRule,
    RmsRule,
    SignRule,
    SmebuGainRule,
    SmebuQuantileRule,
    SmebuRule,
)
from trainer.balance.stats import (
    RoutingStats,
    centered,
    collect_required,
    collects_required,
    register_routing_buffers,
    routing_metrics,
    routing_sums,
)

__all__ = [
    "COLLAPSED_SHARE",
    "NO_LOSSES",
    "Balancer",
    "Experts",
    "Guard",
    "LinearRule",
    "LossWeights",
    "PidRule",
    "QuantileRule",
    "RmsRule",
    "RoutingStats",
    "SignRule",
    "SmebuGainRule",
    "SmebuQuantileRule",
    "SmebuRule",
    "Verdict",
    "attach_loss",
    "batch_balance_loss",
    "centered",
    "collect_required",
    "collects_required",
    "count_in_backward",
    "register_routing_buffers",
    "router_loss",
    "router_z_loss",
    "routing_metrics",
    "routing_sums",
    "sequence_balance_loss",
    "switch_balance_loss",
]
