"""How does torchrun end with the exit code of the rank that failed, and one line about it?

    python -m trainer.torchrun --standalone --nproc-per-node 4 -m trainer.train experiment=demo

Exit code: that of the rank that failed first (128 + n: killed by signal n) · 0 all ranks ended well · 75
asked to stop by SIGTERM: saved, or the last checkpoint stands; start it again · 130 the same by SIGINT. After
a failure all ranks start again while restarts are left, unless the exit code says that this cannot help.
"""

import os
import signal

from trainer.ranks.launcher import LAUNCHER
from trainer.ranks.stop import exit_code as stopped_by
from trainer.ranks.stop import heard_signals
from trainer.terminal import outlive_terminal

if __name__ == "__main__":  # torch takes seconds to be imported; no rank has been started yet
    outlive_terminal()  # before a socket could take the number of a closed stdout, and be printed into
    for number in heard_signals():
        signal.signal(number, lambda number, frame: os._exit(stopped_by(number)))

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api as launcher
from torch.distributed.run import parse_args, run

from trainer.ranks.stop import (
    CANNOT_SAVE,
    COLLAPSED,
    INTERRUPTED,
    NO_DATA,
    PREEMPTED,
    REFUSED,
    SAVING,
    UNSOUND,
)

FINAL = {REFUSED, COLLAPSED, NO_DATA, CANNOT_SAVE, UNSOUND, PREEMPTED, INTERRUPTED}
# How a rank ends that was asked to stop, or that did not stop in time:
TOLD = {
    PREEMPTED,
    INTERRUPTED,
    *(-number for number in (*SAVING, signal.SIGKILL)),
}
AFTERMATH = {1, -signal.SIGABRT, *TOLD} - {-signal.SIGKILL}  # how a rank may end because another is gone
UNTOLD = ("Sending process", "failed (exitcode")  # what torch logs on top of our line


class Ended(SignalException):
    """By a signal, or with the other nodes. `code`: the exit code. On a SignalException torch leaves the
    rendezvous open.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}", sigval=signal.SIGTERM)
        self.code = code


class Agent(LocalElasticAgent):
    """Starts, watches and ends the ranks of this node.

    torch's signal handler raises asynchronously. Ranks that are being started at that moment are not tracked
    yet and would be orphaned. Here a signal waits until the agent next looks at the ranks, 0.1 s at most,
    unless the agent waits for other nodes. torch passes the first signal on to the ranks; this class passes
    on the signals that arrive while torch waits for their end.
    """

    stop_signal: ClassVar[signal.Signals | None] = None
    may_raise: ClassVar[bool] = True
    current: ClassVar["Agent | None"] = None

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        Agent.may_raise, Agent.current = False, self
        try:
            return super().run(role)
        except SignalException as stop:
            # While the ranks are being restarted, the only codes are those of the ranks to be replaced.
            codes = {} if self._worker_group.state is WorkerState.STOPPED else self._codes()
            raise Ended(code_when_stopped(codes, stop_code=stopped_by(stop.sigval))) from None
        except RendezvousError as error:
            print(f"the other nodes have ended or cannot be reached: {error}", file=sys.stderr)
            stops = [code for code in self._codes().values() if code in (PREEMPTED, INTERRUPTED)]
            # 1: srun reports the highest code, and another node has the cause
            raise Ended(stops[0] if stops else 1) from None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # torch keeps the store over a restart, so ranks would find the addresses of the dead ones in it
        # (pytorch #135712, #167288). With this field reset, torch makes a new store on another port.
        worker_group.spec.rdzv_handler._bootstrap_store_info = None
        with interruptible():
            super()._rendezvous(worker_group)

    def _exit_barrier(self) -> None:
        with interruptible():
            super()._exit_barrier()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        with interruptible():
            pass
        ended = self._codes()  # before torch ends the others
        result = super()._monitor_workers(worker_group)
        if not result.is_failed():
            if result.state is WorkerState.HEALTHY and worker_group.spec.rdzv_handler.is_closed():
                # torch would wait until these ranks fail, too
                raise RendezvousClosedError("one of them closed the job")
            return result
        first = {
            rank: failure for rank, failure in result.failures.items() if ended.get(rank)
        } or result.failures
        rank = cause({rank: failure.exitcode for rank, failure in first.items()})
        code = first[rank].exitcode
        result.failures = {rank: first[rank]}
        if code in FINAL:
            self._remaining_restarts = 0  # as torch does for a rank that cannot be ended
        elif self._remaining_restarts:
            left = self._remaining_restarts - 1
            print(
                f"{describe(rank, code)}; all ranks start again, restarts left after this: {left}",
                file=sys.stderr,
            )
        return result

    def _codes(self) -> dict[int, int | None]:
        """Of this node's ranks; None: still running."""
        return {
            self._worker_group.workers[local].global_rank: handler.proc.poll()
            for local, handler in self._handlers().items()
        }

    def _handlers(self) -> dict[int, SubprocessHandler]:
        return getattr(self._pcontext, "subprocess_handlers", {})

    def pass_on(self, number: int) -> None:
        for handler in self._handlers().values():
            with suppress(ProcessLookupError):
                os.killpg(handler.proc.pid, number)


def cause(codes: dict[int, int]) -> int:
    """Which rank failed by itself, if several ended between two looks at them."""
    return min(codes, key=lambda rank: codes[rank] in AFTERMATH)


def code_when_stopped(codes: dict[int, int | None], *, stop_code: int) -> int:
    """The exit code of ranks that were asked to stop. stop_code: if they did so or were killed."""
    failed = {rank: code for rank, code in codes.items() if code and code not in TOLD}
    if failed:
        rank = cause(failed)
        print(describe(rank, failed[rank]), file=sys.stderr)
        return exit_code(failed[rank])
    return 0 if codes and not any(codes.values()) else stop_code


def exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code  # as a shell has it


def describe(rank: int, code: int) -> str:
    return (
        f"rank {rank} ended with exit code {code}"
        if code >= 0
        else f"rank {rank} was killed by {signal.Signals(-code).name}"
    )


def tell(number: int, frame: Any = None) -> None:
    again, Agent.stop_signal = Agent.stop_signal is not None, signal.Signals(number)
    if Agent.may_raise:
        raise SignalException(f"signal {number}", sigval=Agent.stop_signal)
    if again and Agent.current is not None:
        Agent.current.pass_on(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """A signal raises SignalException here, also one that came before."""
    Agent.may_raise = True
    try:
        if Agent.stop_signal is not None:
            tell(Agent.stop_signal)
        yield
    finally:
        Agent.may_raise = False


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ[LAUNCHER] = str(os.getpid())
    for number in heard_signals():  # torch listens only once the nodes have met
        signal.signal(number, tell)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in heard_signals())
    processes._terminate_process_handler = tell  # what torch listens with
    launcher.LocalElasticAgent = Agent
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(
        lambda r: not str(r.msg).startswith(UNTOLD)
    )
    try:
        options = parse_args(arguments)
        if options.log_dir is None and options.redirects == options.tee == "0":
            options.log_dir = os.devnull  # torch would leave a directory behind for what nobody writes
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(describe(rank, failure.exitcode), file=sys.stderr)
        return exit_code(failure.exitcode)
    except Ended as ended:
        return ended.code
    except SignalException as stop:
        return stopped_by(stop.sigval)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # all ranks have ended, and taking torch's store down was seen to hang for seconds at the interpreter's
    # end
    os._exit(status)
