"""What is new in the records of a run? Reads on where it was, and anew where the run went back.

The run may be on another host: nothing but its files is read. Lines are cut off when a run resumes or goes
back; then the last line that was read is no longer where it was.
"""

from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import ConfigError
from trainer.lab.report.read import (
    FILES,
    Columns,
    Records,
    add_others,
    config_of,
    numbers,
    refuse_no_run,
    rows_of_lines,
)

MOST_READ = 2**25  # [bytes] of metrics.jsonl, its last ones: 10,000 steps or more


class Follower:
    def __init__(self, path: Path):
        """Raises: ConfigError if there is no run."""
        refuse_no_run(path)
        self.path, self.metrics = path, path / FILES[1]
        self._begin()

    def _begin(self) -> None:
        self.read_to, self.last_line, self.values = 0, b"", dict[str, np.ndarray]()

    def poll(self) -> Records | None:
        """The run as it is now; None: it has no step yet. Raises: ConfigError."""
        try:
            self._read_on()
            if not self.values:
                return None
            columns = Columns(values=self.values)
            records = Records(path=self.path, config=config_of(self.path), columns=columns)
            add_others(records)
        except OSError as error:
            raise ConfigError(f"{error.filename or self.path}: cannot be read ({error.strerror})") from None
        return records

    def _read_on(self) -> None:
        with self.metrics.open("rb") as file:
            file.seek(max(0, self.read_to - len(self.last_line)))
            if file.read(len(self.last_line)) != self.last_line:
                self._begin()
            if not self.read_to:
                size = file.seek(0, 2)
                file.seek(max(0, size - MOST_READ))
                if size > MOST_READ:
                    file.readline()
                self.read_to = file.tell()
            file.seek(self.read_to)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        if lines:
            self.read_to, self.last_line = self.read_to + len(whole), lines[-1]
            self._add(rows_of_lines([line.decode(errors="replace") for line in lines]))

    def _add(self, rows: list[dict[str, Any]]) -> None:
        before = len(self.values["step"]) if self.values else 0
        keys = dict.fromkeys([*self.values, *(key for row in rows for key in row)])
        for key in keys if rows else ():
            old = self.values.get(key, np.full(before, np.nan))
            self.values[key] = np.concatenate([old, numbers([row.get(key) for row in rows])])
