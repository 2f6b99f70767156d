"""Runs a study, arms x seeds of one program, and writes its tables.

    triquetra ablate study=smoke
    triquetra ablate study=path/to/mine.yaml seeds=5 workers=4 only=[all_on,no_smebu] steps=100

    study=             a file of configs/ablation/, or a path that ends in .yaml
    seeds=             how many, from 0; default: what the study says
    workers=2          jobs at a time, one thread each
    only=[a,b]         runs these arms only; the tables still show all that is there
    run_dir=runs       everything lies in <run_dir>/<study>/: study.md, study.json, a directory for each job
    keep_checkpoints=false    of finished jobs

Anything else is an override for all arms, after the study's base and before the arm's own: steps=100. The
same command continues a study that was stopped and runs no finished job again; a job whose settings changed
since is refused. What a study file says is at the top of trainer/lab/ablate/study.py.

Exit codes: 0 done · 1 a job failed (diverged and collapsed runs are results) · 2 refused · 130 interrupted,
saved.
"""

import fcntl
import shlex
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer import terminal
from trainer.config import CONFIG_DIR, ConfigError, check_values, filled, nearest, number, path
from trainer.lab.ablate import table
from trainer.lab.ablate.programs import PROGRAMS
from trainer.lab.ablate.study import Job, checked, jobs_of, load_study, refuse_changed, study_path
from trainer.lab.ablate.workers import FINISHED, must_stay, record_of, run_jobs
from trainer.run.directory import writing

OK, FAILED, REFUSED, STOPPED = 0, 1, 2, 130


@dataclass(kw_only=True)
class Options:
    study: str = path(MISSING)
    seeds: int | None = number(None, at_least=1, at_most=10_000, why="a run of each arm for each")
    workers: int = number(2, at_least=1, at_most=1024, why="a process each")
    only: list[str] = field(default_factory=list)
    run_dir: str = path("runs")
    keep_checkpoints: bool = False


def parse(arguments: list[str]) -> tuple[Options, list[str]]:
    """Our options, and the overrides that are left for the program. Raises: ConfigError."""
    known = {f.name for f in fields(Options)}
    ours = [a for a in arguments if a.split("=")[0] in known and "=" in a]
    try:
        values = OmegaConf.from_dotlist(ours)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from None
    if isinstance(values.get("only"), str):
        values["only"] = [values["only"]]
    options = filled(Options, values)
    check_values(options)
    return options, [a for a in arguments if a not in ours]


def ablate(options: Options, extra: list[str], *, command: str) -> int:
    study = load_study(options.study)
    study.base = [*study.base, *extra]
    study.seeds = options.seeds or study.seeds
    checked(study)
    for arm in options.only:
        if arm not in study.arms:
            raise ConfigError(f"only={arm}: is no arm{nearest(arm, list(study.arms))}")
    name, program = study_path(options.study).stem, PROGRAMS[study.program]
    directory = Path(options.run_dir) / name
    jobs = jobs_of(study, program, directory)
    with alone(directory):
        records = {job.name: record for job in jobs if (record := record_of(job)) is not None}
        for job in jobs:
            if job.name in records and must_stay(job, records[job.name]):
                refuse_changed(job, records[job.name]["settings"])
        finished = [job.name for job in jobs if records.get(job.name, {}).get("outcome") in FINISHED]
        todo = [
            job for job in jobs if job.name not in finished and (not options.only or job.arm in options.only)
        ]
        with progress(len(todo)) as view:
            complete = run_jobs(
                todo,
                program,
                workers=options.workers,
                keep_checkpoints=options.keep_checkpoints,
                report=view.report,
                tick=view.tick,
            )
        ended = {
            (job.arm, job.seed): (job, record)
            for job in jobs
            if (record := record_of(job)) and record["outcome"] in (*FINISHED, "failed")
        }
        if not complete:
            print(f"stopped with {len(ended)} of {len(jobs)} jobs ended; the same command continues")
            return STOPPED
        results = table.results_of(study, program, ended)
        page = table.markdown(study, results, name=name, command=command)
        table.write(directory, page, table.as_json(study, results, name=name, command=command))
    print(page)
    print(f"{directory}: study.md, study.json")
    outcomes = Counter(record["outcome"] for record in results.values())
    if outcomes["failed"]:
        print(
            f"{outcomes['failed']} jobs failed, see their log.txt; the same command runs them again",
            file=sys.stderr,
        )
    return FAILED if outcomes["failed"] else OK


@contextmanager
def alone(directory: Path):
    """Children inherit the lock, so a study whose engine was killed is taken up only when they too are
    gone.
    """
    with writing(run_dir=directory.parent):
        directory.mkdir(parents=True, exist_ok=True)
        opened = (directory / ".lock").open("w")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{directory} is in use by another trainer.lab.ablate; wait for it, or set run_dir="
            ) from None
        yield


# -- what is shown while it runs --------------------------------------------------------------------------


class Lines:
    """A line for each job that ends."""

    def __init__(self, total: int):
        self.total, self.ended = total, 0

    def report(self, job: Job, record: dict[str, Any]) -> None:
        self.ended += 1
        print(f"{self.ended}/{self.total}  {job.name}: {outcome_of(record)}", flush=True)

    def tick(self, running: list[Job]) -> None:
        pass

    def close(self) -> None:
        pass


class Bars(Lines):
    """One bar for the study; under it the last line that each running job wrote. No thread: it would be
    forked.
    """

    def __init__(self, total: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__(total)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, auto_refresh=False)
        self.task = self.progress.add_task("", total=total)
        self.progress.start()

    def report(self, job: Job, record: dict[str, Any]) -> None:
        self.ended += 1
        self.progress.console.print(f"{job.name}: {outcome_of(record)}", markup=False, highlight=False)
        self.progress.update(self.task, completed=self.ended, refresh=True)

    def tick(self, running: list[Job]) -> None:
        text = "\n".join(f"{job.name}  {last_line(job.directory / 'log.txt')[:80]}" for job in running)
        self.progress.update(self.task, description=text, refresh=True)

    def close(self) -> None:
        self.progress.stop()


def outcome_of(record: dict[str, Any]) -> str:
    message = " ".join(record["message"].split())
    return f"{record['outcome']}, {record['seconds']:.0f} s" + (f": {message[:200]}" if message else "")


def last_line(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[-1] if lines else ""


@contextmanager
def progress(total: int):
    view = Bars(total) if sys.stdout.isatty() and total else Lines(total)
    try:
        yield view
    finally:
        view.close()


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    codes = {ConfigError: REFUSED, KeyboardInterrupt: STOPPED}
    interrupted = "interrupted before the first job; the same command starts it"
    return terminal.run(partial(command, arguments), codes, interrupted=interrupted)


def command(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        studies = sorted(path.stem for path in (CONFIG_DIR / "ablation").glob("*.yaml"))
        print(f"{__doc__}\nStudies: {', '.join(studies)}")
        return OK
    options, extra = parse(arguments)
    of_result = [a for a in arguments if a.split("=")[0] not in ("run_dir", "workers", "keep_checkpoints")]
    return ablate(options, extra, command=shlex.join(["triquetra", "ablate", *of_result]))


if __name__ == "__main__":
    sys.exit(main())
