"""How is launch/slurm.sbatch submitted, held at a step and watched?"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.drills.jobs import REPOSITORY, Where, same_losses, undisturbed
from tests.slurm.cluster import Cluster
from tests.slurm.gate import GATE
from tests.waiting import until

SCRIPT = "launch/slurm.sbatch"
SOURCE = [
    "data.source._target_=tests.slurm.gate.Gated",
    "+data.source.hold_at=24",  # rank 0 of 2 comes to it behind the first checkpoint
    "data.shuffle=false",
    "data.workers=0",
    "heartbeat_s=600",
    "timeout_s=3600",
]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


class Run(Where):
    """One of several in a directory."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path)
        self.name = name

    @property
    def run(self) -> Path:
        return self.path / self.name


def submit(
    cluster: Cluster, where: Where, *overrides: str, options: tuple[str, ...] = (), **environment: str
) -> str:
    """The number of a job. options: of sbatch; environment: what the user has exported."""
    command = ["sbatch", "--parsable", "--nodes=2", *options, SCRIPT, *where.overrides(*SOURCE, *overrides)]
    logs = {"LOGS": str(where.path / "logs"), "SITE": os.devnull, "OMP_NUM_THREADS": "1"}
    return cluster.run(*command, cwd=REPOSITORY, **logs | environment)


class Job:
    """A job of the cluster, whose run is in `where`."""

    def __init__(self, cluster: Cluster, where: Where, *, number: str, log: Path) -> None:
        self.cluster, self.where, self.id, self.log = cluster, where, number, log

    @classmethod
    def of(
        cls,
        cluster: Cluster,
        where: Where,
        *overrides: str,
        held: bool = True,
        options: tuple[str, ...] = (),
        log: Path | None = None,
        **environment: str,
    ) -> "Job":
        """Submits it. held: its first life waits at a step, after a checkpoint."""
        log = log or where.path / "job.log"
        if held:
            environment[GATE] = str(where.path)
        number = submit(cluster, where, *overrides, options=(f"--output={log}", *options), **environment)
        return cls(cluster, where, number=number, log=log)

    @property
    def facts(self) -> dict[str, str]:
        """What Slurm says of it."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    @property
    def lives(self) -> int:
        return int(self.facts["Restarts"]) + 1

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def reaches(self, condition: Callable[[], Any], *, what: str, timeout_s: float = 150.0) -> None:
        """Waits for something while the job has not ended."""
        ended = lambda: self.state in ENDED  # noqa: E731
        until(lambda: condition() or ended(), timeout_s=timeout_s)
        assert condition(), f"{what}: not so; the job is {self.state}\n{self.output[-4000:]}"

    def is_held(self) -> int:
        """Waits until the run stands and a checkpoint is there. Returns the last step that was trained."""
        held = self.where.path / f"held.{self.where.run.name}"
        self.reaches(lambda: held.exists() and self.where.checkpoints(), what="the run stands at a step")
        return self.where.metrics()[-1]["step"]

    def ends(self, state: str, code: int = 0, *, alone: bool = True, timeout_s: float = 200.0) -> None:
        """alone: then nothing runs any more that any job has started."""
        until(lambda: self.state in ENDED, timeout_s=timeout_s)
        facts = self.facts
        assert facts["JobState"] == state, f"{facts['JobState']}, not {state}\n{self.output[-4000:]}"
        if state in ("COMPLETED", "FAILED"):
            assert facts["ExitCode"] == f"{code}:0", f"{facts['ExitCode']}\n{self.output[-4000:]}"
        left = self.cluster.living
        assert not alone or until(lambda: not left(), timeout_s=20), f"processes of the job live on: {left()}"

    def goes_on(self, after: int) -> float:
        """When [s] the first step behind `after` was trained."""
        trained = lambda: self.where.metrics()[-1:] and self.where.metrics()[-1]["step"] > after  # noqa: E731
        self.reaches(trained, what=f"a step after {after}", timeout_s=200)
        return time.time()

    def equals_undisturbed(self) -> str:
        self.where.whole()
        return same_losses(self.where, undisturbed(self.where.num_ranks, *SOURCE))


def stopped_well(job: Job, step: int) -> None:
    """Told to stop at a step: saved there, and the next life went on from there."""
    assert f"stopped at step {step} of" in job.output and f"continuing at step {step} of" in job.output
    assert [start["step"] for start in job.where.starts()] == [0, step], job.where.starts()
