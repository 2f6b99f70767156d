"""How does a run continue: from a checkpoint, after steps that were skipped, or after data that cannot be
read?

`rolled_back.json` in the run's directory makes a roll-back durable at once. It holds the checkpoint that the
run went back to, the data that it passes over, and how often it may still go back. A run that is killed
before its next checkpoint finds the file and continues as if it had not been killed.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from trainer.balance.trace import TraceWriter
from trainer.checkpoint import (
    DamagedError,
    Found,
    json_of,
    manifest_hash,
    naturals,
    reading,
    write_durably,
)
from trainer.data import DataError, StreamState
from trainer.metrics import MetricsLog
from trainer.ranks.agree import broadcast_object
from trainer.run.directory import record_rollback
from trainer.run.health import UnsoundError
from trainer.run.saving import load_checkpoint, refuse_past_end, save
from trainer.run.state import Run
from trainer.run.step import next_batches

RECORD = "rolled_back.json"
MOST_STEPS = 10**9  # the limit of `steps`
log = logging.getLogger(__name__)


def resume(run: Run, origin: Found) -> None:
    """Continues from a checkpoint, of this run or of another one. Collective.

    Raises: ConfigError, ValueError, DamagedError if the checkpoint does not fit.
    """
    load_checkpoint(run, origin)
    refuse_past_end(run, where=origin.path)
    if record := read_record(run, origin):
        run.health.load_state_dict({"counts_3": torch.tensor(record["health"])})
        for steps in record["passed_over_steps"]:
            pass_over(run, steps=steps)


def leave_unread(run: Run, before: StreamState) -> NoReturn:
    """Some rank has no rows for this step: all save what they had before it, and end.

    Raises: BadDocument, DataError.
    """
    if run.step:
        save(run, stream=before)
    run.checkpoints.finish()
    error = run.unread or DataError("another rank could not read its data")
    if (saved := run.checkpoints.last_saved) is not None:  # an earlier step, if this save failed
        error.add_note(f"saved at step {saved}; the same command continues once the data can be read")
    raise error


def roll_back(run: Run, metrics: MetricsLog | None) -> None:
    """Back to the newest checkpoint, passing over the data that was read since. Collective.

    Raises: UnsoundError if the run may not go back, or cannot.
    """
    failed_at = run.step
    run.checkpoints.finish()
    origin = checkpoint_to_return_to(run)
    steps = failed_at - origin.step
    run.health.in_row = 0
    passed_over = [*read_record(run, origin).get("passed_over_steps", []), steps]
    run.checkpoints.go_on_from(origin.step)
    write_record(run, origin, passed_over)
    load_checkpoint(run, origin, without=("health",))  # what was counted since still counts
    for number in passed_over:
        pass_over(run, steps=number)
    if dist.get_rank() == 0:
        log.warning(
            "back to step %d; the data of steps %d to %d is passed over",
            origin.step,
            origin.step + 1,
            failed_at,
        )
        record_rollback(run.config, step=origin.step, steps=steps)
    if run.evaluations is not None:
        run.evaluations.rewind(run)
    logs = [metrics, *(observer for observer in run.balancer.observers if isinstance(observer, TraceWriter))]
    for written in filter(None, logs):
        written.rewind(origin.step)


def checkpoint_to_return_to(run: Run) -> Found:
    """The newest good checkpoint, if the run may go back once more; counts it. Raises: UnsoundError."""
    first = run.step - run.health.in_row + 1
    since = f"step {run.step}: {run.health.reason}; no step could be applied from step {first} on"
    try:
        origin = run.checkpoints.newest_good() if run.health.roll_back() else None
    except DamagedError as error:
        raise UnsoundError(f"{since}; {error}") from error
    if origin is None:
        newest = run.checkpoints.last_saved
        is_there = f"the newest checkpoint is of step {newest}, from before"
        kept = is_there if newest is not None else "there is no checkpoint"
        raise UnsoundError(
            f"{since}; {kept}; continue with a lower learning rate, or with skip.rollbacks=1, which passes "
            "over the data that was read since the newest checkpoint"
        )
    return origin


def pass_over(run: Run, *, steps: int) -> None:
    """Reads the rows of so many steps, as long and as many as they were, and drops them. Collective.

    Raises: BadDocument, DataError.
    """
    back_at = run.tokens
    for _ in range(steps):
        next_batches(run)
        if run.over_documents(int(run.unread is not None)):
            raise run.unread or DataError("another rank could not read its data")
        now = run.program.settings_at(run.tokens)  # the program may change the batch on the way
        run.tokens += now.tokens
    run.tokens = back_at


def write_record(run: Run, origin: Found, passed_over: list[int]) -> None:
    """On rank 0. A disk that is full costs only what the record is for."""
    if dist.get_rank():
        return
    record = {
        "step": origin.step,
        "checkpoint": manifest_hash(origin.path),
        "passed_over_steps": passed_over,
        "health": run.health.state_dict()["counts_3"].tolist(),
    }
    draft = run.directory / f".{RECORD}.draft"
    try:
        write_durably(draft, json.dumps(record) + "\n")
        os.replace(draft, run.directory / RECORD)
    except OSError as error:
        log.warning("%s: %s; the roll-back is not durable before the next checkpoint", draft, error)


def read_record(run: Run, origin: Found) -> dict[str, Any]:
    """What a roll-back to exactly this checkpoint of this run left; {} if there was none. Collective."""
    path = run.directory / RECORD
    return broadcast_object(_read_record(path, origin) if dist.get_rank() == 0 else None)


def _read_record(path: Path, origin: Found) -> dict[str, Any]:
    if not path.is_file() or origin.path.parent.parent.resolve() != path.parent.resolve():
        return {}
    remedy = "remove it to train again on the data that a roll-back passed over"
    with reading(f"{path} cannot be read; {remedy}"):
        record = json_of(path.read_bytes())
        is_of_origin = record["checkpoint"] == manifest_hash(origin.path)
        counts, steps = naturals(record["health"]), naturals(record["passed_over_steps"])
        if len(counts) != 3 or not all(0 < number <= MOST_STEPS for number in steps):
            raise ValueError(f"health={counts}, passed_over_steps={steps} cannot be")
    return {"health": list(counts), "passed_over_steps": list(steps)} if is_of_origin else {}
