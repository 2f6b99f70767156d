"""The short set of the fault drills; `make drills` runs all of them, with more trials each."""

import pytest

from tests.drills.every import DRILLS
from tests.drills.table import span

SHORT = [drill for drill in DRILLS.values() if drill.in_short_set]


@pytest.mark.parametrize(
    "drill", [pytest.param(of, marks=pytest.mark.timeout(of.limit_s), id=of.name) for of in SHORT]
)
def test_what_must_hold_holds(drill, tmp_path):
    drill.act(tmp_path, True)


def test_the_least_to_the_most_of_what_was_measured():
    assert [span([]), span([4, 4]), span([3, 0, 5]), span([1.25, 2.0], digits=1)] == [
        "",
        "4",
        "0 to 5",
        "1.2 to 2.0",
    ]
