"""With which weights does a model on one rank compute in another dtype? With copies, cast once a step.

FSDP casts what it gathers, for each microbatch. A lone rank has nothing to gather: its weights stay what they
are, parameters in float32 under their own names, and its modules read copies that are made when a weight has
changed. Gradients come back in the copies' dtype and add up in float32, so the bits are those of FSDP.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Seen(torch.autograd.Function):
    """The copy in place of the weight, which gets the gradient in its own dtype."""

    @staticmethod
    def forward(ctx, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad.to(ctx.dtype), None


class Cast:
    """One weight's copy. What changes a weight in place tells by its version (torch.autograd.graph)."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.state, self.num_made = dtype, None, 0
        self.copy: Tensor | None = None

    def seen(self, weight: Tensor) -> Tensor:
        state = (weight.data_ptr(), weight._version)
        if state != self.state:
            with torch.no_grad():
                self.copy = weight.to(self.dtype) if self.copy is None else self.copy.copy_(weight)
            self.state, self.num_made = state, self.num_made + 1
        return _Seen.apply(weight, self.copy)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Every module reads its parameters in `dtype`; parameters() and the state dict have them as they are."""
    for module in model.modules():
        if names := list(module._parameters):
            module.casts = {name: Cast(dtype) for name in names}
            readers = {name: property(partial(_read, name)) for name in names}
            module.__class__ = type(type(module).__name__, (type(module),), readers)


def _read(name: str, module: nn.Module) -> Tensor:
    return module.casts[name].seen(module._parameters[name])


def num_casts(model: nn.Module) -> int:
    """How many copies were made so far."""
    return sum(cast.num_made for module in model.modules() for cast in getattr(module, "casts", {}).values())
