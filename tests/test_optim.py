"""AdamW by hand; which parameter gets which optimizer; what must not decay does not."""

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from trainer import train
from trainer.config import load
from trainer.optim import Optimizers, adamw
from trainer.optim.momentum import Muon


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"betas": [0.9]}, "betas"),
        ({"lr": -1}, "lr=-1"),
        ({"eps": 0}, "eps=0"),
        ({"weight_decay": -0.5}, "weight_decay=-0.5"),
    ],
)
def test_impossible_adamw_is_refused(wrong, message):
    settings = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    with pytest.raises(ValueError, match=message):
        adamw(nn.Linear(2, 2), **(settings | wrong))


def test_matrices_decay_and_gains_do_not():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.RMSNorm(3))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizers(adamw(model, lr=0.1, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert optimizer.set_learning_rate(0.5) == {"lr": 0.05}
    optimizer.step()
    # decoupled: lr * weight_decay
    torch.testing.assert_close(model[0].weight.data, before[0] * (1 - 0.05 * 0.5))
    assert torch.equal(model[1].weight.data, before[1])
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_one_step_of_adamw_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    optimizer = adamw(layer, lr=0.1, betas=[0.9, 0.95], eps=0.1, weight_decay=0.0)
    layer.weight.grad = torch.full((1, 1), 2.0)
    optimizer.step()
    # both moments unbiased: m = g, v = g^2
    assert layer.weight.item() == pytest.approx(1 - 0.1 * 2 / (2 + 0.1))


def owners_worker(overrides: list[str]) -> tuple[dict[str, str], dict[str, float], list[dict]]:
    base = [
        "name=owners",
        "model=debug",
        "model.num_layers=2",
        "data=synthetic",
        "steps=3",
        "seq_len=32",
        "global_batch=2",
    ]
    run = train.build(
        load([*base, "micro_batch=2", "optim=muon", "optim.lr=0.02", "optim.adamw_lr=0.004", *overrides])
    )
    names = {p: name for name, p in run.model.named_parameters()}
    owners = {}
    for optimizer in run.optimizer.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[p] not in owners
                owners[names[p]] = f"{type(optimizer).__name__} {group['weight_decay']:g}"
    assert owners.keys() == set(names.values())
    return (
        owners,
        run.optimizer.set_learning_rate(0.5),
        [train.train_step(run, train.next_batches(run)) for _ in range(2)],
    )


@pytest.mark.parametrize(("overrides", "router"), [([], "Muon 0.1"), (["optim.router=adamw"], "AdamW 0.1")])
def test_hidden_matrices_get_muon_and_the_rest_adamw(overrides, router):
    owners, rates, steps = run_ranks(owners_worker, 1, overrides)[0]
    for name, owner in owners.items():
        if "norm" in name:
            expected = "AdamW 0"
        elif name in ("tok_embeddings.weight", "lm_head.weight"):
            expected = "AdamW 0.1"
        else:
            expected = router if "router" in name else "Muon 0.1"
        assert owner == expected, name
    assert rates == {"lr": 0.01, "lr_adamw": 0.002}
    assert [step["lr"] for step in steps] == [0.02, 0.02] and [step["lr_adamw"] for step in steps] == [
        0.004,
        0.004,
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("optim.router=sgd", "optim.router=sgd"),
        ("optim.dtype=float16", "float16"),
        ("optim.momentum=1.5", "momentum=1.5"),
        ("optim.adamw_lr=-1", "lr=-1"),
        ("optim.ns_steps=3", "ns_steps"),
    ],
)
def test_impossible_muon_is_refused(wrong, message):
    with pytest.raises(train.ConfigError, match=message):
        run_ranks(owners_worker, 1, [wrong])


def test_bfloat16_orthogonalisation_is_near_the_float32_one():
    """bfloat16 has 8 bits: five products of five matrices stay within a few percent."""
    weights = [nn.Parameter(torch.zeros(64, 48)) for _ in range(2)]
    for weight, dtype in zip(weights, (torch.float32, torch.bfloat16), strict=True):
        weight.grad = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=1.0, dtype=dtype).step()
    error = (weights[0] - weights[1]).norm() / weights[0].norm()
    assert 0 < error < 0.05
