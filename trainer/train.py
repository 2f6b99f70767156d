"""A training run: loop, `train_step`.

    python -m trainer.train experiment=demo
    torchrun --nproc-per-node 4 -m trainer.train experiment=demo parallel=hsdp_ep

Exit codes: 0 done and balanced · 2 refused configuration · 3 experts collapsed · 4 data cannot be read · 130 interrupted, saved.
"""

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from torch import Tensor

from trainer import device
from trainer.balance.trace import TraceWriter
from trainer.build import Run, build, loss_weights, refusing, resume, save, stream_counts, summed
from trainer.config import Config, ConfigError, load, looked_up
from trainer.data import BAD_KINDS, COUNTED, BadDocument, Batch, DataError, SourcedBatch
from trainer.directory import open_directory, record_start
from trainer.metrics import MetricsLog, batch_heterogeneity
from trainer.model.afmoe import count_parameters, flops_per_token
from trainer.model.loss import IGNORE, Groups
from trainer.model.parallelize import scale_gradients, squared_gradient_norm
from trainer.pretrained import refuse_early, start_from
from trainer.program import Now

OK, REFUSED, COLLAPSED, NO_DATA, INTERRUPTED = 0, 2, 3, 4, 130


# -- the step ---------------------------------------------------------------------------------------------


def train_step(run: Run, batches: Sequence[Batch | SourcedBatch], *, waited_s: float = 0.0) -> dict[str, float]:
    """One optimizer step on this rank's microbatches of the global batch.

    Every loss is a sum over tokens [nats]; the gradient is divided once, by the global number of targets.
    One all-reduce agrees on loss and targets of the U microbatches of all ranks and of the sources, the gradient norm, what was
    read and waited for, and whether some rank was told to stop.
    """
    now = run.program.at(run.tokens)
    rates = follow(run, now)
    first, num_micro = dist.get_rank(run.group) * len(batches), dist.get_world_size(run.group) * len(batches)
    loss_2U, loss_2S = (torch.zeros(2, n, dtype=torch.float64, device=run.device) for n in (num_micro, len(run.stream.names)))
    for m, batch in enumerate(batches, first):
        tokens_BL, labels_BL, positions_BL, *sources = (t.to(run.device, non_blocking=True) for t in batch)
        loss = run.model(tokens_BL, positions_BL, labels_BL, Groups(sources[0].flatten(), loss_2S) if sources else None)
        loss.backward()
        loss_2U[0, m] = loss.detach()
        loss_2U[1, m] = (labels_BL != IGNORE).sum()
    told = torch.tensor([run.stop.signalled, waited_s, *run.stream.state_counts], dtype=torch.float64).to(run.device)
    parts = [squared_gradient_norm(run.model).double().view(1), told, loss_2S.flatten(), loss_2U.flatten()]
    sums = torch.cat(parts)
    if run.group is not None:
        dist.all_reduce(sums, group=run.group)
    # The step's one wait for a GPU:
    (squared_norm,), (stop, all_waited_s, *counts), loss_2S, loss_2U = sums.cpu().split(list(map(len, parts)))
    (loss_U, targets_U), loss_2S = loss_2U.view(2, -1), loss_2S.view(2, -1)
    num_targets = max(targets_U.sum().item(), 1)
    run.stop.agreed = stop.item() > 0
    loss_mean, grad_norm = loss_U.sum().item() / num_targets, math.sqrt(squared_norm.item()) / num_targets
    if not math.isfinite(grad_norm) or not math.isfinite(loss_mean):
        raise FloatingPointError(
            f"step {run.step + 1}: loss {loss_mean}, gradient norm {grad_norm}; the weights were not touched. "
            "Lower the learning rate, or continue from the last checkpoint with other values."
        )
    scale_gradients(run.model, min(1.0, run.config.max_grad_norm / max(grad_norm, 1e-12)) / num_targets)
    run.step += 1
    run.optimizer.step()
    run.optimizer.zero_grad()
    balance = run.balancer.step(run.step)  # weights first, then biases: counts -> all ranks -> rule -> bias
    run.stop.agreed |= run.balancer.guard.wants_stop
    run.tokens += now.tokens
    spread = {"batch_het": batch_heterogeneity(loss_U, targets_U), **run.window.add(loss=loss_mean, grad_norm=grad_norm)}
    read = data_metrics(counts, loss_2S, run.stream.names)
    read["data/wait_s"] = all_waited_s.item() / dist.get_world_size(run.group)
    values: dict[str, float] = {"step": run.step, "tokens": run.tokens, "loss": loss_mean, "grad_norm": grad_norm}
    return {**values, **rates, **spread, **read, **balance}


