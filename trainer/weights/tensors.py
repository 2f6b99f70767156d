"""Which tensors go into which file, and how do they get there from a checkpoint, one at a time?

Memory: the tensor that is being written, in the run's dtype and cast. Of a stack of experts only one expert
is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.checkpoint import BoxReader, DamagedError, TensorSpec, read_index, write_durably, write_file
from trainer.config import ModelConfig
from trainer.model.hf import BIAS, Place, our_shapes, places, refuse_misfits

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
IN_CHECKPOINT = "model."  # before the names of the model's tensors


class Shard(NamedTuple):
    file: str
    kinds: dict[str, TensorSpec]  # by name on disk

    @property
    def num_bytes(self) -> int:
        return sum(kind.num_bytes for kind in self.kinds.values())


def plan(model: ModelConfig, *, dtype: torch.dtype, shard_bytes: float) -> list[Shard]:
    """Tensors layer by layer in files of at most `shard_bytes`; a tensor that is larger has a file of its
    own.
    """
    shards: list[dict[str, TensorSpec]] = []
    room = 0.0
    for name, place in places(model).items():
        kind = TensorSpec(torch.float32 if place.name.endswith(BIAS) else dtype, place.shape)
        if not shards or kind.num_bytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = kind
        room -= kind.num_bytes
    if len(shards) == 1:
        return [Shard(WEIGHTS, shards[0])]
    return [
        Shard(f"model-{i:05d}-of-{len(shards):05d}.safetensors", kinds) for i, kinds in enumerate(shards, 1)
    ]


class Weights:
    """The model's tensors in a checkpoint, read by their names on disk.

    Raises: DamagedError; ValueError naming every tensor that is missing, unknown, mis-shaped, or a bias not
    in float32.
    """

    def __init__(self, checkpoint: Path, model: ModelConfig):
        index = {
            name: stored for name, stored in read_index(checkpoint).items() if name.startswith(IN_CHECKPOINT)
        }
        try:
            refuse_misfits(index, {IN_CHECKPOINT + name: shape for name, shape in our_shapes(model).items()})
        except ValueError as error:
            raise DamagedError(f"{checkpoint}: {error}") from error
        if cast := [
            name for name, stored in index.items() if name.endswith(BIAS) and stored.dtype != torch.float32
        ]:
            raise DamagedError(f"{checkpoint}: {', '.join(cast)} must be float32")
        self.places, self.reader = places(model), BoxReader(checkpoint, index)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Whole, or one expert's part of the stack; nothing else is read."""
        place: Place = self.places[name]
        whole = place.expert is None
        offsets = [0] * len(place.shape) if whole else [place.expert, *[0] * len(place.shape)]
        sizes = place.shape if whole else (1, *place.shape)
        return (
            self.reader.read(IN_CHECKPOINT + place.name, offsets=offsets, sizes=sizes)
            .view(place.shape)
            .to(dtype)
        )


def write_weights(weights: Weights, shards: list[Shard], directory: Path) -> None:
    """The files and, of several, their index as transformers writes it."""
    for shard in shards:
        write_file(
            directory / shard.file,
            shard.kinds,
            lambda name, kinds=shard.kinds: weights.read(name, kinds[name].dtype),
        )
    if len(shards) > 1:
        write_json(
            directory / INDEX,
            {
                "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
                "weight_map": {name: shard.file for shard in shards for name in shard.kinds},
            },
        )


def write_json(path: Path, content: Mapping) -> None:
    write_durably(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
