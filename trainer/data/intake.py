"""Who asks for documents, and before they are needed? Text to tokens, in batches, ahead of the stream.

    wanted (source, n) -> tasks of about 32k tokens -> workers: read, tokenise -> TokenBatch, a Ticket for
    each document

Documents of a forward source are read by one thread of this process, in the order of the requests, and
tokenised by the workers.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from trainer.data.holdout import HELD_OUT, is_held_out
from trainer.data.lengths import NOT_DRAWN
from trainer.data.reader import DataError, Reader
from trainer.data.sources import BadDocument, Document, Tokens, utf8_size
from trainer.data.workers import CLOSED, LazyResult, Workers

TASK_TOKENS, TASK_DOCUMENTS = 32_768, 256
# The priority of documents that were open before a resume: later than those ahead, which are needed now.
RESUMED = 1

Wanted = tuple[int, int]  # source, n


class TokenBatch(list[Tokens | BadDocument | None]):
    """The documents of a task; None: behind the end of the source.

    A batch goes through a pipe as one array of each plane: one by one, documents cost more than tokenising
    them.
    """

    @cached_property
    def lengths(self) -> list[int]:
        """[tokens] Of each document; 0: it is none."""
        return [len(entry.ids) if type(entry) is Tokens else 0 for entry in self]

    def __reduce__(self) -> tuple:
        documents = [document for document in self if isinstance(document, Tokens)]
        masks = [document.mask for document in documents if document.mask is not None]
        entries = [len(entry.ids) if isinstance(entry, Tokens) else entry for entry in self]
        has_mask = {i for i, entry in enumerate(self) if isinstance(entry, Tokens) and entry.mask is not None}
        return unpickled, (packed([document.ids for document in documents]), entries, packed(masks), has_mask)


def packed(arrays: list[np.ndarray]) -> bytes:
    return np.concatenate(arrays).tobytes() if arrays else b""


def unpickled(
    ids: bytes, entries: list[int | BadDocument | None], masks: bytes, has_mask: set[int]
) -> TokenBatch:
    """`entries`: the length of a document, or what stands in its place."""
    ids_T, mask_T = np.frombuffer(ids, np.uint32), np.frombuffer(masks, bool)
    batch, start, mask_start = TokenBatch(), 0, 0
    for i, entry in enumerate(entries):
        if not isinstance(entry, int):
            batch.append(entry)
            continue
        mask = None
        if i in has_mask:
            mask = mask_T[mask_start : mask_start + entry].copy()
            mask_start += entry
        batch.append(Tokens(ids_T[start : start + entry].copy(), mask))  # a copy: not to hold the others
        start += entry
    return batch


class Ticket(NamedTuple):
    """A document that was requested."""

    task: Future | LazyResult
    i: int

    def get(self) -> Tokens | BadDocument | None:
        return self.task.result()[self.i]


class Intake:
    """encode: texts to uint32 ids; None: the sources have tokens."""

    def __init__(
        self,
        readers: Sequence[Reader],
        *,
        encode: Callable[[Sequence[str]], list[np.ndarray]] | None,
        end_of_text: int | None,
        max_document_mb: float,
        holdout: float,
        workers: int,
    ) -> None:
        self.readers, self.encode, self.max_document_mb = readers, encode, max_document_mb
        self.holdout = holdout
        self.repeats = all(reader.repeat for reader in readers)
        self.end_of_text = np.array([end_of_text or 0], np.uint32)
        # a guess of the mean length before any was read, and that all documents are drawn
        self.seen_S, self.used_S, self.tokens_S = ([n] * len(readers) for n in (1, 1, 1000))
        self.lanes: dict[int, SimpleQueue[Callable[[], None] | None]] = {}
        self.broken: dict[int, BaseException] = {}  # sources that could not begin
        self.workers = Workers(workers, self.answer)
        for s, reader in enumerate(readers):
            if workers and reader.num_documents is None:
                lane = self.lanes[s] = SimpleQueue()
                name = f"reads {reader.key}"
                threading.Thread(target=keep_doing, args=(lane,), daemon=True, name=name).start()

    def close(self) -> None:
        self.workers.close()
        for lane in self.lanes.values():
            lane.put(None)

    def forget(self) -> None:
        """Drops the requests that nobody has begun."""
        self.workers.forget()
        for lane in self.lanes.values():
            with contextlib.suppress(Empty):
                while True:
                    lane.get_nowait()

    # -- requests --

    def request(self, wanted: Iterable[Wanted], *, priority: int = 0) -> list[Ticket]:
        """In the order of `wanted`."""
        tickets = list[Ticket]()
        for task in self.tasks(wanted):
            future = self.submit(task, priority=priority)
            tickets += [Ticket(future, i) for i in range(len(task))]
        return tickets

    def tasks(self, wanted: Iterable[Wanted]) -> list[list[Wanted]]:
        tasks, size = list[list[Wanted]](), math.inf
        for source, n in wanted:
            is_full = size >= TASK_TOKENS or len(tasks[-1]) >= TASK_DOCUMENTS
            if is_full or self.is_alone(source, tasks[-1][-1][0]):
                tasks.append([])
                size = 0.0
            tasks[-1].append((source, n))
            size += self.mean_length(source)
        return tasks

    def is_alone(self, source: int, before: int) -> bool:
        """Documents of a source with its own thread are not requested together with others."""
        return source != before and (source in self.lanes or before in self.lanes)

    def submit(self, task: list[Wanted], *, priority: int) -> Future | LazyResult:
        is_new = priority != RESUMED
        places = [(s, n, self.readers[s].place(n)) for s, n in task]
        source = task[0][0]
        lane = self.lanes.get(source)
        if lane is None:
            return self.workers.submit((is_new, places), priority=priority)
        if self.workers.is_closed:
            raise RuntimeError(CLOSED)
        future = Future()

        def read() -> None:
            try:
                error = self.broken.get(source)
                if error is not None:
                    raise error
                documents = [(s, n, self.document(s, i)) for s, n, i in places]
                self.workers.submit((is_new, documents), priority=priority, future=future)
            except BaseException as error:  # noqa: BLE001  # raised where the result is wanted
                future.set_exception(error)

        lane.put(read)
        return future

    def reread(self, source: int, n: int, *, ticket: Ticket | None) -> Tokens:
        """The document that was open before a resume, whatever the limits are now. It is read at once if no
        worker has begun it.
        """
        reader = self.readers[source]
        if ticket is None or not (ticket.task.done() or source in self.lanes):
            [document] = self.answer((False, [(source, n, reader.place(n))]))
        else:
            document = ticket.get()
        if not isinstance(document, Tokens):
            raise reader.foreign(document or f"{reader.key}: document {n} is behind its end")
        return document

    def seek(self, source: int, due: dict[int, int], unread: set[int]) -> None:
        """See Reader.seek."""
        lane = self.lanes.get(source)
        if lane is None:
            self.readers[source].seek(due, unread)
            return

        def seek() -> None:
            self.broken.pop(source, None)
            try:
                self.readers[source].seek(due, unread)
            except BaseException as error:  # noqa: BLE001  # raised where the first document is wanted
                self.broken[source] = error

        lane.put(seek)

    # -- lengths --

    def mean_length(self, source: int) -> float:
        """[tokens] Of the documents of a source that this rank has come to; those that were not drawn have
        none.
        """
        return self.tokens_S[source] / self.seen_S[source]

    def to_request(self, source: int, num: float) -> int:
        """How many documents are requested for so many to be drawn, about."""
        return math.ceil(num * self.seen_S[source] / self.used_S[source])

    def count_length(self, source: int, length: int | None) -> None:
        """None: the document was not drawn."""
        self.seen_S[source] += 1
        self.used_S[source] += length is not None
        self.tokens_S[source] += length or 0

    def count_lengths(self, source: int, lengths: Sequence[int]) -> None:
        """Of documents that were drawn."""
        self.seen_S[source] += len(lengths)
        self.used_S[source] += len(lengths)
        self.tokens_S[source] += sum(lengths)

    # -- answers: in a worker, or here if there is none --

    def answer(self, request: tuple[bool, list[tuple[int, int, Any]]]) -> TokenBatch:
        """`request`: are they new, or were they open before a resume; source, number, document or place of
        each.
        """
        is_new, entries = request
        documents = [self.document(s, it) if type(it) is int else it for s, _, it in entries]
        batch, texts = TokenBatch(), dict[int, str]()
        for i, document in enumerate(documents):
            entry = document
            if isinstance(document, Document):
                entry = self.checked(document, *entries[i][:2], is_new=is_new)
                if entry is None:
                    texts[i] = document.text
            batch.append(entry)
        if texts:
            if self.encode is None:
                raise DataError(f"{documents[next(iter(texts))].where} is text; set data.tokenizer")
            for i, ids in zip(texts, self.encode(list(texts.values())), strict=True):
                is_empty = not len(ids)
                batch[i] = (
                    empty(documents[i]) if is_empty else Tokens(np.concatenate([ids, self.end_of_text]))
                )
        batch.lengths  # noqa: B018  # found now, while the documents are in the processor's cache
        return batch

    def checked(
        self, document: Document, source: int, n: int, *, is_new: bool
    ) -> Tokens | BadDocument | None:
        """Its tokens; None: it is text that may be tokenised. What was open before a resume is within limits,
        and was drawn. Raises: DataError.
        """
        reader = self.readers[source]
        limit_mb = self.max_document_mb if is_new else math.inf
        entry = checked(document, limit_mb=limit_mb, holdout=self.holdout)
        if not is_new or reader.bias is None or isinstance(entry, BadDocument):
            return entry
        num_bytes = utf8_size(document.text) if entry is None else document.num_bytes
        length = len(entry.ids) if num_bytes is None else num_bytes / reader.bias.bytes_per_token
        if reader.draws(n, length):
            return entry
        return BadDocument(
            NOT_DRAWN, document.where, f"its length draws {reader.bias.probability(length):.2f}"
        )

    def document(self, source: int, place: int) -> Document | BadDocument | None:
        reader = self.readers[source]
        try:
            document = reader.read(place)
        except BadDocument as bad:
            return bad
        if document is not None and document.mask is not None and not reader.masks:
            remedy = "its class must have masks = True, so that all ranks know of it"
            raise DataError(f"{reader.key}: {document.where} has a mask; {remedy}")
        return document


def checked(document: Document, *, limit_mb: float, holdout: float = 0.0) -> Tokens | BadDocument | None:
    """Its tokens; None: it is text of a size that may be tokenised. Raises: DataError."""
    if is_held_out(document, share=holdout):
        return BadDocument(HELD_OUT, document.where, f"data.holdout={holdout:g}")
    if document.tokens is not None:
        if document.num_bytes is not None and document.num_bytes / 1e6 > limit_mb:
            return huge(document, document.num_bytes / 1e6, limit_mb)
        return checked_tokens(document) if len(document.tokens) else empty(document)
    if document.mask is not None:
        raise DataError(f"{document.where}: a mask needs tokens, and the document is text")
    try:
        size_mb = utf8_size(document.text) / 1e6
    except UnicodeEncodeError as error:  # half a surrogate pair, which no encoding of text can hold
        return BadDocument("not_utf8", document.where, str(error))
    if size_mb > limit_mb:
        return huge(document, size_mb, limit_mb)
    return None


def checked_tokens(document: Document) -> Tokens:
    ids, mask = np.ascontiguousarray(document.tokens, np.uint32), document.mask
    if mask is None:
        return Tokens(ids)
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != ids.shape:
        message = f"{document.where}: the mask has shape {mask.shape} and dtype {mask.dtype}"
        raise DataError(f"{message}; a bool for each of the {len(ids)} tokens is needed")
    return Tokens(ids, mask)


def huge(document: Document, size_mb: float, limit_mb: float) -> BadDocument:
    return BadDocument("huge", document.where, f"{size_mb:.2f} MB, max_document_mb={limit_mb:g}")


def empty(document: Document) -> BadDocument:
    return BadDocument("empty", document.where, "no token")


def keep_doing(lane: SimpleQueue[Callable[[], None] | None]) -> None:
    job = lane.get()
    while job is not None:
        job()
        job = lane.get()
