"""Which document of a source does one virtual stream open next?

    requested (queue) -> the next one, its length known (peeked) -> taken

Virtual stream v of V opens the documents v, v + V, v + 2V, ... of each source. Documents are requested
ahead of their use; bad ones are passed over where the stream comes to them, not where a worker does.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from trainer.data.intake import Intake, Ticket, Wanted
from trainer.data.lengths import NOT_DRAWN
from trainer.data.reader import DataError
from trainer.data.sources import BadDocument, Tokens


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
        self.queue_S = [deque[Ticket]() for _ in next_S]  # requested: that document, and those behind it
        # that document, once its length was asked for
        self.peeked_S: list[Tokens | None] = [None] * len(next_S)
        self.num_refused_S = [0] * len(next_S)  # bad documents in a row

    def cut_at(self, length: int) -> None:
        """From now on documents are cut at so many tokens: what was looked at is looked at again."""
        if length != self.cut:
            self.cut, self.peeked_S = length, [None] * len(self.peeked_S)

    # -- the next document --

    def next_length(self, source: int) -> int | None:
        """[tokens] Of the document of `source` that is opened next; None: there is none.

        Raises: DataError where a whole epoch holds no usable document.
        """
        tokens = self.peeked_S[source]
        if tokens is None:
            tokens = self.peeked_S[source] = self.next_usable(source)
        return None if tokens is None else len(tokens.ids)

    def next_usable(self, source: int) -> Tokens | None:
        reader, queue = self.intake.readers[source], self.queue_S[source]
        while not reader.is_over(self.next_S[source]):
            if not queue:
                self.request(source, self.intake.to_request(source, 1))
            document = queue[0].get()
            if document is None:
                return None
            if isinstance(document, Tokens) and reader.needs_labels and not document.has_label(self.cut):
                where = reader.where(self.next_S[source])
                document = BadDocument("no_label", where, f"none in its first {self.cut} tokens")
            if isinstance(document, Tokens):
                self.num_refused_S[source] = 0
                return document
            self.pass_over(source, document)
        return None

    def pass_over(self, source: int, bad: BadDocument) -> None:
        reader = self.intake.readers[source]
        self.refuse(bad)
        self.advance(source)
        if bad.kind == NOT_DRAWN:
            self.intake.count_length(source, None)
        self.num_refused_S[source] += 1
        if self.num_refused_S[source] >= reader.patience:
            raise DataError(f"no usable document in a whole epoch, the last was {bad}; check {reader.key}")

    def peeked(self, source: int) -> Tokens:
        """The document whose length `next_length` has told."""
        tokens = self.peeked_S[source]
        assert tokens is not None
        return tokens

    def take(self, source: int) -> Tokens:
        """The document whose length `next_length` has told; the one behind it is the next from now on."""
        tokens = self.peeked_S[source]
        assert tokens is not None
        self.peeked_S[source] = None
        self.advance(source)
        self.intake.count_length(source, len(tokens.ids))
        return tokens

    def take_many(
        self, source: int, *, num: float, num_tokens: float
    ) -> tuple[list[int], list[Tokens], list[int]]:
        """The next documents, until there are so many of them or so many tokens, or no more: their numbers,
        their tokens and their lengths. The one behind is not looked at: it may be bad.
        """
        numbers, documents, lengths = list[int](), list[Tokens](), list[int]()
        while len(documents) < num and num_tokens > 0:
            length = self.next_length(source)
            if length is None:
                break
            numbers.append(self.next_S[source])
            documents.append(self.take(source))
            lengths.append(length)
            num_tokens -= length
            if self.intake.repeats and not self.intake.readers[source].needs_labels:
                usable, of_usable = self.take_usable(source, num=num - len(documents), num_tokens=num_tokens)
                first, num_usable = self.next_S[source], len(usable)
                self.next_S[source] += num_usable * self.num_streams
                numbers += range(first, self.next_S[source], self.num_streams)
                documents += usable
                lengths += of_usable
                num_tokens -= sum(of_usable)
        return numbers, documents, lengths

    def take_usable(self, source: int, *, num: float, num_tokens: float) -> tuple[list[Tokens], list[int]]:
        """As many of the documents that were requested, before the first that is bad."""
        documents, lengths, queue = list[Tokens](), list[int](), self.queue_S[source]
        while queue and len(documents) < num and num_tokens > 0:
            task, first = queue[0]
            batch, stop, at_most = task.result(), first, num - len(documents)
            # tickets of one task stand for documents that follow each other in it
            for ticket in queue:
                if ticket[0] is not task or stop - first >= at_most:
                    break
                length = batch.lengths[stop]
                if not length or num_tokens <= 0:
                    break
                num_tokens -= length
                stop += 1
            if stop == first:
                break
            documents += batch[first:stop]
            lengths += batch.lengths[first:stop]
            for _ in range(first, stop):
                queue.popleft()
        self.intake.count_lengths(source, lengths)
        return documents, lengths

    def advance(self, source: int) -> None:
        self.queue_S[source].popleft()
        self.next_S[source] += self.num_streams

    # -- requests --

    def shortfall(self, goal_S: Sequence[int]) -> list[Wanted]:
        """What to request, so that the queue of each source holds so many documents."""
        wanted = list[Wanted]()
        for source, goal in enumerate(goal_S):
            num_requested = len(self.queue_S[source])
            if num_requested < goal:
                first, is_over = self.next_S[source], self.intake.readers[source].is_over
                start = first + num_requested * self.num_streams
                stop = first + goal * self.num_streams
                numbers = range(start, stop, self.num_streams)
                wanted += [(source, n) for n in numbers if not is_over(n)]
        return wanted

    def append(self, wanted: Iterable[Wanted], tickets: Iterable[Ticket]) -> None:
        """Puts what was requested at the ends of the queues."""
        for (source, _), ticket in zip(wanted, tickets, strict=True):
            self.queue_S[source].append(ticket)

    def request(self, source: int, goal: int) -> None:
        """Requests documents of one source, so that its queue holds so many."""
        goal_S = [0] * len(self.queue_S)
        goal_S[source] = goal
        wanted = self.shortfall(goal_S)
        self.append(wanted, self.intake.request(wanted))
