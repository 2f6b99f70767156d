"""Does the GPU suite itself work? Its bodies run here at tiny sizes on the CPU, so that a GPU hour meets no
slip of the pen, and its command reports what fails, dies, overruns or has no GPU.
"""

import json
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention

from tests.fake import in_a_process
from tests.gpu import __main__ as command
from tests.gpu import attention, one, report, stages
from tests.gpu.bench import Bench
from tests.gpu.stages import HIDDEN, NO_GPU, ONE_GPU, REPOSITORY, Stage, run_stage

CPU = torch.device("cpu")


RUNS = ONE_GPU[6]


@pytest.mark.parametrize("stage", [*ONE_GPU[:6], *ONE_GPU[7:]], ids=lambda stage: stage.name)
def test_every_stage_holds_on_a_cpu(stage, tmp_path):
    holds(stage_on_a_cpu(stage.module, tmp_path))


@pytest.mark.rare  # the drills stop, kill and resume runs, too
def test_the_stage_of_runs_holds_on_a_cpu(tmp_path):
    """In a process that has computed nothing, as it forks its runs."""
    holds(in_a_process(stage_on_a_cpu, tmp_path, RUNS.module, tmp_path))


def stage_on_a_cpu(module, results):
    return one.run(import_module(f"tests.gpu.{module}"), on=CPU, results=results)


def holds(result):
    assert report.troubles(result) == []
    assert result["figures"] and all(check["error"] is None for check in result["checks"])


def test_flex_attention_off_its_kernel(monkeypatch, tmp_path):
    """The whole of stage 2's GPU branch: without the compiler, flex attention is torch's slow one."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)  # it has no backward on a CPU
    bench = Bench(on=CPU, results=tmp_path, flex=True)
    with torch.compiler.set_stance("force_eager"):
        attention.numbers(bench, attention.SIZES["cpu"][:1])
    assert bench.figures and all(figure.holds for figure in bench.figures)


def test_calibration_is_written(tmp_path):
    """As the planner reads it; the figures of a CPU are of no use, but they are there."""
    one.run(import_module("tests.gpu.one_rank"), on=CPU, results=tmp_path)
    calibration = json.loads((tmp_path / "calibration.json").read_text())
    assert calibration["format"] == 1
    assert calibration["measured"].keys() == {"matmul", "experts", "attention", "hbm"}
    assert all(value > 0 for value in [*calibration["measured"].values(), calibration["launch_s"]])
    assert calibration["runs"][0].keys() == {"overrides", "ranks", "traced_ranks", "step_s", "peak_bytes"}


# -- the command ------------------------------------------------------------------------------------------


def misses(bench, size):
    bench.at_most("an error", 2.0, 1.0)
    bench.same("no number", float("nan"), 0.0)


def fails(bench, size):
    raise RuntimeError("CUDA error: an illegal memory access")


def passes(bench, size):
    bench.at_least("a ratio", 2.0, 1.0)
    bench.speed_at_most("a time", 2.0, 1.0, "s")
    bench.absent("a rival", "not installed")


def test_a_check_that_fails_costs_the_others_nothing(tmp_path):
    module, heard = SimpleNamespace(CHECKS=(misses, fails, passes), SIZES={"cpu": None}), []
    result = one.run(
        module, on=CPU, results=tmp_path, report=lambda result: heard.append(len(result["checks"]))
    )
    assert heard == [1, 2, 3]
    assert [bool(check["error"]) for check in result["checks"]] == [False, True, False]
    assert [figure["holds"] for figure in result["figures"]] == [False, False, True, None, None]
    assert report.troubles(result) == [
        "fails: RuntimeError: CUDA error: an illegal memory access",
        "misses: an error: 2 , the bar is <= 1",
        "misses: no number: nan , the bar is = 0.0",
    ]
    assert stages.outcome(1, result) == "failed"
    assert stages.outcome(-11, result) == "died with exit code -11"
    assert stages.outcome(1, {"checks": [], "figures": []}) == "died with exit code 1"  # at an import
    assert stages.outcome(1, {"checks": [], "figures": result["figures"]}) == "missed a bar"
    assert stages.outcome(0, {"checks": [], "figures": []}) == "holds"
    json.loads(json.dumps(result, allow_nan=False))
    page = report.as_markdown(
        [{**result, "stage": "x", "question": "?", "outcome": "failed", "seconds": 1, "limit_s": 2}]
    )
    assert "| x     | failed  | 1 of 3" in page and "illegal memory access" in page


def test_a_stage_that_overruns_is_ended_and_reported(tmp_path):
    """Its limit is over before torch is imported."""
    stage = Stage(number="0", module="ceilings", limit_s=0.01, question="?")
    result = run_stage(stage, tmp_path, device="cpu")
    assert result["outcome"] == "overran its limit and was ended" and result["figures"] == []
    assert not report.is_good([result])


def test_without_a_gpu_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(HIDDEN, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert command.main(["--out", str(tmp_path)]) == NO_GPU
    assert f"no GPU: torch {torch.__version__} sees 0 GPUs, 1 are needed" in capsys.readouterr().out
    assert command.main(["12"]) == 2


def test_hidden_gpus_are_seen_by_the_stages(monkeypatch):
    """Those that tests/conftest.py hides; what the user hides stays hidden."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(HIDDEN, "1")
    assert "CUDA_VISIBLE_DEVICES" not in stages.environment()
    monkeypatch.delenv(HIDDEN)
    assert stages.environment()["CUDA_VISIBLE_DEVICES"] == ""


def test_the_limits_of_all_stages_are_eight_minutes():
    assert sum(stage.limit_s for stage in ONE_GPU) <= 480


@pytest.mark.slow
def test_the_stages_are_collected():
    collect = [sys.executable, "-m", "pytest", "tests/gpu", "--collect-only", "-q"]
    listed = subprocess.run(collect, cwd=REPOSITORY, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert f"tests/gpu/test_stages.py: {len(ONE_GPU)}" in listed.stdout  # quiet twice: a line for each file
