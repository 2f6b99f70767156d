"""trainer/preflight: what is unfit is named with host, value and limit; what is fit is not accused.

Expected values are worked out by hand, or come from real ranks whose host is slowed down and set wrong from
outside.
"""

import os
import time

import pytest
import torch

from tests.ranks import run_ranks
from trainer.__main__ import main
from trainer.config import load
from trainer.lab.plan.hardware import hardware
from trainer.preflight import files, hosts, launch, links, place, speed
from trainer.preflight.__main__ import UNFIT
from trainer.preflight.examine import examine
from trainer.preflight.finding import Finding
from trainer.ranks.stop import OK, REFUSED
from trainer.train import main as train

TINY = ["model=debug", "model.num_layers=2", "model.global_every=2", "data=synthetic", "seq_len=16"]
TINY += ["global_batch=8", "micro_batch=1", "steps=1", "name=run"]
GIB = 2**30


# -- a launch --


def asked(*arguments: str) -> int:
    return main(["preflight", "--dry-run", *arguments])


def test_a_launch_that_fits_is_told_in_a_line(tmp_path, capsys):
    layout = ["parallel=hsdp_ep", "nodes=2", "ranks_per_node=4", f"run_dir={tmp_path}"]
    assert asked(*TINY, *layout) == OK
    assert (
        "nodes=2 x ranks_per_node=4 = 8 ranks: dp_replicate=2 x dp_shard=4, ep=2" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nodes=2"], "not set: ranks_per_node"),
        (["nodes=0", "ranks_per_node=4"], "nodes=0: must be a whole number"),
        (["nodes=3", "ranks_per_node=1", "parallel=hsdp"], "parallel.dp_replicate=2 does not divide 3 ranks"),
        (
            ["nodes=3", "ranks_per_node=1"],
            "global_batch=8 sequences do not divide among 3 data-parallel ranks",
        ),
        (["nodes=2", "ranks_per_node=4", "data.num_streams=4"], "data.num_streams=4 must divide"),
        (["nodes=2", "ranks_per_node=8"], "global_batch=8 sequences do not divide among 16"),
        (["nodes=2", "ranks_per_node=4", "run_dir=/nowhere/runs"], "there is no directory /nowhere"),
        (["node=2", "ranks_per_node=4"], "node: there is no such key (did you mean nodes?)"),
        (["nodes=2", "ranks_per_node=4", "slurm=yes"], "slurm=yes: must be true or false"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused_before_it_is_queued(arguments, said, tmp_path, capsys):
    where = [] if any("run_dir" in argument for argument in arguments) else [f"run_dir={tmp_path}"]
    assert asked(*TINY, "parallel=fsdp", *where, *arguments) == REFUSED
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("says", "code"), [("slurm-wlm 22.05.8", OK), ("slurm 24.11.1", OK), ("slurm 20.11.9", REFUSED)]
)
def test_an_old_slurm_is_refused(says, code, tmp_path, monkeypatch, capsys):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\necho {says}\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    layout = ["nodes=2", "ranks_per_node=4", "parallel=fsdp", f"run_dir={tmp_path}", "slurm=true"]
    assert asked(*TINY, *layout) == code
    assert ("launch/slurm.sbatch was tried under 22.05 and later" in capsys.readouterr().err) == (
        code == REFUSED
    )


def test_where_there_is_no_sbatch_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(launch.ConfigError, match="ask on a login node"):
        launch.slurm_version()


def test_how_it_is_launched_is_of_the_dry_run_only(capsys):
    assert main(["preflight", *TINY, "nodes=2"]) == REFUSED
    assert "use it with --dry-run" in capsys.readouterr().err


# -- who am I --


def test_a_task_of_srun_has_the_names_that_torchrun_would_give():
    slurm = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu7,gpu9",
        "SLURM_JOB_ID": "123456",
    }
    assert place.named_by_slurm(slurm) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu7",
        "MASTER_PORT": "23456",
    }
    assert place.named_by_slurm(slurm | {"RANK": "0"}) == {}  # torchrun has spoken
    del slurm["SLURM_STEP_ID"]
    assert place.named_by_slurm(slurm) == {}  # a batch script: it would wait for tasks that nobody starts


def test_a_host_is_called_as_its_scheduler_calls_it():
    assert place.host_name({"SLURMD_NODENAME": "gpu7"}) == "gpu7"
    assert place.host_name({}) == os.uname().nodename


