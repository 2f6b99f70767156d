"""Mixtures and the document buffer: is every token delivered once, in the shares asked for, on any ranks,
after any restart?

Origins of the expected values: `slow_rows` (a packer that goes token by token on Python lists), a ledger of
what was fed in against what came out and what is still open, invariance under ranks and restarts, arithmetic.
"""

import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.streams import (
    LENGTHS,
    PHASES,
    ArraySource,
    ListSource,
    TextListSource,
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
    settings,
    step_rows,
    write_lines,
)
from trainer import data
from trainer.config import Config, ConfigError, DataConfig, SpanConfig
from trainer.data import TokenStream, with_slots
from trainer.data.batches import Run, TokenBatch
from trainer.data.buffer import EMPTY, DocumentBuffer
from trainer.data.mixture import Credits
from trainer.data.rows import Pieces
from trainer.program import check_sources, program_of

# ---- Corpora and the slow reference ----------------------------------------------------------------------


class Constant(ListSource):
    """A million documents of 2,000 tokens."""

    def __init__(self) -> None:
        self.tokens = np.arange(2000, dtype=np.uint32)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, i: int) -> data.Document:
        return data.Document(f"constant:{i}", tokens=self.tokens)


def lognormal(mean: float, num_documents: int, *, seed: int, first: int = 0) -> ArraySource:
    random = np.random.default_rng(seed)
    return arrays(
        np.maximum(1, random.lognormal(math.log(mean) - 0.245, 0.7, num_documents)).astype(int).tolist(),
        first=first,
    )


