"""What is one optimizer step: which batches, which gradient, is it applied, and what is said about it?

Letters: U microbatches of all ranks in a step, S sources, B rows of a microbatch, L tokens of a row.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from signal import SIGINT
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.data import BAD_KINDS, COUNTED, BadDocument, Batch, DataError, SourcedBatch
from trainer.metrics import batch_heterogeneity
from trainer.model.loss import IGNORE
from trainer.model.loss import Groups as LossGroups
from trainer.model.parallelize import reduce_over_replicas
from trainer.program import StepSettings
from trainer.ranks import device
from trainer.ranks.local import scale_gradients, squared_gradient_norm
from trainer.ranks.stop import INTERRUPTED, PREEMPTED, UNSOUND
from trainer.run.build import loss_weights
from trainer.run.state import Run
from trainer.size import step_flops

T = TypeVar("T")
log = logging.getLogger(__name__)


def next_batches(run: Run) -> Sequence[Batch | SourcedBatch] | None:
    """This rank's microbatches of the next step, as long and as many as the program says; None: all ranks are
    at the end.

    If they cannot be read, `run.unread` says why, and the batches are blank: the other ranks hear of it in
    the step.
    """
    now = run.program.settings_at(run.tokens)
    run.stream.set(
        seq_len=now.seq_len,
        global_batch=now.global_batch,
        mixture=now.mixture,
        buffer=now.buffer,
        phase=now.phase,
        drain=now.drain,
        turn=run.tokens // now.tokens,
    )
    has_more = attempt(run, run.stream.has_more, otherwise=True)
    if run.config.data.at_end == "stop" and not run.over_documents(int(has_more)):
        return None
    blank = run.stream.blank_step(now.micro_batch)
    return attempt(run, partial(run.stream.next_step, now.micro_batch), otherwise=blank)


def attempt(run: Run, read: Callable[[], T], *, otherwise: T) -> T:
    try:
        return otherwise if run.unread else read()
    except (BadDocument, DataError) as error:
        run.unread = error
        return otherwise


@dataclass(kw_only=True)
class StepSums:
    """What all ranks have to know of a step. Summed over them in one all-reduce, in float64.

    Each field holds this rank's share before `all_reduce`, and the sum over ranks with other tokens after it.
    """

    squared_norm: Tensor  # of the gradient
    stop: Tensor  # ranks that were told to stop, and by hand (Ctrl-C)
    unread: Tensor  # ranks that could not read their rows
    waited_s: Tensor  # [s] for rows
    tokens: Tensor  # of this step, without padding
    flop: Tensor  # that the model needs for them
    counts: Tensor  # what was read since the start of the run, in the order of COUNTED
    loss_2S: Tensor  # loss [nats] and targets of each source
    loss_2U: Tensor  # loss [nats] and targets of each microbatch

    def all_reduce(self, group: dist.ProcessGroup | None) -> "StepSums":
        """The sums over `group` on the host: the step's one wait for a GPU. Collective."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        on = parts["loss_2U"].device
        packed = torch.cat([part.to(on, torch.float64).flatten() for part in parts.values()])
        if group is not None:
            dist.all_reduce(packed, group=group)
        sums = packed.cpu().split([part.numel() for part in parts.values()])
        shapes = [part.shape for part in parts.values()]
        return StepSums(**{name: x.view(s) for name, x, s in zip(parts, sums, shapes, strict=True)})

    @property
    def num_targets(self) -> float:
        return max(self.loss_2U[1].sum().item(), 1)

    @property
    def loss_mean(self) -> float:
        """[nats] per target."""
        return self.loss_2U[0].sum().item() / self.num_targets

    @property
    def grad_norm(self) -> float:
        """Of the mean loss."""
        return math.sqrt(self.squared_norm.item()) / self.num_targets


