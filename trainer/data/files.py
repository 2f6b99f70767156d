"""How is document i found in files of many: lines of JSON, plain or compressed, and rows of Parquet and
Arrow?

What the operating system refuses is an OSError with its number, and may succeed when tried again. What a file
holds and no library can decode is damage: a ValueError when the file is opened, a BadDocument when it is
read.
"""

import io
import json
import logging
import math
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.cache import REMEDY, cache_path, draft, hash_in_name, keep, kept, new_hash, reading
from trainer.data.sources import (
    BadDocument,
    Document,
    decoded,
    find_files,
    from_field,
    hashed,
    hashed_files,
    locate,
)

SCAN_BYTES = 1 << 26  # of a file at once, when its lines are indexed
PIECE_BYTES = 1 << 16  # that are unpacked at once
WHOLE, DAMAGED = ".lines", ".damaged"  # of unpacked copies: no *.jsonl, wherever the cache lies
CODECS = {".gz": "gzip", ".zst": "zstd"}  # pyarrow's names
JSONL = (".jsonl", ".json", *(f"{plain}{packed}" for plain in (".jsonl", ".json") for packed in CODECS))
log = logging.getLogger(__name__)
UNDECODABLE = (ValueError, NotImplementedError, OSError)  # what pyarrow raises


class Damage(Exception):
    """What a library says about contents that it cannot decode."""


@contextmanager
def decoding() -> Iterator[None]:
    """Raises: Damage; OSErrors of the system pass. pyarrow raises OSErrors too, but only the system's have a
    number.
    """
    try:
        yield
    except UNDECODABLE as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise Damage(" ".join(str(error).split())) from error


class JsonlSource:
    """One line, one JSON object, one document. `path`: a file, a directory (JSONL below it), a glob or a
    *.manifest.

    Compressed files are unpacked once into `cache_dir` (default: ~/.cache/triquetra), which takes their
    whole size. A copy there is hashed while its lines are indexed, and made anew if it has changed. Where a
    compressed file is damaged, the lines before are documents, and one more says so: BadDocument("corrupt").
    """

    def __init__(self, path: str, field: str = "text", cache_dir: str | None = None) -> None:
        self.files, self.field = find_files(path, suffixes=JSONL), field
        refuse_twins(self.files)
        packed = [file for file in self.files if file.suffix in CODECS]
        # In a random order: the processes of a machine all need the copies, and make different ones most of
        # the time.
        random.Random(os.getpid()).shuffle(packed)
        copies = {file: unpacked(file, cache_path(cache_dir)) for file in packed}
        self.plain = [copies.get(file) or Plain(file, line_offsets(file), False) for file in self.files]
        self.offsets = [plain.offsets for plain in self.plain]
        self.starts = np.cumsum([0, *(len(offsets) - 1 for offsets in self.offsets)])
        self.opened = lru_cache(maxsize=64)(lambda path: path.open("rb", buffering=0))
        self.fingerprint = hashed_files(self.files, field)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Document:
        where, record = self.record(i)
        value = record.get(self.field) if isinstance(record, dict) else None
        return from_field(value, field=self.field, where=where)

    def record(self, i: int) -> tuple[str, Any]:
        """Where line i is, and what it says. Raises: BadDocument."""
        part, line = locate(self.starts, i)
        where = f"{self.files[part]}:{line + 1}"
        start, end = self.offsets[part][line : line + 2]
        path, _, is_damaged = self.plain[part]
        try:
            # moves no position: forked readers share the file
            data = os.pread(self.opened(path).fileno(), end - start, start)
        except OSError:
            self.opened.cache_clear()  # to be opened anew by the next try
            raise
        text = decoded(data, where=where)
        if is_damaged and i + 1 == self.starts[part + 1]:
            raise BadDocument("corrupt", where, f"the file is cut after line {line}: {text}")
        if not text.strip():
            raise BadDocument("empty", where, "the line is blank")
        try:
            return where, json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadDocument("broken_json", where, str(error)) from None


def refuse_twins(files: list[Path]) -> None:
    """A file beside its own compressed copy: every document would come twice."""
    plain = set(files)
    for file in files:
        if file.suffix in CODECS and (twin := file.with_suffix("")) in plain:
            raise ValueError(
                f"{file}: {twin.name} lies beside it, each document would come twice; take one of them out"
            )


