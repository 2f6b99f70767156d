"""What does a resumed run need of model, optimizer and balancing rule?"""

import warnings
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from trainer.optim import Optimizers

# a single rank's saves
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def training_state(model: nn.Module, optimizer: Optimizers, balancer: nn.Module) -> dict[str, Any]:
    """Weights and routing biases, optimizer state, the balancing rule's and the guard's memory: tensors in
    nested dicts.

    Hyper-parameters are not in it: those of the present configuration count.
    """
    new = [one for one in optimizer.optimizers if not one.state]
    of_optimizer = get_optimizer_state_dict(model, optimizer.optimizers)["state"]
    for one in new:  # torch makes what is missing by a step without gradient, and counts it
        for of_parameter in one.state.values():
            for name, value in of_parameter.items():
                if name == "step":
                    value.zero_()
    return {
        "model": get_model_state_dict(model),
        "optimizer": of_optimizer,
        "balancer": balancer.state_dict(),
    }


def set_training_state(
    state: dict[str, Any], model: nn.Module, optimizer: Optimizers, balancer: nn.Module
) -> None:
    """The reverse."""
    set_model_state_dict(model, state["model"])
    kept = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    groups = get_optimizer_state_dict(model, optimizer.optimizers)["param_groups"]
    set_optimizer_state_dict(
        model, optimizer.optimizers, {"state": state["optimizer"], "param_groups": groups}
    )
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)
    balancer.load_state_dict(state["balancer"])
