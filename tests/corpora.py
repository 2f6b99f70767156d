"""Texts as files of every kind of source, and what is read of them, here and in a child."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainer import data
from trainer.data import BadDocument

TEXTS = [f"row {i} " + "é" * (i % 7) * i for i in range(60)]


def outcome(source: object, i: int) -> str:
    try:
        return source[i].text
    except BadDocument as bad:
        return bad.kind


def outcomes(source: object) -> list[str]:
    return [outcome(source, i) for i in range(len(source))]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {"gz": gzip.compress, "zst": zstd}


def write(source: type, path: Path, texts: list[str]) -> Path:
    """The texts as a file of this kind of source, in more than one part where it has parts."""
    table = pa.table({"text": pa.array(texts, pa.string())})
    if source is data.JsonlSource:
        path.write_bytes(PACK[path.suffix[1:]](lines(texts)) if path.suffix[1:] in PACK else lines(texts))
    elif source is data.ParquetSource:
        pq.write_table(
            table, path, row_group_size=7, compression="none", use_dictionary=False, write_page_checksum=True
        )
    elif source is data.ArrowSource:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    else:
        path.write_text(texts[0])
    return path


def forked(work: Callable[[], object]) -> Callable[[], object]:
    """Starts the work in a child now; the result is asked for later."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(writer, repr(work()).encode())
        finally:
            os._exit(0)  # it must not go on with the tests
    os.close(writer)

    def result() -> object:
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        return eval(answer or b"'the child failed'")

    return result
