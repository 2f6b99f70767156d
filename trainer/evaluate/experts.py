"""Which experts does each domain use? One number for each layer says how much they are told apart.

A domain is a part of an evaluation: a named set, or one source of it.

Letters: D domains, M MoE layers, E experts.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.evaluate.kernel import Measured


def expert_use(measured: Sequence[Measured]) -> dict[str, Any]:
    """JSON of load, confidence and, for two domains or more, specialisation and overlap.

    load: for each domain and layer, the tokens of each expert in even shares; 1 is balanced.
    confidence: for each domain, the mean over layers and tokens of the largest gate's share of its token's
    gates: 1/K where the gates are equal, 1 where one expert has all.
    """
    with_tokens = [one for one in measured if len(one.counts_ME) and one.tokens_M.sum() > 0]
    if not with_tokens:
        return {}
    shares_DME = torch.stack([shares(one.counts_ME) for one in with_tokens])
    names = [one.part.name for one in with_tokens]
    num_experts = shares_DME.shape[-1]
    use: dict[str, Any] = {
        "load": {
            name: rounded(shares_ME * num_experts) for name, shares_ME in zip(names, shares_DME, strict=True)
        },
        "confidence": {
            one.part.name: (one.confidence_M / one.tokens_M.clamp_min(1)).mean().item() for one in with_tokens
        },
    }
    if len(names) > 1:
        use["specialisation"] = rounded(specialisation(shares_DME))
        pairs = [(a, b) for a in range(len(names)) for b in range(a)]
        use["overlap"] = {
            f"{names[b]} | {names[a]}": overlap(shares_DME[a], shares_DME[b]).mean().item() for a, b in pairs
        }
    return use


def shares(counts_ME: Tensor) -> Tensor:
    """Of all tokens x K that a layer routed."""
    return counts_ME / counts_ME.sum(-1, keepdim=True).clamp_min(1)


def specialisation(shares_DME: Tensor) -> Tensor:
    """M numbers between 0 (all domains use the experts alike) and 1 (no two domains share an expert).

    The Jensen-Shannon divergence of the domains' shares, each domain of equal weight (Lin 1991, "Divergence
    measures based on the Shannon entropy", eq. 5.1), over its largest value, log D. It is the mutual
    information between a token's domain and an expert it visits.
    """
    entropy_of_mean_M = torch.special.entr(shares_DME.mean(0)).sum(-1)
    mean_entropy_M = torch.special.entr(shares_DME).sum(-1).mean(0)
    return (entropy_of_mean_M - mean_entropy_M) / math.log(len(shares_DME))


def overlap(a_ME: Tensor, b_ME: Tensor) -> Tensor:
    """M numbers: the share of the choices that two domains have in common, 1 - their total variation."""
    return torch.minimum(a_ME, b_ME).sum(-1)


def rounded(values: Tensor) -> list:
    return [round(x, 4) if not isinstance(x, list) else [round(y, 4) for y in x] for x in values.tolist()]
