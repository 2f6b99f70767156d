"""How do tensors lie on disk? layout.py plans who writes what, torch's DCP who reads what; here are the
files, which hold tensors and JSON only.

    rank-00000.safetensors   the pieces that rank 0 wrote, each under the key <tensor>@<offsets>
    index.json               {tensor: {dtype, shape, pieces: [{file, key, offsets, sizes}]}}

DCP's own storage keeps its index as a pickle, and reading one runs whatever is in it (pytorch #189308).
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from trainer.checkpoint.cover import uncovered
from trainer.checkpoint.foreign import (
    CODES,
    DamagedError,
    json_of,
    naturals,
    plain_name,
    read_shapes,
    reading,
    shown,
    size_of,
)
from trainer.checkpoint.layout import Plan, Planned

INDEX = "index.json"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorPiece:
    """A box of a tensor, and where it lies. A file may leave out leading sizes of 1."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[TensorPiece, ...]


Index = Mapping[str, StoredTensor]


def write_shard(path: Path, pieces: dict[str, torch.Tensor]) -> None:
    """One rank's file of a checkpoint, made durable."""
    save_file(pieces, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that their owner alone can read
    make_durable(path)


def write_index(directory: Path, plan: Plan) -> None:
    """Where the pieces of all ranks lie: rank 0 knows without asking them."""
    entries = {name: _entry(name, planned) for name, planned in plan.items()}
    write_durably(directory / INDEX, json.dumps(entries))


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class SafetensorsReader(StorageReader):
    """Reads the boxes that a load plan asks for, from wherever an index says they lie."""

    def __init__(self, directory: Path, index: Index):
        self.directory, self.index = directory, index
        self.piece_of = {
            _index(name, piece): piece for name, stored in index.items() for piece in stored.pieces
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _metadata(stored) for name, stored in self.index.items()})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list] = {}
        for item in plan.items:
            by_file.setdefault(self.piece_of[item.storage_index].file, []).append(item)
        for file, items in by_file.items():
            with safe_open(self.directory / file, framework="pt") as opened:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    key = self.piece_of[item.storage_index].key
                    target.copy_(read_box(opened, key, offsets=item.storage_offsets, sizes=item.lengths))
                    planner.commit_tensor(item, target)
        done = Future[None]()
        done.set_result(None)
        return done

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None: ...

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def read_box(opened: Any, key: str, *, offsets: Iterable[int], sizes: Iterable[int]) -> torch.Tensor:
    """A box of a tensor in an open safetensors file; nothing else of it is read."""
    sizes = tuple(sizes)
    if not sizes:
        return opened.get_tensor(key)
    box = [slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
    part = opened.get_slice(key)
    return part[tuple(box[len(box) - len(part.get_shape()) :])].view(sizes)


def read_index(directory: Path) -> Index:
    """Raises: DamagedError, also where the pieces of a tensor do not hold each of its elements once."""
    path = directory / INDEX
    with reading(path):
        size_of(path)
        return _index_of(path, path.read_bytes())


@lru_cache(maxsize=1)  # a start reads it to verify, for the shapes, and to load: 4 s each for 2,048 ranks
def _index_of(path: Path, content: bytes) -> Index:
    entries = json_of(content)
    index = {name: _from_json(entry, where=f"{path}: {shown(name)}") for name, entry in entries.items()}
    refuse_uncovered(index, where=path)
    return index


forget_index = _index_of.cache_clear  # 0.4 GB, for 2,048 ranks


def refuse_uncovered(index: Index, *, where: Path) -> None:
    """Raises: DamagedError that names a tensor whose pieces do not hold each of its elements exactly once."""
    for name, stored in index.items():
        if wrong := uncovered(stored.shape, [(piece.offsets, piece.sizes) for piece in stored.pieces]):
            raise DamagedError(f"{where}: {shown(name)}: {wrong}")


def check_shard(path: Path, index: Index) -> None:
    """Raises: DamagedError unless a file holds exactly the pieces that the index says, each as it says."""
    shapes = read_shapes(path)
    expected = {
        key_of(name, piece.offsets): (piece.key, (CODES[stored.dtype], piece.sizes))
        for name, stored in index.items()
        for piece in stored.pieces
        if piece.file == path.name
    }
    for key, (said, kind) in expected.items():
        if said != key or shapes.get(key) != kind:
            other = shapes.get(key, "missing") if said == key else f"called {shown(said)} there"
            raise DamagedError(f"{path}: {shown(key)} must be {kind} by {INDEX}, is {other}")
    held = {key for key, (_, shape) in shapes.items() if 0 not in shape}
    if unknown := sorted(held - expected.keys()):
        raise DamagedError(f"{path} holds {shown(unknown[0])}, which {INDEX} does not name")


def write_durably(path: Path, text: str) -> None:
    path.write_text(text)
    make_durable(path)


def make_durable(path: Path) -> None:
    """What was written is on the disk, not only on its way; of a directory: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def key_of(name: str, offsets: Iterable[int]) -> str:
    """What a piece is called in its file."""
    return f"{name}@{','.join(map(str, offsets))}"


def _index(name: str, piece: TensorPiece) -> MetadataIndex:
    return MetadataIndex(name, torch.Size(piece.offsets))


def _entry(name: str, planned: Planned) -> dict[str, Any]:
    pieces = [
        {
            "file": shard_name(rank),
            "key": key_of(name, box.offsets),
            "offsets": box.offsets,
            "sizes": box.sizes,
        }
        for box, rank in planned.pieces()
    ]
    return {"dtype": NAMES[planned.dtype], "shape": planned.shape, "pieces": pieces}


def _metadata(stored: StoredTensor) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)) for piece in stored.pieces
    ]
    return TensorStorageMetadata(TensorProperties(dtype=stored.dtype), torch.Size(stored.shape), chunks)


def _from_json(entry: Mapping[str, Any], *, where: str) -> StoredTensor:
    with reading(where):
        pieces = tuple(
            TensorPiece(
                file=plain_name(piece["file"]),
                key=str(piece["key"]),
                offsets=naturals(piece["offsets"]),
                sizes=naturals(piece["sizes"]),
            )
            for piece in entry["pieces"]
        )
        return StoredTensor(dtype=DTYPES[entry["dtype"]], shape=naturals(entry["shape"]), pieces=pieces)
