"""What do the two programs have in common? Overrides go in, a verdict and numbers come out.

A program loads overrides (in the parent, before anything runs), runs a configuration (in a child) and knows
where its numbers lie. Verdicts: ok and collapsed are results; what a program raises is judged in workers.py.
"""

import json
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer import train
from trainer.config import Config, ConfigError, load
from trainer.lab.ablate.study import Metric
from trainer.lab.simulate import run
from trainer.lab.simulate.config import SimulateConfig
from trainer.ranks import stop

INTERRUPTED = "interrupted"
VERDICTS = {
    stop.OK: "ok",
    stop.COLLAPSED: "collapsed",
    stop.UNSOUND: "diverged",
    stop.INTERRUPTED: INTERRUPTED,
    stop.PREEMPTED: INTERRUPTED,
}


class Program(Protocol):
    def load(self, overrides: list[str]) -> Any: ...

    def run(self, config: Any) -> str:
        """Runs to the end in <run_dir>/<name>. Returns ok, collapsed or interrupted."""
        ...

    def rows(self, directory: Path) -> list[dict[str, Any]]:
        """The numbers of a finished job: a dict for each step, or one dict."""
        ...


class Train:
    def load(self, overrides: list[str]) -> Config:
        return load(overrides)

    def run(self, config: Config) -> str:
        code = train.train(config)
        if code not in VERDICTS:
            raise RuntimeError(f"the training ended with exit code {code}")
        return VERDICTS[code]

    def rows(self, directory: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


class Simulate:
    """Each job is one arm with one seed, so its simulation holds one run."""

    def load(self, overrides: list[str]) -> SimulateConfig:
        config = run.load(overrides)
        if config.compare or config.seeds != 1:
            raise ConfigError(
                "compare= and seeds= of a simulation: arms and seeds are the study's, leave them out"
            )
        return config

    def run(self, config: SimulateConfig) -> str:
        simulation = run.simulate(config)
        (config.directory / "simulation.json").write_text(json.dumps(simulation))
        return "collapsed" if simulation["runs"][0]["collapsed"] else "ok"

    def rows(self, directory: Path) -> list[dict[str, Any]]:
        return [json.loads((directory / "simulation.json").read_text())["runs"][0]["summary"]]


PROGRAMS: dict[str, Program] = {"train": Train(), "simulate": Simulate()}


def measure(metric: Metric, rows: list[dict[str, Any]]) -> float | None:
    """The metric of one job. None: it never got there, was not recorded, or is not finite."""
    rows = rows[-max(1, round(metric.share * len(rows))) :]
    series = [(row.get("step", 0), value) for row in rows if (value := difference(row, metric)) is not None]
    values = [value for _, value in series]
    level = math.nan if metric.level is None else metric.level
    match metric.take:
        case "first_below":
            return next((step for step, value in series if value < level), None)
        case "first_above":
            return next((step for step, value in series if value > level), None)
        case _ if not values:
            return None
        case "mean":
            return math.fsum(values) / len(values)
        case "spread" | "lag_1" if len(series) < 3:
            return None
        case "spread":
            off_N = around_line(series)
            return math.sqrt(off_N @ off_N / (len(off_N) - 2))
        case "lag_1":
            off_N = around_line(series)
            return float(off_N[1:] @ off_N[:-1] / (off_N @ off_N)) if off_N.any() else None
        case "last":
            return values[-1]
        case take:
            return {"max": max, "min": min}[take](values)


def around_line(series: list[tuple[int, float]]) -> np.ndarray:
    """What a series is off the straight line that fits it best, so that a trend is no noise."""
    step_N, value_N = np.array(series, dtype=np.float64).T
    return value_N - np.polynomial.Polynomial.fit(step_N, value_N, 1)(step_N)


def difference(row: dict[str, Any], metric: Metric) -> float | None:
    value = row.get(metric.of)
    other = row.get(metric.minus) if metric.minus else 0.0
    if value is None or other is None or not math.isfinite(value - other):
        return None
    return float(value - other)
