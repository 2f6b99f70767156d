"""One rank is the oracle: every layout takes the same global batch to the same losses, gradients and
biases.
"""

import re
from functools import cache

import pytest
import torch

from tests.layouts import BASE, GLOBAL_BATCH, SEQ_LEN, STEPS, batches, full
from tests.ranks import run_ranks
from trainer import train
from trainer.config import load
from trainer.data import Batch
from trainer.model.afmoe import moe_layers

STARVED = -10.0  # a bias no score can overcome: this expert gets no token on any rank


def worker(overrides: list[str], starve: bool) -> dict:
    run = train.build(load(BASE + overrides))
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    layers, micro = moe_layers(run.model), run.config.micro_batch
    names = [name.replace("_checkpoint_wrapped_module.", "") for name, _ in run.model.named_parameters()]
    result = {"init": dict(zip(names, map(full, run.model.parameters()), strict=True)), "metrics": []}
    if starve:
        for layer in layers:
            layer.expert_bias_E[0] = STARVED
    step_weights, balance = run.optimizer.step, run.balancer.step

    def snapshot_gradients():
        result.setdefault(
            "gradients", dict(zip(names, (full(p.grad) for p in run.model.parameters()), strict=True))
        )
        step_weights()

    def snapshot_counts(step):
        counts_ME = torch.stack([layer.tokens_per_expert_E for layer in layers])
        torch.distributed.all_reduce(counts_ME)
        result.setdefault("counts", []).append(counts_ME)
        return balance(step)

    run.optimizer.step, run.balancer.step = snapshot_gradients, snapshot_counts
    per_rank = GLOBAL_BATCH // num_ranks
    for step in range(STEPS):
        mine = [t[rank * per_rank : (rank + 1) * per_rank] for t in batches(step)]
        micro_batches = [Batch(*parts) for parts in zip(*(t.split(micro) for t in mine), strict=True)]
        result["metrics"].append(train.train_step(run, micro_batches))
    result["biases"] = [layer.expert_bias_E.clone() for layer in layers]
    result["momentum"] = run.balancer.rule.momentum_ME.clone()
    return result


@cache
def trained(num_ranks: int, *overrides: str, starve: bool = False) -> list[dict]:
    """What each rank has after three steps; computed when first asked for."""
    return run_ranks(worker, num_ranks, list(overrides), starve)


def oracle(starve: bool, *model: str) -> dict:
    """Results of one rank, whole batch at once."""
    return trained(1, *model, f"micro_batch={GLOBAL_BATCH}", starve=starve)[0]


def rare(*layout):
    return pytest.param(*layout, marks=pytest.mark.rare)


def slow(*layout):
    return pytest.param(*layout, marks=pytest.mark.slow)


MUON = ["optim=muon", "optim.lr=0.02"]
LAYOUTS = [
    (1, ["micro_batch=2"], False),
    (1, ["micro_batch=4", "activation_checkpoint=full"], False),
    (1, ["micro_batch=8", "activation_checkpoint=selective"], False),
    slow(2, ["parallel=fsdp", "micro_batch=4"], False),
    slow(2, ["parallel=fsdp_ep", "micro_batch=2", "activation_checkpoint=full"], False),
    (2, ["parallel=fsdp_ep", "micro_batch=4"], True),
    rare(4, ["parallel=hsdp", "micro_batch=2"], False),
    (4, ["parallel=hsdp_ep", "micro_batch=2"], False),
    rare(4, ["parallel=hsdp_ep", "micro_batch=1", "activation_checkpoint=selective"], True),
    slow(4, ["parallel=fsdp_ep", "parallel.ep=4", "micro_batch=1", "activation_checkpoint=full"], False),
    (4, ["parallel=hsdp_ep", "micro_batch=2", *MUON], False),
    rare(4, ["parallel=fsdp", "micro_batch=1", *MUON], False),
    # 4 ranks shard 2 local experts each of ep=... more shards than experts: cut inside the matrices
    slow(4, ["parallel=fsdp_ep", "model.num_experts=2", "model.top_k=1", "micro_batch=2"], False),
    # 2 experts whole on 2 shards of 2 replicas
    slow(4, ["parallel=hsdp", "model.num_experts=2", "model.top_k=1", "micro_batch=2", *MUON], False),
]


def spelled(value) -> str:
    return "-".join(value) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("num_ranks", "overrides", "starve"), LAYOUTS, ids=spelled)