def slow_rows(
    documents: list[list[int]], *, stream: int, num_streams: int, seed: int, steps: list[tuple[int, int, int]]
):
    """Rows of one stream over an unshuffled corpus, for each step of (rows, L, b): [[(token, label,
    position)]].
    """
    bits = iter(
        (
            np.random.Philox(key=[seed, stream], counter=[0, 0, 0, 1]).random_raw(20_000) >> np.uint64(32)
        ).tolist()
    )
    # a slot is [document, tokens read of it], or None when it is finished
    slots, n, steps_rows = [], stream, []
    for num_rows, seq_len, b in steps:
        rows = []
        for _ in range(num_rows):
            row = []
            while len(row) < seq_len:
                num_open = sum(slot is not None for slot in slots)
                if num_open <= b:
                    slots = [slot for slot in slots if slot is not None]
                    while len(slots) < max(1, 2 * b):
                        if documents[n % len(documents)]:
                            slots.append([documents[n % len(documents)], 0])
                        n += num_streams
                if b == 0:
                    chosen = next(i for i, slot in enumerate(slots) if slot is not None)
                else:
                    if 2 * num_open <= len(slots):
                        slots = [slot for slot in slots if slot is not None]
                    while slots[chosen := next(bits) * len(slots) // 2**32] is None:
                        pass
                document, start = slots[chosen][0], len(row)
                while len(row) < seq_len and slots[chosen][1] < len(document):
                    i = slots[chosen][1]
                    row.append(
                        (document[i], document[i + 1] if i + 1 < len(document) else -100, len(row) - start)
                    )
                    slots[chosen][1] += 1
                if slots[chosen][1] == len(document):
                    slots[chosen] = None
            rows.append(row)
        steps_rows.append(rows)
    return steps_rows


# ---- Ledger ----------------------------------------------------------------------------------------------

RAGGED = [*LENGTHS, 1_000_000, 1, 1, 0, 2, 250]


def owed(stream: TokenStream, sources: list[ArraySource], *, seed: int, size: int) -> np.ndarray:
    """How often each token was to be delivered by now: all of the documents opened, without what is open of
    them.
    """
    times = np.zeros(size, int)
    for s, source in enumerate(sources):
        epochs = 1 + max(row[s] for row in stream.state_dict()["next_VS"].tolist()) // len(source)
        orders = [data.permutation(len(source), seed=seed, epoch=epoch) for epoch in range(epochs)]
        for v, row in enumerate(stream.state_dict()["next_VS"].tolist()):
            for n in range(v, row[s], stream.num_streams):
                times[source.documents[orders[n // len(source)][n % len(source)]]] += 1
        for _, n, read in (document for document in open_documents(stream) if document[0] == s):
            times[source.documents[orders[n // len(source)][n % len(source)]][read:]] -= 1
    return times


@pytest.mark.parametrize("buffer", [0, 1, 3, 64])
@pytest.mark.parametrize("num_sources", [1, 2])
def test_ledger_every_token_of_every_document_once_an_epoch(buffer: int, num_sources: int) -> None:
    sources = [arrays(RAGGED), arrays([700, 3, 1, 0, 90] * 100, first=2_000_000)][:num_sources]
    size, seed = 2_100_000, 3
    by_name = dict(zip("ab", sources, strict=False)) if num_sources == 2 else sources[0]
    stream = make_stream(by_name, seq_len=8192, global_batch=16, num_streams=4, seed=seed, buffer=buffer)
    follows = np.full(size, -100)
    for source in sources:
        for document in source.documents:
            follows[document[:-1]] = document[1:]
    delivered = np.zeros(size, int)
    for _ in range(20):  # 2.6 M tokens: more than an epoch of the first source, hundreds of the second
        tokens, labels, positions = (part.flatten().numpy() for part in step_rows(stream, micro_batch=16))
        np.add.at(delivered, tokens, 1)
        assert (labels == follows[tokens]).all()  # at the end of a row too: the next token of the document
        begins = np.arange(len(tokens)) % 8192 == 0
        begins[1:] |= labels[:-1] == -100
        starts = np.maximum.accumulate(np.where(begins, np.arange(len(tokens)), 0))
        assert (positions == np.arange(len(tokens)) - starts).all()
        assert (tokens[1:][~begins[1:]] == labels[:-1][~begins[1:]]).all()
    assert (delivered == owed(stream, sources, seed=seed, size=size)).all()
    num_open = Counter(n % 4 for _, n, _ in open_documents(stream))
    at_most = max(1, 2 * num_sources * math.ceil(buffer / num_sources))  # each source has its part
    assert max(num_open.values()) <= at_most and min(num_open[v] for v in range(4)) >= (buffer and 1)
    left = sum(
        len(sources[s].documents[place(sources[s], n, seed)]) - read for s, n, read in open_documents(stream)
    )
    assert stream.counts["open"] == left and stream.counts["tokens"] == 20 * 16 * 8192


# ---- The buffer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buffer", "seq_len", "num_streams"), [(1, 16, 2), (3, 7, 4), (3, 1, 1), (64, 100, 2), (5, 16, 8)]
)
def test_buffered_rows_are_those_of_the_slow_packer(buffer: int, seq_len: int, num_streams: int) -> None:
    check_against_slow_packer([(8, seq_len, buffer)] * 8, num_streams)


@pytest.mark.parametrize(
    "buffers", [(0, 3, 0, 2, 9, 1), (9, 4, 0), (2, 3, 4, 64, 1), (64, 2), (0, 0, 5, 0, 0)]
)
def test_a_span_may_change_the_buffer_the_rows_and_their_length(buffers: tuple[int, ...]) -> None:
    steps = [
        (8 * (1 + i % 2), (16, 40)[i // 2 % 2], buffer) for i, buffer in enumerate(buffers) for _ in range(4)
    ]
    check_against_slow_packer(steps, num_streams=4)


def check_against_slow_packer(steps: list[tuple[int, int, int]], num_streams: int) -> None:
    """`steps`: (global batch, L, b)."""
    documents = numbered(LENGTHS)
    stream = make_stream(
        ListSource(documents), shuffle=False, num_streams=num_streams, global_batch=steps[0][0]
    )
    got = []
    for batch, seq_len, buffer in steps:
        settings(stream, seq_len=seq_len, global_batch=batch, buffer=buffer)
        got.append(step_rows(stream).reshape(3, num_streams, batch // num_streams, seq_len))
    for v in range(num_streams):
        own = [(batch // num_streams, seq_len, buffer) for batch, seq_len, buffer in steps]
        expected = slow_rows(documents, stream=v, num_streams=num_streams, seed=3, steps=own)
        for rows, slow in zip(got, expected, strict=True):
            assert rows[:, v].permute(1, 2, 0).tolist() == [[list(token) for token in row] for row in slow]


def test_open_documents_are_drawn_uniformly_and_by_each_stream_for_itself() -> None:
    """8 documents without end, a row a draw: each gets an eighth of 8,000 rows, within four standard
    deviations.
    """
    stream = make_stream(
        arrays([100_000] * 64), shuffle=False, seq_len=4, global_batch=8, num_streams=8, buffer=4
    )
    # the document of each row
    first = torch.stack([step_rows(stream)[0, :, 0] // 100_000 for _ in range(8000)])
    for v in range(8):
        drawn = Counter(first[:, v].tolist())
        assert set(drawn) == set(range(v, 64, 8))
        assert all(abs(count - 1000) < 4 * math.sqrt(8000 / 8 * 7 / 8) for count in drawn.values())
    same = (first[:, 1:] // 8 == first[:, :-1] // 8).float().mean(0)  # neighbours draw alike by chance only
    assert ((same - 1 / 8).abs() < 4 * math.sqrt(1 / 8 * 7 / 8 / 8000)).all()


def test_a_buffer_refills_in_one_go_and_drains_before_it_does() -> None:
    stream = make_stream(arrays([50] * 4000), shuffle=False, seq_len=64, global_batch=1, num_streams=1)

    def step(buffer: int) -> tuple[int, int]:
        """Documents that are open, and those opened so far."""
        settings(stream, buffer=buffer)
        step_rows(stream)
        return len(open_documents(stream)), stream.virtual[0].opener.next_S[0]

    seen = [step(10) for _ in range(60)]
    assert {num_open for num_open, _ in seen} <= set(range(9, 21))  # 9: the last piece of a row ended another
    opened = [opened for _, opened in seen]
    assert opened[0] == 20 and {after - before for before, after in pairwise(opened)} == {0, 10}
    num_open, opened_so_far = step(40)
    assert num_open >= 77  # filled to 80 at once; a row of 64 ends at most 3 documents of 50
    drain = [step(3) for _ in range(300)]
    until = next(i for i, (_, opened) in enumerate(drain) if opened > opened_so_far)
    # nothing was opened until 3 were left, in the middle of a row
    assert until > 20 and drain[until - 1][0] in range(4, 7)
    assert drain[until][1] == opened_so_far + 3 and {num_open for num_open, _ in drain[until:]} <= set(
        range(1, 7)
    )


def test_without_a_buffer_open_documents_end_oldest_first() -> None:
    stream = make_stream(
        arrays([50] * 4000), shuffle=False, seq_len=64, global_batch=1, num_streams=1, buffer=20
    )
    for _ in range(30):
        step_rows(stream)
    waiting = sorted((n, read) for _, n, read in open_documents(stream))
    assert len({read for _, read in waiting}) > 3
    opened = stream.virtual[0].opener.next_S[0]
    settings(stream, buffer=0)
    tokens = torch.cat([step_rows(stream)[0].flatten() for _ in range(40)]).tolist()
    rest = [token for n, read in waiting for token in range(50 * n + read, 50 * n + 50)]
    assert tokens[: len(rest)] == rest and len(rest) < len(tokens)
    # then those never opened
    assert tokens[len(rest) :] == list(range(50 * opened, 50 * opened + len(tokens) - len(rest)))


def test_slots_stay_in_the_order_of_age() -> None:
    buffer, batch = DocumentBuffer(seed=0, stream=0), TokenBatch([np.arange(1)])
    ages = iter(range(10_000))
    for _ in range(300):
        if room := buffer.room(6):
            buffer.close_up()
            for _ in range(room):
                age = next(ages)
                buffer.extend(Run(batch, 0, 1, range(age, age + 1)))
        buffer.look(6)
        buffer.read_on(Pieces(), 1)
        found = [number for number in buffer.numbers if number != EMPTY]
        assert found == sorted(found) and buffer.num_open == len(found)


def test_draws_are_those_of_their_seed_stream_and_source() -> None:
    keys, count = [(3, 0, 0), (4, 0, 0), (3, 1, 0), (3, 0, 1)], 600  # more than two blocks
    draws = []
    for seed, stream, source in keys:
        buffer = DocumentBuffer(seed=seed, stream=stream, source=source)
        draws.append([buffer.draw(k, 2**32) for k in range(count)])
        bits = np.random.Philox(key=[seed, stream], counter=[0, source, 0, 1]).random_raw(count)
        assert draws[-1] == (bits >> np.uint64(32)).tolist()
    assert len({tuple(of) for of in draws}) == len(keys)


# ---- Mixtures --------------------------------------------------------------------------------------------

MIXTURES = [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 3.0, "c": 1.0}, {"b": 1.0}]


def three_sources() -> dict[str, ArraySource]:
    """Of short, middling and long documents."""
    return {
        "c": lognormal(1000, 1000, seed=2, first=20_000_000),
        "a": lognormal(60, 4000, seed=0),
        "b": lognormal(300, 2000, seed=1, first=10_000_000),
    }


def shares(tokens: torch.Tensor) -> dict[str, float]:
    counts = np.bincount(tokens.flatten().numpy() // 10_000_000, minlength=3)
    return dict(zip("abc", (counts / counts.sum()).tolist(), strict=True))


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("num_streams", [4, 8])
def test_shares_of_tokens_are_the_weights_over_a_million_tokens(
    mixture: dict[str, float], num_streams: int
) -> None:
    stream = make_stream(
        three_sources(), seq_len=2048, global_batch=16, num_streams=num_streams, mixture=mixture
    )
    tokens = torch.stack([step_rows(stream, 16)[0] for _ in range(31)])  # 1.016 M
    total = sum(mixture.values())
    for name, share in shares(tokens).items():
        assert abs(share - mixture.get(name, 0.0) / total) < 0.005
    if len(mixture) == 1:
        assert set(torch.unique(tokens // 10_000_000).tolist()) == {1}


@pytest.mark.parametrize("buffer", [4, 64])
def test_with_a_buffer_shares_hold_from_the_first_token_whatever_the_lengths_are(buffer: int) -> None:
    """Lengths over five orders of magnitude, 40,000 tokens of the longest document, and hundreds of documents
    that stay open.
    """
    random = np.random.default_rng(0)
    means, mixture = {"a": 60, "b": 700, "c": 5000}, {"a": 0.2, "b": 0.5, "c": 0.3}
    lengths = {
        name: random.lognormal(math.log(mean) - 1.62, 1.8, 2_000_000 // mean) for name, mean in means.items()
    }
    sources = {
        name: arrays(np.maximum(1, lengths[name]).astype(int).tolist(), first=10_000_000 * i)
        for i, name in enumerate("abc")
    }
    stream = make_stream(
        sources, seq_len=2048, global_batch=16, num_streams=8, mixture=mixture, buffer=buffer
    )
    for _ in range(2):
        tokens = torch.stack([step_rows(stream, 16)[0] for _ in range(31)])  # 1.016 M
        for name, share in shares(tokens).items():
            assert abs(share - mixture[name]) < 0.005


def slow_mixed_rows(
    sources: list[list[list[int]]], *, stream: int, num_streams: int, seed: int, steps: list
) -> list[list]:
    """Tokens of one stream over unshuffled sources, for each step of (rows, L, b, weights): which source is
    due is worked out anew for each piece, from a draw that is looked at and counted only when it is used."""
    num = len(sources)

    def raw(source: int, use: int, size: int) -> list[int]:
        return np.random.Philox(key=[seed, stream], counter=[0, source, 0, use]).random_raw(size).tolist()

    start = [(bits >> 11) / 2**53 - 0.5 for bits in raw(0, 2, num)]
    bits = [[draw >> 32 for draw in raw(s, 1, 9000)] for s in range(num)]
    draws, credit, n, slots = [0] * num, [math.inf] * num, [stream] * num, [[] for _ in range(num)]
    found = []

    def num_open(s: int) -> int:
        return sum(slot is not None for slot in slots[s])

    def look(s: int, size: int) -> tuple[int, int]:
        if size == 0:
            while slots[s][0] is None:
                slots[s].pop(0)
            return 0, draws[s]
        if 2 * num_open(s) <= len(slots[s]):
            slots[s] = [slot for slot in slots[s] if slot is not None]
        used = draws[s]
        while True:
            slot, used = bits[s][used] * len(slots[s]) // 2**32, used + 1
            if slots[s][slot] is not None:
                return slot, used

    def pay(weights: list[float], s: int, length: float) -> None:
        for t in range(num):
            credit[t] += weights[t] * length
        credit[s] -= length

    def due(weights: list[float], length: dict[int, int]) -> int:
        fresh = [s for s in length if credit[s] == math.inf]
        for s in fresh:
            credit[s] = 0.0
        for s in fresh:
            pay([weight if t in length else 0.0 for t, weight in enumerate(weights)], s, start[s] * length[s])
        return min(length, key=lambda s: (length[s] / 2 - credit[s]) / weights[s])

    def refill(s: int, size: int) -> None:
        slots[s] = [slot for slot in slots[s] if slot is not None]
        while len(slots[s]) < max(1, 2 * size):
            slots[s].append([sources[s][n[s] % len(sources[s])], 0])
            n[s] += num_streams

    for num_rows, seq_len, b, weights in steps:
        sizes, row_tokens = [math.ceil(b * weight) for weight in weights], []
        while len(row_tokens) < num_rows * seq_len:
            rest = seq_len - len(row_tokens) % seq_len
            wanted = [s for s in range(num) if weights[s] > 0]
            if b:
                for s in wanted:
                    if num_open(s) <= sizes[s]:
                        refill(s, sizes[s])
            elif not any(num_open(s) for s in range(num)):
                s = due(weights, {s: len(sources[s][n[s] % len(sources[s])]) for s in wanted})
                refill(s, 0)
            ready = [s for s in wanted if num_open(s)]
            left = {
                s: min(rest, len(slots[s][i][0]) - slots[s][i][1])
                for s in ready
                for i, _ in [look(s, sizes[s])]
            }
            s = due(weights, left) if ready else next(s for s in range(num) if num_open(s))
            slot, draws[s] = look(s, sizes[s])
            document, read = slots[s][slot]
            length = min(rest, len(document) - read)
            row_tokens += document[read : read + length]
            slots[s][slot][1] += length
            if slots[s][slot][1] == len(document):
                slots[s][slot] = None
            if weights[s] > 0:
                pay(weights, s, length)
        found.append(row_tokens)
    return found


@pytest.mark.parametrize("buffers", [(3,), (0,), (9, 1, 9), (5, 0, 2), (0, 4, 0)])
def test_buffered_mixtures_are_those_of_the_slow_packer(buffers: tuple[int, ...]) -> None:
    sources = [[d for d in source.documents if d] for source in ragged_sources().values()]
    mixtures = [[0.5, 0.25, 0.25], [0.125, 0.0, 0.875], [0.0, 0.75, 0.25]]
    steps = [(4, (16, 40)[i % 2], b, mixtures[i % 3]) for i, b in enumerate(buffers * 3) for _ in range(4)]
    by_name = {name: ListSource(documents) for name, documents in zip("abc", sources, strict=True)}
    stream = make_stream(by_name, shuffle=False, num_streams=2, global_batch=8)
    got = []
    for _, seq_len, b, weights in steps:
        settings(stream, seq_len=seq_len, buffer=b, mixture=dict(zip("abc", weights, strict=True)))
        got.append(step_rows(stream)[0].reshape(2, -1))
    for v in range(2):
        expected = slow_mixed_rows(sources, stream=v, num_streams=2, seed=3, steps=steps)
        assert [rows[v].tolist() for rows in got] == expected


def test_weights_are_equal_unless_given_and_their_scale_does_not_matter() -> None:
    def rows(mixture: dict[str, float] | None) -> torch.Tensor:
        stream = make_stream(three_sources(), seq_len=512, mixture=mixture)
        return torch.stack([step_rows(stream) for _ in range(10)])

    assert torch.equal(rows(None), rows({"a": 1.0, "b": 1.0, "c": 1.0}))
    assert torch.equal(rows({"a": 0.5, "c": 0.25}), rows({"c": 64.0, "a": 128.0, "b": 0.0}))
    assert not torch.equal(rows(None), rows({"a": 1.0, "b": 1.0, "c": 1.5}))


def test_another_mixture_holds_from_the_very_next_document_on() -> None:
    sources, stream = three_sources(), None
    stream = make_stream(sources, seq_len=512, mixture={"a": 1.0, "b": 1.0})
    for _ in range(5):
        step_rows(stream)
    before = [list(virtual.opener.next_S) for virtual in stream.virtual]
    begun = {(s, n) for s, n, _ in open_documents(stream)}
    settings(stream, mixture={"c": 1.0})
    tokens = torch.stack([step_rows(stream)[0] for _ in range(5)])
    after = [list(virtual.opener.next_S) for virtual in stream.virtual]
    assert [row[:2] for row in after] == [row[:2] for row in before]  # not a document more of a and b
    assert all(new[2] > old[2] for old, new in zip(before, after, strict=True))
    rest = {int(token) for token in torch.unique(tokens) if token < 20_000_000}
    old = [stream.intake.reread(s, n, ticket=None).ids for s, n in begun if s < 2]
    assert rest <= {int(token) for document in old for token in document}


@pytest.mark.parametrize(
    "lengths", [(100.0, 100.0), pytest.param((10.0, 300.0), marks=pytest.mark.slow), (300.0, 10.0)]
)
def test_streams_do_not_take_turns_in_step(lengths: tuple[float, float]) -> None:
    """Over 1,000 streams, a source of weight 0.1 has a tenth of the tokens at any time from the start, not
    only in the end.
    """
    weights, turn = [0.9, 0.1], max(lengths[0] / 0.9, lengths[1] / 0.1)
    seen = []
    for v in range(1000):
        credits, total = Credits(2, seed=5, stream=v), 0.0
        while total < 3 * turn:
            source = credits.next_source(weights, next_length=lengths.__getitem__)
            credits.charge(source, lengths[source], weights)
            seen.append((total / turn, source, lengths[source]))
            total += lengths[source]
    when, source, tokens = (np.array(column) for column in zip(*seen, strict=True))
    for turns in (1, 2, 3):
        share = (tokens * source)[when < turns].sum() / tokens[when < turns].sum()
        assert abs(share - 0.1) < 0.03 / turns


def test_credits_are_what_the_formula_says() -> None:
    """In exact arithmetic: weights and lengths are fractions and powers of two."""
    weights, lengths = [0.5, 0.25, 0.25], [64, 16, 128]
    credits = Credits(3, seed=0, stream=0)
    credits.credit_S = [0.0, 0.0, 0.0]
    owed, order = [0.0, 0.0, 0.0], []
    for _ in range(60):
        source = credits.next_source(weights, next_length=lengths.__getitem__)
        due = [(lengths[s] / 2 - owed[s]) / weights[s] for s in range(3)]
        assert source == due.index(min(due))
        credits.charge(source, lengths[source], weights)
        owed = [owed[s] + weights[s] * lengths[source] - (s == source) * lengths[source] for s in range(3)]
        assert credits.credit_S == owed and sum(owed) == 0
        order.append(source)
    # due at 64, 192, 320, ...; at 32, 96, 160, ...; at 256, 768, ...: 4, 8 and 1 documents in 512 tokens
    assert order[:9] == [1, 0, 1, 1, 0, 1, 2, 1, 0] and Counter(order[:52]) == {0: 16, 1: 32, 2: 4}


# ---- Elastic and exact -----------------------------------------------------------------------------------


def at_phase(streams: list[TokenStream], step: int) -> torch.Tensor:
    mixture, buffer = PHASES[step // 3]
    for stream in streams:
        settings(stream, mixture=mixture, buffer=buffer)
    return global_rows(streams)


def test_phases_are_the_same_on_any_number_of_ranks() -> None:
    by_ranks = [ranks(num_ranks, ragged_sources()) for num_ranks in (1, 2, 4, 8)]
    for step in range(18):
        alone, *others = [at_phase(streams, step) for streams in by_ranks]
        assert all(torch.equal(alone, rows) for rows in others)
    alone, *others = [gathered(streams) for streams in by_ranks]
    assert all(equal(alone, state) for state in others)


@pytest.mark.parametrize("chain", [(2, 8, 4, 1, 8, 2), (8, 8, 1, 4, 2, 1)])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_phases_through_chains_of_resumes_equal_one_run(chain: tuple[int, ...], every: int) -> None:
    """A resume in each phase, in the middle of documents and buffers, each state loaded twice, with room to
    spare or none.
    """
    straight, streams, state = [make_stream(ragged_sources())], None, None
    for step in range(18):
        expected = at_phase(straight, step)
        if step % every == 0:
            streams = ranks(chain[step // every % len(chain)], ragged_sources())
            for _ in range(2 if state else 0):
                load(streams, state)
                assert equal(gathered(streams), state)
        assert torch.equal(at_phase(streams, step), expected)
        state = gathered(streams)
        assert equal(state, straight[0].state_dict())
        room = gathered([straight[0]])["index_VC"].shape[1] + step % 5
        roomy = with_slots(straight[0].state_dict(), num_slots=room)
        copy = load(ranks(4, ragged_sources()), roomy)
        assert equal(gathered(copy), state)


@pytest.mark.parametrize("buffer", [0, 3])
def test_a_stream_of_several_sources_in_use_goes_back_to_a_state(buffer: int) -> None:
    """What was looked at ahead, to choose a source, is not of that position."""
    stream = make_stream(ragged_sources(), buffer=buffer)
    step_rows(stream)
    state, expected = stream.state_dict(), [step_rows(stream) for _ in range(3)]
    for _ in range(2):
        stream.load_state_dict(state, keep_counts=True)
        assert all(torch.equal(step_rows(stream), rows) for rows in expected)


def test_a_document_that_is_open_is_finished_whatever_the_limit_has_become(tokenizer) -> None:
    texts = TextListSource(["the quick brown fox jumps over the lazy dog " * 20, "packs"] * 8)
    straight = make_stream(texts, tokenizer=tokenizer, num_streams=1, buffer=2)
    step_rows(straight)
    state, expected = straight.state_dict(), step_rows(straight)
    limited = make_stream(texts, tokenizer=tokenizer, num_streams=1, buffer=2, max_document_mb=1e-5)
    limited.load_state_dict(state, keep_counts=True)
    assert torch.equal(step_rows(limited), expected)
    for _ in range(20):
        step_rows(limited)
    assert limited.counts["huge"] > 0  # of those that would have been opened since


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_state_has_heads_and_no_tokens(num_ranks: int) -> None:
    """8,192 open documents on a rank, the report's buffer: at most 100 kB; 9 bytes each and some for each
    stream.
    """
    streams = ranks(num_ranks, Constant(), num_streams=8 * num_ranks, global_batch=8 * num_ranks, buffer=512)
    for stream in streams:
        step_rows(stream)
        assert len(open_documents(stream)) == 8192
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in stream.state_dict().values())
        assert 9 * 8192 <= num_bytes < 80_000
        assert all(ids.format == "I" for virtual in stream.virtual for *_, ids in virtual.open())


def test_foreign_states_are_refused() -> None:
    sources = ragged_sources()
    one, other = ranks(2, sources, buffer=3)
    for _ in range(3):
        step_rows(one)
        step_rows(other)
    state = one.state_dict()
    one.load_state_dict(state, keep_counts=True)

    def refused(message: str, stream: TokenStream, **changes: torch.Tensor) -> None:
        before = stream.state_dict()
        with pytest.raises(ValueError, match=message):
            stream.load_state_dict({**state, **changes}, keep_counts=True)
        assert equal(stream.state_dict(), before)  # nothing was taken over

    refused("not that of streams 4 to 7 of this run", other)
    refused("8 streams, this run 4; use data.num_streams=8", make_stream(sources, num_streams=4, num_ranks=2))
    refused("3 sources, this run 1", make_stream(sources["a"], num_ranks=2))
    refused("3 sources, this run 2", make_stream({name: sources[name] for name in "ab"}, num_ranks=2))
    index, read, source = (state[name] for name in ("index_VC", "read_VC", "source_VC"))
    foreign = "not that of streams 0 to 3"
    refused(foreign, one, index_VC=index.clone().fill_(1000))  # a document that was not opened yet
    refused(foreign, one, index_VC=index - 9)
    refused(foreign, one, read_VC=read - 1000)
    refused(foreign, one, source_VC=source + 3)
    refused(foreign, one, next_VS=state["next_VS"] + 1)
    refused(foreign, one, draws_VS=-state["draws_VS"] - 1)
    short = make_stream({name: ListSource([[1]] * 24) for name in "abc"}, num_ranks=2, buffer=3)
    short.load_state_dict({**state, "read_VC": read + 1}, keep_counts=True)
    with pytest.raises(ValueError, match="corpus and the tokenizer of the checkpoint"):
        step_rows(short)


def test_streamed_sources_mix_and_buffer_like_indexed_ones(tmp_path: Path, tokenizer) -> None:
    """`datasets` against our own reader, beside another source, through phases and resumes on 2 -> 8 -> 4 ->
    1 ranks.
    """
    texts = [f"document {i} " * (1 + i * i % 11) for i in range(37)]
    write_lines(tmp_path / "a.jsonl", [json.dumps({"text": text}).encode() for text in texts])
    other = TextListSource([f"another {i} " * (1 + i % 5) for i in range(24)])

    def sources(kind: type) -> dict[str, object]:
        return {"streamed": kind(str(tmp_path)), "other": other}

    same = {"tokenizer": tokenizer, "shuffle": False, "seq_len": 64}
    straight, state = [make_stream(sources(data.JsonlSource), **same)], None
    phases = [
        ({"streamed": 2.0, "other": 1.0}, 3),
        ({"other": 1.0}, 5),
        ({"streamed": 1.0, "other": 1.0}, 0),
        (None, 2),
    ]
    for num_ranks, (mixture, buffer) in zip((2, 8, 4, 1), phases, strict=True):
        streams = [
            make_stream(sources(data.HubSource), rank=rank, num_ranks=num_ranks, **same)
            for rank in range(num_ranks)
        ]
        if state:
            load(streams, state)
        for _ in range(3):
            for stream in [*streams, *straight]:
                settings(stream, mixture=mixture, buffer=buffer)
            assert torch.equal(global_rows(streams), global_rows(straight))
        state = gathered(streams)
        assert equal(state, straight[0].state_dict())


# ---- Bad documents and refusals --------------------------------------------------------------------------


def test_a_source_without_a_usable_document_is_named() -> None:
    sources = {"good": ListSource([[1, 2, 3]] * 9), "bad": ListSource([[]] * 9)}
    step_rows(make_stream(sources, mixture={"good": 1.0}))
    with pytest.raises(ValueError, match=r"no usable document in a whole epoch.*check data\.sources\.bad"):
        step_rows(make_stream(sources))
    with pytest.raises(ValueError, match=r"no document; check data\.sources\.none"):
        make_stream({"good": sources["good"], "none": ListSource([])})
    with pytest.raises(ValueError, match="there is no source ugly"):
        make_stream(sources, mixture={"ugly": 1.0})


def test_bad_documents_are_counted_once_through_buffers_and_resumes() -> None:
    """Of 10 documents 3 are empty: of 20 streams' reading, whatever was asked for ahead, the counts say
    so.
    """
    sources = {name: ListSource([[i] * (i % 10 > 2) for i in range(200)]) for name in "ab"}
    reported: list[data.BadDocument] = []
    straight = make_stream(sources, buffer=4, shuffle=False, report=reported.append)
    resumed = make_stream(sources, buffer=4, shuffle=False)
    for _ in range(6):
        assert torch.equal(step_rows(straight), step_rows(resumed))
        state = resumed.state_dict()
        resumed = make_stream(sources, buffer=4, shuffle=False)
        resumed.load_state_dict(state, keep_counts=True)
    assert equal(resumed.state_dict(), straight.state_dict()) and resumed.counts["empty"] == len(reported)
    passed = sum(
        n % 200 % 10 <= 2
        for v in straight.virtual
        for end in v.opener.next_S
        for n in range(v.number, end, 8)
    )
    assert resumed.counts["empty"] == passed > 50


def config(stage: dict | None = None, **of_data: object) -> Config:
    spans = {name: SpanConfig(steps=1, **values) for name, values in (stage or {"run": {}}).items()}
    own = {"seq_len": 8, "global_batch": 4, "micro_batch": 1}
    return Config(name="x", stage=spans, data=DataConfig(**of_data), **own)


SEVERAL = {"sources": {"web": {"_target_": "x"}, "code": {"_target_": "y"}}}


def test_the_programs_first_mixture_and_buffer_are_the_runs() -> None:
    def nows(*args: object, **of_data: object) -> list[tuple]:
        return [(span.now.mixture, span.now.buffer) for span in program_of(config(*args, **of_data)).spans]

    assert nows(source={}) == [(None, 0)]
    assert nows(**SEVERAL) == [({"web": 1.0, "code": 1.0}, 0)]
    assert nows(**SEVERAL, mixture={"web": 3.0}, buffer=7) == [({"web": 3.0}, 7)]
    spans = {"a": {}, "b": {"buffer": 2}, "c": {"mixture": {"code": 1.0}}, "d": {"buffer": 0}}
    later = [({"web": 3.0}, 7), ({"web": 3.0}, 2), ({"code": 1.0}, 2), ({"code": 1.0}, 0)]
    assert nows(spans, **SEVERAL, mixture={"web": 3.0}, buffer=7) == later


@pytest.mark.parametrize(
    ("stage", "of_data", "message"),
    [
        (
            None,
            {**SEVERAL, "mixture": {"wbe": 1.0}},
            "data.mixture={'wbe': 1.0}: there is no source wbe (did you mean web?)",
        ),
        (
            {"a": {"mixture": {"web": 1.0, "books": 1.0}}},
            SEVERAL,
            "stage.a: mixture={'web': 1.0, 'books': 1.0}: there is no source books (there are: web, code)",
        ),
        (
            {"a": {}, "b": {"mixture": {"web": 1.0}}},
            {"source": {}},
            "stage.b: mixture={'web': 1.0}: weights, but there is one source, data.source; set data.sources",
        ),
        (
            None,
            {"source": {}, "mixture": {"web": 1.0}},
            "data.mixture={'web': 1.0}: weights, but there is one source",
        ),
        (
            None,
            {**SEVERAL, "mixture": {"web": 0.0}},
            "data.mixture={'web': 0.0}: weights of sources, 0 or more, and not all 0",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(stage: dict | None, of_data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        check_sources(of := config(stage, **of_data), program_of(of))
