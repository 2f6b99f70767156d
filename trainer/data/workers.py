"""Who does the reading? Forked processes, or the caller itself if there are none.

    submit(request) -> queue -> a thread for each worker <-> pipe <-> worker: work(request) -> future

A worker inherits all that `work` needs, so nothing is pickled but requests and answers, and it keeps no
state: any worker may take any request. It ends with the process that forked it, however that one ends. If a
worker is killed, its thread does the work from then on: slower, and nothing is lost.
"""

import contextlib
import logging
import math
import os
import pickle
import signal
import stat
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Empty, PriorityQueue
from typing import Any

# ends that say nothing against the work
LEFT_BY = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ORPHAN_S = 0.25  # [s] between looks at whether the parent is still there

CLOSED = "the stream was closed"

log = logging.getLogger(__name__)


class LazyResult:
    """Stands for a future where there are no workers: the work is done when its result is wanted."""

    def __init__(self, work: Callable[[Any], Any], request: Any) -> None:
        self.work, self.request, self.is_done = work, request, False

    def done(self) -> bool:
        return self.is_done

    def result(self) -> Any:
        if not self.is_done:
            self.answer, self.is_done = self.work(self.request), True
        return self.answer


class Workers:
    def __init__(self, num: int, work: Callable[[Any], Any]) -> None:
        self.num, self.work, self.parent, self.is_closed = num, work, os.getpid(), False
        self.queue, self.order = PriorityQueue[tuple[float, int, Any, Future]](), count()
        self.pids: list[int] = []
        self.running = set[int]()
        for _ in range(num):
            pid, pipe = fork(work)
            self.pids.append(pid)
            self.running.add(pid)
            threading.Thread(
                target=self.serve, args=(pid, pipe), daemon=True, name=f"data worker {pid}"
            ).start()

    def submit(self, request: Any, *, priority: int = 0, future: Future | None = None) -> Future | LazyResult:
        """Lower priorities first. Errors of `work` are raised by the future's `result`."""
        if not self.num:
            return LazyResult(self.work, request)
        if self.is_closed:
            raise RuntimeError(CLOSED)
        future = future or Future()
        self.queue.put((priority, next(self.order), request, future))
        return future

    def serve(self, pid: int, pipe: Connection) -> None:
        """A thread: hands one request after another to its worker."""
        is_alive = True
        while True:
            _, _, request, future = self.queue.get()
            if self.is_closed:
                future.set_exception(RuntimeError(CLOSED))
                return
            try:
                if is_alive:
                    try:
                        pipe.send(request)
                        answer, error = pipe.recv()
                    except (EOFError, OSError):
                        if self.is_closed:
                            raise RuntimeError(CLOSED) from None
                        is_alive = False
                        self.running.discard(pid)
                        refuse_or_tell(pid)
                        answer, error = self.work(request), None
                else:
                    answer, error = self.work(request), None
                if error is not None:
                    raise error
                future.set_result(answer)
            except BaseException as error:  # noqa: BLE001  # it belongs to whoever asks for the result
                future.set_exception(error)

    def forget(self) -> None:
        """Drops the requests that no worker has taken up."""
        with contextlib.suppress(Empty):
            while True:
                self.queue.get_nowait()[-1].set_exception(RuntimeError(CLOSED))

    def close(self) -> None:
        if self.is_closed or os.getpid() != self.parent:
            return
        self.is_closed = True
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)  # it keeps nothing
                os.waitpid(pid, 0)
        self.forget()
        for _ in self.pids:  # wakes the threads
            self.queue.put((-math.inf, next(self.order), None, Future()))


def refuse_or_tell(pid: int) -> None:
    """Raises: RuntimeError if the worker crashed: what it worked on would crash this process too."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if -code not in LEFT_BY:
        raise RuntimeError(f"data worker {pid} crashed with exit code {code}; data.workers=0 shows where")
    how = signal.Signals(-code).name
    log.warning("data worker %d was ended by %s (out of memory?); this process reads in its place", pid, how)


# -- in the worker ----------------------------------------------------------------------------------------


def fork(work: Callable[[Any], Any]) -> tuple[int, Connection]:
    parent = os.getpid()
    ours, theirs = Pipe()
    if pid := os.fork():
        theirs.close()
        return pid, ours
    try:
        for of in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # sent to a whole group of processes; the parent decides when it is over
            signal.signal(of, signal.SIG_IGN)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were not forked
        close_sockets(keep=theirs.fileno())
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
        answer_all(theirs, work)
    finally:
        os._exit(0)


def close_sockets(*, keep: int) -> None:
    """Of the process group and of other workers: peers must see at once that the parent has ended."""
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the one that was listing
            if int(name) != keep and stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.close(int(name))


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_S)
    os._exit(0)


def answer_all(pipe: Connection, work: Callable[[Any], Any]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = pipe.recv()
            try:
                answer = (work(request), None)
            except Exception as error:  # noqa: BLE001  # raised where the result is wanted
                answer = (None, portable(error))
            pipe.send(answer)


def portable(error: Exception) -> Exception:
    """As it is, if it survives the pipe."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever a foreign class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
