"""What does a training step ask of a GPU? Counted without one: kernels, waits, bytes.

    python -m benchmarks.gpu_trace > docs/benchmarks/gpu_trace.md

One microbatch of an 8-layer Trinity Nano runs forward and backward on the fake device of trainer/lab/plan, as
rank 0 of 8 (dp_replicate 2 x dp_shard 4, ep 2), on every branch that a CPU does not take. An operator is a
kernel; what fuses in a compiler is counted apart. tests/test_gpu_trace.py counts again and compares with the
page's bounds.
"""

import re
from pathlib import Path

from trainer.config import load
from trainer.lab.plan.trace import Trace, traced, unlike

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "gpu_trace.md"
DEGREES = (2, 4, 2)
POLICIES = ("none", "selective", "full")
SHAPE = ["model=nano", "model.num_layers=8", "model.num_dense_layers=2"]
RUN = ["name=gpu_trace", "steps=1", "seq_len=2048", "global_batch=8", "micro_batch=1", "dtype=bfloat16"]
SLACK = 1.02  # of a bound over what was counted


def counted(policy: str) -> dict[str, float]:
    config = load([*SHAPE, *RUN, "optim=muon"])
    tokens = unlike(config.model, at_most=config.seq_len)
    return figures(traced(config, config.model, DEGREES, policy, tokens=tokens))


def figures(trace: Trace) -> dict[str, float]:
    values = dict[str, float]()
    for phase in ("forward", "backward"):
        values[f"{phase}: waits of the host"] = sum(n for (at, _), n in trace.waits.items() if at == phase)
        values[f"{phase}: kernels a layer"] = trace.kernels[phase] / 8
        moved = sum(n for (at, part), n in trace.moved.items() if at == phase and part == "other")
        values[f"{phase}: kB a token and layer, products and copies aside"] = moved / trace.tokens / 8 / 1e3
    values["kB a token that live after forward"] = trace.after["forward"][:, -1].sum() / trace.tokens / 1e3
    return values


def bounds(page: str) -> dict[tuple[str, str], float]:
    """Of the page's table: policy and quantity -> at most."""
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \| [\d.,]+ \| ([\d.,]+) \|$", page, flags=re.M)
    return {(policy, name): float(most.replace(",", "")) for policy, name, most in rows}


def main() -> None:
    print(HEAD)
    for policy in POLICIES:
        for name, value in counted(policy).items():
            print(f"| {policy} | {name} | {value:,.1f} | {value * SLACK:,.1f} |", flush=True)


HEAD = """# What a step asks of a GPU

    python -m benchmarks.gpu_trace > docs/benchmarks/gpu_trace.md

Counted on a fake device, without a GPU: one microbatch of an 8-layer Trinity Nano, 2 dense and 6 MoE layers, on rank 0 of 8.
Each of the waits is one of an MoE layer for the counts of its all-to-all; a wait in the backward pass is one of a recomputation.
`tests/test_gpu_trace.py` counts again: a step that asks for more than the last column fails it.

| checkpointing | quantity | counted | at most |
|---|---|---|---|"""  # noqa: E501


if __name__ == "__main__":
    main()
