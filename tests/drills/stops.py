"""The run is told to end: does it end well, and in time?"""

import signal
import time
from pathlib import Path

from tests.drills.jobs import STEPS, Job, Launch, Where, same_losses, undisturbed
from tests.drills.table import Facts, drill
from trainer.ranks.stop import INTERRUPTED, PREEMPTED

GRACE_S = 30.0  # clusters give 30 s or more


def went_on(where: Where, told: Job | Launch) -> None:
    """Nothing was lost: saved at the last step that was trained, and the next start was from there."""
    last = [step for at_s, step in where.trained() if at_s < time.time()][-1]
    assert where.checkpoints()[-1] == last < STEPS, f"trained to step {last}, saved {where.checkpoints()}"
    assert f"stopped at step {last} of {STEPS}, saved; the same command continues" in told.output
    where.completes()
    assert where.starts()[-1]["step"] == last


@drill(limit_s=150)
def sigterm_to_torchrun(directory: Path, short: bool) -> Facts:
    """SIGTERM to torchrun (a preempted job) · saved at the step where it was, exit code 75, on which
    launchers put the job back into the queue"""
    where = Where(directory)
    with where.launched() as launch:
        launch.trained(7)
        told_s = time.time()
        launch.process.send_signal(signal.SIGTERM)
        assert (code := launch.wait()) == PREEMPTED, f"exit code {code}:\n{launch.output[-3000:]}"
        took_s = time.time() - told_s
    assert took_s < GRACE_S, f"{took_s:.1f} s from the signal to the end"
    went_on(where, launch)
    recovered_s = [where.recovered_s(told_s + took_s) + took_s]
    return Facts(
        lost=[0],
        recovered_s=recovered_s,
        equal=same_losses(where, undisturbed(2)),
        note=f"ended in {took_s:.1f} s",
    )


@drill(limit_s=150, short=True)
def signal_to_one_rank(directory: Path, short: bool) -> Facts:
    """SIGTERM, then SIGINT (Ctrl-C) to one of two ranks · both agree on a step, save and end with 75, and
    with 130
    """
    facts, ends_s, where = Facts(), [], Where(directory)
    for step, number, code in ((4, signal.SIGTERM, PREEMPTED), (9, signal.SIGINT, INTERRUPTED)):
        with where.start() as job:
            job.trained(step)
            told_s = job.kill(1, number=number)
            job.wait()
            ends_s.append(time.time() - told_s)
        assert set(job.codes) == {code}, f"{job.codes}\n{job.output}"
        last = where.last_trained()
        assert where.checkpoints()[-1] == last and f"stopped at step {last} of" in job.output
        facts.lost.append(0)
        assert ends_s[-1] < GRACE_S
    went_on(where, job)
    facts.note = f"ended in {max(ends_s):.1f} s"
    facts.equal = same_losses(where, undisturbed(2))
    return facts
