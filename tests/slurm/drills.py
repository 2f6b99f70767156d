"""What is done to a job of launch/slurm.sbatch, and what must hold?"""

import os
import signal
import sys
import time
from pathlib import Path

from tests.drills.jobs import REPOSITORY, Where
from tests.drills.table import Drill, Facts, drill
from tests.slurm.cluster import SMALL_KIB, Cluster, environment_of
from tests.slurm.gate import GATE
from tests.slurm.jobs import SOURCE, Job, Run, stopped_well, submit
from tests.waiting import until
from trainer.preflight.__main__ import UNFIT
from trainer.ranks.stop import REFUSED

DRILLS: dict[str, Drill] = {}
UNFIT_PYTHON = """#!/usr/bin/env bash
for argument in "$@"; do
    [[ $argument != trainer ]] || argument=tests.slurm.unfit
    arguments+=("$argument")
done
exec .venv/bin/python "${arguments[@]}"
"""
# torchrun numbers nodes by their addresses, and nodes of one address by the ids of their processes.
SECOND_FIRST_PYTHON = """#!/usr/bin/env bash
[[ $SLURMD_NODENAME != node2 ]] || export PET_LOCAL_ADDR=127.0.0.1
[[ $SLURMD_NODENAME == node2 ]] || export PET_LOCAL_ADDR=$SLURMD_NODENAME
exec .venv/bin/python "$@"
"""
LIMIT_S = 3600.0  # by the clock, for what hangs


def told_to_stop_and_requeued(job: Job, step: int, began_s: float, *, alone: bool = True) -> Facts:
    """alone: no other job has processes."""
    recovered_s = [job.goes_on(step) - began_s]
    job.ends("COMPLETED", alone=alone)
    stopped_well(job, step)
    return Facts(lost=[0], recovered_s=recovered_s, equal=job.equals_undisturbed())


def started_again(job: Job, step: int, began_s: float, *, lives: int = 1) -> Facts:
    """From its last checkpoint, which was not lost."""
    recovered_s = [job.goes_on(step) - began_s]
    job.ends("COMPLETED")
    again = job.where.starts()[-1]["step"]
    assert job.lives == lives and 0 < again <= step, f"{job.lives} lives, the last from step {again}"
    return Facts(lost=[step - again], recovered_s=recovered_s, equal=job.equals_undisturbed())


@drill(limit_s=LIMIT_S, into=DRILLS)
def whole_run(directory: Path, short: bool) -> Facts:
    """2 nodes x 2 ranks, HSDP x EP, PREFLIGHT=1, a log for each rank · found fit, completes, nothing is left
    running"""
    with Cluster() as cluster:
        environment = {"RANKS_PER_NODE": "2", "PREFLIGHT": "1"}
        job = Job.of(cluster, Where(directory, num_ranks=4), held=False, **environment)
        job.ends("COMPLETED")
    logs = [path for path in (directory / "logs" / job.id / "0").rglob("stdout.log") if path.stat().st_size]
    nodes = {path.relative_to(directory / "logs" / job.id / "0").parts[0] for path in logs}
    assert "rank 0: preflight: fit" in job.output and "rank 0: Triquetra" in job.output, job.output
    assert nodes <= {"node1", "node2"} and any("Triquetra" in path.read_text() for path in logs), logs
    return Facts(equal=job.equals_undisturbed())


@drill(limit_s=LIMIT_S, into=DRILLS)
def a_node_is_unfit(directory: Path, short: bool) -> Facts:
    """PREFLIGHT=1; the second of four nodes multiplies ten times as slowly and its clock is a minute late (by
    tests/slurm/unfit.py) · both are named with value and limit, the job ends with 69 and does not train"""
    site = site_with_python(directory, UNFIT_PYTHON)
    with Cluster(num_nodes=4) as cluster:
        where, options = Where(directory, num_ranks=4), ("--nodes=4",)
        job = Job.of(cluster, where, held=False, options=options, SITE=site, PREFLIGHT="1")
        job.ends("FAILED", UNFIT)
    said = [line for line in job.output.splitlines() if "unfit: " in line]
    assert len(said) == 2 and all("unfit: node2: " in line for line in said), job.output
    assert "clock: -" in said[0] and "cpu (rank " in said[1] and "TFLOP/s; limit: " in said[1], said
    assert not job.where.run.exists()
    return Facts(equal="not asked")


