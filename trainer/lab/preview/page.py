"""What does a reader of a preview see? Learning rates, batch, length and whatever else changes, over tokens;
the table.
"""

from collections.abc import Callable
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from trainer.lab.page import Cell, Column, Page, series, typed, unit_of
from trainer.lab.preview.table import SHOWN, Preview, Stretch, table, totals

POINTS = 257  # of a line within a span
LETTERS = 60  # of labels that fit side by side
UNITS = {
    "Tokens": "seen, from - to",
    "Batch": "sequences x tokens",
    "Accumulation": "microbatches",
    "Else": "new in this span",
}

Value = Callable[[Stretch, float], float | None]  # at a position in a stretch


def write_page(preview: Preview, path: Path, *, command: str) -> None:
    """Raises: OSError."""
    total, name = totals(preview), preview.config.name
    days = f", {total['days']} days" if "days" in total else ""
    heading = f"{total['tokens']} tokens in {total['steps']} steps{days}"
    page = Page(f"{name} · preview", heading=heading, above=f"triquetra · preview of {name}")
    page.facts(total)
    page.code(command)
    page.section(
        "Program", "Over the tokens seen. The bands are spans; drag to zoom, double click to see all."
    )
    rates = {key: lambda s, at, peak=peak: peak * s.span.lr.at(at) for key, peak in preview.peaks.items()}
    page.legend({key: (key, series(i)) for i, key in enumerate(rates)})
    _figure(page, preview, rates, title="Learning rates", labels=True)
    size, letter = unit_of(max(s.span.now.tokens for s in preview.stretches))
    batch = {"title": "Global batch"}
    _figure(
        page,
        preview,
        {"batch": lambda s, at: s.span.now.tokens / size},
        **batch,
        unit=f"{letter} tokens".strip(),
    )
    _figure(
        page, preview, {"batch": lambda s, at: s.span.now.global_batch}, **batch, unit="sequences", ticks=",d"
    )
    _figure(
        page,
        preview,
        {"length": lambda s, at: s.span.now.seq_len},
        title="Sequence length",
        unit="tokens",
        ticks=",d",
    )
    others: dict[str, Value] = {
        key: lambda s, at, key=key: getattr(s.span.now, key) for key in SHOWN if key != "mixture"
    }
    others["bias_rate"] = lambda s, at: s.span.bias_rate.at(at)
    for key, value in others.items():
        if len({value(s, at) for s, at in _positions(preview)}) > 1:
            _figure(
                page, preview, {key: value}, title=key, ticks=",d" if key in ("buffer", "micro_batch") else ""
            )
    if sources := dict.fromkeys(chain.from_iterable(s.span.now.mixture or () for s in preview.stretches)):
        weights = {
            name: lambda s, at, name=name: s.span.now.mixture and s.span.now.mixture.get(name, 0.0)
            for name in sources
        }
        _figure(page, preview, weights, title="mixture", unit="weights of the sources")
    page.section("Spans")
    head, rows = table(preview)
    page.table(
        [Column(title, UNITS.get(title, ""), text=title in ("Span", "Else")) for title in head],
        [[Cell(text, value=i) for text in row] for i, row in enumerate(rows)],
    )
    page.write(path)


def _positions(preview: Preview) -> list[tuple[Stretch, float]]:
    """Both ends of each span are among them, so that what jumps is drawn as a jump."""
    return [(s, float(at)) for s in preview.stretches for at in np.linspace(s.start, s.end, POINTS)]


def _figure(
    page: Page,
    preview: Preview,
    lines: dict[str, Value],
    *,
    title: str,
    unit: str = "",
    ticks: str = "",
    labels: bool = False,
) -> None:
    end = preview.stretches[-1].end
    size, letter = unit_of(end)
    positions, traces = _positions(preview), []
    x = typed([at / size for _, at in positions])
    spans = [escape(s.span.name) for s, _ in positions]
    for i, (name, value) in enumerate(lines.items()):
        template = "%{y:.3~g} · %{text}" if i == 0 and spans[0] else "%{y:.3~g}"
        traces.append(
            {
                "x": x,
                "y": typed([value(s, at) for s, at in positions]),
                "text": spans,
                "name": escape(name),
                "mode": "lines",
                "line": {"color": series(i), "width": 2, "simplify": False},
                "hovertemplate": template,
                **({"legendgroup": name} if labels else {}),
            }
        )
    of_x = {
        "title": {"text": f"tokens seen{f' [{letter}]' if letter else ''}"},
        "range": [0, end / size],
        "unifiedhovertitle": {"text": f"%{{x:.5~g}}{letter} tokens"},
    }
    margin = {"l": 48, "r": 20, "t": 34, "b": 40}  # on top there is room for plotly's buttons
    of_y = {"rangemode": "tozero", "exponentformat": "e", "tickformat": ticks}
    legend = {"orientation": "h", "y": 1, "yanchor": "bottom"}
    layout: dict[str, Any] = {
        "xaxis": of_x,
        "yaxis": of_y,
        "margin": margin,
        "shapes": _bands(preview, size),
        "showlegend": len(lines) > 1 and not labels,
        "legend": legend,
    }
    if labels:
        names, num_rows = _labels(preview)
        layout |= {"annotations": names, "margin": margin | {"t": 34 + 15 * num_rows}}
    page.figure(
        traces, layout, title=title, unit=unit, height=380 if labels else 220, half=not labels, link="tokens"
    )


def _bands(preview: Preview, size: float) -> list[dict[str, Any]]:
    """Every second span is shaded."""
    band = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "layer": "below", "line": {"width": 0}}
    return [
        {**band, "x0": s.start / size, "x1": s.end / size, "fillcolor": "var(--muted) 0.12"}
        for s in preview.stretches[1::2]
    ]


def _labels(preview: Preview) -> tuple[list[dict[str, Any]], int]:
    """The spans' names above where they begin, in as many rows as it takes."""
    end, size = preview.stretches[-1].end, unit_of(preview.stretches[-1].end)[0]
    labels, rows = [], list[float]()  # rows: where the last label of each ends, as a share of the width
    for s in preview.stretches:
        width = (len(s.span.name) + 1) / LETTERS
        # one that does not fit ends at the right edge
        left, fits = min(s.start / end, 1 - width), s.start / end <= 1 - width
        row = next((row for row, used in enumerate(rows) if used <= left), len(rows))
        rows[row : row + 1] = [left + width]
        where = {"x": s.start / size, "xanchor": "left"} if fits else {"x": end / size, "xanchor": "right"}
        labels.append(
            {
                **where,
                "text": escape(s.span.name),
                "yref": "paper",
                "y": 1,
                "yanchor": "bottom",
                "yshift": 15 * row,
                "showarrow": False,
            }
        )
    return labels, len(rows)
