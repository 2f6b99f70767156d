"""The simulator's logits are a pure function of (step, layer) and follow the laws that their configs promise.

Statistical limits are five standard errors of the sample, each written out.
"""

import inspect
import math
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from trainer.config import CONFIG_DIR
from trainer.lab.simulate.scores import TopicScores

SCENARIOS = ["batch_change", "correlated", "documents", "drift", "shift", "shrinking_spread", "topics"]
RUN = {"num_layers": 2, "num_experts": 32, "top_k": 4, "tokens": 96, "steps": 10, "seed": 0}
CALLS = [(step, layer) for step in range(1, 11) for layer in range(2)]


@cache
def config(name: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        return compose(f"scores/{name}").scores


def scenario(name: str, **changes) -> TopicScores:
    return instantiate(config(name))(**RUN | changes)


def topic_counts_C(scores: TopicScores, step: int) -> Tensor:
    """Tokens of each topic, read from logits without noise and popularity: every row must be one topic's,
    exactly.
    """
    same_TC = (scores(step, 0)[:, None] == scores.mean + scores.topics_MCE[0]).all(-1)
    assert (same_TC.sum(1) == 1).all()
    return same_TC.sum(0)


def chi_square(counts_C: Tensor, shares: list[float]) -> float:
    """Of 4 topics in the tests below: 3 degrees of freedom, above 21.1 by chance once in 10,000."""
    expected_C = torch.tensor(shares) * counts_C.sum()
    return float(((counts_C - expected_C).square() / expected_C).sum())


def shares_by_hand(*weights: float) -> list[float]:
    return [weight / sum(weights) for weight in weights]


ZIPF_4 = shares_by_hand(1, 1 / 2, 1 / 3, 1 / 4)
FOUR_TOPICS = {
    "num_topics": 4,
    "num_experts": 4,
    "tokens": 100_000,
    "popularity_std": 0,
    "noise_std": 0,
    "min_document": None,
}


def test_every_scenario_is_tested() -> None:
    assert sorted(path.stem for path in (CONFIG_DIR / "scores").glob("*.yaml")) == SCENARIOS


def test_topics_yaml_holds_every_option_at_its_default() -> None:
    parameters = inspect.signature(TopicScores).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert {k: v for k, v in config("topics").items() if not k.startswith("_")} == defaults


@pytest.mark.parametrize("name", SCENARIOS)
class TestEveryScenario:
    def test_any_order_gives_the_same_bits(self, name: str) -> None:
        """Backwards, repeated, from another instance, and for a caller that overwrites what it got."""
        first, second = scenario(name), scenario(name)
        forward = {call: first(*call).clone() for call in CALLS}
        for call in CALLS[::-1] + CALLS[::3]:
            logits_TE = second(*call)
            assert torch.equal(logits_TE, forward[call])
            logits_TE.fill_(math.nan)

    def test_global_generator_is_not_touched(self, name: str) -> None:
        torch.manual_seed(3)
        before, logits_TE = torch.get_rng_state(), scenario(name)(1, 0).clone()
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(4)
        assert torch.equal(scenario(name)(1, 0), logits_TE)

    def test_shape_and_type(self, name: str) -> None:
        scores = scenario(name)
        for step, layer in CALLS:
            logits_TE = scores(step, layer)
            assert logits_TE.shape == (scores.tokens_at(step), 32) and logits_TE.dtype == torch.float32

    def test_noise_of_steps_layers_and_seeds_is_uncorrelated(self, name: str) -> None:
        noise = {"popularity_std": 0, "topic_std": 0, "rank": None}
        a, b = scenario(name, **noise), scenario(name, **noise, seed=1)
        draws = [
            scores(*call).flatten().clone()
            for scores, call in [(a, (1, 0)), (a, (1, 1)), (a, (2, 0)), (b, (1, 0))]
        ]
        correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
        assert correlation.abs().max() < 5 / math.sqrt(96 * 32)

    def test_popularity_of_layers_and_seeds_is_uncorrelated_and_that_of_the_next_step_alike(
        self, name: str
    ) -> None:
        size = {"num_experts": 4096, "tokens": 1, "topic_std": 0, "noise_std": 0, "rank": None, "steps": 1000}
        a, b = scenario(name, **size), scenario(name, **size, seed=1)
        draws = [
            scores(*call).flatten().clone()
            for scores, call in [(a, (1, 0)), (a, (1, 1)), (b, (1, 0)), (a, (2, 0))]
        ]
        correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
        assert correlation[:3, :3].abs().max() < 5 / math.sqrt(4096)
        assert correlation[0, 3] > 0.9999

    def test_needs_balancing(self, name: str) -> None:
        """Plain top-k sends an expert at least four times its share (asked of the default scenario; here of
        all).
        """
        scores = scenario(name, num_experts=64, tokens=4096)
        for step, layer in [(1, 0), (1, 1), (10, 0), (10, 1)]:
            counts_E = torch.bincount(scores(step, layer).topk(4).indices.flatten(), minlength=64).double()
            assert counts_E.max() > 4 * counts_E.mean()


def test_no_two_calls_share_a_generator() -> None:
    """7 layers, 1,000 steps and the layers' own draws; torch seeds its generator with 32 bits."""
    scores = scenario("topics", num_layers=7, steps=1000)
    seeds = [scores._generator(step, layer).initial_seed() for step in range(1001) for layer in range(7)]
    assert len(set(seeds)) == 7007 and max(seeds) < 2**32
    one = scenario("topics", num_layers=1)
    # the multiplier is odd
    assert one._generator(2**31, 0).initial_seed() != one._generator(0, 0).initial_seed()


def test_spreads_are_those_asked_for() -> None:
    """Standard error of a standard deviation s of n normal numbers: s / sqrt(2 n)."""
    for name, n in [("noise_std", 96 * 4096), ("popularity_std", 4096), ("topic_std", 4096)]:
        others = {"noise_std": 0, "popularity_std": 0, "topic_std": 0} | {name: 0.5}
        logits_TE = scenario("topics", num_experts=4096, num_topics=1, mean=-2, **others)(1, 0).double()
        assert abs(logits_TE.mean() + 2) < 5 * 0.5 / math.sqrt(n)
        assert abs(logits_TE.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * n)


@pytest.mark.parametrize(
    ("zipf", "shares"), [(1.0, ZIPF_4), (2.0, shares_by_hand(1, 1 / 4, 1 / 9, 1 / 16)), (0.0, [0.25] * 4)]
)
def test_topics_follow_zipfs_law(zipf: float, shares: list[float]) -> None:
    assert chi_square(topic_counts_C(scenario("topics", **FOUR_TOPICS, zipf=zipf), step=1), shares) < 21.1


def test_tokens_of_topics_are_independent() -> None:
    """Neighbours share a topic as often as two draws do: sum of p^2."""
    scores = scenario("topics", **FOUR_TOPICS)
    logits_TE, p = scores(1, 0), sum(share**2 for share in ZIPF_4)
    alike = (logits_TE[1:] == logits_TE[:-1]).all(-1).double().mean()
    # every second pair is independent of the others
    assert abs(alike - p) < 5 * math.sqrt(p * (1 - p) / 50_000)


def documents(scores: TopicScores, step: int = 1) -> Tensor:
    """Lengths of runs of equal rows. With 100,000 equally likely topics and no noise, a run is a document."""
    logits_TE = scores(step, 0)
    new_T = torch.ones(len(logits_TE) + 1, dtype=torch.bool)  # the first row and the one past the end
    new_T[1:-1] = (logits_TE[1:] != logits_TE[:-1]).any(-1)
    return new_T.nonzero().flatten().diff()


MANY_TOPICS = {"num_experts": 2, "top_k": 1, "num_topics": 100_000, "zipf": 0, "noise_std": 0}


def test_documents_have_pareto_lengths_and_fill_the_step() -> None:
    lengths = documents(scenario("documents", **MANY_TOPICS, tokens=300_000))
    whole = lengths[:-1]  # the last one is cut by the end of the step
    assert lengths.sum() == 300_000 and whole.min() >= 20
    for x in (21, 40, 100):  # P(length >= x) = (min_document / x) ** tail
        p = (20 / x) ** 2.5
        assert abs((whole >= x).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / len(whole))


def test_topics_of_documents_follow_zipfs_law_and_not_the_lengths() -> None:
    """A token finds itself in a document of E[l^2] / E[l] = 60 tokens, so T tokens tell as much as T / 60
    draws.
    """
    counts_C = topic_counts_C(scenario("documents", **FOUR_TOPICS | {"min_document": 20}), step=1)
    for count, share in zip(counts_C.tolist(), ZIPF_4, strict=True):
        assert abs(count / 100_000 - share) < 5 * math.sqrt(share * (1 - share) * 60 / 100_000)


def test_a_document_ends_with_the_step() -> None:
    assert documents(scenario("documents", **MANY_TOPICS, min_document=500, tokens=96)).tolist() == [96]
    # two in three are beyond int64
    endless = scenario("documents", **MANY_TOPICS, min_document=96, document_tail=0.01)
    assert all(documents(endless, step).tolist() == [96] for step in range(1, 11))
    # none reaches 4: 0.75^100
    alike = scenario("documents", **MANY_TOPICS, min_document=3, document_tail=100, tokens=95)
    assert documents(alike).tolist() == [3] * 31 + [2]


def test_router_of_low_rank() -> None:
    """Full rank: as many directions as experts. Rank 5: five, popularity and topics included."""
    for rank, directions in [(None, 32), (5, 5)]:
        logits_TE = scenario("correlated", rank=rank)(1, 1).double()
        assert torch.linalg.matrix_rank(logits_TE + 1, rtol=1e-5) == directions


def test_router_of_low_rank_keeps_the_spreads_and_the_common_direction() -> None:
    """Mean square of x_TR @ gate_RE with R = 16: relative variance about 2 / (R T) + 2 / (R E), half that for
    its root.
    """
    size = {"num_experts": 2048, "tokens": 2000, "topic_std": 0}
    noise_TE = scenario("correlated", **size, popularity_std=0)(1, 0).double() + 1
    assert (
        abs(noise_TE.square().mean().sqrt() / 0.8 - 1) < 5 * math.sqrt(2 / (16 * 2000) + 2 / (16 * 2048)) / 2
    )
    scores = scenario("correlated", **size)
    mean_E = scores(1, 0).mean(0) + 1
    assert abs(mean_E.std() / 0.8 - 1) < 5 * math.sqrt(1 / (2 * 16))  # 16 numbers decide it
    gate_norm_E = scores.gate_MRE[0].norm(dim=0)
    assert ((mean_E - scores.popularity_at(1, 0)).abs() < 6 * 0.8 * gate_norm_E / math.sqrt(2000)).all()


@pytest.mark.parametrize(
    ("change_at", "steps", "shift_step"), [(0.5, 10, 6), (0.1, 10, 2), (0.9, 10, 10), (0.25, 100, 26)]
)
def test_shift_begins_exactly_at_its_step(change_at: float, steps: int, shift_step: int) -> None:
    """Before it the bits are those of `topics`; from it on a quarter of the experts differ, the others do
    not.
    """
    size = {"steps": steps, "topic_std": 0}
    before, shift = scenario("topics", **size), scenario("shift", **size, change_at=change_at)
    assert (before.shift_step, shift.shift_step) == (None, shift_step)
    for step in range(1, steps + 1):
        for layer in range(2):
            differs_E = (before(step, layer) != shift(step, layer)).any(0)
            assert differs_E.sum() == (8 if step >= shift_step else 0)


def test_shift_draws_a_new_popularity_of_the_same_spread() -> None:
    scores = scenario("shift", num_experts=4096, tokens=1, topic_std=0, noise_std=0)
    before_E, after_E = scores(5, 0).flatten().clone(), scores(6, 0).flatten().clone()
    pairs = torch.stack([before_E, after_E])[:, before_E != after_E]
    assert pairs.shape[1] == 1024
    assert abs(torch.corrcoef(pairs)[0, 1]) < 5 / math.sqrt(1024)
    assert (pairs.std(1) - 0.8).abs().max() < 5 * 0.8 / math.sqrt(2 * 1024)
    assert torch.equal(scores(10, 0).flatten(), after_E)


def test_shift_reverses_the_shares_of_the_topics() -> None:
    scores = scenario("shift", **FOUR_TOPICS)
    assert chi_square(topic_counts_C(scores, step=5), ZIPF_4) < 21.1
    assert chi_square(topic_counts_C(scores, step=6), ZIPF_4[::-1]) < 21.1


def test_drift_turns_popularity_at_a_constant_speed() -> None:
    """A vector turning by d a step obeys x(t+1) + x(t-1) = 2 cos(d) x(t). A quarter turn in 9 steps: d = 10
    degrees.
    """
    scores = scenario("drift", topic_std=0, noise_std=0)
    x = [scores(step, 1)[0].double() + 1 for step in range(1, 11)]
    for t in range(1, 9):
        torch.testing.assert_close(
            x[t + 1] + x[t - 1], 2 * math.cos(math.radians(10)) * x[t], rtol=0, atol=2e-6
        )
    first_E, other_E = scores.popularity_M2E[1].double()
    torch.testing.assert_close(x[0], first_E, rtol=0, atol=1e-6)
    torch.testing.assert_close(x[9], other_E, rtol=0, atol=1e-6)
    assert scores.shift_step is None


def test_drift_takes_the_shares_of_the_topics_to_the_reversed_ones() -> None:
    """Four steps of a quarter turn: 0, 30, 60, 90 degrees, so sin^2 = 0, 1/4, 3/4, 1 of the way."""
    scores = scenario("drift", **FOUR_TOPICS, steps=4)
    for step, way in [(1, 0), (2, 0.25), (3, 0.75), (4, 1)]:
        shares = [(1 - way) * a + way * b for a, b in zip(ZIPF_4, ZIPF_4[::-1], strict=True)]
        assert chi_square(topic_counts_C(scores, step=step), shares) < 21.1


def test_batch_changes_its_size_and_nothing_else() -> None:
    before, change = scenario("documents"), scenario("batch_change")
    assert change.shift_step == 6
    assert [change.tokens_at(step) for step in range(1, 11)] == [96] * 5 + [384] * 5
    assert all(torch.equal(before(step, 0), change(step, 0)) for step in range(1, 6))
    still = {"topic_std": 0, "noise_std": 0}
    assert torch.equal(scenario("documents", **still)(6, 0), scenario("batch_change", **still)(6, 0)[:96])
    assert scenario("batch_change", tokens=10, batch_factor=0.25).tokens_at(10) == 2
    scores = scenario("batch_change", **FOUR_TOPICS | {"tokens": 25_000})
    assert chi_square(topic_counts_C(scores, step=6), ZIPF_4) < 21.1


def test_spread_shrinks_geometrically_about_the_mean() -> None:
    """Ten steps from 1 to 0.001: a thousandth's ninth root, 10^(-1/3), each. The draws are those of
    `documents`.
    """
    constant, shrinking = scenario("documents"), scenario("shrinking_spread", final_spread=0.001)
    assert torch.equal(constant(1, 0), shrinking(1, 0))
    for step in range(1, 11):
        expected_TE = 10 ** (-(step - 1) / 3) * (constant(step, 1).double() + 1) - 1
        torch.testing.assert_close(shrinking(step, 1).double(), expected_TE, rtol=0, atol=1e-6)


def test_options_combine() -> None:
    """Shift and drift at once: before the shift the drift's bits; after it the shifted experts turn the other
    way.
    """
    still = {"topic_std": 0, "noise_std": 0, "tokens": 1, "rank": 5, "final_spread": 0.5}
    both, drift = (
        scenario("drift", **still, change_at=0.5, shifted_experts=0.25, batch_factor=2.0),
        scenario("drift", **still),
    )
    assert all(torch.equal(both(step, 0), drift(step, 0)) for step in range(1, 6))
    assert both(6, 0).shape == (2, 32) and (both(6, 0)[0] != drift(6, 0)[0]).sum() == 8
    (first_E, other_E), x_E = both.popularity_M2E[0], (both(10, 0)[0] + 1) / 0.5  # after a quarter turn
    is_first_E, is_other_E = ((x_E - y_E).abs() < 1e-5 for y_E in (first_E, other_E))
    assert is_first_E.sum() == 8 and torch.equal(is_other_E, ~is_first_E)


def test_one_step_is_a_run() -> None:
    assert torch.equal(scenario("shrinking_spread", steps=1)(1, 0), scenario("documents", steps=1)(1, 0))


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("num_layers", 0, "1,"),
        ("num_experts", 0, "1,"),
        ("tokens", 0, "1,"),
        ("steps", 0, "1,"),
        ("num_topics", 0, "1,"),
        ("top_k", 0, "1, 32"),
        ("top_k", 33, "1, 32"),
        ("rank", 0, "1, 32"),
        ("rank", 33, "1, 32"),
        ("min_document", 0, "1,"),
        ("mean", math.inf, "100"),
        ("mean", math.nan, "100"),
        ("popularity_std", -0.1, "0, 100"),
        ("topic_std", -1.0, "0, 100"),
        ("noise_std", math.nan, "0, 100"),
        ("zipf", -1.0, "0, 100"),
        ("document_tail", 0.0, "0.01"),
        ("drift_turns", math.inf, "100"),
        ("final_spread", 0.0, "0.0001"),
        ("batch_factor", 0.0, "0.0001"),
        ("shifted_experts", 1.5, "0, 1"),
        ("change_at", 1.5, "0, 1"),
        ("change_at", -0.5, "0, 1"),
        ("change_at", 0.5, "together with"),  # nothing changes
        ("shifted_experts", 0.5, "together with"),
        ("batch_factor", 2.0, "together with"),  # never
    ],
)
def test_wrong_option_is_refused(option: str, value: float, limit: str) -> None:
    with pytest.raises(ValueError, match=limit) as error:
        scenario("topics", **{option: value})
    assert f"{option}={value}" in str(error.value)


def test_a_change_outside_the_run_is_refused() -> None:
    for changes in ({"steps": 1}, {"change_at": 0.0}, {"change_at": 1.0}):
        with pytest.raises(
            ValueError, match="change_at=.* one before and one after; use another share or more steps"
        ):
            scenario("shift", **changes)
    with pytest.raises(ValueError, match="tokens_after_change=0"):
        scenario("batch_change", batch_factor=0.001)


@pytest.mark.parametrize(
    "step, layer, value", [(0, 1, "step=0"), (11, 0, "step=11"), (1, -1, "layer=-1"), (1, 2, "layer=2")]
)
def test_a_call_outside_the_run_is_refused(step: int, layer: int, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        scenario("topics")(step, layer)
