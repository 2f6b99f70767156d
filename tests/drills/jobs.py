"""How is a run started, broken and started again, and what did it leave behind?

A job's ranks are forked from this process, which has imported everything, or started by torchrun. Each rank
leads a process group of its own, with its data workers and its watchdog's observer: none of them may outlive
the job.
"""

import atexit
import json
import logging
import multiprocessing
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.drills import faulty
from tests.ranks import free_port
from tests.waiting import until
from trainer.checkpoint import problems

REPOSITORY = Path(__file__).parent.parent.parent
STEPS, INTERVAL = 20, 5  # of most drills
BASE = [
    "model=debug",
    "model.num_layers=2",
    "model.global_every=2",
    "model.dim=32",
    "model.vocab_size=256",
    "data=synthetic",
    "data.source.mean_length=40",
    "seq_len=16",
    "global_batch=4",
    "micro_batch=1",
    f"steps={STEPS}",
    "name=run",
    f"checkpoint.interval={INTERVAL}",
    "checkpoint.retry_s=0.1",
    "data.retry_s=0.1",
    "timeout_s=60",
    "heartbeat_s=30",
]
LAYOUTS = {2: ["parallel=fsdp"], 4: ["parallel=hsdp_ep"]}
TIMED = ("tokens_per_s", "mfu", "memory_gib", "data/wait_s")  # and so never the same twice
PATIENCE_S = 15.0  # for the other ranks, once one has failed
MARK = "TRIQUETRA_DRILL"  # in the environment of all that torchrun starts


class Where:
    """A drill's own directory, with the run in it."""

    def __init__(self, path: Path, *, num_ranks: int = 2) -> None:
        self.path, self.num_ranks = path, num_ranks
        path.mkdir(parents=True, exist_ok=True)

    @property
    def run(self) -> Path:
        return self.path / "run"

    def overrides(self, *more: str) -> list[str]:
        return [*BASE, *LAYOUTS[self.num_ranks], f"run_dir={self.path}", *more]

    def start(
        self, *more: str, fault: dict[str, Any] | None = None, ranks: Sequence[int] | None = None
    ) -> "Job":
        """ranks: those that get `more`; the others get the plain overrides. None: all."""
        chosen = range(self.num_ranks) if ranks is None else ranks
        return Job(
            self, [self.overrides(*(more if rank in chosen else ())) for rank in range(self.num_ranks)], fault
        )

    def finish(self, *more: str, fault: dict[str, Any] | None = None, timeout_s: float = 100.0) -> "Job":
        """Runs to its end."""
        with self.start(*more, fault=fault) as job:
            job.wait(timeout_s)
        return job

    def completes(self, *more: str) -> "Job":
        job = self.finish(*more)
        assert set(job.codes) == {0}, f"the same command ended with {job.codes}\n{job.output}"
        return job

    @contextmanager
    def launched(
        self, *more: str, fault: dict[str, Any] | None = None, restarts: int = 1
    ) -> Iterator["Launch"]:
        launch = Launch(self, self.overrides(*more), fault, restarts)
        try:
            yield launch
        finally:
            launch.end()

    # -- what is there --

    def metrics(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl, without what is measured with a clock."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            {k: v for k, v in json.loads(line).items() if k not in TIMED}
            for line in lines
            if line.endswith("}")
        ]

    def starts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "starts.jsonl").read_text().splitlines()]

    def starts_at(self) -> int:
        """The step that the next start goes on from, if all is well."""
        return max(self.checkpoints(), default=0)

    def restart(self) -> None:
        """From nothing."""
        shutil.rmtree(self.run)

    def checkpoint(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step-{step:08d}"

    def checkpoints(self) -> list[int]:
        """All that are named like one."""
        found = (path.name.removeprefix("step-") for path in (self.run / "checkpoints").glob("step-*"))
        return sorted(int(name) for name in found if name.isdecimal())

    def trained(self) -> list[tuple[float, int]]:
        """(time [s], step) of each step that rank 0 trained, in all lives of the run (faulty.py writes
        them).
        """
        path = self.path / "trained"
        pairs = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(float(at_s), int(step)) for at_s, step in pairs]

    def last_trained(self) -> int:
        return self.trained()[-1][1]

    def recovered_s(self, fault_s: float) -> float:
        """[s] from the fault to the end of the first step after it."""
        return next(at_s for at_s, _ in self.trained()[self.before(fault_s) :]) - fault_s

    def before(self, fault_s: float) -> int:
        return sum(at_s <= fault_s for at_s, _ in self.trained())

    def whole(self) -> None:
        """No directory is named like a checkpoint and is none, and no draft was left."""
        for step in self.checkpoints():
            assert not (found := problems(self.checkpoint(step))), found

    def copy_of(self, other: Path) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(other, self.run)


