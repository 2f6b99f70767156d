"""What did a run do? One HTML file of its records, or of several runs beside each other; no network.

    triquetra report runs/demo
    triquetra report runs/a runs/b runs/c out=compare.html

Runs that differ in their seed alone are one line with a band. A run may be training: nothing is changed.

    out           the page; without it <run>/report.html of the first run

Exit codes: 0 done · 2 no run, or nothing to report on.
"""

import sys
from functools import partial
from pathlib import Path

from trainer import terminal
from trainer.config import ConfigError
from trainer.lab.options import parted, write_page_to
from trainer.lab.report.page import write_report
from trainer.lab.report.read import read_records

OK, REFUSED, INTERRUPTED = 0, 2, 130
MAX_RUNS = 64


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return terminal.run(partial(command, arguments), {ConfigError: REFUSED, KeyboardInterrupt: INTERRUPTED})


def command(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__.rstrip())
        return OK
    paths, out = parsed(arguments)
    runs = [read_records(path) for path in paths]
    out = out or paths[0] / "report.html"
    line = " ".join(["triquetra report", *arguments])
    write_page_to(out, partial(write_report, runs, command=line), example="report.html")
    for sentence in (sentence for run in runs for sentence in run.problems):
        print(f"warning: {sentence}", file=sys.stderr)
    print(f"{out}: the report of {', '.join(run.name for run in runs)}")
    return OK


def parsed(arguments: list[str]) -> tuple[list[Path], Path | None]:
    """Runs, and where the page goes. Raises: ConfigError."""
    words, options = parted(arguments, ("out",))
    paths = [Path(word) for word in words]
    for wrong in (path for path in paths if str(path).startswith("-")):
        raise ConfigError(f"{wrong}: there is no such flag; triquetra report --help says more")
    if not paths:
        raise ConfigError("which run? give its directory, like runs/demo")
    if len(paths) > MAX_RUNS:
        raise ConfigError(f"{len(paths)} runs are too many for one page; give at most {MAX_RUNS}")
    return list(dict.fromkeys(paths)), Path(options["out"]) if "out" in options else None


if __name__ == "__main__":
    sys.exit(main())
