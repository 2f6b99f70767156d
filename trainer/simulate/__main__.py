"""Simulates router balance with the trainer's own router, counters, losses and rules.

    python -m trainer.simulate                                   the default: smebu on frozen scores with a shift
    python -m trainer.simulate balance=quantile scores=drift experts=64 steps=500
    python -m trainer.simulate compare=all seeds=5               ranks the rules
    python -m trainer.simulate level=closed balance=none ci=true exits with 3: experts collapse
    python -m trainer.simulate level=replay level.trace=runs/demo/router.trace balance=sign

Writes <run_dir>/<name>/simulation.json and simulation.html, a page that needs no network.
Exit codes: 0 done · 2 refused configuration · 3 with ci=true: experts collapsed or a threshold was missed · 130 interrupted.
"""

import json
import sys
from typing import Any

from trainer import train
from trainer.config import CONFIG_DIR, ConfigError, resolved_yaml
from trainer.simulate.config import arms, load
from trainer.simulate.page import write_page
from trainer.simulate.result import METRICS
from trainer.simulate.run import simulate

WITH_INTERVAL = ("excess_run", "excess_mean")  # the others have theirs in simulation.json and on the page


def main() -> int:
    overrides = sys.argv[1:]
    try:
        if {"-h", "--help"} & set(overrides):
            print(usage())
            return train.OK
        if "--cfg" in overrides:
            print(resolved_yaml(load([o for o in overrides if o not in ("--cfg", "job")])), end="")
            return train.OK
        return run(overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return train.REFUSED
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return train.INTERRUPTED


def run(overrides: list[str]) -> int:
    config = load(overrides)
    compared = arms(config, overrides)
    result = simulate(config, arms=compared, command=" ".join(["python -m trainer.simulate", *overrides]))
    config.directory.mkdir(parents=True, exist_ok=True)
    (config.directory / "simulation.json").write_text(json.dumps(result))
    write_page(result, config.directory / "simulation.html")
    print_table(result)
    print(f"{config.directory}: simulation.json, simulation.html ({result['seconds']:.0f} s)")
    for failure in result["failures"]:
        print(f"FAILED {failure}")
    collapsed = sum(run["collapsed"] for run in result["runs"])
    num_experts = sum(run["experts"] for run in result["runs"])
    print(f"balance: {'FAILED' if result['failures'] else 'ok'}, {collapsed} of {num_experts} experts collapsed")
    return train.COLLAPSED if config.ci and result["failures"] else train.OK


def print_table(result: dict[str, Any]) -> None:
    """One row per run, or per arm if several are ranked: the mean, for some ± half of the 95 % interval."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    ranked = result["ranking"]
    rows = ranked or [{**run, "metrics": {k: {"mean": v} for k, v in run["summary"].items()}} for run in result["runs"]]
    shown = [key for key in METRICS if any(key in row["metrics"] for row in rows)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for header in ("arm", "collapsed", *(METRICS[key].title for key in shown)):
        table.add_column(header, justify="left" if header == "arm" else "right", no_wrap=header == "arm")
    for row in rows:
        name = f"{row['rank']} {row['arm']}" if ranked else row["arm"] if len(rows) == 1 else f"{row['arm']} seed {row['seed']}"
        collapsed = f"{row['collapsed_runs']}/{row['num_seeds']} runs" if ranked else f"{row['collapsed']}/{row['experts']}"
        table.add_row(name, collapsed, *(cell(row["metrics"].get(key), interval=key in WITH_INTERVAL) for key in shown))
    width = None if sys.stdout.isatty() else 240  # a file or a log has no edge
    Console(width=width).print(table)


def cell(metric: dict[str, Any] | None, *, interval: bool) -> str:
    if metric is None:
        return ""
    if metric["mean"] is None:
        return "never"
    half = metric["high"] - metric["mean"] if interval and metric.get("high") is not None else None
    return f"{number(metric['mean'])} ± {number(half, digits=2)}" if half else number(metric["mean"])


def number(value: float, *, digits: int = 3) -> str:
    if 0 < abs(value) < 0.01:
        return f"{value:.0e}" if digits == 2 else f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def usage() -> str:
    groups = ("level", "balance", "scores")
    options = "\n".join(
        f"    {group + '=':10s} {' | '.join(sorted(o.stem for o in (CONFIG_DIR / group).glob('*.yaml')))}" for group in groups
    )
    return f"""{__doc__}
    --cfg job    prints the resolved configuration and simulates nothing

Choices:
{options}

Any value can be overridden (trainer/simulate/config.py): layers=2 experts=256 top_k=4 tokens=4096 steps=1000 seed=0 seeds=1"""


if __name__ == "__main__":
    sys.exit(main())
