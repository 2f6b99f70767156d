"""`trainer.train`, with a fault in it: put there from outside, by wrapping what the product calls.

    python -m tests.drills.faulty '{"fault": "hang_in_step", "rank": 1, "step": 8, "where": "/tmp/drill"}'
    <overrides>

where: the drill's directory. Files there tell it what happened: pid.<rank>, `trained` (time and number of
each step that rank 0 trained), `fired` (the fault has happened; it does not happen again in a later life of
the run), reached.<rank> (a rank waits at its hook to be killed), digests.<rank>.
"""

import errno
import gc
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import trainer.checkpoint.checkpoints as saving
import trainer.checkpoint.storage as storage
import trainer.data.sources
import trainer.ranks.agree
import trainer.run.build
import trainer.run.step
from trainer import train
from trainer.checkpoint.transfer import Staging
from trainer.optim import Optimizers
from trainer.ranks import device
from trainer.ranks.local import local
from trainer.ranks.stop import StopRequest


def main(spec: dict[str, Any], overrides: list[str]) -> int:
    where, rank = Path(spec["where"]), int(os.environ["RANK"])
    (where / f"pid.{rank}").write_text(str(os.getpid()))
    device.peak_flops = lambda *of: 1e9  # measuring it takes longer than a drill's steps
    note_steps(where / "trained", rank)
    if "fault" in spec and spec.get("rank", rank) == rank:
        FAULTS[spec["fault"]](where, **{k: v for k, v in spec.items() if k not in ("fault", "where", "rank")})
    if "stop_at" in spec and rank == int(os.environ["WORLD_SIZE"]) - 1:
        around_steps(
            before=lambda run, step: os.kill(os.getpid(), signal.SIGTERM) if step == spec["stop_at"] else None
        )
    sys.argv = ["train", *overrides]
    with StopRequest():  # as the program itself has, from its first line on
        return train.main()


def around_steps(
    *,
    before: Callable[[Any, int], Any] = lambda run, step: None,
    after: Callable[[Any, int], Any] = lambda run, step: None,
) -> None:
    original = train.train_step

    def train_step(run, batches, **timing):
        step = run.step + 1
        before(run, step)
        values = original(run, batches, **timing)
        after(run, step)
        return values

    train.train_step = train_step


def note_steps(path: Path, rank: int) -> None:
    def note(run, step):
        if run.step == step:  # it had rows
            with path.open("a") as file:
                file.write(f"{time.time()} {step}\n")

    if rank == 0:
        around_steps(after=note)


def first_time(where: Path, *, name: str = "fired") -> bool:
    with suppress(FileExistsError):
        (where / name).touch(exist_ok=False)
        return True
    return False


# -- a rank that stops somewhere ----------------------------------------------------------------------------


def hang_in_step(where: Path, *, step: int) -> None:
    """It never comes back from its step."""

    def sleep_for_ever():
        while True:
            time.sleep(1)

    around_steps(before=lambda run, at: sleep_for_ever() if at == step and first_time(where) else None)


def hold(where: Path, *, step: int) -> None:
    """It waits before this step until the file `go` is there."""

    def wait(run, at):
        while at == step and not (where / "go").exists():
            time.sleep(0.02)

    around_steps(before=wait)


