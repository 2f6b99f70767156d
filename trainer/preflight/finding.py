"""What is said of a host or device that is unfit?"""

from collections import Counter
from collections.abc import Iterable
from statistics import median_high
from typing import NamedTuple


class Finding(NamedTuple):
    host: str
    what: str  # the device, link or thing
    value: str
    limit: str

    def __str__(self) -> str:
        return f"{self.host}: {self.what}: {self.value}; limit: {self.limit}"


def most_common(values: Iterable[str]) -> str:
    """Of equally common ones the first."""
    return Counter(values).most_common(1)[0][0]


def least_of(values: Iterable[float], *, share: float, sheet: float | None) -> float:
    """What each must reach: a share of the middle one, and of what the device's sheet promises."""
    return share * max(median_high(values), sheet or 0.0)
