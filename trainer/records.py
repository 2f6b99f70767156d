"""What does a run write beside its state, and what if the disk takes it no longer?

Records are lines and texts about a run: metrics, router traces, starts, bad documents, copies of settings.
A run that loses one is the same run. So a record that cannot be written is warned of once and costs that
record, never the run. (A checkpoint is no record: a run that cannot save its state must end.)
"""

import json
import logging
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

MOST_WAITING = 2**26  # [bytes] of lines that wait in memory for room on the disk; further lines are lost
log = logging.getLogger(__name__)
_warned = set[Path]()


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once, so that a full disk leaves the one before as it was."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        _warn(path, error)
        with suppress(OSError):
            draft.unlink()


def append_line(path: Path, line: str) -> None:
    """Adds one line, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            start, data = file.tell(), f"{line}\n".encode(errors="replace")
            try:
                if file.write(data) < len(data):  # a disk that becomes full takes a part
                    raise OSError(f"only a part of {len(data)} bytes was written")
            except OSError:
                file.truncate(start)
                raise
    except OSError as error:
        _warn(path, error)


def _warn(path: Path, error: OSError) -> None:
    if path not in _warned:
        _warned.add(path)
        log.warning("%s cannot be written, the run goes on without it: %s", path, error)


class StepLog:
    """A file with one JSON object per line, each with its `step`; a first line without one is a header.

    after_step: where the run resumes. Later lines are dropped, and so is a last line that a kill has cut.
    """

    def __init__(self, path: Path, *, after_step: int = 0):
        self.path, self.file = path, None
        self.rewind(after_step)

    def rewind(self, step: int) -> None:
        """The run goes on after this step: lines of later ones are dropped."""
        if self.file is not None:
            self.file.close()
        self.file: FileIO | None = None  # opened with the first line
        self.waiting, self.has_warned, self.is_empty = b"", False, True
        try:
            self.is_empty = not keep_steps(self.path, step)
        except OSError as error:
            _warn(self.path, error)

    def add(self, record: dict[str, Any]) -> None:
        """Writes a line at once. Where the disk is full, lines wait here until there is room."""
        line, self.is_empty = f"{json.dumps(record)}\n".encode(), False
        if len(self.waiting) + len(line) <= MOST_WAITING:
            self.waiting += line
        self._write()

    def _write(self) -> None:
        try:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("ab", buffering=0)
            while self.waiting:
                # a disk that becomes full takes a part
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if not self.has_warned:
                log.warning("%s cannot be written, its lines wait: %s", self.path, error)
            self.has_warned = True

    def close(self) -> None:
        if self.waiting:
            self._write()
        if self.waiting:
            log.warning("%s lacks its last lines, they could not be written", self.path)
        if self.file is not None:
            self.file.close()


def keep_steps(path: Path, step: int) -> int:
    """Cuts a StepLog's file behind its last whole line of this step or an earlier one; step 0 empties it.
    Returns its size [bytes].

    The cut is one system call that needs no room on the disk: a kill finds the file before it or after it.
    Raises: OSError.
    """
    if not path.is_file():  # a device has no end
        return 0
    end = kept = 0
    if step:
        with path.open("rb") as file:
            for line in file:
                end += len(line)
                if line.endswith(b"}\n") and _step(line) <= step:
                    kept = end
    os.truncate(path, kept)
    return kept


def _step(line: bytes) -> float:
    try:
        return json.loads(line).get("step", 0)
    except ValueError:  # two lines that a full disk has mixed: not the last one to keep
        return float("inf")
