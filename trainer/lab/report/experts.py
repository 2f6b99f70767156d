"""What did every expert of a run do? Loads in bins of steps, over the run's tail, and the worst layers.

Letters: T bins of steps, M MoE layers, E experts.
"""

from functools import cache
from pathlib import Path

import numpy as np

from trainer.history import Bins
from trainer.lab.report.read import Records
from trainer.lab.report.trace import read_trace

TAIL = 0.1  # of the steps: what "at the end" means, as for the verdict
COLLAPSED = 0.1  # [even shares] of an expert over the tail


@cache
def bins_by_path(path: Path, mtime: float) -> Bins | None:
    return read_trace(path)


def bins_of(run: Records) -> Bins | None:
    """Of the history that every run keeps; of the trace if there is no history."""
    if run.bins is not None:
        return run.bins
    name = run.settings("balance").get("trace")
    path = run.path / str(name or "router.trace")
    if not path.is_file():
        return None
    try:
        return bins_by_path(path, path.stat().st_mtime)
    except ValueError as error:
        if (sentence := f"{error}.") not in run.problems:
            run.problems.append(sentence)
        return None


def tail_of(run: Records) -> np.ndarray | None:
    """(M, E): mean load over the last tenth of the steps; None: unknown."""
    bins = bins_of(run)
    if bins is None:
        return None
    last = bins.last_T[-1]
    weight_T = np.clip(bins.last_T - np.maximum(bins.first_T - 1, (1 - TAIL) * last), 0, None)
    return np.average(bins.load_TME, axis=0, weights=weight_T)


def worst_layers(run: Records, *, at_most: int = 12) -> list[int]:
    """By the load of their busiest expert over the tail."""
    tail_ME = tail_of(run)
    return [] if tail_ME is None else np.argsort(-tail_ME.max(-1), kind="stable")[:at_most].tolist()
