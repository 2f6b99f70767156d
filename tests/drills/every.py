"""All drills, in the order of the table."""

from tests.drills import damages, disks, kills, stalls, starts, steps, stops, supplies  # noqa: F401  # they register
from tests.drills.table import DRILLS

__all__ = ["DRILLS"]
