"""The router's losses against slow loops in float64, and whether their gradients reach the router's
weights.
"""

import math

import pytest
import torch

from tests.arms import GatedLayer, batch, make_lab, train
from trainer.balance import (
    NO_LOSSES,
    LossWeights,
    attach_loss,
    batch_balance_loss,
    count_in_backward,
    router_loss,
    router_z_loss,
    sequence_balance_loss,
    switch_balance_loss,
)
from trainer.config import ModelConfig
from trainer.model.afmoe import afmoe_config, moe_layers
from trainer.model.init import initialize
from trainer.model.moe import MoE

B, L, E, K = 2, 9, 5, 2
LOSSES = ["sequence", "switch", "batch", "z"]


def inputs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits, scores, chosen experts, loads of the last step (their mean is 1), and which tokens are real."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, L, E, generator=generator)
    load = torch.rand(E, generator=generator)
    valid = torch.ones(B, L, dtype=torch.bool)
    valid[0, 2], valid[1, 5:] = False, False
    return logits, logits.sigmoid(), logits.topk(K).indices, load / load.mean(), valid


def share_of(scores: torch.Tensor, tokens: list[tuple[int, int]], i: int) -> float:
    """P_i: the mean over tokens of score i over the token's sum."""
    return sum(scores[b, t, i].item() / sum(scores[b, t].tolist()) for b, t in tokens) / len(tokens)


def frequency_of(ids: torch.Tensor, tokens: list[tuple[int, int]], i: int) -> float:
    """f_i: E / K times the share of tokens that chose expert i."""
    return sum(i in ids[b, t].tolist() for b, t in tokens) * E / (K * len(tokens))


@pytest.mark.parametrize("padded", [False, True])
def test_losses_of_slow_loops_over_real_tokens(padded):
    logits, scores, ids, load, valid = inputs()
    real = [(b, t) for b in range(B) for t in range(L) if valid[b, t] or not padded]
    rows = [[(b, t) for b, t in real if b == row] for row in range(B)]
    f, P, experts = frequency_of, share_of, range(E)
    sequence = sum(len(tokens) * f(ids, tokens, i) * P(scores, tokens, i) for tokens in rows for i in experts)
    switch = sum(len(real) * f(ids, real, i) * P(scores, real, i) for i in experts)
    batch_loss = sum(len(real) * load[i].item() * P(scores, real, i) for i in experts)
    z = sum(math.log(sum(math.exp(x) for x in logits[b, t].tolist())) ** 2 for b, t in real)
    z_torch = sum(torch.logsumexp(logits[b, t].double(), 0).item() ** 2 for b, t in real)
    mask = valid if padded else None
    assert sequence_balance_loss(scores, ids, mask).item() == pytest.approx(sequence, rel=1e-6)
    assert switch_balance_loss(scores, ids, mask).item() == pytest.approx(switch, rel=1e-6)
    assert batch_balance_loss(scores, load, mask).item() == pytest.approx(batch_loss, rel=1e-6)
    assert (
        router_z_loss(logits, mask).item() == pytest.approx(z, rel=1e-6) == pytest.approx(z_torch, rel=1e-6)
    )


def loss_of(name: str, scores, logits, ids, load, valid):
    return router_loss(LossWeights(**{name: 1.0}), scores, logits, ids, load, valid)


