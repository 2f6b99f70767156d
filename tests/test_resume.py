"""A run that stopped and went on is the run that never stopped: bit for bit on one layout, within float32 on
others.
"""

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.runs import BASE, metrics, tensors
from trainer import train
from trainer.checkpoint import Found, checkpoints, storage
from trainer.config import load
from trainer.history import read_history


def train_worker(overrides: list[str], stop_at: int | None) -> int:
    """Trains; told to stop on the last rank only, during step `stop_at`."""
    config = load(BASE + overrides)
    step = train.train_step

    def stopping_step(run, batches, **timing):
        if run.step + 1 == stop_at and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            run.stop.signalled = signal.SIGINT
        return step(run, batches, **timing)

    train.train_step = stopping_step
    return train.train(config)


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (1, []),
        pytest.param(4, ["parallel=hsdp_ep", "activation_checkpoint=full"], marks=pytest.mark.slow),
        pytest.param(4, ["parallel.cp=2", "parallel.dp_shard=2"], marks=pytest.mark.slow),
    ],
)
def test_a_run_in_three_parts_is_the_whole_run_bit_for_bit(tmp_path, num_ranks, layout):
    where = [f"run_dir={tmp_path}", "steps=8", *layout]
    assert set(run_ranks(train_worker, num_ranks, ["name=whole", *where], None)) <= {
        train.OK,
        train.COLLAPSED,
    }
    assert set(run_ranks(train_worker, num_ranks, ["name=parts", *where], 3)) == {train.INTERRUPTED}
    # stopped twice: what only a resumed run fails to save is lost at the second resume
    assert set(run_ranks(train_worker, num_ranks, ["name=parts", *where], 6)) == {train.INTERRUPTED}
    assert set(run_ranks(train_worker, num_ranks, ["name=parts", *where], None)) <= {
        train.OK,
        train.COLLAPSED,
    }
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "whole")] == list(range(1, 9))
    whole, parts = tensors(tmp_path / "whole", 8), tensors(tmp_path / "parts", 8)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    # these belong in a checkpoint, and they are not zero: zeros would be equal and prove nothing
    moments = [name for name in whole if name.endswith("exp_avg")]
    biases = [name for name in whole if name.endswith("expert_bias_E")]
    assert moments and len(biases) == 2
    for name in [*moments, *biases, "balancer.rule.momentum_ME", "balancer.tail_counts_ME", "stream.next_VS"]:
        assert whole[name].any(), name


def next_losses_worker(overrides: list[str]) -> list[float]:
    """Of three steps: the first depends on the weights, the others on the optimizer's state too."""
    run = train.build(load(BASE + overrides))
    train.resume(run, run.checkpoints.newest_good())
    assert run.step == 5
    return [train.train_step(run, train.next_batches(run))["loss"] for _ in range(3)]


