"""CPU or GPU: which backend, which device, which mesh? And what torchtitan needs to run on a CPU.

Only this file and trainer/model/ import torchtitan (tests/test_architecture.py).
"""

import ctypes
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torchtitan.distributed import parallel_dims
from torchtitan.distributed import utils as titan_utils
from torchtitan.distributed.parallel_dims import ParallelDims

from trainer.config import AUTO, Config, ConfigError, ParallelConfig, divisors
from trainer.ranks.meeting import Meeting, meet

DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = {"cuda": "nccl", "cpu": "gloo"}[DEVICE_TYPE]
parallel_dims.device_type = DEVICE_TYPE  # torchtitan says "cuda" where there is no accelerator at all
SPMD_BACKEND = "partial_dtensor"  # torchtitan's default, spmd_types, fails in fully_shard on torch 2.13
titan_utils.set_spmd_backend(SPMD_BACKEND)
# the router's gate is float32 without it: model/router.Gate
warnings.filterwarnings("ignore", message="In CPU autocast")


def of_rank(local_rank: int) -> torch.device:
    """This rank's device; nothing is started. Raises: ConfigError.

    Some launchers show each process one GPU, which is number 0 whatever the rank's number is.
    """
    if DEVICE_TYPE == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus > 1:
        raise ConfigError(
            f"LOCAL_RANK={local_rank}, but this process sees {num_gpus} GPUs; "
            f"start at most {num_gpus} ranks on this host"
        )
    return torch.device("cuda", local_rank if num_gpus > 1 else 0)


