"""What is one optimizer step: which batches, which gradient, is it applied, and what is said about it?

Letters: U microbatches of all ranks in a step, S sources, B rows of a microbatch, L tokens of a row.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from signal import SIGINT
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.data import BAD_KINDS, COUNTED, BadDocument, Batch, DataError, SourcedBatch
from trainer.metrics import batch_heterogeneity
from trainer.model.loss import IGNORE, Groups
from trainer.model.parallelize import scale_gradients, squared_gradient_norm
from trainer.program import Now
from trainer.ranks.stop import INTERRUPTED, PREEMPTED, UNSOUND
from trainer.run.build import Run, loss_weights, summed

T = TypeVar("T")
log = logging.getLogger(__name__)


def next_batches(run: Run) -> Sequence[Batch | SourcedBatch] | None:
    """This rank's microbatches of the next step, as long and as many as the program says; None: all ranks are
    at the end.

    If they cannot be read, `run.unread` says why, and the batches are blank: the other ranks hear of it in
    the step.
    """
    now = run.program.at(run.tokens)
    run.stream.set(
        seq_len=now.seq_len,
        global_batch=now.global_batch,
        mixture=now.mixture,
        buffer=now.buffer,
        phase=now.phase,
        drain=now.drain,
    )
    has_more = attempt(run, run.stream.has_more, otherwise=True)
    if run.config.data.at_end == "stop" and not summed(run, torch.tensor(int(has_more))):
        return None
    blank = run.stream.blank_step(now.micro_batch)
    return attempt(run, partial(run.stream.next_step, now.micro_batch), otherwise=blank)


def attempt(run: Run, read: Callable[[], T], *, otherwise: T) -> T:
    try:
        return otherwise if run.unread else read()
    except (BadDocument, DataError) as error:
        run.unread = error
        return otherwise


def train_step(
    run: Run, batches: Sequence[Batch | SourcedBatch], *, waited_s: float = 0.0
) -> dict[str, float] | None:
    """One optimizer step on this rank's microbatches of the global batch.

    Every loss is a sum over tokens [nats]; the gradient is divided once, by the global number of targets.
    One all-reduce agrees on loss and targets of the U microbatches of all ranks and of the sources, the
    gradient norm, what was read and waited for, and whether some rank was told to stop or has no rows.
    Returns the metrics; None if a rank had no rows: then nothing has changed.
    """
    now = run.program.at(run.tokens)
    rates = follow(run, now)
    torch.manual_seed(random_seed(run))
    first, num_micro = dist.get_rank(run.group) * len(batches), dist.get_world_size(run.group) * len(batches)
    loss_2U, loss_2S = (
        torch.zeros(2, n, dtype=torch.float64, device=run.device) for n in (num_micro, len(run.stream.names))
    )
    for m, batch in enumerate(batches, first):
        tokens_BL, labels_BL, positions_BL, *sources = (t.to(run.device, non_blocking=True) for t in batch)
        loss = run.model(
            tokens_BL, positions_BL, labels_BL, Groups(sources[0].flatten(), loss_2S) if sources else None
        )
        loss.backward()
        loss_2U[0, m] = loss.detach()
        loss_2U[1, m] = (labels_BL != IGNORE).sum()
    signal = (run.stop.signalled is not None, run.stop.signalled == SIGINT)
    told = torch.tensor(
        [*signal, run.unread is not None, waited_s, *run.stream.state_counts], dtype=torch.float64
    ).to(run.device)
    parts = [squared_gradient_norm(run.model).double().view(1), told, loss_2S.flatten(), loss_2U.flatten()]
    sums = torch.cat(parts)
    if run.group is not None:
        dist.all_reduce(sums, group=run.group)
    # The step's one wait for a GPU:
    (squared_norm,), (stop, by_hand, unread, all_waited_s, *counts), loss_2S, loss_2U = sums.cpu().split(
        list(map(len, parts))
    )
    (loss_U, targets_U), loss_2S = loss_2U.view(2, -1), loss_2S.view(2, -1)
    num_targets = max(targets_U.sum().item(), 1)
    if stop > 0:
        run.stop.agreed = INTERRUPTED if by_hand > 0 else PREEMPTED
    loss_mean, grad_norm = loss_U.sum().item() / num_targets, math.sqrt(squared_norm.item()) / num_targets
    if unread > 0:
        discard(run)
        return None
    run.step, run.tokens = run.step + 1, run.tokens + now.tokens
    spread, balance = {"batch_het": batch_heterogeneity(loss_U, targets_U)}, dict[str, float]()
    if run.health.skips(loss=loss_mean, grad_norm=grad_norm, applied_2W=run.window.applied_2W):
        discard(run)
        warn_of_skipped(run, loss_U)
    else:
        scale_gradients(run.model, min(1.0, run.config.max_grad_norm / max(grad_norm, 1e-12)) / num_targets)
        run.optimizer.step()
        run.optimizer.zero_grad()
        spread |= run.window.add(loss=loss_mean, grad_norm=grad_norm)
        # weights first, then biases: counts -> all ranks -> rule -> bias
        balance = run.balancer.step(run.step)
        if run.balancer.guard.wants_stop:
            run.stop.agreed = UNSOUND
    read = data_metrics(counts, loss_2S, run.stream.names)
    read["data/wait_s"] = all_waited_s.item() / dist.get_world_size(run.group)
    values: dict[str, float] = {
        "step": run.step,
        "tokens": run.tokens,
        "loss": loss_mean,
        "grad_norm": grad_norm,
    }
    values |= {**rates, **spread, "skipped_steps": run.health.total, **read, **balance}
    return {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no NaN


def discard(run: Run) -> None:
    """This step's gradients and counts are dropped: weights, optimizer and biases are as they were."""
    run.optimizer.zero_grad()
    run.balancer.discard()


def warn_of_skipped(run: Run, loss_U: Tensor) -> None:
    if dist.get_rank() == 0:
        per_rank = len(loss_U) // dist.get_world_size(run.group)
        ranks = sorted({m // per_rank for m in (~loss_U.isfinite()).nonzero().flatten().tolist()})
        where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
        times = f"skipped in a row: {run.health.in_row}, at most {run.health.most}"
        log.warning("step %d was not applied: %s%s (%s)", run.step, run.health.reason, where, times)


def data_metrics(counts: Sequence[Tensor], loss_2S: Tensor, names: Sequence[str]) -> dict[str, float]:
    """What all ranks have read since the start of the run, and the mean loss [nats] of each source that had
    targets.
    """
    by_name: dict[str, float] = {name: int(count) for name, count in zip(COUNTED, counts, strict=True)}
    skipped = {"skipped": sum(by_name.pop(kind) for kind in BAD_KINDS)}
    loss_S = {f"loss/{name}": (loss / n).item() for name, loss, n in zip(names, *loss_2S, strict=True) if n}
    return loss_S | {
        f"data/{name}": count for name, count in {**by_name, **skipped}.items() if name != "tokens"
    }


def random_seed(run: Run) -> int:
    """Of this step on this rank: random numbers are a function of the step, so a resumed run draws the same
    ones.
    """
    key = f"{run.config.seed} {run.step} {dist.get_rank()}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def follow(run: Run, now: Now) -> dict[str, float]:
    """Everything that the program changes, set for this step. Returns the learning rates."""
    run.model.lm_head.z_loss_weight = now.z_loss_weight
    run.balancer.set(rate=now.bias_rate, loss_weights=loss_weights(now))
    return run.optimizer.set_learning_rate(now.lr)
