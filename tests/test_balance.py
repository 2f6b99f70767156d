"""Oracles for what is counted, for each rule and for the Balancer: the equations by hand, slow loops, closed
forms, small plants.

What must hold for every rule alike is in tests/test_conformance.py.
"""

import math

import numpy as np
import pytest
import torch

from tests.arms import RULES, make_rule, stats_of
from trainer.balance import (
    Balancer,
    LinearRule,
    PidRule,
    QuantileRule,
    RmsRule,
    RoutingStats,
    SignRule,
    SmebuGainRule,
    SmebuQuantileRule,
    SmebuRule,
    Verdict,
    collect_required,
    collects_required,
    register_routing_buffers,
    routing_metrics,
    routing_sums,
)
from trainer.balance.balancer import LEAST_TOKENS
from trainer.balance.stats import NUM_MARGINS, NUM_REQUIRED, margin_bin, num_sums, required_bin


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


def feed(balance, counts_ME, step):
    for layer, counts_E in zip(balance.layers, counts_ME, strict=True):
        layer.tokens_per_expert_E.add_(counts_E)
    return balance.step(step)


# -- what is counted ------------------------------------------------------------------------------------


def random_routing(tokens: int, experts: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """(1, T, E) scores and logits, (1, T, K) chosen, (E,) biases."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(1, tokens, experts, generator=generator)
    bias = 0.2 * torch.randn(experts, generator=generator)
    scores = logits.sigmoid()
    return scores, logits, (scores + bias).topk(top_k, sorted=False).indices, bias


@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (5, 4), (3, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_sums_of_a_slow_loop_over_tokens(experts, top_k, padded):
    """In float32 numbers, one by one: counts, margins, logits and required biases as the docstring of
    stats.py defines them.
    """
    scores, logits, ids, bias = random_routing(120, experts, top_k)
    valid = torch.rand(1, 120, generator=torch.Generator().manual_seed(1)) < 0.7 if padded else None
    counts, margins = [0] * experts, [0] * NUM_MARGINS
    required, mean_squares = [[0] * NUM_REQUIRED for _ in range(experts)], 0
    low, high = np.float32(bias.min()) - np.float32(1), np.float32(bias.max()) + np.float32(1)
    for t in range(120):
        if valid is not None and not valid[0, t]:
            continue
        s, x = scores[0, t].numpy(), logits[0, t].numpy()
        choice = s + bias.numpy()
        ranked = sorted(range(experts), key=lambda e, choice=choice: -choice[e])
        alpha = choice[ranked[top_k]]
        for e in ranked[:top_k]:
            counts[e] += 1
            octaves = math.log2(choice[e] - alpha) + 20  # bins: quarter octaves above 2^-20
            margins[min(max(math.floor(4 * octaves), 0), NUM_MARGINS - 1)] += 1
        for e in range(experts):
            required[e][math.floor((alpha - s[e] - low) * (1000 / (high - low)))] += 1
        mean_squares += round(float((x.astype(float) ** 2).mean()) * 2**20)
    got = routing_sums(scores, logits, ids, bias, valid, required=True)
    assert got.dtype == torch.int64
    stats = RoutingStats.from_sums(got[None], bias[None], top_k=top_k)
    assert stats.counts_ME.tolist() == [counts] and stats.margins_MW.tolist() == [margins]
    assert stats.required_MEH.tolist() == [required]
    num_tokens = sum(counts) / top_k
    # each rounded to a unit of 2^-20, here in float64
    assert abs(stats.logits_M1.item() - mean_squares) < num_tokens
    assert stats.tokens_M1.item() == num_tokens
    assert stats.logit_rms_M.item() == pytest.approx(math.sqrt(mean_squares / 2**20 / num_tokens), rel=1e-6)
    without = routing_sums(scores, logits, ids, bias, valid)
    assert torch.equal(without, got[: num_sums(experts)]) and len(got) == num_sums(experts, required=True)


def test_margin_bins_at_their_edges():
    """Quarter octaves from 2^-20 to 2, by hand; what lies outside is in the first or last bin, nan in the
    first.
    """
    margins = [0.0, 1e-30, 2.0**-20, 2.0**-19, 0.25, 0.5, 1.0, 1.999, 2.0, 50.0, math.inf, math.nan]
    assert margin_bin(torch.tensor(margins)).tolist() == [0, 0, 0, 4, 72, 76, 80, 83, 83, 83, 83, 0]
    below = torch.nextafter(torch.tensor([2.0**-19, 0.5, 1.0]), torch.zeros(3))
    inside = torch.tensor([2.0**-19, 0.5, 1.0]) * (1 - 1e-5)
    assert margin_bin(inside).tolist() == [3, 75, 79]
    # log2 rounds
    assert all(0 <= at - got <= 1 for at, got in zip([4, 76, 80], margin_bin(below).tolist(), strict=True))


def test_required_bins_at_their_edges():
    """1,000 bins from the smallest bias - 1 to the largest + 1, here [-1.5, 1.5): 3/1000 each; numbers that
    float32 holds.
    """
    bias = torch.tensor([-0.5, 0.5, 0.0])
    required = [-1.5, -9.0, -math.inf, -0.75, -0.7501, 0.0, 0.75, 1.4999, 1.5, 7.0, math.inf]
    assert required_bin(torch.tensor(required), bias).tolist() == [
        0,
        0,
        0,
        250,
        249,
        500,
        750,
        999,
        999,
        999,
        999,
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_logits_that_blow_up_show_and_do_not_overflow(value):
    """The mean square of a token counts as 2^16 at most: with 2^26 of them in 2^-20 units the sum is 2^62."""
    scores, logits, ids, bias = random_routing(4, 3, 1)
    logits[0, 2] = value
    sums = routing_sums(scores, logits, ids, bias)
    others = sum(round(float(logits[0, t].double().square().mean()) * 2**20) for t in (0, 1, 3))
    assert abs(sums[3 + NUM_MARGINS].item() - others - 2**36) <= 3
    stats = RoutingStats.from_sums(sums[None], bias[None], top_k=1)
    assert stats.logit_rms_M.item() == pytest.approx(math.sqrt(2**16 / 4), rel=1e-3)


def test_required_biases_are_counted_where_asked_for_only():
    for rule, required, expected in [
        (None, False, False),
        (None, True, True),
        (SignRule((1, 4), lr=1.0), False, False),
        (QuantileRule((1, 4)), False, True),
    ]:
        layer = Layer(4)
        Balancer([layer], rule, steps=1, required=required)
        assert collects_required(layer) == expected
    collect_required(layer)  # once more
    assert collects_required(layer) and len(layer.routing_sums_S) == num_sums(4, required=True)
    with pytest.raises(ValueError, match="needs_required = True"):
        RoutingStats(torch.ones(1, 4), 1, torch.zeros(1, 4)).required_quantile_ME  # noqa: B018


def test_violation_by_hand():
    torch.testing.assert_close(
        RoutingStats(torch.tensor([[10, 20, 30, 20]])).violation_ME, torch.tensor([[0.5, 0.0, -0.5, 0.0]])
    )
    stats = RoutingStats(torch.tensor([[10, 20, 30, 20], [0, 0, 0, 0]]))
    assert (
        stats.load_ME.tolist() == [[0.5, 1.0, 1.5, 1.0], [0.0] * 4]
        and stats.violation_ME[1].tolist() == [0.0] * 4
    )


def test_metrics_by_hand():
    counts_ME = torch.tensor([[10, 20, 30, 20], [0, 0, 40, 40]])  # mean 20
    bias_ME = torch.tensor([[0.1, -0.1, 0.0, 0.0], [0.2, -0.2, 0.0, 0.0]])
    got = {k: v.item() for k, v in routing_metrics(RoutingStats(counts_ME, top_k=2), bias_ME).items()}
    entropy = (
        (-(2 * 0.25 * math.log(0.25) + 0.125 * math.log(0.125) + 0.375 * math.log(0.375)) + math.log(2))
        / 2
        / math.log(4)
    )
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
    """Against sampling: sqrt(2 ln E) bounds the expected maximum of E normals from above, closely for large
    E.
    """
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


# -- the gain of a router -------------------------------------------------------------------------------


def measured_gain(scores_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int, shift: float) -> float:
    """-dv/db by shifting one expert's bias up and down and routing again; mean over experts."""

    def count(e: int, by: float) -> int:
        shifted_E = bias_E.clone()
        shifted_E[e] += by
        return int(((scores_TE + shifted_E).topk(top_k).indices == e).sum())

    experts = len(bias_E)
    gained = sum(count(e, shift) - count(e, -shift) for e in range(experts)) / experts
    return gained / (len(scores_TE) * top_k / experts) / (2 * shift)


def test_gain_of_exponential_scores_in_closed_form():
    """Scores 0.1 + Exp(sigma): the margins of the K chosen are K independent Exp(sigma), so G = 1 / sigma =
    50.

    Counted up to the edge h they give (1 - exp(-h / sigma)) / h. Five standard errors of a quarter of an
    expert per token, 25,000; the finite difference has 0.1 x 25,000 tokens crossing for each of 8 experts.
    """
    sigma, tokens, experts, top_k = 0.02, 100_000, 8, 2
    exponential_TE = (
        -torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).clamp_min(1e-9).log()
    )
    scores_TE, bias_E = 0.1 + sigma * exponential_TE, torch.zeros(experts)
    stats = stats_of(scores_TE[None], bias_E[None], top_k=top_k)
    seen = stats.margins_MW[0].cumsum(0)
    edge = 2.0 ** ((int((seen < tokens / 4).sum()) + 1) / 4 - 20)
    assert stats.gain_M.item() == pytest.approx(
        (1 - math.exp(-edge / sigma)) / edge, rel=5 / math.sqrt(tokens / 4)
    )
    assert stats.gain_M.item() == pytest.approx(1 / sigma, rel=0.1)  # the window: h / 2 sigma = 7 %
    assert measured_gain(scores_TE, bias_E, top_k, shift=0.002) == pytest.approx(
        1 / sigma, rel=5 / math.sqrt(8 * 2500)
    )


