"""Do all hosts run the same code on the same software, and what time is it there?"""

import platform
import time
from collections.abc import Sequence
from statistics import median

import torch

from trainer.preflight.finding import Finding, most_common
from trainer.ranks.agree import MAX_CLOCK_S
from trainer.ranks.meeting import Meeting
from trainer.version import code_version

ROUNDS = 3  # a rank of a busy host may wait for a core in one of them


def software() -> dict[str, str]:
    versions = {"code": code_version(), "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        versions["GPU"] = torch.cuda.get_device_name()
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def clocks(meeting: Meeting) -> list[list[float]]:
    """[s] Each rank's clock, asked when all are there; a row for each of the rounds. Collective."""
    rounds = []
    for _ in range(ROUNDS):
        meeting.all_gather_objects("here")
        rounds.append(meeting.all_gather_objects(time.time()))
    return rounds


def unlike(hosts: Sequence[str], versions: Sequence[dict[str, str]]) -> list[Finding]:
    """Hosts whose software is not what most have; a host is named once."""
    findings = {}
    for name in dict.fromkeys(name for row in versions for name in row):
        values = [row.get(name, "none") for row in versions]
        common = most_common(values)
        for host, value in zip(hosts, values, strict=True):
            if value != common:
                findings[host, name] = Finding(
                    host, f"version of {name}", value, f"{common}, as most hosts have"
                )
    return list(findings.values())


def astray(hosts: Sequence[str], rounds: Sequence[Sequence[float]]) -> list[Finding]:
    """Hosts whose clock is far from the middle of all in every round."""
    errors = [min((row[i] - median(row) for row in rounds), key=abs) for i in range(len(hosts))]
    worst = {host: error for host, error in zip(hosts, errors, strict=True) if abs(error) > MAX_CLOCK_S}
    limit = f"{MAX_CLOCK_S:g} s from the middle of all"
    return [Finding(host, "clock", f"{error:+.1f} s", limit) for host, error in worst.items()]
