"""Does the guard see what it should see, in time and in silence otherwise, and does it change nothing?

Letters: M layers, E experts. Running means by hand: after n steps from 1 to x, the fast one is 1 + (x - 1)(1
- 0.95^n), the slow one has 0.995.
"""

import json
import logging
import math
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.arms import GatedLayer, Lab, batch, make_lab
from tests.arms import train as feed
from tests.ranks import run_ranks
from tests.runs import metrics
from tests.waiting import until
from trainer import train
from trainer.balance import Balancer, Guard, RoutingStats
from trainer.config import GuardConfig, load
from trainer.metrics import MetricsLog, WandbTracker

SHAPE = (2, 4)


def even(**loads: float) -> RoutingStats:
    """Counts of 100 per expert; l1e2=0.5: half of it for expert 2 of layer 1, the rest to its neighbour."""
    counts_ME = torch.full(SHAPE, 100)
    for name, load_ in loads.items():
        layer, expert = int(name[1]), int(name[3])
        counts_ME[layer, expert] = round(100 * load_)
        counts_ME[layer, (expert + 1) % 4] += 100 - round(100 * load_)
    return RoutingStats(counts_ME)


def seen(
    guard: Guard, step: int, stats: RoutingStats | None = None, *, excess: float = 0.0, logits: float = 1.0
) -> list[str]:
    """Shows the guard a step; returns the alarms."""
    values = {
        "balance/max_violation_worst_layer": 0.1 + excess,
        "balance/floor": 0.1,
        "balance/logit_rms": logits,
    }
    raised = guard.watch(step, (stats or even()).load_ME, values)
    alarms = guard.take_alarms()
    assert raised["guard/alarm"] == len(alarms) == (1 if alarms else 0)
    return alarms


# -- the signals -----------------------------------------------------------------------------------------


def test_a_healthy_run_raises_no_alarm():
    """2,000 steps with the noise of 100 tokens per expert, logits that grow by half and an expert that never
    had its share.
    """
    guard, generator = Guard(SHAPE), torch.Generator().manual_seed(0)
    share_E = torch.tensor([1.0, 1.0, 1.0, 0.1])
    for step in range(1, 2001):
        counts_ME = torch.poisson(100 * share_E.expand(SHAPE), generator=generator).long()
        stats = RoutingStats(counts_ME)
        excess = (stats.load_ME.amax() - 1).item() - 0.2
        assert seen(guard, step, stats, excess=excess, logits=1 + step / 4000) == []


def test_a_starving_expert_by_hand():
    """0.95^24 = 0.292: an expert without tokens from step 301 on has under 0.3 of its share at step 324."""
    guard = Guard(SHAPE, patience=1000)
    alarms = [
        text for step in range(1, 400) for text in seen(guard, step, even(l1e2=0.0) if step > 300 else None)
    ]
    assert alarms == ["step 324: 1 experts starve (before: 0), layer 1 expert 2 has 0.29 of its share"]
    assert guard.get_buffer("load_ME")[1, 2] == pytest.approx(0.95**99, rel=1e-4)


def test_the_first_means_are_those_of_all_steps():
    """Four steps with its share, then none: 4 / 14 is below 0.3."""
    guard = Guard(SHAPE, grace=1, patience=1000)
    alarms = [text for step in range(1, 30) for text in seen(guard, step, even(l1e0=float(step < 5)))]
    assert alarms == ["step 14: 1 experts starve (before: 0), layer 1 expert 0 has 0.29 of its share"]


def test_an_expert_that_recovered_can_starve_again():
    """An alarm in each step until it has 0.3 again: 1 - (1 - 0.95^60) 0.95^7 is above. Then once more."""
    guard = Guard(SHAPE, patience=1)
    spans = {201: 0.0, 261: 1.0, 401: 0.0}  # from this step on, this load
    steps, load_ = [], 1.0
    for step in range(1, 430):
        load_ = spans.get(step, load_)
        steps += [step] * len(seen(guard, step, even(l0e1=load_)))
    assert steps == [*range(224, 267), *range(424, 430)]


def by_hand(before: float, after: float, steps: int) -> tuple[float, float]:
    return after + (before - after) * 0.95**steps, after + (before - after) * 0.995**steps


