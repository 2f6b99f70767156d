"""What is counted while a layer routes, and what can be read from the sums?

Letters: M MoE layers, E experts, K experts per token, B sequences, L tokens each, T = B L, S sums of a layer.

All that a rule may see of an optimizer step is one int64 vector per layer, summed over ranks and
microbatches:

    counts_E     tokens sent to each expert                                                 [tokens]
    margins_W    chosen experts by their margin over the runner-up, in W logarithmic bins   [experts]
    logits       sum over tokens of the mean squared router logit, in units of 2^-20        [1]
    required_EH  tokens by the bias that the expert would have needed, in H linear bins     [tokens]
                 (only for rules that ask: E times more work than all the rest)

Integers, so the sums are exact and no rule can tell how the batch was split. The runner-up of a token is its
(K+1)-th largest score + bias, alpha. margin = score + bias - alpha; required bias = alpha - score.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.balance.losses import as_they_are

BINS_PER_OCTAVE, LOWEST_OCTAVE = 4, -20  # of margins: from 2^-20 ...
# ... to 2; what lies outside counts in the first or last bin
NUM_MARGINS = (1 - LOWEST_OCTAVE) * BINS_PER_OCTAVE
# H, over [min bias - 1, max bias + 1]: scores lie in (0, 1), so every required bias does, too
NUM_REQUIRED = 1000
LOGIT_UNIT = 2.0**-20
MAX_SQUARE = 2.0**16  # of a token's mean squared logit, nan too: the sum of 2^26 such tokens fits into int64
# The gain is read from the smallest margins, up to the first bin edge that this many chosen experts per token
# lie below.
DENSITY_WINDOW = 0.25


def register_routing_buffers(layer: nn.Module, num_experts: int) -> None:
    """Gives an MoE layer what a Balancer asks of it.

    expert_bias_E: added to the scores when the top K are chosen; in the checkpoint.
    routing_sums_S: this rank's sums since the Balancer last took them.
    load_E: of the last optimizer step, all ranks, 1 = even share; for the global-batch loss.
    label_share: factor on the router losses of a step (docs/numerics.md, "Masked labels"); 1 without masks.
    total: sums counts over the ranks that share rows; here nobody does.
    """
    layer.total = as_they_are
    layer.register_buffer("expert_bias_E", torch.zeros(num_experts, dtype=torch.float32))
    layer.register_buffer(
        "routing_sums_S", torch.zeros(num_sums(num_experts), dtype=torch.int64), persistent=False
    )
    layer.register_buffer("load_E", torch.ones(num_experts, dtype=torch.float32), persistent=False)
    layer.register_buffer("label_share", torch.ones((), dtype=torch.float32), persistent=False)


def num_sums(num_experts: int, *, required: bool = False) -> int:
    return num_experts + NUM_MARGINS + 1 + (num_experts * NUM_REQUIRED if required else 0)


def collects_required(layer: nn.Module) -> bool:
    return layer.routing_sums_S.numel() > num_sums(layer.expert_bias_E.numel())


def collect_required(layer: nn.Module) -> None:
    """Makes a layer count required biases too; what it has counted since the last step is dropped."""
    size = num_sums(layer.expert_bias_E.numel(), required=True)
    layer.routing_sums_S = layer.routing_sums_S.new_zeros(size)


@torch.no_grad()
def routing_sums(
    scores_BLE: Tensor,
    logits_BLE: Tensor,
    ids_BLK: Tensor,
    bias_E: Tensor,
    valid_BL: Tensor | None = None,
    *,
    required: bool = False,
) -> Tensor:
    """The vector S of one microbatch. valid_BL: False for padding, which is left out; None: no padding."""
    num_experts, top_k = scores_BLE.shape[-1], ids_BLK.shape[-1]
    scores_TE, ids_TK = scores_BLE.detach().view(-1, num_experts), ids_BLK.view(-1, top_k)
    ones_T1 = torch.ones_like(ids_TK[:, :1]) if valid_BL is None else valid_BL.reshape(-1, 1).long()
    choice_TE = scores_TE + bias_E
    chosen_TK = choice_TE.gather(1, ids_TK)
    # -inf where K = E: no runner-up
    alpha_T1 = choice_TE.scatter_(1, ids_TK, -math.inf).amax(1, keepdim=True)
    squares_T1 = logits_BLE.detach().view(-1, num_experts).square().mean(1, keepdim=True)
    squares_T1 = squares_T1.nan_to_num_(nan=MAX_SQUARE).clamp_(max=MAX_SQUARE)
    parts = [
        _histogram(ids_TK, ones_T1, num_experts),
        _histogram(margin_bin(chosen_TK - alpha_T1), ones_T1, NUM_MARGINS),
        ((squares_T1.double() / LOGIT_UNIT).round().long() * ones_T1).sum(0),
    ]
    if required:
        bins_TE = required_bin(alpha_T1 - scores_TE, bias_E)
        bins_TE += torch.arange(
            0, num_experts * NUM_REQUIRED, NUM_REQUIRED, out=bins_TE.new_empty(num_experts)
        )
        if bins_TE.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU the host would wait
            there = bins_TE if valid_BL is None else bins_TE[valid_BL.flatten()]
            parts.append(torch.bincount(there.flatten(), minlength=num_experts * NUM_REQUIRED))
        else:
            parts.append(_histogram(bins_TE, ones_T1, num_experts * NUM_REQUIRED))
    return torch.cat(parts)


def _histogram(bins_TN: Tensor, weights_T1: Tensor, num_bins: int) -> Tensor:
    counts = weights_T1.new_zeros(num_bins)
    return counts.scatter_add_(0, bins_TN.flatten().long(), weights_T1.expand_as(bins_TN).flatten())


def margin_bin(margin: Tensor) -> Tensor:
    return (
        ((margin.log2() - LOWEST_OCTAVE) * BINS_PER_OCTAVE)
        .floor()
        .nan_to_num_(0)
        .clamp_(0, NUM_MARGINS - 1)
        .long()
    )


def required_bin(required_TE: Tensor, bias_E: Tensor) -> Tensor:
    """int32, which is cast to in a fifth of the time; takes the memory of `required_TE`."""
    low, high = bias_E.amin() - 1, bias_E.amax() + 1
    required_TE.sub_(low).mul_(NUM_REQUIRED / (high - low))
    return required_TE.nan_to_num_(0).clamp_(0, NUM_REQUIRED - 1).int()  # from 0 on, to cut off is the floor


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Sums over one optimizer step, all ranks and microbatches; int64: exact at any batch size."""

    counts_ME: Tensor
    top_k: int = 1
    bias_ME: Tensor | None = None  # under which it was routed
    margins_MW: Tensor | None = None
    logits_M1: Tensor | None = None
    required_MEH: Tensor | None = None

    @classmethod
    def from_sums(cls, sums_MS: Tensor, bias_ME: Tensor, *, top_k: int) -> "RoutingStats":
        num_experts = bias_ME.shape[1]
        counts, margins, logits, rest = sums_MS.split(
            [num_experts, NUM_MARGINS, 1, sums_MS.shape[1] - num_sums(num_experts)], dim=1
        )
        required = rest.unflatten(1, (num_experts, NUM_REQUIRED)) if rest.numel() else None
        return cls(counts, top_k, bias_ME, margins, logits, required)

    @property
    def mean_M1(self) -> Tensor:
        return self.counts_ME.double().mean(-1, keepdim=True)

    @property
    def tokens_M1(self) -> Tensor:
        return self.counts_ME.sum(-1, keepdim=True).double() / self.top_k

    @property
    def load_ME(self) -> Tensor:
        """Relative to the even share; 0 for a layer that saw no token; float64."""
        return self.counts_ME / self.mean_M1.clamp_min(1e-9)

    @property
    def violation_ME(self) -> Tensor:
        """(mean - n_i) / mean, 0 for a layer that saw no token (arXiv:2602.17004, eq. 23); float32."""
        return ((self.mean_M1 - self.counts_ME) / self.mean_M1.clamp_min(1e-9)).float()

    @property
    def logit_rms_M(self) -> Tensor:
        """Root mean square of the router's logits over tokens and experts; float64."""
        return (self.logits_M1 * LOGIT_UNIT / self.tokens_M1.clamp_min(1)).sqrt().squeeze(-1)

    @property
    def gain_M(self) -> Tensor:
        """G = -dv/db [1/score]: by how much a bias moves its expert's violation; float32; 0 without tokens.

        An expert's load changes by the tokens that cross the runner-up: G = (E/K) x density of the margin at
        0 = chosen experts within h of the runner-up / (tokens K h). h: the first edge of a bin with enough of
        them.
        """
        seen_MW = self.margins_MW.cumsum(-1)
        first_M1 = (seen_MW >= DENSITY_WINDOW * self.tokens_M1).int().argmax(-1, keepdim=True)
        h_M1 = 2.0 ** ((first_M1 + 1).double() / BINS_PER_OCTAVE + LOWEST_OCTAVE)
        gain_M1 = seen_MW.gather(-1, first_M1) / (self.tokens_M1.clamp_min(1) * self.top_k * h_M1)
        return gain_M1.squeeze(-1).float()

    @property
    def required_quantile_ME(self) -> Tensor:
        """The bias at which an expert's score would have reached the runner-up's in K/E of the tokens;
        float32.

        Exact for experts with more than their share. One with less must beat the K-th score, not the
        (K+1)-th: where it lost by little it is asked for too small a bias, as in the published rule.

        Linear within a bin; a layer that saw no token keeps its biases.
        """
        if self.required_MEH is None:
            raise ValueError("no required biases were counted; the rule must set needs_required = True")
        low_M1 = self.bias_ME.amin(-1, keepdim=True) - 1
        high_M1 = self.bias_ME.amax(-1, keepdim=True) + 1
        seen_MEH = self.required_MEH.cumsum(-1)
        wanted_ME1 = self.mean_M1.unsqueeze(-1).expand_as(seen_MEH[..., :1])  # T K / E
        bin_ME1 = torch.searchsorted(seen_MEH, wanted_ME1.ceil().long())
        inside_ME1 = self.required_MEH.gather(-1, bin_ME1)
        part_ME = (
            (wanted_ME1 - (seen_MEH.gather(-1, bin_ME1) - inside_ME1)) / inside_ME1.clamp_min(1)
        ).squeeze(-1)
        quantile_ME = low_M1 + (high_M1 - low_M1) * (bin_ME1.squeeze(-1) + part_ME) / NUM_REQUIRED
        return torch.where(self.mean_M1 > 0, quantile_ME.float(), self.bias_ME)


