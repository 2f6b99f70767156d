"""What does it cost on 2,048 ranks to agree who writes and who reads which piece of a checkpoint?

    python -m benchmarks.checkpoint_ranks [ranks=2048] [replicas=16] [ep=8] [any setting: model=large ...]

One process is rank 0 of a fake process group. It holds the whole state of a run as shapes: weights, optimizer
state, biases. Everything but the bytes of tensors is real: the plan, the index of all ranks' pieces, the
answers that rank 0 unpickles, the index read and checked again, the plan of what rank 0 reads of it, on the
same ranks and on half of the replicas. Beside it: what torch's DCP would send to rank 0 for the same save.
Times are CPU seconds of this process.
"""

import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.checkpoint.layout import Plan, plan_of
from trainer.checkpoint.storage import INDEX, SafetensorsReader, read_index, write_index
from trainer.checkpoint.transfer import flat
from trainer.config import load
from trainer.model.afmoe import afmoe_config
from trainer.model.parallelize import build_parallel
from trainer.optim import muon
from trainer.ranks import device

SETTINGS = ["name=ranks", "steps=1", "seq_len=8192", "global_batch=12288", "micro_batch=1"]
HYPER = {
    "lr": 1e-3,
    "adamw_lr": 1e-3,
    "momentum": 0.95,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
}
T = TypeVar("T")


def state_of(overrides: list[str], *, replicas: int) -> dict[str, torch.Tensor]:
    """Of a run on all ranks of the group, on the meta device, by the names of a checkpoint."""
    config = load([*SETTINGS, *overrides])
    config.parallel.dp_replicate, config.parallel.dp_shard = replicas, None
    dims = device.build_mesh(config.parallel, num_experts=config.model.num_experts)
    shape = afmoe_config(config.model, flex=False)
    model = build_parallel(shape, dims, dtype=torch.bfloat16)
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[str, Any] = {"model": model.state_dict(), "optimizer": {}}
    for one in muon(model, **HYPER, dtype="bfloat16"):
        is_adamw = isinstance(one, torch.optim.AdamW)
        for parameter in (parameter for group in one.param_groups for parameter in group["params"]):
            kept = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
            state["optimizer"][names[parameter]] = kept if is_adamw else {"momentum": parameter}
    return flat(state)


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """(its result, CPU seconds)"""
    start_s = time.process_time()
    return action(), time.process_time() - start_s


def row(what: str, seconds: float, num_bytes: float | None = None) -> None:
    print(f"| {what} | {seconds:.2f} | {'' if num_bytes is None else f'{num_bytes / 1e6:.1f}'} |")


def save(state: dict[str, torch.Tensor], directory: Path, *, num_ranks: int) -> None:
    plan, first_s = timed(lambda: plan_of(state, num_ranks=num_ranks))
    _, again_s = timed(lambda: plan_of(state, num_ranks=num_ranks))
    own, own_s = timed(lambda: [box for planned in plan.values() if (box := planned.piece_of(0)) is not None])
    _, index_s = timed(lambda: write_index(directory, plan))
    answer = ({"rank-00000.safetensors": {"bytes": 10**9, "xxh3": "0" * 32}}, None)
    sent = pickle.dumps(answer)
    _, gather_s = timed(lambda: [pickle.loads(sent) for _ in range(num_ranks)])
    row("plan, first save", first_s)
    row("plan, later saves", again_s)
    row(f"own pieces ({len(own)} of {len(plan)} tensors)", own_s)
    row("index, written", index_s, (directory / INDEX).stat().st_size)
    row("files and hashes, gathered", gather_s, len(sent) * num_ranks)
    row("**a later save on rank 0**", again_s + own_s + index_s + gather_s, len(sent) * num_ranks)
    shares(plan, state, num_ranks=num_ranks)


def shares(plan: Plan, state: dict[str, torch.Tensor], *, num_ranks: int) -> None:
    """Staged is written: both are the pieces of the plan."""
    written = [0] * num_ranks
    for planned in plan.values():
        for box, rank in planned.pieces():
            written[rank] += torch.Size(box.sizes).numel() * planned.dtype.itemsize
    held = sum(
        (x.to_local() if isinstance(x, DTensor) else x).numel() * x.dtype.itemsize for x in state.values()
    )
    print(
        f"\nwritten: {sum(written) / 2**30:,.1f} GiB; staged by a rank: {min(written) / 2**30:.2f} to "
        f"{max(written) / 2**30:.2f} GiB of {held / 2**30:.2f} GiB that rank 0 holds\n"
    )


def dcp_save(state: dict[str, torch.Tensor], *, num_ranks: int) -> None:
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=False)
    plan, plan_s = timed(planner.create_local_plan)
    sent = pickle.dumps(plan)
    _, one_s = timed(lambda: pickle.loads(sent))
    row("DCP: a rank's plan", plan_s, len(sent))
    row(f"DCP: gathered and unpickled (1 x {num_ranks})", one_s * num_ranks, len(sent) * num_ranks)
    names = len(pickle.dumps(list(state)))
    row("DCP: names of the tensors, gathered on every rank before a load", 0.0, names * num_ranks)


def load_again(state: dict[str, torch.Tensor], directory: Path, *, where: str) -> None:
    index, index_s = timed(lambda: read_index(directory))
    reader, reader_s = timed(lambda: SafetensorsReader(directory, index))
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, reader.read_metadata())
    plan, plan_s = timed(planner.create_local_plan)
    pieces = sum(len(stored.pieces) for stored in index.values())
    row(f"index of {pieces} pieces, read and checked", index_s)
    row("pieces by place", reader_s)
    row(f"plan, {where} ({len(plan.items)} reads)", plan_s)


def main() -> None:
    own = {"ranks": 2048, "replicas": 16, "ep": 8}
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = int(value)
    overrides = [a for a in sys.argv[1:] if a.partition("=")[0] not in own]
    if not any(a.startswith("model=") for a in overrides):
        overrides.append("model=large")
    overrides.append(f"parallel.ep={own['ep']}")
    dist.init_process_group("fake", rank=0, world_size=own["ranks"], store=FakeStore())
    state = state_of(overrides, replicas=own["replicas"])
    print(f"{len(state)} tensors, {json.dumps(own)}, torch {torch.__version__}\n")
    print("| | CPU s | MB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        save(state, Path(name), num_ranks=own["ranks"])
        print("| | CPU s | MB |\n|---|---|---|")
        dcp_save(state, num_ranks=own["ranks"])
        load_again(state, Path(name), where="the same ranks")
        fewer = state_of(overrides, replicas=max(1, own["replicas"] // 2))
        load_again(fewer, Path(name), where="half of the replicas")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
