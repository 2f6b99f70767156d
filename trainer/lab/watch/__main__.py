"""What does a run do right now? A live view of its records, of a run on this host or on another one.

    triquetra watch runs/demo
    triquetra watch runs/demo every=10     seconds between two looks; without it 2
    triquetra watch runs/demo --once       one frame, then the end

It reads files only and changes nothing. It follows a run that restarts, and ends with Ctrl-C, or when the run
has reached its last step. Without a terminal, or on a dumb one, it prints a line when there are new steps.

Exit codes: 0 the end · 2 no run.
"""

import os
import sys
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live

from trainer import terminal
from trainer.config import ConfigError
from trainer.lab.watch.follow import Follower
from trainer.lab.watch.frame import Letters, frame, one_line

OK, REFUSED, INTERRUPTED = 0, 2, 130
EVERY_S, MAX_EVERY_S = 2.0, 3600.0
NOTHING_YET = "no step yet; waiting for the first line of metrics.jsonl"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return terminal.run(partial(command, arguments), {ConfigError: REFUSED, KeyboardInterrupt: INTERRUPTED})


def command(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__.rstrip())
        return OK
    path, every_s, once = parsed(arguments)
    follower = Follower(path)
    with suppress(KeyboardInterrupt):
        (show_once if once else partial(watch, every_s=every_s))(follower)
    return OK


def parsed(arguments: list[str]) -> tuple[Path, float, bool]:
    """Raises: ConfigError."""
    paths = [argument for argument in arguments if not argument.startswith(("-", "every="))]
    every = [argument.removeprefix("every=") for argument in arguments if argument.startswith("every=")]
    for wrong in (argument for argument in arguments if argument.startswith("-") and argument != "--once"):
        raise ConfigError(f"{wrong}: there is no such flag; there is --once")
    if len(paths) != 1:
        raise ConfigError(f"{len(paths)} runs given; give the directory of one, like runs/demo")
    try:
        every_s = float(every[-1]) if every else EVERY_S
    except ValueError:
        every_s = 0.0
    if not 0.1 <= every_s <= MAX_EVERY_S:
        raise ConfigError(f"every={every[-1]}: must be seconds, 0.1 to {MAX_EVERY_S:.0f}")
    return Path(paths[0]), every_s, "--once" in arguments


def show_once(follower: Follower) -> None:
    """Raises: ConfigError if there is nothing to show."""
    run = follower.poll()
    if run is None:
        raise ConfigError(f"{follower.metrics}: holds no step yet")
    console = console_of_stdout()
    console.print(frame(run, Letters.of(console.encoding), width=console.width))


def console_of_stdout() -> Console:
    """As wide as the terminal; a file or a pipe gets 100 letters a line. rich heeds NO_COLOR and TERM."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(width=width, highlight=False, markup=False)


def watch(follower: Follower, *, every_s: float) -> None:
    """Until the run is done."""
    console = console_of_stdout()
    is_drawn = console.is_terminal and not console.is_dumb_terminal
    letters, last = Letters.of(console.encoding), None
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop") if is_drawn else nullcontext()
    with live as screen:
        while True:
            run = follower.poll()
            if screen is not None:
                shown = NOTHING_YET if run is None else frame(run, letters, width=console.width)
                screen.update(shown, refresh=True)
            elif (now := NOTHING_YET if run is None else one_line(run)) != last:
                last = now
                print(now, flush=True)
            if run is not None and run.is_done:
                return
            time.sleep(every_s)


if __name__ == "__main__":
    sys.exit(main())
