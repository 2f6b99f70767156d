"""How does a command speak to a terminal that may be gone or lack letters, and how does it end?"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path


def run(
    command: Callable[[], int], codes: Mapping[type[BaseException], int], *, interrupted: str = "interrupted"
) -> int:
    """Runs a command and returns its exit code. An error named in `codes` becomes one line on stderr (and its
    notes) and that code; `interrupted` is what is said of a KeyboardInterrupt. All other errors pass through.
    """
    outlive_terminal()
    try:
        return command()
    except tuple(codes) as error:
        line = interrupted if isinstance(error, KeyboardInterrupt) else f"error: {error}"
        print("\n".join([line, *getattr(error, "__notes__", [])]), file=sys.stderr)
        return next(code for kind, code in codes.items() if isinstance(error, kind))


def path(text: str) -> Path:
    """The type of an argument of argparse. An empty shell variable must not mean the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty (an unset shell variable?); give a path")
    return Path(text)


def outlive_terminal() -> None:
    """Makes stdout and stderr accept everything from now on: output that cannot be written is dropped, and a
    letter that the encoding lacks becomes a question mark. Streams that somebody has replaced are left alone.
    """
    for number in (0, 1, 2):  # or the next opened file would get this descriptor, and prints would go into it
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is original:
            kept = lasting(number, stream)
            setattr(sys, name, kept)
            setattr(sys, f"__{name}__", kept)


def lasting(number: int, like: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """A text stream on this descriptor, buffered as `like` is. like: None where the descriptor was closed."""
    kept = {}
    if like is not None:
        # python -u and PYTHONUNBUFFERED write through to a raw file; here there is a buffer below
        by_line = like.line_buffering or like.write_through
        kept = {"encoding": like.encoding, "line_buffering": by_line}
        with suppress(OSError, ValueError):
            like.flush()
    buffer = io.BufferedWriter(_Lasting(number, "w", closefd=False))
    return io.TextIOWrapper(buffer, errors="replace", **kept)


class _Lasting(io.FileIO):
    """The lowest layer, so that no buffer above it keeps what could not be written and fails at the exit."""

    def write(self, data) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written