@pytest.mark.parametrize(("experts", "top_k", "spread"), [(8, 2, 1.0), (32, 4, 0.3), (16, 1, 2.0)])
def test_gain_is_how_far_a_shifted_bias_moves_the_load(experts, top_k, spread):
    """Sigmoid scores of experts with unequal loads, under biases: within 12 %, as the density is seen over a
    window.
    """
    generator = torch.Generator().manual_seed(1)
    logits_TE = spread * (
        torch.randn(30_000, experts, generator=generator) + 0.3 * torch.randn(experts, generator=generator)
    )
    scores_TE, bias_E = logits_TE.sigmoid(), 0.02 * torch.randn(experts, generator=generator)
    gain = stats_of(scores_TE[None], bias_E[None], top_k=top_k).gain_M.item()
    assert measured_gain(scores_TE, bias_E, top_k, shift=0.05 / gain) == pytest.approx(gain, rel=0.12)


def test_smebu_gain_finds_its_lambda_from_the_gain():
    """lambda = rho / (kappa G): the first step is that of SMEBU with it; then G is a running mean; limited by
    max_lr.
    """
    spread_M11 = torch.tensor([[[1.0]], [[0.2]]])
    scores_MTE = (spread_M11 * torch.randn(2, 4000, 8, generator=torch.Generator().manual_seed(2))).sigmoid()
    stats = stats_of(scores_MTE, torch.zeros(2, 8), top_k=2)
    rule = SmebuGainRule((2, 8), rho=0.3, beta=0.5, kappa=2.0, memory=0.75, max_lr=0.1)
    step_ME = rule(stats, stats.bias_ME)
    for m, gain in enumerate(stats.gain_M.tolist()):
        smebu = SmebuRule((2, 8), lr=0.3 / (2 * gain), beta=0.5, kappa=2.0)
        torch.testing.assert_close(step_ME[m], smebu(stats, stats.bias_ME)[m])
        assert rule.stability_M(stats)[m].item() == pytest.approx(0.3 * 0.5 / (2 * 1.5))
    steeper = stats_of(torch.sigmoid(0.5 * scores_MTE.logit()), torch.zeros(2, 8), top_k=2)
    rule(steeper, steeper.bias_ME)
    mean_M = 0.75 * stats.gain_M + 0.25 * steeper.gain_M
    torch.testing.assert_close(rule.gain_M, mean_M)
    torch.testing.assert_close(rule.lr_M1(steeper), 0.3 / (2 * mean_M.unsqueeze(-1)))
    nothing = RoutingStats(torch.zeros(2, 8).long(), 2, torch.zeros(2, 8), torch.zeros(2, NUM_MARGINS).long())
    rule(nothing, stats.bias_ME)
    torch.testing.assert_close(rule.gain_M, mean_M)  # a layer without tokens says nothing about its gain
    never_meet = SmebuGainRule((2, 8), rho=0.3, beta=0.5, kappa=2.0, max_lr=1e-4)
    never_meet(stats, stats.bias_ME)
    torch.testing.assert_close(never_meet.lr_M1(stats), torch.full((2, 1), 1e-4))


