"""What could the model do, and where? Any evaluation is drawn by the shape of its result.

A float is a curve; `by_...` is a table, and its loss a curve for each entry; `experts` is the use of experts
of each domain; `needles`, a list of {length, depth, exact, total}, is bars by length and a heat map: depth
in %, `exact` the share of `total` samples; `answers`, a list of {prompt, answer}, is a table of all
evaluations.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from trainer.lab.page import Cell, Column, number, series, typed
from trainer.lab.report.curves import Drawing, Named
from trainer.lab.report.plots import EVEN
from trainer.lab.report.read import Records, is_number
from trainer.lab.report.router import matrix
from trainer.lab.report.thin import Group

UNITS = {
    "loss": "nats per token",
    "bits_per_byte": "bits",
    "perplexity": "exp(loss)",
    "accuracy": "share of the targets",
}
COUNTS = ("documents", "targets", "questions")
MAX_ROWS = 60  # of a table
MAX_LINES = 12  # of a figure
MAX_ASKED = 12  # evaluations whose answers are shown, the last ones
MAX_DOMAINS = 6  # drawn as heat maps
MAX_BARS = 5  # evaluations beside each other, behind the first one
OF_LENGTH = "exact_at_"  # numbers that stand beside each other in a figure of their own

Result = dict[str, Any]


def draw_evaluations(d: Drawing) -> None:
    names = dict.fromkeys(e["evaluation"] for g in d.groups for run in g.runs for e in run.evaluations)
    for name in names:
        of_run = [
            (g, run, [e for e in run.evaluations if e["evaluation"] == name])
            for g in d.groups
            for run in g.runs
        ]
        draw_evaluation(d, name, [(g, run, results) for g, run, results in of_run if results])


def draw_evaluation(d: Drawing, name: str, of_run: Sequence[tuple[Group, Records, list[Result]]]) -> None:
    last = of_run[0][2][-1]
    about = [f"{last[key]:,} {key}" for key in COUNTS if is_number(last.get(key))]
    text = f"{len(of_run[0][2])} times so far{'' if not about else ', on ' + ' with '.join(about)}."
    d.page.section(f"Evaluation: {name}", text)
    numbers = dict.fromkeys(
        key for _, _, results in of_run for e in results for key, x in e.items() if isinstance(x, float)
    )
    numbers.pop("seconds", None)
    numbers = [key for key in numbers if not key.startswith(OF_LENGTH)]
    for key in numbers:
        lines = [curve(d, group, key, results, key) for group, _, results in of_run]
        d.figure(lines, title=key.replace("_", " ").capitalize(), unit=UNITS.get(key, ""), markers=True)
    tables = dict.fromkeys(key for _, _, results in of_run for key in results[-1] if key.startswith("by_"))
    for draw in (draw_parts, draw_table):
        for key in tables:
            draw(d, key, of_run)
    for _, run, results in of_run:
        which = f" of {run.name}" if len(of_run) > 1 else ""
        if isinstance(experts := results[-1].get("experts"), Mapping):
            draw_use(d, experts, which, with_maps=len(of_run) == 1)
        draw_lengths(d, results, which)
        draw_needles(d, needles_of(results[-1]), which)
        draw_answers(d, results)


def curve(d: Drawing, group: Group, key: str, results: Sequence[Result], name: str) -> Named:
    points = [(int(e["step"]), float(e[key])) for e in results if is_number(e.get(key))]
    return d.at_steps(group, name, [step for step, _ in points], [x for _, x in points])


# -- by_source, by_position, ... --


def entries(value: Any) -> dict[str, Result]:
    """Of a table: by name, from a dict of dicts; by where it lies, from a list of them."""
    if isinstance(value, Mapping):
        return {str(name): dict(x) for name, x in value.items() if isinstance(x, Mapping)}
    if isinstance(value, list):
        rows = [x for x in value if isinstance(x, Mapping)]
        return {
            row_name(row): {k: x for k, x in row.items() if k not in ("from", "to", "name")} for row in rows
        }
    return {}


def row_name(row: Mapping[str, Any]) -> str:
    if "name" in row:
        return str(row["name"])
    where = [row[key] for key in ("from", "to") if key in row]
    return " – ".join(f"{x:,}" if is_number(x) else str(x) for x in dict.fromkeys(where)) or "–"


def draw_parts(d: Drawing, key: str, of_run: Sequence[tuple[Group, Records, list[Result]]]) -> None:
    """Of one run: the loss of each entry over the evaluations."""
    if len(of_run) > 1:
        return
    group, _, results = of_run[0]
    parts = [{"step": e["step"], "parts": entries(e.get(key))} for e in results]
    lines = [
        curve(d, group, "loss", [{"step": e["step"], **e["parts"].get(part, {})} for e in parts], part)
        for part in list(parts[-1]["parts"])[:MAX_LINES]
    ]
    title = f"Loss {key.replace('_', ' ')}"
    d.figure(lines, title=title, unit=UNITS["loss"], markers=True)


def draw_table(d: Drawing, key: str, of_run: Sequence[tuple[Group, Records, list[Result]]]) -> None:
    """The entries of each run's newest result."""
    rows = [
        (run, part, values)
        for _, run, results in of_run
        for part, values in entries(results[-1].get(key)).items()
    ]
    columns = dict.fromkeys(name for _, _, values in rows for name, x in values.items() if is_number(x))
    if not columns:
        return
    several = len(of_run) > 1
    head = [*([Column("Run", text=True)] if several else [])]
    head += [Column(key.replace("_", " ").capitalize(), text=True)]
    head += [Column(name.replace("_", " ")) for name in columns]
    body = []
    for i, (run, part, values) in enumerate(rows[:MAX_ROWS]):
        cells = [number_cell(values.get(name)) for name in columns]
        body.append([*([Cell(run.name, value=run.name)] if several else []), Cell(part, value=i), *cells])
    d.page.table(head, body)
    if len(rows) > MAX_ROWS:
        d.page.text(f"{len(rows) - MAX_ROWS} more rows are in evaluations.jsonl.", dim=True)


