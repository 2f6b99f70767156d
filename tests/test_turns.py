"""A step has fewer rows than there are virtual streams, which serve in turns: is every token delivered once,
on any ranks, after any restart, and do ranks have equally many rows?

Origins of the expected values: `slow_run` (loops over Python lists, token by token), a ledger of the tokens
that documents have against those that came out or are still open, invariance under ranks, workers, restarts.
"""

import re
from itertools import chain

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import BASE, metrics, tensors
from tests.streams import (
    ListSource,
    arrays,
    equal,
    gathered,
    global_rows,
    load,
    make_stream,
    numbered,
    open_documents,
    place,
    ragged_sources,
    ranks,
)
from trainer import train
from trainer.config import Config, ConfigError, DataConfig, SpanConfig
from trainer.data import Document, TokenStream
from trainer.data import stream as stream_module
from trainer.program import program_of

L, V = 16, 8
# Rows of the steps of each span: down from as many as there are streams, to a fraction, and up again.
TO_TWO = [(8, 3), (2, 7), (8, 2), (2, 3), (16, 2)]
TO_FOUR = [(8, 2), (4, 5), (16, 1), (4, 4), (8, 2)]
LENGTHS = [5, 1, 16, 15, 17, 32, 300, 1, 7, 48, 3, 11, 2, 64, 9, 23, 130, 6, 41]


