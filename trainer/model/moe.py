"""How do tokens reach their experts, and what do these return?

torchtitan's all-to-all dispatcher and grouped GEMM, with what pretraining needs besides: experts in float32
or bfloat16, sums over a token's experts by gathering (deterministic, and no atomics) instead of scattering.

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
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import (
    AllToAllDispatchMetadata,
    AllToAllTokenDispatcher,
    LocalDispatchMetadata,
    LocalTokenDispatcher,
)
from torchtitan.protocols.module import Module

from trainer.balance import NO_LOSSES, LossWeights, register_routing_buffers
from trainer.model.router import Router, count_and_balance, use_sums


class Experts(GroupedExperts):
    """SwiGLU experts as one grouped GEMM each for gate, up and down, in `dtype` (None: the input's).

    Each grouped GEMM is `self._grouped_mm`, torchtitan's seam: a subclass that overrides the method, as a
    quantisation converter of torchtitan makes one, computes every product of the experts, on every device.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        dtype: torch.dtype | None = None

    def __init__(self, config: Config):
        super().__init__(config)
        self.dtype = config.dtype

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        dtype = self.dtype or x_RD.dtype
        w1_EFD, w2_EDF, w3_EFD = (
            (w.to_local() if isinstance(w, DTensor) else w).to(dtype)
            for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        )
        is_cpu, is_own = x_RD.device.type == "cpu", type(self)._grouped_mm is GroupedExperts._grouped_mm
        if is_cpu and is_own and dtype == torch.float32 and not torch.compiler.is_compiling():
            return _SwigluLoop.apply(x_RD.to(dtype), w1_EFD, w2_EDF, w3_EFD, num_tokens_per_expert_E).to(
                x_RD.dtype
            )
        ends_E = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        gate_RF = self._grouped_mm(A=x_RD.to(dtype), B_t=w1_EFD.mT, offs=ends_E)
        up_RF = self._grouped_mm(A=x_RD.to(dtype), B_t=w3_EFD.mT, offs=ends_E)
        return self._grouped_mm(A=F.silu(gate_RF) * up_RF, B_t=w2_EDF.mT, offs=ends_E).to(x_RD.dtype)


class _SwigluLoop(torch.autograd.Function):
    """The same on a CPU, expert after expert, for rows of any size: a grouped GEMM needs rows of 16 bytes.

    The loop stands in for the seam's own method only, never for an override. Its speed is 0.91 to 1.07 times
    that of three grouped GEMMs, which are loops over experts on a CPU, too (docs/benchmarks/train_step.md).
    Results may differ from theirs in the last bit.
    """

    @staticmethod
    def forward(
        ctx, x_RD: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, num_tokens_per_expert_E: Tensor
    ) -> Tensor:
        ctx.sizes = num_tokens_per_expert_E.tolist()
        gate_RF, up_RF = x_RD.new_empty(2, len(x_RD), w1_EFD.shape[1])
        out_RD = torch.empty_like(x_RD)
        rows = _parts(ctx.sizes, x_RD, gate_RF, up_RF, out_RD)
        for x, gate, up, out, w1, w2, w3 in zip(*rows, w1_EFD, w2_EDF, w3_EFD, strict=True):
            torch.mm(x, w1.T, out=gate)
            torch.mm(x, w3.T, out=up)
            torch.mm(F.silu(gate).mul_(up), w2.T, out=out)
        ctx.save_for_backward(x_RD, gate_RF, up_RF, w1_EFD, w2_EDF, w3_EFD)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_RD: Tensor):
        x_RD, gate_RF, up_RF, w1_EFD, w2_EDF, w3_EFD = ctx.saved_tensors
        grad_x_RD = torch.empty_like(x_RD)
        grads = tuple(torch.empty_like(w) for w in (w1_EFD, w2_EDF, w3_EFD))
        rows = _parts(ctx.sizes, x_RD, gate_RF, up_RF, grad_out_RD, grad_x_RD)
        for x, gate, up, grad_out, grad_x, w1, w2, w3, g1, g2, g3 in zip(
            *rows, w1_EFD, w2_EDF, w3_EFD, *grads, strict=True
        ):
            silu = F.silu(gate)
            grad_hidden = grad_out @ w2
            torch.mm(grad_out.T, silu * up, out=g2)
            grad_gate = torch.ops.aten.silu_backward(grad_hidden * up, gate)
            grad_up = grad_hidden.mul_(silu)
            torch.mm(grad_gate.T, x, out=g1)
            torch.mm(grad_up.T, x, out=g3)
            torch.mm(grad_gate, w1, out=grad_x)
            grad_x.addmm_(grad_up, w3)
        return grad_x_RD, *grads, None


