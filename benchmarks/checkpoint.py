"""What does a checkpoint cost: how long does the step wait, how long until it is durable, how long to verify
and load it?

    python -m benchmarks.checkpoint [rounds=5] [any setting of the trainer: model=small ...]

One process trains; in each round the contenders save the same state one after another, in turns: ours with
the step waiting for all of it, ours in the background, and torch's own `dcp.save` and `dcp.async_save`, which
neither hash nor rename. `waits` is how long the call holds up the step. While ours is being written, steps
are timed against those before it.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from trainer import train
from trainer.checkpoint import Checkpoints, problems
from trainer.checkpoint.checkpoints import Found
from trainer.config import load
from trainer.run.recover import resume

SETTINGS = [
    "model=small",
    "data=synthetic",
    "data.workers=0",
    "name=checkpoint",
    "steps=1000",
    "seq_len=256",
    "global_batch=8",
    "micro_batch=4",
]
Times = dict[str, list[float]]


def timed(action: Callable, *arguments: Any, **options: Any) -> float:
    start_s = time.perf_counter()
    action(*arguments, **options)
    return time.perf_counter() - start_s


def one_step(run: train.Run) -> None:
    train.train_step(run, train.next_batches(run))


def one_round(
    run: train.Run, ours: Checkpoints, times: Times, *, number: int, group: dist.ProcessGroup
) -> None:
    for _ in range(3):
        times["step"].append(timed(one_step, run))
    state_s = timed(run.state_dict)
    state = run.state_dict()
    times["sync"].append(state_s + timed(ours.save, 2 * number, state, wait=True))
    times["background waits"].append(state_s + timed(ours.save, 2 * number + 1, state))
    written_s = time.perf_counter()
    while ours.thread is not None and ours.thread.is_alive():
        times["step meanwhile"].append(timed(one_step, run))
    ours.finish()
    times["background durable after"].append(time.perf_counter() - written_s)
    for name in ("dcp", "async"):
        shutil.rmtree(ours.directory.parent / name, ignore_errors=True)
    times["dcp.save"].append(state_s + timed(dcp.save, state, checkpoint_id=ours.directory.parent / "dcp"))
    start_s = time.perf_counter()
    future = dcp.async_save(state, checkpoint_id=ours.directory.parent / "async", process_group=group)
    times["dcp.async_save waits"].append(state_s + time.perf_counter() - start_s)
    future.result()


def main() -> None:
    rounds = int(next((a.removeprefix("rounds=") for a in sys.argv[1:] if a.startswith("rounds=")), 5))
    run = train.build(load([*SETTINGS, *(a for a in sys.argv[1:] if not a.startswith("rounds="))]))
    directory, times, group = (
        Path(tempfile.mkdtemp(dir=".")),
        defaultdict[str, list[float]](list),
        dist.new_group(backend="gloo"),
    )
    ours = Checkpoints(directory / "ours", keep=1)
    try:
        one_round(run, ours, defaultdict(list), number=0, group=group)  # warms up
        for number in range(1, rounds + 1):
            one_round(run, ours, times, number=number, group=group)
        newest = Found(2 * rounds + 1, ours.path(2 * rounds + 1))
        size = sum(file.stat().st_size for file in newest.path.iterdir())
        for _ in range(rounds):
            times["verify"].append(timed(problems, newest.path))
            times["load"].append(timed(resume, run, newest))
    finally:
        shutil.rmtree(directory)
    sync_s = statistics.median(times["sync"])
    print(
        f"{size / 1e6:.0f} MB, {torch.get_num_threads()} threads, medians of {rounds} rounds and "
        "their range\n"
    )
    print("| | ms | of `sync` |\n|---|---|---|")
    for name, values in times.items():
        middle, low, high = (1e3 * of(values) for of in (statistics.median, min, max))
        print(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {middle / 1e3 / sync_s:.3f} |")


if __name__ == "__main__":
    main()
