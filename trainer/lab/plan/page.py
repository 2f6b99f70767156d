"""What does a reader of a plan see? Memory by kind, a step in time, the layouts that were searched."""

from html import escape
from pathlib import Path
from typing import Any

from trainer.lab.page import Cell, Column, Page, series, typed
from trainer.lab.plan import table
from trainer.lab.plan.layout import GIB
from trainer.lab.plan.plan import Plan
from trainer.lab.plan.search import POLICIES, fits

MARGIN = {"l": 110, "r": 20, "t": 34, "b": 40}


def write_page(plan: Plan, path: Path, *, command: str) -> None:
    """Raises: OSError."""
    name, facts = plan.config.name, table.facts(plan)
    heading = f"{facts['tokens']} tokens on {facts['ranks']}: {facts['days']} days"
    page = Page(f"{name} · plan", heading=heading, above=f"triquetra · plan of {name}")
    page.facts(facts)
    page.notes([table.sentence(plan), *table.warnings(plan)])
    page.code(command)
    page.text(table.certainty(plan), dim=True)
    page.section("Spans", "The whole program, span by span.")
    show(page, table.spans(plan))
    page.section("Memory", "Of one rank at its peak, in the span that most tokens are seen in.")
    memory_figure(page, plan)
    show(page, table.memory(plan))
    page.text(f"A checkpoint takes {table.gib(table.host_bytes(plan))} of host memory on each node.")
    page.section("A step", "What runs beside each other takes as long as the longest of it.")
    step_figure(page, plan)
    show(page, table.timeline(plan))
    show(page, table.flop(plan))
    show(page, table.traffic(plan))
    if plan.search is not None:
        page.section("Layouts", table.fallen(plan))
        search_figure(page, plan)
        show(page, table.best(plan))
    page.write(path)


def show(page: Page, rows: table.Rows) -> None:
    head, body = rows
    columns = [Column(title, text=i == 0 or title in ("Bound by", "Command")) for i, title in enumerate(head)]
    page.table(columns, [[Cell(text, value=i) for text in row] for i, row in enumerate(body)])


def memory_figure(page: Page, plan: Plan) -> None:
    """One bar for each span, and the device's room."""
    spans = plan.spans
    kinds = {**spans[0].step.memory.kinds, "lost": 0.0}
    labels = [escape(span.name or "run") for span in spans]
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "y": labels,
            "x": typed(
                [(s.step.memory.lost if kind == "lost" else s.step.memory.kinds[kind]) / GIB for s in spans]
            ),
            "name": {"lost": "allocator, CUDA, NCCL"}.get(kind, kind),
            "marker": {"color": series(i)},
            "hovertemplate": "%{x:.1f} GiB",
        }
        for i, kind in enumerate(kinds)
    ]
    room = plan.hardware.memory.value
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": room, "x1": room}
    layout = {
        "barmode": "stack",
        "xaxis": {
            "title": {"text": f"GiB; the line is a {escape(plan.hardware.name)}"},
            "rangemode": "tozero",
        },
        "yaxis": {"autorange": "reversed"},
        "hovermode": "closest",
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "margin": {**MARGIN, "l": 150, "t": 60},
        "shapes": [{**line, "line": {"color": "var(--muted)", "width": 2, "dash": "dot"}}],
    }
    page.figure(traces, layout, title="Memory by kind", unit="GiB", height=150 + 34 * len(spans))


def step_figure(page: Page, plan: Plan) -> None:
    """One lane for each resource: what it does in one microbatch and the optimizer's step."""
    forward, _, last, optimizer = plan.main.step.phases
    phases = {"forward": forward, "last backward": last, "optimizer": optimizer}
    lanes = ("GPU", "NVLink", "NIC", "host")
    traces, starts = [], 0.0
    for i, (name, phase) in enumerate(phases.items()):
        busy = [phase.gpu, phase.nvlink, phase.nic, phase.host]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": list(lanes),
                "x": typed(busy),
                "base": [starts] * len(lanes),
                "name": name,
                "marker": {"color": series(i)},
                "hovertemplate": "%{y}: %{customdata:.3f} s",
                "customdata": busy,
            }
        )
        starts += phase.seconds
    layout = {
        "barmode": "overlay",
        "xaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed"},
        "hovermode": "closest",
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "margin": {**MARGIN, "t": 60},
    }
    repeats = plan.main.step.accumulation
    text = f"The last of {repeats} microbatches of a step; a lane that is full is what bounds its phase."
    page.figure(traces, layout, title="A step in time", unit="s", height=280, text=text)


def search_figure(page: Page, plan: Plan) -> None:
    """Memory against speed; what lies right of the line does not fit."""
    traces = []
    for i, policy in enumerate(POLICIES):
        steps = [step for step in plan.search.steps if step.layout.policy == policy]
        traces.append(
            {
                "type": "scattergl",
                "mode": "markers",
                "x": typed([step.memory.total / GIB for step in steps]),
                "y": typed([step.tokens_per_s / plan.layout.ranks for step in steps]),
                "text": [escape(" ".join(step.layout.overrides())) for step in steps],
                "name": f"checkpointing: {policy}",
                "marker": {
                    "color": series(i),
                    "size": 6,
                    "opacity": 0.7,
                },
                "hovertemplate": "%{text}<br>%{x:.0f} GiB, %{y:,.0f} tokens/s<extra></extra>",
            }
        )
    now, room = plan.main.step, plan.hardware.memory.value
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": [now.memory.total / GIB],
            "y": [now.tokens_per_s / plan.layout.ranks],
            "name": "this configuration" if fits(now, plan.hardware) else "this configuration, does not fit",
            "marker": {"symbol": "diamond", "size": 12, "color": series(5)},
            "hovertemplate": "%{x:.0f} GiB, %{y:,.0f} tokens/s",
        }
    )
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": room, "x1": room}
    layout = {
        "xaxis": {"title": {"text": "GiB of a rank"}, "range": [0, 2 * room]},
        "yaxis": {"title": {"text": "tokens/s of a GPU, at the most"}, "rangemode": "tozero"},
        "hovermode": "closest",
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "margin": {**MARGIN, "l": 70, "t": 60},
        "shapes": [{**line, "line": {"color": "var(--muted)", "width": 2, "dash": "dot"}}],
    }
    page.figure(traces, layout, title="Layouts", unit="memory against speed", height=420)
