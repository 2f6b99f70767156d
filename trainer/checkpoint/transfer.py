"""How do tensors get from a running model into a checkpoint's files, and from there into another layout?"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.tensor import DTensor

from trainer.checkpoint.foreign import DamagedError, shown
from trainer.checkpoint.layout import Plan, plan_of
from trainer.checkpoint.storage import Index, SafetensorsReader, key_of, read_index
from trainer.ranks.agree import all_gather_objects

# A single rank's saves and loads have no process group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Staged(NamedTuple):
    """What this rank writes of a save, copied, and what all ranks write."""

    pieces: dict[str, Tensor]  # by key
    plan: Plan


class Staging:
    """Takes copies to write from: training goes on while they are written.

    Memory: what this rank writes once more, on the host (pinned beside a GPU), kept from save to save. Of
    what several ranks hold alike, one of them takes a copy.
    """

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}

    def stage(self, state: dict[str, Any]) -> Staged:
        tensors = flat(state)
        plan, rank, before = plan_of(tensors, num_ranks=dist.get_world_size()), dist.get_rank(), self.copies
        self.copies = {}
        for name, planned in plan.items():
            if (box := planned.piece_of(rank)) is not None:
                key, tensor = key_of(name, box.offsets), tensors[name]
                own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
                self.copies[key] = copied(own, into=before.get(key))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Staged(self.copies, plan)


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    """Nested dicts of tensors as one, with the names that a checkpoint has. Raises: TypeError."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state)
    if wrong := [name for name, value in planner.state_dict.items() if not isinstance(value, Tensor)]:
        raise TypeError(f"{', '.join(wrong)}: a checkpoint holds tensors only")
    return planner.state_dict


def copied(own: Tensor, *, into: Tensor | None) -> Tensor:
    """On the host. into: the copy of an earlier save, used again where it fits."""
    if into is None or into.shape != own.shape or into.dtype != own.dtype:
        into = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
    return into.copy_(own, non_blocking=True)


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
    own = _attempted(lambda: _load(state, SafetensorsReader(directory, index), planner=planner))
    if problem := next(filter(None, all_gather_objects(own)), None):
        raise DamagedError(problem)
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
    _load(whole, SafetensorsReader(directory, chosen))
    return whole


def _load(
    state: dict[str, Any], reader: SafetensorsReader, *, planner: DefaultLoadPlanner | None = None
) -> None:
    """Each rank plans what it reads by itself: DCP would gather all plans, and all names before that."""
    try:
        dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:  # a BaseException: nobody else would catch it
        [(cause, _)] = error.failures.values()
        where = f"rank {dist.get_rank()}: " if dist.is_initialized() else ""
        raise DamagedError(
            f"{reader.directory} cannot be read: {where}{type(cause).__name__}: {shown(cause)}"
        ) from None


def _attempted(load: Callable[[], None]) -> str | None:
    """What it refused."""
    try:
        load()
    except DamagedError as error:
        return str(error)
    return None