def number_cell(value: Any) -> Cell:
    return Cell(number(value), value=value) if is_number(value) else Cell("–")


# -- use of experts by domain --


def draw_use(d: Drawing, experts: Mapping[str, Any], which: str, *, with_maps: bool) -> None:
    load = {
        name: array for name, x in items_of(experts, "load") if (array := array_of(x, ndim=2)) is not None
    }
    if (special_M := array_of(experts.get("specialisation"), ndim=1)) is not None:
        draw_specialisation(d, special_M, which)
    if overlap := dict(items_of(experts, "overlap")):
        draw_overlap(d, overlap, which)
    if confidence := dict(items_of(experts, "confidence")):
        head = [Column("Domain", text=True)]
        head += [Column("Confidence", "share", "Of a token's gates, the largest one's share.")]
        head += [Column("Busiest", EVEN), Column("Least", EVEN)]
        d.page.table(head, [use_row(name, x, load.get(name)) for name, x in confidence.items()])
    for name, load_ME in list(load.items())[: MAX_DOMAINS * with_maps]:
        draw_domain(d, name, load_ME)


def items_of(experts: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    value = experts.get(key)
    return [(str(name), x) for name, x in value.items()] if isinstance(value, Mapping) else []


def array_of(value: Any, *, ndim: int) -> np.ndarray | None:
    """None if it is no array of numbers of so many dimensions."""
    try:
        array = np.array(value, dtype=float)
    except (TypeError, ValueError):
        return None
    return array if array.ndim == ndim and array.size else None


def draw_specialisation(d: Drawing, special_M: np.ndarray, which: str) -> None:
    bars = {"type": "bar", "x": list(range(len(special_M))), "y": typed(special_M)}
    look = {"marker": {"color": "var(--c0)"}, "hovertemplate": "layer %{x}: %{y:.3f}<extra></extra>"}
    layout = {
        "xaxis": {"title": {"text": "MoE layer"}, "type": "category"},
        "yaxis": {"rangemode": "tozero"},
        "hovermode": "closest",
    }
    text = "0: all domains use the experts alike; 1: no two share one."
    title = f"Specialisation of layers{which}"
    d.page.figure([bars | look], layout, title=title, unit="1", text=text, height=240, half=True)


def use_row(name: str, confidence: Any, load_ME: np.ndarray | None) -> list[Cell]:
    extremes = [None, None] if load_ME is None else [float(load_ME.max()), float(load_ME.min())]
    return [Cell(name, value=name), *map(number_cell, [confidence, *extremes])]


def draw_overlap(d: Drawing, overlap: Mapping[str, Any], which: str) -> None:
    """Of each pair of domains, the share of their choices that they have in common."""
    pairs = {tuple(str(key).split(" | ", 1)): x for key, x in overlap.items() if is_number(x)}
    names = list(dict.fromkeys(name for pair in pairs if len(pair) == 2 for name in pair))
    at = {name: i for i, name in enumerate(names)}
    values = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(values, 1.0)
    for (a, b), x in ((pair, x) for pair, x in pairs.items() if len(pair) == 2):
        values[at[a], at[b]] = values[at[b], at[a]] = x
    trace = heatmap(values, names, names) | {
        "zmin": 0,
        "zmax": 1,
        "hovertemplate": "%{y} and %{x}: %{z:.2f}<extra></extra>",
    }
    layout = {"hovermode": "closest", "yaxis": {"autorange": "reversed"}}
    text = "The share of their choices of experts that two domains have in common."
    d.page.figure(
        [trace], layout, title=f"Overlap of domains{which}", unit="1", text=text, height=240, half=True
    )


def heatmap(values: np.ndarray, x: Sequence[Any], y: Sequence[Any]) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": [escape(str(name)) for name in x],
        "y": [escape(str(name)) for name in y],
        "z": matrix(values),
        "xgap": 1,
        "ygap": 1,
        "colorscale": [[0, "var(--even)"], [0.5, "var(--under1)"], [1, "var(--under3)"]],
        "colorbar": {"thickness": 10, "outlinewidth": 0},
    }


