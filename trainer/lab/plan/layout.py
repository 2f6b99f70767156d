"""How is a run laid out, and what does a rank of that layout need: memory by kind, traffic by link?

The traces (trace.Whole) say what a microbatch does on a small mesh. Only what depends on the mesh is reckoned
here: a rank's share of weights, of experts, of tokens, and which bytes of a collective leave the node.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.config import Config, ConfigError, ParallelConfig, divisors
from trainer.lab.plan.hardware import Hardware
from trainer.lab.plan.optimizer import OptimizerStep
from trainer.lab.plan.watch import CLASSES, KINDS, Sent
from trainer.lab.plan.whole import Variant, Whole, are_cut_inside, axis_of, group_of
from trainer.model.context import Cut
from trainer.program import StepSettings
from trainer.ranks import device

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    ranks: int
    dp_replicate: int
    ep: int
    micro_batch: int
    policy: str  # activation_checkpoint
    reshard: bool = True  # parallel.reshard_after_forward
    reduce_dtype: str = "float32"  # parallel.reduce_dtype
    cp: int = 1

    @property
    def shards(self) -> int:
        """Ranks of a replica, which share its weights."""
        return self.ranks // self.dp_replicate

    @property
    def dp_shard(self) -> int:
        return self.shards // self.cp

    @property
    def readers(self) -> int:
        """Groups of ranks that share rows."""
        return self.ranks // self.cp

    @property
    def degrees(self) -> tuple[int, int, int]:
        return self.dp_replicate, self.shards, self.ep

    def variant(self, num_experts: int) -> Variant:
        cut_inside = are_cut_inside(self.degrees, num_experts)
        return Variant(self.policy, self.ep > 1, cut_inside, self.reshard, self.reduce_dtype)

    def overrides(self) -> list[str]:
        """Of the command line of a run."""
        return [
            f"parallel.dp_replicate={self.dp_replicate}",
            f"parallel.dp_shard={self.dp_shard}",
            *([] if self.cp == 1 else [f"parallel.cp={self.cp}"]),
            f"parallel.ep={self.ep}",
            f"micro_batch={self.micro_batch}",
            f"activation_checkpoint={self.policy}",
            *([] if self.reshard else ["parallel.reshard_after_forward=false"]),
            *([] if self.reduce_dtype == "float32" else [f"parallel.reduce_dtype={self.reduce_dtype}"]),
        ]


def layout_of(config: Config, *, ranks: int | None, micro_batch: int) -> Layout:
    """What the configuration asks for. Raises: ConfigError, as a start of training would."""
    p, m = config.parallel, config.model
    if ranks is None:
        if p.dp_shard is None:
            raise ConfigError(
                "parallel.dp_shard=null: how many ranks are there? Give ranks=, or parallel.dp_shard"
            )
        ranks = p.dp_replicate * p.dp_shard * p.cp
    num_experts = m.num_experts if m.num_dense_layers < m.num_layers else None
    degrees = device.degrees_of(p, num_ranks=ranks, num_experts=num_experts)
    return Layout(
        ranks,
        degrees.replicate,
        degrees.ep,
        micro_batch,
        config.activation_checkpoint,
        p.reshard_after_forward,
        p.reduce_dtype,
        p.cp,
    )


class Refusal(NamedTuple):
    why: str  # a word or two, for counting
    message: str


def refusal(config: Config, layout: Layout, nows: list[StepSettings]) -> Refusal | None:
    """Why training would refuse the layout; None if it would not."""
    m = config.model
    num_experts = m.num_experts if m.num_dense_layers < m.num_layers else None
    parallel = ParallelConfig(
        dp_replicate=layout.dp_replicate, dp_shard=layout.dp_shard, cp=layout.cp, ep=layout.ep
    )
    try:
        device.degrees_of(parallel, num_ranks=layout.ranks, num_experts=num_experts)
    except ConfigError as error:
        return Refusal("experts or ranks do not divide", str(error))
    parts = layout.shards // layout.ep
    if num_experts and are_cut_inside(layout.degrees, num_experts) and math.gcd(m.dim, m.expert_dim) % parts:
        return Refusal(
            "experts or ranks do not divide",
            f"parallel.dp_shard x parallel.cp = {layout.shards}: {parts} ranks cannot share "
            f"model.dim={m.dim} and model.expert_dim={m.expert_dim} evenly",
        )
    for now in nows:
        if now.global_batch % layout.readers or now.global_batch // layout.readers % now.micro_batch:
            return Refusal("the batch does not divide", f"{now.global_batch} sequences")
        if now.seq_len % Cut(size=layout.cp).multiple:
            return Refusal("rows do not divide", f"{now.seq_len} tokens")
    return None


def rows_at_once(now: StepSettings, *, readers: int, most: int) -> int:
    """micro_batch of a span: the most rows that divide a reader's, up to `most`."""
    return max((n for n in divisors(max(1, now.global_batch // readers)) if n <= most), default=1)


# -- memory ------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """[bytes] of a rank at its peak."""

    kinds: dict[str, float]
    moment: str  # forward and backward | end of backward | optimizer
    lost: float  # fragments and what is reserved

    @property
    def total(self) -> float:
        return sum(self.kinds.values()) + self.lost


def class_scale(layout: Layout, whole: Whole, *, tokens: int) -> np.ndarray:
    """What each class of watch.CLASSES is of what it is on the mesh of the traces."""
    _, shard, ep = whole.degrees
    of_shard = shard / layout.shards
    scale = dict.fromkeys(("shard", "expert shard"), of_shard)
    scale |= {"whole": 1.0, "expert whole": ep / layout.ep, "tokens": tokens / whole.tokens}
    return np.array([scale[name] for name in CLASSES])


def memory(
    layout: Layout,
    whole: Whole,
    optimizer: OptimizerStep,
    hardware: Hardware,
    *,
    tokens: int,
    accumulation: int,
    fetched: float = 0.0,
) -> Memory:
    """tokens: of a microbatch on a rank; fetched: [bytes] of keys and values from other ranks."""
    scale = class_scale(layout, whole, tokens=tokens)
    gradients = whole.after["backward"][KINDS.index("gradients")] @ scale
    places = {"in forward and backward": whole.late @ scale, "at the end of backward": whole.early @ scale}
    places["in forward and backward"] = places["in forward and backward"].copy()
    places["in forward and backward"][:, KINDS.index("activations")] += fetched
    if accumulation > 1:  # gradients of the microbatches before; with replicas, not yet reduced over them
        places["in forward and backward"][:, KINDS.index("gradients")] += gradients
    weights = whole.after["build"][KINDS.index("weights")] @ scale
    step = np.zeros((1, len(KINDS)))
    step[0, [KINDS.index(k) for k in ("weights", "gradients", "activations")]] = (
        weights,
        gradients,
        optimizer.peak,
    )
    places["in the optimizer's step"] = step
    moment, lives = max(
        ((place, row) for place, rows in places.items() for row in [rows[rows.sum(axis=1).argmax()]]),
        key=lambda each: each[1].sum(),
    )
    kinds = dict(zip(KINDS, lives.tolist(), strict=True))
    kinds["optimizer"] = optimizer.state
    total = sum(kinds.values())
    lost = total * hardware.fragments.value + hardware.reserved.value * GIB
    return Memory(kinds, moment, lost)


# -- traffic -----------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """[bytes] that a rank receives by a link, or sends in an all-to-all."""

    nvlink: float = 0.0
    nic: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.nvlink + other.nvlink, self.nic + other.nic)

    def times(self, factor: float) -> "Traffic":
        return Traffic(self.nvlink * factor, self.nic * factor)


def sent_on(layout: Layout, whole: Whole, *, tokens: int) -> Counter[Sent]:
    """Every collective of a microbatch of `tokens` tokens: bytes, as Watch counts them. The all-reduce over
    replicas is that of the last microbatch of a step."""
    sent = Counter[Sent]()
    scale = dict(zip(CLASSES, class_scale(layout, whole, tokens=tokens), strict=True))
    for key, num_bytes in whole.sent.items():
        axis = axis_of(key, whole.degrees)
        size, stride = group_of(axis, layout.degrees)
        if size == 1:
            continue
        by = {"dp_replicate": scale["shard"], "fsdp": 1.0, "efsdp": scale["expert whole"]}.get(axis)
        if by is None:
            by = scale["tokens"] if key.part == "tokens" else 1.0
        sent[key._replace(size=size, stride=stride)] += num_bytes * by
    return sent


def traffic(key: Sent, num_bytes: float, *, per_node: int) -> Traffic:
    """Over which links the bytes of a collective travel. Rings pass each byte into a node once."""
    size, stride = key.size, max(1, key.stride)
    inside = max(1, min(size, per_node // stride)) if stride < per_node else 1
    nodes = size / inside
    if size == 1:
        return Traffic()
    if key.operator == "all-to-all":
        return Traffic(num_bytes * (inside - 1) / size, num_bytes * (1 - inside / size))
    passes = 2 if key.operator == "all-reduce" else 1
    through = num_bytes * (nodes - 1) / nodes / inside
    return Traffic(passes * (num_bytes * (size - 1) / size - through), passes * through)
