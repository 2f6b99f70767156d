"""The run is told to end: does it end well, and in time?"""

import signal
import time
from pathlib import Path

from tests.drills.faulty import MOMENTS
from tests.drills.jobs import STEPS, Job, Launch, Where, same_losses, undisturbed
from tests.drills.table import Facts, drill
from trainer.ranks.stop import INTERRUPTED, OK, PREEMPTED, exit_code

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
            job.wait(GRACE_S)
            ends_s.append(time.time() - told_s)
        assert set(job.codes) == {code}, f"{job.codes}\n{job.output}"
        last = where.last_trained()
        assert where.checkpoints()[-1] == last and f"stopped at step {last} of" in job.output
        facts.lost.append(0)
    went_on(where, job)
    facts.note = f"ended in {max(ends_s):.1f} s"
    facts.equal = same_losses(where, undisturbed(2))
    return facts


@drill(limit_s=600, short=True)
def a_signal_at_every_moment(directory: Path, short: bool) -> Facts:
    """SIGINT, SIGTERM, SIGHUP to one of two ranks, at 22 moments of the start, of a step, of a save, of the
    end; each life goes on from the one before · both ranks end with 130 and 75, with one line and no
    traceback; after the last step a signal changes nothing"""
    facts, numbers = Facts(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for first in range(1 if short else len(numbers)):
        where = Where(directory / str(first))
        for turn, moment in enumerate(list(MOMENTS)[:: 3 if short else 1]):
            number, trained = numbers[(first + turn) % len(numbers)], where.trained()
            is_end = moment in ("the last save", "the verdict", "leaving")
            job = where.finish(fault={"fault": "signal_at", "moment": moment, "number": number, "rank": 1})
            code = OK if is_end else exit_code(number)
            assert set(job.codes) == {code}, f"{number.name} at {moment}: {job.codes}\n{job.output}"
            assert "Traceback" not in job.output, f"{number.name} at {moment}:\n{job.output}"
            ends = [line for line in job.output.splitlines() if "told to end" in line or "stopped at" in line]
            assert len(ends) == (not is_end), f"{number.name} at {moment}:\n{job.output}"
            assert where.trained() == trained or where.checkpoints()[-1] == where.last_trained()
            facts.lost.append(0)
        facts.equal = same_losses(where, undisturbed(2))
    facts.note = f"{len(facts.lost)} signals"
    return facts
