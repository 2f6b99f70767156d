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

from collections.abc import Callable
from itertools import compress

import numpy as np

from trainer.data.batches import Run, TokenBatch
from trainer.data.rows import Pieces

BLOCK = 1024  # draws made at once
DRAWS = 1  # what random bits are for, see mixture.START
EMPTY = -1  # in place of a number: a slot without a document
UNKNOWN = -1  # in place of a rest: the document was not read since a resume


class DocumentBuffer:
    """Slots of open documents, oldest first, as columns of equal length: plain lists are quick to copy.

    numbers: of the document in its source, or EMPTY. read [tokens]: how much of it was delivered. rest
    [tokens]: what is still to be delivered; 0 in an empty slot. batches, places: where its tokens are; None
    after a resume, until the document is read on.

    reread: fetches the tokens of a document that was open before a resume, by its number.
    """

    def __init__(
        self,
        *,
        seed: int,
        stream: int,
        source: int = 0,
        reread: Callable[[int, int], TokenBatch] | None = None,
    ) -> None:
        self.key, self.source, self.block, self.reread = [seed, stream], source, -1, reread
        self.restore([], [], draws=0)

    def restore(self, numbers: list[int], read: list[int], *, draws: int) -> None:
        self.numbers, self.read, self.draws = numbers, read, draws
        self.batches: list[TokenBatch | None] = [None] * len(numbers)
        self.places = [0] * len(numbers)
        self.rest = [0 if number == EMPTY else UNKNOWN for number in numbers]
        self.num_open = len(numbers) - numbers.count(EMPTY)

    def room(self, size: int) -> int:
        """How many documents to open now."""
        return max(1, 2 * size) - self.num_open if self.num_open <= size else 0

    def extend(self, run: Run) -> None:
        num = run.stop - run.first
        self.numbers += run.numbers
        self.read += [0] * num
        self.rest += run.batch.lengths[run.first : run.stop]
        self.batches += [run.batch] * num
        self.places += range(run.first, run.stop)
        self.num_open += num

    def hold(self, number: int, batch: TokenBatch, place: int, *, read: int, rest: int) -> None:
        """One document in place of all slots; if nothing of it is left, an empty slot."""
        self.num_open = 1 if rest else 0
        if rest:
            self.numbers, self.read, self.rest = [number], [read], [rest]
            self.batches, self.places = [batch], [place]
        elif self.numbers != [EMPTY]:
            self.numbers, self.read, self.rest = [EMPTY], [0], [0]
            self.batches, self.places = [None], [0]

    # -- the next piece --

    def look(self, size: int) -> tuple[int, int]:
        """The slot to read on from, and the count of draws after it was used."""
        draws, slot = self.draws, 0
        if not size:
            if self.numbers[0] == EMPTY:
                self.drop_front()
        else:
            if 2 * self.num_open <= len(self.numbers):
                self.close_up()
            num_slots, is_open = len(self.numbers), 0
            while not is_open:
                bits = self.bits[draws % BLOCK] if draws // BLOCK == self.block else self.bits_of(draws)
                slot = bits * num_slots >> 32
                draws, is_open = draws + 1, self.rest[slot]
        if self.rest[slot] == UNKNOWN:
            self.fetch(slot)
        return slot, draws

    def fetch(self, slot: int) -> None:
        """After a resume."""
        assert self.reread is not None
        batch = self.reread(self.numbers[slot], self.read[slot])
        self.batches[slot], self.places[slot] = batch, 0
        self.rest[slot] = batch.lengths[0] - self.read[slot]

    def read_on(self, slot: int, pieces: Pieces, room: int) -> int:
        """One piece of the document in a slot, to its end or the row's (`room`). Returns its length."""
        batch, place, read, rest = self.batches[slot], self.places[slot], self.read[slot], self.rest[slot]
        if rest <= room:
            pieces.add(batch, place, read, rest)
            self.finish(slot)
            return rest
        pieces.add(batch, place, read, room)
        pieces.cut(batch, place, read + room)
        self.read[slot], self.rest[slot] = read + room, rest - room
        return room

    def read_drawn(self, pieces: Pieces, *, end: int, seq_len: int, at_least: int) -> None:
        """One piece after another, each of a document that is drawn, to the `end` of the step or while more
        than `at_least` are open.
        """
        room = seq_len - pieces.filled % seq_len
        while self.num_open > at_least and pieces.filled < end:
            if 2 * self.num_open <= len(self.numbers):
                self.close_up()
            room = self.read_block(pieces, end=end, seq_len=seq_len, room=room, at_least=at_least)

    def read_block(self, pieces: Pieces, *, end: int, seq_len: int, room: int, at_least: int) -> int:
        """As read_drawn, with the draws of one block, until slots must be closed up. Documents that end in
        their row, most of them, are read in line. Returns the room that is left in the row.
        """
        numbers, read, rest, batches, places = self.columns
        add_ids, add_length, filled = pieces.ids.append, pieces.lengths.append, pieces.filled
        num_slots, num_open = len(numbers), self.num_open
        at_least = max(at_least, num_slots // 2)  # then slots are closed up
        self.bits_of(self.draws)
        bits, first = self.bits, self.draws % BLOCK
        for i in range(first, BLOCK):
            slot = bits[i] * num_slots >> 32
            length = rest[slot]
            if not length:  # an empty slot
                continue
            batch = batches[slot]
            if 0 < length <= room and not batch.masks:
                start = batch.starts[places[slot]] + read[slot]
                add_ids(batch.ids[start : start + length])
                add_length(length)
                numbers[slot], read[slot], batches[slot], rest[slot] = EMPTY, 0, None, 0
                filled += length
                num_open -= 1
            else:
                if batch is None:
                    self.fetch(slot)
                pieces.filled, self.num_open = filled, num_open
                length = self.read_on(slot, pieces, room)
                filled, num_open = pieces.filled, self.num_open
            room = room - length or seq_len
            if num_open <= at_least or filled == end:
                break
        self.draws += i + 1 - first
        pieces.filled, self.num_open = filled, num_open
        return room

    def finish(self, slot: int) -> None:
        self.numbers[slot], self.read[slot], self.batches[slot], self.rest[slot] = EMPTY, 0, None, 0
        self.num_open -= 1

    def close_up(self) -> None:
        """Takes the empty slots out."""
        if self.num_open < len(self.numbers):
            kept = [list(compress(column, self.rest)) for column in self.columns]  # an empty slot has no rest
            self.numbers, self.read, self.rest, self.batches, self.places = kept

    @property
    def columns(self) -> tuple[list, ...]:
        return self.numbers, self.read, self.rest, self.batches, self.places

    def drop_front(self) -> None:
        """Takes the empty slots before the oldest open document out."""
        num = next(slot for slot, number in enumerate(self.numbers) if number != EMPTY)
        for column in self.columns:
            del column[:num]

    def draw(self, k: int, n: int) -> int:
        """Number k, uniform below n, from raw bits: numpy promises to keep those. (Off by n / 2 ** 32 at
        most.)
        """
        return self.bits_of(k) * n >> 32

    def bits_of(self, k: int) -> int:
        """32 of draw k."""
        if k // BLOCK != self.block:
            self.block = k // BLOCK
            counter = [self.block * BLOCK // 4, self.source, 0, DRAWS]  # a count is 4 words
            bits = np.random.Philox(key=self.key, counter=counter).random_raw(BLOCK)
            self.bits = (bits >> np.uint64(32)).tolist()
        return self.bits[k % BLOCK]
