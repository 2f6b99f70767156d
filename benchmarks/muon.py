"""How orthogonal is Muon's update, and what does it cost: in time at `model=small`, in FLOP and bytes for
Trinity Large?

    python -m benchmarks.muon [rounds=5] [any setting of the trainer: model=small global_batch=16 ...]

Accuracy: singular values after Newton-Schulz, of Gaussian matrices and of one with a spectrum that falls to
1e-4.
Measured: the whole `train_step` and the optimizers' part of it, with AdamW and with Muon, interleaved in one
process.
Counted: the plan of rank 0 of 2,048 (dp_replicate 16 x dp_shard 128, ep 8) on a fake process group, from
shapes alone; bytes are those of bfloat16. The minimum is what must move when each matrix is orthogonalised by
one rank: its missing pieces to that rank, the result to all R x S ranks that hold a piece.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks.train_step import SETTINGS, packed_batch
from trainer import train
from trainer.config import load
from trainer.data import Batch
from trainer.model.afmoe import afmoe_config
from trainer.model.parallelize import build_parallel
from trainer.optim import muon
from trainer.optim.newton_schulz import cost, orthogonalize
from trainer.optim.plan import Item, Plan
from trainer.ranks import device

HYPER = {
    "lr": 1e-3,
    "adamw_lr": 1e-3,
    "momentum": 0.95,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
}


def accuracy() -> None:
    print(
        "| matrix | dtype | smallest and largest singular value | deviation from orthogonal, mean over "
        "directions |"
    )
    print("|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    cases = (("256 x 256", 256, 256, 0), ("256 x 768", 256, 768, 0), ("256 x 768, 1 to 1e-4", 256, 768, 4))
    for name, rows, columns, falling in cases:
        matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        if falling:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            matrix = left @ torch.diag(torch.logspace(0, -falling, len(values), dtype=torch.float64)) @ right
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            update = orthogonalize(matrix[None].to(dtype))[0].double()
            values = torch.linalg.svdvals(update)
            gram = update @ update.T - torch.eye(rows, dtype=torch.float64)
            low, high, error = values.min(), values.max(), gram.norm() / rows**0.5
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {low:.3f} to {high:.3f} | {error:.3f} |")
    print()


def measure(rounds: int, overrides: list[str]) -> None:
    arms = {"adamw": [*SETTINGS, "optim=adamw", *overrides], "muon": [*SETTINGS, "optim=muon", *overrides]}
    steps, times = {name: stepper(arm) for name, arm in arms.items()}, {name: [] for name in arms}
    for _ in range(rounds + 1):  # the first one is not counted
        for name, step in steps.items():
            times[name].append(step())
    config = load(arms["muon"])
    print(
        f"{config.global_batch} x {config.seq_len} tokens, {torch.get_num_threads()} threads, medians of "
        f"{rounds} rounds\n"
    )
    print("| optimizer | step [ms] | its part [ms] | share |\n|---|---|---|---|")
    for name, pairs in times.items():
        whole_ms, part_ms = (statistics.median(seconds) * 1e3 for seconds in zip(*pairs[1:], strict=True))
        print(f"| {name} | {whole_ms:.0f} | {part_ms:.1f} | {part_ms / whole_ms:.1%} |")
    dist.destroy_process_group()


def stepper(overrides: list[str]) -> Callable[[], tuple[float, float]]:
    """A function that makes one step and returns its time and the optimizers' part of it [s]."""
    run = train.build(load(overrides))
    config, part_s = run.config, 0.0
    batch = packed_batch(config.model.vocab_size, rows=config.global_batch, seq_len=config.seq_len)
    micro_batches = [
        Batch(*parts) for parts in zip(*(t.split(config.micro_batch) for t in batch), strict=True)
    ]
    step_weights = run.optimizer.step

    def timed() -> None:
        nonlocal part_s
        start_s = time.perf_counter()
        step_weights()
        part_s = time.perf_counter() - start_s

    def step() -> tuple[float, float]:
        start_s = time.perf_counter()
        train.train_step(run, micro_batches)
        return time.perf_counter() - start_s, part_s

    run.optimizer.step = timed
    return step


def count() -> None:
    dist.init_process_group("fake", rank=0, world_size=2048)
    config = load(["experiment=trinity_large"])
    dims = device.build_mesh(config.parallel, num_experts=config.model.num_experts)
    model = build_parallel(afmoe_config(config.model, flex=False), dims, dtype=torch.bfloat16)
    start_s = time.perf_counter()
    plans = muon(model, **HYPER, dtype="bfloat16")[0].plans
    print(f"\nTrinity Large on 2,048 ranks, rank 0; planned in {time.perf_counter() - start_s:.2f} s\n")
    print(
        "| matrices | number | owners | rounds | TFLOP | most/mean | TFLOP if replicas repeated it | GB "
        "received | minimum |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for plan in plans:
        items = [item for owned in plan.rounds for items in owned for item in items]
        flop, name = flop_by_owner(plan), "all others" if plan.cut_group else "experts"
        spread = max(flop) / statistics.mean(flop)
        mine = flop[plan.replica * plan.num_cuts + plan.cut_rank]
        print(
            f"| {name} | {len(items)} | {plan.num_replicas} x {plan.num_cuts} | {len(plan.rounds)} "
            f"| {mine / 1e12:.2f} | {spread:.2f} | {sum(flop) / plan.num_cuts / 1e12:.1f} "
            f"| {2 * received(plan) / 1e9:.3f} | {2 * minimum(plan, items) / 1e9:.3f} |"
        )
    dist.destroy_process_group()


def flop_by_owner(plan: Plan) -> list[int]:
    return [
        sum(cost(*item.shape) for owned in plan.rounds for item in owned[owner])
        for owner in range(len(plan.rounds[0]))
    ]


def received(plan: Plan) -> int:
    """[elements] that this rank gets from others in one step, padding included."""
    total = 0
    for owned in plan.rounds:
        shares = [owned[r * plan.num_cuts : (r + 1) * plan.num_cuts] for r in range(plan.num_replicas)]
        size = [
            [sum(math.prod(plan.piece_shape(item, plan.cut_rank)) for item in items) for items in share]
            for share in shares
        ]
        mine = shares[plan.replica][plan.cut_rank]
        # pieces to this owner
        total += sum(math.prod(item.shape) for item in mine) - size[plan.replica][plan.cut_rank]
        total += sum(size[plan.replica]) - size[plan.replica][plan.cut_rank]  # results of this replica
        total += (plan.num_replicas - 1) * max(map(sum, size))  # results of the others
    return total


def minimum(plan: Plan, items: list[Item]) -> float:
    """[elements], mean over ranks."""
    ranks = plan.num_replicas * plan.num_cuts
    pieces = 1 - 1 / plan.num_cuts
    results = plan.num_replicas - 1 / plan.num_cuts
    return sum(math.prod(item.shape) for item in items) * (pieces + results) / ranks


def main() -> None:
    rounds, overrides = 5, []
    for argument in sys.argv[1:]:
        if argument.startswith("rounds="):
            rounds = int(argument.removeprefix("rounds="))
        else:
            overrides.append(argument)
    accuracy()
    measure(rounds, overrides)
    count()


if __name__ == "__main__":
    main()
