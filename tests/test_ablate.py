"""Studies of arms x seeds: the statistics by hand, the engine on a program that does as it is told, one real
training.
"""

import fcntl
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree

import pytest

from tests.waiting import until
from trainer.config import CONFIG_DIR, ConfigError
from trainer.lab.ablate import programs, study
from trainer.lab.ablate.__main__ import FAILED, OK, REFUSED, STOPPED, main
from trainer.lab.ablate.study import Metric
from trainer.lab.intervals import T_975, Estimate, estimate

VALUES = {"a": [1.0, 2.0, 3.0], "b": [1.5, 2.4, 3.6]}  # arm -> the loss of seeds 0, 1, 2


@dataclass(kw_only=True)
class Told:
    name: str = "?"
    run_dir: str = "?"
    seed: int = 0
    arm: str = "a"
    do: str = "ok"
    steps: int = 10


class Obedient:
    """A program that does what its configuration says, and notes each time that it runs."""

    def load(self, overrides):
        given = dict(override.split("=", 1) for override in overrides)
        if unknown := given.keys() - {f.name for f in fields(Told)}:
            raise ConfigError(f"unknown {unknown}")
        return Told(**{**given, "seed": int(given["seed"]), "steps": int(given.get("steps", 10))})

    def run(self, config):
        print(f"I do {config.do}")
        directory = Path(config.run_dir) / config.name
        with (directory / "calls").open("a") as file:
            file.write(".")
        (directory / "checkpoints").mkdir(exist_ok=True)
        is_first = (directory / "calls").read_text() == "."
        match config.do if config.seed == 1 else "ok":
            case "diverge":
                raise FloatingPointError("step 3: loss nan")
            case "fail once" if is_first:
                raise RuntimeError("no space left")
            case "be killed once" if is_first:
                os.kill(os.getpid(), signal.SIGKILL)
            case "wait once" if is_first:
                time.sleep(600)
            case "collapse":
                return "collapsed"
        return "ok"

    def rows(self, directory):
        arm, seed = directory.name.split("-s")
        loss = VALUES.get(arm, [7.0, 7.0, 7.0])[int(seed)]
        return [{"step": step, "loss": loss + (10 - step), "even": loss} for step in range(1, 11)]


@pytest.fixture
def obedient(monkeypatch):
    monkeypatch.setitem(programs.PROGRAMS, "train", Obedient())


def write_study(
    directory, *, arms="{a: [], b: [arm=b]}", metrics="{loss: {of: loss, take: last}}", more=""
) -> str:
    path = directory / "mine.yaml"
    path.write_text(
        f"question: Which?\nbase: [steps=10]\narms: {arms}\nreference: a\nmetrics: {metrics}\n{more}"
    )
    return f"study={path}"


def run(directory: Path, *arguments: str, **study_parts: str) -> int:
    return main([write_study(directory, **study_parts), f"run_dir={directory}", *arguments])


def calls(directory: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in sorted(directory.glob("mine/*/calls"))}


def result(directory: Path) -> dict:
    return json.loads((directory / "mine" / "study.json").read_text())


def outcomes(directory: Path, arm: str) -> list[str]:
    return [
        json.loads((directory / "mine" / f"{arm}-s{s}" / "job.json").read_text())["outcome"] for s in range(3)
    ]


# -- statistics -------------------------------------------------------------------------------------------


def test_interval_of_three_values_by_hand():
    """1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.303, so the half width is 4.303 / sqrt(3) = 2.4843."""
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None and (found.mean, found.num_seeds) == (2.0, 3)
    assert (
        found.half == pytest.approx(2.4843, abs=1e-4)
        and not Estimate(mean=2.48, half=2.4843, num_seeds=3).excludes_zero
    )
    assert str(found) == "2.0 ± 2.5"
    assert estimate([]) is None
    one = estimate([4.0])
    assert one is not None and one.half is None and not one.excludes_zero and str(one) == "4"
    assert str(estimate([0.1 + 0.2, 0.3])) == "0.3 ± 0"  # a spread of rounding errors is none


