"""How does a function run on several GPUs? In processes started anew: CUDA does not survive a fork."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from tests.gpu import stock  # noqa: F401  # in the new process too: before the trainer
from tests.ranks import free_port


def spawn_ranks(worker: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """As tests/ranks.run_ranks, which forks. `worker` is found by its name; it joins the group itself."""
    with tempfile.TemporaryDirectory(prefix="triquetra-gpu-ranks-") as directory:
        job = (worker, args, num_ranks, free_port(), directory)
        start_processes(_run_rank, job, nprocs=num_ranks, start_method="spawn")
        return [torch.load(Path(directory, str(rank)), weights_only=False) for rank in range(num_ranks)]


def _run_rank(
    rank: int, worker: Callable[..., Any], args: tuple, num_ranks: int, port: int, where: str
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_PORT": str(port)}
    try:
        torch.save(worker(*args), Path(where, str(rank)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
