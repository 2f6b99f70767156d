"""Does a simulation say what happened, and does it route as the trainer does?

Letters: M layers, E experts, K per token, T tokens of a step. The numbers come from slow loops over what was
routed, from the trainer's own steps, or by hand.
"""

import base64
import gc
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

import trainer.config
from tests.ranks import run_ranks
from tests.runs import tensors
from trainer import train
from trainer.balance import RoutingStats
from trainer.balance.trace import Trace
from trainer.config import CONFIG_DIR, ConfigError
from trainer.lab.simulate import __main__ as program
from trainer.lab.simulate import history as histories
from trainer.lab.simulate import run as running
from trainer.lab.simulate.config import SimulateConfig, arms, load
from trainer.lab.simulate.history import History, Probe
from trainer.lab.simulate.levels import RoutingLayer
from trainer.lab.simulate.result import CURVES, METRICS, check
from trainer.lab.simulate.run import build_level, ranking, simulate
from trainer.run.build import loss_weights

REPOSITORY = Path(__file__).parent.parent
SMALL = ["layers=2", "experts=8", "top_k=2", "tokens=64", "steps=20", "ep=4", "workers=1"]
TINY = [
    "level=tiny",
    "layers=2",
    "experts=8",
    "top_k=2",
    "tokens=128",
    "steps=3",
    "ep=4",
    "level.train=['experiment=synthetic','seq_len=32','micro_batch=2']",
]
CLOSED = [
    "level=closed",
    "layers=1",
    "experts=16",
    "top_k=2",
    "tokens=384",
    "steps=150",  # 15 steps of 48 tokens per expert are judged
    "ep=4",
    "workers=1",
    "level.forgetting=0.05",
]  # ten times as fast as configs/level/closed.yaml
ALL_ARMS = sorted(path.stem for path in (CONFIG_DIR / "balance").glob("*.yaml"))


def simulated(*overrides: str) -> dict[str, Any]:
    config = load([*overrides])
    return simulate(config, arms=arms(config, [*overrides]))


def timeless(run: dict[str, Any], *without: str) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in ("seconds", *without)}


def run_main(monkeypatch, *overrides: str) -> int:
    monkeypatch.setattr(sys, "argv", ["simulate", *overrides])
    return program.main()


@pytest.fixture
def collected() -> Iterator[None]:
    """After a model was built here: a process group left in a cycle would be taken down in a process forked
    later, where its threads are not, and hang it."""
    yield
    gc.collect()


# -- the figures, from slow loops -----------------------------------------------------------------------


class Step(NamedTuple):
    scores: list  # of layer, token, expert
    chosen: list  # of layer, token: a set of experts
    counts: list  # of layer, expert
    bias_ME: Tensor  # after the step


RECORDED = [
    "layers=2",
    "experts=8",
    "top_k=2",
    "tokens=300",
    "steps=67",
    "ep=4",
    "workers=1",
    "scores.popularity_std=1.5",
    "balance=smebu",
    "balance.rule.lr=0.02",
    "guard=off",
]  # more tokens than are probed


def choose(choice: list[float], top_k: int) -> set[int]:
    return set(sorted(range(len(choice)), key=lambda expert: -choice[expert])[:top_k])


def count(chosen: list[set[int]], experts: int) -> list[int]:
    return [sum(expert in ids for ids in chosen) for expert in range(experts)]


@cache
def slow_run() -> tuple[SimulateConfig, list[Step]]:
    """Nothing of the simulator but its scores; SMEBU as arXiv:2602.17004, eq. 23-28."""
    c = load(RECORDED)
    shape = {"num_layers": c.layers, "num_experts": c.experts, "top_k": c.top_k, "tokens": c.tokens}
    scores = instantiate(c.scores)(**shape, steps=c.steps, seed=0)
    bias_ME, momentum_ME = torch.zeros(2, c.layers, c.experts)
    lr, beta, kappa = 0.02, 0.5, 2.0
    steps = []
    for step in range(1, c.steps + 1):
        scores_MTE = torch.stack([torch.sigmoid(scores(step, m)) for m in range(c.layers)])
        chosen = [
            [choose(token, c.top_k) for token in layer]
            for layer in (scores_MTE + bias_ME.unsqueeze(1)).tolist()
        ]
        counts_ME = torch.tensor([count(layer, c.experts) for layer in chosen])
        mean_M1 = counts_ME.double().mean(1, keepdim=True)
        delta_ME = lr * torch.tanh(kappa * ((mean_M1 - counts_ME) / mean_M1).float())
        momentum_ME = torch.lerp(momentum_ME, delta_ME - delta_ME.mean(1, keepdim=True), 1 - beta)
        bias_ME = bias_ME + momentum_ME
        steps.append(Step(scores_MTE.tolist(), chosen, counts_ME.tolist(), bias_ME))
    return c, steps


def test_a_frozen_run_is_the_routers_and_the_rules_own():
    """Biases bit for bit, loads exactly."""
    config, steps = slow_run()
    level = build_level(config, 0)
    for number, step in enumerate(steps, start=1):
        level.step(number)
        assert torch.equal(level.balancer.bias_ME, step.bias_ME)
        assert torch.equal(level.balancer.load_ME, torch.tensor(step.counts) / 75)  # T K / E
    assert steps[-1].bias_ME.abs().max() > 0.05


