"""A few dozen cases of tests/fuzz/files.py; thousands are for the hand."""

import pytest

from tests.fuzz.files import run_cases


@pytest.mark.slow
def test_whatever_lies_in_a_checkpoint_is_loaded_as_it_was_written_or_refused_in_one_line():
    outcomes = list(run_cases(100, seed=0))  # 0.4 s of CPU each
    assert [(outcome.number, outcome.what, outcome.problem) for outcome in outcomes if outcome.problem] == []
    kinds = {outcome.kind for outcome in outcomes}
    assert {
        "resume: good, code 0, step 2",
        "resume: damaged, code 0, step 1",
        "rewind: good, code 0",
    } <= kinds
    assert {"rewind: damaged, code 1", "export: damaged, code 1"} <= kinds
    assert "export: good, code 0" in kinds  # all ends that there are
