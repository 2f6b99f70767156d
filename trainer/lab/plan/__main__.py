"""What will a run need, what bounds it, and which layout is best? On a laptop, before a GPU hour is spent:
no GPU, no data, no weights.

    triquetra plan experiment=trinity_large device=b300
    triquetra plan experiment=trinity_mini device=h200 price=3.5 out=plan.html
    triquetra plan experiment=trinity_large_extension device=b300 span=extension

    device        a file of configs/device: a100 | h100 | h200 | b200 | b300
    ranks         GPUs; without it parallel.dp_replicate x parallel.dp_shard x parallel.cp
    price         of a GPU hour; with it spans have a cost
    imbalance     MaxVio that is expected of the router: the fullest expert's load over an even one, less 1
    calibration   a JSON file of speeds that were measured (tests/gpu writes it); without it times are ranges
    search        false: plans this layout only
    span          the span that is searched for and told of; without it the one with most tokens
    out           the page, one file that needs no network; without it <run_dir>/<name>/plan.html

All else is as for trainer.train. docs/planning.md says what each number means.
Exit codes: 0 done · 2 refused configuration.
"""

import math
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from trainer import terminal
from trainer.config import ConfigError, load, looked_up
from trainer.lab.options import parted, refuse_misspelt, write_page_to
from trainer.lab.plan import table
from trainer.lab.plan.calibration import Calibration, read
from trainer.lab.plan.hardware import hardware
from trainer.lab.plan.page import write_page
from trainer.lab.plan.plan import Plan, plan, refuse_unfit
from trainer.ranks.stop import INTERRUPTED, OK, REFUSED

OWN = ("device", "ranks", "price", "imbalance", "calibration", "search", "span", "out")
MOST_RANKS = 2**20
NUMBERS = {"price": (0.0, 1e6), "imbalance": (0.0, 1e3)}  # at least, at most


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    codes = {ConfigError: REFUSED, KeyboardInterrupt: INTERRUPTED}
    return terminal.run(partial(command, arguments), codes)


def command(arguments: list[str]) -> int:
    overrides, options = parted(arguments, OWN)
    if (text := looked_up(overrides, __doc__)) is not None:
        print(text)
        return OK
    planned = plan_of(overrides, options)
    refuse_unfit(planned)
    print_plan(planned)
    out = Path(options["out"]) if "out" in options else planned.config.directory / "plan.html"
    line = " ".join(["triquetra plan", *arguments])
    write_page_to(out, partial(write_page, planned, command=line), example="plan.html")
    print(f"{out}: the page")
    return OK


def plan_of(overrides: list[str], options: dict[str, str]) -> Plan:
    """Of what trainer.train would be called with, and our own keys. Raises: ConfigError."""
    refuse_misspelt(overrides, OWN)
    if "device" not in options:
        raise ConfigError("not set: device. Name the GPU, like device=h200 (configs/device has them)")
    config = load(overrides)
    device = options["device"]
    hardware(device)
    calibration = (
        read(Path(options["calibration"]), device=device) if "calibration" in options else Calibration(device)
    )
    numbers = {key: number(key, options[key]) for key in NUMBERS if key in options}
    ranks = options.get("ranks")
    if ranks is not None and not (ranks.isdecimal() and 1 <= int(ranks) <= MOST_RANKS):
        raise ConfigError(
            f"ranks={ranks}: must be a whole number from 1 to {MOST_RANKS:,}; without it, parallel= says"
        )
    if options.get("search", "true") not in ("true", "false"):
        raise ConfigError(f"search={options['search']}: must be true or false")
    made = plan(
        config,
        hardware(device, calibration),
        calibration,
        ranks=None if ranks is None else int(ranks),
        searches=options.get("search", "true") == "true",
        span=options.get("span"),
        **numbers,
    )
    return replace(made, overrides=tuple(overrides))


def number(key: str, text: str) -> float:
    least, most = NUMBERS[key]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise ConfigError(f"{key}={text}: must be a number from {least:g} to {most:g}")
    return value


def print_plan(planned: Plan) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 180, highlight=False)

    def show(rows: table.Rows) -> None:
        head, body = rows
        made = Table(box=SIMPLE_HEAD, pad_edge=False)
        for i, title in enumerate(head):
            made.add_column(title, justify="left" if i == 0 or title in ("Bound by", "Command") else "right")
        for row in body:
            made.add_row(*row)
        console.print(made)

    console.print(" · ".join(f"{name} {value}" for name, value in table.facts(planned).items()))
    for sentence in (table.sentence(planned), *table.warnings(planned)):
        console.print(sentence)
    for rows in (table.spans, table.memory, table.flop, table.traffic, table.timeline):
        show(rows(planned))
    console.print(f"A checkpoint takes {table.gib(table.host_bytes(planned))} of host memory on each node.")
    if planned.search is not None:
        head, body = table.best(planned)
        show((head[:-1], [row[:-1] for row in body]))
        for row in body:
            console.print(f"{row[0]}  {row[-1]}", soft_wrap=True)
        console.print(table.fallen(planned))
    console.print(table.certainty(planned))


if __name__ == "__main__":
    sys.exit(main())
