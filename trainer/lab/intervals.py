"""How sure is a mean over seeds? 95 % intervals by Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# The 0.975 quantile of Student's t with 1 ... 30 degrees of freedom: NIST/SEMATECH e-Handbook of Statistical
# Methods, section 1.3.6.7.2. Beyond 30 the last one is used, which makes intervals up to 4 % too wide.
T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval."""

    mean: float
    half: float | None  # None: one seed has no interval
    num_seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half

    def as_dict(self) -> dict[str, Any]:
        low, high = (None, None) if self.half is None else (self.mean - self.half, self.mean + self.half)
        return {"mean": self.mean, "low": low, "high": high, "num_seeds": self.num_seeds}

    def __str__(self) -> str:
        if not self.half or self.half < 1e-12 * abs(self.mean):  # one seed, or no spread but rounding
            return f"{self.mean:.4g}" + ("" if self.half is None else " ± 0")
        if max(abs(self.mean), self.half) < 1e-3:
            return f"{self.mean:.2e} ± {self.half:.1e}"
        largest = max(abs(self.mean), self.half)
        # 2 of half, 4 in all
        decimals = min(1 - math.floor(math.log10(self.half)), 3 - math.floor(math.log10(largest)))
        decimals = max(0, decimals)
        return f"{self.mean:.{decimals}f} ± {self.half:.{decimals}f}"


def estimate(values: Sequence[float]) -> Estimate | None:
    """mean ± t s / sqrt(n); None of no values."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean=mean, half=None, num_seeds=1)
    s = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    return Estimate(mean=mean, half=T_975[min(n - 1, len(T_975)) - 1] * s / math.sqrt(n), num_seeds=n)
