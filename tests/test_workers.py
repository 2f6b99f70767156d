"""Processes that read ahead: are the batches those of a stream without them, and does every end leave nothing
behind?

Origins of the expected values: the same stream without workers, the process table, arithmetic.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.streams import (
    LENGTHS,
    PHASES,
    ListSource,
    TextListSource,
    equal,
    gathered,
    global_rows,
    load,
    make_stream,
    numbered,
    ragged_sources,
    settings,
    step_rows,
)
from tests.waiting import until
from trainer import data
from trainer.data import BadDocument, DataError, Document, TokenStream
from trainer.data.workers import Workers


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch):
    """Ends the workers of every stream of a test."""
    made, of_stream = [], TokenStream.__init__

    def init(self: TokenStream, *args: object, **settings: object) -> None:
        of_stream(self, *args, **settings)
        made.append(self)

    monkeypatch.setattr(TokenStream, "__init__", init)
    yield
    for stream in made:
        stream.close()


def children() -> set[int]:
    """Processes that this one has started and that still run."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(path.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def gone(pids: set[int] | list[int], *, within_s: float) -> bool:
    return bool(until(lambda: not any(map(is_running, pids)), timeout_s=within_s))


# ---- The same batches ------------------------------------------------------------------------------------


class Counted(ListSource):
    """Token documents without length: read forward, like one of the hub."""

    __len__ = None  # not Sized
    num_rows = None

    def __init__(self, documents: list[list[int]]) -> None:
        super().__init__(documents)
        self.position, self.kept, self.read = 0, {}, []

    def seek(self, first: int, *, wanted) -> None:
        self.position, self.kept, self.wanted = first, {}, wanted

    def __getitem__(self, n: int) -> Document:
        while n not in self.kept:
            assert self.position <= n, f"{n} was passed at {self.position} and not kept"
            if self.position == n or self.wanted(self.position):
                self.kept[self.position] = self.documents[self.position % len(self.documents)]
            self.position += 1
        return Document(f"forward:{n}", tokens=np.array(self.kept.pop(n)))


def forward_sources() -> dict[str, object]:
    sources = ragged_sources()
    return {**sources, "b": Counted([d for d in sources["b"].documents if d])}


