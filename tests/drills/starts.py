"""May this run start, here and so?"""

import socket
from pathlib import Path

from tests.drills.disks import tree
from tests.drills.jobs import INTERVAL, STEPS, Where, same_losses, shared, undisturbed
from tests.drills.table import Facts, drill
from trainer.ranks.stop import REFUSED


@drill(limit_s=150, short=True)
def two_runs_in_one_directory(directory: Path, short: bool) -> Facts:
    """the same command again while the first runs; then kill -9 of the first and again at once · the second
    refuses with exit code 2 and names process and host, the first is not disturbed; after the kill it may
    start"""
    where = Where(directory)
    with where.start(fault={"fault": "hold", "step": INTERVAL + 3}) as first:
        first.trained(INTERVAL + 2)
        second = where.finish()
        assert set(second.codes) == {REFUSED}, f"{second.codes}\n{second.output}"
        said = (
            f"error: {where.run} is in use by process {first.processes[0].pid} on "
            f"{socket.gethostname()}, since 20"
        )
        assert second.output.count(said) == 2, second.output
        (where.path / "go").touch()
        first.trained(INTERVAL + 4)  # not disturbed
        killed_s = first.kill()
        first.wait()
    last = where.trained()[where.before(killed_s) - 1][1]
    where.completes()
    lost = last - where.starts()[-1]["step"]
    assert lost <= 2 * INTERVAL
    return Facts(
        lost=[lost], recovered_s=[where.recovered_s(killed_s)], equal=same_losses(where, undisturbed(2))
    )


@drill(limit_s=120, short=True)
def ranks_disagree(directory: Path, short: bool) -> Facts:
    """rank 1 has another learning rate; another seed; other code · all ranks refuse with exit code 2, naming
    the rank and both values; nothing was written"""
    other = {"fault": "other_code", "rank": 1, "version": "0.0.0+drill"}
    cases = [
        (["optim.lr=5e-3"], None, "rank 1 has optim.lr=0.005 (rank 0: 0.001)"),
        (["seed=7"], None, "rank 1 has seed=7 (rank 0: 0)"),
        ([], other, "rank 1 has the code='0.0.0+drill' (rank 0: '"),
    ]
    for number, (more, fault, said) in enumerate(cases):
        where = Where(directory / str(number))
        with where.start(*more, ranks=[1], fault=fault) as job:
            job.wait()
        assert set(job.codes) == {REFUSED}, f"{job.codes}\n{job.output}"
        assert job.output.count(said) == 2, job.output  # from both ranks
        assert not where.run.exists()
    return Facts()


@drill(limit_s=200)
def another_program(directory: Path, short: bool) -> Facts:
    """a run goes on with another learning rate, another schedule, longer rows in a later span; with another
    model · the first three are recorded in starts.jsonl with both values; the last is refused with exit code
    2, naming both, and nothing changes"""
    facts = Facts()
    half = Where(shared() / "half")
    if not half.run.exists():
        job = half.finish(fault={"stop_at": 10})
        assert set(job.codes) == {75}, job.output
    longer = [
        "stage=constant",
        "~stage.run",
        "+stage.a={steps: 12}",
        f"+stage.b={{steps: {STEPS - 12}, seq_len: 32}}",
    ]
    changes = [
        (["optim.lr=2e-3"], "optim.lr", [0.001, 0.002]),
        (["stage=cosine"], None, None),
        (longer, "stage.b.seq_len", [None, 32]),
    ]
    for number, (more, key, values) in enumerate(changes):
        where = Where(directory / str(number))
        where.copy_of(half.run)
        job = where.completes(*more)
        start = where.starts()[-1]
        assert start["step"] == 10 and start["changed"], start
        assert key is None or start["changed"][key] == values, start["changed"]
        assert key is not None or any(name.startswith("stage.") for name in start["changed"]), start[
            "changed"
        ]
        assert [line["loss"] for line in where.metrics()[:10]] == [
            line["loss"] for line in undisturbed(2).metrics()[:10]
        ]
        assert where.metrics()[-1]["loss"] != undisturbed(2).metrics()[-1]["loss"]
        facts.recovered_s.append(where.recovered_s(job.started_s))
    lengths = [
        after["tokens"] - before["tokens"]
        for before, after in zip(where.metrics(), where.metrics()[1:], strict=False)
    ]
    assert lengths == [4 * 16] * 11 + [4 * 32] * 8, lengths
    for number, (key, before, now) in enumerate((("model.dim", 32, 64), ("model.vocab_size", 256, 512))):
        where = Where(directory / f"refused-{number}")
        where.copy_of(half.run)
        files = tree(where.run)
        job = where.finish(f"{key}={now}")
        assert set(job.codes) == {REFUSED}, f"{job.codes}\n{job.output}"
        assert f"is of a run with {key}={before}" in job.output and f"now it is {key}={now}" in job.output, (
            job.output
        )
        assert tree(where.run) == files
    facts.lost, facts.equal = [0], "up to the change; after it another run"
    return facts
