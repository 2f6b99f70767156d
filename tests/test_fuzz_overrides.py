"""Overrides drawn at random end in a run or in one line; and the harness that says so sees what does not."""

import os
import signal
import sys

import pytest

from tests.fuzz import cases_of
from tests.fuzz import overrides as fuzz
from trainer import train
from trainer.ranks import stop

PARTS, CASES = 4, 50  # parts run side by side; 0.3 s of CPU for each case


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_overrides_drawn_at_random_end_in_a_run_or_in_one_line(part):
    outcomes = list(fuzz.run_cases(CASES, 0, first=part * CASES))
    assert [fuzz.report(outcome, 0) for outcome in outcomes if outcome.problem] == []
    assert len({outcome.kind for outcome in outcomes}) > 1  # neither all refused nor all trained


def test_a_case_is_a_function_of_the_seed_and_its_number():
    keys = ["steps", "model.dim"]
    cases = [fuzz.draw(3, number, keys) for number in range(50)]
    assert cases == [fuzz.draw(3, number, keys) for number in range(50)]
    assert cases != [fuzz.draw(4, number, keys) for number in range(50)]


def broken(how):
    def main(overrides):
        how()
        return stop.REFUSED

    return main


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (lambda: 1 / 0, "traceback"),
        (lambda: sys.exit(41), "code 41 is not documented"),
        (lambda: None, "0 lines of error with code 2"),
        (lambda: print("error: a\nerror: b", file=sys.stderr), "2 lines of error with code 2"),
        (lambda: print("error: a\nb", file=sys.stderr), "several lines"),
        (lambda: print("WARNING a\nerror: b", file=sys.stderr), None),
        (lambda: fuzz.os.kill(fuzz.os.getpid(), fuzz.signal.SIGKILL), "ended by SIGKILL"),
        (lambda: fuzz.os.kill(fuzz.os.getpid(), fuzz.signal.SIGXCPU), f"no answer in {fuzz.CPU_S} s"),
    ],
)
def test_the_harness_sees_what_it_looks_for(how, problem, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "main", broken(how))
    assert fuzz.run_case(0, ["a=1"], tmp_path / "case").problem == problem


def test_a_run_of_the_base_trains_and_one_of_many_steps_is_ended(tmp_path):
    assert fuzz.run_case(0, [], tmp_path / "case").code in (stop.OK, stop.COLLAPSED)
    assert fuzz.run_case(0, ["steps=1000000"], tmp_path / "case").code == stop.PREEMPTED


@pytest.mark.parametrize("wrong", ["x", "-1", "1.5"])
def test_arguments_that_are_no_numbers_are_one_line_with_the_usage(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        cases_of("overrides", fuzz.__doc__, ["10", wrong])
    assert ended.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert "[cases] [seed] [first]" in usage and f"{wrong!r}: must be a whole number" in error
    asked = cases_of("overrides", fuzz.__doc__, ["10", "3"])
    assert (asked.cases, asked.seed, asked.first) == (10, 3, 0)


def test_cases_that_are_interrupted_still_have_a_table(capsys, monkeypatch):
    one = fuzz.Outcome(0, ["a=1"], stop.OK, None, 1.0, "")

    def outcomes(num_cases, seed, *, first):
        yield one
        os.kill(os.getpid(), signal.SIGTERM)
        yield one
        yield one

    monkeypatch.setattr(fuzz, "run_cases", outcomes)
    assert fuzz.main(3) == 0
    assert capsys.readouterr().out.startswith("2 cases, 2 s of CPU\n       2  OK")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
