"""Do all ranks see, decide and have the same? All functions but `turn_on_host` are collective."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from trainer.config import ConfigError
from trainer.ranks.stop import Stopped, StopRequest

MAX_CLOCK_S = 5.0  # [s] between clocks; more makes the times in logs of several hosts misleading
log = logging.getLogger(__name__)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_gather_objects(value: Any) -> list[Any]:
    """Each rank's value, on all ranks."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def turn_on_host() -> int:
    """0 on the first rank of a host; 1 on the others, which find what the first has unpacked or fetched."""
    return min(int(os.environ.get("LOCAL_RANK", dist.get_rank())), 1)


def refusing_on_all(
    action: Callable[[], Any], *, refusals: tuple[type[Exception], ...] = (ConfigError, OSError)
) -> Any:
    """Rank 0 acts, and what rank 0 refuses is refused on all ranks. Returns the result on rank 0 and None on
    the others. Raises: ConfigError.
    """
    result, refusal = None, None
    if dist.get_rank() == 0:
        try:
            result = action()
        except refusals as error:
            refusal = str(error)
    if (refusal := broadcast_object(refusal)) is not None:
        raise ConfigError(refusal)
    return result


def refuse_disagreement(
    facts: Mapping[str, Any],
    *,
    broadcast: Callable[[Any], Any] = broadcast_object,
    gather: Callable[[Any], list[Any]] = all_gather_objects,
) -> None:
    """Raises: ConfigError, on all ranks, that names a rank whose facts are not those of rank 0, and the
    difference.
    """
    first = broadcast(dict(facts))
    pairs = {key: (facts.get(key), first.get(key)) for key in {**first, **facts}}
    differ = [
        f"{key}={own!r} (rank 0: {of_first!r})"
        for key, (own, of_first) in pairs.items()
        if own != of_first and repr(own) != repr(of_first)  # a nan is no other than rank 0's
    ]
    wrong = [
        f"rank {rank} has {', '.join(of_rank)}"
        for rank, of_rank in enumerate(gather(differ or None))
        if of_rank
    ]
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more ranks" if len(wrong) > 8 else "")
        raise ConfigError(
            f"the ranks do not agree: {shown}. Start all of them with one command, from one state of the code"
        )


def end_if_told(stop: StopRequest, *, ask: Callable[[Any], list[Any]] | None = None) -> None:
    """Between two phases of a start. ask: each rank's value, of ranks that have no process group yet.

    Raises: Stopped, on all ranks, if any was told to end.
    """
    if ask is not None or dist.is_initialized():
        codes = (ask or all_gather_objects)(stop.code)
    elif int(os.environ.get("WORLD_SIZE", 1)) == 1:
        codes = [stop.code]
    else:  # no group yet, so no rank can ask the others
        return
    if heard := [code for code in codes if code is not None]:
        stop.agreed = max(heard)  # Ctrl-C before a preemption: somebody wanted it to end
        raise Stopped(stop.agreed)


def compare_clocks() -> None:
    """Warns of hosts whose clocks differ."""
    broadcast_object(None)  # all ranks leave this at the same time
    clocks = all_gather_objects(time.time())
    late_s, rank = max((abs(clock - clocks[0]), rank) for rank, clock in enumerate(clocks))
    if dist.get_rank() == 0 and late_s > MAX_CLOCK_S:
        log.warning(
            "the clocks of ranks 0 and %d differ by %.0f s: compare times in their logs with care",
            rank,
            late_s,
        )
