"""Does a launch fit its configuration? Asked where it is submitted, before anything is queued."""

import re
import subprocess
from pathlib import Path

from trainer.config import Config, ConfigError
from trainer.preflight.files import GB, checkpoint_bytes, directory_problem
from trainer.program import program_of
from trainer.ranks import device
from trainer.run.build import num_experts_of
from trainer.split import check_rows

OLDEST_SLURM = (22, 5)  # that launch/slurm.sbatch was tried under (make slurm)
MOST = 2**20  # ranks of a run, as of parallel.dp_shard


def whole(key: str, text: str) -> int:
    """Raises: ConfigError."""
    if not (text.isdecimal() and 1 <= int(text) <= MOST):
        raise ConfigError(f"{key}={text}: must be a whole number from 1 to {MOST:,}")
    return int(text)


def check_launch(config: Config, *, nodes: int, ranks_per_node: int) -> str:
    """Returns what fits, in a line. Raises: ConfigError that begins with the launch."""
    launch, num_ranks = f"nodes={nodes} x ranks_per_node={ranks_per_node}", nodes * ranks_per_node
    try:
        degrees = device.degrees_of(config.parallel, num_ranks=num_ranks, num_experts=num_experts_of(config))
        program = program_of(config)
        program.check_split(num_ranks=degrees.num_readers, num_streams=config.data.num_streams)
        check_rows(program, cp=degrees.cp)
    except ConfigError as error:
        raise ConfigError(f"{launch}: {error}") from None
    if problem := directory_problem(Path(config.run_dir)):
        raise ConfigError(
            f"run_dir={config.run_dir}: {problem}; every node must see it: make it, or choose another"
        )
    size, with_cp = checkpoint_bytes(config) / GB, f" x cp={degrees.cp}" if degrees.cp > 1 else ""
    return (
        f"{launch} = {num_ranks} ranks: dp_replicate={degrees.replicate} x dp_shard={degrees.shard}{with_cp}"
        f", ep={degrees.ep}, data.num_streams={config.data.num_streams}; a checkpoint takes {size:,.1f} GB"
    )


def slurm_version() -> str:
    """As sbatch says it. Raises: ConfigError."""
    try:
        done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"slurm=true: sbatch: {error.strerror}; ask on a login node") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"slurm=true: sbatch --version: {said}; ask on a login node")
    return done.stdout.strip()


def check_slurm(said: str) -> None:
    """Raises: ConfigError."""
    numbers = re.search(r"(\d+)\.(\d+)", said)
    version = tuple(map(int, numbers.groups())) if numbers else (0, 0)
    if version < OLDEST_SLURM:
        oldest = ".".join(f"{part:02}" for part in OLDEST_SLURM)
        raise ConfigError(
            f"{said}: launch/slurm.sbatch was tried under {oldest} and later; start torchrun by srun"
        )
