"""Which rank orthogonalises which matrix, and how do the pieces get there and back?

    pieces of a matrix --all-to-all--> its owner --> orthogonalised --all-to-all--> pieces --all-gather-->
    replicas (cut by FSDP over S ranks of a replica)                          (of R replicas, each with its
    share)

A matrix that is whole on its rank, as experts are, skips the all-to-alls; a run without replicas the
all-gather.
Letters: R replicas (dp_replicate), S ranks of a replica among which a matrix is cut. Sizes in elements.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.optim.newton_schulz import cost, orthogonalized
from trainer.ranks.local import local

ROUND_ELEMENTS = 2**26  # of the matrices that a rank orthogonalises at once: bounds the memory of a step


@dataclass(frozen=True)
class Spread:
    """How a parameter lies on the ranks: cut inside its matrices over one axis of the mesh, alike over
    another.
    """

    mesh: Any = None  # DeviceMesh
    cut_axis: int | None = None
    cut_dim: int = -2  # of the matrix
    replica_axis: int | None = None

    @classmethod
    def of(cls, p: Tensor) -> "Spread":
        if not isinstance(p, DTensor):
            return cls()
        real = [(axis, place) for axis, place in enumerate(p.placements) if p.device_mesh.shape[axis] > 1]
        cut = [
            (axis, place.dim - p.ndim) for axis, place in real if place.is_shard() and place.dim >= p.ndim - 2
        ]
        alike = [axis for axis, place in real if place.is_replicate()]
        if len(cut) > 1 or len(alike) > 1 or any(place.is_partial() for _, place in real):
            raise ValueError(
                f"Muon: a parameter placed as {p.placements} is cut over several axes; it can be cut over one"
            )
        cut_axis, cut_dim = cut[0] if cut else (None, -2)
        return cls(p.device_mesh, cut_axis, cut_dim, alike[0] if alike else None)

    def along(self, axis: int | None) -> tuple[dist.ProcessGroup | None, int, int]:
        """The group of an axis, its size and this rank's place in it."""
        if axis is None:
            return None, 1, 0
        return self.mesh.get_group(axis), self.mesh.size(axis), self.mesh.get_local_rank(axis)


@dataclass(frozen=True, eq=False)
class Item:
    """One matrix."""

    parameter: Tensor
    index: int  # in the parameter's local batch
    shape: tuple[int, int]  # of the whole matrix

    def of(self, tensor: Tensor) -> Tensor:
        """This matrix, or this rank's piece of it, in a tensor shaped like the parameter's local part."""
        return tensor.view(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])[self.index]


Direction = Callable[[Item], Tensor]  # this rank's piece of what is to be orthogonalised
Apply = Callable[[Item, Tensor], None]  # the result, to this rank's piece of the weights


