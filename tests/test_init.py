"""Does a model start where the report says, and from the same numbers in every layout?

Statistics are those of a normal truncated at 3 std (formulas below), within 5 standard errors, 6 where all
pairs are compared. Here is the invariance to the layout itself; real meshes need process groups.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.model.afmoe import Afmoe, afmoe_config
from trainer.model.init import BLOCK_ROWS, Progress, draw, draw_truncated, initialize
from trainer.model.recompute import CHECKPOINTING

SHAPE = ModelConfig(
    vocab_size=500,
    dim=64,
    num_layers=4,
    num_dense_layers=1,
    ffn_dim=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    window=6,
    num_experts=8,
    top_k=2,
    expert_dim=48,
    num_shared_experts=1,
    route_scale=2.448,
)
STD = 0.5 / 64**0.5  # arXiv:2602.17004, section 2.4
DENSITY_AT_3 = math.exp(-4.5) / math.sqrt(2 * math.pi)
# a unit normal truncated at c = 3: variance 1 - 2 c phi(c) / (2 Phi(c) - 1)
TRUNCATED = math.sqrt(1 - 2 * 3 * DENSITY_AT_3 / math.erf(3 / math.sqrt(2)))


def start(*, seed: int, checkpointed: bool = False) -> Afmoe:
    with torch.device("meta"):
        model = afmoe_config(SHAPE, flex=False).build()
    if checkpointed:
        CHECKPOINTING["full"].build().apply(model)
    initialize(model, device=torch.device("cpu"), seed=seed)
    return model


def matrices(model: Afmoe) -> dict[str, Tensor]:
    """Every matrix under its own name; each expert's is one."""
    whole = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    experts = {f"{name}[{e}]": p[e] for name, p in whole.items() if p.ndim == 3 for e in range(len(p))}
    return {name: p for name, p in whole.items() if p.ndim == 2} | experts


def test_every_matrix_is_a_truncated_normal():
    for name, matrix in matrices(start(seed=0)).items():
        n, z = matrix.numel(), matrix / STD
        assert abs(z.mean()) < 5 * TRUNCATED / math.sqrt(n), name
        assert abs(z.std() / TRUNCATED - 1) < 5 / math.sqrt(2 * n), name
        assert z.abs().max() <= 3, name


def test_truncation_at_three_std():
    """P(|z| > 2.5) of a unit normal truncated at 3, and nothing beyond 3; an untruncated one has 0.27 %
    there.
    """
    z = draw("any", 1.0, rows=2048, first=0, columns=256)
    inside = math.erf(3 / math.sqrt(2))
    p = (inside - math.erf(2.5 / math.sqrt(2))) / inside
    assert 2.99 < z.abs().max() <= 3
    assert abs((z.abs() > 2.5).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / z.numel())


@pytest.mark.parametrize("shape", [(64, 300), (3, 7)])
def test_a_value_is_the_first_of_its_draws_within_the_limit(shape: tuple[int, int]):
    """By a loop over the elements, in tensors drawn one after another (trunc_normal_ of torch 2.13)."""
    for seed in range(20):
        got = draw_truncated(torch.empty(shape), 0.5, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        rounds = torch.stack([torch.empty(shape).normal_(0, 0.5, generator=generator) for _ in range(8)])
        columns = rounds.reshape(8, -1).T.tolist()
        expected = [next(value for value in column if abs(value) <= 1.5) for column in columns]
        assert got.view(-1).tolist() == expected


def test_norm_gains_and_biases():
    """1, but 1 / sqrt(layers) after a sublayer (eq. 33-35): 2 of them in each of 4 layers. Biases, sums: 0;
    loads and the share of labels: 1.
    """
    model = start(seed=0)
    gains = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    post = {name for name in gains if "post_attention_norm" in name or "post_ffn_norm" in name}
    assert len(post) == 8 and len(gains) == 4 * (4 + 2) + 1
    for name, gain in gains.items():
        assert (gain == (0.5 if name in post else 1.0)).all(), name
    buffers = dict(model.named_buffers())
    assert len(buffers) == 3 * 4
    for name, buffer in buffers.items():
        assert (buffer == (1.0 if name.endswith(("load_E", "label_share")) else 0.0)).all(), name


def test_no_two_matrices_are_alike():
    """Names, experts and seeds: correlation of any two draws within 6 / sqrt(n) of 0; equal draws would have
    1.
    """
    drawn = [matrix.flatten()[:2048] for seed in (0, 1) for matrix in matrices(start(seed=seed)).values()]
    unit = torch.stack([row / row.norm() for row in drawn if len(row) == 2048])
    correlation = unit @ unit.T - torch.eye(len(unit))
    assert len(unit) > 2 * 3 * 8 * 3 and correlation.abs().max() < 6 / math.sqrt(2048)


def test_blocks_of_a_matrix_are_not_alike():
    blocks = draw("any", 1.0, rows=40 * BLOCK_ROWS, first=0, columns=16).view(40, -1)
    unit = blocks / blocks.norm(dim=1, keepdim=True)
    assert (unit @ unit.T - torch.eye(40)).abs().max() < 6 / math.sqrt(BLOCK_ROWS * 16)


def test_start_is_a_function_of_the_seed():
    """Again: bit-equal. Through the wrapper of activation checkpointing, which renames parameters:
    bit-equal.
    """
    first = list(start(seed=3).parameters())
    for other in (start(seed=3), start(seed=3, checkpointed=True)):
        assert all(torch.equal(a, b) for a, b in zip(first, other.parameters(), strict=True))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
def test_any_rows_are_those_of_the_whole(rows):
    """Also a single row, an empty part, parts within one block and across blocks."""
    whole = draw("any", STD, rows=rows, first=0, columns=24)
    cuts = sorted({0, 1, 31, 63, 64, 65, 127, 128, 129, 299, rows} & set(range(rows + 1)))
    for low in cuts:
        for high in (c for c in cuts if c >= low):
            assert torch.equal(draw("any", STD, rows=high - low, first=low, columns=24), whole[low:high])


def test_rows_do_not_depend_on_how_many_there_are():
    """A shard of a padded vocabulary starts like that of an unpadded one."""
    assert torch.equal(
        draw("any", STD, rows=500, first=0, columns=8)[:70], draw("any", STD, rows=70, first=0, columns=8)
    )


def test_threads_change_nothing():
    """Each block has its own generator: four threads draw the bits that one draws."""
    with ThreadPoolExecutor(4) as pool:
        threaded = draw("any", STD, rows=1000, first=30, columns=24, over=pool.map)
    assert torch.equal(threaded, draw("any", STD, rows=1000, first=30, columns=24))


def test_progress_is_told_every_five_seconds():
    """By hand: parts of a quarter of 4e9 weights at 1, 6, 7 and 12 s; the second and the last are told."""
    now_s, said = [0.0], []
    progress = Progress(4_000_000_000, report=said.append, clock=lambda: now_s[0])
    for now_s[0] in (1.0, 6.0, 7.0, 12.0):
        progress.add(1_000_000_000)
    assert said == [
        "initial weights: 50% of this rank's 4.0 B",
        "initial weights: 100% of this rank's 4.0 B",
    ]