@pytest.mark.rare
@pytest.mark.parametrize("optimizer", [["optim=adamw"], ["optim=muon", "optim.lr=0.02"]])
def test_a_checkpoint_of_four_ranks_continues_on_one_and_on_two(tmp_path, optimizer):
    where = ["name=moving", f"run_dir={tmp_path}", *optimizer]
    run_ranks(train_worker, 4, ["parallel=hsdp_ep", *where], 5)
    before = metrics(tmp_path / "moving")[-1]["loss"]
    same = run_ranks(next_losses_worker, 4, ["parallel=hsdp_ep", *where])
    assert all(losses == same[0] for losses in same) and before not in same[0]
    others = [
        (1, []),
        (2, ["parallel=fsdp_ep"]),
        (2, ["parallel=fsdp"]),
        (4, ["parallel=fsdp_ep", "parallel.ep=4"]),
    ]
    for num_ranks, layout in others:
        for losses in run_ranks(next_losses_worker, num_ranks, [*layout, *where]):
            assert losses == pytest.approx(same[0], rel=2e-6)


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(1, ["checkpoint.background=false"]), pytest.param(2, ["parallel=fsdp"], marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("stop_at", [None, 7])
def test_a_run_whose_last_checkpoint_cannot_be_written_does_not_say_that_it_is_saved(
    tmp_path, monkeypatch, capfd, num_ranks, layout, stop_at
):
    """One miss is no reason to end a run that goes on; for one that ends it is all that there is."""

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    def worker() -> int:
        step = train.train_step

        def filling(run, batches, **timing):
            if run.step == 6:
                monkeypatch.setattr(storage, "make_durable", full)
            if run.step + 1 == stop_at:
                run.stop.signalled = signal.SIGTERM
            return step(run, batches, **timing)

        train.train_step = filling
        train.sys.argv = [
            "train",
            *BASE,
            f"run_dir={tmp_path}",
            "name=full",
            "steps=8",
            "checkpoint.interval=4",
            "checkpoint.retries=0",
            *layout,
        ]
        return train.main()

    assert run_ranks(worker, num_ranks) == [train.CANNOT_SAVE] * num_ranks
    told = capfd.readouterr()
    assert f"the checkpoint of step {stop_at or 8}" in told.err and "the newest is of step 4" in told.err
    assert "the same command continues" not in told.out


def test_a_start_that_is_refused_changes_nothing(tmp_path, capfd):
    def worker(steps: int) -> int:
        train.sys.argv = ["train", *BASE, f"run_dir={tmp_path}", "name=a", f"steps={steps}"]
        return train.main()

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.*")}

    assert set(run_ranks(worker, 1, 3)) <= {train.OK, train.COLLAPSED}
    before = files()
    assert before.keys() >= {"config.yaml", "data.json", "starts.jsonl", "metrics.jsonl"}
    assert run_ranks(worker, 1, 2) == [train.REFUSED] and "use steps=3 or more" in capfd.readouterr().err
    assert files() == before


def test_a_branch_may_begin_at_a_run_that_is_named_like_a_checkpoint(tmp_path):
    where = [f"run_dir={tmp_path}", "parallel=fsdp"]
    run_ranks(train_worker, 2, [*where, "name=step-lr", "steps=2"], None)
    run_ranks(train_worker, 2, [*where, "name=new", "steps=3", f"branch={tmp_path}/step-lr"], None)
    assert [line["step"] for line in metrics(tmp_path / "new")] == [3]


LAYOUTS = {
    "one": (1, []),
    "fsdp2": (2, ["parallel=fsdp"]),
    "hsdp2": (2, ["parallel=hsdp"]),
    "ep2": (2, ["parallel=fsdp_ep"]),
    "fsdp4": (4, ["parallel=fsdp"]),
    "hsdp_ep4": (4, ["parallel=hsdp_ep"]),
    "ep4": (4, ["parallel=fsdp_ep", "parallel.ep=4"]),
    "cp2": (2, ["parallel.cp=2"]),
    "cp2_ep4": (4, ["parallel.cp=2", "parallel.dp_shard=2", "parallel.ep=4"]),
}


def whole_of(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a run's state, gathered; collective."""
    parts = [
        whole_of(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v} for k, v in state.items()
    ]
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


SAME = ["optim=muon", "steps=2", "data.buffer=2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a run on a layout, which is trained when it is first asked for."""
    root = tmp_path_factory.mktemp("saved")

    @cache
    def directory(name: str) -> Path:
        num_ranks, layout = LAYOUTS[name]
        run_ranks(train_worker, num_ranks, [f"name={name}", f"run_dir={root}", *SAME, *layout], None)
        return root / name

    return directory


def loading(overrides: list[str], whole: dict[str, dict[str, torch.Tensor]], paths: dict[str, Path]) -> list:
    """Which tensors of which checkpoint this rank does not have once it has loaded it."""
    run, wrong = train.build(load([*BASE, "name=any", *SAME, *overrides])), []
    for name, expected in whole.items():
        train.resume(run, Found(2, paths[name] / "checkpoints" / "step-00000002"))
        state = whole_of(run.state_dict(num_slots=expected["stream.index_VC"].shape[1]))
        wrong += [f"{name}: {key}" for key in expected if not torch.equal(state[key], expected[key])]
    return wrong


def load_on(layout: str, names: Iterable[str], saved: Callable[[str], Path]) -> None:
    """Every tensor of the run's state, bit for bit."""
    num_ranks, overrides = LAYOUTS[layout]
    paths = {name: saved(name) for name in names}
    whole = {name: tensors(path, 2) for name, path in paths.items()}
    assert all(whole[name].keys() == tensors(saved("one"), 2).keys() for name in names)
    assert run_ranks(loading, num_ranks, overrides, whole, paths) == [[]] * num_ranks


TIERS = {"hsdp_ep4": (), "one": pytest.mark.slow}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=TIERS.get(name, pytest.mark.rare)) for name in LAYOUTS],
)
def test_a_checkpoint_of_any_layout_loads_on_one_rank_and_that_of_one_rank_on_any(saved, layout):
    """What is saved and what is loaded meet in one index, so these pairs cover the others."""
    load_on(layout, LAYOUTS if layout == "one" else ["one"], saved)


