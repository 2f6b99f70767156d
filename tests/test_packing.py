"""Packing in bulk gives the rows of a slow loop that takes one piece after another."""

import math

import numpy as np
import pytest
import torch

from tests.streams import ArraySource, arrays, make_stream, open_documents, place, settings
from trainer.data import SourcedBatch
from trainer.data.buffer import DocumentBuffer
from trainer.data.mixture import Credits
from trainer.data.rows import Pieces, write

SEED, NUM_STREAMS, SEQ_LEN, ROWS = 3, 2, 32, 4


class SlowStream:
    """One virtual stream, piece by piece. A slot is [document, tokens read], or None: empty."""

    def __init__(self, sources: list[ArraySource], *, number: int) -> None:
        self.sources, num = sources, len(sources)
        self.slots_S, self.draws_S, self.next_S = [[] for _ in sources], [0] * num, [number] * num
        draws_of = [DocumentBuffer(seed=SEED, stream=number, source=s).draw for s in range(num)]
        self.draw_S, self.credits = draws_of, Credits(num, seed=SEED, stream=number)

    def document(self, s: int, n: int) -> list[int]:
        return self.sources[s].documents[place(self.sources[s], n, SEED)].tolist()

    def num_open(self, s: int) -> int:
        return sum(slot is not None for slot in self.slots_S[s])

    def close_up(self, s: int) -> None:
        self.slots_S[s] = [slot for slot in self.slots_S[s] if slot is not None]

    def refill(self, s: int, size: int) -> None:
        if (num_open := self.num_open(s)) <= size:
            self.close_up(s)
            for _ in range(max(1, 2 * size) - num_open):
                self.slots_S[s].append([self.next_S[s], 0])
                self.next_S[s] += NUM_STREAMS

    def look(self, s: int, size: int) -> tuple[int, int]:
        if not size:
            while self.slots_S[s][0] is None:
                del self.slots_S[s][0]
            return 0, self.draws_S[s]
        if 2 * self.num_open(s) <= len(self.slots_S[s]):
            self.close_up(s)
        k, num_slots = self.draws_S[s], len(self.slots_S[s])
        while self.slots_S[s][self.draw_S[s](k, num_slots)] is None:
            k += 1
        return self.draw_S[s](k, num_slots), k + 1

    def left(self, s: int, size: int) -> int:
        slot, _ = self.look(s, size)  # it may close slots up
        n, read = self.slots_S[s][slot]
        return len(self.document(s, n)) - read

    def due(self, weights_S: list[float], size_S: list[int], row_rest: int) -> int:
        if any(size_S):
            for s, size in enumerate(size_S):
                if size:
                    self.refill(s, size)
        elif not any(map(self.num_open, range(len(size_S)))):
            next_length = lambda s: len(self.document(s, self.next_S[s]))  # noqa: E731
            s = self.credits.next_source(weights_S, next_length=next_length)
            self.refill(s, 0)
            return s
        open_S = [weight if self.num_open(s) else 0.0 for s, weight in enumerate(weights_S)]
        if any(open_S):
            return self.credits.next_source(
                open_S, next_length=lambda s: min(self.left(s, size_S[s]), row_rest)
            )
        return next(s for s in range(len(size_S)) if self.num_open(s))

    def step(self, weights_S: list[float], size_S: list[int]) -> np.ndarray:
        """tokens, labels, positions, sources of the rows of a step: (4, rows x L)."""
        rows = [list[int]() for _ in range(4)]
        while (filled := len(rows[0])) < ROWS // NUM_STREAMS * SEQ_LEN:
            row_rest = SEQ_LEN - filled % SEQ_LEN
            s = self.due(weights_S, size_S, row_rest)
            slot, self.draws_S[s] = self.look(s, size_S[s])
            n, read = self.slots_S[s][slot]
            ids = self.document(s, n)
            after = min(len(ids), read + row_rest)
            for i in range(read, after):
                for plane, value in enumerate((ids[i], [*ids, -100][i + 1], i - read, s)):
                    rows[plane].append(value)
            self.slots_S[s][slot] = [n, after] if after < len(ids) else None
            if weights_S[s] > 0:
                self.credits.charge(s, after - read, weights_S)
        return np.array(rows)


SOURCES = [
    [arrays([5, 1, 40, 32, 31, 33, 300, 2, 7, 64, 3, 11] * 9)],
    [arrays([3, 1, 70, 9] * 30), arrays([20, 33, 2] * 30, first=10_000), arrays([400, 5] * 9, first=20_000)],
]


@pytest.mark.parametrize("sources", SOURCES, ids=["one source", "three sources"])
@pytest.mark.parametrize("buffers", [(0,), (1,), (6,), (30,), (6, 0, 20, 2, 0)], ids=str)
def test_rows_are_those_of_a_slow_loop(sources: list[ArraySource], buffers: tuple[int, ...]) -> None:
    names = dict(zip("abc", sources, strict=False))
    changes = {"seq_len": SEQ_LEN, "num_streams": NUM_STREAMS, "global_batch": ROWS, "with_sources": True}
    stream = make_stream(names, seed=SEED, **changes)
    slow_V = [SlowStream(sources, number=v) for v in range(NUM_STREAMS)]
    mixtures = [dict.fromkeys(names, 1.0), {name: 1.0 + i for i, name in enumerate(names)}, {"a": 2.0}]
    for step in range(60):
        mixture, buffer = mixtures[step // 20], buffers[step // 6 % len(buffers)]
        settings(stream, mixture=mixture, buffer=buffer)
        weights_S = [mixture.get(name, 0.0) / sum(mixture.values()) for name in names]
        size_S = [math.ceil(buffer * weight) for weight in weights_S]
        expected = np.stack([slow.step(weights_S, size_S) for slow in slow_V], axis=1).reshape(4, -1, SEQ_LEN)
        [batch] = stream.next_step(ROWS)
        assert isinstance(batch, SourcedBatch)
        assert np.array_equal(torch.stack(list(batch)).numpy(), expected)
        state, draws_V = stream.state_dict(), [slow.draws_S for slow in slow_V]
        assert state["draws_VS"].tolist() == draws_V
        assert not state["read_VC"][state["index_VC"] < 0].any()  # an empty slot says nothing of its past
        open_V = [
            (s, *slot) for slow in slow_V for s in range(len(names)) for slot in slow.slots_S[s] if slot
        ]
        assert sorted(open_documents(stream)) == sorted(open_V)
    stream.close()


@pytest.mark.parametrize("length", [1, 3, 900])
@pytest.mark.parametrize("padding", [0, 2])
def test_positions_count_from_the_start_of_each_piece(length: int, padding: int) -> None:
    """By hand, for pieces that are counted and for such that are copied."""
    pieces = Pieces()
    for n in (length, 2 * length):
        pieces.ids.append(np.arange(n, dtype=np.uint32))
        pieces.lengths.append(n)
        pieces.filled += n
    pieces.pad(padding)
    num_tokens = 3 * length + padding
    planes, withheld = write(pieces, document_mask=True, seq_len=num_tokens)
    one, two = list(range(length)), list(range(2 * length))
    labels = [*one[1:], -100, *two[1:], -100, *[-100] * padding]
    expected = [[*one, *two, *[0] * padding], labels, [*one, *two, *[-1] * padding]]
    assert [plane_T.tolist() for plane_T in planes] == expected and withheld == 0
