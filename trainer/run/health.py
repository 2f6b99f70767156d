"""May this step be applied? Judged from the reduced loss and gradient norm, so all ranks decide alike, before
the weights move.

A step whose loss or gradient norm is not finite is skipped: weights, optimizer state and biases stay, its
data is passed over. With `spike`, so is one that lies far above the last applied steps: by more than `spike`
deviations from their median, where a deviation is 1.4826 times the median distance from it (that of a
Gaussian), and at least FLOOR of the median. Skipped steps are not among those that later ones are measured
against: one value that is not a number would spoil the measure for all that follow. After `most` skipped
steps in a row the run goes back to its newest checkpoint and passes over the data since, `rollbacks` times;
then it ends.
"""

import math

import torch
from torch import Tensor

LEAST = 32  # applied steps before spikes are judged
FLOOR = 0.02  # of the median: steps that are almost alike make no spike of a small change


class UnsoundError(FloatingPointError):
    """The run cannot go on as it is; the message says since when, and what to try."""


class Health:
    """spike [deviations], None: spikes are applied. most: skipped steps in a row. rollbacks: over the whole
    run.
    """

    def __init__(self, *, spike: float | None = None, most: int = 5, rollbacks: int = 0):
        if spike is not None and not spike > 0:
            raise ValueError(f"skip.spike={spike}: must be above 0, or null; 6 to 10 deviations are far")
        if most < 0 or rollbacks < 0:
            raise ValueError(f"skip.most={most}, skip.rollbacks={rollbacks}: must be 0 or more")
        self.spike, self.most, self.rollbacks = spike, most, rollbacks
        self.reason = ""  # of the last skipped step
        self.counts_3 = torch.zeros(3, dtype=torch.int64)  # skipped in a row, skipped in all, rolled back

    def skips(self, *, loss: float, grad_norm: float, applied_2W: Tensor) -> bool:
        """Judges and counts a step."""
        reason = self.judge(loss=loss, grad_norm=grad_norm, applied_2W=applied_2W)
        self.reason = reason or self.reason
        self.counts_3[0] = self.counts_3[0] + 1 if reason else 0
        self.counts_3[1] += reason is not None
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
        return {"counts_3": self.counts_3}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts_3.copy_(state["counts_3"])

    @property
    def in_row(self) -> int:
        return int(self.counts_3[0])

    @in_row.setter
    def in_row(self, number: int) -> None:
        self.counts_3[0] = number

    @property
    def total(self) -> int:
        return int(self.counts_3[1])

    @property
    def is_lost(self) -> bool:
        """More steps in a row were skipped than may be."""
        return self.in_row > self.most

    def roll_back(self) -> bool:
        """Whether the run may go back once more; counts it."""
        may = int(self.counts_3[2]) < self.rollbacks
        self.counts_3[2] += may
        return may
