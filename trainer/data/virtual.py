"""What does one virtual stream deliver?

    opener: the next document of each source -> credits choose a source -> open documents -> pieces -> rows

What virtual stream v of V delivers is a function of the corpus, the tokenizer, the seed, the program and its
position: it knows of no ranks, of no other stream, and not of who reads ahead.

Letters: T tokens of the stream in one step, L of a row, R rows, S sources.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from trainer.data.buffer import EMPTY, DocumentBuffer
from trainer.data.intake import Ticket
from trainer.data.mixture import Credits
from trainer.data.opener import Opener
from trainer.data.rows import Pieces
from trainer.data.sources import Tokens
from trainer.data.state import Position


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What a span of the program says about the stream."""

    seq_len: int
    rows_per_stream: int  # of a stream in a step that it serves
    weights_S: list[float]  # they sum to 1
    size_S: list[int]  # of the document buffers
    phase: int = 0  # how often the mixture has changed
    # documents opened in an earlier phase are read to their ends before this one opens any
    drain: bool = False
    num_turns: int = 1  # a stream serves every so many steps
    turn: int = 0  # of this step, below num_turns
    cut: int = sys.maxsize  # [tokens] of a document that are delivered

    @property
    def num_tokens(self) -> int:
        return self.rows_per_stream * self.seq_len

    def room(self, filled: int) -> int:
        """[tokens] In the row of the next token."""
        return self.seq_len - filled % self.seq_len

    @cached_property
    def has_buffer(self) -> bool:
        return any(self.size_S)

    @cached_property
    def wanted(self) -> tuple[int, ...]:
        """The sources of the mixture."""
        return tuple(s for s, weight in enumerate(self.weights_S) if weight > 0)

    def steps_until(self, stream: int) -> int:
        """Until this stream serves; 0: it does in this step."""
        return (stream - self.turn) % self.num_turns


