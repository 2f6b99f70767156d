"""What a token carries besides its id, what a step counts, and what a snapshot remembers.

Origins of the expected values: slow packers that go token by token on Python lists, a ledger, the same stream
undisturbed, arithmetic.
"""

import pickle

import numpy as np
import pytest
import torch

from tests.streams import (
    LENGTHS,
    ListSource,
    TextListSource,
    equal,
    gathered,
    global_rows,
    load,
    make_stream,
    numbered,
    ragged_sources,
    ranks,
    settings,
    step_rows,
)
from trainer import data
from trainer.data import BadDocument, DataError, Document
from trainer.data.batches import NO_IDS, TokenBatch
from trainer.data.sources import Tokens


class MaskedSource(ListSource):
    """Every third document has no mask; the others hide a random half of their tokens."""

    masks = True

    def mask(self, i: int) -> np.ndarray | None:
        return np.random.default_rng(i).random(len(self.documents[i])) < 0.5 if i % 3 else None

    def __getitem__(self, i: int) -> Document:
        return super().__getitem__(i)._replace(mask=self.mask(i))


def label_of(source: MaskedSource, i: int, at: int) -> int:
    """What the model shall say after token `at` of document i."""
    document, mask = source.documents[i], source.mask(i)
    if at + 1 == len(document) or (mask is not None and not mask[at + 1]):
        return -100
    return document[at + 1]


def slow_rows(source: MaskedSource, *, stream: int, num_streams: int, num_rows: int, seq_len: int):
    """Documents of one stream, one after another in the corpus' order: [[(token, label)]]."""
    rows, row, n = [], [], stream
    while len(rows) < num_rows:
        i = n % len(source)
        for at, token in enumerate(source.documents[i]):
            row.append((token, label_of(source, i, at)))
            if len(row) == seq_len:
                rows.append(row)
                row = []
        n += num_streams
    return rows[:num_rows]


def labels_by_token(source: MaskedSource) -> dict[int, int]:
    """Every token of `numbered` documents occurs once, so a token says what its label must be."""
    return {
        token: label_of(source, i, at)
        for i, document in enumerate(source.documents)
        for at, token in enumerate(document)
    }


@pytest.mark.parametrize("seq_len", [1, 7, 16, 100])
@pytest.mark.parametrize("workers", [0, 1])
def test_masked_labels_are_those_of_the_slow_packer(seq_len: int, workers: int) -> None:
    """Rows of 7 tokens cut documents at masked and unmasked targets alike."""
    source = MaskedSource(numbered(LENGTHS))
    stream = make_stream(source, shuffle=False, seq_len=seq_len, num_streams=4, workers=workers)
    steps = [step_rows(stream)[:2].reshape(2, 4, 4, seq_len) for _ in range(6)]
    stream.close()
    for v in range(4):
        rows = torch.cat([step[:, v] for step in steps], dim=1).permute(1, 2, 0).tolist()
        expected = slow_rows(source, stream=v, num_streams=4, num_rows=24, seq_len=seq_len)
        assert rows == [[list(pair) for pair in row] for row in expected]
        assert any(label == -100 for row in expected for _, label in row)


@pytest.mark.parametrize("packing", ["stream", "fit"])
@pytest.mark.parametrize("buffer", [0, 3])
def test_each_token_has_the_label_that_its_document_says_in_any_packing(packing: str, buffer: int) -> None:
    """Also of documents that `fit` cuts: the label at the cut is that of the token behind it."""
    source = MaskedSource(numbered(LENGTHS))
    labels, seen = labels_by_token(source), set[int]()
    stream = make_stream(source, packing=packing, buffer=buffer, at_end="stop")
    while stream.has_more():
        tokens_T, labels_T, positions_T = step_rows(stream).flatten(1)
        is_real = positions_T >= 0
        for token, label in zip(tokens_T[is_real].tolist(), labels_T[is_real].tolist(), strict=True):
            assert label == labels[token]
            seen.add(token)
    kept = (document if packing == "stream" else document[:16] for document in source.documents)
    assert seen == {token for document in kept for token in document}
    assert stream.counts["documents"] == sum(length > 0 for length in LENGTHS)  # a masked end is no more ends


def test_masks_survive_ranks_workers_and_resumes_in_the_middle_of_documents() -> None:
    source = MaskedSource(numbered(LENGTHS))
    straight, state = make_stream(source, buffer=5), None
    for num_ranks, workers in ((2, 0), (8, 1), (1, 2), (4, 0)):
        streams = ranks(num_ranks, source, buffer=5, workers=workers)
        if state:
            load(streams, state)
        for _ in range(3):
            assert torch.equal(global_rows(streams), step_rows(straight))
        state = gathered(streams)
        assert equal(state, straight.state_dict())
        for stream in streams:
            stream.close()


def test_a_mask_of_ones_changes_nothing() -> None:
    class Ones(MaskedSource):
        def mask(self, i: int) -> np.ndarray:
            return np.ones(len(self.documents[i]), bool)

    documents = numbered(LENGTHS)
    plain, masked = (make_stream(kind(documents), buffer=3) for kind in (ListSource, Ones))
    for _ in range(10):
        assert torch.equal(step_rows(plain), step_rows(masked))


