"""What happens to settings that nobody would write? Cases are drawn from a seed and can be drawn again."""

import argparse
import signal
from collections.abc import Iterable, Iterator, Sequence
from signal import SIGINT, SIGTERM
from typing import TypeVar

Outcome = TypeVar("Outcome")


class Cases(argparse.Namespace):
    cases: int
    seed: int
    first: int


def cases_of(name: str, doc: str | None, arguments: Sequence[str] | None = None) -> Cases:
    """What a command line asks for. Ends the program with 2 and one line where that is no number."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.fuzz.{name}", description=doc, formatter_class=as_written
    )
    parser.add_argument("cases", type=natural, nargs="?", default=200, help="how many; 200 without it")
    parser.add_argument("seed", type=natural, nargs="?", default=0, help="0 without it")
    parser.add_argument("first", type=natural, nargs="?", default=0, help="number of the first case")
    return parser.parse_args(arguments, Cases())


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 0 or more")
    return int(text)


def until_told(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Ends after the case in which Ctrl-C or SIGTERM came, so that the table of what was done is printed."""
    told = list[int]()
    before = {number: signal.signal(number, lambda n, _: told.append(n)) for number in (SIGINT, SIGTERM)}
    try:
        for outcome in outcomes:
            yield outcome
            if told:
                return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
