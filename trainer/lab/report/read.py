"""What do the records of a run say? Files of a run's directory -> `Records`. Nothing is changed.

A run may be alive while it is read, killed, or copied from elsewhere: a line that cannot be read is passed
over and counted. Letters: N lines of metrics.jsonl.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trainer.config import ConfigError
from trainer.history import Bins, read_history

CHUNK = 1000  # [lines] parsed together
MAX_BAD_LINES = 20  # of bad documents that are shown
FILES = ("config.yaml", "metrics.jsonl")  # without these it is no run's directory


@dataclass(kw_only=True)
class Columns:
    """metrics.jsonl by columns; nan: the line has no such number."""

    values: dict[str, np.ndarray]

    @property
    def steps_N(self) -> np.ndarray:
        return self.values["step"]

    def get(self, name: str) -> np.ndarray:
        return self.values.get(name, np.full(len(self.steps_N), np.nan))

    def starting_with(self, prefix: str) -> dict[str, np.ndarray]:
        """By what follows the prefix, in the order of the file."""
        return {name.removeprefix(prefix): x for name, x in self.values.items() if name.startswith(prefix)}


@dataclass(kw_only=True)
class Records:
    path: Path
    config: dict[str, Any]  # nested
    columns: Columns
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    roll_backs: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    bad_documents: list[str] = field(default_factory=list)  # the first lines
    num_bad_documents: int = 0
    bins: Bins | None = None  # of experts.jsonl
    verdict: dict[str, Any] | None = None  # of the run's end
    problems: list[str] = field(default_factory=list)  # sentences: what could not be read

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.name)

    def settings(self, key: str) -> dict[str, Any]:
        """A group of the configuration; empty if there is none."""
        group = self.config.get(key)
        return group if isinstance(group, dict) else {}

    @property
    def step(self) -> int:
        return int(self.columns.steps_N[-1])

    @property
    def tokens(self) -> float:
        tokens_N = self.columns.get("tokens")
        return float(tokens_N[-1]) if np.isfinite(tokens_N[-1]) else 0.0

    @property
    def spans(self) -> list[dict[str, Any]]:
        """The program under which the run was last started."""
        return self.starts[-1]["program"] if self.starts else []

    @property
    def last_step(self) -> int | None:
        """Where the program ends, seen from the last start; None: unknown."""
        if not self.spans:
            return None
        step, position = self.starts[-1]["step"], self.starts[-1]["tokens"]
        for span in self.spans:
            tokens = max(1, int(span["global_batch"]) * int(span["seq_len"]))
            num_steps = max(0, -(-(int(span["end"]) - position) // tokens))
            step, position = step + num_steps, position + num_steps * tokens
        steps = self.config.get("steps")
        return min(step, int(steps)) if is_number(steps) else step

    @property
    def is_done(self) -> bool:
        return self.last_step is not None and self.step >= self.last_step


def read_records(path: Path) -> Records:
    """Raises: ConfigError, one line, if it is no run or has no step."""
    refuse_no_run(path)
    problems = list[str]()
    try:
        records = Records(
            path=path,
            config=config_of(path),
            columns=columns_of(path / FILES[1], problems),
            problems=problems,
        )
        add_others(records)
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    return records


def refuse_no_run(path: Path) -> None:
    """Raises: ConfigError."""
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such directory; give a run's, like runs/demo")
    if missing := [name for name in FILES if not (path / name).is_file()]:
        raise ConfigError(f"{path}: is no run's directory, it has no {' and no '.join(missing)}")


def config_of(path: Path) -> dict[str, Any]:
    """Raises: ConfigError."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8", errors="replace"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path / 'config.yaml'}: is no YAML: {what}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path / 'config.yaml'}: holds no settings of a run")
    return config


def add_others(records: Records) -> None:
    path, problems = records.path, records.problems
    records.evaluations = [
        line
        for line in lines_of(path / "evaluations.jsonl", problems)
        if is_number(line.get("step")) and isinstance(line.get("evaluation"), str)
    ]
    starts = [start_of(line) for line in lines_of(path / "starts.jsonl", problems)]
    records.starts = [line for line in starts if not line.get("rolled_back")]
    records.roll_backs = [line for line in starts if line.get("rolled_back")]
    records.alarms = list(lines_of(path / "alarms.jsonl", problems))
    for file in sorted(path.glob("bad_documents.*.txt")):
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                records.num_bad_documents += 1
                if len(records.bad_documents) < MAX_BAD_LINES:
                    records.bad_documents.append(line.rstrip("\n"))
    try:
        records.bins = read_history(path / "experts.jsonl")
    except FileNotFoundError:
        pass
    except ValueError as error:
        problems.append(f"{error}.")
    for verdict in lines_of(path / "verdict.json", problems):
        if verdict.get("step") == records.step and isinstance(verdict.get("text"), str):
            records.verdict = verdict