def _parts(sizes: list[int], *tensors: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Each tensor's rows, cut by expert."""
    return tuple(tensor.split(sizes) for tensor in tensors)


class _Spread(torch.autograd.Function):
    """x_TD -> its K copies, sorted by expert; backward sums the copies' gradients."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.inverse_TK = inverse_N.view(len(x_TD), -1)
        return x_TD.index_select(0, order_N // ctx.inverse_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor):
        return gather_sum(grad_ND, ctx.inverse_TK), None, None


class _WeightedSum(torch.autograd.Function):
    """rows_ND sorted by expert, scores_TK -> sum over each token's K rows; float32 inside."""

    @staticmethod
    def forward(ctx, rows_ND: Tensor, scores_TK: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, scores_TK, inverse_N)
        return gather_sum(rows_ND, inverse_N.view_as(scores_TK), scores_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        rows_ND, scores_TK, inverse_N = ctx.saved_tensors
        order_N = invert(inverse_N)
        grad_ND = grad_TD.index_select(0, order_N // scores_TK.shape[1]).float()
        grad_scores_N = torch.bmm(rows_ND.float().unsqueeze(1), grad_ND.unsqueeze(2)).flatten()
        grad_rows_ND = grad_ND.mul_(scores_TK.flatten().index_select(0, order_N).unsqueeze(1))
        return (
            grad_rows_ND.to(rows_ND.dtype),
            grad_scores_N.index_select(0, inverse_N).view_as(scores_TK),
            None,
        )


def gather_sum(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """out_T = sum over k of weights_Tk rows[index_Tk], in float32; without atomics, so the same bits every
    time.
    """
    if rows_ND.device.type == "cpu":
        return F.embedding_bag(index_TK, rows_ND.float(), mode="sum", per_sample_weights=weights_TK).to(
            rows_ND.dtype
        )
    rows_TKD = rows_ND.index_select(0, index_TK.flatten()).unflatten(0, index_TK.shape).float()
    if weights_TK is None:
        return rows_TKD.sum(1).to(rows_ND.dtype)
    return torch.bmm(weights_TK.unsqueeze(1), rows_TKD).squeeze(1).to(rows_ND.dtype)


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

    def _local_reorder(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        order_N = torch.argsort(topk_expert_ids_TK.flatten(), stable=True)
        inverse_N = invert(order_N)
        return _Spread.apply(x_TD, order_N, inverse_N), inverse_N, topk_scores_TK

    def combine(
        self,
        routed_output_RD: Tensor,
        metadata: AllToAllDispatchMetadata | LocalDispatchMetadata,
        x_TD: Tensor,
    ) -> Tensor:
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

    Its routing buffers are those of `balance.register_routing_buffers`. In training the backward pass counts
    what was routed (padding is not counted) and adds the gradient of the balance losses.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        router: Router.Config
        routed_experts: RoutedExperts.Config
        shared_experts: FeedForward.Config | None
        loss_weights: LossWeights = NO_LOSSES

    def __init__(self, config: Config):
        super().__init__()
        refuse_other_dispatcher(config.routed_experts.token_dispatcher)
        self.router = config.router.build()
        self.routed_experts = config.routed_experts.build()
        self.shared_experts = config.shared_experts.build() if config.shared_experts else None
        self.loss_weights, self.top_k = config.loss_weights, config.router.top_k
        self.use_S: Tensor | None = None  # in an evaluation: see router.use_sums
        register_routing_buffers(self, config.router.num_experts)

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """int64, this rank's training tokens since the Balancer last took them."""
        return self.routing_sums_S[: len(self.expert_bias_E)]

    def forward(self, x_BLD: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        """valid_BL: False where a token is padding; None: there is none."""
        routing = self.router(x_BLD, self.expert_bias_E)
        routed_E = torch.zeros_like(self.expert_bias_E, dtype=torch.int64)
        routed_E.scatter_add_(0, routing.ids_BLK.flatten(), torch.ones_like(routing.ids_BLK.flatten()))
        gates_BLK = count_and_balance(self, routing, valid_BL) if self.training else routing.gates_BLK
        if self.use_S is not None:
            self.use_S += use_sums(routing, valid_BL)
        out_BLD = self.routed_experts(x_BLD, gates_BLK, routing.ids_BLK, routed_E)
        return out_BLD if self.shared_experts is None else out_BLD + self.shared_experts(x_BLD)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.expert_bias_E.zero_()
        self.routing_sums_S.zero_()
        self.load_E.fill_(1)
        self.label_share.fill_(1)


def refuse_other_dispatcher(config: LocalTokenDispatcher.Config) -> None:
    """torchtitan's quantisation converters exchange the dispatcher for one that scatters, without a word.

    Raises: TypeError.
    """
    if not isinstance(config, TokenDispatcher.Config):
        raise TypeError(
            f"token_dispatcher={type(config).__qualname__}: the experts need a TokenDispatcher of "
            "trainer/model/moe.py, which gathers and so gives the same bits every time; convert the experts "
            "alone, and pad in a subclass of TokenDispatcher"
        )
