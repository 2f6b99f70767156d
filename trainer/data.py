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

import glob
import hashlib
import json
import math
import os
import sysconfig
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sized
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
BAD_KINDS = ("empty", "not_utf8", "huge", "missing_field", "broken_json")
COUNTED = ("documents", "tokens", *BAD_KINDS)
IGNORED = -100  # the label that cross entropy leaves out

# ---- Documents and where they come from --------------------------------------------------------------------


class Document(NamedTuple):
    """One text, or the tokens of one (then complete: the end of text is the source's own business)."""

    where: str  # for people: "corpus/a.jsonl:17"
    text: str | None = None
    tokens: np.ndarray | None = None


class BadDocument(Exception):
    """A document that cannot be used; `kind` is one of BAD_KINDS."""

    def __init__(self, kind: str, where: str, detail: str) -> None:
        super().__init__(f"{where}: {kind}: {detail}")
        self.kind, self.where, self.detail = kind, where, detail


class Source(Protocol):
    """Documents by number. One without `__len__` only reads forward, like HubSource, and has its `follow`."""

    fingerprint: str  # which corpus this is: equal on every machine that holds the same one

    def __getitem__(self, i: int) -> Document: ...


def find_files(path: str, *, suffix: str) -> list[Path]:
    """The files that a file name, a directory or a glob stands for, in sorted order."""
    root = Path(path).expanduser()
    names = root.rglob(f"*{suffix}") if root.is_dir() else glob.glob(str(root), recursive=True)
    files = [root] if root.is_file() else sorted(file for file in map(Path, names) if file.is_file())
    if not files:
        raise ValueError(f"{path}: no file matches; give a file, a directory with *{suffix} or a quoted glob")
    return files


