"""Where do a run's checkpoints lie, when is one complete, and which one does a run go on from?

    <run>/checkpoints/step-00000200/            its content: storage.py; its hashes: manifest.py
                      latest                    the name of the newest one
                      .step-00000250.draft/     being written
                      step-00000150.damaged/    set aside: it did not verify when the run was continued
                      step-00000300.abandoned/  set aside: the run went back to an earlier step (rewind)

A save copies what this rank holds and returns; a thread writes the copy into a draft, makes it durable, and
hashes it; rank 0 gathers the hashes into the manifest and renames the draft: the rename is the commit,
`latest` follows. Nothing is ever written into a directory that is there already. What is named step-<number>
belongs to the run as it is now, so that purging and resuming need not ask which line of the run a checkpoint
is from.
"""

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.foreign import DamagedError, shown
from trainer.checkpoint.manifest import MANIFEST, file_entry, problems, write_manifest
from trainer.checkpoint.storage import (
    INDEX,
    forget_index,
    make_durable,
    read_index,
    shard_name,
    write_durably,
    write_index,
    write_shard,
)
from trainer.checkpoint.transfer import Staged, Staging, load_into
from trainer.ranks.agree import all_gather_objects, broadcast_object

LATEST = "latest"
LAZY = "TORCH_GLOO_LAZY_INIT"  # read by torch when it makes a group
MAX_MISSES = 3  # checkpoints in a row that could not be written; then the run ends
REMEDY = "run_dir= or name= chooses another directory"
NAME = re.compile(r"step-(\d{8,})")
log = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """Checkpoints cannot be written; the message says where, warnings before it say why."""


class Found(NamedTuple):
    step: int
    path: Path