def start_of(line: dict[str, Any]) -> dict[str, Any]:
    """A line of starts.jsonl with what others rely on: whole numbers, spans that have limits, pairs."""
    numbers_of = {key: int(line[key]) if is_number(line.get(key)) else 0 for key in ("step", "tokens")}
    program, changed = line.get("program"), line.get("changed")
    spans = [span for span in (program if isinstance(program, list) else ()) if is_span(span)]
    pairs = changed.items() if isinstance(changed, dict) else ()
    pairs = {key: pair for key, pair in pairs if isinstance(pair, list) and len(pair) == 2}
    return {**line, **numbers_of, "program": spans, "changed": pairs}


def is_span(span: Any) -> bool:
    keys = ("start", "end", "global_batch", "seq_len")
    return isinstance(span, dict) and all(is_number(span.get(key)) for key in keys)


def columns_of(path: Path, problems: list[str]) -> Columns:
    """Raises: ConfigError."""
    chunks, bad = list[dict[str, np.ndarray]](), Broken(path)
    for rows in rows_of(path, bad):
        keys = dict.fromkeys(key for row in rows for key in row)
        chunks.append({key: numbers([row.get(key) for row in rows]) for key in keys})
    if not chunks:
        empty = "holds no step yet" if not bad.lines else f"none of its {len(bad.lines)} lines is a step"
        raise ConfigError(f"{path}: {empty}")
    problems.extend(bad.sentences())
    lengths = [len(chunk["step"]) for chunk in chunks]
    names = dict.fromkeys(name for chunk in chunks for name in chunk)
    values = {
        name: np.concatenate(
            [chunk.get(name, np.full(n, np.nan)) for chunk, n in zip(chunks, lengths, strict=True)]
        )
        for name in names
    }
    return Columns(values={name: x for name, x in values.items() if np.isfinite(x).any()})


class Broken:
    """Lines that cannot be read. The last one of a file may be cut by a kill: no word of it."""

    def __init__(self, path: Path):
        self.path, self.lines = path, list[int]()

    def sentences(self) -> list[str]:
        if not self.lines:
            return []
        n, first = len(self.lines), self.lines[0]
        return [f"{self.path}: {n} line{'s' * (n > 1)} cannot be read, the first is line {first}."]


def rows_of(path: Path, bad: Broken) -> Iterator[list[dict[str, Any]]]:
    """Lines with a step, CHUNK at a time."""
    for start, lines in chunks_of(path):
        if rows := rows_of_lines(lines, wrong=lambda i, start=start: bad.lines.append(start + i)):
            yield rows


def rows_of_lines(
    lines: Sequence[str], *, wrong: Callable[[int], None] = lambda i: None
) -> list[dict[str, Any]]:
    """Those that are an object with a step; `wrong` hears of the place of each of the others."""
    try:
        rows = json.loads(f"[{','.join(lines)}]")  # much faster than one by one
    except (ValueError, RecursionError):
        rows = []
    if len(rows) != len(lines):
        rows = [parsed(line) for line in lines]
    is_step = [isinstance(row, dict) and is_number(row.get("step")) for row in rows]
    for i in (i for i, good in enumerate(is_step) if not good):
        wrong(i)
    return [row for row, good in zip(rows, is_step, strict=True) if good]


def chunks_of(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line, and whole lines."""
    start, lines = 1, list[str]()
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.endswith("\n"):
                break
            lines.append(line)
            if len(lines) == CHUNK:
                yield start, lines
                start, lines = start + CHUNK, []
    if lines:
        yield start, lines


def lines_of(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Objects of a file with one a line; nothing if there is no such file."""
    if not path.is_file():
        return
    bad = Broken(path)
    for start, lines in chunks_of(path):
        for i, line in enumerate(lines):
            value = parsed(line)
            if isinstance(value, dict):
                yield value
            else:
                bad.lines.append(start + i)
    problems.extend(bad.sentences())


def parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def numbers(values: Sequence[Any]) -> np.ndarray:
    try:
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([float(value) if is_number(value) else np.nan for value in values])


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def flat(nodes: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.dim": 64, ...}. As run.directory.dotted_keys, whose file imports torch: a report does not."""
    if not isinstance(nodes, Mapping) or not nodes:
        return {prefix.rstrip("."): nodes}
    return {
        key: value for name, node in nodes.items() for key, value in flat(node, f"{prefix}{name}.").items()
    }
