"""Which tokens of a row does this rank hold, and how do the keys of the others reach it (context
parallelism)?

A row of L tokens is cut into 2 C T equal pieces. The C ranks take them in T turns, up and down: in turn t
rank r gets the pieces 2 C t + r and 2 C (t + 1) - 1 - r. In a causal layer an early piece sees few keys and a
late one many; together all ranks see as many in a row of one document, and nearly as many in a row of several
(docs/long_context.md). A piece sees a stretch of the row that ends with the piece itself: in a local layer
the window before it, in a global one all that is before it. What others hold of it comes in one all-to-all,
and its gradient returns by the reverse:

    keys and values of own tokens --all-to-all--> those that own queries may see, in the row's order

Documents and padding do not matter here: attention masks them, so the shapes follow from L alone.

Letters: B rows, L tokens of a row, l of them on this rank, K keys that they may see, C ranks that share rows,
T turns, N key heads, H head dim, G = 2 H for a key and its value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchtitan.distributed.parallel_dims import ParallelDims

from trainer.split import pieces

MOST_TURNS = 4  # the slowest rank then has 1.07 times the mean's work on packed rows; more widen the halo

Parts = Sequence[range]  # tokens of a row, in ascending order


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a row lies on the ranks that share it. window: of the model's local layers."""

    size: int = 1
    rank: int = 0
    window: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def among(cls, dims: ParallelDims, *, window: int) -> "Cut":
        mesh = dims.get_optional_mesh("cp")
        if mesh is None:
            return WHOLE
        return cls(size=mesh.size(), rank=mesh.get_local_rank(), window=window, group=mesh.get_group())

    @property
    def multiple(self) -> int:
        """[tokens] Rows have a multiple of it."""
        return pieces(self.size)

    def turns(self, length: int) -> int:
        """The most whose pieces are no shorter than half a window: with shorter ones a rank would fetch more
        than twice the keys that it holds for a local layer.
        """
        turns = MOST_TURNS
        while turns > 1 and (length % (2 * self.size * turns) or 2 * self.piece(length, turns) < self.window):
            turns //= 2
        return turns

    def piece(self, length: int, turns: int) -> int:
        return length // (2 * self.size * turns)

    def held(self, length: int, *, rank: int | None = None) -> Parts:
        """The pieces of a rank (None: of this one)."""
        if self.size == 1:
            return [range(length)]
        rank, turns, each = self.rank if rank is None else rank, self.turns(length), 2 * self.size
        step = self.piece(length, turns)
        numbers = [n for turn in range(turns) for n in (each * turn + rank, each * (turn + 1) - 1 - rank)]
        return [range(n * step, (n + 1) * step) for n in numbers]

    def own(self, plane_BL: Tensor) -> Tensor:
        """This rank's tokens of whole rows."""
        if self.size == 1:
            return plane_BL
        held = self.held(plane_BL.shape[1])
        return torch.cat([plane_BL[:, piece.start : piece.stop] for piece in held], dim=1)

    def keys(self, length: int, window: int | None, *, rank: int | None = None) -> Parts:
        """The tokens that a rank's queries may see. window: of a local layer; None: of a global one."""
        return visible(self.held(length, rank=rank), window)

    def exchange(self, length: int, window: int | None) -> "Exchange | None":
        """How they get there; None: they are there."""
        return None if self.size == 1 else exchange_of(self, length, window)

    def sum_over_row(self, sums: Tensor) -> Tensor:
        """In place, over the ranks that hold other tokens of the same rows. Collective."""
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return sums


WHOLE = Cut()


def visible(pieces: Parts, window: int | None) -> Parts:
    """What queries of these pieces may see. Stretches that touch are one."""
    stretches = list[range]()
    for piece in pieces:
        start = 0 if window is None else max(0, piece.start - window + 1)
        if stretches and start <= stretches[-1].stop:
            start = stretches.pop().start
        stretches.append(range(start, piece.stop))
    return stretches


def common(a: Parts, b: Parts) -> Parts:
    both = (range(max(x.start, y.start), min(x.stop, y.stop)) for x in a for y in b)
    return [part for part in both if part]


def count(parts: Parts) -> int:
    return sum(map(len, parts))


