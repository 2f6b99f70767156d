"""Which steps are applied: by hand, against a slow loop, and in a run on several ranks."""

import json
import math
import signal
import statistics
import threading
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import BASE, NAN, Scaled, metrics, tensors
from trainer import train
from trainer.balance import Balancer
from trainer.checkpoint import Checkpoints, problems, storage
from trainer.config import ConfigError, load
from trainer.ranks import agree
from trainer.ranks.agree import refuse_disagreement
from trainer.ranks.stop import PREEMPTED
from trainer.run.health import FLOOR, LEAST, Health

INF = math.inf


def judged(health: Health, applied: list[tuple[float, float]], loss: float, grad_norm: float) -> str | None:
    applied_2W = torch.tensor(applied, dtype=torch.float64).reshape(-1, 2).T
    return health.judge(loss=loss, grad_norm=grad_norm, applied_2W=applied_2W)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("spike", [None, 6.0])
def test_what_is_not_finite_is_never_applied(value, spike):
    assert judged(Health(spike=spike), [], value, 1.0) == f"loss {value}"
    assert judged(Health(spike=spike), [(1.0, 1.0)] * LEAST, 1.0, value) == f"gradient norm {value}"


def test_spikes_are_found_as_a_slow_loop_finds_them():
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        number = int(torch.randint(1, 300, (1,), generator=generator))
        applied = (torch.rand(number, 2, generator=generator, dtype=torch.float64) + 0.5).tolist()
        value, spike = 0.3 + 3 * float(torch.rand(1, generator=generator)), 1 + case % 9
        column = [row[case % 2] for row in applied]
        lower_median = statistics.median_low(column)
        deviation = 1.4826 * statistics.median_low([abs(x - lower_median) for x in column])
        expected = number >= LEAST and value > lower_median + spike * max(deviation, FLOOR * lower_median)
        pair = (value, 0.5) if case % 2 == 0 else (0.5, value)
        assert (judged(Health(spike=spike), applied, *pair) is not None) == expected
        assert judged(Health(), applied, *pair) is None  # nobody asked for it


def test_a_spike_is_measured_against_steps_like_it_and_downward_there_is_none():
    steady = [(2.0, 1.0)] * LEAST  # no deviation at all: FLOOR of the median counts as one, here 0.04
    assert (
        judged(Health(spike=5), steady, 2.19, 1.0) is None
        and judged(Health(spike=5), steady, 2.21, 1.0) is not None
    )
    assert judged(Health(spike=5), steady, 0.0, 0.0) is None
    assert judged(Health(spike=5), steady[1:], 99.0, 1.0) is None  # too few to say


def test_steps_in_a_row_are_counted():
    health, seen = Health(most=2), []
    for loss in (1.0, NAN, NAN, 1.0, NAN, NAN, NAN):
        skipped = health.skips(loss=loss, grad_norm=1.0, applied_2W=torch.zeros(2, 0))
        seen.append((skipped, health.in_row, health.total, health.is_lost))
    assert seen == [
        (False, 0, 0, False),
        (True, 1, 1, False),
        (True, 2, 2, False),
        (False, 0, 2, False),
        (True, 1, 3, False),
        (True, 2, 4, False),
        (True, 3, 5, True),
    ]


