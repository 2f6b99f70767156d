"""Ctrl-C or SIGTERM: how does a run end without losing a step? And with which code does it end?"""

import signal
from typing import Any

OK, REFUSED, COLLAPSED, NO_DATA, CANNOT_SAVE, UNSOUND = 0, 2, 3, 4, 5, 6
# EX_TEMPFAIL of sysexits.h: SIGTERM, saved; the same command continues, so launchers put it back into the
# queue
PREEMPTED = 75
INTERRUPTED = 130  # 128 + SIGINT, as shells say it: saved, somebody wanted it to end


class StopRequest:
    """Finish the step, save, leave. `agreed` is the exit code once all ranks know, at the same step."""

    def __init__(self) -> None:
        self.signalled: int | None = None  # the last signal
        self.agreed: int | None = None

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.signalled = number