@pytest.mark.parametrize("name", LOSSES[:3])
def test_a_loss_is_one_per_token_when_every_expert_has_the_same_share(name):
    ids = torch.arange(4).repeat(4).view(1, 8, 2)
    assert loss_of(
        name, torch.full((1, 8, 4), 0.3), torch.zeros(1, 8, 4), ids, torch.ones(4), None
    ).item() == pytest.approx(8.0)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_has_no_gradient_and_changes_none(name):
    """Of a token that is not there, bit for bit zero; of the others as if it had never been."""
    logits, _, ids, load, valid = inputs()
    valid = torch.ones_like(valid)
    valid[:, -3:] = False
    padded, alone = logits.clone().requires_grad_(), logits[:, :-3].clone().requires_grad_()
    loss_of(name, padded.sigmoid(), padded, ids, load, valid).backward()
    loss_of(name, alone.sigmoid(), alone, ids[:, :-3], load, None).backward()
    assert torch.equal(padded.grad[:, -3:], torch.zeros(B, 3, E))
    torch.testing.assert_close(padded.grad[:, :-3], alone.grad)
    everything = torch.zeros_like(valid)
    assert loss_of(name, padded.sigmoid(), padded, ids, load, everything).item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_finite_differences(name):
    """In float64, the chosen experts and the loads held as they are: those carry no gradient."""
    logits, _, ids, load, valid = inputs()

    def of(logits_BLE: torch.Tensor) -> torch.Tensor:
        return loss_of(name, logits_BLE.sigmoid(), logits_BLE, ids, load.double(), valid)

    assert torch.autograd.gradcheck(of, (logits.double().requires_grad_(),))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("logit", [-200.0, -104.0, -90.0, -86.0, -84.0, -60.0, 20.0, 200.0])
def test_losses_of_saturated_scores_are_finite(name, logit):
    """sigmoid underflows below -104; between -87 and -104 it is a subnormal number."""
    logits = torch.full((1, 6, 64), logit, requires_grad=True)
    ids = torch.arange(2).repeat(6).view(1, 6, 2)
    loss = loss_of(name, logits.sigmoid(), logits, ids, torch.rand(64) * 2, None)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_weights_combine():
    """By the losses themselves; a weight of 0 leaves its loss out, and all of them nothing at all."""
    logits, scores, ids, load, valid = inputs()
    parts = {name: loss_of(name, scores, logits, ids, load, valid) for name in LOSSES}
    assert len({round(part.item(), 4) for part in parts.values()}) == 4
    weights = {"sequence": 0.5, "switch": 0.25, "batch": 2.0, "z": 0.125}
    every = router_loss(LossWeights(**weights), scores, logits, ids, load, valid)
    torch.testing.assert_close(every, sum(weight * parts[name] for name, weight in weights.items()))
    two = router_loss(LossWeights(switch=3.0, z=1.0), scores, logits, ids, load, valid)
    torch.testing.assert_close(two, 3 * parts["switch"] + parts["z"])
    assert router_loss(NO_LOSSES, scores, logits, ids, load, valid) is None


# -- on their way through the backward pass ---------------------------------------------------------------


def test_an_attached_loss_gives_the_gradient_of_the_added_loss():
    """An attached loss must act like a term of the sum, with its own factor and nothing else."""
    w = torch.randn(5, requires_grad=True)
    (w.exp().sum() + 3 * w.square().sum()).backward()
    added, w.grad = w.grad, None
    x = w.exp()
    attached = attach_loss(x, 3 * w.square().sum())
    assert torch.equal(attached, x)
    attached.sum().backward()
    torch.testing.assert_close(w.grad, added)


SHAPE = ModelConfig(
    vocab_size=61,
    dim=16,
    num_layers=2,
    num_dense_layers=1,
    ffn_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    window=6,
    num_experts=8,
    top_k=2,
    expert_dim=8,
    num_shared_experts=1,
    route_scale=2.448,
)


@torch.no_grad()
def moe_layer(weights: LossWeights) -> MoE:
    with torch.device("meta"):
        model = afmoe_config(SHAPE, flex=False, loss_weights=weights).build()
    initialize(model, device=torch.device("cpu"), seed=0)
    (moe,) = moe_layers(model)
    moe.router.gate.weight.mul_(10)  # scores that differ
    moe.expert_bias_E.copy_(torch.linspace(-0.1, 0.1, 8))
    moe.load_E.copy_(torch.linspace(0.5, 1.5, 8))
    return moe.train()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_gradient_reaches_the_gate_of_a_real_layer(name, padded):
    """With the loss minus without it: the gradient of the loss itself, taken from the router's outputs.
    Nothing else feels it.
    """
    x_BLD = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(1))
    valid_BL = torch.arange(12).expand(3, 12) < torch.tensor([[12], [7], [10]]) if padded else None
    real = slice(None) if valid_BL is None else valid_BL
    weights = LossWeights(**{name: 0.7})
    gradients = []
    for moe in (moe_layer(weights), moe_layer(NO_LOSSES)):
        moe(x_BLD, valid_BL)[real].square().sum().backward()
        gradients.append({key: parameter.grad for key, parameter in moe.named_parameters()})
    moe = moe_layer(weights)
    _, ids, scores, logits = moe.router(x_BLD, moe.expert_bias_E)
    (0.7 * loss_of(name, scores, logits, ids, moe.load_E, valid_BL)).backward()
    with_loss, without = gradients
    key, expected = "router.gate.weight", moe.router.gate.weight.grad
    assert expected.norm() > 1e-2
    error = with_loss.pop(key) - without[key] - expected
    assert error.norm() < 1e-5 * (without[key].norm() + expected.norm())
    assert all(torch.equal(gradient, without[other]) for other, gradient in with_loss.items())


