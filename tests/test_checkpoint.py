"""Checkpoints prove themselves: what is loaded is what was saved, what was damaged is found, and nothing good
is ever lost.
"""

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.ranks import run_ranks
from trainer.checkpoint import (
    Checkpoints,
    DamagedError,
    SaveError,
    checkpoints,
    problems,
    read_manifest,
    read_whole,
    storage,
)
from trainer.checkpoint.__main__ import DAMAGED, OK, REFUSED, main
from trainer.config import ConfigError, load
from trainer.ranks import lock as lock_module
from trainer.ranks.lock import InUseError, lock
from trainer.run.directory import take

QUICK = {"retries": 0, "retry_s": 0.0}


def state_of(seed: int) -> dict:
    """Every kind of tensor that a run has: nested, of no dimension, of no elements, of every dtype."""
    generator = torch.Generator().manual_seed(seed)
    kinds = {
        str(dtype): torch.randint(0, 2, (3, 4), generator=generator).to(dtype)
        for dtype in storage.DTYPES.values()
    }
    weights = {
        "w": torch.randn(4, 6, generator=generator),
        "layer.bias": torch.randn(5, generator=generator).to(torch.bfloat16),
    }
    return {"model": weights, "kinds": kinds, "step": torch.tensor(seed), "empty": torch.zeros(0, 3)}


def flat(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    parts = [
        flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v} for k, v in state.items()
    ]
    return {name: tensor for part in parts for name, tensor in part.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def saved(directory: Path, *steps: int, **settings) -> Path:
    """Checkpoints of these steps, made in a process of their own."""

    def worker() -> None:
        kept = Checkpoints(directory, **{"keep": 99, **QUICK, **settings})
        for step in steps:
            kept.save(
                step,
                state_of(step),
                about={"tokens": 100 * step},
                texts={"config.yaml": f"step: {step}\n"},
                wait=True,
            )

    run_ranks(worker, 1)
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_loaded_is_what_was_saved(tmp_path):
    saved(tmp_path, 7)
    assert names(tmp_path) == ["latest", "step-00000007"]
    assert (tmp_path / "latest").read_text() == "step-00000007\n"
    assert equal(read_whole(tmp_path / "step-00000007"), flat(state_of(7)))
    assert (tmp_path / "step-00000007" / "config.yaml").read_text() == "step: 7\n"
    manifest = read_manifest(tmp_path / "step-00000007")
    assert manifest["tokens"] == 700 and sorted(manifest["files"]) == [
        "config.yaml",
        "index.json",
        "rank-00000.safetensors",
    ]

    def worker() -> dict:
        blank = {
            name: (
                {n: torch.zeros_like(t) for n, t in v.items()} if isinstance(v, dict) else torch.zeros_like(v)
            )
            for name, v in state_of(7).items()
        }
        return flat(Checkpoints(tmp_path).load(7, blank))

    assert equal(run_ranks(worker, 1)[0], flat(state_of(7)))


def test_every_file_can_be_read_by_whoever_can_read_the_directory(tmp_path):
    saved(tmp_path, 1)
    before = os.umask(0)
    os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "step-00000001").iterdir()} == {
        oct(0o666 & ~before)
    }


def test_a_save_is_a_copy_and_does_not_wait(tmp_path, monkeypatch):
    go_on, save_file = threading.Event(), storage.save_file

    def slow(*arguments, **options):
        assert go_on.wait(60)
        return save_file(*arguments, **options)

    def worker() -> list:
        monkeypatch.setattr(storage, "save_file", slow)
        kept, state = Checkpoints(tmp_path, **QUICK), state_of(1)
        kept.save(1, state)
        for tensor in flat(state).values():
            tensor.fill_(1)  # the next step trains on
        seen = [kept.all_steps(), (tmp_path / "latest").exists()]
        go_on.set()
        kept.finish()
        return [*seen, kept.steps(), kept.last_saved]

    assert run_ranks(worker, 1) == [[[], False, [1], 1]]
    assert equal(read_whole(tmp_path / "step-00000001"), flat(state_of(1)))


