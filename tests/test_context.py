"""Context parallelism: rows cut over ranks give the losses, gradients and counts of one rank with whole rows."""

import pytest
import torch
import torch.distributed as dist

from tests.layouts import full
from tests.ranks import run_ranks
from trainer import train
from trainer.config import load
from trainer.data import Batch
from trainer.model.afmoe import moe_layers
from trainer.model.parallelize import local

SEQ_LEN, GLOBAL_BATCH, STEPS = 64, 4, 2
BASE = [
    "name=context",
    "model=debug",
    "model.num_layers=3",
    "model.global_every=3",
    "data=synthetic",
    "data.source.num_topics=8",
    "data.workers=0",
    f"steps={STEPS}",
    f"seq_len={SEQ_LEN}",
    f"global_batch={GLOBAL_BATCH}",
    "stage.warmup.share=0",
    "z_loss_weight=1e-3",
    "balance.sequence_loss_weight=0.01",
    "balance.switch_loss_weight=0.01",
    "balance.batch_loss_weight=0.01",
    "balance.router_z_loss_weight=0.001",
]


def batches(step: int) -> Batch:
    """Documents that lie across pieces, one as long as a row, padding, and labels that are missing unevenly."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 1024, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    positions = torch.arange(SEQ_LEN).repeat(GLOBAL_BATCH, 1)
    labels = tokens[:, 1:].clone()
    for row, cuts in enumerate([(5, 13, 40), (), (29,), (17, 50)]):
        for cut in cuts:
            positions[row, cut:] = torch.arange(SEQ_LEN - cut)
            labels[row, cut - 1] = -100
    labels[0, :20] = -100
    positions[3, 60:], labels[3, 60:] = -1, -100
    return Batch(tokens[:, :-1], labels, positions)


def trained(overrides: list[str]) -> dict:
    """What a rank has after some steps."""
    run = train.build(load(BASE + overrides))
    layers, groups, micro = moe_layers(run.model), run.groups, run.config.micro_batch
    names = [name.replace("_checkpoint_wrapped_module.", "") for name, _ in run.model.named_parameters()]
    result = {"metrics": [], "counts": []}
    step_weights, balance = run.optimizer.step, run.balancer.step

    def snapshot_gradients():
        gradients = {name: full(p.grad) for name, p in zip(names, run.model.parameters(), strict=True)}
        result.setdefault("gradients", gradients)
        step_weights()

    def snapshot_counts(step):
        counts_ME = torch.stack([layer.tokens_per_expert_E for layer in layers])
        dist.all_reduce(counts_ME)
        result["counts"].append(counts_ME)
        return balance(step)

    run.optimizer.step, run.balancer.step = snapshot_gradients, snapshot_counts
    rows = GLOBAL_BATCH // groups.num_readers
    own = slice(groups.reader * rows, (groups.reader + 1) * rows)
    for step in range(STEPS):
        planes = [plane[own].split(micro) for plane in batches(step)]
        result["metrics"].append(
            train.train_step(run, [Batch(*parts) for parts in zip(*planes, strict=True)])
        )
    result["biases"] = [layer.expert_bias_E.clone() for layer in layers]
    result["shards"] = sum(local(p).numel() for p in run.model.parameters())
    return result


def all_trained(cases: list[list[str]]) -> list[dict]:
    return [trained(overrides) for overrides in cases]


# A piece of a row: 4, 8 or 16 tokens with cp=2 (4, 2 turns or 1), 4 or 8 with cp=4.
WINDOWS = (4, 8, 9, 32, 100)
MUON = ["optim=muon", "optim.lr=0.02"]
LAYOUTS = {
    2: [["parallel.cp=2"], ["parallel.cp=2", "parallel.ep=2", "activation_checkpoint=selective"]],
    4: [
        ["parallel.cp=4"],
        ["parallel.cp=4", "parallel.ep=4", "activation_checkpoint=full"],
        ["parallel.cp=4", "parallel.ep=2", "micro_batch=1"],
        ["parallel.cp=2", "parallel.dp_shard=2", "parallel.ep=4"],
        ["parallel.cp=2", "parallel.dp_replicate=2", "parallel.ep=2", "activation_checkpoint=full"],
        ["parallel.cp=2", "parallel.dp_replicate=2", "micro_batch=1", *MUON],
    ],
}
# Of each layout one window in `make test`: below, equal to, one above and far above a piece, above the row.
QUICK = {2: [(0, 4), (0, 9), (1, 32)], 4: [(0, 8), (1, 4), (2, 100), (3, 9), (4, 8), (5, 32)]}
EVERY = {ranks: [(i, w) for i in range(len(layouts)) for w in WINDOWS] for ranks, layouts in LAYOUTS.items()}


def oracle_of(layout: list[str], window: int) -> list[str]:
    kept = [word for word in layout if word.startswith(("optim", "micro_batch"))]
    return ["micro_batch=2", *kept, f"model.window={window}"]


def assert_equal(got: dict, expected: dict) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got["counts"], expected["counts"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got["biases"], expected["biases"], strict=True))
    for ours, theirs in zip(got["metrics"], expected["metrics"], strict=True):
        for key in ("loss", "grad_norm", "balance/max_violation", "data/step_flop"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
        # a small difference of large sums of float32
        assert ours["batch_het"] == pytest.approx(theirs["batch_het"], abs=1e-5)
    for name, gradient in expected["gradients"].items():
        error = (got["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-5, (name, error)


def check(num_ranks: int, cases: list[tuple[int, int]]) -> None:
    layouts = LAYOUTS[num_ranks]
    own = [["micro_batch=2", *layouts[i], f"model.window={window}"] for i, window in cases]
    oracles = {tuple(oracle_of(layouts[i], window)): None for i, window in cases}
    expected = dict(zip(oracles, run_ranks(all_trained, 1, list(map(list, oracles)))[0], strict=True))
    results = run_ranks(all_trained, num_ranks, own)
    for number, (i, window) in enumerate(cases):
        of_ranks = [result[number] for result in results]
        for got in of_ranks:
            assert_equal(got, expected[tuple(oracle_of(layouts[i], window))])
        assert all(got["metrics"] == of_ranks[0]["metrics"] for got in of_ranks), "the same bits on all ranks"


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_cut_rows_equal_whole_ones(num_ranks):
    check(num_ranks, QUICK[num_ranks])


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_cut_rows_equal_whole_ones_in_every_layout_and_window(num_ranks):
    check(num_ranks, EVERY[num_ranks])
