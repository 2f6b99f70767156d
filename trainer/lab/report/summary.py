"""What is said of a run in one line and in six numbers? For the page and for the terminal."""

import math
import time
from collections.abc import Sequence

import numpy as np

from trainer.lab.page import Cell, number
from trainer.lab.report.experts import COLLAPSED, TAIL, tail_of
from trainer.lab.report.read import Columns, Records

SIGNS = {"good": "✓", "bad": "✗", "warn": "–"}


def heading(runs: Sequence[Records]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs beside each other"
    return f"{runs[0].name}: {short(verdict(runs[0]).text)}"


def short(text: str) -> str:
    """Its first statement."""
    return text.split(" (")[0].split(", MaxVio")[0]


def verdict(run: Records) -> Cell:
    """The word of the run's end; of a run that has not ended, what its last tenth says so far."""
    if run.verdict is not None:
        tone = "warn" if not run.verdict.get("is_known") else "good" if run.verdict.get("ok") else "bad"
        return Cell(run.verdict["text"].removeprefix("balance: "), tone=tone)
    tail_ME = tail_of(run)
    if tail_ME is None:
        return Cell("no verdict yet", tone="warn")
    few, so_far = int((tail_ME < COLLAPSED).sum()), "" if run.is_done else " so far"
    if few:
        text = f"{few:,} of {tail_ME.size:,} experts have less than {COLLAPSED:.0%} of their share{so_far}"
        return Cell(text, tone="bad")
    return Cell(f"all {tail_ME.size:,} experts are alive{so_far}", tone="good")


def state(run: Records) -> str:
    of = f" of {run.last_step:,}" if run.last_step else ""
    return f"step {run.step:,}{of}, {'done' if run.is_done else f'last line {ago(written_ago_s(run))} ago'}"


def written_ago_s(run: Records) -> float:
    return max(0.0, time.time() - (run.path / "metrics.jsonl").stat().st_mtime)


def ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def tail(columns: Columns, name: str) -> float:
    """Mean over the last tenth of the steps; nan: there is none."""
    x_N = columns.get(name)[columns.steps_N > (1 - TAIL) * columns.steps_N[-1]]
    return float(np.nanmean(x_N)) if np.isfinite(x_N).any() else math.nan


def tiles_of(run: Records) -> dict[str, Cell]:
    c = run.columns
    evaluation = next((e for e in reversed(run.evaluations) if isinstance(e.get("loss"), float)), None)
    skipped = c.get("skipped_steps")
    lost = [int(skipped[np.isfinite(skipped)][-1]) if np.isfinite(skipped).any() else 0]
    lost += [max(0, len(run.starts) - 1), len(run.roll_backs)]
    max_vio, floor = tail(c, "balance/max_violation"), tail(c, "balance/floor")
    unit = "last tenth of the steps"
    return {
        "Loss": Cell(number(tail(c, "loss")), f"nats, {unit}"),
        "Validation loss": Cell(
            number(evaluation["loss"]), f"nats, {evaluation['evaluation']}, step {evaluation['step']:,}"
        )
        if evaluation
        else Cell("–", "no evaluation yet"),
        "Tokens per second": Cell(compact(tail(c, "tokens_per_s")), unit),
        "MFU": Cell(f"{tail(c, 'mfu'):.1%}" if math.isfinite(tail(c, "mfu")) else "–", unit),
        "MaxVio": Cell(number(max_vio), f"even shares; by chance alone {number(floor)}"),
        "Lost": Cell(
            " · ".join(map(str, lost)),
            "steps not applied · restarts · roll-backs",
            tone="warn" if lost[0] + lost[2] else "",
        ),
    }


def compact(value: float) -> str:
    """4.25M; a plain number below ten thousand."""
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K"))
    size, letter = next(((least, unit) for least, unit in units if value >= least), (1.0, ""))
    return number(value / (1e3 if letter == "K" else size)) + letter


def step_seconds(columns: Columns) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return columns.get("data/step_tokens") / columns.get("tokens_per_s")
