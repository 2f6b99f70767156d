"""Schedules by hand; AdamW's groups; what must not decay does not."""

import math

import pytest
import torch
from torch import nn

from trainer.optim import adamw, set_learning_rate, warmup_cosine, warmup_stable_decay


def test_warmup_stable_decay_by_hand():
    factor = [warmup_stable_decay(step, 20, warmup=4, decay=0.25, final=0.0) for step in range(1, 21)]
    # up in 4 steps, flat, down over the last 5: at step 16 the decay has not begun, at step 20 one fifth is left
    assert factor == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 13 + [0.8, 0.6, 0.4, 0.2])
    assert warmup_stable_decay(20, 20, warmup=0, decay=0.25, final=0.5) == pytest.approx(0.6)
    assert warmup_stable_decay(20, 20, warmup=0, decay=0.0, final=0.0) == 1.0


def test_warmup_cosine_by_hand():
    factor = {step: warmup_cosine(step, 110, warmup=10, final=0.1) for step in (1, 10, 60, 110)}
    assert factor == pytest.approx({1: 0.1, 10: 1.0, 60: 0.55, 110: 0.1})  # the middle of the cosine is the mean
    assert warmup_cosine(35, 110, warmup=10, final=0.1) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("wrong", [{"warmup": -1}, {"decay": 1.5}, {"final": 2.0}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        warmup_stable_decay(1, 10, **({"warmup": 1, "decay": 0.1, "final": 0.0} | wrong))


def test_impossible_adamw_is_refused():
    with pytest.raises(ValueError, match="betas"):
        adamw(nn.Linear(2, 2), lr=1e-3, betas=[0.9], eps=1e-8, weight_decay=0.1)
    with pytest.raises(ValueError, match="lr=-1"):
        adamw(nn.Linear(2, 2), lr=-1, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1)


def test_matrices_decay_and_gains_do_not():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.RMSNorm(3))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = adamw(model, lr=0.1, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert set_learning_rate(optimizer, 0.5) == 0.05
    optimizer.step()
    torch.testing.assert_close(model[0].weight.data, before[0] * (1 - 0.05 * 0.5))  # decoupled: lr * weight_decay
    assert torch.equal(model[1].weight.data, before[1])


def test_one_step_of_adamw_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    optimizer = adamw(layer, lr=0.1, betas=[0.9, 0.95], eps=0.1, weight_decay=0.0)
    layer.weight.grad = torch.full((1, 1), 2.0)
    optimizer.step()
    assert layer.weight.item() == pytest.approx(1 - 0.1 * 2 / (2 + 0.1))  # both moments unbiased: m = g, v = g^2
