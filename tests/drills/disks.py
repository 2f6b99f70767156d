"""The disk is full, or gives back something else than what was written."""

import hashlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

from tests.drills.jobs import INTERVAL, STEPS, Where, same_losses, undisturbed
from tests.drills.table import Facts, drill
from trainer.checkpoint import problems
from trainer.checkpoint.__main__ import main
from trainer.ranks.stop import CANNOT_SAVE

SIZE_MB = 16
SAVED = ["checkpoint.retries=2", "checkpoint.retry_s=0.3"]


@drill(limit_s=200, short=True)
def the_disk_is_full(directory: Path, short: bool) -> Facts:
    """the disk is full from a checkpoint on, for good · a warning says so, the run goes on; what is there
    stays whole, no draft stays; after 3 checkpoints that were missed it ends with exit code 5; with room
    again the same command completes"""
    where = Where(directory)
    with small_disk(where.path) as (how, fill, empty):
        fault = None if how == "a tmpfs" else {"fault": "full_disk"}
        with where.start(*SAVED, f"checkpoint.interval={INTERVAL - 2}", fault=fault) as job:
            job.until(lambda: where.checkpoint(INTERVAL - 2).exists(), what="the first checkpoint")
            before = where.checkpoints()
            fill()
            job.wait()
        assert set(job.codes) == {CANNOT_SAVE}, f"{job.codes}\n{job.output[-3000:]}"
        assert "No space left on device" in job.output and "the run goes on without it" in job.output
        assert "3 checkpoints in a row could not be written" in job.output
        assert set(before) <= set(where.checkpoints())
        where.whole()
        assert not list((where.run / "checkpoints").glob(".step-*")), "a draft was left"
        fault_s, last = time.time(), where.last_trained()
        empty()
        where.completes(*SAVED)
        lost = last - where.starts()[-1]["step"]
        note, recovered_s = (
            f"{how}; {lost} steps is what 3 missed checkpoints cost",
            where.recovered_s(fault_s),
        )
        equal = same_losses(where, undisturbed(2))
    return Facts(lost=[lost], recovered_s=[recovered_s], equal=equal, note=note)


@drill(limit_s=150)
def the_disk_has_room_again(directory: Path, short: bool) -> Facts:
    """the disk is full when a checkpoint is written, and has room again within the retries · the retry
    succeeds, nothing is missing, the run knows no difference"""
    where = Where(directory)
    with small_disk(where.path) as (how, fill, empty):
        fault = None if how == "a tmpfs" else {"fault": "full_disk"}
        with where.start("checkpoint.retry_s=0.5", "checkpoint.background=false", fault=fault) as job:
            job.until(lambda: where.checkpoint(INTERVAL).exists(), what="the first checkpoint")
            fill()
            job.until(lambda: "was not written: " in job.output, what="a failed save")
            empty()
            job.wait()
        assert set(job.codes) == {0}, f"{job.codes}\n{job.output[-3000:]}"
        assert "No space left on device" in job.output and "the run goes on without it" not in job.output
        assert where.checkpoints() == [STEPS - INTERVAL, STEPS]
        where.whole()
        equal = same_losses(where, undisturbed(2))
    return Facts(lost=[0], equal=equal, note=how)


@contextmanager
def small_disk(path: Path) -> Iterator[tuple]:
    """A tmpfs at `path`, or where none can be mounted, a file `full` that a fault looks for. (which of them,
    fill, empty)
    """
    if not can_mount():
        yield "ENOSPC injected in fsync", (path / "full").touch, (path / "full").unlink
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", path], check=True)
    ballast = path / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    try:
        yield "a tmpfs", fill, ballast.unlink
    finally:
        subprocess.run(["umount", "-l", path], check=False)


@cache
def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as directory:
        if shutil.which("mount") is None:
            return False
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], capture_output=True).returncode:
            return False
        subprocess.run(["umount", directory], check=True)
        return True


def tree(directory: Path) -> dict[str, str]:
    """{file: hash}, but of the lock, in which each process writes its name."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- going back ---------------------------------------------------------------------------------------------


@drill(limit_s=200)
def going_back(directory: Path, short: bool) -> Facts:
    """rewind to step 10 of checkpoints 10, 15, 20; a kill after the new line's checkpoint 14; before that one
    where 15 and 20 are incomplete · the run goes on from the new line, never from what was set aside; keep=2
    keeps whole ones: 10 and 14"""
    facts, reference = Facts(), undisturbed(2, "checkpoint.keep=9")
    for how in ("rewind", "incomplete"):
        where = Where(directory / how)
        where.copy_of(reference.run)
        if how == "rewind":
            with redirect_stdout(StringIO()):
                assert main(["rewind", str(where.run), "10"]) == 0
            assert where.checkpoints() == [5, 10]
        else:
            for step in (15, 20):
                (where.checkpoint(step) / "manifest.json").unlink()
        every = ["checkpoint.keep=2", "optim.lr=2e-3"]  # another line: with other weights
        job = where.finish(*every, fault={"stop_at": 14})
        assert set(job.codes) == {75}, job.output
        assert where.checkpoints() == [10, 14], f"{where.checkpoints()} after {how}"
        where.whole()
        with where.start(*every, "checkpoint.interval=100") as job:
            job.trained(17)
            killed_s = job.kill()
            job.wait()
        where.completes(*every)
        assert [start["step"] for start in where.starts()][-3:] == [10, 14, 14], where.starts()
        facts.lost.append(where.trained()[where.before(killed_s) - 1][1] - 14)
        facts.recovered_s.append(where.recovered_s(killed_s))
        aside = sorted(path.name for path in (where.run / "checkpoints").glob("step-*.*"))
        assert [name.split(".")[1] for name in aside] == (
            ["abandoned"] if how == "rewind" else ["damaged"]
        ) * 2, aside
        assert not any(problems(where.checkpoint(step)) for step in where.checkpoints())
    line = Where(directory / "straight")  # the new line, without a kill
    line.copy_of(reference.run)
    with redirect_stdout(StringIO()):
        assert main(["rewind", str(line.run), "10"]) == 0
    line.completes("checkpoint.keep=2", "optim.lr=2e-3")
    for how in ("rewind", "incomplete"):
        where = Where(directory / how)
        facts.equal = f"{same_losses(where, line)}, of the new line"
    assert where.metrics()[-1]["loss"] != reference.metrics()[-1]["loss"]
    return facts
