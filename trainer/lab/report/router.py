"""What did the routers do? Balance over the run, every expert's load, and which layers to look at.

Letters: T bins of steps, M MoE layers, E experts.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.history import Bins
from trainer.lab.page import Cell, Column, number, typed
from trainer.lab.report.curves import Drawing
from trainer.lab.report.experts import bins_of, tail_of, worst_layers
from trainer.lab.report.plots import EVEN, ROUTER
from trainer.lab.report.read import Records
from trainer.lab.report.thin import Group

MAX_LOAD = 8.0  # [even shares] where the heat map ends
MAX_CELLS = 1_000_000  # of all heat maps of a page, a byte each
LINES = 8  # at most so many layers are lines; more are a heat map


def draw_router(d: Drawing) -> None:
    if not any(np.isfinite(g.column("balance/max_violation").mean_P).any() for g in d.groups):
        return
    d.page.section("Router", "1 is the even share: every expert is visited equally often.")
    for plot in ROUTER:
        d.plot(plot)
    draw_layers(d)
    draw_alarms(d)
    if any(heat_data([group]) for group in d.groups):
        d.page.section("Load of every expert", source_text(d.groups))
        d.page.html('<div class="controls" id="controls"></div>')
        text = "A row is an expert, a column a bin of steps. Under 0.1, the limit of collapse, is starved."
        d.page.figure(
            [],
            title="Load of an expert at a step",
            unit=f"{EVEN}, log scale",
            text=text,
            height=420,
            name="heatmap",
        )


# -- the heat map --


def source_text(groups: Sequence[Group]) -> str:
    run = groups[0].runs[0]
    if run.bins is None:
        return "From the router trace."
    bins = run.bins
    longest = int((bins.last_T - bins.first_T).max()) + 1
    mean = f", the longest is the mean of {longest:,} steps" if longest > 1 else ", one for each step"
    return f"From experts.jsonl: {len(bins.last_T)} bins{mean}."


def heat_data(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """For heatmap.js: loads of each run as bytes, in bins that follow one another."""
    runs = [run for group in groups for run in group.runs if bins_of(run) is not None]
    return [entry(run, room=MAX_CELLS // len(runs)) for run in runs]


def entry(run: Records, *, room: int) -> dict[str, Any]:
    bins = bins_of(run)
    load_TME, last_T = merged(bins, at_most=max(8, room // bins.load_TME[0].size))
    num_bins, layers, experts = load_TME.shape
    top = float(min(MAX_LOAD, max(2.0, load_TME.max())))
    codes = np.round(np.clip(load_TME.transpose(1, 2, 0) / top, 0, 1) * 255).astype(np.uint8)
    loads = {"layers": layers, "experts": experts, "bins": num_bins, "max": top}
    loads["data"] = base64.b64encode(codes.tobytes()).decode()
    return {"arm": run.name, "steps": last_T.tolist(), "loads": loads}


def merged(bins: Bins, *, at_most: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring bins put together, weighted by their steps."""
    num_bins = len(bins.last_T)
    starts = np.unique(np.linspace(0, num_bins, min(at_most, num_bins) + 1).astype(int))[:-1]
    weight_T = (bins.last_T - bins.first_T + 1).astype(np.float32)
    sums = np.add.reduceat(bins.load_TME * weight_T[:, None, None], starts, axis=0)
    ends = np.append(starts[1:], num_bins) - 1
    return sums / np.add.reduceat(weight_T, starts)[:, None, None], bins.last_T[ends]


# -- layers --


def draw_layers(d: Drawing) -> None:
    """Of one run: which layer, when? Of several: the worst layers of each."""
    runs = [run for group in d.groups for run in group.runs]
    if len(runs) == 1 and (bins := bins_of(runs[0])) is not None:
        by_layer(d, bins, bins.load_TME.max(-1) - 1, title="MaxVio of layers", unit=EVEN)
        by_layer(d, bins, bins.load_TME.min(-1), title="Least load of layers", unit=EVEN, colours=LOW_IS_BAD)
        spread = bins.bias_TM5[..., -1] - bins.bias_TM5[..., 0]
        by_layer(
            d,
            bins,
            spread,
            title="Spread of biases",
            unit="score",
            text="The largest bias of a layer minus its least.",
        )
        by_layer(d, bins, bins.gain_TM, title="Gain of layers", unit="1/score")
        draw_biases(d, bins)
    if len(runs) == 1:
        draw_stability(d, runs[0])
    rows = [(run, m) for run in runs for m in worst_layers(run)]
    if not rows:
        return
    named = [Column("Run", text=True)] if len(runs) > 1 else []
    head = [
        *named,
        Column("Layer", "MoE layers from 0"),
        Column("MaxVio", EVEN),
        Column("Least load", EVEN),
        Column("Under 0.1", "experts"),
        Column("Least expert"),
        Column("Spread of biases", "score"),
        Column("Gain", "1/score"),
        Column(
            "Stability",
            "of the largest step",
            "The rule's step over the largest stable one; above 1 it swings.",
        ),
    ]
    d.page.section("Worst layers", "By MaxVio over the last tenth of the steps.")
    d.page.table(head, [[*([Cell(run.name)] if named else []), *layer_row(run, m)] for run, m in rows])