@dataclass(kw_only=True, eq=False)
class VirtualStream:
    opener: Opener
    seed: int
    totals: Counter[str]  # of all streams of the rank
    phase: int = 0  # in which documents were opened last
    # requests of documents that were open before a resume
    resumed: dict[tuple[int, int], Ticket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.number, self.intake = self.opener.number, self.opener.intake
        num_sources = len(self.intake.readers)
        self.credits = Credits(num_sources, seed=self.seed, stream=self.number)
        self.buffer_S = [
            DocumentBuffer(seed=self.seed, stream=self.number, source=s, reread=partial(self.reread, s))
            for s in range(num_sources)
        ]

    # -- rows --

    def concatenate(self, pieces: Pieces, now: StreamSettings) -> None:
        """The rows of one step: documents one after another, cut where a row ends."""
        start, num_pieces, num_cuts = pieces.filled, len(pieces.lengths), len(pieces.cuts)
        end = start + now.num_tokens
        read_on = self.read_only if len(self.buffer_S) == 1 else self.read_mixed
        while pieces.filled < end and read_on(pieces, now, end):
            pass
        self.totals["open"] -= pieces.filled - start
        self.totals["documents"] += len(pieces.lengths) - num_pieces - (len(pieces.cuts) - num_cuts)
        self.totals["tokens"] += pieces.filled - start
        self.totals["padding"] += end - pieces.filled
        pieces.pad(end - pieces.filled)

    def read_only(self, pieces: Pieces, now: StreamSettings, end: int) -> bool:
        """Pieces of the only source, at least one; False: all is read."""
        buffer, size, drains = self.buffer_S[0], now.size_S[0], self.drains(now)
        if buffer.num_open <= size and not drains:
            if not size:
                return self.read_in_order(pieces, now, end)
            self.refill(0, now)
        if not buffer.num_open:
            return False
        if size:
            # at the end of the corpus fewer are open, and the slots are closed up after each
            at_least = 0 if drains else min(size, buffer.num_open - 1)
            buffer.read_drawn(pieces, end=end, seq_len=now.seq_len, at_least=at_least)
        else:
            buffer.look(0)
            buffer.read_on(pieces, now.room(pieces.filled))
        return True

    def read_in_order(self, pieces: Pieces, now: StreamSettings, end: int) -> bool:
        """The next documents of the only source, where none is open; False: there is none."""
        if self.opener.next_length(0) is None:
            self.buffer_S[0].close_up()
            return False
        run = self.opener.take(0, at_most=sys.maxsize, num_tokens=end - pieces.filled)
        self.totals["open"] += run.num_tokens
        rest = pieces.add_run(run, end=end, seq_len=now.seq_len)
        if rest:
            ids, mask = run.batch.tokens(run.stop - 1)
            self.buffer_S[0].hold(run.numbers[-1], ids, mask, read=len(ids) - rest)
        else:
            self.buffer_S[0].hold_none()
        return True

    def read_mixed(self, pieces: Pieces, now: StreamSettings, end: int) -> bool:
        """Pieces of the sources that are due, at least one; False: all is read."""
        open_S = [s for s, buffer in enumerate(self.buffer_S) if buffer.num_open]
        if self.drains(now):
            fullest = max(open_S, key=lambda s: self.buffer_S[s].num_open)
            self.read_piece(fullest, pieces, now)
            return True
        if now.has_buffer:
            for s in now.wanted:
                if self.buffer_S[s].num_open <= now.size_S[s]:
                    self.refill(s, now)
        elif not open_S:
            return self.read_next(pieces, now, end)
        if any(self.buffer_S[s].num_open for s in now.wanted):
            self.read_due(pieces, now, end)
            return True
        if open_S:  # of sources that the mixture names no longer
            self.read_piece(open_S[0], pieces, now)
        return bool(open_S)

    def read_piece(self, source: int, pieces: Pieces, now: StreamSettings) -> None:
        """Of a source that nothing is charged to."""
        buffer = self.buffer_S[source]
        buffer.look(now.size_S[source])
        buffer.read_on(pieces, now.room(pieces.filled))
        pieces.sources.append(source)

    def read_due(self, pieces: Pieces, now: StreamSettings, end: int) -> None:
        """One piece after another, each of the source that is due, until one has no open document."""
        weights_S, size_S, buffer_S, repeats = now.weights_S, now.size_S, self.buffer_S, self.intake.repeats
        charge, due, room = self.credits.charge, self.credits.due, now.room(pieces.filled)
        rest_S = {s: buffer_S[s].look(size_S[s]) for s in now.wanted if buffer_S[s].num_open}
        are_open = [weight if s in rest_S else 0.0 for s, weight in enumerate(weights_S)]
        self.credits.begin(are_open, next_length=lambda s: min(rest_S[s], room))
        while True:
            source = due(rest_S, weights_S, at_most=room)
            buffer, size = buffer_S[source], size_S[source]
            length = buffer.read_on(pieces, room)
            pieces.sources.append(source)
            charge(source, length, weights_S if repeats else self.weights_left(weights_S))
            room = room - length or now.seq_len
            if pieces.filled == end:
                return
            if size and buffer.num_open <= size:
                self.refill(source, now)
            if not buffer.num_open:
                return
            rest_S[source] = buffer.look(size)

    def read_next(self, pieces: Pieces, now: StreamSettings, end: int) -> bool:
        """One document after another, each of the source that is due, where none is open. False: there is
        none.
        """
        weights_S = self.weights_left(now.weights_S)
        length_S = {s: self.opener.next_length(s) for s, weight in enumerate(weights_S) if weight > 0}
        if not length_S:
            return False
        self.credits.begin(weights_S, next_length=length_S.__getitem__)
        # where sources end, weights change with every document
        source = (
            self.read_whole(pieces, now, length_S)
            if self.intake.repeats
            else self.credits.due(length_S, weights_S)
        )
        if source is not None:
            self.read_document(source, pieces, now, end)
        return True

    def read_whole(self, pieces: Pieces, now: StreamSettings, length_S: dict[int, int]) -> int | None:
        """As read_next: documents that end in the row, as long as those behind are known to be usable.
        Returns the source whose next document does not end in the row.
        """
        weights_S, charge, charged_due = now.weights_S, self.credits.charge, self.credits.charged_due
        add, add_source, room = pieces.add, pieces.sources.append, now.room(pieces.filled)
        ahead_S = {s: self.opener.ahead(s) for s in length_S}
        place_S = {s: first for s, (_, first, _) in ahead_S.items()}
        source = self.credits.due(length_S, weights_S)
        while source is not None and length_S[source] <= room:
            place, (batch, _, stop) = place_S[source], ahead_S[source]
            length = add(*batch.tokens(place), room=room)
            add_source(source)
            room -= length
            place_S[source] = place = place + 1
            if room and place < stop:
                length_S[source] = batch.lengths[place]
                source = charged_due(source, length, length_S, weights_S)
            else:
                charge(source, length, weights_S)
                source = None
        for s, (batch, first, _) in ahead_S.items():
            if place_S[s] > first:
                num_tokens = batch.starts[place_S[s]] - batch.starts[first]
                self.opener.advance(s, place_S[s] - first, num_tokens)
                self.totals["open"] += num_tokens
                self.buffer_S[s].hold_none()
        return source

    def read_document(self, source: int, pieces: Pieces, now: StreamSettings, end: int) -> None:
        """The next of a source, to its end or that of the step."""
        number, buffer = self.opener.next_S[source], self.buffer_S[source]
        ids, mask = self.opener.take_one(source)
        self.totals["open"] += len(ids)
        buffer.hold(number, ids, mask, read=0)
        while buffer.num_open and pieces.filled < end:
            length = buffer.read_on(pieces, now.room(pieces.filled))
            pieces.sources.append(source)
            self.credits.charge(source, length, self.weights_left(now.weights_S))

    def best_fit(self, pieces: Pieces, now: StreamSettings) -> None:
        """The rows of one step: whole documents, cut at the length of a row, each in the fullest row that has
        room for it; the rest is padding. The step ends with the first document that finds no room.
        """
        rows = [list[tuple[int, memoryview, np.ndarray | None]]() for _ in range(now.rows_per_stream)]
        room_R = [now.seq_len] * now.rows_per_stream
        self.opener.cut = now.cut
        source = self.next_source(now.weights_S, at_most=now.seq_len)
        while source is not None:
            length = min(self.opener.next_length(source), now.seq_len)
            with_room = [r for r, room in enumerate(room_R) if room >= length]
            if not with_room:
                break
            if len(now.weights_S) > 1:
                self.credits.charge(source, length, self.weights_left(now.weights_S))
            fullest = min(with_room, key=room_R.__getitem__)
            rows[fullest].append((source, *self.opener.take_one(source)))
            room_R[fullest] -= length
            source = self.next_source(now.weights_S, at_most=now.seq_len)
        for row, room in zip(rows, room_R, strict=True):
            for source, ids, mask in row:
                self.totals["truncated"] += len(ids) - pieces.add(ids, mask, room=now.seq_len)
                pieces.sources.append(source)
            pieces.pad(room)
        self.totals["documents"] += sum(map(len, rows))
        self.totals["tokens"] += now.num_tokens - sum(room_R)
        self.totals["padding"] += sum(room_R)

    def has_more(self, now: StreamSettings) -> bool:
        """Peeks at the document that the next step would take first; calling it has no side effect."""
        self.opener.cut = now.cut
        is_open = any(buffer.num_open for buffer in self.buffer_S)
        return is_open or any(
            weight and self.opener.next_length(s) is not None for s, weight in enumerate(now.weights_S)
        )

    # -- which source --

    def drains(self, now: StreamSettings) -> bool:
        """Are documents of an earlier phase read to their ends, before anything else?"""
        if self.phase != now.phase and not (now.drain and any(buffer.num_open for buffer in self.buffer_S)):
            self.phase = now.phase
        return self.phase != now.phase

    def next_source(self, weights_S: list[float], *, at_most: float = math.inf) -> int | None:
        """The source of the next document; None: all are at their ends. One at its end leaves its share to
        the others. at_most: [tokens] that a document counts.
        """
        next_length = self.opener.next_length
        if len(weights_S) == 1:
            return 0 if next_length(0) is not None else None
        weights_S = self.weights_left(weights_S)
        if not any(weights_S):
            return None
        if at_most == math.inf:
            return self.credits.next_source(weights_S, next_length=lambda s: next_length(s) or 0)
        return self.credits.next_source(weights_S, next_length=lambda s: min(next_length(s) or 0, at_most))

    def weights_left(self, weights_S: list[float]) -> list[float]:
        """The weights of the sources that have a document left."""
        if self.intake.repeats:
            return weights_S
        has_S = [
            weight > 0 and (self.buffer_S[s].num_open or self.opener.next_length(s))
            for s, weight in enumerate(weights_S)
        ]
        total = sum(weight for weight, has in zip(weights_S, has_S, strict=True) if has)
        return [weight / total if has else 0.0 for weight, has in zip(weights_S, has_S, strict=True)]

    # -- open documents --

    def refill(self, source: int, now: StreamSettings) -> None:
        """Fills the buffer."""
        buffer = self.buffer_S[source]
        room = buffer.room(now.size_S[source])
        self.opener.request(source, self.intake.to_request(source, room))
        buffer.close_up()
        while room and self.opener.next_length(source) is not None:
            run = self.opener.take(source, at_most=room)
            buffer.extend(run)
            room -= run.stop - run.first
            self.totals["open"] += run.num_tokens

    def reread(self, source: int, n: int, read: int) -> Tokens:
        """A document that was open before a resume."""
        ticket = self.resumed.pop((source, n), None)
        document = self.intake.reread(source, n, ticket=ticket)
        if read >= len(document.ids):
            reader = self.intake.readers[source]
            raise reader.foreign(f"{reader.where(n)}: no token {read}, the document has {len(document.ids)}")
        return document

    def open(self) -> Iterator[tuple[int, int, int, memoryview | None]]:
        """source, number in the source, tokens read, and those that are left: None until they are reread."""
        for s, buffer in enumerate(self.buffer_S):
            for n, read, ids in zip(buffer.numbers, buffer.read, buffer.ids, strict=True):
                if n != EMPTY:
                    yield s, n, read, ids

    def oldest(self, source: int) -> int:
        """The oldest document of `source` that is open, or the next one."""
        numbers = [n for n in self.buffer_S[source].numbers if n != EMPTY]
        return min(numbers, default=self.opener.next_S[source])

    # -- state --

    def position(self) -> Position:
        """Copies of lists, no more: it is taken in every step."""
        return Position(
            next_S=self.opener.next_S.copy(),
            credit_S=self.credits.credit_S.copy(),
            draws_S=[buffer.draws for buffer in self.buffer_S],
            phase=self.phase,
            numbers_SC=[buffer.numbers.copy() for buffer in self.buffer_S],
            read_SC=[buffer.read.copy() for buffer in self.buffer_S],
        )

    def start_at(self, position: Position) -> None:
        self.opener.start_at(position.next_S)
        self.credits.credit_S, self.phase = position.credit_S, position.phase
        self.resumed.clear()
        columns = zip(self.buffer_S, position.numbers_SC, position.read_SC, position.draws_S, strict=True)
        for buffer, numbers, read, draws in columns:
            buffer.restore(numbers, read, draws=draws)
