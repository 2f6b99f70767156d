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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from trainer import device, optim
from trainer.balance import Balancer, Guard, LossWeights
from trainer.balance.trace import TraceWriter
from trainer.checkpoint import set_training_state, training_state
from trainer.config import BalanceConfig, Config, ConfigError, load, resolved_yaml, usage
from trainer.data import BAD_KINDS, COUNTED, Batch, TokenStream, check_split, load_tokenizer
from trainer.device import ParallelDims
from trainer.directory import BadDocumentLog, checkpoints_of, open_directory, run_directory
from trainer.metrics import MetricsLog
from trainer.model.afmoe import Afmoe, afmoe_config, count_parameters, flops_per_token, moe_layers
from trainer.model.init import initialize
from trainer.model.loss import IGNORE
from trainer.model.parallelize import build_parallel, scale_gradients, squared_gradient_norm
from trainer.stop import StopRequest

OK, REFUSED, COLLAPSED, INTERRUPTED = 0, 2, 3, 130


@dataclass(kw_only=True)
class Run:
    """Everything that the loop touches."""

    config: Config
    device: torch.device
    dims: ParallelDims
    model: Afmoe
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    balancer: Balancer
    stream: TokenStream
    group: dist.ProcessGroup | None  # ranks with other tokens; None: there are none
    stop: StopRequest
    step: int = 0
    tokens: int = 0  # trained on so far, over all ranks

    @property
    def directory(self) -> Path:
        return run_directory(self.config)


# -- the step ---------------------------------------------------------------------------------------------


def train_step(run: Run, batches: list[Batch]) -> dict[str, float]:
    """One optimizer step on this rank's microbatches of the global batch.

    Every loss is a sum over tokens [nats]; the gradient is divided once, by the global number of targets.
    One all-reduce agrees on the loss, the targets, the gradient norm and whether some rank was told to stop.
    """
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
    lr = optim.set_learning_rate(run.optimizer, run.schedule(run.step, run.config.steps))
    run.optimizer.step()
    run.optimizer.zero_grad()
    balance = run.balancer.step(run.step)  # weights first, then biases: counts -> all ranks -> rule -> bias
    run.stop.agreed |= run.balancer.guard.wants_stop
    run.tokens += run.config.global_batch * run.config.seq_len
    return {"step": run.step, "tokens": run.tokens, "loss": loss_mean, "grad_norm": grad_norm, "lr": lr, **balance}


def loop(run: Run, metrics: MetricsLog | None) -> None:
    """Trains until the last step, or until some rank is told to stop; saves at intervals and at the end."""
    config, checkpoints = run.config, checkpoints_of(run.config)
    peak = device.peak_flops(run.device, getattr(torch, config.dtype)) * dist.get_world_size()
    flop = flops_per_token(config.model, seq_len=config.seq_len)
    start_s = time.perf_counter()
    while run.step < config.steps and not run.stop.agreed:
        values = train_step(run, run.stream.next_step(config.micro_batch))
        tokens_per_s = config.global_batch * config.seq_len / (time.perf_counter() - start_s)
        values |= {"tokens_per_s": tokens_per_s, "mfu": flop * tokens_per_s / peak, "memory_gib": device.memory_gib(run.device)}
        if metrics is not None:
            metrics.write(values, alarms=run.balancer.guard.take_alarms())
        if run.step % config.checkpoint.interval == 0 or run.step == config.steps or run.stop.agreed:
            checkpoints.save(run.step, full_state(run))
        start_s = time.perf_counter()


# -- building and resuming --------------------------------------------------------------------------------


