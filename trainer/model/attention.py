"""With which kernel does a token attend: masked SDPA on a CPU, flex attention on a GPU?

Both take the same mask functions. Letters: B sequences, L tokens each, N heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torchtitan.models.common import attention
from torchtitan.protocols.module import Module

from trainer.model import compiled

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
QUERY_BLOCK = 128  # queries that attend together in MaskedSDPA
MASK_BLOCK = 128  # tokens of a block mask's block, torch's default
# one family of kernels for all lengths; its tiles come from torch's table of devices, head dims and dtypes
KERNEL_OPTIONS = {"BACKEND": "TRITON"}


class MaskedSDPA(Module):
    """Attention under a boolean mask (B, 1, L, L), for devices without flex attention's backward (CPU).

    Blocks of queries see only the keys that the causal mask and the window leave them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        window: int | None = None

    def __init__(self, config: Config):
        super().__init__()
        self.window = config.window

    @staticmethod
    def mask(mod: MaskMod, num_rows: int, length: int, *, device: torch.device) -> Tensor:
        return create_mask(mod, num_rows, None, length, length, device=device)

    def forward(
        self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *, attention_masks: Tensor, enable_gqa: bool
    ) -> Tensor:
        k_BNLH, v_BNLH = k_BLNH.transpose(1, 2), v_BLNH.transpose(1, 2)
        length, parts = q_BLNH.shape[1], []
        for first, block_BlNH in zip(
            range(0, length, QUERY_BLOCK), q_BLNH.split(QUERY_BLOCK, dim=1), strict=True
        ):
            last = first + block_BlNH.shape[1]
            keys = slice(max(0, first - self.window + 1) if self.window else 0, last)  # all others are masked
            out_BNlH = F.scaled_dot_product_attention(
                block_BlNH.transpose(1, 2),
                k_BNLH[:, :, keys],
                v_BNLH[:, :, keys],
                attn_mask=attention_masks[:, :, first:last, keys],
                enable_gqa=enable_gqa,
            )
            parts.append(out_BNlH.transpose(1, 2))  # the order in memory, so that cat copies long runs
        return torch.cat(parts, dim=1)


class FlexAttention(attention.FlexAttention):
    """Flex attention, one fixed kernel for each shape. torchtitan's own is tuned by timing on every rank: it
    takes minutes, and a restart may find another kernel and so other bits.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(attention.FlexAttention.Config):
        kernel_options: dict = field(default_factory=KERNEL_OPTIONS.copy)

    @staticmethod
    def mask(mod: MaskMod, num_rows: int, length: int, *, device: torch.device) -> BlockMask:
        """Compiled, so that no mask of all pairs is in memory; Inductor cannot generate that of one block."""
        make = compiled.block_mask if length > MASK_BLOCK else create_block_mask
        return make(mod, num_rows, None, length, length, device=device)

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
