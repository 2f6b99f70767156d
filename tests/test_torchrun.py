"""`python -m trainer.torchrun`: the exit code says what became of the ranks, one line says which rank,
restarts are for crashes.

Workers are small scripts that do not import torch. What they do: `code` or `-signal` for each rank; `wait`:
until told; `start`: as a start that hangs, until told twice; `deaf`: for ever. A rank fails once all others
have started.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import torchrun

REPOSITORY = Path(__file__).parent.parent
WORKER = r"""
import os, signal, sys, time
from trainer.ranks.launcher import end_with_launcher
end_with_launcher()
rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def path_of(rank):
    return os.path.join(os.path.dirname(__file__), f"lives.{rank}")
def has_started(rank):
    return os.path.exists(path_of(rank)) and f"{life}\n" in open(path_of(rank))
def say_started():
    with open(path_of(rank), "a") as file:
        file.write(f"{life}\n")
what = sys.argv[1 + rank].split("/")[min(life, sys.argv[1 + rank].count("/"))]
def told(*_):
    os.write(1, b"told\n")
    sys.exit(int(os.environ["TOLD"]))
def told_once(number, frame):
    signal.signal(number, told)
    os.write(1, b"once\n")
if what in ("wait", "start"):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, told if what == "wait" else told_once)
    say_started()
    os.write(1, b"ready\n")
    time.sleep(600)
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say_started()
    os.write(1, b"ready\n")
    time.sleep(600)
say_started()
while int(what) and not all(has_started(rank) for rank in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.01)
if int(what) < 0:
    os.kill(os.getpid(), -int(what))
sys.exit(int(what))
"""


def start(directory, *arguments, told="75", ranks=2, options=("--standalone",)):
    worker = directory / "worker.py"
    worker.write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "trainer.torchrun",
        "--nproc-per-node",
        str(ranks),
        *options,
        worker,
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"TOLD": told, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Exit code and the lines on stderr."""
    try:
        return process.communicate(timeout=200)[1].splitlines(), process.returncode
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its ranks, which a killed one could not
            process.communicate(timeout=250)


def told_once_ready(process, number):
    """Signals it when both ranks listen."""
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
        process.send_signal(number)
    finally:
        errors, code = finish(process)
    return [line for line in errors if "death signal" not in line], code


def lives(directory):
    """How often each rank was started."""
    return [(directory / f"lives.{rank}").read_text().count("\n") for rank in (0, 1)]


def test_a_crash_starts_all_ranks_again_and_a_refusal_ends_them(tmp_path):
    """Rank 1 is killed in its first life; in its second, rank 0 refuses: one restart is left, and of no
    use.
    """
    errors, code = finish(
        start(tmp_path, "wait/2", "-9/wait", options=["--standalone", "--max-restarts", "2"])
    )
    assert code == 2, errors
    assert errors == [
        "rank 1 was killed by SIGKILL; all ranks start again, restarts left after this: 1",
        "rank 0 ended with exit code 2",
    ]
    assert lives(tmp_path) == [2, 2]


def test_the_code_of_the_rank_that_failed_first_once_the_restarts_are_used_up(tmp_path):
    """128 + 9, as a shell has it; the other rank was told to stop by torchrun and ended with 75."""
    errors, code = finish(start(tmp_path, "wait", "-9", options=["--standalone", "--max-restarts", "1"]))
    assert code == 137, errors
    assert len(errors) == 2 and errors[1] == "rank 1 was killed by SIGKILL"
    assert lives(tmp_path) == [2, 2]


@pytest.mark.parametrize(
    ("number", "told", "expected"),
    [
        (signal.SIGTERM, "75", 75),
        (signal.SIGINT, "130", 130),
        (signal.SIGHUP, "75", 75),
        (signal.SIGUSR1, "75", 75),
    ],
)
def test_a_request_to_stop_reaches_the_ranks_and_is_the_exit_code(tmp_path, number, told, expected):
    process = start(tmp_path, "wait", "wait", told=told, options=["--standalone", "--max-restarts", "2"])
    errors, code = told_once_ready(process, number)
    assert (errors, code) == ([], expected)
    assert lives(tmp_path) == [1, 1]


