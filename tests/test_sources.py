"""Are the documents of files and of the hub those that were written, and is every damage told?

Origins of the expected values: the texts that were written, by hand; other readers (zlib fed byte by byte,
pyarrow's tables); and the same source undisturbed, elsewhere, or read alone.
"""

import errno
import gzip
import json
import os
import resource
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rich

from tests.corpora import PACK, TEXTS, forked, lines, outcome, outcomes, write, zstd
from trainer import data
from trainer.data import BadDocument, files

NAMES = {
    data.TextSource: "a.txt",
    data.JsonlSource: "a.jsonl",
    data.ParquetSource: "a.parquet",
    data.ArrowSource: "a.arrow",
}
OF_ROWS = [source for source in NAMES if source is not data.TextSource]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compressed files are unpacked: $XDG_CACHE_HOME/triquetra."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "triquetra"


# ---- Compressed lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("plain", ["jsonl", "json"])
def test_compressed_lines_are_those_that_were_written(
    tmp_path: Path, cache: Path, pack: str, plain: str
) -> None:
    """In one member (gzip) or frame (zstd), in several that cut a line in two, and beside plain files."""
    folder, content = tmp_path / "corpus", lines(TEXTS)
    folder.mkdir()
    (folder / f"a.{plain}.{pack}").write_bytes(PACK[pack](content))
    (folder / f"b.{plain}.{pack}").write_bytes(
        b"".join(PACK[pack](part) for part in (content[:1000], b"", content[1000:]))
    )
    (folder / f"c.{plain}").write_bytes(content)
    (folder / "d.md").write_bytes(content)
    source = data.JsonlSource(str(folder))
    assert outcomes(source) == 3 * TEXTS
    assert source[61].where == f"{folder}/b.{plain}.{pack}:2"
    assert len(list(cache.iterdir())) == 2  # nothing unfinished


@pytest.mark.parametrize("pack", PACK)
def test_content_of_many_pieces_is_unpacked_whole(
    tmp_path: Path, pack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 100)
    path = write(data.JsonlSource, tmp_path / f"a.jsonl.{pack}", TEXTS)
    assert b"".join(files.pieces(path)) == lines(TEXTS)


def test_a_compressed_file_is_unpacked_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, unpack = [], files.unpack
    monkeypatch.setattr(files, "unpack", lambda path, target: calls.append(path.name) or unpack(path, target))
    (tmp_path / "corpus").mkdir()
    path = write(data.JsonlSource, tmp_path / "corpus" / "a.jsonl.gz", TEXTS)
    assert outcomes(data.JsonlSource(str(path))) == outcomes(data.JsonlSource(str(path))) == TEXTS
    (tmp_path / "link.jsonl.gz").symlink_to(path)
    assert outcomes(data.JsonlSource(str(tmp_path / "link.jsonl.gz"))) == TEXTS
    assert calls == ["a.jsonl.gz"]
    stat = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))  # as long as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert outcomes(data.JsonlSource(str(path))) == ["corrupt"]
    assert calls == ["a.jsonl.gz"] * 2
    for _ in range(2):  # the second time with the unpacked file below the corpus
        assert outcomes(
            data.JsonlSource(str(tmp_path / "corpus"), cache_dir=str(tmp_path / "corpus" / "cache"))
        ) == ["corrupt"]
    assert len(list((tmp_path / "corpus" / "cache").iterdir())) == 1


def test_several_processes_unpack_at_once(tmp_path: Path, cache: Path) -> None:
    texts = [f"{i} " * 500 for i in range(2000)]
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        write(data.JsonlSource, tmp_path / name, texts)
    results = [forked(lambda: outcomes(data.JsonlSource(str(tmp_path))) == 2 * texts) for _ in range(4)]
    assert [result() for result in results] == [True] * 4
    assert len(list(cache.iterdir())) == 2


