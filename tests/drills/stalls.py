"""A rank makes no progress and does not end: who notices, and what is there to read afterwards?"""

import time
from pathlib import Path

from tests.drills.jobs import INTERVAL, Where, same_losses, undisturbed
from tests.drills.table import Facts, drill
from trainer.ranks.watchdog import HUNG

HEARTBEAT_S = 4.0
LONG_HEARTBEAT_S = 20.0  # its grace is 10 s, the most (trainer/ranks/watchdog.py)


def stacks(where: Where) -> list[str]:
    return [(where.run / f"stacks.{rank}.txt").read_text() for rank in range(where.num_ranks)]


@drill(limit_s=200)
def a_rank_hangs(directory: Path, short: bool) -> Facts:
    """one rank never comes back from its step, heartbeat_s=4, under torchrun · within the limit the stacks of
    all ranks are written, the hanging one's names the function; the job ends, torchrun starts it again, it
    completes"""
    where = Where(directory)
    with where.launched(
        f"heartbeat_s={HEARTBEAT_S}", fault={"fault": "hang_in_step", "rank": 1, "step": INTERVAL + 3}
    ) as launch:
        launch.trained(INTERVAL + 2)
        fault_s = time.time()
        assert (code := launch.wait()) == 0, f"exit code {code}:\n{launch.output[-3000:]}"
    waiting, hanging = stacks(where)
    assert "sleep_for_ever" in hanging and "sleep_for_ever" not in waiting
    assert f"in step {INTERVAL + 3}" in waiting and f"in step {INTERVAL + 3}" in hanging
    assert f"ended with exit code {HUNG}; all ranks start again" in launch.output, launch.output[-3000:]
    last_of_first_life = (where.run / "stacks.1.txt").stat().st_mtime - fault_s
    assert last_of_first_life < 2 * HEARTBEAT_S, f"the stacks were written after {last_of_first_life:.1f} s"
    lost = INTERVAL + 2 - where.starts()[-1]["step"]
    assert lost <= INTERVAL
    recovered_s = [where.recovered_s(fault_s + 0.5)]
    note = f"stacks after {last_of_first_life:.1f} s"
    return Facts(lost=[lost], recovered_s=recovered_s, equal=same_losses(where, undisturbed(2)), note=note)


@drill(limit_s=150, short=True)
def the_data_source_hangs(directory: Path, short: bool) -> Facts:
    """a read of the data never returns on one rank · as above; the stack names the read, exit code 7"""
    where = Where(directory)
    fault = {"fault": "source", "rank": 1, "after": 12, "hangs": True}
    # the longest grace there is, for a machine so busy that the other rank comes to its limit much later
    with where.start(f"heartbeat_s={LONG_HEARTBEAT_S}", "data.workers=0", fault=fault) as job:
        job.until(lambda: (where.path / "fired").exists(), what="the read")
        fault_s = time.time()
        job.wait(4 * LONG_HEARTBEAT_S)
        ended_s = time.time() - fault_s
    assert HUNG in job.codes, job.codes
    waiting, hanging = stacks(where)
    assert "read_of_a_dead_disk" in hanging and "read_of_a_dead_disk" not in waiting
    last = where.last_trained()
    where.completes("data.workers=0")
    lost = last - where.starts()[-1]["step"]
    assert lost <= INTERVAL
    recovered_s = [where.recovered_s(fault_s)]
    note = f"ended after {ended_s:.1f} s"
    return Facts(lost=[lost], recovered_s=recovered_s, equal=same_losses(where, undisturbed(2)), note=note)
