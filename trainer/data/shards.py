"""How do a corpus's tokens lie on disk, and are they what was written?

    OUT/corpus.json      format, dtype, tokenizer, shards, sizes and hashes: docs/data.md#tokens
    OUT/tokenizer.json   the tokenizer that gave the ids
    OUT/00000.tokens     ids, documents one after another, each with its end of text
    OUT/00000.index      INDEX, an entry for each document, 24 bytes

`triquetra tokenize` writes such a directory (tokenize.py). Files are memory mapped. Their hashes are compared
at the first start on a machine, and again when a size or a time has changed.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.batches import NO_IDS
from trainer.data.cache import cache_path, draft, file_hash, hash_of, keep, kept, mapped
from trainer.data.sources import BadDocument, Document, expanded, hashed, locate

FORMAT = 1  # raise it when the files change their meaning
CORPUS, TOKENIZER = "corpus.json", "tokenizer.json"
DTYPES = ("<u2", "<u4")
# of a document: [tokens] its end in the shard, [bytes] its text's UTF-8, xxh3 of that text
INDEX = np.dtype([("end", "<u8"), ("num_bytes", "<u8"), ("content", "<u8")])
AGAIN = "fetch it again, or tokenise the corpus anew"


class Shard(NamedTuple):
    """What a shard's record says. bad: kind and detail of documents that have no tokens, by their number."""

    num_documents: int
    num_tokens: int
    max_id: int  # -1: there is no token
    hashes: dict[str, str]  # by suffix
    bad: dict[str, list[str]]


def dtype_for(num_ids: int) -> str:
    return DTYPES[num_ids > 1 << 16]


def shard_file(directory: Path, k: int, suffix: str) -> Path:
    return directory / f"{k:05d}.{suffix}"