def hashed(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def hashed_files(files: list[Path], *parts: object) -> str:
    """Names below the common directory and sizes: cheap, and a corpus may be moved."""
    root = os.path.commonpath([file.parent for file in files])
    return hashed([(file.relative_to(root).as_posix(), file.stat().st_size) for file in files], *parts)


def decoded(data: bytes, *, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDocument("not_utf8", where, str(error)) from None


def from_field(value: object, *, field: str, where: str) -> Document:
    """A document from one field of a record; None where the record has no such field."""
    if not isinstance(value, str):
        raise BadDocument("missing_field", where, f"field {field!r} is {type(value).__name__}, not a string")
    try:
        value.encode()  # JSON can spell half a surrogate pair, which no encoding of text can hold
    except UnicodeEncodeError as error:
        raise BadDocument("not_utf8", where, str(error)) from None
    return Document(where, text=value)


def locate(starts: np.ndarray, i: int) -> tuple[int, int]:
    """Document i is number `i - starts[part]` of the part that holds it."""
    part = int(np.searchsorted(starts, i, side="right")) - 1
    return part, i - int(starts[part])


class TextSource:
    """One file, one document. `path`: a file, a directory (*.txt below it) or a glob."""

    def __init__(self, path: str) -> None:
        self.files = find_files(path, suffix=".txt")
        self.fingerprint = hashed_files(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Document:
        where = str(self.files[i])
        return Document(where, text=decoded(self.files[i].read_bytes(), where=where))


class PythonSource(TextSource):
    """The running interpreter's standard library: about 30 MB of real text that every machine has."""

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        foreign = {"site-packages", "dist-packages", "__pycache__"}
        files = find_files(str(root), suffix=".py")
        self.files = [file for file in files if not foreign.intersection(file.relative_to(root).parts)]
        self.fingerprint = hashed_files(self.files)


class JsonlSource:
    """One line, one JSON object, one document. `path`: a file, a directory (*.jsonl below it) or a glob."""

    def __init__(self, path: str, field: str = "text") -> None:
        self.files, self.field = find_files(path, suffix=".jsonl"), field
        self.offsets = [line_offsets(file) for file in self.files]
        self.starts = np.cumsum([0, *(len(offsets) - 1 for offsets in self.offsets)])
        self.fingerprint = hashed_files(self.files, field)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Document:
        part, line = locate(self.starts, i)
        where, (start, end) = f"{self.files[part]}:{line + 1}", self.offsets[part][line : line + 2]
        with self.files[part].open("rb") as file:
            file.seek(start)
            text = decoded(file.read(end - start), where=where)
        if not text.strip():
            raise BadDocument("empty", where, "the line is blank")
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadDocument("broken_json", where, str(error)) from None
        value = record.get(self.field) if isinstance(record, dict) else None
        return from_field(value, field=self.field, where=where)


def line_offsets(path: Path) -> np.ndarray:
    """Byte at which each line starts, then the file's size: line k is [k] to [k + 1]. 8 bytes a line."""
    found, size = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 26):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size + 1)
            size += len(chunk)
    offsets = np.concatenate(found)
    return offsets if offsets[-1] == size else np.append(offsets, size)


class ParquetSource:
    """One row, one document. Holds the last 8 row groups it read: shuffled, it likes small row groups."""

    def __init__(self, path: str, field: str = "text") -> None:
        from pyarrow.parquet import ParquetFile

        self.files, self.field = find_files(path, suffix=".parquet"), field
        self.groups: list[tuple[Path, int, int]] = []  # file, row group, rows of the file before it
        sizes = [0]
        for name in self.files:
            with ParquetFile(name) as file:
                if field not in (columns := file.schema_arrow.names):
                    raise ValueError(f"{name}: no column {field!r}; data.source.field is one of {columns}")
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            before = np.cumsum([0, *rows]).tolist()
            self.groups += [(name, group, before[group]) for group in range(len(rows))]
            sizes += rows
        self.starts = np.cumsum(sizes)
        self.column = lru_cache(maxsize=8)(self.read_column)
        self.fingerprint = hashed_files(self.files, field)

    def read_column(self, part: int) -> Any:
        from pyarrow.parquet import ParquetFile

        path, group, _ = self.groups[part]
        with ParquetFile(path) as file:
            return file.read_row_group(group, columns=[self.field]).column(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Document:
        part, row = locate(self.starts, i)
        path, _, rows_before = self.groups[part]
        where = f"{path}:{rows_before + row + 1}"
        try:
            return from_field(self.column(part)[row].as_py(), field=self.field, where=where)
        except UnicodeDecodeError as error:
            raise BadDocument("not_utf8", where, str(error)) from None


class HubSource:
    """A Hugging Face dataset (hub name or local directory), streamed; after its end it begins again.

    It reads forward only. `source[i]` reads on to document i, and keeps those of the documents it passes that
    are `wanted` later. A TokenStream wants what lies between the slowest and the fastest stream of its rank:
    that bounds the memory; documents of other ranks are dropped. A document further back is found by starting
    over: right, but slow. Opening at document n reads n documents, unless `datasets` can skip whole files.
    """

    def __init__(
        self, name: str, split: str = "train", field: str = "text", subset: str | None = None
    ) -> None:  # fmt: skip
        import datasets

        try:
            self.dataset = datasets.load_dataset(name, subset, split=split, streaming=True)
        except Exception as error:  # a dozen kinds: no network, no such name, subset or split
            remedy = "check data.source.name, subset and split, the network and HF_HUB_OFFLINE"
            raise ValueError(f"{name}: cannot open the dataset ({error}); {remedy}") from error
        if (columns := self.dataset.column_names) and field not in columns:
            raise ValueError(f"{name}: no column {field!r}; data.source.field is one of {columns}")
        self.name, self.field = name, field
        self.num_rows: int | None = None  # N, known as soon as the end was seen
        self.fingerprint = hashed(name, split, field, subset)
        self.follow(0, wanted=lambda i: False)

    def follow(self, first: int, *, wanted: Callable[[int], bool]) -> None:
        """Starts over at document `first`; of what it passes, it keeps what is `wanted`."""
        self.position, self.wanted, self.kept = first, wanted, dict[int, object]()
        self.rows = self.rows_from(first)

    def rows_from(self, start: int) -> Iterator[dict[str, object]]:
        while True:
            end = start
            for row in self.dataset.skip(start):
                yield row
                end += 1
            self.num_rows = end if end > start else sum(1 for _ in self.dataset)  # `start` may lie beyond N
            if not self.num_rows:
                raise ValueError(f"{self.name}: the dataset holds no row; check data.source.split")
            start = 0 if end > start else start % self.num_rows

    def __getitem__(self, i: int) -> Document:
        if i < self.position and i not in self.kept:
            self.follow(i, wanted=self.wanted)
        while i not in self.kept:
            row = next(self.rows)
            if self.position == i or self.wanted(self.position):
                self.kept[self.position] = row.get(self.field)
            self.position += 1
        return from_field(self.kept.pop(i), field=self.field, where=f"{self.name}:{i + 1}")


class SyntheticSource:
    """Documents about topics, for runs in which a router without balancing must collapse.

    Topics are Zipf distributed, p(topic k) ~ (k + 1) ** -topic_skew: a few own most tokens. A topic has its
    own slice of the vocabulary, where a token is followed by the one `stride` further on (cyclically) or,
    with probability `noise`, by any. Lengths are lognormal; token 0 ends a document. Document i is a function
    of (seed, i).
    """

    def __init__(
        self, vocab_size: int, num_topics: int = 32, topic_skew: float = 1.2, mean_length: float = 512.0,
        length_sigma: float = 1.0, noise: float = 0.1, num_documents: int = 1_000_000, seed: int = 0,
    ) -> None:  # fmt: skip
        self.width = (vocab_size - 1) // num_topics  # tokens of a topic
        if self.width < 2:
            remedy = f"use {2 * num_topics + 1} or more, or fewer topics"
            raise ValueError(f"vocab_size={vocab_size} holds no {num_topics} topics of 2 tokens; {remedy}")
        self.num_documents, self.noise, self.seed = num_documents, noise, seed
        self.log_mean, self.log_sigma = math.log(mean_length) - length_sigma**2 / 2, length_sigma
        self.topic_cdf = (np.arange(1, num_topics + 1) ** -float(topic_skew)).cumsum()
        self.topic_cdf /= self.topic_cdf[-1]
        shape = (vocab_size, num_topics, topic_skew, mean_length, length_sigma, noise)
        self.fingerprint = hashed("synthetic", *shape, num_documents, seed)

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, i: int) -> Document:
        random = np.random.Generator(np.random.Philox(key=[self.seed, i]))
        topic = int(np.searchsorted(self.topic_cdf, random.random(), side="right"))
        length = max(1, round(random.lognormal(self.log_mean, self.log_sigma)))
        steps = random.integers(self.width, size=length)  # uniform: a jump to any token of the slice
        stride = 1 + topic % (self.width - 1)
        steps[1:][random.random(length - 1) >= self.noise] = stride
        tokens = 1 + topic * self.width + steps.cumsum() % self.width
        return Document(f"synthetic:{i}", tokens=np.append(tokens, 0).astype(np.uint32))


# ---- Text to tokens ----------------------------------------------------------------------------------------

SAMPLE_MB = 8.0  # text that a tokenizer is trained on: 2 s on 2 cores for 32,768 entries (measured)
FORMAT = 1  # of the cached tokenizers: raise it when `train_tokenizer` changes


def load_tokenizer(
    spec: str | None, *, source: Source, vocab_size: int, cache_dir: str | Path | None = None
) -> Tokenizer | None:
    """`spec`: "train" (on the source), a tokenizer.json, its directory, a hub name; None: no text."""
    if spec is None:
        return None
    path = cached_tokenizer(source, vocab_size, cache_dir) if spec == "train" else Path(spec).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file)) if path.exists() else Tokenizer.from_pretrained(spec)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        remedy = "give train, a tokenizer.json, its directory or a hub name (network, HF_HUB_OFFLINE?)"
        raise ValueError(f"data.tokenizer={spec}: cannot load it ({error}); {remedy}") from error
    if (needed := max(tokenizer.get_vocab().values()) + 1) > vocab_size:
        raise ValueError(f"data.tokenizer={spec} needs model.vocab_size={needed}, which is {vocab_size}")
    end_of_text_id(tokenizer)
    tokenizer.encode_special_tokens = True  # text that looks like a control token stays text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    ids = [tokenizer.token_to_id(name) for name in END_OF_TEXT]
    if not (found := [i for i in ids if i is not None]):
        raise ValueError(f"the tokenizer has no end-of-text token; looked for {', '.join(END_OF_TEXT)}")
    return found[0]