@pytest.mark.rare
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_a_checkpoint_of_any_layout_loads_on_any_other_bit_for_bit(saved, layout):
    """With the pairs above, seven layouts on 1, 2 and 4 ranks: all 49 pairs."""
    load_on(layout, [name for name in LAYOUTS if name != "one"], saved)


PROGRAM = [
    "stage=constant",
    "~stage.run",
    "+stage.first={steps: 6, lr: {from: 0, to: 1}, bias_rate: 2}",
    "+stage.longer={steps: 4, seq_len: 64, z_loss_weight: 1e-3}",
    "+stage.wider={tokens: 1000, global_batch: 8}",
    (
        "+stage.last={steps: 5, lr: {to: 0, shape: cosine}, bias_rate: 0, sequence_loss_weight: 0.01, "
        "micro_batch: 2}"
    ),
    "steps=null",
]


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        pytest.param(1, ["optim=muon"], marks=pytest.mark.slow),
        pytest.param(4, ["optim=muon", "parallel=hsdp_ep"], marks=pytest.mark.rare),
    ],
)
def test_a_program_stopped_in_every_span_goes_on_bit_for_bit(tmp_path, num_ranks, layout):
    where = [f"run_dir={tmp_path}", "data.num_streams=4", *layout, *PROGRAM]
    run_ranks(train_worker, num_ranks, ["name=whole", *where], None)
    for stop_at in (3, 8, 11, 14):
        assert set(run_ranks(train_worker, num_ranks, ["name=parts", *where], stop_at)) == {train.INTERRUPTED}
    run_ranks(train_worker, num_ranks, ["name=parts", *where], None)
    whole = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == whole
    # 6 steps of 4 x 32 tokens, 4 of 4 x 64, ceil(1000 / 512) of 8 x 64, 5 of them again; nominal ends: 768,
    # 1792, 2792, 5352
    tokens = (
        [128 * n for n in range(1, 7)]
        + [768 + 256 * n for n in range(1, 5)]
        + [1792 + 512 * n for n in range(1, 8)]
    )
    assert [line["tokens"] for line in whole] == tokens
    assert [line["lr"] for line in whole[:6]] == pytest.approx([2e-2 * (2 * n + 1) / 12 for n in range(6)])
    starts = [json.loads(line) for line in (tmp_path / "parts" / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["tokens"]) for start in starts] == [
        (0, 0),
        (3, 384),
        (8, 1280),
        (11, 2304),
        (14, 3840),
    ]
    one, other = tensors(tmp_path / "whole", 17), tensors(tmp_path / "parts", 17)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(name.endswith("momentum_buffer") and tensor.any() for name, tensor in one.items())


FEW = (
    "few: {_target_: trainer.data.SyntheticSource, vocab_size: 512, num_topics: 2, mean_length: 40, "
    "num_documents: 90}"
)
MANY = (
    "many: {_target_: trainer.data.SyntheticSource, vocab_size: 512, num_topics: 30, mean_length: 90, "
    "seed: 1}"
)
MIXED = [
    "data.source=null",
    f"data.sources={{{FEW}, {MANY}}}",
    "data.mixture={few: 1}",
    "data.num_streams=4",
    "steps=null",
    "stage=constant",
    "~stage.run",
    "+stage.a={steps: 4}",
    "+stage.b={steps: 3, mixture: {few: 1, many: 3}, seq_len: 64}",
    "+stage.c={steps: 4, buffer: 3}",
    "+stage.d={steps: 3, global_batch: 8, buffer: 5, mixture: {many: 1}}",
    "+stage.e={steps: 3, buffer: 0, mixture: {few: 1, many: 1}}",
]


