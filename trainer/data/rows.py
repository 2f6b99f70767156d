"""What are the rows of a step? Pieces of documents one after another, then padding.

Letters: T tokens of the rows, N planes of a row, P pieces.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from trainer.data.sources import Tokens

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

    ids: list[np.ndarray] = field(default_factory=list)  # contiguous, uint32
    lengths: list[int] = field(default_factory=list)  # [tokens]
    sources: list[int] = field(default_factory=list)  # shorter than the others: all are of source 0
    # of pieces that are cut: where they end, and the token behind
    cuts: list[tuple[int, int]] = field(default_factory=list)
    # of pieces with a mask: where they start, and which of the labels from there on are targets
    masks: list[tuple[int, np.ndarray]] = field(default_factory=list)
    blanks: list[tuple[int, int]] = field(default_factory=list)  # where padding starts and ends
    filled: int = 0  # [tokens]

    def add_cut(self, tokens: Tokens, source: int, *, at_most: int) -> None:
        """A document from its start on."""
        ids, mask = tokens
        length = min(len(ids), at_most)
        if mask is not None:
            self.masks.append((self.filled, mask[1 : length + 1]))
        self.ids.append(ids[:length])
        self.lengths.append(length)
        self.sources.append(source)
        self.filled += length
        if length < len(ids):
            self.cuts.append((self.filled, int(ids[length])))

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
    ends_P = np.array(pieces.lengths).cumsum()
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
        count(pieces.lengths, ends_P, positions_T, seq_len=seq_len)
    else:
        positions_T.reshape(-1, seq_len)[:] = up_to(seq_len)
    if num_planes > SOURCES:
        rows_NT[SOURCES] = np.repeat(pieces.sources, pieces.lengths) if any(pieces.sources) else 0
    for start, end in pieces.blanks:
        rows_NT[:, start:end] = BLANK_N1[:num_planes]
    return withheld


def count(lengths: list[int], ends_P: np.ndarray, positions_T: np.ndarray, *, seq_len: int) -> None:
    """0, 1, 2, ... in each piece."""
    if len(positions_T) > LONG_PIECE * len(lengths):
        index = up_to(max(seq_len, *lengths))
        np.concatenate([index[:length] for length in lengths], out=positions_T)
        return
    positions_T.fill(1)
    positions_T[0] = 0
    positions_T[ends_P[:-1]] -= np.array(lengths[:-1], np.int64)
    positions_T.cumsum(out=positions_T)
