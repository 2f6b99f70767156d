"""What would an operator do with a tensor of this shape? Outlines take the place of tensors where there are
ten thousand of them: the optimizer's own code runs on them a hundred times as fast as on fake tensors.

A ledger counts, as Watch does. An operator that outlines do not have raises AttributeError or TypeError.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F


class Ledger:
    """kernels, [bytes] through memory, FLOP, [bytes] that live now and at the most."""

    def __init__(self) -> None:
        self.kernels, self.moved, self.flop, self.live, self.peak = 0, 0, 0, 0, 0

    def allocate(self, num_bytes: int) -> "Storage":
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        return Storage(self, num_bytes)


class Storage:
    """Lives as long as an outline of it does."""

    __slots__ = ("ledger", "num_bytes")

    def __init__(self, ledger: Ledger, num_bytes: int) -> None:
        self.ledger, self.num_bytes = ledger, num_bytes

    def __del__(self) -> None:
        self.ledger.live -= self.num_bytes


class Outline:
    """Of a tensor: what the operators of trainer/optim ask of one, and nothing more."""

    __slots__ = ("dtype", "is_contiguous", "shape", "storage")

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, storage: Storage, *, is_contiguous: bool = True
    ) -> None:
        self.shape, self.dtype, self.storage, self.is_contiguous = tuple(shape), dtype, storage, is_contiguous

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def made(
        self, shape: Sequence[int], *others: "Outline", dtype: torch.dtype | None = None, flop: int = 0
    ) -> "Outline":
        """What one kernel makes of this and others."""
        ledger, dtype = self.storage.ledger, dtype or self.dtype
        num_bytes = math.prod(shape) * dtype.itemsize
        ledger.kernels += 1
        ledger.flop += flop
        ledger.moved += num_bytes + self.num_bytes + sum(other.num_bytes for other in others)
        return Outline(shape, dtype, ledger.allocate(num_bytes))

    def seen(self, shape: Sequence[int], *, is_contiguous: bool | None = None) -> "Outline":
        """A view."""
        is_contiguous = self.is_contiguous if is_contiguous is None else is_contiguous
        return Outline(shape, self.dtype, self.storage, is_contiguous=is_contiguous)

    # -- views -----------------------------------------------------------------------------------------

    def view(self, *shape: Any) -> "Outline":
        return self.seen(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    def __getitem__(self, at: int | slice) -> "Outline":
        if isinstance(at, slice):
            return self.seen((len(range(*at.indices(len(self)))), *self.shape[1:]))
        return self.seen(self.shape[1:])

    def __iter__(self):
        return (self.seen(self.shape[1:]) for _ in range(len(self)))

    @property
    def mT(self) -> "Outline":
        return self.seen((*self.shape[:-2], self.shape[-1], self.shape[-2]), is_contiguous=False)

    def split(self, sizes: Sequence[int], dim: int = 0) -> list["Outline"]:
        dim %= self.ndim
        return [
            self.seen(
                (*self.shape[:dim], size, *self.shape[dim + 1 :]),
                is_contiguous=self.is_contiguous and (dim == 0 or size == self.shape[dim]),
            )
            for size in sizes
        ]

    def flatten(self) -> "Outline":
        shape = (math.prod(self.shape),)
        return self.seen(shape) if self.is_contiguous else self.made(shape)

    # -- kernels ---------------------------------------------------------------------------------------

    def new_empty(self, size: int, *, dtype: torch.dtype | None = None) -> "Outline":
        dtype = dtype or self.dtype
        return Outline((size,), dtype, self.storage.ledger.allocate(size * dtype.itemsize))

    def to(self, dtype: torch.dtype) -> "Outline":
        return self if dtype == self.dtype else self.made(self.shape, dtype=dtype)

    def add(self, other: "Outline", *, alpha: float = 1) -> "Outline":
        return self.made(self.shape, other)

    def add_(self, other: "Outline", *, alpha: float = 1) -> None:
        ledger = self.storage.ledger
        ledger.kernels += 1
        ledger.moved += 2 * self.num_bytes + other.num_bytes

    def norm(self, *, dim: tuple[int, ...], keepdim: bool) -> "Outline":
        kept = {i % self.ndim for i in dim}
        return self.made([1 if i in kept else size for i, size in enumerate(self.shape)])

    def clamp_min(self, least: float) -> "Outline":
        return self.made(self.shape)

    def __truediv__(self, other: "Outline") -> "Outline":
        return self.made(self.shape, other)

    def __matmul__(self, other: "Outline") -> "Outline":
        *batch, rows, inner = self.shape
        columns = other.shape[-1]
        return self.made((*batch, rows, columns), other, flop=2 * math.prod(batch) * rows * inner * columns)

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None) -> "Outline":
        if func not in FUNCTIONS:
            raise TypeError(f"an outline has no {func.__name__}")
        return FUNCTIONS[func](*args, **(kwargs or {}))


def cat(tensors: Sequence[Outline], dim: int = 0) -> Outline:
    first, *others = tensors
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return first.made(shape, *others)


def stack(tensors: Sequence[Outline]) -> Outline:
    first, *others = tensors
    return first.made((len(tensors), *first.shape), *others)


def baddbmm(to: Outline, a: Outline, b: Outline, *, beta: float = 1, alpha: float = 1) -> Outline:
    batch, rows, inner = a.shape
    return to.made(to.shape, a, b, flop=2 * batch * rows * inner * b.shape[-1])


def pad(tensor: Outline, sides: tuple[int, int], **kwargs) -> Outline:
    return tensor.made((len(tensor) + sum(sides),))


FUNCTIONS = {torch.cat: cat, torch.stack: stack, torch.baddbmm: baddbmm, F.pad: pad}