def cached_tokenizer(source: Source, vocab_size: int, cache_dir: str | Path | None) -> Path:
    """The file of the tokenizer trained on this source, trained now if it is the first time."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "triquetra"
    key = hashed(source.fingerprint, vocab_size, tokenizers.__version__, FORMAT)
    path = Path(cache_dir or default).expanduser() / f"tokenizer-{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        train_tokenizer(source, vocab_size).save(str(unfinished))
        os.replace(unfinished, path)  # training is deterministic: a second process puts the same bytes there
    return path


def train_tokenizer(source: Source, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: 256 bytes, the end of text (id 0) and merges, `vocab_size` entries exactly."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT[0]], initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(sample(source), trainer)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        remedy = f"use model.vocab_size={size}" if size > 257 else "use a larger vocabulary or corpus"
        raise ValueError(f"model.vocab_size={vocab_size}: the corpus gives a vocabulary of {size}; {remedy}")
    return tokenizer


def sample(source: Source) -> Iterator[str]:
    """The first SAMPLE_MB of text, in a fixed order: the tokenizer must not depend on the run's seed."""
    remaining = int(SAMPLE_MB * 1e6)
    for i in permutation(len(source), seed=0, epoch=0) if isinstance(source, Sized) else range(100_000):
        try:
            text = source[int(i)].text
        except BadDocument:
            continue
        if text is None:
            raise ValueError("data.tokenizer=train needs text, the source gives tokens; use null")
        yield text[:remaining]
        remaining -= len(text)
        if remaining <= 0:
            return


