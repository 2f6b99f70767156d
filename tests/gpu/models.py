"""Stage 4. Is the whole model on this device the one of the CPU, and the one of `transformers`?

A tiny AFMoE with every part. Its steps on the CPU in float32 are the oracle: tests/test_model.py holds them
to transformers and to slow loops. Checkpointing and compilation are held to the plain model on this device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from tests.gpu.bench import Bench, relative, worst
from trainer.config import ModelConfig, ParallelConfig
from trainer.model.afmoe import Afmoe, afmoe_config, moe_layers
from trainer.model.hf import hf_config, to_hf
from trainer.model.init import initialize
from trainer.model.loss import IGNORE
from trainer.model.parallelize import build_parallel
from trainer.optim import adamw, muon
from trainer.ranks import device
from trainer.ranks.local import scale_gradients

CPU = torch.device("cpu")
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass(frozen=True, kw_only=True)
class Size:
    shape: ModelConfig
    length: int
    shapes: list[tuple[int, int]]  # (rows, length) that follow one another in a compiled run


TINY = ModelConfig(
    vocab_size=96, dim=32, num_layers=3, num_dense_layers=1, ffn_dim=48, num_heads=4, num_kv_heads=2,
    head_dim=16, window=20, num_experts=8, top_k=2, expert_dim=24, num_shared_experts=1, route_scale=2.448,
    global_every=3,
)  # fmt: skip
SIZES = {
    "cuda": Size(
        shape=replace(TINY, vocab_size=512, dim=128, head_dim=32, ffn_dim=256, expert_dim=64, window=100),
        length=256,
        shapes=[(2, 256), (1, 256), (2, 384), (1, 512)],
    ),
    "cpu": Size(shape=TINY, length=40, shapes=[(2, 32), (1, 48)]),
}


def rows(
    shape: ModelConfig, num_rows: int, length: int, on: torch.device, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions, labels: documents that are cut at another place in each row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(shape.vocab_size, (num_rows, length + 1), generator=generator)
    cut = torch.randint(1, length, (num_rows, 1), generator=generator)
    index = torch.arange(length).expand(num_rows, -1)
    positions = torch.where(index < cut, index, index - cut)
    labels = tokens[:, 1:].masked_fill(index == cut - 1, IGNORE)
    return tokens[:, :-1].to(on), positions.to(on), labels.to(on)


def filled(model: Afmoe, on: torch.device) -> Afmoe:
    """Weights of every test; gates are made larger, so that no token is close to a tie."""
    initialize(model, device=on, seed=0)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.gate.weight.mul_(4)
    return model.train()


def build(size: Size, on: torch.device, *, flex: bool) -> Afmoe:
    with torch.device("meta"):
        model = afmoe_config(size.shape, flex=flex).build()
    return filled(model, on)


def forward_and_backward(model: Afmoe, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Loss, every gradient and every count of this batch."""
    model.zero_grad()
    for layer in moe_layers(model):
        layer.tokens_per_expert_E.zero_()
    loss = model(*batch)
    loss.backward()
    counts = torch.stack([layer.tokens_per_expert_E.clone() for layer in moe_layers(model)])
    gradients = {plain(name): p.grad.detach().clone() for name, p in model.named_parameters()}
    return {"loss": loss.detach(), "counts": counts} | gradients


def plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def against_cpu(bench: Bench, size: Size) -> None:
    """float32, one batch: loss 1e-5, every gradient 1e-4, counts equal."""
    on_cpu = forward_and_backward(build(size, CPU, flex=False), rows(size.shape, 2, size.length, CPU))
    here = build(size, bench.on, flex=bench.flex)
    result = forward_and_backward(here, rows(size.shape, 2, size.length, bench.on))
    bench.same("counts", result.pop("counts").cpu(), on_cpu.pop("counts"))
    bench.at_most("loss", relative(result.pop("loss"), on_cpu.pop("loss")), 1e-5)
    bench.at_most("worst gradient", worst(result, on_cpu), 1e-4)


def steps(bench: Bench, size: Size) -> None:
    """Three steps of AdamW and of Muon from the same weights: losses 1e-5, weights 1e-4 of their size."""
    for name in ("adamw", "muon"):
        of_cpu, losses_of_cpu = trained(size, CPU, name, flex=False)
        here, losses = trained(size, bench.on, name, flex=bench.flex)
        bench.at_most(f"{name}: losses", relative(losses, losses_of_cpu), 1e-5)
        bench.at_most(f"{name}: worst weight", worst(here, of_cpu), 1e-4)


