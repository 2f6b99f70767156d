"""Does every damaged corpus give counted bad documents, or one line with the file?

Origins of the expected values: the texts that were written; damages are drawn from a seed. Each corpus is
read in a child, so a library that crashes is seen.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.corpora import PACK, TEXTS, forked, outcome, write
from trainer import data
from trainer.data import BAD_KINDS, BadDocument

KINDS = {
    "a.jsonl": data.JsonlSource,
    "a.jsonl.gz": data.JsonlSource,
    "a.jsonl.zst": data.JsonlSource,
    "a.parquet": data.ParquetSource,
    "a.arrow": data.ArrowSource,
    "file.arrow": data.ArrowSource,
    "a.txt": data.TextSource,
}
SEEDS = 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def written(path: Path) -> bytes:
    if path.name == "file.arrow":
        table = pa.table({"text": pa.array(TEXTS, pa.string())})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    else:
        write(KINDS[path.name], path, TEXTS)
    return path.read_bytes()


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Cut, with a hole, with a block of zeros or of noise, with flipped bits, or with NULs between."""
    start, length = int(random.integers(len(content))), int(random.integers(1, 200))
    before, behind = content[:start], content[start + length :]
    block = random.integers(0, 256, length, np.uint8).tobytes()
    bits = np.frombuffer(content, np.uint8).copy()
    bits[random.integers(0, len(bits), 5)] ^= np.uint8(1 << random.integers(8))
    choices = [before, before + behind, before + bytes(length) + behind, before + block + behind]
    choices += [bits.tobytes(), content[:start] + bytes(3) + content[start:]]
    return choices[int(random.integers(len(choices)))]


def reading(path: Path) -> list[str]:
    """What is wrong with how the corpus is read; empty: nothing."""
    try:
        source = KINDS[path.name](str(path))
    except ValueError as error:
        message = str(error)
        return [] if str(path) in message and "\n" not in message else [f"refused with {message!r}"]
    problems = list[str]()
    for i in range(len(source)):
        try:
            document = source[i]
        except BadDocument as bad:
            where = bad.where if path.suffix == ".txt" else bad.where.removesuffix(f":{i + 1}")
            if bad.kind not in BAD_KINDS or where != str(path) or "\n" in str(bad):
                problems.append(f"document {i}: {bad!r}")
        else:
            document.text.encode()  # text that can be written is text that can be tokenised
    return problems


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_or_has_bad_documents(tmp_path: Path, name: str, seed: int) -> None:
    path = tmp_path / name
    path.write_bytes(damaged(written(path), np.random.default_rng(seed)))
    assert forked(lambda: reading(path))() == []


LINES = {
    b"null": "missing_field",
    b"17": "missing_field",
    b'"text"': "missing_field",
    b"[]": "missing_field",
    b'[{"text": "in a list"}]': "missing_field",
    b"{}": "missing_field",
    b'{"text": null}': "missing_field",
    b'{"text": 3.5}': "missing_field",
    b'{"text": ["a", "b"]}': "missing_field",
    b'{"text": {"text": "deeper"}}': "missing_field",
    b'{"Text": "another case"}': "missing_field",
    b'{"text": "no end': "broken_json",
    b'{"text": "two"} {"text": "objects"}': "broken_json",
    b'{"text": "a raw \x00 NUL"}': "broken_json",
    b"\x00": "broken_json",
    b"\x00\x00\x00{}": "broken_json",
    b'{"text": "a tab\tin it"}': "broken_json",
    b"[" * 100_000: "broken_json",
    b'{"text": ' + b"9" * 10_000 + b"}": "broken_json",
    b'{"text": "\xff\xfe"}': "not_utf8",
    b'{"text": "\xed\xa0\x80"}': "not_utf8",
    b'{"text": "\\ud800"}': "not_utf8",
    b"": "empty",
    b" \t\r": "empty",
    b'{"text": "a spelt \\u0000 NUL"}': "a spelt \x00 NUL",
    b'\xef\xbb\xbf{"text": "a mark"}': "a mark",
    b'{"text": "first", "text": "last"}': "last",
    b'{"text": NaN}': "missing_field",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_lines_of_every_wrong_kind_are_told_apart(tmp_path: Path, name: str) -> None:
    content, path = b"\n".join(LINES) + b"\n", tmp_path / name
    path.write_bytes(PACK[path.suffix[1:]](content) if path.suffix[1:] in PACK else content)
    source = data.JsonlSource(str(path))
    assert [outcome(source, i) for i in range(len(source))] == list(LINES.values())


@pytest.mark.parametrize("seed", range(4))
def test_a_line_of_noise_is_one_bad_document_and_its_neighbours_are_whole(tmp_path: Path, seed: int) -> None:
    random, content = np.random.default_rng(seed), list[bytes]()
    for i in range(50):
        noise = random.integers(0, 256, int(random.integers(1, 300)), np.uint8).tobytes().replace(b"\n", b"")
        content += [json.dumps({"text": f"row {i}"}).encode(), noise or b"x"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(content))
    source = data.JsonlSource(str(tmp_path / "a.jsonl"))
    read = [outcome(source, i) for i in range(len(source))]
    assert read[::2] == [f"row {i}" for i in range(50)]
    assert set(read[1::2]) <= {"not_utf8", "broken_json", "empty", "missing_field"}


@pytest.mark.parametrize("line", [b"a\x00.txt", b"\xff\xfe", b"a" * 5000, b"\x00" * 10, b".", b"*.txt"])
def test_a_manifest_with_a_name_that_cannot_be_one_is_refused_by_its_line(
    tmp_path: Path, line: bytes
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.manifest").write_bytes(b"a.txt\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/b\.manifest:3: .*(no such file|a directory); give"):
        data.TextSource(str(tmp_path / "b.manifest"))
