"""A fresh process for what registers the fake device.

Torch's engine counts the devices when it first runs backward, so a process that has done so takes no new one,
and neither do its forks. The server that these processes are forked from has only imported.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

multiprocessing.set_forkserver_preload(["trainer.lab.plan.plan"])


def in_a_process(worker: Callable[..., Any], directory: Path, *args: Any) -> Any:
    """What worker(*args) returns there. The worker is a function of a module, and its arguments are
    pickled.
    """
    torch.multiprocessing.start_processes(
        _saved, args=(worker, directory / "result", args), nprocs=1, start_method="forkserver"
    )
    return torch.load(directory / "result", weights_only=False)


def _saved(rank: int, worker: Callable[..., Any], path: Path, args: tuple) -> None:
    torch.save(worker(*args), path)
