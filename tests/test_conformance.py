"""What must hold for every arm of configs/balance/, a new one included? Nobody can tell how the tokens came,
for one.

The oracle is one process that is given each step's tokens at once. Compared bit for bit: the biases after
every step, the rule's memory, the loads, the metrics. The gradients of the balance losses are sums of floats:
within 1e-5.
"""

import inspect
import math
import re
from functools import cache

import pytest
import torch
import torch.distributed as dist
from hydra.utils import get_class
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.arms import (
    ARMS,
    DIM,
    RULES,
    GatedLayer,
    Lab,
    arm_config,
    batch,
    make_lab,
    make_rule,
    stats_of,
    times,
    train,
)
from tests.ranks import run_ranks
from trainer import train as program
from trainer.balance import Balancer, LossWeights, RoutingStats
from trainer.balance.stats import NUM_MARGINS, NUM_REQUIRED
from trainer.config import load

STEPS = range(1, 7)
LOSSES = LossWeights(sequence=0.3, batch=0.2, z=0.1)  # `switch` sees microbatches, by definition
all_arms, all_rules = pytest.mark.parametrize("name", ARMS), pytest.mark.parametrize("name", RULES)


# -- however the tokens come ----------------------------------------------------------------------------


@cache
def oracle(name: str) -> Lab:
    return make_lab(name, loss_weights=LOSSES).run(train, STEPS)


def outcome(lab: Lab) -> dict:
    return {
        "biases": lab.biases,
        "metrics": lab.metrics,
        "gradients": lab.gradients,
        "state": lab.balancer.state_dict(),
    }


