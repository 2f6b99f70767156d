"""Stage 8a. Is every layout of eight GPUs the run of one GPU, and do eight ranks stop, die and go on?

One rank is the oracle, in float32: the same global batches, five steps of Muon. Then the scenes of stage 6.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.gpu import runs
from tests.gpu.bench import Bench, relative
from tests.gpu.ranks import spawn_ranks
from tests.gpu.runs import Size as RunsSize
from tests.ranks import run_ranks
from trainer import finish_saving, next_batches, save, start, train_step
from trainer.config import load
from trainer.model.afmoe import moe_layers
from trainer.ranks.local import local

RANKS = 8
STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Size:
    overrides: Sequence[str]
    layouts: dict[str, list[str]]
    num_ranks: int
    spread: Callable[..., list[Any]]
    runs: RunsSize


BASE = [
    "name=layouts", "data=synthetic", "optim=muon", "optim.dtype=float32", "dtype=float32", "data.workers=0",
    f"steps={2 * STEPS}", "global_batch=16", "micro_batch=1", "data.num_streams=16",
]  # fmt: skip
SIZES = {
    "cuda": Size(
        overrides=[*BASE, "model=tiny", "seq_len=256"],
        layouts={
            "FSDP 8": ["parallel=fsdp"],
            "HSDP 2 x 4": ["parallel=hsdp"],
            "EP 2": ["parallel=fsdp_ep"],
            "EP 4": ["parallel=fsdp_ep", "parallel.ep=4"],
            "EP 8": ["parallel=fsdp_ep", "parallel.ep=8"],
            "HSDP 2 x 4, EP 2": ["parallel=hsdp_ep"],
        },
        num_ranks=8,
        spread=spawn_ranks,
        runs=replace(
            runs.SIZES["cuda"],
            overrides=[*runs.SIZES["cuda"].overrides, "parallel=hsdp_ep"],
            num_ranks=8,
            at_once=1,
        ),
    ),
    "cpu": Size(
        overrides=[*BASE, "model=debug", "seq_len=32"],
        layouts={"EP 2": ["parallel=fsdp_ep"]},
        num_ranks=2,
        spread=run_ranks,
        runs=replace(
            runs.SIZES["cpu"], overrides=[*runs.SIZES["cpu"].overrides, "parallel=fsdp"], num_ranks=2
        ),
    ),
}


def trained(overrides: list[str], num_steps: int) -> dict[str, Any]:
    """On each rank: losses and counts of every step, from where the run's directory left it; then saved."""
    run = start(load(overrides))
    losses, counts, take = [], [], run.balancer.step

    def counted(step: int) -> dict[str, float]:
        counts_ME = torch.stack([layer.tokens_per_expert_E for layer in moe_layers(run.model)])
        dist.all_reduce(counts_ME)
        counts.append(counts_ME.cpu())
        return take(step)

    run.balancer.step = counted
    for _ in range(num_steps):
        losses.append(train_step(run, next_batches(run))["loss"])
    save(run)
    finish_saving(run)
    run.stream.close()
    held = sum(local(p).numel() for p in run.model.parameters())
    return {"losses": torch.tensor(losses, dtype=torch.float64), "counts": counts, "parameters": held}


def every_layout(bench: Bench, size: Size) -> None:
    """Losses of five steps 1e-5, the counts of the first step equal."""
    with tempfile.TemporaryDirectory() as directory:
        alone = [*size.overrides, f"run_dir={directory}/alone"]
        of_one = size.spread(trained, 1, alone, STEPS)[0]
        for number, (name, layout) in enumerate(size.layouts.items()):
            overrides = [*size.overrides, *layout, f"run_dir={directory}/{number}"]
            of_rank = size.spread(trained, size.num_ranks, overrides, STEPS)[0]
            bench.at_most(f"{name}: losses", relative(of_rank["losses"], of_one["losses"]), 1e-5)
            bench.same(f"{name}: counts of the first step", of_rank["counts"][0], of_one["counts"][0])
            bench.figure(
                f"{name}: parameters of a rank over all", of_rank["parameters"] / of_one["parameters"]
            )


def resume_on_another_layout(bench: Bench, size: Size) -> None:
    """The next loss after a checkpoint of one layout is loaded by another and by one rank: 1e-6."""
    layouts = list(size.layouts.values())
    with tempfile.TemporaryDirectory() as directory:
        where, after = f"run_dir={directory}", []
        size.spread(trained, size.num_ranks, [*size.overrides, *layouts[0], where], 2)
        for name, layout, num_ranks in (("one", [], 1), ("another", layouts[-1], size.num_ranks)):
            branch = [f"name={name}", f"branch={directory}/layouts/checkpoints/step-{2:08d}"]
            overrides = [*size.overrides, *layout, where, *branch]
            after.append(size.spread(trained, num_ranks, overrides, 1)[0]["losses"])
        bench.at_most("next loss", relative(after[1], after[0]), 1e-6)
        bench.same("checkpoints", len(list(Path(directory).glob("*/checkpoints/step-00000003"))), 2)


def scenes(bench: Bench, size: Size) -> None:
    """Those of stage 6, on all ranks."""
    runs.scenes(bench, size.runs)


CHECKS = (every_layout, resume_on_another_layout, scenes)
