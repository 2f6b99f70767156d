"""What does a microbatch of the whole model cost a rank, whatever the number of layers and ranks?

Layers of one kind are alike. So a model of two layers, one with a dense layer more, one with a global layer
and one with two MoE layers say what a model of any depth does: `Traces.whole` adds them up. They are traced
on a small mesh; what depends on the mesh is a class of its own (watch.CLASSES), which `layout` scales.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from trainer.config import Config, ModelConfig, divisors
from trainer.lab.plan.trace import COUNTED, Trace, traced, unlike
from trainer.lab.plan.watch import CLASSES, KINDS, Sent

MOST_TOKENS = 2048  # of a trace: what tokens cost is proportional to them; more than a chunk of the loss has
REPLICAS, EFSDP = 2, 2  # of the small mesh


@dataclass(frozen=True)
class Variant:
    """What of a run's configuration changes the operators of a layer."""

    policy: str  # activation_checkpoint
    has_ep: bool = True
    cut_inside: bool = False  # experts are cut inside their matrices: more ranks than experts share them
    reshard: bool = True  # parallel.reshard_after_forward
    reduce_dtype: str = "float32"  # parallel.reduce_dtype

    def sharding(self) -> dict[str, Any]:
        """Arguments of build_parallel."""
        return {"reshard_after_forward": self.reshard, "reduce_dtype": getattr(torch, self.reduce_dtype)}

    def degrees(self, m: ModelConfig) -> tuple[int, int, int]:
        """Of a small mesh on which it is so."""
        eps = divisors(m.num_experts)[1:] if self.has_ep and m.num_experts > 1 else [1]
        if not self.cut_inside:
            return REPLICAS, EFSDP * eps[0], eps[0]
        parts = divisors(math.gcd(m.dim, m.expert_dim))
        meshes = ((REPLICAS, ep * n, ep) for ep in eps for n in parts)
        return next(mesh for mesh in meshes if are_cut_inside(mesh, m.num_experts))


@dataclass
class Whole:
    """A microbatch of the whole model, of `tokens` tokens, on the mesh of the traces."""

    model: ModelConfig
    variant: Variant
    tokens: int
    degrees: tuple[int, int, int]
    after: dict[str, np.ndarray]
    late: np.ndarray  # moments when all layers' activations live
    early: np.ndarray  # and when all layers' gradients do
    flop: Counter
    moved: Counter
    kernels: Counter
    waits: Counter
    sent: Counter
    calls: Counter

    def parameters(self) -> tuple[float, float]:
        """Bytes in all, float32: experts' and the rest."""
        _, shard, _ = self.degrees
        rest, experts = self.after["build"][KINDS.index("weights"), :2]
        return rest * shard, experts * shard


