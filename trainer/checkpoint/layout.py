"""Which pieces does each tensor of a state have, and which rank writes each of them?

Every rank reckons from shapes and meshes alone, and all come to the same answer, so nothing is gathered to
plan a save. Of the ranks that hold a piece alike one writes it: the one that has the least to write so far.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapreplace
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as box_at


class Held(NamedTuple):
    """A box of a tensor, and the ranks that hold it, alike."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...] | range


@dataclass(frozen=True, eq=False)  # so that it is cheap to look up
class Layout:
    """How a tensor lies on the ranks.

    is_written: a mesh may be one of several that hold the same tensor, each the whole of it; the one with
    rank 0 writes.
    """

    held: tuple[Held, ...]
    num_replicas: int
    is_written: bool


class Planned(NamedTuple):
    """A tensor of a save. replica: which of the ranks that hold a box alike writes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: Layout
    replica: int

    def pieces(self) -> list[tuple[Held, int]]:
        """What is written of it, and by which rank."""
        held = self.layout.held if self.layout.is_written else ()
        return [(box, box.ranks[self.replica]) for box in held if 0 not in box.sizes]

    def piece_of(self, rank: int) -> Held | None:
        """What this rank writes of it."""
        box = held_by(self.layout, rank) if self.layout.is_written else None
        return box if box is not None and 0 not in box.sizes and box.ranks[self.replica] == rank else None


Plan = dict[str, Planned]  # of all tensors of a state, by name


def plan_of(tensors: Mapping[str, Tensor], *, num_ranks: int) -> Plan:
    """Who writes what of a state. The same on all ranks: only what they have in common is looked at."""
    plan, loads = Plan(), dict[int, list[tuple[int, int]]]()
    for name in sorted(tensors):
        tensor = tensors[name]
        layout, shape = layout_of(tensor, num_ranks=num_ranks), tuple(tensor.shape)
        of_replicas = loads.setdefault(layout.num_replicas, [(0, r) for r in range(layout.num_replicas)])
        load, replica = of_replicas[0]  # the least
        size = prod(shape) * tensor.dtype.itemsize // len(layout.held)
        heapreplace(of_replicas, (load + size, replica))
        plan[name] = Planned(tensor.dtype, shape, layout, replica)
    return plan


def layout_of(tensor: Tensor, *, num_ranks: int) -> Layout:
    if isinstance(tensor, DTensor):
        return _of_mesh(tuple(tensor.shape), tensor.device_mesh, tuple(tensor.placements))
    return _whole(tuple(tensor.shape), num_ranks)


@lru_cache(maxsize=4096)
def _whole(shape: tuple[int, ...], num_ranks: int) -> Layout:
    return Layout((Held((0,) * len(shape), shape, range(num_ranks)),), num_ranks, is_written=True)


@lru_cache(maxsize=4096)
def _of_mesh(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Layout:
    """Along an axis that does not cut the tensor all ranks hold the same box."""
    if any(placement.is_partial() for placement in placements):
        raise TypeError(f"a tensor of shape {shape} is not summed yet: {placements}")
    cuts = [not placement.is_replicate() for placement in placements]
    ranks, held = mesh.mesh, []
    for at in product(*(range(size) if cut else (0,) for size, cut in zip(mesh.shape, cuts, strict=True))):
        sizes, offsets = box_at(shape, mesh.shape, list(at), placements)
        alike = ranks[tuple(i if cut else slice(None) for i, cut in zip(at, cuts, strict=True))]
        held.append(Held(tuple(offsets), tuple(sizes), tuple(alike.flatten().tolist())))
    return Layout(tuple(held), len(held[0].ranks), is_written=bool((ranks == 0).any()))


@lru_cache(maxsize=4096)
def held_by(layout: Layout, rank: int) -> Held | None:
    return next((box for box in layout.held if rank in box.ranks), None)
