"""How is the model spread over ranks? CP, EP -> compile, activation checkpointing -> FSDP, stated once."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import spmd_types as spmd
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import CompileConfig
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.common.moe_sharding import set_moe_sharding_config

from trainer.model.afmoe import Afmoe, moe_layers
from trainer.model.casts import cast_weights
from trainer.model.compiled import allow_graphs
from trainer.model.context import Cut
from trainer.ranks.device import DEVICE_TYPE, use_plain_sum

EXPERT_LAYOUT = {"w1_EFD": spmd.S(1), "w2_EDF": spmd.S(2), "w3_EFD": spmd.S(1)}


def build_parallel(
    config: Afmoe.Config,
    dims: ParallelDims,
    *,
    dtype: torch.dtype,
    activation_checkpoint: str = "none",
    compile: str | None = None,
    num_shapes: int = 1,
    reshard_after_forward: bool = True,
    reduce_dtype: torch.dtype = torch.float32,
) -> Afmoe:
    """The model on the meta device, spread over the meshes of `dims`.

    dtype: of weights in forward and backward; the weights themselves and their gradients are float32, and are
    reduced over ranks in reduce_dtype. reshard_after_forward: a block gives its gathered weights back between
    its forward and its backward, and gathers them twice. compile: the backend that blocks are compiled with;
    num_shapes: of microbatches, in the whole run.
    Gradients are summed over ranks, not averaged: the loop divides once, by the global number of tokens.
    """
    if dims.ep_enabled:
        for layer in config.layers:
            if layer.moe is not None:
                set_moe_sharding_config(
                    layer.moe, enable_ep=True, enable_sp=False, expert_param_layout=EXPERT_LAYOUT
                )
                states = layer.moe.sharding_config.state_shardings
                # whole on every rank
                states |= dict.fromkeys(("routing_sums_S", "load_E", "label_share"), states["expert_bias_E"])
    with torch.device("meta"):
        model = config.build()
    model.cut = Cut.among(dims, window=config.window)
    for layer in moe_layers(model):
        layer.total = model.cut.sum_over_row
    if dims.ep_enabled:
        model.parallelize(dims)
    allow_graphs(num_shapes=num_shapes)
    wraps = [
        partial(_compile, model, dims, backend=compile),
        partial(_checkpoint, model, kind=activation_checkpoint),
    ]
    # A compiled block may be repeated as a whole. What is saved inside of one, its compiler must see.
    for wrap in wraps if activation_checkpoint == "full" else reversed(wraps):
        wrap()
    if dims.world_size == 1 and (dtype == torch.float32 or (DEVICE_TYPE == "cpu" and compile is None)):
        if dtype != torch.float32:
            cast_weights(model, dtype)
        return model.train()  # nothing to cut: FSDP would only copy
    replicate = ["dp_replicate"] if dims.dp_replicate_enabled else []
    mesh = dims.get_mesh([*replicate, "fsdp"])
    with _replicas_not_counted(model, num_shards=mesh["fsdp"].size(), num_ranks=mesh.size()):
        apply_fsdp_to_decoder(
            model,
            mesh,
            param_dtype=dtype,
            reduce_dtype=reduce_dtype,
            pp_enabled=False,
            reshard_after_forward_policy="default" if reshard_after_forward else "never",
            ep_degree=dims.ep,
            edp_mesh=dims.get_mesh([*replicate, "efsdp"]) if dims.ep_enabled else None,
        )
    use_plain_sum(model)
    model.tok_embeddings.set_unshard_in_backward(False)  # its gradient needs the tokens alone
    return model.train()


@contextmanager
def _replicas_not_counted(model: Afmoe, *, num_shards: int, num_ranks: int) -> Iterator[None]:
    """Without EP, torchtitan cuts inside an expert's matrices where the model has fewer experts than HSDP has
    ranks. Its count includes the replicas, which cut nothing: each shard may well have whole experts, and
    Muon wants them whole. So torchtitan reads a number of experts that is not below that of ranks.
    """
    experts = [layer.routed_experts.inner_experts for layer in moe_layers(model)]
    true = [each.num_experts for each in experts]
    for each in experts:
        if num_shards <= each.num_experts:
            each.num_experts = max(each.num_experts, num_ranks)
    try:
        yield
    finally:
        for each, num in zip(experts, true, strict=True):
            each.num_experts = num


def _compile(model: Afmoe, dims: ParallelDims, *, backend: str | None) -> None:
    if backend is not None:
        config = CompileConfig(enable=True, backend=backend)
        apply_compile(model, compile_config=config, parallel_dims=dims)


def _checkpoint(model: Afmoe, *, kind: str) -> None:
    if kind != "none":
        from trainer.model.recompute import CHECKPOINTING  # 0.4 s, most starts do without

        CHECKPOINTING[kind].build().apply(model)


def reduce_over_replicas(model: nn.Module, *, now: bool) -> None:
    """Does the next backward pass sum its gradients over the replicas of HSDP? If not, a rank adds them to
    those of the next microbatch, in its shard: a step then sends the same bytes however many it has.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(now, recurse=False)
