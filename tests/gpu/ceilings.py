"""Stage 0. What is this machine, and how fast can it be? All later shares are shares of these."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from tests.gpu.bench import Bench

PACKAGES = ("torch", "torchtitan", "triton", "transformers", "numpy", "liger-kernel")


@dataclass(frozen=True, kw_only=True)
class Size:
    copied_bytes: int
    side: int
    dtype: torch.dtype


SIZES = {
    "cuda": Size(copied_bytes=2**31, side=8192, dtype=torch.bfloat16),
    "cpu": Size(copied_bytes=2**22, side=256, dtype=torch.float32),
}


def machine(bench: Bench, size: Size) -> None:
    """For the record."""
    bench.figure("python", platform.python_version())
    bench.figure("cores", len(os.sched_getaffinity(0)))
    for package in PACKAGES:
        try:
            bench.figure(package, version(package))
        except PackageNotFoundError:
            bench.absent(package, "not installed")
    if not bench.is_gpu:
        bench.absent("gpu", "this is a CPU")
        return
    of = torch.cuda.get_device_properties(bench.on)
    bench.figure("gpu", of.name)
    bench.figure("gpus", torch.cuda.device_count())
    bench.figure("memory", of.total_memory / 2**30, "GiB")
    bench.figure("multiprocessors", of.multi_processor_count)
    bench.figure("cuda", torch.version.cuda or "none")
    bench.figure("nccl", ".".join(map(str, torch.cuda.nccl.version())))


def copy(bench: Bench, size: Size) -> None:
    """A large copy: bytes read and written per second."""
    source = torch.zeros(size.copied_bytes, dtype=torch.uint8, device=bench.on)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source), rounds=10)
    bench.figure("copy", 2 * size.copied_bytes / seconds / 1e12, "TB/s")


def matmul(bench: Bench, size: Size) -> None:
    """A square matrix product, as a stage is to reach it at best."""
    left = torch.randn(size.side, size.side, device=bench.on, dtype=size.dtype)
    right = torch.randn_like(left)
    seconds = bench.seconds(lambda: left @ right, rounds=10)
    bench.figure("matmul", 2 * size.side**3 / seconds / 1e12, "TFLOP/s")


CHECKS = (machine, copy, matmul)
