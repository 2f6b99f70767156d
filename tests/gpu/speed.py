"""Stage 7a. How fast is Trinity Nano on one GPU, which kernels take the time, and how fast are others?

The whole model with its optimizer: 73 GB of state. Rivals do the same work in the same process: transformers'
AfmoeForCausalLM with grouped products, torchtitan's own MoE layer, and liger's loss where it is installed.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.gpu.bench import Bench, random
from tests.gpu.models import rows
from tests.gpu.waits import run_of
from trainer import next_batches, train_step
from trainer.config import ModelConfig, load
from trainer.model.afmoe import Afmoe, afmoe_config, moe_layers
from trainer.model.hf import hf_config
from trainer.model.loss import IGNORE, linear_cross_entropy
from trainer.ranks import device
from trainer.ranks.local import local


@dataclass(frozen=True, kw_only=True)
class Size:
    overrides: Sequence[str]
    micro_batch: int
    length: int
    layers: int  # of the slice that is compared with transformers
    dtype: torch.dtype
    rounds: int

    @property
    def model(self) -> ModelConfig:
        return load([*self.overrides, "steps=1"]).model


NANO = [
    "name=speed",
    "experiment=trinity_nano",
    "data=synthetic",
    "stage=constant",
    "parallel=single",
    "data.workers=0",
]
DEBUG = ["name=speed", "model=debug", "data=synthetic", "optim=muon", "data.workers=0"]
SIZES = {
    "cuda": Size(
        overrides=[*NANO, "seq_len=4096", "global_batch=4", "micro_batch=2"],
        micro_batch=2, length=4096, layers=8, dtype=torch.bfloat16, rounds=5,
    ),
    "cpu": Size(
        overrides=[*DEBUG, "seq_len=32", "global_batch=2", "micro_batch=2"],
        micro_batch=2, length=32, layers=5, dtype=torch.float32, rounds=1,
    ),
}  # fmt: skip
# kernels by what stands in their names; the first that fits
KINDS = {
    "attention": "flex|sdpa|flash|fmha",
    "experts": "group",
    "matmul": "gemm|cutlass|nvjet|matmul|bmm|sm90_xmma",
    "optimizer": "adam|multi_tensor|foreach",
    "sort and gather": "sort|radix|index|gather|scatter|topk",
    "norm": "norm",
}


@torch.no_grad()
def fill(model: Afmoe, *, device: torch.device, seed: int, report: object = None) -> None:
    """In place of `initialize`, which draws Nano for minutes on a core: weights are drawn where they lie."""
    model.to_empty(device=device)
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "_init_self_buffers"):
            module._init_self_buffers(buffer_device=device)
    for parameter in model.parameters():
        local(parameter).fill_(1.0) if parameter.ndim == 1 else local(parameter).normal_(std=0.02)


def whole_steps(bench: Bench, size: Size) -> None:
    """Whole optimizer steps with reading, balancing and Muon; then one step under the profiler."""
    with patch("trainer.run.build.initialize", fill), run_of(size.overrides) as run:
        step = lambda: train_step(run, next_batches(run))  # noqa: E731
        values = step()
        seconds = bench.seconds(step, rounds=size.rounds)
        tokens = values["data/step_tokens"]
        bench.figure("step", seconds, "s")
        bench.figure("tokens", tokens / seconds, "tokens/s")
        peak = device.peak_flops(bench.on, size.dtype)
        bench.figure("MFU", values["data/step_flop"] / seconds / peak)
        bench.figure("peak memory", device.memory_gib(bench.on), "GiB")
        kernels(bench, step, num_layers=len(run.model.layers))
    microbatches = tokens / (size.micro_batch * size.length)
    share_of_the_loss(bench, size, step_s=seconds / microbatches)


def kernels(bench: Bench, step: Callable[[], object], *, num_layers: int) -> None:
    """Of one step: launches a layer, shares by kind, the fifteen that take longest."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_gpu else [])]
    with profile(activities=activities) as recorded:
        step()
        bench.wait()
    kind_of_device = torch.autograd.DeviceType.CUDA if bench.is_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in recorded.events() if event.device_type == kind_of_device]
    by_name, by_kind = Counter[str](), Counter[str]()
    for event in events:
        taken_us = event.time_range.elapsed_us() if bench.is_gpu else event.self_cpu_time_total
        by_name[event.name] += taken_us
        by_kind[kind_of(event.name)] += taken_us
    whole_us = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    bench.figure("launches a layer", len(events) / num_layers)
    for kind, taken_us in by_kind.most_common():
        bench.figure(f"share of {kind}", taken_us / whole_us)
    bench.figure("share in which nothing runs", 1 - by_kind.total() / whole_us)
    for name, taken_us in by_name.most_common(15):
        bench.figure(f"kernel {name[:80]}", taken_us / 1e3, "ms")


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "all else")


