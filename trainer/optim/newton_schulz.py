"""How is a matrix orthogonalised with matrix products alone, and what does it cost?

Letters: m x n a matrix, m <= n; b matrices at once.
"""

from collections import defaultdict

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of a x + b x^3 + c x^5 (K. Jordan, "Muon", 2024)
STEPS = 5  # times that the polynomial is applied
TINY = 1e-20  # below any gradient's norm; a matrix of zeros stays one


def orthogonalize(matrices_bmn: Tensor) -> Tensor:
    """Each matrix with its singular values brought near 1, by Newton-Schulz: 0.68 to 1.21, less where they
    are under a hundredth of the largest; zeros stay zeros.

    matrices_bmn: a batch, m <= n.
    """
    a, b, c = QUINTIC
    x_bmn = matrices_bmn / matrices_bmn.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)
    for _ in range(STEPS):
        gram_bmm = x_bmn @ x_bmn.mT
        poly_bmm = torch.baddbmm(gram_bmm, gram_bmm, gram_bmm, beta=b, alpha=c)
        x_bmn = torch.baddbmm(x_bmn, poly_bmm, x_bmn, beta=a)
    return x_bmn


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """Those of equal shape, lying or standing, as one batch."""
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in matrices]
    batches = defaultdict(list)
    for i, matrix in enumerate(wide):
        batches[matrix.shape].append(i)
    for batch in batches.values():
        for i, result in zip(batch, orthogonalize(torch.stack([wide[i] for i in batch])), strict=True):
            wide[i] = result
    return [
        result if result.shape == matrix.shape else result.mT
        for result, matrix in zip(wide, matrices, strict=True)
    ]


def cost(rows: int, columns: int) -> int:
    """[FLOP] of orthogonalising one matrix."""
    short, long = sorted((rows, columns))
    return STEPS * (4 * short * short * long + 2 * short**3)
