"""A rank that makes no progress ends, and says where it stood; one that makes some does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.ranks.watchdog import HUNG, Watchdog, core_share

REPOSITORY = Path(__file__).parent.parent
OPEN = """
import ctypes, os, signal, sys, time
from pathlib import Path
from trainer.ranks.watchdog import Watchdog
def hangs_here():
    time.sleep(3600)
rank = int(os.environ.get("RANK", 0))
dog = Watchdog(Path(sys.argv[1]), rank=rank, limit_s=0.5, first_limit_s=5, grace_s=0.5)
dog.start()
"""


def python(directory, code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", OPEN + code, str(directory)],
        cwd=REPOSITORY,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, *, timeout_s=800):
    """The exit code and what was printed to stderr."""
    try:
        return process.communicate(timeout=timeout_s)[1], process.returncode
    finally:
        process.kill()


def run(directory, code):
    start_s = time.monotonic()
    errors, code = ended(python(directory, code))
    return errors, code, time.monotonic() - start_s


def test_a_rank_that_hangs_says_where_and_ends(tmp_path):
    errors, code, _ = run(tmp_path, "dog.heartbeat('step 12: data')\nhangs_here()")
    assert code == HUNG == 7
    (line,) = errors.splitlines()
    assert (
        line.startswith("rank 0: no progress for 0.")
        and "s in step 12: data; stacks of its threads are in" in line
    )
    text = (tmp_path / "stacks.0.txt").read_text()
    assert "rank 0: 0." in text.splitlines()[0] and "step 12: data" in text.splitlines()[0]
    assert "in hangs_here" in text and "Thread MainThread" in text


def test_all_ranks_of_a_stuck_collective_report(tmp_path):
    """Rank 1 sleeps, rank 0 waits for it. Rank 1 has no end before rank 0 has: were it gone first, the
    collective of rank 0 would fail.
    """
    code = """
dog.heartbeat("meeting", limit_s=1000)
import torch, torch.distributed as dist
store, rank = dist.FileStore(sys.argv[1] + "/store", 2), int(os.environ["RANK"])
def hangs_here():
    while True:
        time.sleep(0.05)
        dog.grace_s = 0.5 if Path(sys.argv[1], "rank 0 has ended").exists() else dog.grace_s
dog.grace_s = 1e9 if rank == 1 else 0.5
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
dist.barrier()
dog.heartbeat("step 1: forward and backward")
hangs_here() if rank == 1 else dist.all_reduce(torch.ones(1))
"""
    ranks = [python(tmp_path, code, RANK=str(rank)) for rank in (0, 1)]
    first = ended(ranks[0])
    (tmp_path / "rank 0 has ended").touch()
    results = [first, ended(ranks[1])]
    assert [code for _, code in results] == [HUNG, HUNG], results
    waiting, guilty = ((tmp_path / f"stacks.{rank}.txt").read_text() for rank in (0, 1))
    assert "in all_reduce" in waiting and "hangs_here" not in waiting
    assert "in hangs_here" in guilty and "all_reduce" not in guilty


@pytest.mark.slow
def test_progress_and_longer_limits_keep_it_alive(tmp_path):
    """Six times the limit with beats, four with one that may take longer, and the first limit before any:
    none is a hang.
    """
    code = """
time.sleep(1.5)
for step in range(30):
    dog.heartbeat(f"step {step}: data")
    time.sleep(0.1)
dog.heartbeat("saving", limit_s=20)
time.sleep(2)
dog.close()
time.sleep(1.5)
sys.exit(21)
"""
    errors, code, _ = run(tmp_path, code)
    assert (errors, code) == ("", 21)
    assert list(tmp_path.iterdir()) == []


def test_a_phase_of_its_own_limit_ends_at_it(tmp_path):
    """1.5 s and the grace of 0.5 s, where the default would have ended it at 1 s."""
    errors, code, took_s = run(tmp_path, "dog.heartbeat('saving', limit_s=1.5)\nhangs_here()")
    assert code == HUNG and "no progress for 1." in errors
    assert took_s > 1.9
    errors, code, _ = run(
        tmp_path, "dog.heartbeat('saving', limit_s=20)\ndog.heartbeat('step 3: data')\nhangs_here()"
    )
    assert code == HUNG and "no progress for 0." in errors and "step 3: data" in errors


@pytest.mark.slow
def test_before_the_first_beat_its_own_limit_counts(tmp_path):
    errors, code, _ = run(tmp_path, "hangs_here()")
    assert code == HUNG and "no progress for 5." in errors and "in start;" in errors


@pytest.mark.slow
def test_a_rank_that_was_merely_slow_lives(tmp_path):
    """It goes on once its stacks have been written, long before its end would come, and lives for longer
    than its limit and its grace.
    """
    code = """
dog.grace_s = 4
dog.heartbeat("step 1: data")
while not dog.path.exists() or dog._reporter.is_alive():
    time.sleep(0.01)
