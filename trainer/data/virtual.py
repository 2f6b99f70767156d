"""What does one virtual stream deliver, and what must be remembered for it to go on?

    queues of documents asked for, one a source -> credits choose -> open documents -> pieces -> rows

Virtual stream v of V reads documents v, v + V, v + 2V, ... of each source. What it delivers is a function of
the corpus, the tokenizer, the seed, the program and its position: it knows of no ranks, of no other stream,
and not of who reads ahead.

Letters: T tokens of the stream in one step, L of a row, N planes, S sources, C slots of the buffer.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from trainer.data.buffer import DocumentBuffer, OpenDocument
from trainer.data.intake import Intake, Pending, Wanted
from trainer.data.mixture import Credits
from trainer.data.reader import DataError
from trainer.data.sources import BadDocument

IGNORED = -100  # the label that cross entropy leaves out
PADDING = -1  # the position of a token that is not there: nothing attends to it, no expert gets it
EMPTY, BEYOND = -1, -2  # in a state: a slot without a document, and what is behind the last slot
TOKENS, LABELS, POSITIONS, SOURCES = range(4)  # the N planes of rows


@lru_cache(maxsize=8)
def up_to(seq_len: int) -> np.ndarray:
    return np.arange(seq_len)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a span of the program says about the stream."""

    seq_len: int
    rows_per_stream: int
    weights_S: list[float]  # they sum to 1
    size_S: list[int]  # of the document buffers
    phase: int = 0  # how often the mixture has changed
    # documents opened in an earlier phase are read to their ends before this one opens any
    drain: bool = False

    @property
    def num_tokens(self) -> int:
        return self.rows_per_stream * self.seq_len


