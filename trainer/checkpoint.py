"""What does a resumed run need, and where does it lie?

    <run>/checkpoints/step-00000200/    weights, biases, optimizer, balancer, data position, progress

A checkpoint is written into a hidden directory and renamed when every rank is done: the rename is the
commit, so a directory named step-* is complete. Everything is a tensor; sharded tensors are cut anew when
they are loaded on another layout (torch.distributed.checkpoint).
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from trainer.optim import Optimizers

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")  # see `alone`


class Checkpoints:
    """The checkpoints of one run. All methods but `steps` are collective: every rank calls them."""

    def __init__(self, directory: Path, *, keep: int):
        self.directory, self.keep = directory, keep

    def steps(self) -> list[int]:
        """Steps that can be resumed from, oldest first."""
        names = (path.name for path in self.directory.glob("step-*") if (path / ".metadata").is_file())
        return sorted(int(name.removeprefix("step-")) for name in names)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes `state` (nested dicts of tensors); a complete checkpoint of this step is left as it is."""
        final, draft = self.path(step), self.directory / f".step-{step:08d}.draft"
        if step not in self._agreed_steps():
            if dist.get_rank() == 0:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
            dist.barrier()
            dcp.save(state, checkpoint_id=draft, no_dist=alone())
            if dist.get_rank() == 0:
                os.rename(draft, final)
                for old in self.steps()[: -self.keep]:
                    shutil.rmtree(self.path(old))
            dist.barrier()
        return final

    def load(self, step: int, state: dict[str, Any]) -> dict[str, Any]:
        """Fills the tensors of `state` in place, resharding as needed, and returns it."""
        dcp.load(state, checkpoint_id=self.path(step), no_dist=alone())
        return state

    def shape(self, step: int, name: str) -> tuple[int, ...]:
        """Of a saved tensor."""
        saved = dcp.FileSystemReader(self.path(step)).read_metadata().state_dict_metadata
        if name not in saved:
            raise ValueError(f"{self.path(step)} holds no {name}: another version of Triquetra wrote it; continue with that one")
        return tuple(saved[name].size)

    def _agreed_steps(self) -> list[int]:
        """Rank 0's view, on all ranks: file systems of several hosts may differ for a moment."""
        agreed = [self.steps() if dist.get_rank() == 0 else []]
        dist.broadcast_object_list(agreed)
        return agreed[0]

    def latest(self) -> int | None:
        return max(self._agreed_steps(), default=None)


def alone() -> bool:
    """A single rank saves without collectives: gloo's threads would start OpenMP teams of their own for the metadata, and
    with more threads than cores OpenMP stops spinning, for good (measured on 2 cores: steps took twice as long)."""
    return dist.get_world_size() == 1


def training_state(model: nn.Module, optimizer: Optimizers, balancer: nn.Module) -> dict[str, Any]:
    """Weights and routing biases, optimizer state, the balancing rule's memory."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer.optimizers),
        "balancer": balancer.state_dict(),
    }


def set_training_state(state: dict[str, Any], model: nn.Module, optimizer: Optimizers, balancer: nn.Module) -> None:
    """The reverse. Hyper-parameters stay those of the present configuration, not of the saved one."""
    hyper_parameters = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer.optimizers, state["optimizer"])
    for group, values in zip(optimizer.param_groups, hyper_parameters, strict=True):
        group.update(values)
    balancer.load_state_dict(state["balancer"])
