"""Which part of a tensor is on this rank, and what is the norm of a gradient whose parts are on many?"""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def squared_gradient_norm(model: nn.Module) -> Tensor:
    """This rank's share: summed over all ranks it is the squared norm of the whole gradient.

    Each shard counts once, whatever the mesh (experts live on another one): a tensor that r ranks hold alike
    counts 1/r on each. One scalar to reduce, so all ranks scale by the same bits.
    """
    total = torch.zeros((), dtype=torch.float64)
    for parameter in trained(model):
        total = total.to(parameter.device) + local(parameter.grad).norm().double().square() / num_replicas(
            parameter
        )
    return total


def scale_gradients(model: nn.Module, factor: float) -> None:
    torch._foreach_mul_([local(parameter.grad) for parameter in trained(model)], factor)


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_replicas(tensor: Tensor) -> int:
    if not isinstance(tensor, DTensor):
        return 1
    axes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in axes if placement.is_replicate())
