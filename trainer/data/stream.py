"""How does a document become rows of tokens: the same rows on any number of ranks, and after any restart?

    source[i] --tokenizer--> tokens of document n --stream v--> rows --rank r--> tokens_BL, labels_BL,
     (text)  + end of text   (uint32, one at a time) (packed)  (its streams)     positions_BL

The order is arithmetic, so there is little to save. The run's document n = 0, 1, 2, ... is document n % N of
epoch n // N, in that epoch's own permutation. Virtual stream v reads documents v, v + V, v + 2V, ... and
fills rows with them, one after another; a global batch takes G / V rows from each stream. A rank owns V / R
neighbouring streams: a global batch does not depend on R. The state is V pairs (document, tokens read of it).

Letters: B rows of a microbatch, L tokens of a row, T tokens of one stream in one step, G rows of an optimizer
step (the global batch), V virtual streams (not the vocabulary), R data-parallel ranks, N documents.
Units: offsets and lengths in tokens, `_mb` in 10^6 bytes of UTF-8, lines and rows of a file counted from 1.
"""

from collections import Counter
from collections.abc import Callable, Sized
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from trainer.data.sources import BAD_KINDS, BadDocument, Document, Source, permutation
from trainer.data.tokenizer import end_of_text_id

COUNTED = ("documents", "tokens", *BAD_KINDS)
IGNORED = -100  # the label that cross entropy leaves out


class Batch(NamedTuple):
    """One microbatch, int64. A label is the next token of its document; positions restart with each piece of a
    document, and so does attention; without `document_mask` with each row only."""

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    positions_BL: torch.Tensor


