"""Does `triquetra plan` say what others have measured? Its ranges beside published runs.

    python -m benchmarks.plan > docs/benchmarks/plan.md

Where a report leaves a setting open, it is named as assumed. Models of others are shapes of an AFMoE with as
many parameters in each part: their attention is not ours.
"""

from dataclasses import dataclass

from trainer.config import load
from trainer.lab.plan.calibration import Calibration
from trainer.lab.plan.hardware import hardware
from trainer.lab.plan.plan import Plan, plan

SETTINGS = [
    "name=published", "steps=1", "dtype=bfloat16", "optim=adamw", "data=synthetic", "balance=sign",
    "model.global_every=1", "model.window=131072", "model.route_scale=1", "model=mini",
]  # fmt: skip
QWEN3 = [
    "model.vocab_size=151936", "model.dim=2048", "model.num_layers=48", "model.num_dense_layers=0",
    "model.num_heads=32", "model.num_kv_heads=4", "model.head_dim=128", "model.num_experts=128",
    "model.top_k=8", "model.expert_dim=768", "model.num_shared_experts=0",
]  # fmt: skip
DEEPSEEK = [
    "model.vocab_size=129280", "model.dim=7168", "model.num_layers=61", "model.num_dense_layers=3",
    "model.ffn_dim=18432", "model.num_heads=64", "model.num_kv_heads=8", "model.head_dim=128",
    "model.num_experts=256", "model.top_k=8", "model.expert_dim=2048", "model.num_shared_experts=1",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    what: str
    device: str
    overrides: list[str]
    published: float | None  # [tokens/s] of a GPU
    remark: str
    compute_only: bool = False  # was measured with a fake process group


def run(seq_len: int, micro: int, policy: str, *, shard: int, ep: int, rows: int) -> list[str]:
    return [
        f"seq_len={seq_len}", f"micro_batch={micro}", f"global_batch={rows * shard}",
        f"activation_checkpoint={policy}", f"parallel.dp_shard={shard}", f"parallel.ep={ep}",
    ]  # fmt: skip


SPAN = "stage.phase1_larger_batch.micro_batch"
LARGE = ["experiment=trinity_large", "parallel=published_2048"]
QWEN3_RUN = [*SETTINGS, *QWEN3, *run(4096, 4, "selective", shard=8, ep=8, rows=4)]
DEEPSEEK_RUN = [*SETTINGS, *DEEPSEEK, *run(4096, 1, "full", shard=256, ep=64, rows=4)]
CASES = [
    Case(
        "Trinity Large, 33 days on 2,048, published layout, micro_batch=1", "b300",
        [*LARGE, "micro_batch=1", f"{SPAN}=1", "activation_checkpoint=selective"], 2911,
        "the report does not say its microbatch; see the next row",
    ),
    Case(
        "the same, micro_batch=2", "b300",
        [*LARGE, "micro_batch=2", f"{SPAN}=2", "activation_checkpoint=selective"], 2911, "",
    ),
    Case("Trinity Mini on 512 H200", "h200", ["experiment=trinity_mini"], None, "no speed is published"),
    Case("Trinity Nano on 512 H200", "h200", ["experiment=trinity_nano"], None, "no speed is published"),
    Case(
        "Qwen3-30B-A3B, 8 B200, EP 8, all-to-all (torchtitan, a fork's baseline)", "b200", QWEN3_RUN, 9930,
        "microbatch and row length assumed",
    ),
    Case(
        "the same with DeepEP and fused kernels", "b200",
        [*QWEN3_RUN, "compile=true", "activation_checkpoint=full"], 14796,
        "fused kernels as compile=true, which wants full checkpointing",
    ),
    Case(
        "DeepSeek-V3, 256 B200, bfloat16 (torchtitan)", "b200", DEEPSEEK_RUN, 651,
        "layout assumed: EP 64, full checkpointing",
    ),
    Case("the same with DeepEP", "b200", DEEPSEEK_RUN, 859, "DeepEP is not modelled"),
    Case(
        "DeepSeek-V3, one rank of 256 on GB300, EP 64, fake communication", "b300", DEEPSEEK_RUN, 2052,
        "the GPU's work alone", compute_only=True,
    ),
    Case(
        "DeepSeek-V3's own run, 2,048 H800 in FP8", "h100",
        [*SETTINGS, *DEEPSEEK, *run(4096, 1, "full", shard=2048, ep=64, rows=8)], 1543,
        "FP8, pipeline parallelism and H800 are not modelled",
    ),
]  # fmt: skip


def speed(planned: Plan, *, compute_only: bool) -> float:
    """[tokens/s] of a GPU, at the most."""
    step = planned.main.step
    if not compute_only:
        return step.tokens_per_s / planned.layout.ranks
    forward, backward, *_ = step.phases
    busy = sum(max(phase.gpu - phase.parts["all-to-all"], phase.host) for phase in (forward, backward))
    return step.layout.micro_batch * step.now.seq_len / busy


def row(case: Case) -> str:
    calibration = Calibration(case.device)
    planned = plan(load(case.overrides), hardware(case.device), calibration, searches=False)
    high = speed(planned, compute_only=case.compute_only)
    low = high / calibration.width
    published, inside = "-", "-"
    if case.published is not None:
        published = f"{case.published:,.0f}"
        inside = "yes" if low <= case.published <= high else f"no, {case.published / high:.2g} of the fastest"
    bound = planned.main.step.bound
    return f"| {case.what} | {published} | {low:,.0f} - {high:,.0f} | {inside} | {bound} | {case.remark} |"


def main() -> None:
    print(HEAD)
    for case in CASES:
        print(row(case), flush=True)
    print(TAIL)


HEAD = """# What the planner says of published runs

    python -m benchmarks.plan > docs/benchmarks/plan.md

Tokens per second of one GPU.
A range is what `configs/device` gives and half of it, as no run of this code was measured on these devices.

| run | published | planned | inside | bound by | remark |
|---|---|---|---|---|---|"""
TAIL = """
Published figures: arXiv:2602.17004 (Trinity), arXiv:2412.19437 (DeepSeek-V3), reports of torchtitan.
Models of others are shapes of an AFMoE with as many parameters in each part.
Latent attention is grouped-query attention with as many weights.
No factor belongs to one model: what is off is off by the efficiencies of the device.

DeepSeek-V3's rows that lie outside: the reports do not publish their layouts.
With the layout assumed here the network between nodes bounds the runs on B200, and another layout would not; no search was made for them."""  # noqa: E501


if __name__ == "__main__":
    main()
