"""How do tokens reach their experts and come back?

torchtitan's all-to-all, with sums over a token's experts by gathering (deterministic, and no atomics) instead
of scattering; with rows of each expert padded for a grouped GEMM that scales blocks of rows; the same on one
rank's CPU, in fewer passes; or a library of its own for both directions.

Letters: T tokens, D model dim, E experts, K per token, N = T K routed slots in token order, R routed slots
that reach this rank's experts, sorted by expert, P of them with padding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchtitan.models.common.token_dispatcher import (
    AllToAllDispatchMetadata,
    AllToAllTokenDispatcher,
    DeepEPTokenDispatcher,
    HybridEPTokenDispatcher,
    LocalDispatchMetadata,
    LocalTokenDispatcher,
)

from trainer.model.compiled import compiled

BLOCK = 512  # rows of two float32 tensors of 256 columns that 1 MiB holds


class _Spread(torch.autograd.Function):
    """x_TD -> its K copies, sorted by expert: in row r that of token_N[r], so that place_TK are a token's
    rows; backward sums their gradients.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, token_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor):
        (place_TK,) = ctx.saved_tensors
        return gather_sum(grad_ND, place_TK), None, None


class _Permute(torch.autograd.Function):
    """rows[index], a permutation, gathering in backward, too: indexing's own backward adds up, which sorts
    on a GPU.
    """

    @staticmethod
    def forward(ctx, rows_RD: Tensor, index_R: Tensor) -> Tensor:
        ctx.save_for_backward(index_R)
        return rows_RD.index_select(0, index_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD: Tensor):
        (index_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, invert(index_R)), None


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
        spread = _spread_gradient_cpu if rows_ND.device.type == "cpu" else spread_gradient
        grad_rows_ND, grad_scores_N = spread(rows_ND, grad_TD, scores_TK, invert(inverse_N))
        return grad_rows_ND, grad_scores_N.index_select(0, inverse_N).view_as(scores_TK), None


