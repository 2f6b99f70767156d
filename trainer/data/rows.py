"""What are the rows of a step? Pieces of documents one after another, then padding.

Letters: T tokens of the rows, N planes of a row.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

IGNORED = -100  # the label that cross entropy leaves out
PADDING = -1  # the position of a token that is not there: nothing attends to it, no expert gets it
TOKENS, LABELS, POSITIONS, SOURCES = range(4)  # the N planes of rows
BLANK_N1 = np.array([[0], [IGNORED], [PADDING], [0]])  # a token that is not there, in each plane


@lru_cache(maxsize=8)
def up_to(length: int) -> np.ndarray:
    return np.arange(length)


class Pieces(NamedTuple):
    """Columns with an entry for each piece of a document; `masks` has one for each piece that has a mask."""

    ids: list[np.ndarray]
    positions: list[np.ndarray]
    ends: list[int]  # [tokens] of all pieces up to the end of this one
    targets: list[int]  # the token behind the piece; IGNORED where the document ends
    sources: list[int]
    masks: list[
        tuple[int, np.ndarray]
    ]  # where the piece starts; which of the labels from there on are targets


class Written(NamedTuple):
    tokens: int  # that are no padding
    withheld: int  # labels that a mask takes away


def write(pieces: Pieces, rows_NT: np.ndarray, *, document_mask: bool, seq_len: int) -> Written:
    """Fills the rows in place."""
    filled = pieces.ends[-1] if pieces.ends else 0
    num_planes = len(rows_NT)
    if filled < rows_NT.shape[1]:
        rows_NT[:, filled:] = BLANK_N1[:num_planes]
    if not filled:
        return Written(0, 0)
    rows_NT = rows_NT[:, :filled]
    tokens_T, labels_T = rows_NT[TOKENS], rows_NT[LABELS]
    np.concatenate(pieces.ids, out=tokens_T)
    labels_T[:-1] = tokens_T[1:]
    labels_T[np.array(pieces.ends) - 1] = pieces.targets
    withheld = 0
    for start, is_target in pieces.masks:
        labels = labels_T[start : start + len(is_target)]
        withheld += np.count_nonzero(labels[~is_target] != IGNORED)
        labels[~is_target] = IGNORED
    if document_mask:
        np.concatenate(pieces.positions, out=rows_NT[POSITIONS])
    else:
        rows_NT[POSITIONS] = np.arange(filled) % seq_len
    if num_planes > SOURCES:
        rows_NT[SOURCES] = np.repeat(pieces.sources, np.diff(pieces.ends, prepend=0))
    return Written(filled, withheld)
