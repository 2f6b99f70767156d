"""With which kernel does a token attend: masked SDPA on a CPU, flex attention on a GPU?

Both take the same mask functions, and queries and keys that are parts of a row: those that a rank holds and
those that they may see (context.py). Letters: B sequences, L tokens each, N heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torchtitan.models.common import attention
from torchtitan.protocols.module import Module

from trainer.model import compiled
from trainer.model.context import Parts, count, places, visible

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# queries that attend together in MaskedSDPA: fewer leave out more keys, and are slower each in float32
QUERY_BLOCK = {torch.float32: 128, torch.bfloat16: 64}
MOST_KEPT = 2**24  # [pairs of a query and a key], four bytes each, of blocks that are kept for all layers
MOST_SHARES = 2**24  # [pairs in each head], two bytes each, that one layer keeps for its backward pass
MASK_BLOCK = 128  # tokens of a block mask's block, torch's default
# behind scaled_dot_product_attention on a CPU: the output and the logsumexp; the gradients
attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# one family of kernels for all lengths; its tiles come from torch's table of devices, head dims and dtypes
KERNEL_OPTIONS = {"BACKEND": "TRITON"}


class Block(NamedTuple):
    """Queries that attend together, and the keys that the causal mask and the window leave them."""

    queries: slice  # of those that this rank holds
    keys: slice
    first_query: int  # of the row
    first_key: int


@dataclass(frozen=True)
class Blocks:
    """A mask that is made block by block, where it is used: no mask of all pairs is in memory.

    kept: the mask of each block, where all of them are small; else none.
    """

    mod: MaskMod
    num_rows: int
    blocks: list[Block]
    device: torch.device
    kept: tuple[Tensor, ...] = ()

    def mask(self, number: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, queries, keys) of a block: 0 where a query sees a key, -inf elsewhere."""
        return (self.kept[number] if self.kept else self.made(self.blocks[number])).to(dtype)

    def made(self, block: Block) -> Tensor:
        sees = self.sees(block)
        return torch.zeros(sees.shape, device=self.device).masked_fill_(~sees, -torch.inf)

    def sees(self, block: Block) -> Tensor:
        rows, queries, keys = (
            torch.arange(first, first + size, device=self.device)
            for first, size in (
                (0, self.num_rows),
                (block.first_query, block.queries.stop - block.queries.start),
                (block.first_key, block.keys.stop - block.keys.start),
            )
        )
        sees = self.mod(rows[:, None, None], rows.new_zeros(()), queries[:, None], keys)
        return sees.expand(len(rows), len(queries), len(keys)).unsqueeze(1)

    @property
    def num_pairs(self) -> int:
        sizes = [part.stop - part.start for block in self.blocks for part in block[:2]]
        return self.num_rows * sum(map(mul, sizes[::2], sizes[1::2]))

    def if_small_kept(self) -> "Blocks":
        """All layers make the same masks: the same ones, made once."""
        if self.num_pairs > MOST_KEPT:
            return self
        return replace(self, kept=tuple(self.made(block) for block in self.blocks))

    @staticmethod
    def inputs(block: Block, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q_BNLH[:, :, block.queries], k_BNLH[:, :, block.keys], v_BNLH[:, :, block.keys]


class MaskedSDPA(Module):
    """Attention under masks of blocks, for devices without flex attention's backward (CPU)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dtype: torch.dtype = torch.float32

    def __init__(self, config: Config):
        super().__init__()
        self.query_block = QUERY_BLOCK[config.dtype]

    def mask(
        self,
        mod: MaskMod,
        num_rows: int,
        queries: Parts,
        keys: Parts,
        *,
        window: int | None,
        device: torch.device,
    ) -> Blocks:
        blocks = list[Block]()
        for piece in queries:
            for start in range(piece.start, piece.stop, self.query_block):
                block = range(start, min(start + self.query_block, piece.stop))
                [seen] = visible([block], window)
                [held], [wanted] = places([block], queries), places([seen], keys)
                blocks.append(Block(held, wanted, block.start, seen.start))
        return Blocks(mod, num_rows, blocks, device).if_small_kept()

    def forward(
        self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *, attention_masks: Blocks, enable_gqa: bool
    ) -> Tensor:
        masked = _MaskedMatmuls if q_BLNH.dtype == torch.bfloat16 else _Masked
        return masked.apply(q_BLNH, k_BLNH, v_BLNH, attention_masks)


class _Masked(torch.autograd.Function):
    """What scaled_dot_product_attention and its gradient are on a CPU, block after block, from the same
    kernels. Autograd would keep a float mask of each block in each layer, and add up a gradient of all keys
    for each block: memory and time would grow with the square of a row, in a local layer too.
    """

    @staticmethod
    def forward(ctx, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, masks: Blocks) -> Tensor:
        heads = [each.transpose(1, 2) for each in (q_BLNH, k_BLNH, v_BLNH)]
        parts = [
            attend(*masks.inputs(block, *heads), attn_mask=masks.mask(number, heads[0].dtype))
            for number, block in enumerate(masks.blocks)
        ]
        out_BLNH = torch.cat([out_BNqH.transpose(1, 2) for out_BNqH, _ in parts], dim=1)
        ctx.masks = masks
        ctx.save_for_backward(*heads, out_BLNH.transpose(1, 2), *(lse for _, lse in parts))
        return out_BLNH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLNH: Tensor):
        q_BNLH, k_BNLH, v_BNLH, out_BNLH, *lses = ctx.saved_tensors
        grad_BNLH, masks = grad_BLNH.transpose(1, 2), ctx.masks
        grads_q, grad_k_BNLH, grad_v_BNLH = [], torch.zeros_like(k_BNLH), torch.zeros_like(v_BNLH)
        for number, block in reversed(list(enumerate(masks.blocks))):
            q, k, v = masks.inputs(block, q_BNLH, k_BNLH, v_BNLH)
            grad, out = grad_BNLH[:, :, block.queries], out_BNLH[:, :, block.queries]
            grad_q, grad_k, grad_v = attend_backward(
                grad, q, k, v, out, lses[number], 0.0, False, attn_mask=masks.mask(number, q.dtype)
            )
            grads_q.append(grad_q.transpose(1, 2))
            grad_k_BNLH[:, :, block.keys] += grad_k
            grad_v_BNLH[:, :, block.keys] += grad_v
        grad_q_BLNH = torch.cat(grads_q[::-1], dim=1)
        return grad_q_BLNH, grad_k_BNLH.transpose(1, 2), grad_v_BNLH.transpose(1, 2), None


class _MaskedMatmuls(torch.autograd.Function):
    """The same as products of matrices, in bfloat16: the kernels above multiply it without the processor's
    instructions for it, backward four times as slowly as float32.

    A head of keys answers all its queries' heads in one product. Letters: b a row and a head of keys of it,
    G heads of queries that share it, q a block's queries times G, K its keys.
    """

    @staticmethod
    def forward(ctx, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, masks: Blocks) -> Tensor:
        num_groups = q_BLNH.shape[2] // k_BLNH.shape[2]
        q_bqH, k_bKH, v_bKH = _folded(q_BLNH, num_groups), _folded(k_BLNH, 1), _folded(v_BLNH, 1)
        out_bqH = torch.empty_like(q_bqH)
        kept: list[Tensor] = []
        keeps = masks.num_pairs * q_BLNH.shape[2] <= MOST_SHARES
        for number, block in enumerate(masks.blocks):
            q, out, k, v = _of_block(block, num_groups, (q_bqH, out_bqH), (k_bKH, v_bKH))
            share_bqK = _shares(q, k, masks, number)
            out.copy_(torch.bmm(share_bqK, v))  # a compiler takes no `out=` that is a part of a tensor
            kept += [share_bqK] if keeps else []
        ctx.masks, ctx.num_groups, ctx.shapes = masks, num_groups, (q_BLNH.shape, k_BLNH.shape)
        ctx.save_for_backward(q_bqH, k_bKH, v_bKH, *kept)
        return _unfolded(out_bqH, q_BLNH.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLNH: Tensor):
        q_bqH, k_bKH, v_bKH, *kept = ctx.saved_tensors
        grad_bqH, grad_q_bqH = _folded(grad_BLNH, ctx.num_groups), torch.empty_like(q_bqH)
        grad_k_bKH, grad_v_bKH = (torch.zeros_like(each, dtype=torch.float32) for each in (k_bKH, v_bKH))
        scale = q_bqH.shape[-1] ** -0.5
        for number, block in enumerate(ctx.masks.blocks):
            q, grad, grad_q, *keys = _of_block(
                block,
                ctx.num_groups,
                (q_bqH, grad_bqH, grad_q_bqH),
                (k_bKH, v_bKH, grad_k_bKH, grad_v_bKH),
            )
            k, v, grad_k, grad_v = keys
            share_bqK = kept[number] if kept else _shares(q, k, ctx.masks, number)
            grad_v += share_bqK.mT @ grad
            grad_bqK = torch.ops.aten._softmax_backward_data(grad @ v.mT, share_bqK, -1, share_bqK.dtype)
            grad_q.copy_(torch.baddbmm(grad_q, grad_bqK, k, beta=0, alpha=scale))
            grad_k += grad_bqK.mT @ q
        grads = (grad_q_bqH, grad_k_bKH.mul_(scale).to(q_bqH.dtype), grad_v_bKH.to(q_bqH.dtype))
        shapes = (ctx.shapes[0], ctx.shapes[1], ctx.shapes[1])
        return *(_unfolded(*each) for each in zip(grads, shapes, strict=True)), None


def _shares(q_bqH: Tensor, k_bKH: Tensor, masks: Blocks, number: int) -> Tensor:
    """(b, q, K): how much a query attends to each key; the softmax is float32."""
    scores_bqK = q_bqH.new_empty(len(q_bqH), q_bqH.shape[1], k_bKH.shape[1])
    torch.baddbmm(scores_bqK, q_bqH, k_bKH.mT, beta=0, alpha=q_bqH.shape[-1] ** -0.5, out=scores_bqK)
    exact_bqK, mask = scores_bqK.float(), masks.mask(number, torch.float32)
    rows, _, queries, keys = mask.shape
    exact_bqK.view(rows, -1, queries, q_bqH.shape[1] // queries, keys).add_(mask.unsqueeze(3))
    return scores_bqK.copy_(torch.softmax(exact_bqK, dim=-1))


def _folded(x_BLNH: Tensor, num_groups: int) -> Tensor:
    """(B KV, L G, H): the heads that share keys lie behind one another, token by token."""
    num_rows, length, num_heads, dim = x_BLNH.shape
    x = x_BLNH.view(num_rows, length, num_heads // num_groups, num_groups, dim).transpose(1, 2)
    return x.reshape(-1, length * num_groups, dim)


def _unfolded(x_bqH: Tensor, shape: torch.Size) -> Tensor:
    num_rows, length, num_heads, dim = shape
    x = x_bqH.view(num_rows, -1, length, num_heads * num_rows // len(x_bqH), dim).transpose(1, 2)
    return x.reshape(shape)


def _of_block(block: Block, num_groups: int, of_queries, of_keys) -> list[Tensor]:
    queries = slice(block.queries.start * num_groups, block.queries.stop * num_groups)
    return [each[:, queries] for each in of_queries] + [each[:, block.keys] for each in of_keys]


class FlexAttention(attention.FlexAttention):
    """Flex attention, one fixed kernel for each shape. torchtitan's own is tuned by timing on every rank: it
    takes minutes, and a restart may find another kernel and so other bits.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(attention.FlexAttention.Config):
        kernel_options: dict = field(default_factory=KERNEL_OPTIONS.copy)

    @staticmethod
    def mask(
        mod: MaskMod, num_rows: int, queries: Parts, keys: Parts, *, window: int | None, device: torch.device
    ) -> BlockMask:
        """Compiled, so that no mask of all pairs is in memory; Inductor cannot generate that of one block."""
        num_queries, num_keys = count(queries), count(keys)
        make = compiled.block_mask if num_queries > MASK_BLOCK else create_block_mask
        if queries != keys:
            mod = moved(mod, indices(queries, device), indices(keys, device))
        return make(mod, num_rows, None, num_queries, num_keys, device=device)

    def forward(
        self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *, attention_masks: BlockMask, enable_gqa: bool
    ) -> Tensor:
        out_BNLH = compiled.flex(
            q_BLNH.transpose(1, 2),
            k_BLNH.transpose(1, 2),
            v_BLNH.transpose(1, 2),
            block_mask=attention_masks,
            enable_gqa=enable_gqa,
            kernel_options=self.kernel_options,
        )
        return out_BNLH.transpose(1, 2)


def indices(parts: Parts, device: torch.device) -> Tensor:
    """In the row, of tokens that lie one after another."""
    return torch.cat([torch.arange(part.start, part.stop, device=device) for part in parts])


def moved(mod: MaskMod, query_Q: Tensor, key_K: Tensor) -> MaskMod:
    """The same mask for queries and keys that are some of the row's."""
    return lambda b, h, q, k: mod(b, h, query_Q[q], key_K[k])