# -- hosts --


def test_the_host_with_other_software_is_named():
    versions = [{"code": "a", "torch": "2"}, {"code": "b", "torch": "2"}, {"code": "a", "torch": "2"}]
    assert hosts.unlike(["n0", "n1", "n2"], versions) == [
        Finding("n1", "version of code", "b", "a, as most hosts have")
    ]
    (finding,) = hosts.unlike(["n0", "n1", "n2"], [{"GPU": "x"}, {"GPU": "x"}, {}])
    assert finding == Finding("n2", "version of GPU", "none", "x, as most hosts have")


def test_the_host_with_another_clock_is_named_and_one_that_answered_late_is_not():
    """n2 is 6 s ahead in all rounds; n1 waited for a core in the first."""
    rounds = [[100.0, 109.0, 106.0, 100.0, 100.0], [200.0, 200.1, 206.0, 200.0, 200.0]]
    assert hosts.astray(["n0", "n1", "n2", "n3", "n4"], rounds) == [
        Finding("n2", "clock", "+6.0 s", "5 s from the middle of all")
    ]
    assert hosts.astray(["n0", "n1"], [[7.0, 11.9]]) == []


# -- devices --


def test_a_known_product_is_right_in_each_dtype_and_a_wrong_one_is_not(monkeypatch):
    cpu = torch.device("cpu")
    assert speed.is_right(cpu, torch.float32) and speed.is_right(cpu, torch.bfloat16)
    multiply = torch.Tensor.__matmul__

    def off_by_one(a, b):
        product = multiply(a, b)
        if a.dtype is torch.float32:
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", off_by_one)
    assert not speed.is_right(cpu, torch.float32)
    devices = [("n0", "cuda 0"), ("n0", "cuda 1")]
    (finding,) = speed.wrong(devices, [True, False])
    assert finding.host == "n0" and finding.what.startswith("cuda 1, a known product")


def test_the_slow_device_is_named_against_the_others_and_against_the_sheet():
    devices = [("n0", "cuda 0"), ("n0", "cuda 1"), ("n1", "cuda 0"), ("n1", "cuda 1")]
    flops = [700e12, 690e12, 500e12, 710e12]
    (finding,) = speed.slow(devices, flops, kind="cuda", sheet=None)
    assert str(finding) == (
        "n1: cuda 0, a product of 8192 x 8192: 500 TFLOP/s; limit: 595 TFLOP/s"  # 0.85 x 700, the middle one
    )
    assert len(speed.slow(devices, flops, kind="cuda", sheet=800e12)) == 1  # 0.7 x 800 = 560
    assert len(speed.slow(devices, flops, kind="cuda", sheet=1100e12)) == 4  # all alike slow: 770


def test_links_are_held_against_the_sheet():
    """Half of an H200's: NVLink 450 GB/s x 0.75, NIC 50 GB/s x 0.8; all-to-all x 0.6 and 0.55."""
    sheet = hardware("h200")
    fit = [
        links.Link(links.INSIDE, "all-reduce", "nvlink", 169e9),
        links.Link(links.ALL, "all-to-all", "all_to_all_nic", 13.8e9),
        links.Link(links.BETWEEN, "exchange", "nic", 20.1e9),
    ]
    devices = [("n0", "cuda 0"), ("n1", "cuda 0")]
    assert links.slow(devices, [fit, fit], sheet=sheet) == []
    lame = [fit[0]._replace(speed=168e9), fit[1]._replace(speed=13.7e9), fit[2]._replace(speed=2.5e9)]
    findings = [str(finding) for finding in links.slow(devices, [fit, lame], sheet=sheet)]
    assert findings == [
        "n1: cuda 0, all-reduce inside the host: 168 GB/s; limit: 169 GB/s, half of H200's",
        "n1: cuda 0, exchange between hosts: 2.5 GB/s; limit: 20 GB/s, half of H200's",
    ]
    assert [finding.host for finding in links.slow(devices, [lame, lame], sheet=sheet)].count(
        "all hosts"
    ) == 1
    assert links.slow(devices, [lame, lame], sheet=None) == []


@pytest.mark.parametrize("num_hosts", [2, 3, 4, 5, 8])
def test_every_host_has_a_neighbour_and_one_partner_at_a_time(num_hosts):
    phases = links.neighbours(num_hosts)
    for pairs in phases:
        partners = [host for pair in pairs for host in pair]
        assert len(set(partners)) == len(partners)
    assert {host for pairs in phases for pair in pairs for host in pair} == set(range(num_hosts))


