"""Muon against a plain Muon in float64, written here from the equations; alone and on every layout."""

import math

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from trainer import train
from trainer.config import load
from trainer.model.init import local_window
from trainer.optim.momentum import Muon
from trainer.optim.newton_schulz import orthogonalize

STEPS, LR, MOMENTUM, DECAY = 5, 0.02, 0.9, 0.1


def plain_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix.double()
    if x.norm() == 0:
        return x
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


class PlainMuon:
    """One matrix, or a stack of them, at a time; no batching, no sharding, no transposing."""

    def __init__(self, weight: torch.Tensor, *, lr=LR, momentum=MOMENTUM, decay=DECAY):
        self.weight, self.buffer = weight.double(), torch.zeros_like(weight).double()
        self.lr, self.momentum, self.decay = lr, momentum, decay

    def step(self, gradient: torch.Tensor) -> None:
        self.buffer = self.momentum * self.buffer + gradient.double()
        nesterov = gradient.double() + self.momentum * self.buffer
        rows, columns = self.weight.shape[-2:]
        stack = nesterov.reshape(-1, rows, columns)
        update = torch.stack([plain_orthogonal(matrix) for matrix in stack]).reshape(self.weight.shape)
        self.weight = (1 - self.lr * self.decay) * self.weight - self.lr * math.sqrt(
            max(1, rows / columns)
        ) * update