dog.heartbeat("step 2: data", limit_s=100)
time.sleep(5)
"""
    errors, code, _ = run(tmp_path, code)
    assert code == 0
    assert [line.split(" for ")[0].split(" after ")[0] for line in errors.splitlines()] == [
        "rank 0: no progress",
        "rank 0: progress again",
    ]
    assert "progress again after" in (tmp_path / "stacks.0.txt").read_text().splitlines()[-1]


@pytest.mark.slow
def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path):
    """6 s are four limits, and three times limit and grace. It runs for under 1.5 s."""
    code = (
        "until_s = time.monotonic() + 6.8\nwhile time.monotonic() < until_s:\n    "
        "time.sleep(0.05)\ndog.close()\nsys.exit(21)"
    )
    process = python(
        tmp_path,
        "dog.first_limit_s = 60\ndog.heartbeat('step 1: data', limit_s=1.5)\n"
        "print('ready', file=sys.stderr, flush=True)\n" + code,
    )
    try:
        assert process.stderr.readline() == "ready\n"
        time.sleep(0.3)  # until its thread has seen the phase
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
        assert ended(process) == ("", 21)
    finally:
        process.kill()


def test_a_directory_that_cannot_be_written_does_not_keep_it_from_ending(tmp_path):
    errors, code, _ = run(tmp_path / "nowhere", "dog.heartbeat('step 1: data')\nhangs_here()")
    assert code == HUNG
    assert (
        "cannot be written (No such file or directory); this process ends" in errors
        and "in hangs_here" in errors
    )


def test_a_file_system_that_hangs_does_not_keep_it_from_ending(tmp_path):
    """Opening a named pipe that nobody reads blocks, as a dead file server does."""
    os.mkfifo(tmp_path / "stacks.0.txt")
    errors, code, _ = run(tmp_path, "dog.heartbeat('step 1: data')\nhangs_here()")
    assert code == HUNG
    assert "stacks.0.txt does not answer, this process ends" in errors and "in hangs_here" in errors


def test_c_code_that_holds_the_interpreter_lock_is_ended_by_the_timer(tmp_path):
    """A mutex locked twice, by way of PyDLL, which keeps the lock: no Python thread has a turn, no signal
    ends the wait. The timer comes first_limit_s after what should have been the end.
    """
    code = """
def holds_the_lock():
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex), libc.pthread_mutex_lock(mutex)
dog.first_limit_s = 1
dog.heartbeat("step 1: data")
time.sleep(0.2)
holds_the_lock()
"""
    errors, code, took_s = run(tmp_path, code)
    assert code == 1
    assert "Timeout (0:" in errors and "in holds_the_lock" in errors
    assert took_s > 2


@pytest.mark.parametrize(
    ("share", "at_least_s"), [(1.0, 1.0), pytest.param(0.2, 5.0, marks=pytest.mark.slow)]
)
def test_a_busy_machine_has_more_time(tmp_path, share, at_least_s):
    """A fifth of a core: limit and grace, 0.5 s each, take five times as long."""
    code = f"watchdog.core_share = lambda: {share}\ndog.heartbeat('step 1: data')\nhangs_here()"
    errors, code, took_s = run(tmp_path, f"from trainer.ranks import watchdog\n{code}")
    assert code == HUNG and "no progress for 0." in errors
    assert took_s > at_least_s


def test_the_share_of_a_core_is_that_of_all_who_want_one():
    """Four busy processes a core: a process gets a quarter of one or less, whatever else runs here."""
    busy = [
        subprocess.Popen(
            [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
        )
        for _ in range(4 * os.cpu_count())
    ]
    try:
        assert [process.stdout.readline() for process in busy] == [b"\n"] * len(busy)
        assert core_share() <= 1 / 4
    finally:
        for process in busy:
            process.kill()
            process.communicate()
    assert 0 < core_share() <= 1


def best_s(call):
    """[s] of a thousand calls, without what other processes took."""

    def once_s():
        start_s = time.perf_counter()
        for _ in range(1000):
            call("step 1: data")
        return time.perf_counter() - start_s

    return min(once_s() for _ in range(20))


def test_a_beat_costs_about_as_much_as_a_few_calls_of_nothing(tmp_path):
    """The promise is a microsecond, which is about twenty of them: a ratio, measured in one run."""
    dog = Watchdog(tmp_path, rank=0, limit_s=100, first_limit_s=100)
    assert best_s(dog.heartbeat) < 20 * best_s(lambda phase: None)


def test_start_and_close_leave_nothing_behind(tmp_path):
    dog = Watchdog(tmp_path, rank=0, limit_s=100, first_limit_s=100)
    dog.close()
    dog = Watchdog(tmp_path, rank=0, limit_s=100, first_limit_s=100)
    dog.start()
    dog.close()
    dog.close()
    assert not dog._thread.is_alive()


def test_a_limit_must_be_above_zero(tmp_path):
    with pytest.raises(ValueError, match="limit_s=0"):
        Watchdog(tmp_path, rank=0, limit_s=0, first_limit_s=1)


def test_a_grace_is_half_the_limit_and_at_most_ten_seconds(tmp_path):
    assert Watchdog(tmp_path, rank=0, limit_s=4, first_limit_s=1).grace_s == 2
    assert Watchdog(tmp_path, rank=0, limit_s=600, first_limit_s=1).grace_s == 10
