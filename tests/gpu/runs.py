"""Stage 6. Do runs on this device stop, die and go on, and is it the same run bit for bit?

The faults are those of tests/drills. On a GPU each life is a process started anew; on a CPU it is forked.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.drills.jobs import BASE, Job, Where, same_losses
from tests.gpu import faulty  # noqa: F401  # its faults are added to those of the drills
from tests.gpu.bench import Bench
from tests.gpu.stages import REPOSITORY
from tests.gpu.waits import run_of
from tests.ranks import free_port
from trainer import finish_saving, next_batches, save, train_step
from trainer.ranks.stop import PREEMPTED
from trainer.ranks.watchdog import HUNG

STEPS, INTERVAL = 8, 3


class Process(subprocess.Popen):
    """With the names of multiprocessing's."""

    @property
    def exitcode(self) -> int | None:
        return self.poll()

    def is_alive(self) -> bool:
        return self.poll() is None

    def join(self) -> None:
        self.wait()


class Spawned(Job):
    """Ranks that are started from nothing, each by a command."""

    def __init__(self, where: Where, overrides: list[list[str]], fault: dict[str, Any] | None) -> None:
        self.where, self.started_s = where, time.time()
        self.log = where.path / f"log-{len(list(where.path.glob('log-*'))):03d}"
        spec = json.dumps({**(fault or {}), "where": str(where.path)})
        num = str(len(overrides))
        job = {"WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_ADDR": "127.0.0.1"}
        job["MASTER_PORT"] = str(free_port())
        with self.log.open("w") as log:
            self.processes = [
                Process(
                    [sys.executable, "-m", "tests.gpu.faulty", spec, *of_rank],
                    cwd=REPOSITORY,
                    env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                for rank, of_rank in enumerate(overrides)
            ]


@dataclass(frozen=True, kw_only=True)
class Size:
    overrides: Sequence[str]
    job: type[Job]
    hang: str  # the fault that the watchdog is to end
    heartbeat_s: float  # of that run: the watchdog's clock is slow on a busy machine
    at_once: int  # scenes
    num_ranks: int = 1


OF_ALL = [f"steps={STEPS}", f"checkpoint.interval={INTERVAL}"]
SMALL = [text for text in BASE if not text.startswith(("steps=", "checkpoint.interval="))]
GPU = [
    "model=tiny", "data=synthetic", "name=run", "optim=muon", "dtype=bfloat16", "seq_len=256",
    "global_batch=8", "micro_batch=1", "data.workers=2", "checkpoint.retry_s=0.1", "timeout_s=90",
]  # fmt: skip
SIZES = {
    "cuda": Size(overrides=[*GPU, *OF_ALL], job=Spawned, hang="kernel_without_end", heartbeat_s=4, at_once=8),
    "cpu": Size(
        overrides=[*SMALL, *OF_ALL, "data.workers=1"], job=Job, hang="hang_in_step", heartbeat_s=1, at_once=1
    ),
}


class Place(Where):
    """A directory of a run, which starts as the size says."""

    def __init__(self, path: Path, size: Size) -> None:
        super().__init__(path, num_ranks=size.num_ranks)
        self.size = size

    def overrides(self, *more: str) -> list[str]:
        return [*self.size.overrides, f"run_dir={self.path}", *more]

    def completes(self, *more: str, fault: dict[str, Any] | None = None) -> Job:
        job = self.finish(*more, fault=fault)
        assert set(job.codes) == {0}, f"ended with {job.codes}\n{job.output[-3000:]}"
        return job

    def start(self, *more: str, fault: dict[str, Any] | None = None, ranks: Any = None) -> Job:
        return self.size.job(self, [self.overrides(*more)] * self.num_ranks, fault)

    def bits(self) -> dict[str, str]:
        """A hash of each file of tensors in the last checkpoint."""
        files = sorted(self.checkpoint(STEPS).rglob("*.safetensors"))
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def same_run(place: Place, reference: Place) -> None:
    same_losses(place, reference)
    assert place.bits() and place.bits() == reference.bits(), "the last checkpoint has other bits"
    place.whole()


# -- scenes: each in a directory of its own, beside the others ---------------------------------------


def again(place: Place, reference: Place) -> None:
    """the same command in another directory, whose data workers are forked before CUDA is started"""
    place.completes(fault={"fault": "note_forks"})
    same_run(place, reference)
    states = (place.path / "forks").read_text().split()
    assert states and set(states) == {"False"}, f"CUDA had been started at {states.count('True')} forks"


def sigterm(place: Place, reference: Place) -> None:
    """SIGTERM at half: exit code 75, saved; the same command goes on"""
    job = place.finish(fault={"stop_at": STEPS // 2})
    assert set(job.codes) == {PREEMPTED}, f"{job.codes}\n{job.output[-3000:]}"
    assert place.checkpoints()[-1] == STEPS // 2
    place.completes()
    same_run(place, reference)


def killed_in_a_save(place: Place, reference: Place) -> None:
    """kill -9 with half a shard written: no broken checkpoint is named like one; the same command goes on"""
    with place.start(fault={"fault": "pause", "hook": "half a shard", "step": 2 * INTERVAL}) as job:
        job.until((place.path / "reached").exists, what="the save", timeout_s=90)
        job.kill()
        job.wait()
    assert place.checkpoints() == [INTERVAL]
    place.completes()
    same_run(place, reference)


def not_a_number(place: Place, reference: Place) -> None:
    """a gradient that is not a number: the step is left out, no bit of weights, optimizer, biases changes"""
    job = place.finish(fault={"fault": "wrong_numbers", "kind": "gradient", "steps": [INTERVAL + 1]})
    assert set(job.codes) == {0}, f"{job.codes}\n{job.output[-3000:]}"
    skipped = [line["skipped_steps"] for line in place.metrics()]
    assert skipped == [0] * INTERVAL + [1] * (STEPS - INTERVAL), skipped
    before, after = (json.loads(line) for line in (place.path / "digests.0").read_text().splitlines())
    assert before["before"] == after["after"]
    assert place.metrics()[:INTERVAL] == reference.metrics()[:INTERVAL]


def hung(place: Place, reference: Place) -> None:
    """a kernel (on a CPU: a step) that never ends: the watchdog writes the stacks and ends the rank with 7"""
    heartbeat = f"heartbeat_s={place.size.heartbeat_s:g}"
    with place.start(heartbeat, fault={"fault": place.size.hang, "step": INTERVAL + 1}) as job:
        reached = lambda: any(step == INTERVAL for _, step in place.trained())  # noqa: E731
        job.until(reached, what=f"step {INTERVAL}", timeout_s=200)
        codes = job.wait(timeout_s=200)
    assert HUNG in codes, f"{codes}\n{job.output[-3000:]}"
    assert f"in step {INTERVAL + 1}" in (place.run / "stacks.0.txt").read_text()


SCENES = (again, sigterm, killed_in_a_save, not_a_number, hung)


def scenes(bench: Bench, size: Size) -> None:
    """One undisturbed run, which compiles for all; then every scene, side by side."""
    with tempfile.TemporaryDirectory(prefix="triquetra-gpu-runs-") as directory:
        reference = Place(Path(directory, "reference"), size)
        reference.completes()
        act = partial(played, Path(directory), size, reference)
        if size.at_once == 1:
            outcomes: Iterable[str] = list(map(act, SCENES))
        else:
            with ThreadPoolExecutor(size.at_once) as pool:
                outcomes = list(pool.map(act, SCENES))
    for scene, outcome in zip(SCENES, outcomes, strict=True):
        bench.same(f"{scene.__name__}: {scene.__doc__}", outcome, "holds")


def played(directory: Path, size: Size, reference: Place, scene: Callable[[Place, Place], None]) -> str:
    """`holds`, or in one line why not."""
    try:
        scene(Place(directory / scene.__name__, size), reference)
    except Exception as error:  # noqa: BLE001  # the other scenes go on
        print(f"-- {scene.__name__}\n{traceback.format_exc()}", flush=True)
        return " ".join(str(error).split())[:200] or type(error).__name__
    return "holds"


# -- in this process ---------------------------------------------------------------------------------


def stall_of_a_save(bench: Bench, size: Size) -> None:
    """A save in the background holds a step up by at most 10 % of a whole one; memory goes back."""
    overrides = [text for text in size.overrides if not text.startswith("steps=")]
    with run_of([text.replace("model=tiny", "model=small") for text in overrides]) as run:
        for _ in range(2):
            train_step(run, next_batches(run))
        background_s, waited_s, levels = [], [], []
        for _ in range(4):
            train_step(run, next_batches(run))
            bench.wait()
            start_s = time.perf_counter()
            save(run)
            stalled_s = time.perf_counter() - start_s
            finish_saving(run)
            background_s.append(stalled_s)
            waited_s.append(time.perf_counter() - start_s)
            levels.append(torch.cuda.memory_allocated() if bench.is_gpu else 0)
        # the first one makes its pinned buffers
        share = sum(background_s[1:]) / sum(waited_s[1:])
    bench.speed_at_most("stall over the whole save", share, 0.10)
    bench.figure("whole save", sum(waited_s[1:]) / 3, "s")
    bench.at_most("memory after the last save over that after the second", levels[-1] - levels[1], 0, "bytes")


CHECKS = (scenes, stall_of_a_save)
