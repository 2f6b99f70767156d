"""What does one microbatch of a small model do on the fake device?

The run's own modules, built as a run builds them.
"""

import copy
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from trainer.config import Config, ModelConfig, ParallelConfig
from trainer.lab.plan import fake
from trainer.lab.plan.watch import Watch
from trainer.model.afmoe import Afmoe, Attention, afmoe_config
from trainer.model.frozen import freeze
from trainer.model.parallelize import build_parallel
from trainer.program import program_of
from trainer.ranks import device
from trainer.ranks.local import local
from trainer.run.build import loss_weights

COUNTED = ("flop", "moved", "kernels", "waits", "sent", "calls")


@dataclass
class Trace:
    """Of one microbatch of `tokens` tokens in one row, on a rank of the mesh of `degrees`."""

    tokens: int
    degrees: tuple[int, int, int]  # dp_replicate, dp_shard, ep
    after: dict[str, np.ndarray]  # what lives after build, forward, backward: KINDS x CLASSES
    moments: dict[str, np.ndarray]  # by place, what lived: N x KINDS x CLASSES
    flop: Counter
    moved: Counter
    kernels: Counter
    waits: Counter
    sent: Counter
    calls: Counter


@dataclass
class Model:
    """One that was built on the fake device, and what watches it."""

    net: Afmoe
    watch: Watch
    tokens: int
    mode: torch._subclasses.FakeTensorMode

    def microbatch(self, num_rows: int = 1) -> None:
        """As run/step.backward does it."""
        rows = torch.empty(num_rows, self.tokens // num_rows, dtype=torch.int64, device=fake.NAME)
        with self.watch.during("forward"):
            loss = self.net(rows, rows, rows, None)
        self.watch.after["forward"] = self.watch.live.copy()
        with self.watch.during("backward"):
            loss.backward()
        del loss
        self.watch.rename(sharded(self.net, of="grad"), "gradients")
        self.watch.after["backward"] = self.watch.live.copy()


def sharded(net: Afmoe, *, of: str) -> list[tuple[torch.Tensor, float]]:
    """Each parameter, or its gradient, as it lies on this rank; 1.0 if it is of routed experts."""
    return [
        (local(p if of == "weight" else p.grad).detach(), float(".inner_experts." in name))
        for name, p in net.named_parameters()
        if of == "weight" or p.grad is not None
    ]


def build(
    config: Config, mode, *, degrees: tuple[int, int, int], policy: str, tokens: int, **sharding
) -> Model:
    """Within fake.ranks and fake.stand_ins of the model's watch."""
    m = config.model
    replicate, shard, ep = degrees
    layout = ParallelConfig(dp_replicate=replicate, dp_shard=shard, ep=ep if has_moe(m) else 1)
    dims = device.build_mesh(layout, num_experts=m.num_experts if has_moe(m) else None)
    watch = Watch(device_type=fake.NAME, slots=tokens * m.top_k)
    watch.tokens, watch.vocab_size, watch.after = tokens, m.vocab_size, {}
    watch.numels, watch.expert_numels = weight_numels(m, ep=layout.ep)
    first = program_of(config).spans[0].now
    shape = afmoe_config(m, flex=True, loss_weights=loss_weights(first), z_loss_weight=first.z_loss_weight)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    with fake.stand_ins(watch):
        net = build_parallel(shape, dims, dtype=dtype, activation_checkpoint=policy, **sharding)
    if config.train_only is not None:
        freeze(net, config.train_only)
    for module in net.modules():
        if isinstance(module, Attention):
            module.window = m.window
    with mode, watch:
        net.to_empty(device=fake.NAME)
        for module in net.modules():
            if hasattr(module, "_init_self_buffers"):
                module._init_self_buffers(buffer_device=torch.device(fake.NAME))
        watch.rename(sharded(net, of="weight"), "weights")
    watch.after["build"] = watch.live.copy()
    return Model(net, watch, tokens, mode)


def weight_numels(m: ModelConfig, *, ep: int) -> tuple[frozenset[int], frozenset[int]]:
    """Sizes of a model's matrices, and of the routed experts' of a rank."""
    one = replace(m, num_layers=2, num_dense_layers=min(1, m.num_dense_layers))
    with torch.device("meta"):
        net = afmoe_config(one, flex=False).build()
    named = {name: p.numel() for name, p in net.named_parameters() if p.ndim >= 2}
    experts = {size for name, size in named.items() if ".inner_experts." in name}
    return frozenset(named.values()) - experts, frozenset(size // ep for size in experts)


def unlike(m: ModelConfig, *, at_most: int) -> int:
    """A number of tokens that divides the size of no weight, so that the two are never mixed up."""
    rest, experts = weight_numels(m, ep=1)
    sizes = rest | experts | {size // 2 for size in experts}
    return next(n for n in range(at_most - at_most % 2, 1, -2) if all(size % n for size in sizes))


def has_moe(m: ModelConfig) -> bool:
    return m.num_dense_layers < m.num_layers


def traced(
    config: Config,
    m: ModelConfig,
    degrees: tuple[int, int, int],
    policy: str,
    *,
    tokens: int,
    first_moe: int = 1,
    **sharding,
) -> Trace:
    """One microbatch of a model of shape m, in the run's other settings. first_moe: the layer before which
    those of a larger model would have run."""
    config = replace_model(config, m)
    with fake.ranks(degrees[0] * degrees[1]) as mode:
        model = build(config, mode, degrees=degrees, policy=policy, tokens=tokens, **sharding)
        mark_places(model, first_moe)
        with fake.stand_ins(model.watch), mode, model.watch:
            model.microbatch()
    watch, moments = model.watch, {}
    for place, live in watch.moments:
        moments.setdefault(place, []).append(live)
    counts = {name: getattr(watch, name) for name in COUNTED}
    return Trace(
        tokens, degrees, watch.after, {k: undominated(np.array(v)) for k, v in moments.items()}, **counts
    )


def replace_model(config: Config, m: ModelConfig) -> Config:
    other = copy.copy(config)
    other.model = m
    return other


def mark_places(model: Model, first_moe: int) -> None:
    """before | late | early: late is where the layers that this model lacks would have run forward and not
    yet backward."""
    layers, watch = list(model.net.layers.values()), model.watch
    watch.place = "before"

    def enter(place: str) -> None:
        watch.place = place

    def before_forward(module, args) -> None:
        if watch.phase == "forward":
            enter("late")
            args[0].register_hook(lambda grad: enter("early"))

    layers[first_moe].register_forward_pre_hook(before_forward)


def undominated(moments: np.ndarray) -> np.ndarray:
    """Of N moments those that no other one exceeds in every class: the peak of any layout is among them."""
    sums = moments.sum(axis=1)
    order, kept = np.argsort(-sums.sum(axis=1)), list[int]()
    for i in order:
        if not kept or not (sums[kept] >= sums[i]).all(axis=1).any():
            kept.append(i)
    return moments[kept]
