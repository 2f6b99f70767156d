"""How fast do devices send: inside a host, between two hosts, and all together?

All-reduce and all-to-all are what a run waits for. Pairs of neighbouring hosts exchange at the same time,
each host with both of its neighbours: the slow one of many is known by its best.

Speeds are [B/s] of a rank, counted as in configs/device: what it receives, or sends in an all-to-all.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from trainer.lab.plan.hardware import Hardware
from trainer.preflight.finding import Finding
from trainer.preflight.speed import fastest_s

NUM_BYTES = {"cuda": 2**28, "cpu": 2**22}
REPEATS = 5
SHARE = 0.5  # of what the device's sheet promises
INSIDE, BETWEEN, ALL = "inside the host", "between hosts", "between all hosts"


class Link(NamedTuple):
    """What a rank has measured. kind: of Hardware.speed."""

    where: str
    operation: str
    kind: str
    speed: float


def measured(hosts: Sequence[str], device: torch.device) -> list[Link]:
    """hosts: of every rank. Collective."""
    ranks = {
        host: [rank for rank, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)
    }
    links, rank = [], dist.get_rank()
    groups = {host: dist.new_group(of_host) for host, of_host in ranks.items()}
    own = ranks[hosts[rank]]
    if len(own) > 1:
        links += together(groups[hosts[rank]], device, where=INSIDE, leaving=1.0, kind="nvlink")
    dist.barrier()
    if len(ranks) == 1:
        return links
    between = 1 - len(own) / len(hosts)  # the share of a rank's bytes that leaves its host
    links += together(None, device, where=ALL, leaving=between, kind="nic")
    exchanges = [exchanged(list(ranks.values()), pairs, device) for pairs in neighbours(len(ranks))]
    best = max((speed for speed in exchanges if speed is not None), default=None)
    return links if best is None else [*links, Link(BETWEEN, "exchange", "nic", best)]


def together(
    group: dist.ProcessGroup | None, device: torch.device, *, where: str, leaving: float, kind: str
) -> list[Link]:
    """leaving: the share of the bytes that takes the link."""
    n, num_bytes = dist.get_world_size(group), NUM_BYTES[device.type]
    sent, received = (torch.zeros(num_bytes // 4 // n * n, device=device) for _ in range(2))
    reduce_s = fastest_s(lambda: dist.all_reduce(sent, group=group), device, repeats=REPEATS)
    swap_s = fastest_s(lambda: dist.all_to_all_single(received, sent, group=group), device, repeats=REPEATS)
    share = (n - 1) / n if where == INSIDE else leaving
    return [
        Link(where, "all-reduce", kind, 2 * share * num_bytes / reduce_s),
        Link(where, "all-to-all", f"all_to_all_{kind}", share * num_bytes / swap_s),
    ]


def neighbours(num_hosts: int) -> list[list[tuple[int, int]]]:
    """Pairs of hosts that exchange at the same time; each host has one or two neighbours.

    >>> neighbours(4)
    [[(0, 1), (2, 3)], [(1, 2), (3, 0)]]
    """
    first = [(i, i + 1) for i in range(0, num_hosts - 1, 2)]
    second = [(i, (i + 1) % num_hosts) for i in range(1, num_hosts, 2)]
    return [first, second] if num_hosts > 2 else [first]


def exchanged(
    ranks: Sequence[Sequence[int]], pairs: Iterable[tuple[int, int]], device: torch.device
) -> float | None:
    """[B/s] each way between this rank and that of the same number on the other host; None: it has none."""
    rank, other = dist.get_rank(), None
    for a, b in pairs:
        both = dict(zip(ranks[a], ranks[b], strict=False))
        other = both.get(rank, {y: x for x, y in both.items()}.get(rank, other))
    sent, received = (torch.zeros(NUM_BYTES[device.type] // 4, device=device) for _ in range(2))

    def exchange() -> None:
        operations = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    took_s = None if other is None else fastest_s(exchange, device, repeats=REPEATS)
    dist.barrier()
    return None if took_s is None else NUM_BYTES[device.type] / took_s


def slow(
    devices: Sequence[tuple[str, str]], links: Sequence[Iterable[Link]], *, sheet: Hardware | None
) -> list[Finding]:
    """Against the device's sheet. What all do together is told of the first rank."""
    if sheet is None:
        return []
    findings = []
    for rank, (host, device) in enumerate(devices):
        for where, operation, kind, speed in links[rank]:
            least = SHARE * sheet.speed(kind)
            if speed < least and (where != ALL or rank == 0):
                name = "all hosts" if where == ALL else host
                what = f"{operation} {where}" if where == ALL else f"{device}, {operation} {where}"
                findings.append(Finding(name, what, gb(speed), f"{gb(least)}, half of {sheet.name}'s"))
    return findings


def gb(speed: float) -> str:
    return f"{speed / 1e9:.3g} GB/s"
