"""How is a corpus of texts written as tokens, by many processes, whenever it is killed?

    plan -> OUT.draft/plan.json -> a worker for each shard: texts -> 00000.tokens, 00000.index, then
    00000.json -> all shards there: corpus.json -> OUT

A shard is a range of documents. Its record is written last and by a rename, so a shard with a record is
whole, and a second start makes only the others. The rename of OUT.draft is the commit.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from tokenizers import Tokenizer

from trainer.data.cache import file_hash, new_hash
from trainer.data.encoder import Encoder
from trainer.data.intake import checked
from trainer.data.reader import DataError, Reader
from trainer.data.shards import CORPUS, FORMAT, INDEX, TOKENIZER, Shard, dtype_for, shard_file
from trainer.data.sources import BadDocument, Document, Source
from trainer.data.tokenizer import end_of_text_id, tokenizer_digest
from trainer.data.workers import Workers

PLAN, RECORD, PART = "plan.json", "json", ".part"
BATCH_DOCUMENTS, BATCH_BYTES = 256, 1 << 22  # of texts that are tokenised at once
SAMPLE = 200  # documents whose mean size says how many make a shard


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a draft holds: a second start must want the same."""

    corpus: str
    tokenizer: str
    dtype: str
    num_documents: int
    per_shard: int  # documents
    max_document_mb: float
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_documents / self.per_shard)

    def documents_of(self, k: int) -> range:
        return range(k * self.per_shard, min((k + 1) * self.per_shard, self.num_documents))


def plan_of(source: Source, tokenizer: Tokenizer, *, shard_mb: float, max_document_mb: float) -> Plan:
    """Raises: ValueError where a source cannot be tokenised."""
    if not isinstance(source, Sized):
        raise ValueError(
            "data.source only reads forward; tokenize needs documents by number: fetch its files"
        )
    if not len(source):
        raise ValueError("data.source holds no document; give another path")
    return Plan(
        corpus=source.fingerprint,
        tokenizer=tokenizer_digest(tokenizer),
        dtype=dtype_for(max(tokenizer.get_vocab().values()) + 1),
        num_documents=len(source),
        per_shard=max(1, round(shard_mb * 1e6 / mean_bytes(source))),
        max_document_mb=max_document_mb,
    )


def mean_bytes(source: Source) -> float:
    """Of the texts of a sample, evenly spread."""
    sizes = list[int]()
    for i in np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(int).tolist():
        try:
            document = source[i]
        except BadDocument:
            continue
        refuse_tokens(document)
        sizes.append(len(document.text.encode(errors="surrogatepass")))
    return max(1.0, sum(sizes) / max(1, len(sizes)))


def refuse_tokens(document: Document) -> None:
    if document.text is None:
        raise ValueError(f"{document.where}: is tokens already; tokenize wants a source of texts")