def trained(size: Size, on: torch.device, name: str, *, flex: bool) -> tuple[dict[str, Tensor], Tensor]:
    model, losses = build(size, on, flex=flex), []
    if name == "muon":
        optimizers = muon(model, lr=1e-2, adamw_lr=1e-3, momentum=0.95, dtype="float32", **ADAMW)
    else:
        optimizers = [adamw(model, lr=1e-3, **ADAMW)]
    for step in range(3):
        batch = rows(size.shape, 2, size.length, on, seed=step)
        loss = model(*batch)
        loss.backward()
        scale_gradients(model, 1 / batch[2].numel())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach().cpu())
    return {name: p.detach() for name, p in model.named_parameters()}, torch.stack(losses)


def against_transformers(bench: Bench, size: Size) -> None:
    """AfmoeForCausalLM on the same device, from our weights by name: logits 1e-4, every gradient 1e-4."""
    from transformers import AfmoeConfig, AfmoeForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    ours = build(size, bench.on, flex=bench.flex)
    theirs = transformers_model(ours, size.shape, AfmoeConfig, AfmoeForCausalLM).to(bench.on)
    tokens, _, labels = rows(size.shape, 2, size.length, bench.on)
    logits = theirs(tokens).logits
    bench.at_most("logits", relative(ours(tokens), logits), 1e-4)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE).backward()
    ours(tokens, None, labels).backward()
    state = ours.state_dict() | {name: p.grad for name, p in ours.named_parameters()}
    gradients = {name: tensor for name, tensor in to_hf(state, size.shape).items() if "bias" not in name}
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    expected = {n: t for n, t in revert_weight_conversion(theirs, expected).items() if "bias" not in n}
    bench.at_most("worst gradient", worst(gradients, expected), 1e-4)


def transformers_model(
    ours: Afmoe, shape: ModelConfig, config_class: type, model_class: type
) -> torch.nn.Module:
    """Slow attention and expert loops, in float32, read from files as users read them."""
    import tempfile
    from pathlib import Path

    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        state = {n: t.detach().cpu().contiguous() for n, t in to_hf(ours.state_dict(), shape).items()}
        save_file(state, Path(name, "model.safetensors"), metadata={"format": "pt"})
        config_class(**hf_config(shape, max_position_embeddings=1024)).save_pretrained(name)
        slow = {"attn_implementation": "eager", "experts_implementation": "eager"}
        return model_class.from_pretrained(name, dtype=torch.float32, **slow)


@contextmanager
def one_rank() -> Iterator[object]:
    """The meshes of a single process, as a run has them."""
    device.start(timeout_s=120)
    try:
        yield device.build_mesh(ParallelConfig(), num_experts=None)
    finally:
        dist.destroy_process_group()


def spread(bench: Bench, size: Size, dims: object, **choices: object) -> Afmoe:
    config = afmoe_config(size.shape, flex=bench.flex)
    return filled(build_parallel(config, dims, **choices), bench.on)


def whole(result: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in result.items()}


def checkpointing(bench: Bench, size: Size) -> None:
    """Recomputed activations: loss, gradients and counts bit for bit those without, in both dtypes."""
    batch = rows(size.shape, 2, size.length, bench.on)
    with one_rank() as dims:
        for dtype in (torch.float32, torch.bfloat16):
            of = {
                kind: whole(
                    forward_and_backward(
                        spread(bench, size, dims, dtype=dtype, activation_checkpoint=kind), batch
                    )
                )
                for kind in ("none", "selective", "full")
            }
            for kind in ("selective", "full"):
                equal = [torch.equal(of[kind][name], of["none"][name]) for name in of["none"]]
                name = f"{str(dtype).removeprefix('torch.')} {kind}: tensors that are equal"
                bench.same(name, sum(equal), len(equal))


def compiled(bench: Bench, size: Size) -> None:
    """compile=true in bfloat16 over several shapes, each twice and then once more: loss 2e-3, no new graph in
    the second or third step of a shape.
    """
    if not bench.is_gpu:
        bench.absent("compilation", "graphs are made on a GPU only; the calls run without")
    with one_rank() as dims:
        model = spread(bench, size, dims, dtype=torch.bfloat16, compile="inductor")
        eager = spread(bench, size, dims, dtype=torch.bfloat16)
        for num_rows, length in size.shapes:
            batch = rows(size.shape, num_rows, length, bench.on)
            first = forward_and_backward(model, batch)
            graphs = counters["stats"]["unique_graphs"]
            again = [forward_and_backward(model, batch) for _ in range(2)]
            new = counters["stats"]["unique_graphs"] - graphs
            bench.same(f"{num_rows} x {length}: new graphs after the first step", new, 0)
            expected = forward_and_backward(eager, batch)
            error = max(relative(result["loss"], expected["loss"]) for result in [first, *again])
            bench.at_most(f"{num_rows} x {length}: loss", error, 2e-3)
            bench.same(
                f"{num_rows} x {length}: tokens counted",
                int(first["counts"].sum()),
                int(expected["counts"].sum()),
            )
    torch.compiler.reset()


CHECKS = (against_cpu, steps, against_transformers, checkpointing, compiled)