class Job:
    """Ranks that are forked from here. `codes`: how each ended, as subprocess has it."""

    def __init__(self, where: Where, overrides: list[list[str]], fault: dict[str, Any] | None) -> None:
        self.where, self.started_s = where, time.time()
        self.log = where.path / f"log-{len(list(where.path.glob('log-*'))):03d}"
        self.log.touch()
        fork, port, num = multiprocessing.get_context("fork"), free_port(), len(overrides)
        spec = {**(fault or {}), "where": str(where.path)}
        jobs = [(rank, num, port, self.log, spec, of_rank) for rank, of_rank in enumerate(overrides)]
        self.processes = [fork.Process(target=_rank, args=job) for job in jobs]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: Any) -> None:
        groups = [process.pid for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        left = [
            group for group in groups if not until(lambda group=group: not group_lives(group), timeout_s=5)
        ]
        for group in left:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        if error[0] is None:
            assert not left, f"processes of the job live on after it, in the groups {left}"
        elif isinstance(error[1], AssertionError):
            error[1].add_note(f"the job's last words:\n{self.output[-3000:]}")

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], Any], *, timeout_s: float = 60.0, what: str = "it") -> None:
        """Waits for something while all ranks live."""
        ended = until(
            lambda: condition() or any(code is not None for code in self.codes), timeout_s=timeout_s
        )
        assert condition(), (
            f"{what} did not "
            f"happen{f', the ranks ended with {self.codes}' if ended else f' in {timeout_s} s'}"
        )

    def trained(self, step: int) -> None:
        """Waits until this step is trained, in this life."""
        reached = lambda: any(at_s > self.started_s and of >= step for at_s, of in self.where.trained())  # noqa: E731
        self.until(reached, what=f"step {step}")

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> float:
        """Returns when [s]."""
        at_s = time.time()
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)
        return at_s

    def wait(self, timeout_s: float = 100.0) -> list[int]:
        """As a launcher does: when one has failed, the others are given PATIENCE_S to end by themselves."""
        left_s = until(lambda: any(self.codes) or None not in self.codes, timeout_s=timeout_s)
        assert left_s, f"not done after {timeout_s} s"
        patience_s = min(PATIENCE_S, max(1.0, left_s))
        if not until(lambda: None not in self.codes, timeout_s=patience_s):
            raise AssertionError(f"one rank has ended, others live on after {patience_s:.0f} s: {self.codes}")
        return self.codes


def _rank(rank: int, num: int, port: int, log: Path, spec: dict[str, Any], overrides: list[str]) -> None:
    """In the new process."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    logging.getLogger().handlers.clear()  # pytest's: a rank's warnings belong into its log
    sys.exit(faulty.main(spec, overrides))


class Launch:
    """A job under torchrun: the real command, with everything imported anew in each rank."""

    def __init__(
        self, where: Where, overrides: list[str], fault: dict[str, Any] | None, restarts: int
    ) -> None:
        self.where, self.mark, self.started_s = where, secrets.token_hex(8), time.time()
        self.log = where.path / f"log-{len(list(where.path.glob('log-*'))):03d}"
        spec = json.dumps({**(fault or {}), "where": str(where.path)})
        command = [
            sys.executable,
            "-m",
            "trainer.torchrun",
            "--standalone",
            "--nproc-per-node",
            str(where.num_ranks),
            "--max-restarts",
            str(restarts),
            "-m",
            "tests.drills.faulty",
            spec,
            *overrides,
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def trained(self, step: int, *, timeout_s: float = 100.0) -> None:
        reached = lambda: any(at_s > self.started_s and of >= step for at_s, of in self.where.trained())  # noqa: E731
        until(lambda: reached() or self.process.poll() is not None, timeout_s=timeout_s)
        assert reached(), f"step {step} was not reached:\n{self.output[-3000:]}"

    def kill(self, rank: int, number: int) -> float:
        """Returns when [s]."""
        at_s = time.time()
        os.kill(int((self.where.path / f"pid.{rank}").read_text()), number)
        return at_s

    def wait(self, timeout_s: float = 150.0) -> int:
        assert until(lambda: self.process.poll() is not None, timeout_s=timeout_s), (
            f"not done:\n{self.output[-3000:]}"
        )
        assert until(lambda: not self.living(), timeout_s=5), "processes live on after torchrun has ended"
        return self.process.returncode

    def living(self) -> list[int]:
        """What this job started and still runs: all of it has the mark in its environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"{MARK}={self.mark}".encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
        for pid in self.living():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


# -- what should have been ----------------------------------------------------------------------------------


@cache
def shared() -> Path:
    """What drills have in common, until this process ends."""
    path = Path(tempfile.mkdtemp(prefix="drills-shared-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def undisturbed(num_ranks: int, *more: str) -> Where:
    """A run that nothing happens to; made once."""
    where = Where(
        shared() / f"undisturbed-{num_ranks}-{zlib.crc32(' '.join(more).encode()):x}", num_ranks=num_ranks
    )
    where.completes(*more)
    assert [line["step"] for line in where.metrics()] == list(range(1, len(where.metrics()) + 1))
    return where


def same_losses(where: Where, reference: Where, *, but: Sequence[str] = ()) -> str:
    """Every line of metrics.jsonl, each number in it, bit for bit. Returns it in words. but: names that may
    differ.
    """
    found, expected = (
        [{k: v for k, v in line.items() if k not in but} for line in of.metrics()]
        for of in (where, reference)
    )
    steps = [line["step"] for line in found]
    assert steps == [line["step"] for line in expected], f"metrics.jsonl has steps {steps}"
    for one, other in zip(found, expected, strict=True):
        differ = {
            key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)
        }
        assert not differ, f"step {one['step']} is not the undisturbed run's: {differ}"
    return f"yes, {len(steps)} of {len(steps)} bit for bit"


def group_lives(group: int) -> bool:
    """Other than as a zombie that nobody waits for."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                return True
    return False