@pytest.mark.parametrize("sources", [ragged_sources, pytest.param(forward_sources, marks=pytest.mark.slow)])
def test_batches_do_not_depend_on_ranks_and_workers_through_any_chain_of_resumes(sources) -> None:
    """Six phases of three steps, a resume every other step, on 1, 2, 4, 8 ranks with 0, 1, 2, 4 workers
    each.
    """
    straight, streams, state = [make_stream(sources())], None, None
    chain = [(1, 4), (2, 2), (8, 1), (4, 0), (1, 1), (4, 2), (2, 4), (8, 0), (1, 2)]
    for step in range(18):
        mixture, buffer = PHASES[step // 3]
        if step % 2 == 0:
            num_ranks, workers = chain[step // 2]
            streams = [
                make_stream(sources(), rank=r, num_ranks=num_ranks, workers=workers) for r in range(num_ranks)
            ]
            if state:
                load(streams, state)
        for stream in [*straight, *streams]:
            settings(stream, mixture=mixture, buffer=buffer)
        assert torch.equal(global_rows(streams), global_rows(straight))
        state = gathered(streams)
        assert equal(state, straight[0].state_dict())
        if step % 2:
            for stream in streams:
                stream.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_text_is_the_same_tokens_whoever_tokenises_it(tokenizer, workers: int) -> None:
    texts = [
        f"the {word} fox {i} jumps over" * (1 + i % 7)
        for i, word in enumerate(["quick", "brown", "lazy"] * 40)
    ]
    stream = make_stream(
        TextListSource(texts), tokenizer=tokenizer, shuffle=False, num_streams=1, workers=workers
    )
    got = np.concatenate([step_rows(stream)[0].flatten().numpy() for _ in range(10)])
    expected = [token for text in texts for token in [*tokenizer.encode(text).ids, 0]]
    assert got.tolist() == expected[: len(got)]


def test_bad_documents_are_counted_where_the_stream_passes_them_not_where_workers_do(tokenizer) -> None:
    texts = TextListSource(["fine words", "", "x" * 2000, "more of them"] * 50)
    settings_ = {"tokenizer": tokenizer, "max_document_mb": 0.001, "num_streams": 2}
    alone, ahead = make_stream(texts, **settings_), make_stream(texts, workers=2, prefetch=8, **settings_)
    for _ in range(4):
        assert torch.equal(step_rows(alone), step_rows(ahead))
        assert alone.counts == ahead.counts and alone.counts["empty"] > 0 < alone.counts["huge"]
    fatal = make_stream(texts, workers=2, on_bad="fatal", **settings_)
    with pytest.raises(BadDocument, match=r": (empty|huge): ") as caught:
        for _ in range(9):
            step_rows(fatal)
    assert "data.on_bad=skip" in caught.value.__notes__[0]


def test_no_more_is_read_ahead_than_was_said() -> None:
    """Documents of 40 tokens; a step is 2 x 64 tokens of a stream, so 2 steps and a refill of 5 are 12
    documents.
    """
    stream = make_stream(
        ListSource(numbered([40] * 500)), seq_len=64, global_batch=4, num_streams=2, workers=1, prefetch=2
    )
    for _ in range(100):
        settings(stream, buffer=5)
        step_rows(stream)
    assert all(1 <= len(virtual.opener.queue_S[0]) <= 12 for virtual in stream.virtual)


def test_as_much_is_read_ahead_as_was_said_of_each_source_its_share() -> None:
    """Documents of 40 tokens; 2 steps of 2 x 64 tokens of a stream, half of them of each source: 3.2
    documents.
    """
    sources = {name: ListSource(numbered([40] * 500)) for name in "ab"}
    stream = make_stream(sources, seq_len=64, global_batch=4, num_streams=2, workers=1, prefetch=2)
    for _ in range(250):  # 800 documents of each: the guess of their length before the first weighs little
        step_rows(stream)
    assert {len(queue) for virtual in stream.virtual for queue in virtual.opener.queue_S} == {4}


def test_a_source_that_reads_forward_keeps_only_what_will_be_asked_for() -> None:
    straight = make_stream(forward_sources(), buffer=9)
    for _ in range(3):
        step_rows(straight)
    for num_ranks in (1, 2):
        streams = [
            make_stream(forward_sources(), rank=r, num_ranks=num_ranks, buffer=9) for r in range(num_ranks)
        ]
        load(streams, straight.state_dict())
        for stream in streams:
            while any(tokens is None for virtual in stream.virtual for *_, tokens in virtual.open()):
                step_rows(stream)
            due = {virtual.number: virtual.opener.next_S[1] for virtual in stream.virtual}
            assert all(n >= due[n % 8] for n in stream.readers[1].source.kept)


def test_documents_that_were_open_are_asked_for_behind_those_ahead_and_let_go_once_read(monkeypatch) -> None:
    asked, of_workers = [], Workers.submit

    def submit(self: Workers, request: object, *, priority: int = 0, **more: object) -> object:
        asked.append(priority)
        return of_workers(self, request, priority=priority, **more)

    monkeypatch.setattr(Workers, "submit", submit)
    straight, stream = (make_stream(ragged_sources(), buffer=9, workers=1) for _ in range(2))
    step_rows(straight)
    asked.clear()
    stream.load_state_dict(straight.state_dict(), keep_counts=True)
    again = asked.copy()
    asked.clear()
    step_rows(stream)
    assert min(again) > max(asked)
    while any(tokens is None for virtual in stream.virtual for *_, tokens in virtual.open()):
        step_rows(stream)
    assert not any(virtual.resumed for virtual in stream.virtual)


def test_a_worker_finishes_what_was_open_whatever_the_limit_has_become(tokenizer) -> None:
    texts = TextListSource(["the quick brown fox jumps over the lazy dog " * 20, "packs"] * 8)
    straight = make_stream(texts, tokenizer=tokenizer, num_streams=1, buffer=2)
    step_rows(straight)
    state, expected = straight.state_dict(), step_rows(straight)
    limited = make_stream(
        texts, tokenizer=tokenizer, num_streams=1, buffer=2, max_document_mb=1e-5, workers=1
    )
    limited.load_state_dict(state, keep_counts=True)
    for ticket in limited.virtual[0].resumed.values():
        ticket.task.result(timeout=300)  # by the worker, not here
    assert torch.equal(step_rows(limited), expected)


def test_workers_run_while_the_step_does() -> None:
    """What the next step needs is read while nobody asks: its rows come though the workers are stopped."""
    documents = numbered([16] * 400)
    straight = make_stream(ListSource(documents), global_batch=8)
    stream = make_stream(ListSource(documents), global_batch=8, workers=2, prefetch=2)
    openers = [virtual.opener for virtual in stream.virtual]
    for _ in range(6):
        assert torch.equal(step_rows(stream), step_rows(straight))
        assert until(lambda: all(t.task.done() for o in openers for queue in o.queue_S for t in queue))
        for pid in stream.intake.workers.pids:
            os.kill(pid, signal.SIGSTOP)
        assert torch.equal(step_rows(stream), step_rows(straight))
        for pid in stream.intake.workers.pids:
            os.kill(pid, signal.SIGCONT)


# ---- Ends ------------------------------------------------------------------------------------------------


def test_closing_a_stream_and_losing_it_end_its_workers() -> None:
    before = children()
    stream = make_stream(ListSource(numbered(LENGTHS)), workers=2)
    step_rows(stream)
    assert len(children() - before) == 2
    stream.close()
    stream.close()
    assert children() == before


def test_a_killed_worker_is_replaced_by_its_rank_and_nothing_is_lost(caplog) -> None:
    straight, stream = (make_stream(ListSource(numbered(LENGTHS)), workers=n, prefetch=1) for n in (0, 2))
    for step in range(12):
        if step in (3, 6):
            os.kill(stream.intake.workers.pids[step // 6], (signal.SIGKILL, signal.SIGTERM)[step // 6])
        assert torch.equal(step_rows(stream), step_rows(straight))
    # SIGTERM does not end it: it goes to whole groups of processes
    os.kill(stream.intake.workers.pids[1], signal.SIGKILL)
    for _ in range(12):
        assert torch.equal(step_rows(stream), step_rows(straight))
    assert caplog.text.count("was ended by SIGKILL") == 2


@pytest.mark.parametrize("of", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_is_sent_to_a_whole_group_of_processes_does_not_end_a_worker(of: signal.Signals) -> None:
    workers = Workers(1, lambda request: os.environ["TOKENIZERS_PARALLELISM"])
    # it listens; and uses no thread that was not forked
    assert workers.submit(0).result(timeout=300) == "false"
    os.kill(workers.pids[0], of)
    assert workers.submit(0).result(timeout=300) == "false" and is_running(workers.pids[0])
    workers.close()


def test_a_worker_that_crashes_is_an_error() -> None:
    class Crash(ListSource):
        def __getitem__(self, i: int) -> Document:
            if i == 40:
                os._exit(11)  # what a fault in foreign code does
            return super().__getitem__(i)

    stream = make_stream(Crash(numbered([40] * 50)), shuffle=False, workers=2)
    with pytest.raises(RuntimeError, match=r"data worker \d+ crashed with exit code 11; data.workers=0"):
        for _ in range(20):
            step_rows(stream)


PARENT = """
import sys, time
from tests.waiting import until
from tests.streams import ListSource, make_stream, numbered, step_rows
class Slow(ListSource):
    def __getitem__(self, i):
        time.sleep(SLOW)
        return super().__getitem__(i)
stream = make_stream(Slow(numbered([40] * 50)), workers=2)
if not SLOW:
    step_rows(stream)
print(*stream.intake.workers.pids, flush=True)
END
"""


@pytest.mark.parametrize("slow_s", [0, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("end", ["pass", "1 / 0", "time.sleep(600)"])
def test_no_worker_survives_its_parent(slow_s: float, end: str) -> None:
    """Ended at its end, by an error, and by SIGKILL; workers idle or in the middle of a document."""
    program = PARENT.replace("SLOW", str(slow_s)).replace("END", end)
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 2
    if "sleep" in end:
        parent.kill()
    parent.wait(timeout=300)
    assert gone(pids, within_s=2)


def test_idle_workers_do_not_spin() -> None:
    stream = make_stream(ListSource(numbered([40] * 50)), workers=4, num_streams=1, global_batch=1)
    step_rows(stream)

    def cpu_ticks() -> int:
        return sum(
            sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
            for pid in stream.intake.workers.pids
        )

    before = cpu_ticks()
    time.sleep(2)
    assert cpu_ticks() - before <= 8  # of 4 x 200


def test_a_worker_holds_no_socket_of_its_parent() -> None:
    """A peer must see at once that a killed rank is gone."""
    import socket

    here, there = socket.socketpair()
    stream = make_stream(ListSource(numbered(LENGTHS)), workers=2)
    here.close()
    there.settimeout(300)
    assert there.recv(1) == b""  # the end, though the workers live
    assert all(map(is_running, stream.intake.workers.pids))
    step_rows(stream)


# ---- Errors ----------------------------------------------------------------------------------------------


class Flaky(ListSource):
    """Every document fails so many times before it can be read."""

    def __init__(self, documents: list[list[int]], *, fails: int, error: type[Exception] = OSError) -> None:
        super().__init__(documents)
        self.fails, self.error, self.tries = fails, error, {}

    def __getitem__(self, i: int) -> Document:
        self.tries[i] = self.tries.get(i, 0) + 1
        if self.tries[i] <= self.fails:
            raise self.error(5, "Input/output error")
        self.tries[i] = 0
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_fails_is_tried_again_and_then_named(workers: int) -> None:
    documents = numbered(LENGTHS)
    straight, flaky = (
        make_stream(ListSource(documents)),
        make_stream(Flaky(documents, fails=2), retry_s=1e-4, workers=workers),
    )
    for _ in range(5):
        assert torch.equal(step_rows(flaky), step_rows(straight))
    dead = make_stream(
        {"web": Flaky(documents, fails=9), "code": ListSource(documents)}, retry_s=0.01, workers=workers
    )
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"data.sources.web: document \d+ cannot be read, tried 5 times in 0.15 s: OSError: "
    ):
        step_rows(dead)
    assert time.monotonic() - start >= 0.15


def test_waits_between_tries_double(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr("trainer.data.reader.time.sleep", waits.append)
    flaky, settings_ = Flaky(numbered([4] * 8), fails=9), {"seed": 0, "shuffle": False, "num_streams": 1}
    reader = data.stream.Reader(flaky, key="data.source", retries=5, **settings_)
    with pytest.raises(DataError, match="tried 6 times in 31 s"):
        reader.read(3)
    assert waits == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("workers", [0, 2])
def test_other_errors_of_a_source_come_through_as_they_are(workers: int) -> None:
    stream = make_stream(Flaky(numbered(LENGTHS), fails=1, error=KeyError), workers=workers)
    with pytest.raises(KeyError):
        step_rows(stream)


def test_an_error_of_a_source_that_reads_forward_comes_through_its_thread() -> None:
    class Wrong(Counted):
        def __getitem__(self, n: int) -> Document:
            raise KeyError(n)

    stream = make_stream(Wrong(numbered([4] * 8)), workers=1)
    with pytest.raises(KeyError):
        next(iter(stream.virtual[0].opener.queue_S[0])).task.result(timeout=300)


def test_work_is_done_in_order_of_priority_and_errors_that_cannot_travel_are_told() -> None:
    class Local(Exception):  # not found by pickle
        pass

    def work(request: object) -> object:
        if request == "wrong":
            raise Local("here")
        all_are_waiting.wait()
        return (request, os.getpid())

    all_are_waiting = multiprocessing.Event()
    workers, done = Workers(1, work), []
    for name, priority in (("first", 0), ("last", 2), ("next", 0), ("soon", 1)):
        future = workers.submit(name, priority=priority)
        future.add_done_callback(lambda f: done.append(f.result()))
    all_are_waiting.set()
    with pytest.raises(RuntimeError, match="Local: here"):
        workers.submit("wrong", priority=3).result(timeout=300)
    assert [name for name, _ in done] == ["first", "next", "soon", "last"]
    assert {pid for _, pid in done} == set(workers.pids) != {os.getpid()}
    workers.close()
    assert until(lambda: f"data worker {workers.pids[0]}" not in thread_names())


# ---- After the end ---------------------------------------------------------------------------------------


def test_a_closed_stream_says_so_and_kills_nobody_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream(ListSource(numbered([40] * 500)), workers=2, prefetch=1)
    step_rows(stream)
    first = stream.intake.workers.pids[0]
    os.kill(first, signal.SIGKILL)
    for _ in range(12):
        step_rows(stream)
    killed, kill = [], os.kill
    monkeypatch.setattr("trainer.data.workers.os.kill", lambda pid, how: killed.append(pid) or kill(pid, how))
    stream.close()
    # the other was reaped, its number may be another's by now
    assert killed == stream.intake.workers.pids[1:]
    with pytest.raises(RuntimeError, match="the stream was closed"):
        for _ in range(40):
            step_rows(stream)


def test_a_source_that_cannot_begin_is_an_error_where_its_first_document_is_wanted() -> None:
    class Broken(Counted):
        def seek(self, first: int, *, wanted) -> None:
            if first:
                raise OSError("no way back")
            super().seek(first, wanted=wanted)

    stream = make_stream(Counted(numbered([40] * 50)))
    for _ in range(5):
        step_rows(stream)
    broken = make_stream(Broken(numbered([40] * 50)), workers=1)
    broken.load_state_dict(stream.state_dict(), keep_counts=True)
    with pytest.raises(OSError, match="no way back"):
        step_rows(broken)


def test_a_resumed_stream_does_not_wait_for_what_was_asked_for_before() -> None:
    """One worker: a fresh stream asks for 960 documents, which nobody wants after the state was loaded."""
    reads, loaded = multiprocessing.Value("i", 0), multiprocessing.Event()

    class Late(ListSource):
        def __getitem__(self, i: int) -> Document:
            loaded.wait()
            reads.value += 1
            return super().__getitem__(i)

    documents = numbered([40] * 2000)
    straight = make_stream(ListSource(documents), num_streams=1, global_batch=1)
    for _ in range(3000):
        step_rows(straight)
    state, expected = straight.state_dict(), step_rows(straight)
    stream = make_stream(Late(documents), num_streams=1, global_batch=1, workers=1, prefetch=60_000)
    stream.load_state_dict(state, keep_counts=True)
    stream.config = replace(stream.config, prefetch=1)
    loaded.set()
    assert torch.equal(step_rows(stream), expected) and reads.value < 100


def test_the_thread_of_a_forward_source_ends_with_its_stream() -> None:
    stream = make_stream(Counted(numbered([40] * 50)), workers=1)
    step_rows(stream)
    assert "reads data.source" in thread_names()
    stream.close()
    assert until(lambda: "reads data.source" not in thread_names())
    with pytest.raises(RuntimeError, match="the stream was closed"):
        for _ in range(40):
            step_rows(stream)