# -- rules by hand --------------------------------------------------------------------------------------


def test_smebu_three_experts_three_steps_by_hand():
    rule, layer = SmebuRule((1, 3), lr=0.1, beta=0.5, kappa=2.0), Layer(3)
    balance = Balancer([layer], rule, steps=9)
    t = math.tanh
    # counts (2, 4, 6): mean 4, v = (.5, 0, -.5), clamped tanh(1) (1, 0, -1), zero-mean already
    # counts (4, 4, 4): v = 0;  counts (12, 0, 0): mean 4, v = (-2, 1, 1), clamped (-tanh 4, tanh 2, tanh 2)
    a, c = 0.1 * t(1), (2 * t(2) - t(4)) / 3
    steps = [[a, 0, -a], [0, 0, 0], [0.1 * (-t(4) - c), 0.1 * (t(2) - c), 0.1 * (t(2) - c)]]
    momentum, bias = [0.0] * 3, [0.0] * 3
    for number, (counts, step) in enumerate(
        zip([[2, 4, 6], [4, 4, 4], [12, 0, 0]], steps, strict=True), start=1
    ):
        momentum = [0.5 * m + 0.5 * s for m, s in zip(momentum, step, strict=True)]
        bias = [b + m for b, m in zip(bias, momentum, strict=True)]
        layer.tokens_per_expert_E.add_(torch.tensor(counts))
        balance.step(number)
        torch.testing.assert_close(layer.expert_bias_E.tolist(), bias, atol=1e-7, rtol=1e-6)


