"""What checkpoints does a run have, are they good, and go back to one.

    triquetra checkpoint list runs/demo            all of them, newest last
    triquetra checkpoint verify runs/demo [STEP]   every byte of them, or of one
    triquetra checkpoint rewind runs/demo STEP     the run goes on from there; newer ones are set aside

Exit codes: 0 all is well · 1 something is damaged · 2 not a run, no such step, or in use.
"""

import argparse
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer import terminal
from trainer.checkpoint.checkpoints import LATEST, Checkpoints
from trainer.checkpoint.foreign import DamagedError, shown
from trainer.checkpoint.manifest import problems, read_manifest
from trainer.ranks.lock import InUseError, lock

OK, DAMAGED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    return terminal.run(partial(command, arguments), {KeyboardInterrupt: INTERRUPTED})


def command(arguments: list[str] | None) -> int:
    as_written = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(
        prog="triquetra checkpoint", description=__doc__, formatter_class=as_written
    )
    parser.add_argument("action", choices=("list", "verify", "rewind"))
    parser.add_argument("run", type=terminal.path, help="a run's directory")
    parser.add_argument("step", type=int, nargs="?")
    flags = parser.parse_args(arguments)
    checkpoints = Checkpoints(flags.run / "checkpoints")
    if not checkpoints.directory.is_dir():
        return refused(f"{flags.run}: no run's directory, it has no checkpoints/")
    try:
        return acted(checkpoints, flags)
    except OSError as error:
        return refused(f"{flags.run}: {error}")


def acted(checkpoints: Checkpoints, flags: argparse.Namespace) -> int:
    steps = checkpoints.all_steps()
    known = ", ".join(map(str, steps)) or "none"
    if flags.step is not None and flags.step not in steps:
        return refused(f"step {flags.step}: {flags.run} has steps {known}")
    if flags.action == "list":
        return listed(checkpoints)
    if flags.action == "verify":
        return verified(checkpoints, steps if flags.step is None else [flags.step])
    if flags.step is None:
        return refused(f"rewind: which step? {flags.run} has {known}")
    return rewound(checkpoints, flags.run, flags.step)


def listed(checkpoints: Checkpoints) -> int:
    table = Table(box=None, header_style="bold")
    for name in ("Step", "Tokens", "Saved at", "Size", "Ranks", "Code", "State"):
        table.add_column(name, justify="right" if name in ("Step", "Tokens", "Size", "Ranks") else "left")
    latest = checkpoints.directory / LATEST
    newest = latest.read_bytes().decode(errors="replace").strip() if latest.is_file() else None
    for path in sorted(checkpoints.directory.glob("step-*")):
        number = path.name.removeprefix("step-").split(".")[0].lstrip("0") or "0"
        columns, state = [""] * 5, "DAMAGED"
        with suppress(DamagedError):
            columns = columns_of(read_manifest(path))
        if not problems(path, hashes=False):
            state = path.suffix.removeprefix(".") or ("latest" if path.name == newest else "complete")
        table.add_row(*map(shown, (number, *columns, state)))
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)
    return OK


def columns_of(manifest: Mapping[str, Any]) -> list[str]:
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    facts = [str(manifest.get(key, "")) for key in ("saved_at", "ranks", "code")]
    return [f"{manifest.get('tokens', 0):,}", facts[0], f"{size / 1e6:,.1f} MB", *facts[1:]]


def verified(checkpoints: Checkpoints, steps: list[int]) -> int:
    damaged = False
    for step in steps:
        wrong = problems(checkpoints.path(step))
        damaged |= bool(wrong)
        print(f"step {step}: {'DAMAGED' if wrong else 'good'}")
        for line in wrong:
            print(f"    {line}")
    if not steps:
        print("no checkpoints")
    return DAMAGED if damaged else OK


def rewound(checkpoints: Checkpoints, run: Path, step: int) -> int:
    try:
        with lock(run):
            moved = checkpoints.rewind(step)
    except DamagedError as error:
        print(f"error: the run was left as it is: {error}", file=sys.stderr)
        return DAMAGED
    except InUseError as error:
        return refused(str(error))
    except OSError as error:
        return refused(f"{error}; {run} must be writable for this user")
    for path in moved:
        print(f"set aside: {path}")
    print(f"{run} goes on from step {step}")
    return OK


def refused(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
