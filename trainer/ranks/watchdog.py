"""A rank that makes no progress holds all others in a collective: where does it stand, and who ends the job?

`Watchdog` is a thread that counts how long the current phase lasts. Over its limit, the stacks of all threads
are written and the process ends with HUNG. It counts its own turns, not the clock: a process that was stopped
(SIGSTOP, a paused container, a suspended laptop) is not to blame for the time. Of a turn, only the share of a
core that a process of this host gets is counted: a rank on a busy machine is slow, and not hung, and so is
one that waits for it.

A Python thread has no turn while C code holds the interpreter lock. So each turn sets faulthandler's timer
anew, a thread in C: where no turn comes, it writes the stacks to stderr and ends the process with 1.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

HUNG = 7  # exit code; those of runs that end by themselves are in stop.py
STDERR = 2  # the descriptor: nothing here may wait for the lock of sys.stderr, which a stuck thread may hold
LAST_WORDS_S = 1.0  # what the stacks may take to be written to stderr
MAX_LIMIT_S = 1e6  # eleven days; faulthandler's timer goes no further than 9e9 s


class Watchdog:
    """Ends this process if a phase lasts longer than its limit.

    directory: where stacks.<rank>.txt is written, which need not be possible.
    limit_s, first_limit_s: [s] of a phase, and of the time between `start` and the first `heartbeat`.
    grace_s: [s] between the report and the end. The other ranks reach their limit in it and report too.

    A rank that makes progress during the grace period was merely slow, and it is spared. If no other rank has
    ended, the job goes on; if one has, the next collective fails or reaches the limit. Where Python gives the
    thread no turn, up to first_limit_s more may pass by the clock: a process may have been stopped for that
    long, and collectives have the same limit by the same clock. Start the watchdog once the data workers are
    forked, because a fork has none of its parent's threads.

    Raises: ValueError if a limit is not above 0.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rank: int,
        limit_s: float,
        first_limit_s: float,
        grace_s: float | None = None,
    ) -> None:
        if min(limit_s, first_limit_s) <= 0:
            raise ValueError(f"limit_s={limit_s}, first_limit_s={first_limit_s}: both must be above 0")
        self.path = directory / f"stacks.{rank}.txt"
        self.rank, self.limit_s, self.first_limit_s = rank, limit_s, first_limit_s
        self.grace_s = min(10.0, limit_s / 2) if grace_s is None else grace_s
        self._phase = ("start", first_limit_s)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._reporter = threading.Thread()

    def start(self) -> None:
        self._set_timer()
        self._thread.start()

    def close(self) -> None:
        """Stops watching. Harmless before `start` and a second time."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        faulthandler.cancel_dump_traceback_later()

    def heartbeat(self, phase: str, *, limit_s: float | None = None) -> None:
        """The rank is now in `phase`, which may take limit_s [s]; None: as long as any step."""
        self._phase = (phase, self.limit_s if limit_s is None else limit_s)

    def _watch(self) -> None:
        seen, quiet_s, reported, last_s = ("", 0.0), 0.0, False, time.monotonic()
        while not self._closed.wait(turn_s := min(1.0, self._phase[1] / 10, self.limit_s / 10)):
            now_s = time.monotonic()
            # longer than two turns: the process was stopped
            passed_s, last_s = min(now_s - last_s, 2 * turn_s) * core_share(), now_s
            phase = self._phase
            self._set_timer()
            if phase is not seen:
                if reported:
                    self._note(
                        f"rank {self.rank}: progress again after {quiet_s:.1f} s in {seen[0]}; it goes on\n"
                    )
                seen, quiet_s, reported = phase, 0.0, False
                continue
            quiet_s += passed_s
            if not reported and quiet_s >= phase[1]:
                reported = True
                self._report(phase[0], quiet_s)
            elif reported and quiet_s >= phase[1] + self.grace_s:
                self._end(phase[0], quiet_s)

    def _set_timer(self) -> None:
        """Ends this process unless the thread has a turn before; 40 us."""
        if not self._closed.is_set():
            silent_s = (self._phase[1] + self.grace_s) / core_share() + self.first_limit_s
            faulthandler.dump_traceback_later(min(silent_s, MAX_LIMIT_S), exit=True, file=STDERR)

    def _report(self, phase: str, quiet_s: float) -> None:
        """In a thread of its own: the file system may be what hangs."""
        head = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}, host {socket.gethostname()}, pid {os.getpid()}, "
            f"rank {self.rank}: "
        )
        text = "\n".join([f"{head}{quiet_s:.1f} s in {phase}", *stacks(), ""])
        line = f"rank {self.rank}: no progress for {quiet_s:.1f} s in {phase}; stacks of its threads are"

        def write() -> None:
            try:
                append(self.path, text)
            except OSError as error:
                say(
                    f"{line} here, as {self.path} cannot be written ({error.strerror}); this process "
                    f"ends\n{text}"
                )
            else:
                say(f"{line} in {self.path}; this process ends\n")

        self._reporter = threading.Thread(target=write, name="watchdog's report", daemon=True)
        self._reporter.start()

    def _note(self, line: str) -> None:
        say(line)
        with suppress(OSError):
            append(self.path, line)

    def _end(self, phase: str, quiet_s: float) -> None:
        if self._reporter.is_alive():
            line = (
                f"rank {self.rank}: no progress for {quiet_s:.1f} s in {phase}; {self.path} does not "
                "answer, this process ends"
            )
            last = threading.Thread(target=say, args=("\n".join([line, *stacks(), ""]),), daemon=True)
            last.start()
            last.join(timeout=LAST_WORDS_S)
        os._exit(HUNG)


def stacks() -> Iterator[str]:
    """Of all Python threads, innermost call first. Reads no source file: the file system may be what
    hangs.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f"Thread {names.get(ident, ident)} (innermost call first):"
        while frame is not None:
            yield f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_qualname}'
            frame = frame.f_back


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def say(text: str) -> None:
    with suppress(OSError):
        os.write(STDERR, text.encode())


def core_share() -> float:
    """How much of a core a process of this host gets that wants one, at most 1. Where nobody knows: 1."""
    try:
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 1.0
    return min(1.0, (os.cpu_count() or 1) / max(1, running - 1))  # this thread is one of them
