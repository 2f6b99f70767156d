"""Who asks for documents, and before they are needed? Text to tokens, in batches, ahead of the stream.

    wanted (source, n) -> tasks of about 32k tokens -> workers: read, tokenise -> Pending: one document of a
    task

Documents of a forward source are read by one thread of this process, in the order in which they were asked
for, and tokenised by the workers.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from trainer.data.reader import DataError, Reader
from trainer.data.sources import BadDocument, Document
from trainer.data.workers import CLOSED, Later, Workers

TASK_TOKENS, TASK_DOCUMENTS = 32_768, 256
# priority of documents that were open before a resume: they may be needed later, those ahead are needed now
AGAIN = 1

# uint32, the end of text included; None: behind the end of the source
Tokens = np.ndarray | BadDocument | None
Wanted = tuple[int, int]  # source, n


class Answer(list[Tokens]):
    """Tokens of the documents of a task. Goes through a pipe as one array: one by one they cost more than
    tokenising them.
    """

    def __reduce__(self) -> tuple:
        arrays = [tokens for tokens in self if isinstance(tokens, np.ndarray)]
        flat = np.concatenate(arrays).tobytes() if arrays else b""
        return unpacked, (
            flat,
            [len(tokens) if isinstance(tokens, np.ndarray) else tokens for tokens in self],
        )


def unpacked(flat: bytes, answers: list[int | BadDocument | None]) -> Answer:
    tokens_T, end, found = np.frombuffer(flat, np.uint32), 0, Answer()
    for answer in answers:
        if isinstance(answer, int):
            end += answer
            answer = tokens_T[end - answer : end].copy()  # not to hold the others
        found.append(answer)
    return found


class Pending(NamedTuple):
    """A document that was asked for."""

    task: Future | Later
    i: int

    def get(self) -> Tokens:
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
        workers: int,
    ) -> None:
        self.readers, self.encode, self.max_document_mb = readers, encode, max_document_mb
        self.repeats = all(reader.repeat for reader in readers)
        self.end_of_text = np.array([end_of_text or 0], np.uint32)
        # a guess of the mean length before any was read
        self.seen_S, self.tokens_S = [1] * len(readers), [1000] * len(readers)
        self.lanes: dict[int, SimpleQueue[Callable[[], None] | None]] = {}
        self.broken: dict[int, BaseException] = {}  # sources that could not begin
        self.workers = Workers(workers, self.answer)
        for s, reader in enumerate(readers):
            if workers and reader.num_documents is None:
                self.lanes[s] = lane = SimpleQueue()
                threading.Thread(
                    target=keep_doing, args=(lane,), daemon=True, name=f"reads {reader.key}"
                ).start()

    def close(self) -> None:
        self.workers.close()
        for lane in self.lanes.values():
            lane.put(None)

    def forget(self) -> None:
        """What was asked for and not begun is not wanted any more."""
        self.workers.forget()
        for lane in self.lanes.values():
            with contextlib.suppress(Empty):
                while True:
                    lane.get_nowait()

    # -- asking --

    def request(self, wanted: Iterable[Wanted], *, priority: int = 0) -> list[Pending]:
        """In the order of `wanted`."""
        found, tasks, size = list[Pending](), list[list[Wanted]](), 0.0
        for s, n in wanted:
            if (
                not tasks
                or size >= TASK_TOKENS
                or len(tasks[-1]) >= TASK_DOCUMENTS
                or self.is_alone(s, tasks[-1][-1][0])
            ):
                tasks.append([])
                size = 0.0
            tasks[-1].append((s, n))
            size += self.mean_length(s)
        for task in tasks:
            future = self.submit(task, priority=priority)
            found += [Pending(future, i) for i in range(len(task))]
        return found

    def is_alone(self, source: int, before: int) -> bool:
        """Documents of a source with its own thread are not asked for together with others."""
        return source != before and (source in self.lanes or before in self.lanes)

    def submit(self, task: list[Wanted], *, priority: int) -> Future | Later:
        limit_mb = math.inf if priority == AGAIN else self.max_document_mb
        request = [(s, self.readers[s].place(n)) for s, n in task]
        if (lane := self.lanes.get(task[0][0])) is None:
            return self.workers.submit((limit_mb, request), priority=priority)
        if self.workers.is_closed:
            raise RuntimeError(CLOSED)
        future = Future()

        def read() -> None:
            try:
                if error := self.broken.get(task[0][0]):
                    raise error
                documents = [self.document(s, i) for s, i in request]
                self.workers.submit((limit_mb, documents), priority=priority, future=future)
            except BaseException as error:  # noqa: BLE001  # raised where the result is wanted
                future.set_exception(error)

        lane.put(read)
        return future

    def again(self, source: int, n: int, *, pending: Pending | None) -> np.ndarray:
        """A document that was open before a resume: whatever the limits are now, and at once if a worker has
        not come to it.
        """
        reader = self.readers[source]
        if pending is None or not (pending.task.done() or source in self.lanes):
            [tokens] = self.answer((math.inf, [(source, reader.place(n))]))
        else:
            tokens = pending.get()
        if isinstance(tokens, BadDocument) or tokens is None:
            raise reader.foreign(tokens or f"{reader.key}: document {n} is behind its end")
        return tokens

    def follow(self, source: int, due: dict[int, int], unread: set[int]) -> None:
        """See Reader.follow."""
        if (lane := self.lanes.get(source)) is None:
            self.readers[source].follow(due, unread)
            return

        def follow() -> None:
            self.broken.pop(source, None)
            try:
                self.readers[source].follow(due, unread)
            except BaseException as error:  # noqa: BLE001  # raised where the first document is wanted
                self.broken[source] = error

        lane.put(follow)

    # -- lengths --

    def mean_length(self, source: int) -> float:
        """[tokens] Of the documents of a source that this rank has opened."""
        return self.tokens_S[source] / self.seen_S[source]

    def saw(self, source: int, length: int) -> None:
        self.seen_S[source] += 1
        self.tokens_S[source] += length

    # -- answering: in a worker, or here if there is none --

    def answer(self, request: tuple[float, list[Any]]) -> Answer:
        """`request`: the limit in MB, and documents, or (source, place) of them."""
        limit_mb, wanted = request
        documents = [self.document(*of) if type(of) is tuple else of for of in wanted]
        answers, texts = Answer(), dict[int, str]()
        for i, document in enumerate(documents):
            answers.append(
                tokens := checked(document, limit_mb=limit_mb) if isinstance(document, Document) else document
            )
            if document is not None and tokens is None:
                texts[i] = document.text
        if texts:
            if self.encode is None:
                raise DataError(f"{documents[next(iter(texts))].where} is text; set data.tokenizer")
            for i, ids in zip(texts, self.encode(list(texts.values())), strict=True):
                answers[i] = np.concatenate([ids, self.end_of_text]) if len(ids) else empty(documents[i])
        return answers

    def document(self, source: int, place: int) -> Document | BadDocument | None:
        try:
            return self.readers[source].read(place)
        except BadDocument as bad:
            return bad


def checked(document: Document, *, limit_mb: float) -> np.ndarray | BadDocument | None:
    """Its tokens; None: it is text of a size that may be tokenised."""
    if document.tokens is not None:
        return document.tokens.astype(np.uint32, copy=False) if len(document.tokens) else empty(document)
    try:
        size_mb = len(document.text.encode()) / 1e6
    except UnicodeEncodeError as error:  # half a surrogate pair, which no encoding of text can hold
        return BadDocument("not_utf8", document.where, str(error))
    if size_mb > limit_mb:
        return BadDocument("huge", document.where, f"{size_mb:.2f} MB, max_document_mb={limit_mb:g}")
    return None


def empty(document: Document) -> BadDocument:
    return BadDocument("empty", document.where, "no token")


def keep_doing(lane: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := lane.get()) is not None:
        job()