class Traces:
    """Made when they are first asked for, once for each variant. As a context: beside one another."""

    def __init__(self, config: Config):
        self.config, self.known, self.wholes = config, dict[tuple, Trace](), dict[Variant, Whole]()
        self.begun, self.pool = dict[Variant, Future](), None
        rows = max(2, min(MOST_TOKENS, config.seq_len))
        self.tokens = unlike(config.model, at_most=rows)

    def __enter__(self) -> "Traces":
        """Forks, which torch's backward pass must not precede."""
        self.pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("fork"))
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.pool = None

    def small(self, variant: Variant, *, dense: int = 2, moe: int = 0, has_global: bool = False) -> Trace:
        if moe == 0:
            variant = replace(variant, has_ep=False, cut_inside=False)
        key = variant, dense, moe, has_global
        if key not in self.known:
            m, layers = self.config.model, dense + moe
            shape = replace(
                m,
                num_layers=layers,
                num_dense_layers=dense,
                global_every=layers if has_global else layers + 1,
            )
            self.known[key] = traced(
                self.config,
                shape,
                variant.degrees(shape),
                variant.policy,
                tokens=self.tokens,
                first_moe=dense if moe else 1,
                **variant.sharding(),
            )
        return self.known[key]

    def ahead(self, variants: Iterable[Variant]) -> None:
        """Begins with these, in processes of their own."""
        for variant in dict.fromkeys(variants):
            if self.pool is not None and variant not in self.wholes and variant not in self.begun:
                self.begun[variant] = self.pool.submit(whole_of, self.config, variant)

    def whole(self, variant: Variant) -> Whole:
        if variant not in self.wholes:
            begun = self.begun.pop(variant, None)
            self.wholes[variant] = self.add_up(variant) if begun is None else begun.result()
        return self.wholes[variant]

    def add_up(self, variant: Variant) -> Whole:
        m, base = self.config.model, self.small(variant)
        num_global, num_moe = m.num_layers // m.global_every, m.num_layers - m.num_dense_layers
        terms = [(base, 1.0)]

        def add(other: Trace, times: float, *, over: Trace = base) -> None:
            terms.extend([(other, times), (over, -times)])

        if m.num_dense_layers != 2:
            add(self.small(variant, dense=3), m.num_dense_layers - 2)
        # parts of a model that are not trained may be those of its local layers, or its experts
        global_moe = num_global - m.num_dense_layers // m.global_every if self.config.train_only else 0
        if num_global > global_moe:
            add(self.small(variant, has_global=True), num_global - global_moe)
        num_dense_terms, timeline = len(terms), base
        if num_moe:
            timeline = self.small(variant, moe=2)
            add(timeline, num_moe / 2)
        if global_moe:
            add(self.small(variant, moe=2, has_global=True), global_moe, over=timeline)
            timeline = self.small(variant, moe=2, has_global=True)
        scaled = [(on_mesh(trace, timeline.degrees), times) for trace, times in terms]
        of_moe = scaled[num_dense_terms:]
        after = {key: sum(times * trace.after[key] for trace, times in scaled) for key in base.after}
        counts = {name: added(scaled, name) for name in COUNTED}
        back = timeline.moments["late backward"]
        running = np.concatenate([timeline.moments["late forward"], back])
        late = running + after["forward"] - timeline.after["forward"]
        early = timeline.moments["early backward"] + after["backward"] - timeline.after["backward"]
        if num_moe:  # the first MoE layer, when those above it have gradients already
            above = sum(times * grown(trace) for trace, times in of_moe)
            above -= grown(timeline) - grown(on_mesh(base, timeline.degrees))
            late = np.concatenate([late, back + after["forward"] - timeline.after["forward"] + above])
        return Whole(m, variant, self.tokens, timeline.degrees, after, late, early, **counts)


def grown(trace: Trace) -> np.ndarray:
    """What a backward pass leaves behind, less what it frees."""
    return trace.after["backward"] - trace.after["forward"]


def whole_of(config: Config, variant: Variant) -> Whole:
    return Traces(config).whole(variant)


def on_mesh(trace: Trace, degrees: tuple[int, int, int]) -> Trace:
    """The trace of a model without experts, as it would be on another mesh."""
    if trace.degrees == degrees:
        return trace
    scale = np.ones(len(CLASSES))
    scale[:2] = trace.degrees[1] / degrees[1]
    sent, calls = Counter(), Counter()
    for key, size in trace.sent.items():
        by = scale[0] if key.operator == "all-reduce" else 1.0
        there = moved_key(key, trace.degrees, degrees)
        sent[there] += size * by
        calls[there] += trace.calls[key]
    return replace(
        trace, degrees=degrees, after={k: v * scale for k, v in trace.after.items()}, sent=sent, calls=calls
    )


def moved_key(key: Sent, before: tuple[int, int, int], degrees: tuple[int, int, int]) -> Sent:
    axis = axis_of(key, before)
    return key._replace(**dict(zip(("size", "stride"), group_of(axis, degrees), strict=True)))


def axis_of(key: Sent, degrees: tuple[int, int, int]) -> str:
    """Which axis of the mesh the ranks of a collective are: dp_replicate | fsdp | efsdp | ep."""
    _, shard, ep = degrees
    if key.operator == "all-reduce" or (key.phase == "optimizer" and key.stride == shard):
        return "dp_replicate"
    if key.part in ("tokens", "counts"):
        return "ep"
    return "efsdp" if key.part == "experts" and ep > 1 else "fsdp"


def group_of(axis: str, degrees: tuple[int, int, int]) -> tuple[int, int]:
    """Number of ranks and the stride between them."""
    replicate, shard, ep = degrees
    return {
        "dp_replicate": (replicate, shard),
        "fsdp": (shard, 1),
        "efsdp": (shard // ep, ep),
        "ep": (ep, 1),
    }[axis]


def are_cut_inside(degrees: tuple[int, int, int], num_experts: int) -> bool:
    """Are experts cut inside their matrices? Where the ranks that share a replica are more than experts."""
    _, shard, ep = degrees
    return shard > ep and shard > num_experts


def added(terms: list[tuple[Trace, float]], name: str) -> Counter:
    total = Counter()
    for trace, times in terms:
        for key, value in getattr(trace, name).items():
            total[key] += times * value
    return total
