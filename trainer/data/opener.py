"""Which document of a source does one virtual stream open next?

    requested (queue) -> the next one, its length known -> taken, perhaps with its neighbours

Virtual stream v of V opens the documents v, v + V, v + 2V, ... of each source. Documents are requested
ahead of their use; bad ones are passed over where the stream comes to them, not where a worker does.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.batches import Run, TokenBatch
from trainer.data.intake import Intake, Ticket, Wanted
from trainer.data.lengths import NOT_DRAWN
from trainer.data.reader import DataError
from trainer.data.sources import BadDocument, Tokens


class Queue:
    """The documents of one source that were requested and not taken: tickets, each for neighbours."""

    def __init__(self) -> None:
        self.tickets, self.num_documents = deque[Ticket](), 0
        self.batch: TokenBatch | None = None  # of the first ticket, once it was looked at
        self.place = 0  # of the next document there
        self.usable = 0  # up to here documents are usable, as far as is known

    def __len__(self) -> int:
        return self.num_documents

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self.tickets)

    def append(self, ticket: Ticket) -> None:
        self.tickets.append(ticket)
        self.num_documents += ticket.stop - ticket.first

    def front(self) -> tuple[TokenBatch, int]:
        """Of the next document: its batch, and its place there."""
        if self.batch is None:
            task, self.place, _ = self.tickets[0]
            self.batch = task.result()
        return self.batch, self.place

    def drop(self, num: int) -> None:
        """Of the documents of the batch that `front` has told."""
        self.num_documents -= num
        self.place += num
        if self.place == self.tickets[0].stop:
            self.tickets.popleft()
            self.batch, self.place, self.usable = None, 0, 0


@dataclass(kw_only=True)
class Opener:
    """Lists have an entry for each source (S)."""

    number: int
    num_streams: int
    intake: Intake
    refuse: Callable[[BadDocument], None]

    def __post_init__(self) -> None:
        self.start_at([self.number] * len(self.intake.readers))

    def start_at(self, next_S: list[int]) -> None:
        self.cut = sys.maxsize  # [tokens] of a document that are delivered, where its length has such a limit
        self.next_S = next_S  # the document that is opened next
        self.queue_S = [Queue() for _ in next_S]  # requested: that document, and those behind it
        self.num_refused_S = [0] * len(next_S)  # bad documents in a row

    # -- the next document --

    def next_length(self, source: int) -> int | None:
        """[tokens] Of the document of `source` that is opened next; None: there is none.

        Raises: DataError where a whole epoch holds no usable document.
        """
        queue = self.queue_S[source]
        if queue.place < queue.usable:
            return queue.batch.lengths[queue.place]
        reader = self.intake.readers[source]
        while reader.repeat or not reader.is_over(self.next_S[source]):
            if not queue.tickets:
                self.request(source, self.intake.to_request(source, 1))
            batch, i = queue.front()
            length = batch.lengths[i]
            if length and not (reader.needs_labels and self.lacks_label(batch, i)):
                self.num_refused_S[source] = 0
                if not reader.needs_labels:  # whether one has a label is told of one after another
                    queue.usable = batch.usable_until(i, queue.tickets[0].stop)
                return length
            document = batch[i]
            if document is None:
                return None
            if isinstance(document, Tokens):
                where = reader.where(self.next_S[source])
                document = BadDocument("no_label", where, f"none in its first {self.cut} tokens")
            self.pass_over(source, document)
        return None

    def lacks_label(self, batch: TokenBatch, i: int) -> bool:
        mask = batch.masks.get(i)
        return mask is not None and not mask[1 : self.cut + 1].any()

    def pass_over(self, source: int, bad: BadDocument) -> None:
        reader = self.intake.readers[source]
        self.refuse(bad)
        self.queue_S[source].drop(1)
        self.next_S[source] += self.num_streams
        if bad.kind == NOT_DRAWN:
            self.intake.count_not_drawn(source)
        self.num_refused_S[source] += 1
        if self.num_refused_S[source] >= reader.patience:
            raise DataError(f"no usable document in a whole epoch, the last was {bad}; check {reader.key}")

    def ahead(self, source: int) -> tuple[TokenBatch, int, int]:
        """The document whose length `next_length` has told, and neighbours that are usable, from which place
        to which in their batch.
        """
        queue = self.queue_S[source]
        batch, first = queue.front()
        return batch, first, max(queue.usable, first + 1)

    def take_one(self, source: int) -> tuple[memoryview, np.ndarray | None]:
        """The document whose length `next_length` has told: its ids and its mask. The one behind is the next
        from now on.
        """
        batch, place = self.queue_S[source].front()
        self.advance(source, 1, batch.lengths[place])
        return batch.tokens(place)

    def take(self, source: int, *, at_most: int, num_tokens: float = math.inf) -> Run:
        """The documents that are `ahead`, until there are so many of them or so many tokens."""
        start, (batch, first, stop) = self.next_S[source], self.ahead(source)
        stop = batch.usable_until(first, min(stop, first + at_most), num_tokens=num_tokens)
        self.advance(source, stop - first, batch.starts[stop] - batch.starts[first])
        return Run(batch, first, stop, range(start, self.next_S[source], self.num_streams))

    def advance(self, source: int, num: int, num_tokens: int) -> None:
        """So many of the documents that are `ahead` were taken, with so many tokens."""
        self.queue_S[source].drop(num)
        self.next_S[source] += num * self.num_streams
        self.intake.count_drawn(source, num, num_tokens)

    # -- requests --

    def shortfall(self, goal_S: Sequence[int]) -> list[Wanted]:
        """What to request, so that the queue of each source holds so many documents."""
        wanted = list[Wanted]()
        for source, (queue, goal) in enumerate(zip(self.queue_S, goal_S, strict=False)):
            num_requested = queue.num_documents
            if num_requested < goal:
                start = self.next_S[source] + num_requested * self.num_streams
                stop = self.next_S[source] + goal * self.num_streams
                numbers = range(start, min(stop, self.intake.readers[source].end), self.num_streams)
                if numbers:
                    wanted.append(Wanted(source, numbers))
        return wanted

    def append(self, source: int, tickets: Sequence[Ticket]) -> None:
        """Puts what was requested at the end of a queue."""
        for ticket in tickets:
            self.queue_S[source].append(ticket)

    def request(self, source: int, goal: int) -> None:
        """Requests documents of one source, so that its queue holds so many."""
        if self.queue_S[source].num_documents < goal:
            wanted = self.shortfall([0] * source + [goal])
            for tickets in self.intake.request(wanted):
                self.append(source, tickets)