class Plan:
    """Rounds of matrices that lie alike; in each, which of the R x S ranks orthogonalises which: the least
    busy one.
    """

    def __init__(self, spread: Spread, parameters: Sequence[Tensor], *, dtype: torch.dtype):
        self.cut_dim, self.empty = spread.cut_dim, local(parameters[0]).new_empty(0, dtype=dtype)
        self.cut_group, self.num_cuts, self.cut_rank = spread.along(spread.cut_axis)
        self.replica_group, self.num_replicas, self.replica = spread.along(spread.replica_axis)
        num_ranks = self.num_replicas * self.num_cuts
        items = [
            Item(p, i, tuple(p.shape[-2:])) for p in parameters for i in range(math.prod(local(p).shape[:-2]))
        ]
        items.sort(key=lambda item: -cost(*item.shape))  # stable: the same order on all ranks
        self.rounds: list[list[list[Item]]] = []  # of a round, by owner: replica S + place in the replica
        # [FLOP] first
        busy = [(0, place, replica) for place in range(self.num_cuts) for replica in range(self.num_replicas)]
        room = 0
        for item in items:
            if room == 0:
                room = num_ranks * max(1, ROUND_ELEMENTS // math.prod(item.shape))
                self.rounds.append([[] for _ in range(num_ranks)])
            room -= 1
            flop, place, replica = heapq.heappop(busy)
            heapq.heappush(busy, (flop + cost(*item.shape), place, replica))
            self.rounds[-1][replica * self.num_cuts + place].append(item)

    def run(self, direction: Direction, apply: Apply) -> None:
        """While replicas exchange the results of one round, the next one is orthogonalised."""
        finish = nothing
        for owned in self.rounds:
            first = self.replica * self.num_cuts
            share = owned[first : first + self.num_cuts]  # of this replica, by place
            matrices = orthogonalized(self.to_owners(share, direction))
            started = self.exchange(owned, self.from_owners(share, matrices), apply)
            finish()
            finish = started
        finish()

    def piece_shape(self, item: Item, place: int) -> tuple[int, ...]:
        """Of what a rank of a replica holds of a matrix: FSDP cuts as torch.chunk does."""
        shape = list(item.shape)
        chunk = -(-shape[self.cut_dim] // self.num_cuts)
        shape[self.cut_dim] = max(0, min(chunk, shape[self.cut_dim] - place * chunk))
        return tuple(shape)

    def to_owners(self, share: list[list[Item]], direction: Direction) -> list[Tensor]:
        """The whole matrices that this rank is to orthogonalise."""
        outgoing = [[direction(item) for item in items] for items in share]
        if self.cut_group is None:
            return outgoing[0]
        shapes = [
            [self.piece_shape(item, place) for item in share[self.cut_rank]] for place in range(self.num_cuts)
        ]
        incoming = self.all_to_all(outgoing, shapes)
        return [torch.cat(pieces, dim=self.cut_dim) for pieces in zip(*incoming, strict=True)]

    def from_owners(self, share: list[list[Item]], matrices: list[Tensor]) -> list[Tensor]:
        """This rank's pieces of all matrices of its replica's share, in the order of `share`."""
        if self.cut_group is None:
            return matrices
        cut = [
            matrix.split(
                [self.piece_shape(item, place)[self.cut_dim] for place in range(self.num_cuts)],
                dim=self.cut_dim,
            )
            for item, matrix in zip(share[self.cut_rank], matrices, strict=True)
        ]
        outgoing = [[pieces[place] for pieces in cut] for place in range(self.num_cuts)]
        shapes = [[self.piece_shape(item, self.cut_rank) for item in items] for items in share]
        return list(chain.from_iterable(self.all_to_all(outgoing, shapes)))

    def exchange(self, owned: list[list[Item]], pieces: list[Tensor], apply: Apply) -> Callable[[], None]:
        """Tells the other replicas this one's results. Returns what waits for theirs and applies all of
        them.
        """
        shares = [
            list(chain.from_iterable(owned[r * self.num_cuts : (r + 1) * self.num_cuts]))
            for r in range(self.num_replicas)
        ]
        if self.replica_group is None:
            return lambda: apply_all(apply, shares[0], pieces)
        shapes = [[self.piece_shape(item, self.cut_rank) for item in share] for share in shares]
        sizes = [[math.prod(shape) for shape in share] for share in shapes]
        sent, longest = self.concatenated(pieces), max(map(sum, sizes))
        sent = F.pad(sent, (0, longest - len(sent)))
        received = sent.new_empty(self.num_replicas * longest)
        work = dist.all_gather_single(received, sent, group=self.replica_group, async_op=True)

        def finish() -> None:
            work.wait()
            for r, (share, shape, size) in enumerate(zip(shares, shapes, sizes, strict=True)):
                parts = received[r * longest :][: sum(size)].split(size)
                apply_all(apply, share, [part.view(s) for part, s in zip(parts, shape, strict=True)])

        return finish

    def all_to_all(
        self, outgoing: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Sends outgoing[place] to each place of this replica; receives tensors of shapes[place] from it."""
        sent = [self.concatenated(tensors) for tensors in outgoing]
        sizes = [[math.prod(shape) for shape in place] for place in shapes]
        received = self.empty.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(
            received, torch.cat(sent), [sum(s) for s in sizes], [len(s) for s in sent], group=self.cut_group
        )
        parts = iter(received.split(list(chain.from_iterable(sizes))))
        return [[next(parts).view(shape) for shape in place] for place in shapes]

    def concatenated(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([self.empty, *(tensor.flatten() for tensor in tensors)])


def nothing() -> None:
    pass


def apply_all(apply: Apply, items: list[Item], pieces: list[Tensor]) -> None:
    for item, piece in zip(items, pieces, strict=True):
        apply(item, piece)