@drill(limit_s=LIMIT_S, into=DRILLS)
def preflight_by_srun(directory: Path, short: bool) -> Facts:
    """srun --nodes=2 --ntasks-per-node=2 triquetra preflight, without torchrun · the ranks find each other by
    Slurm's variables, and are found fit"""
    where = Where(directory, num_ranks=4)
    command = [sys.executable, "-m", "trainer", "preflight", *where.overrides(*SOURCE)]
    with Cluster() as cluster:
        layout = ["--nodes=2", "--ntasks-per-node=2", "--mem=0", "--exclusive"]
        said = cluster.run("srun", *layout, *command, cwd=REPOSITORY)
    assert "preflight: hosts 2, devices 4" in said and said.endswith("preflight: fit"), said
    return Facts(equal="not asked")


@drill(limit_s=LIMIT_S, into=DRILLS)
def nodes_with_gpus(directory: Path, short: bool) -> Facts:
    """2 nodes with 2 GPUs (any character devices; no rank computes on them) and the same script · a rank for
    each GPU, and each node's ranks see both"""
    with Cluster(gpus=2) as cluster:
        job = Job.of(cluster, Where(directory, num_ranks=4), "data.source.hold_at=16")  # rank 0 reads less
        job.is_held()
        seen = {value for pid in cluster.living() for value in environment_of(pid) if "CUDA_VISIBLE" in value}
        assert seen == {"CUDA_VISIBLE_DEVICES=0,1"}, seen
        cluster.run("scancel", job.id)
        job.ends("CANCELLED")
    return Facts(equal="not asked")


@drill(limit_s=LIMIT_S, short=True, into=DRILLS)
def told_to_stop(directory: Path, short: bool) -> Facts:
    """scancel --signal=TERM · saved at the step where it was, 75, requeued, completes"""
    with Cluster() as cluster:
        job = Job.of(cluster, Where(directory))
        step, began_s = job.is_held(), time.time()
        cluster.run("scancel", "--signal=TERM", job.id)
        return told_to_stop_and_requeued(job, step + 1, began_s)


@drill(limit_s=LIMIT_S, into=DRILLS)
def cancelled(directory: Path, short: bool) -> Facts:
    """scancel · saved within KillWait, the job stays cancelled; the same command goes on"""
    with Cluster() as cluster:
        job = Job.of(cluster, Where(directory))
        step = job.is_held() + 1
        cluster.run("scancel", job.id)
        job.ends("CANCELLED")
        assert job.lives == 1 and job.where.checkpoints()[-1] == step, job.where.checkpoints()
        job = Job.of(cluster, job.where, held=False)
        job.ends("COMPLETED")
        stopped_well(job, step)
    return Facts(lost=[0], equal=job.equals_undisturbed())


@drill(limit_s=LIMIT_S, into=DRILLS)
def time_limit(directory: Path, short: bool) -> Facts:
    """USR1 to the batch shell near the time limit (made short while the run stands) · saved, requeued,
    completes"""
    with Cluster() as cluster:
        job = Job.of(cluster, Where(directory), options=("--signal=B:USR1@3000", "--time=100"))
        step, began_s = job.is_held(), time.time()
        cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=50")
        job.reaches(lambda: job.state == "PENDING", what="requeued near the limit")
        cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=1000")
        facts = told_to_stop_and_requeued(job, step + 1, began_s)
        assert job.lives == 2, job.lives
    return facts


