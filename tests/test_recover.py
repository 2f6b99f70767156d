"""A run that goes back loses nothing of it: not when it goes back twice, and not when it is killed after."""

import json

import pytest

from tests.ranks import run_ranks
from tests.runs import BASE, NAN, Scaled, metrics
from trainer import train
from trainer.config import load

WHERE = ["steps=9", "checkpoint.interval=3", "skip.most=0", "skip.rollbacks=2", "data.workers=0"]


class Killed(BaseException):
    """In place of a kill: nothing in the program catches it."""


def training(overrides: list[str], *, wrong: tuple[int, ...], killed_before: int | None = None) -> int:
    """Trains. The calls of `train_step` are counted from 1: those in `wrong` have a gradient that is no
    number; the run dies before the call `killed_before`.
    """
    step, calls = train.train_step, 0

    def wrapped(run, batches, **timing):
        nonlocal calls
        calls += 1
        if calls == killed_before:
            raise Killed
        handle = run.model.register_forward_hook(
            lambda model, inputs, loss: Scaled.apply(loss, NAN if calls in wrong else 1.0)
        )
        try:
            return step(run, batches, **timing)
        finally:
            handle.remove()

    train.train_step = wrapped
    try:
        return train.train(load([*BASE, *WHERE, *overrides]))
    except Killed:
        return -9


def by_hand(overrides: list[str], passed_over: int) -> list[float]:
    """Three steps, then so many steps' rows are read and thrown away, then the rest."""
    run, losses = train.build(load([*BASE, *WHERE, *overrides])), []
    while run.step < run.last_step:
        if run.step == 3 and passed_over:
            for _ in range(passed_over):
                train.next_batches(run)
            passed_over = 0
        losses.append(train.train_step(run, train.next_batches(run))["loss"])
    return losses


@pytest.mark.parametrize(
    ("num_ranks", "layout"), [(1, []), pytest.param(2, ["parallel=fsdp"], marks=pytest.mark.slow)]
)
def test_a_second_roll_back_to_one_checkpoint_passes_over_the_data_of_the_first_too(
    tmp_path, num_ranks, layout
):
    where = [f"run_dir={tmp_path}", *layout]
    # Step 5 fails (calls 4, 5), and again (calls 6, 7): the data of 2 + 2 steps is left out.
    run_ranks(lambda: training([*where, "name=twice"], wrong=(5, 7)), num_ranks)
    expected = run_ranks(lambda: by_hand([*where, "name=by_hand"], 4), num_ranks)[0]
    assert [line["loss"] for line in metrics(tmp_path / "twice")] == expected


@pytest.mark.slow
def test_a_roll_back_outlives_a_kill_before_the_next_checkpoint(tmp_path):
    where = [f"run_dir={tmp_path}"]
    run_ranks(lambda: training([*where, "name=whole"], wrong=(5,)), 1)
    assert run_ranks(lambda: training([*where, "name=killed"], wrong=(5,), killed_before=7), 1) == [-9]
    run_ranks(lambda: training([*where, "name=killed"], wrong=()), 1)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "killed")[-1]["skipped_steps"] == 1
    whole, killed = ((tmp_path / name / "experts.jsonl").read_text() for name in ("whole", "killed"))
    assert killed == whole and '"step": 6,' in whole


def test_a_run_cannot_go_back_more_often_because_it_was_killed(tmp_path):
    where = [f"run_dir={tmp_path}", "name=often", "skip.rollbacks=1"]
    assert run_ranks(lambda: training(where, wrong=(5,), killed_before=6), 1) == [-9]
    with pytest.raises(FloatingPointError, match="step 5: gradient norm nan; no step could be applied"):
        run_ranks(lambda: training(where, wrong=(2,)), 1)


def test_a_branch_passes_over_nothing_that_its_origin_did(tmp_path):
    where = [f"run_dir={tmp_path}"]
    assert run_ranks(lambda: training([*where, "name=back"], wrong=(5,), killed_before=6), 1) == [-9]
    run_ranks(lambda: training([*where, "name=branch", f"branch={tmp_path}/back"], wrong=()), 1)
    expected = run_ranks(lambda: by_hand([*where, "name=by_hand"], 0), 1)[0]
    assert [line["loss"] for line in metrics(tmp_path / "branch")] == expected[3:]


@pytest.mark.slow
def test_a_record_that_cannot_be_read_is_refused_with_its_name(tmp_path):
    where = [f"run_dir={tmp_path}", "name=back"]
    assert run_ranks(lambda: training(where, wrong=(5,), killed_before=6), 1) == [-9]
    record = tmp_path / "back" / "rolled_back.json"
    content = json.loads(record.read_text())
    assert content["step"] == 3 and content["passed_over_steps"] == [2] and content["health"] == [0, 1, 1]
    wrong = [{"passed_over_steps": of} for of in ("x", [-1], [0], [10**30], [1.5])]
    wrong += [{"health": of} for of in ([0], [0, 1, -1], None)]
    for text in ("{", "[]", "[" * 100_000, *(json.dumps(content | of) for of in wrong)):
        record.write_text(text)
        with pytest.raises(train.ConfigError, match=r"rolled_back\.json cannot be read"):
            run_ranks(lambda: training(where, wrong=()), 1)