def build(config: Config) -> Run:
    """Joins the process group and builds everything on this rank. Raises: ConfigError before any training."""
    on = device.start(timeout_s=config.timeout_s)
    has_experts = config.model.num_dense_layers < config.model.num_layers
    dims = device.build_mesh(config.parallel, num_experts=config.model.num_experts if has_experts else None)
    with refusing():
        stream = build_stream(config, dims)
        rule = instantiate(config.balance.rule)
        schedule = instantiate(config.schedule)
        schedule(1, config.steps)
        num_moe = config.model.num_layers - config.model.num_dense_layers
        rule = rule((num_moe, config.model.num_experts)).to(on) if rule is not None and num_moe else None
    shape = afmoe_config(
        config.model,
        flex=on.type == "cuda",
        loss_weights=loss_weights(config.balance),
        z_loss_weight=config.z_loss_weight,
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
        optimizer = instantiate(config.optim)(model)
    mesh = dims.get_optional_mesh("loss")
    group = mesh.get_group() if mesh is not None else None
    required = config.balance.trace is not None and config.balance.trace_required
    with refusing():
        guard = Guard((num_moe, config.model.num_experts), **vars(config.guard)).to(on)
    balancer = Balancer(moe_layers(model), rule, steps=config.steps, group=group, guard=guard, required=required)
    return Run(config=config, device=on, dims=dims, model=model, optimizer=optimizer, schedule=schedule,
               balancer=balancer, stream=stream, group=group, stop=StopRequest())  # fmt: skip


def build_stream(config: Config, dims: ParallelDims) -> TokenStream:
    """This rank's share of the token stream. Rank 0 trains the tokenizer, if it must be trained, before the others look."""
    mesh = dims.get_optional_mesh("batch")
    rank, num_ranks = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
    d = config.data
    check_split(global_batch=config.global_batch, num_streams=d.num_streams, num_ranks=num_ranks)
    if (rows := config.global_batch // num_ranks) % config.micro_batch:
        raise ConfigError(
            f"micro_batch={config.micro_batch} does not divide the {rows} sequences of a rank "
            f"(global_batch={config.global_batch} on {num_ranks} data-parallel ranks); use one of {device.divisors(rows)}"
        )
    source = instantiate(d.source)
    tokenizer = None
    for turn in (0, 1):
        if d.tokenizer is not None and turn == min(dist.get_rank(), 1):
            tokenizer = load_tokenizer(d.tokenizer, source=source, vocab_size=config.model.vocab_size, cache_dir=d.cache_dir)
        dist.barrier()
    return TokenStream(
        source=source,
        tokenizer=tokenizer,
        seq_len=config.seq_len,
        global_batch=config.global_batch,
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


def loss_weights(b: BalanceConfig) -> LossWeights:
    return LossWeights(
        sequence=b.sequence_loss_weight, switch=b.switch_loss_weight, batch=b.batch_loss_weight, z=b.router_z_loss_weight
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


def resume(run: Run) -> None:
    """Continues from the newest checkpoint of this run's directory, if there is one. Raises: ConfigError."""
    checkpoints = checkpoints_of(run.config)
    step = checkpoints.latest()
    if step is None:
        return
    state = checkpoints.load(step, full_state(run))
    set_training_state(state, run.model, run.optimizer, run.balancer)
    run.stream.load_state_dict({k: v.cpu() for k, v in state["stream"].items()}, keep_counts=dist.get_rank() == 0)
    run.step, run.tokens = int(state["step"]), int(state["tokens"])
    if run.step > run.config.steps:
        raise ConfigError(f"steps={run.config.steps}, but {run.directory} is at step {run.step}; use steps={run.step} or more")


# -- entry point ------------------------------------------------------------------------------------------


def train(config: Config) -> int:
    """The whole run on this rank. Returns the exit code."""
    run = build(config)
    is_first = dist.get_rank() == 0
    open_directory(config, source=run.stream.source, tokenizer=run.stream.tokenizer)
    run.stop.listen()
    with refusing():
        resume(run)
    directory, resumed = run.directory, run.step
    metrics = None
    if is_first:
        announce(run)
        if config.balance.trace is not None:
            run.balancer.observers += (TraceWriter(directory / config.balance.trace, after_step=resumed),)
        tracker = instantiate(config.logging.tracker)
        start = partial(tracker, directory, asdict(config)) if tracker else None
        metrics = MetricsLog(directory / "metrics.jsonl", steps=config.steps, interval=config.logging.interval,
                             after_step=resumed, start_tracker=start)  # fmt: skip
    try:
        loop(run, metrics)
    finally:
        if metrics is not None:
            metrics.close()
    return conclude(run)


def announce(run: Run) -> None:
    c, count = run.config, count_parameters(run.config.model)
    print(
        f"Triquetra · {c.name}: {count.total / 1e6:.1f}M parameters, {count.active / 1e6:.1f}M active, "
        f"on {dist.get_world_size()} x {run.device.type}, "
        f"{c.global_batch} x {c.seq_len} = {c.global_batch * c.seq_len} tokens a step"
    )
    if run.step == c.steps:
        print(f"{run.directory} is complete at step {run.step}; steps= trains on, name= starts a new run")
    elif run.step:
        print(f"continuing at step {run.step} of {c.steps}")


def conclude(run: Run) -> int:
    """Prints where everything is and what became of the experts. Returns the exit code, the same on all ranks."""
    done = run.step >= run.config.steps
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
            print(f"stopped at step {run.step} of {run.config.steps}, saved; the same command continues")
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
