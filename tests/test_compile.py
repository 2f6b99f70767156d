"""Does a model of compiled blocks compute what it computes without, at every length of a program?

The backend is aot_eager: Dynamo and AOTAutograd trace, guard and partition as always, and run the same
operators, so losses and gradients must be the same bits. What Inductor makes of the graphs is for a GPU.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from tests.models import GQA
from tests.ranks import run_ranks
from trainer.config import ParallelConfig
from trainer.model import moe
from trainer.model.afmoe import afmoe_config, moe_layers
from trainer.model.init import initialize
from trainer.model.parallelize import build_parallel
from trainer.ranks import device
from trainer.ranks.local import local

# a dense local layer and a global one with experts: two kinds of blocks, two graphs a length
SHAPE = replace(GQA, vocab_size=64, num_layers=2, global_every=2)
LENGTHS, STEPS = (32, 48, 64, 40), 3


def microbatches(backend: str | None, kind: str, ep: int, cp: int, lengths: tuple[int, ...]) -> list[tuple]:
    """Of STEPS at each length: the loss, all counts, a sum over the gradients; and the graphs made so far."""
    parallel = ParallelConfig(dp_shard=dist.get_world_size() // cp, cp=cp, ep=ep)
    dims = device.build_mesh(parallel, num_experts=8)
    model = build_parallel(
        afmoe_config(SHAPE, flex=False),
        dims,
        dtype=torch.bfloat16,
        activation_checkpoint=kind,
        compile=backend,
        num_shapes=len(lengths),
    )
    initialize(model, device=torch.device("cpu"), seed=0)
    results = []
    for length in lengths:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(100 * length + 10 * step + dist.get_rank())
            tokens_BL, labels_BL = torch.randint(0, 64, (2, 2, length), generator=generator)
            loss = model(tokens_BL, None, labels_BL)
            loss.backward()
            gradients = [local(p.grad).double().abs().sum().item() for p in model.parameters()]
            counts = [layer.tokens_per_expert_E.tolist() for layer in moe_layers(model)]
            results.append(((loss.item(), counts, gradients), counters["stats"]["unique_graphs"]))
            model.zero_grad()
    return results


def both(kind: str, ep: int, cp: int, lengths: tuple[int, ...]) -> list[list[tuple]]:
    """Eager, then compiled, with grouped GEMMs as on a GPU: a CPU has a loop of its own for eager experts."""
    moe.Experts._grouped_mm = grouped_mm
    return [microbatches(backend, kind, ep, cp, lengths) for backend in (None, "aot_eager")]


def grouped_mm(self, *, A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return torch._grouped_mm(A, B_t, offs=offs)


OTHERS = [("full", 2, 1), ("none", 1, 1), ("none", 2, 1), ("full", 1, 1), ("full", 2, 2), ("none", 1, 2)]
CASES = [
    pytest.param(
        "full", 2, 1, (32, 160), id="two lengths", marks=pytest.mark.slow
    ),  # the second one has two blocks of queries
    *(pytest.param(*other, LENGTHS, marks=pytest.mark.rare) for other in OTHERS),
]


@pytest.mark.parametrize(("kind", "ep", "cp", "lengths"), CASES)
def test_compiled_blocks_at_every_length(kind, ep, cp, lengths):
    """Same bits, counts too; each length is compiled in its first step alone, and the fourth one, past the 8
    graphs that torch allows by default with four kinds of blocks, ends nothing."""
    results = run_ranks(lambda: both(kind, ep, cp, lengths), max(ep, cp), timeout_s=900.0)
    for eager, compiled in results:
        assert [values for values, _ in compiled] == [values for values, _ in eager]
        graphs = [number for _, number in compiled]
        assert graphs == [2 * (i + 1) for i in range(len(lengths)) for _ in range(STEPS)]
