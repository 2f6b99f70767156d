"""Stage 7b. Is one rank of 2,048 of Trinity Large what the planner says, and what does this GPU reach?

Weights, activations and kernels are real and are those of one rank; the process group carries nothing, so the
other 2,047 need not be there. What a collective would have brought is whatever lies in its buffer: times and
bytes are right, numbers mean nothing. Tokens are balanced over experts.

Writes calibration.json for `calibration=` of the planner: trainer/lab/plan/calibration.py has the format.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # the backend "fake"

from tests.gpu.attention import Case, attend, build, tensors, visible_pairs
from tests.gpu.bench import Bench, random
from tests.gpu.speed import fill
from trainer.config import Config, load
from trainer.model.afmoe import Afmoe, afmoe_config
from trainer.model.dispatch import TokenDispatcher
from trainer.model.moe import Experts
from trainer.model.parallelize import build_parallel
from trainer.optim import muon
from trainer.ranks import device
from trainer.ranks.local import local, scale_gradients, squared_gradient_norm

MICROBATCHES, STEPS = 2, 3
DEVICES = ("a100", "h100", "h200", "b200", "b300")  # files of configs/device


@dataclass(frozen=True, kw_only=True)
class Size:
    overrides: Sequence[str]
    ranks: int
    parameter_gib: float  # by arithmetic: this rank's share
    tokens: int  # of the products that are measured
    case: Case


SIZES = {
    "cuda": Size(
        overrides=[
            "experiment=trinity_large", "data=synthetic", "stage=constant", "steps=3", "name=one_rank",
            f"global_batch={MICROBATCHES * 2048}", "micro_batch=1",
        ],
        ranks=2048,
        parameter_gib=11.6018,  # tests/test_large.py
        tokens=8192,
        case=Case(rows=1, length=8192, group=6, head_dim=128, window=4096),
    ),
    "cpu": Size(
        overrides=[
            "model=debug", "data=synthetic", "optim=muon", "steps=3", "name=one_rank", "seq_len=32",
            f"global_batch={MICROBATCHES * 8}", "micro_batch=1", "parallel=hsdp_ep", "data.num_streams=8",
            "activation_checkpoint=selective",
        ],
        ranks=8,
        parameter_gib=0.0,
        tokens=64,
        case=Case(rows=1, length=64, group=2, head_dim=16, window=32),
    ),
}  # fmt: skip


@contextmanager
def ranks_that_are_not_there(num_ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=dist.HashStore())
    try:
        with patch.object(TokenDispatcher, "_sync_token_count_exchange", balanced):
            yield
    finally:
        dist.destroy_process_group()


def balanced(self: TokenDispatcher, sent_E: Tensor, received_Ee: Tensor, ep_size: int) -> tuple:
    """Every expert of this rank gets as many tokens from every rank; torchtitan would read the buffer."""
    per_expert = balanced.slots // received_Ee.numel()
    split = [per_expert * received_Ee.numel() // ep_size] * ep_size
    return torch.full_like(received_Ee, per_expert).reshape(-1), split, split


def one_rank(bench: Bench, size: Size) -> None:
    """Steps of two microbatches and Muon: seconds, most bytes at once; parameters by arithmetic."""
    config = load(size.overrides)
    rows, length, m = config.micro_batch, config.seq_len, config.model
    balanced.slots = rows * length * m.top_k
    with ranks_that_are_not_there(size.ranks):
        model, optimizers = of_rank(config, bench)
        held = sum(local(p).numel() * p.element_size() for p in model.parameters())
        if bench.is_gpu:
            bench.at_most("parameters over arithmetic", abs(held / 2**30 / size.parameter_gib - 1), 1e-4)
        bench.figure("parameters", held / 2**30, "GiB")
        tokens = torch.randint(m.vocab_size, (rows, length), device=bench.on)
        positions = torch.arange(length, device=bench.on).expand(rows, -1)
        taken = [step(bench, model, optimizers, tokens, positions) for _ in range(STEPS)]
        seconds = {part: statistics.median(of[part] for of in taken[1:]) for part in taken[0]}
    for part, part_s in seconds.items():
        bench.figure(part, part_s, "s")
    peak = torch.cuda.max_memory_allocated() if bench.is_gpu else 0
    bench.figure("peak memory", peak / 2**30, "GiB")
    run = {"overrides": list(size.overrides), "ranks": 1, "traced_ranks": size.ranks}
    write_calibration(
        bench, {**run, "step_s": sum(seconds.values()), "peak_bytes": peak}, reached(bench, size, config)
    )


def of_rank(config: Config, bench: Bench) -> tuple[Afmoe, Sequence[torch.optim.Optimizer]]:
    dims = device.build_mesh(config.parallel, num_experts=config.model.num_experts)
    model = build_parallel(
        afmoe_config(config.model, flex=bench.flex), dims, dtype=torch.bfloat16,
        activation_checkpoint=config.activation_checkpoint,
    )  # fmt: skip
    fill(model, device=bench.on, seed=0)
    rates = {"lr": 1e-3, "adamw_lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1}
    return model, muon(model, betas=(0.9, 0.95), eps=1e-8, dtype="bfloat16", **rates)


def step(
    bench: Bench, model: Afmoe, optimizers: Sequence, tokens: Tensor, positions: Tensor
) -> dict[str, float]:
    """[s] of its parts."""
    times = [time.perf_counter()]
    for _ in range(MICROBATCHES):
        model(tokens, positions, tokens).backward()
    for act in (
        lambda: None,
        lambda: (squared_gradient_norm(model), scale_gradients(model, 1e-4)),
        lambda: [optimizer.step() for optimizer in optimizers],
    ):
        act()
        bench.wait()
        times.append(time.perf_counter())
    for optimizer in optimizers:
        optimizer.zero_grad()
    parts = (f"{MICROBATCHES} microbatches", "gradient norm and scale", "optimizer")
    return dict(zip(parts, (after - before for before, after in pairwise(times)), strict=True))


# -- what this GPU reaches ----------------------------------------------------------------------------


def reached(bench: Bench, size: Size, config: Config) -> dict[str, float]:
    """[FLOP/s], [B/s] of products, attention and copies at the model's shapes."""
    m = config.model
    x = random(size.tokens, m.dim, seed=0, on=bench.on, dtype=torch.bfloat16)
    weight = random(m.ffn_dim, m.dim, seed=1, on=bench.on, dtype=torch.bfloat16)
    matmul_s = bench.seconds(lambda: x @ weight.T, rounds=10)
    copied = torch.empty(2**30 if bench.is_gpu else 2**20, dtype=torch.uint8, device=bench.on)
    copy_s = bench.seconds(lambda: copied.clone(), rounds=5)
    per_rank = max(1, m.num_experts // config.parallel.ep)
    slots = size.tokens * m.top_k // per_rank * per_rank
    experts_s = bench.seconds(grouped_product(bench, m.dim, m.expert_dim, per_rank, slots), rounds=5)
    attention_s, attention_flop = attention_cost(bench, size.case)
    return {
        "matmul": 2 * x.numel() * m.ffn_dim / matmul_s,
        "experts": 3 * 2 * slots * m.dim * m.expert_dim / experts_s,
        "attention": attention_flop / attention_s,
        "hbm": 2 * copied.numel() / copy_s,
    }


def grouped_product(
    bench: Bench, dim: int, hidden: int, num_experts: int, slots: int
) -> Callable[[], object]:
    """Forward and backward of one."""
    rows = random(slots, dim, seed=2, on=bench.on, dtype=torch.bfloat16).requires_grad_()
    weights = torch.randn(num_experts, hidden, dim, device=bench.on, dtype=torch.bfloat16).requires_grad_()
    ends = torch.arange(1, num_experts + 1, device=bench.on, dtype=torch.int32) * (slots // num_experts)
    seam = Experts.Config(dim=dim, hidden_dim=hidden, num_experts=num_experts)
    grad = random(slots, hidden, seed=3, on=bench.on, dtype=torch.bfloat16)
    return lambda: Experts._grouped_mm(seam, A=rows, B_t=weights.mT, offs=ends).backward(grad)


def attention_cost(bench: Bench, case: Case) -> tuple[float, float]:
    """[s] and [FLOP] of a local layer, forward and backward: 4 and 10 times the head dim for each pair."""
    model = build(case, flex=bench.flex)
    inputs = model.attention_inputs(torch.arange(case.length, device=bench.on).expand(case.rows, -1))
    qkv, grad = tensors(case, bench.on, torch.bfloat16)
    seconds = bench.seconds(lambda: attend(model, 0, qkv, inputs).backward(grad), rounds=5)
    return seconds, 14 * case.head_dim * 2 * case.group * case.rows * visible_pairs(case)


def launch_s(bench: Bench) -> float:
    """[s] of the host for a kernel that does nearly nothing."""
    number = torch.zeros((), device=bench.on)
    bench.wait()
    start_s = time.perf_counter()
    for _ in range(1000):
        number.add_(1)
    return (time.perf_counter() - start_s) / 1000


def write_calibration(bench: Bench, run: dict[str, object], measured: dict[str, float]) -> None:
    gpu = torch.cuda.get_device_name(bench.on) if bench.is_gpu else "none"
    calibration = {
        "format": 1,
        "device": next((name for name in DEVICES if name in gpu.lower()), gpu.lower()),
        "gpu": gpu,
        "torch": torch.__version__,
        "measured": measured,
        "launch_s": launch_s(bench),
        "runs": [run],
    }
    (bench.results / "calibration.json").write_text(json.dumps(calibration, indent=2) + "\n")
    for name, value in measured.items():
        bench.figure(f"reached by {name}", value / 1e12, "TB/s" if name == "hbm" else "TFLOP/s")
    bench.figure("a launch", calibration["launch_s"] * 1e6, "us")


CHECKS = (one_rank,)