def head_of(size: Size, on: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    model, tokens = size.model, size.micro_batch * size.length
    x = random(tokens, model.dim, seed=0, on=on, dtype=size.dtype).requires_grad_()
    head = (
        (torch.randn(model.vocab_size, model.dim, device=on) / model.dim**0.5).to(size.dtype).requires_grad_()
    )
    return x, head, torch.randint(model.vocab_size, (tokens,), device=on)


def share_of_the_loss(bench: Bench, size: Size, *, step_s: float) -> None:
    """step_s: of a step, for each of its microbatches."""
    x, head, labels = head_of(size, bench.on)
    seconds = bench.seconds(lambda: linear_cross_entropy(x, head, labels).backward(), rounds=size.rounds)
    bench.speed_at_most("share of head and loss", seconds / step_s, 0.08)


def rival_loss(bench: Bench, size: Size) -> None:
    """liger's fused loss on the same head: ours may take 1.1 times its time."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        bench.absent("liger", "not installed")
        return
    x, head, labels = head_of(size, bench.on)
    theirs = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    ours_s = bench.seconds(lambda: linear_cross_entropy(x, head, labels).backward(), rounds=size.rounds)
    theirs_s = bench.seconds(lambda: theirs(head, x, labels).backward(), rounds=size.rounds)
    bench.figure("liger", theirs_s * 1e3, "ms")
    bench.speed_at_most("ours over liger's time", ours_s / theirs_s, 1.1)


def rival_transformers(bench: Bench, size: Size) -> None:
    """Forward and backward of a few layers: ours at least 1.3 times as fast as AfmoeForCausalLM."""
    from transformers import AfmoeConfig, AfmoeForCausalLM

    shape = replace(size.model, num_layers=size.layers)
    tokens, _, labels = rows(shape, size.micro_batch, size.length, bench.on)
    ours_s = seconds_of_ours(bench, size, shape, tokens, labels)
    config = AfmoeConfig(**hf_config(shape, max_position_embeddings=size.length))
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    with bench.on:
        theirs = AfmoeForCausalLM(config).to(size.dtype).train()

    def step() -> None:
        logits = theirs(tokens, use_cache=False).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=IGNORE
        )
        loss.backward()

    theirs_s = bench.seconds(step, rounds=size.rounds)
    bench.figure("transformers", tokens.numel() / theirs_s, "tokens/s")
    bench.figure("ours", tokens.numel() / ours_s, "tokens/s")
    bench.speed_at_least("times as fast as transformers", theirs_s / ours_s, 1.3)


def seconds_of_ours(bench: Bench, size: Size, shape: ModelConfig, tokens: Tensor, labels: Tensor) -> float:
    with torch.device("meta"):
        model = afmoe_config(shape, flex=bench.flex).build()
    fill(model, device=bench.on, seed=0)
    model.to(size.dtype).train()
    return bench.seconds(lambda: model(tokens, None, labels).backward(), rounds=size.rounds)


def rival_torchtitan(bench: Bench, size: Size) -> None:
    """Forward and backward of one MoE layer: ours at least 1.1 times as fast as torchtitan's own."""
    shape = replace(size.model, num_layers=1, num_dense_layers=0, global_every=1)
    with torch.device("meta"):
        ours = moe_layers(afmoe_config(shape, flex=False).build())[0]
        theirs = torchtitans_layer(shape)
    x = random(
        size.micro_batch, size.length, shape.dim, seed=1, on=bench.on, dtype=size.dtype
    ).requires_grad_()
    seconds = []
    for layer in (ours, theirs):
        layer.to_empty(device=bench.on)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=0.02)
            for buffer in layer.buffers():
                buffer.zero_()
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(size.dtype)
        layer.train()
        seconds.append(bench.seconds(lambda layer=layer: layer(x).backward(x.detach()), rounds=size.rounds))
    ours_s, theirs_s = seconds
    bench.figure("torchtitan's layer", theirs_s * 1e3, "ms")
    bench.figure("our layer", ours_s * 1e3, "ms")
    bench.speed_at_least("times as fast as torchtitan", theirs_s / ours_s, 1.1)


def torchtitans_layer(shape: ModelConfig) -> torch.nn.Module:
    """Its router, dispatcher and experts, at our shape; the shared experts are built as ours are."""
    from torchtitan.models.common import moe
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    ours = afmoe_config(shape, flex=False).layers[0].moe
    experts = {"dim": shape.dim, "hidden_dim": shape.expert_dim, "num_experts": shape.num_experts}
    return moe.MoE.Config(
        num_experts=shape.num_experts,
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=shape.num_experts, top_k=shape.top_k, route_norm=True, route_scale=shape.route_scale,
            gate=Linear.Config(in_features=shape.dim, out_features=shape.num_experts),
        ),
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(**experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=shape.num_experts, top_k=shape.top_k),
        ),
        shared_experts=ours.shared_experts,
    ).build()  # fmt: skip


CHECKS = (whole_steps, rival_transformers, rival_torchtitan, rival_loss)