def test_every_layout_equals_one_rank(num_ranks, overrides, starve):
    model = [o for o in overrides if o.startswith(("model.", "optim"))]  # another one has its own oracle
    expected = oracle(starve, *model)
    results = trained(num_ranks, *overrides, starve=starve)
    for got in results:
        assert all(torch.equal(got["init"][name], weight) for name, weight in expected["init"].items())
        assert all(torch.equal(a, b) for a, b in zip(got["counts"], expected["counts"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(got["biases"], expected["biases"], strict=True))
        assert torch.equal(got["momentum"], expected["momentum"])
        for ours, theirs in zip(got["metrics"], expected["metrics"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        for name, gradient in expected["gradients"].items():
            error = (got["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
            assert error < 1e-5, (name, error)
    # the same bits on every rank
    assert all(result["metrics"] == results[0]["metrics"] for result in results)


def test_the_oracle_is_not_trivial():
    """All tokens counted, the starved expert at zero, every other one in use, and its gradient finite."""
    tokens = GLOBAL_BATCH * SEQ_LEN * 2  # K = 2
    for counts_ME in oracle(False)["counts"]:
        assert (counts_ME.sum(-1) == tokens).all() and counts_ME.dtype == torch.int64
    starved = oracle(True)
    assert all(
        (counts_ME[:, 0] == 0).all() and (counts_ME[:, 1:] > 0).all() for counts_ME in starved["counts"]
    )
    for name, gradient in starved["gradients"].items():
        assert gradient.isfinite().all()
        if "inner_experts" in name:
            assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


def test_clipping_scales_the_whole_gradient_to_the_limit():
    """The applied gradient of the oracle, experts included, has norm max_grad_norm = 1 or the reported
    norm.
    """
    result = oracle(False)
    norm = torch.stack([g.norm() for g in result["gradients"].values()]).norm().item()
    assert norm == pytest.approx(min(1.0, result["metrics"][0]["grad_norm"]), rel=1e-5)


@pytest.mark.slow
def test_batch_heterogeneity_is_that_of_all_ranks_microbatches():
    """Four microbatches of two rows, on one rank or on four: the same rows, so the same worst one."""
    one = trained(1, "micro_batch=2")[0]
    expected = [step["batch_het"] for step in one["metrics"]]
    assert min(expected) > 1e-3
    for result in trained(4, "parallel=hsdp_ep", "micro_batch=2"):
        assert [step["batch_het"] for step in result["metrics"]] == pytest.approx(expected, rel=1e-3)


def clip_worker(overrides):
    run = train.build(load(BASE + ["micro_batch=2", *overrides]))
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    n = GLOBAL_BATCH // num_ranks
    seen = {}
    step_weights = run.optimizer.step
    run.optimizer.step = lambda: (
        seen.update(g={k: full(p.grad) for k, p in run.model.named_parameters()}),
        step_weights(),
    )
    mine = [t[rank * n : (rank + 1) * n] for t in batches(0)]
    train.train_step(run, [Batch(*parts) for parts in zip(*(t.split(2) for t in mine), strict=True)])
    return torch.stack([g.norm() for g in seen["g"].values()]).norm().item()


def test_clipping_sees_experts_once_on_every_mesh():
    """An expert that several ranks hold must enter the norm once, or the clip depends on the layout."""
    for norm in run_ranks(clip_worker, 4, ["parallel=hsdp_ep", "max_grad_norm=0.01"]):
        assert norm == pytest.approx(0.01, rel=1e-4)


REFUSED = [
    (4, ["parallel=single"], r"parallel\.dp_shard=4"),
    (4, ["parallel.dp_replicate=3"], r"use one of \[1, 2, 4\]"),
    (4, ["parallel=fsdp", "parallel.ep=3"], r"use one of \[1, 2, 4\]"),
    (4, ["parallel=hsdp", "parallel.ep=4"], r"use one of \[1, 2\]"),
    (4, ["parallel=fsdp", "micro_batch=3"], r"use one of \[1, 2\]"),
    (4, ["parallel=fsdp", "global_batch=6"], "6"),
    (2, ["parallel=fsdp_ep", "model.num_dense_layers=3"], "no MoE layer"),
    (4, ["parallel.cp=3"], r"parallel\.cp=3 does not divide 4 ranks; use one of \[1, 2, 4\]"),
    (
        4,
        ["parallel.cp=4", "parallel.dp_shard=2"],
        r"dp_shard=2 x parallel\.cp=4 = 8 ranks, but there are 4; "
        r"use parallel\.dp_shard=1",
    ),
    (
        4,
        ["parallel.cp=2", "parallel.dp_replicate=4"],
        r"does not divide 4 ranks / parallel\.cp=2; use one of \[1, 2\]",
    ),
    (
        4,
        ["parallel.cp=4", "parallel.ep=3"],
        r"the 4 ranks of a replica \(dp_shard x cp\).*use one of \[1, 2, 4\]",
    ),
    (
        4,
        ["parallel.cp=4", "seq_len=68"],
        r"seq_len=68 is no multiple of 2 x parallel\.cp=4.*"
        r"use seq_len=64 or 72, or parallel\.cp from \[1, 2\]",
    ),
    (
        4,
        ["parallel.cp=4", "stage.decay.seq_len=66"],
        r"stage\.decay: seq_len=66 is no multiple of 2 x parallel\.cp=4",
    ),
]


def refused_worker(layouts):
    """What is said of each layout, or that it is taken."""
    said = []
    for overrides in layouts:
        try:
            train.build(load(["name=refused", *BASE[1:], "micro_batch=1", *overrides]))
            said.append("accepted")
        except train.ConfigError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("num_ranks", sorted({num_ranks for num_ranks, *_ in REFUSED}))
def test_impossible_layouts_are_refused_with_degrees_that_work(num_ranks):
    layouts, messages = zip(*(rest for ranks, *rest in REFUSED if ranks == num_ranks), strict=True)
    for said in run_ranks(refused_worker, num_ranks, layouts):
        for text, message in zip(said, messages, strict=True):
            assert re.search(message, text), text
