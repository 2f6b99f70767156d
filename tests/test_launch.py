"""launch/slurm.sbatch against stand-ins for Slurm's commands: when does a job go back into the queue?"""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "launch" / "slurm.sbatch"
STAND_INS = {
    "srun": """if [ "$NEAR" ]; then
        kill -USR1 $PPID
        until grep -qs save calls; do sleep 0.05; done
    fi
    echo "$@" >> calls
    exit $STATUS""",
    "scontrol": '[ "$1" != requeue ] || echo requeued >> calls; echo node0',
    "squeue": "echo $STATE",
    "scancel": "echo asked to save >> calls",
}


def calls(directory, *, status, near="", state="RUNNING", **environment):
    """What the script did, and its exit code."""
    (directory / "bin").mkdir()
    for name, body in STAND_INS.items():
        path = directory / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(directory),
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": "12345",
        "SLURM_NNODES": "2",
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
    }
    stand_ins = {"STATUS": str(status), "NEAR": near, "STATE": state}
    done = subprocess.run(
        ["bash", SCRIPT, "experiment=demo"], env=os.environ | slurm | stand_ins | environment, timeout=250
    )
    return (directory / "calls").read_text().splitlines(), done.returncode


def test_the_nodes_meet_at_the_first_and_a_crash_is_restarted(tmp_path):
    (srun,), status = calls(tmp_path, status=0)
    assert status == 0
    assert srun.startswith(".venv/bin/python -m trainer.torchrun --nnodes 2 ")
    assert srun.endswith(" -m trainer.train experiment=demo")
    assert "--nproc-per-node gpu " in srun  # one for each GPU of the node
    assert "--rdzv-endpoint node0:22345 " in srun and "--max-restarts 3 " in srun


def test_the_number_of_restarts_and_of_ranks_can_be_chosen(tmp_path):
    (srun,), _ = calls(tmp_path, status=0, RESTARTS="0", RANKS_PER_NODE="2")
    assert "--max-restarts 0 " in srun and "--nproc-per-node 2 " in srun


@pytest.mark.parametrize(
    ("status", "near", "state", "requeued"),
    [
        (0, "", "RUNNING", False),
        (75, "", "RUNNING", True),
        (75, "", "COMPLETING", False),  # cancelled, or preempted: Slurm has decided
        (1, "", "RUNNING", False),  # the restarts are used up
        (1, "near", "RUNNING", True),
        (137, "near", "RUNNING", True),
        (75, "near", "RUNNING", True),
        (0, "near", "RUNNING", False),
        *((final, near, "RUNNING", False) for final in (2, 3, 4, 6) for near in ("", "near")),
    ],
)
def test_a_job_goes_back_into_the_queue_where_that_helps(tmp_path, status, near, state, requeued):
    did, code = calls(tmp_path, status=status, near=near, state=state)
    assert code == status
    assert ("requeued" in did) == requeued
    assert ("asked to save" in did) == bool(near)
