"""A training run: build, loop, `train_step`.

    python -m trainer.train experiment=demo
    torchrun --nproc-per-node 4 -m trainer.train experiment=demo parallel=hsdp_ep

Exit codes: 0 done and balanced · 2 refused configuration · 3 experts collapsed · 130 interrupted, saved.
"""

import logging
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from trainer import device
from trainer.balance import Balancer, Guard, LossWeights
from trainer.balance.trace import TraceWriter
from trainer.checkpoint import set_training_state, training_state
from trainer.config import BalanceConfig, Config, ConfigError, load, resolved_yaml, usage
from trainer.data import BAD_KINDS, COUNTED, Batch, TokenStream, load_tokenizer
from trainer.device import ParallelDims
from trainer.directory import BadDocumentLog, checkpoints_of, find_checkpoint, open_directory, record_start, run_directory
from trainer.metrics import MetricsLog
from trainer.model.afmoe import Afmoe, afmoe_config, count_parameters, flops_per_token, moe_layers
from trainer.model.init import initialize
from trainer.model.loss import IGNORE
from trainer.model.parallelize import build_parallel, scale_gradients, squared_gradient_norm
from trainer.optim import Optimizers
from trainer.program import Now, Program, program_of
from trainer.stop import StopRequest

OK, REFUSED, COLLAPSED, INTERRUPTED = 0, 2, 3, 130


@dataclass(kw_only=True)
class Run:
    """Everything that the loop touches."""

    config: Config
    device: torch.device
    dims: ParallelDims
    model: Afmoe
    optimizer: Optimizers
    program: Program
    balancer: Balancer
    stream: TokenStream
    group: dist.ProcessGroup | None  # ranks with other tokens; None: there are none
    stop: StopRequest
    step: int = 0
    tokens: int = 0  # trained on so far, over all ranks
    last_step: int  # where the program ends, seen from here

    @property
    def directory(self) -> Path:
        return run_directory(self.config)


# -- the step ---------------------------------------------------------------------------------------------


def train_step(run: Run, batches: list[Batch]) -> dict[str, float]:
    """One optimizer step on this rank's microbatches of the global batch.

    Every loss is a sum over tokens [nats]; the gradient is divided once, by the global number of targets.
    One all-reduce agrees on the loss, the targets, the gradient norm and whether some rank was told to stop.
    """
    now = run.program.at(run.tokens)
    rates = follow(run, now)
    sums = torch.zeros(4, dtype=torch.float64, device=run.device)  # loss, targets, squared gradient norm, stop
    for batch in batches:
        tokens_BL, labels_BL, positions_BL = (t.to(run.device, non_blocking=True) for t in batch)
        loss = run.model(tokens_BL, positions_BL, labels_BL)
        loss.backward()
        sums[0] += loss.detach()
        sums[1] += (labels_BL != IGNORE).sum()
    sums[2] = squared_gradient_norm(run.model)
    sums[3] = run.stop.signalled
    if run.group is not None:
        dist.all_reduce(sums, group=run.group)
    loss_sum, num_targets, squared_norm, stop = sums.tolist()
    num_targets = max(num_targets, 1)
    run.stop.agreed = stop > 0
    loss_mean, grad_norm = loss_sum / num_targets, math.sqrt(squared_norm) / num_targets
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
    return {"step": run.step, "tokens": run.tokens, "loss": loss_mean, "grad_norm": grad_norm, **rates, **balance}


def follow(run: Run, now: Now) -> dict[str, float]:
    """Everything that the program changes, set for this step. Returns the learning rates."""
    run.model.lm_head.z_loss_weight = now.z_loss_weight
    run.balancer.set(rate=now.bias_rate, loss_weights=loss_weights(now))
    return run.optimizer.set_learning_rate(now.lr)


def next_batches(run: Run) -> list[Batch]:
    """This rank's microbatches of the next step, as long and as many as the program says."""
    now = run.program.at(run.tokens)
    run.stream.resize(seq_len=now.seq_len, global_batch=now.global_batch)
    return run.stream.next_step(now.micro_batch)