class Checkpoints:
    """The checkpoints of one run. Methods under "saving" and "loading" are collective: every rank calls them.

    keep: the newest ones; keep_every [steps]: and for good each at a multiple of it. retries: of a save that
    fails, after 1, 2, 4, ... times retry_s [s].
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        retries: int = 4,
        retry_s: float = 1.0,
    ) -> None:
        self.directory, self.keep, self.keep_every = directory, keep, keep_every
        self.retries, self.retry_s = retries, retry_s
        self.misses = 0  # in a row
        self.last_saved: int | None = None  # step
        self.best: int | None = None  # step of the best one, which stays
        self.broken: Exception | None = None
        self.thread: threading.Thread | None = None
        self.group: dist.ProcessGroup | None = None
        self.staging = Staging()

    # -- what is there --

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def all_steps(self) -> list[int]:
        """Of everything that is named like a checkpoint, oldest first. Raises: OSError if nobody may look."""
        names = os.listdir(self.directory) if os.path.lexists(self.directory) else []
        steps = {int(match[1]) for name in names if (match := NAME.fullmatch(name))}
        return sorted(step for step in steps if self.path(step).name in names)

    def steps(self) -> list[int]:
        """Of the checkpoints that were completed, oldest first. They may have been damaged since."""
        return [step for step in self.all_steps() if (self.path(step) / MANIFEST).is_file()]

    def set_aside(self, step: int, why: str) -> Path:
        """Renames a checkpoint to one that no run goes on from; its content stays."""
        name, number = f"{self.path(step).name}.{why}", 1
        while os.path.lexists(self.directory / name):
            number += 1
            name = f"{self.path(step).name}.{why}-{number}"
        return self.path(step).rename(self.directory / name)

    def rewind(self, step: int) -> list[Path]:
        """The run goes on from this step: all that is newer is set aside, newest first. Returns where it lies
        now.

        Raises: DamagedError if the checkpoint of this step is not there or not good; then nothing has
        changed.
        """
        if wrong := problems(self.path(step)):
            raise DamagedError("\n".join(wrong))
        moved = [self.set_aside(newer, "abandoned") for newer in reversed(self.all_steps()) if newer > step]
        self.point_at(step)
        return moved

    def point_at(self, step: int) -> None:
        """`latest` names this step."""
        draft = self.directory / f".{LATEST}.draft"
        write_durably(draft, f"{self.path(step).name}\n")
        os.replace(draft, self.directory / LATEST)
        make_durable(self.directory)

    # -- saving --

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        about: Mapping[str, Any] | None = None,
        texts: Mapping[str, str] | None = None,
        wait: bool = False,
    ) -> None:
        """Copies `state` (nested dicts of tensors) and writes the copy in the background, after a save that
        is under way.

        about: for the manifest; texts: further files, by name. wait: until it is written.
        Raises: SaveError when MAX_MISSES in a row could not be written.
        """
        self.finish()
        self.connect()
        job = (step, self.staging.stage(state), dict(about or {}), dict(texts or {}))
        self.thread = threading.Thread(target=self._write, args=job, name="checkpoint", daemon=True)
        self.thread.start()
        if wait:
            self.finish()

    def connect(self) -> None:
        """Makes the group in which the ranks agree on a save, apart from the step's collectives, which go on
        meanwhile. Two ranks connect when they first speak: all pairs of 2,048 would take minutes. Writing may
        take its time; a dead rank is seen at once.
        """
        if self.group is None and dist.get_world_size() > 1:
            before = os.environ.get(LAZY)
            os.environ[LAZY] = "1"
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
            os.environ.pop(LAZY) if before is None else os.environ.update({LAZY: before})

    def finish(self) -> None:
        """Waits until nothing is being written. Raises: SaveError, on all ranks."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.broken is not None:
            raise self.broken
        if self.misses >= MAX_MISSES:
            raise SaveError(
                f"{self.misses} checkpoints in a row could not be written to {self.directory}, see the "
                "warnings"
            )

    def _write(self, *job: Any) -> None:
        """In the thread."""
        try:
            for attempt in range(self.retries + 1):
                problem = self._attempt(*job)
                if problem is None:
                    self.misses, self.last_saved = 0, job[0]
                    return
                wait_s = self.retry_s * 2**attempt if attempt < self.retries else None
                if dist.get_rank() == 0:
                    then = "the run goes on without it" if wait_s is None else f"again in {wait_s:g} s"
                    log.warning("the checkpoint of step %d was not written: %s; %s", job[0], problem, then)
                time.sleep(wait_s or 0)
            self.misses += 1
        except Exception as error:  # noqa: BLE001  # a rank is gone, so there is no agreeing on anything; `finish` raises it
            self.broken = error

    def _attempt(self, step: int, staged: Staged, about: dict[str, Any], texts: dict[str, str]) -> str | None:
        """What went wrong, the same on all ranks; then the draft is gone, and all else as it was."""
        draft = self.directory / f".{self.path(step).name}.draft"

        def prepare() -> None:
            if os.path.lexists(self.path(step)):
                raise FileExistsError(f"{self.path(step)} is there already")
            remove(draft)
            draft.mkdir(parents=True)

        def write() -> dict[str, Any]:
            if not staged.pieces:  # what this rank holds others hold too, and write
                return {}
            own = draft / shard_name(dist.get_rank())
            write_shard(own, staged.pieces)
            return {own.name: file_entry(own)}

        def commit() -> None:
            for name, text in texts.items():
                write_durably(draft / name, text)
            write_index(draft, staged.plan)
            entries = files | {name: file_entry(draft / name) for name in (INDEX, *texts)}
            write_manifest(
                draft,
                {"step": step, "saved_at": datetime.now(UTC).isoformat(timespec="seconds"), **about},
                entries,
            )
            make_durable(draft)
            draft.rename(self.path(step))

        def tidy() -> None:
            self.point_at(step)
            self._purge()

        if (problem := self._first(prepare)) is None:
            files, problem = self._each(write)
            problem = problem or self._first(commit)
            after = self._first(tidy if problem is None else lambda: remove(draft))
            if after and dist.get_rank() == 0:  # it is there: a further attempt would only find that
                log.warning(
                    "the checkpoint of step %d was written, but not all after it was done: %s", step, after
                )
        return problem

    def _first(self, action: Callable[[], Any]) -> str | None:
        """Rank 0 acts; all hear what went wrong."""
        return self._told(attempted(action)[1] if dist.get_rank() == 0 else None)

    def _each(self, action: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str | None]:
        """Every rank acts; all hear what went wrong on the first of them. The results, united, on rank 0."""
        own = attempted(action)
        answers = [own] * dist.get_world_size() if dist.get_rank() == 0 else None
        if self.group is not None:
            dist.gather_object(own, answers, dst=0, group=self.group)
        problem = self._told(first_problem(answers) if answers is not None else None)
        return {name: entry for result, _ in answers or [] for name, entry in (result or {}).items()}, problem

    def _told(self, problem: str | None) -> str | None:
        """What rank 0 says, on all ranks."""
        said = [problem]
        if self.group is not None:
            dist.broadcast_object_list(said, src=0, group=self.group)
        return said[0]

    def _purge(self) -> None:
        """Deletes all but the newest whole ones, and those that are kept for good."""
        whole = [step for step in self.steps() if not problems(self.path(step), hashes=False)]
        for step in whole[: -self.keep]:
            if step != self.best and (not self.keep_every or step % self.keep_every):
                gone = self.directory / f".{self.path(step).name}.deleted"
                remove(gone)  # what an earlier one left, which would be in the way
                remove(self.path(step).rename(gone))  # renamed at once: nobody finds half

    # -- loading --

    def newest_good(self) -> Found | None:
        """The newest checkpoint that verifies; what is wrong with newer ones is said aloud. None: there are
        none.

        Raises: DamagedError if there are some and none is good.
        """
        steps, problem = broadcast_object(attempted(self.all_steps) if dist.get_rank() == 0 else None)
        if problem:
            raise DamagedError(f"{self.directory} cannot be read: {problem}; {REMEDY}")
        for step in reversed(steps):
            wrong = self.verify(step)
            if not wrong:
                return Found(step, self.path(step))
            if dist.get_rank() == 0:
                for line in wrong:
                    log.warning("DAMAGED: %s", line)
                log.warning("the checkpoint of step %d cannot be used, trying an earlier one", step)
        if steps:
            raise DamagedError(
                f"{self.directory}: none of the checkpoints can be used (steps "
                f"{', '.join(map(str, steps))}), see the warnings; "
                "bring one of them back, or choose another name= to start anew"
            )
        return None

    def verify(self, step: int) -> list[str]:
        """What is wrong with a checkpoint: each rank reads a share of its files, all hear of everything."""
        own = problems(self.path(step), share=slice(dist.get_rank(), None, dist.get_world_size()))
        return sorted({problem for of_rank in all_gather_objects(own) for problem in of_rank})

    def go_on_from(self, step: int | None) -> None:
        """This run's next checkpoint follows that of `step`: newer ones were found damaged and are set aside,
        drafts removed. Every rank tries whether it can write here.

        Raises: SaveError, on all ranks, if one of them cannot.
        """

        def tidy() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob(".step-*"):
                remove(path)
            for newer in reversed(self.all_steps()):
                if step is not None and newer > step:
                    log.warning("set aside: %s", self.set_aside(newer, "damaged"))
            if step is not None:
                self.point_at(step)

        problem = broadcast_object(attempted(tidy)[1] if dist.get_rank() == 0 else None)
        probed = all_gather_objects(attempted(self._probe)[1] if problem is None else None)
        refusals = [f"rank {rank}: {refusal}" for rank, refusal in enumerate(probed) if refusal]
        if problem := problem or next(iter(refusals), None):
            raise SaveError(f"{self.directory} cannot be written to: {problem}; {REMEDY}")
        self.last_saved = step

    def _probe(self) -> None:
        """What a save does, with a few bytes."""
        draft = self.directory / f".probe-{dist.get_rank():05d}.draft"
        written = draft.with_suffix("")
        try:
            write_durably(draft, "Can a checkpoint be written here?\n")
            draft.rename(written)
            make_durable(self.directory)
        finally:
            for path in (draft, written):
                path.unlink(missing_ok=True)

    def warn_if_short(self, weights: Iterable[Tensor]) -> None:
        """On rank 0: is there room for one checkpoint, which holds these and more?"""
        free = shutil.disk_usage(self.directory).free
        needed = sum(tensor.numel() * tensor.element_size() for tensor in weights)
        if free < needed:
            log.warning(
                "%s has %.1f MB free; the weights alone of a checkpoint take %.1f MB; %s",
                *(self.directory, free / 1e6, needed / 1e6, REMEDY),
            )

    def load(self, step: int, state: dict[str, Any]) -> dict[str, Any]:
        """Fills the tensors of `state` in place, each rank its own part, and returns it. Raises: ValueError,
        DamagedError.
        """
        try:
            return load_into(state, directory=self.path(step), index=read_index(self.path(step)))
        finally:
            forget_index()

    def shape(self, step: int, name: str) -> tuple[int, ...]:
        """Of a saved tensor."""
        index = read_index(self.path(step))
        if name not in index:
            raise ValueError(
                f"{self.path(step)} holds no {name}: another version of Triquetra wrote it; continue with "
                "that one"
            )
        return index[name].shape


def remove(path: Path) -> None:
    """Whatever it is; of a link itself, never what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def attempted(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """(its result, None) or (None, what it raised)."""
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001  # a full disk has many names
        return None, f"{type(error).__name__}: {shown(error)}"


def first_problem(answers: Sequence[tuple[Any, str | None]]) -> str | None:
    """Of the ranks that failed; without the rank where all of them did."""
    failed = [(rank, said) for rank, (_, said) in enumerate(answers) if said]
    if not failed:
        return None
    rank, said = failed[0]
    return said if len(failed) == len(answers) else f"rank {rank}: {said}"