class Plain(NamedTuple):
    """A file of lines. `is_damaged`: it is the copy of a damaged one, and its last line says how."""

    path: Path
    offsets: np.ndarray  # see line_offsets
    is_damaged: bool


def line_offsets(path: Path, digest: Any = None) -> np.ndarray:
    """Byte at which each line starts, then the file's size: line k is [k] to [k + 1]. 8 bytes a line.

    digest: a hash that takes the content along: the file is read once.
    """
    starts, size = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(SCAN_BYTES):
            starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size + 1)
            size += len(chunk)
            if digest is not None:
                digest.update(chunk)
    offsets = np.concatenate(starts)
    return offsets if offsets[-1] == size else np.append(offsets, size)


def unpacked(path: Path, cache: Path) -> Plain:
    """The plain copy of a compressed file: the one in the cache if it is what was written there, else a new
    one. Raises: CacheError, or an OSError with the file and the room that is left.
    """
    stat = path.stat()
    name = f"unpacked-{hashed(str(path.resolve()), stat.st_size, stat.st_mtime_ns)}"
    copies = kept(cache, name)
    for copy in copies:
        digest = new_hash()
        with reading(copy):
            offsets = line_offsets(copy, digest)
        if digest.hexdigest() == hash_in_name(copy):
            return Plain(copy, offsets, copy.suffix == DAMAGED)
    for copy in copies:
        log.warning("%s is not what was written there; %s is unpacked again", copy, path)
    return newly_unpacked(path, cache, name)


def newly_unpacked(path: Path, cache: Path, name: str) -> Plain:
    with draft(cache, name) as target:
        try:
            is_damaged, digest = unpack(path, target), new_hash()
            offsets = line_offsets(target, digest)
            copy = keep(target, name, digest.hexdigest(), suffix=DAMAGED if is_damaged else WHOLE)
        except OSError as error:
            size, free = target.stat().st_size, shutil.disk_usage(cache).free
            room = f"{size:,} bytes of it were unpacked to {cache}, where {free:,} are free"
            raise OSError(error.errno, f"{path}: {error.strerror}; {room}; {REMEDY}") from error
    return Plain(copy, offsets, is_damaged)


def unpack(path: Path, target: Path) -> bool:
    """Writes the whole lines of a compressed file and, if it is damaged, one with the library's message: then
    True.
    """
    written = end_of_lines = 0
    with target.open("wb") as file:
        try:
            for piece in pieces(path):
                file.write(piece)
                if b"\n" in piece:
                    end_of_lines = written + piece.rindex(b"\n") + 1
                written += len(piece)
        except Damage as damage:
            file.truncate(end_of_lines)
            file.seek(end_of_lines)
            file.write(str(damage).encode())
            return True
    return False


class Fed(io.FileIO):
    """A file that gives itself to pyarrow byte by byte from `fine_from` on."""

    def __init__(self, path: Path, fine_from: float) -> None:
        super().__init__(path)
        self.fine_from = fine_from

    def read(self, size: int = -1) -> bytes:
        self.last = self.tell()
        return super().read(size if self.last < self.fine_from else 1)


def pieces(path: Path) -> Iterator[bytes]:
    """The contents of a compressed file. Raises: Damage, after everything that comes before it.

    A failing read loses what it has unpacked so far: a second pass goes byte by byte where the first one
    failed.
    """
    import pyarrow as pa

    if not path.stat().st_size:
        raise Damage("the file is empty")
    done, fine_from = 0, math.inf
    while True:
        with Fed(path, fine_from) as packed:
            try:
                with (
                    decoding(),
                    pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), CODECS[path.suffix]) as stream,
                ):
                    for skipped in range(0, done, PIECE_BYTES):
                        stream.read(min(PIECE_BYTES, done - skipped))
                    while piece := stream.read(PIECE_BYTES if fine_from == math.inf else 1):
                        yield piece
                        done += len(piece)
                return
            except Damage:
                if fine_from < math.inf:
                    raise
                fine_from = packed.last