def test_a_batch_of_documents_goes_through_a_pipe_as_it_is() -> None:
    random = np.random.default_rng(0)
    lengths = [5, 1, 300, 2, 7]
    ids = [random.integers(0, 2**32, n).astype(np.uint32) for n in lengths]
    ids.insert(2, NO_IDS)
    ids.append(NO_IDS)
    masks = {i: random.random(len(ids[i])) < 0.5 for i in (1, 4)}
    batch = TokenBatch(ids, masks, {2: None, 6: BadDocument("empty", "here", "no token")})
    copy = pickle.loads(pickle.dumps(batch))
    assert type(copy) is TokenBatch and len(copy) == 7
    assert copy[2] is None and str(copy[6]) == "here: empty: no token"
    assert [one.mask is not None for one in batch if isinstance(one, Tokens)] == [
        False,
        True,
        False,
        True,
        False,
    ]
    for one, other in zip(batch, copy, strict=True):
        if isinstance(one, Tokens):
            assert np.array_equal(one.ids, other.ids) and other.ids.dtype == np.uint32
            assert (one.mask is None and other.mask is None) or np.array_equal(one.mask, other.mask)
    unmasked = TokenBatch(ids, others=batch.others)
    num_ids, num_masked = 4 * sum(lengths), sum(map(len, masks.values()))
    assert len(pickle.dumps(unmasked)) < num_ids + 300  # nothing is sent for masks that are not there
    assert num_masked < len(pickle.dumps(batch)) - len(pickle.dumps(unmasked)) < num_masked + 300


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(4, bool), r"list:0: the mask has shape \(4,\) and dtype bool; a bool for each of the 5"),
        (np.ones(5), r"list:0: the mask has shape \(5,\) and dtype float64; a bool for each of the 5"),
    ],
)
def test_a_mask_that_does_not_fit_its_tokens_ends_the_stream(mask: np.ndarray, message: str) -> None:
    class Wrong(ListSource):
        masks = True

        def __getitem__(self, i: int) -> Document:
            return super().__getitem__(i)._replace(mask=mask)

    with pytest.raises(DataError, match=message):
        step_rows(make_stream(Wrong([[1] * 5])))


def test_a_mask_of_text_is_refused() -> None:
    class Text(TextListSource):
        masks = True

        def __getitem__(self, i: int) -> Document:
            return super().__getitem__(i)._replace(mask=np.ones(4, bool))

    with pytest.raises(DataError, match="list:0: a mask needs tokens, and the document is text"):
        step_rows(make_stream(Text(["text"])))


# ---- Counts of a step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["stream", "fit"])
def test_a_step_counts_its_tokens_that_are_no_padding(packing: str) -> None:
    stream, total = make_stream(ragged_sources(), packing=packing, at_end="stop", buffer=2), 0
    assert stream.step_tokens == 0
    paddings = set[int]()
    while stream.has_more():
        positions = step_rows(stream)[2]
        assert stream.step_tokens == int((positions >= 0).sum())
        paddings.add(positions.numel() - stream.step_tokens)
        total += stream.step_tokens
    assert total == stream.counts["tokens"] and len(paddings) > 1
    step_rows(stream)
    assert stream.step_tokens == 0  # padding only


def test_a_step_that_cannot_be_read_counts_no_token() -> None:
    stream = make_stream(ListSource([[1, 2, 3]] * 30 + [[]]), on_bad="fatal", shuffle=False, num_streams=1)
    stream.set(seq_len=16, global_batch=4, mixture=None, buffer=0)
    step_rows(stream)
    assert stream.step_tokens == 64
    with pytest.raises(BadDocument):
        step_rows(stream)
    assert stream.step_tokens == 0


# ---- Snapshots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("buffer", "packing"), [(0, "stream"), (5, "stream"), (0, "fit")])
def test_a_snapshot_is_of_its_moment_whatever_the_stream_does_since(buffer: int, packing: str) -> None:
    """Its state is the one that was taken at once, also after the stream has read on or has failed."""
    stream = make_stream(ragged_sources(), buffer=buffer, packing=packing)
    for step in range(12):
        settings(stream, buffer=buffer, mixture={"a": 1.0, "b": 1.0 + step}, phase=step)
        snapshot, state = stream.snapshot(), stream.state_dict()
        rows = step_rows(stream)
        assert equal(snapshot.state_dict(), state) and not equal(stream.state_dict(), state)
        again = make_stream(ragged_sources(), buffer=buffer, packing=packing)
        settings(again, buffer=buffer, mixture={"a": 1.0, "b": 1.0 + step}, phase=step)
        again.load_state_dict(snapshot.state_dict(), keep_counts=True)
        assert torch.equal(step_rows(again), rows)


def test_a_snapshot_from_before_a_step_that_failed_is_whole() -> None:
    documents = [[n] * 7 for n in range(1, 41)]
    stream = make_stream(ListSource([*documents, []]), on_bad="fatal", shuffle=False, buffer=2, num_streams=2)
    with pytest.raises(BadDocument):
        for _ in range(100):
            snapshot, state = stream.snapshot(), stream.state_dict()
            step_rows(stream)
    assert equal(snapshot.state_dict(), state) and not equal(stream.state_dict(), state)


def test_counts_of_the_state_keep_their_order() -> None:
    """Checkpoints of earlier versions hold them by place."""
    assert (
        "documents",
        "tokens",
        "open",
        "padding",
        "truncated",
        *data.BAD_KINDS[:6],
        "held_out",
        "not_drawn",
        "turns",
        "no_label",
    ) == data.COUNTED
