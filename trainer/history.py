"""What did the experts of a run do, coarsely, over all its steps? experts.jsonl, which every run keeps.

One JSON object a line. The first is {"format": "triquetra-experts", "version": 1, "layers": M, "experts": E}.
Each other line is a bin: {"from": a, "step": b, "load": ..., "bias": ..., "gain": ...}, of the steps a to b.
Values are base64 of zlib of little-endian numbers in C order:

    load (M, E) uint8     mean load over the bin: round(32 log2(1 + load)); 1 is the even share
    bias (M, 5) float32   of the biases after step b: least, 10 %, median, 90 %, largest of a layer
    gain (M,)   float32   mean gain over the bin [1/score]; none where no margins were counted

The file of a run of s steps has at most 9 kB x sqrt(s): 0.9 MB at 10,000 steps. A bin begins with one step;
where a line has no room, the length of the bins doubles. So it is fine at first and always fine next to the
run's length. Letters: M MoE layers, E experts.
"""

import base64
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.records import StepLog

FORMAT, VERSION = "triquetra-experts", 1
LEVELS = 32  # of load, in each doubling of 1 + load
ROOM = 9_000  # [bytes], times the square root of the steps
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)  # of the biases of a layer


class ExpertHistory:
    """Writes the file, on rank 0. after_step: where the run resumes; later bins are dropped.

    A run that is killed loses the bin that was open: at most one column of the picture.
    """

    def __init__(self, path: Path, *, after_step: int = 0):
        self.lines = StepLog(path, after_step=after_step)
        self._begin(after_step)

    def _begin(self, step: int) -> None:
        path = self.lines.path
        self.size = path.stat().st_size if path.is_file() else 0
        self.first, self.last, self.every = step + 1, step, 1
        self._empty()

    def _empty(self) -> None:
        self.num_steps, self.load_ME, self.gain_M, self.bias_ME = 0, 0.0, 0.0, None

    def add(self, step: int, *, load_ME: np.ndarray, bias_ME: np.ndarray, gain_M: np.ndarray | None) -> None:
        """Of a step that was applied."""
        self.num_steps, self.last, self.bias_ME = self.num_steps + 1, step, bias_ME
        self.load_ME = self.load_ME + load_ME
        self.gain_M = None if gain_M is None else self.gain_M + gain_M
        if step % self.every == 0:
            line = self._line()
            if self.size + size_of(line) <= ROOM * math.sqrt(step):
                self._write(line)
            else:
                self.every *= 2

    def rewind(self, step: int) -> None:
        """The run went back to this step."""
        self.lines.rewind(step)
        self._begin(step)

    def close(self) -> None:
        """Writes the bin that is open, as the end of a run is looked at most."""
        if self.num_steps:
            self._write(self._line())
        self.lines.close()

    def _line(self) -> dict[str, Any]:
        bias_M5 = np.quantile(self.bias_ME, QUANTILES, axis=1).T
        values = {"load": encoded(self.load_ME / self.num_steps), "bias": bias_M5.astype("<f4")}
        if self.gain_M is not None:
            values["gain"] = (self.gain_M / self.num_steps).astype("<f4")
        return {"from": self.first, "step": self.last} | {name: packed(x) for name, x in values.items()}

    def _write(self, line: dict[str, Any]) -> None:
        if self.lines.is_empty:
            layers, experts = self.bias_ME.shape
            self.lines.add({"format": FORMAT, "version": VERSION, "layers": layers, "experts": experts})
        self.lines.add(line)
        self.size += size_of(line)
        self.first = self.last + 1
        self._empty()


def size_of(line: dict[str, Any]) -> int:
    return len(json.dumps(line)) + 1


def encoded(load_ME: np.ndarray) -> np.ndarray:
    return np.minimum(np.round(LEVELS * np.log2(1 + load_ME)), 255).astype(np.uint8)


def decoded(codes_ME: np.ndarray) -> np.ndarray:
    return 2 ** (codes_ME / LEVELS) - 1


def packed(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes())).decode()


def unpacked(text: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).reshape(shape)


class Bins(NamedTuple):
    """What the experts did in T bins of steps."""

    first_T: np.ndarray  # step
    last_T: np.ndarray
    load_TME: np.ndarray  # [even shares]
    bias_TM5: np.ndarray  # [score]
    gain_TM: np.ndarray  # [1/score]; nan: not counted


def read_history(path: Path) -> Bins | None:
    """None: it has no bin yet. A last line that a kill has cut is no line. Raises: ValueError, OSError."""
    header, lines = None, list[dict[str, Any]]()
    try:
        for line in whole_lines(path):
            if header is None:
                header = line
            else:
                lines.append(line)
        if header is None or not lines:
            return None
        if (header["format"], header["version"]) != (FORMAT, VERSION):
            raise ValueError(f"its first line is {str(header)[:100]}")
        return bins_of(lines, layers=header["layers"], experts=header["experts"])
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        what = f"a line has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a history of experts of version {VERSION}: {what}") from None


def bins_of(lines: list[dict[str, Any]], *, layers: int, experts: int) -> Bins:
    none_M = np.full(layers, np.nan)
    load = [decoded(unpacked(line["load"], "u1", (layers, experts))) for line in lines]
    bias = [unpacked(line["bias"], "<f4", (layers, len(QUANTILES))) for line in lines]
    gain = [unpacked(line["gain"], "<f4", (layers,)) if "gain" in line else none_M for line in lines]
    first, last = (np.array([line[key] for line in lines], dtype=np.int64) for key in ("from", "step"))
    return Bins(
        first, last, np.array(load, np.float32), np.array(bias, np.float32), np.array(gain, np.float32)
    )


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(errors="replace") as file:
        yield from (json.loads(line) for line in file if line.endswith("}\n"))