@pytest.mark.parametrize("df", range(1, 31))
def test_t_quantiles_cut_off_a_fortieth_of_the_density(df):
    """The integral of Student's density from 0 to t, by Simpson's rule, is 0.475 up to the rounding of t to
    0.001.
    """
    t, n = T_975[df - 1], 2000

    def density(x):
        return (
            math.gamma((df + 1) / 2)
            / (math.sqrt(df * math.pi) * math.gamma(df / 2))
            * (1 + x * x / df) ** (-(df + 1) / 2)
        )

    inner = sum((4 if i % 2 else 2) * density(t * i / n) for i in range(1, n))
    assert (density(0) + inner + density(t)) * t / n / 3 == pytest.approx(0.475, abs=3e-5)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Metric(of="loss"), 1.0),  # mean of the last 10 % of 20 steps: of 1.5 and 0.5
        (Metric(of="loss", over=0.5), 5.0),  # 9.5 ... 0.5
        (Metric(of="loss", take="last"), 0.5),
        (Metric(of="loss", take="max"), 19.5),
        (Metric(of="loss", take="max", over=0.1), 1.5),
        (Metric(of="loss", minus="floor", take="min"), -0.5),
        (Metric(of="loss", take="first_below", level=10.0), 11),
        (Metric(of="loss", take="first_below", level=0.5), None),
        (Metric(of="loss", take="first_above", level=3.0), 1),
        (Metric(of="broken", take="last"), 0.0),  # null and nan are left out
        (Metric(of="loss", take="spread"), 0.0),  # a straight line
        # 1, -1, 1, -1: the best line is 0.6 - 0.4 n
        (Metric(of="zigzag", take="spread", over=0.2), math.sqrt(3.2 / 2)),
        (Metric(of="zigzag", take="lag_1", over=0.2), -2.4 / 3.2),  # off it: 0.4, -1.2, 1.2, -0.4
        (Metric(of="loss", take="spread", over=0.1), None),  # two steps
        (Metric(of="broken", take="lag_1"), None),  # no spread
        (Metric(of="unheard_of"), None),
    ],
)
def test_metric_of_a_run_by_hand(metric, expected):
    broken = {19: None, 20: math.nan}
    rows = [
        {"step": s, "loss": 20.5 - s, "floor": 1.0, "broken": broken.get(s, 0.0), "zigzag": (-1.0) ** (s + 1)}
        for s in range(1, 21)
    ]
    assert programs.measure(metric, rows) == pytest.approx(expected, abs=1e-12)


def test_difference_is_paired_by_seed(tmp_path, obedient):
    """b - a is .5, .4, .6: mean .5, s = .1, half 4.303 x .1 / sqrt(3) = .24843. The arms' own intervals
    overlap widely.
    """
    assert run(tmp_path) == OK
    a, b = result(tmp_path)["arms"]["a"], result(tmp_path)["arms"]["b"]
    assert a["metrics"]["loss"]["values"] == {"0": 1.0, "1": 2.0, "2": 3.0}
    assert [b["metrics"]["loss"][k] for k in ("mean", "num_seeds")] == [pytest.approx(2.5), 3]
    change = b["differences"]["loss"]
    assert [change[k] for k in ("mean", "low", "high")] == pytest.approx(
        [0.5, 0.5 - 0.24843, 0.5 + 0.24843], abs=1e-5
    )
    assert change["excludes_zero"] and a["differences"] == {}
    page = (tmp_path / "mine" / "study.md").read_text()
    assert "| `b` | 0.50 ± 0.25 * |" in page and "| `a` | 3     | 2.0 ± 2.5 |" in page


# -- the engine -------------------------------------------------------------------------------------------


def test_page_says_what_is_needed_to_make_it_again(tmp_path, obedient, capfd):
    assert run(tmp_path, "seeds=2", "do=collapse") == OK
    page = (tmp_path / "mine" / "study.md").read_text()
    terminal = capfd.readouterr().out
    assert page in terminal and "I do collapse" not in terminal
    assert "4/4  " in terminal and "b-s1: collapsed, 0 s" in terminal
    assert (tmp_path / "mine" / "b-s1" / "log.txt").read_text() == "I do collapse\n"
    command, base = "mine.yaml seeds=2 do=collapse`", "All arms: `steps=10 do=collapse`"
    assert all(fact in page for fact in ("# mine", "Which?", command, base, "- `b`: `arm=b`", "torch 2."))
    assert f"run_dir={tmp_path}" not in page
    assert [result(tmp_path)["arms"][arm]["outcomes"] for arm in "ab"] == [{"ok": 1, "collapsed": 1}] * 2


