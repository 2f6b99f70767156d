"""How does a number of a run become a line over tokens, FLOP or steps? One figure for each question.

All figures of a page share their axis along x: report.js swaps it in all of them at once.
"""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from trainer.lab.page import Page, series, typed, unit_of
from trainer.lab.report.plots import Plot
from trainer.lab.report.thin import Group, Line

AXES = {"tokens": ("tokens seen", "tokens"), "flop": ("FLOP spent", "FLOP"), "step": ("step", "")}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKED = 40  # points of an evaluation's line that are marked
DECADES = [10.0**power for power in range(-12, 13)]


class Named(NamedTuple):
    """A line of a figure. key: what it is: its colour, or its dash where several groups are drawn."""

    group: Group
    key: str
    line: Line
    axis: str  # in Drawing.axes


class Drawing:
    """A page that is being drawn, and the axes of its lines."""

    def __init__(self, page: Page, groups: Sequence[Group]):
        self.page, self.groups = page, groups
        self.axes: dict[str, dict[str, np.ndarray]] = {}
        self.names: dict[str, str] = {}  # of axes with steps of their own
        for group in groups:
            self.axes[self.axis_of(group)] = group.axes
        ends = {name: max(float(g.axes[name][-1]) for g in groups) for name in AXES}
        self.units = {name: unit_of(end) if end else (1, "") for name, end in ends.items()}
        if ends["flop"] > 1e15:
            self.units["flop"] = power_of(ends["flop"])
        self.units["step"] = (1, "")
        self.ends = ends

    def axis_of(self, group: Group) -> str:
        return f"{group.colour}"

    def columns(self, keys: Mapping[str, str]) -> list[Named]:
        """keys: of metrics.jsonl -> how they are called. Those that no step has are left out."""
        return [
            self.named(group, key, line)
            for group in self.groups
            for name, key in keys.items()
            if np.isfinite((line := group.column(name)).mean_P).any()
        ]

    def derived(self, key: str, formula: Any) -> list[Named]:
        """formula: columns of a run -> N numbers."""
        lines = [group.line([formula(run.columns) for run in group.runs]) for group in self.groups]
        named = zip(self.groups, lines, strict=True)
        return [self.named(g, key, x) for g, x in named if np.isfinite(x.mean_P).any()]

    def at_steps(self, group: Group, key: str, steps: Sequence[int], values: Sequence[float]) -> Named:
        """A line with steps of its own, like those of an evaluation."""
        return Named(group, key, Line(np.array(values, dtype=float)), self.axis_at(group, steps))

    def axis_at(self, group: Group, steps: Sequence[int]) -> str:
        """The name of an axis with these steps; lines with the same ones share it."""
        axis = f"{group.colour} at {','.join(map(str, steps))}"
        axis = self.names.setdefault(axis, f"{group.colour}.{len(self.names)}")
        self.axes.setdefault(axis, {**group.axes_at(steps), "step": np.array(steps, dtype=float)})
        return axis

    def named(self, group: Group, key: str, line: Line) -> Named:
        return Named(group, key, line, self.axis_of(group))

    def plot(self, plot: Plot) -> None:
        settings = plot._asdict()
        self.figure(self.columns(settings.pop("keys")), **settings)

    def figure(
        self,
        lines: Sequence[Named],
        *,
        title: str,
        unit: str = "",
        text: str = "",
        log: bool = False,
        from_zero: bool = False,
        large: bool = False,
        markers: bool = False,
        unless_zero: bool = False,
    ) -> None:
        """Nothing if there is no line. unless_zero: and nothing if all are zero."""
        lines = [line for line in lines if np.isfinite(line.line.mean_P).any()]
        if not lines or (unless_zero and not any(np.nan_to_num(line.line.mean_P).any() for line in lines)):
            return
        keys = list(dict.fromkeys(line.key for line in lines))
        num_groups = len({line.group.colour for line in lines})
        data = [
            trace for line in lines for trace in self.traces(line, keys, num_groups, log=log, markers=markers)
        ]
        layout = self.layout(labels=large and len(keys) == 1) | {
            "yaxis": y_axis(lines, log=log, from_zero=from_zero),
            "showlegend": len(keys) > 1,
            "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        }
        layout["margin"]["t"] += 16 * (len(keys) > 1)
        if num_groups > 1 and len(keys) > 1:
            data = [{**trace, "showlegend": False} for trace in data] + dashes_of(keys)
        self.page.figure(
            data,
            layout,
            title=title,
            unit=f"{unit}, log scale".lstrip(", ") if log else unit,
            text=text,
            height=380 if large else 260,
            half=not large,
            link="run",
        )

    def traces(
        self, line: Named, keys: list[str], num_groups: int, *, log: bool, markers: bool
    ) -> list[dict[str, Any]]:
        index = keys.index(line.key)
        colour = series(line.group.colour if num_groups > 1 or len(keys) == 1 else index)
        name = " · ".join([line.group.name] * (num_groups > 1) + [line.key] * (len(keys) > 1)) or line.key
        common = {
            "x": typed(self.axes[line.axis]["tokens"] / self.units["tokens"][0]),
            "axis": line.axis,  # for report.js
            "legendgroup": f"group{line.group.colour}" if num_groups > 1 else f"key{index}",
            "mode": "lines",
        }
        shown = [np.where(x > 0, x, np.nan) if log else x for x in line.line if x is not None]
        stroke = {
            "color": colour,
            "width": 1.8,
            "dash": DASHES[index % len(DASHES)] if num_groups > 1 else "solid",
        }
        few = len(shown[0]) <= MARKED * markers or np.isfinite(shown[0]).sum() == 1
        mode = {"mode": "lines+markers", "marker": {"size": 5}} if few else {}
        drawn = {**common, **mode, "y": typed(shown[0]), "name": escape(name), "line": stroke}
        traces = [{**drawn, "hovertemplate": "%{y:.4~g}"}]
        if len(shown) == 3:
            edge = {**common, "hoverinfo": "skip", "showlegend": False, "line": {"width": 0, "color": colour}}
            band = {"fill": "tonexty", "fillcolor": f"{colour} 0.15"}
            traces = [{**edge, "y": typed(shown[1])}, {**edge, "y": typed(shown[2]), **band}, *traces]
        return traces

    # -- what all figures have along x --

    def layout(self, *, labels: bool = False) -> dict[str, Any]:
        of_axis = self.along("tokens")
        if not labels:
            of_axis["annotations"] = []
        return {**of_axis, "margin": {"l": 52, "r": 16, "t": 32, "b": 40}}

    def along(self, axis: str) -> dict[str, Any]:
        """The axis itself; of the first group spans as bands, with their names, and restarts as lines."""
        size, letter = self.units[axis]
        title, noun = AXES[axis]
        xaxis = {
            "title": {"text": f"{title}{f' [{letter}]' if letter else ''}"},
            "range": [0, self.ends[axis] / size],
            "unifiedhovertitle": {
                "text": f"%{{x:.5~g}}{letter} {noun}".strip() if noun else "step %{x:,.0f}"
            },
        }
        spans, restarts = marks(self.groups[0], axis)
        grey = {"color": "var(--muted)", "width": 1, "dash": "dot"}
        tall = {"yref": "paper", "y0": 0, "y1": 1}
        shapes = [
            {
                **tall,
                "type": "rect",
                "layer": "below",
                "line": {"width": 0},
                "x0": a / size,
                "x1": b / size,
                "fillcolor": "var(--muted) 0.1",
            }
            for _, a, b in spans[1::2]
        ] + [{**tall, "type": "line", "x0": at / size, "x1": at / size, "line": grey} for at in restarts]
        return {"xaxis": xaxis, "shapes": shapes, "annotations": labels_of(spans, size)}

    def data(self) -> dict[str, Any]:
        """For report.js: every line and every mark over each axis."""
        return {
            "axes": {
                axis: {name: typed(x / self.units[name][0]) for name, x in of_name.items()}
                for axis, of_name in self.axes.items()
            },
            "along": {name: self.along(name) for name in AXES if self.ends[name] > 0},
        }


def marks(group: Group, axis: str) -> tuple[list[tuple[str, float, float]], list[float]]:
    """Spans that the group's first run has reached, each from and to, and its restarts; on this axis."""
    run = group.runs[0]
    tokens, other = (np.concatenate([[0], group.axes[name]]) for name in ("tokens", axis))
    at = {
        name: float(np.interp(name, tokens, other))
        for name in {x for s in run.spans for x in (s["start"], s["end"])}
    }
    reached = [span for span in run.spans if span["start"] < group.axes["tokens"][-1]]
    spans = [(str(span.get("span") or ""), at[span["start"]], at[span["end"]]) for span in reached]
    steps = [line["step"] for line in [*run.starts[1:], *run.roll_backs]]
    return spans, [float(x) for x in group.axes_at(steps)[axis]]


def dashes_of(keys: Sequence[str]) -> list[dict[str, Any]]:
    """The legend of a figure of several groups, whose colours the page's legend has: which dash is what."""
    line = {"color": "var(--muted)", "width": 1.8}
    entries = zip(keys, cycle(DASHES), strict=False)
    return [
        {"x": [None], "y": [None], "mode": "lines", "name": escape(key), "line": {**line, "dash": dash}}
        for key, dash in entries
    ]


def labels_of(spans: Sequence[tuple[str, float, float]], size: float) -> list[dict[str, Any]]:
    """Names of the spans above where they begin; report.js leaves out those without room."""
    where = {"xanchor": "left", "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False}
    return [{**where, "x": start / size, "text": escape(name)} for name, start, _ in spans if name]


def y_axis(lines: Sequence[Named], *, log: bool, from_zero: bool) -> dict[str, Any]:
    if not log:
        return {"rangemode": "tozero" if from_zero else "normal", "exponentformat": "e"}
    values = np.concatenate([line.line.mean_P for line in lines])
    values = values[np.isfinite(values) & (values > 0)]
    wide = len(values) and values.max() > 1e3 * values.min()
    ticks = DECADES if wide else [digit * tick for tick in DECADES for digit in (1, 2, 5)]
    return {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{tick:g}".replace("e-0", "e-") for tick in ticks],
    }


def power_of(count: float) -> tuple[float, str]:
    """(1e21, "10²¹"): FLOP are many."""
    power = int(np.log10(count)) // 3 * 3
    return 10.0**power, "10" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(power))