def layer_row(run: Records, m: int) -> list[Cell]:
    bins, load_E = bins_of(run), tail_of(run)[m]
    bias_5, starved = bins.bias_TM5[-1, m], int((load_E < 0.1).sum())
    stability_N = run.columns.get(f"balance/stability/{m}")
    stability = float(stability_N[np.isfinite(stability_N)][-1]) if np.isfinite(stability_N).any() else None
    values = [
        load_E.max() - 1,
        load_E.min(),
        starved,
        load_E.argmin(),
        bias_5[-1] - bias_5[0],
        bins.gain_TM[-1, m],
    ]
    cells = [Cell(number(float(x)), value=float(x)) for x in values]
    cells[2] = cells[2]._replace(tone="bad" if starved else "")
    tone = "bad" if stability is not None and stability > 1 else ""
    return [Cell(str(m), value=m), *cells, Cell(number(stability), value=stability, tone=tone)]


HIGH_IS_BAD = [[0, "var(--even)"], [0.5, "var(--over1)"], [0.75, "var(--over2)"], [1, "var(--over3)"]]
LOW_IS_BAD = [[0, "var(--under3)"], [0.25, "var(--under2)"], [0.5, "var(--under1)"], [1, "var(--even)"]]


def by_layer(
    d: Drawing,
    bins: Bins,
    x_TM: np.ndarray,
    *,
    title: str,
    unit: str,
    text: str = "",
    colours: list[list[Any]] = HIGH_IS_BAD,
) -> None:
    """Lines of few layers, a heat map of many."""
    group, num_layers = d.groups[0], x_TM.shape[1]
    if not np.isfinite(x_TM).any():
        return
    if num_layers <= LINES:
        lines = [d.at_steps(group, f"layer {m}", bins.last_T.tolist(), x_TM[:, m]) for m in range(num_layers)]
        d.figure(lines, title=title, unit=unit, text=text, from_zero=True)
        return
    x_TM, steps_T = thinned(x_TM, bins.last_T)
    axis = d.axis_at(group, steps_T.tolist())
    trace = {
        "type": "heatmap",
        "x": typed(d.axes[axis]["tokens"] / d.units["tokens"][0]),
        "axis": axis,
        "y": list(range(num_layers)),
        "z": matrix(x_TM.T),
        "colorscale": colours,
        "colorbar": {"thickness": 10, "outlinewidth": 0},
        "hovertemplate": "layer %{y}: %{z:.3~g}<extra></extra>",
    }
    layout = d.layout() | {"yaxis": {"title": {"text": "MoE layer"}}, "hovermode": "closest"}
    d.page.figure([trace], layout, title=title, unit=unit, text=text, half=True, link="run")


def thinned(x_TM: np.ndarray, steps_T: np.ndarray, *, at_most: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Of each stretch the last bin is drawn: a mean would hide the worst."""
    kept = np.unique(np.linspace(0, len(steps_T) - 1, min(at_most, len(steps_T))).astype(int))
    return x_TM[kept], steps_T[kept]


def matrix(values: np.ndarray) -> dict[str, Any]:
    return typed(values.ravel()) | {"shape": ",".join(map(str, values.shape))}


def draw_biases(d: Drawing, bins: Bins) -> None:
    """Trajectories: least, middle and largest bias over the layers of the run."""
    names = {
        "largest": bins.bias_TM5[..., -1].max(-1),
        "median": np.median(bins.bias_TM5[..., 2], axis=-1),
        "least": bins.bias_TM5[..., 0].min(-1),
    }
    lines = [d.at_steps(d.groups[0], name, bins.last_T.tolist(), x_T) for name, x_T in names.items()]
    d.figure(lines, title="Biases of all layers", unit="score")


def draw_stability(d: Drawing, run: Records) -> None:
    of_layer = run.columns.starting_with("balance/stability/")
    if not of_layer:
        return
    text = "The rule's step over the largest stable one; above 1 loads swing."
    group = d.groups[0]
    if len(of_layer) <= LINES:
        keys = {f"balance/stability/{m}": f"layer {m}" for m in of_layer}
        d.figure(
            d.columns(keys),
            title="Stability of layers",
            unit="of the largest step",
            text=text,
            from_zero=True,
        )
        return
    x_TM = np.array([group.column(f"balance/stability/{m}").mean_P for m in of_layer]).T
    steps_T = group.last_step_P.astype(int)
    nothing_M = np.full(x_TM.shape[1], np.nan)
    bins = Bins(steps_T, steps_T, nothing_M, nothing_M, nothing_M)
    by_layer(d, bins, x_TM, title="Stability of layers", unit="of the largest step", text=text)


def draw_alarms(d: Drawing) -> None:
    alarms = [(run, line) for group in d.groups for run in group.runs for line in run.alarms]
    several = sum(len(group.runs) for group in d.groups) > 1
    without_text = [
        run
        for group in d.groups
        for run in group.runs
        if not run.alarms and np.nansum(run.columns.get("guard/alarm"))
    ]
    sentences = [f"{run.name + ': ' if several else ''}{line.get('text')}" for run, line in alarms]
    sentences += [
        f"{run.name}: {int(np.nansum(run.columns.get('guard/alarm')))} alarms" for run in without_text
    ]
    if sentences:
        d.page.html("<h3>Alarms of the guard</h3>")
        d.page.notes(sentences)
