"""How long does a test wait? Until something happens: the limit is for what never does.

A limit counts the time of a machine that is there for this process alone, as the watchdog's does: of each
turn only the share of a core that a process gets now. So it is the same limit beside thirty other processes.
"""

import time
from collections.abc import Callable
from typing import Any

from trainer.ranks.watchdog import core_share

LIMIT_S = 120.0


def until(condition: Callable[[], Any], *, timeout_s: float = LIMIT_S) -> float:
    """[s] that are left of timeout_s once the condition holds; 0 if it never did."""
    left_s, last_s = timeout_s, time.monotonic()
    while not condition():
        if left_s <= 0:
            return 0.0
        time.sleep(0.02)
        now_s = time.monotonic()
        left_s, last_s = left_s - (now_s - last_s) * core_share(), now_s
    return max(left_s, 1e-3)
