"""How do tensors get from a running model into a checkpoint's files, and from there into another layout?"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from trainer.checkpoint.foreign import DamagedError, shown
from trainer.checkpoint.storage import Index, SafetensorsReader, read_index

# A single rank's saves and loads have no process group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class StagedPlanner(DefaultSavePlanner):
    """DCP's planner, writing from a copy that `stage` took: training goes on while the copy is written.

    Memory: this rank's part of the state once more, on the host (pinned beside a GPU), kept from save to
    save.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[str, Tensor] = {}

    def stage(self, state: dict[str, Any]) -> None:
        self.set_up_planner(state)
        if wrong := [name for name, value in self.state_dict.items() if not isinstance(value, Tensor)]:
            raise TypeError(f"{', '.join(wrong)}: a checkpoint holds tensors only")
        before, self.copies = self.copies, {}
        for name, value in self.state_dict.items():
            tensor = (value.to_local() if isinstance(value, DTensor) else value).detach()
            copy = before.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.copies[name] = copy.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.copies[write_item.index.fqn]


def load_into(state: dict[str, Any], *, directory: Path, index: Index) -> dict[str, Any]:
    """Fills the tensors of `state` in place, each rank its own part, and returns it. Collective.

    Raises: ValueError naming every tensor that is missing, or of another shape or dtype; DamagedError if a
    file cannot be read.
    """
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state)
    shapes = {name: tuple(tensor.shape) for name, tensor in planner.state_dict.items()}
    missing = [
        f"{name}: is not in it, must be {shape}" for name, shape in shapes.items() if name not in index
    ]
    present = [(name, index[name].shape, shape) for name, shape in shapes.items() if name in index]
    wrong = missing + [
        f"{name}: has {held}, must be {shape}" for name, held, shape in present if held != shape
    ]
    pairs = [
        (name, index[name].dtype, tensor.dtype)
        for name, tensor in planner.state_dict.items()
        if name in index
    ]
    wrong += [f"{name}: has {held}, must be {ours}" for name, held, ours in pairs if not converts(held, ours)]
    if wrong:
        raise ValueError("\n".join([f"{directory}: {len(wrong)} tensors do not fit this run:", *wrong]))
    _load(state, SafetensorsReader(directory, index), alone=dist.get_world_size() == 1, planner=planner)
    return state


def converts(there: torch.dtype, own: torch.dtype) -> bool:
    """Between floats a value is rounded; a count that does not fit would silently become another one."""
    return there == own or (there.is_floating_point and own.is_floating_point)


def read_whole(directory: Path, names: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint (none named: all), whole, in this process alone. Raises: DamagedError,
    KeyError.
    """
    index = read_index(directory)
    chosen = {name: index[name] for name in (index if names is None else names)}
    whole = {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in chosen.items()}
    _load(whole, SafetensorsReader(directory, chosen), alone=True)
    return whole


def _load(
    state: dict[str, Any],
    reader: SafetensorsReader,
    *,
    alone: bool,
    planner: DefaultLoadPlanner | None = None,
) -> None:
    try:
        dcp.load(state, storage_reader=reader, planner=planner, no_dist=alone)
    except CheckpointException as error:  # a BaseException: nobody else would catch it
        raise DamagedError(f"{reader.directory} cannot be read: {first_failure(error)}") from None


def first_failure(error: CheckpointException) -> str:
    """What the first rank failed with, without the traceback."""
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {type(cause).__name__}: {shown(cause)}"