def test_rising_violation_by_hand():
    """From 0.1 to 2.0: the fast mean passes 0.5 in the fifth step, when the slow one is 0.15."""
    guard = Guard(SHAPE, patience=1000)
    alarms = [text for step in range(1, 400) for text in seen(guard, step, excess=2.0 if step > 300 else 0.1)]
    (fast, slow), (fast_before, _) = by_hand(0.1, 2.0, 5), by_hand(0.1, 2.0, 4)
    assert fast_before < 0.5 < fast
    assert (
        alarms
        == [f"step 305: MaxVio over its floor rose from {slow:.2f} to {fast:.2f}"]
        == ["step 305: MaxVio over its floor rose from 0.15 to 0.53"]
    )
    steady = Guard(SHAPE)
    # high from the start, not rising
    assert not any(seen(steady, step, excess=3.0) for step in range(1, 400))
    slight = Guard(SHAPE)
    # rising, not high
    assert not any(seen(slight, step, excess=0.45 if step > 300 else 0.0) for step in range(1, 400))
    negative = Guard(SHAPE)
    first = next(step for step in range(1, 400) if seen(negative, step, excess=2.0 if step > 300 else -1.0))
    assert first == 314  # 2 - 3 * 0.95^14


def test_growing_logits_by_hand():
    """From 1 to 2: the fast mean is 1.5 times the slow one for the first time at the n-th step."""
    guard = Guard(SHAPE, patience=1000)
    alarms = [text for step in range(1, 400) for text in seen(guard, step, logits=2.0 if step > 300 else 1.0)]
    n = next(n for n in range(1, 100) if (now := by_hand(1.0, 2.0, n))[0] > 1.5 * now[1])
    fast, slow = by_hand(1.0, 2.0, n)
    assert alarms == [f"step {300 + n}: router logits grew from {slow:.2f} to {fast:.2f} (root mean square)"]
    slow_growth = Guard(SHAPE)
    # sevenfold, in 2,000 steps
    assert not any(seen(slow_growth, step, logits=1.001**step) for step in range(1, 2000))


def test_several_reasons_are_one_alarm():
    guard = Guard(SHAPE, patience=1000)
    sick: dict[str, Any] = {"stats": even(l0e3=0.0), "excess": 9.0, "logits": 5.0}
    alarms = [
        text
        for step in range(1, 260)
        for text in (seen(guard, step, **sick) if step > 200 else seen(guard, step))
    ]
    assert (
        len(alarms) == 1
        and alarms[0].startswith("step 202: MaxVio over its floor rose")
        and "; " not in alarms[0]
    )
    guard.last_alarm.fill_(0)
    (text,) = seen(guard, 1000, **sick)
    for part in ("step 1000: 1 experts starve", ", layer 0 expert 3 has", ", MaxVio", ", router logits"):
        assert part in text


def test_nothing_is_judged_within_the_grace():
    """Logits that jump at step 301 are seen at step 302, or when the grace is over."""
    for grace, first in ((1, 302), (301, 302), (302, 303), (310, 311)):
        guard = Guard(SHAPE, grace=grace)
        assert [step for step in range(1, 320) if seen(guard, step, logits=9.0 if step > 300 else 1.0)] == [
            first
        ]


def test_what_never_had_its_share_is_not_lost():
    """An expert that starves when the grace ends is the router's choice; a second one is an alarm."""
    guard = Guard(SHAPE, grace=100, patience=1000)
    for step in range(1, 200):
        assert seen(guard, step, even(l0e0=0.0)) == []
    alarms = [text for step in range(200, 300) for text in seen(guard, step, even(l0e0=0.0, l1e3=0.0))]
    assert len(alarms) == 1 and alarms[0].startswith("step 223: 2 experts starve (before: 1)")


@pytest.mark.parametrize("patience", [1, 7])
def test_alarms_are_patience_steps_apart(patience):
    """The fault lasts; one alarm every `patience` steps while the fast mean is that much above the slow
    one.
    """
    guard = Guard(SHAPE, patience=patience)
    steps = [step for step in range(1, 331) if seen(guard, step, logits=9.0 if step > 300 else 1.0)]
    assert steps == list(range(302, 331, patience))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grace": 0}, "guard.grace=0, guard.patience=50: must be at least 1 step"),
        ({"patience": 0}, "guard.patience=0"),
        ({"starving": 0.0}, r"guard.starving=0.0: must lie in \(0, 1\)"),
        ({"starving": 1.0}, "guard.starving=1.0"),
        ({"starving": math.nan}, "guard.starving=nan"),
        ({"rising": 1.0}, "guard.rising=1.0"),
        ({"rising": math.nan}, "guard.rising"),
        ({"logits": 0.5}, "guard.logits=0.5: must exceed 1"),
        ({"excess": 0.0}, "guard.excess=0.0: must exceed 0"),
    ],
)
def test_wrong_settings_are_refused_with_their_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Guard(SHAPE, **settings)


def test_the_settings_of_guard_on_are_those_of_the_class_and_of_the_schema():
    on = load(["experiment=synthetic", "guard=on"]).guard
    assert vars(on) == vars(GuardConfig(enabled=True))
    default = Guard(SHAPE)
    assert {name: getattr(default, name) for name in vars(on)} == vars(on)
    assert load(["experiment=synthetic"]).guard == GuardConfig()


