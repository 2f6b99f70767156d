"""Stage 5. Where does the host wait for the GPU in a training step?

torch's sync debug mode warns at every call that waits. A microbatch on one GPU must not wait at all; the step
around it may wait three times: for the sums that all ranks agree on, and for what is written to the log.
"""

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tests.gpu.bench import Bench
from trainer import next_batches
from trainer.config import load
from trainer.run.build import build
from trainer.run.state import Run
from trainer.run.step import backward, train_step

STEPS = 2  # that are watched
WAIT = "synchronizing CUDA operation"


@dataclass(frozen=True, kw_only=True)
class Size:
    overrides: Sequence[str]


BASE = ["data=synthetic", "name=waits", "optim=muon", "data.workers=0", "global_batch=8", "micro_batch=2"]
SIZES = {
    "cuda": Size(overrides=[*BASE, "model=small", "seq_len=512", "dtype=bfloat16"]),
    "cpu": Size(overrides=[*BASE, "model=debug", "seq_len=32"]),
}


@contextmanager
def run_of(overrides: Sequence[str]) -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as directory:
        run = build(load([*overrides, f"run_dir={directory}", "steps=100"]))
        try:
            yield run
        finally:
            run.stream.close()
            dist.destroy_process_group()


@contextmanager
def watched(bench: Bench) -> Iterator[Counter[str]]:
    """Lines of code at which the host waited, by how often; none on a CPU."""
    lines = Counter[str]()
    bench.wait()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if bench.is_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            if bench.is_gpu:
                torch.cuda.set_sync_debug_mode("default")
    of_waits = [warning for warning in seen if WAIT in str(warning.message)]
    lines.update(f"{Path(warning.filename).name}:{warning.lineno}" for warning in of_waits)


def waits(bench: Bench, size: Size) -> None:
    """0 in forward and backward of a microbatch, at most 3 in the rest of a step."""
    with run_of(size.overrides) as run:
        for _ in range(3):  # shapes are compiled, buffers made
            train_step(run, next_batches(run))
        batches = [next_batches(run) for _ in range(STEPS)]
        with watched(bench) as of_steps:
            for batch in batches:
                train_step(run, batch)
        with watched(bench) as of_backward:
            backward(run, batches[0], waited_s=0.0)
        with watched(bench) as of_no_microbatch:  # the gradients are there: what `backward` does besides
            backward(run, batches[0][:0], waited_s=0.0)
    if not bench.is_gpu:
        bench.absent("waits", "sync debug mode is CUDA's; the steps run without")
        return
    of_microbatches = of_backward.total() - of_no_microbatch.total()
    bench.figure("in two steps, by line", ", ".join(f"{line} x{n}" for line, n in of_steps.most_common()))
    bench.at_most("in the microbatches of a step", of_microbatches, 0)
    bench.at_most("in the rest of a step", of_steps.total() / STEPS - of_microbatches, 3)


CHECKS = (waits,)