class TokensSource:
    """What `triquetra tokenize` wrote: documents of tokens, numbered as in the corpus of texts.

    vocab_size: of the model. A document carries its text's hash and size, so what is held out, what is too
    large and what is drawn by its length are the same documents as of the texts.
    """

    def __init__(self, path: str, vocab_size: int | None = None, cache_dir: str | None = None) -> None:
        self.directory = expanded(path)
        about = read_corpus(self.directory, path=path)
        self.dtype, self.tokenizer_digest = np.dtype(about["dtype"]), about["tokenizer"]
        self.shards = [Shard(**shard) for shard in about["shards"]]
        self.starts = np.cumsum([0, *(shard.num_documents for shard in self.shards)])
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self.fingerprint = hashed("tokens", FORMAT, [shard.hashes for shard in self.shards])
        refuse_beyond(max(shard.max_id for shard in self.shards), vocab_size, what=f"path={path}")
        self.refuse_other_sizes()
        self.refuse_damage(cache_path(cache_dir))
        # mapped when a document of theirs is read
        self.tokens: list[np.ndarray | None] = [None] * len(self.shards)
        self.index: list[np.ndarray | None] = [None] * len(self.shards)
        self.ends: list[np.ndarray | None] = [None] * len(self.shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Document:
        k, n = locate(self.starts, i)
        if self.tokens[k] is None:
            self.map(k)
        where, bad = f"{self.directory}/{k:05d}:{n + 1}", self.shards[k].bad
        if bad and str(n) in bad:
            kind, detail = bad[str(n)]
            raise BadDocument(kind, where, detail)
        end, num_bytes, content = self.index[k][n].item()
        start = int(self.ends[k][n - 1]) if n else 0
        ids = self.tokens[k][start:end].astype(np.uint32, copy=False)
        return Document(where, tokens=ids, content=content, num_bytes=num_bytes)

    def ready(self, places: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """See sources.Source."""
        place_D = np.array(places)
        shard_D = self.starts.searchsorted(place_D, side="right") - 1
        ids_D, about_D = [NO_IDS] * len(places), np.empty(len(places), INDEX)
        for k in set(shard_D.tolist()):
            if self.tokens[k] is None:
                self.map(k)
            of_shard = (shard_D == k).nonzero()[0]
            n_D = place_D[of_shard] - self.starts[k]
            about_D[of_shard] = about_shard_D = self.index[k][n_D]
            start_D = self.ends[k][n_D - 1] * (n_D > 0)
            spans = zip(of_shard.tolist(), start_D.tolist(), about_shard_D["end"].tolist(), strict=True)
            for d, start, end in spans:
                ids_D[d] = self.tokens[k][start:end]
        if self.dtype != np.uint32:
            ids_D = [ids.astype(np.uint32) for ids in ids_D]
        return ids_D, about_D["content"], about_D["num_bytes"]

    def map(self, k: int) -> None:
        shard, file = self.shards[k], partial(shard_file, self.directory, k)
        self.index[k] = mapped(file("index"), INDEX, num=shard.num_documents)
        self.ends[k] = self.index[k]["end"]
        self.tokens[k] = mapped(file("tokens"), self.dtype, num=shard.num_tokens)

    def files(self) -> list[tuple[Path, str, int]]:
        """Of each file: its path, its hash and its size."""
        sizes = [
            (k, shard, {"tokens": shard.num_tokens * self.dtype.itemsize, "index": shard.num_documents * 24})
            for k, shard in enumerate(self.shards)
        ]
        return [
            (shard_file(self.directory, k, suffix), shard.hashes[suffix], size)
            for k, shard, of_shard in sizes
            for suffix, size in of_shard.items()
        ]

    def refuse_other_sizes(self) -> None:
        """A file that is cut off must not be mapped: to read behind its end would kill the process."""
        for path, _, size in self.files():
            here = path.stat().st_size if path.is_file() else None
            if here != size:
                message = f"{path}: is not there" if here is None else f"{path}: has {here:,} bytes"
                raise ValueError(f"{message}, {CORPUS} says {size:,} (dtype {self.dtype.str}); {AGAIN}")

    def refuse_damage(self, cache: Path) -> None:
        """Compares all hashes, unless these files with these times were compared before."""
        stats = [(str(path.resolve()), path.stat().st_mtime_ns, digest) for path, digest, _ in self.files()]
        name = f"compared-{hashed(stats)}"
        if kept(cache, name):
            return
        for path, digest, _ in self.files():
            here = file_hash(path)
            if here != digest:
                raise ValueError(f"{path}: is damaged: its hash is {here}, not {digest}; {AGAIN}")
        with draft(cache, name) as mark:
            keep(mark, name, hash_of(b""), suffix=".ok")


def read_corpus(directory: Path, *, path: str) -> dict[str, Any]:
    """Raises: ValueError where the directory is not a whole corpus of tokens."""
    file, tool = directory / CORPUS, "triquetra tokenize"
    if not file.is_file():
        unfinished = directory.with_name(f"{directory.name}.draft")
        remedy = f"{tool} again finishes {unfinished}" if unfinished.is_dir() else f"write one with {tool}"
        raise ValueError(f"path={path}: is no corpus of tokens, it has no {CORPUS}; {remedy}")
    try:
        about = json.loads(file.read_text())
        number = about["format"]
        [Shard(**shard) for shard in about["shards"]]
        is_known = about["dtype"] in DTYPES and isinstance(about["tokenizer"], str)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read ({error!r}); {AGAIN}") from error
    if number != FORMAT or not is_known:
        raise ValueError(
            f"{file}: format {number} with dtype {about['dtype']}, this program reads format "
            f"{FORMAT} with {' or '.join(DTYPES)}; tokenise the corpus anew"
        )
    if not any(shard["num_tokens"] for shard in about["shards"]):
        raise ValueError(f"path={path}: the corpus holds no token; tokenise another one")
    return about


def refuse_beyond(max_id: int, vocab_size: int | None, *, what: str) -> None:
    if vocab_size is not None and max_id >= vocab_size:
        remedy = f"use model.vocab_size={max_id + 1} or more, or the corpus of another tokenizer"
        raise ValueError(f"{what}: holds the token id {max_id}, model.vocab_size is {vocab_size}; {remedy}")
