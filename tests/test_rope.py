"""Are local layers unaffected by the length of a row: do far positions rotate as near ones do?

Origins of the expected values: rotations in float64, and the bounds that follow from how far apart float32
numbers are there.
"""

import pytest
import torch
from torch import Tensor
from torchtitan.models.common.rope import CosSinRoPE

from trainer.config import ModelConfig, load
from trainer.model.afmoe import afmoe_config

LARGE = load(["experiment=demo", "model=large"]).model  # heads of 128, a window of 4,096, theta 10,000
DISTANCES = torch.arange(LARGE.window - 64, -1, -64)  # of the keys to the last one, which asks
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9}  # of a number, relative


def rope_of(m: ModelConfig, at_L: Tensor) -> Tensor:
    """What the model makes of these positions."""
    config = afmoe_config(m, flex=False)
    config.layers = config.layers[:1]
    with torch.device("meta"):
        model = config.build()
    return model.attention_inputs(at_L.unsqueeze(0)).rope


def scores(q_LNH: Tensor, k_LNH: Tensor, at_L: Tensor) -> Tensor:
    """q . k of the last position with all, as the model rotates them."""
    turned_q, turned_k = CosSinRoPE.apply_rotary_emb(
        q_LNH.unsqueeze(0), k_LNH.unsqueeze(0), rope_of(LARGE, at_L)
    )
    return torch.einsum("nh,lnh->ln", turned_q[0, -1].double(), turned_k[0].double())


def exact_scores(q_LNH: Tensor, k_LNH: Tensor) -> Tensor:
    """The same in float64 from the distances alone, pair after pair: dims j and j + H / 2."""
    half, total = q_LNH.shape[-1] // 2, 0.0
    for j in range(half):
        turn_L = DISTANCES.double() * LARGE.rope_theta ** (-j / half)
        q = torch.complex(q_LNH[-1:, :, j].double(), q_LNH[-1:, :, j + half].double())
        k = torch.complex(k_LNH[..., j].double(), k_LNH[..., j + half].double())
        total = total + (q * k.conj() * torch.polar(torch.ones_like(turn_L), turn_L)[:, None]).real
    return total


def bounds(q_LNH: Tensor, k_LNH: Tensor, last: int) -> Tensor:
    """How far a score may be off: by half the distance of float32 numbers around each of two angles, by the
    rounding of the frequency over the distance of the two, and by that of the numbers themselves.
    """
    half = LARGE.head_dim // 2
    frequency_h = LARGE.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    spacing_h = 2.0 ** ((last * frequency_h).log2().floor() - 23)
    off_h = spacing_h + LARGE.window * frequency_h * 2**-23 + 4 * ROUNDING[q_LNH.dtype]

    def size(x: Tensor) -> Tensor:
        return torch.hypot(x[..., :half].double(), x[..., half:].double())

    return (size(q_LNH[-1:]) * size(k_LNH) * off_h).sum(-1)


@pytest.mark.parametrize(
    ("dtype", "first", "at_most"),
    [  # of the spread of the scores
        (torch.float32, 0, 1e-4),
        (torch.float32, 2**18 - LARGE.window, 3e-3),  # the end of a row of 256K
        (torch.float32, 1_000_000, 1e-2),
        (torch.bfloat16, 0, 4e-3),
        (torch.bfloat16, 1_000_000, 1e-2),
    ],
)
def test_scores_in_a_window_follow_from_distances_at_any_position(
    dtype: torch.dtype, first: int, at_most: float
) -> None:
    at_L = first + LARGE.window - 64 - DISTANCES
    random = torch.Generator().manual_seed(0)
    q_LNH, k_LNH = torch.randn(2, len(at_L), 4, LARGE.head_dim, generator=random).to(dtype)
    off, expected = scores(q_LNH, k_LNH, at_L), exact_scores(q_LNH, k_LNH)
    off -= expected
    assert (off.abs() <= bounds(q_LNH, k_LNH, int(at_L[-1]))).all()
    assert off.std() <= at_most * expected.std()


def test_a_far_row_sees_the_same_window() -> None:
    """A mask follows from where documents start, not from where the row lies in them."""
    config = load(["experiment=demo", "model=debug"]).model
    with torch.device("meta"):
        model = afmoe_config(config, flex=False).build()
    near = model.attention_inputs(torch.arange(96).unsqueeze(0))
    far = model.attention_inputs(1_000_000 + torch.arange(96).unsqueeze(0))
    for one, other in ((near.local_mask, far.local_mask), (near.global_mask, far.global_mask)):
        for number in range(len(one.blocks)):
            mask = one.mask(number, torch.float32)
            assert (mask == 0).any() and torch.equal(mask, other.mask(number, torch.float32))
