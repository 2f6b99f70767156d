"""A rank that makes no progress holds all others in a collective: where does it stand, and who ends the job?

`Watchdog` is a thread that counts how long the current phase lasts. Over its limit, the stacks of all threads
are written and the process ends with HUNG. It counts its own turns, not the clock: a process that was stopped
(SIGSTOP, a paused container, a suspended laptop) is not to blame for the time.

A Python thread has no turn while C code holds the interpreter lock, or if writing the report itself blocks
it. So each turn is told to an observer: this file, run as a small process of its own, which ends a rank whose
thread has gone silent.
"""

import faulthandler
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

HUNG = 7  # exit code; those of runs that end by themselves are in stop.py
STDERR = 2  # the descriptor: nothing here may wait for the lock of sys.stderr, which a stuck thread may hold
# writes the stacks of all threads to stderr, in C, whoever holds the interpreter lock
DUMP_SIGNAL = signal.SIGUSR2
DUMP_S = 1.0  # what the stacks may take to be written to stderr


class Watchdog:
    """Ends this process if a phase lasts longer than its limit.

    directory: where stacks.<rank>.txt is written, which need not be possible; limit_s, first_limit_s: [s] of
    a phase, and of the time between `start` and the first `beat`; grace_s: [s] between the report and the
    end, in which the other ranks reach their limit and report too. A rank that goes on within it was merely
    slow and lives: if no other has ended, the job is saved, and if one has, the next collective fails or
    reaches the limit. Start it once the data workers are forked: threads do not live on in a fork, and the
    fork would hold the observer's pipe open.
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
        self._observer: subprocess.Popen | None = None

    def start(self) -> None:
        faulthandler.register(DUMP_SIGNAL, file=STDERR, all_threads=True, chain=False)
        command = [sys.executable, "-I", "-S", __file__, str(self.rank), str(os.getpid())]
        with suppress(OSError):  # no process to be had: the thread alone has to do
            self._observer = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0
            )
            os.set_blocking(self._observer.stdin.fileno(), False)
        self._tell(self.first_limit_s)
        self._thread.start()

    def close(self) -> None:
        """Stops watching. Harmless before `start` and a second time."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        if self._observer is not None:
            self._observer.stdin.close()  # and so it ends
            self._observer.wait()
            self._observer = None
            faulthandler.unregister(DUMP_SIGNAL)

    def beat(self, phase: str, *, limit_s: float | None = None) -> None:
        """The rank is now in `phase`, which may take limit_s [s]. Without a limit of its own, this costs next
        to nothing.
        """
        if limit_s is None:
            self._phase = (phase, self.limit_s)
            return
        self._phase = (phase, limit_s)
        self._tell(limit_s)  # at once: C code may take the interpreter lock before the thread's next turn

    def _watch(self) -> None:
        seen, quiet_s, reported, last_s = ("", 0.0), 0.0, False, time.monotonic()
        while not self._closed.wait(turn_s := min(1.0, self._phase[1] / 10, self.limit_s / 10)):
            now_s = time.monotonic()
            passed_s, last_s = min(now_s - last_s, 2 * turn_s), now_s  # longer: the process was stopped
            phase = self._phase
            self._tell(phase[1])
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

    def _tell(self, limit_s: float) -> None:
        """Tells the observer how long the thread may be silent from now on."""
        margin_s = min(10.0, limit_s)
        if self._observer is not None:
            with suppress(OSError):
                self._observer.stdin.write(f"{limit_s + self.grace_s + margin_s}\n".encode())

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
            last.join(timeout=DUMP_S)
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


# -- the observer: a process of its own --------------------------------------------------------------------


def observe(*, rank: int, pid: int) -> None:
    """Reads from stdin how long [s] the parent `pid` may be silent, again and again; ends it when it was
    silent for longer.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # a group is told to stop as a whole, and the rank still has to save
        signal.signal(number, signal.SIG_IGN)
    limit_s, quiet_s, warned, last_s = 3600.0, 0.0, False, time.monotonic()
    while os.getppid() == pid:  # 3600: until the parent has said its own
        turn_s = min(1.0, limit_s / 10)
        if select.select([0], [], [], turn_s)[0]:
            told = os.read(0, 2**16).split()
            if not told:
                return
            limit_s, quiet_s, warned = float(told[-1]), 0.0, False
        elif not is_stopped(pid):
            quiet_s += min(time.monotonic() - last_s, 2 * turn_s)
        last_s = time.monotonic()
        if quiet_s >= limit_s and not warned:
            warned = True
            say(
                f"rank {rank}: its watchdog had no turn for {quiet_s:.1f} s (C code holds the interpreter "
                "lock?); it is killed\n"
            )
            os.kill(pid, DUMP_SIGNAL)
        elif warned and quiet_s >= limit_s + DUMP_S:
            os.kill(pid, signal.SIGKILL)
            return


def is_stopped(pid: int) -> bool:
    """By SIGSTOP or a debugger. Where there is no /proc: nobody knows."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


if __name__ == "__main__":
    observe(rank=int(sys.argv[1]), pid=int(sys.argv[2]))
