"""What did a router do, step by step? A file that a training run writes and the simulator replays under any
rule.

router.trace is text, one JSON object a line. The first describes the rest:

    {"format": "triquetra-router-trace", "version": 1, "layers": M, "experts": E, "top_k": K, "margins": W,
    "required": H}

Each other line is a step: {"step": n, "counts": ..., "bias": ..., "margins": ..., "logits": ..., "required":
...}. Values are base64 of zlib of little-endian numbers in C order: counts (M, E), margins (M, W), logits (M,
1) and required (M, E, H) int64, bias (M, E) float32: the biases under which it was routed. What the sums
mean, and the edges of their bins: balance/stats.py. `required` is there if the run was asked for it: it is
needed to replay quantile rules, and is larger than all the rest. Lines are whole or, after a kill, missing.
"""

import base64
import json
import zlib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.balance.stats import NUM_MARGINS, NUM_REQUIRED, RoutingStats
from trainer.records import StepLog

FORMAT, VERSION = "triquetra-router-trace", 1
SUMS = {"counts": "counts_ME", "margins": "margins_MW", "logits": "logits_M1", "required": "required_MEH"}


class TraceWriter:
    """An observer of the Balancer. `after_step`: where the run resumes; later lines are dropped."""

    def __init__(self, path: Path, *, after_step: int = 0):
        self.lines = StepLog(path, after_step=after_step)
        self.rewind = self.lines.rewind

    def __call__(self, step: int, stats: RoutingStats) -> None:
        if self.lines.is_empty:
            layers, experts = stats.counts_ME.shape
            header = {
                "format": FORMAT,
                "version": VERSION,
                "layers": layers,
                "experts": experts,
                "top_k": stats.top_k,
            }
            self.lines.add(header | {"margins": NUM_MARGINS, "required": NUM_REQUIRED})
        line: dict[str, Any] = {"step": step, "bias": _packed(stats.bias_ME)}
        line |= {
            name: _packed(sums) for name, field in SUMS.items() if (sums := getattr(stats, field)) is not None
        }
        self.lines.add(line)


def _packed(tensor: Tensor) -> str:
    return base64.b64encode(zlib.compress(tensor.cpu().contiguous().numpy().tobytes())).decode()


class Trace:
    """A trace on disk. Raises: ValueError if it is none, with what is wrong with which line."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(
                f"trace={path}: there is no such file; a training run with balance.trace=router.trace "
                "writes one"
            )
        self.header = next(self._lines(), {})
        is_ours = self.header.get("format") == FORMAT and self.header.get("version") == VERSION
        if not (is_ours and {"layers", "experts", "top_k"} <= self.header.keys()):
            raise ValueError(
                f"{path}: not a router trace of version {VERSION}; its first line is {str(self.header)[:120]}"
            )
        sizes = {"margins": NUM_MARGINS, "required": NUM_REQUIRED}
        if wrong := {
            key: self.header.get(key) for key, size in sizes.items() if self.header.get(key) != size
        }:
            raise ValueError(f"{path}: has {wrong} bins, this version reads {sizes}")
        self.num_layers, self.num_experts, self.top_k = (
            self.header[key] for key in ("layers", "experts", "top_k")
        )
        self.num_steps, self.has_required = 0, True
        for line in self._lines():
            if "step" in line:
                self.num_steps += 1
                self.has_required &= "required" in line
        if not self.num_steps:
            raise ValueError(f"{path}: holds no step")

    def __iter__(self) -> Iterator[RoutingStats]:
        for _, stats in self.steps():
            yield stats

    def steps(self, kept: Container[int] | None = None) -> Iterator[tuple[int, RoutingStats]]:
        """Each step's number and sums. kept: places in the file, from 0; None: all of them."""
        experts, place = self.num_experts, -1
        shapes = {
            "counts": (experts,),
            "margins": (NUM_MARGINS,),
            "logits": (1,),
            "required": (experts, NUM_REQUIRED),
        }
        for line in self._lines():
            if "step" not in line:
                continue
            place += 1
            if kept is not None and place not in kept:
                continue
            try:
                there = {name: shape for name, shape in shapes.items() if name in line or name != "required"}
                sums = {
                    SUMS[name]: self._unpacked(line[name], np.int64, shape) for name, shape in there.items()
                }
                stats = RoutingStats(
                    top_k=self.top_k, bias_ME=self._unpacked(line["bias"], np.float32, (experts,)), **sums
                )
            except (KeyError, TypeError, ValueError, zlib.error) as error:
                what = f"it has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{self.path}: step {line['step']} cannot be read: {what}") from error
            yield line["step"], stats

    def _unpacked(self, text: str, dtype: type, shape: tuple[int, ...]) -> Tensor:
        numbers = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)
        return torch.from_numpy(numbers.reshape(self.num_layers, *shape).copy())

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self.path.open(errors="replace") as file:  # what is no text is no trace either
            for number, line in enumerate(file, start=1):
                if line.endswith("}\n"):  # a kill may cut the last one
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{self.path}: line {number} is not JSON: {error}") from None
