"""Who is this rank, whoever started it: torchrun, srun alone, or nobody?"""

import os
import re
import socket
import subprocess
from collections.abc import Mapping

from trainer.config import ConfigError

FIRST_PORT, NUM_PORTS = 20_000, 10_000  # as in launch/slurm.sbatch
SLURM_HOST = "SLURMD_NODENAME"


def host_name(environment: Mapping[str, str] = os.environ) -> str:
    """As the scheduler calls it, where it says so: that is what is drained and excluded."""
    return environment.get(SLURM_HOST) or socket.gethostname()


def named_by_slurm(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What torchrun would have set, for a task of a step that srun has started; nothing elsewhere, as a batch
    script has a rank and no step. Raises: ConfigError.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment:
        return {}
    here = environment["SLURM_TASKS_PER_NODE"].split(",")[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": re.sub(r"\D.*", "", here),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS),
    }


def first_host(nodes: str) -> str:
    """Of a list as Slurm writes it, like gpu[003-006,010]. Raises: ConfigError."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"SLURM_STEP_NODELIST={nodes}: scontrol cannot say which hosts these are ({error})"
        ) from None
    return listed.stdout.split()[0]