def test_finished_jobs_do_not_run_again(tmp_path, obedient):
    assert run(tmp_path, "seeds=1") == OK
    assert run(tmp_path, "seeds=2", "only=b") == OK
    assert calls(tmp_path) == {"a-s0": 1, "b-s0": 1, "b-s1": 1}
    assert run(tmp_path, metrics="{even: {of: even}}") == OK  # other metrics of the same runs
    assert calls(tmp_path) == {f"{arm}-s{seed}": 1 for arm in "ab" for seed in range(3)}
    assert result(tmp_path)["arms"]["b"]["metrics"]["even"]["values"] == {"0": 1.5, "1": 2.4, "2": 3.6}
    assert not list(tmp_path.glob("mine/*/checkpoints"))


def test_checkpoints_are_kept_on_request(tmp_path, obedient):
    assert run(tmp_path, "seeds=1", "keep_checkpoints=true") == OK
    assert len(list(tmp_path.glob("mine/*/checkpoints"))) == 2


def test_a_finished_job_with_other_settings_is_refused(tmp_path, obedient, capsys):
    assert run(tmp_path, "seeds=1") == OK
    assert run(tmp_path, "seeds=1", arms="{a: [], b: [arm=b, do=diverge]}") == REFUSED
    error = capsys.readouterr().err
    assert "arm b: " in error and "do=ok, now diverge" in error and "delete that directory" in error
    assert run(tmp_path, "seeds=1", "steps=20", "only=a") == REFUSED
    assert calls(tmp_path) == {"a-s0": 1, "b-s0": 1}


def test_a_setting_that_came_later_changes_nothing_at_its_default():
    before, defaults = {"lr": 1}, {"lr": 3, "guard": False}
    assert study.differences(before, {"lr": 1, "guard": False}, defaults) == []
    assert study.differences(before, {"lr": 1, "guard": True}, defaults) == ["guard"]
    assert study.differences(before, {"lr": 1, "rule.ema": 0.9}, defaults) == ["rule.ema"]
    assert study.differences(before, {"lr": 3, "guard": False}, defaults) == ["lr"]
    assert study.differences({"lr": 1, "gone": None}, {"lr": 1}, defaults) == ["gone"]
    config = asdict(Told(name="x", run_dir="here"))
    assert study.settings(Told(name="y", run_dir="there")) == {
        k: v for k, v in config.items() if k not in ("name", "run_dir")
    }


def test_diverged_run_is_a_result(tmp_path, obedient, capsys):
    assert run(tmp_path, arms="{a: [], b: [arm=b, do=diverge]}") == OK
    assert outcomes(tmp_path, "b") == ["ok", "diverged", "ok"]
    b = result(tmp_path)["arms"]["b"]
    assert (
        b["metrics"]["loss"]["values"] == {"0": 1.5, "2": 3.6} and b["differences"]["loss"]["num_seeds"] == 2
    )
    page = capsys.readouterr().out
    assert "b seed 1 diverged: step 3: loss nan" in page and "(2 of 3)" in page
    assert run(tmp_path, arms="{a: [], b: [arm=b, do=diverge]}") == OK
    assert calls(tmp_path)["b-s1"] == 1


@pytest.mark.parametrize(
    ("how", "message"), [("fail once", "RuntimeError: no space"), ("be killed once", "killed by signal 9")]
)
def test_failed_job_does_not_stop_the_others_and_runs_again(tmp_path, obedient, how, message):
    arms = f"{{a: [], b: [arm=b, 'do={how}']}}"
    assert run(tmp_path, arms=arms) == FAILED
    assert outcomes(tmp_path, "b") == ["ok", "failed", "ok"]
    assert next(job["message"] for job in result(tmp_path)["jobs"] if job["outcome"] == "failed").startswith(
        message
    )
    assert run(tmp_path, arms=arms) == OK
    assert calls(tmp_path) == {f"{arm}-s{s}": 1 + (arm == "b" and s == 1) for arm in "ab" for s in range(3)}