def _spread_gradient_cpu(
    rows_ND: Tensor, grad_TD: Tensor, scores_TK: Tensor, order_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of rows_ND and of their scores, in operators that are fast on a CPU."""
    grad_ND = grad_TD.index_select(0, order_N // scores_TK.shape[1]).float()
    grad_scores_N = torch.bmm(rows_ND.float().unsqueeze(1), grad_ND.unsqueeze(2)).flatten()
    grad_rows_ND = grad_ND.mul_(scores_TK.flatten().index_select(0, order_N).unsqueeze(1))
    return grad_rows_ND.to(rows_ND.dtype), grad_scores_N


@compiled
def spread_gradient(
    rows_ND: Tensor, grad_TD: Tensor, scores_TK: Tensor, order_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as one expression, which becomes one kernel: no float32 copy of the rows is in memory."""
    grad_ND = grad_TD.index_select(0, order_N // scores_TK.shape[1]).float()
    scores_N1 = scores_TK.flatten().index_select(0, order_N).unsqueeze(1)
    return (grad_ND * scores_N1).to(rows_ND.dtype), (rows_ND.float() * grad_ND).sum(1)


def gather_sum(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """out_T = sum over k of weights_Tk rows[index_Tk], in float32; without atomics, so the same bits every
    time.
    """
    if rows_ND.device.type != "cpu":
        return gather_sum_in_order(rows_ND, index_TK, weights_TK)
    if weights_TK is not None and weights_TK.dtype != rows_ND.dtype:  # it wants weights in the rows' dtype
        high_TK = weights_TK.to(rows_ND.dtype)  # each is a sum of two, to 16 bits in bfloat16
        weights_TK = torch.cat([high_TK, (weights_TK - high_TK).to(rows_ND.dtype)], dim=1)
        index_TK = torch.cat([index_TK, index_TK], dim=1)
    return F.embedding_bag(index_TK, rows_ND, mode="sum", per_sample_weights=weights_TK)


@compiled
def gather_sum_in_order(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """The same, k after k: nothing is larger than the sum, and compiled it is one kernel."""
    total_TD: Tensor | None = None
    for k, index_T in enumerate(index_TK.unbind(1)):
        row_TD = rows_ND.index_select(0, index_T).float()
        if weights_TK is not None:
            row_TD = row_TD * weights_TK[:, k : k + 1]
        total_TD = row_TD if total_TD is None else total_TD + row_TD
    return total_TD.to(rows_ND.dtype)


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
        rows_ND = _Spread.apply(x_TD, order_N // self.top_k, inverse_N.view_as(topk_scores_TK))
        return rows_ND, inverse_N, topk_scores_TK

    def _permute(
        self, routed_input_RD: Tensor, num_global_tokens_per_local_expert_E: Tensor
    ) -> tuple[torch.Size, Tensor, Tensor, Tensor]:
        sizes_E = num_global_tokens_per_local_expert_E
        # torchtitan works the permutation out, and moves rows of no columns
        _, _, index_R, sizes_e = super()._permute(routed_input_RD[:, :0], sizes_E)
        return routed_input_RD.shape, _Permute.apply(routed_input_RD, index_R), index_R, sizes_e

    def _unpermute(self, routed_output_RD: Tensor, input_shape: torch.Size, permuted_indices: Tensor):
        return _Permute.apply(routed_output_RD, invert(permuted_indices))

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


class _Pad(torch.autograd.Function):
    """rows_RD -> rows_PD, row r at place_R[r], zeros elsewhere; backward takes the places' gradients."""

    @staticmethod
    def forward(ctx, rows_RD: Tensor, place_R: Tensor, num_places: int) -> Tensor:
        ctx.save_for_backward(place_R)
        return rows_RD.new_zeros(num_places, rows_RD.shape[1]).index_copy_(0, place_R, rows_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_PD: Tensor):
        (place_R,) = ctx.saved_tensors
        return grad_PD.index_select(0, place_R), None, None


class _Unpad(torch.autograd.Function):
    """rows_PD -> rows_RD, the other way round."""

    @staticmethod
    def forward(ctx, rows_PD: Tensor, place_R: Tensor) -> Tensor:
        ctx.save_for_backward(place_R)
        ctx.num_places = len(rows_PD)
        return rows_PD.index_select(0, place_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD: Tensor):
        (place_R,) = ctx.saved_tensors
        grad_PD = grad_RD.new_zeros(ctx.num_places, grad_RD.shape[1]).index_copy_(0, place_R, grad_RD)
        return grad_PD, None


def padding(sizes_e: Tensor, num_rows: int, multiple: int) -> tuple[Tensor, Tensor, int]:
    """Each expert's rows with padding, how far its own move for that of those before it, and how many rows
    there are with the most padding there can be.
    """
    padded_e = (sizes_e + multiple - 1) // multiple * multiple
    shift_e = (padded_e.cumsum(0) - padded_e) - (sizes_e.cumsum(0) - sizes_e)
    most = num_rows + len(sizes_e) * (multiple - 1)
    return padded_e, shift_e, -(-most // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class PaddedMetadata:
    inner: AllToAllDispatchMetadata | LocalDispatchMetadata
    place_R: Tensor  # of each row among those with padding


class PaddedTokenDispatcher(TokenDispatcher):
    """The same; each expert's rows are followed by zeros up to a multiple of `multiple`.

    There are rows for the most padding there can be, so that nobody waits for a GPU to count. What lies
    behind the last expert's rows is never read: not by the experts, and not on the way back.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenDispatcher.Config):
        multiple: int

    def __init__(self, config: Config):
        super().__init__(config)
        self.multiple = config.multiple

    def dispatch(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor, PaddedMetadata]:
        rows_RD, sizes_e, inner = super().dispatch(*args, **kwargs)
        padded_e, shift_e, num_places = padding(sizes_e, len(rows_RD), self.multiple)
        place_R = torch.arange(len(rows_RD), device=rows_RD.device)
        place_R = place_R + shift_e.repeat_interleave(sizes_e, output_size=len(rows_RD))
        rows_PD = _Pad.apply(rows_RD, place_R, num_places)
        return rows_PD, padded_e, PaddedMetadata(inner=inner, place_R=place_R)

    def combine(self, routed_output_RD: Tensor, metadata: PaddedMetadata, x_TD: Tensor) -> Tensor:
        rows_RD = _Unpad.apply(routed_output_RD, metadata.place_R)
        return super().combine(rows_RD, metadata.inner, x_TD)


class _PaddedSum(torch.autograd.Function):
    """_WeightedSum for rows with padding. In their places scores are 0, and so is the gradient that an expert
    gets there. Backward goes by blocks of rows, which a core's own cache holds in float32.
    """

    @staticmethod
    def forward(ctx, rows_PD: Tensor, scores_TK: Tensor, place_TK: Tensor, token_P: Tensor) -> Tensor:
        ctx.save_for_backward(rows_PD, scores_TK, place_TK, token_P)
        return gather_sum(rows_PD, place_TK, scores_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        rows_PD, scores_TK, place_TK, token_P = ctx.saved_tensors
        grad_TD, grad_rows_PD, place_N = grad_TD.float(), torch.empty_like(rows_PD), place_TK.flatten()
        scores_P = scores_TK.new_zeros(len(rows_PD)).scatter_(0, place_N, scores_TK.flatten())
        grad_scores = []
        blocks = (each.split(BLOCK) for each in (rows_PD, grad_rows_PD, scores_P.unsqueeze(1), token_P))
        for rows_pD, grad_rows_pD, scores_p1, token_p in zip(*blocks, strict=True):
            grad_pD = grad_TD.index_select(0, token_p)
            grad_scores.append(rows_pD.float().mul_(grad_pD).sum(1))
            grad_rows_pD.copy_(grad_pD.mul_(scores_p1))
        return grad_rows_PD, torch.cat(grad_scores).index_select(0, place_N).view_as(scores_TK), None, None


class LocalMetadata(NamedTuple):
    scores_TK: Tensor
    place_TK: Tensor  # of a token's copies among the rows with padding
    token_P: Tensor


class LocalPaddedDispatcher(LocalTokenDispatcher):
    """What PaddedTokenDispatcher does where no token changes its rank, with one gather in each direction: the
    rows of padding are copies of token 0.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(LocalTokenDispatcher.Config):
        multiple: int

    def __init__(self, config: Config):
        super().__init__(config)
        self.multiple = config.multiple

    def dispatch(
        self, x_TD: Tensor, scores_TK: Tensor, ids_TK: Tensor, sizes_E: Tensor
    ) -> tuple[Tensor, Tensor, LocalMetadata]:
        ids_N = ids_TK.flatten()
        padded_E, shift_E, num_places = padding(sizes_E, len(ids_N), self.multiple)
        place_N = invert(torch.argsort(ids_N, stable=True)) + shift_E[ids_N]
        token_N = torch.arange(len(ids_N), device=ids_N.device) // self.top_k
        token_P = token_N.new_zeros(num_places).scatter_(0, place_N, token_N)
        metadata = LocalMetadata(scores_TK, place_N.view_as(ids_TK), token_P)
        return _Spread.apply(x_TD, token_P, metadata.place_TK), padded_E, metadata

    def combine(self, routed_output_RD: Tensor, metadata: LocalMetadata, x_TD: Tensor) -> Tensor:
        return _PaddedSum.apply(routed_output_RD, *metadata)


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """Which dispatcher the MoE layers have. name: all_to_all | deepep | hybridep | local; multiple: of each
    expert's rows, 1: no padding; max_tokens: of a microbatch on one rank, which a library makes its buffer
    for.
    """

    name: str = "all_to_all"
    multiple: int = 1
    max_tokens: int | None = None

    def config(self, *, num_experts: int, top_k: int, dim: int) -> LocalTokenDispatcher.Config:
        shape = {"num_experts": num_experts, "top_k": top_k}
        library = {"num_max_tokens_per_rank": self.max_tokens, "hidden_dim": dim}
        if self.name == "deepep":
            return DeepEPTokenDispatcher.Config(**shape, **library)
        if self.name == "hybridep":
            pad = self.multiple if self.multiple > 1 else None
            return HybridEPTokenDispatcher.Config(**shape, **library, pad_multiple=pad)
        if self.name == "local":
            return LocalPaddedDispatcher.Config(**shape, multiple=self.multiple)
        if self.multiple > 1:
            return PaddedTokenDispatcher.Config(**shape, multiple=self.multiple)
        return TokenDispatcher.Config(**shape)


ALL_TO_ALL = Dispatch()
OURS = (
    TokenDispatcher.Config,
    LocalPaddedDispatcher.Config,
    DeepEPTokenDispatcher.Config,
    HybridEPTokenDispatcher.Config,
)


def refuse_other_dispatcher(config: LocalTokenDispatcher.Config) -> None:
    """torchtitan's quantisation converters exchange the dispatcher for one that scatters, without a word.

    Raises: TypeError.
    """
    if not isinstance(config, OURS):
        raise TypeError(
            f"token_dispatcher={type(config).__qualname__}: the experts need a TokenDispatcher of "
            "trainer/model/dispatch.py, which gathers and so gives the same bits every time; convert the "
            "experts alone, and pad with its PaddedTokenDispatcher"
        )