def assert_same(got: dict, expected: dict) -> None:
    assert got["metrics"] == expected["metrics"] and len(got["biases"]) == len(expected["biases"]) == len(
        STEPS
    )
    assert all(torch.equal(a, b) for a, b in zip(got["biases"], expected["biases"], strict=True))
    assert got["state"].keys() == expected["state"].keys()
    assert all(torch.equal(tensor, expected["state"][key]) for key, tensor in got["state"].items())
    for a, b in zip(got["gradients"], expected["gradients"], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@all_arms
def test_the_oracle_is_not_trivial(name):
    """Every token is counted, in every layer; the biases move and the routing answers, unless there is no
    rule.
    """
    lab, still = oracle(name), make_lab("none").run(train, STEPS)
    per_step = 8 * 32 * 2  # K = 2
    # the tail of six steps is the last one
    assert lab.balancer.tail_counts_ME.sum(1).tolist() == [per_step] * 2
    assert all(gradient.abs().sum() > 0 for gradient in lab.gradients)
    moved = [bias_ME.abs().amax(1).min() > 0 for bias_ME in lab.biases]
    assert moved == [name != "none"] * len(STEPS)
    assert torch.equal(lab.balancer.tail_counts_ME, still.balancer.tail_counts_ME) == (name == "none")


@all_arms
def test_activation_checkpointing_counts_once(name):
    """The recomputed forward pass would count the same tokens a second time."""
    for use_reentrant in (False, True):

        def recomputed(lab: Lab, x_BLD: Tensor, use_reentrant: bool = use_reentrant) -> None:
            for layer in lab.layers:
                gates_BLK = checkpoint(layer, x_BLD.clone().requires_grad_(), use_reentrant=use_reentrant)
                gates_BLK.square().sum().backward()

        assert_same(
            outcome(make_lab(name, loss_weights=LOSSES).run(recomputed, STEPS)), outcome(oracle(name))
        )


@all_arms
def test_microbatches_are_one_step(name):
    """A rule that ran once per microbatch would depend on how the batch is split."""

    def split(lab: Lab, x_BLD: Tensor) -> None:
        for part_BLD in x_BLD.split([1, 4, 3]):
            train(lab, part_BLD)

    assert_same(outcome(make_lab(name, loss_weights=LOSSES).run(split, STEPS)), outcome(oracle(name)))


@all_arms
def test_evaluation_changes_no_state(name):
    """Without a backward pass, with and without autograd, before and after the tokens that train."""

    def evaluate(lab: Lab, x_BLD: Tensor) -> None:
        state = [tensor.clone() for layer in lab.layers for tensor in layer.buffers()]
        for layer in lab.layers:
            layer(2 * x_BLD)
            with torch.no_grad():
                layer(3 * x_BLD)
        assert all(map(torch.equal, state, (tensor for layer in lab.layers for tensor in layer.buffers())))

    def between(lab: Lab, x_BLD: Tensor) -> None:
        evaluate(lab, x_BLD)
        train(lab, x_BLD)
        evaluate(lab, x_BLD)

    assert_same(outcome(make_lab(name, loss_weights=LOSSES).run(between, STEPS)), outcome(oracle(name)))


@all_arms
def test_padding_is_not_there(name):
    """Three tokens of padding before each sequence, four after it, and a whole sequence of it; whatever they
    hold.
    """

    def padded(lab: Lab, x_BLD: Tensor) -> None:
        filled_BLD, valid_BL = 5 * torch.ones(9, 39, DIM), torch.zeros(9, 39, dtype=torch.bool)
        filled_BLD[:8, 3:-4], valid_BL[:8, 3:-4] = x_BLD, True
        train(lab, filled_BLD, valid_BL)

    assert_same(outcome(make_lab(name, loss_weights=LOSSES).run(padded, STEPS)), outcome(oracle(name)))


# sequences of a rank, by step
SHARES = [[2, 2, 2, 2], [1, 3, 0, 4], [0, 0, 8, 0], [5, 1, 1, 1], [3, 3, 1, 1], [0, 2, 0, 6]]


def ranks_worker() -> dict:
    """Everything that needs ranks, at once: they are expensive to start."""
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone, pairs = (
        dist.group.WORLD,
        [dist.new_group(ranks) for ranks in ([[0, 1], [2, 3]] if world == 4 else [])],
    )

    def share(lab: Lab, x_BLD: Tensor) -> None:
        sizes = SHARES[len(lab.metrics)] if world == 4 else [8]
        if sizes[rank]:  # a rank without tokens does not even call its layers
            train(lab, x_BLD.split(sizes)[rank])

    result = {}
    for name in ARMS:
        lab = make_lab(name, loss_weights=LOSSES, group=everyone).run(share, STEPS)
        for gradient in lab.gradients:  # as the data-parallel sum
            dist.all_reduce(gradient)
        result[name] = outcome(lab)
    if world == 4:
        result["opposite"] = opposite_loads(rank)
        result["one token more"] = [one_token_more(rank, tokens) for tokens in (40_840, 2**25)]
        result["stage"] = {name: outcome(pipeline_stage(name, pairs, rank)) for name in ARMS}
    return result


def opposite_loads(rank: int) -> tuple[list[float], float]:
    """Every rank uses another expert only; over all ranks they are even."""
    layer = GatedLayer(4, 1)
    balancer = Balancer([layer], make_rule("sign", (1, 4)), steps=1, group=dist.group.WORLD)
    layer.counts_E[rank] = 100
    metrics = balancer.step(1)
    return layer.expert_bias_E.tolist(), metrics["balance/max_violation"]


def one_token_more(rank: int, tokens: int) -> list[float]:
    """Every rank has `tokens` for each expert, the last rank one more for expert 0."""
    layer = GatedLayer(2, 1)
    balancer = Balancer([layer], make_rule("sign", (1, 2), lr=1.0), steps=1, group=dist.group.WORLD)
    layer.counts_E.add_(tokens)
    layer.counts_E[0] += rank == 3
    balancer.step(1)
    return layer.expert_bias_E.tolist()


def pipeline_stage(name: str, pairs: list, rank: int) -> Lab:
    """Ranks 0 and 1 hold the MoE layers and half of the tokens each, ranks 2 and 3 hold layers without
    experts.
    """
    has_experts, group = rank < 2, pairs[rank // 2]
    lab = (
        make_lab(name, loss_weights=LOSSES, group=group)
        if has_experts
        else Lab([], Balancer([], None, steps=6, group=group))
    )
    if not has_experts:
        lab.metrics = [lab.balancer.step(step) for step in STEPS]
        return lab
    lab.run(lambda lab, x_BLD: train(lab, x_BLD.split(4)[rank]), STEPS)
    for gradient in lab.gradients:
        dist.all_reduce(gradient, group=group)
    return lab


@pytest.fixture(scope="module")
def on_four_ranks() -> list[dict]:
    return run_ranks(ranks_worker, 4)


@pytest.fixture(scope="module")
def on_one_rank() -> list[dict]:
    return run_ranks(ranks_worker, 1)


@all_arms
def test_one_rank_with_a_process_group(on_one_rank, name):
    assert_same(on_one_rank[0][name], outcome(oracle(name)))


@all_arms
def test_four_ranks_with_different_and_with_no_tokens(on_four_ranks, name):
    """And with them the batch loss: its loads are those of all ranks, so its gradients add up to the
    oracle's.
    """
    for result in on_four_ranks:
        assert_same(result[name], outcome(oracle(name)))


def test_the_rule_sees_the_sum_of_all_ranks(on_four_ranks):
    """Applied per rank, sign would have pushed each rank's own expert down."""
    for bias, _ in (result["opposite"] for result in on_four_ranks):
        assert bias == [0.0] * 4


def test_counts_are_exact_over_ranks(on_four_ranks):
    """Near 163,360 bfloat16 counts in steps of 1,024, at 2^27 float32 in steps of 16."""
    assert [result["one token more"] for result in on_four_ranks] == [[[-1.0, 1.0]] * 2] * 4


def test_max_violation_is_of_all_ranks_and_of_the_busiest_expert(on_four_ranks):
    """By hand: 3.0 on every rank alone, 0 over all. And (9, 1, 1, 1): 9 / 3 - 1, with the busiest, not
    without it.
    """
    assert [violation for _, violation in (result["opposite"] for result in on_four_ranks)] == [0.0] * 4
    layer = GatedLayer(4, 1)
    layer.counts_E.add_(torch.tensor([9, 1, 1, 1]))
    assert Balancer([layer], None, steps=1).step(1)["balance/max_violation"] == 2.0


@all_arms
def test_ranks_without_moe_layers_take_no_part(on_four_ranks, name):
    """A rank without MoE layers must neither wait in an all-reduce nor change the sums of the others."""
    for rank, result in enumerate(on_four_ranks):
        if rank < 2:
            assert_same(result["stage"][name], outcome(oracle(name)))
        else:
            assert result["stage"][name]["metrics"] == [{}] * len(STEPS)


# -- layers ---------------------------------------------------------------------------------------------


@all_arms
def test_every_layer_is_its_own(name):
    """Three layers together do what each does alone: none is skipped, none is another's."""
    together = make_lab(name, layers=3).run(train, STEPS)
    for m, layer in enumerate(together.layers):
        twin = GatedLayer(16, 2, seed=m)
        alone = Lab([twin], Balancer([twin], make_rule(name, (1, 16)), steps=6)).run(train, STEPS)
        assert all(torch.equal(a[m], b[0]) for a, b in zip(together.biases, alone.biases, strict=True))
        assert torch.equal(layer.load_E, twin.load_E)


@all_arms
def test_a_layer_without_tokens(name):
    """Its biases stay while it has never seen one, later they stay finite and zero-mean; the other layer does
    not notice.
    """
    lab = make_lab(name)

    def first_only(lab: Lab, x_BLD: Tensor) -> None:
        lab.layers[0](x_BLD).sum().backward()

    lab.run(first_only, STEPS[:2])
    assert torch.equal(lab.layers[1].expert_bias_E, torch.zeros(16)) and torch.equal(
        lab.layers[1].load_E, torch.zeros(16)
    )
    lab.run(train, STEPS[2:4]).run(first_only, STEPS[4:])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(lab.biases, oracle(name).biases, strict=True))
    assert all(map(math.isfinite, (value for metrics in lab.metrics for value in metrics.values())))
    assert lab.biases[-1].mean(-1).abs().max() < 1e-6


@all_arms
def test_experts_without_tokens(name):
    """A bias of -10 beats any score: the expert gets no token, and every rule raises it."""
    lab = make_lab(name, layers=1)
    lab.layers[0].expert_bias_E[[3, 5]] = -10.0
    lab.run(train, STEPS)
    assert (lab.loads[0][0, [3, 5]] == 0).all()
    assert all(map(math.isfinite, (value for metrics in lab.metrics for value in metrics.values())))
    risen_E = lab.biases[-1][0] - torch.zeros(16).index_fill(0, torch.tensor([3, 5]), -10.0)
    assert (risen_E[[3, 5]] > 0).all() == (name != "none") and risen_E.isfinite().all()


@all_arms
@pytest.mark.parametrize(("experts", "top_k"), [(4, 4), (1, 1), (4, 1), (5, 4)])
def test_the_smallest_and_the_widest_choice(name, experts, top_k):
    """K = E and E = 1: nothing to choose, so nothing moves. K = 1 and K = E - 1 move, and everything stays
    finite.
    """
    lab = make_lab(name, experts=experts, top_k=top_k, loss_weights=LOSSES).run(train, STEPS)
    assert all(map(math.isfinite, (value for metrics in lab.metrics for value in metrics.values())))
    assert all(gradient.isfinite().all() for gradient in lab.gradients)
    assert (lab.biases[-1] != 0).any() == (name != "none" and top_k < experts)
    assert lab.biases[-1].mean(-1).abs().max() < 1e-6


# -- memory ---------------------------------------------------------------------------------------------


@all_arms
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_is_the_same_run_bit_for_bit(name, stop):
    """From the balancer's state dict and the biases: memory, loads (the gradient of the batch loss) and the
    verdict's tail.
    """
    whole, first, second = (make_lab(name, loss_weights=LOSSES) for _ in range(3))
    whole.run(train, STEPS)
    first.run(train, STEPS[:stop])
    second.metrics = list(first.metrics)
    second.balancer.load_state_dict(
        {key: tensor.clone() for key, tensor in first.balancer.state_dict().items()}
    )
    for theirs, ours in zip(second.layers, first.layers, strict=True):
        theirs.load_state_dict({key: tensor.clone() for key, tensor in ours.state_dict().items()})
    second.run(train, STEPS[stop:])
    assert second.metrics == whole.metrics and second.balancer.verdict() == whole.balancer.verdict()
    for got, expected in ((second.biases, whole.biases), (second.gradients, whole.gradients)):
        assert all(map(torch.equal, got, expected[stop:]))
    state = whole.balancer.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in second.balancer.state_dict().items())