def whole_lines(content: bytes) -> list[str]:
    return [json.loads(line)["text"] for line in content.split(b"\n")[:-1]]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_a_truncated_gzip_file_gives_its_whole_lines_and_tells_of_the_damage(
    tmp_path: Path, cache: Path, share: float
) -> None:
    packed = gzip.compress(lines(TEXTS))
    size = min(int(share * len(packed)), len(packed) - 1)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:size])
    (tmp_path / "b.jsonl").write_bytes(lines(["next"]))
    expected = whole_lines(zlib.decompressobj(31).decompress(packed[:size]))
    assert share < 1 or expected == TEXTS  # only the checksum is cut
    for _ in range(2):  # the second time from the cache
        source = data.JsonlSource(str(tmp_path))
        assert outcomes(source) == [*expected, "corrupt", "next"]
        with pytest.raises(BadDocument) as caught:
            source[len(expected)]
        message = "the file is empty" if not size else "Truncated compressed stream"
        assert caught.value.where == f"{tmp_path}/a.jsonl.gz:{len(expected) + 1}"
        assert caught.value.detail == f"the file is cut after line {len(expected)}: {message}"
    assert len(list(cache.iterdir())) == 1


def test_the_last_whole_line_may_lie_in_the_middle_of_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 100)
    packed = gzip.compress(lines(["a", "b", np.random.default_rng(0).bytes(1000).hex()]))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert outcomes(data.JsonlSource(str(tmp_path))) == ["a", "b", "corrupt"]


def test_a_truncated_zstd_file_gives_the_lines_of_what_can_be_decoded(tmp_path: Path) -> None:
    """A frame is decoded by blocks: cut in the second frame's only block, the first frame's whole lines
    remain.
    """
    content = lines(TEXTS)
    first, second = content[:1500], content[1500:]
    packed = zstd(first) + zstd(second)
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-20])
    assert outcomes(data.JsonlSource(str(tmp_path))) == [*whole_lines(first), "corrupt"]
    (tmp_path / "a.jsonl.zst").write_bytes(packed + b"no frame")
    assert outcomes(data.JsonlSource(str(tmp_path))) == [*TEXTS, "corrupt"]