def loop(run: Run, metrics: MetricsLog | None) -> None:
    """Trains until the last step, or until some rank is told to stop; saves at intervals and at the end."""
    config, checkpoints = run.config, checkpoints_of(run.config)
    peak = device.peak_flops(run.device, getattr(torch, config.dtype)) * dist.get_world_size()
    flop_at = cache(partial(flops_per_token, config.model))
    start_s = time.perf_counter()
    while run.step < run.last_step and not run.stop.agreed:
        now = run.program.at(run.tokens)
        values = train_step(run, next_batches(run))
        tokens_per_s = now.tokens / (time.perf_counter() - start_s)
        mfu = flop_at(seq_len=now.seq_len) * tokens_per_s / peak
        values |= {"tokens_per_s": tokens_per_s, "mfu": mfu, "memory_gib": device.memory_gib(run.device)}
        if metrics is not None:
            metrics.write(values, alarms=run.balancer.guard.take_alarms())
        if run.step % config.checkpoint.interval == 0 or run.step == run.last_step or run.stop.agreed:
            checkpoints.save(run.step, full_state(run))
        start_s = time.perf_counter()


# -- building and resuming --------------------------------------------------------------------------------


def build(config: Config) -> Run:
    """Joins the process group and builds everything on this rank. Raises: ConfigError before any training."""
    on = device.start(timeout_s=config.timeout_s)
    has_experts = config.model.num_dense_layers < config.model.num_layers
    dims = device.build_mesh(config.parallel, num_experts=config.model.num_experts if has_experts else None)
    program = program_of(config)
    first = program.spans[0].now
    with refusing():
        stream = build_stream(config, program, dims)
        rule = instantiate(config.balance.rule)
        num_moe = config.model.num_layers - config.model.num_dense_layers
        rule = rule((num_moe, config.model.num_experts)).to(on) if rule is not None and num_moe else None
    shape = afmoe_config(
        config.model,
        flex=on.type == "cuda",
        loss_weights=loss_weights(first),
        z_loss_weight=first.z_loss_weight,
    )
    model = build_parallel(
        shape,
        dims,
        dtype=getattr(torch, config.dtype),
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
    )
    initialize(model, device=on, seed=config.seed)
    with refusing():
        optimizer = Optimizers(instantiate(config.optim)(model))
    mesh = dims.get_optional_mesh("loss")
    group = mesh.get_group() if mesh is not None else None
    required = config.balance.trace is not None and config.balance.trace_required
    with refusing():
        guard = Guard((num_moe, config.model.num_experts), **vars(config.guard)).to(on)
    balancer = Balancer(moe_layers(model), rule, steps=program.last_step(), group=group, guard=guard, required=required)
    return Run(config=config, device=on, dims=dims, model=model, optimizer=optimizer, program=program, balancer=balancer,
               stream=stream, group=group, stop=StopRequest(), last_step=program.last_step())  # fmt: skip


def build_stream(config: Config, program: Program, dims: ParallelDims) -> TokenStream:
    """This rank's share of the token stream. Rank 0 trains the tokenizer, if it must be trained, before the others look."""
    mesh = dims.get_optional_mesh("batch")
    rank, num_ranks = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
    d, first = config.data, program.spans[0].now
    for span in program.spans:
        if span.now.mixture or span.now.buffer:
            what = f"buffer={span.now.buffer}" if span.now.buffer else f"mixture={span.now.mixture}"
            raise ConfigError(f"stage.{span.name}: {what}: training reads one source in order so far; set it to null to train")
    program.check_split(num_ranks=num_ranks, num_streams=d.num_streams)
    source = instantiate(d.source)
    tokenizer = None
    for turn in (0, 1):
        if d.tokenizer is not None and turn == min(dist.get_rank(), 1):
            tokenizer = load_tokenizer(d.tokenizer, source=source, vocab_size=config.model.vocab_size, cache_dir=d.cache_dir)
        dist.barrier()
    return TokenStream(
        source=source,
        tokenizer=tokenizer,
        seq_len=first.seq_len,
        global_batch=first.global_batch,
        num_streams=d.num_streams,
        seed=config.seed,
        rank=rank,
        num_ranks=num_ranks,
        shuffle=d.shuffle,
        on_bad=d.on_bad,
        max_document_mb=d.max_document_mb,
        document_mask=d.document_mask,
        report=BadDocumentLog(run_directory(config) / f"bad_documents.{rank}.txt"),
    )


def loss_weights(of: BalanceConfig | Now) -> LossWeights:
    return LossWeights(
        sequence=of.sequence_loss_weight, switch=of.switch_loss_weight, batch=of.batch_loss_weight, z=of.router_z_loss_weight
    )


