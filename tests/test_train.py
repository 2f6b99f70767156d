"""The program as a person runs it: exit codes, Ctrl-C, the verdict, torchrun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import MEASURE, run_ranks
from tests.runs import run_main
from tests.waiting import until
from trainer import train
from trainer.config import load
from trainer.ranks import device

REPOSITORY = Path(__file__).parent.parent
QUICK = [
    "experiment=synthetic",
    "global_batch=4",
    "micro_batch=2",
    "seq_len=32",
    "steps=4",
    "model.num_experts=8",
]
METRICS = [
    "step",
    "tokens",
    "loss",
    "grad_norm",
    "lr",
    "batch_het",
    "tokens_per_s",
    "mfu",
    "memory_gib",
    "balance/max_violation",
    "balance/max_violation_worst_layer",
    "balance/floor",
    "balance/min_load",
    "balance/dead_experts",
    "skipped_steps",
    "balance/entropy",
    "balance/bias_rms",
    "balance/gain",
    "balance/logit_rms",
    *(
        f"data/{name}"
        for name in (
            "documents",
            "open",
            "padding",
            "truncated",
            "held_out",
            "not_drawn",
            "skipped",
            "step_tokens",
            "step_flop",
            "wait_s",
        )
    ),
    *(f"balance/stability/{layer}" for layer in range(4)),
]


def logged(directory, arm="smebu"):
    return [
        json.loads(line)
        for line in (directory / f"synthetic-{arm}" / "metrics.jsonl").read_text().splitlines()
    ]


def python(*arguments, **kwargs):
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


@pytest.mark.rare
def test_the_check_passes_with_smebu_and_fails_without_balancing(tmp_path):
    """The same run, one word changed. A check that cannot fail is no check."""

    def both(balance):
        return run_main(["experiment=synthetic", f"balance={balance}", f"run_dir={tmp_path}"])

    assert run_ranks(both, 1, "smebu") == [train.OK]
    assert run_ranks(both, 1, "none") == [train.COLLAPSED]
    last = {arm: logged(tmp_path, arm)[-1] for arm in ("smebu", "none")}
    assert last["smebu"]["balance/max_violation"] < last["none"]["balance/max_violation"]
    assert last["none"]["balance/bias_rms"] == 0 < last["smebu"]["balance/bias_rms"]


def test_every_step_has_every_metric_in_its_unit(tmp_path):
    def measuring() -> int:
        device.peak_flops = MEASURE
        return run_main([*QUICK, f"run_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}"])

    assert run_ranks(measuring, 1)[0] in (train.OK, train.COLLAPSED)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert sorted(line) == sorted(METRICS)
        assert line["tokens"] == line["step"] * 4 * 32
        assert 0 < line["mfu"] < 1.5 and 0.05 < line["memory_gib"] < 24 and line["tokens_per_s"] > 0
    assert 6 < lines[0]["loss"] < 8  # ln(1024) = 6.9: an untrained model knows nothing


def test_a_finished_run_is_left_as_it_is_and_says_the_same_again(tmp_path):
    command = [*QUICK, f"run_dir={tmp_path}"]
    first = run_ranks(run_main, 1, command)
    before = (tmp_path / "synthetic-smebu" / "metrics.jsonl").read_text()
    assert run_ranks(run_main, 1, command) == first
    assert (tmp_path / "synthetic-smebu" / "metrics.jsonl").read_text() == before


def test_a_model_without_experts_trains(tmp_path):
    assert run_ranks(run_main, 1, [*QUICK, "model.num_dense_layers=5", f"run_dir={tmp_path}"]) == [train.OK]


@pytest.mark.parametrize(
    ("dtype", "expert_dtype"),
    [
        ("bfloat16", "null"),
        pytest.param("bfloat16", "float32", marks=pytest.mark.rare),
        pytest.param("float32", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_lower_precision_trains(tmp_path, dtype, expert_dtype):
    precision = [f"dtype={dtype}", f"model.expert_dtype={expert_dtype}", "steps=20", "stage.warmup.share=0"]
    run_ranks(run_main, 1, [*QUICK, *precision, f"run_dir={tmp_path}"])
    losses = [line["loss"] for line in logged(tmp_path)]
    assert 6 < losses[0] < 8 and losses[-1] < losses[0] - 1


def test_a_refused_configuration_exits_with_2_before_anything_is_built(tmp_path, capsys):
    assert run_main([*QUICK, "stpes=4", f"run_dir={tmp_path}"]) == train.REFUSED
    assert "did you mean steps" in capsys.readouterr().err
    for wrong in (
        ["stage.decay.lr.shape=square"],
        ["balance.rule.beta=1.0"],
        ["micro_batch=3"],
        ["data.num_streams=3"],
    ):
        assert run_ranks(run_main, 1, [*QUICK, *wrong, f"run_dir={tmp_path}"]) == [train.REFUSED]
    nowhere = ["experiment=demo", "data=jsonl", "data.source.path=nowhere/*.jsonl", f"run_dir={tmp_path}"]
    assert run_ranks(run_main, 1, nowhere) == [train.REFUSED]
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    def worker():
        run = train.build(load([*QUICK, f"run_dir={tmp_path}"]))
        batches = run.stream.next_step(2)
        run.model.norm.weight.data.fill_(float("nan"))
        before = {name: p.clone() for name, p in run.model.named_parameters()}
        assert "loss" not in train.train_step(run, batches) and run.health.in_row == 1
        return all(p.equal(before[name]) or "nan" in str(p) for name, p in run.model.named_parameters())

    assert run_ranks(worker, 1) == [True]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_continues(tmp_path):
    command = ["-m", "trainer.train", *QUICK, "steps=100000", f"run_dir={tmp_path}"]
    metrics = tmp_path / "synthetic-smebu" / "metrics.jsonl"
    process = python(*command)
    try:
        trains = lambda: metrics.exists() and metrics.read_text().count("\n") >= 3  # noqa: E731
        assert until(lambda: trains() or process.poll() is not None) and trains()
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=250)[0]
    finally:
        process.kill()
    assert process.returncode == train.INTERRUPTED, output
    stopped = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert f"stopped at step {stopped} of 100000, saved; the same command continues" in output
    assert "Traceback" not in output
    assert {path.name for path in (tmp_path / "synthetic-smebu" / "checkpoints").iterdir()} == {
        f"step-{stopped:08d}",
        "latest",
    }
    again = [*QUICK, f"steps={stopped + 2}", f"run_dir={tmp_path}"]
    assert run_ranks(run_main, 1, again)[0] in (train.OK, train.COLLAPSED)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(
        range(1, stopped + 3)
    )


@pytest.mark.slow
def test_torchrun_is_the_same_program(tmp_path):
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
    ]
    settings = [*QUICK, "seq_len=64", "global_batch=8", "optim.lr=1e-3"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    process = python(
        *launch, "-m", "trainer.train", *settings, "parallel=fsdp_ep", f"run_dir={tmp_path}", env=one_thread
    )
    try:
        output = process.communicate(timeout=200)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "on 2 x cpu" in output and output.count("balance: too short to judge") == 1
    (tmp_path / "one").mkdir()
    run_ranks(run_main, 1, [*settings, f"run_dir={tmp_path / 'one'}"])
    two, one = ([line["loss"] for line in logged(directory)] for directory in (tmp_path, tmp_path / "one"))
    assert two == pytest.approx(one, rel=1e-5)


def test_the_matmul_peak_is_measured_once_on_a_machine(tmp_path, monkeypatch):
    """The second start reads it; another dtype is another peak; a damaged file is as good as none."""
    measured = iter([3e9, 5e9, 7e9])
    monkeypatch.setattr(device, "measured_flops", lambda dtype: next(measured))
    file = tmp_path / "cache" / "peak_flops.json"
    assert [device.kept_flops(torch.float32, file) for _ in range(2)] == [3e9, 3e9]
    assert device.kept_flops(torch.bfloat16, file) == 5e9 and device.kept_flops(torch.float32, file) == 3e9
    file.write_text("[1, 2")
    assert [device.kept_flops(torch.float32, file) for _ in range(2)] == [7e9, 7e9]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
