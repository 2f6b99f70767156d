"""What does a reader of a report see first, and what then? The verdict, six numbers, curves, the router,
evaluations, starts, and what was passed over.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.lab.page import HEATMAP, Cell, Column, Page, series
from trainer.lab.report.curves import Drawing
from trainer.lab.report.evaluations import draw_evaluations
from trainer.lab.report.plots import LOSS, RUN, Plot
from trainer.lab.report.read import Records, is_number
from trainer.lab.report.router import draw_router, heat_data
from trainer.lab.report.summary import SIGNS, compact, heading, state, step_seconds, tiles_of, verdict
from trainer.lab.report.thin import Group, differences, groups_of

SCRIPT = Path(__file__).with_name("report.js")


def write_report(runs: Sequence[Records], path: Path, *, command: str) -> None:
    """Raises: OSError."""
    groups = groups_of(runs)
    names = ", ".join(group.name for group in groups)
    page = Page(f"{names} · report", heading=heading(runs), above=f"triquetra · report of {names}")
    drawing = Drawing(page, groups)
    if len(runs) == 1:
        one(page, runs[0])
    else:
        several(page, groups)
    page.notes([sentence for run in runs for sentence in run.problems])
    page.code(command)
    draw_curves(drawing)
    draw_router(drawing)
    draw_evaluations(drawing)
    draw_starts(page, runs)
    draw_bad_documents(page, runs)
    data = {**drawing.data(), "noun": "Run", "config": {}, "runs": heat_data(groups)}
    script = "\n".join(file.read_text(encoding="utf-8") for file in (SCRIPT, HEATMAP))
    page.write(path, data=data, script=script)


# -- the verdict and the numbers --


def one(page: Page, run: Records) -> None:
    said = verdict(run)
    page.pills([Cell(SIGNS[said.tone], said.text, tone=said.tone)])
    page.tiles(tiles_of(run))
    page.facts(facts(run))


def facts(run: Records) -> dict[str, str]:
    model = run.settings("model")
    shape = ("num_layers", "dim", "num_experts", "top_k")
    layers, dim, experts, top_k = (model.get(key, "?") for key in shape)
    code = run.starts[-1].get("code") if run.starts else None
    return {
        "run": str(run.path),
        "state": state(run),
        "tokens": compact(run.tokens),
        "model": f"{layers} layers x {dim}, {experts} experts, top {top_k}",
        "balance": str(run.settings("balance").get("name", "?")),
        "seed": str(run.config.get("seed", "?")),
        "code": str(code or "?"),
    }


def several(page: Page, groups: Sequence[Group]) -> None:
    colours = [(group, run) for group in groups for run in group.runs]
    page.pills(
        [
            Cell(run.name, SIGNS[said.tone], colour=series(group.colour), tone=said.tone)
            for group, run in colours
            for said in [verdict(run)]
        ]
    )
    page.section("Summary", "Means over the last tenth of the steps of each run.")
    tiles = [tiles_of(run) for _, run in colours]
    columns = [Column("Run", text=True), Column("Verdict", text=True), Column("Step")]
    columns += [Column(name, explanation=cell.detail) for name, cell in tiles[0].items()]
    rows = []
    for (group, run), of_run in zip(colours, tiles, strict=True):
        said = verdict(run)
        first = [
            Cell(run.name, value=run.name, colour=series(group.colour)),
            Cell(said.text, value=said.text, tone=said.tone),
            Cell(f"{run.step:,}", "done" if run.is_done else f"of {run.last_step or '?'}", run.step),
        ]
        rows.append([*first, *(Cell(cell.text, value=cell.text) for cell in of_run.values())])
    page.table(columns, rows)
    draw_differences(page, groups)


def draw_differences(page: Page, groups: Sequence[Group]) -> None:
    rows = differences(groups)
    if not rows:
        page.text("The runs differ in their seeds alone.")
        return
    head = [Column("Setting", text=True), *(Column(group.name, text=True) for group in groups)]
    body = [
        [Cell(key, value=key), *(Cell(plain(x), value=plain(x)) for x in values)]
        for key, values in rows.items()
    ]
    page.section("What differs", "Settings that the runs do not have alike; name and seed apart.")
    page.table(head, body)


def plain(value: Any) -> str:
    return "–" if value is None else str(value)


# -- curves --


def draw_curves(d: Drawing) -> None:
    marks = "Grey bands are spans of the program, dotted lines restarts."
    d.page.section("Curves", f"{about_points(d.groups)} {marks}")
    d.page.html('<div class="controls" id="along"></div>')
    if len(d.groups) > 1:
        d.page.legend({f"group{g.colour}": (g.name, series(g.colour)) for g in d.groups})
    d.plot(LOSS)
    names = dict.fromkeys(name for g in d.groups for run in g.runs for name in run.columns.values)
    sources = {name: name.removeprefix("loss/") for name in names if name.startswith("loss/")}
    d.plot(Plot("Loss by source", sources, "nats per token", from_zero=False))
    d.plot(Plot("Learning rates", {name: name for name in names if re.fullmatch(r"lr(_\w+)?", name)}))
    for plot in RUN:
        d.plot(plot)
    waits = d.derived("whole step", step_seconds) + d.columns({"data/wait_s": "waiting for data"})
    d.figure(waits, title="Seconds of a step", unit="s", from_zero=True)
    draw_mixture(d)


def about_points(groups: Sequence[Group]) -> str:
    """How the lines were thinned: a reader should know what is not there."""
    steps = max(group.steps_per_point for group in groups)
    text = "Every step is drawn." if steps == 1 else f"Thinned: a point is the mean of up to {steps:,} steps."
    if any(len(group.runs) > 1 for group in groups):
        return f"{text} A line is the mean over seeds, its band goes from the lowest to the highest."
    return text if steps == 1 else f"{text} A band goes from the lowest to the highest of them."


def draw_mixture(d: Drawing) -> None:
    """What the program wants of each source, and what was delivered."""
    for group in d.groups:
        targets = {name for run in group.runs for name in run.columns.starting_with("data/targets/")}
        lines = []
        for name in sorted(targets):
            shares = [share_of(run, name) for run in group.runs]
            lines += [d.named(group, f"{name}", group.line(shares))]
            lines += [
                d.named(group, f"{name}, wanted", group.line([wanted(run, name) for run in group.runs]))
            ]
        d.figure(lines, title="Mixture, wanted and delivered", unit="share of the targets", from_zero=True)


def share_of(run: Records, name: str) -> np.ndarray:
    all_N = np.nansum(list(run.columns.starting_with("data/targets/").values()), axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(run.columns.get(f"data/targets/{name}")) / all_N


def wanted(run: Records, name: str) -> np.ndarray:
    """By the span in which each step begins; nan where it has no mixture."""
    begins_N = np.concatenate([[0], run.columns.get("tokens")[:-1]])
    wanted_N = np.full(len(begins_N), np.nan)
    for span in run.spans:
        weights = span.get("mixture")
        if isinstance(weights, dict) and all(map(is_number, weights.values())) and sum(weights.values()):
            is_inside = (begins_N >= span["start"]) & (begins_N < span["end"])
            wanted_N[is_inside] = weights.get(name, 0.0) / sum(weights.values())
    return wanted_N


# -- what happened --


def draw_starts(page: Page, runs: Sequence[Records]) -> None:
    events = [(run, line) for run in runs for line in [*run.starts, *run.roll_backs]]
    if not events:
        return
    page.section("Starts", "Each start of the run, the settings that it changed, and roll-backs.")
    named = [Column("Run", text=True)] if len(runs) > 1 else []
    head = [
        *named,
        Column("Step"),
        Column("What", text=True),
        Column("Changed", text=True),
        Column("Code", text=True),
    ]
    body = [[*([Cell(run.name)] if named else []), *start_row(line)] for run, line in events]
    page.table(head, body)


def start_row(line: dict[str, Any]) -> list[Cell]:
    step = line["step"]
    if line.get("rolled_back"):
        what = f"rolled back, {line.get('passed_over_steps')} steps of data passed over"
        return [Cell(str(step), value=step), Cell(what, tone="warn"), Cell("–"), Cell("–")]
    loaded = line.get("loaded") or line.get("init_from")
    what = f"from {loaded}" if loaded else "from the beginning"
    texts = [f"{key}: {old} → {new}" for key, (old, new) in line["changed"].items()]
    return [
        Cell(str(step), value=step),
        Cell(what),
        Cell("; ".join(texts) or "–"),
        Cell(str(line.get("code") or "–")),
    ]


def draw_bad_documents(page: Page, runs: Sequence[Records]) -> None:
    for run in (run for run in runs if run.num_bad_documents):
        shown = len(run.bad_documents)
        more = f" The first {shown} of them:" if run.num_bad_documents > shown else ""
        page.section(
            f"Bad documents{f' of {run.name}' * (len(runs) > 1)}",
            f"{run.num_bad_documents:,} were passed over.{more}",
        )
        page.code("\n".join(run.bad_documents))