def test_a_loss_in_evaluation_is_none():
    """An evaluation that is differentiated must not feel the router losses."""
    moe = moe_layer(LossWeights(sequence=1.0, switch=1.0, batch=1.0, z=1.0)).eval()
    plain = moe_layer(NO_LOSSES).eval()
    x_BLD = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(1))
    for layer in (moe, plain):
        layer(x_BLD).square().sum().backward()
    assert torch.equal(moe.router.gate.weight.grad, plain.router.gate.weight.grad)
    assert moe.routing_sums_S.sum() == 0


def test_a_layer_without_weight_does_not_disable_the_others():
    """Three layers, the losses on the second only: the first and third have the gradient of no loss, the
    second its own.
    """
    on, off = LossWeights(sequence=0.5, z=0.1), NO_LOSSES
    gradients = []
    for weights in ((off, on, off), (off, off, off), (on, on, on)):
        layers = [GatedLayer(8, 2, seed=m, loss_weights=w) for m, w in enumerate(weights)]
        for layer in layers:
            layer(batch(1)).square().sum().backward()
        gradients.append([layer.router.gate.weight.grad for layer in layers])
    mixed, without, everywhere = gradients
    assert (
        torch.equal(mixed[0], without[0])
        and torch.equal(mixed[2], without[2])
        and torch.equal(mixed[1], everywhere[1])
    )
    assert all((a - b).norm() > 1 for a, b in zip(everywhere, without, strict=True))


def test_the_batch_loss_is_silent_in_the_first_step_and_then_has_the_last_step_s_loads():
    """All loads are 1 at first, and the shares sum to 1: no gradient, bit for bit. Then by hand, from the
    counts.
    """
    lab, plain = make_lab("none", loss_weights=LossWeights(batch=1.0)), make_lab("none")
    for either in (lab, plain):
        either.run(train, [1, 2])
    assert torch.equal(lab.gradients[0], plain.gradients[0]) and not torch.equal(
        lab.gradients[1], plain.gradients[1]
    )
    for m, layer in enumerate(lab.layers):
        counts = torch.bincount(layer.router(batch(1), torch.zeros(16)).ids_BLK.flatten(), minlength=16)
        twin = GatedLayer(16, 2, seed=m)
        scores_BLE = twin.router(batch(2), torch.zeros(16)).scores_BLE
        share_BLE = scores_BLE / scores_BLE.sum(-1, keepdim=True)
        # sum over tokens and experts of f_i P_i
        (share_BLE * counts / counts.double().mean()).sum().backward()
        expected = twin.router.gate.weight.grad
        assert (lab.gradients[1][m] - plain.gradients[1][m] - expected).norm() < 1e-4 * expected.norm()


def test_counting_happens_once_under_recomputation_and_never_without_a_backward():
    """A count in the forward pass would count recomputed and evaluated tokens too."""
    into_E, counts_E = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 4])
    w = torch.ones(3, requires_grad=True)

    def forward(w):
        return count_in_backward(w * 2, counts_E, into_E).exp().sum()

    forward(w)
    with torch.no_grad():
        forward(w)
    assert into_E.tolist() == [0, 0]
    for use_reentrant in (False, True):
        into_E.zero_()
        torch.utils.checkpoint.checkpoint(forward, w, use_reentrant=use_reentrant).backward()
        assert into_E.tolist() == [3, 4]
