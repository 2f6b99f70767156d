"""What does one virtual stream deliver, and what must be remembered for it to go on?

    credits -> a source -> its next document -> open documents -> pieces -> rows

Virtual stream v of V reads documents v, v + V, v + 2V, ... of each source. What it delivers is a function of the corpus, the
tokenizer, the seed, the program and its position: it knows of no ranks and of no other stream.

Letters: T tokens of the stream in one step, L of a row, S sources, C slots of the buffer, P pieces.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from trainer.data.buffer import DocumentBuffer, OpenDocument
from trainer.data.mixture import Credits
from trainer.data.reader import Reader

IGNORED = -100  # the label that cross entropy leaves out
EMPTY, BEYOND = -1, -2  # in a state: a slot without a document, and what is behind the last slot


class VirtualStream:
    def __init__(self, number: int, *, num_streams: int, readers: Sequence[Reader], seed: int, totals: Counter[str]) -> None:
        self.number, self.num_streams, self.readers, self.totals = number, num_streams, readers, totals
        self.next_S = [number] * len(readers)  # the document of each source that is opened next
        self.credits = Credits(len(readers), seed=seed, stream=number)
        self.buffer = DocumentBuffer(seed=seed, stream=number)
        self.ahead: dict[int, np.ndarray] = {}  # tokens of the next document of a source, read to know its length

    # -- rows --

    def fill(
        self, rows_3T: np.ndarray, *, seq_len: int, document_mask: bool, weights_S: Sequence[float], buffer_size: int
    ) -> None:  # fmt: skip
        """Tokens, labels and positions of the rows of one step, in place."""
        tokens_T, labels_T, positions_T = rows_3T
        pieces, positions, ends, targets = list[np.ndarray](), list[np.ndarray](), list[int](), list[int]()
        filled, num_tokens, buffer, index_L = 0, len(tokens_T), self.buffer, np.arange(seq_len)
        while filled < num_tokens:
            if buffer.num_open <= buffer_size:
                self.refill(buffer_size, weights_S)
            slot = buffer.pick(buffer_size)
            document = buffer.slots[slot]
            if document.tokens is None:
                document.tokens = self.readers[document.source].again(document.n, read=document.read)
            tokens, read = document.tokens, document.read
            length = min(len(tokens) - read, seq_len - filled % seq_len)
            document.read = after = read + length
            pieces.append(tokens[read:after])
            positions.append(index_L[:length])
            if after < len(tokens):  # cut at the end of the row
                targets.append(int(tokens[after]))
            else:
                targets.append(IGNORED)
                buffer.finish(slot)
            ends.append(filled := filled + length)
        np.concatenate(pieces, out=tokens_T)
        labels_T[:-1] = tokens_T[1:]
        labels_T[np.array(ends) - 1] = targets
        np.concatenate(positions if document_mask else [index_L] * (num_tokens // seq_len), out=positions_T)
        self.totals["documents"] += targets.count(IGNORED)
        self.totals["tokens"] += filled
        self.totals["open"] -= filled

    def refill(self, buffer_size: int, weights_S: Sequence[float]) -> None:
        room, opened = self.buffer.room(buffer_size), 0
        self.buffer.close_up()
        for _ in range(room):
            source = self.credits.next_source(weights_S, next_length=self.next_length) if len(weights_S) > 1 else 0
            tokens = self.ahead.pop(source) if source in self.ahead else self.read_next(source)
            if len(weights_S) > 1:
                self.credits.charge(source, len(tokens), weights_S)
            self.buffer.add(OpenDocument(source, self.next_S[source], 0, tokens))
            self.next_S[source] += self.num_streams
            opened += len(tokens)
        self.totals["open"] += opened

    def next_length(self, source: int) -> int:
        """Of the document of `source` that is opened next; it is kept for then."""
        if source not in self.ahead:
            self.ahead[source] = self.read_next(source)
        return len(self.ahead[source])

    def read_next(self, source: int) -> np.ndarray:
        self.next_S[source], tokens = self.readers[source].next_usable(self.next_S[source], step=self.num_streams)
        return tokens

    # -- what is still to be read --

    def unread(self, source: int) -> Iterator[int]:
        """Documents of `source` that were open before a resume and have not been read again."""
        slots = (document for document in self.buffer.slots if document is not None)
        return (document.n for document in slots if document.source == source and document.tokens is None)

    def slowest(self, source: int) -> int:
        """The oldest document of `source` that is open, or the next one."""
        slots = (document for document in self.buffer.slots if document is not None)
        return min((document.n for document in slots if document.source == source), default=self.next_S[source])

    # -- state --

    def heads(self, num_slots: int) -> np.ndarray:
        """(3, C): of each slot the document's index in this stream's share of its source, the tokens read, the source."""
        slots = [(EMPTY, 0, 0) if d is None else (d.n // self.num_streams, d.read, d.source) for d in self.buffer.slots]
        beyond = [(BEYOND, 0, 0)] * (num_slots - len(slots))
        return np.array(slots + beyond, np.int64).reshape(num_slots, 3).T

    def restore(self, next_S: list[int], *, credit_S: list[float], draws: int, heads_3C: np.ndarray) -> None:
        self.next_S, self.credits.credit_S, self.ahead = next_S, credit_S, {}
        slots = [
            None if index == EMPTY else OpenDocument(source, self.number + index * self.num_streams, read, None)
            for index, read, source in heads_3C.T.tolist() if index != BEYOND
        ]  # fmt: skip
        self.buffer.restore(slots, draws=draws)
