"""The branches that a CPU does not take: a step on the fake GPU, counted against the page's bounds."""

import pytest

from benchmarks.gpu_trace import PAGE, POLICIES, bounds, counted
from tests.fake import in_a_process


@pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=pytest.mark.slow if p == "selective" else pytest.mark.rare) for p in POLICIES],
)
def test_a_step_asks_for_no_more_than_the_page_says(policy, tmp_path):
    counts, most = in_a_process(counted, tmp_path, policy), bounds(PAGE.read_text())
    assert {(policy, name) for name in counts} <= set(most)
    for name, value in counts.items():
        assert value <= most[policy, name], name
    # each of the 6 MoE layers waits for its counts, once more where its dispatch is repeated
    assert counts["forward: waits of the host"] == 6
    assert counts["backward: waits of the host"] == (0 if policy == "none" else 6)
