"""What is an AFMoE? One function from our configuration to torchtitan's modules (arXiv:2602.17004, section
2).

    x = embedding(tokens) sqrt(D)                                                        eq. 39
    each layer:  x += norm2(attention(norm1(x)));  x += norm2(ffn or moe(norm1(x)))      eq. 33-35
    loss = cross_entropy(head(norm(x)), labels)                                          eq. 36

Three layers of four are local (sliding window, RoPE), the fourth is global (causal, no positions).

Letters: B sequences, L tokens each, T = B L, D model dim, N heads, H head dim, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks
from torchtitan.models.common.attention import (
    QKVLinear,
    get_causal_mask_mod,
    get_efficient_causal_mask_mod_for_packed_document,
    get_sliding_window_mask_mod,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.rope import CosSinRoPE
from torchtitan.protocols.module import Module

from trainer.balance import NO_LOSSES, LossWeights
from trainer.config import ModelConfig
from trainer.model.attention import Blocks, FlexAttention, MaskedSDPA
from trainer.model.context import WHOLE, Exchange, exchanged
from trainer.model.dispatch import ALL_TO_ALL, Dispatch
from trainer.model.loss import Groups, linear_cross_entropy
from trainer.model.moe import MoE, experts_in
from trainer.model.norm import RMSNorm
from trainer.model.router import Gate, Router

PADDING = -1  # position of a token that is not there


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Masks and rotary angles of a microbatch and which of its tokens are there; one for all layers."""

    local_mask: Blocks | BlockMask
    global_mask: Blocks | BlockMask
    local_keys: Exchange | None  # how those that this rank does not hold reach it
    global_keys: Exchange | None
    rope: Tensor  # (B, L, 1, 2 H): cos, then sin
    valid_BL: Tensor | None  # False: padding; None: no padding


class Attention(Module):
    """Gated grouped-query attention with QK-norm (arXiv:2602.17004, eq. 3-14); RoPE only if `local`."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        qkv_linear: QKVLinear.Config
        gate: Linear.Config
        wo: Linear.Config
        q_norm: RMSNorm.Config
        k_norm: RMSNorm.Config
        inner_attention: Module.Config
        local: bool
        enable_gqa: bool

    def __init__(self, config: Config):
        super().__init__()
        self.qkv_linear, self.gate, self.wo = (
            config.qkv_linear.build(),
            config.gate.build(),
            config.wo.build(),
        )
        self.q_norm, self.k_norm = config.q_norm.build(), config.k_norm.build()
        self.inner_attention = config.inner_attention.build()
        self.local, self.enable_gqa = config.local, config.enable_gqa

    def forward(self, x_BLD: Tensor, inputs: AttentionInputs) -> Tensor:
        q_BLNH, k_BLNH, v_BLNH = self.qkv_linear(x_BLD)
        q_BLNH, k_BLNH = self.q_norm(q_BLNH), self.k_norm(k_BLNH)
        if self.local:
            q_BLNH, k_BLNH = CosSinRoPE.apply_rotary_emb(q_BLNH, k_BLNH, inputs.rope)
        mask, keys = (
            (inputs.local_mask, inputs.local_keys) if self.local else (inputs.global_mask, inputs.global_keys)
        )
        k_BKNH, v_BKNH = exchanged(k_BLNH, v_BLNH, keys)
        out_BLNH = self.inner_attention(
            q_BLNH, k_BKNH, v_BKNH, attention_masks=mask, enable_gqa=self.enable_gqa
        )
        return self.wo(out_BLNH.flatten(2) * torch.sigmoid(self.gate(x_BLD)))  # eq. 12-14


class Block(Module):
    """One layer with depth-scaled sandwich norms (arXiv:2602.17004, eq. 33-35)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        attention: Attention.Config
        feed_forward: FeedForward.Config | None
        moe: MoE.Config | None
        attention_norm: RMSNorm.Config
        post_attention_norm: RMSNorm.Config
        ffn_norm: RMSNorm.Config
        post_ffn_norm: RMSNorm.Config

    def __init__(self, config: Config):
        super().__init__()
        self.attention = config.attention.build()
        self.moe_enabled = config.moe is not None  # torchtitan's FSDP looks for it
        if self.moe_enabled:
            self.moe = config.moe.build()
        else:
            self.feed_forward = config.feed_forward.build()
        self.attention_norm, self.post_attention_norm = (
            config.attention_norm.build(),
            config.post_attention_norm.build(),
        )
        self.ffn_norm, self.post_ffn_norm = config.ffn_norm.build(), config.post_ffn_norm.build()

    def forward(self, x_BLD: Tensor, inputs: AttentionInputs) -> Tensor:
        x_BLD = x_BLD + self.post_attention_norm(self.attention(self.attention_norm(x_BLD), inputs))
        h_BLD = self.ffn_norm(x_BLD)
        h_BLD = self.moe(h_BLD, inputs.valid_BL) if self.moe_enabled else self.feed_forward(h_BLD)
        return x_BLD + self.post_ffn_norm(h_BLD)


