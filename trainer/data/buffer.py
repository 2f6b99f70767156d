"""Which open document is read on next? The Random Sequential Document Buffer (arXiv:2602.17004, section 3.2),
of one source in one stream.

Each open document has a read head. A piece of a row is read from one of them, drawn uniformly, until the
document ends or the row is full; then another is drawn. When `size` or fewer are open, the buffer is refilled
to twice as many. A finished document leaves an empty slot, which draws pass over until the slots are closed
up: removal costs nothing, and slots stay in the order of age. With size 0 the oldest document is read to its
end: documents one after another.

Draws are counted, and number k is a function of (seed, stream, source, k). A draw counts once it is used: to
look where the next piece would come from changes nothing. `size` may change between any two pieces: a buffer
that is too full drains by itself.
"""

from dataclasses import dataclass

import numpy as np

BLOCK = 256  # draws made at once
DRAWS = 1  # what random bits are for, see mixture.START


@dataclass(slots=True, eq=False)
class OpenDocument:
    source: int
    n: int  # its number in the source
    read: int  # [tokens] delivered
    tokens: np.ndarray | None  # uint32; None after a resume, until it is read on


class DocumentBuffer:
    """Open documents, oldest first; None: an empty slot."""

    def __init__(self, *, seed: int, stream: int, source: int = 0) -> None:
        self.key, self.source, self.block = [seed, stream], source, -1
        self.restore([], draws=0)

    def restore(self, slots: list[OpenDocument | None], *, draws: int) -> None:
        self.slots, self.draws = slots, draws
        self.num_open = len(slots) - slots.count(None)

    def room(self, size: int) -> int:
        """How many documents to open now."""
        return max(1, 2 * size) - self.num_open if self.num_open <= size else 0

    def add(self, document: OpenDocument) -> None:
        self.slots.append(document)
        self.num_open += 1

    def look(self, size: int) -> tuple[int, int]:
        """The slot to read on from, and the count of draws after it was used."""
        if not size:
            while self.slots[0] is None:
                del self.slots[0]
            return 0, self.draws
        if 2 * self.num_open <= len(self.slots):
            self.close_up()
        slots, draws = self.slots, self.draws
        while slots[slot := self.draw(draws, len(slots))] is None:
            draws += 1
        return slot, draws + 1

    def finish(self, slot: int) -> None:
        self.slots[slot] = None
        self.num_open -= 1

    def close_up(self) -> None:
        self.slots = [document for document in self.slots if document is not None]

    def draw(self, k: int, n: int) -> int:
        """Number k, uniform below n, from raw bits: numpy promises to keep those. (Off by n / 2 ** 32 at
        most.)
        """
        if k // BLOCK != self.block:
            self.block = k // BLOCK
            counter = [self.block * BLOCK // 4, self.source, 0, DRAWS]  # a count is 4 words
            bits = np.random.Philox(key=self.key, counter=counter).random_raw(BLOCK)
            self.bits = (bits >> np.uint64(32)).tolist()
        return self.bits[k % BLOCK] * n >> 32
