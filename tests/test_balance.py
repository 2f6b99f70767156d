"""Oracles: the report's equations by hand, brute-force loops, and properties that must hold for every rule."""

import math

import pytest
import torch

from trainer.balance import (
    Balancer,
    RoutingStats,
    SignRule,
    SmebuRule,
    attach_loss,
    count_in_backward,
    register_routing_buffers,
    routing_metrics,
    sequence_balance_loss,
)

RULES = {
    "sign": lambda shape: SignRule(shape, lr=0.1),
    "smebu": lambda shape: SmebuRule(shape, lr=0.1, beta=0.5, kappa=2.0),
}


class Layer(torch.nn.Module):
    """What a Balancer asks of an MoE layer."""

    def __init__(self, num_experts: int, top_k: int = 1):
        super().__init__()
        self.top_k = top_k
        register_routing_buffers(self, num_experts)

    @property
    def tokens_per_expert_E(self):
        return self.routing_sums_S[: len(self.expert_bias_E)]


def apply(rule, counts):
    counts_ME = torch.as_tensor(counts)
    return rule(RoutingStats(counts_ME), torch.zeros(counts_ME.shape))


def balancer(num_experts=4, num_layers=1, rule=None, steps=10, top_k=1):
    return Balancer([Layer(num_experts, top_k) for _ in range(num_layers)], rule, steps=steps)


def test_violation_by_hand():
    torch.testing.assert_close(RoutingStats(torch.tensor([[10, 20, 30, 20]])).violation_ME, torch.tensor([[0.5, 0.0, -0.5, 0.0]]))


def test_smebu_three_experts_three_steps_by_hand():
    rule, layer = SmebuRule((1, 3), lr=0.1, beta=0.5, kappa=2.0), Layer(3)
    balance = Balancer([layer], rule, steps=9)
    t = math.tanh
    # counts (2, 4, 6): mean 4, v = (.5, 0, -.5), clamped tanh(1) (1, 0, -1), zero-mean already
    # counts (4, 4, 4): v = 0;  counts (12, 0, 0): mean 4, v = (-2, 1, 1), clamped (-tanh 4, tanh 2, tanh 2)
    a, c = 0.1 * t(1), (2 * t(2) - t(4)) / 3
    steps = [[a, 0, -a], [0, 0, 0], [0.1 * (-t(4) - c), 0.1 * (t(2) - c), 0.1 * (t(2) - c)]]
    momentum, bias = [0.0] * 3, [0.0] * 3
    for number, (counts, step) in enumerate(zip([[2, 4, 6], [4, 4, 4], [12, 0, 0]], steps, strict=True), start=1):
        momentum = [0.5 * m + 0.5 * s for m, s in zip(momentum, step, strict=True)]
        bias = [b + m for b, m in zip(bias, momentum, strict=True)]
        layer.tokens_per_expert_E.add_(torch.tensor(counts))
        balance.step(number)
        torch.testing.assert_close(layer.expert_bias_E.tolist(), bias, atol=1e-7, rtol=1e-6)


def test_sign_by_hand_is_recentred():
    # counts (1, 1, 1, 9): mean 3, signs (+, +, +, -), their mean 0.5 is taken away
    torch.testing.assert_close(apply(RULES["sign"]((1, 4)), [[1, 1, 1, 9]]), torch.tensor([[0.05, 0.05, 0.05, -0.15]]))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_zero_mean_and_ignores_the_scale_of_counts(name):
    counts_ME = torch.randint(1, 100, (3, 16))
    once, doubled = (apply(RULES[name]((3, 16)), k * counts_ME) for k in (1, 2))
    torch.testing.assert_close(once.mean(-1), torch.zeros(3), atol=1e-7, rtol=0)
    assert torch.equal(once, doubled)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_pushes_towards_the_starved_expert_and_rests_at_balance(name):
    step_E = apply(RULES[name]((1, 4)), [[0, 10, 10, 20]])[0]
    assert step_E[0] > step_E[1] == step_E[2] > step_E[3]
    assert torch.equal(apply(RULES[name]((1, 4)), [[5, 5, 5, 5]]), torch.zeros(1, 4))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_resumes_where_it_stopped_bit_for_bit(name):
    run, resumed = (balancer(8, 2, RULES[name]((2, 8)), steps=6) for _ in range(2))
    counts = torch.randint(1, 100, (6, 2, 8))
    for step in range(3):
        feed(run, counts[step], step + 1)
    resumed.load_state_dict(run.state_dict())
    for theirs, ours in zip(resumed.layers, run.layers, strict=True):
        theirs.expert_bias_E.copy_(ours.expert_bias_E)
    for step in range(3, 6):
        assert feed(run, counts[step], step + 1) == feed(resumed, counts[step], step + 1)
    assert run.verdict() == resumed.verdict()
    assert all(torch.equal(a.expert_bias_E, b.expert_bias_E) for a, b in zip(run.layers, resumed.layers, strict=True))


