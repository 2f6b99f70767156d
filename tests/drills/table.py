"""Which drills are there, did what must hold hold, and how is that told?"""

import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = (
    "drill",
    "what was done",
    "what must hold",
    "held",
    "steps lost",
    "recovered in [s]",
    "losses equal an undisturbed run's",
    "took [s]",
)


@dataclass(kw_only=True)
class Facts:
    """What was measured. lost: steps that were trained twice; recovered_s: from the fault to the end of the
    first step after it, the restart in it; equal: and how far."""

    lost: list[int] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)
    equal: str = "not promised"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Drill:
    """name, done, holds: for the table. act(directory for its files, whether the short version will do)."""

    name: str
    done: str
    holds: str
    limit_s: float
    in_short_set: bool
    act: Callable[[Path, bool], Facts]


DRILLS: dict[str, Drill] = {}


def drill(*, limit_s: float = 120.0, short: bool = False, into: dict[str, Drill] = DRILLS) -> Callable:
    """Of a function whose docstring is "what is done · what must hold". short: it is in the set that `make
    test-all` runs. into: where it is listed.
    """

    def register(act: Callable[[Path, bool], Facts]) -> Callable[[Path, bool], Facts]:
        done, holds = " ".join(act.__doc__.split()).split(" · ")
        into[act.__name__] = Drill(
            name=act.__name__,
            done=done,
            holds=holds.rstrip("."),
            limit_s=limit_s,
            in_short_set=short,
            act=act,
        )
        return act

    return register


def run(of: Drill, *, short: bool) -> tuple[list[str], str | None]:
    """Its row of the table, and why it failed."""
    directory = Path(tempfile.mkdtemp(prefix=f"drill-{of.name}-"))
    start_s, failure, facts = time.monotonic(), None, Facts()
    try:
        with at_most(of.limit_s):
            facts = of.act(directory, short)
    except Exception as error:  # noqa: BLE001  # a drill that breaks is a drill that failed, and the others go on
        at = next(
            frame
            for frame in reversed(traceback.extract_tb(error.__traceback__))
            if "/tests/" in frame.filename
        )
        line = f"{Path(at.filename).name}:{at.lineno}: {at.line}"
        failure = "\n".join([f"{type(error).__name__}: {error}", line, *getattr(error, "__notes__", [])])
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    took = f"{time.monotonic() - start_s:.0f}"
    holds = f"{of.holds} ({facts.note})" if facts.note else of.holds
    measured = (
        ["NO", "", "", ""]
        if failure
        else ["yes", span(facts.lost), span(facts.recovered_s, digits=1), facts.equal]
    )
    return [of.name.replace("_", " "), of.done, holds, *measured, took], failure


def span(values: list[Any], *, digits: int = 0) -> str:
    """The least to the most of it."""
    ends = [f"{end:.{digits}f}" for end in (min(values), max(values))] if values else [""]
    return " to ".join(dict.fromkeys(ends))


@contextmanager
def at_most(limit_s: float) -> Iterator[None]:
    def end(number: int, frame: Any) -> None:
        raise TimeoutError(f"the drill was not done after {limit_s:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def as_markdown(rows: list[list[str]]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