def test_gzip_with_flipped_bits_gives_what_zlib_gives_byte_by_byte(tmp_path: Path) -> None:
    texts = [f"{i} " + np.random.default_rng(i).bytes(20).hex() for i in range(3000)]  # more than one piece
    packed = gzip.compress(lines(texts))
    for place in (5000, len(packed) // 2, len(packed) - 3):
        broken = bytearray(packed)
        broken[place] ^= 0x5A
        (tmp_path / "a.jsonl.gz").write_bytes(broken)
        one_by_one, content = zlib.decompressobj(31), b""
        with pytest.raises(zlib.error):
            for byte in broken:
                content += one_by_one.decompress(bytes([byte]))
        source = data.JsonlSource(str(tmp_path), cache_dir=str(tmp_path / f"cache{place}"))
        assert len(source) == content.count(b"\n") + 1
        assert outcome(source, len(source) - 1) == "corrupt"
        good = sum(outcome(source, i) == texts[i] for i in range(len(source) - 1))
        assert good >= place * 0.9 / len(packed) * 3000  # those before the place, which zlib may find late


def test_a_full_disk_is_told_with_file_bytes_and_remedy_and_leaves_nothing(
    tmp_path: Path, cache: Path
) -> None:
    """The limit of a file's size stands for the disk's."""
    path = write(data.JsonlSource, tmp_path / "a.jsonl.gz", ["x" * 3_000_000])

    def work() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            data.JsonlSource(str(path))
        except OSError as error:
            return f"{errno.errorcode[error.errno]} {error}"

    message = forked(work)()
    assert (
        message.startswith("EFBIG")
        and f"{path}: File too large; 1,000,000 bytes of it were unpacked to {cache}" in message
    )
    assert "are free; data.cache_dir= names another place" in message
    assert list(cache.iterdir()) == []


def test_a_file_beside_its_compressed_copy_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.zst", "b.jsonl.zst"):
        write(data.JsonlSource, tmp_path / name, TEXTS)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: a\.jsonl lies beside it.*take one"):
        data.JsonlSource(str(tmp_path))


# ---- Arrow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stream", "file", "zstd"])
@pytest.mark.parametrize("dtype", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_arrow_rows_are_those_of_the_table(tmp_path: Path, kind: str, dtype: pa.DataType) -> None:
    rows = [None if i == 13 else f"row {i % 20} é" for i in range(57)]
    options = pa.ipc.IpcWriteOptions(compression="zstd" if kind == "zstd" else None)
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    for name, part in {"a": rows[:30], "b": [], "c": rows[30:]}.items():
        table = pa.table({"id": list(range(len(part))), "body": pa.array(part, pa.string()).cast(dtype)})
        with (
            pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as file,
            new(file, table.schema, options=options) as writer,
        ):
            writer.write_table(table, max_chunksize=7)
    source = data.ArrowSource(str(tmp_path), field="body")
    order = np.random.default_rng(0).permutation(57).tolist()
    assert [outcome(source, i) for i in order] == [rows[i] or "missing_field" for i in order]
    assert len(source) == 57
    assert source[47].where == f"{tmp_path}/c.arrow:18"
    assert [outcome(data.ArrowSource(str(tmp_path), field="id"), i) for i in range(2)] == [
        "missing_field"
    ] * 2


def test_what_datasets_saved_is_read_without_what_it_cached(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved", num_shards=3)
    source = data.ArrowSource(str(tmp_path / "saved"))
    assert outcomes(source) == TEXTS and len(source.files) == 3
    loaded = datasets.load_from_disk(tmp_path / "saved").map(lambda row: row)
    assert len(loaded.cache_files) == 1
    with pytest.raises(ValueError, match=r"cache-\w+\.arrow: .*the same documents; .*data-\*\.arrow'"):
        data.ArrowSource(str(tmp_path / "saved"))
    assert outcomes(data.ArrowSource(f"{tmp_path}/saved/data-*.arrow")) == TEXTS


def test_arrow_stays_on_disk(tmp_path: Path) -> None:
    path = write(data.ArrowSource, tmp_path / "a.arrow", ["x" * 1_000_000] * 20)
    before = pa.total_allocated_bytes()
    source = data.ArrowSource(str(path))
    assert len(source[19].text) == 1_000_000
    assert pa.total_allocated_bytes() - before < 100_000


# ---- Damage, and what may pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow", "a.parquet"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_files_are_refused_with_their_names(tmp_path: Path, name: str, share: float) -> None:
    source = data.ArrowSource if name.endswith(".arrow") else data.ParquetSource
    path = write(source, tmp_path / name, TEXTS)
    if name == "file.arrow":
        table = pa.table({"text": TEXTS})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    size = int(share * (path.stat().st_size - 100))  # a stream's last bytes only say that it ends
    os.truncate(path, size)
    with pytest.raises(
        ValueError, match=rf"{path}: not a whole \*\{path.suffix} file \(.+\); fetch it again or take it out"
    ):
        source(str(path))


def test_a_damaged_page_of_parquet_costs_its_row_group_and_is_read_once(tmp_path: Path, monkeypatch) -> None:
    path = write(data.ParquetSource, tmp_path / "a.parquet", TEXTS)
    place = path.read_bytes().index(TEXTS[40].encode())  # row group 40 // 7 = 5: rows 35 to 41
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    source = data.ParquetSource(str(path))
    opened, parquet_file = [], pq.ParquetFile
    monkeypatch.setattr(
        pq, "ParquetFile", lambda *args, **kw: opened.append(args) or parquet_file(*args, **kw)
    )
    assert outcomes(source) == ["corrupt" if 35 <= i < 42 else text for i, text in enumerate(TEXTS)]
    assert len(opened) == 9  # row groups, the damaged one too
    with pytest.raises(BadDocument, match=rf"{path}:41: corrupt: .*CRC"):
        source[40]


def test_arrow_with_a_broken_offset_loses_the_two_rows_it_bounds(tmp_path: Path) -> None:
    path = write(data.ArrowSource, tmp_path / "a.arrow", ["a" * 10] * 7)
    content = path.read_bytes()
    offsets = np.arange(0, 80, 10, dtype=np.int32)
    broken = offsets.copy()
    broken[3] = 1 << 30
    path.write_bytes(content.replace(offsets.tobytes(), broken.tobytes()))
    assert outcomes(data.ArrowSource(str(path))) == ["a" * 10] * 2 + ["corrupt"] * 2 + ["a" * 10] * 3


@pytest.mark.parametrize("source", [data.TextSource, data.JsonlSource, data.ParquetSource])
def test_a_file_that_vanishes_for_a_while_is_an_error_of_the_system_and_no_bad_document(
    tmp_path: Path, source: type
) -> None:
    path = write(source, tmp_path / NAMES[source], TEXTS)
    documents = source(str(path))
    path.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=str(path)):
            documents[0]
    (tmp_path / "away").rename(path)
    assert documents[0].text == TEXTS[0]


def test_an_input_output_error_passes_through_pyarrow_with_its_number(tmp_path: Path, monkeypatch) -> None:
    path = write(data.ParquetSource, tmp_path / "a.parquet", TEXTS)
    source = data.ParquetSource(str(path))

    def failing(*args, **kw):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetFile, "read_row_group", failing)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                source[0]
    assert source[0].text == TEXTS[0]


def test_text_that_is_not_utf8_is_counted_in_every_format(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff", "é".encode()], pa.binary())
    for name, column in {"raw": raw, "text": raw.view(pa.string())}.items():
        table = pa.table({"text": column})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with (
            pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n{"text": "\xc3\xa9"}\n')
    for i, content in enumerate(raw.to_pylist()):
        (tmp_path / f"{i}.txt").write_bytes(content)
    for source, times in {
        data.TextSource: 1,
        data.JsonlSource: 1,
        data.ParquetSource: 2,
        data.ArrowSource: 2,
    }.items():
        assert outcomes(source(str(tmp_path))) == ["fine", "not_utf8", "é"] * times


@pytest.mark.rare
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.txt"])
def test_a_document_of_100_mb_takes_seconds(tmp_path: Path, name: str) -> None:
    source = next(source for source, own in NAMES.items() if Path(name).name.startswith(own))
    text = "0123456789" * 10_000_000
    path = write(source, tmp_path / name, [text])
    start_s = time.process_time()
    document = source(str(path))[0]
    assert time.process_time() - start_s < 60  # measured: 1 s; quadratic: hours
    assert document.text == text


# ---- Refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", OF_ROWS)
def test_paths_and_columns_that_cannot_be_read_are_refused_once_with_a_remedy(
    tmp_path: Path, source: type, monkeypatch
) -> None:
    name = NAMES[source]
    (tmp_path / "empty").mkdir()
    (tmp_path / "corpus" / f"folder{name}").mkdir(parents=True)  # a directory named like a file is none
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/empty: no file matches; .*directory with \*\{Path(name).suffix}"
    ):
        source(str(tmp_path / "empty"))
    path = write(source, tmp_path / "corpus" / name, TEXTS)
    assert len(source(str(tmp_path / "corpus"))) == len(source(f"{tmp_path}/corpus/*{path.suffix}")) == 60
    link = tmp_path / "corpus" / f"link{name}"
    link.symlink_to(tmp_path / "nowhere")
    for given in (tmp_path / "corpus", link):
        with pytest.raises(
            ValueError, match=rf"{link}: cannot be read \(a link to nothing\); make it readable or take"
        ):
            source(str(given))
    link.unlink()
    if source is not data.JsonlSource:
        with pytest.raises(ValueError, match=rf"{path}: no column 'body'; field= is one of \['text'\]"):
            source(str(path), field="body")
    monkeypatch.setattr(os, "access", lambda file, mode: False)  # the tests may be root's
    with pytest.raises(ValueError, match=rf"{path}: cannot be read \(permission denied\)"):
        source(str(tmp_path / "corpus"))


def test_a_directory_that_may_not_be_listed_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    for folder in (tmp_path, tmp_path / "deep"):
        (folder / "a.txt").write_text("text")
    listed = os.scandir

    def scandir(path: str):
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match=f"{tmp_path}/deep"):
        data.TextSource(str(tmp_path))


# ---- Manifests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", NAMES)
def test_a_manifest_gives_its_files_in_its_order(tmp_path: Path, source: type) -> None:
    folder, suffix = tmp_path / "corpus", Path(NAMES[source]).suffix
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c", "not listed"):
        write(source, folder / f"{name}{suffix}", [name])
    (folder / f"d{suffix}").symlink_to(write(source, folder / "blob", ["d"]))
    listed = f"\ufeff# shards\n\nb{suffix}\n  deep/c{suffix}  \r\nd{suffix}\n  # no more\n./a{suffix}"
    (folder / "all.manifest").write_text(listed, encoding="utf-8", newline="")
    read = source(f"{folder}/all.manifest")
    assert outcomes(read) == ["b", "deep/c", "d", "a"]
    (folder / "all.manifest").write_text(f"a{suffix}\nb{suffix}\ndeep/c{suffix}\nd{suffix}\n")
    # other documents by the same numbers
    assert source(f"{folder}/all.manifest").fingerprint != read.fingerprint


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("../outside.txt", "leads out of the manifest's directory"),
        ("deep/../../outside.txt", "leads out"),
        ("link.txt", "leads out"),
        ("folder/outside.txt", "leads out"),
        ("/etc/passwd", "an absolute path"),
        ("file:///etc/passwd", "no such file"),
        ("http://example.org/a.txt", "no such file"),
        ("missing.txt", "no such file"),
        ("nul\0.txt", "no such file"),
        ("x" * 300, "no such file"),
        ("deep", "a directory"),
        ("./a.txt", "the file of line 2 again"),
        ("same.txt", "the file of line 2 again"),
    ],
)
def test_a_manifest_names_files_of_its_own_directory_once(tmp_path: Path, line: str, why: str) -> None:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (tmp_path / "outside.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "same.txt").symlink_to(folder / "a.txt")
    manifest = folder / "all.manifest"
    manifest.write_text(f"# one\na.txt\n{line}\n")
    with pytest.raises(ValueError) as caught:
        data.TextSource(str(manifest))
    assert str(caught.value).startswith(f"{manifest}:3: {line}: {why}")
    assert str(caught.value).endswith(f"; give each file once, by its path below {folder}")
    manifest.write_text("# nothing\n")
    with pytest.raises(ValueError, match=rf"{manifest}: no file is named; give one a line"):
        data.TextSource(str(manifest))


# ---- Where a corpus lies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_corpus_may_be_moved(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = next(source for source, own in NAMES.items() if name.startswith(own))
    (tmp_path / "here" / "deep").mkdir(parents=True)
    for place in ("", "deep/"):
        write(source, tmp_path / f"here/{place}{name}", TEXTS)
    (tmp_path / "here" / "all.manifest").write_text(f"{name}\ndeep/{name}\n")
    there = tmp_path / "some" / "where" / "else"
    shutil.copytree(tmp_path / "here", there)  # with other times
    (tmp_path / "link").symlink_to(there)
    prints = {
        source(f"{folder}{what}").fingerprint
        for folder in (tmp_path / "here", there, tmp_path / "link")
        for what in ("", "/all.manifest")
    }
    monkeypatch.chdir(there)
    assert prints == {source(".").fingerprint}
    (there / name).unlink()
    assert source(str(there)).fingerprint not in prints


# ---- Forks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_two_children_and_their_parent_read_at_the_same_time(tmp_path: Path, name: str) -> None:
    source = next(source for source, own in NAMES.items() if name.startswith(own))
    texts = [f"{i} " * (1 + i % 5) for i in range(300)]
    if source is data.TextSource:
        for i, text in enumerate(texts):
            (tmp_path / f"{i:03}.txt").write_text(text)
    else:
        write(source, tmp_path / name, texts)
    documents = source(str(tmp_path))
    assert documents[7].text == texts[7]  # something is cached when it is forked

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(300).tolist() * 5
        return [documents[i].text for i in order] == [texts[i] for i in order]

    children = [forked(lambda seed=seed: read(seed)) for seed in (1, 2)]
    assert read(3)
    assert [child() for child in children] == [True, True]


# ---- The hub ---------------------------------------------------------------------------------------------


class NetworkError(Exception):
    """Like many of the network's: no OSError."""


class FakeDataset:
    """Rows that fail before row k, times[k] times."""

    column_names = ("text",)
    num_read = 0

    def __init__(self, times: dict[int, int], num_rows: int = 10) -> None:
        self.times, self.num_rows, self.first = times, num_rows, 0

    def skip(self, first: int):
        other = FakeDataset(self.times, self.num_rows)
        other.first = first
        return other

    def __iter__(self):
        for k in range(self.first, self.num_rows + 1):  # and before the end
            if self.times.get(k, 0) > 0:
                self.times[k] -= 1
                raise NetworkError(f"lost before {k}")
            if k < self.num_rows:
                FakeDataset.num_read += 1
                yield {"text": None if k == 6 else f"document {k}"}


def hub(times: dict[int, int], monkeypatch: pytest.MonkeyPatch, **changes: int) -> data.HubSource:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: FakeDataset(times, **changes))
    return data.HubSource("fake")


