"""Where do documents come from, and what makes one unusable?

A source is a sequence of documents with random access (a stream on the hub: forward only); its constructor
is its schema, configs/data/*.yaml name it. A user's own source is any class with `source[i]`, `fingerprint`
and, unless it is endless, `len`.
"""

import glob
import hashlib
import json
import math
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

BAD_KINDS = ("empty", "not_utf8", "huge", "missing_field", "broken_json")
SCAN_BYTES = 1 << 26  # of a file at once, when its lines are indexed


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

    def __reduce__(self) -> tuple:
        return BadDocument, (self.kind, self.where, self.detail)


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
    """The running interpreter's standard library: real text that every machine has (3.11: 32 MB).

    `match`: a regular expression for the files' names below the library's directory; without it, all.
    """

    def __init__(self, match: str = ".*") -> None:
        root = Path(sysconfig.get_path("stdlib"))
        installed = (root / "site-packages", root / "dist-packages")
        packages = [path for path in root.iterdir() if path.is_dir() and path not in installed]
        files = [root.glob("*.py"), *(package.rglob("*.py") for package in packages)]
        found = sorted(file for file in chain.from_iterable(files) if file.is_file())
        self.files = [file for file in found if re.fullmatch(match, file.relative_to(root).as_posix())]
        if not self.files:
            raise ValueError(f"match={match}: none of the library's {len(found)} files; an example is json/decoder.py")
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
        while chunk := file.read(SCAN_BYTES):
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


def permutation(num_documents: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch. From raw bits: numpy promises to keep those, and not its `permutation`."""
    bits = np.random.Philox(key=[seed, epoch]).random_raw(num_documents)
    return bits.argsort(kind="stable")
