"""Stage 1. Is the grouped GEMM in bfloat16 a loop over experts, also where an expert has no tokens?

The oracle is a loop of matmuls in float32 over the same bfloat16 numbers. Kernels have left gradients of
experts without tokens unwritten (pytorch issue 172439), so the memory that they get is full of NaN.

Letters: R rows sorted by expert, D model dim, F hidden dim of an expert, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.bench import Bench, random, worst
from trainer.model.moe import Experts

PRODUCT = 5e-3  # one rounding to bfloat16 costs 2^-9 at most: 2e-3
LAYER = 2e-2  # that of docs/numerics.md for a layer: four roundings in a row


@dataclass(frozen=True, kw_only=True)
class Size:
    rows: int  # of an expert that has an even share
    dim: int
    hidden: int


SIZES = {"cuda": Size(rows=512, dim=1024, hidden=768), "cpu": Size(rows=8, dim=32, hidden=24)}


def loads(rows: int) -> dict[str, list[int]]:
    """Rows of eight experts."""
    return {
        "even": [rows] * 8,
        "first empty": [0, *[rows] * 7],
        "one in the middle empty": [*[rows] * 3, 0, *[rows] * 4],
        "last empty": [*[rows] * 7, 0],
        "one row each": [1] * 8,
        "all in one": [0, 0, 8 * rows, 0, 0, 0, 0, 0],
        "ragged": [rows, 0, 1, rows + 1, 0, 3, 2 * rows - 7, 0],
        "all empty": [0] * 8,
    }


def products(bench: Bench, size: Size) -> None:
    """Forward, gradient of the rows, gradient of the weights: 5e-3 each, 0 for an expert without rows."""
    for name, sizes in loads(size.rows).items():
        rows = random(sum(sizes), size.dim, seed=0, on=bench.on, dtype=torch.bfloat16).requires_grad_()
        weights = random(8, size.hidden, size.dim, seed=1, on=bench.on, dtype=torch.bfloat16).requires_grad_()
        grad = random(sum(sizes), size.hidden, seed=2, on=bench.on, dtype=torch.bfloat16)
        ends = torch.tensor(sizes, device=bench.on).cumsum(0, dtype=torch.int32)
        bench.poison(4 * weights.numel() * 2 + 4 * rows.numel() * 2)
        seam = Experts.Config(dim=size.dim, hidden_dim=size.hidden, num_experts=8)
        out = Experts._grouped_mm(seam, A=rows, B_t=weights.mT, offs=ends)
        out.backward(grad)
        actual = {"forward": out, "rows": rows.grad, "weights": weights.grad}
        error = worst(actual, expected_products(rows, weights, grad, sizes))
        bench.at_most(f"{name}: worst of three products", error, PRODUCT)
        bench.same(f"{name}: largest gradient of an empty expert", largest_of_empty(weights.grad, sizes), 0.0)


def expected_products(rows: Tensor, weights: Tensor, grad: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Expert by expert in float32."""
    parts = zip(
        *(t.detach().float().split(list(sizes)) for t in (rows, grad)), weights.detach().float(), strict=True
    )
    out, grad_rows, grad_weights = [], [], []
    for x, g, w in parts:
        out.append(x @ w.T)
        grad_rows.append(g @ w)
        grad_weights.append(g.T @ x)
    return {"forward": torch.cat(out), "rows": torch.cat(grad_rows), "weights": torch.stack(grad_weights)}


def layer(bench: Bench, size: Size) -> None:
    """The experts as the model has them: SwiGLU of three products, output and all gradients 2e-2."""
    for name, sizes in loads(size.rows).items():
        experts = Experts.Config(
            dim=size.dim, hidden_dim=size.hidden, num_experts=8, dtype=torch.bfloat16
        ).build()
        with torch.no_grad():
            for seed, parameter in enumerate(experts.parameters()):
                parameter.copy_(random(*parameter.shape, seed=seed, on=torch.device("cpu")) / size.dim**0.5)
        experts.to(bench.on, torch.bfloat16)
        x = random(sum(sizes), size.dim, seed=5, on=bench.on, dtype=torch.bfloat16).requires_grad_()
        grad = random(sum(sizes), size.dim, seed=6, on=bench.on, dtype=torch.bfloat16)
        bench.poison(8 * sum(p.numel() for p in experts.parameters()))
        out = experts(x, torch.tensor(sizes, device=bench.on))
        out.backward(grad)
        actual = {"out": out, "x": x.grad} | {n: p.grad for n, p in experts.named_parameters()}
        error = worst(actual, expected_layer(experts, x, grad, sizes))
        bench.at_most(f"{name}: output and gradients", error, LAYER)
        empty = max(largest_of_empty(p.grad, sizes) for p in experts.parameters())
        bench.same(f"{name}: largest gradient of an empty expert", empty, 0.0)


def expected_layer(experts: Experts, x: Tensor, grad: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    weights = {n: p.detach().float().requires_grad_() for n, p in experts.named_parameters()}
    rows = x.detach().float().requires_grad_()
    stacks = (weights["w1_EFD"], weights["w2_EDF"], weights["w3_EFD"])
    parts = zip(rows.split(list(sizes)), *stacks, strict=True)
    out = torch.cat([(F.silu(part @ w1.T) * (part @ w3.T)) @ w2.T for part, w1, w2, w3 in parts])
    out.backward(grad.float())
    return {"out": out, "x": rows.grad} | {n: w.grad for n, w in weights.items()}


def largest_of_empty(grad: Tensor, sizes: Sequence[int]) -> float:
    """NaN where one is not a number."""
    empty = [i for i, rows in enumerate(sizes) if rows == 0]
    return float(grad[empty].abs().max()) if empty else 0.0


CHECKS = (products, layer)