def test_a_run_goes_back_as_often_as_it_may():
    health = Health(rollbacks=2)
    assert [health.roll_back() for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("skip.spike=0", r"skip.spike=0.0: must be above 0"),
        ("skip.most=-1", "skip.most=-1"),
        ("skip.rollbacks=-2", "rollbacks=-2"),
        ("heartbeat_s=0", "heartbeat_s=0.0: must be at least 1"),
        ("checkpoint.keep_every=0", "checkpoint.keep_every=0: must be at least 1"),
        ("checkpoint.retries=-1", "checkpoint.retries=-1"),
        ("checkpoint.retry_s=-1", "checkpoint.retry_s=-1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        run_ranks(lambda: train.build(load([*BASE, "name=no", change])), 1)


# -- in a run ---------------------------------------------------------------------------------------------


def faulty(overrides: list[str], *, wrong_at: tuple[int, ...], factor: float, rank: int = 0) -> int:
    """Trains; the first time that a step of `wrong_at` is done, this rank's gradient is multiplied."""
    step, left = train.train_step, set(wrong_at)

    def wrapped(run, batches, **timing):
        handle = None
        if run.step + 1 in left and torch.distributed.get_rank() == rank:
            left.remove(run.step + 1)
            handle = run.model.register_forward_hook(lambda model, given, loss: Scaled.apply(loss, factor))
        try:
            return step(run, batches, **timing)
        finally:
            if handle is not None:
                handle.remove()

    train.train_step = wrapped
    return train.train(load([*BASE, *overrides]))


def left_out(overrides: list[str], steps: tuple[int, ...]) -> list[float]:
    """The losses of a run whose updates of these steps are left out, by plain calls."""
    run, losses = train.build(load([*BASE, *overrides])), []
    while run.step < run.last_step:
        applied = {name: p.detach().clone() for name, p in run.model.state_dict().items()}
        if run.step + 1 in steps:
            run.optimizer.step = run.balancer.step = lambda *_: {}  # type: ignore[method-assign]
        else:
            run.optimizer.__dict__.pop("step", None), run.balancer.__dict__.pop("step", None)
        losses.append(train.train_step(run, train.next_batches(run))["loss"])
        if run.step in steps:
            run.balancer.discard()
            assert all(torch.equal(p, applied[name]) for name, p in run.model.state_dict().items())
    return losses


@pytest.mark.parametrize(
    ("num_ranks", "layout"), [(1, []), pytest.param(4, ["parallel=hsdp_ep"], marks=pytest.mark.rare)]
)
def test_a_gradient_that_is_no_number_on_one_rank_leaves_the_step_out_on_all(
    tmp_path, num_ranks, layout, caplog
):
    where = [f"run_dir={tmp_path}", "name=nan", "steps=8", *layout]
    codes = run_ranks(lambda: faulty(where, wrong_at=(3, 5), factor=NAN, rank=num_ranks - 1), num_ranks)
    assert set(codes) <= {train.OK, train.COLLAPSED}
    lines = metrics(tmp_path / "nan")
    expected = run_ranks(
        lambda: left_out(where[:1] + ["name=by_hand", "steps=8", *layout], (3, 5)), num_ranks
    )[0]
    assert [line["loss"] for line in lines] == expected
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert ["grad_norm" in line for line in lines] == [True, True, False, True, False, True, True, True]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_a_run_saved_before_any_step_was_applied_goes_on_as_if_it_had_not_stopped(tmp_path):
    """AdamW counts its steps: torch counts one more when it is asked for a state that is not there yet."""

    def stopping(name: str, stop_at: int | None, wrong_at: tuple[int, ...]) -> int:
        step = train.train_step

        def wrapped(run, batches, **timing):
            if run.step + 1 == stop_at:
                run.stop.signalled = signal.SIGTERM
            return step(run, batches, **timing)

        train.train_step = wrapped
        return faulty([f"run_dir={tmp_path}", f"name={name}", "steps=6"], wrong_at=wrong_at, factor=NAN)

    run_ranks(stopping, 1, "whole", None, (1, 2))
    assert run_ranks(stopping, 1, "halves", 2, (1, 2)) == [PREEMPTED]
    counts = {
        name: value for name, value in tensors(tmp_path / "halves", 2).items() if name.endswith(".step")
    }
    assert counts and not any(value.any() for value in counts.values())
    run_ranks(stopping, 1, "halves", None, ())
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_and_the_newest_checkpoint_is_from_before(tmp_path):
    where = [f"run_dir={tmp_path}", "name=lost", "steps=20", "checkpoint.interval=3", "skip.most=4"]
    with pytest.raises(
        FloatingPointError,
        match=r"step 11: gradient norm nan; no step could be applied from step 7 on; "
        "the newest checkpoint is of step 6, from before",
    ):
        run_ranks(lambda: faulty(where, wrong_at=tuple(range(7, 30)), factor=NAN), 1)
    checkpoints = tmp_path / "lost" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000003", "step-00000006"]
    assert problems(checkpoints / "step-00000006") == []
    run_ranks(lambda: faulty(where, wrong_at=(), factor=1), 1)  # the same command, without the fault
    run_ranks(lambda: faulty([*where, "name=whole"], wrong_at=(), factor=1), 1)
    assert metrics(tmp_path / "lost") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(("num_ranks", "layout"), [(1, ["data.workers=0"]), (2, ["parallel=fsdp"])])
def test_a_run_that_cannot_go_on_writes_the_checkpoint_that_it_began(
    tmp_path, monkeypatch, num_ranks, layout
):
    """A rule may give biases that are no numbers in the step after a save: what writes it must not die with
    the run.
    """
    save_file, update, failed = storage.save_file, Balancer.update, threading.Event()

    def slow(*arguments, **options):
        failed.wait()
        return save_file(*arguments, **options)

    def failing(balancer, step, stats):
        if step == 5:
            failed.set()
            raise FloatingPointError("step 5: biases that are not finite")
        return update(balancer, step, stats)

    def worker() -> int:
        monkeypatch.setattr(storage, "save_file", slow)
        monkeypatch.setattr(Balancer, "update", failing)
        train.sys.argv = [
            "train",
            *BASE,
            f"run_dir={tmp_path}",
            "name=lost",
            "checkpoint.interval=4",
            *layout,
        ]
        return train.main()

    assert run_ranks(worker, num_ranks) == [train.UNSOUND] * num_ranks
    assert Checkpoints(tmp_path / "lost" / "checkpoints").steps() == [4]


def test_a_rollback_with_every_checkpoint_damaged_ends_as_any_run_that_cannot_go_on(tmp_path, capfd):
    where = [
        *BASE,
        f"run_dir={tmp_path}",
        "name=lost",
        "steps=8",
        "checkpoint.interval=3",
        "skip.most=0",
        "skip.rollbacks=1",
    ]

    def worker() -> int:
        step = train.train_step

        def failing(run, batches, **timing):
            if run.step == 4:
                run.checkpoints.finish()
                (tmp_path / "lost" / "checkpoints" / "step-00000003" / "index.json").unlink()
                run.model.register_forward_hook(lambda model, given, loss: Scaled.apply(loss, NAN))
            return step(run, batches, **timing)

        train.train_step = failing
        train.sys.argv = ["train", *where]
        return train.main()

    assert run_ranks(worker, 1) == [train.UNSOUND]
    told = capfd.readouterr().err
    assert (
        "error: step 5: gradient norm nan" in told and "none of the checkpoints can be used (steps 3)" in told
    )


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(1, ["data.workers=0"]), (2, ["parallel=fsdp"])],
)
@pytest.mark.rare
def test_a_spike_rolls_back_and_passes_over_the_data_since(tmp_path, num_ranks, layout):
    where = [
        f"run_dir={tmp_path}",
        "steps=39",
        "checkpoint.interval=33",
        "skip.spike=20",
        "skip.most=1",
        "skip.rollbacks=1",
        *layout,
    ]
    settings = ["name=spike", *where]
    run_ranks(lambda: faulty(settings, wrong_at=(35, 36), factor=1e6), num_ranks)
    lines = metrics(tmp_path / "spike")
    assert [line["step"] for line in lines] == list(range(1, 40)) and lines[-1]["skipped_steps"] == 2
    starts = [json.loads(line) for line in (tmp_path / "spike" / "starts.jsonl").read_text().splitlines()]
    assert starts[1] == {"step": 33, "rolled_back": True, "passed_over_steps": 3}

    def by_hand() -> list[float]:
        """33 steps, then 3 steps' rows are read and thrown away."""
        run, losses = train.build(load([*BASE, "name=by_hand", *where])), []
        for _ in range(33):
            losses.append(train.train_step(run, train.next_batches(run))["loss"])
        for _ in range(3):
            train.next_batches(run)
        while run.step < run.last_step:
            losses.append(train.train_step(run, train.next_batches(run))["loss"])
        return losses

    assert [line["loss"] for line in lines] == run_ranks(by_hand, num_ranks)[0]


