"""What does a run do when its data cannot be read, or when too many steps could not be applied?"""

import logging
from typing import NoReturn

import torch
import torch.distributed as dist

from trainer.balance.trace import TraceWriter
from trainer.checkpoint import DamagedError
from trainer.data import DataError, StreamState
from trainer.metrics import MetricsLog
from trainer.run.build import Run, resume, save, summed
from trainer.run.directory import record_rollback
from trainer.run.health import UnsoundError
from trainer.run.step import next_batches

log = logging.getLogger(__name__)


def leave_unread(run: Run, heads: StreamState) -> NoReturn:
    """Some rank has no rows for this step: all save what they had before it, and end. Raises: BadDocument,
    DataError.
    """
    if run.step:
        save(run, heads=heads)
    run.checkpoints.finish()
    error = run.unread or DataError("another rank could not read its data")
    if (saved := run.checkpoints.last_saved) is not None:  # an earlier step, if this one could not be written
        error.add_note(f"saved at step {saved}; the same command continues once the data can be read")
    raise error


def roll_back(run: Run, metrics: MetricsLog | None) -> None:
    """Back to the newest checkpoint, passing over the data that was read since. Raises: UnsoundError."""
    first, now_at = run.step - run.health.in_row + 1, run.step
    since = f"step {now_at}: {run.health.reason}; no step could be applied from step {first} on"
    run.checkpoints.finish()
    try:
        found = run.checkpoints.newest_good() if run.health.roll_back() else None
    except DamagedError as error:
        raise UnsoundError(f"{since}; {error}") from error
    if found is None:
        newest = run.checkpoints.last_saved
        kept = (
            f"the newest checkpoint is of step {newest}, from before"
            if newest is not None
            else "there is no checkpoint"
        )
        remedy = (
            "go on with a lower learning rate, or skip.rollbacks=1: it passes over the data since "
            "the newest checkpoint"
        )
        raise UnsoundError(f"{since}; {kept}. {remedy}")
    counts = run.health.counts_3.clone()
    run.checkpoints.go_on_from(found.step)
    resume(run, found)
    run.health.counts_3.copy_(counts)
    run.health.counts_3[0] = 0
    pass_over(run, steps=now_at - found.step)
    if dist.get_rank() == 0:
        log.warning(
            "back to step %d; the data of steps %d to %d is passed over", found.step, found.step + 1, now_at
        )
        record_rollback(run.config, step=found.step, steps=now_at - found.step)
    logs = [metrics, *(observer for observer in run.balancer.observers if isinstance(observer, TraceWriter))]
    for written in filter(None, logs):
        written.rewind(found.step)


def pass_over(run: Run, *, steps: int) -> None:
    """Reads the rows of so many steps, as long and as many as they were, and drops them. Raises: BadDocument,
    DataError.
    """
    back_at = run.tokens
    for _ in range(steps):
        next_batches(run)
        if summed(run, torch.tensor(int(run.unread is not None))):
            raise run.unread or DataError("another rank could not read its data")
        run.tokens += run.program.at(run.tokens).tokens  # the program may have changed them on the way
    run.tokens = back_at