@all_rules
def test_biases_and_memory_are_float32_even_where_bfloat16_is_the_default(name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        lab = make_lab(name)
    finally:
        torch.set_default_dtype(before)
    tensors = {**lab.layers[0].state_dict(), **lab.balancer.state_dict()}
    assert [key for key, tensor in tensors.items() if tensor.dtype == torch.bfloat16] == [
        "router.gate.weight"
    ]


def bfloat16_worker(rules: list[str]) -> dict[str, set[torch.dtype]]:
    """Of biases, loads and memory of a model that trains in bfloat16."""
    found = {}
    for name in rules:
        overrides = [
            f"balance={name}",
            "model=debug",
            "dtype=bfloat16",
            "data=synthetic",
            "data.source.num_topics=8",
            "steps=1",
            "seq_len=32",
            "global_batch=2",
            "micro_batch=2",
            "stage.warmup.share=0",
            "name=low",
        ]
        run = program.build(load(overrides))
        program.train_step(run, run.stream.next_step(2))
        tensors = [
            *(layer.expert_bias_E for layer in run.balancer.layers),
            *run.balancer.state_dict().values(),
        ]
        found[name] = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return found


def test_training_in_bfloat16_leaves_biases_and_memory_in_float32():
    """Casting the model would cast its buffers with it, and fine steps would be lost."""
    (found,) = run_ranks(bfloat16_worker, 1, ["smebu", "smebu_gain"])
    assert found["smebu"] == found["smebu_gain"] == {torch.float32, torch.float64}


@all_rules
def test_nothing_that_is_not_finite_reaches_a_bias(name):
    """Of the router: tokens whose logits are nan, infinite or huge."""
    lab = make_lab(name)
    for step, value in enumerate([math.nan, math.inf, -math.inf, 1e30, -1e30], start=1):
        x_BLD = batch(step)
        x_BLD[0, :4], x_BLD[3, 7] = value, value
        lab.step(train, x_BLD)
        assert lab.balancer.bias_ME.isfinite().all()
        assert all(tensor.isfinite().all() for tensor in lab.balancer.state_dict().values())
        assert all(map(math.isfinite, lab.metrics[-1].values()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_rule_that_gives_what_is_not_finite_is_stopped(value):
    class Broken(nn.Module):
        def forward(self, stats: RoutingStats, bias_ME: Tensor) -> Tensor:
            step_ME = torch.zeros_like(bias_ME)
            step_ME[1, 5] = value
            return step_ME

    lab = make_lab("none")
    lab.balancer.rule = Broken()
    with pytest.raises(FloatingPointError, match="step 1: .*Broken.*MoE layer 1.*biases were not touched"):
        lab.run(train, STEPS[:1])
    assert torch.equal(lab.balancer.bias_ME, torch.zeros(2, 16))


# -- one step -------------------------------------------------------------------------------------------


def routed(layers: int = 3, experts: int = 16, top_k: int = 2, tokens: int = 1000) -> RoutingStats:
    """Scores of which higher experts have the higher ones, biases that are not zero."""
    generator = torch.Generator().manual_seed(5)
    logits_MTE = torch.randn(layers, tokens, experts, generator=generator) + torch.linspace(-1, 1, experts)
    bias_ME = 0.05 * torch.randn(layers, experts, generator=generator)
    return stats_of(logits_MTE.sigmoid(), bias_ME - bias_ME.mean(-1, keepdim=True), top_k=top_k)


@all_rules
def test_updates_have_zero_mean(name):
    """Every step, with memory: within float32 of the largest step."""
    stats, rule = routed(), make_rule(name, (3, 16))
    for _ in range(5):
        step_ME = rule(stats, stats.bias_ME)
        assert step_ME.shape == (3, 16) and step_ME.dtype == torch.float32
        assert (step_ME.mean(-1).abs() < 1e-6 * step_ME.abs().amax(-1)).all()


@all_rules
def test_the_step_does_not_depend_on_the_batch_size(name):
    """Bit for bit, and up to counts that neither float32 (2^24) nor bfloat16 (256) can hold."""
    stats = routed()
    once, rules = [], [make_rule(name, (3, 16)) for _ in range(3)]
    for rule, factor in zip(rules, (1, 2, 2**20), strict=True):
        larger = times(stats, factor)
        once.append(torch.stack([rule(larger, stats.bias_ME) for _ in range(3)]))
    assert torch.equal(once[0], once[1]) and torch.equal(once[0], once[2])


@all_rules
def test_experts_have_no_order(name):
    """Permuted experts are given permuted steps."""
    stats = routed()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    permuted = RoutingStats(
        stats.counts_ME[:, order],
        2,
        stats.bias_ME[:, order],
        stats.margins_MW,
        stats.logits_M1,
        stats.required_MEH[:, order],
    )
    step_ME = make_rule(name, (3, 16))(stats, stats.bias_ME)
    got_ME = make_rule(name, (3, 16))(permuted, permuted.bias_ME)
    torch.testing.assert_close(got_ME, step_ME[:, order], rtol=1e-5, atol=1e-6 * float(step_ME.abs().max()))


@all_rules
def test_the_starved_expert_rises_and_the_busy_one_falls(name):
    stats, rule = routed(), make_rule(name, (3, 16))
    least, most = stats.counts_ME.argmin(-1, keepdim=True), stats.counts_ME.argmax(-1, keepdim=True)
    for _ in range(3):
        step_ME = rule(stats, stats.bias_ME)
        assert (step_ME.gather(1, least) > 0).all() and (step_ME.gather(1, most) < 0).all()


@all_rules
def test_rest_at_exact_balance(name):
    """K = 1, 2,000 tokens for each expert, though their scores differ: no rule that reads counts moves.

    A rule that asks for quantiles moves by less than a bin, and by how far the closest token is from leaving
    its expert.
    """
    logits_TE = torch.randn(60_000, 8, generator=torch.Generator().manual_seed(3)) + torch.linspace(
        -0.3, 0.3, 8
    )
    bias_E = torch.linspace(0.1, -0.1, 8)
    scores_TE = logits_TE.sigmoid()
    chosen_T = (scores_TE + bias_E).argmax(-1)
    first = torch.cat([(chosen_T == e).nonzero().flatten()[:2000] for e in range(8)])
    stats, rule = stats_of(scores_TE[first][None], bias_E[None], top_k=1), make_rule(name, (1, 8))
    assert stats.counts_ME.tolist() == [[2000] * 8]
    step_ME = rule(stats, bias_E[None])
    if getattr(rule, "needs_required", False):
        two_TE = (scores_TE[first] + bias_E).topk(2).values
        closest = max(
            float((two_TE[chosen_T[first] == e, 0] - two_TE[chosen_T[first] == e, 1]).min()) for e in range(8)
        )
        width = (2 + 0.2) / NUM_REQUIRED
        assert closest < width and step_ME.abs().max() <= closest + width
    else:
        assert torch.equal(step_ME, torch.zeros(1, 8))


@all_rules
@pytest.mark.parametrize("tokens", [40_840, 2**25])
def test_one_token_more_is_seen(name, tokens):
    """Near 40,840 bfloat16 counts in steps of 256, beyond 2^24 float32 in steps of 2. One token goes to
    expert 0, not 1.

    Histograms of quantile rules: `tokens` of required biases in bin 400, the even share, the others in bin
    600. Expert 0 has one more in bin 400, expert 1 one less: its quantile is in bin 600.
    """
    counts_ME = torch.tensor([[tokens + 1, tokens - 1, tokens, tokens]])
    margins_MW, required_MEH = torch.zeros(1, NUM_MARGINS).long(), torch.zeros(1, 4, NUM_REQUIRED).long()
    margins_MW[0, 70] = 4 * tokens
    required_MEH[..., 400], required_MEH[..., 600] = counts_ME, 4 * tokens - counts_ME
    stats = RoutingStats(counts_ME, 1, torch.zeros(1, 4), margins_MW, torch.zeros(1, 1).long(), required_MEH)
    rule = make_rule(name, (1, 4))
    step = rule(stats, torch.zeros(1, 4))[0].tolist()
    assert step[1] > step[2] == step[3]
    if not getattr(rule, "needs_required", False):
        assert step[3] > step[0]


def settings(name: str) -> list[str]:
    parameters = inspect.signature(get_class(arm_config(name)._target_)).parameters
    return [key for key in parameters if key != "shape_ME"]


SHARES_BELOW_ONE, MAY_BE_ZERO = {"beta", "ema", "memory"}, {"kp", "kd", "beta", "ema", "memory"}
WRONG = [
    (name, key, value)
    for name in RULES
    for key in settings(name)
    for value in (
        math.nan,
        math.inf,
        -1.0,
        *([1.0] if key in SHARES_BELOW_ONE else []),
        *([] if key in MAY_BE_ZERO else [0.0]),
    )
]


@pytest.mark.parametrize(("name", "key", "value"), WRONG)
def test_wrong_settings_are_refused_with_their_name_and_value(name, key, value):
    with pytest.raises(Exception) as error:
        make_rule(name, (1, 4), **{key: value})
    refusal = error.value.__cause__ or error.value
    assert isinstance(refusal, ValueError) and re.search(rf"\b{re.escape(f'{key}={value}')}", str(refusal)), (
        refusal
    )


@all_arms
def test_every_loss_goes_with_every_rule(name):
    """All four at once: they do not touch the counts, and their gradient is there in every step."""
    weights = LossWeights(sequence=0.3, switch=0.1, batch=0.2, z=0.1)
    with_losses, without = (
        make_lab(name, loss_weights=weights).run(train, STEPS),
        make_lab(name).run(train, STEPS),
    )
    assert (
        all(map(torch.equal, with_losses.biases, without.biases)) and with_losses.metrics == without.metrics
    )
    for a, b in zip(with_losses.gradients, without.gradients, strict=True):
        assert a.isfinite().all() and (a - b).flatten(1).norm(dim=1).min() > 1e-3
