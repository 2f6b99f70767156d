"""Does launch/slurm.sbatch hold under a real Slurm: when it is stopped, preempted, killed, when a node dies?

    python -m tests.slurm [name ...] [--short]     make slurm runs all of them

A whole cluster on this machine (cluster.py): slurmctld, a slurmd for each virtual node, munge. The script is
the repository's own, with the options that a user would give to sbatch.
"""