def test_sign_by_hand_is_recentred():
    # counts (1, 1, 1, 9): mean 3, signs (+, +, +, -), their mean 0.5 is taken away
    torch.testing.assert_close(
        apply(SignRule((1, 4), lr=0.1), [[1, 1, 1, 9]]), torch.tensor([[0.05, 0.05, 0.05, -0.15]])
    )


def test_linear_by_hand():
    # counts (10, 20, 30, 20): mean 20, v = (.5, 0, -.5, 0); not clamped: (0, 0, 0, 80) has v = (1, 1, 1, -3)
    rule = LinearRule((2, 4), lr=0.1)
    step_ME = apply(rule, [[10, 20, 30, 20], [0, 0, 0, 80]])
    torch.testing.assert_close(step_ME, torch.tensor([[0.05, 0.0, -0.05, 0.0], [0.1, 0.1, 0.1, -0.3]]))


def test_rms_by_hand():
    # v = (.5, 0, -.5, 0): rms sqrt(1/8). v = (1, 1, 1, -3): rms sqrt(3). A layer at balance stays
    step_ME = apply(RmsRule((3, 4), lr=0.1), [[10, 20, 30, 20], [0, 0, 0, 80], [7, 7, 7, 7]])
    a, b = 0.05 * math.sqrt(8), 0.1 / math.sqrt(3)
    torch.testing.assert_close(step_ME, torch.tensor([[a, 0, -a, 0], [b, b, b, -3 * b], [0, 0, 0, 0]]))