@dataclass(kw_only=True)
class VirtualStream:
    number: int
    num_streams: int
    intake: Intake
    seed: int
    totals: Counter[str]
    refuse: Callable[[BadDocument], None]
    document_mask: bool = True
    phase: int = 0  # in which documents were opened last
    # documents that were open before a resume, asked for
    again: dict[Wanted, Pending] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_sources = len(self.intake.readers)
        self.next_S = [self.number] * num_sources  # the document of each source that is opened next
        self.queue_S = [deque[Pending]() for _ in range(num_sources)]  # that one, and those behind it
        # tokens of the next document of a source, once they were looked at
        self.ahead: dict[int, np.ndarray] = {}
        self.refused_S = [0] * num_sources  # bad documents in a row
        self.credits = Credits(num_sources, seed=self.seed, stream=self.number)
        self.buffer_S = [
            DocumentBuffer(seed=self.seed, stream=self.number, source=s) for s in range(num_sources)
        ]
        # where the next piece of a source would come from, in this step
        self.looked: dict[int, tuple[int, int]] = {}

    # -- rows --

    def fill(self, rows_NT: np.ndarray, now: Settings) -> None:
        """Tokens, labels, positions and, if there is room for them, sources of the rows of one step, in
        place.
        """
        pieces, positions, ends, targets, sources = [], [], list[int](), list[int](), list[int]()
        filled, num_tokens, seq_len = 0, now.num_tokens, now.seq_len
        index_L, is_mixed = up_to(seq_len), len(now.weights_S) > 1
        self.looked.clear()
        while filled < num_tokens:
            row_rest = seq_len - filled % seq_len
            if (source := self.source_to_read(now, row_rest)) is None:  # the end of the corpus
                break
            buffer = self.buffer_S[source]
            slot, buffer.draws = self.look(source, now)
            document = buffer.slots[slot]
            del self.looked[source]
            tokens, read = document.tokens, document.read
            if tokens is None:
                tokens = self.reread(document)
            length = min(len(tokens) - read, row_rest)
            document.read = after = read + length
            pieces.append(tokens[read:after])
            positions.append(index_L[:length])
            sources.append(source)
            if after < len(tokens):  # cut at the end of the row
                targets.append(int(tokens[after]))
            else:
                targets.append(IGNORED)
                buffer.finish(slot)
            if is_mixed:
                self.charge(source, length, now)
            ends.append(filled := filled + length)
        self.totals["documents"] += targets.count(IGNORED)
        self.totals["tokens"] += filled
        self.totals["open"] -= filled
        self.write(
            rows_NT, seq_len, pieces=pieces, positions=positions, ends=ends, targets=targets, sources=sources
        )

    def fit(self, rows_NT: np.ndarray, now: Settings) -> None:
        """Whole documents, cut at the length of a row, each into the fullest row that has room for it; the
        rest is padding. The step ends with the first document that finds no room."""
        rows = [list[tuple[np.ndarray, int, int]]() for _ in range(now.rows_per_stream)]
        room_R, index_L = [now.seq_len] * now.rows_per_stream, up_to(now.seq_len)
        while (source := self.next_source(now.weights_S, at_most=now.seq_len)) is not None:
            tokens = self.ahead[source]
            length = min(len(tokens), now.seq_len)
            if not (fits := [r for r, room in enumerate(room_R) if room >= length]):
                break
            if len(now.weights_S) > 1:
                self.credits.charge(source, length, self.left(now.weights_S))
            self.take(source)
            target = int(tokens[length]) if length < len(tokens) else IGNORED
            best = min(fits, key=room_R.__getitem__)
            rows[best].append((tokens[:length], target, source))
            room_R[best] -= length
            self.totals.update({"documents": 1, "tokens": length, "truncated": len(tokens) - length})
        for r, row in enumerate(rows):
            lengths = [len(tokens) for tokens, _, _ in row]
            self.write(
                rows_NT[:, r * now.seq_len : (r + 1) * now.seq_len],
                now.seq_len,
                pieces=[tokens for tokens, _, _ in row],
                positions=[index_L[:length] for length in lengths],
                ends=np.cumsum(lengths).tolist(),
                targets=[target for _, target, _ in row],
                sources=[s for _, _, s in row],
            )

    def write(
        self,
        rows_NT: np.ndarray,
        seq_len: int,
        *,
        pieces: list[np.ndarray],
        positions: list[np.ndarray],
        ends: list[int],
        targets: list[int],
        sources: list[int],
    ) -> None:
        """Pieces one after another; behind the last one, padding."""
        filled, num_tokens = ends[-1] if ends else 0, rows_NT.shape[1]
        if filled < num_tokens:
            rows_NT[:, filled:] = np.array([0, IGNORED, PADDING, 0])[: len(rows_NT), None]
            self.totals["padding"] += num_tokens - filled
            if not filled:
                return
        rows_NT = rows_NT[:, :filled]
        tokens_T, labels_T = rows_NT[TOKENS], rows_NT[LABELS]
        np.concatenate(pieces, out=tokens_T)
        labels_T[:-1] = tokens_T[1:]
        labels_T[np.array(ends) - 1] = targets
        if self.document_mask:
            np.concatenate(positions, out=rows_NT[POSITIONS])
        else:
            rows_NT[POSITIONS] = np.arange(filled) % seq_len
        if len(rows_NT) > SOURCES:
            rows_NT[SOURCES] = np.repeat(sources, np.diff(ends, prepend=0))

    def has_more(self, now: Settings) -> bool:
        """Looks at no more than `fill` does first, so that asking changes nothing."""
        is_open = any(buffer.num_open for buffer in self.buffer_S)
        return is_open or any(
            weight and self.next_length(s) is not None for s, weight in enumerate(now.weights_S)
        )

    # -- which source, which document --

    def source_to_read(self, now: Settings, row_rest: int) -> int | None:
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
            if (source := self.next_source(now.weights_S)) is not None:
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
        # of sources no longer wanted
        return next((s for s, buffer in enumerate(self.buffer_S) if buffer.num_open), None)

    def look(self, source: int, now: Settings) -> tuple[int, int]:
        if source not in self.looked:
            self.looked[source] = self.buffer_S[source].look(now.size_S[source])
        return self.looked[source]

    def length_left(self, source: int, now: Settings) -> int:
        """[tokens] Unread of the open document of `source` that would be read on."""
        slot, _ = self.look(source, now)
        document = self.buffer_S[source].slots[slot]
        return len(self.reread(document) if document.tokens is None else document.tokens) - document.read

    def next_source(self, weights_S: list[float], *, at_most: float = math.inf) -> int | None:
        """The source of the next document; None: all are at their ends. One at its end leaves its share to
        the others. at_most: [tokens] that a document counts."""
        if len(weights_S) > 1:
            weights_S = self.left(weights_S)
            due = self.credits.next_source
            return (
                due(weights_S, next_length=lambda s: min(self.next_length(s) or 0, at_most))
                if any(weights_S)
                else None
            )
        return 0 if self.next_length(0) is not None else None

    def left(self, weights_S: list[float]) -> list[float]:
        """The weights of the sources that have a document left."""
        if self.intake.repeats:
            return weights_S
        has_S = [
            weight > 0 and (self.buffer_S[s].num_open or self.next_length(s))
            for s, weight in enumerate(weights_S)
        ]
        total = sum(weight for weight, has in zip(weights_S, has_S, strict=True) if has)
        return [weight / total if has else 0.0 for weight, has in zip(weights_S, has_S, strict=True)]

    def charge(self, source: int, length: int, now: Settings) -> None:
        """Not for what is left of another phase: it is nobody's share."""
        if self.phase == now.phase and now.weights_S[source] > 0:
            self.credits.charge(source, length, self.left(now.weights_S))

    # -- opening documents --

    def refill(self, source: int, now: Settings) -> None:
        buffer = self.buffer_S[source]
        if (room := buffer.room(now.size_S[source])) > 1:
            goal_S = [room if s == source else 0 for s in range(len(self.buffer_S))]
            self.asked(wanted := self.missing(goal_S), self.intake.request(wanted))
        buffer.close_up()
        for _ in range(room):
            if self.next_length(source) is None:
                return
            n = self.next_S[source]
            tokens = self.take(source)
            buffer.add(OpenDocument(source, n, 0, tokens))
            self.totals["open"] += len(tokens)

    def take(self, source: int) -> np.ndarray:
        """The tokens of the next document of `source`, which is that no longer."""
        tokens = self.ahead.pop(source)
        self.advance(source)
        self.intake.saw(source, len(tokens))
        return tokens

    def next_length(self, source: int) -> int | None:
        """Of the document of `source` that is opened next; None: there is none. Bad documents are passed
        over.
        """
        if source in self.ahead:
            return len(self.ahead[source])
        reader, queue = self.intake.readers[source], self.queue_S[source]
        while not reader.is_over(self.next_S[source]):
            if not queue:
                queue += self.intake.request([(source, self.next_S[source])])
            tokens = queue[0].get()
            if isinstance(tokens, np.ndarray):
                self.ahead[source], self.refused_S[source] = tokens, 0
                return len(tokens)
            if tokens is None:
                return None
            self.refuse(tokens)
            self.advance(source)
            self.refused_S[source] += 1
            if self.refused_S[source] >= reader.patience:
                raise DataError(
                    f"no usable document in a whole epoch, the last was {tokens}; check {reader.key}"
                )
        return None

    def advance(self, source: int) -> None:
        self.queue_S[source].popleft()
        self.next_S[source] += self.num_streams

    # -- asking for documents --

    def missing(self, goal_S: Sequence[int]) -> list[Wanted]:
        """What to ask for, so that so many documents of each source lie ahead."""
        wanted = list[Wanted]()
        for s, goal in enumerate(goal_S):
            if goal > (num_ahead := len(self.queue_S[s])):
                first, is_over = self.next_S[s], self.intake.readers[s].is_over
                numbers = range(
                    first + num_ahead * self.num_streams, first + goal * self.num_streams, self.num_streams
                )
                wanted += [(s, n) for n in numbers if not is_over(n)]
        return wanted

    def asked(self, wanted: list[Wanted], pending: Iterable[Pending]) -> None:
        for (s, _), document in zip(wanted, pending, strict=True):
            self.queue_S[s].append(document)

    # -- what was open before a resume --

    def reread(self, document: OpenDocument) -> np.ndarray:
        pending = self.again.pop((document.source, document.n), None)
        tokens = document.tokens = self.intake.again(document.source, document.n, pending=pending)
        if document.read >= len(tokens):
            reader = self.intake.readers[document.source]
            raise reader.foreign(
                f"{reader.where(document.n)}: no token {document.read}, the document has {len(tokens)}"
            )
        return tokens

    def open(self) -> Iterator[OpenDocument]:
        return (document for buffer in self.buffer_S for document in buffer.slots if document is not None)

    def slowest(self, source: int) -> int:
        """The oldest document of `source` that is open, or the next one."""
        return min(
            (document.n for document in self.open() if document.source == source), default=self.next_S[source]
        )

    # -- state --

    @property
    def num_slots(self) -> int:
        return sum(len(buffer.slots) for buffer in self.buffer_S)

    def heads(self, num_slots: int) -> np.ndarray:
        """(3, C): of each slot the document's index in this stream's share of its source, the tokens read,
        the source.
        """
        slots = [
            (d.n // self.num_streams if d else EMPTY, d.read if d else 0, s)
            for s, buffer in enumerate(self.buffer_S)
            for d in buffer.slots
        ]
        beyond = [(BEYOND, 0, 0)] * (num_slots - len(slots))
        return np.array(slots + beyond, np.int64).reshape(num_slots, 3).T

    def restore(
        self,
        next_S: list[int],
        *,
        credit_S: list[float],
        draws_S: list[int],
        phase: int,
        heads_3C: np.ndarray,
    ) -> None:
        self.next_S, self.credits.credit_S, self.phase, self.ahead, self.again = (
            next_S,
            credit_S,
            phase,
            {},
            {},
        )
        for queue in self.queue_S:
            queue.clear()
        slots_S = [list[OpenDocument | None]() for _ in self.buffer_S]
        for index, read, source in heads_3C.T.tolist():
            if index != BEYOND:
                number = self.number + index * self.num_streams
                slots_S[source].append(OpenDocument(source, number, read, None) if index != EMPTY else None)
        for buffer, slots, draws in zip(self.buffer_S, slots_S, draws_S, strict=True):
            buffer.restore(slots, draws=draws)
