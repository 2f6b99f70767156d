"""Which experts does a token visit, and what do they return?

torchtitan's router, all-to-all dispatcher and grouped GEMM, with what pretraining needs besides: exact
integer counts, balance losses attached to the router, experts in float32 or bfloat16, sums over a token's
experts by gathering (deterministic, and no atomics) instead of scattering.

Letters: B sequences, L tokens each, T = B L, D model dim, F expert hidden dim, E experts, K per token,
N = T K routed slots in token order, R routed slots that reach this rank's experts, sorted by expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import AllToAllDispatchMetadata, AllToAllTokenDispatcher, LocalDispatchMetadata
from torchtitan.protocols.module import Module

from trainer.balance import attach_loss, count_in_backward, sequence_balance_loss


class Float32Linear(Linear):
    """The router's gate. float32 even under bfloat16 weights: explicit, autocast to float32 is a no-op on CPU."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float())


class Experts(GroupedExperts):
    """SwiGLU experts as one grouped GEMM each for gate, up and down, in `dtype` (None: the input's)."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        dtype: torch.dtype | None = None

    def __init__(self, config: Config):
        super().__init__(config)
        self.dtype = config.dtype

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        dtype = self.dtype or x_RD.dtype
        w1_EFD, w2_EDF, w3_EFD = (
            (w.to_local() if isinstance(w, DTensor) else w).to(dtype) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        )
        ends_E = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        gate_RF = torch._grouped_mm(x_RD.to(dtype), w1_EFD.mT, offs=ends_E)
        up_RF = torch._grouped_mm(x_RD.to(dtype), w3_EFD.mT, offs=ends_E)
        return torch._grouped_mm(F.silu(gate_RF) * up_RF, w2_EDF.mT, offs=ends_E).to(x_RD.dtype)


class _Spread(torch.autograd.Function):
    """x_TD -> its K copies, sorted by expert; backward gathers the copies' gradients and sums them."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.top_k = len(order_N) // len(x_TD)
        return x_TD.index_select(0, order_N // ctx.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor):
        (inverse_N,) = ctx.saved_tensors
        return grad_ND.index_select(0, inverse_N).unflatten(0, (-1, ctx.top_k)).sum(1), None, None


class _WeightedSum(torch.autograd.Function):
    """rows_ND sorted by expert, scores_TK -> sum over each token's K rows; float32 inside."""

    @staticmethod
    def forward(ctx, rows_ND: Tensor, scores_TK: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, scores_TK, inverse_N)
        rows_TKD = rows_ND.index_select(0, inverse_N).unflatten(0, scores_TK.shape)
        return torch.bmm(scores_TK.unsqueeze(1), rows_TKD.float()).squeeze(1).to(rows_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        rows_ND, scores_TK, inverse_N = ctx.saved_tensors
        rows_TKD = rows_ND.index_select(0, inverse_N).unflatten(0, scores_TK.shape)
        grad_scores_TK = torch.bmm(rows_TKD.float(), grad_TD.float().unsqueeze(2)).squeeze(2)
        order_N = invert(inverse_N)
        grad_rows_ND = grad_TD.index_select(0, order_N // scores_TK.shape[1])
        grad_rows_ND = grad_rows_ND * scores_TK.flatten().index_select(0, order_N).unsqueeze(1)
        return grad_rows_ND.to(rows_ND.dtype), grad_scores_TK, None


def invert(permutation_N: Tensor) -> Tensor:
    slots_N = torch.arange(len(permutation_N), device=permutation_N.device)
    return torch.empty_like(permutation_N).scatter_(0, permutation_N, slots_N)


class TokenDispatcher(AllToAllTokenDispatcher):
    """torchtitan's all-to-all (and its local path without expert parallelism), gathering in both directions.

    The metadata's two fields hold the inverse of the sort and the scores in token order.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        pass

    def _local_reorder(self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order_N = torch.argsort(topk_expert_ids_TK.flatten(), stable=True)
        inverse_N = invert(order_N)
        return _Spread.apply(x_TD, order_N, inverse_N), inverse_N, topk_scores_TK

    def combine(self, routed_output_RD: Tensor, metadata: AllToAllDispatchMetadata | LocalDispatchMetadata, x_TD: Tensor) -> Tensor:
        if isinstance(metadata, AllToAllDispatchMetadata):
            rows_RD = self._unpermute(routed_output_RD, metadata.input_shape, metadata.permuted_indices)
            routed_output_RD = self._combine_token_exchange(
                rows_RD, self.ep_mesh.get_group(), metadata.input_splits, metadata.output_splits
            )
        return _WeightedSum.apply(
            routed_output_RD, metadata.topk_scores_experts_sorted_N, metadata.token_indices_experts_sorted_N
        )


class MoE(Module):
    """Router, routed experts and shared experts (arXiv:2602.17004, eq. 15-18).

    Buffers: `expert_bias_E` (float32, moved by the Balancer, in the checkpoint) and `tokens_per_expert_E`
    (int64, this rank's training tokens since the Balancer last took them; padding is not counted).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        router: TokenChoiceTopKRouter.Config
        routed_experts: RoutedExperts.Config
        shared_experts: FeedForward.Config | None
        sequence_loss_weight: float = 0.0

    def __init__(self, config: Config):
        super().__init__()
        self.router = config.router.build()
        self.routed_experts = config.routed_experts.build()
        self.shared_experts = config.shared_experts.build() if config.shared_experts else None
        self.sequence_loss_weight = config.sequence_loss_weight
        self.top_k = config.router.top_k
        self.register_buffer("expert_bias_E", torch.zeros(config.router.num_experts, dtype=torch.float32))
        self.register_buffer("tokens_per_expert_E", torch.zeros_like(self.expert_bias_E, dtype=torch.int64), persistent=False)

    def forward(self, x_BLD: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        """valid_BL: False where a token is padding; None: there is none."""
        topk_scores_BLK, topk_ids_BLK, scores_BLE = self.router(x_BLD, self.expert_bias_E)
        routed_E = self.count(topk_ids_BLK, None)
        if self.training:
            counts_E = routed_E if valid_BL is None else self.count(topk_ids_BLK, valid_BL)
            topk_scores_BLK = count_in_backward(topk_scores_BLK, counts_E, self.tokens_per_expert_E)
            if self.sequence_loss_weight:
                loss = sequence_balance_loss(scores_BLE, topk_ids_BLK, valid_BL)
                topk_scores_BLK = attach_loss(topk_scores_BLK, self.sequence_loss_weight * loss)
        out_BLD = self.routed_experts(x_BLD, topk_scores_BLK, topk_ids_BLK, routed_E)
        return out_BLD if self.shared_experts is None else out_BLD + self.shared_experts(x_BLD)

    def count(self, topk_ids_BLK: Tensor, valid_BL: Tensor | None) -> Tensor:
        """Tokens per expert, int64."""
        ones = torch.ones_like(topk_ids_BLK) if valid_BL is None else valid_BL.unsqueeze(-1).expand_as(topk_ids_BLK).long()
        return torch.zeros_like(self.tokens_per_expert_E).scatter_add_(0, topk_ids_BLK.flatten(), ones.flatten())

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.expert_bias_E.zero_()
        self.tokens_per_expert_E.zero_()