def asked_until_read(source: data.HubSource, i: int, errors: list[OSError]) -> str:
    for _ in range(10):
        try:
            return outcome(source, i)
        except OSError as error:
            errors.append(error)
    raise errors[-1]


@pytest.mark.parametrize("first", [0, 4, 23])
@pytest.mark.parametrize("times", [{0: 1}, {3: 2, 4: 1}, {6: 1, 7: 3}, {10: 2}, {9: 1, 10: 1, 0: 1}])
def test_a_network_that_fails_changes_no_document(times: dict[int, int], first: int, monkeypatch) -> None:
    """Three epochs of ten, from their start and from within, with documents that are left out and wanted
    later.
    """
    num_errors, errors = sum(times.values()), []
    source = hub(dict(times), monkeypatch)
    source.seek(first, wanted=lambda i: i % 3 == 0)
    order = list(range(first, first + 27, 3))
    order[1:3] = order[2:0:-1]  # one waits among those that were kept
    expected = ["missing_field" if i % 10 == 6 else f"document {i % 10}" for i in order]
    assert [asked_until_read(source, i, errors) for i in order] == expected
    assert len(errors) == num_errors
    assert all(isinstance(error.__cause__, NetworkError) for error in errors)


def test_an_error_of_the_hub_names_dataset_row_and_what_it_was(monkeypatch) -> None:
    source = hub({3: 1}, monkeypatch)
    with pytest.raises(OSError, match=r"fake: row 4 cannot be read \(NetworkError: lost before 3\)"):
        source[5]
    assert source[5].text == "document 5"
    with pytest.raises(ValueError, match="fake: the dataset holds no row; check split=train"):
        hub({}, monkeypatch, num_rows=0)[0]


def test_reading_on_in_a_later_epoch_begins_in_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    times: dict[int, int] = {}
    source = hub(times, monkeypatch)
    assert outcome(source, 26) == "missing_field"
    times[7], before = 1, FakeDataset.num_read
    assert asked_until_read(source, 27, []) == "document 7"
    # and not ten of an epoch to find out that it ends before row 27
    assert FakeDataset.num_read == before + 1


def test_the_files_of_an_installed_package_by_its_name() -> None:
    """What its own directory holds; the package is not imported, and one that is not there is refused."""
    source, directory = data.PythonSource(package="rich"), Path(rich.__file__).parent
    assert {Path(source[i].where) for i in range(len(source))} == set(directory.rglob("*.py"))
    assert source.fingerprint != data.PythonSource().fingerprint
    with pytest.raises(ValueError, match=r"package=no_such_package: is no installed package"):
        data.PythonSource(package="no_such_package")
    with pytest.raises(ValueError, match=r"match=x: none of the \d+ files; an example is "):
        data.PythonSource(match="x", package="rich")
