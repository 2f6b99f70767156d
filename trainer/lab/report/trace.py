"""How does a router trace become the bins that a history has? For runs from before experts.jsonl."""

from pathlib import Path

import numpy as np

from trainer.history import QUANTILES, Bins

MAX_BINS = 240


def read_trace(path: Path) -> Bins:
    """Of a long trace as many steps as there are bins, evenly spaced: a step is 100 kB at 60 x 256.

    Raises: ValueError.
    """
    from trainer.balance.trace import Trace  # imports torch

    trace = Trace(path)
    kept = set(
        np.unique(np.linspace(0, trace.num_steps - 1, min(MAX_BINS, trace.num_steps)).astype(int)).tolist()
    )
    steps, load, bias, gain = list[int](), list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for step, stats in trace.steps(kept):
        steps.append(step)
        load.append(stats.load_ME.numpy())
        bias.append(np.quantile(stats.bias_ME.numpy(), QUANTILES, axis=1).T)
        gain.append(stats.gain_M.numpy())
    steps_T = np.array(steps)
    return Bins(steps_T, steps_T, *(np.array(x, np.float32) for x in (load, bias, gain)))
