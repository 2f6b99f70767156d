"""A request to end counts from the first line of a program, ends a start that hangs, and is left alone where
somebody chose to ignore it. (At every moment of a run: tests/drills/stops.py.)
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import free_port, run_ranks
from tests.waiting import until
from trainer import train
from trainer.config import ConfigError
from trainer.ranks.agree import end_if_told
from trainer.ranks.stop import SAVING, Stopped, StopRequest

REPOSITORY = Path(__file__).parent.parent
# signals itself when torch is about to be imported, which takes seconds
AT_TORCH = """
import os, runpy, signal, sys
class AtTorch:
    sent = False
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not self.sent:
            self.sent = True
            for number in NUMBERS:
                os.kill(os.getpid(), number)
sys.meta_path.insert(0, AtTorch())
sys.argv = [MODULE, *ARGUMENTS]
runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
"""


def told_at_torch(module, numbers, *arguments):
    """Exit code and stderr."""
    code = f"NUMBERS = {[int(n) for n in numbers]}\nMODULE, ARGUMENTS = {module!r}, {arguments!r}\n{AT_TORCH}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=250
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "number", "code"),
    [
        ("trainer.train", (), signal.SIGINT, 130),
        ("trainer", ("train",), signal.SIGTERM, 75),
    ],
)
def test_a_signal_while_torch_is_being_imported_ends_the_program_in_one_line(
    tmp_path, module, arguments, number, code
):
    """SIGUSR2 comes first: it prints stacks and ends nothing."""
    settings = ["experiment=synthetic", f"run_dir={tmp_path}"]
    status, errors = told_at_torch(module, (signal.SIGUSR2, number), *arguments, *settings)
    assert status == code, errors
    assert "Current thread" in errors
    assert errors.splitlines()[-1] == "told to end before the first step; nothing new to save"
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_a_launcher_that_has_started_no_rank_ends_at_once(number, code):
    assert told_at_torch("trainer.torchrun", (number,), "--no-such-option") == (code, "")


def is_pending(pid: int, number: int) -> bool:
    """Sent to the process, and not yet taken by one of its threads."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["ShdPnd"], 16) >> (number - 1) & 1)


def test_a_second_signal_ends_a_start_that_hangs_in_c_code(tmp_path):
    """The other rank never comes, so this one waits in torch's store; its main thread has no turn."""
    alone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # joins, as the start does, and says so just before
    code = """
import os
from trainer.ranks.stop import StopRequest
with StopRequest():
    from trainer.ranks import device
    print("joins", flush=True)
    device.start(timeout_s=1000)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | alone,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "joins\n"
        process.send_signal(signal.SIGTERM)
        until(
            lambda: not is_pending(process.pid, signal.SIGTERM)
        )  # of two that wait, the lower number is first
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=250)[1]
    finally:
        process.kill()
    assert process.returncode == 75
    assert errors.splitlines()[-1].startswith("a second signal before the first step: ended at once")


def test_further_signals_change_nothing_once_the_run_has_started():
    with StopRequest() as stop:
        stop.has_started()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert (stop.signalled, stop.code) == (signal.SIGHUP, 75)


@pytest.mark.parametrize(("number", "code"), [*((n, 75) for n in SAVING if n != signal.SIGINT), (2, 130)])
def test_each_signal_is_noted_and_handlers_are_as_before_afterwards(number, code):
    before = [signal.getsignal(n) for n in SAVING]
    with StopRequest() as outer:
        os.kill(os.getpid(), number)
        with StopRequest() as stop:  # a request inside another one
            assert stop.signalled == outer.signalled == number
            assert stop.code == code
            with pytest.raises(Stopped) as stopped:
                end_if_told(stop)
            assert stopped.value.code == stop.agreed == code
    assert [signal.getsignal(n) for n in SAVING] == before
    assert signal.set_wakeup_fd(-1) == -1 and StopRequest.current is None


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup does with SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signalled is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_forked_child_is_sent_does_not_count_for_its_parent():
    with StopRequest() as stop:
        if not (pid := os.fork()):
            for number in (signal.SIGUSR1, signal.SIGXCPU):
                os.kill(os.getpid(), number)
            os._exit(21)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 21
        assert stop.signalled is None


def test_one_rank_that_was_told_ends_the_start_of_all():
    """Rank 1 was preempted, rank 2 got Ctrl-C, rank 0 nothing: 130 on all of them."""

    def worker():
        import torch.distributed as dist

        stop = StopRequest()
        end_if_told(stop)  # nobody was told
        stop.signalled = {1: signal.SIGTERM, 2: signal.SIGINT}.get(dist.get_rank())
        with pytest.raises(Stopped) as stopped:
            end_if_told(stop)
        return stopped.value.code

    assert run_ranks(worker, 3) == [130, 130, 130]


def test_a_start_that_is_refused_leaves_signals_as_they_were(monkeypatch):
    def refuse(config):
        assert StopRequest.current is not None
        raise ConfigError("no")

    monkeypatch.setattr(train, "refuse_early", refuse)
    before = [signal.getsignal(n) for n in SAVING]
    with pytest.raises(ConfigError, match="no"):
        train.start(None)
    assert StopRequest.current is None and [signal.getsignal(n) for n in SAVING] == before