class Tokenizing:
    """The writing of one corpus into `draft`, which this process holds alone."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, plan: Plan, draft: Path, *, backend: str, reader: Reader
    ) -> None:
        self.source, self.tokenizer, self.plan, self.draft, self.reader = (
            source,
            tokenizer,
            plan,
            draft,
            reader,
        )
        self.encode = Encoder(tokenizer, backend=backend)
        self.end_of_text = np.array([end_of_text_id(tokenizer)], np.uint32)

    def run(self, *, processes: int, report: Callable[[int, Shard], None]) -> list[Shard]:
        """Writes the shards that are not there. report: is told of every shard, also those that were."""
        self.keep_plan()
        shards = {k: shard for k in range(self.plan.num_shards) if (shard := self.whole(k)) is not None}
        for k, shard in shards.items():
            report(k, shard)
        missing = [k for k in range(self.plan.num_shards) if k not in shards]
        workers = Workers(min(processes, len(missing)), self.write_shard)
        try:
            running: dict[Future, int] = {workers.submit(k): k for k in missing}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    k = running.pop(future)
                    shards[k] = future.result()
                    report(k, shards[k])
        finally:
            workers.close()
        return [shards[k] for k in range(self.plan.num_shards)]

    def keep_plan(self) -> None:
        """Raises: ValueError where the draft was begun with another plan."""
        for part in self.draft.glob(f"*{PART}"):  # of a process that was killed
            part.unlink(missing_ok=True)
        file, plan = self.draft / PLAN, asdict(self.plan)
        if not file.exists():
            write_durably(file, json.dumps(plan).encode())
            return
        before = json.loads(file.read_text())
        other = [key for key in plan if before.get(key) != plan[key]]
        if other:
            key = other[0]
            remedy = "give the same corpus, tokenizer and options, or delete it"
            message = f"{self.draft}: was begun with {key}={before.get(key)}, this is {plan[key]}"
            raise ValueError(f"{message}; {remedy}")

    def whole(self, k: int) -> Shard | None:
        """The shard that an earlier start has finished, if its files are what was written."""
        record = shard_file(self.draft, k, RECORD)
        if not record.exists():
            return None
        shard = Shard(**json.loads(record.read_text()))
        files = {suffix: shard_file(self.draft, k, suffix) for suffix in shard.hashes}
        is_whole = all(p.is_file() and file_hash(p) == shard.hashes[suffix] for suffix, p in files.items())
        return shard if is_whole else None

    # -- in a worker --

    def write_shard(self, k: int) -> Shard:
        """Holds one batch of documents in memory, and 24 bytes of each document of the shard."""
        dtype, numbers = np.dtype(self.plan.dtype), self.plan.documents_of(k)
        index_D, digest, bad = np.zeros(len(numbers), INDEX), new_hash(), dict[str, list[str]]()
        num_tokens, max_id = 0, -1
        target = shard_file(self.draft, k, "tokens")
        with replacing(target) as file:
            for first, batch in self.batches(numbers):
                ids_D = self.tokens_of(batch, index_D[first : first + len(batch)], first, bad)
                lengths = [len(ids) for ids in ids_D]
                index_D["end"][first : first + len(batch)] = num_tokens + np.cumsum(lengths)
                ids_T = np.concatenate(ids_D)
                num_tokens += len(ids_T)
                max_id = max(max_id, int(ids_T.max())) if len(ids_T) else max_id
                content = ids_T.astype(dtype).tobytes()
                digest.update(content)
                file.write(content)
        index = shard_file(self.draft, k, "index")
        write_durably(index, index_D.tobytes())
        hashes = {"tokens": digest.hexdigest(), "index": file_hash(index)}
        shard = Shard(len(numbers), num_tokens, max_id, hashes, bad)
        write_durably(shard_file(self.draft, k, RECORD), json.dumps(shard._asdict()).encode())
        return shard

    def batches(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[Document | BadDocument]]]:
        """Documents, and the number in the shard of the first of them."""
        batch, first, size = list[Document | BadDocument](), 0, 0
        for n, number in enumerate(numbers):
            document = self.document(number)
            batch.append(document)
            size += len(document.text) if isinstance(document, Document) else 0
            if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
                yield first, batch
                batch, first, size = [], n + 1, 0
        if batch:
            yield first, batch

    def document(self, number: int) -> Document | BadDocument:
        try:
            document = self.reader.read(number)
        except BadDocument as bad:
            return bad
        refuse_tokens(document)
        bad = checked(document, limit_mb=self.plan.max_document_mb)
        return document if bad is None else bad

    def tokens_of(
        self, batch: list[Document | BadDocument], index_D: np.ndarray, first: int, bad: dict[str, list[str]]
    ) -> list[np.ndarray]:
        """The ids of each document, none of those that are bad; fills their index, and `bad`."""
        texts = [document.text for document in batch if isinstance(document, Document)]
        encoded = iter(self.encode(texts) if texts else ())
        ids_D = list[np.ndarray]()
        for n, document in enumerate(batch):
            if isinstance(document, BadDocument):
                bad[str(first + n)] = [document.kind, document.detail]
                ids_D.append(self.end_of_text[:0])
                continue
            ids, content = next(encoded), document.text.encode()
            index_D["num_bytes"][n], index_D["content"][n] = len(content), xxhash.xxh3_64_intdigest(content)
            ids_D.append(np.concatenate([ids, self.end_of_text]) if len(ids) else self.end_of_text[:0])
        return ids_D


def finish(tokenizing: Tokenizing, shards: list[Shard], out: Path) -> None:
    """Raises: DataError where there is no token."""
    draft, plan = tokenizing.draft, tokenizing.plan
    if not any(shard.num_tokens for shard in shards):
        kinds = sorted({kind for shard in shards for kind, _ in shard.bad.values()})
        raise DataError(
            f"none of the {plan.num_documents} documents has a token ({', '.join(kinds) or 'empty'})"
            f"; check data.source; {draft} may be deleted"
        )
    write_durably(draft / TOKENIZER, tokenizing.tokenizer.to_str(pretty=True).encode())
    about = {**asdict(plan), "shards": [shard._asdict() for shard in shards]}
    write_durably(draft / CORPUS, json.dumps(about).encode())
    os.rename(draft, out)
    sync_directory(out.parent)
    for name in (PLAN, "lock", *(shard_file(out, k, RECORD).name for k in range(len(shards)))):
        (out / name).unlink(missing_ok=True)  # corpus.json has all that they say


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` whole, whenever the process is killed or the machine goes down.
    Its name is this process's own: a worker may outlive its killed parent by a moment.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_directory(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
