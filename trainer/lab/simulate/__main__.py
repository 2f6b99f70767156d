"""Simulates router balance with the trainer's own router, counters, losses and rules.

    triquetra simulate                                   the default: smebu on frozen scores with a shift
    triquetra simulate balance=quantile scores=drift experts=64 steps=500
    triquetra simulate compare=all seeds=5               ranks the rules
    triquetra simulate level=closed balance=none ci=true exits with 3: experts collapse
    triquetra simulate level=replay level.trace=runs/demo/router.trace balance=sign

Writes <run_dir>/<name>/simulation.json and simulation.html, a page that needs no network.
Exit codes: 0 done · 2 refused configuration · 3 with ci=true: experts collapsed or a threshold was missed ·
130 interrupted.
"""

import json
import sys
from contextlib import suppress
from functools import partial
from typing import Any

from trainer import terminal, train
from trainer.config import CONFIG_DIR, ConfigError, resolved_yaml
from trainer.lab.page import number
from trainer.lab.simulate.config import arms, load
from trainer.lab.simulate.page import write_page
from trainer.lab.simulate.result import METRICS
from trainer.lab.simulate.run import simulate
from trainer.run.directory import writing

COLUMNS = (
    "steps_to_balance",
    "steps_to_floor",
    "recovery_steps",
    "excess_run",
    "excess_mean",
    "excess_p99",
    "bias_step_rms",
    "bias_chatter",
    "churn",
    "mean_score",
    "ep_max_over_mean",
    "dead_experts",
    "loss",
)
WITH_INTERVAL = ("excess_run", "excess_mean")  # the others have theirs in simulation.json and on the page


def main(arguments: list[str] | None = None) -> int:
    overrides = sys.argv[1:] if arguments is None else arguments
    codes = {ConfigError: train.REFUSED, KeyboardInterrupt: train.INTERRUPTED}
    return terminal.run(partial(run, overrides), codes, interrupted="interrupted; nothing was written")


def run(overrides: list[str]) -> int:
    if {"-h", "--help"} & set(overrides):
        print(usage())
        return train.OK
    if "--cfg" in overrides:
        print(resolved_yaml(load([o for o in overrides if o not in ("--cfg", "job")])), end="")
        return train.OK
    config = load(overrides)
    compared = arms(config, overrides)
    command = " ".join(["triquetra simulate", *overrides])
    with writing(run_dir=config.run_dir, name=config.name):
        config.directory.mkdir(parents=True, exist_ok=True)  # before minutes are spent
        try:
            result = simulate(config, arms=compared, command=command)
        except BaseException:
            with suppress(OSError):  # something lies in it
                config.directory.rmdir()
            raise
        (config.directory / "simulation.json").write_text(json.dumps(result))
        write_page(result, config.directory / "simulation.html")
    print_table(result)
    print(f"{config.directory}: simulation.json, simulation.html ({result['seconds']:.0f} s)")
    for failure in result["failures"]:
        print(f"FAILED {failure}")
    collapsed = sum(run["collapsed"] for run in result["runs"])
    num_experts = sum(run["experts"] for run in result["runs"])
    too_short = [run["too_short"] for run in result["runs"] if run["too_short"]]
    if too_short and not result["failures"]:
        print(too_short[0])
    else:
        state = "FAILED" if result["failures"] else "ok"
        print(f"balance: {state}, {collapsed} of {num_experts} experts collapsed")
    return train.COLLAPSED if config.ci and result["failures"] else train.OK


def print_table(result: dict[str, Any]) -> None:
    """Up to three runs side by side; more, or arms that are ranked, one a line: the mean, for some ± half of
    its interval.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    ranked = result["ranking"]
    rows = ranked or [
        {**run, "metrics": {k: {"mean": v} for k, v in run["summary"].items()}} for run in result["runs"]
    ]
    shown = [key for key in COLUMNS if any(key in row["metrics"] for row in rows)]
    lines = [["", *(METRICS[key].title for key in shown), "Collapsed"]]
    for row in rows:
        name = f"{row['rank']} {row['arm']}" if ranked else f"{row['arm']} seed {row['seed']}"
        collapsed = (
            f"{row['collapsed_runs']} of {row['num_seeds']} runs"
            if ranked
            else f"{row['collapsed']} of {row['experts']}"
        )
        lines.append(
            [
                name,
                *(cell(row["metrics"].get(key), interval=key in WITH_INTERVAL) for key in shown),
                collapsed,
            ]
        )
    if len(rows) <= 3:
        units = ["", *(METRICS[key].unit for key in shown), "" if ranked else "experts"]
        lines = [list(column) for column in zip(*lines, units, strict=True)]
    table = Table(*lines[0], box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1 : len(rows) + 1 if len(rows) <= 3 else None]:
        column.justify = "right"
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=180 if len(rows) > 3 else None).print(table)


def cell(metric: dict[str, Any] | None, *, interval: bool) -> str:
    if metric is None:
        return ""
    if metric["mean"] is None:
        return "never"
    half = metric["high"] - metric["mean"] if interval and metric.get("high") is not None else None
    return f"{number(metric['mean'])} ± {number(half)}" if half else number(metric["mean"])


def usage() -> str:
    groups = ("level", "balance", "scores")
    options = "\n".join(
        f"    {group + '=':10s} {' | '.join(sorted(o.stem for o in (CONFIG_DIR / group).glob('*.yaml')))}"
        for group in groups
    )
    return f"""{__doc__}
    --cfg job    prints the resolved configuration and simulates nothing

Choices:
{options}

Any value can be overridden (trainer/lab/simulate/config.py):
    layers=2 experts=256 top_k=4 tokens=4096 steps=1000 seed=0 seeds=1"""


if __name__ == "__main__":
    sys.exit(main())
