"""How do many jobs run side by side? Each in a child that is forked when everything is imported.

    <run_dir>/<study>/<arm>-s<seed>/job.json   settings, outcome, seconds
                                    log.txt    what the job printed
                                    ...        what the program writes there

Outcomes: ok, collapsed and diverged are results. started, interrupted and failed run again with the next
command. A child leads a process group of its own, so Ctrl-C reaches the parent alone; the parent signals each
child once and waits.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch

from trainer.config import ConfigError
from trainer.lab.ablate.programs import INTERRUPTED, Program
from trainer.lab.ablate.study import Job, settings

FINISHED = ("ok", "collapsed", "diverged")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def record_of(job: Job) -> dict[str, Any] | None:
    """What is known of a job that was started; None: it never was."""
    path = job.directory / "job.json"
    return json.loads(path.read_text()) if path.exists() else None


def must_stay(job: Job, record: dict[str, Any]) -> bool:
    """Whether a job left something that other settings would mix with: a result, or a checkpoint to go on
    from.
    """
    return record["outcome"] in FINISHED or any((job.directory / "checkpoints").glob("step-*"))


def write_record(job: Job, record: dict[str, Any]) -> None:
    draft = job.directory / ".job.json"
    draft.write_text(json.dumps(record, indent=1))
    draft.rename(job.directory / "job.json")


class Stop:
    """Ctrl-C or SIGTERM while the jobs run: noted once, for the loop."""

    def __enter__(self) -> "Stop":
        self.asked = False
        self.before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True


def run_jobs(
    jobs: list[Job],
    program: Program,
    *,
    workers: int,
    keep_checkpoints: bool,
    report: Callable[[Job, dict[str, Any]], None],
    tick: Callable[[list[Job]], None] = lambda running: None,
) -> bool:
    """Runs each job in a child, `workers` at a time. Returns whether all were run; False: told to stop, all
    children left.

    report: gets each job that ended and its record. tick: gets the running jobs about twice a second.
    """
    waiting, running, is_stopping = list(jobs), {}, False
    with Stop() as stop:
        while running or (waiting and not stop.asked):
            while waiting and len(running) < workers and not stop.asked:
                job = waiting.pop(0)
                running[job.name] = (job, start(job, program, keep_checkpoints=keep_checkpoints))
            tick([job for job, _ in running.values()])
            connection.wait([process.sentinel for _, process in running.values()], timeout=0.5)
            for name, (job, process) in list(running.items()):
                if not process.is_alive():
                    process.join()
                    del running[name]
                    report(job, conclude(job, process, stopping=stop.asked))
            if stop.asked and not is_stopping:
                is_stopping = True
                print("stopping: each running job finishes its step and saves", flush=True)
                for _, process in running.values():
                    with suppress(ProcessLookupError):
                        os.kill(process.pid or 0, signal.SIGINT)
    return not waiting and not stop.asked


def start(job: Job, program: Program, *, keep_checkpoints: bool) -> BaseProcess:
    job.directory.mkdir(parents=True, exist_ok=True)
    seconds = (record_of(job) or {}).get("seconds", 0.0)
    record = {
        "arm": job.arm,
        "seed": job.seed,
        "outcome": "started",
        "message": "",
        "seconds": seconds,
        "overrides": job.overrides,
        "settings": settings(job.config),
    }
    write_record(job, record)
    process = get_context("fork").Process(target=child, args=(job, program, record, keep_checkpoints))
    # the child opens up when its own handlers are in place
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return process


def conclude(job: Job, process: BaseProcess, *, stopping: bool) -> dict[str, Any]:
    """The record of a job whose process is gone, whether or not it lived to write it."""
    record = record_of(job)
    assert record is not None  # `start` wrote it
    if record["outcome"] == "started":
        code = process.exitcode or 0
        message = f"killed by signal {-code}" if code < 0 else f"the process left with exit code {code}"
        message += ", out of memory?" if code == -signal.SIGKILL else ""
        record |= {"outcome": INTERRUPTED} if stopping else {"outcome": "failed", "message": message}
        write_record(job, record)
    return record


# -- in the child -----------------------------------------------------------------------------------------


def child(job: Job, program: Program, record: dict[str, Any], keep_checkpoints: bool) -> None:
    detach(job.directory / "log.txt")
    start_s = time.monotonic()
    outcome, message = judge(program, job.config)
    record |= {
        "outcome": outcome,
        "message": message,
        "seconds": record["seconds"] + time.monotonic() - start_s,
    }
    if outcome in FINISHED and not keep_checkpoints:
        rmtree(job.directory / "checkpoints", ignore_errors=True)
    write_record(job, record)


def judge(program: Program, config: Any) -> tuple[str, str]:
    """Runs it. A run that diverges is a result of an ablation; all else that is raised is a failure."""
    try:
        return program.run(config), ""
    except FloatingPointError as error:
        return "diverged", str(error)
    except KeyboardInterrupt:
        return INTERRUPTED, ""
    except ConfigError as error:
        print(f"error: {error}")
        return "failed", str(error)
    except BaseException as error:  # noqa: BLE001  # SystemExit too; the other jobs go on
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"


def detach(log: Path) -> None:
    """One thread, default signals, output into the log, told to stop when the parent dies."""
    os.setpgid(0, 0)
    stream = log.open("a", buffering=1)
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    sys.stdout = sys.stderr = stream
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    torch.set_num_threads(1)
    # of libraries that have not started theirs yet
    os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