def test_a_second_signal_is_passed_on(tmp_path):
    """Ranks whose start hangs end at the second one."""
    process = start(
        tmp_path, "start", "start", told="130", options=["--standalone", "--shutdown-timeout", "500"]
    )
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        process.send_signal(signal.SIGINT)
        assert [process.stdout.readline() for _ in range(2)] == ["once\n"] * 2
        process.send_signal(signal.SIGINT)
    finally:
        errors, code = finish(process)
    assert code == 130, errors


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    """They would run for 600 s, and hold its stdout open."""
    process = start(tmp_path, "deaf", "wait")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.kill()
    assert process.communicate(timeout=250)[0] == ""


def test_no_directory_is_left_behind(tmp_path):
    assert finish(start(tmp_path, "0", "-9/0", options=["--standalone", "--max-restarts", "1"]))[1] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"worker.py", "lives.0", "lives.1"}


def test_a_signal_while_ranks_are_being_started_leaves_none_behind(tmp_path):
    """Rank 0 signals its launcher at once, when most of the 16 are still to come. A rank that lived on would
    hold stderr open.
    """
    worker = tmp_path / "worker.sh"
    worker.write_text('#!/bin/sh\n[ "$RANK" != 0 ] || kill -TERM "$PPID"\nexec sleep 3600\n')
    worker.chmod(0o755)
    launch = ["-m", "trainer.torchrun", "--standalone", "--nproc-per-node", "16", "--no-python", worker]
    process = subprocess.Popen([sys.executable, *launch], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert finish(process)[1] == 75


@pytest.mark.slow
def test_ranks_that_had_to_be_killed_leave_the_last_checkpoint(tmp_path):
    process = start(tmp_path, "deaf", "wait", options=["--standalone", "--shutdown-timeout", "5"])
    errors, code = told_once_ready(process, signal.SIGTERM)
    assert code == 75
    assert len(errors) == 1 and "Unable to shutdown process" in errors[0]


def test_a_rank_that_fails_when_told_to_stop_is_a_failure(tmp_path):
    """Both fail at saving, with 1: that is no code of a rank that did as it was told."""
    errors, code = told_once_ready(start(tmp_path, "wait", "wait", told="1"), signal.SIGTERM)
    assert (errors, code) == (["rank 0 ended with exit code 1"], 1)


@pytest.mark.slow
def test_a_node_that_cannot_go_on_ends_the_other(tmp_path):
    """The second node's rank would run for 60 s, and restarts are left on both. Its code must not hide the
    cause: srun reports the highest, so it is 1."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meet = f"localhost:{probe.getsockname()[1]}"
    options = [
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        meet,
        "--rdzv-id",
        "1",
        "--max-restarts",
        "3",
    ]
    nodes = [start(tmp_path, "4", "wait", told="-15", ranks=1, options=options) for _ in range(2)]
    results = [finish(process) for process in nodes]
    assert sorted(code for _, code in results) == [1, 4], results
    assert "rank 0 ended with exit code 4" in [line for errors, _ in results for line in errors]
    assert lives(tmp_path) == [1, 1]


@pytest.mark.parametrize(
    ("codes", "told", "expected"),
    [
        ({0: 75, 1: 75}, 75, 75),
        ({0: 130, 1: 130}, 75, 75),  # told by SIGTERM: the caller is to start it again
        ({0: 75, 1: -9}, 75, 75),  # had to be killed
        ({0: -15, 1: -2}, 130, 130),  # before they listened
        ({0: 0, 1: 0}, 75, 0),  # the run was at its end
        ({0: 0, 1: 75}, 75, 75),
        ({0: 75, 1: 4}, 75, 4),
        ({0: 1, 1: 4}, 75, 4),  # 1 is how a rank ends when another is gone
        ({0: -6, 1: -11}, 130, 139),
        ({0: None, 1: 75}, 75, 75),  # could not be killed
        ({}, 75, 75),  # no rank had been started
    ],
)
def test_what_the_ranks_codes_mean_after_a_request_to_stop(codes, told, expected):
    assert torchrun.code_when_stopped(codes, stop_code=told) == expected


@pytest.mark.parametrize(
    ("codes", "expected"),
    [({0: 1, 1: 4}, 1), ({0: -6, 1: -9}, 1), ({3: 2, 1: 2}, 3), ({0: 1, 1: 1}, 0), ({0: 75, 1: 7}, 1)],
)
def test_the_cause_among_ranks_that_ended_together(codes, expected):
    """An exception or an abort is what others die of, so anything else comes first; then the order in which
    they were seen.
    """
    assert torchrun.cause(codes) == expected
