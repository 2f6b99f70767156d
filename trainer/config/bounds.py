"""Which values may one setting have? A field declares it beside its default, one walk checks all of them.

steps: int = number(100, at_least=1, at_most=10**9, why="a step a second would take 30 years")
"""

import dataclasses
import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from omegaconf import MISSING

BOUND = "bound"  # key of a field's metadata


class ConfigError(ValueError):
    """The configuration cannot be run as written; the message says what would work."""


class Bound(Protocol):
    def problem(self, value: Any) -> str | None:
        """What such a value must be instead; None: it is allowed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Number:
    """at_least or above; at_most and `why` it ends there. inf is allowed where at_most is inf, nan nowhere.

    least_why: why it does not begin lower, where that is not plain.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float
    why: str
    least_why: str = ""

    def problem(self, value: float) -> str | None:
        # an int may be too large for math.isfinite
        if value != value or (value in (math.inf, -math.inf) and value != self.at_most):
            return f"must be {self.lowest}, and finite"
        if value > self.at_most:
            return f"must be at most {limit(self.at_most)} ({self.why})"
        is_low = value <= self.above if self.above is not None else value < (self.at_least or 0)
        if is_low or (value == 0 and math.copysign(1, value) < 0):
            return f"must be {self.lowest}" + (f" ({self.least_why})" if self.least_why else "")
        return None

    @property
    def lowest(self) -> str:
        if self.above is not None:
            return f"above {limit(self.above)}"
        is_zero = isinstance(self.at_least, float) and self.at_least == 0
        return "0 or more" if is_zero else f"at least {limit(self.at_least or 0)}"


@dataclass(frozen=True)
class OneOf:
    options: tuple[str | None, ...]

    def problem(self, value: str | None) -> str | None:
        if value in self.options:
            return None
        names = ["null" if option is None else option for option in self.options]
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"must be one of {', '.join(names)}{hint}"


@dataclass(frozen=True, kw_only=True)
class FirstAndLast:
    """[a, b], two steps; at_most: of them, from a to b, and `why` no more."""

    at_most: int
    why: str

    def problem(self, value: list[int]) -> str | None:
        if len(value) != 2 or not 1 <= value[0] <= value[1]:
            return "must be [first step, last step], the first one at least 1 and not behind the last"
        if value[1] - value[0] >= self.at_most:
            return f"must be at most {self.at_most} steps ({self.why})"
        return None


@dataclass(frozen=True)
class NotEmpty:
    """A path or a name. An empty shell variable must not mean the current directory."""

    def problem(self, value: str) -> str | None:
        if len(value.splitlines()) > 1:
            return "holds a line break; give a path or a name of one line"
        return None if value.strip() else "is empty (an unset shell variable?); give a path or a name"


@dataclass(frozen=True)
class Target:
    """A `_target_` node. partial: our code makes the object, from the node's numbers and its own."""

    partial: bool
    example: str

    def problem(self, value: Any) -> str | None:
        if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
            return f"must be a node with a _target_, like {self.example}"
        if value.get("_partial_", False) is not self.partial:
            return f"must have _partial_: {str(self.partial).lower()}, like {self.example}"
        return None


def number(default: Any, **limits: Any) -> Any:
    """A field that is a number, or null where its type says so. limits: of Number."""
    return dataclasses.field(default=default, metadata={BOUND: Number(**limits)})


def choice(default: Any, *options: str | None) -> Any:
    return dataclasses.field(default=default, metadata={BOUND: OneOf(options)})


def path(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={BOUND: NotEmpty()})


def target(*, partial: bool, example: str) -> dict[str, Bound]:
    """A field's metadata."""
    return {BOUND: Target(partial, example)}


def first_and_last(*, at_most: int, why: str) -> dict[str, Bound]:
    """A field's metadata."""
    return {BOUND: FirstAndLast(at_most=at_most, why=why)}


def bounds_of(schema: Any) -> Iterator[tuple[dataclasses.Field, Bound | None]]:
    """Each field of a dataclass and what it declares."""
    return ((field, field.metadata.get(BOUND)) for field in dataclasses.fields(schema))


def check_values(config: Any, *, where: str = "") -> None:
    """Every field of a dataclass, and of those in it. where: before the keys. Raises: ConfigError."""
    for field, bound in bounds_of(config):
        value, key = getattr(config, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(value):
            check_values(value, where=f"{key}.")
        elif isinstance(value, str) and value == MISSING:  # a ~ has taken away what has no default
            raise ConfigError(f"not set: {key}; leave out ~{key}, or give {key}=")
        elif bound is not None and value is not None and (problem := bound.problem(value)):
            raise ConfigError(f"{key}={shown(value)}: {problem}")
        elif value is None and isinstance(bound, OneOf) and (problem := bound.problem(value)):
            raise ConfigError(f"{key}=null: {problem}")


def check_numbers(limits: dict[str, Number], **values: float) -> None:
    """The same for the arguments of a constructor. Raises: ConfigError."""
    for name, value in values.items():
        if problem := limits[name].problem(value):
            raise ConfigError(f"{name}={shown(value)}: {problem}")


def shown(value: Any) -> str:
    """In a message of one line."""
    return ascii(value) if isinstance(value, str) and not value.isprintable() else str(value)


def limit(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