def places(parts: Parts, among: Parts) -> list[slice]:
    """Where parts of the row lie among those of `among`, joined one after another."""
    starts = [sum(min(max(part.start - one.start, 0), len(one)) for one in among) for part in parts]
    return [slice(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Exchange:
    """What one rank sends and receives in one kind of layer; nothing goes to the rank itself. Numbers are of
    tokens, slices of own tokens or of the keys, both in the row's order.
    """

    num_keys: int
    own_in_keys: list[slice]
    sent: list[slice]  # of own tokens, in the order of the ranks that they go to
    received: list[slice]  # of the keys, in the order of the ranks that they come from
    send_counts: list[int]
    receive_counts: list[int]
    group: dist.ProcessGroup | None


@lru_cache(maxsize=64)
def exchange_of(cut: Cut, length: int, window: int | None) -> Exchange:
    """From the arithmetic of all ranks, the same on each, so no rank asks another."""
    held = [cut.held(length, rank=rank) for rank in range(cut.size)]
    own, keys = held[cut.rank], visible(held[cut.rank], window)
    sent, received = list[Parts](), list[Parts]()
    for rank, theirs in enumerate(held):
        is_other = rank != cut.rank
        sent.append(common(own, visible(theirs, window)) if is_other else [])
        received.append(common(theirs, keys) if is_other else [])
    return Exchange(
        num_keys=count(keys),
        own_in_keys=places(own, keys),
        sent=[at for parts in sent for at in places(parts, own)],
        received=[at for parts in received for at in places(parts, keys)],
        send_counts=list(map(count, sent)),
        receive_counts=list(map(count, received)),
        group=cut.group,
    )


def exchanged(k_BlNH: Tensor, v_BlNH: Tensor, by: Exchange | None) -> tuple[Tensor, Tensor]:
    """Keys and values (B, K, N, H) that this rank's queries may see, in the row's order. Collective."""
    return (k_BlNH, v_BlNH) if by is None else _Exchanged.apply(k_BlNH, v_BlNH, by)


class _Exchanged(torch.autograd.Function):
    """A token's gradient is the sum over the ranks that it was sent to, in float32 and in their order: the
    same bits every time.
    """

    @staticmethod
    def forward(ctx, k_BlNH: Tensor, v_BlNH: Tensor, by: Exchange) -> tuple[Tensor, Tensor]:
        ctx.by = by
        own_lBNG = torch.cat([k_BlNH, v_BlNH], dim=-1).transpose(0, 1)
        arrived = all_to_all(own_lBNG, by.sent, by.send_counts, by.receive_counts, by.group)
        keys_KBNG = own_lBNG.new_empty(by.num_keys, *own_lBNG.shape[1:])
        fill(keys_KBNG, by.own_in_keys, own_lBNG)
        fill(keys_KBNG, by.received, arrived)
        k_BKNH, v_BKNH = keys_KBNG.transpose(0, 1).chunk(2, dim=-1)
        return k_BKNH, v_BKNH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_k_BKNH: Tensor, grad_v_BKNH: Tensor):
        by = ctx.by
        grad_KBNG = torch.cat([grad_k_BKNH, grad_v_BKNH], dim=-1).transpose(0, 1)
        arrived = all_to_all(grad_KBNG, by.received, by.receive_counts, by.send_counts, by.group)
        grad_lBNG = torch.cat([grad_KBNG[at] for at in by.own_in_keys]).float()
        for at, part in zip(by.sent, arrived.split([at.stop - at.start for at in by.sent]), strict=True):
            grad_lBNG[at] += part
        grad_k_BlNH, grad_v_BlNH = grad_lBNG.to(grad_KBNG.dtype).transpose(0, 1).chunk(2, dim=-1)
        return grad_k_BlNH, grad_v_BlNH, None


def all_to_all(
    rows: Tensor, sent: list[slice], send_counts: list[int], receive_counts: list[int], group: object
) -> Tensor:
    """Parts of the rows for each rank of the group -> what each of them has for this one."""
    parcel = torch.cat([rows[at] for at in sent]) if sent else rows[:0]
    arrived = parcel.new_empty(sum(receive_counts), *rows.shape[1:])
    dist.all_to_all_single(arrived, parcel.contiguous(), receive_counts, send_counts, group=group)
    return arrived


def fill(rows: Tensor, places: list[slice], parts: Tensor) -> None:
    for at, part in zip(places, parts.split([at.stop - at.start for at in places]), strict=True):
        rows[at] = part