def program_steps(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(rows, turn) of each step, where the turn is what the run computes from the tokens before the step."""
    steps, position = [], 0
    for rows, num_steps in spans:
        for _ in range(num_steps):
            steps.append((rows, position // (rows * L)))
            position += rows * L
    return steps


def at_step(streams: list[TokenStream], rows: int, turn: int, **changes: object) -> torch.Tensor:
    now = {"seq_len": L, "mixture": None, "buffer": 0, **changes}
    for stream in streams:
        stream.set(global_batch=rows, turn=turn, **now)
    return global_rows(streams)


def slow_run(documents: list[list[int]], steps: list[tuple[int, int]]) -> list[list[list[int]]]:
    """The tokens of the rows of each step, the corpus in its order and no buffer."""
    queues = [
        chain.from_iterable(documents[n % len(documents)] for n in range(v, 10**4, V)) for v in range(V)
    ]
    result = []
    for num_rows, turn in steps:
        rows = []
        for v in range(V):
            if num_rows >= V:
                rows += [[next(queues[v]) for _ in range(L)] for _ in range(num_rows // V)]
            elif v % (V // num_rows) == turn % (V // num_rows):
                rows.append([next(queues[v]) for _ in range(L)])
        result.append(rows)
    return result


@pytest.mark.parametrize("spans", [TO_TWO, TO_FOUR, [(1, 20), (8, 1), (1, 3)]])
def test_rows_are_those_of_the_slow_loop(spans: list[tuple[int, int]]) -> None:
    documents, steps = numbered(LENGTHS), program_steps(spans)
    stream = make_stream(ListSource(documents), shuffle=False)
    for (rows, turn), expected in zip(steps, slow_run(documents, steps), strict=True):
        assert at_step([stream], rows, turn)[0].tolist() == expected


@pytest.mark.parametrize("buffer", [0, 3])
@pytest.mark.parametrize("spans", [TO_TWO, TO_FOUR])
def test_ledger_of_all_tokens(spans: list[tuple[int, int]], buffer: int) -> None:
    """What came out and what is still open is what was opened: nothing is lost, nothing comes twice."""
    source = arrays(LENGTHS * 40)
    stream, delivered = make_stream(source), np.zeros(sum(LENGTHS) * 40, int)
    for rows, turn in program_steps(spans):
        np.add.at(delivered, at_step([stream], rows, turn, buffer=buffer)[0].flatten().numpy(), 1)
    opened = np.zeros_like(delivered)
    for v, (after,) in enumerate(stream.state_dict()["next_VS"].tolist()):
        for n in range(v, after, V):
            opened[source.documents[place(source, n, seed=3)]] += 1
    for _, n, read in open_documents(stream):
        opened[source.documents[place(source, n, seed=3)][read:]] -= 1
    assert (delivered == opened).all() and delivered.sum() == sum(r * n * L for r, n in spans)


@pytest.mark.parametrize(
    ("spans", "num_ranks"), [(TO_TWO, 2), (TO_FOUR, 2), (TO_FOUR, 4), ([(8, 1), (2, 9)], 2)]
)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("buffer", [0, 2])
def test_ranks_and_workers_change_nothing(
    spans: list[tuple[int, int]], num_ranks: int, workers: int, buffer: int
) -> None:
    alone, several = [make_stream(ragged_sources())], ranks(num_ranks, ragged_sources(), workers=workers)
    for rows, turn in program_steps(spans):
        expected = at_step(alone, rows, turn, buffer=buffer)
        parts = [at_step([stream], rows, turn, buffer=buffer) for stream in several]
        assert torch.equal(torch.cat(parts, dim=1), expected)
        assert {part.shape[1] for part in parts} == {rows // num_ranks}
    assert equal(gathered(several), gathered(alone))
    for stream in several:
        stream.close()


@pytest.mark.parametrize("packing", ["stream", "fit"])
@pytest.mark.parametrize("every", [1, 2])
def test_resumes_on_other_ranks_in_the_middle_of_a_turn(packing: str, every: int) -> None:
    straight, streams, state = [make_stream(ragged_sources(), packing=packing)], None, None
    for step, (rows, turn) in enumerate(program_steps(TO_FOUR)):
        expected = at_step(straight, rows, turn)
        if step % every == 0:
            streams = ranks((2, 4, 1)[step // every % 3], ragged_sources(), packing=packing)
            if state:
                load(streams, state)
        assert torch.equal(at_step(streams, rows, turn), expected)
        state = gathered(streams)
        assert equal(state, gathered(straight))


class Asked(ListSource):
    """Remembers which documents were read."""

    def __init__(self, documents: list[list[int]]) -> None:
        super().__init__(documents)
        self.read = []

    def __getitem__(self, i: int) -> Document:
        self.read.append(i)
        return super().__getitem__(i)


def test_only_what_serves_soon_is_read() -> None:
    """Documents of a row each: a step of 2 rows of 8 streams reads 2 documents, whichever streams serve."""
    source = Asked(numbered([L] * 400))
    stream = make_stream(source, shuffle=False, global_batch=2, prefetch=1)
    for turn in range(6):
        source.read.clear()
        at_step([stream], 2, turn)
        assert [n % 4 for n in source.read] == [turn % 4] * 2


# -- a whole run -------------------------------------------------------------------------------------------

TURNS = [
    "data.num_streams=8",
    "global_batch=8",
    "data.buffer=1",
    "steps=null",
    "stage=constant",
    "~stage.run",
    "+stage.a={steps: 3}",
    "+stage.b={steps: 5, global_batch: 2, seq_len: 64}",
    "+stage.c={steps: 2, global_batch: 8, seq_len: 32}",
]


def train_worker(overrides: list[str], stop_at: int | None) -> int:
    config = train.load([*BASE, *overrides])
    if stop_at is not None:
        config.steps = stop_at
    return train.train(config)


def rows_worker(overrides: list[str]) -> list[tuple[torch.Tensor, list[int]]]:
    """This rank's tokens of each step, without training on them, and the streams that served."""
    run, seen, served = train.build(train.load([*BASE, *overrides])), [], list[int]()
    pack = stream_module.PACKINGS["stream"]
    stream_module.PACKINGS["stream"] = lambda virtual, *rest: (
        served.append(virtual.number) or pack(virtual, *rest)
    )
    while run.step < run.last_step:
        served.clear()
        batches = train.next_batches(run)
        seen.append((torch.cat([batch.tokens_BL for batch in batches]), list(served)))
        run.tokens, run.step = run.tokens + run.program.settings_at(run.tokens).tokens, run.step + 1
    return seen


@pytest.mark.slow
def test_a_run_in_turns_stopped_in_the_middle_goes_on_bit_for_bit_on_other_ranks(tmp_path):
    where = [f"run_dir={tmp_path}"]
    run_ranks(train_worker, 1, [*TURNS, "name=whole", *where], None)
    for stop_at in (2, 4, 6, 7, 9, None):
        run_ranks(train_worker, 1, [*TURNS, "name=parts", *where], stop_at)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    one, other = tensors(tmp_path / "whole", 10), tensors(tmp_path / "parts", 10)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    [alone] = run_ranks(rows_worker, 1, [*TURNS, "name=alone", *where])
    two = run_ranks(rows_worker, 2, [*TURNS, "name=two", "parallel=fsdp", *where])
    # 768 tokens before the first step of 128, so it is number 6 of its size: turn 2 of 4
    turns = [[2, 6], [3, 7], [0, 4], [1, 5], [2, 6]]
    assert [served for _, served in alone] == [list(range(8))] * 3 + turns + [list(range(8))] * 2
    for (one, first), (other, second), (whole, served) in zip(*two, alone, strict=True):
        assert torch.equal(torch.cat([one, other]), whole) and first + second == served


# -- refusals ----------------------------------------------------------------------------------------------


def two_batches(first: int, second: int, **data: object) -> Config:
    stage = {"a": SpanConfig(steps=2), "b": SpanConfig(steps=2, global_batch=second)}
    source = {"_target_": "trainer.data.PythonSource"}
    config = Config(name="x", steps=None, seq_len=L, global_batch=first, micro_batch=1, optim={}, stage=stage)
    config.data = DataConfig(source=source, **data)
    return config


def test_the_published_extension_is_split_as_the_pretraining_is() -> None:
    """512 rows of 2,048 streams on the 512 data-parallel ranks that 2,048 GPUs are with 4 ranks a row."""
    program = program_of(two_batches(12288, 512))
    program.check_split(num_ranks=512, num_streams=2048)
    with pytest.raises(
        ConfigError, match="stage.b: global_batch=512 sequences do not divide among 2048 .*-parallel"
    ):
        program.check_split(num_ranks=2048, num_streams=2048)


def test_streams_that_serve_unevenly_are_refused_with_numbers_that_work() -> None:
    program = program_of(two_batches(12, 8))
    text = (
        "data.num_streams=6 must divide each of global_batch=[8, 12] or be a multiple of it, and be a "
        "multiple of the 2 data-parallel ranks; use data.num_streams from [2, 4]"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        program.check_split(num_ranks=2, num_streams=6)
    for num_streams in (2, 4, 24):  # 24 is a multiple of both
        program.check_split(num_ranks=2, num_streams=num_streams)


def test_turns_need_a_corpus_without_an_end() -> None:
    message = (
        r"data.at_end=stop with stage.b: global_batch=2 and data.num_streams=8: .* data.num_streams=2, or"
    )
    with pytest.raises(ConfigError, match=message):
        program_of(two_batches(8, 2, at_end="stop", num_streams=8))
    program_of(two_batches(8, 2, at_end="stop", num_streams=2))