def slow_series(config: SimulateConfig, steps: list[Step]) -> dict[str, list[float]]:
    experts, top_k, tokens = config.experts, config.top_k, config.tokens
    mean = tokens * top_k / experts
    found: dict[str, list[float]] = {}
    bias = [[0.0] * experts] * config.layers
    for step in steps:
        loads = [[n / mean for n in layer] for layer in step.counts]
        after = step.bias_ME.tolist()
        moves = [b - a for old, new in zip(bias, after, strict=True) for a, b in zip(old, new, strict=True)]
        probed, kept, total = histories.PROBED, 0, 0.0
        for scores, chosen, b in zip(step.scores, step.chosen, after, strict=True):
            for token, ids in zip(scores[:probed], chosen[:probed], strict=True):
                kept += len(ids & choose([s + x for s, x in zip(token, b, strict=True)], top_k))
                total += sum(token[i] for i in ids)
        choices = config.layers * probed * top_k
        # ep=4: two experts each
        ranks = [[sum(layer[i : i + 2]) for i in range(0, experts, 2)] for layer in step.counts]
        floor = math.sqrt(2 * math.log(experts) * (1 - top_k / experts) / mean)
        max_violation = statistics.fmean(max(layer) - 1 for layer in loads)
        values = {
            "max_violation": max_violation,
            "floor": floor,
            "excess": max_violation - floor,
            "min_load": min(map(min, loads)),
            "dead_experts": sum(n == 0 for layer in step.counts for n in layer),
            "load_cv": statistics.fmean(map(statistics.pstdev, loads)),
            "bias_rms": math.sqrt(statistics.fmean(b * b for layer in after for b in layer)),
            "bias_step_rms": math.sqrt(statistics.fmean(move * move for move in moves)),
            "churn": 1 - kept / choices,
            "mean_score": total / choices,
            "ep_max_over_mean": statistics.fmean(max(layer) / statistics.fmean(layer) for layer in ranks),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
        bias = after
    return found


def slow_wait(series: list[float], limits: list[float], first: int) -> int | None:
    """The first of ten steps that are below the limit in the mean, counted from `first` (from 0)."""
    for step in range(first, len(series) - 9):
        if sum(series[step : step + 10]) < sum(limits[step : step + 10]):
            return step - first + 1
    return None


def slow_chatter(steps: list[Step], tail: int) -> float:
    biases = (
        torch.stack([torch.zeros_like(steps[0].bias_ME), *(step.bias_ME for step in steps)])
        .flatten(1)
        .T.tolist()
    )
    reversals = moves = 0
    for bias in biases:
        deltas = [b - a for a, b in pairwise(bias)]
        for before, now in list(pairwise(deltas))[-tail:]:
            moves += before != 0 and now != 0
            reversals += before * now < 0
    return reversals / moves


def test_the_summary_is_that_of_slow_loops():
    config, steps = slow_run()
    series, tail = slow_series(config, steps), round(67 / 5)
    shift = round(67 / 2)  # the steps before; scores=shift
    expected: dict[str, Any] = {
        name: statistics.fmean(series[name][-tail:]) for name in METRICS if name in series
    }
    expected |= {
        "steps_to_balance": slow_wait(series["max_violation"][:shift], [0.6] * shift, 0),
        "steps_to_floor": slow_wait(
            series["max_violation"][:shift], [1.25 * floor for floor in series["floor"]], 0
        ),
        "recovery_steps": slow_wait(series["max_violation"], [0.6] * 67, shift),
        "excess_run": statistics.fmean(max(0.0, excess) for excess in series["excess"]),
        "excess_mean": statistics.fmean(series["excess"][-tail:]),
        "excess_p99": max(series["excess"][-tail:]),  # of 13 steps
        "bias_chatter": slow_chatter(steps, tail),
        "collapse_step": None,
        "first_alarm": None,
        "alarms": 0,  # these are tested by hand
    }
    level = build_level(config, 0)
    metrics = [level.step(number) for number in range(1, 68)]
    expected["gain"] = statistics.fmean(m["balance/gain"] for m in metrics[-tail:])
    worst = [
        max(value for name, value in m.items() if name.startswith("balance/stability/")) for m in metrics
    ]
    expected["stability"] = statistics.fmean(worst[-tail:])
    [run] = simulated(*RECORDED)["runs"]
    assert run["summary"] == {
        name: None if value is None else pytest.approx(value, rel=1e-5) for name, value in expected.items()
    }
    assert run["summary"].keys() == METRICS.keys() - {"loss"}
    assert expected["steps_to_balance"] > 1 and expected["recovery_steps"] > 1
    assert 0 < expected["bias_chatter"] < 1 and expected["churn"] > 0


@pytest.mark.parametrize("bins", [500, 7])
def test_curves_and_loads_are_means_of_time_bins(monkeypatch, bins):
    monkeypatch.setattr(histories, "MAX_BINS", bins)
    config, steps = slow_run()
    [run] = simulated(*RECORDED)["runs"]
    ends, num_bins = run["steps"], min(bins, 67)
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert len(ends) == num_bins and ends[-1] == 67 and set(sizes) <= {67 // num_bins, -(-67 // num_bins)}
    binned = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    for name, values in slow_series(config, steps).items():
        means = [statistics.fmean(values[i] for i in of) for of in binned]
        assert run["curves"][name] == pytest.approx(means, rel=1e-4, abs=1e-6)  # five digits are kept
    assert CURVES.keys() - run["curves"].keys() == {"loss"}
    loads = run["loads"]
    assert (loads["layers"], loads["experts"], loads["bins"], loads["max"]) == (2, 8, num_bins, 4.0)
    data = list(base64.b64decode(loads["data"]))
    for m in range(2):
        for e in range(8):
            row = data[(m * 8 + e) * num_bins :][:num_bins]
            expected = [min(4.0, statistics.fmean(steps[i].counts[m][e] / 75 for i in of)) for of in binned]
            assert [value / 255 * 4 for value in row] == pytest.approx(expected, abs=0.5 / 255 * 4 + 1e-6)


# -- the figures, by hand --------------------------------------------------------------------------------


class Scripted:
    """A level without a router: what was routed, the biases and the metrics are given."""

    def __init__(self, layers: int = 1, experts: int = 2, shift_step: int | None = None):
        shape_ME = (layers, experts)
        self.balancer = SimpleNamespace(
            load_ME=torch.ones(shape_ME), bias_ME=torch.zeros(shape_ME), observers=()
        )
        self.layers, self.shift_step = [], shift_step


def play(
    level: Scripted,
    steps: int,
    *,
    counts=lambda step: [[8, 8]],
    bias=lambda step: [[0.0, 0.0]],
    ep=1,
    below=0.6,
    max_violation=lambda step: 0.0,
    floor=0.2,
    alarm=lambda step: False,
) -> History:
    history = History(level, steps=steps, ep=ep, balanced_below=below)
    for step in range(1, steps + 1):
        (observe,) = level.balancer.observers
        observe(step, RoutingStats(torch.tensor(counts(step))))
        level.balancer.bias_ME = torch.tensor(bias(step))
        metrics = {
            "balance/max_violation": max_violation(step),
            "balance/floor": floor,
            "guard/alarm": float(alarm(step)),
        }
        history.add(step, metrics)
    return history


def test_waits_by_hand():
    """Ten steps from the third on have five of 1.0 and five of 0.0: the first mean below 0.6. Again after the
    shift.
    """
    waits = ["steps_to_balance", "steps_to_floor", "recovery_steps"]
    uneven = {*range(1, 8), *range(41, 49)}
    summary = play(Scripted(shift_step=41), 80, max_violation=lambda step: float(step in uneven)).summary()
    assert [summary[name] for name in waits] == [3, 6, 4]  # below 1.25 * 0.2: two of ten
    late = play(Scripted(shift_step=41), 80, max_violation=lambda step: float(step < 50)).summary()
    assert [late[name] for name in waits] == [None, None, 5]  # what comes after the shift is no first balance
    never = play(Scripted(), 30, max_violation=lambda step: 0.625, below=0.625).summary()
    assert [never[name] for name in waits[:2]] == [None, None] and "recovery_steps" not in never
    assert (
        play(Scripted(), 30, max_violation=lambda step: 0.625, below=0.626).summary()["steps_to_balance"] == 1
    )
    assert play(Scripted(), 9).summary()["steps_to_balance"] is None  # less than a window


def test_a_window_never_spans_the_shift():
    """Nine even steps before it do not make up for an uneven one after it."""
    summary = play(
        Scripted(shift_step=41), 60, max_violation=lambda step: 10.0 * (41 <= step <= 45)
    ).summary()
    assert summary["recovery_steps"] == 6


def test_excess_by_hand():
    """Of the 200 steps of the tail two lie above the 99th percentile; what is below the floor does not offset
    the rest.
    """
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    values = [0.0] * 400 + [1.2] * 400 + [0.2 + i for i in order]
    summary = play(Scripted(), 1000, max_violation=lambda step: values[step - 1]).summary()
    assert summary["excess_p99"] == 197 and summary["excess_mean"] == pytest.approx(99.5)
    assert summary["excess_run"] == pytest.approx(0.4 * 1.0 + 0.2 * 99.5)


def test_chatter_by_hand():
    """The tail of 20 steps is four. The first bias goes up before it, then up, down, up, down: three of four
    reverse the one before; the second rests, then goes up: it has no step before to reverse."""
    first = [*range(1, 17), 17, 16, 17, 16]
    bias = [[[float(first[i]), 0.0 if i < 19 else 1.0]] for i in range(20)]
    assert play(Scripted(), 20, bias=lambda step: bias[step - 1]).summary()["bias_chatter"] == 3 / 4
    assert play(Scripted(), 20).summary()["bias_chatter"] == 0.0


def test_churn_and_score_by_hand():
    """Two tokens choose {0, 1} and {2, 3} of four experts; a bias moves one of the four choices."""
    layer = RoutingLayer(4, 2, loss_weights=loss_weights(load(SMALL).balance))
    probe = Probe(layer)
    scores_TE = torch.tensor([[0.8, 0.6, 0.5, 0.1], [0.1, 0.2, 0.6, 0.7]])
    layer.count(scores_TE.logit())
    assert probe.churn() == 0 and probe.mean_score() == pytest.approx((0.8 + 0.6 + 0.6 + 0.7) / 4)
    layer.expert_bias_E.copy_(torch.tensor([0.0, 0.0, 0.2, 0.0]))
    assert probe.churn() == 1 / 4 and probe.mean_score() == pytest.approx(2.7 / 4)  # without the bias
    layer.expert_bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert probe.churn() == 1 / 4
    layer.expert_bias_E.copy_(torch.tensor([-5.0, -5.0, 0.0, 0.0]))
    assert probe.churn() == 2 / 4


def test_the_busiest_rank_by_hand():
    """Two ranks of three experts: 9 and 3 tokens in one layer, even in the other."""
    counts = [[5, 3, 1, 1, 1, 1], [2] * 6]
    history = play(Scripted(2, 6), 5, counts=lambda step: counts, bias=lambda step: [[0.0] * 6] * 2, ep=2)
    assert history.summary()["ep_max_over_mean"] == pytest.approx((9 / 6 + 1) / 2)


def test_the_first_collapse_by_hand():
    """An expert without tokens from step 30 on: 0.95^n is below 0.1 from n = 45 on. One that never had half a
    share is no loss, nor is one that keeps a quarter."""
    lost_from = {0: None, 30: 74, 1000: None}
    for first, step in lost_from.items():
        counts = [[[16, 0]] if number >= first else [[8, 8]] for number in range(101)]
        assert play(Scripted(), 100, counts=counts.__getitem__).summary()["collapse_step"] == step
    quarter = play(Scripted(), 100, counts=lambda step: [[14, 2]] if step >= 30 else [[8, 8]])
    assert quarter.summary()["collapse_step"] is None


def test_alarms_are_counted():
    summary = play(Scripted(), 50, alarm=lambda step: step in (7, 40)).summary()
    assert (summary["first_alarm"], summary["alarms"]) == (7, 2)


def test_memory_does_not_grow_with_steps(monkeypatch):
    monkeypatch.setattr(histories, "MAX_BINS", 8)
    monkeypatch.setattr(histories, "MAX_TAIL", 10)
    sizes = []
    for steps in (100, 1000):
        history = play(Scripted(), steps, max_violation=float)
        kept = history.as_dict(with_loads=True)
        sizes.append(
            (len(history.tail), history.load_NME.shape, *map(len, (kept["steps"], *kept["curves"].values())))
        )
        end = range(steps - steps // 5 + 1, steps + 1)
        # every 2nd, every 20th step
        assert kept["summary"]["excess_mean"] == pytest.approx(statistics.fmean(end), rel=0.02)
    assert sizes[0] == sizes[1] and sizes[0][0] == 10


def test_bins_are_few_whatever_the_shape():
    for layers, experts in ((1, 2), (60, 256), (200, 1000)):
        history = History(Scripted(layers, experts), steps=10**9, ep=1, balanced_below=0.6)
        assert 20 <= history.num_bins <= 500
        assert history.num_bins * layers * experts <= 1_500_000 or history.num_bins == 20


def test_what_is_not_finite_is_null():
    history = play(Scripted(), 20, max_violation=lambda step: math.inf)
    kept = history.as_dict(with_loads=False)
    assert kept["summary"]["excess_mean"] is None and set(kept["curves"]["max_violation"]) == {None}


# -- seeds, workers, arms --------------------------------------------------------------------------------


def test_seeds_differ_and_can_be_repeated():
    both = simulated(*SMALL, "seed=3", "seeds=2")["runs"]
    alone = [simulated(*SMALL, f"seed={seed}")["runs"][0] for seed in (3, 4)]
    assert [run["seed"] for run in both] == [3, 4]
    assert timeless(both[0]) == timeless(alone[0])
    # of the first seed only
    assert timeless(both[1], "loads") == timeless(alone[1], "loads") and both[1]["loads"] is None
    assert both[0]["curves"] != both[1]["curves"]


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("level", [SMALL, pytest.param(TINY, marks=pytest.mark.slow)])
def test_workers_change_nothing(level):
    """Tiny: the parent's process group must be gone before a worker inherits it, or the worker hangs."""
    one, two = (simulated(*level, "seeds=2", f"workers={workers}") for workers in (1, 2))
    assert [timeless(run) for run in one.pop("runs")] == [timeless(run) for run in two.pop("runs")]
    assert timeless(one) == timeless(two)


def test_arms_are_compared_on_the_same_scores():
    """Each run is the run that the arm does alone."""
    names = ["sign", "none", "smebu_gain"]
    result = simulated(*SMALL, f"compare=[{','.join(names)},sign]", "seeds=2")  # named twice, run once
    assert [(run["arm"], run["seed"]) for run in result["runs"]] == [
        (name, seed) for name in names for seed in (0, 1)
    ]
    for name in names:
        alone = simulated(*SMALL, f"balance={name}", "seeds=2")
        assert alone["ranking"] is None
        assert [timeless(run) for run in alone["runs"]] == [
            timeless(run) for run in result["runs"] if run["arm"] == name
        ]
    assert sorted(row["arm"] for row in result["ranking"]) == sorted(names)
    # before any bias moved
    assert len({run["curves"]["max_violation"][0] for run in result["runs"] if run["seed"] == 0}) == 1
    losses = simulated(
        *SMALL, "compare=[sign,none]", "balance.switch_loss_weight=0.5", "steps=3", "scores=topics"
    )
    assert len(losses["runs"]) == 2  # what is not the rule may be set for all


def test_compare_all_is_every_arm():
    overrides = [*SMALL, "compare=all", "steps=3", "scores=topics"]
    config = load(overrides)
    compared = arms(config, overrides)
    result = simulate(config, arms=compared)
    assert [run["arm"] for run in result["runs"]] == [arm.balance.name for arm in compared] == ALL_ARMS
    assert sorted(row["arm"] for row in result["ranking"]) == ALL_ARMS
    for arm in compared:
        assert (
            arm.balance
            == trainer.config.load(["experiment=synthetic", f"balance={arm.balance.name}"]).balance
        )


def test_the_ranking_by_hand():
    """Collapsed runs first, then the mean of excess_run; 12.706 is Student's t with one degree of freedom."""
    rows = {
        "lost": [(True, 0.1, 5), (False, 0.1, 5)],
        "slow": [(True, 0.4, 5), (True, 0.6, None)],
        "even": [(True, 0.45, None), (True, 0.45, None)],
        "worse": [(False, 0.0, 1), (False, 0.0, 1)],
    }
    runs = [
        {"arm": arm, "ok": ok, "summary": {"excess_run": excess, "steps_to_balance": wait}}
        for arm, values in rows.items()
        for ok, excess, wait in values
    ]
    ranked = ranking(runs)
    assert [(row["rank"], row["arm"], row["collapsed_runs"], row["num_seeds"]) for row in ranked] == [
        (1, "even", 0, 2),
        (2, "slow", 0, 2),
        (3, "lost", 1, 2),
        (4, "worse", 2, 2),
    ]
    metrics = {row["arm"]: row["metrics"] for row in ranked}
    half = 12.706 * 0.1  # s / sqrt(2) = 0.1
    slow = metrics["slow"]["excess_run"]
    assert (slow["mean"], slow["low"], slow["high"]) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    # of those that were
    assert metrics["slow"]["steps_to_balance"] == {"mean": 5, "low": None, "high": None, "num_seeds": 1}
    assert metrics["even"]["steps_to_balance"] == {"mean": None, "low": None, "high": None, "num_seeds": 0}


# -- closed ------------------------------------------------------------------------------------------------


def closed(*overrides: str) -> dict[str, Any]:
    [run] = simulated(*CLOSED, *overrides)["runs"]
    return run


def test_without_balancing_feedback_loses_experts_and_a_rule_or_a_loss_keeps_them():
    even, lost = (closed(f"level.feedback={feedback}", "balance=none") for feedback in (0.0, 0.1))
    kept = closed("level.feedback=0.1", "balance=smebu", "balance.rule.lr=0.05")
    assert (even["collapsed"], kept["collapsed"]) == (0, 0) and lost["collapsed"] > 0
    assert even["ok"] and kept["ok"] and not lost["ok"]
    assert lost["summary"]["collapse_step"] < 150 and even["summary"]["collapse_step"] is None
    pushed = closed("level.feedback=0.1", "balance=none", "balance.batch_loss_weight=1e-2")
    assert pushed["summary"]["excess_mean"] < lost["summary"]["excess_mean"] / 2
    assert pushed["summary"]["bias_step_rms"] == 0  # it pushes the router itself


@pytest.mark.parametrize("fault", [None, "rule", "feedback", "logits", "expert"])
def test_feedback_loss_and_fault_are_those_of_a_slow_loop(fault):
    """The loss by autograd through its formula: weight sum_t sum_i f_i P_ti, with f of the last step."""
    weight, feedback, forgetting, gate_lr, lr, fault_step = 0.02, 0.1, 0.05, 100.0, 0.01, 7
    overrides = [
        "level=closed",
        "layers=2",
        "experts=6",
        "top_k=2",
        "tokens=48",
        "steps=12",
        "ep=2",
        "balance=sign",
        "balance.sequence_loss_weight=0",
        f"balance.batch_loss_weight={weight}",
        f"balance.rule.lr={lr}",
        f"level.feedback={feedback}",
        f"level.forgetting={forgetting}",
    ]
    c = load([*overrides, *([f"level.fault={fault}"] if fault else [])])
    level = build_level(c, 0)
    scores = instantiate(c.scores)(num_layers=2, num_experts=6, top_k=2, tokens=48, steps=12, seed=0)
    a_ME, bias_ME = torch.zeros(2, 2, 6)
    load_ME = torch.ones(2, 6)
    for step in range(1, 13):
        since = max(0, step - fault_step + 1)
        counts, gradients = [], []
        for m in range(2):
            a_E = a_ME[m].clone().requires_grad_()
            logits_TE = scores(step, m) + a_E
            if fault == "logits":
                logits_TE = logits_TE * 1.02**since
            if fault == "expert":
                logits_TE = logits_TE - 0.02 * since * torch.eye(6)[m]
            scores_TE = logits_TE.sigmoid()
            counts.append(count([choose(token, 2) for token in (scores_TE + bias_ME[m]).tolist()], 6))
            share_TE = scores_TE / scores_TE.sum(1, keepdim=True)
            gradients += [
                gradient_E / 48
                for gradient_E in torch.autograd.grad(weight * (share_TE * load_ME[m]).sum(), a_E)
            ]
        load_ME = torch.tensor(counts) * 6 / 96
        strength = feedback * 10 if fault == "feedback" and since else feedback
        a_ME = (
            a_ME + strength * torch.tanh(load_ME - 1) - forgetting * a_ME - gate_lr * torch.stack(gradients)
        )
        sign_ME = (1 - load_ME).sign()
        if not (fault == "rule" and since):
            bias_ME = bias_ME + lr * (sign_ME - sign_ME.mean(1, keepdim=True))
        level.step(step)
        assert level.balancer.load_ME.tolist() == load_ME.tolist()
        assert (level.attraction_ME - a_ME).abs().max() < 1e-5
        assert (level.balancer.bias_ME - bias_ME).abs().max() < 1e-6
    assert a_ME.abs().max() > 0.1


def test_growing_logits_end_at_twentyfold():
    level = build_level(
        load(
            [
                *CLOSED,
                "steps=400",
                "level.fault=logits",
                "level.fault_at=0.01",
                "tokens=16",
                "balance=none",
                "level.feedback=0",
            ]
        ),
        0,
    )
    rms = [level.step(step)["balance/logit_rms"] for step in range(1, 401)]
    assert rms[10] < rms[60] < rms[110] and rms[-1] == pytest.approx(20 * rms[0], rel=0.2)  # 1.02^152 = 20.3


def test_the_guard_notices_a_fault_before_the_collapse():
    fault = [
        "level.feedback=0.01",
        "balance=smebu",
        "steps=300",
        "tokens=512",
        "guard.grace=100",
        "level.fault=expert",
    ]
    summary = closed(*fault)["summary"]
    assert 150 < summary["first_alarm"] < summary["collapse_step"]


# -- tiny and replay ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("collected")
def test_tiny_is_the_trainer(tmp_path):
    """The same metrics, losses among them, step by step; and the same biases."""
    level = build_level(load([*TINY, f"run_dir={tmp_path}"]), 5)
    mine = [level.step(step) for step in (1, 2, 3)]
    mine.append({"bias": level.balancer.bias_ME.tolist()})
    level.close()
    same = [
        "experiment=synthetic",
        "seq_len=32",
        "micro_batch=2",
        "global_batch=4",
        "steps=3",
        "seed=5",
        "model.num_layers=3",
        "model.num_dense_layers=1",
        "model.num_experts=8",
        "model.top_k=2",
        "guard=on",
        f"run_dir={tmp_path}",
    ]
    run = train.build(trainer.config.load(same))
    theirs: list[dict] = [train.train_step(run, run.stream.next_step(2)) for _ in range(3)]
    theirs.append({"bias": run.balancer.bias_ME.tolist()})
    dist.destroy_process_group()
    assert mine == theirs and mine[0]["loss"] > 6


@pytest.mark.usefixtures("collected")
def test_tiny_shows_its_losses_and_takes_the_arm(tmp_path):
    result = simulated(*TINY, f"run_dir={tmp_path}", "compare=[smebu,none]", "workers=1")
    curves = {run["arm"]: run["curves"] for run in result["runs"]}
    assert len(curves["smebu"]["loss"]) == 3 and result["runs"][0]["summary"]["loss"] == pytest.approx(
        curves["smebu"]["loss"][-1], rel=1e-4
    )
    assert curves["none"]["bias_rms"] == [0.0] * 3 and all(curves["smebu"]["bias_rms"])
    assert result["config"]["scores"] is None and {"churn", "mean_score"} <= curves["smebu"].keys()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A real run of six steps that recorded what its router did; smebu, four layers of eight experts."""
    where = tmp_path_factory.mktemp("trained")
    overrides = [
        "experiment=synthetic",
        "global_batch=4",
        "micro_batch=2",
        "seq_len=32",
        "steps=6",
        "model.num_experts=8",
        "name=run",
        f"run_dir={where}",
    ]

    def record(*more: str) -> int:
        return train.train(trainer.config.load([*overrides, *more]))

    run_ranks(record, 1, "balance.trace=router.trace")
    run_ranks(
        record, 1, "balance.trace=router.trace", "balance.trace_required=true", "name=required", "steps=2"
    )
    return where


def test_a_replay_under_the_same_rule_is_the_training_run(trained):
    level = build_level(load(["level=replay", f"level.trace={trained}/run/router.trace"]), 0)
    for step, stats in enumerate(Trace(trained / "run" / "router.trace"), start=1):
        assert torch.equal(level.balancer.bias_ME, stats.bias_ME)
        level.step(step)
    saved = [
        bias_E
        for name, bias_E in sorted(tensors(trained / "run", 6).items())
        if name.endswith("expert_bias_E")
    ]
    assert (
        step == 6 and torch.equal(level.balancer.bias_ME, torch.stack(saved)) and level.balancer.bias_ME.any()
    )


def test_a_replay_has_the_shape_of_the_trace_and_says_open_loop(trained):
    path = trained / "run" / "router.trace"
    result = simulated("level=replay", f"level.trace={path}", "compare=[sign,none]", "ep=4", "workers=1")
    shape = ("layers", "experts", "top_k", "tokens", "steps", "ep", "scores", "shift_step")
    assert [result["config"][key] for key in shape] == [4, 8, 2, 128, 6, 4, None, None]
    assert result["notes"] == [
        f"Open loop: the counts are those of {path}; they do not answer to the biases of the replayed rule."
    ]
    sign, none = result["runs"]
    assert sign["curves"]["max_violation"] == none["curves"]["max_violation"]  # as recorded
    assert any(sign["curves"]["bias_rms"]) and not any(none["curves"]["bias_rms"])
    assert sign["steps"] == [1, 2, 3, 4, 5, 6] and "churn" not in sign["curves"] and sign["experts"] == 32
    short = simulated("level=replay", f"level.trace={path}", "steps=2", "workers=1")
    assert short["runs"][0]["steps"] == [1, 2]


def test_quantile_rules_replay_what_was_recorded_for_them(trained, monkeypatch):
    """Refused before any arm has made a step."""
    [run] = simulated("level=replay", f"level.trace={trained}/required/router.trace", "balance=quantile")[
        "runs"
    ]
    assert run["curves"]["bias_rms"][0] > 0
    monkeypatch.setattr(running, "run_one", None)
    with pytest.raises(
        ConfigError, match="balance=quantile needs .* record with balance.trace_required=true"
    ):
        simulated(
            "level=replay", f"level.trace={trained}/run/router.trace", "compare=[sign,quantile]", "workers=1"
        )


# -- the program -------------------------------------------------------------------------------------------


def test_ci_fails_where_experts_collapse(monkeypatch, capsys, tmp_path):
    collapsing = [*CLOSED, "level.feedback=0.1", "balance=none", f"run_dir={tmp_path}"]
    for ci, code in (("true", train.COLLAPSED), ("false", train.OK)):
        assert run_main(monkeypatch, *collapsing, f"ci={ci}") == code
        out = capsys.readouterr().out
        assert re.search(
            r"FAILED none seed 0: (\d+) of 16 experts collapsed\nbalance: FAILED, \1 of 16 experts collapsed",
            out,
        )
    assert (
        run_main(monkeypatch, *CLOSED, "level.feedback=0", "balance=none", f"run_dir={tmp_path}", "ci=true")
        == train.OK
    )
    assert "balance: ok, 0 of 16 experts collapsed" in capsys.readouterr().out
    assert (tmp_path / "simulate-closed-none" / "simulation.json").is_file()


def test_a_short_simulation_says_that_it_cannot_be_judged(monkeypatch, capsys, tmp_path):
    """128 tokens, two of 16 experts each: 16 tokens per expert and step; on the terminal and on the page."""
    short = [*CLOSED, "tokens=128", "level.feedback=0.1", "balance=none", f"run_dir={tmp_path}", "ci=true"]
    assert run_main(monkeypatch, *short) == train.OK
    assert capsys.readouterr().out.splitlines()[-1] == (
        "balance: too short to judge (240 tokens per expert in the last 15 steps; 619 in 15 steps are needed)"
    )
    assert "too short to judge" in (tmp_path / "simulate-closed-none" / "simulation.html").read_text()


def test_ci_fails_where_a_threshold_is_missed(monkeypatch, capsys, tmp_path):
    base = [
        *SMALL,
        "balance=sign",
        "balance.rule.lr=0.02",
        "steps=40",
        f"run_dir={tmp_path}",
        "name=it",
        "seeds=2",
        "ci=true",
    ]
    assert run_main(monkeypatch, *base) == train.OK
    kept = json.loads((tmp_path / "it" / "simulation.json").read_text())
    values = [run["summary"]["excess_mean"] for run in kept["runs"]]
    lower, higher = sorted(values)
    assert "FAILED" not in capsys.readouterr().out and kept["failures"] == []
    # the limit itself is met
    assert run_main(monkeypatch, *base, f"thresholds.excess_mean={higher!r}") == train.OK
    capsys.readouterr()
    assert run_main(monkeypatch, *base, f"thresholds.excess_mean={(lower + higher) / 2!r}") == train.COLLAPSED
    missed = (
        f"sign seed {values.index(higher)}: excess_mean is {higher:.4g}, the limit is "
        f"{(lower + higher) / 2:g}"
    )
    assert f"FAILED {missed}\nbalance: FAILED, 0 of 32 experts collapsed" in capsys.readouterr().out
    kept = json.loads((tmp_path / "it" / "simulation.json").read_text())
    assert kept["failures"] == [missed] and kept["thresholds"]["excess_mean"] == (lower + higher) / 2
    never = [*base, "thresholds.steps_to_balance=3", "thresholds.recovery_steps=9", "balanced_below=1e-3"]
    assert run_main(monkeypatch, *never) == train.COLLAPSED
    out = capsys.readouterr().out
    assert "FAILED sign seed 0: steps_to_balance is never reached, the limit is 3" in out
    assert "FAILED sign seed 1: recovery_steps is never reached, the limit is 9" in out
    assert run_main(monkeypatch, *never, "ci=false") == train.OK


REFUSED = {  # overrides: what the message must contain
    "level=frosen": "Could not find 'level/frosen' Available options in 'level': closed frozen replay tiny",
    "stpes=3": "did you mean steps",
    "scores.zpif=2": "did you mean scores.zipf",
    "+scores.zpif=2": "did you mean zipf",
    "level=closed level.feedbak=1": "Key 'feedbak'",
    "balance.rule.kapa=2": "did you mean balance.rule.kappa",
    "steps=many": "many",
    "compare=[smebu,sgin]": "compare: there is no configs/balance/sgin.yaml (did you mean sign",
    "compare=sign": "compare=sign: must be all or a list of arms, compare=[smebu,sign]",
    "compare=all balance=sign": "balance=sign with compare=: each arm brings its own rule",
    "compare=all balance.rule.lr=1": "balance.rule.lr=1 with compare=: each arm brings its own rule",
    "ep=3": "ep=3 does not divide experts=8; use one of [1, 2, 4, 8]",
    "top_k=9": "top_k=9 exceeds experts=8",
    "layers=0": "layers=0: must be at least 1",
    "tokens=-1": "tokens=-1: must be at least 1",
    "steps=0": "steps=0: must be at least 1",
    "seeds=0": "seeds=0: must be at least 1",
    "seed=-1": "seed=-1: must be at least 0",
    "workers=0": "workers=0: must be at least 1",
    "balanced_below=0": "balanced_below=0.0: must be above 0",
    "balanced_below=inf": "balanced_below=inf: must be above 0, and finite",
    "balance.batch_loss_weight=-1": "balance.batch_loss_weight=-1.0: must be 0 or more",
    "balance.batch_loss_weight=inf": "balance.batch_loss_weight=inf: must be 0 or more, and finite",
    "thresholds.excess_mean=inf": "thresholds.excess_mean=inf: must be at least -1e+06, and finite",
    "thresholds.excess_men=1": "did you mean thresholds.excess_mean",
    "balance.rule.lr=-1": "lr=-1: must be above 0",
    "scores.zipf=-1": "zipf=-1: must lie in [0, 100]",
    "scores.change_at=0": "must leave one before and one after",
    "guard.starving=2": "guard.starving=2.0: must be at most 1 (1 is the even share)",
    "guard.stop=true": "guard.stop=True: is for training runs",
    "balance.trace=router.trace": "balance.trace=router.trace: is for training runs",
    "balance.trace=": "balance.trace=: is empty",
    "guard.ladder=[a]": "Key 'ladder' not in 'GuardConfig' (did you mean guard.",
    "layers=1000000007": "layers=1000000007: must be at most 4096 (",
    "tokens=1000000007": "tokens=1000000007: must be at most 16777216 (",
    "tokens=16777216 experts=65536 ep=1": "x experts=65536: the logits of a step would take 8,192.0 GiB, but",
    "seeds=9223372036854775807": "seeds=9223372036854775807: must be at most 10000 (",
    "run_dir=": "run_dir=: is empty",
    "run_dir=/dev/null": "run_dir=/dev/null, name=simulate-frozen-smebu: cannot be written to (Not",
    "compare=[]": "compare=[]: must be all or a list of arms",
    "name=": "name=: is empty",
    "level=tiny balance.trace_required=true": "balance.trace_required=True: is for training runs",
    "level=closed level.fault=fire": (
        "level.fault=fire: must be one of rule, feedback, logits, expert, or null"
    ),
    "level=closed level.fault_at=1": "level.fault_at=1: must lie in (0, 1)",
    "level=closed level.gate_lr=-1": "level.gate_lr=-1: must lie in [0, 1000]",
    (
        "level=tiny tokens=100 level.train=['experiment=synthetic','seq_len=32']"
    ): "tokens=100: must be a multiple of the 32 tokens",
    "level=tiny tokens=1024 level.train=['experiment=demo','stpes=3']": "did you mean steps",
    "level=replay": "level.trace is not set",
    "level=replay level.trace=nowhere": (
        "there is no such file; a training run with balance.trace=router.trace writes one"
    ),
    "level=replay level.trace=pyproject.toml": "pyproject.toml: not a router trace of version 1",
    (
        "balance=quantile balance.rule._target_=trainer.lab.simulate.levels.ExactQuantileRule level=closed"
    ): "level=frozen only",
    "name=../elsewhere": "one plain directory name",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_simulated_exits_with_2_and_says_why(monkeypatch, capsys, tmp_path, overrides):
    assert run_main(monkeypatch, *SMALL, f"run_dir={tmp_path}", *overrides.split(" ")) == train.REFUSED
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and REFUSED[overrides] in output.err
    assert output.out == "" and list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_replayed_exits_with_2(monkeypatch, capsys, trained, tmp_path):
    lines = (trained / "run" / "router.trace").read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"counts": "', '"counts": "A')
    (tmp_path / "corrupt.trace").write_text("".join(lines))
    cases = {
        f"{tmp_path}/corrupt.trace ep=1": "corrupt.trace: step 3 cannot be read",
        f"{trained}/run/router.trace ep=16": "ep=16 does not divide the 8 experts of",
    }
    for case, message in cases.items():
        code = run_main(
            monkeypatch, "level=replay", f"run_dir={tmp_path}", "workers=1", *f"level.trace={case}".split(" ")
        )
        assert code == train.REFUSED and message in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "simulate", interrupted)
    assert run_main(monkeypatch, *SMALL) == train.INTERRUPTED
    assert "nothing was written" in capsys.readouterr().err


def test_help_names_every_choice_and_cfg_shows_every_setting(monkeypatch, capsys):
    assert run_main(monkeypatch, "--help") == train.OK
    text = capsys.readouterr().out
    for group in ("level", "scores", "balance"):
        options = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
        assert re.search(rf"{group}= +{re.escape(' | '.join(options))}\n", text)
    assert "Exit codes: 0 done · 2 refused" in text
    assert run_main(monkeypatch, *SMALL, "balance=sign", "--cfg", "job") == train.OK
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.tokens, shown.balance.rule._target_, shown.scores.zipf) == (
        64,
        "trainer.balance.SignRule",
        1.0,
    )


@pytest.mark.slow
def test_the_program_from_end_to_end(tmp_path):
    overrides = [*SMALL, "compare=[smebu,none]", "seeds=2", f"run_dir={tmp_path}", "name=whole", "workers=2"]
    command = [sys.executable, "-m", "trainer.lab.simulate", *overrides]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert (process.returncode, process.stderr) == (0, ""), process.stdout + process.stderr
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "simulation.html",
        "simulation.json",
    ]

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    kept = json.loads((tmp_path / "whole" / "simulation.json").read_text(), parse_constant=refuse)
    check(kept)
    assert kept["command"] == f"triquetra simulate {' '.join(overrides)}"
    assert [timeless(run) for run in kept["runs"]] == [timeless(run) for run in simulated(*overrides)["runs"]]
    assert re.findall(r"\b([12]) (smebu|none)\b", process.stdout) == [
        (str(row["rank"]), row["arm"]) for row in kept["ranking"]
    ]
    for title in ("Balanced", "Recovery", "Excess, run", "Churn", "EP rank max/mean", "Collapsed"):
        assert title in process.stdout
    assert f"{tmp_path}/whole: simulation.json, simulation.html" in process.stdout
    page = (tmp_path / "whole" / "simulation.html").read_text()
    assert not re.search(
        r"<(script|link|img|iframe)\b[^>]*\b(src|href)=", page[: page.index("<script")] + page[-20_000:]
    )
    assert "default-src 'none'" in page
