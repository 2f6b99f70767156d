"""A rank, or all of them, are gone without a word: what is lost?"""

import random
import signal
from pathlib import Path

from tests.drills.jobs import INTERVAL, STEPS, Where, same_losses, undisturbed, until
from tests.drills.table import Facts, drill
from trainer.checkpoint import problems
from trainer.ranks.stop import PREEMPTED

HOOKS = [
    "half a shard",
    "before the rename",
    "before the first byte",
    "between two ranks' files",
    "before the manifest",
    "half a manifest",
    "before `latest`",
    "deleting an old one",
]


def go_on(
    where: Where,
    facts: Facts,
    *more: str,
    killed_s: float,
    saving: int | None = None,
    interval: int = INTERVAL,
) -> None:
    """The same command again, to the end. saving: the step whose save was under way."""
    trained = where.trained()[where.before(killed_s) - 1][1]
    good = [step for step in where.checkpoints() if not problems(where.checkpoint(step))]
    assert where.checkpoints() == good, f"{where.checkpoints()} are named like checkpoints, {good} are whole"
    latest = where.run / "checkpoints" / "latest"
    assert not latest.exists() or (latest.parent / latest.read_text().strip()).is_dir(), (
        "`latest` names what is not there"
    )
    where.completes(*more)
    resumed = where.starts()[-1]["step"]
    assert resumed == max(good, default=0), (
        f"went on from step {resumed}, the newest good checkpoint was of step {max(good)}"
    )
    at_most = interval if saving is None else trained - saving + interval
    assert trained - resumed <= at_most, (
        f"killed after step {trained}, went on from {resumed}: more than {at_most} steps lost"
    )
    facts.lost.append(trained - resumed)
    facts.recovered_s.append(where.recovered_s(killed_s))
    where.whole()
    assert latest.read_text().strip() == where.checkpoint(where.last_trained()).name
    names = {path.name for path in (where.run / "checkpoints").iterdir()}
    assert not (drafts := [name for name in names if name.startswith(".")]), f"left behind: {drafts}"


@drill(limit_s=400, short=True)
def kill_at_a_point_of_a_save(directory: Path, short: bool) -> Facts:
    """kill -9 of one rank and of all at a chosen point of a save: before the first byte, half a shard,
    between two ranks' files, before and half of the manifest, before the rename, before `latest`, half of an
    old one deleted · no step-* that does not verify; goes on from the newest whole one; at most an interval
    lost, and what was trained during the save"""
    facts = Facts()
    reference = undisturbed(2)
    trials = [(hook, of_all) for hook in HOOKS for of_all in (True, False)]
    for number, (hook, of_all) in enumerate([trials[0], trials[3]] if short else trials):
        where = Where(directory / str(number))
        rank = 1 if hook in ("between two ranks' files", "half a shard") else 0
        fault = {"fault": "pause", "hook": hook, "step": 3 * INTERVAL, "rank": rank}
        # every other one in the background: then the ranks train on until they are killed
        more = ["checkpoint.background=false"] if number % 2 else []
        with where.start(*more, fault=fault) as job:
            job.until(lambda where=where: (where.path / "reached").exists(), what=hook)
            if hook == "between two ranks' files":
                draft = where.run / "checkpoints" / f".step-{3 * INTERVAL:08d}.draft"
                job.until(
                    lambda draft=draft: (draft / "rank-00000.safetensors").exists(),
                    what="the other rank's file",
                )
            killed_s = job.kill() if of_all else job.kill(rank)
            job.wait()
        go_on(where, facts, *more, killed_s=killed_s, saving=3 * INTERVAL)
        facts.equal = same_losses(where, reference)
    facts.note = f"{len(facts.lost)} kills"
    return facts


