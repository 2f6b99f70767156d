"""How many weights has a shape, and how much work is a token of it? By arithmetic: no model, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    total: int
    active: int  # used by one token: K of E experts


def matrices(m: ModelConfig) -> dict[tuple[str, ...], int]:
    """How many weights are in matrices, by the keys of the shape that say so."""
    num_moe, expert = max(0, m.num_layers - m.num_dense_layers), 3 * m.expert_dim * m.dim
    heads = 3 * m.num_heads + 2 * m.num_kv_heads  # query, gate and output; keys and values
    return {
        ("vocab_size", "dim"): 2 * m.vocab_size * m.dim,
        ("num_heads", "head_dim", "dim", "num_layers"): heads * m.head_dim * m.dim * m.num_layers,
        ("ffn_dim", "dim", "num_dense_layers"): 3 * m.ffn_dim * m.dim * min(m.num_dense_layers, m.num_layers),
        ("num_experts", "expert_dim", "dim", "num_layers"): m.num_experts * expert * num_moe,
        ("num_shared_experts", "expert_dim", "dim", "num_layers"): m.num_shared_experts * expert * num_moe,
        ("num_experts", "dim", "num_layers"): m.num_experts * m.dim * num_moe,
    }


def count_parameters(m: ModelConfig) -> ParameterCount:
    """Exact. Norm gains: four of a layer's width, those of queries and keys, and the last one."""
    gains = m.num_layers * (4 * m.dim + 2 * m.head_dim) + m.dim
    total = sum(matrices(m).values()) + gains
    num_moe = max(0, m.num_layers - m.num_dense_layers)
    idle = 3 * m.expert_dim * m.dim * (m.num_experts - m.top_k) * num_moe
    return ParameterCount(total=total, active=total - idle)


def flops_per_token(model: ModelConfig, *, seq_len: int) -> float:
    """[FLOP] of `step_flops` per token of a row that is one document."""
    window = min(model.window, seq_len)
    local = window - window * (window - 1) / (2 * seq_len)  # mean positions seen: the first rows see fewer
    return _flops(model, tokens=1, attended=(seq_len + 1) / 2, attended_in_window=local)


def step_flops(model: ModelConfig, positions_BL: Tensor) -> float:
    """[FLOP] of forward and backward that the model needs for these rows; recomputation not counted.

    positions_BL: of each token in its document, -1 is padding. A token attends to itself and to what stands
    before it in its document: only these pairs count, and padding counts nothing.
    """
    seen_BL = positions_BL + 1
    attended, in_window = int(seen_BL.sum()), int(seen_BL.clamp(max=model.window).sum())
    tokens = int((seen_BL > 0).sum())
    return _flops(model, tokens=tokens, attended=attended, attended_in_window=in_window)


def _flops(model: ModelConfig, *, tokens: float, attended: float, attended_in_window: float) -> float:
    """6 per token and active weight in a matmul (the input embedding is a look-up; norm gains, 0.03 % of
    Nano, are counted as if they were) and 12 H N per attended position, in global layers or in a window.
    """
    weights = count_parameters(model).active - model.vocab_size * model.dim
    num_global = model.num_layers // model.global_every
    pairs = num_global * attended + (model.num_layers - num_global) * attended_in_window
    return 6 * weights * tokens + 12 * model.num_heads * model.head_dim * pairs