@pytest.mark.rare
@pytest.mark.parametrize(("num_ranks", "layout"), [(1, []), (4, ["parallel=hsdp_ep"])])
def test_phases_of_mixtures_and_buffers_stopped_in_every_span_go_on_bit_for_bit(
    tmp_path, num_ranks, layout, capfd
):
    where = [f"run_dir={tmp_path}", *layout]
    run_ranks(train_worker, num_ranks, [*MIXED, "name=whole", *where], None)
    conclusion = (
        r"data: \d+ documents, 5376 tokens, none skipped\nbuffer: \d+ documents are still open, "
        r"\d+ of their tokens"
    )
    assert re.search(conclusion, capfd.readouterr().out)
    for stop_at in (2, 6, 9, 13, 15):
        assert set(run_ranks(train_worker, num_ranks, [*MIXED, "name=parts", *where], stop_at)) == {
            train.INTERRUPTED
        }
    run_ranks(train_worker, num_ranks, [*MIXED, "name=parts", *where], None)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    one, other = tensors(tmp_path / "whole", 17), tensors(tmp_path / "parts", 17)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    # mixed from step 5 on, buffered from step 8 to 14
    heads = {
        name: one[f"stream.{name}"] for name in ("next_VS", "draws_VS", "index_VC", "read_VC", "source_VC")
    }
    assert (
        heads["next_VS"].min() >= 4
        and heads["draws_VS"].min() > 0
        and heads["index_VC"].shape == heads["source_VC"].shape
    )


def next_tokens_worker(overrides: list[str]) -> list[torch.Tensor]:
    """This rank's rows of each step that is left, without training on them."""
    run = train.build(load([*BASE, *MIXED, *overrides]))
    train.resume(run, run.checkpoints.newest_good())
    assert run.step == 9
    seen = []
    while run.step < run.last_step:
        rows = [torch.stack(list(batch)) for batch in train.next_batches(run)]
        seen.append(torch.cat(rows, dim=1))
        run.tokens, run.step = run.tokens + run.program.settings_at(run.tokens).tokens, run.step + 1
    return seen


@pytest.mark.rare
def test_a_buffered_mixture_of_four_ranks_goes_on_on_one_and_on_two(tmp_path):
    where = ["name=moving", f"run_dir={tmp_path}"]
    run_ranks(train_worker, 4, [*MIXED, "parallel=hsdp_ep", *where], 9)
    # in the middle of the buffer
    assert (tensors(tmp_path / "moving", 9)["stream.index_VC"] >= 0).sum() > 4 * 3
    one = run_ranks(next_tokens_worker, 1, where)[0]
    assert len(one) == 8
    for num_ranks, layout in [(2, "fsdp"), (4, "hsdp_ep")]:
        parts = run_ranks(next_tokens_worker, num_ranks, [f"parallel={layout}", *where])
        assert all(
            torch.equal(torch.cat(rows, dim=1), whole) for *rows, whole in zip(*parts, one, strict=True)
        )
    # and on from there, on other ranks again
    run_ranks(train_worker, 2, [*MIXED, "parallel=fsdp", *where, "steps=12"], None)
    assert run_ranks(train_worker, 1, [*MIXED, *where, "steps=14"], None)[0] in (train.OK, train.COLLAPSED)
    same = run_ranks(train_worker, 1, [*MIXED, "name=same", f"run_dir={tmp_path}", "steps=14"], None)
    assert same[0] in (train.OK, train.COLLAPSED)
    moved, stayed = tensors(tmp_path / "moving", 14), tensors(tmp_path / "same", 14)
    names = [name for name in stayed if name.startswith("stream.")]
    assert len(names) == 8 and all(torch.equal(moved[name], stayed[name]) for name in names)


def test_a_resume_may_have_another_mixture_and_buffer_and_no_other_sources(tmp_path):
    where = ["name=remixed", f"run_dir={tmp_path}"]
    run_ranks(train_worker, 1, [*MIXED, *where], 9)
    other = [
        "stage.c.buffer=9",
        "stage.c.mixture={few: 3, many: 1}",
        "data.mixture={many: 1}",
        "data.buffer=2",
    ]
    assert run_ranks(train_worker, 1, [*MIXED, *where, *other, "steps=11"], None)[0] in (
        train.OK,
        train.COLLAPSED,
    )
    # 7 to 14 of few, 3 to 6 of many
    assert tensors(tmp_path / "remixed", 11)["stream.index_VC"].shape[1] == 20
    with pytest.raises(
        train.ConfigError, match=r"data\.sources\.many\.seed=1, now it is data\.sources\.many\.seed=2"
    ):
        run_ranks(train_worker, 1, [*MIXED, *where, "data.sources.many.seed=2"], None)


