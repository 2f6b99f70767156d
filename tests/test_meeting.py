"""Do ranks agree before they have a process group, and is nothing there yet that a fork would break?

Origins of the expected values: what each rank was given to say; the process table.
"""

import io
import os
import signal
from contextlib import redirect_stderr, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from tests.layouts import BASE
from tests.ranks import free_port
from trainer import train
from trainer.config import ConfigError, load
from trainer.ranks import device
from trainer.ranks.meeting import StoreMeeting, meet
from trainer.ranks.stop import StopRequest
from trainer.run import build as building

ROWS = [*BASE, "global_batch=8", "micro_batch=2", "data.workers=2"]


def bare(worker, num_ranks: int, directory: Path) -> list:
    """Calls worker() in processes that have a launcher's environment and no process group. What each
    returned, or raised.
    """
    port = free_port()
    start_processes(_run, args=(worker, num_ranks, port, directory), nprocs=num_ranks, start_method="fork")
    return [torch.load(directory / str(rank), weights_only=False) for rank in range(num_ranks)]


def _run(rank: int, worker, num_ranks: int, port: int, directory: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        result = worker()
    except Exception as error:  # noqa: BLE001  # the test asks which
        result = f"{type(error).__name__}: {error}"
    torch.save(result, directory / str(rank))
    if dist.is_initialized():
        dist.destroy_process_group()


def thread_names() -> set[str]:
    names = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            names.add(Path(f"/proc/self/task/{task}/comm").read_text().strip())
    return names


def test_nothing_that_a_fork_would_break_is_there_when_the_workers_are_forked(tmp_path):
    def seen_at_forks() -> dict:
        forks = []
        os.register_at_fork(
            before=lambda: forks.append((torch.cuda.is_initialized(), dist.is_initialized(), thread_names()))
        )
        run = train.build(load([*ROWS, "name=forks", f"run_dir={tmp_path}", "parallel=fsdp"]))
        during, after = len(forks), thread_names()
        train.train_step(run, train.next_batches(run))
        run.stream.close()
        return {"forks": forks, "during": during, "after": after, "joined": dist.is_initialized()}

    for rank in bare(seen_at_forks, 2, tmp_path):
        assert isinstance(rank, dict), rank
        assert len(rank["forks"]) == rank["during"] == 2  # data.workers, and none after the build
        for has_cuda, has_group, threads in rank["forks"]:
            assert (has_cuda, has_group) == (False, False)
            assert not {name for name in threads if "gloo" in name}
        # the origin can fail: the same look finds gloo's threads once the group is joined
        assert rank["joined"] and {name for name in rank["after"] if "gloo" in name}


def test_all_ranks_hear_what_some_say_and_rank_0_says_what_all_hear(tmp_path):
    def said() -> list:
        meeting = meet(timeout_s=60)
        own = {1: "one", 2: ["two", 2]}.get(meeting.rank)
        return [
            meeting.all_gather_objects(own),
            meeting.all_gather_objects(None),
            meeting.broadcast_object({"rank": meeting.rank}),
        ]

    assert bare(said, 3, tmp_path) == [[[None, "one", ["two", 2]], [None] * 3, {"rank": 0}]] * 3


def test_where_one_rank_fails_all_do_and_say_which(tmp_path):
    def act(error: Exception):
        meeting = meet(timeout_s=60)

        def fail():
            if meeting.rank == 1:
                raise error

        return meeting.together(fail)

    (tmp_path / "b").mkdir()
    refused = bare(lambda: act(ConfigError("no room")), 3, tmp_path)
    assert refused == ["ConfigError: rank 1: no room", "ConfigError: no room", "ConfigError: rank 1: no room"]
    broken = bare(lambda: act(OSError("no disk")), 2, tmp_path / "b")
    assert broken == ["RuntimeError: rank 1: no disk", "OSError: no disk"]


def test_the_first_rank_of_a_host_makes_what_the_others_find(tmp_path):
    def make() -> str:
        file = tmp_path / "made"

        def once() -> str:
            if not file.exists():
                file.write_text(f"by {os.environ['LOCAL_RANK']}")
            return file.read_text()

        return meet(timeout_s=60).first_of_host(once)

    assert bare(make, 3, tmp_path) == ["by 0"] * 3


def test_a_rank_that_never_comes_is_missed_after_the_limit():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    meeting = StoreMeeting(store, rank=0, num_ranks=2, timeout_s=0.5)
    with pytest.raises(TimeoutError, match=r"not all of the 2 ranks came within timeout_s=0\.5 s"):
        meeting.all_gather_objects(None)


def test_a_rank_that_is_told_to_end_before_the_group_is_joined_ends_all_with_one_line(tmp_path):
    def told() -> tuple[int, str, bool]:
        arguments = [*ROWS, "name=told", f"run_dir={tmp_path}", "parallel=fsdp"]
        with StopRequest() as stop:
            stop.signalled = signal.SIGTERM if os.environ["RANK"] == "1" else None
            errors = io.StringIO()
            with redirect_stderr(errors):
                code = train.main(arguments)
        return code, errors.getvalue(), dist.is_initialized()

    line = "told to end before the first step; nothing new to save\n"
    assert bare(told, 2, tmp_path) == [(75, line, False), (75, "", False)]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("seed=0", "seed=1", r"the ranks do not agree: rank 1 has seed=1 \(rank 0: 0\)"),
        ("parallel=fsdp", "parallel=single", r"the ranks do not agree: rank 1 has parallel\.dp_shard=1 "),
        ("parallel.ep=3", "parallel.ep=3", r"parallel\.ep=3 must divide the 2 ranks of a replica"),
        ("data.tokenizer=nowhere", "data.tokenizer=nowhere", "data.tokenizer=nowhere: cannot load it"),
    ],
)
def test_a_start_that_is_refused_is_refused_on_all_ranks_and_leaves_no_process(
    tmp_path, first: str, second: str, message: str
):
    def refused() -> tuple[str, bool, list[int]]:
        own = first if os.environ["RANK"] == "0" else second
        forked = []
        os.register_at_fork(after_in_parent=lambda: forked.append(1))
        try:
            train.build(load([*ROWS, "name=refused", f"run_dir={tmp_path}", "parallel=fsdp", own]))
        except ConfigError as error:
            return str(error), dist.is_initialized(), forked
        return "accepted", True, forked

    for said, joined, forked in bare(refused, 2, tmp_path):
        assert message.replace("\\", "") in said
        assert not joined and not forked


def test_a_group_of_nccl_that_somebody_made_before_is_refused_with_workers(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    with pytest.raises(ConfigError, match=r"data\.workers=2: the process group was joined before"):
        building.refuse_late_fork(load(ROWS).data)
    building.refuse_late_fork(load([*ROWS, "data.workers=0"]).data)


def test_the_gpu_of_a_rank_is_the_one_it_sees_or_that_of_its_number(monkeypatch):
    monkeypatch.setattr(device, "DEVICE_TYPE", "cuda")
    for visible, local_rank, index in ((8, 3, 3), (1, 3, 0), (1, 0, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert device.of_rank(local_rank) == torch.device("cuda", index)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=2, but this process sees 2 GPUs; start at most 2"):
        device.of_rank(2)
