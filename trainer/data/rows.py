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
TOKENS, LABELS, POSITIONS, SOURCES = range(4)  # the N planes of rows
BLANK_N1 = np.array([[0], [IGNORED], [PADDING], [0]])  # a token that is not there, in each plane
LONG_PIECE = 700  # [tokens] from here on positions are copied faster than they are counted (measured)


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


def write(pieces: Pieces, rows_NT: np.ndarray, *, document_mask: bool, seq_len: int) -> int:
    """Fills the rows in place. Returns how many labels masks take away."""
    num_planes = len(rows_NT)
    tokens_T, labels_T, positions_T = rows_NT[: POSITIONS + 1]
    ids_T = np.frombuffer(b"".join(pieces.ids), np.uint32)  # a third of the time of np.concatenate
    lengths_P = np.array(pieces.lengths)
    ends_P = lengths_P.cumsum()
    tokens_T[:] = ids_T
    labels_T[:-1] = ids_T[1:]
    labels_T[ends_P - 1] = IGNORED
    for end, token in pieces.cuts:
        labels_T[end - 1] = token
    withheld = 0
    for start, is_target in pieces.masks:
        labels = labels_T[start : start + len(is_target)]
        withheld += int(np.count_nonzero(labels[~is_target] != IGNORED))
        labels[~is_target] = IGNORED
    if document_mask:
        count(lengths_P, ends_P, positions_T, seq_len=seq_len)
    else:
        positions_T.reshape(-1, seq_len)[:] = up_to(seq_len)
    if num_planes > SOURCES:
        rows_NT[SOURCES] = np.repeat(pieces.sources, lengths_P) if any(pieces.sources) else 0
    for start, end in pieces.blanks:
        rows_NT[:, start:end] = BLANK_N1[:num_planes]
    return withheld


def count(lengths_P: np.ndarray, ends_P: np.ndarray, positions_T: np.ndarray, *, seq_len: int) -> None:
    """0, 1, 2, ... in each piece."""
    if len(positions_T) > LONG_PIECE * len(lengths_P):
        index = up_to(max(seq_len, int(lengths_P.max())))
        np.concatenate([index[:length] for length in lengths_P.tolist()], out=positions_T)
    else:
        np.subtract(up_to(len(positions_T)), np.repeat(ends_P - lengths_P, lengths_P), out=positions_T)
