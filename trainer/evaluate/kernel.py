"""What does the model make of rows that it never trains on? Sums, the same on any layout; nothing is changed.

The model stays in evaluation mode for as long as the rows take: nothing is counted for the balancing rule,
no random number is drawn, no gradient exists. Sums are taken in float64 over the ranks that hold other
tokens.

Letters: G groups, M MoE layers, E experts, S sums of a layer (model/router.py, `use_sums`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trainer.evaluate.rows import Part, share_of
from trainer.model.afmoe import moe_layers
from trainer.model.loss import Groups
from trainer.run.state import Run
from trainer.run.step import exit_code, held, told_to_stop

ASK_EVERY = 16  # [microbatches] between two questions whether some rank was told to stop


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one part, over all ranks; on the host."""

    part: Part
    loss_G: Tensor  # [nats] summed over the targets
    targets_G: Tensor
    hits_G: Tensor  # targets that were the most likely token
    counts_ME: Tensor  # [tokens] that each expert received; padding is not counted
    tokens_M: Tensor  # [tokens] that a layer routed
    confidence_M: Tensor  # sum over tokens of the largest gate's share of its token's gates


def measure(run: Run, part: Part, *, heartbeat: Callable[[], None] = lambda: None) -> Measured | None:
    """Forward passes over the rows of a part. None: some rank was told to stop (`run.stop.agreed`).

    heartbeat: called before each microbatch. Collective.
    """
    now, length = run.program.settings_at(run.tokens), part.tokens_RL.shape[1]
    rows = max(1, now.micro_batch * now.seq_len // length)  # no more tokens at a time than in training
    batches = share_of(
        part,
        reader=run.groups.reader,
        num_readers=run.groups.num_readers,
        micro_batch=rows,
        multiple=run.model.cut.multiple,
    )
    layers = moe_layers(run.model)
    sums_3G = torch.zeros(3, part.num_groups, dtype=torch.float64, device=run.device)
    with evaluating(run) as use_of_layers:
        for i, batch in enumerate(batches):
            heartbeat()
            if i % ASK_EVERY == 0 and is_told_to_stop(run):
                return None
            tokens_BL, labels_BL, positions_BL, groups_BL = held(run, batch)
            run.model(tokens_BL, positions_BL, labels_BL, Groups(groups_BL.flatten(), sums_3G))
        packed = torch.cat([sums_3G.flatten(), *use_of_layers])
    if run.groups.tokens is not None:
        dist.all_reduce(packed, group=run.groups.tokens)
    sums, use = packed.cpu().split([sums_3G.numel(), packed.numel() - sums_3G.numel()])
    loss_G, targets_G, hits_G = sums.view(3, part.num_groups)
    num_experts = run.config.model.num_experts
    counts_ME, tokens_M1, confidence_M1 = use.view(len(layers), num_experts + 2).split(
        [num_experts, 1, 1], dim=1
    )
    return Measured(
        part=part,
        loss_G=loss_G,
        targets_G=targets_G,
        hits_G=hits_G,
        counts_ME=counts_ME,
        tokens_M=tokens_M1.squeeze(1),
        confidence_M=confidence_M1.squeeze(1),
    )


@contextmanager
def evaluating(run: Run) -> Iterator[list[Tensor]]:
    """The model in evaluation mode, its layers adding up where tokens go: one vector S for each MoE layer."""
    layers = moe_layers(run.model)
    for layer in layers:
        layer.use_S = layer.routing_sums_S.new_zeros(len(layer.expert_bias_E) + 2, dtype=torch.float64)
    run.model.eval()
    try:
        with torch.no_grad():
            yield [layer.use_S for layer in layers]
    finally:
        for layer in layers:
            layer.use_S = None
        run.model.train()
        for module in run.model.modules():  # whole weights must not outlive the next optimizer step
            if isinstance(module, FSDPModule):
                module.reshard()


def is_told_to_stop(run: Run) -> bool:
    """Has any rank received a signal? Then `run.stop.agreed` is set, on all ranks. Collective."""
    told_2 = told_to_stop(run).to(run.device, torch.int64)
    if run.groups.tokens is not None:
        dist.all_reduce(told_2, group=run.groups.tokens)
    code = exit_code(told_2)
    if code is not None:
        run.stop.agreed = code
    return code is not None
