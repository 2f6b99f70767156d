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
QUERY_BLOCK = 128  # queries that attend together in MaskedSDPA
MOST_KEPT = 2**24  # [pairs of a query and a key], a byte each, of blocks that are kept for all layers
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

    kept: of each block, which keys its queries see, where all of it is small; else none.
    """

    mod: MaskMod
    num_rows: int
    blocks: list[Block]
    device: torch.device
    kept: tuple[Tensor, ...] = ()

    def mask(self, number: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, queries, keys) of a block: 0 where a query sees a key, -inf elsewhere."""
        sees = self.kept[number] if self.kept else self.sees(self.blocks[number])
        return torch.zeros(sees.shape, dtype=dtype, device=self.device).masked_fill_(~sees, -torch.inf)

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

    def if_small_kept(self) -> "Blocks":
        """All layers make the same masks: the same ones, made once."""
        sizes = [part.stop - part.start for block in self.blocks for part in block[:2]]
        pairs = self.num_rows * sum(map(mul, sizes[::2], sizes[1::2]))
        if pairs > MOST_KEPT:
            return self
        return replace(self, kept=tuple(self.sees(block).contiguous() for block in self.blocks))

    @staticmethod
    def inputs(block: Block, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q_BNLH[:, :, block.queries], k_BNLH[:, :, block.keys], v_BNLH[:, :, block.keys]


class MaskedSDPA(Module):
    """Attention under masks of blocks, for devices without flex attention's backward (CPU)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config):
        super().__init__()

    @staticmethod
    def mask(
        mod: MaskMod, num_rows: int, queries: Parts, keys: Parts, *, window: int | None, device: torch.device
    ) -> Blocks:
        blocks = list[Block]()
        for piece in queries:
            for start in range(piece.start, piece.stop, QUERY_BLOCK):
                block = range(start, min(start + QUERY_BLOCK, piece.stop))
                [seen] = visible([block], window)
                [held], [wanted] = places([block], queries), places([seen], keys)
                blocks.append(Block(held, wanted, block.start, seen.start))
        return Blocks(mod, num_rows, blocks, device).if_small_kept()

    def forward(
        self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *, attention_masks: Blocks, enable_gqa: bool
    ) -> Tensor:
        return _Masked.apply(q_BLNH, k_BLNH, v_BLNH, attention_masks)


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
