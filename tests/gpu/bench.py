"""How does a check say what it has measured, and whether that is good enough?"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Figure:
    check: str
    name: str
    value: float | str
    unit: str
    bar: str  # "": there is none
    holds: bool | None  # None: not judged


@dataclass(kw_only=True)
class Bench:
    """Where the checks of a stage run, and what they have measured so far."""

    on: torch.device
    results: Path | None  # a directory for files beside the figures
    flex: bool = False  # attention, as trainer/run/build.py chooses it by device
    check: str = ""  # that is running
    figures: list[Figure] = field(default_factory=list)

    @property
    def is_gpu(self) -> bool:
        return self.on.type == "cuda"

    def figure(self, name: str, value: float | str, unit: str = "") -> None:
        """A number for the record."""
        self._judge(name, value, unit, "", None)

    def absent(self, name: str, why: str) -> None:
        """What this machine cannot show, in words."""
        self.figure(name, f"not here: {why}")

    def at_most(self, name: str, value: float, limit: float, unit: str = "") -> None:
        self._judge(name, value, unit, f"<= {limit:g}", value <= limit)

    def at_least(self, name: str, value: float, limit: float, unit: str = "") -> None:
        self._judge(name, value, unit, f">= {limit:g}", value >= limit)

    def same(self, name: str, actual: object, expected: object) -> None:
        """Tensors bit for bit, everything else by ==."""
        equal = torch.equal(actual, expected) if isinstance(actual, Tensor) else actual == expected
        words = ("the same", "differs") if isinstance(actual, Tensor) else (str(actual), str(actual))
        bar = "bit for bit" if isinstance(actual, Tensor) else f"= {expected}"
        self._judge(name, words[not equal], "", bar, equal)

    def speed_at_most(self, name: str, value: float, limit: float, unit: str = "") -> None:
        """Of a clock or of a GPU's memory: judged on a GPU only."""
        self._judge(name, value, unit, f"<= {limit:g}", value <= limit if self.is_gpu else None)

    def speed_at_least(self, name: str, value: float, limit: float, unit: str = "") -> None:
        self._judge(name, value, unit, f">= {limit:g}", value >= limit if self.is_gpu else None)

    def _judge(self, name: str, value: float | str, unit: str, bar: str, holds: bool | None) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has no NaN
        figure = Figure(check=self.check, name=name, value=value, unit=unit, bar=bar, holds=holds)
        self.figures.append(figure)

    # -- clock and memory --

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.on)

    def seconds(self, act: Callable[[], object], *, rounds: int, warm: int = 2) -> float:
        """[s] median of one call, waiting for the GPU after each."""
        for _ in range(warm):
            act()
        self.wait()
        taken = []
        for _ in range(rounds):
            start_s = time.perf_counter()
            act()
            self.wait()
            taken.append(time.perf_counter() - start_s)
        return statistics.median(taken)

    def poison(self, num_bytes: int) -> None:
        """Leaves NaN in the memory that the allocator hands out next: who reads what nobody wrote is seen."""
        torch.full((num_bytes // 4,), math.nan, device=self.on)


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| of the whole tensor, in float64 on the CPU; 0 / 0 is 0."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error, norm = float((actual - expected).norm()), float(expected.norm())
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def worst(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest `relative` of all tensors by name; NaN if one is."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    errors = [relative(actual[name], expected[name]) for name in expected]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def random(*shape: int, seed: int, on: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, drawn on the CPU: the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(on, dtype)
