"""What are the rows of a step? Pieces of documents one after another, then padding.

Letters: T tokens of the rows, N planes of a row, P pieces.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from trainer.data.batches import Run

IGNORED = -100  # the label that cross entropy leaves out
PADDING = -1  # the position of a token that is not there: nothing attends to it, no expert gets it
# a token that is not there, in each plane: tokens, labels, positions, sources
BLANK = (0, IGNORED, PADDING, 0)
LONG_PIECE = 150  # [tokens] from here on positions are copied faster than they are counted (measured)


@lru_cache(maxsize=8)
def up_to(length: int) -> np.ndarray:
    return np.arange(length)


@dataclass(slots=True)
class Pieces:
    """Columns with an entry for each piece of a document, in the order of the rows; a piece ends with its
    document, unless it is one of `cuts`.
    """

    # uint32, one after another the tokens of all pieces: an entry may hold those of many
    ids: list[memoryview | np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # [tokens]
    sources: list[int] = field(default_factory=list)  # shorter than the others: all are of source 0
    # of pieces that are cut: where they end, and the token behind
    cuts: list[tuple[int, int]] = field(default_factory=list)
    # of documents with a mask: where they start, and which of the labels from there on are targets
    masks: list[tuple[int, np.ndarray]] = field(default_factory=list)
    blanks: list[tuple[int, int]] = field(default_factory=list)  # where padding starts and ends
    filled: int = 0  # [tokens]

    def add(self, ids: memoryview, mask: np.ndarray | None, *, room: int) -> int:
        """A piece of a document of which this is left: to its end or that of the row. Returns its length."""
        length = len(ids)
        if length > room:
            self.cuts.append((self.filled + room, ids[room]))
            ids, length = ids[:room], room
        if mask is not None:
            self.masks.append((self.filled, mask[1 : length + 1]))
        self.ids.append(ids)
        self.lengths.append(length)
        self.filled += length
        return length

    def add_run(self, run: Run, *, end: int, seq_len: int) -> int:
        """Documents one after another, cut where a row ends, and at `end`. Returns how many tokens of the
        last one were not read.
        """
        batch, i, stop, _ = run
        ids, starts, lengths = batch.ids, batch.starts, batch.lengths
        here, last = starts[i], min(starts[stop], starts[i] + end - self.filled)
        offset = self.filled - here
        self.ids.append(ids[here:last])
        masks = {d: mask for d, mask in batch.masks.items() if i <= d < stop}
        self.masks += [(starts[d] + offset, mask[1 : last - starts[d] + 1]) for d, mask in masks.items()]
        until = here + seq_len - self.filled % seq_len  # where the row ends
        while here < last:
            whole = bisect_right(starts, min(until, last), i + 1, stop + 1) - 1
            if whole > i:
                self.lengths.append(starts[i + 1] - here)
                self.lengths += lengths[i + 1 : whole]
                here, i = starts[whole], whole
            cut = min(until, last)
            if here < cut and i < stop:
                self.lengths.append(cut - here)
                self.cuts.append((cut + offset, ids[cut]))
                here = cut
            until += seq_len
        self.filled = last + offset
        return starts[stop] - last

    def pad(self, length: int) -> None:
        if length:
            self.blanks.append((self.filled, self.filled + length))
            self.ids.append(np.zeros(length, np.uint32))
            self.lengths.append(length)
            self.sources.append(0)
            self.filled += length


def write(
    pieces: Pieces, *, document_mask: bool, seq_len: int, with_sources: bool = False
) -> tuple[list[np.ndarray], int]:
    """The planes of the rows, and how many labels masks take away."""
    ids_T = np.frombuffer(b"".join(pieces.ids), np.uint32)  # a third of the time of np.concatenate
    lengths_P = np.array(pieces.lengths, np.int64)
    ends_P = lengths_P.cumsum()
    tokens_T, labels_T = ids_T.astype(np.int64), np.empty(len(ids_T), np.int64)
    labels_T[:-1] = ids_T[1:]
    labels_T[ends_P - 1] = IGNORED
    for end, token in pieces.cuts:
        labels_T[end - 1] = token
    withheld = 0
    for start, is_target in pieces.masks:
        labels = labels_T[start : start + len(is_target)]
        withheld += int(np.count_nonzero(labels[~is_target] != IGNORED))
        labels[~is_target] = IGNORED
    runs_P = lengths_P if document_mask else np.full(len(ids_T) // seq_len, seq_len)
    planes = [tokens_T, labels_T, positions(runs_P)]
    if with_sources:
        planes.append(
            np.repeat(pieces.sources, lengths_P) if any(pieces.sources) else np.zeros_like(labels_T)
        )
    for start, end in pieces.blanks:
        for plane_T, blank in zip(planes, BLANK, strict=False):
            plane_T[start:end] = blank
    return planes, withheld


def positions(lengths_P: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... in each piece."""
    ends_P = lengths_P.cumsum()
    index_T = up_to(int(ends_P[-1]))
    if len(index_T) > LONG_PIECE * len(lengths_P):
        index = memoryview(index_T)
        return np.frombuffer(bytearray().join([index[:length] for length in lengths_P.tolist()]), np.int64)
    starts_T = np.repeat(ends_P - lengths_P, lengths_P)
    return np.subtract(index_T, starts_T, out=starts_T)
