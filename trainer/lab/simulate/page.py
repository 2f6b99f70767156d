"""What does a reader of a simulation see first, and what then? simulation.json -> simulation.html.

The verdict, the summary, the curves over steps, the layer x expert x step heatmap (heatmap.js), in this
order. An arm has one colour throughout, by its place among the arms as they were run.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.lab.page import HEATMAP, Cell, Column, Page, number, series, typed
from trainer.lab.simulate.result import CURVES, METRICS, SHARES, Metric, check

DECADES = [10.0**power for power in range(-12, 7)]
COLLAPSED = "Collapsed: an expert had under 10 % of an even share over the last tenth of the run."


class Row(NamedTuple):
    """Of a table: the runs it stands for, what is special to the table, the metrics."""

    runs: Sequence[Mapping[str, Any]]
    special: list[str]
    metrics: Mapping[str, Any]

    @property
    def arm(self) -> str:
        return self.runs[0]["arm"]

    @property
    def passed(self) -> bool:
        return all(run["ok"] for run in self.runs)

    def value(self, key: str) -> float | None:
        entry = self.metrics.get(key)
        return entry.get("mean") if isinstance(entry, Mapping) else entry


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Raises: ValueError if `result` is not what simulation.json should be."""
    check(result)
    config, failures = result["config"], tuple(result["failures"])
    failed = [
        any(text.startswith(f"{run['arm']} seed {run['seed']}: ") for text in failures)
        for run in result["runs"]
    ]
    # a missed threshold
    runs = [{**run, "ok": run["ok"] and not bad} for run, bad in zip(result["runs"], failed, strict=True)]
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        arms.setdefault(run["arm"], []).append(run)
    colours = {arm: series(i) for i, arm in enumerate(arms)}
    verdicts = [verdict(of_arm)._replace(colour=colours[arm]) for arm, of_arm in arms.items()]
    passed = f"{sum(cell.tone == 'good' for cell in verdicts)} of {len(arms)} arms passed"
    heading = passed if len(arms) > 1 else f"{verdicts[0].text} {verdicts[0].detail[2:]}"

    page = Page(
        f"{config.get('name', 'Balance')} · simulation",
        heading=heading,
        above="triquetra · balance simulation",
    )
    page.pills(verdicts)
    page.notes(failures, bad=True)
    page.notes(result["notes"])
    page.facts({name.replace("_", " "): _plain(value) for name, value in config.items() if value is not None})
    page.code(result["command"])
    thresholds = _plain(result["thresholds"]) or "none"
    page.text(f"torch {result['torch']}, {number(result['seconds'])} s. Thresholds: {thresholds}.", dim=True)

    shaded = "A shaded value is the best of those that passed. " if len(runs) > 1 else ""
    page.section("Summary", f"{shaded}Click a head to sort, point at it to read what it means.")
    _summary(page, {**result, "runs": runs}, arms, colours)
    _curves(page, arms, config)
    if any(run["loads"] for run in runs):
        page.section("Load of every expert")
        page.html('<div class="controls" id="controls"></div>')
        text = (
            "A row is an expert, a column a time bin. 1 is an even share; under 0.1, the limit of "
            "collapse, is starved."
        )
        text += " Of several seeds, the first." if len(runs) > len(arms) else ""
        title, unit = "Load of an expert at a step", f"{SHARES}, log scale"
        page.figure([], title=title, unit=unit, text=text, height=420, link="steps", name="heatmap")
    page.save_button("simulation.json")
    page.write(path, data=result, script=HEATMAP.read_text(encoding="utf-8"))


def verdict(runs: Sequence[Mapping[str, Any]]) -> Cell:
    """Of all seeds of an arm. The sign says it too, not the colour alone."""
    collapsed = [run for run in runs if run["collapsed"]]
    failed = [run for run in runs if not run["ok"]]
    of_seeds = f" in {len(collapsed or failed)} of {len(runs)} seeds" if len(runs) > 1 else ""
    detail, tone = "✓ passed", "good"
    if collapsed:
        most = max(run["collapsed"] for run in collapsed)
        detail, tone = f"✗ collapsed{of_seeds} ({most} expert{'s' * (most != 1)})", "bad"
    elif failed:
        detail, tone = f"! missed a threshold{of_seeds}", "warn"
    elif any(run.get("too_short") for run in runs):
        detail, tone = "– too short to judge", "warn"
    return Cell(runs[0]["arm"], detail, tone=tone)