# -- files --


def test_files_of_a_host_that_are_not_seen_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SEEN_S", 0.0)
    files.commit(tmp_path, "n0")
    assert files.unseen(tmp_path, ["n0"], "n0") == []
    (finding,) = files.unseen(tmp_path, ["n0", "n1"], "n0")
    assert finding.host == "n0" and "files of n1" in finding.what and finding.value == "not seen"
    (tmp_path / "n0" / "host").write_text("")  # the name came before what lies in it
    assert len(files.unseen(tmp_path, ["n0"], "n0")) == 1


def test_too_little_room_is_named_with_both_numbers(tmp_path, monkeypatch):
    config = load([*TINY, f"run_dir={tmp_path}"])
    needed = 2 * files.checkpoint_bytes(config)
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert files.room(config, tmp_path, "n0") == []
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    (finding,) = files.room(config, tmp_path, "n0")
    assert finding.what == f"{tmp_path}, free" and "2 checkpoints" in finding.limit


def test_the_size_of_a_checkpoint_is_that_of_a_written_one(tmp_path):
    """Beside weights and optimizer state it holds norm gains, biases and the position of the data."""
    overrides = [*TINY, f"run_dir={tmp_path}", "data.workers=0"]
    assert train(overrides) == OK
    (written,) = (tmp_path / "run" / "checkpoints").glob("*/rank-00000.safetensors")
    reckoned = files.checkpoint_bytes(load(overrides))
    assert reckoned <= written.stat().st_size <= 1.1 * reckoned


# -- all of it, on ranks --


def named_as_hosts(*more: str) -> list[str]:
    """Two ranks a host."""
    os.environ["SLURMD_NODENAME"] = f"n{int(os.environ['RANK']) // 2}"
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
    return [*TINY, "parallel=fsdp", *more]


def test_a_fit_job_is_fit_and_leaves_nothing_behind(tmp_path):
    def rank():
        return examine(load(named_as_hosts(f"run_dir={tmp_path}")), sheet=None)

    assert run_ranks(rank, 4) == [0, 0, 0, 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_slow_host_the_wrong_clock_and_the_lock_that_does_not_hold_are_named(tmp_path):
    """Host n1 of three is made slow, late, and blind to locks."""

    def rank():
        overrides = named_as_hosts(f"run_dir={tmp_path}", "global_batch=12")
        if os.environ["SLURMD_NODENAME"] == "n1":
            flops, now = speed.product_flops, time.time
            speed.product_flops = lambda *on: flops(*on) / 10
            hosts.time = type("Late", (), {"time": staticmethod(lambda: now() - 60)})
            files.lock = lambda directory, **_: (directory / f"lock.{os.environ['RANK']}").open("w")
        written = []
        examine_module.conclude = written.extend
        count = examine(load(overrides), sheet=None)
        return count, [str(finding) for finding in written]

    from trainer.preflight import examine as examine_module

    results = run_ranks(rank, 6)
    assert {count for count, _ in results} == {5}
    clock, *locks, slow, other = results[0][1]
    assert clock.startswith("n1: clock: -") and clock.endswith("limit: 5 s from the middle of all")
    assert all(line.startswith("n1: ") and "lock of rank 0: not held" in line for line in locks)
    assert len(locks) == 2 and slow.startswith("n1: cpu (rank 2)") and other.startswith("n1: cpu (rank 3)")


def test_alone_it_ends_with_what_it_has_found(tmp_path, monkeypatch, capsys):
    arguments = ["preflight", *TINY, f"run_dir={tmp_path}"]
    assert main(arguments) == OK
    assert "preflight: fit" in capsys.readouterr().out
    monkeypatch.setattr(files, "checkpoint_bytes", lambda config: 2**80)
    assert main(arguments) == UNFIT
    said = capsys.readouterr()
    assert "unfit: " in said.err and ", free: " in said.err and "preflight: 1 unfit" in said.out


def test_a_host_that_cannot_write_there_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["preflight", *TINY, f"run_dir={tmp_path}/file/runs"]) == UNFIT
    assert f"{tmp_path}/file/runs: Not a directory; limit: can be written to" in capsys.readouterr().err
