"""A few dozen cases of tests/fuzz/files.py; thousands are for the hand."""

from tests.fuzz.files import run_cases

CASES = 100  # 0.4 s of CPU each


def test_whatever_lies_in_a_checkpoint_is_loaded_as_it_was_written_or_refused_in_one_line():
    outcomes = list(run_cases(CASES, seed=0))
    assert [(outcome.number, outcome.what, outcome.problem) for outcome in outcomes if outcome.problem] == []
    kinds = {outcome.kind for outcome in outcomes}  # the cases reach all ends that there are
    assert {
        "resume: good, code 0, step 2",
        "resume: damaged, code 0, step 1",
        "export: good, code 0",
    } <= kinds
    assert {"export: damaged, code 1", "rewind: damaged, code 1", "rewind: good, code 0"} <= kinds