@drill(limit_s=LIMIT_S, into=DRILLS)
def preemption(directory: Path, short: bool) -> Facts:
    """a job of another partition takes the nodes, GraceTime=0 · saved, requeued by Slurm, completes then"""
    with Cluster() as cluster:
        job = Job.of(cluster, Where(directory))
        step, began_s = job.is_held(), time.time()
        urgent = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={os.devnull}"]
        cluster.run("sbatch", "--wait", *urgent, "--wrap=true")
        facts = told_to_stop_and_requeued(job, step + 1, began_s)
        assert job.lives == 2, job.lives
    return facts


@drill(limit_s=LIMIT_S, into=DRILLS)
def requeued_by_hand(directory: Path, short: bool) -> Facts:
    """scontrol requeue · saved, requeued once, completes"""
    with Cluster() as cluster:
        job = Job.of(cluster, Where(directory))
        step, began_s = job.is_held(), time.time()
        cluster.run("scontrol", "requeue", job.id)
        facts = told_to_stop_and_requeued(job, step + 1, began_s)
        assert job.lives == 2, job.lives
    return facts


@drill(limit_s=LIMIT_S, short=True, into=DRILLS)
def kill_one_rank(directory: Path, short: bool) -> Facts:
    """kill -9 of one rank of two nodes · all ranks start again in the same job, from the last
    checkpoint"""
    with Cluster() as cluster:
        job = Job.of(cluster, Where(directory))
        step, began_s = job.is_held(), time.time()
        os.kill(process_of(cluster, rank=1), signal.SIGKILL)
        facts = started_again(job, step, began_s)
        assert "rank 1 was killed by SIGKILL; all ranks start again" in job.output, job.output
    return facts


@drill(limit_s=LIMIT_S, into=DRILLS)
def kill_a_step(directory: Path, short: bool) -> Facts:
    """kill -9 of every process of the job's step at once · the job fails with 137 and stays so; the
    same command goes on"""
    with Cluster() as cluster:
        job = Job.of(cluster, Where(directory))
        step, began_s = job.is_held(), time.time()
        for pid in cluster.living():
            if {"SLURM_STEP_ID=0", "SLURM_STEPID=0"} & set(environment_of(pid)):
                os.kill(pid, signal.SIGKILL)
        job.ends("FAILED", 137)
        assert job.lives == 1
        job = Job.of(cluster, job.where, held=False)
        return started_again(job, step, began_s)


@drill(limit_s=LIMIT_S, short=True, into=DRILLS)
def node_dies_with_a_spare(directory: Path, short: bool) -> Facts:
    """the second of two nodes dies, slurmd and all below it; a third is idle · requeued on the first and the
    third, from the last checkpoint"""
    with Cluster(num_nodes=3) as cluster:
        job = Job.of(cluster, Where(directory))
        step, began_s = job.is_held(), time.time()
        cluster.kill_node("node2")
        facts = started_again(job, step, began_s, lives=2)
        assert job.facts["NodeList"] == "node[1,3]", job.facts["NodeList"]
    return facts


@drill(limit_s=LIMIT_S, into=DRILLS)
def node_dies_without_a_spare(directory: Path, short: bool) -> Facts:
    """the second of two nodes dies, there is no other · the job waits in the queue until the node is back"""
    with Cluster() as cluster:
        job = Job.of(cluster, Where(directory))
        step, began_s = job.is_held(), time.time()
        cluster.kill_node("node2")
        job.reaches(lambda: job.state == "PENDING", what="back in the queue")
        cluster.start_node("node2")
        return started_again(job, step, began_s, lives=2)


@drill(limit_s=LIMIT_S, into=DRILLS)
def slurmd_is_gone(directory: Path, short: bool) -> Facts:
    """slurmd of the second node dies and its ranks live on; a third node is idle · Slurm gives the node
    up, its ranks end by themselves as the others are gone; requeued, from the last checkpoint"""
    # Slurm tells the first node's ranks to stop: rank 0, were it there, would open the gate and save with all
    site = site_with_python(directory, SECOND_FIRST_PYTHON)
    with Cluster(num_nodes=3, kill_wait_s=10) as cluster:
        job = Job.of(cluster, Where(directory), SITE=site)
        step, began_s = job.is_held(), time.time()
        assert "SLURMD_NODENAME=node2" in environment_of(process_of(cluster, rank=0))
        cluster.kill_slurmd("node2")
        return started_again(job, step, began_s, lives=2)


