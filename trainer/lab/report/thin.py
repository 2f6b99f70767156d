"""How do 100,000 steps become a line that an eye can follow? Means of bins of steps.

Runs that differ in their seed alone are one group, and share their bins. Letters: N steps, P bins (points),
R runs of a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from trainer.lab.report.read import Records, flat

POINTS = 600  # at most, of a line
OF_THE_PLACE = ("name", "run_dir", "seed")  # settings that two runs of a group may have different


class Line(NamedTuple):
    """Over the bins of a group; nan: no value. low, high: None where nothing spreads."""

    mean_P: np.ndarray
    low_P: np.ndarray | None = None
    high_P: np.ndarray | None = None


@dataclass(kw_only=True)
class Group:
    """Runs that differ in their seed alone, most of the time one. All its lines have the same bins."""

    runs: list[Records]
    colour: int = 0
    cache: dict[str, Line] = field(default_factory=dict)

    @property
    def name(self) -> str:
        more = len(self.runs) - 1
        return self.runs[0].name + (f" and {more} more seed{'s' * (more > 1)}" if more else "")

    @cached_property
    def edges(self) -> np.ndarray:
        """Steps where bins end, the first bin begins after the first of them."""
        first = min(run.columns.steps_N[0] for run in self.runs) - 1
        last = max(run.columns.steps_N[-1] for run in self.runs)
        return np.unique(np.linspace(first, last, POINTS + 1).round())

    @property
    def steps_per_point(self) -> int:
        return int(np.diff(self.edges).max())

    @property
    def last_step_P(self) -> np.ndarray:
        return self.edges[1:]

    def column(self, name: str) -> Line:
        if name not in self.cache:
            self.cache[name] = self.line([run.columns.get(name) for run in self.runs])
        return self.cache[name]

    def line(self, values: Sequence[np.ndarray]) -> Line:
        """values: for each run, N numbers. The band: over seeds, or with one seed over the steps of a bin."""
        binned = [self.binned(run, x_N) for run, x_N in zip(self.runs, values, strict=True)]
        if len(binned) == 1:
            return binned[0]
        mean_RP = np.array([line.mean_P for line in binned])
        return Line(quiet(np.nanmean, mean_RP), quiet(np.nanmin, mean_RP), quiet(np.nanmax, mean_RP))

    def binned(self, run: Records, x_N: np.ndarray) -> Line:
        num_bins = len(self.edges) - 1
        bin_N = np.clip(np.searchsorted(self.edges, run.columns.steps_N) - 1, 0, num_bins - 1)
        is_there = np.isfinite(x_N)
        bin_N, x_N = bin_N[is_there], x_N[is_there]
        count_P = np.bincount(bin_N, minlength=num_bins)
        with np.errstate(invalid="ignore"):
            mean_P = np.where(count_P, np.bincount(bin_N, x_N, num_bins) / np.maximum(count_P, 1), np.nan)
        if self.steps_per_point == 1:
            return Line(mean_P)
        low_P, high_P = np.full(num_bins, np.inf), np.full(num_bins, -np.inf)
        np.minimum.at(low_P, bin_N, x_N)
        np.maximum.at(high_P, bin_N, x_N)
        return Line(mean_P, np.where(count_P, low_P, np.nan), np.where(count_P, high_P, np.nan))

    @cached_property
    def axes(self) -> dict[str, np.ndarray]:
        """What the lines may be drawn over: tokens seen, FLOP spent, steps; at the end of each bin."""
        flop = [np.nancumsum(run.columns.get("data/step_flop")) for run in self.runs]
        ends = [self.at_ends([run.columns.get("tokens") for run in self.runs]), self.at_ends(flop)]
        return {"tokens": ends[0], "flop": ends[1], "step": self.last_step_P}

    def at_ends(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Of growing columns; of the first run that reaches so far."""
        longest = max(range(len(self.runs)), key=lambda i: self.runs[i].step)
        steps_N, x_N = self.runs[longest].columns.steps_N, values[longest]
        is_there = np.isfinite(x_N)
        if not is_there.any():
            return self.last_step_P
        return np.interp(self.last_step_P, steps_N[is_there], x_N[is_there])

    def axes_at(self, steps: Sequence[float]) -> dict[str, np.ndarray]:
        """The same axes at steps of one's own; step 0 is their origin."""
        known = np.concatenate([[0], self.last_step_P])
        return {name: np.interp(steps, known, np.concatenate([[0], x_P])) for name, x_P in self.axes.items()}


def quiet(reduce: Any, x_RP: np.ndarray) -> np.ndarray:
    """nan where no run has a value, without a warning."""
    nothing_P = np.isnan(x_RP).all(0)
    return np.where(nothing_P, np.nan, reduce(np.where(nothing_P, 0.0, x_RP), axis=0))


def groups_of(runs: Sequence[Records]) -> list[Group]:
    """In the order of the runs."""
    by_settings: dict[str, Group] = {}
    for run in runs:
        settings = {key: value for key, value in flat(run.config).items() if key not in OF_THE_PLACE}
        key = repr(sorted((name, repr(value)) for name, value in settings.items()))
        by_settings.setdefault(key, Group(runs=[])).runs.append(run)
    groups = list(by_settings.values())
    for i, group in enumerate(groups):
        group.colour = i
    return groups


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Settings that the groups do not have alike; a group that lacks one has None."""
    configs: list[Mapping[str, Any]] = [flat(group.runs[0].config) for group in groups]
    keys = dict.fromkeys(key for config in configs for key in config if key not in OF_THE_PLACE)
    rows = {key: [config.get(key) for config in configs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(map(repr, values))) > 1}
