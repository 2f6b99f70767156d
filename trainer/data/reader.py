"""What are the tokens of a source's document n, and which documents are passed over?

A source's documents are numbered 0, 1, 2, ... over the whole run: document n is document n % N of epoch n //
N, in that epoch's own permutation. What a number stands for needs no state, so any process can read any
document. (A stream on the hub is read by one thread, forward.)
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np

from trainer.data.lengths import LengthBias
from trainer.data.sources import Document, Source, permutation

REMEDIES = {
    PermissionError: "make it readable for this user",
    FileNotFoundError: "bring the file back",
}
FOREIGN = "resume with the corpus and the tokenizer of the checkpoint"


Result = TypeVar("Result")


class DataError(ValueError):
    """The stream cannot go on; the message says where and why."""


class Reader:
    """The documents of one source. `key`: what the source is called in the configuration.

    bias: which documents are drawn by their length; None: all.
    epochs: after how many it is at its end, unless it repeats.
    retries: how often a read that the operating system or the network refuses is tried again, after 1, 2, 4,
    ... times wait_s.
    """

    def __init__(
        self,
        source: Source,
        *,
        key: str,
        seed: int,
        shuffle: bool,
        num_streams: int,
        repeat: bool = True,
        epochs: int = 1,
        bias: LengthBias | None = None,
        retries: int = 4,
        wait_s: float = 1.0,
    ) -> None:
        self.num_documents = len(source) if isinstance(source, Sized) else None
        if self.num_documents == 0:
            raise ValueError(f"the corpus holds no document; check {key}")
        self.source, self.key, self.shuffle, self.repeat = source, key, shuffle, repeat
        self.epochs = epochs
        self.seed, self.bias = seed, bias
        self.masks = bool(getattr(source, "masks", False))
        self.needs_labels = bool(getattr(source, "needs_labels", False))
        self.has_ready = hasattr(source, "ready")
        self.num_streams, self.retries, self.wait_s = num_streams, retries, wait_s
        self.order = lru_cache(maxsize=2)(lambda epoch: permutation(len(source), seed=seed, epoch=epoch))
        self.due: dict[int, int] = {}  # of a forward source: the document that each stream reads next
        self.unread = set[int]()  # and those that were open before a resume

    # -- numbers --

    def place(self, n: int) -> int:
        """Where in the corpus document n is."""
        if self.num_documents is None:
            return n
        epoch, position = divmod(n, self.num_documents)
        return int(self.order(epoch)[position]) if self.shuffle else position

    def places(self, numbers: range) -> list[int]:
        """Of documents of one stream."""
        if self.num_documents is None:
            return list(numbers)
        epoch, first = divmod(numbers[0], self.num_documents)
        start = numbers[0] - first
        if not self.shuffle or numbers[-1] >= start + self.num_documents:
            return list(map(self.place, numbers))
        return self.order(epoch)[first : numbers.stop - start : numbers.step].tolist()

    def epoch(self, n: int) -> int:
        num_documents = self.size
        return n // num_documents if num_documents else 0

    def is_over(self, n: int) -> bool:
        """Is document n behind the end?"""
        return n >= self.end

    @property
    def end(self) -> int:
        """The number behind the last document, as far as that is known."""
        return sys.maxsize if self.repeat or self.size is None else self.size * self.epochs

    @property
    def size(self) -> int | None:
        """N; of a forward source None until its end was seen."""
        return self.num_documents if self.num_documents is not None else self.source.num_rows

    @property
    def patience(self) -> int:
        """Documents in a row of one stream that may be passed over: an epoch, and more of it where the corpus
        is tiny or few are drawn.
        """
        return round((1000 + (self.num_documents or 100_000)) / (self.bias.least if self.bias else 1))

    def draws(self, n: int, length: float) -> bool:
        """Is document n, of so many tokens, one that its length draws?"""
        return self.bias is None or self.bias.draws(length, seed=self.seed, source=self.key, number=n)

    # -- documents --

    def read(self, i: int) -> Document | None:
        """The document at place i; None: it is behind the end. Raises: BadDocument, DataError."""
        read = self.read_forward if self.num_documents is None else self.source.__getitem__
        return self.tried(partial(read, i), first=i)

    def ready(self, places: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """See sources.Source. Raises: DataError."""
        return self.tried(partial(self.source.ready, places), first=places[0])

    def tried(self, read: Callable[[], Result], *, first: int) -> Result:
        for attempt in range(self.retries + 1):
            try:
                return read()
            except OSError as error:
                if attempt == self.retries:
                    raise self.unreadable(first, error) from error
                time.sleep(self.wait_s * 2**attempt)
        raise AssertionError

    def unreadable(self, i: int, error: OSError) -> DataError:
        waited_s = self.wait_s * (2**self.retries - 1)
        tried = f"{self.key}: document {i} cannot be read, tried {self.retries + 1} times in {waited_s:g} s"
        remedy = next((text for kind, text in REMEDIES.items() if isinstance(error, kind)), "")
        return DataError(f"{tried}: {type(error).__name__}: {error}{remedy and '; '}{remedy}")

    def read_forward(self, n: int) -> Document | None:
        try:
            document = self.source[n]
        finally:  # a bad one was read too
            self.unread.discard(n)
            self.due[n % self.num_streams] = max(n + self.num_streams, self.due.get(n % self.num_streams, 0))
        return None if self.is_over(n) else document

    def seek(self, due: Mapping[int, int], unread: set[int]) -> None:
        """Tells a source that only reads forward where to begin, and what to keep of what it passes.

        due: the document that each stream reads next. unread: those that were open before a resume.
        """
        self.due, self.unread = dict(due), unread
        self.source.seek(min(unread | set(due.values())), wanted=self.wants)

    def wants(self, n: int) -> bool:
        return n in self.unread or n >= self.due.get(n % self.num_streams, math.inf)

    def foreign(self, what: object) -> DataError:
        return DataError(f"{what}; {FOREIGN}")

    def where(self, n: int) -> str:
        return self.source[self.place(n)].where if self.num_documents else f"{self.key}:{n + 1}"