class ColumnSource:
    """One row, one document, from one column of files that hold rows in parts: row groups, record batches."""

    suffix: str

    def __init__(self, path: str, field: str = "text") -> None:
        self.files, self.field = find_files(path, suffixes=(self.suffix,)), field
        # of each part: file, number in the file, rows of the file before it
        self.places: list[tuple[Path, int, int]] = []
        sizes = [0]
        for file in self.files:
            try:
                with decoding():
                    columns, rows = self.opened(file)
            except Damage as damage:
                remedy = "fetch it again or take it out"
                raise ValueError(f"{file}: not a whole *{self.suffix} file ({damage}); {remedy}") from damage
            if field not in columns:
                raise ValueError(f"{file}: no column {field!r}; field= is one of {columns}")
            before = np.cumsum([0, *rows]).tolist()
            self.places += [(file, part, before[part]) for part in range(len(rows))]
            sizes += rows
        self.starts = np.cumsum(sizes)
        self.fingerprint = hashed_files(self.files, field)

    def opened(self, file: Path) -> tuple[list[str], list[int]]:
        """A file's columns, and the rows of each of its parts."""
        raise NotImplementedError

    def value(self, part: int, row: int) -> object:
        """Raises: Damage, or an OSError of the system."""
        raise NotImplementedError

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Document:
        where, value = self.record(i)
        return from_field(value, field=self.field, where=where)

    def record(self, i: int) -> tuple[str, Any]:
        """Where row i is, and what it holds. Raises: BadDocument."""
        part, row = locate(self.starts, i)
        file, _, rows_before = self.places[part]
        where = f"{file}:{rows_before + row + 1}"
        try:
            return where, self.value(part, row)
        except UnicodeDecodeError as error:
            raise BadDocument("not_utf8", where, str(error)) from None
        except Damage as damage:
            raise BadDocument("corrupt", where, str(damage)) from None


class ParquetSource(ColumnSource):
    """Parquet files. Holds the last 8 row groups it read: shuffled, it likes small row groups."""

    suffix = ".parquet"

    def __init__(self, path: str, field: str = "text") -> None:
        super().__init__(path, field)
        self.column = lru_cache(maxsize=8)(self.read_column)

    def opened(self, file: Path) -> tuple[list[str], list[int]]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as opened:
            groups = range(opened.num_row_groups)
            return opened.schema_arrow.names, [opened.metadata.row_group(group).num_rows for group in groups]

    def read_column(self, part: int) -> Any:
        """What is damaged stays so: its message is returned, and cached like a column. Other errors are
        raised, they may pass.
        """
        from pyarrow.parquet import ParquetFile

        path, group, _ = self.places[part]
        try:
            with decoding(), ParquetFile(path, page_checksum_verification=True) as file:
                return file.read_row_group(group, columns=[self.field], use_threads=False).column(0)
        except Damage as damage:
            return str(damage)

    def value(self, part: int, row: int) -> object:
        column = self.column(part)
        if isinstance(column, str):
            raise Damage(column)
        return column[row].as_py()


class ArrowSource(ColumnSource):
    """Arrow files, streams too, like those of `datasets`' save_to_disk. Memory mapped; compressed ones are
    held unpacked.
    """

    suffix = ".arrow"

    def __init__(self, path: str, field: str = "text") -> None:
        self.columns: list[Any] = []  # of all parts
        super().__init__(path, field)
        for file in self.files:
            if file.name.startswith("cache-") and (file.parent / "state.json").exists():
                remedy = f"take it out or give path='{file.parent}/data-*.arrow'"
                raise ValueError(
                    f"{file}: what `datasets` once computed from the files beside it, the same documents; "
                    f"{remedy}"
                )

    def opened(self, file: Path) -> tuple[list[str], list[int]]:
        import pyarrow as pa

        mapped = pa.memory_map(str(file))
        if mapped.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            mapped.seek(0)
            batches = reader = pa.ipc.open_stream(mapped)
        if self.field not in reader.schema.names:
            return reader.schema.names, []
        columns = [batch.column(self.field) for batch in batches]
        raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(
            reader.schema.field(self.field).type
        )
        self.columns += [column.view(raw) if raw else column for column in columns]
        return reader.schema.names, [len(column) for column in columns]

    def value(self, part: int, row: int) -> object:
        one = self.columns[part].slice(row, 1)
        with decoding():
            # nothing has looked at the offsets yet: broken ones would be read beyond the end
            one.validate(full=True)
        return one[0].as_py()