# ---- Tokens to rows ----------------------------------------------------------------------------------------


def permutation(num_documents: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch. From raw bits: numpy promises to keep those, and not its `permutation`."""
    bits = np.random.Philox(key=[seed, epoch]).random_raw(num_documents)
    return bits.argsort(kind="stable")


class Batch(NamedTuple):
    """One microbatch, int64. A label is the next token of its document; positions restart with each piece."""

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    positions_BL: torch.Tensor


class TokenStream:
    """The rows of one rank, step after step, without end."""

    def __init__(
        self, *, source: Source, tokenizer: Tokenizer | None, seq_len: int, global_batch: int,
        num_streams: int, seed: int, rank: int, num_ranks: int, shuffle: bool = True,
        on_bad: Literal["skip", "fatal"] = "skip", max_document_mb: float = 100.0,
        report: Callable[[BadDocument], None] = lambda bad: None,
    ) -> None:  # fmt: skip
        check_split(global_batch=global_batch, num_streams=num_streams, num_ranks=num_ranks)
        self.num_documents = len(source) if isinstance(source, Sized) else None
        if self.num_documents == 0:
            raise ValueError("the corpus holds no document; check data.source")
        self.source, self.seq_len, self.num_streams = source, seq_len, num_streams
        self.tokenizer, self.end_of_text = tokenizer, end_of_text_id(tokenizer) if tokenizer else None
        self.on_bad, self.max_document_mb, self.report = on_bad, max_document_mb, report
        self.shuffle, self.totals = shuffle, Counter[str]()
        self.order = lru_cache(maxsize=2)(lambda epoch: permutation(len(source), seed=seed, epoch=epoch))
        self.rows_per_stream, owned = global_batch // num_streams, num_streams // num_ranks
        self.streams = range(rank * owned, (rank + 1) * owned)
        self.move_to(np.stack([np.arange(num_streams), np.zeros(num_streams, int)], axis=1))

    def move_to(self, cursor_V2: np.ndarray) -> None:
        self.cursor_V2, self.tokens_of = cursor_V2, dict[int, np.ndarray]()  # a stream's current document
        if self.num_documents is None:
            self.source.follow(int(cursor_V2[self.streams, 0].min()), wanted=self.wants)

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