def centered(step_ME: Tensor) -> Tensor:
    """Top-k ignores a shift common to all experts, so none may build up (arXiv:2602.17004, eq. 22, 26)."""
    return step_ME - step_ME.mean(-1, keepdim=True)


def routing_metrics(stats: RoutingStats, bias_ME: Tensor) -> dict[str, Tensor]:
    """Scalars (float64) of one step; every violation and load is relative to the even share.

    floor: MaxVio that independent tokens would show by chance alone, sqrt(2 ln E (1 - K/E) / mean count);
    figures from different batch sizes are comparable only above it.
    """
    num_experts = bias_ME.shape[-1]
    load_ME = stats.load_ME
    max_violation_M = load_ME.amax(-1) - 1  # MaxVio (arXiv:2602.17004, eq. 42)
    floor_M1 = (
        2 * math.log(num_experts) * (1 - stats.top_k / num_experts) / stats.mean_M1.clamp_min(1e-9)
    ).sqrt()
    entropy_M = torch.special.entr(load_ME / num_experts).sum(-1) / max(math.log(num_experts), 1e-9)
    metrics = {
        "balance/max_violation": max_violation_M.mean(),
        "balance/max_violation_worst_layer": max_violation_M.amax(),
        "balance/floor": floor_M1.mean(),
        "balance/min_load": load_ME.amin(),
        "balance/dead_experts": (stats.counts_ME == 0).sum().double(),
        "balance/entropy": entropy_M.mean(),
        "balance/bias_rms": bias_ME.double().square().mean().sqrt(),
    }
    if stats.margins_MW is not None:
        metrics["balance/gain"] = stats.gain_M.double().mean()
        metrics["balance/logit_rms"] = stats.logit_rms_M.mean()
    return metrics
