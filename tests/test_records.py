"""Does a run outlive a disk that takes its records no longer, and which lines are left when it goes on?"""

import errno
import json
import os
import resource
import signal
import tracemalloc
from pathlib import Path

import pytest

from trainer import records
from trainer.data import BadDocument
from trainer.records import StepLog, append_line, keep_steps, write_text
from trainer.run.directory import BadDocumentLog

LINES = ['{"format": "header"}', '{"step": 1}', '{"step": 2}', '{"step": 3}']


def steps(path: Path) -> list[int | None]:
    return [json.loads(line).get("step") for line in path.read_text().splitlines()]


def limited(num_bytes: int) -> None:
    """As on a full disk: no file of this process grows beyond so many bytes; a write takes a part."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def disk():
    """`limited`, and unlimited again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.getsignal(signal.SIGXFSZ)
    records._warned.clear()
    yield limited
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("text", "step", "kept"),
    [
        ("".join(f"{line}\n" for line in LINES), 2, 3),
        ("".join(f"{line}\n" for line in LINES), 9, 4),
        ("".join(f"{line}\n" for line in LINES), 0, 0),
        ("\n".join(LINES), 3, 3),  # a kill cut the newline of the last line
        ("\n".join(LINES)[:-4], 3, 3),
        ('{"step": 1}\n{"st{"step": 2}\n{"step": 3}\n{"step": 4}\n', 3, 3),  # a line in the middle is damaged
        ('{"step": 1}\n{"st{"step": 2}\n', 3, 1),
        ("", 3, 0),
    ],
)
def test_lines_up_to_a_step_are_kept(tmp_path, text, step, kept):
    """`kept` lines by hand; what is left are the file's first bytes as they were."""
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    size = keep_steps(path, step)
    assert path.read_text() == "".join(line for line in text.splitlines(keepends=True)[:kept])
    assert size == path.stat().st_size


def test_a_kill_while_a_log_is_taken_up_again_loses_none_of_it(tmp_path, monkeypatch):
    """Before the one system call the file is as it was, after it all is done. Nothing else is written."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f"{line}\n" for line in LINES))

    def killed(*arguments):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", killed)
        with pytest.raises(SystemExit):
            StepLog(path, after_step=2)
    assert steps(path) == [None, 1, 2, 3] and list(tmp_path.iterdir()) == [path]
    log = StepLog(path, after_step=2)
    assert steps(path) == [None, 1, 2] and not log.is_empty
    log.add({"step": 3, "again": True})
    log.rewind(1)
    log.add({"step": 2, "again": True})
    log.close()
    assert steps(path) == [None, 1, 2]


def test_lines_wait_for_room_on_the_disk(tmp_path, disk, caplog):
    """12 bytes a line: the limit of 30 cuts the third; with room again each line is there, once and whole."""
    path = tmp_path / "log.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    disk(30)
    log = StepLog(path)
    for step in range(1, 6):
        log.add({"step": step})
    assert path.stat().st_size == 30
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.add({"step": 6})
    log.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    warned = [record.getMessage() for record in caplog.records]
    assert warned == [f"{path} cannot be written, its lines wait: [Errno {errno.EFBIG}] File too large"]


def test_a_disk_that_stays_full_costs_lines_and_bounded_memory(tmp_path, disk, caplog, monkeypatch):
    monkeypatch.setattr(records, "MOST_WAITING", 10_000)
    path = tmp_path / "log.jsonl"
    disk(15)
    log = StepLog(path)
    tracemalloc.start()
    for step in range(1, 5001):
        log.add({"step": step})
    assert tracemalloc.get_traced_memory()[0] < 100_000
    tracemalloc.stop()
    log.close()
    assert steps_of_whole_lines(path) == [1]
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [
        f"{path} cannot be written, its lines wait",
        f"{path} lacks its last lines, they could not be written",
    ]


def steps_of_whole_lines(path: Path) -> list[int]:
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line)["step"] for line in whole]


def test_a_log_that_cannot_be_opened_ends_nothing(tmp_path, caplog):
    """A file stands where its directory should be."""
    (tmp_path / "file").touch()
    log = StepLog(tmp_path / "file" / "log.jsonl", after_step=4)
    for step in (5, 6):
        log.add({"step": step})
    log.close()
    assert len(caplog.records) == 2  # its lines wait, and in the end are lost


def test_a_device_in_place_of_a_log_is_not_read(tmp_path, caplog):
    """It has no end; /dev/full takes no line, either."""
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = StepLog(tmp_path / "log.jsonl", after_step=4)
    log.add({"step": 5})
    log.close()
    assert len(caplog.records) == 2


def test_texts_and_single_lines_are_whole_or_not_there(tmp_path, disk, caplog):
    """A full disk leaves the earlier text and the earlier lines, and one warning for each file."""
    text, lines, bad = tmp_path / "config.yaml", tmp_path / "starts.jsonl", tmp_path / "new" / "bad.txt"
    write_text(text, "before ä")
    append_line(lines, '{"step": 0}')
    disk(20)
    report = BadDocumentLog(bad)
    for _ in range(2):
        write_text(text, "x" * 100)
        append_line(lines, '{"step": 5}')
        report(BadDocument("empty", "a.txt", "no text at all"))
    assert text.read_text(encoding="utf-8") == "before ä" and lines.read_text() == '{"step": 0}\n'
    assert bad.read_text() == ""
    assert [record.getMessage().partition(" cannot")[0] for record in caplog.records] == list(
        map(str, (text, lines, bad))
    )
