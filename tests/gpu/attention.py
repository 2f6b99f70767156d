"""Stage 2. Is flex attention masked attention: documents, window, padding, grouped queries, gradients?

The oracle is softmax(q k / sqrt(H) + mask) v in float64, with a mask made by comparing indices, not by ours.
For bfloat16 torch's own scaled_dot_product_attention says how large an error is to be expected.

Letters: B rows, L tokens each, N heads, G of them to a key-value head, H head dim.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tests.gpu.bench import Bench, random, relative, worst
from trainer.config import ModelConfig
from trainer.model.afmoe import PADDING, Afmoe, AttentionInputs, afmoe_config

SHAPE = ModelConfig(
    vocab_size=64, dim=64, num_layers=2, num_dense_layers=2, ffn_dim=64, num_heads=8, num_kv_heads=2,
    head_dim=64, window=100, num_experts=2, top_k=1, expert_dim=8, global_every=2,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    rows: int
    length: int
    group: int  # query heads to a key-value head
    head_dim: int
    window: int

    @property
    def name(self) -> str:
        return f"B{self.rows} L{self.length} G{self.group} H{self.head_dim} window {self.window}"

    def shape(self) -> ModelConfig:
        heads = {"num_heads": 2 * self.group, "num_kv_heads": 2, "head_dim": self.head_dim}
        return replace(SHAPE, window=self.window, **heads)


# each value of each axis at least once; every case costs a GPU four compilations
SIZES = {
    "cuda": [
        Case(rows=2, length=256, group=4, head_dim=16, window=100),
        Case(rows=1, length=1000, group=8, head_dim=64, window=256),
        Case(rows=2, length=4096, group=4, head_dim=128, window=2048),
    ],
    "cpu": [
        Case(rows=2, length=160, group=2, head_dim=16, window=60),
        Case(rows=1, length=129, group=4, head_dim=16, window=200),
    ],
}


def positions(case: Case) -> Tensor:
    """Row 0: documents of 1, 7, a third of the row, and what is left. Row 1: one document, then padding."""
    first = [1, 7, case.length // 3]
    first.append(case.length - sum(first))
    of_rows = [[p for n in first for p in range(n)]]
    padding = case.length // 5
    of_rows.append([*range(case.length - padding), *[PADDING] * padding])
    return torch.tensor(of_rows[: case.rows])


def visible(positions_BL: Tensor, window: int | None) -> Tensor:
    """(B, L, L): a token sees its document up to itself, at most `window` tokens."""
    document_BL = (positions_BL == 0).cumsum(1)
    index_L = torch.arange(positions_BL.shape[1])
    distance_LL = index_L[:, None] - index_L[None, :]
    seen_LL = (distance_LL >= 0) & (distance_LL < (window or len(index_L)))
    return seen_LL & (document_BL[:, :, None] == document_BL[:, None, :])


def visible_pairs(case: Case) -> int:
    """Of a row that is one document, in a local layer."""
    return sum(min(index + 1, case.window) for index in range(case.length))


def build(case: Case, *, flex: bool) -> Afmoe:
    """A local and a global layer, for its masks and its attention; it has no weights."""
    with torch.device("meta"):
        return afmoe_config(case.shape(), flex=flex).build()


def dense(mask: Tensor | BlockMask, case: Case) -> Tensor:
    """(B, L, L) as the kernel reads it: what is in no block is hidden, whatever the mask function says."""
    if isinstance(mask, Tensor):
        return mask[:, 0].cpu()
    blocks = mask.to_dense()[:, 0].cpu().bool()  # (B, query blocks, key blocks)
    of_query, of_key = mask.BLOCK_SIZE
    in_block = blocks.repeat_interleave(of_query, 1).repeat_interleave(of_key, 2)
    full = torch.zeros_like(blocks)
    if mask.full_kv_num_blocks is not None:
        for b, query, number in full_blocks(mask):
            full[b, query, number] = True
    is_full = full.repeat_interleave(of_query, 1).repeat_interleave(of_key, 2)
    size = case.length
    b, q, k = torch.meshgrid(
        *(torch.arange(n, device=mask.kv_indices.device) for n in (case.rows, size, size)), indexing="ij"
    )
    by_function = mask.mask_mod(b, torch.zeros_like(b), q, k).cpu()
    return (is_full[:, :size, :size] | by_function) & in_block[:, :size, :size]


def full_blocks(mask: BlockMask) -> list[tuple[int, int, int]]:
    """(row, query block, key block) of those that the kernel takes without asking the mask function."""
    numbers, indices = mask.full_kv_num_blocks[:, 0].tolist(), mask.full_kv_indices[:, 0].tolist()
    return [
        (b, query, key)
        for b, of_row in enumerate(numbers)
        for query, count in enumerate(of_row)
        for key in indices[b][query][:count]
    ]


def masks(bench: Bench, size: list[Case]) -> None:
    """Bit for bit those of the loop over pairs, for tokens that are there."""
    for case in size:
        positions_BL = positions(case)
        inputs = build(case, flex=True).attention_inputs(positions_BL.to(bench.on))
        is_there = (positions_BL != PADDING)[:, :, None]
        for kind, window, mask in (
            ("local", case.window, inputs.local_mask),
            ("global", None, inputs.global_mask),
        ):
            expected = visible(positions_BL, window) & is_there
            bench.same(f"{case.name}: {kind} mask", dense(mask, case) & is_there, expected)


def attend(model: Afmoe, layer: int, qkv: list[Tensor], inputs: AttentionInputs) -> Tensor:
    """Of the layer's own inner attention, whatever class it is."""
    attention = model.layers[str(layer)].attention
    mask = inputs.local_mask if attention.local else inputs.global_mask
    return attention.inner_attention(*qkv, attention_masks=mask, enable_gqa=attention.enable_gqa)


