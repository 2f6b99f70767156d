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
    echo "${@//$'\n'/ }" >> calls
    case "$*" in *preflight*) exit "${UNFIT:-0}";; esac
    exit $STATUS""",
    "scontrol": '[ "$1" != requeue ] || echo "requeued $2" >> calls; echo node0',
    "squeue": '[ "$3" = "$JOB" ] && echo $STATE',
    "scancel": 'echo "asked $2 to save" >> calls',
    "nvidia-smi": "exit 9",
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
        "SLURM_CPUS_ON_NODE": "4",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": "12345",
        "SLURM_NNODES": "2",
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
    }
    stand_ins = {"STATUS": str(status), "NEAR": near, "STATE": state, "JOB": "12345", "SITE": os.devnull}
    done = subprocess.run(
        ["bash", SCRIPT, "experiment=demo"], env=os.environ | slurm | stand_ins | environment, timeout=250
    )
    return (directory / "calls").read_text().splitlines(), done.returncode


def test_the_nodes_meet_at_the_first_and_a_crash_is_restarted(tmp_path):
    (srun,), status = calls(tmp_path, status=0)
    assert status == 0
    assert srun.startswith("--cpus-per-task=4 bash -c ")
    assert " .venv/bin/python -m trainer.torchrun --nnodes 2 " in srun
    assert srun.endswith(" -m trainer.train experiment=demo")
    assert "--rdzv-endpoint node0:22345 " in srun and "--max-restarts 3 " in srun


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [({}, 1), ({"RANKS_PER_NODE": "2"}, 2), ({"SLURM_GPUS_ON_NODE": "8"}, 8)],
)
def test_a_node_has_a_rank_for_each_gpu_or_one(tmp_path, environment, ranks):
    (srun,), _ = calls(tmp_path, status=0, **environment)
    assert f"--nproc-per-node {ranks} " in srun
    assert ("--gpus-per-node=8 " in srun) == (ranks == 8)  # or the step has none of the job's


def test_the_number_of_restarts_can_be_chosen(tmp_path):
    (srun,), _ = calls(tmp_path, status=0, RESTARTS="0")
    assert "--max-restarts 0 " in srun


def test_a_sites_own_settings_are_one_file(tmp_path):
    site = tmp_path / "site.env"
    site.write_text("PYTHON=/opt/python\nSRUN_OPTIONS+=(--container-image=image)\n")
    (srun,), _ = calls(tmp_path, status=0, SITE=str(site))
    assert " --container-image=image bash -c " in srun and " /opt/python -m trainer.torchrun " in srun


def test_preflight_comes_first_where_it_is_asked_for(tmp_path):
    (preflight, training), status = calls(tmp_path, status=0, PREFLIGHT="1")
    assert preflight.endswith("--max-restarts 0 -m trainer preflight experiment=demo") and status == 0
    assert training.endswith("-m trainer.train experiment=demo")


def test_a_job_that_is_unfit_does_not_train_and_is_not_requeued(tmp_path):
    (preflight,), status = calls(tmp_path, status=0, PREFLIGHT="1", UNFIT="69")
    assert "preflight" in preflight and status == 69


def test_a_job_of_an_array_does_not_speak_for_the_others(tmp_path):
    """The last job of an array has the array's own number: Slurm would take it for all of them."""
    array = {"SLURM_ARRAY_JOB_ID": "12345", "SLURM_ARRAY_TASK_ID": "7", "JOB": "12345_7"}
    did, _ = calls(tmp_path, status=75, near="near", **array)
    assert "asked 12345_7 to save" in did[0] and did[-1] == "requeued 12345_7"


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
    assert ("requeued 12345" in did) == requeued
    assert ("asked 12345 to save" in did) == bool(near)
