"""Root mean square norm in few passes over memory: on a CPU, torch's own is a chain of elementwise operators.

Letters: D the normalized dim; x_D and its like may have any dims before it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchtitan.models.common import nn_modules


class RMSNorm(nn_modules.RMSNorm):
    @dataclass(kw_only=True, slots=True)
    class Config(nn_modules.RMSNorm.Config):
        pass

    def forward(self, x_D: Tensor) -> Tensor:
        if x_D.device.type == "cpu" and x_D.dtype == self.weight.dtype == torch.float32:
            return _RMSNorm.apply(x_D, self.weight, self.eps)
        return super().forward(x_D)


class _RMSNorm(torch.autograd.Function):
    """Twice the speed of F.rms_norm on a CPU: its backward is one fused kernel, that of a layer norm whose
    mean is 0.
    """

    @staticmethod
    def forward(ctx, x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm_1 = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True)
        scale_1 = norm_1.square_().div_(x_D.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_D, weight_D, scale_1)
        return (x_D * scale_1).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_D: Tensor):
        x_D, weight_D, scale_1 = ctx.saved_tensors
        dim = x_D.shape[-1]
        grad_x_D, grad_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad_D, x_D, [dim], torch.zeros_like(scale_1), scale_1, weight_D, None, [True, True, False]
        )
        # what a mean that moves with x would take
        through_mean_1 = (grad_D @ weight_D).unsqueeze(-1).mul_(scale_1).div_(dim)
        return grad_x_D.add_(through_mean_1), grad_weight_D, None
