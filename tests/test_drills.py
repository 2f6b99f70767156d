"""The short set of the fault drills; `make drills` runs all of them, with more trials each."""

import pytest

from tests.drills.every import DRILLS
from tests.drills.table import Drill, span

SHORT = [drill for drill in DRILLS.values() if drill.in_short_set]
# what no other test comes near: processes that are killed, told, stuck, or in each other's way
TIERS = {
    "signal_to_one_rank": pytest.mark.slow,
    "ranks_disagree": (),
    "the_data_cannot_be_read": pytest.mark.slow,
    "two_runs_in_one_directory": pytest.mark.slow,
}


def marked(drill: Drill):
    return pytest.param(drill, id=drill.name, marks=TIERS.get(drill.name, pytest.mark.rare))


@pytest.mark.parametrize("drill", [marked(drill) for drill in SHORT])
def test_what_must_hold_holds(drill, tmp_path):
    drill.act(tmp_path, True)


def test_the_least_to_the_most_of_what_was_measured():
    assert [span([]), span([4, 4]), span([3, 0, 5]), span([1.25, 2.0], digits=1)] == [
        "",
        "4",
        "0 to 5",
        "1.2 to 2.0",
    ]