def draw_domain(d: Drawing, name: str, load_ME: np.ndarray) -> None:
    low, high = np.log2(0.1), 3.0
    trace = {
        "type": "heatmap",
        "z": matrix(np.log2(np.clip(load_ME, 0.1, 8.0))),
        "zmin": low,
        "zmax": high,
        "customdata": None,
        "colorscale": scale(low, high),
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "tickvals": [low, -1, 0, 1, 2, 3],
            "ticktext": ["≤ 0.1", "0.5", "1", "2", "4", "≥ 8"],
        },
        "hovertemplate": "layer %{y}, expert %{x}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "expert"}},
        "yaxis": {"title": {"text": "MoE layer"}},
        "hovermode": "closest",
    }
    d.page.figure(
        [trace], layout, title=f"Use of experts: {name}", unit=f"{EVEN}, log scale", height=260, half=True
    )


def scale(low: float, high: float) -> list[list[Any]]:
    at = {
        "--starved": low,
        "--under2": -1.3,
        "--under1": -0.5,
        "--even": 0.0,
        "--over1": 0.5,
        "--over2": 1.0,
        "--over3": high,
    }
    return [[(x - low) / (high - low), f"var({name})"] for name, x in at.items()]


# -- needles --


def needles_of(result: Result) -> list[Mapping[str, Any]]:
    rows = result.get("needles")
    keys = ("length", "depth", "exact", "total")
    is_row = lambda n: isinstance(n, Mapping) and all(is_number(n.get(key)) for key in keys)  # noqa: E731
    return [n for n in rows if is_row(n)] if isinstance(rows, list) else []


def draw_lengths(d: Drawing, results: Sequence[Result], which: str) -> None:
    """What was found in contexts of each length, evaluation by evaluation: the first, and the last ones."""
    asked = [(e["step"], needles_of(e)) for e in results if needles_of(e)]
    asked = [*asked[:1], *asked[1:][-MAX_BARS:]]
    bars = []
    for i, (step, needles) in enumerate(asked):
        lengths = sorted({n["length"] for n in needles})
        shares = [np.mean([n["exact"] for n in needles if n["length"] == length]) for length in lengths]
        bar = {
            "x": [number(x) for x in lengths],
            "y": typed(np.array(shares)),
            "name": f"step {number(step)}",
        }
        look = {"marker": {"color": series(i)}, "hovertemplate": "%{x} tokens: %{y:.0%}<extra></extra>"}
        bars.append({"type": "bar"} | bar | look)
    if len({x for bar in bars for x in bar["x"]}) < 2:
        return
    axes = {
        "xaxis": {"title": {"text": "length of the context, tokens"}, "type": "category"},
        "yaxis": {"range": [0, 1], "tickformat": ".0%"},
    }
    d.page.figure(
        bars,
        {**axes, "hovermode": "closest", "showlegend": len(bars) > 1},
        title=f"Needles by length{which}",
        unit="share found",
        text="How often a needle was given back exactly, at all depths together.",
        height=320,
    )


def draw_needles(d: Drawing, rows: Sequence[Mapping[str, Any]], which: str) -> None:
    """How often what was hidden at a depth of a context of some length was given back exactly."""
    if not rows:
        return
    lengths, depths = (sorted({n[key] for n in rows}) for key in ("length", "depth"))
    share = np.full((len(depths), len(lengths)), np.nan)
    for n in rows:
        share[depths.index(n["depth"]), lengths.index(n["length"])] = n["exact"]
    y = [f"{depth:g} %" for depth in depths]
    trace = heatmap(share, [number(x) for x in lengths], y)
    trace |= {"zmin": 0, "zmax": 1, "hovertemplate": "%{x} tokens, at %{y}: %{z:.0%}<extra></extra>"}
    axes = {
        "xaxis": {"title": {"text": "length of the context, tokens"}, "type": "category"},
        "yaxis": {"title": {"text": "depth"}, "type": "category", "autorange": "reversed"},
    }
    d.page.figure(
        [trace],
        {**axes, "hovermode": "closest"},
        title=f"Needles{which}",
        unit="share found",
        text="How often a needle at a depth of the context was given back exactly.",
        height=320,
    )


# -- answers --


def draw_answers(d: Drawing, results: Sequence[Result]) -> None:
    """What was answered to each prompt, evaluation by evaluation."""
    rows = [
        (str(row["prompt"]), e["step"], str(row["answer"]))
        for e in results[-MAX_ASKED:]
        if isinstance(e.get("answers"), list)
        for row in e["answers"]
        if isinstance(row, Mapping) and {"prompt", "answer"} <= set(row)
    ]
    if not rows:
        return
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in rows))
    rows = sorted(rows, key=lambda row: prompts.index(row[0]))[:MAX_ROWS]
    columns = [
        Column("prompt", explanation="What the user says.", text=True),
        Column("step", explanation="After which the model was asked."),
        Column("answer", explanation="The likeliest token, again and again.", text=True),
    ]
    d.page.table(columns, [[Cell(p), Cell(number(step), value=step), Cell(a)] for p, step, a in rows])
