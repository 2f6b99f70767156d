"""Ctrl-C or SIGTERM: how does a run end without losing a step?"""

import signal
from typing import Any


class StopRequest:
    """Finish the step, save, leave. `agreed` once all ranks know, at the same step."""

    def __init__(self) -> None:
        self.signalled = self.agreed = False

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.signalled = True