@pytest.mark.slow
def test_all_data_is_passed_over_if_the_program_made_steps_longer_since(tmp_path):
    where = [
        f"run_dir={tmp_path}",
        "steps=9",
        "checkpoint.interval=3",
        "skip.most=0",
        "skip.rollbacks=1",
        "data.workers=0",
        "stage.warmup.share=null",
        "stage.warmup.steps=4",
        "stage.stable.global_batch=8",
    ]
    run_ranks(lambda: faulty(["name=back", *where], wrong_at=(6,), factor=NAN), 1)

    def by_hand() -> list[float]:
        run, losses = train.build(load([*BASE, "name=by_hand", *where])), []
        for _ in range(3):
            losses.append(train.train_step(run, train.next_batches(run))["loss"])
        for rows in (4, 8, 8):
            run.stream.set(seq_len=32, global_batch=rows, mixture=None, buffer=0)
            run.stream.next_step(1)
        while run.step < run.last_step:
            losses.append(train.train_step(run, train.next_batches(run))["loss"])
        return losses

    assert [line["loss"] for line in metrics(tmp_path / "back")] == run_ranks(by_hand, 1)[0]


def test_a_run_that_goes_back_writes_each_step_once(tmp_path):
    where = [
        f"run_dir={tmp_path}",
        "name=back",
        "steps=8",
        "checkpoint.interval=3",
        "skip.most=0",
        "skip.rollbacks=1",
        "balance.trace=router.trace",
    ]
    run_ranks(lambda: faulty(where, wrong_at=(6,), factor=NAN), 1)
    trace = [json.loads(line) for line in (tmp_path / "back" / "router.trace").read_text().splitlines()]
    assert [line.get("step") for line in trace] == [None, *range(1, 9)]
    assert [line["step"] for line in metrics(tmp_path / "back")] == list(range(1, 9))