def biases_worker(overrides: list[str]) -> list[torch.Tensor]:
    """The routing biases after each step."""
    run, seen = train.build(load(BASE + overrides)), []
    while run.step < run.last_step:
        train.train_step(run, train.next_batches(run))
        seen.append(run.balancer.bias_ME.clone())
    return seen


def test_biases_rest_where_the_program_says_so_and_move_as_fast_as_it_says(tmp_path):
    spans = ["stage=constant", "~stage.run", "balance=sign", "balance.rule.lr=0.5", "steps=null"]
    after = run_ranks(
        biases_worker, 1, ["name=rate", *spans, "+stage.a={steps: 2}", "+stage.b={steps: 2, bias_rate: 0}"]
    )[0]
    slow = run_ranks(biases_worker, 1, ["name=slow", *spans, "+stage.a={steps: 1, bias_rate: 0.25}"])[0]
    assert after[0].any() and not torch.equal(after[1], after[0])
    assert torch.equal(after[2], after[1]) and torch.equal(after[3], after[1])
    torch.testing.assert_close(slow[0], 0.25 * after[0])  # the first step of either run routes alike


@pytest.mark.slow
def test_a_branch_anneals_from_a_checkpoint_of_another_run(tmp_path):
    """TrueBase -> Base: up to the branch point the run is the other one, from there on its own program's."""
    where = [f"run_dir={tmp_path}", "checkpoint={interval: 4, keep: 9}"]
    run_ranks(train_worker, 1, ["name=base", *where, "stage=constant", "steps=12"], None)
    annealed = [
        "name=annealed",
        *where,
        "stage=constant",
        "steps=null",
        "stage.run.tokens=1024",
        "+stage.decay={tokens: 512, lr: {to: 0}}",
        f"branch={tmp_path}/base/checkpoints/step-00000008",
    ]
    run_ranks(train_worker, 1, annealed, 10)
    run_ranks(train_worker, 1, annealed, None)  # now from its own checkpoint
    base, branch = metrics(tmp_path / "base"), metrics(tmp_path / "annealed")
    assert [line["step"] for line in branch] == [9, 10, 11, 12]
    # the same weights, the same tokens
    assert branch[0]["loss"] == base[8]["loss"] and branch[0]["tokens"] == base[8]["tokens"]
    assert [line["lr"] for line in branch] == pytest.approx([1e-3 * f for f in (0.875, 0.625, 0.375, 0.125)])
    starts = [json.loads(line) for line in (tmp_path / "annealed" / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [8, 10]
    assert (
        starts[0]["loaded"].endswith("base/checkpoints/step-00000008") and "annealed" in starts[1]["loaded"]
    )
    assert [span["end"] for span in starts[0]["program"]] == [1024, 1536]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A run of two steps."""
    root = tmp_path_factory.mktemp("two")
    run_ranks(train_worker, 1, ["name=run", f"run_dir={root}", "steps=2"], None)
    return root / "run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("branch={0}/nowhere", "nowhere: no checkpoint there"),
        ("branch={0}/base/checkpoints/step-00000007", "no checkpoint there"),
        ("branch={0}/base seed=4", "seed=0, now it is seed=4"),
        ("branch={0}/base model.expert_dim=16", "expert_dim"),
        ("branch={0}/base steps=1", "steps=1, but .* is at step 2"),
        ("branch={0}/base optim=muon", "adamw.*muon"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(tmp_path, two_steps, change, message):
    shutil.copytree(two_steps, tmp_path / "base")
    with pytest.raises(train.ConfigError, match=message):
        run_ranks(
            train_worker,
            1,
            ["name=twig", f"run_dir={tmp_path}", "steps=4", *change.format(tmp_path).split()],
            None,
        )


def losses_worker(overrides: list[str]) -> list[float]:
    run = train.build(load(BASE + overrides))
    return [train.train_step(run, train.next_batches(run))["loss"] for _ in range(4)]


@pytest.mark.slow
def test_a_growing_batch_is_the_same_on_any_number_of_ranks_and_microbatches():
    spans = ["stage=constant", "stage.run.steps=2", "+stage.b={steps: 2, global_batch: 8}"]
    grow = ["name=growing", *spans, "steps=null"]
    one = run_ranks(losses_worker, 1, [*grow, "micro_batch=4"])[0]
    for num_ranks, layout in [(1, []), (2, ["parallel=fsdp"]), (4, ["parallel=hsdp_ep"])]:
        for losses in run_ranks(losses_worker, num_ranks, [*grow, *layout]):
            assert losses == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "stage.run.mixture={a: 1}",
            r"stage.run: mixture={'a': 1.0}: weights, but there is one source, data.source",
        ),
        ("data.mixture={a: 1}", r"data.mixture={'a': 1.0}: weights, but there is one source"),
        (
            (
                "data.source=null|data.sources={gone: {_target_: trainer.data.TextSource, path: "
                "nowhere}}|stage.run.mixture={god: 1}"
            ),
            "there is no source god .did you mean gone",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_before_anything_is_loaded(change, message):
    with pytest.raises(train.ConfigError, match=message):
        run_ranks(losses_worker, 1, ["name=no", "stage=constant", *change.split("|")])


def test_only_the_newest_checkpoints_are_kept_and_a_draft_is_none(tmp_path):
    run_ranks(
        train_worker,
        1,
        ["name=keep", f"run_dir={tmp_path}", "steps=6", "checkpoint={interval: 2, keep: 2}"],
        None,
    )
    directory = tmp_path / "keep" / "checkpoints"
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step-00000004", "step-00000006"]
    assert (directory / "latest").read_text() == "step-00000006\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.expert_dim=16", "model.expert_dim=32, now it is model.expert_dim=16"),
        ("seed=3", "seed=0, now it is seed=3"),
        ("data.source.num_topics=5", "num_topics"),
        ("data.num_streams=2", "num_streams=4, now it is data.num_streams=2"),
        ("global_batch=8", "num_streams=4, now it is data.num_streams=8; set it back"),
        ("balance=none", "SmebuRule.*None"),
        ("steps=1", "steps=1, but .* is at step 2; use steps=2 or more"),
    ],
)
def test_a_run_directory_refuses_another_model_or_stream(tmp_path, two_steps, change, message):
    where = ["name=fixed", f"run_dir={tmp_path}", "steps=2"]
    shutil.copytree(two_steps, tmp_path / "fixed")
    with pytest.raises(train.ConfigError, match=message):
        run_ranks(train_worker, 1, [*where, change], None)


def test_harmless_changes_apply_from_the_resumed_step(tmp_path):
    where = ["name=change", f"run_dir={tmp_path}", "stage=constant"]
    run_ranks(train_worker, 1, [*where, "steps=4"], None)
    run_ranks(train_worker, 1, [*where, "steps=6", "optim.lr=1e-4"], None)
    assert [line["lr"] for line in metrics(tmp_path / "change")] == [1e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4]


def test_a_larger_batch_continues_with_the_same_streams_and_tokens_add_up(tmp_path):
    where = ["name=grow", f"run_dir={tmp_path}"]
    run_ranks(train_worker, 1, [*where, "steps=2"], None)
    run_ranks(train_worker, 1, [*where, "steps=4", "global_batch=8", "data.num_streams=4"], None)
    assert [line["tokens"] for line in metrics(tmp_path / "grow")] == [128, 256, 512, 768]


def test_another_corpus_under_the_same_path_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one document " * 200)
    where = [
        "name=corpus",
        f"run_dir={tmp_path}",
        "steps=1",
        "data=txt",
        f"data.source.path={tmp_path}",
        "model.vocab_size=260",
    ]
    cache = [f"data.cache_dir={tmp_path / 'cache'}"]
    base = [o for o in BASE if not o.startswith("data")]

    def worker():
        return train.train(load([*base, *where, cache[0]]))

    run_ranks(worker, 1)
    assert (tmp_path / "corpus" / "tokenizer.json").is_file()
    (tmp_path / "b.txt").write_text("another document " * 200)
    with pytest.raises(train.ConfigError, match="the corpus's fingerprint"):
        run_ranks(worker, 1)


def test_more_steps_give_the_run_another_tail(tmp_path):
    """Counts of the old tail are dropped: the verdict of step 6 is about step 6 only."""
    where = ["name=tail", f"run_dir={tmp_path}"]
    run_ranks(train_worker, 1, [*where, "steps=4"], None)
    run_ranks(train_worker, 1, [*where, "steps=6"], None)
    state = tensors(tmp_path / "tail", 6)
    # M B L K
    assert state["balancer.tail_3"][0] == 1 and state["balancer.tail_counts_ME"].sum() == 2 * 4 * 32 * 2


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    """A run killed after step 3 resumes from step 2: metrics.jsonl has each step once."""
    where = ["name=killed", f"run_dir={tmp_path}", "checkpoint.interval=2", "steps=6"]

    def killed_worker():
        config, step = load(BASE + where), train.train_step

        def dying_step(run, batches, **timing):
            if run.step == 3:
                raise KeyboardInterrupt
            return step(run, batches, **timing)

        train.train_step = dying_step
        train.train(config)

    with pytest.raises(BaseException):  # noqa: B017  # KeyboardInterrupt, as the rank raised it
        run_ranks(killed_worker, 1)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a line cut by the kill
    run_ranks(train_worker, 1, where, None)
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(1, 7))
    bins = read_history(tmp_path / "killed" / "experts.jsonl")  # of so small a model one for each step
    assert bins.first_T.tolist() == bins.last_T.tolist() == list(range(1, 7))


UNWRITABLE = {
    "a file": lambda path: path.touch(),
    "a link to where nothing can be written": lambda path: path.symlink_to("/proc/self"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere/at/all"),
}


@pytest.mark.parametrize("place", UNWRITABLE)
def test_checkpoints_that_cannot_be_written_end_a_run_before_its_first_step(tmp_path, capfd, place):
    """Eight steps were trained before the first save told."""
    (tmp_path / "a").mkdir()
    UNWRITABLE[place](tmp_path / "a" / "checkpoints")

    def worker() -> int:
        return train.main([*BASE, f"run_dir={tmp_path}", "name=a", "parallel=fsdp"])

    (code, other) = run_ranks(worker, 2)
    assert code == other and code in (train.CANNOT_SAVE, train.REFUSED)
    captured = capfd.readouterr()
    (error,) = {line for line in captured.err.splitlines() if line.startswith("error: ")}
    assert f"{tmp_path}/a/checkpoints cannot be" in error and "run_dir= or name=" in error
    assert "step 1/" not in captured.out
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


def test_one_rank_that_cannot_write_ends_all_before_the_first_step(tmp_path, capfd, monkeypatch):
    """As on a host whose file system is mounted for reading only."""

    def worker() -> int:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            durable = checkpoints.write_durably

            def refusing(path: Path, text: str) -> None:
                if path.name.startswith(".probe"):
                    raise OSError(30, "Read-only file system", str(path))
                durable(path, text)

            monkeypatch.setattr(checkpoints, "write_durably", refusing)
        return train.main([*BASE, f"run_dir={tmp_path}", "name=a", "parallel=fsdp"])

    assert run_ranks(worker, 2) == [train.CANNOT_SAVE] * 2
    captured = capfd.readouterr()
    message = "checkpoints cannot be written to: rank 1: OSError: [Errno 30] Read-only file system"
    assert message in captured.err and "step 1/" not in captured.out
    assert list((tmp_path / "a" / "checkpoints").iterdir()) == []


def test_too_little_room_for_one_checkpoint_is_said_at_the_start(tmp_path, monkeypatch):
    def worker(free: int) -> list[str]:
        said: list[str] = []
        monkeypatch.setattr(checkpoints.log, "warning", lambda text, *values: said.append(text % values))
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
        train.main([*BASE, f"run_dir={tmp_path}", f"name=free{free}", "steps=1"])
        return said

    ((warning,),) = run_ranks(worker, 1, 100_000)
    assert "has 0.1 MB free; the weights alone of a checkpoint take 1.3 MB" in warning
    assert run_ranks(worker, 1, 10**9) == [[]]
