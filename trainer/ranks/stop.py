"""How does a run that is asked to end do so without losing a step, and with which code?

Signals count from the first line of a program to its last, so this file imports next to nothing.
docs/reliability.md has the table of signals.
"""

import faulthandler
import os
import signal
import threading
from types import FrameType
from typing import ClassVar

OK, REFUSED, COLLAPSED, NO_DATA, CANNOT_SAVE, UNSOUND = 0, 2, 3, 4, 5, 6
# EX_TEMPFAIL of sysexits.h: saved; the same command continues, so launchers put it back into the queue
PREEMPTED = 75
INTERRUPTED = 130  # 128 + SIGINT, as shells say it: saved, somebody wanted it to end

# SIGQUIT (Ctrl-\) is not among them: it ends a process at once, whatever state that is in
SAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1)
STACKS = (
    signal.SIGUSR2
)  # writes the stacks of all threads to stderr, in C, whoever holds the interpreter lock
STDERR = 2


class Stopped(Exception):
    """All ranks were told to end before the first step. code: the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__("told to end before the first step; nothing new to save")
        self.code = code


class StopRequest:
    """Finish the step, save, leave. `signalled` is the first signal; `agreed` the exit code once all ranks
    know, at the same step.

    As a context, it listens to signals; inside another one it takes over what that one has heard. While the
    run is being built there is nothing to save, so a second signal ends the process at once, even where
    C code keeps the main thread from noticing the first. From `has_started` on, further signals change
    nothing.
    """

    current: ClassVar["StopRequest | None"] = None  # signals are sent to the process

    def __init__(self) -> None:
        self.signalled: int | None = None
        self.agreed: int | None = None
        self.outer: StopRequest | None = None
        self.handlers: dict[int, object] = {}  # as they were before
        self.wakeup: int | None = None  # the pipe that signals are written to while the run is being built

    def __enter__(self) -> "StopRequest":
        self.outer, StopRequest.current = StopRequest.current, self
        if self.outer is not None:
            self.signalled, self.wakeup = self.signalled or self.outer.signalled, self.outer.wakeup
            return self
        faulthandler.register(STACKS, file=STDERR, all_threads=True, chain=False)
        read, self.wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        threading.Thread(target=end_at_second, args=(read,), name="signals", daemon=True).start()
        self.handlers = {number: signal.signal(number, note) for number in heard_signals()}
        return self

    def __exit__(self, *error: object) -> None:
        StopRequest.current = self.outer
        if self.outer is None:
            self.has_started()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def has_started(self) -> None:
        """The first step begins: from now on there is something to save."""
        if self.wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self.wakeup)  # and so the thread ends
        request: StopRequest | None = self
        while request is not None:
            request.wakeup, request = None, request.outer

    @property
    def code(self) -> int | None:
        """The exit code that this rank was told to end with."""
        return None if self.signalled is None else exit_code(self.signalled)


def heard_signals() -> list[signal.Signals]:
    """Those of SAVING that are not ignored already: nohup does so, and a shell for jobs in the background."""
    return [number for number in SAVING if signal.getsignal(number) is not signal.SIG_IGN]


def exit_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def note(number: int, frame: FrameType | None) -> None:
    if (request := StopRequest.current) is not None and request.signalled is None:
        request.signalled = number


def leave_to_parent() -> None:
    """In a forked child: what is sent to it must not count as sent to its parent."""
    if (request := StopRequest.current) is not None:
        request.has_started()


os.register_at_fork(after_in_child=leave_to_parent)


def end_at_second(pipe: int) -> None:
    """A thread: reads the numbers of signals, which the kernel's handler writes at once."""
    signals: list[int] = []
    while numbers := os.read(pipe, 64):
        signals += [number for number in numbers if number in SAVING]
        if len(signals) > 1:
            os.write(STDERR, b"a second signal before the first step: ended at once, nothing new to save\n")
            os._exit(exit_code(signals[0]))
    os.close(pipe)
