"""How do the documents of a task lie in memory, and how do they go through a pipe?

    ids: document 0 | document 1 | ...     one array: neighbours are one slice, and nothing is kept of each

A document that is open keeps its batch in memory (intake.TASK_TOKENS).
"""

import math
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from trainer.data.sources import BadDocument, Tokens

NO_IDS = np.empty(0, np.uint32)


class TokenBatch:
    """D documents; of those without tokens, `others` says what stands in their place: None is behind the end
    of the source.

    ids: uint32; slices of a memoryview cost less than those of an array. lengths, starts: [tokens] of each
    document and before each; starts has one more: all tokens.
    masks: of the documents that have one.
    """

    def __init__(
        self,
        ids_D: Sequence[np.ndarray],
        masks: Mapping[int, np.ndarray] | None = None,
        others: Mapping[int, BadDocument | None] | None = None,
    ) -> None:
        self.lengths = array("q", map(len, ids_D))  # a list's numbers would lie all over the memory
        self.starts = array("q", accumulate(self.lengths, initial=0))
        self.ids = memoryview(ids_D[0]) if len(ids_D) == 1 else memoryview(b"".join(ids_D)).cast("I")
        self.masks, self.others = dict(masks or {}), dict(sorted((others or {}).items()))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Tokens | BadDocument | None:
        if not self.lengths[i]:
            return self.others[i]
        ids, mask = self.tokens(i)
        return Tokens(np.asarray(ids), mask)

    def tokens(self, i: int) -> tuple[memoryview, np.ndarray | None]:
        """A document's ids and its mask."""
        return self.ids[self.starts[i] : self.starts[i + 1]], self.masks.get(i)

    def usable_until(self, first: int, stop: int, *, num_tokens: float = math.inf) -> int:
        """Where the documents from `first` on end that have so many tokens, or are all before `stop`, or
        before one that has none.
        """
        if self.others:
            stop = min(stop, next((i for i in self.others if i >= first), stop))
        if num_tokens == math.inf:
            return stop
        return min(stop, bisect_left(self.starts, self.starts[first] + num_tokens, first + 1, stop))

    def __reduce__(self) -> tuple:
        """One array of each kind: one by one, documents cost more than tokenising them."""
        masks = {i: mask.tobytes() for i, mask in self.masks.items()}
        return unpickled, (self.ids.tobytes(), self.lengths, masks, self.others)


def unpickled(
    ids: bytes, lengths: array, masks: dict[int, bytes], others: dict[int, BadDocument | None]
) -> TokenBatch:
    batch = TokenBatch(())
    batch.ids, batch.lengths = memoryview(ids).cast("I"), lengths
    batch.starts = array("q", accumulate(lengths, initial=0))
    batch.masks = {i: np.frombuffer(mask, bool) for i, mask in masks.items()}
    batch.others = others
    return batch


class Run(NamedTuple):
    """Documents first to stop - 1 of a batch, and their numbers in the source."""

    batch: TokenBatch
    first: int
    stop: int
    numbers: range

    @property
    def num_tokens(self) -> int:
        return self.batch.starts[self.stop] - self.batch.starts[self.first]