def start(*, timeout_s: float, meeting: Meeting | None = None) -> torch.device:
    """Joins the process group of the ranks that have met, or makes one of a single process. Returns this
    rank's device. From here on nothing may be forked.
    """
    logging.getLogger("torchtitan").setLevel(logging.WARNING)
    meeting = meeting or meet(timeout_s=timeout_s)
    device = of_rank(meeting.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(
            BACKEND,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
            rank=meeting.rank,
            world_size=meeting.num_ranks,
            store=meeting.store or dist.HashStore(),
        )
    return device


def keep_freed_memory() -> None:
    """glibc gives each large block back to the kernel when it is freed, and every step pays page faults to
    get it again (measured: 50,000 to 130,000 a step at model=small; with this, none). Elsewhere than on
    glibc: nothing to set. Forked workers inherit it."""
    if DEVICE_TYPE != "cpu":
        return
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
    set_option(m_mmap_threshold, 2**30)
    set_option(m_trim_threshold, 2**31 - 1)
    set_option(m_arena_max, 1)  # the backward pass runs in a thread of its own


class Degrees(NamedTuple):
    """ranks = replicate x shard x cp; ep divides shard x cp."""

    replicate: int
    shard: int
    cp: int
    ep: int

    @property
    def num_readers(self) -> int:
        """Groups of cp ranks, neighbours in the order of ranks, that read other documents than the others."""
        return self.replicate * self.shard

    @property
    def num_shards(self) -> int:
        """Ranks of a replica, which share its weights."""
        return self.shard * self.cp


def degrees_of(config: ParallelConfig, *, num_ranks: int, num_experts: int | None) -> Degrees:
    """num_experts: of the model, None if it has no MoE layer.

    Raises: ConfigError naming degrees that would work on this number of ranks.
    """
    replicate, cp, ep = config.dp_replicate, config.cp, config.ep
    shared, with_cp = (f" / parallel.cp={cp}", f" x parallel.cp={cp}") if cp > 1 else ("", "")
    if num_ranks % cp:
        raise ConfigError(
            f"parallel.cp={cp} does not divide {num_ranks} ranks; use one of {divisors(num_ranks)}"
        )
    if num_ranks // cp % replicate:
        raise ConfigError(
            f"parallel.dp_replicate={replicate} does not divide {num_ranks} ranks{shared}; "
            f"use one of {divisors(num_ranks // cp)}"
        )
    left = num_ranks // cp // replicate
    shard = left if config.dp_shard is None else config.dp_shard
    if shard != left:
        remedy = "parallel=fsdp, or " if num_ranks > 1 and replicate == shard == cp == 1 else ""
        raise ConfigError(
            f"parallel.dp_replicate={replicate} x parallel.dp_shard={shard}{with_cp} = "
            f"{replicate * shard * cp} ranks, but there are {num_ranks}; "
            f"use {remedy}parallel.dp_shard={left} (null: what is left over)"
        )
    if ep > 1 and num_experts is None:
        raise ConfigError(f"parallel.ep={ep}, but the model has no MoE layer; use parallel.ep=1")
    fitting = [n for n in divisors(shard * cp) if num_experts is None or num_experts % n == 0]
    if ep not in fitting:
        what = "dp_shard x cp" if cp > 1 else "dp_shard"
        raise ConfigError(
            f"parallel.ep={ep} must divide the {shard * cp} ranks of a replica ({what}) and "
            f"model.num_experts={num_experts}; "
            f"use one of {fitting}"
        )
    return Degrees(replicate, shard, cp, ep)


def build_mesh(config: ParallelConfig, *, num_experts: int | None) -> ParallelDims:
    """The meshes of HSDP (dp_replicate x dp_shard) with context and expert parallelism inside the shards.

    Raises: ConfigError, as degrees_of.
    """
    world = dist.get_world_size()
    degrees = degrees_of(config, num_ranks=world, num_experts=num_experts)
    dims = ParallelDims(
        dp_replicate=degrees.replicate,
        dp_shard=degrees.shard,
        cp=degrees.cp,
        tp=1,
        pp=1,
        ep=degrees.ep,
        world_size=world,
        spmd_backend=SPMD_BACKEND,
    )
    dims.build_mesh()
    return dims


def use_plain_sum(model: torch.nn.Module) -> None:
    """FSDP takes PREMUL_SUM once its own gradient division is set to 1. gloo has none, and NCCL sums in the
    network (NVLS) without it only.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


class Hardware(NamedTuple):
    """What a rank runs on. capability: compute capability of a GPU; are_linked: its host's GPUs reach each
    other's memory, None where only one is seen; has_bfloat16: instructions that multiply it.
    """

    type: str
    capability: tuple[int, int] = (0, 0)
    are_linked: bool | None = None
    has_bfloat16: bool = True


def multiplies_bfloat16() -> bool:
    """Whether this device has instructions for it."""
    names = ("avx512_bf16", "amx_bf16", "bf16")
    return DEVICE_TYPE == "cuda" or any(torch.cpu.get_capabilities().get(name, False) for name in names)


def settled(config: Config) -> Config:
    """The same, with the fast dtype of this device in place of `auto`."""
    if config.dtype != AUTO:
        return config
    return replace(config, dtype="bfloat16" if multiplies_bfloat16() else "float32")


def hardware(on: torch.device) -> Hardware:
    if on.type != "cuda":
        return Hardware(on.type, has_bfloat16=multiplies_bfloat16())
    own = torch.cuda.current_device()
    others = [other for other in range(torch.cuda.device_count()) if other != own]
    are_linked = all(torch.cuda.can_device_access_peer(own, other) for other in others) if others else None
    return Hardware(on.type, torch.cuda.get_device_capability(on), are_linked)


def set_matmul_precision(*, dtypes: Iterable[str | None]) -> None:
    """Of float32 matmuls on a GPU, from the dtypes that the run asks for. Where all are bfloat16, those that
    are left in float32, the router's gate, multiply bfloat16 values: TF32 does so exactly, at tensor cores'
    speed. A run that asks for float32 gets float32.
    """
    torch.set_float32_matmul_precision("highest" if "float32" in dtypes else "high")


@cache
def peak_flops(device: torch.device, dtype: torch.dtype, keep: Path | None = None) -> float:
    """[FLOP/s] that MFU is measured against: the data sheet on a GPU, a measured matmul on a CPU.

    keep: the file where what was measured on this machine is kept.
    """
    if device.type == "cuda":
        from torchtitan.tools.utils import get_peak_flops

        return float(get_peak_flops(torch.cuda.get_device_name(device)))
    return measured_flops(dtype) if keep is None else kept_flops(dtype, keep)


def kept_flops(dtype: torch.dtype, file: Path) -> float:
    """As it was measured here before, with as many threads; a file that cannot be used is as good as none."""
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    threads = f"{torch.get_num_threads()} threads"
    key = ", ".join((platform.node(), processor, threads, str(dtype), f"torch {torch.__version__}"))
    known: dict[str, float] = {}
    with suppress(OSError, ValueError, AttributeError):
        known |= {str(k): float(v) for k, v in json.loads(file.read_text()).items()}
    if not 0 < known.get(key, 0) < float("inf"):
        known[key] = measured_flops(dtype)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_name(f"{file.name}.{os.getpid()}")
            draft.write_text(json.dumps(known, indent=1))
            draft.replace(file)
    return known[key]


def measured_flops(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """[FLOP/s] of a product of matrices on this CPU, the best of 8."""
    n = 1024
    a = torch.randn(n, n, dtype=dtype)
    best_s = float("inf")
    for _ in range(8):
        start_s = clock()
        torch.mm(a, a)
        best_s = min(best_s, clock() - start_s)
    return 2 * n**3 / best_s


def memory_gib(device: torch.device) -> float:
    """[GiB] Peak of this process so far: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(device: torch.device) -> dict[str, float]:
    """The metrics. On a GPU also the peak of what the allocator holds (what is above the other peak is
    fragments), and how often it had to give blocks back to find room for another.
    """
    values = {"memory_gib": memory_gib(device)}
    if device.type == "cuda":
        values["memory_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
        values["memory_retries"] = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    return values


def onto(device: torch.device, plane: torch.Tensor) -> torch.Tensor:
    """A copy that a GPU makes while the host goes on, which takes pinned memory."""
    pinned = plane.pin_memory() if device.type == "cuda" else plane
    return pinned.to(device, non_blocking=True)