@contextmanager
def refusing():
    """What a constructor named in the configuration refuses is a refused configuration."""
    try:
        yield
    except (ValueError, TypeError, InstantiationException) as error:
        raise ConfigError(str(error.__cause__ or error)) from error


def full_state(run: Run) -> dict[str, Any]:
    """Everything that a resumed run needs, on any layout; collective."""
    state = training_state(run.model, run.optimizer, run.balancer)
    return {**state, "stream": global_stream_state(run), "step": torch.tensor(run.step), "tokens": torch.tensor(run.tokens)}


def global_stream_state(run: Run) -> dict[str, torch.Tensor]:
    """Each rank knows its own streams; the sum is the state of all."""
    state = {name: tensor.to(run.device) for name, tensor in run.stream.state_dict().items()}
    if run.group is not None:
        for tensor in state.values():
            dist.all_reduce(tensor, group=run.group)
    return state


def resume(run: Run) -> Path | None:
    """Continues from the newest checkpoint of this run's directory, else from that of `branch`. Returns what it loaded.

    Raises: ConfigError.
    """
    found = find_checkpoint(run.config)
    if found is None:
        return None
    checkpoints, step = found
    state = checkpoints.load(step, full_state(run))
    run.step, run.tokens = int(state["step"]), int(state["tokens"])
    run.last_step = run.program.last_step(step=run.step, position=run.tokens)
    run.balancer.end_at(run.last_step)
    set_training_state(state, run.model, run.optimizer, run.balancer)
    run.stream.load_state_dict({k: v.cpu() for k, v in state["stream"].items()}, keep_counts=dist.get_rank() == 0)
    if run.config.steps is not None and run.step > run.config.steps:
        where = checkpoints.path(step)
        raise ConfigError(f"steps={run.config.steps}, but {where} is at step {run.step}; use steps={run.step} or more")
    return checkpoints.path(step)


# -- entry point ------------------------------------------------------------------------------------------


def train(config: Config) -> int:
    """The whole run on this rank. Returns the exit code."""
    run = build(config)
    is_first = dist.get_rank() == 0
    open_directory(config, source=run.stream.source, tokenizer=run.stream.tokenizer)
    run.stop.listen()
    with refusing():
        loaded = resume(run)
    directory, resumed = run.directory, run.step
    metrics = None
    if is_first:
        record_start(config, program=run.program, step=run.step, tokens=run.tokens, loaded=loaded)
        announce(run, loaded)
        if config.balance.trace is not None:
            run.balancer.observers += (TraceWriter(directory / config.balance.trace, after_step=resumed),)
        tracker = instantiate(config.logging.tracker)
        start = partial(tracker, directory, asdict(config)) if tracker else None
        metrics = MetricsLog(directory / "metrics.jsonl", steps=run.last_step, interval=config.logging.interval,
                             after_step=resumed, start_tracker=start)  # fmt: skip
    try:
        loop(run, metrics)
    finally:
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
        span = f" in {now.span}" if now.span else ""
        print(f"continuing {loaded} at step {run.step} of {run.last_step}, {run.tokens} tokens seen{span}")


def conclude(run: Run) -> int:
    """Prints where everything is and what became of the experts. Returns the exit code, the same on all ranks."""
    done = run.step >= run.last_step
    verdict = run.balancer.verdict()
    read = dict(zip(COUNTED, global_stream_state(run)["counts"].tolist(), strict=True))
    if dist.get_rank() == 0:
        print(f"{run.directory}: config.yaml, metrics.jsonl, checkpoints/ (step {run.step})")
        bad = ", ".join(f"{read[kind]} {kind}" for kind in BAD_KINDS if read[kind])
        skipped = f"skipped {bad} (bad_documents.*.txt)" if bad else "none skipped"
        print(f"data: {read['documents']} documents, {read['tokens']} tokens, {skipped}")
        if done:
            print(verdict)
        else:
            print(f"stopped at step {run.step} of {run.last_step}, saved; the same command continues")
    return INTERRUPTED if not done else OK if verdict.ok else COLLAPSED


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    overrides = sys.argv[1:]
    try:
        if {"-h", "--help"} & set(overrides):
            print(usage(__doc__))
            return OK
        if "--cfg" in overrides:
            print(resolved_yaml(load([o for o in overrides if o not in ("--cfg", "job")])), end="")
            return OK
        return train(load(overrides))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted before the first step; nothing to save", file=sys.stderr)
        return INTERRUPTED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
