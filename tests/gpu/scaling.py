"""Stage 8b. How fast are eight GPUs next to one, what do their links reach, does memory stay?"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.gpu.bench import Bench
from tests.gpu.ranks import spawn_ranks
from tests.gpu.speed import DEBUG, NANO, fill
from tests.ranks import run_ranks
from trainer import next_batches, train_step
from trainer.config import load
from trainer.ranks import device
from trainer.run.build import build

RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Size:
    runs: dict[str, tuple[int, list[str]]]  # ranks and overrides; the first two are compared
    num_ranks: int
    spread: Callable[..., list[Any]]
    steps: int
    bytes: int  # of a message


MINI = [
    "name=scaling", "experiment=trinity_mini", "data=synthetic", "stage=constant", "data.workers=0",
    "seq_len=4096", "global_batch=32", "micro_batch=4",
]  # fmt: skip
FOUR_ROWS = ["seq_len=4096", "micro_batch=2"]
SIZES = {
    "cuda": Size(
        runs={
            "Nano on 1": (1, [*NANO, *FOUR_ROWS, "global_batch=4"]),
            "Nano on 8": (8, [*NANO, *FOUR_ROWS, "global_batch=32", "parallel=fsdp"]),
            "Mini on 8, EP 8": (8, [*MINI, "parallel=fsdp_ep", "parallel.ep=8"]),
            "Mini on 8, EP 1": (8, [*MINI, "parallel=fsdp"]),
        },
        num_ranks=8,
        spread=spawn_ranks,
        steps=12,
        bytes=2**30,
    ),
    "cpu": Size(
        runs={
            "debug on 1": (1, [*DEBUG, "seq_len=32", "global_batch=2", "micro_batch=2"]),
            "debug on 2": (2, [*DEBUG, "seq_len=32", "global_batch=4", "micro_batch=2", "parallel=fsdp"]),
        },
        num_ranks=2,
        spread=run_ranks,
        steps=3,
        bytes=2**16,
    ),
}


def steps_of(overrides: Sequence[str], num_steps: int) -> dict[str, float]:
    """On each rank: [s] of a step, tokens/s of all ranks, MFU, [bytes] more at the end than at half."""
    with patch("trainer.run.build.initialize", fill):
        run = build(load([*overrides, "steps=1000"]))
        taken, allocated, values = [], [], {}
        for _ in range(num_steps):
            batches = next_batches(run)
            start_s = time.perf_counter()
            values = train_step(run, batches) or {}
            taken.append(time.perf_counter() - start_s)
            allocated.append(torch.cuda.memory_allocated() if run.device.type == "cuda" else 0)
        run.stream.close()
    step_s = median(taken[num_steps // 3 :])
    peak = device.peak_flops(run.device, torch.bfloat16) * dist.get_world_size()
    return {
        "step_s": step_s,
        "tokens/s": values["data/step_tokens"] / step_s,
        "MFU": values["data/step_flop"] / step_s / peak,
        "peak_gib": device.memory_gib(run.device),
        "growth": allocated[-1] - allocated[num_steps // 2],
    }


def speeds(bench: Bench, size: Size) -> None:
    """Tokens/s and MFU; eight GPUs do at least 7 times the work of one; not a byte more after many steps."""
    results = {}
    for name, (num_ranks, overrides) in size.runs.items():
        with tempfile.TemporaryDirectory() as directory:
            own = [*overrides, f"run_dir={directory}"]
            results[name] = result = size.spread(steps_of, num_ranks, own, size.steps)[0]
        bench.figure(f"{name}: step", result["step_s"], "s")
        bench.figure(f"{name}: tokens", result["tokens/s"], "tokens/s")
        bench.figure(f"{name}: MFU", result["MFU"])
        bench.figure(f"{name}: peak memory", result["peak_gib"], "GiB")
        bench.at_most(f"{name}: growth of memory", result["growth"], 0, "bytes")
    one, many = list(results.values())[:2]
    bench.speed_at_least("times as much work", many["tokens/s"] / one["tokens/s"], 7 / 8 * size.num_ranks)


def links_of(num_bytes: int) -> dict[str, float]:
    """On each rank: [B/s] received in an all-gather and sent in an all-to-all."""
    on = device.start(timeout_s=120)
    world = dist.get_world_size()
    part = torch.zeros(num_bytes // world, dtype=torch.uint8, device=on)
    whole = torch.zeros(part.numel() * world, dtype=torch.uint8, device=on)
    rank = Bench(on=on, results=None)
    gather_s = rank.seconds(lambda: dist.all_gather_single(whole, part), rounds=5)
    exchange_s = rank.seconds(lambda: dist.all_to_all_single(torch.empty_like(whole), whole), rounds=5)
    others = part.numel() * (world - 1)
    return {"nvlink": others / gather_s, "all_to_all_nvlink": others / exchange_s}


def links(bench: Bench, size: Size) -> None:
    """For the planner: added to calibration.json where stage 7b has written one."""
    reached = size.spread(links_of, size.num_ranks, size.bytes)[0]
    for name, value in reached.items():
        bench.figure(f"reached by {name}", value / 1e9, "GB/s")
    path = bench.results / "calibration.json"
    if path.exists():
        calibration = json.loads(path.read_text())
        calibration["measured"] |= reached
        path.write_text(json.dumps(calibration, indent=2) + "\n")
    else:
        bench.absent("calibration.json", "stage 7b writes it")


CHECKS = (speeds, links)