def data_metrics(counts: Sequence[Tensor], loss_2S: Tensor, names: Sequence[str]) -> dict[str, float]:
    """What all ranks have read since the start of the run, and the mean loss [nats] of each source that had targets."""
    by_name: dict[str, float] = {name: int(count) for name, count in zip(COUNTED, counts, strict=True)}
    skipped = {"skipped": sum(by_name.pop(kind) for kind in BAD_KINDS)}
    loss_S = {f"loss/{name}": (loss / n).item() for name, loss, n in zip(names, *loss_2S, strict=True) if n}
    return loss_S | {f"data/{name}": count for name, count in {**by_name, **skipped}.items() if name != "tokens"}


def follow(run: Run, now: Now) -> dict[str, float]:
    """Everything that the program changes, set for this step. Returns the learning rates."""
    run.model.lm_head.z_loss_weight = now.z_loss_weight
    run.balancer.set(rate=now.bias_rate, loss_weights=loss_weights(now))
    return run.optimizer.set_learning_rate(now.lr)


def next_batches(run: Run) -> Sequence[Batch | SourcedBatch] | None:
    """This rank's microbatches of the next step, as long and as many as the program says; None: all ranks are at the end."""
    now = run.program.at(run.tokens)
    run.stream.set(
        seq_len=now.seq_len, global_batch=now.global_batch, mixture=now.mixture, buffer=now.buffer, phase=now.phase,
        drain=now.drain,
    )  # fmt: skip
    if run.config.data.at_end == "stop" and not summed(run, torch.tensor(int(run.stream.has_more()))):
        return None
    return run.stream.next_step(now.micro_batch)


def loop(run: Run, metrics: MetricsLog | None) -> None:
    """Trains until the last step, or until some rank is told to stop; saves at intervals and at the end."""
    config = run.config
    peak = device.peak_flops(run.device, getattr(torch, config.dtype)) * dist.get_world_size()
    flop_at = cache(partial(flops_per_token, config.model))
    start_s = time.perf_counter()
    while run.step < run.last_step and not run.stop.agreed:
        now = run.program.at(run.tokens)
        if (batches := next_batches(run)) is None:
            if dist.get_rank() == 0:
                print(f"the corpus is at its end after step {run.step} of {run.last_step}")
            run.end_here()
            save(run)
            break
        values = train_step(run, batches, waited_s=time.perf_counter() - start_s)
        tokens_per_s = now.tokens / (time.perf_counter() - start_s)
        mfu = flop_at(seq_len=now.seq_len) * tokens_per_s / peak
        values |= {"tokens_per_s": tokens_per_s, "mfu": mfu, "memory_gib": device.memory_gib(run.device)}
        if metrics is not None:
            metrics.write(values, alarms=run.balancer.guard.take_alarms())
        if run.step % config.checkpoint.interval == 0 or run.step == run.last_step or run.stop.agreed:
            save(run)
        start_s = time.perf_counter()
    run.checkpoints.finish()


# -- entry point ------------------------------------------------------------------------------------------