@pytest.mark.parametrize(("kp", "ki", "kd"), [(5e-3, 5e-3, 0.0), (0.0, 1e-2, 0.0), (3e-3, 1e-3, 7e-3)])
def test_pid_is_the_textbook_controller(kp, ki, kd):
    """Positional form, from scratch at each step: b = kp v + ki sum(v) + kd (v - v before), v = 0 before the
    start.
    """
    counts = torch.randint(1, 100, (8, 6), generator=torch.Generator().manual_seed(0))
    balance = balancer(6, 1, PidRule((1, 6), kp=kp, ki=ki, kd=kd))
    violations = [[0.0] * 6]
    for step in range(8):
        feed(balance, counts[step : step + 1], step + 1)
        mean = sum(counts[step].tolist()) / 6
        violations.append([(mean - n) / mean for n in counts[step].tolist()])
        total = [sum(v[e] for v in violations) for e in range(6)]
        now, before = violations[-1], violations[-2]
        expected = [kp * now[e] + ki * total[e] + kd * (now[e] - before[e]) for e in range(6)]
        torch.testing.assert_close(balance.layers[0].expert_bias_E.tolist(), expected, rtol=1e-5, atol=1e-7)


def two_experts() -> RoutingStats:
    """E = 2, K = 1, four tokens, no biases: all choose expert 0; the runner-up alpha is expert 1's score.

    alpha - s of expert 0: -.8, -.499, -.1, -.4; of expert 1: 0, four times. Two tokens each would be even.
    Bins of 2/1000 over [-1, 1]. Expert 0: the second smallest is -.499, alone in [-.5, -.498), so the target
    is its end.
    Expert 1: four in [0, .002), and two of four are wanted: its middle, .001.
    """
    scores_TE = torch.tensor([[0.9, 0.1], [0.8, 0.301], [0.7, 0.6], [0.6, 0.2]])
    return stats_of(scores_TE[None], torch.zeros(1, 2), top_k=1)


def test_quantile_of_four_tokens_by_hand():
    stats = two_experts()
    assert stats.counts_ME.tolist() == [[4, 0]]
    torch.testing.assert_close(stats.required_quantile_ME, torch.tensor([[-0.498, 0.001]]))
    torch.testing.assert_close(QuantileRule((1, 2))(stats, stats.bias_ME), torch.tensor([[-0.2495, 0.2495]]))
    torch.testing.assert_close(
        QuantileRule((1, 2), ema=0.9)(stats, stats.bias_ME), torch.tensor([[-0.02495, 0.02495]])
    )
    # from other biases, as a replay does: q - b = (-.598, .105), minus their mean
    torch.testing.assert_close(
        QuantileRule((1, 2))(stats, torch.tensor([[0.1, -0.104]])), torch.tensor([[-0.3515, 0.3515]])
    )


def test_smebu_quantile_two_steps_by_hand():
    """Distances -+.2495: Delta = .02 tanh(rate .2495 / .02); m = .5 m + .5 Delta."""
    stats, rule = two_experts(), SmebuQuantileRule((1, 2), lr=0.02, rate=0.1, beta=0.5)
    delta = 0.02 * math.tanh(0.1 * 0.2495 / 0.02)
    for momentum in (0.5 * delta, 0.75 * delta):
        torch.testing.assert_close(rule(stats, stats.bias_ME), torch.tensor([[-momentum, momentum]]))


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(4096, 32, 4), (1001, 48, 7), (500, 16, 1), (37, 8, 3)]
)
def test_quantiles_are_exact_within_a_bin(tokens, experts, top_k):
    """The oracle sorts alpha - score and takes the smallest that K/E of the tokens do not exceed (J. Su)."""
    generator = torch.Generator().manual_seed(tokens)
    # correlated experts
    shared_TE = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, experts, generator=generator)
    scores_TE = (shared_TE + 0.5 * torch.randn(tokens, experts, generator=generator)).sigmoid()
    bias_E = 0.3 * torch.randn(experts, generator=generator)
    stats = stats_of(scores_TE[None], bias_E[None], top_k=top_k)
    alpha_T1 = (scores_TE + bias_E).sort(descending=True).values[:, top_k : top_k + 1]
    exact_E = (alpha_T1 - scores_TE).sort(dim=0).values[math.ceil(tokens * top_k / experts) - 1]
    width = (float(bias_E.max() - bias_E.min()) + 2) / NUM_REQUIRED
    assert (stats.required_quantile_ME[0] - exact_E).abs().max() <= width * (1 + 1e-3)


