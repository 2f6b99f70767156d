"""How are the tokens of Megatron's indexed data sets read: NAME.idx with NAME.bin?

    NAME.idx   b"MMIDIDX\\0\\0", version 1 <u8, code of the dtype u1, sequences S <u8, documents + 1 <u8,
               lengths <i4 x S [tokens], places <i8 x S [bytes in NAME.bin], documents <i8: in sequences;
               perhaps u1 x S: the sequences' modes
    NAME.bin   the ids

A document is its sequences one after another, as they are: an end of text is there if whoever wrote the files
put it there (--append-eod), and `end_of_text` appends one where nobody did.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.data.cache import cache_path, draft, hash_of, keep, kept, mapped
from trainer.data.shards import refuse_beyond
from trainer.data.sources import Document, find_files, hashed, hashed_files, locate

HEADER = struct.Struct("<9sQBQQ")
MAGIC, VERSION = b"MMIDIDX\0\0", 1
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # the others are floats
SCANNED = 1 << 24  # [tokens] at once


class Pair(NamedTuple):
    """S sequences, D documents."""

    ids_T: np.ndarray
    lengths_S: np.ndarray  # [tokens]
    starts_S: np.ndarray  # [tokens]
    documents_D1: np.ndarray  # where each document starts [sequences], and where the last one ends


class MegatronSource:
    """Documents of tokens. `path`: an *.idx, a directory (*.idx below it), a glob or a *.manifest; each has
    its *.bin beside it.

    vocab_size: of the model; every id is compared with it, at the first start with these files. end_of_text:
    an id that is appended to each document.
    """

    def __init__(
        self,
        path: str,
        vocab_size: int | None = None,
        end_of_text: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        self.files = find_files(path, suffixes=(".idx",))
        self.pairs = [opened(file) for file in self.files]
        self.starts = np.cumsum([0, *(len(pair.documents_D1) - 1 for pair in self.pairs)])
        self.end = np.array([] if end_of_text is None else [end_of_text], np.uint32)
        self.fingerprint = hashed_files([*self.files, *map(bin_of, self.files)], end_of_text)
        if not any(len(pair.ids_T) for pair in self.pairs):
            raise ValueError(f"path={path}: the files hold no token; give others")
        refuse_beyond(-1 if end_of_text is None else end_of_text, vocab_size, what="end_of_text")
        for file, pair in zip(self.files, self.pairs, strict=True):
            refuse_ids(bin_of(file), pair.ids_T, vocab_size, cache_path(cache_dir))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Document:
        part, n = locate(self.starts, i)
        ids_T, lengths_S, starts_S, documents_D1 = self.pairs[part]
        first, stop = documents_D1[n : n + 2].tolist()
        parts = [
            ids_T[start : start + length]
            for start, length in zip(
                starts_S[first:stop].tolist(), lengths_S[first:stop].tolist(), strict=True
            )
        ]
        is_whole = len(parts) == 1 and not len(self.end)
        tokens = parts[0] if is_whole else np.concatenate([*parts, self.end[: len(self.end) * bool(parts)]])
        return Document(f"{self.files[part]}:{n + 1}", tokens=tokens.astype(np.uint32, copy=False))


def bin_of(file: Path) -> Path:
    return file.with_suffix(".bin")


def opened(file: Path) -> Pair:
    """Raises: ValueError where the two files do not say what they should."""
    size = file.stat().st_size
    with file.open("rb") as opened_file:
        head = opened_file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{file}: does not begin like an index of Megatron's ({head[:9]!r}); give another")
    _, version, code, num_sequences, num_documents = HEADER.unpack(head)
    if version != VERSION or code not in DTYPES:
        raise ValueError(
            f"{file}: has version {version} and dtype code {code}; {VERSION} and one of {sorted(DTYPES)} can "
            "be read"
        )
    needed = HEADER.size + 12 * num_sequences + 8 * num_documents
    if size not in (needed, needed + num_sequences):  # with modes
        raise ValueError(
            f"{file}: has {size:,} bytes, its {num_sequences:,} sequences and {num_documents:,} documents "
            f"need {needed:,}; the file is cut off, fetch it again"
        )
    content = mapped(file, np.dtype("u1"), num=size)[HEADER.size :]
    lengths, places, documents = np.split(
        content[: needed - HEADER.size], np.cumsum([4 * num_sequences, 8 * num_sequences])
    )
    dtype = np.dtype(DTYPES[code])
    return checked_pair(
        file, dtype, lengths.view("<i4"), places.copy().view("<i8"), documents.copy().view("<i8")
    )


def checked_pair(
    file: Path, dtype: np.dtype, lengths_S: np.ndarray, places_S: np.ndarray, documents_D1: np.ndarray
) -> Pair:
    """Raises: ValueError where the index points beyond the ids, or not at whole ones."""
    ids, other = bin_of(file), "the two files do not belong together, fetch both again"
    if not ids.is_file():
        raise ValueError(f"{file}: {ids.name} is not beside it; fetch it")
    size = ids.stat().st_size
    ends_S = places_S + lengths_S.astype(np.int64) * dtype.itemsize
    needed = int(ends_S.max(initial=0))
    if needed != size:
        raise ValueError(
            f"{ids}: has {size:,} bytes, {file.name} speaks of {needed:,} (dtype {dtype}); {other}"
        )
    is_right = (places_S >= 0).all() and (lengths_S >= 0).all() and not (places_S % dtype.itemsize).any()
    spans = np.diff(documents_D1)
    is_right = is_right and len(documents_D1) > 0 and documents_D1[0] >= 0 and (spans >= 0).all()
    if not is_right or documents_D1[-1] > len(lengths_S):
        raise ValueError(f"{file}: points beyond its {len(lengths_S):,} sequences or between ids; {other}")
    ids_T = mapped(ids, dtype, num=size // dtype.itemsize)
    return Pair(ids_T, lengths_S, places_S // dtype.itemsize, documents_D1)


def refuse_ids(file: Path, ids_T: np.ndarray, vocab_size: int | None, cache: Path) -> None:
    """Compares every id with the vocabulary, unless this file with this time was compared before."""
    if ids_T.dtype.kind == "u" and vocab_size is not None and vocab_size > np.iinfo(ids_T.dtype).max:
        return
    stat = file.stat()
    name = f"scanned-{hashed(str(file.resolve()), stat.st_size, stat.st_mtime_ns, vocab_size)}"
    if kept(cache, name):
        return
    for start in range(0, len(ids_T), SCANNED):
        chunk = ids_T[start : start + SCANNED]
        least, most = int(chunk.min()), int(chunk.max())
        if least < 0:
            raise ValueError(f"{file}: holds the token id {least}; ids are 0 or more, write the files anew")
        refuse_beyond(max(most, 0), vocab_size, what=str(file))
    with draft(cache, name) as mark:
        keep(mark, name, hash_of(b""), suffix=".ok")