class Head(Linear):
    """Logits, or with labels the summed cross entropy without ever holding all logits."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        z_loss_weight: float = 0.0

    def __init__(self, config: Config):
        super().__init__(config)
        self.z_loss_weight = config.z_loss_weight

    def forward(self, x_BLD: Tensor, labels_BL: Tensor | None = None, groups: Groups | None = None) -> Tensor:
        if labels_BL is None:
            return F.linear(x_BLD, self.weight)
        x_TD, labels_T = x_BLD.flatten(0, 1), labels_BL.flatten()
        return linear_cross_entropy(
            x_TD, self.weight, labels_T, z_loss_weight=self.z_loss_weight, groups=groups
        )


class Afmoe(Decoder):
    cut = WHOLE  # how rows lie on ranks

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        window: int
        head_dim: int
        rope_theta: float

        def update_from_config(self, **kwargs) -> None:
            raise NotImplementedError("built by afmoe_config, not by torchtitan's trainer")

        def get_nparams_and_flops(self, model, seq_len):
            raise NotImplementedError("see trainer.size.flops_per_token")

    def forward(
        self,
        tokens_BL: Tensor,
        positions_BL: Tensor | None = None,
        labels_BL: Tensor | None = None,
        groups: Groups | None = None,
    ) -> Tensor:
        """Logits (B, L, V), or with labels the cross entropy [nats] summed over all tokens.

        Tokens, labels and groups are those that this rank holds of the rows (`cut.own`), positions those of
        whole rows.
        positions_BL: of each token in its document: a 0 starts a document, PADDING (-1) marks padding; None:
        each row is one document. Tokens attend within their document only. labels_BL: loss.IGNORE = no label.
        groups: sums of the loss by group, to be added to.
        """
        if positions_BL is None:
            length = tokens_BL.shape[1] * self.cut.size
            positions_BL = torch.arange(length, device=tokens_BL.device).expand(len(tokens_BL), -1)
        inputs = self.attention_inputs(positions_BL)
        x_BLD = self.tok_embeddings(tokens_BL) * math.sqrt(self.config.dim)  # eq. 39
        for layer in self.layers.values():
            x_BLD = layer(x_BLD, inputs)
        x_BLD = self.norm(x_BLD)
        return self.lm_head(x_BLD) if labels_BL is None else self.lm_head(x_BLD, labels_BL, groups)

    def attention_inputs(self, positions_BL: Tensor) -> AttentionInputs:
        """Masks and rotary angles of a microbatch, from the positions alone."""
        num_rows, length = positions_BL.shape
        starts_BL = positions_BL.clone()
        # torchtitan's mask wants each row to start with a document, also a row of padding
        starts_BL[:, 0] = 0
        document = get_efficient_causal_mask_mod_for_packed_document(starts_BL)
        global_mod = and_masks(get_causal_mask_mod(), document)
        local_mod = and_masks(global_mod, get_sliding_window_mask_mod(self.config.window))  # eq. 8
        device, window, cut = positions_BL.device, self.config.window, self.cut
        make = partial(self.layers["0"].attention.inner_attention.mask, num_rows=num_rows, device=device)
        held, in_window, before = cut.held(length), cut.keys(length, window), cut.keys(length, None)
        positions_BL = cut.own(positions_BL)
        half = torch.arange(0, self.config.head_dim, 2, device=device, dtype=torch.float32)
        angle_BLh = positions_BL.clamp_min(0).unsqueeze(-1) * self.config.rope_theta ** (
            -half / self.config.head_dim
        )
        angle_BLH = torch.cat([angle_BLh, angle_BLh], dim=-1)
        return AttentionInputs(
            local_mask=make(local_mod, queries=held, keys=in_window, window=window),
            global_mask=make(global_mod, queries=held, keys=before, window=None),
            local_keys=cut.exchange(length, window),
            global_keys=cut.exchange(length, None),
            rope=torch.cat([angle_BLH.cos(), angle_BLH.sin()], dim=-1).unsqueeze(2),
            # no sync on a GPU
            valid_BL=positions_BL >= 0 if device.type != "cpu" or (positions_BL < 0).any() else None,
        )


def afmoe_config(
    model: ModelConfig,
    *,
    flex: bool,
    dtype: torch.dtype = torch.float32,
    clears_idle: bool = False,
    dispatch: Dispatch = ALL_TO_ALL,
    loss_weights: LossWeights = NO_LOSSES,
    z_loss_weight: float = 0.0,
) -> Afmoe.Config:
    """Translates our configuration to the tree of torchtitan modules.

    flex: flex attention (GPU) or masked SDPA, in blocks for `dtype`; clears_idle: of Experts; dispatch: how
    tokens reach experts.
    """
    m = model
    attends = FlexAttention.Config if flex else partial(MaskedSDPA.Config, dtype=dtype)
    routed = partial(_routed, m, dispatch=dispatch, clears_idle=clears_idle)
    head = Head.Config(in_features=m.dim, out_features=m.vocab_size, z_loss_weight=z_loss_weight)
    return Afmoe.Config(
        dim=m.dim,
        vocab_size=m.vocab_size,
        window=m.window,
        head_dim=m.head_dim,
        rope_theta=m.rope_theta,
        tok_embeddings=Embedding.Config(num_embeddings=m.vocab_size, embedding_dim=m.dim),
        layers=[
            _block(m, i, attends=attends, routed=routed, loss_weights=loss_weights)
            for i in range(m.num_layers)
        ],
        norm=_norm(m, m.dim),
        lm_head=head,
    )


def _block(
    m: ModelConfig,
    layer: int,
    *,
    attends: Callable[[], Module.Config],
    routed: Callable[[], RoutedExperts.Config],
    loss_weights: LossWeights,
) -> Block.Config:
    is_dense = layer < m.num_dense_layers
    return Block.Config(
        attention=_attention(m, layer, attends()),
        feed_forward=_swiglu(m, m.ffn_dim) if is_dense else None,
        moe=None if is_dense else _moe(m, routed(), loss_weights),
        attention_norm=_norm(m, m.dim),
        post_attention_norm=_norm(m, m.dim),
        ffn_norm=_norm(m, m.dim),
        post_ffn_norm=_norm(m, m.dim),
    )


def _attention(m: ModelConfig, layer: int, inner_attention: Module.Config) -> Attention.Config:
    is_local, heads = (layer + 1) % m.global_every != 0, m.num_heads * m.head_dim
    return Attention.Config(
        qkv_linear=QKVLinear.Config(
            head_dim=m.head_dim, wq=_linear(m.dim, heads), wkv=_linear(m.dim, m.num_kv_heads * m.head_dim)
        ),
        gate=_linear(m.dim, heads),
        wo=_linear(heads, m.dim),
        q_norm=_norm(m, m.head_dim),
        k_norm=_norm(m, m.head_dim),
        inner_attention=inner_attention,
        local=is_local,
        enable_gqa=m.num_heads > m.num_kv_heads,
    )


def _moe(m: ModelConfig, routed_experts: RoutedExperts.Config, loss_weights: LossWeights) -> MoE.Config:
    gate = Gate.Config(in_features=m.dim, out_features=m.num_experts, dtype=getattr(torch, m.router_dtype))
    return MoE.Config(
        router=Router.Config(num_experts=m.num_experts, top_k=m.top_k, route_scale=m.route_scale, gate=gate),
        routed_experts=routed_experts,
        shared_experts=_swiglu(m, m.expert_dim * m.num_shared_experts) if m.num_shared_experts else None,
        loss_weights=loss_weights,
    )


def _routed(m: ModelConfig, *, dispatch: Dispatch, clears_idle: bool) -> RoutedExperts.Config:
    experts, dtype = experts_in(m.expert_dtype)
    return RoutedExperts.Config(
        inner_experts=experts(
            dim=m.dim,
            hidden_dim=m.expert_dim,
            num_experts=m.num_experts,
            dtype=dtype,
            clears_idle=clears_idle,
        ),
        token_dispatcher=dispatch.config(num_experts=m.num_experts, top_k=m.top_k, dim=m.dim),
    )


def _swiglu(m: ModelConfig, hidden: int) -> FeedForward.Config:
    return FeedForward.Config(w1=_linear(m.dim, hidden), w2=_linear(hidden, m.dim), w3=_linear(m.dim, hidden))


def _linear(inputs: int, outputs: int) -> Linear.Config:
    return Linear.Config(in_features=inputs, out_features=outputs)


def _norm(m: ModelConfig, dim: int) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=dim, eps=m.norm_eps)


def moe_layers(model: Afmoe) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]