def test_a_busy_expert_at_its_quantile_gets_the_even_share():
    """Only its own bias moved, the tokens routed again: within the tokens of its bin. (A starved expert gets
    closer, but not there: it must beat the K-th score, and alpha is the (K+1)-th.)"""
    generator = torch.Generator().manual_seed(7)
    scores_TE = (torch.randn(20_000, 16, generator=generator) + torch.linspace(-1, 1, 16)).sigmoid()
    stats = stats_of(scores_TE[None], torch.zeros(1, 16), top_k=2)
    busy, even = (stats.load_ME[0] > 1).nonzero().flatten().tolist(), 20_000 * 2 / 16
    assert len(busy) >= 5
    for e in busy:
        bias_E = torch.zeros(16)
        bias_E[e] = stats.required_quantile_ME[0, e]
        in_its_bin = int(stats.required_MEH[0, e, int((bias_E[e] + 1) * (NUM_REQUIRED / 2) - 1e-3)])
        assert 0 < in_its_bin < 0.05 * even
        assert abs(int(((scores_TE + bias_E).topk(2).indices == e).sum()) - even) <= in_its_bin


# -- stability: the rules on a router that answers in proportion, v = -G b ----------------------------------


GAIN, EVEN = 8.0, 2**40  # EVEN: so many tokens per expert that v is not rounded


def plant(bias_ME: torch.Tensor) -> RoutingStats:
    """K = 1, v = -G b. Half of all margins lie below 2^-4 = 1 / (2 G), the upper edge of bin 63: so gain_M
    reads G = 8.

    The quantile target is 0 for each expert: an even share lies in 0's bin, after as many tokens in bin 0 as
    makes the interpolation hit it.
    """
    experts = bias_ME.shape[1]
    counts_ME = (EVEN * (1 + GAIN * bias_ME.double())).round().long()
    margins_MW = torch.zeros(1, NUM_MARGINS).long()
    margins_MW[0, 63] = margins_MW[0, 80] = experts * EVEN // 2
    low, high = bias_ME.amin() - 1, bias_ME.amax() + 1
    place = float((0 - low.double()) / (high - low).double() * NUM_REQUIRED)
    required_MEH = torch.zeros(1, experts, NUM_REQUIRED).long()
    required_MEH[..., 0] = round((1 - place % 1) * EVEN)
    required_MEH[..., int(place)] = EVEN
    return RoutingStats(counts_ME, 1, bias_ME, margins_MW, torch.zeros(1, 1).long(), required_MEH)


def test_the_plant_is_what_it_says():
    bias_ME = torch.tensor([[1e-3, -2e-3, 0.0, 1e-3]])
    stats = plant(bias_ME)
    torch.testing.assert_close(stats.violation_ME, -GAIN * bias_ME)
    assert stats.gain_M.item() == GAIN
    torch.testing.assert_close(stats.required_quantile_ME, torch.zeros(1, 4), atol=1e-7, rtol=0)