def gradient_of(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """The same on every rank; small as real gradients are; the second expert of each tensor never gets a
    token.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
    gradient = torch.randn(shape, generator=generator) * 1e-4
    if len(shape) == 3:
        gradient[1] = 0
    return gradient


# -- alone --


@pytest.mark.parametrize(
    "shape", [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1), (3, 4, 6), (3, 6, 4), (2, 3, 4, 5)]
)
def test_one_process_equals_the_equations(shape):
    weight = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    oracle = PlainMuon(weight.detach())
    optimizer = Muon([weight], lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    for step in range(STEPS):
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
        oracle.step(weight.grad)
        optimizer.step()
    torch.testing.assert_close(weight.double(), oracle.weight, rtol=0, atol=1e-6)


def test_groups_have_their_own_rates():
    weights = [
        torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(i))) for i in range(3)
    ]
    settings = [(0.01, 0.0, 0.0), (0.05, 0.95, 0.3), (0.0, 0.5, 0.5)]
    oracles = [
        PlainMuon(w.detach(), lr=lr, momentum=m, decay=d)
        for w, (lr, m, d) in zip(weights, settings, strict=True)
    ]
    keys = ("lr", "momentum", "weight_decay")
    given = zip(weights, settings, strict=True)
    optimizer = Muon(
        [{"params": [weight], **dict(zip(keys, values, strict=True))} for weight, values in given]
    )
    for step in range(3):
        for i, (weight, oracle) in enumerate(zip(weights, oracles, strict=True)):
            weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + i))
            oracle.step(weight.grad)
        optimizer.step()
    for weight, oracle in zip(weights, oracles, strict=True):
        torch.testing.assert_close(weight.double(), oracle.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_the_update_forgets_the_gradients_scale(scale):
    matrix = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(orthogonalize(matrix * scale), orthogonalize(matrix), rtol=0, atol=1e-5)


def test_the_update_is_nearly_orthogonal():
    """Five steps of the quintic bring singular values of a Gaussian matrix into [0.6, 1.3] and keep the
    singular vectors.
    """
    batch = torch.randn(8, 48, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = orthogonalize(batch)
    left, _, right = torch.linalg.svd(batch, full_matrices=False)
    in_its_basis = left.mT @ got @ right.mT
    values = in_its_basis.diagonal(dim1=-2, dim2=-1)
    assert (values > 0.6).all() and (values < 1.3).all()
    assert (in_its_basis - torch.diag_embed(values)).abs().max() < 1e-10


def test_an_expert_without_tokens_stays_where_it_is():
    weight = torch.nn.Parameter(torch.randn(3, 4, 6))
    before = weight.detach().clone()
    optimizer = Muon([weight], lr=0.1, momentum=0.95)
    for _ in range(3):
        weight.grad = torch.randn(3, 4, 6)
        weight.grad[1] = 0
        optimizer.step()
    assert torch.equal(weight[1], before[1]) and weight.isfinite().all()
    assert not torch.equal(weight[0], before[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Muon([torch.nn.Parameter(torch.zeros(3))]), "shape \\(3,\\)"),
        (lambda: Muon([torch.nn.Parameter(torch.zeros(3, 3))], lr=-1.0), "lr=-1"),
        (lambda: Muon([torch.nn.Parameter(torch.zeros(3, 3))], momentum=1.0), "momentum=1"),
        (lambda: Muon([torch.nn.Parameter(torch.zeros(3, 3))], weight_decay=-0.1), "weight_decay=-0.1"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_gradient_is_named():
    optimizer = Muon([torch.nn.Parameter(torch.zeros(3, 2))])
    with pytest.raises(RuntimeError, match=r"\(3, 2\) has no gradient"):
        optimizer.step()


# -- on every layout --

BASE = [
    "name=muon",
    "model=debug",
    "model.num_layers=3",
    "data=synthetic",
    "data.source.num_topics=8",
    "steps=5",
    "seq_len=32",
    "global_batch=8",
    "micro_batch=1",
    "optim=muon",
    f"optim.lr={LR}",
    f"optim.momentum={MOMENTUM}",
    f"optim.weight_decay={DECAY}",
]
# rows: 30, 10, 6, 20
UNEVEN = ["model.num_heads=3", "model.num_kv_heads=1", "model.head_dim=10", "model.expert_dim=20"]


def layout_worker(overrides: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Before and after, of every matrix of Muon's, whole."""
    run = train.build(load(BASE + overrides))
    names = {p: name for name, p in run.model.named_parameters()}
    mine = [p for group in run.optimizer.optimizers[0].param_groups for p in group["params"]]
    assert isinstance(run.optimizer.optimizers[0], Muon)
    run.optimizer.set_learning_rate(1.0)
    before = {names[p]: full(p) for p in mine}
    for step in range(STEPS):
        for name, p in run.model.named_parameters():
            if p.ndim < 2:
                p.grad = torch.zeros_like(p)
                continue
            shape, offset = local_window(p)
            gradient = gradient_of(name, p.shape, step)[
                tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
            ]
            is_dtensor = isinstance(p, DTensor)
            p.grad = (
                DTensor.from_local(
                    gradient.clone(),
                    p.device_mesh,
                    p.placements,
                    shape=p.shape,
                    stride=p.stride(),
                    run_check=False,
                )
                if is_dtensor
                else gradient
            )
        run.optimizer.step()
    return {names[p]: (before[names[p]], full(p)) for p in mine}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


LAYOUTS = [
    (1, ["parallel=single"]),
    (1, ["parallel=single", "dtype=bfloat16"]),  # a mesh of one rank
    (2, ["parallel=fsdp"]),
    (2, ["parallel=fsdp_ep"]),
    pytest.param(4, ["parallel=fsdp"], marks=pytest.mark.slow),
    pytest.param(4, ["parallel=hsdp", "parallel.dp_replicate=4"], marks=pytest.mark.slow),
    (4, ["parallel=hsdp_ep"]),
    pytest.param(4, ["parallel=fsdp_ep"], marks=pytest.mark.slow),  # efsdp 2 x ep 2
    # more shards than experts: cut inside their matrices
    pytest.param(4, ["parallel=fsdp", "model.num_experts=2"], marks=pytest.mark.slow),
    # parts of 2, 2, 2, 0 experts; of 8, 8, 8, 6 and 3, 3, 3, 1 rows
    pytest.param(4, ["parallel=fsdp", "model.num_experts=6", *UNEVEN], marks=pytest.mark.slow),
    pytest.param(4, ["parallel=hsdp_ep", "model.num_experts=6", *UNEVEN], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("num_ranks", "overrides"), LAYOUTS, ids=lambda v: "-".join(v) if isinstance(v, list) else None
)
def test_every_layout_equals_the_equations(num_ranks, overrides):
    results = run_ranks(layout_worker, num_ranks, overrides)
    for name, (before, _) in results[0].items():
        oracle = PlainMuon(before)
        for step in range(STEPS):
            oracle.step(gradient_of(name, before.shape, step))
        for result in results:
            assert (result[name][1] - oracle.weight).abs().max() < 1e-5, name
    # wq wk wv gate wo, dense or shared FFN; router and experts
    assert len(results[0]) == 3 * (5 + 3) + 2 * (1 + 3)