def pause(where: Path, *, hook: str, step: int) -> None:
    """At a point of the save of `step` a rank says so and waits to be killed."""

    def wait_here(of: str) -> None:
        if first_time(where):
            (where / "reached").write_text(of)
            while True:
                time.sleep(1)

    def wrapped(owner: Any, name: str, action: Callable[..., bool]) -> None:
        """`action` looks at the arguments: is it this call? If so it may already have done half of it."""
        original = getattr(owner, name)

        def call(*args, **kwargs):
            if action(*args) and not (where / "fired").exists():
                wait_here(f"{hook} of step {step}")
            return original(*args, **kwargs)

        setattr(owner, name, call)

    name, save_file, write = f"step-{step:08d}", storage.save_file, saving.write_manifest

    def half_shard(tensors, path):
        if is_it := name in str(path) and not (where / "fired").exists():
            save_file(tensors, path)
            os.truncate(path, path.stat().st_size // 2)
        return is_it

    def half_manifest(directory, *of):
        if is_it := name in str(directory) and not (where / "fired").exists():
            write(directory, *of)
            os.truncate(directory / "manifest.json", 100)
        return is_it

    def half_deleted(path, *of):
        if is_it := path.name.endswith(".deleted") and path.exists():
            next(path.iterdir()).unlink()
        return is_it

    if hook == "deleting an old one":
        # the module of everybody else stays as it is
        saving.shutil = SimpleNamespace(**vars(saving.shutil))
    hooks = {
        "before the first byte": (storage, "save_file", lambda tensors, path: name in str(path)),
        "half a shard": (storage, "save_file", half_shard),
        "between two ranks' files": (storage, "save_file", lambda tensors, path: name in str(path)),
        "before the manifest": (saving, "write_manifest", lambda directory, *of: name in str(directory)),
        "half a manifest": (saving, "write_manifest", half_manifest),
        "before the rename": (Path, "rename", lambda path, to: path.name == f".{name}.draft"),
        "before `latest`": (saving.Checkpoints, "point_at", lambda checkpoints, of: of == step),
        "deleting an old one": (getattr(saving, "shutil", None), "rmtree", half_deleted),
        "before metrics.jsonl is cut": (os, "truncate", lambda path, size: "metrics.jsonl" in str(path)),
    }
    wrapped(*hooks[hook])


# -- signals ----------------------------------------------------------------------------------------------

# a call just before which a signal comes, in the order of a run
MOMENTS = {
    "the configuration": (train, "load"),
    "early refusals": (train, "refuse_early"),
    "joining": (device, "start"),
    "agreeing": (trainer.run.build, "refuse_disagreement"),
    "the mesh": (device, "build_mesh"),
    "the data": (trainer.run.build, "build_stream"),
    "the model": (trainer.run.build, "build_parallel"),
    "the weights": (trainer.run.build, "initialize"),
    "the optimizer": (trainer.run.build, "Optimizers"),
    "the directory": (train, "open_directory"),
    "watching": (train, "Watchdog"),
    "the garbage": (gc, "freeze"),
    "rows": (train, "next_batches"),
    "a step": (train, "train_step"),
    "the gradient": (trainer.run.step, "squared_gradient_norm"),
    "the update": (Optimizers, "step"),
    "copying": (Staging, "stage"),
    "loading": (train, "resume"),
    "writing": (storage, "save_file"),
    "the last save": (train, "finish_saving"),
    "the verdict": (train, "conclude"),
    "leaving": (torch.distributed, "destroy_process_group"),
}


def signal_at(where: Path, *, moment: str, number: int) -> None:
    """This rank is sent a signal just before the first call."""
    owner, name = MOMENTS[moment]
    original, sent = getattr(owner, name), []

    def call(*args, **kwargs):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, call)


# -- data, disk ---------------------------------------------------------------------------------------------


def source(where: Path, *, after: int, times: int | None = None, hangs: bool = False) -> None:
    """Documents cannot be read from the `after`-th on: `times` times, or for good."""
    of, seen = trainer.data.sources.SyntheticSource, {"reads": 0, "failed": 0}
    original = of.__getitem__

    def read_of_a_dead_disk():
        while True:
            time.sleep(1)

    def read(self, i):
        seen["reads"] += 1
        if seen["reads"] > after and (times is None or seen["failed"] < times):
            seen["failed"] += 1
            if hangs and first_time(where):
                read_of_a_dead_disk()
            if not hangs:
                raise OSError(errno.EIO, "Input/output error (drill)")
        return original(self, i)

    of.__getitem__ = read


def full_disk(where: Path) -> None:
    """While the file `full` is there, nothing can be made durable."""
    original = os.fsync

    def fsync(descriptor):
        if (where / "full").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    os.fsync = fsync


# -- numbers ------------------------------------------------------------------------------------------------


class NanGradient(torch.autograd.Function):
    """The identity, and a gradient that is not a number."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


WRONG = {
    "gradient": NanGradient.apply,  # the loss looks well
    "loss": lambda loss: loss * float("nan"),
    "spike": lambda loss: loss * 50,
}


def wrong_numbers(where: Path, *, kind: str, steps: list[int]) -> None:
    """Loss or gradient of this rank, each of these steps once. Digests of all that a step may change are
    written.
    """
    done, hooks = set(), []
    digests = (where / f"digests.{os.environ['RANK']}").open("a", buffering=1)

    def before(run, step):
        if step in steps and step not in done:
            done.add(step)
            digests.write(json.dumps({"step": step, "before": digest(run)}) + "\n")
            hooks.append(run.model.register_forward_hook(lambda model, given, loss: WRONG[kind](loss)))

    def after(run, step):
        if hooks:
            hooks.pop().remove()
            digests.write(json.dumps({"step": step, "after": digest(run)}) + "\n")

    around_steps(before=before, after=after)


def digest(run: Any) -> str:
    """Of this rank's part of weights, optimizer state and biases."""
    digest = hashlib.sha256()
    for tensor in [*run.model.parameters(), *run.model.buffers()]:
        digest.update(local(tensor.detach()).cpu().contiguous().numpy().tobytes())
    for optimizer in run.optimizer.optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                digest.update(local(torch.as_tensor(value)).cpu().contiguous().numpy().tobytes())
    for value in run.balancer.state_dict().values():
        digest.update(local(value).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# -- starts -------------------------------------------------------------------------------------------------


def other_code(where: Path, *, version: str) -> None:
    trainer.run.build.code_version = lambda: version


FAULTS: dict[str, Callable[..., None]] = {
    of.__name__: of
    for of in (hang_in_step, hold, pause, signal_at, source, full_disk, wrong_numbers, other_code)
}

if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