def test_failed_job_without_a_checkpoint_may_change(tmp_path, obedient, capsys):
    assert run(tmp_path, arms="{a: [], b: [arm=b, do=fail once]}") == FAILED
    for seed in (0, 2):  # finished with the settings that are now to change
        rmtree(tmp_path / "mine" / f"b-s{seed}")
    assert run(tmp_path) == OK
    assert outcomes(tmp_path, "b") == ["ok"] * 3 and calls(tmp_path)["b-s1"] == 2
    assert run(tmp_path, arms="{a: [], c: [do=fail once]}") == FAILED
    (tmp_path / "mine" / "c-s1" / "checkpoints" / "step-00000002").mkdir(parents=True)
    for seed in (0, 2):
        rmtree(tmp_path / "mine" / f"c-s{seed}")
    capsys.readouterr()
    assert run(tmp_path, arms="{a: [], c: [do=collapse]}") == REFUSED
    assert "arm c: " in capsys.readouterr().err


def test_ctrl_c_waits_for_the_children_and_the_same_command_continues(tmp_path, obedient):
    arms = "{a: [], b: [arm=b, do=wait once]}"
    engine = get_context("fork").Process(target=lambda: sys.exit(run(tmp_path, arms=arms)))
    engine.start()
    try:
        waits = tmp_path / "mine" / "b-s1" / "calls"
        assert until(lambda: waits.exists() or not engine.is_alive()) and waits.exists()
        os.kill(engine.pid, signal.SIGINT)
        engine.join(250)
    finally:
        engine.kill()
    assert engine.exitcode == STOPPED
    assert json.loads((tmp_path / "mine" / "b-s1" / "job.json").read_text())["outcome"] == "interrupted"
    assert not (tmp_path / "mine" / "study.json").exists()
    assert run(tmp_path, arms=arms) == OK
    assert calls(tmp_path) == {f"{arm}-s{s}": 1 + (arm == "b" and s == 1) for arm in "ab" for s in range(3)}