def test_pieces_of_four_ranks_are_cut_anew_for_two_and_for_one(tmp_path):
    """Odd sizes: 7 rows over 4 ranks leave the last one with a single row, 3 rows leave it none."""
    whole = {
        "a": torch.arange(21.0).view(7, 3),
        "b": torch.arange(12).view(3, 4),
        "c": torch.arange(5.0).sqrt(),
    }

    def sharded(of: dict) -> dict:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        return {
            "a": distribute_tensor(of["a"], mesh, [Shard(0)]),
            "b": distribute_tensor(of["b"], mesh, [Shard(1)]),
            "b0": distribute_tensor(of["b"], mesh, [Shard(0)]),
            "c": of["c"].clone(),
        }

    def writing() -> None:
        Checkpoints(tmp_path, **QUICK).save(1, sharded(whole), wait=True)

    def reading() -> dict:
        loaded = Checkpoints(tmp_path).load(
            1, sharded({name: torch.zeros_like(t) for name, t in whole.items()})
        )
        return {name: t.full_tensor() if name != "c" else t for name, t in loaded.items()}

    run_ranks(writing, 4)
    expected = {**whole, "b0": whole["b"]}
    assert equal(read_whole(tmp_path / "step-00000001"), expected)
    files = names(tmp_path / "step-00000001")
    assert [name for name in files if name.startswith("rank")] == [
        f"rank-{rank:05d}.safetensors" for rank in range(4)
    ]
    for num_ranks in (1, 2, 4):
        assert all(equal(loaded, expected) for loaded in run_ranks(reading, num_ranks))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def zero(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(len(content[middle : middle + 64]))
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": flip,
    "zeros": zero,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 3),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "index.json", "config.yaml", "manifest.json"])
def test_any_damage_is_found_and_named_and_the_run_goes_on_from_the_one_before(tmp_path, file, damage):
    saved(tmp_path, 10, 20)
    DAMAGES[damage](tmp_path / "step-00000020" / file)
    (found,) = problems(tmp_path / "step-00000020")
    assert file in found

    def worker() -> tuple:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("trainer").addHandler(handler)
        kept = Checkpoints(tmp_path)
        good = kept.newest_good()
        kept.go_on_from(good.step)
        return good.step, lines

    step, lines = run_ranks(worker, 1)[0]
    assert step == 10 and any("DAMAGED" in line and file in line for line in lines)
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000020.damaged"]
    assert (tmp_path / "latest").read_text() == "step-00000010\n"


def test_ranks_verify_together_and_all_hear_of_it(tmp_path):
    saved(tmp_path, 1, 2)
    flip(tmp_path / "step-00000002" / "rank-00000.safetensors")
    found = run_ranks(lambda: (Checkpoints(tmp_path).verify(1), Checkpoints(tmp_path).verify(2)), 3)
    assert all(good == [] and len(bad) == 1 and "rank-00000" in bad[0] for good, bad in found)


def test_if_none_is_good_nothing_is_started_anew_over_them(tmp_path):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}" / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"none of the checkpoints can be used \(steps 1, 2\)"):
        run_ranks(lambda: Checkpoints(tmp_path).newest_good(), 1)
    assert run_ranks(lambda: Checkpoints(tmp_path / "nothing").newest_good(), 1) == [None]


