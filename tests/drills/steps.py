"""A step's numbers are wrong: do all ranks leave it out, and is the run otherwise what it would have been?

The references are made by hand: the same program, in which the step's update is left out, or the steps' data
is passed over.
"""

import json
from pathlib import Path

from tests.drills.jobs import INTERVAL, TIMED, Where, same_losses, shared, undisturbed
from tests.drills.table import Facts, drill
from tests.ranks import run_ranks
from trainer import train
from trainer.checkpoint import Found
from trainer.config import load
from trainer.ranks.stop import UNSOUND

LONG = 48  # [steps] spikes are judged after 32 applied ones
IGNORED = ("skipped_steps", *TIMED)  # runs by hand count none


def by_hand(overrides: list[str], left_out: list[int], origin: Found | None, passed_over: int) -> list[dict]:
    """Each applied step's metrics, of a run without a loop, a log and a judge. left_out: steps that train on
    nothing.
    """
    run, lines = train.build(load(overrides)), []
    if origin is not None:
        train.resume(run, origin)
        for _ in range(passed_over):
            assert train.next_batches(run) is not None
    while run.step < run.last_step:
        batches = train.next_batches(run)
        if run.step + 1 in left_out:
            run.tokens, run.step = run.tokens + run.program.settings_at(run.tokens).tokens, run.step + 1
        else:
            lines.append(train.train_step(run, batches))
    run.stream.close()
    return lines


def same_as_by_hand(
    where: Where, *more: str, left_out: tuple = (), origin: Found | None = None, passed_over: int = 0
) -> str:
    overrides = [text for text in where.overrides(*more) if not text.startswith(("run_dir=", "skip."))]
    overrides.append(f"run_dir={shared() / 'by-hand'}")
    expected = run_ranks(by_hand, where.num_ranks, overrides, [*left_out], origin, passed_over)[0]
    found = {line["step"]: line for line in where.metrics()}
    steps = [line["step"] for line in expected]
    assert steps == [step for step in sorted(found) if step >= steps[0] and step not in left_out]
    for line in expected:
        of_run = found[line["step"]]
        differ = {
            key: (of_run.get(key), line[key])
            for key in line
            if key not in IGNORED and of_run.get(key) != line[key]
        }
        assert not differ, f"step {line['step']}: {differ}"
    return f"{len(expected)} of {len(expected)} bit for bit those of a run by hand"


def unchanged(where: Where, steps: list[int], *, of_rank: int) -> None:
    """Weights, optimizer state and biases were the same after these steps as before."""
    lines = [json.loads(line) for line in (where.path / f"digests.{of_rank}").read_text().splitlines()]
    before, after = (
        {line["step"]: line[when] for line in lines if when in line} for when in ("before", "after")
    )
    assert [*before] == steps and before == after, f"rank {of_rank}: a skipped step changed something"


@drill(limit_s=250, short=True)
def not_a_number_on_one_rank(directory: Path, short: bool) -> Facts:
    """on one rank a gradient is NaN (its loss looks well); then a loss; then both ranks' · all ranks skip
    that step and no other, it is counted once, nothing has changed by it; later steps equal a run by hand in
    which the update is left out"""
    equal = ""
    for kind, rank in [("gradient", 1), ("loss", 1), ("gradient", None)][: 1 if short else None]:
        where = Where(directory / f"{kind}-{rank}")
        only = {} if rank is None else {"rank": rank}
        job = where.finish(fault={"fault": "wrong_numbers", "kind": kind, "steps": [8], **only})
        assert set(job.codes) == {0}, f"{job.codes}\n{job.output[-3000:]}"
        assert [line["skipped_steps"] for line in where.metrics()] == [0] * 7 + [1] * 13
        assert "WARNING trainer.run.step: step 8 was not applied" in job.output
        assert (kind != "loss") or "on rank 1 " in job.output
        for of_rank in range(2) if rank is None else [rank]:
            unchanged(where, [8], of_rank=of_rank)
        equal = same_as_by_hand(where, left_out=(8,))
    return Facts(lost=[1], equal=f"{equal} without step 8")