@pytest.mark.slow
def test_random_numbers_are_those_of_the_step(tmp_path):
    """Something that draws (a dropout, a user's own layer) draws the same after a resume, and something else
    on each rank.
    """
    where = [f"run_dir={tmp_path}", "name=random", "steps=6", "checkpoint.interval=3", "parallel=fsdp"]

    def drawing() -> list[tuple[int, float]]:
        drawn: list[tuple[int, float]] = []
        step = train.train_step

        def watched(run, batches, **timing):
            handle = run.model.register_forward_pre_hook(
                lambda *_: drawn.append((run.step + 1, torch.rand(()).item()))
            )
            result = step(run, batches, **timing)
            handle.remove()
            return result

        train.train_step = watched
        train.train(load([*BASE, *where]))
        return drawn

    whole = run_ranks(drawing, 2)
    checkpoints = tmp_path / "random" / "checkpoints"
    for path in checkpoints.glob("step-00000006/*"):
        path.unlink()
    (checkpoints / "step-00000006").rmdir()
    resumed = run_ranks(drawing, 2)
    for rank in (0, 1):
        # 2 microbatches
        assert resumed[rank] == [pair for pair in whole[rank] if pair[0] > 3] and len(resumed[rank]) == 6
    values = [value for of_rank in whole for _, value in of_rank]
    assert len(set(values)) == len(values)