@drill(limit_s=400)
def kill_at_random_times(directory: Path, short: bool) -> Facts:
    """kill -9 of one rank and of all at random times, with a save every other step · as above, however
    often
    """
    facts, interval, seed = Facts(), 2, 4
    delays = random.Random(seed)
    reference = undisturbed(2)
    for victims in ([], [1], [0]):  # []: all
        where, number = Where(directory / f"of-{len(victims)}-{sum(victims)}"), 0
        while number < 4:
            with where.start(f"checkpoint.interval={interval}") as job:
                job.trained(where.starts_at() + 1)
                delay_s = delays.uniform(0.0, 1.2)
                ended = until(lambda job=job: None not in job.codes, timeout_s=delay_s)
                if ended:  # it was at its end: begin again
                    where.restart()
                    continue
                killed_s = job.kill(*victims)
                job.wait()
            number += 1
            trained = where.trained()[where.before(killed_s) - 1][1]
            good = [step for step in where.checkpoints() if not problems(where.checkpoint(step))]
            assert where.checkpoints() == good, (
                f"{where.checkpoints()} are named like checkpoints, {good} are whole"
            )
            assert trained - max(good, default=0) <= 2 * interval, (
                f"killed after step {trained}, whole: {good}"
            )
            facts.lost.append(trained - max(good, default=0))
            # killed after the last save: nothing is left to train
            if where.starts_at() == STEPS and number < 4:
                where.restart()
        where.completes(f"checkpoint.interval={interval}")
        if where.trained()[-1][0] > killed_s:
            facts.recovered_s.append(where.recovered_s(killed_s))
        facts.equal = same_losses(where, reference)
        where.whole()
    facts.note = f"{len(facts.lost)} kills, seed {seed}, interval {interval}"
    return facts


@drill(limit_s=150)
def kill_one_of_four_ranks(directory: Path, short: bool) -> Facts:
    """kill -9 of one of four ranks, experts spread over pairs (HSDP x EP) · the others end by themselves; the
    same command goes on; at most an interval lost"""
    facts, where = Facts(), Where(directory, num_ranks=4)
    with where.start() as job:
        job.trained(2 * INTERVAL + 3)
        until(lambda: where.checkpoint(2 * INTERVAL).exists(), timeout_s=20)
        killed_s = job.kill(2)
        job.wait()
    go_on(where, facts, killed_s=killed_s)
    facts.equal = same_losses(where, undisturbed(4))
    return facts


@drill(limit_s=120)
def kill_at_a_start(directory: Path, short: bool) -> Facts:
    """kill -9 while the next start takes over metrics.jsonl · no line of it is lost"""
    where = Where(directory)
    job = where.finish(fault={"stop_at": 7})
    before = where.metrics()
    assert set(job.codes) == {PREEMPTED} and [line["step"] for line in before] == [*range(1, 8)], job.output
    with where.start(
        fault={"fault": "pause", "hook": "before metrics.jsonl is cut", "step": 0, "rank": 0}
    ) as job:
        job.until(lambda: (where.path / "reached").exists(), what="the start")
        killed_s = job.kill()
        job.wait()
    assert where.metrics() == before, f"metrics.jsonl has steps {[line['step'] for line in where.metrics()]}"
    where.completes()
    return Facts(
        lost=[0], recovered_s=[where.recovered_s(killed_s)], equal=same_losses(where, undisturbed(2))
    )


@drill(limit_s=200, short=True)
def torchrun_restarts_the_ranks(directory: Path, short: bool) -> Facts:
    """kill -9 of one rank under torchrun --max-restarts 1 · exit code 0 without a hand, from the last good
    checkpoint
    """
    where = Where(directory)
    with where.launched() as launch:
        launch.trained(INTERVAL + 2)
        until(lambda: where.checkpoint(INTERVAL).exists(), timeout_s=20)
        fault_s = launch.kill(1, signal.SIGKILL)
        assert (code := launch.wait()) == 0, f"exit code {code}:\n{launch.output[-3000:]}"
    assert "rank 1 was killed by SIGKILL; all ranks start again" in launch.output
    first, second = where.starts()
    trained = where.trained()[where.before(fault_s) - 1][1]
    assert first["step"] == 0 and second["step"] >= INTERVAL and where.last_trained() == STEPS
    assert trained - second["step"] <= INTERVAL + 2, f"killed after {trained}, went on from {second['step']}"
    lost, recovered_s = [trained - second["step"]], [where.recovered_s(fault_s)]
    return Facts(lost=lost, recovered_s=recovered_s, equal=same_losses(where, undisturbed(2)))
