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

from bisect import bisect_right
from itertools import accumulate, compress

import numpy as np

from trainer.data.rows import Pieces
from trainer.data.sources import Tokens

BLOCK = 1024  # draws made at once
DRAWS = 1  # what random bits are for, see mixture.START
EMPTY = -1  # in place of a number: a slot without a document
UNKNOWN = -1  # in place of a rest: the document was not read since a resume


class DocumentBuffer:
    """Slots of open documents, oldest first, as columns of equal length: plain lists are quick to copy.

    numbers: of the document in its source, or EMPTY. read [tokens]: how much of it was delivered. tokens:
    all of it; None after a resume, until the document is read on. rest [tokens]: what is still to be
    delivered; 0 in an empty slot.
    """

    def __init__(self, *, seed: int, stream: int, source: int = 0) -> None:
        self.key, self.source, self.block = [seed, stream], source, -1
        self.restore([], [], draws=0)

    def restore(self, numbers: list[int], read: list[int], *, draws: int) -> None:
        self.numbers, self.read, self.draws = numbers, read, draws
        self.tokens: list[Tokens | None] = [None] * len(numbers)
        self.rest = [0 if number == EMPTY else UNKNOWN for number in numbers]
        self.num_open = len(numbers) - numbers.count(EMPTY)
        # are the documents those of one refill, of which only the first can be read in part or to its end?
        self.in_order = False

    def room(self, size: int) -> int:
        """How many documents to open now."""
        return max(1, 2 * size) - self.num_open if self.num_open <= size else 0

    def add(self, number: int, tokens: Tokens | None) -> None:
        self.extend([number], [tokens], [UNKNOWN if tokens is None else len(tokens.ids)])

    def extend(self, numbers: list[int], tokens: list[Tokens | None], lengths: list[int]) -> None:
        self.numbers += numbers
        self.read += [0] * len(numbers)
        self.tokens += tokens
        self.rest += lengths
        self.num_open += len(numbers)

    # -- the next piece --

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

    def read_on(self, slot: int, pieces: Pieces, *, until: int) -> None:
        """One piece of the document in a slot, to its end or the row's (`until`)."""
        tokens, rest, read = self.tokens[slot], self.rest[slot], self.read[slot]
        length = min(rest, until - pieces.filled)
        after = read + length
        if tokens.mask is not None:
            pieces.masks.append((pieces.filled, tokens.mask[read + 1 : after + 1]))
        pieces.ids.append(tokens.ids[read:after] if read or length < rest else tokens.ids)
        pieces.lengths.append(length)
        pieces.filled += length
        if length == rest:
            self.finish(slot)
        else:
            pieces.cuts.append((pieces.filled, int(tokens.ids[after])))
            self.read[slot], self.rest[slot] = after, rest - length

    def read_whole(self, pieces: Pieces, size: int, *, until: int) -> int:
        """Documents that were never read on and fit in the row. Returns how many; 0: `look` has the next."""
        if size:
            return self.read_drawn(pieces, until=until, at_least=size)
        return self.read_in_order(pieces, until=until) if self.in_order else 0

    def read_in_order(self, pieces: Pieces, *, until: int) -> int:
        """Whole documents, from the oldest on, as many as fit in the row. Returns how many."""
        if self.numbers[0] == EMPTY:
            self.drop(1)
        if self.read[0]:
            return 0
        ends = list(accumulate(self.rest, initial=pieces.filled))
        num = bisect_right(ends, until) - 1
        if num:
            pieces.ids += [tokens.ids for tokens in self.tokens[:num]]
            pieces.lengths += self.rest[:num]
            pieces.filled = ends[num]
            self.drop(num - 1)
            self.num_open -= num - 1
            self.finish(0)  # the empty slot stays, as where documents are read one by one
        return num

    def read_drawn(self, pieces: Pieces, *, until: int, at_least: int) -> int:
        """Whole documents, one draw after another, as many as fit in the row, while more than `at_least` are
        open. Returns how many. What was read in part is left to `look`, and so is what does not fit.
        """
        numbers, read, tokens, rest = self.numbers, self.read, self.tokens, self.rest
        num_slots, room, before = len(numbers), until - pieces.filled, self.num_open
        at_least = max(at_least, num_slots // 2)  # then slots are closed up
        self.draw(self.draws, num_slots)
        bits, first = self.bits, self.draws % BLOCK
        add_ids, add_length = pieces.ids.append, pieces.lengths.append
        num_open, used = before, first
        for i in range(first, BLOCK if before > at_least else first):
            slot = bits[i] * num_slots >> 32
            length = rest[slot]
            if not length:  # an empty slot
                continue
            if length > room or length < 0 or read[slot]:
                break
            add_ids(tokens[slot].ids)
            add_length(length)
            numbers[slot], tokens[slot], rest[slot] = EMPTY, None, 0
            room, num_open, used = room - length, num_open - 1, i + 1
            if num_open <= at_least:
                break
        pieces.filled, self.num_open = until - room, num_open
        self.draws += used - first
        return before - num_open

    def finish(self, slot: int) -> None:
        self.numbers[slot], self.read[slot], self.tokens[slot], self.rest[slot] = EMPTY, 0, None, 0
        self.num_open -= 1

    def close_up(self) -> None:
        """Takes the empty slots out."""
        if not self.num_open:
            self.numbers, self.read, self.tokens, self.rest = [], [], [], []
        elif self.num_open < len(self.numbers):
            is_open = [number != EMPTY for number in self.numbers]
            self.numbers = list(compress(self.numbers, is_open))
            self.read = list(compress(self.read, is_open))
            self.tokens = list(compress(self.tokens, is_open))
            self.rest = list(compress(self.rest, is_open))

    def drop_front(self) -> None:
        """Takes the empty slots before the oldest open document out."""
        self.drop(next(slot for slot, number in enumerate(self.numbers) if number != EMPTY))

    def drop(self, num: int) -> None:
        """Takes so many slots out, from the oldest on."""
        del self.numbers[:num], self.read[:num], self.tokens[:num], self.rest[:num]

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
