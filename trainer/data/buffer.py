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

import sys
from collections.abc import Callable
from itertools import compress, pairwise

import numpy as np

from trainer.data.batches import Run
from trainer.data.rows import Pieces
from trainer.data.sources import Tokens

BLOCK = 1024  # draws made at once
DRAWS = 1  # what random bits are for, see mixture.START
EMPTY = -1  # in place of a number: a slot without a document
UNKNOWN = sys.maxsize  # in place of a rest, longer than any row: the document was not read since a resume


class DocumentBuffer:
    """Slots of open documents, oldest first, as columns of equal length: plain lists are quick to copy.

    numbers: of the document in its source, or EMPTY. read [tokens]: how much of it was delivered; of an empty
    slot it says nothing. rest [tokens]: what is still to be delivered; 0 in an empty slot. ids: these tokens;
    None after a resume, until the document is read on.
    masks: what is left of them, by the numbers of the documents that have one.

    reread: fetches the tokens of a document that was open before a resume, by its number.
    """

    def __init__(
        self,
        *,
        seed: int,
        stream: int,
        source: int = 0,
        reread: Callable[[int, int], Tokens] | None = None,
    ) -> None:
        self.key, self.source, self.reread = [seed, stream], source, reread
        self.block, self.num_slots = -1, 0  # whose slots are at hand
        self.restore([], [], draws=0)

    def restore(self, numbers: list[int], read: list[int], *, draws: int) -> None:
        self.numbers, self.read, self.draws = numbers, read, draws
        self.ids: list[memoryview | None] = [None] * len(numbers)
        self.masks: dict[int, np.ndarray] = {}
        self.rest = [0 if number == EMPTY else UNKNOWN for number in numbers]
        self.num_open = len(numbers) - numbers.count(EMPTY)

    def room(self, size: int) -> int:
        """How many documents to open now."""
        return max(1, 2 * size) - self.num_open if self.num_open <= size else 0

    def extend(self, run: Run) -> None:
        batch, first, stop, numbers = run
        ids, starts = batch.ids, batch.starts[first : stop + 1]
        self.numbers += numbers
        self.read += [0] * len(numbers)
        self.rest += batch.lengths[first:stop]
        self.ids += [ids[start:end] for start, end in pairwise(starts)]
        if batch.masks:
            self.masks |= {n: batch.masks[i] for i, n in enumerate(numbers, first) if i in batch.masks}
        self.num_open += len(numbers)

    def hold(self, number: int, ids: memoryview, mask: np.ndarray | None, *, read: int) -> None:
        """One document, of which so much was read, in place of all slots."""
        self.numbers, self.read, self.rest, self.ids = [number], [read], [len(ids) - read], [ids[read:]]
        self.masks = {} if mask is None else {number: mask[read:]}
        self.num_open, self.slot, self.after = 1, 0, self.draws

    def hold_none(self) -> None:
        """An empty slot in place of all, where none is open."""
        if self.numbers != [EMPTY]:
            self.numbers, self.read, self.rest, self.ids = [EMPTY], [0], [0], [None]
            self.masks, self.num_open = {}, 0

    # -- the next piece --

    def look(self, size: int) -> int:
        """What is left of the next document, the one to be read on: in `slot`, after which so many draws
        (`after`) were used.
        """
        draws, slot = self.draws, 0
        if not size:
            if self.numbers[0] == EMPTY:
                self.drop_front()
        else:
            if 2 * self.num_open <= len(self.numbers):
                self.close_up()
            slots = self.slots(draws, len(self.rest))
            while not self.rest[slot := slots[draws % BLOCK]]:
                draws += 1
                if draws % BLOCK == 0:
                    slots = self.slots(draws, len(self.rest))
            draws += 1
        self.slot, self.after = slot, draws
        if self.rest[slot] == UNKNOWN:
            self.fetch(slot)
        return self.rest[slot]

    def fetch(self, slot: int) -> None:
        """After a resume."""
        assert self.reread is not None
        number, read = self.numbers[slot], self.read[slot]
        ids, mask = self.reread(number, read)
        self.ids[slot], self.rest[slot] = memoryview(ids)[read:], len(ids) - read
        if mask is not None:
            self.masks[number] = mask[read:]

    def read_on(self, pieces: Pieces, room: int) -> int:
        """One piece of the next document, to its end or the row's (`room`). Returns its length."""
        slot, self.draws = self.slot, self.after
        number, ids = self.numbers[slot], self.ids[slot]
        assert ids is not None
        mask = self.masks.pop(number, None)
        length = pieces.add(ids, mask, room=room)
        if length == self.rest[slot]:
            self.numbers[slot], self.rest[slot], self.ids[slot] = EMPTY, 0, None
            self.num_open -= 1
        else:
            self.read[slot] += length
            self.rest[slot] -= length
            self.ids[slot] = ids[length:]
            if mask is not None:
                self.masks[number] = mask[length:]
        return length

    def read_drawn(self, pieces: Pieces, *, end: int, seq_len: int, at_least: int) -> None:
        """One piece after another, each of a document that is drawn, to the `end` of the step or while more
        than `at_least` are open.
        """
        while self.num_open > at_least and pieces.filled < end:
            if 2 * self.num_open <= len(self.numbers):
                self.close_up()
            if not self.masks:
                self.read_ended(pieces, room=seq_len - pieces.filled % seq_len, at_least=at_least)
            if self.num_open > at_least:
                self.look(1)  # it draws, whatever the size is
                self.read_on(pieces, seq_len - pieces.filled % seq_len)

    def read_ended(self, pieces: Pieces, *, room: int, at_least: int) -> None:
        """As read_drawn, the documents that end before the row does, most of them: with draws of one block,
        until one is longer or slots must be closed up.
        """
        rest, ids, numbers = self.rest, self.ids, self.numbers
        add_ids, add_length, before = pieces.ids.append, pieces.lengths.append, room
        num_open, at_least = self.num_open, max(at_least, len(rest) // 2)  # then slots are closed up
        draws, slots = self.draws, self.slots(self.draws, len(rest))
        for slot in slots[draws % BLOCK : draws % BLOCK + len(rest)]:
            length = rest[slot]
            if length >= room:
                break
            draws += 1
            if length:  # no empty slot
                add_ids(ids[slot])
                add_length(length)
                numbers[slot], rest[slot], ids[slot] = EMPTY, 0, None
                room -= length
                num_open -= 1
                if num_open == at_least:
                    break
        pieces.filled += before - room
        self.draws, self.num_open = draws, num_open

    def close_up(self) -> None:
        """Takes the empty slots out."""
        if self.num_open < len(self.numbers):
            kept = [list(compress(column, self.rest)) for column in self.columns]  # an empty slot has no rest
            self.numbers, self.read, self.rest, self.ids = kept

    @property
    def columns(self) -> tuple[list, ...]:
        return self.numbers, self.read, self.rest, self.ids

    def drop_front(self) -> None:
        """Takes the empty slots before the oldest open document out."""
        num = next(slot for slot, number in enumerate(self.numbers) if number != EMPTY)
        for column in self.columns:
            del column[:num]

    # -- draws --

    def draw(self, k: int, n: int) -> int:
        """Number k, uniform below n, from raw bits: numpy promises to keep those. (Off by n / 2 ** 32 at
        most.)
        """
        return self.slots(k, n)[k % BLOCK]

    def slots(self, k: int, n: int) -> list[int]:
        """The draws of the block of draw k, each a slot below n."""
        if k // BLOCK != self.block:
            self.block, self.num_slots = k // BLOCK, 0
            counter = [self.block * BLOCK // 4, self.source, 0, DRAWS]  # a count is 4 words
            self.bits = np.random.Philox(key=self.key, counter=counter).random_raw(BLOCK) >> np.uint64(32)
        if n != self.num_slots:
            self.num_slots, self.slots_of_block = n, (self.bits * np.uint64(n) >> np.uint64(32)).tolist()
        return self.slots_of_block
