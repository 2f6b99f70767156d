"""Which open document is read on next? The Random Sequential Document Buffer (arXiv:2602.17004, section 3.2),
of one source in one stream.

Each open document has a read head. A piece of a row is read from one of them, drawn uniformly, until the
document ends or the row is full; then another is drawn. When `size` or fewer are open, the buffer is refilled
to twice as many. A finished document leaves an empty slot, which draws pass over until the slots are closed
up: removal costs nothing, and slots stay in the order of age. With size 0 the oldest document is read to its
end: documents one after another.

The k-th random draw is a pure function of (seed, stream, source, k). The counter advances only when a draw
is consumed, so peeking at the next piece is free. `size` may change between any two pieces: a buffer that is
too full drains by itself.
"""

from itertools import compress

import numpy as np

from trainer.data.sources import Tokens

BLOCK = 256  # draws made at once
DRAWS = 1  # what random bits are for, see mixture.START
EMPTY = -1  # in place of a number: a slot without a document


class DocumentBuffer:
    """Slots of open documents, oldest first, as columns of equal length: plain lists are quick to copy.

    numbers: of the document in its source, or EMPTY. read [tokens]: how much of it was delivered. tokens:
    all of it; None after a resume, until the document is read on.
    """

    def __init__(self, *, seed: int, stream: int, source: int = 0) -> None:
        self.key, self.source, self.block = [seed, stream], source, -1
        self.restore([], [], draws=0)

    def restore(self, numbers: list[int], read: list[int], *, draws: int) -> None:
        self.numbers, self.read, self.draws = numbers, read, draws
        self.tokens: list[Tokens | None] = [None] * len(numbers)
        self.num_open = len(numbers) - numbers.count(EMPTY)

    def room(self, size: int) -> int:
        """How many documents to open now."""
        return max(1, 2 * size) - self.num_open if self.num_open <= size else 0

    def add(self, number: int, tokens: Tokens) -> None:
        self.numbers.append(number)
        self.read.append(0)
        self.tokens.append(tokens)
        self.num_open += 1

    def look(self, size: int) -> tuple[int, int]:
        """The slot to read on from, and the count of draws after it was used."""
        if not size:
            if self.numbers[0] == EMPTY:
                self.drop_front()
            return 0, self.draws
        if 2 * self.num_open <= len(self.numbers):
            self.close_up()
        draws, num_slots = self.draws, len(self.numbers)
        slot = self.draw(draws, num_slots)
        while self.numbers[slot] == EMPTY:
            draws += 1
            slot = self.draw(draws, num_slots)
        return slot, draws + 1

    def finish(self, slot: int) -> None:
        self.numbers[slot], self.read[slot], self.tokens[slot] = EMPTY, 0, None
        self.num_open -= 1

    def close_up(self) -> None:
        """Takes the empty slots out."""
        if not self.num_open:
            self.numbers, self.read, self.tokens = [], [], []
        elif self.num_open < len(self.numbers):
            is_open = [number != EMPTY for number in self.numbers]
            self.numbers = list(compress(self.numbers, is_open))
            self.read = list(compress(self.read, is_open))
            self.tokens = list(compress(self.tokens, is_open))

    def drop_front(self) -> None:
        """Takes the empty slots before the oldest open document out."""
        first = next(slot for slot, number in enumerate(self.numbers) if number != EMPTY)
        del self.numbers[:first], self.read[:first], self.tokens[:first]

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
