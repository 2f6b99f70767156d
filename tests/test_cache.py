"""Is what the cache holds used only while it is what was written there, and does every error name its key?

Origins of the expected values: the texts that were written, by hand; the same cache undisturbed.
"""

import errno
import os
import pwd
import resource
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from tokenizers import Tokenizer

from tests.corpora import TEXTS, forked, lines, outcomes, write
from trainer import data, train
from trainer.config import ConfigError, DataConfig
from trainer.data import files
from trainer.data import lines as line_index
from trainer.data.cache import CacheError, cache_path, kept
from trainer.data.reader import Reader
from trainer.run.build import sources_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$XDG_CACHE_HOME/triquetra."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "triquetra"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A compressed file, beside the cache."""
    (tmp_path / "corpus").mkdir()
    return write(data.JsonlSource, tmp_path / "corpus" / "a.jsonl.gz", TEXTS)


def same_size(content: bytes) -> bytes:
    """Another digit in a row's number: the lines stay lines of JSON."""
    return content.replace(b"row 1", b"row 9", 1)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "of the same size": same_size,
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "longer": lambda content: content + b'{"text": "more"}\n',
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_unpacked_copy_that_was_changed_is_made_anew_and_one_line_says_so(
    corpus: Path, cache: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    assert outcomes(data.JsonlSource(str(corpus))) == TEXTS and caplog.text == ""
    (copy,) = cache.iterdir()
    written = copy.read_bytes()
    copy.write_bytes(damage(written))
    assert copy.read_bytes() != written
    assert outcomes(data.JsonlSource(str(corpus))) == TEXTS
    assert list(cache.iterdir()) == [copy] and copy.read_bytes() == written
    (line,) = caplog.messages
    assert line == f"{copy} is not what was written there; {corpus} is unpacked again"
    assert outcomes(data.JsonlSource(str(corpus))) == TEXTS and len(caplog.messages) == 1


def test_the_copy_of_a_damaged_file_is_checked_too(corpus: Path, cache: Path) -> None:
    corpus.write_bytes(corpus.read_bytes()[:-9])
    expected = outcomes(data.JsonlSource(str(corpus)))
    assert expected[-1] == "corrupt" and expected[:-1] == TEXTS[: len(expected) - 1]
    (copy,) = cache.iterdir()
    copy.write_bytes(same_size(copy.read_bytes()))
    assert outcomes(data.JsonlSource(str(corpus))) == expected


def test_a_tokenizer_that_was_changed_is_trained_again_and_one_line_says_so(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog")
    source = data.TextSource(str(tmp_path / "a.txt"))

    def loaded() -> Tokenizer:
        return data.load_tokenizer("train", source=source, vocab_size=262)

    expected = loaded().to_str()
    (copy,) = cache.iterdir()
    written = copy.read_bytes()
    copy.write_bytes(written.replace(b"<|endoftext|>", b"<|endoftexT|>"))
    assert len(copy.read_bytes()) == len(written) and copy.read_bytes() != written
    assert loaded().to_str() == expected and copy.read_bytes() == written
    assert caplog.messages == [f"{copy} is not what was written there; the tokenizer is trained again"]
    assert loaded().to_str() == expected and len(caplog.messages) == 1


def test_a_build_that_is_killed_leaves_nothing_that_is_taken_for_whole(corpus: Path, cache: Path) -> None:
    """The child ends without a word, as if killed, at each piece that it has unpacked."""

    def killed_at(piece: int) -> Callable[[], object]:
        def work() -> None:
            unpacked_pieces, files.PIECE_BYTES = files.pieces, 100

            def pieces(path: Path):
                for i, content in enumerate(unpacked_pieces(path)):
                    if i == piece:
                        os._exit(9)
                    yield content

            files.pieces = pieces
            data.JsonlSource(str(corpus))

        return work

    for piece in (0, 1, 20):
        assert forked(killed_at(piece))() == "the child failed"
    assert len(list(cache.iterdir())) == 3  # drafts
    assert outcomes(data.JsonlSource(str(corpus))) == TEXTS
    assert outcomes(data.JsonlSource(str(corpus))) == TEXTS  # from the cache
    assert len(list(cache.iterdir())) == 4


def test_several_processes_that_meet_a_changed_copy_all_get_the_right_one(corpus: Path, cache: Path) -> None:
    data.JsonlSource(str(corpus))
    (copy,) = cache.iterdir()
    copy.write_bytes(same_size(copy.read_bytes()))
    results = [forked(lambda: outcomes(data.JsonlSource(str(corpus))) == TEXTS) for _ in range(4)]
    assert [result() for result in results] == [True] * 4
    assert list(cache.iterdir()) == [copy] and outcomes(data.JsonlSource(str(corpus))) == TEXTS


# ---- Errors that name the key ----------------------------------------------------------------------------


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def test_without_a_home_directory_the_error_names_data_cache_dir(
    no_home: None, corpus: Path, tmp_path: Path
) -> None:
    message = r"^data\.cache_dir=null: .* home directory, and HOME is not set; data\.cache_dir= names"
    with pytest.raises(CacheError, match=message):
        cache_path(None)
    with pytest.raises(ValueError, match=message):
        data.load_tokenizer("train", source=data.PythonSource("abc.py"), vocab_size=300)
    with pytest.raises(ValueError, match=message):
        data.JsonlSource(str(corpus))
    assert outcomes(data.JsonlSource(str(corpus), cache_dir=str(tmp_path / "cache"))) == TEXTS
    plain = write(data.JsonlSource, tmp_path / "b.jsonl", TEXTS)
    assert outcomes(data.JsonlSource(str(plain))) == TEXTS  # needs no cache
    with pytest.raises(ValueError, match=r"^path=~/a: there is no home directory .*give the whole path"):
        data.TextSource("~/a")


def test_a_cache_that_cannot_be_written_to_is_refused_with_its_key_and_the_remedy(
    corpus: Path, tmp_path: Path
) -> None:
    """A file where a directory is needed: root may write everywhere else."""
    (tmp_path / "file").write_text("no directory")
    place = str(tmp_path / "file" / "cache")
    message = rf"data\.cache_dir={place}: cannot be written to \(Not a directory\); data\.cache_dir= names"
    with pytest.raises(ValueError, match=f"^{message}"):
        data.JsonlSource(str(corpus), cache_dir=place)
    with pytest.raises(ValueError, match=f"^{message}"):
        data.load_tokenizer("train", source=data.TextSource(str(corpus)), vocab_size=300, cache_dir=place)


def test_a_full_disk_under_the_tokenizer_names_the_key_and_leaves_nothing(
    tmp_path: Path, cache: Path
) -> None:
    """The limit of a file's size stands for the disk's."""
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog")
    source = data.TextSource(str(tmp_path / "a.txt"))

    def work() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            data.load_tokenizer("train", source=source, vocab_size=262)
        except ValueError as error:
            return str(error)

    assert forked(work)().startswith(f"data.cache_dir={cache}: cannot be written to (File too large); ")
    assert list(cache.iterdir()) == []


def test_a_cache_that_may_not_be_looked_at_names_the_key(cache: Path, monkeypatch) -> None:
    """As the home directory of another user; root may look everywhere."""

    def refuse(*of: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(cache))

    monkeypatch.setattr(Path, "glob", refuse)
    with pytest.raises(
        CacheError, match=rf"^data\.cache_dir={cache}: cannot be .*denied.*; data\.cache_dir="
    ):
        kept(cache, "tokenizer")


def test_a_copy_that_cannot_be_read_names_the_key(corpus: Path, cache: Path) -> None:
    data.JsonlSource(str(corpus))
    (copy,) = cache.iterdir()
    copy.unlink()
    copy.mkdir()  # root may read every file
    with pytest.raises(ValueError, match=rf"^data\.cache_dir={cache}: {copy.name} cannot be read \(Is a dir"):
        data.JsonlSource(str(corpus))


def test_data_cache_dir_holds_for_sources_unless_they_name_another_place(
    corpus: Path, tmp_path: Path
) -> None:
    node = {"_target_": "trainer.data.JsonlSource", "path": str(corpus)}
    own = {**node, "cache_dir": str(tmp_path / "own")}
    sources_of(DataConfig(source=node, cache_dir=str(tmp_path / "all")), vocab_size=256)
    sources_of(DataConfig(source=own, cache_dir=str(tmp_path / "all")), vocab_size=256)
    assert len(list((tmp_path / "all").iterdir())) == len(list((tmp_path / "own").iterdir())) == 1
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ConfigError, match=rf"^data\.source: data\.cache_dir={tmp_path}/file/x: cannot be"):
        sources_of(DataConfig(source=node, cache_dir=str(tmp_path / "file" / "x")), vocab_size=256)


def test_a_path_that_may_not_be_looked_at_is_refused_with_key_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may be root's: the system's answer is imitated."""

    def is_dir(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", is_dir)
    where = rf"path={tmp_path}: {tmp_path}: Permission denied; make it readable .*another path="
    node = {"_target_": "trainer.data.TextSource", "path": str(tmp_path)}
    with pytest.raises(ConfigError, match=rf"^data\.source: {where}"):
        sources_of(DataConfig(source=node), vocab_size=256)


class Refusing:
    fingerprint = "refusing"

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> data.Document:
        raise PermissionError(13, "Permission denied", "/corpus/a.txt")


def test_a_file_that_becomes_unreadable_while_it_is_read_names_key_and_remedy() -> None:
    reader = Reader(Refusing(), key="data.sources.web", seed=0, shuffle=False, num_streams=1, retries=0)
    message = (
        r"^data\.sources\.web: document 3 cannot be read, tried 1 times in 0 s: PermissionError: .*"
        r"'/corpus/a\.txt'; make it readable for this user$"
    )
    with pytest.raises(data.DataError, match=message):
        reader.read(3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.cache_dir=/dev/null", "data.cache_dir=/dev/null: cannot be written to (File exists); "),
        ("data.tokenizer=/dev/null", "data.tokenizer=/dev/null: cannot load it (EOF while parsing"),
        ("data.tokenizer=/nowhere", "data.tokenizer=/nowhere: cannot load it ("),
    ],
)
def test_a_run_says_which_key_and_which_remedy(tmp_path: Path, capsys, override: str, message: str) -> None:
    """What a constructor says reaches the user, not what lies below it."""
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog")
    run = ["model=debug", "data=txt", f"data.source.path={tmp_path}/a.txt", f"run_dir={tmp_path}", "steps=1"]
    run += ["name=run", "seq_len=16", "global_batch=2", "micro_batch=1", "model.vocab_size=262"]
    assert train.main([*run, override]) == train.REFUSED
    assert capsys.readouterr().err.startswith(f"error: {message}")


# ---- Indexes of lines ------------------------------------------------------------------------------------


def test_an_index_of_lines_is_kept_until_size_or_time_or_the_index_has_changed(tmp_path, monkeypatch, caplog):
    """The index is also that of a file whose index is not kept."""
    path, scanned, scan = tmp_path / "a.jsonl", [], line_index.line_offsets
    path.write_bytes(lines(TEXTS))
    monkeypatch.setattr(line_index, "line_offsets", lambda path: scanned.append(path) or scan(path))
    monkeypatch.setattr(line_index, "KEPT_FROM_BYTES", 1)

    def start() -> list[str]:
        return outcomes(data.JsonlSource(str(path), cache_dir=str(tmp_path / "cache")))

    assert start() == start() == TEXTS and len(scanned) == 1
    os.utime(path, ns=(1, 1))
    assert start() == TEXTS and len(scanned) == 2
    path.write_bytes(lines(["another", *TEXTS]))
    assert start() == ["another", *TEXTS] and len(scanned) == 3
    for index in (tmp_path / "cache").glob("lines-*"):
        index.write_bytes(bytes(len(index.read_bytes())))
    assert start() == ["another", *TEXTS] and len(scanned) == 4
    assert "is not what was written there; the lines of" in caplog.text
    (tmp_path / "none").touch()
    source = data.JsonlSource(
        str(path), cache_dir=str(tmp_path / "none")
    )  # a file, so nothing can be kept there
    assert outcomes(source) == ["another", *TEXTS] and len(scanned) == 5
    assert f"the lines of {path} are found at every start" in caplog.text