class TokenStream:
    """The rows of one rank, step after step, without end."""

    def __init__(
        self, *, source: Source, tokenizer: Tokenizer | None, seq_len: int, global_batch: int,
        num_streams: int, seed: int, rank: int, num_ranks: int, shuffle: bool = True,
        on_bad: Literal["skip", "fatal"] = "skip", max_document_mb: float = 100.0, document_mask: bool = True,
        report: Callable[[BadDocument], None] = lambda bad: None,
    ) -> None:  # fmt: skip
        self.num_streams, self.num_ranks = num_streams, num_ranks
        self.resize(seq_len=seq_len, global_batch=global_batch)
        self.num_documents = len(source) if isinstance(source, Sized) else None
        if self.num_documents == 0:
            raise ValueError("the corpus holds no document; check data.source")
        self.source = source
        self.tokenizer, self.end_of_text = tokenizer, end_of_text_id(tokenizer) if tokenizer else None
        self.on_bad, self.max_document_mb, self.report = on_bad, max_document_mb, report
        self.shuffle, self.document_mask, self.totals = shuffle, document_mask, Counter[str]()
        self.order = lru_cache(maxsize=2)(lambda epoch: permutation(len(source), seed=seed, epoch=epoch))
        owned = num_streams // num_ranks
        self.streams = range(rank * owned, (rank + 1) * owned)
        self.move_to(np.stack([np.arange(num_streams), np.zeros(num_streams, int)], axis=1))

    def move_to(self, cursor_V2: np.ndarray) -> None:
        self.cursor_V2, self.tokens_of = cursor_V2, dict[int, np.ndarray]()  # a stream's current document
        if self.num_documents is None:
            self.source.follow(int(cursor_V2[self.streams, 0].min()), wanted=self.wants)

    def resize(self, *, seq_len: int, global_batch: int) -> None:
        """Rows of another length, or another number of them, from the next step on; the streams read on where they are."""
        check_split(global_batch=global_batch, num_streams=self.num_streams, num_ranks=self.num_ranks)
        self.seq_len, self.rows_per_stream = seq_len, global_batch // self.num_streams

    def wants(self, n: int) -> bool:
        stream = n % self.num_streams
        return stream in self.streams and n >= self.cursor_V2[stream, 0]

    # -- rows --

    def next_step(self, micro_batch: int) -> list[Batch]:
        """This rank's rows of the next optimizer step, in microbatches of `micro_batch` rows."""
        if (rows := len(self.streams) * self.rows_per_stream) % micro_batch:
            given = f"micro_batch={micro_batch} does not divide the {rows} rows of a rank"
            raise ValueError(f"{given}; use one of {divisors(rows)}")
        rows_3BL = torch.from_numpy(np.concatenate([self.next_rows(stream) for stream in self.streams], 1))
        return [Batch(*batch_3BL) for batch_3BL in rows_3BL.split(micro_batch, dim=1)]

    def next_rows(self, stream: int) -> np.ndarray:
        """The stream's rows of one step: tokens, labels and positions, (3, rows, L)."""
        index_T = np.arange(self.rows_per_stream * self.seq_len)
        tokens_T, labels_T = np.empty_like(index_T), np.full_like(index_T, IGNORED)
        start_T = index_T // self.seq_len * self.seq_len  # of the row, or of the piece if that is later
        filled = 0
        while filled < len(index_T):
            document, read = self.document(stream), int(self.cursor_V2[stream, 1])
            piece = document[read : read + len(index_T) - filled]
            targets = document[read + 1 : read + 1 + len(piece)]  # one fewer where the document ends
            tokens_T[filled : filled + len(piece)] = piece
            labels_T[filled : filled + len(targets)] = targets
            if self.document_mask:
                start_T[filled] = filled
            filled += len(piece)
            self.advance(stream, len(piece))
        rows_3T = np.stack([tokens_T, labels_T, index_T - np.maximum.accumulate(start_T)])
        return rows_3T.reshape(3, self.rows_per_stream, self.seq_len)

    def document(self, stream: int) -> np.ndarray:
        """The tokens of the stream's current document; passes over those that cannot be used."""
        patience = 1000 + (self.num_documents or 100_000)  # an epoch, and more of it where the corpus is tiny
        while stream not in self.tokens_of:
            try:
                self.tokens_of[stream] = self.read(stream)
            except BadDocument as bad:
                self.refuse(bad)
                self.cursor_V2[stream] += (self.num_streams, 0)
                if (patience := patience - 1) == 0:
                    message = f"no usable document in a whole epoch, the last was {bad}; check data.source"
                    raise ValueError(message) from bad
        return self.tokens_of[stream]

    def read(self, stream: int) -> np.ndarray:
        n, offset = self.cursor_V2[stream].tolist()
        document = self.source[self.place(n)]
        tokens = self.tokenized(document) if document.tokens is None else document.tokens.astype(np.uint32)
        if not len(tokens):
            raise BadDocument("empty", document.where, "no token")
        if offset >= len(tokens):
            remedy = "resume with the corpus and the tokenizer of the checkpoint"
            raise ValueError(f"{document.where}: no token {offset}, the document has {len(tokens)}; {remedy}")
        return tokens

    def place(self, n: int) -> int:
        """Where in the corpus the run's document n is."""
        if self.num_documents is None:
            return n
        epoch, position = divmod(n, self.num_documents)
        return int(self.order(epoch)[position]) if self.shuffle else position

    def tokenized(self, document: Document) -> np.ndarray:
        if self.tokenizer is None:
            raise ValueError(f"{document.where} is text; set data.tokenizer")
        if (size_mb := len(document.text.encode()) / 1e6) > self.max_document_mb:
            limit = f"max_document_mb={self.max_document_mb:g}"
            raise BadDocument("huge", document.where, f"{size_mb:.2f} MB, {limit}")
        ids = self.tokenizer.encode_batch_fast([document.text], add_special_tokens=False)[0].ids
        return np.array([*ids, self.end_of_text] if ids else [], np.uint32)

    def refuse(self, bad: BadDocument) -> None:
        if self.on_bad == "fatal":
            bad.add_note("data.on_bad=skip counts and reports such documents, and goes on")
            raise bad
        self.totals[bad.kind] += 1
        self.report(bad)

    def advance(self, stream: int, num_tokens: int) -> None:
        self.totals["tokens"] += num_tokens
        self.cursor_V2[stream, 1] += num_tokens
        if self.cursor_V2[stream, 1] == len(self.tokens_of[stream]):
            del self.tokens_of[stream]
            self.cursor_V2[stream] = (self.cursor_V2[stream, 0] + self.num_streams, 0)
            self.totals["documents"] += 1

    # -- state --

    @property
    def counts(self) -> dict[str, int]:
        """What this rank has read since the start of the run, and the epoch its slowest stream is in."""
        num_documents = self.num_documents or self.source.num_rows
        epoch = int(self.cursor_V2[self.streams, 0].min()) // num_documents if num_documents else 0
        return {"epoch": epoch, **{name: self.totals[name] for name in COUNTED}}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's part: the state of the run is the sum over its ranks."""
        cursor_V2 = torch.zeros(self.num_streams, 2, dtype=torch.int64)
        cursor_V2[self.streams] = torch.from_numpy(self.cursor_V2[self.streams])
        return {"cursor_V2": cursor_V2, "counts": torch.tensor([self.totals[name] for name in COUNTED])}

    def load_state_dict(self, state: dict[str, torch.Tensor], *, keep_counts: bool) -> None:
        """Goes on from a summed state. `keep_counts` on one rank only, for their sum to stay right."""
        cursor_V2 = state["cursor_V2"].numpy().copy()
        if len(cursor_V2) != self.num_streams:
            given = f"the checkpoint has {len(cursor_V2)} streams, this run {self.num_streams}"
            raise ValueError(f"{given}; use data.num_streams={len(cursor_V2)}")
        if (cursor_V2[:, 0] % self.num_streams != np.arange(self.num_streams)).any():
            raise ValueError("the state is not one run's: sum the state_dict of all its ranks, each once")
        counts = state["counts"].tolist() if keep_counts else [0] * len(COUNTED)
        self.totals = Counter(dict(zip(COUNTED, counts, strict=True)))
        self.move_to(cursor_V2)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def check_split(*, global_batch: int, num_streams: int, num_ranks: int) -> None:
    """Each stream serves the same number of rows, each rank the same number of streams."""
    if global_batch % num_streams or num_streams % num_ranks:
        choices = [d for d in divisors(global_batch) if d % num_ranks == 0]
        remedy = f"num_streams from {choices}" if choices else f"a global_batch that {num_ranks} divides"
        given = f"num_streams={num_streams} must divide global_batch={global_batch}"
        raise ValueError(f"{given} and be a multiple of the {num_ranks} data-parallel ranks; use {remedy}")
