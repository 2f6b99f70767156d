"""Which source is the next document of a virtual stream from? Weights are shares of tokens.

    a document of length l from source s:  credit += weights * l;  credit[s] -= l

Sources are scheduled like periodic tasks. A credit is what a source is owed [tokens]. Its next document, of
length l, is due when half of it is owed, that is after (l / 2 - credit) / weight more tokens; the document
that is due first comes next. So delivered tokens lie around the share on both sides, whatever the lengths
are. (Choosing the largest credit would favour sources of long documents by half a document in each stream.)

Streams must not take turns in step with each other: a source that is wanted for the first time starts with a
random credit of half its first document more or less. A source that was never wanted has an infinite credit.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

START = 2  # what random bits are for: the last word of their counter, so that no two uses share any


class Credits:
    """Of one virtual stream."""

    def __init__(self, num_sources: int, *, seed: int, stream: int) -> None:
        bits_S = np.random.Philox(key=[seed, stream], counter=[0, 0, 0, START]).random_raw(num_sources)
        self.start_S = ((bits_S >> np.uint64(11)) * 2.0**-53 - 0.5).tolist()  # [documents] from -1/2 to 1/2
        self.credit_S = [math.inf] * num_sources

    def begin(self, weights_S: Sequence[float], *, next_length: Callable[[int], int]) -> None:
        """Of the sources that are wanted for the first time."""
        credit_S = self.credit_S
        if math.inf in credit_S:
            begun = [s for s, weight in enumerate(weights_S) if weight > 0 and credit_S[s] == math.inf]
            for s in begun:
                credit_S[s] = 0.0
            for s in begun:
                self.charge(s, self.start_S[s] * next_length(s), weights_S)

    def next_source(self, weights_S: Sequence[float], *, next_length: Callable[[int], int]) -> int:
        self.begin(weights_S, next_length=next_length)
        return self.due({s: next_length(s) for s, weight in enumerate(weights_S) if weight > 0}, weights_S)

    def due(
        self, length_S: Mapping[int, int], weights_S: Sequence[float], *, at_most: float = math.inf
    ) -> int:
        """Of some sources with weights, whose next documents have these lengths, of which no more than
        `at_most` counts.
        """
        credit_S, first, first_due = self.credit_S, -1, math.inf
        for s, length in length_S.items():
            due = ((length if length < at_most else at_most) / 2 - credit_S[s]) / weights_S[s]
            if due < first_due:
                first, first_due = s, due
        return first

    def charged_due(
        self, source: int, length: int, length_S: Mapping[int, int], weights_S: Sequence[float]
    ) -> int:
        """`charge`, then `due`, of all sources with weights in one pass."""
        credit_S, first, first_due = self.credit_S, -1, math.inf
        for s, next_length in length_S.items():
            weight = weights_S[s]
            credit = credit_S[s] + weight * length
            if s == source:
                credit -= length
            credit_S[s] = credit
            due = (next_length / 2 - credit) / weight
            if due < first_due:
                first, first_due = s, due
        return first

    def charge(self, source: int, length: float, weights_S: Sequence[float]) -> None:
        credit_S = self.credit_S
        for s, weight in enumerate(weights_S):
            credit_S[s] += weight * length
        credit_S[source] -= length
