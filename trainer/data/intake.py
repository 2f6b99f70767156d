"""Who asks for documents, and before they are needed? Text to tokens, in batches, ahead of the stream.

    wanted (source, numbers) -> tasks of about 32k tokens -> workers: read, tokenise -> TokenBatch, a Ticket
    for neighbours

Documents of a forward source are read by one thread of this process, in the order of the requests, and
tokenised by the workers.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import chain, groupby
from operator import itemgetter
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from trainer.data.batches import NO_IDS, TokenBatch
from trainer.data.holdout import HELD_OUT, is_held_out, may_be_held_out
from trainer.data.lengths import NOT_DRAWN
from trainer.data.reader import DataError, Reader
from trainer.data.sources import BadDocument, Document, Tokens, utf8_size
from trainer.data.workers import CLOSED, LazyResult, Workers

TASK_TOKENS, TASK_DOCUMENTS = 32_768, 256
# The priority of documents that were open before a resume: later than those ahead, which are needed now.
RESUMED = 1


class Wanted(NamedTuple):
    """Documents by their numbers in a source, for one stream."""

    source: int
    numbers: range


class Ticket(NamedTuple):
    """Documents that were requested, neighbours in their task."""

    task: Future | LazyResult
    first: int
    stop: int

    def get(self) -> Tokens | BadDocument | None:
        """The first one."""
        return self.task.result()[self.first]


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

    def request(self, wanted: Sequence[Wanted], *, priority: int = 0) -> list[list[Ticket]]:
        """The tickets of each of `wanted`, in its order."""
        tickets = [list[Ticket]() for _ in wanted]
        for task in self.tasks(wanted):
            future, stop = self.submit([part for _, part in task], priority=priority), 0
            for which, (_, numbers) in task:
                first, stop = stop, stop + len(numbers)
                tickets[which].append(Ticket(future, first, stop))
        return tickets

    def tasks(self, wanted: Sequence[Wanted]) -> list[list[tuple[int, Wanted]]]:
        """Parts of what is wanted, each with its place in `wanted`."""
        tasks, size, num_documents = list[list[tuple[int, Wanted]]](), math.inf, 0
        for which, (source, numbers) in enumerate(wanted):
            mean_length = self.mean_length(source)
            while numbers:
                is_full = size >= TASK_TOKENS or num_documents >= TASK_DOCUMENTS
                if is_full or self.is_alone(source, tasks[-1][-1][1].source):
                    tasks.append([])
                    size, num_documents = 0.0, 0
                room = min(TASK_DOCUMENTS - num_documents, math.ceil((TASK_TOKENS - size) / mean_length))
                part, numbers = numbers[:room], numbers[room:]
                tasks[-1].append((which, Wanted(source, part)))
                size, num_documents = size + len(part) * mean_length, num_documents + len(part)
        return tasks

    def is_alone(self, source: int, before: int) -> bool:
        """Documents of a source with its own thread are not requested together with others."""
        return source != before and (source in self.lanes or before in self.lanes)

    def submit(self, task: list[Wanted], *, priority: int) -> Future | LazyResult:
        is_new = priority != RESUMED
        places = list[tuple[int, list[range], list[int]]]()
        for s, parts in groupby(task, itemgetter(0)):
            ranges = [numbers for _, numbers in parts]
            places.append((s, ranges, list(chain.from_iterable(map(self.readers[s].places, ranges)))))
        source = task[0].source
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
                documents = [(s, ranges, [self.document(s, i) for i in of_s]) for s, ranges, of_s in places]
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
            [document] = self.answer((False, [(source, [range(n, n + 1)], [reader.place(n)])]))
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

    def count_drawn(self, source: int, num: int, num_tokens: int) -> None:
        self.seen_S[source] += num
        self.used_S[source] += num
        self.tokens_S[source] += num_tokens

    def count_not_drawn(self, source: int) -> None:
        self.seen_S[source] += 1

    # -- answers: in a worker, or here if there is none --

    def answer(self, request: tuple[bool, list[tuple[int, list[range], list[Any]]]]) -> TokenBatch:
        """`request`: are the documents new, or were they open before a resume; of each source its documents'
        numbers, and the documents or their places.
        """
        is_new, parts = request
        ids_D, masks, others, texts = list[np.ndarray](), dict[int, np.ndarray](), {}, {}
        for source, ranges, entries in parts:
            first = len(ids_D)
            ids_D += self.ready(source, entries, is_new=is_new)
            missing = [d for d in range(first, len(ids_D)) if not len(ids_D[d])]
            numbers = list(chain.from_iterable(ranges)) if missing else ()
            for d in missing:
                entry = self.entry(source, numbers[d - first], entries[d - first], is_new=is_new)
                if isinstance(entry, Tokens):
                    ids_D[d] = entry.ids
                    masks |= {} if entry.mask is None else {d: entry.mask}
                else:
                    (texts if isinstance(entry, Document) else others)[d] = entry
        for d, ids in zip(texts, self.encoded(list(texts.values())), strict=True):
            if len(ids):
                ids_D[d] = np.concatenate([ids, self.end_of_text])
            else:
                others[d] = empty(texts[d])
        return TokenBatch(ids_D, masks, others)

    def encoded(self, documents: list[Document]) -> list[np.ndarray]:
        """The ids of texts. Raises: DataError."""
        if not documents:
            return []
        if self.encode is None:
            raise DataError(f"{documents[0].where} is text; set data.tokenizer")
        return self.encode([document.text for document in documents])

    def ready(self, source: int, entries: list[Any], *, is_new: bool) -> list[np.ndarray]:
        """The ids of the documents that a source has as tokens and that are surely within limits; none of
        those that must be looked at one by one.
        """
        reader = self.readers[source]
        if not reader.has_ready or reader.bias is not None:
            return [NO_IDS] * len(entries)
        ids_D, content_D, num_bytes_D = reader.ready(entries)
        limit_mb = self.max_document_mb if is_new else math.inf
        refused_D = (num_bytes_D / 1e6 > limit_mb) | may_be_held_out(content_D, self.holdout)
        for d in refused_D.nonzero()[0]:
            ids_D[d] = NO_IDS
        return ids_D

    def entry(
        self, source: int, n: int, entry: Any, *, is_new: bool
    ) -> Document | Tokens | BadDocument | None:
        """Document n of a source, or what stands in its place. A Document is text to be tokenised."""
        document = self.document(source, entry) if type(entry) is int else entry
        if not isinstance(document, Document):
            return document
        checked_one = self.checked(document, source, n, is_new=is_new)
        return document if checked_one is None else checked_one

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
