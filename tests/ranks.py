"""Run a function on several gloo ranks, in seconds: everything is imported once, here, and then forked."""

import gc
import os
import pickle
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

# Before the fork, or every rank imports them again.
import trainer.model.recompute
import trainer.train  # noqa: F401
from tests.waiting import until
from trainer.config import ConfigError, load
from trainer.data import reader
from trainer.ranks import device

# What takes a while the first time, in a fork too: Hydra's first composition, and the order of the synthetic
# source's million documents.
SYNTHETIC = load(["experiment=synthetic"])
reader.permutation = lru_cache(maxsize=4)(reader.permutation)
reader.permutation(SYNTHETIC.data.source["num_documents"], seed=SYNTHETIC.seed, epoch=0)

MEASURE = device.peak_flops
PEAK_FLOPS = 1e11  # [FLOP/s] that a rank's `mfu` is reckoned with; to measure it takes longer than two steps


def run_ranks(worker: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 600.0) -> list[Any]:
    """Calls `worker(*args)` in `num_ranks` new processes that share a gloo process group. Returns each rank's
    result.

    A result must survive torch.save: whole tensors, no DTensor. `worker` and `args` are inherited, not
    pickled, so closures are fine. What the first failing rank raised is raised here, with its traceback as a
    note; a job that is not done after `timeout_s` is killed and raises TimeoutError (what waiting.py counts).
    A worker need not end the group; having ended it, it cannot start another.
    """
    for overrides in args:
        are_words = isinstance(overrides, list) and all(isinstance(word, str) for word in overrides)
        if are_words and num_ranks > 1:  # composed here, each rank finds it in its memory
            with suppress(ConfigError):
                load(overrides)
    with tempfile.TemporaryDirectory(prefix="triquetra-ranks-") as directory:
        job = (worker, args, num_ranks, free_port(), Path(directory))
        context = start_processes(_run_rank, job, nprocs=num_ranks, join=False, start_method="fork")
        try:
            if not until(lambda: context.join(timeout=0.2, grace_period=2.0), timeout_s=timeout_s):
                alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                raise TimeoutError(f"ranks {alive} of {num_ranks} were not done after {timeout_s} s")
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise _first_failure(Path(directory)) or error from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [
            torch.load(Path(directory, f"result-{rank}"), weights_only=False) for rank in range(num_ranks)
        ]


def _run_rank(
    rank: int,
    worker: Callable[..., Any],
    args: tuple,
    num_ranks: int,
    port: int,
    directory: Path,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # What the parent has left over is not this process's to end: a process group's destructor would wait for
    # threads that did not come along.
    gc.freeze()
    gc.unfreeze = lambda: None
    torch.set_num_threads(1)
    device.peak_flops = lambda *_: PEAK_FLOPS
    try:
        dist.init_process_group("gloo", timeout=timedelta(hours=1))  # run_ranks ends it long before
        torch.save(worker(*args), directory / f"result-{rank}")
    except BaseException as error:  # SystemExit too
        failure = pickle.dumps((time.monotonic(), _picklable(error, rank)))
        (directory / f"failure-{rank}").write_bytes(failure)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _picklable(error: BaseException, rank: int) -> BaseException:
    """The error itself where it can travel, with its traceback."""
    note = f"on rank {rank}:\n{''.join(traceback.format_exception(error))}"
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever its class does on the way
        error = RuntimeError(repr(error))
    error.add_note(note)
    return error


def _first_failure(directory: Path) -> BaseException | None:
    """What the first rank to fail raised: the others then fail too, as it is gone. None if it left no
    word.
    """
    failures = []
    for path in directory.glob("failure-*"):
        # half written by a rank that was terminated meanwhile
        with suppress(EOFError, pickle.UnpicklingError):
            failures.append(pickle.loads(path.read_bytes()))
    return min(failures, key=lambda failure: failure[0])[1] if failures else None


def free_port() -> int:
    """Below the ports that the system gives to outgoing connections, so nobody is given it before rank 0
    listens.
    """
    choose = random.SystemRandom()
    while True:
        port = choose.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
