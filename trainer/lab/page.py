"""How is a result shown as one HTML file that needs no network? The frame: facts, notes, tables, plotly
figures.

    page = Page("Balance simulation")
    page.section("Curves")
    page.figure([{"x": typed(steps), "y": typed(loss), "line": {"color": series(0)}}], title="Loss",
    unit="nats") page.write(Path("page.html"))

Figures are plotly's plain dicts. A string "var(--c3)" in them is a colour of page.html's style sheet, where
the light and the dark theme are; "var(--c3) 0.2" is the same at opacity 0.2. All text is escaped here; only
`html` takes markup.
"""

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TEMPLATE = Path(__file__).with_name("page.html")
HEATMAP = Path(__file__).with_name("heatmap.js")  # for `script` of `write`: layer x expert x step
NUM_COLOURS = 12
MAX_NOTES = 6  # the others are folded away


class Column(NamedTuple):
    title: str
    unit: str = ""
    explanation: str = ""
    text: bool = False  # set left


class Cell(NamedTuple):
    text: str
    detail: str = ""  # after it, small
    value: float | str | None = None  # to sort by; None comes last
    best: bool = False
    colour: str = ""  # of a dot before it
    tone: str = ""  # good | bad | warn


def series(index: int) -> str:
    """Colour of the index-th thing compared, the same in all figures. There are 12; then they repeat."""
    return f"var(--c{index % NUM_COLOURS})"


def typed(values: Sequence[float | None] | np.ndarray) -> dict[str, str]:
    """Numbers as plotly takes them packed: float32, little-endian, base64. None is a gap."""
    packed = np.asarray(values, dtype=np.float64).astype("<f4").tobytes()
    return {"dtype": "f4", "bdata": base64.b64encode(packed).decode()}