BETA, KAPPA = 0.5, 2.0
SMEBU_LIMIT = 2 * (1 + BETA) / (1 - BETA)  # of lambda kappa G
AT_LIMIT = {  # each rule, at `part` of its limit
    "linear": lambda part: LinearRule((1, 4), lr=part * 2 / GAIN),
    "smebu": lambda part: SmebuRule((1, 4), lr=part * SMEBU_LIMIT / (KAPPA * GAIN), beta=BETA, kappa=KAPPA),
    "smebu without momentum": lambda part: SmebuRule(
        (1, 4), lr=part * 2 / (KAPPA * GAIN), beta=0.0, kappa=KAPPA
    ),
    "smebu_gain": lambda part: SmebuGainRule(
        (1, 4), rho=part * SMEBU_LIMIT, beta=BETA, kappa=KAPPA, max_lr=10.0
    ),
    "smebu_quantile": lambda part: SmebuQuantileRule((1, 4), lr=0.02, rate=part * SMEBU_LIMIT, beta=BETA),
}


@pytest.mark.parametrize("name", AT_LIMIT)
@pytest.mark.parametrize("part", [0.9, 1.1])
def test_stability_limits(name, part):
    """A small disturbance dies out just below the limit and grows just above it; stability_M says on which
    side we are.
    """
    rule, bias_ME = AT_LIMIT[name](part), 1e-4 * torch.tensor([[1.0, -2.0, 0.5, 0.5]])
    start = bias_ME.norm()
    for _ in range(60):
        stats = plant(bias_ME)
        bias_ME = bias_ME + rule(stats, bias_ME)
    assert rule.stability_M(stats).item() == pytest.approx(part, rel=1e-5)
    assert bias_ME.norm() < start / 100 if part < 1 else bias_ME.norm() > start * 10


def test_every_stability_is_tested():
    arms = {type(make_rule(name, (1, 4))) for name in RULES}
    assert {rule for rule in arms if hasattr(rule, "stability_M")} == {
        type(make(0.5)) for make in AT_LIMIT.values()
    }


# -- the balancer ---------------------------------------------------------------------------------------


def test_the_biases_of_an_unbalanced_router_converge():
    """Closed loop on fixed scores: SMEBU brings a router with skewed scores near the floor; none leaves
    it.
    """
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
def test_counts_are_exact_beyond_bf16_and_fp32_spacing(tokens):
    """Near 40k bf16 counts in steps of 256, beyond 2^24 fp32 in steps of 2; one token more must still be
    seen.
    """
    layer = Layer(2)
    balance = Balancer([layer], SignRule((1, 2), lr=1.0), steps=1)
    for _ in range(2):  # two microbatches
        layer.tokens_per_expert_E.add_(torch.tensor([tokens, tokens]))
    layer.tokens_per_expert_E.add_(torch.tensor([1, 0]))
    balance.step(1)
    assert layer.expert_bias_E.tolist() == [-1.0, 1.0]


def test_bias_and_momentum_are_float32_and_a_fine_step_is_kept():
    """In bfloat16 a step of 1e-6 would be lost beside a bias of 1."""
    rule = SmebuRule((1, 4), lr=1e-6, beta=0.5, kappa=2.0)
    assert rule.momentum_ME.dtype == torch.float32
    layer = Layer(4)
    layer.expert_bias_E += 1.0  # bf16 would swallow 1e-6 next to 1
    feed(Balancer([layer], rule, steps=1), torch.tensor([[1, 2, 3, 2]]), 1)
    assert layer.expert_bias_E[0] > 1 > layer.expert_bias_E[2]


def test_microbatches_are_summed_before_the_rule():
    """A rule that ran once per microbatch would step several times, each time on a part of the counts."""
    split, whole = (balancer(4, 1, SmebuRule((1, 4), lr=0.1, beta=0.5, kappa=2.0)) for _ in range(2))
    for counts in ([9, 1, 1, 1], [0, 4, 4, 4], [1, 1, 7, 3]):
        split.layers[0].tokens_per_expert_E.add_(torch.tensor(counts))
    split.step(1)
    feed(whole, torch.tensor([[10, 6, 12, 8]]), 1)
    assert torch.equal(split.layers[0].expert_bias_E, whole.layers[0].expert_bias_E)
    assert split.layers[0].routing_sums_S.sum() == 0


def test_a_model_without_experts():
    empty = Balancer([], None, steps=3)
    assert empty.step(1) == {} and empty.verdict().ok


