"""How is one box of a saved tensor read, and a safetensors file written, while nothing else is held in
memory?

A safetensors file is: 8 bytes, the length of the header; the header, {name: {dtype, shape, data_offsets}} in
JSON; the bytes of the tensors. The header follows from shapes alone, so the tensors may be made one by one
while the file is written.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint.foreign import CODES, DamagedError, read_shapes, shown
from trainer.checkpoint.storage import Index, TensorPiece, read_box

MAX_OPEN = 64  # files at a time
DTYPES = {CODES[dtype]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}  # of weights


class TensorSpec(NamedTuple):
    """A tensor's dtype and shape, known before any of its values is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class BoxReader:
    """Reads boxes of the tensors of an index, from whichever pieces they lie in."""

    def __init__(self, directory: Path, index: Index):
        self.index = index
        self.opened = lru_cache(MAX_OPEN)(lambda file: safe_open(directory / file, framework="pt"))

    def read(self, name: str, *, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box (sizes) at `offsets` of a tensor. Raises: DamagedError if no piece, or more than one, holds
        part of it.
        """
        stored = self.index[name]
        box, num_values = torch.empty(tuple(sizes), dtype=stored.dtype), 0
        for piece in stored.pieces:
            first, last = overlap(piece, offsets, sizes)
            if all(a < b for a, b in zip(first, last, strict=True)):
                part = [b - a for a, b in zip(first, last, strict=True)]
                target = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, offsets, strict=True))
                inside = [a - o for a, o in zip(first, piece.offsets, strict=True)]
                box[target] = self.part(piece, offsets=inside, sizes=part)
                num_values += prod(part)
        if num_values != box.numel():
            raise DamagedError(
                f"{name}: the checkpoint's pieces hold {num_values} of the {box.numel()} values at "
                f"{tuple(offsets)}"
            )
        return box

    def part(self, piece: TensorPiece, *, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        return read_box(self.opened(piece.file), piece.key, offsets=offsets, sizes=sizes)


def overlap(piece: TensorPiece, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """The intersection of a piece and a box: its first corner and, exclusive, its last one, in coordinates of
    the whole tensor.
    """
    first = [max(a, b) for a, b in zip(piece.offsets, offsets, strict=True)]
    ends = zip(piece.offsets, piece.sizes, offsets, sizes, strict=True)
    return first, [min(a + n, b + m) for a, n, b, m in ends]


def read_header(path: Path) -> dict[str, TensorSpec]:
    """What a safetensors file holds. Raises: DamagedError, naming the file, if it is none, cut off, or of
    other dtypes.
    """
    try:
        shapes = read_shapes(path)
    except DamagedError as error:
        raise DamagedError(f"{error}; fetch it again") from None
    if other := [name for name, (code, _) in shapes.items() if code not in DTYPES]:
        code = shapes[other[0]][0]
        raise DamagedError(f"{path}: {shown(other[0])} is {code}; weights must be one of {', '.join(DTYPES)}")
    return {name: TensorSpec(DTYPES[code], shape) for name, (code, shape) in shapes.items()}


def write_file(path: Path, kinds: Mapping[str, TensorSpec], make: Callable[[str], Tensor]) -> None:
    """Writes the tensors that `make` gives one by one, and makes the file durable. Wider dtypes come first:
    all lie aligned.

    Raises: ValueError if a tensor is not of its kind; OSError.
    """
    # stable: otherwise in the given order
    names = sorted(kinds, key=lambda name: -kinds[name].dtype.itemsize)
    with path.open("wb") as file:
        file.write(header_of({name: kinds[name] for name in names}))
        for name in names:
            tensor = make(name)
            if (has := TensorSpec(tensor.dtype, tuple(tensor.shape))) != kinds[name]:
                raise ValueError(
                    f"{name}: is {has.dtype} {has.shape}, must be {kinds[name].dtype} {kinds[name].shape}"
                )
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            del tensor  # before the next one is made
        file.flush()
        os.fsync(file.fileno())


def header_of(kinds: Mapping[str, TensorSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, kind in kinds.items():
        start, end = end, end + kind.num_bytes
        header[name] = {"dtype": CODES[kind.dtype], "shape": list(kind.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