def train(config: Config) -> int:
    """The whole run on this rank. Returns the exit code."""
    refuse_early(config)
    run = build(config)
    is_first = dist.get_rank() == 0
    opened = open_directory(config, run.checkpoints, corpus=run.stream.fingerprint, tokenizer=run.stream.tokenizer)
    run.about, run.texts = opened.about, opened.texts
    run.stop.listen()
    if opened.origin is not None:
        with refusing():
            resume(run, opened.origin)
    elif config.init_from is not None:
        start_from(config, run.model, run.stream.tokenizer)
    directory, resumed = run.directory, run.step
    metrics = None
    if is_first:
        record_start(config, program=run.program, step=run.step, tokens=run.tokens, opened=opened)
        announce(run, opened.origin.path if opened.origin else None)
        if config.balance.trace is not None:
            run.balancer.observers += (TraceWriter(directory / config.balance.trace, after_step=resumed),)
        tracker = instantiate(config.logging.tracker)
        start = partial(tracker, directory, asdict(config)) if tracker else None
        metrics = MetricsLog(directory / "metrics.jsonl", steps=run.last_step, interval=config.logging.interval,
                             after_step=resumed, start_tracker=start)  # fmt: skip
    try:
        loop(run, metrics)
    finally:
        run.stream.close()
        if metrics is not None:
            metrics.close()
    return conclude(run)


def announce(run: Run, loaded: Path | None) -> None:
    c, now, count = run.config, run.program.at(run.tokens), count_parameters(run.config.model)
    print(
        f"Triquetra · {c.name}: {count.total / 1e6:.1f}M parameters, {count.active / 1e6:.1f}M active, "
        f"on {dist.get_world_size()} x {run.device.type}, "
        f"{now.global_batch} x {now.seq_len} = {now.tokens} tokens a step"
    )
    if run.step >= run.last_step:
        longer = "steps= trains on" if c.steps is not None else "a longer stage= trains on"
        print(f"{run.directory} is complete at step {run.step}; {longer}, name= starts a new run")
    elif loaded is not None:
        how = "continuing" if run.directory in loaded.parents else f"branching from {loaded}"
        print(f"{how} at step {run.step} of {run.last_step}, {run.tokens} tokens seen")
    elif c.init_from is not None:
        print(f"starting from the weights of {c.init_from}")


def conclude(run: Run) -> int:
    """Prints where everything is and what became of the experts. Returns the exit code, the same on all ranks."""
    done = run.step >= run.last_step
    verdict = run.balancer.verdict()
    read = stream_counts(run)
    num_open, tokens_read = summed(run, torch.tensor(run.stream.open_documents)).tolist()
    if dist.get_rank() == 0:
        print(f"{run.directory}: config.yaml, metrics.jsonl, checkpoints/ (step {run.step})")
        bad = ", ".join(f"{read[kind]} {kind}" for kind in BAD_KINDS if read[kind])
        skipped = f"skipped {bad} (bad_documents.*.txt)" if bad else "none skipped"
        print(f"data: {read['documents']} documents, {read['tokens']} tokens, {skipped}")
        if num_open and any(span.now.buffer for span in run.program.spans):
            print(left_open(read, num_open=num_open, tokens_read=tokens_read))
        if done:
            print(verdict)
        else:
            print(f"stopped at step {run.step} of {run.last_step}, saved; the same command continues")
    return INTERRUPTED if not done else OK if verdict.ok else COLLAPSED


def left_open(read: dict[str, int], *, num_open: int, tokens_read: int) -> str:
    """Draws are uniform, so documents that are still open are the long ones: the user should know."""
    of_open, of_ended = (tokens_read + read["open"]) / num_open, (read["tokens"] - tokens_read) / max(1, read["documents"])
    share = read["open"] / (read["open"] + read["tokens"])
    text = f"buffer: {num_open} documents are still open, {read['open']} of their tokens unread ({share:.0%} of all opened)"
    short = "; long documents came short so far" if read["documents"] and of_open > 1.1 * of_ended else ""
    return f"{text}; their mean length is {of_open:.0f}, of those that ended {of_ended:.0f}{short}"


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    overrides = sys.argv[1:]
    try:
        if (text := looked_up(overrides, __doc__)) is not None:
            print(text)
            return OK
        return train(load(overrides))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except (BadDocument, DataError) as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return NO_DATA
    except KeyboardInterrupt:
        print("interrupted before the first step; nothing to save", file=sys.stderr)
        return INTERRUPTED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
