"""What do experts return for the tokens that reach them, and what is an MoE layer?

torchtitan's grouped GEMM in float32, bfloat16 or MXFP8; its router and dispatcher are ours, see router.py and
dispatch.py.

Letters: B sequences, L tokens each, T = B L, D model dim, F expert hidden dim, E experts, K per token, R
routed slots that reach this rank's experts, sorted by expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.protocols.module import Module

from trainer.balance import NO_LOSSES, LossWeights, register_routing_buffers
from trainer.config import MXFP8
from trainer.model.dispatch import refuse_other_dispatcher
from trainer.model.router import Router, count_and_balance, use_sums


class Experts(GroupedExperts):
    """SwiGLU experts as one grouped GEMM each for gate, up and down, in `dtype` (None: the input's).

    Each grouped GEMM is `self._grouped_mm`, torchtitan's seam: a subclass that overrides the method, as a
    quantisation converter of torchtitan makes one, computes every product of the experts, on every device.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        dtype: torch.dtype | None = None
        clears_idle: bool = (
            False  # where a grouped GEMM may give weights of experts without tokens a gradient
        )

    def __init__(self, config: Config):
        super().__init__(config)
        self.dtype, self.clears_idle = config.dtype, config.clears_idle

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        dtype = self.dtype or x_RD.dtype
        w1_EFD, w2_EDF, w3_EFD = (
            (w.to_local() if isinstance(w, DTensor) else w).to(dtype)
            for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        )
        is_cpu, is_own = x_RD.device.type == "cpu", type(self)._grouped_mm is GroupedExperts._grouped_mm
        if is_cpu and is_own and not torch.compiler.is_compiling():
            return _SwigluLoop.apply(x_RD.to(dtype), w1_EFD, w2_EDF, w3_EFD, num_tokens_per_expert_E).to(
                x_RD.dtype
            )
        if self.clears_idle:
            w1_EFD, w2_EDF, w3_EFD = (
                _ClearIdle.apply(w, num_tokens_per_expert_E) for w in (w1_EFD, w2_EDF, w3_EFD)
            )
        ends_E = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        gate_RF = self._grouped_mm(A=x_RD.to(dtype), B_t=w1_EFD.mT, offs=ends_E)
        up_RF = self._grouped_mm(A=x_RD.to(dtype), B_t=w3_EFD.mT, offs=ends_E)
        return self._grouped_mm(A=F.silu(gate_RF) * up_RF, B_t=w2_EDF.mT, offs=ends_E).to(x_RD.dtype)


def experts_in(dtype: str | None) -> tuple[type[Experts.Config], torch.dtype | None]:
    """The class that multiplies in `dtype` (None: the input's), and what it casts to. MXFP8 is torchao's: it
    quantises what it is handed in bfloat16. torchtitan's converter makes the class; it would exchange the
    dispatcher, too, so it is not asked to convert.
    """
    if dtype != MXFP8:
        return Experts.Config, dtype and getattr(torch, dtype)
    from torchtitan.components.quantization.mx import _get_mxfp8_grouped_experts_cls

    return _get_mxfp8_grouped_experts_cls(Experts).Config, torch.bfloat16


class _ClearIdle(torch.autograd.Function):
    """The weights; their gradient is 0 for experts without tokens, whatever memory the grouped GEMM left
    there (sm_100: pytorch issue 172439).
    """

    @staticmethod
    def forward(ctx, w_EXY: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        ctx.save_for_backward(num_tokens_per_expert_E)
        return w_EXY.view_as(w_EXY)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_EXY: Tensor):
        (num_tokens_per_expert_E,) = ctx.saved_tensors
        return grad_EXY.masked_fill((num_tokens_per_expert_E == 0)[:, None, None], 0), None


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
    """Each tensor's rows, cut by expert; what lies behind the last expert's is nobody's."""
    return tuple(tensor[: sum(sizes)].split(sizes) for tensor in tensors)


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
