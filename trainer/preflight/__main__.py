"""Are hosts, devices, links and the file system fit for a run? Under a minute, before hours are spent.

    triquetra preflight experiment=demo                                          this machine
    torchrun --nproc-per-node 8 -m trainer preflight experiment=demo parallel=fsdp micro_batch=1   its 8 GPUs
    srun --nodes=16 --ntasks-per-node=8 triquetra preflight ...                  or PREFLIGHT=1 with launch/*
    triquetra preflight --dry-run nodes=256 ranks_per_node=8 experiment=trinity_large slurm=true

All else is as for the run that is to follow: its layout, its directory and the size of its checkpoints count.

    device           a file of configs/device, like h200; without it the GPU's name says
    --dry-run        asks nothing of the devices: does the launch fit the configuration?
    nodes            of the launch
    ranks_per_node   one for each GPU
    slurm            true: is the Slurm of this machine one that launch/slurm.sbatch was tried under?

docs/clusters.md says what each finding means. A finding is a line: host, what, value, limit.
Exit codes: 0 fit · 2 refused configuration or launch · 69 unfit.
"""

import sys
from functools import partial

from trainer import terminal
from trainer.config import Config, ConfigError, load, looked_up
from trainer.lab.options import parted, refuse_misspelt
from trainer.preflight.launch import check_launch, check_slurm, slurm_version, whole
from trainer.ranks.stop import INTERRUPTED, OK, REFUSED

OWN = ("device", "nodes", "ranks_per_node", "slurm")
DRY = "--dry-run"
UNFIT = 69  # EX_UNAVAILABLE of sysexits.h


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    codes = {ConfigError: REFUSED, TimeoutError: UNFIT, KeyboardInterrupt: INTERRUPTED}
    return terminal.run(partial(command, arguments), codes)


def command(arguments: list[str]) -> int:
    overrides, options = parted([argument for argument in arguments if argument != DRY], OWN)
    if (text := looked_up(overrides, __doc__)) is not None:
        print(text)
        return OK
    refuse_misspelt(overrides, OWN)
    config = load(overrides)
    if DRY in arguments:
        return dry_run(config, options)
    if unused := sorted(set(options) - {"device"}):
        raise ConfigError(f"{unused[0]}={options[unused[0]]}: says how it is launched; use it with {DRY}")
    from trainer.preflight.examine import examine  # torch's devices are asked from here on

    return UNFIT if examine(config, sheet=options.get("device")) else OK


def dry_run(config: Config, options: dict[str, str]) -> int:
    if missing := [key for key in ("nodes", "ranks_per_node") if key not in options]:
        raise ConfigError(
            f"not set: {', '.join(missing)}. Say how it is launched, like nodes=2 ranks_per_node=8"
        )
    numbers = {key: whole(key, options[key]) for key in ("nodes", "ranks_per_node")}
    if options.get("slurm", "false") not in ("true", "false"):
        raise ConfigError(f"slurm={options['slurm']}: must be true or false")
    if options.get("slurm") == "true":
        check_slurm(slurm_version())
    print(check_launch(config, **numbers))
    return OK


if __name__ == "__main__":
    sys.exit(main())
