"""Do all ranks see, decide and have the same? All functions are collective: every rank calls them."""

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


def agreed(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gathered(value: Any) -> list[Any]:
    """Each rank's value, on all ranks."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def refusing_on_all(
    action: Callable[[], Any], *, refusals: tuple[type[Exception], ...] = (ConfigError, OSError)
) -> Any:
    """Rank 0 acts; what it refuses is refused on all ranks. Returns its result, None on the others. Raises:
    ConfigError.
    """
    result, refusal = None, None
    if dist.get_rank() == 0:
        try:
            result = action()
        except refusals as error:
            refusal = str(error)
    if (refusal := agreed(refusal)) is not None:
        raise ConfigError(refusal)
    return result


def refuse_disagreement(
    facts: Mapping[str, Any],
    *,
    agreed: Callable[[Any], Any] = agreed,
    gathered: Callable[[Any], list[Any]] = gathered,
) -> None:
    """Raises: ConfigError, on all ranks, that names a rank whose facts are not those of rank 0, and the
    difference.
    """
    first = agreed(dict(facts))
    pairs = {key: (facts.get(key), first.get(key)) for key in {**first, **facts}}
    differ = [
        f"{key}={own!r} (rank 0: {of_first!r})" for key, (own, of_first) in pairs.items() if own != of_first
    ]
    wrong = [
        f"rank {rank} has {', '.join(of_rank)}"
        for rank, of_rank in enumerate(gathered(differ or None))
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
        codes = (ask or gathered)(stop.code)
    elif int(os.environ.get("WORLD_SIZE", 1)) == 1:
        codes = [stop.code]
    else:  # the others cannot be asked yet
        return
    if heard := [code for code in codes if code is not None]:
        stop.agreed = max(heard)  # Ctrl-C before a preemption: somebody wanted it to end
        raise Stopped(stop.agreed)


def compare_clocks() -> None:
    """Warns of hosts whose clocks differ."""
    agreed(None)  # all ranks leave this at the same time
    clocks = gathered(time.time())
    late_s, rank = max((abs(clock - clocks[0]), rank) for rank, clock in enumerate(clocks))
    if dist.get_rank() == 0 and late_s > MAX_CLOCK_S:
        log.warning(
            "the clocks of ranks 0 and %d differ by %.0f s: compare times in their logs with care",
            rank,
            late_s,
        )