def feed(balance, counts_ME, step):
    for layer, counts_E in zip(balance.layers, counts_ME, strict=True):
        layer.tokens_per_expert_E.add_(counts_E)
    return balance.step(step)


def test_the_biases_of_an_unbalanced_router_converge():
    """Closed loop on fixed scores: SMEBU brings a router with skewed scores near the floor; none leaves it."""
    torch.manual_seed(0)
    score_TE = torch.rand(4096, 8) * 0.5 + torch.linspace(0, 0.4, 8)
    excess = {}
    for name, rule in {"none": None, "smebu": SmebuRule((1, 8), lr=5e-3, beta=0.5, kappa=2.0)}.items():
        balance = balancer(8, 1, rule, steps=300, top_k=2)
        for step in range(1, 301):
            ids = (score_TE + balance.layers[0].expert_bias_E).topk(2).indices
            metrics = feed(balance, torch.bincount(ids.flatten(), minlength=8)[None], step)
        excess[name] = metrics["balance/max_violation"]
    assert excess["none"] > 1 > 0.05 > excess["smebu"]


@pytest.mark.parametrize("tokens", [40_840, 2**25 + 1])
def test_trap_1_counts_are_exact_beyond_bf16_and_fp32_spacing(tokens):
    """Near 40k bf16 counts in steps of 256, beyond 2^24 fp32 in steps of 2; one token more must still be seen."""
    layer = Layer(2)
    balance = Balancer([layer], SignRule((1, 2), lr=1.0), steps=1)
    for _ in range(2):  # two microbatches
        layer.tokens_per_expert_E.add_(torch.tensor([tokens, tokens]))
    layer.tokens_per_expert_E.add_(torch.tensor([1, 0]))
    balance.step(1)
    assert layer.expert_bias_E.tolist() == [-1.0, 1.0]


def test_trap_2_bias_and_momentum_are_float32_and_a_fine_step_is_kept():
    rule = SmebuRule((1, 4), lr=1e-6, beta=0.5, kappa=2.0)
    assert rule.momentum_ME.dtype == torch.float32
    layer = Layer(4)
    layer.expert_bias_E += 1.0  # bf16 would swallow 1e-6 next to 1
    feed(Balancer([layer], rule, steps=1), torch.tensor([[1, 2, 3, 2]]), 1)
    assert layer.expert_bias_E[0] > 1 > layer.expert_bias_E[2]


def test_trap_4_microbatches_are_summed_before_the_rule():
    split, whole = (balancer(4, 1, SmebuRule((1, 4), lr=0.1, beta=0.5, kappa=2.0)) for _ in range(2))
    for counts in ([9, 1, 1, 1], [0, 4, 4, 4], [1, 1, 7, 3]):
        split.layers[0].tokens_per_expert_E.add_(torch.tensor(counts))
    split.step(1)
    feed(whole, torch.tensor([[10, 6, 12, 8]]), 1)
    assert torch.equal(split.layers[0].expert_bias_E, whole.layers[0].expert_bias_E)
    assert split.layers[0].tokens_per_expert_E.sum() == 0


def test_a_layer_without_tokens_and_a_model_without_experts():
    balance = balancer(4, 2, SmebuRule((2, 4), lr=0.1, beta=0.5, kappa=2.0))
    metrics = feed(balance, torch.tensor([[0, 0, 0, 0], [1, 1, 1, 5]]), 1)
    assert torch.equal(balance.layers[0].expert_bias_E, torch.zeros(4)) and balance.layers[1].expert_bias_E.abs().sum() > 0
    assert all(math.isfinite(value) for value in metrics.values())
    empty = Balancer([], None, steps=3)
    assert empty.step(1) == {} and empty.verdict().ok