# -- stop and state ---------------------------------------------------------------------------------------


class Scripted(Guard):
    """Alarms at the steps that are named."""

    def __init__(self, *, at: tuple[int, ...], stop: bool = False):
        super().__init__((2, 16), grace=1, patience=1, stop=stop)
        self.at = at

    def reasons(self) -> list[str]:
        return ["as scripted"] if self.seen.item() in self.at else []


def guarded(name: str, *, at: tuple[int, ...], stop: bool = False) -> Lab:
    return make_lab(name, guard=Scripted(at=at, stop=stop))


def test_an_alarm_changes_nothing_in_the_run():
    """Biases, gradients and metrics are those without a guard, bit for bit."""
    lab = guarded("smebu", at=(2, 3, 5), stop=True).run(feed, range(1, 8))
    without = make_lab("smebu").run(feed, range(1, 8))
    assert [metrics.pop("guard/alarm") for metrics in lab.metrics] == [0, 1, 1, 0, 1, 0, 0]
    assert lab.metrics == without.metrics
    for kind in ("biases", "gradients"):
        both = zip(getattr(lab, kind), getattr(without, kind), strict=True)
        assert all(torch.equal(a, b) for a, b in both)
    assert lab.balancer.guard.take_alarms() == [f"step {step}: as scripted; stop" for step in (2, 3, 5)]
    assert lab.balancer.guard.take_alarms() == []


def test_stop_is_asked_for_once():
    """At the alarm; a run that is continued, or goes on, is not stopped again for it."""
    for stop in (True, False):
        lab, asked = guarded("sign", at=(2, 4), stop=stop), []
        for step in range(1, 6):
            lab.step(feed, batch(step))
            asked.append(lab.balancer.guard.wants_stop)
        assert asked == [False, stop, False, stop, False]


def state_of(lab: Lab) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in lab.balancer.state_dict().items()}


def test_a_resumed_guard_is_the_same_guard():
    """Its means, its count of steps, and the step of its last alarm."""
    whole = guarded("smebu", at=(2, 6)).run(feed, range(1, 9))
    first = guarded("smebu", at=(2, 6)).run(feed, range(1, 5))
    second = guarded("smebu", at=(2, 6))
    second.metrics = list(first.metrics)
    for old, new in zip(first.layers, second.layers, strict=True):
        new.expert_bias_E.copy_(old.expert_bias_E)
    second.balancer.load_state_dict(state_of(first))
    second.run(feed, range(5, 9))
    assert second.metrics == whole.metrics
    one, other = state_of(second), state_of(whole)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_guard_that_is_off_says_and_does_nothing():
    """The same metrics and biases as without one; its state stays as it is."""
    off, without = Guard((2, 16), enabled=False, grace=1, patience=1, stop=True), make_lab("smebu")
    before = deepcopy(off.state_dict())
    off.reasons = lambda: ["as scripted"]  # type: ignore[method-assign]
    lab = make_lab("smebu", guard=off).run(feed, range(1, 5))
    without.run(feed, range(1, 5))
    assert lab.metrics == without.metrics and not any(key.startswith("guard") for key in lab.metrics[0])
    assert all(torch.equal(a, b) for a, b in zip(lab.biases, without.biases, strict=True))
    assert all(torch.equal(tensor, before[key]) for key, tensor in off.state_dict().items())
    assert off.take_alarms() == [] and not off.wants_stop


# -- in training -------------------------------------------------------------------------------------------


BASE = [
    "experiment=synthetic",
    "model.num_experts=8",
    "seq_len=32",
    "global_batch=4",
    "micro_batch=2",
    "stage.warmup.share=0",
]
# the untrained router's noise is enough
JUMPY = ["guard=on", "guard.grace=1", "guard.starving=0.9", "guard.patience=1"]


def trained(overrides: list[str], alarms_at: tuple[int, ...] | None = None) -> int:
    """alarms_at: the steps at which the guard raises one, whatever it sees."""
    if alarms_at is not None:
        Guard.reasons = lambda self: ["as scripted"] if self.seen.item() in alarms_at else []  # type: ignore[method-assign]
    logging.getLogger().handlers.clear()  # pytest's; without them warnings go to stderr
    return train.train(load([*BASE, *overrides]))


