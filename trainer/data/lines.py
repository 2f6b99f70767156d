"""Where does each line of a file start, and need that be found again at every start?"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.cache import (
    CacheError,
    cache_path,
    draft,
    file_hash,
    hash_in_name,
    hash_of,
    keep,
    kept,
    mapped,
    reading,
    unwritable,
)
from trainer.data.sources import hashed

SCAN_BYTES = 1 << 26  # of a file at once, when its lines are indexed
KEPT_FROM_BYTES = 1 << 26  # a smaller file is indexed in a twentieth of a second
SUFFIX = ".offsets"
log = logging.getLogger(__name__)


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


def kept_offsets(path: Path, cache_dir: str | Path | None) -> np.ndarray:
    """`line_offsets`, from the cache if the file's size and time are those of then. What is kept is memory
    mapped, so the processes of a machine share it. Without a cache nothing is kept, and a line says so.
    """
    if path.stat().st_size < KEPT_FROM_BYTES:
        return line_offsets(path)
    try:
        return offsets_in(cache_path(cache_dir), path)
    except CacheError as error:
        log.warning("%s; the lines of %s are found at every start", error, path)
        return line_offsets(path)


def offsets_in(cache: Path, path: Path) -> np.ndarray:
    """Raises: CacheError."""
    stat = path.stat()
    name = f"lines-{hashed(str(path.resolve()), stat.st_size, stat.st_mtime_ns)}"
    for index in kept(cache, name):
        with reading(index):
            if file_hash(index) == hash_in_name(index):
                return mapped(index, np.dtype(np.int64), num=index.stat().st_size // 8)
        log.warning("%s is not what was written there; the lines of %s are found again", index, path)
    with draft(cache, name) as target:  # opened first: a scan takes long
        offsets = line_offsets(path)
        try:
            target.write_bytes(offsets.tobytes())
            keep(target, name, hash_of(offsets.tobytes()), suffix=SUFFIX)
        except OSError as error:
            raise unwritable(cache, error) from error
    return offsets
