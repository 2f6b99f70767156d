"""How does a run write a checkpoint, and how is it filled from one?"""

from pathlib import Path

from trainer.checkpoint import Checkpoints, Found, SaveError
from trainer.config import ConfigError
from trainer.data import StreamState
from trainer.run.state import PARTS, Run


def save(run: Run, *, stream: StreamState | None = None) -> None:
    """Writes a checkpoint of this step, if there is none. In the background, if so configured. Collective.

    stream: the state of the stream to save; None: as it is now. Raises: SaveError.
    """
    run.checkpoints.finish()
    if run.checkpoints.last_saved != run.step:
        about = {"tokens": run.tokens, **run.about}
        wait = not run.config.checkpoint.background
        run.checkpoints.save(run.step, run.state_dict(stream=stream), about=about, texts=run.texts, wait=wait)


def finish_saving(run: Run) -> None:
    """Waits until nothing is being written.

    Raises: SaveError, on all ranks, if the checkpoint of this step was to be written and is not there.
    """
    run.checkpoints.finish()
    if run.checkpoints.misses and run.checkpoints.last_saved != run.step:
        last = run.checkpoints.last_saved
        newest = f"the newest is of step {last}" if last is not None else "there is none"
        where = f"to {run.checkpoints.directory}, see the warnings"
        raise SaveError(
            f"the checkpoint of step {run.step}, where the run stops, could not be written {where}; {newest}"
        )


def load_checkpoint(run: Run, origin: Found, *, without: tuple[str, ...] = ()) -> None:
    """Fills the run from a checkpoint, of this run or another one, but for the parts `without`. Collective.

    Raises: ValueError, DamagedError if the checkpoint does not fit.
    """
    checkpoints = Checkpoints(origin.path.parent)
    _, num_slots = checkpoints.shape(origin.step, "stream.read_VC")
    [num_counts] = checkpoints.shape(origin.step, "stream.counts")
    parts = [part for part in PARTS if part not in without]
    state = run.state_dict(parts, num_slots=num_slots, num_counts=num_counts)
    run.load_state_dict(checkpoints.load(origin.step, state))


def refuse_past_end(run: Run, *, where: Path) -> None:
    if run.config.steps is not None and run.step > run.config.steps:
        raise ConfigError(
            f"steps={run.config.steps}, but {where} is at step {run.step}; use steps={run.step} or more"
        )
    if run.tokens >= run.program.end + run.program.settings_at(run.tokens).tokens:
        raise ConfigError(
            f"stage: the program ends at {run.program.end} tokens, but {where} has seen {run.tokens}; "
            "use a longer program"
        )
