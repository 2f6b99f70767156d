"""Does a run fit into this machine? Estimated from the configuration, before any memory is allocated.

The estimate is a lower bound, so nothing that fits is refused. It contains weights, gradients and optimizer
state in float32, the input of each layer, and the rows of a step.
"""

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.config import Config, ConfigError, ModelConfig
from trainer.program import Program, StepSettings, named
from trainer.ranks.device import Degrees
from trainer.size import matrices

GIB = 2**30
WEIGHT, GRADIENT = 4, 4  # [bytes] of a parameter
STATE = {"trainer.optim.adamw": 8, "trainer.optim.muon": 4}  # [bytes] at least; of a user's own, none
NO_LIMIT = 2**60  # [bytes] what a cgroup without a limit has, and more than any machine
PLANES = 3 * 8  # [bytes] of a token in a row: itself, its label and position


class Part(NamedTuple):
    """What some keys of the configuration ask for on one rank."""

    keys: str  # with their values
    what: str
    num_bytes: int


class Room(NamedTuple):
    """What there is for one rank."""

    where: str
    num_bytes: int


def refuse_too_large(config: Config, program: Program, degrees: Degrees, *, on: torch.device) -> None:
    """Raises: ConfigError that names the largest part."""
    refuse(parts_of(config, program, degrees, on_cpu=on.type == "cpu"), room_on(on))


def refuse_too_many_rows(config: Config, program: Program, degrees: Degrees) -> None:
    """Of a step: they wait in the host's memory, whatever device computes. Raises: ConfigError."""
    rows = [rows_of(config, span.now, degrees) for span in program.spans]
    refuse([max(rows, key=lambda part: part.num_bytes)], room_on(torch.device("cpu")))


def refuse(parts: list[Part], room: Room) -> None:
    needed = sum(part.num_bytes for part in parts)
    if needed <= room.num_bytes:
        return
    largest = max(parts, key=lambda part: part.num_bytes)
    raise ConfigError(
        f"{largest.keys}: {largest.what} would take {largest.num_bytes / GIB:,.1f} GiB of the "
        f"{needed / GIB:,.1f} GiB that the run needs at least on each rank, but {room.where} "
        f"{room.num_bytes / GIB:,.1f} GiB; use a smaller one, or more ranks"
    )


def parts_of(config: Config, program: Program, degrees: Degrees, *, on_cpu: bool) -> list[Part]:
    """Of one rank, at least: the parameters, and the most that a span needs beside them."""
    each = WEIGHT if config.train_only else WEIGHT + GRADIENT + STATE.get(config.optim["_target_"], 0)
    what = "weights, gradients and optimizer state"
    parts = [
        Part(_shown(config.model, keys), what, each * size // degrees.num_shards)
        for keys, size in matrices(config.model).items()
    ]
    of_spans = [parts_of_step(config, span.now, degrees, on_cpu=on_cpu) for span in program.spans]
    return parts + max(of_spans, key=lambda of_span: sum(part.num_bytes for part in of_span))


def parts_of_step(config: Config, now: StepSettings, degrees: Degrees, *, on_cpu: bool) -> list[Part]:
    m, tokens = config.model, now.micro_batch * now.seq_len // degrees.cp
    inputs = tokens * m.dim * m.num_layers * getattr(torch, config.dtype).itemsize
    parts = [
        Part(written(config, now, "micro_batch", "seq_len"), "what layers keep for their gradients", inputs)
    ]
    if on_cpu:  # of a GPU: refuse_too_many_rows
        parts.append(rows_of(config, now, degrees))
    return parts


def rows_of(config: Config, now: StepSettings, degrees: Degrees) -> Part:
    rows = PLANES * now.tokens // degrees.num_readers
    return Part(written(config, now, "global_batch", "seq_len"), "the rows of a step", rows)


def written(config: Config, now: StepSettings, *keys: str) -> str:
    """The keys with the values that a span has, which is named where these are its own."""
    where = "" if all(getattr(now, key) == getattr(config, key) for key in keys) else named(now.span)
    return where + " x ".join(f"{key}={getattr(now, key)}" for key in keys)


def _shown(m: ModelConfig, keys: tuple[str, ...]) -> str:
    return " x ".join(f"model.{key}={getattr(m, key)}" for key in keys)


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
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(base):
                size = read_bytes(directory / name)
                if size < NO_LIMIT:
                    yield size


def read_bytes(file: Path) -> float:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # none there; "max"
        return math.inf