def _plain(value: Any) -> str:
    """A setting as text; of a group only what is set, after the name of its class."""
    if isinstance(value, Mapping):
        kind = [str(value["_target_"]).rsplit(".", 1)[-1]] if "_target_" in value else []
        shown = {
            name: inner for name, inner in value.items() if inner is not None and not name.startswith("_")
        }
        return ", ".join(
            [*kind, *(f"{name.replace('_', ' ')} {_plain(inner)}" for name, inner in shown.items())]
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _summary(
    page: Page, result: Mapping[str, Any], arms: Mapping[str, list], colours: Mapping[str, str]
) -> None:
    """Arms with intervals if they were ranked, and every run below; else every run."""
    ranking, runs = result["ranking"] or [], result["runs"]
    entries = [run["summary"] for run in runs] + [rank["metrics"] for rank in ranking]
    keys = dict.fromkeys(key for entry in entries for key in entry)
    if result["config"].get("shift_step") is None:
        keys.pop("recovery_steps", None)  # nothing to recover from
    known_first = [key for key in [*METRICS, *keys] if key in keys]
    metrics = {key: METRICS.get(key) or Metric(key.replace("_", " "), better="") for key in known_first}
    seeds = ["Seed"] * (len(runs) > len(arms))
    each = [Row([run], [str(run["seed"])] * len(seeds), run["summary"]) for run in runs]
    if ranking:
        ranked = [
            Row(arms[rank["arm"]], [str(rank["rank"]), str(rank["num_seeds"])], rank["metrics"])
            for rank in ranking
        ]
        _table(page, ranked, ["Rank", "Seeds"], metrics, colours)
        page.text("Mean over seeds [95 % interval].", dim=True)
        page.html("<details><summary>Every run</summary>")
        _table(page, each, seeds, metrics, colours)
        page.html("</details>")
    else:
        _table(page, each, seeds, metrics, colours)
    page.terms(
        "What the columns mean",
        {metric.title: metric.explanation for metric in metrics.values() if metric.explanation},
    )


def _table(
    page: Page, rows: list[Row], special: list[str], metrics: Mapping[str, Metric], colours: Mapping[str, str]
) -> None:
    best = {}
    for key, metric in metrics.items():
        values = [value for row in rows if row.passed and (value := row.value(key)) is not None]
        if metric.better and len(set(values)) > 1:
            best[key] = max(values) if metric.better == "high" else min(values)

    def cell(row: Row, key: str) -> Cell:
        value, entry = row.value(key), row.metrics.get(key)
        if value is None:
            return Cell("never", tone="warn") if key in row.metrics else Cell("–")
        detail = ""
        if isinstance(entry, Mapping):
            low = entry.get("low")
            high = entry.get("high")
            of_seeds = entry.get("num_seeds", len(row.runs))
            detail = "" if low is None or high is None else f"[{number(low)}, {number(high)}]"
            # the others never reached it
            detail += f" {of_seeds} of {len(row.runs)} seeds" * (of_seeds < len(row.runs))
        return Cell(number(value), detail, value, best=row.passed and value == best.get(key))

    head = [
        Column("Arm", text=True),
        Column("Verdict", explanation=COLLAPSED, text=True),
        *map(Column, special),
    ]
    head += [Column(metric.title, metric.unit, metric.explanation) for metric in metrics.values()]
    body = []
    for row in rows:
        state = verdict(row.runs)
        first = [
            Cell(row.arm, value=row.arm, colour=colours[row.arm]),
            Cell(state.detail, value=state.detail, tone=state.tone),
        ]
        body.append(
            [*first, *(Cell(text, value=text) for text in row.special), *(cell(row, key) for key in metrics)]
        )
    page.table(head, body)


def _curves(page: Page, arms: Mapping[str, list], config: Mapping[str, Any]) -> None:
    drawn = {key: _lines(arms, key) for key in CURVES}
    if not any(lines for lines, _, _ in drawn.values()):
        return
    seeds = max(map(len, arms.values()))
    band = (
        " A line is the mean over seeds, its band goes from the lowest to the highest." if seeds > 1 else ""
    )
    page.section(
        "Curves over steps",
        f"Each point is the mean of a time bin.{band} A zoom along the steps goes to all figures.",
    )
    page.legend({f"arm{i}": (arm, series(i)) for i, arm in enumerate(arms)})
    for key, (lines, (smallest, largest), without) in drawn.items():
        if not lines:
            continue
        curve, first = CURVES[key], key == "max_violation"
        log = curve.log or (first and largest > 4)  # a collapsed arm would flatten the others
        text = curve.explanation + (f" No line: {', '.join(without)}." if without else "")
        if first and (floors := _floors(arms)):
            lines, text = lines + floors, f"{text} Dashed: the floor, what chance alone gives."
        limit = config.get("balanced_below", curve.limit) if first else curve.limit
        layout = _layout(config.get("shift_step"), limit=limit, from_zero=curve.from_zero)
        if log:  # plotly's own ticks are abbreviated
            ticks = (
                DECADES
                if largest > 1e3 * smallest
                else [digit * tick for tick in DECADES for digit in (1, 2, 5)]
            )
            names = [f"{tick:g}".replace("e-0", "e-") for tick in ticks]
            layout["yaxis"] = {"type": "log", "tickvals": ticks, "ticktext": names}
        unit, height = curve.unit + ", log scale" * log, 420 if first else 300
        page.figure(
            lines,
            layout,
            title=curve.title,
            unit=unit,
            text=text,
            height=height,
            half=not first,
            link="steps",
        )


def _lines(arms: Mapping[str, list], key: str) -> tuple[list[dict[str, Any]], tuple[float, float], list[str]]:
    """One line an arm, with a band over its seeds; smallest and largest value; the arms that have none."""
    traces, smallest, largest, without = [], np.inf, -np.inf, []
    for i, (arm, runs) in enumerate(arms.items()):
        steps = runs[0]["steps"]
        curves = [run["curves"][key] for run in runs if key in run["curves"]]
        values = np.array(curves, dtype=float).reshape(-1, len(steps))
        if CURVES[key].log:
            values[values <= 0] = np.nan
        if np.isnan(values).all():
            without.append(arm)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a bin without any value is a gap
            mean, low, high = np.nanmean(values, axis=0), np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        common = {"x": typed(steps), "legendgroup": f"arm{i}", "mode": "lines"}
        if len(values) > 1:
            edge = {**common, "hoverinfo": "skip", "line": {"width": 0, "color": series(i)}}
            band = {"fill": "tonexty", "fillcolor": f"{series(i)} 0.16"}
            traces += [{**edge, "y": typed(low)}, {**edge, "y": typed(high), **band}]
        line = {"line": {"color": series(i), "width": 1.8}, "hovertemplate": "%{y:.3~g}"}
        traces.append({**common, "y": typed(mean), "name": escape(arm), **line})
        smallest = min(smallest, float(np.nanmin(values)))
        largest = max(largest, float(np.nanmax(values)))
    return traces, (smallest, largest), without


def _floors(arms: Mapping[str, list]) -> list[dict[str, Any]]:
    """Dashed, once if all runs have the same."""
    runs = [run for of_arm in arms.values() for run in of_arm if run["curves"].get("floor")]
    stroke = {"color": "var(--ink)", "width": 1.5, "dash": "dash"}
    line = {"name": "floor", "mode": "lines", "hovertemplate": "%{y:.3~g}", "line": stroke}
    floors = {tuple(run["curves"]["floor"]): run["steps"] for run in runs}
    return [{**line, "x": typed(steps), "y": typed(floor)} for floor, steps in floors.items()]


def _layout(shift_step: int | None, *, limit: float | None, from_zero: bool) -> dict[str, Any]:
    grey, shapes, annotations = {"color": "var(--muted)", "width": 1}, [], []
    if limit is not None:
        dotted = {**grey, "dash": "dot"}
        shapes.append(
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit, "line": dotted}
        )
    if shift_step is not None:
        shapes.append(
            {
                "type": "line",
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "x0": shift_step,
                "x1": shift_step,
                "line": grey,
            }
        )
        above = {
            "yref": "paper",
            "y": 1,
            "yanchor": "bottom",
            "xanchor": "left",
            "xshift": -2,
            "showarrow": False,
        }
        annotations.append({"text": "shift", "x": shift_step, **above})
    xaxis = {"title": {"text": "step"}, "unifiedhovertitle": {"text": "step %{x}"}}
    yaxis = {"rangemode": "tozero" if from_zero else "normal"}
    return {"xaxis": xaxis, "yaxis": yaxis, "shapes": shapes, "annotations": annotations}
