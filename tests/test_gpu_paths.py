"""Does what runs on a GPU only do what it should, as far as a CPU can tell?

What a function does on tensors that are not on a CPU is run here on the meta device, where operators have
shapes and no values, or its parts are called with CPU tensors. Expected values are those of the CPU's path,
of float64, or worked out by hand.
"""

import torch

from tests.traffic import Traffic
from trainer.model import loss as loss_module
from trainer.model.loss import chunk_tokens, linear_cross_entropy

META = torch.device("meta")
LARGE_VOCAB, LARGE_DIM, ROW = 200_192, 3072, 8192  # Trinity Large, one row of its first stage

# -- the loss ---------------------------------------------------------------------------------------------


def test_head_and_loss_of_a_row_of_large_move_a_quarter_terabyte_at_most():
    """By hand: a chunk reads the head's 1.23 GB twice, writes its gradient's 1.23 GB in bfloat16, reads that
    again, and reads and writes 2.46 GB of float32: 9.8 GB, 8 times. Each logit costs 58 bytes: 95 GB.
    """
    x_TD = torch.empty(ROW, LARGE_DIM, dtype=torch.bfloat16, device=META, requires_grad=True)
    weight_VD = torch.empty(LARGE_VOCAB, LARGE_DIM, dtype=torch.bfloat16, device=META, requires_grad=True)
    labels_T = torch.empty(ROW, dtype=torch.int64, device=META)
    with Traffic() as traffic:
        linear_cross_entropy(x_TD, weight_VD, labels_T, z_loss_weight=1e-4).backward()
    assert 0.15e12 < traffic.bytes < 0.25e12
    assert traffic.largest <= 4 * LARGE_VOCAB * LARGE_DIM  # nothing is larger than the head's gradient


def test_chunks_by_device():
    """A CPU's are 2^22 logits, as ever; a GPU's are 1,024 tokens or a multiple, of at most 2^28 logits."""
    cpu = {vocab: chunk_tokens(vocab, on=torch.device("cpu")) for vocab in (1024, 50_000, LARGE_VOCAB, 2**24)}
    assert cpu == {1024: 4096, 50_000: 83, LARGE_VOCAB: 20, 2**24: 1}
    gpu = {
        vocab: chunk_tokens(vocab, on=torch.device("cuda")) for vocab in (1024, 50_000, LARGE_VOCAB, 2**24)
    }
    assert gpu == {1024: 2**18, 50_000: 5 * 1024, LARGE_VOCAB: 1024, 2**24: 1024}


def test_sums_by_group_are_those_of_the_cpu_and_keep_what_is_not_finite_apart(monkeypatch):
    """Against index_add_, 1e-12 relative; a group without tokens, and one with a loss that is infinite."""
    generator = torch.Generator().manual_seed(0)
    both_2t = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    group_t = torch.randint(0, 4, (500,), generator=generator)
    expected_2G = torch.zeros(2, 6, dtype=torch.float64).index_add_(1, group_t, both_2t)
    actual_2G = loss_module.sums_by_group(both_2t, group_t, num_groups=6)
    torch.testing.assert_close(actual_2G, expected_2G, rtol=1e-12, atol=1e-12)
    both_2t[0, (group_t == 2).nonzero()[0]] = torch.inf
    assert loss_module.sums_by_group(both_2t, group_t, num_groups=6)[0].isinf().tolist() == [
        group == 2 for group in range(6)
    ]