def test_stop_saves_and_ends_the_run_and_the_same_command_goes_on(tmp_path, capfd):
    command = [
        *JUMPY,
        "guard.patience=100",
        "guard.stop=true",
        "steps=14",
        "name=stopped",
        f"run_dir={tmp_path}",
    ]
    assert run_ranks(trained, 1, command) == [train.UNSOUND]
    first = capfd.readouterr()
    lines = metrics(tmp_path / "stopped")
    stopped = lines[-1]["step"]
    assert 2 <= stopped < 14 and [line["guard/alarm"] for line in lines] == [0.0] * (stopped - 1) + [1.0]
    assert f"stopped at step {stopped} of 14, saved; the same command continues" in first.out
    assert (
        f"guard: step {stopped}: " in first.err
        and "experts starve (before: " in first.err
        and "; stop\n" in first.err
    )
    assert {path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()} == {
        f"step-{stopped:08d}",
        "latest",
    }
    assert run_ranks(trained, 1, command)[0] in (train.OK, train.COLLAPSED)
    assert f"continuing at step {stopped} of 14" in capfd.readouterr().out
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == list(range(1, 15))


def test_a_guard_can_be_switched_on_and_off_again(tmp_path):
    """Of a run that was begun without; it counts its grace from where it was switched on."""
    base = ["name=run", f"run_dir={tmp_path}"]
    done = (train.OK, train.COLLAPSED)
    assert run_ranks(trained, 1, [*base, "steps=2"])[0] in done
    assert run_ranks(trained, 1, [*base, *JUMPY, "steps=5"], (1, 3))[0] in done
    assert run_ranks(trained, 1, [*base, "steps=7"])[0] in done
    alarms = [line.get("guard/alarm") for line in metrics(tmp_path / "run")]
    assert alarms == [None, None, 0, 0, 1, None, None]


def test_alarms_reach_the_log_and_the_tracker(tmp_path, caplog):
    class Tracker:
        def __init__(self) -> None:
            self.seen: list[tuple] = []

        def log(self, metrics: dict[str, float], step: int) -> None:
            self.seen.append((step, metrics["guard/alarm"]))

        def alert(self, text: str, step: int) -> None:
            self.seen.append((step, text))

        def finish(self) -> None: ...

    tracker = Tracker()
    log = MetricsLog(tmp_path / "metrics.jsonl", steps=2, interval=1, start_tracker=lambda: tracker)
    line = {"loss": 1.0, "tokens_per_s": 1.0}
    log.write({"step": 1, "guard/alarm": 0.0, **line})
    log.write({"step": 2, "guard/alarm": 1.0, **line}, alarms=["step 2: told so", "and more"])
    log.close()
    assert tracker.seen == [(1, 0.0), (2, 1.0), (2, "step 2: told so"), (2, "and more")]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == ["guard: step 2: told so", "guard: and more"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["guard/alarm"] == 1.0


def test_a_tracker_that_fails_at_an_alarm_stops_nothing(tmp_path, caplog):
    class Broken:
        def log(self, metrics: dict[str, float], step: int) -> None: ...

        def alert(self, text: str, step: int) -> None:
            raise ConnectionError("the service is down")

        def finish(self) -> None: ...

    log = MetricsLog(tmp_path / "metrics.jsonl", steps=1, interval=1, start_tracker=Broken)
    log.write({"step": 1, "loss": 1.0, "tokens_per_s": 1.0}, alarms=["one"])
    log.close()
    assert caplog.text.count("tracking stopped") == 1 and "guard: one" in caplog.text and log.tracker is None


def test_wandb_takes_an_alarm_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb = WandbTracker(tmp_path, {"steps": 1}, project="triquetra", mode="offline")
    wandb.alert("told so", 3)
    wandb.finish()
    (stored,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # its own process writes; on a busy machine later than `finish` returns
    assert until(lambda: b"told so" in stored.read_bytes()), "wandb stored no alarm"


def rank_worker() -> tuple[list[str], list[torch.Tensor]]:
    """Rank 1 has the only tokens that change: its expert 0 starves from step 41 on. Rank 0 sees nothing of
    that by itself.
    """
    layers = [GatedLayer(16, 2, seed=0)]
    guard = Guard((1, 16), grace=35, patience=100, stop=True)
    balancer = Balancer(layers, None, steps=80, group=dist.group.WORLD, guard=guard)
    alarms, rank = [], dist.get_rank()
    for step in range(1, 81):
        x_BLD = batch(step, sequences=2)
        if rank == 1 and step > 40:
            x_BLD = batch(1, sequences=2)[:1, :1].expand(2, 32, -1)  # one token again and again
        layers[0](x_BLD).square().sum().backward()
        balancer.step(step)
        alarms += guard.take_alarms()
    return alarms, list(guard.state_dict().values())


def test_all_ranks_alarm_at_the_same_step():
    one, other = run_ranks(rank_worker, 2)
    assert len(one[0]) == 1 and "; stop" in one[0][0] and one[0] == other[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