def test_one_engine_at_a_time(tmp_path, obedient, capsys):
    (tmp_path / "mine").mkdir()
    with (tmp_path / "mine" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(tmp_path) == REFUSED
    assert "in use by another trainer.lab.ablate" in capsys.readouterr().err and calls(tmp_path) == {}


@pytest.mark.parametrize(
    ("parts", "arguments", "message"),
    [
        ({"more": "seds: 3"}, [], "did you mean seeds"),
        (
            {"metrics": "{loss: {of: loss, ovr: 1}}"},
            [],
            "metrics.loss.ovr: Key 'ovr' not in 'Metric' (did you mean over?)",
        ),
        ({"metrics": "{loss: {take: last}}"}, [], "not set: metrics.loss.of"),
        ({"metrics": "{loss: {of: loss, take: lost}}"}, [], "did you mean last?"),
        ({"metrics": "{loss: {of: loss, over: 10}}"}, [], "above 0 and at most 1"),
        ({"metrics": "{loss: {of: loss, take: first_below}}"}, [], "level="),
        ({"metrics": "{}"}, [], "at least one arm and one metric"),
        ({"arms": "{all: []}"}, [], "reference=a: is no arm (did you mean all?)"),
        ({"arms": "{a: [], b/c: [arm=b]}"}, [], "arms.b/c: must be a plain directory name"),
        ({"arms": "{a: [], b: [amr=b]}"}, [], "arm b: unknown {'amr'}"),
        ({"arms": "{a: [], b: [arm=b], c: [arm=b]}"}, [], "arms b and c resolve to the same configuration"),
        ({"arms": "{a: [], b: [seed=4]}"}, [], "arm b: 'seed=4'"),
        ({"more": "program: trian"}, [], "must be train or simulate"),
        ({}, ["only=[a,d]"], "only=d: is no arm"),
        ({}, ["workers=0"], "workers=0: must be at least 1"),
        ({}, ["seeds=three"], "seeds: Value 'three'"),
        ({}, ["stpes=3"], "arm a: unknown {'stpes'}"),
    ],
)
def test_refused_before_any_job_starts(tmp_path, obedient, capsys, parts, arguments, message):
    assert run(tmp_path, *arguments, **parts) == REFUSED
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_a_metric_that_nobody_recorded_is_refused_with_the_nearest_name(tmp_path, obedient, capsys):
    assert run(tmp_path, "seeds=1", metrics="{loss: {of: lsos}}") == REFUSED
    assert "metrics.loss: 'lsos' was recorded by no job (did you mean loss?)" in capsys.readouterr().err
    assert run(tmp_path, "seeds=1") == OK
    assert calls(tmp_path) == {"a-s0": 1, "b-s0": 1}


def test_unknown_study_and_help(capsys):
    assert main(["study=smoek"]) == REFUSED
    assert "did you mean smoke?" in capsys.readouterr().err
    assert main(["--help"]) == OK
    assert "keep_checkpoints=" in capsys.readouterr().out


# -- real programs ----------------------------------------------------------------------------------------


def test_real_simulation(tmp_path, capsys):
    base = "base: [layers=1, experts=8, top_k=2, tokens=64, steps=20, ep=2]"
    path = tmp_path / "mine.yaml"
    path.write_text(f"""program: simulate
question: Does it run?
{base}
arms: {{a: [balance=sign], b: [balance=none]}}
reference: a
metrics: {{excess: {{of: excess_mean}}, steps: {{of: steps_to_balance}}}}
""")
    assert main([f"study={path}", f"run_dir={tmp_path}", "seeds=2"]) == OK
    for arm, rule in {"a": "sign", "b": "none"}.items():
        files = [tmp_path / "mine" / f"{arm}-s{seed}" / "simulation.json" for seed in (0, 1)]
        runs = [run for file in files for run in json.loads(file.read_text())["runs"]]
        assert [(run["arm"], run["seed"]) for run in runs] == [(rule, 0), (rule, 1)]
        expected = {str(run["seed"]): run["summary"]["excess_mean"] for run in runs}
        assert result(tmp_path)["arms"][arm]["metrics"]["excess"]["values"] == expected
    assert main([f"study={path}", f"run_dir={tmp_path}", "compare=all"]) == REFUSED
    assert "arm a: compare= and seeds= of a simulation" in capsys.readouterr().err


def test_real_training_two_steps_and_a_divergence(tmp_path):
    """The second arm's first update is far outside what float32 multiplies, so its second loss is not
    finite.
    """
    small = "model=debug, data=synthetic, steps=2, seq_len=32, global_batch=2, micro_batch=2"
    base = f"base: [{small}, stage.warmup.share=0, skip.most=0]"
    path = tmp_path / "mine.yaml"
    path.write_text(f"""question: Does it run?
{base}
arms: {{smebu: [], diverging: [optim.lr=1e6, model.route_scale=1e6]}}
reference: smebu
metrics: {{loss: {{of: loss, take: max}}, excess: {{of: balance/max_violation, minus: balance/floor}}}}
""")
    assert main([f"study={path}", f"run_dir={tmp_path}", "seeds=1"]) == OK
    smebu, diverging = (result(tmp_path)["arms"][arm] for arm in ("smebu", "diverging"))
    assert 6 < smebu["metrics"]["loss"]["mean"] < 8  # ln(1024) = 6.9: an untrained model knows nothing
    assert math.isfinite(smebu["metrics"]["excess"]["mean"]) and sum(smebu["outcomes"].values()) == 1
    assert diverging["outcomes"] == {"diverged": 1} and diverging["metrics"]["loss"]["num_seeds"] == 0
    assert "step 2: loss" in [job["message"] for job in result(tmp_path)["jobs"]][1]


TRAINING = {
    "lr_transfer",
    "six_changes",
    "six_changes_unstable",
    "stability",
    "guard",
}  # studies of whole runs


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.rare] if path.stem in TRAINING else [])
        for path in sorted((CONFIG_DIR / "ablation").glob("*.yaml"))
    ],
)
def test_each_study_of_ours_can_be_run(path, tmp_path):
    mine = study.load_study(path.stem)
    mine.seeds = 1
    assert len(study.jobs_of(mine, programs.PROGRAMS[mine.program], tmp_path)) == len(mine.arms)
