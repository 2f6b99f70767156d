"""What does one virtual stream deliver, and what must be remembered for it to go on?

    queues of documents asked for, one a source -> credits choose -> open documents -> pieces -> rows

Virtual stream v of V reads documents v, v + V, v + 2V, ... of each source. What it delivers is a function of the corpus, the
tokenizer, the seed, the program and its position: it knows of no ranks, of no other stream, and not of who reads ahead.

Letters: T tokens of the stream in one step, L of a row, N planes, S sources, C slots of the buffer.
"""

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
    buffer: int = 0
    phase: int = 0  # how often the mixture has changed
    drain: bool = False  # documents opened in an earlier phase are read to their ends before this one opens any

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
    again: dict[Wanted, Pending] = field(default_factory=dict)  # documents that were open before a resume, asked for

    def __post_init__(self) -> None:
        num_sources = len(self.intake.readers)
        self.next_S = [self.number] * num_sources  # the document of each source that is opened next
        self.queue_S = [deque[Pending]() for _ in range(num_sources)]  # that one, and those behind it
        self.ahead: dict[int, np.ndarray] = {}  # tokens of the next document of a source, once they were looked at
        self.refused_S = [0] * num_sources  # bad documents in a row
        self.credits = Credits(num_sources, seed=self.seed, stream=self.number)
        self.buffer = DocumentBuffer(seed=self.seed, stream=self.number)

    # -- rows --

    def fill(self, rows_NT: np.ndarray, now: Settings) -> None:
        """Tokens, labels, positions and, if there is room for them, sources of the rows of one step, in place."""
        pieces, positions, ends, targets, sources = [], [], list[int](), list[int](), list[int]()
        filled, num_tokens, seq_len = 0, now.num_tokens, now.seq_len
        buffer, buffer_size, index_L = self.buffer, now.buffer, up_to(seq_len)
        while filled < num_tokens:
            if buffer.num_open <= buffer_size:
                self.refill(now)
                if not buffer.num_open:  # the end of the corpus
                    break
            slot = buffer.pick(buffer_size)
            document = buffer.slots[slot]
            tokens, read = document.tokens, document.read
            if tokens is None:
                tokens = document.tokens = self.reread(document)
            length = min(len(tokens) - read, seq_len - filled % seq_len)
            document.read = after = read + length
            pieces.append(tokens[read:after])
            positions.append(index_L[:length])
            sources.append(document.source)
            if after < len(tokens):  # cut at the end of the row
                targets.append(int(tokens[after]))
            else:
                targets.append(IGNORED)
                buffer.finish(slot)
            ends.append(filled := filled + length)
        self.totals["documents"] += targets.count(IGNORED)
        self.totals["tokens"] += filled
        self.totals["open"] -= filled
        self.write(rows_NT, seq_len, pieces=pieces, positions=positions, ends=ends, targets=targets, sources=sources)

    def fit(self, rows_NT: np.ndarray, now: Settings) -> None:
        """Whole documents, cut at the length of a row, each into the fullest row that has room for it; the rest is padding. The
        step ends with the first document that finds no room."""
        rows = [list[tuple[np.ndarray, int, int]]() for _ in range(now.rows_per_stream)]
        room_R, index_L = [now.seq_len] * now.rows_per_stream, up_to(now.seq_len)
        while (source := self.choose(now.weights_S)) is not None:
            tokens = self.ahead[source]
            length = min(len(tokens), now.seq_len)
            if not (fits := [r for r, room in enumerate(room_R) if room >= length]):
                break
            self.take(source, now.weights_S)
            target = int(tokens[length]) if length < len(tokens) else IGNORED
            best = min(fits, key=room_R.__getitem__)
            rows[best].append((tokens[:length], target, source))
            room_R[best] -= length
            self.totals.update({"documents": 1, "tokens": length, "truncated": len(tokens) - length})
        for r, row in enumerate(rows):
            lengths = [len(tokens) for tokens, _, _ in row]
            self.write(
                rows_NT[:, r * now.seq_len : (r + 1) * now.seq_len], now.seq_len,
                pieces=[tokens for tokens, _, _ in row], positions=[index_L[:length] for length in lengths],
                ends=np.cumsum(lengths).tolist(), targets=[target for _, target, _ in row], sources=[s for _, _, s in row],
            )  # fmt: skip

    def write(
        self, rows_NT: np.ndarray, seq_len: int, *, pieces: list[np.ndarray], positions: list[np.ndarray], ends: list[int],
        targets: list[int], sources: list[int],
    ) -> None:  # fmt: skip
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
        return self.buffer.num_open > 0 or self.choose(now.weights_S) is not None

    # -- opening documents --

    def refill(self, now: Settings) -> None:
        if self.phase != now.phase and now.drain and self.buffer.num_open:
            return
        self.phase = now.phase
        if (room := self.buffer.room(now.buffer)) > 1:
            goal_S = self.intake.goals(room, now.weights_S)
            self.asked(wanted := self.missing(goal_S), self.intake.request(wanted))
        self.buffer.close_up()
        for _ in range(room):
            if (source := self.choose(now.weights_S)) is None:
                return
            n = self.next_S[source]
            tokens = self.take(source, now.weights_S)
            self.buffer.add(OpenDocument(source, n, 0, tokens))
            self.totals["open"] += len(tokens)

    def choose(self, weights_S: list[float]) -> int | None:
        """The source of the next document; None: all are at their ends. One at its end leaves its share to the others."""
        if len(weights_S) > 1:
            weights_S = self.left(weights_S)
            return self.credits.next_source(weights_S, next_length=self.next_length) if any(weights_S) else None
        return 0 if self.next_length(0) is not None else None

    def left(self, weights_S: list[float]) -> list[float]:
        """The weights of the sources that have a document left."""
        if self.intake.repeats:
            return weights_S
        left_S = [weight if weight and self.next_length(s) is not None else 0.0 for s, weight in enumerate(weights_S)]
        return [weight / total for weight in left_S] if (total := sum(left_S)) else left_S

    def take(self, source: int, weights_S: list[float]) -> np.ndarray:
        """The tokens of the next document of `source`, which is that no longer."""
        if len(weights_S) > 1:
            self.credits.charge(source, len(self.ahead[source]), self.left(weights_S))
        tokens = self.ahead.pop(source)
        self.advance(source)
        self.intake.saw(source, len(tokens))
        return tokens

    def next_length(self, source: int) -> int | None:
        """Of the document of `source` that is opened next; None: there is none. Bad documents are passed over."""
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
                raise DataError(f"no usable document in a whole epoch, the last was {tokens}; check {reader.key}")
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
                numbers = range(first + num_ahead * self.num_streams, first + goal * self.num_streams, self.num_streams)
                wanted += [(s, n) for n in numbers if not is_over(n)]
        return wanted

    def asked(self, wanted: list[Wanted], pending: Iterable[Pending]) -> None:
        for (s, _), document in zip(wanted, pending, strict=True):
            self.queue_S[s].append(document)

    # -- what was open before a resume --

    def reread(self, document: OpenDocument) -> np.ndarray:
        pending = self.again.pop((document.source, document.n), None)
        tokens = self.intake.again(document.source, document.n, pending=pending)
        if document.read >= len(tokens):
            reader = self.intake.readers[document.source]
            raise reader.foreign(f"{reader.where(document.n)}: no token {document.read}, the document has {len(tokens)}")
        return tokens

    def open(self) -> Iterator[OpenDocument]:
        return (document for document in self.buffer.slots if document is not None)

    def slowest(self, source: int) -> int:
        """The oldest document of `source` that is open, or the next one."""
        return min((document.n for document in self.open() if document.source == source), default=self.next_S[source])

    # -- state --

    def heads(self, num_slots: int) -> np.ndarray:
        """(3, C): of each slot the document's index in this stream's share of its source, the tokens read, the source."""
        slots = [(EMPTY, 0, 0) if d is None else (d.n // self.num_streams, d.read, d.source) for d in self.buffer.slots]
        beyond = [(BEYOND, 0, 0)] * (num_slots - len(slots))
        return np.array(slots + beyond, np.int64).reshape(num_slots, 3).T

    def restore(self, next_S: list[int], *, credit_S: list[float], draws: int, phase: int, heads_3C: np.ndarray) -> None:
        self.next_S, self.credits.credit_S, self.phase, self.ahead = next_S, credit_S, phase, {}
        for queue in self.queue_S:
            queue.clear()
        slots = [
            None if index == EMPTY else OpenDocument(source, self.number + index * self.num_streams, read, None)
            for index, read, source in heads_3C.T.tolist() if index != BEYOND
        ]  # fmt: skip
        self.buffer.restore(slots, draws=draws)
        self.again = {}
