"""What will a run do, step by step? Draws its program before anything is trained: no data, no process group,
no model.

    triquetra preview experiment=trinity_large tokens_per_s=6e6
    triquetra preview experiment=demo steps=5000 ranks=8 out=preview.html

    tokens_per_s  of the whole run; with it spans have days
    device        a GPU, like h200: tokens_per_s is the lower end of what triquetra plan says
    ranks         GPUs; without it parallel.dp_replicate x parallel.dp_shard x parallel.cp
    out           the page, one file that needs no network; without it <run_dir>/<name>/preview.html

All else is as for trainer.train. Exit codes: 0 done · 2 refused configuration.
"""

import math
import os
import sys
from functools import partial
from pathlib import Path

import trainer.lab.plan  # noqa: F401  # before torch, to which it says what is no news
from trainer import terminal
from trainer.config import Config, ConfigError, divisors, load, looked_up
from trainer.lab.options import parted, refuse_misspelt, write_page_to
from trainer.lab.preview.page import write_page
from trainer.lab.preview.table import Preview, stretches, table, totals
from trainer.program import program_of
from trainer.ranks.stop import INTERRUPTED, OK, REFUSED
from trainer.split import check_rows

OWN = ("tokens_per_s", "device", "ranks", "out")
SLOWEST = 1e-3  # [tokens/s] a token in a quarter of an hour
ELSE_WIDTH = 24  # [characters] at least, of the column that wraps


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    codes = {ConfigError: REFUSED, KeyboardInterrupt: INTERRUPTED}
    return terminal.run(partial(command, arguments), codes)


def command(arguments: list[str]) -> int:
    overrides, options = parted(arguments, OWN)
    if (text := looked_up(overrides, __doc__)) is not None:
        print(text)
        return OK
    preview = preview_of(overrides, options)
    print_table(preview)
    out = Path(options["out"]) if "out" in options else preview.config.directory / "preview.html"
    line = " ".join(["triquetra preview", *arguments])
    write_page_to(out, partial(write_page, preview, command=line), example="preview.html")
    print(f"{out}: the page")
    return OK


def preview_of(overrides: list[str], options: dict[str, str]) -> Preview:
    """Of what trainer.train would be called with, and our own keys. Raises: ConfigError."""
    refuse_misspelt(overrides, OWN)
    config = load(overrides)
    cp = config.parallel.cp
    default = config.parallel.dp_replicate * (config.parallel.dp_shard or 1) * cp
    ranks, speed = options.get("ranks", str(default)), options.get("tokens_per_s", "inf")
    if not (ranks.isdecimal() and int(ranks) >= 1):
        raise ConfigError(
            f"ranks={ranks}: must be a whole number, at least 1; without it, parallel= gives {default}"
        )
    try:
        tokens_per_s = float(speed)
    except ValueError:
        tokens_per_s = math.nan
    if "tokens_per_s" in options and not SLOWEST <= tokens_per_s < math.inf:
        limit = f"at least {SLOWEST:g}; without it there are no days"
        raise ConfigError(f"tokens_per_s={speed}: must be a number above 0, like 6e6, {limit}")
    program = program_of(config)
    if int(ranks) % cp:
        raise ConfigError(
            f"parallel.cp={cp} does not divide ranks={ranks}; use one of {divisors(int(ranks))}"
        )
    program.check_split(num_ranks=int(ranks) // cp, num_streams=config.data.num_streams)
    check_rows(program, cp=cp)
    if "device" in options:
        if "tokens_per_s" in options:
            raise ConfigError(
                f"tokens_per_s={speed} and device={options['device']} are both set; keep one of them"
            )
        tokens_per_s = planned_speed(config, options["device"], ranks=int(ranks))
    return Preview(config, stretches(program), int(ranks), tokens_per_s)


def planned_speed(config: Config, device: str, *, ranks: int) -> float:
    """[tokens/s] over the whole program. Raises: ConfigError."""
    from trainer.lab.plan.calibration import Calibration  # a preview without it starts sooner
    from trainer.lab.plan.hardware import hardware
    from trainer.lab.plan.plan import plan

    calibration = Calibration(device)
    planned = plan(config, hardware(device), calibration, ranks=ranks, searches=False)
    return planned.tokens / planned.seconds / calibration.width


def print_table(preview: Preview) -> None:
    """As many columns side by side as the terminal is wide, the others below; the first one every time."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    head, rows = table(preview)
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 180, highlight=False)

    def side_by_side(columns: list[int], *, widest: int | None = None) -> Table:
        columns_table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for i in columns:
            wraps = head[i] == "Else"
            columns_table.add_column(
                head[i],
                justify="left" if i == 0 or wraps else "right",
                no_wrap=not wraps,
                min_width=ELSE_WIDTH if wraps else None,
                max_width=widest if wraps else None,
            )
        for row in rows:
            columns_table.add_row(*(row[i] for i in columns))
        return columns_table

    tables = [[0]]
    for i in range(1, len(head)):
        least = side_by_side([*tables[-1], i], widest=ELSE_WIDTH)
        if console.measure(least, options=console.options.update(width=1000)).maximum > console.width:
            tables.append([0])
        tables[-1].append(i)
    for columns in tables:
        console.print(side_by_side(columns))
    console.print("In all: " + " · ".join(f"{name} {value}" for name, value in totals(preview).items()))


if __name__ == "__main__":
    sys.exit(main())