def test_nothing_is_written_into_a_directory_that_is_there(tmp_path):
    saved(tmp_path, 5)
    before = {path.name: path.read_bytes() for path in (tmp_path / "step-00000005").iterdir()}

    def worker() -> int:
        kept = Checkpoints(tmp_path, **QUICK)
        kept.save(5, state_of(6), wait=True)
        return kept.misses

    assert run_ranks(worker, 1) == [1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "step-00000005").iterdir()} == before
    assert names(tmp_path) == ["latest", "step-00000005"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(tmp_path, monkeypatch, num_ranks):
    saved(tmp_path, 1)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    def worker() -> tuple:
        if torch.distributed.get_rank() == num_ranks - 1:
            monkeypatch.setattr(storage, "make_durable", full)
        kept = Checkpoints(tmp_path, **QUICK)
        for step in (2, 3):
            kept.save(step, state_of(step), wait=True)
        misses, there = kept.misses, names(tmp_path)
        torch.distributed.barrier()  # else one looks while another has begun the next save
        with pytest.raises(SaveError, match="3 checkpoints in a row"):
            kept.save(4, state_of(4), wait=True)
        return misses, there, kept.last_saved

    assert run_ranks(worker, num_ranks) == [(2, ["latest", "step-00000001"], None)] * num_ranks
    assert problems(tmp_path / "step-00000001") == []


def test_a_save_is_tried_again_and_a_success_forgets_the_misses(tmp_path, monkeypatch, caplog):
    failing = {"left": 2}
    durable = storage.make_durable

    def sometimes(path: Path) -> None:
        if path.suffix == ".safetensors" and failing["left"]:
            failing["left"] -= 1
            raise OSError(28, "No space left on device")
        durable(path)

    def worker() -> tuple:
        monkeypatch.setattr(storage, "make_durable", sometimes)
        waited: list[float] = []
        monkeypatch.setattr(checkpoints.time, "sleep", waited.append)
        kept = Checkpoints(tmp_path, retries=2, retry_s=0.5)
        kept.misses = 2
        kept.save(1, state_of(1), wait=True)
        return waited, kept.misses, kept.steps()

    assert run_ranks(worker, 1) == [([0.5, 1.0], 0, [1])]
    assert equal(read_whole(tmp_path / "step-00000001"), flat(state_of(1)))


def test_a_checkpoint_under_the_name_of_another_step_is_not_used(tmp_path):
    saved(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000005")
    assert run_ranks(lambda: Checkpoints(tmp_path).newest_good().step, 1) == [2]
    assert problems(tmp_path / "step-00000005") == [
        f"{tmp_path}/step-00000005 holds step 2: it was renamed or copied"
    ]


def test_numbers_that_would_become_others_are_refused(tmp_path):
    state = {"float": torch.tensor([1.7, 300.2]), "count": torch.tensor([2**40])}

    def worker(**dtypes: torch.dtype) -> dict:
        kept = Checkpoints(tmp_path, **QUICK)
        if not kept.steps():
            kept.save(1, state, wait=True)
        return kept.load(
            1, {name: torch.zeros_like(t, dtype=dtypes.get(name, t.dtype)) for name, t in state.items()}
        )

    rounded = run_ranks(lambda: worker(float=torch.bfloat16), 1)[0]
    assert equal(rounded, {**state, "float": state["float"].bfloat16()})
    for wrong in ({"float": torch.uint8}, {"count": torch.int32}, {"count": torch.float32}):
        with pytest.raises(
            ValueError, match=f"{next(iter(wrong))}: has torch.*, must be {next(iter(wrong.values()))}"
        ):
            run_ranks(lambda given=wrong: worker(**given), 1)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_directory_that_rank_0_cannot_tidy_is_refused_on_all_ranks(tmp_path, monkeypatch, num_ranks):
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "index.json").unlink()

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    def worker() -> int | None:
        monkeypatch.setattr(Path, "rename", denied)
        kept = Checkpoints(tmp_path, **QUICK)
        found = kept.newest_good()
        with pytest.raises(SaveError, match=r"cannot be written to: PermissionError: \[Errno 13\]"):
            kept.go_on_from(found.step)
        return found.step

    assert run_ranks(worker, num_ranks) == [1] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_fails_after_the_rename_is_told_and_is_no_miss(tmp_path, monkeypatch, num_ranks):
    """The checkpoint is there: trying again would find it in the way, and three of them would end the run."""
    (tmp_path / ".step-00000001.deleted" / "left").mkdir(parents=True)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    def worker() -> tuple:
        said: list[str] = []
        monkeypatch.setattr(checkpoints.log, "warning", lambda text, *values: said.append(text % values))
        kept = Checkpoints(tmp_path, keep=1, **QUICK)
        kept.save(1, state_of(1), wait=True)
        with monkeypatch.context() as broken:
            broken.setattr(checkpoints.os, "replace", full)
            kept.save(2, state_of(2), wait=True)
        seen = kept.misses, kept.last_saved, kept.steps(), (tmp_path / "latest").read_text(), len(said)
        kept.save(3, state_of(3), wait=True)
        return *seen, kept.steps(), said

    said = [
        (
            "the checkpoint of step 2 was written, but not all after it was done: OSError: [Errno 28] No "
            "space left on device"
        )
    ]
    expected = (0, 2, [1, 2], "step-00000001\n", 1, [3], said)
    others = (0, 2, [1, 2], "step-00000001\n", 0, [3], [])
    assert run_ranks(worker, num_ranks) == [expected, others][:num_ranks]


def test_the_newest_are_kept_and_those_for_good(tmp_path):
    saved(tmp_path, *range(1, 9), keep=2, keep_every=3)
    assert names(tmp_path) == ["latest", *(f"step-0000000{step}" for step in (3, 6, 7, 8))]


def test_what_is_incomplete_counts_as_nothing_when_old_ones_are_deleted(tmp_path):
    """torchtitan: keep 2, valid 10, incomplete 20 and 30, then 14 is saved: it deletes 10 and 14, and nothing
    valid is left.
    """
    saved(tmp_path, 10, 20, 30)
    (tmp_path / "step-00000020" / "manifest.json").unlink()
    os.truncate(tmp_path / "step-00000030" / "rank-00000.safetensors", 100)

    def worker() -> None:
        kept = Checkpoints(tmp_path, keep=2, **QUICK)
        kept.go_on_from(kept.newest_good().step)
        kept.save(14, state_of(14), wait=True)

    run_ranks(worker, 1)
    assert Checkpoints(tmp_path).all_steps() == [10, 14]
    assert problems(tmp_path / "step-00000010") == problems(tmp_path / "step-00000014") == []


def test_even_without_a_resume_damaged_ones_do_not_push_out_good_ones(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "index.json").unlink()
    saved(tmp_path, 3, keep=2)
    assert Checkpoints(tmp_path).all_steps() == [1, 2, 3]


def test_going_back_is_not_undone_by_what_was_abandoned(tmp_path, capsys):
    """torchtitan: load_step=10 while 20 and 30 exist; the next resume takes the abandoned 30."""
    run, directory = tmp_path, tmp_path / "checkpoints"
    saved(directory, 10, 20, 30)
    assert main(["rewind", str(run), "10"]) == OK
    assert "goes on from step 10" in capsys.readouterr().out
    assert run_ranks(lambda: Checkpoints(directory).newest_good().step, 1) == [10]
    saved(directory, 20, keep=2)
    assert run_ranks(lambda: Checkpoints(directory).newest_good().step, 1) == [20]
    assert names(directory) == [
        "latest",
        "step-00000010",
        "step-00000020",
        "step-00000020.abandoned",
        "step-00000030.abandoned",
    ]
    assert main(["rewind", str(run), "10"]) == OK
    assert "step-00000020.abandoned-2" in names(directory)


def test_a_rewind_of_what_cannot_be_written_to_is_refused(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "checkpoints", 10, 20)

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", denied)
    assert main(["rewind", str(tmp_path), "10"]) == REFUSED and "Permission denied" in capsys.readouterr().err


def test_a_rewind_to_a_damaged_one_changes_nothing(tmp_path, capsys):
    saved(tmp_path / "checkpoints", 10, 20)
    flip(tmp_path / "checkpoints" / "step-00000010" / "rank-00000.safetensors")
    before = names(tmp_path / "checkpoints")
    assert main(["rewind", str(tmp_path), "10"]) == DAMAGED
    assert "left as it is" in capsys.readouterr().err and names(tmp_path / "checkpoints") == before


def test_a_draft_of_a_killed_process_is_removed_and_never_loaded(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.draft")

    def worker() -> int:
        kept = Checkpoints(tmp_path)
        found = kept.newest_good()
        kept.go_on_from(found.step)
        return found.step

    assert run_ranks(worker, 1) == [1] and names(tmp_path) == ["latest", "step-00000001"]


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", [".metadata", "rank-00000.safetensors", "index.json", "manifest.json"])
def test_a_poisoned_pickle_is_refused_and_never_run(tmp_path, file):
    saved(tmp_path / "c", 1)
    poison = pickle.dumps(Payload(tmp_path / "ran"))
    (tmp_path / "c" / "step-00000001" / file).write_bytes(poison)
    pickle.loads(poison)
    assert (tmp_path / "ran").exists()  # it is poison
    (tmp_path / "ran").unlink()
    found = problems(tmp_path / "c" / "step-00000001")
    assert (found == []) == (file == ".metadata")
    if file != ".metadata":
        with pytest.raises(DamagedError):
            read_manifest(tmp_path / "c" / "step-00000001") and read_whole(tmp_path / "c" / "step-00000001")
    assert not (tmp_path / "ran").exists()


def test_no_file_outside_of_the_checkpoint_is_read(tmp_path):
    saved(tmp_path, 1, 2)
    path = tmp_path / "step-00000001"
    index = json.loads((path / "index.json").read_text())
    index["model.w"]["pieces"][0]["file"] = "../step-00000002/rank-00000.safetensors"
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedError, match="plain name"):
        storage.read_index(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../latest"] = manifest["files"]["config.yaml"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match="plain names"):
        read_manifest(path)


def test_tensors_that_do_not_fit_are_all_named_with_both_shapes(tmp_path):
    saved(tmp_path, 1)
    other = {**state_of(1), "model": {"w": torch.zeros(4, 8), "new": torch.zeros(2)}}
    with pytest.raises(
        ValueError,
        match=r"2 tensors do not fit(.|\n)*model.new: is not in it(.|\n)*\(4, 6\), must be \(4, 8\)",
    ):
        run_ranks(lambda: Checkpoints(tmp_path).load(1, other), 1)


def test_a_state_of_anything_but_tensors_is_refused(tmp_path):
    with pytest.raises(TypeError, match="model.lr: a checkpoint holds tensors only"):
        run_ranks(lambda: Checkpoints(tmp_path).save(1, {"model": {"lr": 0.1}}), 1)


# -- the command line, the lock ---------------------------------------------------------------------------


def test_list_and_verify(tmp_path, capsys):
    saved(tmp_path / "checkpoints", 10, 20, 30)
    assert main(["list", str(tmp_path)]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["10", "20", "30"] and lines[3].split()[-1] == "latest"
    assert "2,000" in lines[2] and "complete" in lines[2]
    assert main(["verify", str(tmp_path)]) == OK
    assert capsys.readouterr().out == "step 10: good\nstep 20: good\nstep 30: good\n"
    flip(tmp_path / "checkpoints" / "step-00000020" / "rank-00000.safetensors")
    assert main(["verify", str(tmp_path)]) == DAMAGED
    assert "step 20: DAMAGED\n" in capsys.readouterr().out
    assert main(["verify", str(tmp_path), "30"]) == OK
    for wrong in (["list", str(tmp_path / "no")], ["verify", str(tmp_path), "11"], ["rewind", str(tmp_path)]):
        assert main(wrong) == REFUSED
    assert "step 11" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "soon", "-1", "nan", "1e9"])
def test_a_wait_that_is_none_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setenv("TRIQUETRA_WAIT_S", text)
    with pytest.raises(ConfigError, match=f"TRIQUETRA_WAIT_S={text}: must be seconds from 0 to 86,400"):
        take(load(["experiment=demo", f"run_dir={tmp_path}"]))


def test_a_run_waits_as_long_as_it_is_told_and_says_so(tmp_path, monkeypatch):
    """The holder ends once it is said that somebody waits for it, so a shorter wait would be refused."""
    config = load(["experiment=demo", f"run_dir={tmp_path}"])
    code = (
        "import sys; from pathlib import Path; from trainer.ranks.lock import lock; "
        f"f = lock(Path({str(config.directory)!r})); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        said = []
        tell = lambda *words: (said.append(words), holder.stdin.close())  # noqa: E731
        monkeypatch.setattr(lock_module, "SHORT_S", 0.0)
        monkeypatch.setattr(lock_module.log, "warning", tell)
        monkeypatch.setenv("TRIQUETRA_WAIT_S", "3600")
        take(config).close()
        [(text, in_use, wait_s)] = said
        assert text % (in_use, wait_s) == f"{in_use}; it may leave within 3600 s"
        assert f"in use by process {holder.pid} on " in in_use
    finally:
        holder.kill()
        holder.wait()


def test_a_lock_is_held_as_long_as_its_process_lives(tmp_path):
    code = (
        "import time; from pathlib import Path; from trainer.ranks.lock import lock; f = "
        f"lock(Path({str(tmp_path)!r})); "
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "print('held', flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InUseError, match=f"in use by process {holder.pid} on "):
            lock(tmp_path, wait_s=0.2)
        holder.send_signal(signal.SIGSTOP)  # it hangs, and still has the directory
        with pytest.raises(InUseError):
            lock(tmp_path, wait_s=0.2)
        holder.send_signal(signal.SIGKILL)
        lock(tmp_path, wait_s=3600.0).close()  # it has it at once, not at the end of the wait
    finally:
        holder.kill()
        holder.wait()
    lock(tmp_path, wait_s=0.0).close()