def train_step(
    run: Run, batches: Sequence[Batch | SourcedBatch], *, waited_s: float = 0.0
) -> dict[str, float] | None:
    """One optimizer step on this rank's microbatches of the global batch.

    Every loss is a sum over tokens [nats]; the gradient is divided once, by the global number of targets.
    One all-reduce (`StepSums`) tells all ranks what they decide from. Returns the metrics; None if a rank
    had no rows: then nothing has changed.
    """
    now = run.program.settings_at(run.tokens)
    rates = apply_settings(run, now, label_share=label_share(run, batches))
    torch.manual_seed(random_seed(run))
    sums = backward(run, batches, waited_s=waited_s).all_reduce(run.groups.tokens)
    if (by_signal := exit_code(sums.stop)) is not None:
        run.stop.agreed = by_signal
    if sums.unread > 0:
        discard(run)
        return None
    run.step, run.tokens = run.step + 1, run.tokens + now.tokens
    loss, grad_norm = sums.loss_mean, sums.grad_norm
    values: dict[str, float] = {"step": run.step, "tokens": run.tokens, "loss": loss, "grad_norm": grad_norm}
    values |= rates
    values["batch_het"] = batch_heterogeneity(*sums.loss_2U)
    balance = dict[str, float]()
    if run.health.skips(loss=loss, grad_norm=grad_norm, applied_2W=run.window.applied_2W):
        discard(run)
        warn_of_skipped(run, sums.loss_2U[0])
    else:
        clip = min(1.0, run.config.max_grad_norm / max(grad_norm, 1e-12))
        scale_gradients(run.model, clip / sums.num_targets)
        run.optimizer.step()
        run.optimizer.zero_grad()
        values |= run.window.add(loss=loss, grad_norm=grad_norm)
        # Weights first, then biases: counts -> all ranks -> rule -> bias.
        balance = run.balancer.step(run.step)
        if run.balancer.guard.wants_stop:
            run.stop.agreed = UNSOUND
    values["skipped_steps"] = run.health.total
    values |= data_metrics(sums, run.stream.names)
    values |= {"data/step_tokens": sums.tokens.item(), "data/step_flop": sums.flop.item()}
    values["data/wait_s"] = sums.waited_s.item() / run.groups.num_readers
    values |= balance
    return {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no NaN


def backward(run: Run, batches: Sequence[Batch | SourcedBatch], *, waited_s: float) -> StepSums:
    """Forward and backward of this rank's microbatches; what it has to tell the other ranks."""
    on, groups = run.device, run.groups
    loss_2S = torch.zeros(2, len(run.stream.names), dtype=torch.float64, device=on)
    loss_2U = torch.zeros(2, groups.num_readers * len(batches), dtype=torch.float64, device=on)
    flop = 0.0
    first, last = groups.reader * len(batches), (groups.reader + 1) * len(batches) - 1
    for m, batch in enumerate(batches, start=first):
        tokens_BL, labels_BL, positions_BL, *sources = held(run, batch)
        flop += step_flops(run.config.model, batch.positions_BL)
        by_source = LossGroups(sources[0].flatten(), loss_2S) if sources else None
        loss = run.model(tokens_BL, positions_BL, labels_BL, by_source)
        reduce_over_replicas(run.model, now=m == last)
        loss.backward()
        loss_2U[0, m] = loss.detach()
        loss_2U[1, m] = (labels_BL != IGNORE).sum()
    once = float(groups.is_first_of_row)  # what the ranks of a row have in common is counted once
    return StepSums(
        squared_norm=squared_gradient_norm(run.model).double(),
        stop=told_to_stop(run),
        unread=torch.tensor(run.unread is not None),
        waited_s=torch.tensor(waited_s * once, dtype=torch.float64),
        tokens=torch.tensor(run.stream.step_tokens * once),
        flop=torch.tensor(flop * once, dtype=torch.float64),
        counts=torch.tensor(run.stream.state_counts, dtype=torch.float64) * once,
        loss_2S=loss_2S,
        loss_2U=loss_2U,
    )


def held(run: Run, batch: Sequence[Tensor]) -> list[Tensor]:
    """The planes of a microbatch on this rank's device: the positions of whole rows, and of all else the
    tokens that this rank holds of them.
    """
    own = run.model.cut.own
    tokens_BL, labels_BL, positions_BL, *others = batch
    planes = [own(tokens_BL), own(labels_BL), positions_BL, *map(own, others)]
    return [device.onto(run.device, plane) for plane in planes]


def told_to_stop(run: Run) -> Tensor:
    """Was this rank told to stop, and by hand (Ctrl-C)? To be summed over ranks, for `exit_code`."""
    signal = run.stop.signalled
    return torch.tensor([signal is not None, signal == SIGINT])


def exit_code(told_2: Tensor) -> int | None:
    """With which the run ends, if some rank was told to stop."""
    is_told, by_hand = (told_2 > 0).tolist()
    return None if not is_told else INTERRUPTED if by_hand else PREEMPTED


def discard(run: Run) -> None:
    """This step's gradients and counts are dropped: weights, optimizer and biases are as they were."""
    run.optimizer.zero_grad()
    run.balancer.discard()


def warn_of_skipped(run: Run, loss_U: Tensor) -> None:
    if dist.get_rank() == 0:
        per_reader = len(loss_U) // run.groups.num_readers
        ranks = sorted({m // per_reader for m in (~loss_U.isfinite()).nonzero().flatten().tolist()})
        where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
        times = f"skipped in a row: {run.health.in_row}, at most {run.health.most}"
        log.warning("step %d was not applied: %s%s (%s)", run.step, run.health.reason, where, times)


def data_metrics(sums: StepSums, names: Sequence[str]) -> dict[str, float]:
    """What all ranks have read since the start of the run; of each source with targets in the step their mean
    loss [nats] and their number.
    """
    counts: dict[str, float] = {name: int(n) for name, n in zip(COUNTED, sums.counts, strict=True)}
    skipped = sum(counts.pop(kind) for kind in BAD_KINDS)
    del counts["tokens"]
    loss_S, targets_S = sums.loss_2S
    metrics = dict[str, float]()
    for name, loss, targets in zip(names, loss_S.tolist(), targets_S.tolist(), strict=True):
        if targets:
            metrics |= {f"loss/{name}": loss / targets, f"data/targets/{name}": int(targets)}
    return metrics | {f"data/{name}": count for name, count in counts.items()} | {"data/skipped": skipped}


def random_seed(run: Run) -> int:
    """Of this step on this rank: random numbers are a function of the step, so a resumed run draws the same
    ones.
    """
    key = f"{run.config.seed} {run.step} {dist.get_rank()}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def label_share(run: Run, batches: Sequence[Batch | SourcedBatch]) -> float:
    """Of the labels of this step, the part that masks leave: N / (N + W) of docs/numerics.md.

    Without sources that mask it is 1, and nothing is sent. Collective where they may.
    """
    if not run.stream.may_mask:
        return 1.0
    once = int(run.groups.is_first_of_row)
    targets = sum(int((batch.labels_BL != IGNORE).sum()) for batch in batches)
    sums_2 = torch.tensor([targets * once, run.stream.step_withheld * once], device=run.device)
    if run.groups.tokens is not None:
        dist.all_reduce(sums_2, group=run.groups.tokens)
    num_targets, num_withheld = sums_2.tolist()
    return num_targets / (num_targets + num_withheld) if num_targets else 1.0


def apply_settings(run: Run, now: StepSettings, *, label_share: float) -> dict[str, float]:
    """Everything that the program changes, set for this step. Returns the learning rates."""
    run.model.lm_head.z_loss_weight = now.z_loss_weight
    weights = loss_weights(now)
    run.balancer.set(rate=now.bias_rate, loss_weights=weights, label_share=label_share)
    return run.optimizer.set_learning_rate(now.lr)