def number(value: float | None) -> str:
    """Three digits, as a reader wants them: 0.0421, 1.02, 350, 9.7e-5."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 1e5:
        digits = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
        return re.sub(r"\.0+$", "", digits)
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), f"{value:.1e}")


def unit_of(count: float) -> tuple[float, str]:
    """(1e9, "B") of 2.5e9: what a count is divided by, so that few digits say it."""
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
    return next((unit for unit in units if float(f"{count:.4g}") >= unit[0]), (1, ""))


class Page:
    """Parts are added from top to bottom, in the order of the calls."""

    def __init__(self, title: str, *, heading: str = "", above: str = ""):
        self.title = title
        self.parts = [f'<p class="eyebrow">{escape(above)}</p>', f"<h1>{escape(heading or title)}</h1>"]
        self.figures: dict[str, dict[str, Any]] = {}
        self.in_section = False

    def html(self, markup: str) -> None:
        """Markup as it is: the caller escapes what is not its own."""
        self.parts.append(markup)

    def text(self, sentence: str, *, dim: bool = False) -> None:
        self.html(f"<p{' class=dim' if dim else ''}>{escape(sentence)}</p>")

    def section(self, title: str, text: str = "") -> None:
        """Opens one and closes the one before. In a section, cards and halves of cards stand in a grid."""
        self.html(("</section>" if self.in_section else "") + "<section>")
        self.html(f"<div><h2>{escape(title)}</h2>" + (f"<p>{escape(text)}</p>" if text else "") + "</div>")
        self.in_section = True

    def facts(self, values: Mapping[str, Any]) -> None:
        """One line of names and values."""
        items = (
            f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
            for name, value in values.items()
        )
        self.html(f'<dl class="facts">{"".join(items)}</dl>')

    def pills(self, cells: Sequence[Cell]) -> None:
        """Who passed and who did not, at a glance."""
        items = (
            f'<li>{_dot(c.colour)}{escape(c.text)} <span class="{c.tone}">{escape(c.detail)}</span></li>'
            for c in cells
        )
        self.html(f'<ul class="pills">{"".join(items)}</ul>')

    def tiles(self, tiles: Mapping[str, Cell]) -> None:
        """A few large numbers with a word below each: what a reader should see if there is time for nothing
        else.
        """
        items = (
            f'<div class="card"><dt>{escape(name)}</dt><dd class="{cell.tone}">{escape(cell.text)}</dd>'
            f"<dd><small>{escape(cell.detail)}</small></dd></div>"
            for name, cell in tiles.items()
        )
        self.html(f'<dl class="tiles">{"".join(items)}</dl>')

    def notes(self, sentences: Sequence[str], *, bad: bool = False) -> None:
        items = [f"<li>{escape(sentence)}</li>" for sentence in sentences]
        first, others = "".join(items[:MAX_NOTES]), "".join(items[MAX_NOTES:])
        if others:
            first += (
                f"<li><details><summary>and {len(items) - MAX_NOTES} "
                f"more</summary><ul>{others}</ul></details></li>"
            )
        if first:
            self.html(f'<ul class="notes{" bad" if bad else ""}">{first}</ul>')

    def code(self, text: str) -> None:
        self.html(f"<pre>{escape(text)}</pre>")

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
        """A click on a head sorts. The explanations are the heads' tooltips; `terms` puts them below."""
        head = "".join(
            f'<th scope="col"{" class=text" if c.text else ""} title="{escape(c.explanation)}">'
            f"<button>{escape(c.title)}</button>"
            f"{f'<small>{escape(c.unit)}</small>' if c.unit else ''}</th>"
            for c in columns
        )
        body = "".join(f"<tr>{''.join(map(_td, row, columns))}</tr>" for row in rows)
        self.html(
            '<div class="card '
            f'scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def terms(self, summary: str, explanations: Mapping[str, str]) -> None:
        items = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in explanations.items()
        )
        self.html(f'<details><summary>{escape(summary)}</summary><dl class="terms">{items}</dl></details>')

    def legend(self, names: Mapping[str, tuple[str, str]]) -> None:
        """Group -> (name, colour). A click hides the traces whose `legendgroup` it is, in all figures."""
        tip = "Click: hide or show. Double click: only this one, or all again."
        chips = (
            f'<button class="chip" aria-pressed="true" data-group="{escape(group)}" title="{tip}">'
            f"{_dot(colour)}{escape(name)}</button>"
            for group, (name, colour) in names.items()
        )
        self.html(f'<div class="legend">{"".join(chips)}</div>')

    def figure(
        self,
        data: Sequence[Mapping[str, Any]],
        layout: Mapping[str, Any] | None = None,
        *,
        title: str,
        unit: str = "",
        text: str = "",
        height: int = 300,
        half: bool = False,
        link: str = "",
        name: str = "",
    ) -> None:
        """`half`: two beside each other where there is room. `link`: figures with the same one zoom along x
        together.
        """
        name = name or f"figure{len(self.figures)}"
        self.figures[name] = {"data": data, "layout": {"height": height, **(layout or {})}, "link": link}
        self.html(
            f'<div class="card figure{" half" if half else ""}"><h3>{escape(title)}'
            f"{f' <small>[{escape(unit)}]</small>' if unit else ''}</h3><p>{escape(text)}</p>"
            f'<div id="{escape(name)}" style="height:{height}px"></div></div>'
        )

    def save_button(self, file_name: str) -> None:
        """Saves `data` of `write` as the file it was."""
        self.html(
            f'<p><button class="save" data-name="{escape(file_name)}">Save {escape(file_name)}</button></p>'
        )

    def write(self, path: Path, *, data: Any = None, script: str = "") -> None:
        """`data` is in the page as `page.data` for its own `script`. Raises: ValueError for numbers that JSON
        has not.
        """
        from plotly.offline import get_plotlyjs

        slots = {
            "title": escape(self.title),
            "body": "\n".join([*self.parts, "</section>" if self.in_section else ""]),
            "figures": _json(self.figures),
            "data": _json(data),
            "plotly": get_plotlyjs(),
            "script": script,
        }
        html = re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], TEMPLATE.read_text(encoding="utf-8"))
        path.write_text(html, encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in. Raises: ValueError."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise ValueError(f"the page's data: {error}; write null for a number that is not finite") from None
    return text.replace("<", r"\u003c")


def _dot(colour: str) -> str:
    return f'<i class="dot" style="background:{escape(colour)}"></i>' if colour else ""


def _td(cell: Cell, column: Column) -> str:
    classes = " ".join(filter(None, ["text" if column.text else "", "best" if cell.best else "", cell.tone]))
    sort = "" if cell.value is None else str(cell.value)
    detail = f"<small>{escape(cell.detail)}</small>" if cell.detail else ""
    return (
        f'<td class="{classes}" '
        f'data-sort="{escape(sort)}">{_dot(cell.colour)}{escape(cell.text)}{detail}</td>'
    )