@drill(limit_s=150)
def too_many_steps_in_a_row(directory: Path, short: bool) -> Facts:
    """the gradient is NaN from step 8 on, skip.most=3 · exit code 6 after step 11; the newest checkpoint is
    from before step 8, though 10 is a checkpoint's step; the same command goes on from there once the cause
    is gone"""
    where = Where(directory)
    fault = {"fault": "wrong_numbers", "kind": "gradient", "steps": [*range(8, 21)], "rank": 1}
    job = where.finish("skip.most=3", fault=fault)
    assert set(job.codes) == {UNSOUND}, f"{job.codes}\n{job.output[-3000:]}"
    assert where.checkpoints() == [INTERVAL] and where.last_trained() == 11
    assert (
        "no step could be applied from step 8 on; the newest checkpoint is of step 5, from before"
        in job.output
    )
    again = where.completes("skip.most=3")
    recovered_s = [where.recovered_s(again.started_s)]
    return Facts(lost=[11 - INTERVAL], recovered_s=recovered_s, equal=same_losses(where, undisturbed(2)))


@drill(limit_s=250)
def a_spike(directory: Path, short: bool) -> Facts:
    """one rank's loss is 50 times itself at step 43, skip.spike=8 · all ranks skip that step and no other;
    later steps equal a run by hand in which the update is left out"""
    where, more = Where(directory), (f"steps={LONG}", "skip.spike=8")
    job = where.finish(*more, fault={"fault": "wrong_numbers", "kind": "spike", "steps": [43], "rank": 1})
    assert set(job.codes) == {0}, f"{job.codes}\n{job.output[-3000:]}"
    assert "step 43 was not applied: " in job.output and "deviations above" in job.output
    assert [line["skipped_steps"] for line in where.metrics()] == [0] * 42 + [1] * (LONG - 42)
    unchanged(where, [43], of_rank=1)
    return Facts(lost=[1], equal=f"{same_as_by_hand(where, *more, left_out=(43,))} without step 43")


@drill(limit_s=300)
def a_spike_and_back(directory: Path, short: bool) -> Facts:
    """spikes at step 43 with skip.rollbacks=1 and most=0, and at steps 43 and 44 with most=1 · back to
    checkpoint 40, the data since is passed over; the rest equals a run by hand from checkpoint 40 without
    that data"""
    facts = Facts()
    calm = undisturbed(2, f"steps={LONG}", "checkpoint.interval=10", "checkpoint.keep=9")
    origin = Found(40, calm.checkpoint(40))
    for most in (0, 1):
        where, spikes = Where(directory / str(most)), [43, 44][: most + 1]
        more = (
            f"steps={LONG}",
            "skip.spike=8",
            "skip.rollbacks=1",
            f"skip.most={most}",
            "checkpoint.interval=10",
        )
        job = where.finish(
            *more, fault={"fault": "wrong_numbers", "kind": "spike", "steps": spikes, "rank": 1}
        )
        assert set(job.codes) == {0}, f"{job.codes}\n{job.output[-3000:]}"
        assert f"back to step 40; the data of steps 41 to {spikes[-1]} is passed over" in job.output
        rolled_back = where.starts()[-1]
        assert rolled_back == {"step": 40, "rolled_back": True, "passed_over_steps": spikes[-1] - 40}
        lines = where.metrics()
        assert [line["step"] for line in lines] == [*range(1, LONG + 1)], "a step twice, or none"
        assert lines[-1]["skipped_steps"] == len(spikes)
        assert [line["loss"] for line in lines[:40]] == [line["loss"] for line in calm.metrics()[:40]]
        facts.equal = (
            same_as_by_hand(where, *more, origin=origin, passed_over=spikes[-1] - 40) + ", its data left out"
        )
        facts.lost.append(spikes[-1] - 40)
        where.whole()
    return facts
