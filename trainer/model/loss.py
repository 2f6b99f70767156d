"""What does a row of hidden states cost as a prediction of its labels?

Letters: T tokens, D model dim, V vocabulary. Losses are sums over tokens [nats].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # label of a token that predicts nothing: the last of a document, padding
CHUNK_LOGITS = 2**22  # logits alive at a time on a CPU: 16 MiB in float32, which its caches hold
ROWS = 64  # of logits that become gradients at a time there: in bfloat16, no more of them are in float32
# On a GPU each chunk reads the head's weight twice, and reads and writes its whole float32 gradient: chunks
# are of thousands of tokens. 1 GiB of float32, or 1,024 tokens if these are more; Large: 0.8 GiB.
GPU_CHUNK_LOGITS, GPU_CHUNK_TOKENS = 2**28, 1024


class Groups(NamedTuple):
    """Which group each token belongs to, and the sums of each group so far, float64.

    sums_NG: loss [nats] and targets; with a third row also the targets that are the most likely token, as
    greedy decoding would write them.
    """

    of_T: Tensor
    sums_NG: Tensor


def chunk_tokens(vocab_size: int, *, on: torch.device) -> int:
    """How many tokens have their logits alive at a time."""
    if on.type == "cpu":
        return max(1, CHUNK_LOGITS // vocab_size)
    return GPU_CHUNK_TOKENS * max(1, GPU_CHUNK_LOGITS // GPU_CHUNK_TOKENS // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    """Both gradients are made in the forward pass, chunk by chunk, so the T x V logits never exist at
    once.
    """

    @staticmethod
    def forward(
        ctx, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, z_loss_weight: float, groups: Groups | None
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        wants_hits = groups is not None and len(groups.sums_NG) == 3
        chunk = chunk_tokens(len(weight_VD), on=x_TD.device)
        loss = x_TD.new_zeros((), dtype=torch.float32)
        grad_x_TD = torch.empty_like(x_TD if needs_grad else x_TD[:0])
        grad_weight_VD = torch.zeros_like(weight_VD if needs_grad else weight_VD[:0], dtype=torch.float32)
        rows = ROWS if x_TD.device.type == "cpu" else chunk
        for start in range(0, len(x_TD), chunk):
            x_tD, labels_t = x_TD[start : start + chunk], labels_T[start : start + chunk]
            logits_tV = x_tD @ weight_VD.T
            counts_t = labels_t != IGNORE
            target_t1 = labels_t.clamp_min(0).unsqueeze(1)
            is_hit_t = logits_tV.argmax(1) == labels_t if wants_hits else None
            target_logit_t = logits_tV.gather(1, target_t1).squeeze(1).float()
            blocks = (each.split(rows) for each in (logits_tV, target_t1, counts_t.unsqueeze(1)))
            parts = [
                become_gradients(*block, z_loss_weight, needs_grad=needs_grad)
                for block in zip(*blocks, strict=True)
            ]
            loss_t = (torch.cat(parts).squeeze(1) - target_logit_t) * counts_t
            loss += loss_t.sum()
            if groups is not None:
                values = [loss_t, counts_t.float()] + ([is_hit_t.float()] if wants_hits else [])
                add_by_group(groups.sums_NG, groups.of_T[start : start + chunk], torch.stack(values).double())
            if not needs_grad:
                continue
            grad_tV = logits_tV  # what they have become
            torch.mm(grad_tV, weight_VD, out=grad_x_TD[start : start + chunk])
            if grad_weight_VD.dtype == grad_tV.dtype:
                grad_weight_VD.addmm_(grad_tV.T, x_tD)
            else:
                grad_weight_VD += grad_tV.T @ x_tD
        if needs_grad:
            ctx.save_for_backward(grad_x_TD, grad_weight_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        return grad_x_TD * grad_loss, grad_weight_VD * grad_loss, None, None, None


def become_gradients(
    logits_rV: Tensor, target_r1: Tensor, counts_r1: Tensor, z_loss_weight: float, *, needs_grad: bool
) -> Tensor:
    """The lse. Logits become, if needed, the gradient of lse + z_loss_weight lse^2 - target."""
    exp_rV = logits_rV.float()
    max_r1 = exp_rV.amax(1, keepdim=True)
    sum_r1 = exp_rV.sub_(max_r1).exp_().sum(1, keepdim=True)
    lse_r1 = sum_r1.log() + max_r1
    if needs_grad:
        d_lse_r1 = counts_r1 * (1 + 2 * z_loss_weight * lse_r1)
        grad_rV = exp_rV.mul_(d_lse_r1 / sum_r1)  # the softmax is d lse / d logits
        logits_rV.copy_(grad_rV.scatter_add_(1, target_r1, -counts_r1.float()))
    return lse_r1


def add_by_group(sums_NG: Tensor, group_t: Tensor, values_Nt: Tensor) -> None:
    """Adds each token's values to the sums of its group, in the same order every time: on a GPU index_add_
    adds in the order in which its threads come.
    """
    if sums_NG.device.type == "cpu":
        sums_NG.index_add_(1, group_t, values_Nt)
    else:
        sums_NG += sums_by_group(values_Nt, group_t, num_groups=sums_NG.shape[1])


def sums_by_group(values_Nt: Tensor, group_t: Tensor, *, num_groups: int) -> Tensor:
    """Each group's own sum, so that a loss that is not finite stays in its group."""
    of_group_Gt = torch.arange(num_groups, device=group_t.device).unsqueeze(1) == group_t
    return torch.stack([torch.where(of_group_Gt, x_t, 0).sum(1) for x_t in values_Nt], dim=0)


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    z_loss_weight: float = 0.0,
    groups: Groups | None = None,
) -> Tensor:
    """Cross entropy of the logits x @ weight.T, summed over the tokens whose label is not IGNORE.

    The value is the cross entropy alone; the gradient is that of cross entropy + z_loss_weight * lse^2, with
    lse = logsumexp(logits) (z-loss, arXiv:2602.17004, section 2.2). float32 inside, whatever the inputs are.
    Losses and targets are added to the sums of their groups. Under no_grad no gradient is computed.
    """
    if not torch.is_grad_enabled():  # even then a Function is told that a weight's gradient is wanted
        x_TD, weight_VD = x_TD.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, z_loss_weight, groups)
