"""What does one virtual stream deliver?

    opener: the next document of each source -> credits choose a source -> open documents -> pieces -> rows

What virtual stream v of V delivers is a function of the corpus, the tokenizer, the seed, the program and its
position: it knows of no ranks, of no other stream, and not of who reads ahead.

Letters: T tokens of the stream in one step, L of a row, R rows, N planes, S sources.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from trainer.data.buffer import EMPTY, DocumentBuffer
from trainer.data.intake import Ticket, Wanted
from trainer.data.mixture import Credits
from trainer.data.opener import Opener
from trainer.data.rows import IGNORED, Pieces, up_to, write
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

    def steps_until(self, stream: int) -> int:
        """Until this stream serves; 0: it does in this step."""
        return (stream - self.turn) % self.num_turns


@dataclass(kw_only=True, eq=False)
class VirtualStream:
    opener: Opener
    seed: int
    totals: Counter[str]  # of all streams of the rank
    document_mask: bool = True
    phase: int = 0  # in which documents were opened last
    # requests of documents that were open before a resume
    resumed: dict[Wanted, Ticket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.number, self.intake = self.opener.number, self.opener.intake
        num_sources = len(self.intake.readers)
        self.credits = Credits(num_sources, seed=self.seed, stream=self.number)
        self.buffer_S = [
            DocumentBuffer(seed=self.seed, stream=self.number, source=s) for s in range(num_sources)
        ]
        # where the next piece of a source would come from, in this step: see DocumentBuffer.look
        self.looked: dict[int, tuple[int, int]] = {}

    # -- rows --

    def concatenate(self, rows_NT: np.ndarray, now: StreamSettings) -> None:
        """The rows of one step, in place: documents one after another, cut where a row ends."""
        pieces = Pieces([], [], [], [], [], [])
        all_ids, positions, ends, targets, sources, masks = pieces
        filled, num_tokens, seq_len = 0, now.num_tokens, now.seq_len
        index_L, is_mixed = up_to(seq_len), len(now.weights_S) > 1
        self.looked.clear()
        while filled < num_tokens:
            row_rest = seq_len - filled % seq_len
            source = self.source_to_read(now, row_rest)
            if source is None:  # the end of the corpus
                break
            buffer = self.buffer_S[source]
            slot, buffer.draws = self.look(source, now)
            del self.looked[source]
            ids, mask = buffer.tokens[slot] or self.reread(source, slot)
            read = buffer.read[slot]
            length = min(len(ids) - read, row_rest)
            after = read + length
            all_ids.append(ids[read:after])
            positions.append(index_L[:length])
            sources.append(source)
            if mask is not None:
                masks.append((filled, mask[read + 1 : after + 1]))
            if after < len(ids):  # cut at the end of the row
                targets.append(int(ids[after]))
                buffer.read[slot] = after
            else:
                targets.append(IGNORED)
                buffer.finish(slot)
            if is_mixed:
                self.charge(source, length, now)
            filled += length
            ends.append(filled)
        self.totals["open"] -= filled
        self.totals["documents"] += targets.count(IGNORED)
        self.write(pieces, rows_NT, seq_len)

    def best_fit(self, rows_NT: np.ndarray, now: StreamSettings) -> None:
        """The rows of one step, in place: whole documents, cut at the length of a row, each in the fullest
        row that has room for it; the rest is padding. The step ends with the first document that finds no
        room.
        """
        rows = [Pieces([], [], [], [], [], []) for _ in range(now.rows_per_stream)]
        room_R, index_L = [now.seq_len] * now.rows_per_stream, up_to(now.seq_len)
        self.opener.cut_at(now.cut)
        source = self.next_source(now.weights_S, at_most=now.seq_len)
        while source is not None:
            ids, mask = self.opener.peeked(source)
            length = min(len(ids), now.seq_len)
            with_room = [r for r, room in enumerate(room_R) if room >= length]
            if not with_room:
                break
            if len(now.weights_S) > 1:
                self.credits.charge(source, length, self.weights_left(now.weights_S))
            self.opener.take(source)
            fullest = min(with_room, key=room_R.__getitem__)
            row = rows[fullest]
            start = now.seq_len - room_R[fullest]
            row.ids.append(ids[:length])
            row.positions.append(index_L[:length])
            row.sources.append(source)
            row.targets.append(int(ids[length]) if length < len(ids) else IGNORED)
            row.ends.append(start + length)
            if mask is not None:
                row.masks.append((start, mask[1 : length + 1]))
            room_R[fullest] -= length
            self.totals["documents"] += 1
            self.totals["truncated"] += len(ids) - length
            source = self.next_source(now.weights_S, at_most=now.seq_len)
        for r, row in enumerate(rows):
            self.write(row, rows_NT[:, r * now.seq_len : (r + 1) * now.seq_len], now.seq_len)

    def write(self, pieces: Pieces, rows_NT: np.ndarray, seq_len: int) -> None:
        written = write(pieces, rows_NT, document_mask=self.document_mask, seq_len=seq_len)
        self.totals["tokens"] += written.tokens
        self.totals["withheld"] += written.withheld
        self.totals["padding"] += rows_NT.shape[1] - written.tokens

    def has_more(self, now: StreamSettings) -> bool:
        """Peeks at the document that the next step would take first; calling it has no side effect."""
        self.opener.cut_at(now.cut)
        is_open = any(buffer.num_open for buffer in self.buffer_S)
        return is_open or any(
            weight and self.opener.next_length(s) is not None for s, weight in enumerate(now.weights_S)
        )

    # -- which source --

    def source_to_read(self, now: StreamSettings, row_rest: int) -> int | None:
        """The source of the next piece: the one that is due, of those with an open document. None: all is
        read.
        """
        if self.phase != now.phase:
            fullest = max(range(len(self.buffer_S)), key=lambda s: self.buffer_S[s].num_open)
            if now.drain and self.buffer_S[fullest].num_open:
                return fullest
            self.phase = now.phase
        if len(self.buffer_S) == 1:
            if self.buffer_S[0].num_open <= now.size_S[0]:
                self.refill(0, now)
            return 0 if self.buffer_S[0].num_open else None
        if any(now.size_S):
            for source, size in enumerate(now.size_S):
                if size and self.buffer_S[source].num_open <= size:
                    self.refill(source, now)
        elif not any(buffer.num_open for buffer in self.buffer_S):
            source = self.next_source(now.weights_S)
            if source is not None:
                self.refill(source, now)
            return source
        open_S = [
            weight if buffer.num_open else 0.0
            for weight, buffer in zip(now.weights_S, self.buffer_S, strict=True)
        ]
        if any(open_S):
            return self.credits.next_source(
                open_S, next_length=lambda s: min(self.length_left(s, now), row_rest)
            )
        # of sources that the mixture names no longer
        return next((s for s, buffer in enumerate(self.buffer_S) if buffer.num_open), None)

    def look(self, source: int, now: StreamSettings) -> tuple[int, int]:
        if source not in self.looked:
            self.looked[source] = self.buffer_S[source].look(now.size_S[source])
        return self.looked[source]

    def length_left(self, source: int, now: StreamSettings) -> int:
        """[tokens] Unread of the open document of `source` that would be read on."""
        slot, _ = self.look(source, now)
        buffer = self.buffer_S[source]
        tokens = buffer.tokens[slot] or self.reread(source, slot)
        return len(tokens.ids) - buffer.read[slot]

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

    def refill(self, source: int, now: StreamSettings) -> None:
        buffer = self.buffer_S[source]
        room = buffer.room(now.size_S[source])
        if room > 1:
            self.opener.request(source, self.intake.to_request(source, room))
        buffer.close_up()
        opener = self.opener
        for _ in range(room):
            length = opener.next_length(source)
            if length is None:
                return
            number = opener.next_S[source]
            buffer.add(number, opener.take(source))
            self.totals["open"] += length

    def reread(self, source: int, slot: int) -> Tokens:
        """The tokens of a document that was open before a resume."""
        buffer = self.buffer_S[source]
        n, read = buffer.numbers[slot], buffer.read[slot]
        ticket = self.resumed.pop((source, n), None)
        tokens = self.intake.reread(source, n, ticket=ticket)
        if read >= len(tokens.ids):
            reader = self.intake.readers[source]
            raise reader.foreign(f"{reader.where(n)}: no token {read}, the document has {len(tokens.ids)}")
        buffer.tokens[slot] = tokens
        return tokens

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