def test_observers_see_the_sums_before_the_biases_move():
    seen = []
    balance = balancer(4, 2, SignRule((2, 4), lr=0.1))
    balance.observers = (
        lambda step, stats: seen.append((step, stats.counts_ME.tolist(), stats.bias_ME.clone())),
    )
    counts = [[[1, 2, 3, 2], [5, 5, 5, 1]], [[4, 4, 4, 4], [0, 0, 1, 3]]]
    biases = [balance.bias_ME]
    for step in (1, 2):
        feed(balance, torch.tensor(counts[step - 1]), step)
        biases.append(balance.bias_ME)
    assert [(step, n) for step, n, _ in seen] == [(1, counts[0]), (2, counts[1])]
    assert all(torch.equal(bias, before) for (_, _, bias), before in zip(seen, biases[:-1], strict=True))


def test_the_verdict_counts_the_last_tenth_of_the_steps_only():
    balance = balancer(4, 1, steps=200)
    for step in range(1, 201):  # the tail are the last 20 steps; expert 3 is starved there only
        feed(balance, torch.tensor([[100, 100, 100, 1]] if step > 180 else [[1, 1, 1, 500]]), step)
    verdict = balance.verdict()
    assert verdict.collapsed == [(0, 3)] and not verdict.ok and verdict.num_experts == 4
    assert (verdict.num_steps, verdict.num_tokens) == (20, 20 * 75.25)
    assert verdict.max_violation == pytest.approx(100 / 75.25 - 1)
    assert str(verdict).startswith("balance: FAILED, 1 of 4 experts collapsed, MaxVio 0.33 (floor ")


def tail_of(counts: list[int], *, steps: int = 15) -> Verdict:
    """The verdict on a run whose tail has so many steps, each with these counts."""
    balance = balancer(len(counts), 1, steps=10 * steps)
    for step in range(9 * steps + 1, 10 * steps + 1):
        feed(balance, torch.tensor([counts]), step)
    return balance.verdict()


@pytest.mark.parametrize(("starved", "ok"), [(9, False), (10, True)])
def test_the_limit_of_collapse_is_a_tenth_of_the_even_share(starved, ok):
    verdict = tail_of([starved] + [100] * 8 + [200 - starved])  # mean 100 tokens
    assert verdict.ok is ok
    assert ("ok, 0 of 10" in str(verdict)) is ok


def test_the_tokens_that_a_verdict_needs_by_the_distribution_itself():
    """Under a tenth of the even share, by chance: clusters of 30 tokens are Poisson with mean n / 30. The
    bound that the number comes from holds, and a third of the number would not be enough."""

    def chance(num_tokens: float) -> float:
        mean, limit = num_tokens / 30, 0.1 * num_tokens / 30
        return sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(math.ceil(limit)))

    assert LEAST_TOKENS == 619  # 30 ln(10^6) / (0.9 + 0.1 ln 0.1) = 618.8
    assert chance(LEAST_TOKENS) < 1e-6 < chance(LEAST_TOKENS / 3)


@pytest.mark.parametrize(
    ("steps", "mean", "is_known"), [(15, 42, True), (15, 41, False), (14, 1000, False), (1, 10**6, False)]
)
def test_a_short_tail_is_not_judged(steps, mean, is_known):
    """15 steps of 42 tokens per expert are 630, of 41 they are 615; 619 and 15 steps are needed."""
    verdict = tail_of([0, mean, 2 * mean], steps=steps)
    assert verdict.starved == [(0, 0)] and verdict.is_known is is_known
    assert verdict.ok is not is_known and len(verdict.collapsed) == is_known
    assert is_known or str(verdict) == (
        f"balance: too short to judge ({steps * mean:,} tokens per expert in the last {steps} steps; "
        "619 in 15 steps are needed)"
    )


def test_a_run_whose_tail_was_not_applied_is_not_judged():
    assert str(balancer(4, 2, steps=100).verdict()) == (
        "balance: too short to judge (0 tokens per expert in the last 0 steps; 619 in 15 steps are needed)"
    )