def test_metrics_by_hand():
    counts_ME = torch.tensor([[10, 20, 30, 20], [0, 0, 40, 40]])  # mean 20
    bias_ME = torch.tensor([[0.1, -0.1, 0.0, 0.0], [0.2, -0.2, 0.0, 0.0]])
    got = {k: v.item() for k, v in routing_metrics(RoutingStats(counts_ME, top_k=2), bias_ME).items()}
    entropy = (-(2 * 0.25 * math.log(0.25) + 0.125 * math.log(0.125) + 0.375 * math.log(0.375)) + math.log(2)) / 2 / math.log(4)
    assert got == pytest.approx(
        {
            "balance/max_violation": (0.5 + 1.0) / 2,
            "balance/max_violation_worst_layer": 1.0,
            "balance/floor": math.sqrt(2 * math.log(4) * (1 - 2 / 4) / 20),
            "balance/min_load": 0.0,
            "balance/dead_experts": 2.0,
            "balance/entropy": entropy,
            "balance/bias_rms": math.sqrt((2 * 0.01 + 2 * 0.04) / 8),
        }
    )


def test_the_floor_is_what_independent_tokens_show():
    """Against sampling: sqrt(2 ln E) bounds the expected maximum of E normals from above, closely for large E."""
    num_experts, top_k, tokens = 64, 4, 8192
    generator = torch.Generator().manual_seed(0)
    sampled = []
    for _ in range(20):
        ids = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
        stats = RoutingStats(torch.bincount(ids.flatten(), minlength=num_experts)[None], top_k)
        metrics = routing_metrics(stats, torch.zeros(1, num_experts))
        sampled.append(metrics["balance/max_violation"].item())
    mean = sum(sampled) / len(sampled)
    assert mean < metrics["balance/floor"].item() < 1.25 * mean


def test_the_verdict_counts_the_last_tenth_of_the_steps_only():
    balance = balancer(4, 1, steps=20)
    for step in range(1, 21):  # the tail is steps 19 and 20; expert 3 is starved there only
        feed(balance, torch.tensor([[100, 100, 100, 1]] if step > 18 else [[1, 1, 1, 500]]), step)
    verdict = balance.verdict()
    assert verdict.collapsed == [(0, 3)] and not verdict.ok and verdict.num_experts == 4
    assert verdict.max_violation == pytest.approx(100 / 75.25 - 1)
    assert str(verdict).startswith("balance: FAILED, 1 of 4 experts collapsed, MaxVio 0.33 (floor ")


@pytest.mark.parametrize(("starved", "ok"), [(9, False), (10, True)])
def test_the_limit_of_collapse_is_a_tenth_of_the_even_share(starved, ok):
    balance = balancer(10, 1, steps=1)  # mean 100 tokens
    counts = [starved] + [100] * 8 + [200 - starved]
    feed(balance, torch.tensor([counts]), 1)
    assert balance.verdict().ok is ok
    assert ("ok, 0 of 10" in str(balance.verdict())) is ok


# -- losses ---------------------------------------------------------------------------------------------


def test_sequence_balance_loss_is_one_per_token_when_uniform():
    ids = torch.arange(4).repeat(2)[None, :, None]
    assert sequence_balance_loss(torch.ones(1, 8, 4), ids).item() == pytest.approx(8.0)


def test_sequence_balance_loss_against_a_loop_over_real_tokens():
    torch.manual_seed(0)
    B, L, E, K = 2, 8, 4, 2
    score = torch.rand(B, L, E)
    ids = score.topk(K).indices
    valid = torch.ones(B, L, dtype=torch.bool)
    valid[1, 5:] = False
    loop = 0.0
    for b in range(B):
        tokens = [t for t in range(L) if valid[b, t]]
        for i in range(E):
            f_i = sum((i in ids[b, t].tolist()) for t in tokens) * E / (K * len(tokens))
            P_i = sum((score[b, t, i] / score[b, t].sum()).item() for t in tokens) / len(tokens)
            loop += len(tokens) * f_i * P_i
    assert sequence_balance_loss(score, ids, valid).item() == pytest.approx(loop, rel=1e-5)
    whole = sequence_balance_loss(score[:1], ids[:1], valid[:1]).item()
    assert sequence_balance_loss(score[:1], ids[:1]).item() == pytest.approx(whole)


def test_trap_10_an_attached_loss_gives_the_gradient_of_the_added_loss():
    w = torch.randn(5, requires_grad=True)
    (w.exp().sum() + 3 * w.square().sum()).backward()
    added, w.grad = w.grad, None
    attach_loss(w.exp(), 3 * w.square().sum()).sum().backward()
    torch.testing.assert_close(w.grad, added)


def test_trap_3_counting_happens_once_under_recomputation_and_never_without_a_backward():
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
