"""Does a run fit into this machine? Reckoned from the configuration, before anything is asked for.

What is reckoned is a lower bound, so nothing that fits is refused: weights, gradients and the optimizer's
state in float32, the input of each layer, on a CPU the masks of attention, and the rows of a step.
"""

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.config import Config, ConfigError, ModelConfig
from trainer.program import Program

GIB = 2**30
WEIGHT, GRADIENT = 4, 4  # [bytes] of a parameter
STATE = {"trainer.optim.adamw": 8, "trainer.optim.muon": 4}  # [bytes] at least; of a user's own, none
NO_LIMIT = 2**60  # [bytes] what a cgroup without a limit has, and more than any machine
PLANES = 3  # of a row: tokens, labels, positions


class Part(NamedTuple):
    """What some keys of the configuration ask for on one rank."""

    keys: tuple[str, ...]
    what: str
    num_bytes: int


class Room(NamedTuple):
    """What there is for one rank."""

    where: str
    num_bytes: int


def refuse_too_large(config: Config, program: Program, *, on: torch.device, num_shards: int) -> None:
    """num_shards: ranks that share the parameters. Raises: ConfigError that names the largest part."""
    parts = parts_of(config, program, num_shards=num_shards, masks=on.type == "cpu")
    needed, room = sum(part.num_bytes for part in parts), room_on(on)
    if needed <= room.num_bytes:
        return
    largest = max(parts, key=lambda part: part.num_bytes)
    values = " x ".join(f"{key}={value_of(config, key)}" for key in largest.keys)
    raise ConfigError(
        f"{values}: {largest.what} would take {largest.num_bytes / GIB:,.1f} GiB of the "
        f"{needed / GIB:,.1f} GiB that the run needs at least on each rank, but {room.where} "
        f"{room.num_bytes / GIB:,.1f} GiB; use a smaller one, or more ranks"
    )


def value_of(config: Config, key: str) -> object:
    group, _, name = key.rpartition(".")
    return getattr(getattr(config, group) if group else config, name)


def parts_of(config: Config, program: Program, *, num_shards: int, masks: bool) -> list[Part]:
    """Of one rank, at least."""
    each = WEIGHT + GRADIENT + STATE.get(config.optim["_target_"], 0)
    what = "weights, gradients and optimizer state"
    parts = [
        Part(keys, what, each * size // num_shards) for keys, size in parameters_of(config.model).items()
    ]
    nows, model = [span.now for span in program.spans], config.model
    num_bytes = getattr(torch, config.dtype).itemsize * model.dim * model.num_layers
    tokens = max(now.micro_batch * now.seq_len for now in nows)
    parts.append(
        Part(("micro_batch", "seq_len"), "what layers keep for the backward pass", tokens * num_bytes)
    )
    if masks:
        squares = max(now.micro_batch * now.seq_len**2 for now in nows)
        parts.append(Part(("seq_len", "micro_batch"), "masks of attention", 2 * squares))
    ranks = max(1, config.parallel.dp_replicate * num_shards)
    rows = max(now.tokens for now in nows) // ranks * PLANES * 8
    return [*parts, Part(("global_batch", "seq_len"), "the rows of a step", rows)]


def parameters_of(m: ModelConfig) -> dict[tuple[str, ...], int]:
    """How many there are, by the keys that say so; norm gains left out. (Built, they are counted by
    afmoe.count_parameters; a shape of 10^12 is not for building.)"""
    num_dense, num_moe = min(m.num_dense_layers, m.num_layers), max(0, m.num_layers - m.num_dense_layers)
    heads = 3 * m.num_heads + 2 * m.num_kv_heads  # query, gate and output; keys and values
    sizes = {
        ("vocab_size", "dim"): 2 * m.vocab_size * m.dim,
        ("num_heads", "head_dim", "dim", "num_layers"): heads * m.head_dim * m.dim * m.num_layers,
        ("ffn_dim", "dim", "num_dense_layers"): 3 * m.ffn_dim * m.dim * num_dense,
        ("num_experts", "expert_dim", "dim", "num_layers"): 3
        * m.num_experts
        * m.expert_dim
        * m.dim
        * num_moe,
        ("num_shared_experts", "expert_dim", "dim"): 3
        * m.num_shared_experts
        * m.expert_dim
        * m.dim
        * num_moe,
        ("num_experts", "dim"): m.num_experts * m.dim * num_moe,
    }
    return {tuple(f"model.{name}" for name in names): size for names, size in sizes.items()}


def room_on(on: torch.device) -> Room:
    """The least of what the hardware, the cgroup and ulimit leave to a rank."""
    if on.type == "cuda":
        total = torch.cuda.get_device_properties(on).total_memory
        return Room(f"{torch.cuda.get_device_name(on)} has", total)
    ranks_here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    shared = [Room("this machine has", machine_bytes())]
    shared += [Room("this machine's cgroup allows", size) for size in cgroup_bytes()]
    rooms = [Room(room.where, room.num_bytes // ranks_here) for room in shared]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        rooms.append(Room("ulimit -v allows", soft))
    return min(rooms, key=lambda room: room.num_bytes)


def machine_bytes() -> int:
    """Memory and swap."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_bytes() -> Iterator[int]:
    """Limits of this process's cgroup and those around it (versions 1 and 2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    root = Path("/sys/fs/cgroup")
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        base, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        own = base / path.lstrip("/")
        for directory in (own, *own.parents):
            if directory.is_relative_to(base):
                size = read_bytes(directory / name)
                if size < NO_LIMIT:
                    yield size


def read_bytes(file: Path) -> float:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # none there; "max"
        return math.inf
