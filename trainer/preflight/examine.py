"""Every rank looks at its host and device, all look at each other, and rank 0 says what is unfit."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from trainer.config import Config
from trainer.lab.plan.hardware import DEVICES, Hardware, hardware
from trainer.preflight import files, hosts, links, speed
from trainer.preflight.finding import Finding
from trainer.preflight.place import host_name, named_by_slurm
from trainer.program import program_of
from trainer.ranks import device
from trainer.ranks.meeting import Meeting, meet
from trainer.run.build import num_experts_of
from trainer.split import check_rows

TIMEOUT_S = 60.0


def examine(config: Config, *, sheet: str | None) -> int:
    """How many findings there are, on every rank; rank 0 prints them. Collective. Raises: ConfigError."""
    os.environ |= named_by_slurm()
    known = hardware(sheet) if sheet else None
    meeting = meet(timeout_s=TIMEOUT_S)
    degrees = device.degrees_of(
        config.parallel, num_ranks=meeting.num_ranks, num_experts=num_experts_of(config)
    )
    program = program_of(config)
    program.check_split(num_ranks=degrees.num_readers, num_streams=config.data.num_streams)
    check_rows(program, cp=degrees.cp)
    names = meeting.all_gather_objects(host_name())
    findings = before_devices(config, meeting, names)
    on = device.start(timeout_s=TIMEOUT_S, meeting=meeting)
    try:
        findings += of_devices(config, meeting, names, on, known or sheet_of(on))
    finally:
        dist.destroy_process_group()
    if meeting.rank == 0:
        conclude(findings)
    return len(findings)


def before_devices(config: Config, meeting: Meeting, names: Sequence[str]) -> list[Finding]:
    findings = hosts.unlike(names, meeting.all_gather_objects(hosts.software()))
    findings += hosts.astray(names, hosts.clocks(meeting))
    tried = meeting.all_gather_objects(files.tried(config, meeting, names))
    return findings + [Finding(*each) for of_rank in tried for each in of_rank]


def of_devices(
    config: Config, meeting: Meeting, names: Sequence[str], on: torch.device, sheet: Hardware | None
) -> list[Finding]:
    dtype = getattr(torch, device.settled(config).dtype)
    called = (
        f"{on.type} {on.index or 0} (rank {meeting.rank})"
        if on.type == "cuda"
        else f"cpu (rank {meeting.rank})"
    )
    devices = list(zip(names, meeting.all_gather_objects(called), strict=True))
    right = meeting.all_gather_objects(speed.is_right(on, dtype))
    flops = meeting.all_gather_objects(speed.product_flops(on, dtype))
    of_links = [
        [links.Link(*link) for link in row] for row in meeting.all_gather_objects(links.measured(names, on))
    ]
    if meeting.rank == 0:
        say_measured(devices, flops, of_links, sheet)
    is_matched = sheet is not None and dtype is torch.bfloat16
    promised = sheet.speed("matmul") if is_matched else None
    findings = speed.wrong(devices, right) + speed.slow(devices, flops, kind=on.type, sheet=promised)
    return findings + links.slow(devices, of_links, sheet=sheet)


def sheet_of(on: torch.device) -> Hardware | None:
    """The file of configs/device whose name is part of the GPU's."""
    if on.type != "cuda":
        return None
    name = torch.cuda.get_device_name(on).lower()
    return next((hardware(path.stem) for path in sorted(DEVICES.glob("*.yaml")) if path.stem in name), None)


def say_measured(
    devices: Sequence[Any], flops: Sequence[float], of_links: Any, sheet: Hardware | None
) -> None:
    num_hosts = len({host for host, _ in devices})
    against = f"the sheet of {sheet.name}" if sheet else "each other"
    print(f"preflight: hosts {num_hosts}, devices {len(devices)}, measured against {against}")
    print(f"  product: {span(value / 1e12 for value in flops)} TFLOP/s")
    for where, operation in dict.fromkeys(link[:2] for row in of_links for link in row):
        speeds = [link.speed for row in of_links for link in row if link[:2] == (where, operation)]
        print(f"  {operation} {where}: {span(value / 1e9 for value in speeds)} GB/s")


def span(values: Iterable[float]) -> str:
    ends = sorted(values)
    return " to ".join(dict.fromkeys(f"{end:.3g}" for end in (ends[0], ends[-1])))


def conclude(findings: Sequence[Finding]) -> None:
    sys.stdout.flush()
    for finding in findings:
        print(f"unfit: {finding}", file=sys.stderr)
    print(f"preflight: {len(findings)} unfit" if findings else "preflight: fit")
