"""What are the tokens of a source's document n, and which documents are passed over?

A source's documents are numbered 0, 1, 2, ... over the whole run: document n is document n % N of epoch n // N, in that
epoch's own permutation. What a number stands for needs no state, so any process can read any document.
"""

from collections.abc import Callable, Sized
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from trainer.data.sources import BadDocument, Document, Source, permutation
from trainer.data.tokenizer import end_of_text_id

FOREIGN = "resume with the corpus and the tokenizer of the checkpoint"


class Reader:
    """The documents of one source as tokens. `key`: what the source is called in the configuration."""

    def __init__(
        self, source: Source, *, key: str, tokenizer: Tokenizer | None, seed: int, shuffle: bool, max_document_mb: float,
        refuse: Callable[[BadDocument], None],
    ) -> None:  # fmt: skip
        self.num_documents = len(source) if isinstance(source, Sized) else None
        if self.num_documents == 0:
            raise ValueError(f"the corpus holds no document; check {key}")
        self.source, self.key, self.shuffle, self.refuse = source, key, shuffle, refuse
        self.tokenizer, self.end_of_text = tokenizer, end_of_text_id(tokenizer) if tokenizer else None
        self.max_document_mb = max_document_mb
        self.order = lru_cache(maxsize=2)(lambda epoch: permutation(len(source), seed=seed, epoch=epoch))

    def next_usable(self, n: int, *, step: int) -> tuple[int, np.ndarray]:
        """The first of the documents n, n + step, ... that can be used, and its tokens."""
        patience = 1000 + (self.num_documents or 100_000)  # an epoch, and more of it where the corpus is tiny
        while True:
            try:
                return n, self.tokens(n, max_mb=self.max_document_mb)
            except BadDocument as bad:
                self.refuse(bad)
                n += step
                if (patience := patience - 1) == 0:
                    raise ValueError(f"no usable document in a whole epoch, the last was {bad}; check {self.key}") from bad

    def again(self, n: int, *, read: int) -> np.ndarray:
        """The tokens of a document of which `read` were delivered before a resume: it is finished, whatever the limits are."""
        try:
            tokens = self.tokens(n, max_mb=float("inf"))
        except BadDocument as bad:
            raise ValueError(f"{bad}; {FOREIGN}") from bad
        if read >= len(tokens):
            where = self.source[self.place(n)].where if self.num_documents else f"{self.key}:{n + 1}"
            raise ValueError(f"{where}: no token {read}, the document has {len(tokens)}; {FOREIGN}")
        return tokens

    def tokens(self, n: int, *, max_mb: float) -> np.ndarray:
        """uint32, the end of text included. Raises: BadDocument."""
        document = self.source[self.place(n)]
        tokens = self.tokenized(document, max_mb=max_mb) if document.tokens is None else document.tokens
        if tokens.dtype != np.uint32:
            tokens = tokens.astype(np.uint32)
        if not len(tokens):
            raise BadDocument("empty", document.where, "no token")
        return tokens

    def place(self, n: int) -> int:
        """Where in the corpus document n is."""
        if self.num_documents is None:
            return n
        epoch, position = divmod(n, self.num_documents)
        return int(self.order(epoch)[position]) if self.shuffle else position

    def epoch(self, n: int) -> int:
        num_documents = self.num_documents or self.source.num_rows
        return n // num_documents if num_documents else 0

    def tokenized(self, document: Document, *, max_mb: float) -> np.ndarray:
        if self.tokenizer is None:
            raise ValueError(f"{document.where} is text; set data.tokenizer")
        if (size_mb := len(document.text.encode()) / 1e6) > max_mb:
            raise BadDocument("huge", document.where, f"{size_mb:.2f} MB, max_document_mb={max_mb:g}")
        ids = self.tokenizer.encode_batch_fast([document.text], add_special_tokens=False)[0].ids
        return np.array([*ids, self.end_of_text] if ids else [], np.uint32)
