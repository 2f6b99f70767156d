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
from functools import cached_property

from trainer.data.buffer import EMPTY, DocumentBuffer
from trainer.data.intake import Ticket, Wanted
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
    resumed: dict[Wanted, Ticket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.number, self.intake = self.opener.number, self.opener.intake
        num_sources = len(self.intake.readers)
        self.masks = any(reader.masks for reader in self.intake.readers)
        self.credits = Credits(num_sources, seed=self.seed, stream=self.number)
        self.buffer_S = [
            DocumentBuffer(seed=self.seed, stream=self.number, source=s) for s in range(num_sources)
        ]
        # in this step: where the next piece of each source would come from, and which sources were read since
        # their buffers were looked after
        self.looked: list[tuple[int, int, int] | None] = [None] * num_sources
        self.unfilled: tuple[int, ...] = ()

    # -- rows --

    def concatenate(self, pieces: Pieces, now: StreamSettings) -> None:
        """The rows of one step: documents one after another, cut where a row ends."""
        start, num_pieces, num_cuts = pieces.filled, len(pieces.lengths), len(pieces.cuts)
        end = start + now.num_tokens
        read_on = self.read_only if len(self.buffer_S) == 1 else self.read_mixed
        self.looked = [None] * len(self.buffer_S)
        self.unfilled = tuple(range(len(self.buffer_S)))
        has_more, until = True, start
        while has_more and until < end:
            until += now.seq_len
            while has_more and pieces.filled < until:
                has_more = read_on(pieces, now, until=until, end=end)
        self.totals["open"] -= pieces.filled - start
        self.totals["documents"] += len(pieces.lengths) - num_pieces - (len(pieces.cuts) - num_cuts)
        self.totals["tokens"] += pieces.filled - start
        self.totals["padding"] += end - pieces.filled
        pieces.pad(end - pieces.filled)

    def read_only(self, pieces: Pieces, now: StreamSettings, *, until: int, end: int) -> bool:
        """A piece of the only source or many, none beyond the row; False: all is read."""
        if self.source_to_read(now, row_rest=0, step_rest=end - pieces.filled) is None:
            return False
        buffer, size = self.buffer_S[0], now.size_S[0]
        if self.masks or not buffer.read_whole(pieces, size, until=until):
            slot, buffer.draws = buffer.look(size)
            if buffer.tokens[slot] is None:
                self.reread(0, slot)
            buffer.read_on(slot, pieces, until=until)
        return True

    def read_mixed(self, pieces: Pieces, now: StreamSettings, *, until: int, end: int) -> bool:
        """A piece of the source that is due; False: all is read."""
        start = pieces.filled
        source = self.source_to_read(now, row_rest=until - start)
        if source is None:
            return False
        buffer = self.buffer_S[source]
        slot, buffer.draws, _ = self.look(source, now)
        self.looked[source] = None
        buffer.read_on(slot, pieces, until=until)
        pieces.sources.append(source)
        self.unfilled = (*self.unfilled, source)
        self.charge(source, pieces.filled - start, now)
        return True

    def best_fit(self, pieces: Pieces, now: StreamSettings) -> None:
        """The rows of one step: whole documents, cut at the length of a row, each in the fullest row that has
        room for it; the rest is padding. The step ends with the first document that finds no room.
        """
        rows = [list[tuple[int, Tokens]]() for _ in range(now.rows_per_stream)]
        room_R = [now.seq_len] * now.rows_per_stream
        self.opener.cut_at(now.cut)
        source = self.next_source(now.weights_S, at_most=now.seq_len)
        while source is not None:
            length = min(len(self.opener.peeked(source).ids), now.seq_len)
            with_room = [r for r, room in enumerate(room_R) if room >= length]
            if not with_room:
                break
            if len(now.weights_S) > 1:
                self.credits.charge(source, length, self.weights_left(now.weights_S))
            fullest = min(with_room, key=room_R.__getitem__)
            rows[fullest].append((source, self.opener.take(source)))
            room_R[fullest] -= length
            source = self.next_source(now.weights_S, at_most=now.seq_len)
        for row, room in zip(rows, room_R, strict=True):
            for source, tokens in row:
                pieces.add_cut(tokens, source, at_most=now.seq_len)
                self.totals["truncated"] += max(0, len(tokens.ids) - now.seq_len)
            pieces.pad(room)
        self.totals["documents"] += sum(map(len, rows))
        self.totals["tokens"] += now.num_tokens - sum(room_R)
        self.totals["padding"] += sum(room_R)

    def has_more(self, now: StreamSettings) -> bool:
        """Peeks at the document that the next step would take first; calling it has no side effect."""
        self.opener.cut_at(now.cut)
        is_open = any(buffer.num_open for buffer in self.buffer_S)
        return is_open or any(
            weight and self.opener.next_length(s) is not None for s, weight in enumerate(now.weights_S)
        )

    # -- which source --

    def source_to_read(self, now: StreamSettings, *, row_rest: int, step_rest: int = 0) -> int | None:
        """The source of the next piece: the one that is due, of those with an open document. None: all is
        read. step_rest: [tokens] that are sure to be read of an only source in this step.
        """
        if self.phase != now.phase:
            fullest = max(range(len(self.buffer_S)), key=lambda s: self.buffer_S[s].num_open)
            if now.drain and self.buffer_S[fullest].num_open:
                return fullest
            self.phase = now.phase
        if len(self.buffer_S) == 1:
            if self.buffer_S[0].num_open <= now.size_S[0]:
                self.refill(0, now, num_tokens=step_rest)
            return 0 if self.buffer_S[0].num_open else None
        if now.has_buffer:
            for s in self.unfilled:
                if now.size_S[s] and self.buffer_S[s].num_open <= now.size_S[s]:
                    self.refill(s, now)
            self.unfilled = ()
        elif not any(buffer.num_open for buffer in self.buffer_S):
            source = self.next_source(now.weights_S)
            if source is not None:
                self.refill(source, now)
            return source
        source = self.source_due(now, row_rest)
        if source is not None:
            return source
        # of sources that the mixture names no longer
        return next((s for s, buffer in enumerate(self.buffer_S) if buffer.num_open), None)

    def source_due(self, now: StreamSettings, row_rest: int) -> int | None:
        """As Credits.next_source says it, of the sources with an open document; quicker once all of them have
        begun.
        """
        due, first_due, credit_S, weights_S = None, math.inf, self.credits.credit_S, now.weights_S
        for s in now.wanted:
            if self.buffer_S[s].num_open:
                if credit_S[s] == math.inf:
                    return self.first_due(now, row_rest)
                looked = self.looked[s]
                rest = self.look(s, now)[2] if looked is None else looked[2]
                then = ((rest if rest < row_rest else row_rest) / 2 - credit_S[s]) / weights_S[s]
                if then < first_due:
                    due, first_due = s, then
        return due

    def first_due(self, now: StreamSettings, row_rest: int) -> int:
        """Where a source is due for the first time."""
        both = zip(now.weights_S, self.buffer_S, strict=True)
        open_S = [weight if buffer.num_open else 0.0 for weight, buffer in both]
        return self.credits.next_source(open_S, next_length=lambda s: min(self.look(s, now)[2], row_rest))

    def look(self, source: int, now: StreamSettings) -> tuple[int, int, int]:
        """Of the document of `source` that would be read on: slot, draws after it, and tokens unread."""
        looked = self.looked[source]
        if looked is None:
            buffer = self.buffer_S[source]
            slot, draws = buffer.look(now.size_S[source])
            if buffer.tokens[slot] is None:
                self.reread(source, slot)
            looked = self.looked[source] = slot, draws, buffer.rest[slot]
        return looked

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

    def charge(self, source: int, length: int, now: StreamSettings) -> None:
        """Tokens left over from an earlier phase are charged to no source."""
        if self.phase == now.phase and now.weights_S[source] > 0:
            self.credits.charge(source, length, self.weights_left(now.weights_S))

    # -- open documents --

    def refill(self, source: int, now: StreamSettings, *, num_tokens: int = 0) -> None:
        """Fills the buffer. Where there is none, one document is opened, or as many as hold `num_tokens`: all
        but the last of them are read to their ends in this step.
        """
        buffer = self.buffer_S[source]
        room = buffer.room(now.size_S[source])
        if room > 1:
            self.opener.request(source, self.intake.to_request(source, room))
        buffer.close_up()
        buffer.in_order = num_tokens > 0 and not now.size_S[source]
        before = len(buffer.numbers)
        if buffer.in_order:
            buffer.extend(*self.opener.take_many(source, num=math.inf, num_tokens=num_tokens))
        elif room > 1:
            buffer.extend(*self.opener.take_many(source, num=room, num_tokens=math.inf))
        elif self.opener.next_length(source) is not None:
            buffer.add(self.opener.next_S[source], self.opener.take(source))
        self.totals["open"] += sum(buffer.rest[before:])

    def reread(self, source: int, slot: int) -> None:
        """Fetches the tokens of a document that was open before a resume."""
        buffer = self.buffer_S[source]
        n, read = buffer.numbers[slot], buffer.read[slot]
        ticket = self.resumed.pop((source, n), None)
        tokens = self.intake.reread(source, n, ticket=ticket)
        if read >= len(tokens.ids):
            reader = self.intake.readers[source]
            raise reader.foreign(f"{reader.where(n)}: no token {read}, the document has {len(tokens.ids)}")
        buffer.tokens[slot], buffer.rest[slot] = tokens, len(tokens.ids) - read

    def open(self) -> Iterator[tuple[int, int, int, Tokens | None]]:
        """source, number in the source, tokens read, tokens."""
        for s, buffer in enumerate(self.buffer_S):
            for n, read, tokens in zip(buffer.numbers, buffer.read, buffer.tokens, strict=True):
                if n != EMPTY:
                    yield s, n, read, tokens

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
