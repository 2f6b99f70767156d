"""May this step be applied? That is decided before the weights move, from the reduced loss and gradient norm:
all ranks decide alike.

A step whose loss or gradient norm is not finite is skipped: weights, optimizer state and biases stay as they
were, and the step's data is passed over. With `spike`, a step is also skipped if its loss or gradient norm
exceeds median + spike x sigma over the last applied steps, with sigma = max(1.4826 x MAD, FLOOR x median).
MAD is the median absolute deviation; 1.4826 x MAD is the standard deviation of a Gaussian. Skipped steps do
not enter the median: a single NaN would spoil it for all later steps. When more than `most` steps in a row
were skipped, the run goes back to its newest checkpoint and passes over the data that was read since. A run
may go back `rollbacks` times; then it ends.
"""

import math

import torch
from torch import Tensor

LEAST = 32  # applied steps before spikes are judged
FLOOR = 0.02  # of the median: steps that are almost alike make no spike of a small change


class UnsoundError(FloatingPointError):
    """The run cannot go on as it is; the message says since when, and what to try."""


class Health:
    """spike: [sigma]; None: spikes are applied. most: how many steps in a row may be skipped. rollbacks: how
    often the whole run may go back to a checkpoint.
    """

    def __init__(self, *, spike: float | None = None, most: int = 5, rollbacks: int = 0):
        if spike is not None and not spike > 0:
            raise ValueError(f"skip.spike={spike}: must be above 0, or null; try 6 to 10")
        if most < 0 or rollbacks < 0:
            raise ValueError(f"skip.most={most}, skip.rollbacks={rollbacks}: must be 0 or more")
        self.spike, self.most, self.rollbacks = spike, most, rollbacks
        self.reason = ""  # of the last skipped step
        self.in_row = self.total = self.rolled_back = 0  # skipped steps in a row and in all; roll-backs

    def skips(self, *, loss: float, grad_norm: float, applied_2W: Tensor) -> bool:
        """Judges and counts a step."""
        reason = self.judge(loss=loss, grad_norm=grad_norm, applied_2W=applied_2W)
        self.reason = reason or self.reason
        self.in_row = self.in_row + 1 if reason else 0
        self.total += reason is not None
        return reason is not None

    def judge(self, *, loss: float, grad_norm: float, applied_2W: Tensor) -> str | None:
        """Why this step is not to be applied; None: it is. applied_2W: loss and gradient norm of the last
        applied steps.
        """
        for name, value, applied_W in zip(
            ("loss", "gradient norm"), (loss, grad_norm), applied_2W, strict=True
        ):
            if not math.isfinite(value):
                return f"{name} {value}"
            if self.spike is not None and len(applied_W) >= LEAST:
                median = applied_W.median()
                deviation = max(1.4826 * (applied_W - median).abs().median(), FLOOR * median.abs())
                if value > median + self.spike * deviation:
                    return (
                        f"{name} {value:.4g}, {(value - median) / deviation:.1f} deviations above "
                        f"{median:.4g}"
                    )
        return None

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts_3": torch.tensor([self.in_row, self.total, self.rolled_back])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.in_row, self.total, self.rolled_back = state["counts_3"].tolist()

    @property
    def is_lost(self) -> bool:
        """Whether more steps in a row were skipped than allowed."""
        return self.in_row > self.most

    def roll_back(self) -> bool:
        """Whether the run may go back once more; counts it."""
        may = self.rolled_back < self.rollbacks
        self.rolled_back += may
        return may
