"""What does a watcher see of a run? A frame: how far it is, its numbers and their course, bad layers."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from trainer.lab.page import number
from trainer.lab.report.experts import bins_of, tail_of, worst_layers
from trainer.lab.report.read import Records
from trainer.lab.report.summary import (
    SIGNS,
    ago,
    compact,
    step_seconds,
    tail,
    tiles_of,
    verdict,
    written_ago_s,
)

STYLES = {"good": "green", "bad": "bold red", "warn": "yellow", "": ""}
LATE = 10  # times the usual length of a step: then the run may be dead
LAYERS, ALARMS = 5, 3  # that are shown


class Letters(NamedTuple):
    """What a terminal can show."""

    blocks: str = " ▁▂▃▄▅▆▇█"
    full: str = "█"
    empty: str = "░"
    dot: str = "·"

    @classmethod
    def of(cls, encoding: str | None) -> "Letters":
        return cls() if "utf" in (encoding or "").lower() else cls(" .:-=+*#@", "#", ".", "-")


def sparkline(values: np.ndarray, letters: Letters, *, width: int) -> str:
    """The course of a number in `width` letters: means of stretches, from the least to the largest."""
    edges = np.linspace(0, len(values), min(width, max(1, len(values))) + 1).astype(int)
    parts = [values[a:b] for a, b in pairwise(edges)]
    means = np.array([np.nanmean(part) if np.isfinite(part).any() else np.nan for part in parts])
    if not np.isfinite(means).any():
        return ""
    low, high = np.nanmin(means), np.nanmax(means)
    most = len(letters.blocks) - 1
    share = (means - low) / (high - low) if high > low else np.where(np.isnan(means), np.nan, 0.5)
    return "".join(letters.blocks[0 if math.isnan(x) else 1 + round(x * (most - 1))] for x in share)


def frame(run: Records, letters: Letters, *, width: int) -> Group:
    parts: list[Any] = [headline(run, letters, width=width), numbers_of(run, letters, width=width)]
    parts += [lost(run, letters), said_of(run, letters)]
    if layers := worst(run, letters, width=width):
        parts.append(layers)
    parts += [Text(f"alarm: {line.get('text')}", style=STYLES["warn"]) for line in run.alarms[-ALARMS:]]
    return Group(*parts)


def headline(run: Records, letters: Letters, *, width: int) -> Text:
    last = run.last_step
    text = Text(f"{run.name}  ", style="bold", no_wrap=True, overflow="crop")
    if last:
        share, length = min(1.0, run.step / max(1, last)), max(10, min(30, width - 60))
        done = round(share * length)
        text.append(letters.full * done + letters.empty * (length - done) + f" {share:.0%}  ", style="none")
    text.append(
        f"step {run.step:,}{f' of {last:,}' if last else ''}, {compact(run.tokens)} tokens", style="none"
    )
    if last and not run.is_done:
        step_s = usual_step_s(run)
        late = written_ago_s(run) > max(60, LATE * step_s)
        if math.isfinite(step_s):
            text.append(f", {ago((last - run.step) * step_s)} left", style="none")
        style = STYLES["warn"] if late else "none"
        text.append(f", last line {ago(written_ago_s(run))} ago", style=style)
    return text


def usual_step_s(run: Records) -> float:
    seconds = step_seconds(run.columns)[-100:]
    return float(np.median(seconds[np.isfinite(seconds)])) if np.isfinite(seconds).any() else math.nan


def numbers_of(run: Records, letters: Letters, *, width: int) -> Table:
    c = run.columns
    floor = tail(c, "balance/floor")
    rows = [
        ("loss", "loss", "nats", number),
        ("gradient norm", "grad_norm", "", number),
        ("tokens/s", "tokens_per_s", "", compact),
        ("MFU", "mfu", "", lambda x: f"{x:.1%}"),
        ("MaxVio", "balance/max_violation", f"by chance {number(floor)}", number),
        ("least load", "balance/min_load", "even shares", number),
        ("wait for data", "data/wait_s", "s", number),
        ("memory", "memory_gib", "GiB", number),
    ]
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "left", "left"):
        table.add_column(justify=justify, no_wrap=True)
    for title, key, unit, shown in rows:
        x_N = c.get(key)
        if np.isfinite(x_N).any():
            last = float(x_N[np.isfinite(x_N)][-1])
            line = sparkline(x_N, letters, width=max(8, min(60, width - 48)))
            table.add_row(title, shown(last), Text(line, style="cyan"), Text(unit, style="dim"))
    for name in dict.fromkeys(e["evaluation"] for e in run.evaluations):
        results = [e for e in run.evaluations if e["evaluation"] == name]
        add_evaluation(table, name, results, letters, width=width)
    return table


def add_evaluation(
    table: Table, name: str, results: Sequence[dict[str, Any]], letters: Letters, *, width: int
) -> None:
    """Its loss, or the first number that it has."""
    keys = [key for key, x in results[-1].items() if isinstance(x, float) and key != "seconds"]
    if not keys:
        return
    key = "loss" if "loss" in keys else keys[0]
    values = np.array([e[key] if isinstance(e.get(key), float) else math.nan for e in results])
    line = sparkline(values, letters, width=max(8, min(60, width - 48)))
    unit = f"{key.replace('_', ' ')} at step {results[-1]['step']:,}"
    table.add_row(name, number(values[-1]), Text(line, style="cyan"), Text(unit, style="dim"))


def lost(run: Records, letters: Letters) -> Text:
    cell = tiles_of(run)["Lost"]
    counts, words = cell.text.split(" · "), cell.detail.split(" · ")
    text = f" {letters.dot} ".join(f"{n} {word}" for n, word in zip(counts, words, strict=True))
    return Text(text, style=STYLES[cell.tone])


def said_of(run: Records, letters: Letters) -> Text:
    said = verdict(run)
    sign = SIGNS[said.tone] if letters == Letters() else {"good": "+", "bad": "X", "warn": "-"}[said.tone]
    return Text(f"{sign} {said.text}", style=STYLES[said.tone])


def worst(run: Records, letters: Letters, *, width: int) -> Table | None:
    layers = worst_layers(run, at_most=LAYERS)
    if not layers:
        return None
    bins, tail_ME = bins_of(run), tail_of(run)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("worst layers", "MaxVio", "least load", "of expert"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("MaxVio so far", no_wrap=True)
    for m in layers:
        load_E = tail_ME[m]
        line = sparkline(bins.load_TME[:, m].max(-1), letters, width=max(8, min(60, width - 52)))
        values = [number(float(load_E.max() - 1)), number(float(load_E.min())), str(load_E.argmin())]
        table.add_row(str(m), *values, Text(line, style="cyan"))
    return table


def one_line(run: Records) -> str:
    """For a terminal that cannot be drawn over."""
    c = run.columns
    parts = [f"{run.name}: step {run.step:,}" + (f"/{run.last_step:,}" if run.last_step else "")]
    keys = {"loss": "loss", "MaxVio": "balance/max_violation", "least load": "balance/min_load"}
    parts += [f"{name} {number(float(c.get(key)[-1]))}" for name, key in keys.items()]
    parts.append(f"{compact(float(c.get('tokens_per_s')[-1]))} tokens/s")
    return "  ".join(parts)