@drill(limit_s=LIMIT_S, into=DRILLS)
def job_array(directory: Path, short: bool) -> Facts:
    """--array=0-1, a run for each; one is told to stop · that one alone saves, is requeued and goes on; both
    complete"""
    with Cluster(num_nodes=4) as cluster:
        both = ("--array=0-1", f"--output={directory}/%a.log")
        number = submit(
            cluster,
            Where(directory),
            "name=${oc.env:SLURM_ARRAY_TASK_ID}",
            options=both,
            **{GATE: str(directory)},
        )
        jobs = [
            Job(cluster, Run(directory, name), number=f"{number}_{name}", log=directory / f"{name}.log")
            for name in ("0", "1")
        ]
        steps = [job.is_held() for job in jobs]
        began_s = time.time()
        cluster.run(
            "scancel", "--signal=TERM", jobs[1].id
        )  # the last one: its own number is the array's, too
        jobs[1].reaches(lambda: jobs[1].lives == 2, what="requeued")
        assert jobs[0].lives == 1 and jobs[0].where.metrics()[-1]["step"] == steps[0], jobs[0].output
        facts = told_to_stop_and_requeued(jobs[1], steps[1] + 1, began_s, alone=False)
        cluster.run("scancel", "--signal=TERM", jobs[0].id)
        told_to_stop_and_requeued(jobs[0], steps[0] + 1, time.time())
        assert [job.lives for job in jobs] == [2, 2]
    return facts


@drill(limit_s=LIMIT_S, into=DRILLS)
def same_name_twice(directory: Path, short: bool) -> Facts:
    """the same command submitted again while the first runs · the second ends with 2 and names process and
    host, it is not requeued; the first is not disturbed"""
    with Cluster(num_nodes=4) as cluster:
        first = Job.of(cluster, Where(directory))
        step = first.is_held()
        second = Job.of(cluster, first.where, held=False, log=directory / "second.log")
        until(lambda: second.state not in ("PENDING", "RUNNING"))
        assert second.facts["ExitCode"] == f"{REFUSED}:0" and second.lives == 1, second.output
        assert "is in use by process" in second.output, second.output
        cluster.run("scancel", "--signal=TERM", first.id)
        return told_to_stop_and_requeued(first, step + 1, time.time())


@drill(limit_s=LIMIT_S, into=DRILLS)
def full_log_disk(directory: Path, short: bool) -> Facts:
    """the job's log and the ranks' logs on a disk that is full · the run does not notice, and completes"""
    with Cluster() as cluster:
        size = f"{SMALL_KIB + 1}K"
        cluster.run("bash", "-c", f"head -c {size} /dev/zero >{cluster.small}/filled", check=False)
        job = Job.of(
            cluster, Where(directory), held=False, log=cluster.small / "log", LOGS=str(cluster.small / "logs")
        )
        job.ends("COMPLETED")
        free = cluster.run("df", "--output=avail", str(cluster.small)).split()[-1]
        assert free == "0", f"{free} KiB are free"
    return Facts(equal=job.equals_undisturbed())


def site_with_python(directory: Path, script: str) -> str:
    """A site.env by which each node starts this script as its Python."""
    site, python = directory / "site.env", directory / "python"
    python.write_text(script)
    python.chmod(0o755)
    site.write_text(f"PYTHON={python}\n")
    return str(site)


def process_of(cluster: Cluster, *, rank: int) -> int:
    (pid,) = [pid for pid in cluster.living() if f"RANK={rank}" in environment_of(pid)]
    return pid
