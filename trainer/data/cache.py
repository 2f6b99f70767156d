"""Is what was made once and kept still what was written?

    <cache_dir>/<name>-<hash><suffix>      hash: xxh3 of the content

The hash stands in the name, so one rename publishes the content together with its hash. A process that is
killed leaves a draft, which no later start takes for whole. Two processes that make the same content put the
same bytes under the same name.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import xxhash

CHUNK_BYTES = 1 << 24  # that are hashed at once
REMEDY = "data.cache_dir= names another place"


class CacheError(OSError, ValueError):
    """The cache cannot be used; the message names the key and the remedy."""


def cache_path(chosen: str | Path | None) -> Path:
    """The directory of what is made once: `chosen`, else $XDG_CACHE_HOME/triquetra, else ~/.cache/triquetra.

    Raises: CacheError where the user has no home directory.
    """
    path = Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "triquetra")
    try:
        return path.expanduser()
    except RuntimeError as error:
        message = f"data.cache_dir={chosen or 'null'}: {path} needs a home directory, and HOME is not set"
        raise CacheError(f"{message}; {REMEDY}") from error


def kept(cache: Path, name: str) -> list[Path]:
    """The files that were kept under this name, in a fixed order; whether one is whole, its hash tells.
    Raises: CacheError where the system does not let this user look.
    """
    try:
        return sorted(cache.glob(f"{name}-*"))
    except OSError as error:
        raise unwritable(cache, error) from error


def hash_in_name(path: Path) -> str:
    return path.stem.rpartition("-")[2]


def new_hash() -> xxhash.xxh3_128:
    """xxh3 finds every accident at the speed of memory; xxh3 does not stop somebody who forges."""
    return xxhash.xxh3_128()


def hash_of(content: bytes) -> str:
    return xxhash.xxh3_128(content).hexdigest()


def file_hash(path: Path) -> str:
    digest = new_hash()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def mapped(path: Path, dtype: np.dtype, *, num: int) -> np.ndarray:
    """Read-only, and without a file descriptor that stays open: a large corpus has thousands of files."""
    if not num:
        return np.empty(0, dtype)
    num_bytes = num * dtype.itemsize
    array = torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8).numpy().view(dtype)
    array.flags.writeable = False
    return array


def unwritable(cache: Path, error: OSError) -> CacheError:
    return CacheError(f"data.cache_dir={cache}: cannot be written to ({error.strerror}); {REMEDY}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises: CacheError where the system refuses to read what is kept."""
    try:
        yield
    except OSError as error:
        message = f"data.cache_dir={path.parent}: {path.name} cannot be read ({error.strerror})"
        raise CacheError(f"{message}; make it readable or take it out; {REMEDY}") from error


@contextmanager
def draft(cache: Path, name: str) -> Iterator[Path]:
    """An empty file to write to; what is still there at the end is removed. Raises: CacheError."""
    path = cache / f"{name}.{uuid.uuid4().hex}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise unwritable(cache, error) from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def keep(path: Path, name: str, digest: str, *, suffix: str) -> Path:
    """Puts a finished draft into its place, over whatever lies there. Returns the place."""
    place = path.with_name(f"{name}-{digest}{suffix}")
    os.replace(path, place)
    return place
