"""What a run is given from outside fails: its data, and where it reports to."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

from tests.drills.jobs import STEPS, Where, same_losses, undisturbed
from tests.drills.table import Facts, drill
from tests.ranks import free_port
from trainer.ranks.stop import NO_DATA


@drill(limit_s=200, short=True)
def the_data_cannot_be_read(directory: Path, short: bool) -> Facts:
    """reads fail for good on one rank, in its data worker and in its own process · all ranks end with exit
    code 4 and a checkpoint of the last trained step; once the data can be read the same command goes on"""
    facts = Facts()
    for workers in [1] if short else [1, 0]:
        where, more = (
            Where(directory / str(workers)),
            (f"data.workers={workers}", "data.retries=2", "data.prefetch=1"),
        )
        job = where.finish(*more, fault={"fault": "source", "rank": 1, "after": 14})
        assert set(job.codes) == {NO_DATA}, f"{job.codes}\n{job.output[-3000:]}"
        last = where.last_trained()
        assert 1 <= last < STEPS and where.checkpoints()[-1] == last, (
            f"trained to {last}, saved {where.checkpoints()}"
        )
        assert (
            "cannot be read, tried 3 times in 0.3 s: OSError: [Errno 5] Input/output error (drill)"
            in job.output
        )
        assert "another rank could not read its data" in job.output
        assert f"saved at step {last}; the same command continues once the data can be read" in job.output
        again = where.completes(*more)
        assert where.starts()[-1]["step"] == last
        facts.lost.append(last - where.starts()[-1]["step"])
        facts.recovered_s.append(where.recovered_s(again.started_s))
        facts.equal = same_losses(where, undisturbed(2))
    return facts


@drill(limit_s=120)
def the_data_comes_late(directory: Path, short: bool) -> Facts:
    """a read fails three times on one rank and then works · the run knows no difference"""
    where = Where(directory)
    fault = {"fault": "source", "rank": 1, "after": 6, "times": 3}
    job = where.finish(fault=fault)
    assert set(job.codes) == {0}, f"{job.codes}\n{job.output[-3000:]}"
    assert len(where.starts()) == 1
    return Facts(lost=[0], equal=same_losses(where, undisturbed(2)))


@contextmanager
def environment(**values: str):
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@drill(limit_s=200)
def the_tracker_is_down(directory: Path, short: bool) -> Facts:
    """W&B does not answer; TensorBoard's directory cannot be written · one warning, the run completes,
    metrics.jsonl is whole
    """
    facts, took = Facts(), {}
    dead = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}",
        "WANDB_API_KEY": "a" * 40,
        "WANDB_SILENT": "true",
    }
    with environment(**dead):
        for name in ("wandb", "tensorboard"):
            where = Where(directory / name)
            where.run.mkdir()
            (where.run / "tensorboard").write_text("a file where the directory should be")
            start_s = time.time()
            job = where.completes(f"logging={name}")
            took[name] = where.trained()[0][0] - start_s
            assert job.output.count("tracking stopped, metrics.jsonl goes on") == 1, job.output
            facts.equal = same_losses(where, undisturbed(2))
    facts.lost = [0]
    facts.note = (
        f"first step after {took['wandb']:.0f} s with W&B down, after {took['tensorboard']:.0f} "
        "s with TensorBoard down"
    )
    return facts