def slow(qkv: list[Tensor], mask: Tensor) -> Tensor:
    """In the dtype of q, k, v: float64 for an oracle."""
    q, k, v = (t.transpose(1, 2) for t in qkv)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask.to(q.device)[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def torchs_own(qkv: list[Tensor], mask: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device)[:, None], enable_gqa=True)
    return out.transpose(1, 2)


def tensors(case: Case, on: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output, which padding has none of. bfloat16 numbers in every dtype."""
    heads = (2 * case.group, 2, 2, 2 * case.group)
    drawn = [
        random(case.rows, case.length, n, case.head_dim, seed=seed, on=on) for seed, n in enumerate(heads)
    ]
    *qkv, grad = (t.bfloat16().to(dtype) for t in drawn)
    is_there = (positions(case) != PADDING).to(on)
    return [t.requires_grad_() for t in qkv], grad * is_there[:, :, None, None]


def results(out: Tensor, qkv: list[Tensor], grad: Tensor, case: Case) -> dict[str, Tensor]:
    out.backward(grad)
    is_there = (positions(case) != PADDING).to(out.device)
    return {"out": out.detach() * is_there[:, :, None, None]} | {
        n: t.grad for n, t in zip("qkv", qkv, strict=True)
    }


def numbers(bench: Bench, size: list[Case]) -> None:
    """float32: output 2e-5, gradients 1e-4. bfloat16: at most 1.5 times the error of torch's attention."""
    for case in size:
        torch.compiler.reset()  # over its limit of shapes, dynamo would run flex attention without its kernel
        positions_BL = positions(case)
        model = build(case, flex=bench.flex)
        inputs = model.attention_inputs(positions_BL.to(bench.on))
        for layer, window in ((0, case.window), (1, None)):
            kind = f"{case.name}: {'local' if window else 'global'}"
            mask = visible(positions_BL, window)
            qkv, grad = tensors(case, bench.on, torch.float64)
            expected = results(slow(qkv, mask), qkv, grad, case)
            qkv, grad = tensors(case, bench.on, torch.float32)
            actual = results(attend(model, layer, qkv, inputs), qkv, grad, case)
            bench.at_most(f"{kind}, float32 output", relative(actual.pop("out"), expected["out"]), 2e-5)
            bench.at_most(f"{kind}, float32 gradients", worst(actual, {n: expected[n] for n in "qkv"}), 1e-4)
            qkv, grad = tensors(case, bench.on, torch.bfloat16)
            ours = worst(results(attend(model, layer, qkv, inputs), qkv, grad, case), expected)
            qkv, grad = tensors(case, bench.on, torch.bfloat16)
            theirs = worst(results(torchs_own(qkv, mask), qkv, grad, case), expected)
            bench.at_most(f"{kind}, bfloat16 error next to torch's", ours / theirs, 1.5)


CHECKS = (masks, numbers)