# -- data that cannot be read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_ranks", "layout", "at_end"),
    [(1, [], "repeat"), pytest.param(4, ["parallel=hsdp_ep"], "stop", marks=pytest.mark.rare)],
)
def test_data_that_one_rank_cannot_read_ends_all_with_everything_saved(tmp_path, num_ranks, layout, at_end):
    corpus = tmp_path / "corpus.jsonl"
    words = [f"{chr(97 + i % 26)}{chr(97 + 7 * i % 26)}{i}" for i in range(90)]
    documents = [
        {"text": " ".join(words[(n * 7 + i) % len(words)] for i in range(40 + n % 13))} for n in range(400)
    ]
    corpus.write_text("".join(json.dumps(document) + "\n" for document in documents))
    where = [
        f"run_dir={tmp_path}",
        "data=jsonl",
        f"data.source.path={corpus}",
        "model.vocab_size=300",
        f"data.at_end={at_end}",
        "data.buffer=2",
        "data.retries=0",
        "data.workers=0",
        "steps=12",
        "checkpoint.interval=5",
        "data.num_streams=4",
        "model=debug",
        "model.num_layers=3",
        "model.global_every=3",
        "seq_len=32",
        "global_batch=4",
        "micro_batch=1",
        "data.cache_dir=" + str(tmp_path / "cache"),
        *layout,
    ]

    def broken(name: str, fails_at: int | None) -> int:
        from trainer.data.stream import DataError, TokenStream

        next_step, seen = TokenStream.next_step, []

        def failing(stream, micro_batch):
            seen.append(1)
            if len(seen) == fails_at and torch.distributed.get_rank() == num_ranks - 1:
                next_step(stream, micro_batch)  # half way: this rank's stream has moved
                raise DataError("the disk is gone")
            return next_step(stream, micro_batch)

        TokenStream.next_step = failing
        train.sys.argv = ["train", *where, f"name={name}"]
        return train.main()

    assert set(run_ranks(broken, num_ranks, "whole", None)) <= {train.OK, train.COLLAPSED}
    assert run_ranks(broken, num_ranks, "parts", 8) == [train.NO_DATA] * num_ranks
    assert (
        len(metrics(tmp_path / "parts")) == 7
        and (tmp_path / "parts/checkpoints/latest").read_text() == "step-00000007\n"
    )
    assert set(run_ranks(broken, num_ranks, "parts", None)) <= {train.OK, train.COLLAPSED}
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    one, other = tensors(tmp_path / "parts", 12), tensors(tmp_path / "whole", 12)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- do all ranks have the same? --------------------------------------------------------------------------


def test_ranks_that_disagree_are_named_with_both_values():
    def worker(different: dict[int, dict]) -> None:
        refuse_disagreement({"seed": 0, "code": "1+ab", **different.get(torch.distributed.get_rank(), {})})

    run_ranks(worker, 3, {})
    run_ranks(worker, 3, {rank: {"mixture": math.nan, "betas": [math.nan]} for rank in range(3)})
    with pytest.raises(ConfigError, match=r"do not agree: rank 2 has seed=7 \(rank 0: 0\)\. Start all"):
        run_ranks(worker, 3, {2: {"seed": 7}})
    with pytest.raises(
        ConfigError, match=r"rank 1 has code='1\+cd' .rank 0: '1\+ab'.*; rank 2 has extra=1 .rank 0: None"
    ):
        run_ranks(worker, 3, {1: {"code": "1+cd"}, 2: {"extra": 1}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: train.load([*BASE, "name=r", "seed=3", "parallel=fsdp"]),
            r"rank 1 has seed=3 \(rank 0: 0\)",
        ),
        (lambda: train.load([*BASE, "name=r", "optim.lr=0.5", "parallel=fsdp"]), r"rank 1 has optim.lr=0.5"),
    ],
)
def test_a_run_of_ranks_that_disagree_does_not_start(tmp_path: Path, change, message):
    def worker() -> None:
        train.build(change() if torch.distributed.get_rank() else load([*BASE, "name=r", "parallel=fsdp"]))

    with pytest.raises(ConfigError, match=message):
        run_ranks(worker, 2)


def test_clocks_that_differ_are_told(monkeypatch):
    def worker() -> list[str]:
        said: list[str] = []
        monkeypatch.setattr(agree.log, "warning", lambda text, *values: said.append(text % values))
        if torch.distributed.get_rank() == 1:
            now = agree.time.time()
            monkeypatch.setattr(agree.time, "time", lambda: now + 100)
        agree.compare_clocks()
        return said

    said = run_ranks(worker, 2)
    assert said == [
        ["the clocks of ranks 0 and 1 differ by 100 s: compare times in their logs with care"],
        [],
    ]
