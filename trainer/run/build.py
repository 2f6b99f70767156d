"""How is a run put together, and how does it go on where it stopped?"""

import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch.distributed.tensor import DTensor, Shard

from trainer.balance import Balancer, Guard, LossWeights
from trainer.checkpoint import Checkpoints, Found, SaveError, code_version, set_training_state, training_state
from trainer.config import BalanceConfig, Config, ConfigError, DataConfig
from trainer.data import (
    COUNTED,
    BadDocument,
    DataError,
    Source,
    StreamState,
    TokenStream,
    load_tokenizer,
    with_slots,
)
from trainer.metrics import Window
from trainer.model.afmoe import Afmoe, afmoe_config, moe_layers
from trainer.model.init import initialize
from trainer.model.parallelize import build_parallel, local
from trainer.optim import Optimizers
from trainer.program import Now, Program, check_sources, program_of
from trainer.ranks import device
from trainer.ranks.agree import compare_clocks, refuse_disagreement
from trainer.ranks.device import ParallelDims
from trainer.ranks.stop import StopRequest
from trainer.run.directory import BadDocumentLog, checkpoints_of, flat, run_directory
from trainer.run.health import Health


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
    checkpoints: Checkpoints
    health: Health
    step: int = 0
    tokens: int = 0  # trained on so far, over all ranks
    last_step: int  # where the program ends, seen from here
    window: Window = field(default_factory=Window)  # of the applied steps
    unread: BadDocument | DataError | None = None  # why this rank has no rows for the step
    about: dict[str, Any] = field(default_factory=dict)  # for the manifests of its checkpoints
    texts: dict[str, str] = field(default_factory=dict)  # files that go into each of them
    held: TextIO | None = None  # the lock of the run's directory, on rank 0

    def end_here(self) -> None:
        """There is nothing left to train on."""
        self.last_step = self.step
        self.balancer.end_at(self.step)

    @property
    def directory(self) -> Path:
        return run_directory(self.config)


def build(config: Config) -> Run:
    """Joins the process group and builds everything on this rank. Raises: ConfigError before any training."""
    on = device.start(timeout_s=config.timeout_s)
    refuse_disagreement({**flat(asdict(config)), "the code": code_version(), "torch": torch.__version__})
    compare_clocks()
    has_experts = config.model.num_dense_layers < config.model.num_layers
    dims = device.build_mesh(config.parallel, num_experts=config.model.num_experts if has_experts else None)
    program = program_of(config)
    check_sources(config, program)
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
        health = Health(**vars(config.skip))
    balancer = Balancer(
        moe_layers(model), rule, steps=program.last_step(), group=group, guard=guard, required=required
    )
    return Run(
        config=config,
        device=on,
        dims=dims,
        model=model,
        optimizer=optimizer,
        program=program,
        balancer=balancer,
        stream=stream,
        group=group,
        stop=StopRequest(),
        checkpoints=checkpoints_of(config),
        health=health,
        last_step=program.last_step(),
    )


def build_stream(config: Config, program: Program, dims: ParallelDims) -> TokenStream:
    """This rank's share of the token stream."""
    mesh = dims.get_optional_mesh("batch")
    rank, num_ranks = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
    d, first = config.data, program.spans[0].now
    program.check_split(num_ranks=num_ranks, num_streams=d.num_streams)
    # the first rank of a host unpacks files and trains the tokenizer, the others find them
    for turn in (0, 1):
        if turn == min(int(os.environ.get("LOCAL_RANK", dist.get_rank())), 1):
            source = sources_of(d)
            tokenizer = load_tokenizer(
                d.tokenizer, source=source, vocab_size=config.model.vocab_size, cache_dir=d.cache_dir
            )
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
        max_bad=d.max_bad,
        max_document_mb=d.max_document_mb,
        document_mask=d.document_mask,
        mixture=first.mixture,
        buffer=first.buffer,
        packing=d.packing,
        at_end=d.at_end,
        backend=d.backend,
        workers=d.workers,
        prefetch=d.prefetch,
        retries=d.retries,
        retry_s=d.retry_s,
        with_sources=d.source_loss,
        report=BadDocumentLog(run_directory(config) / f"bad_documents.{rank}.txt"),
    )


def sources_of(d: DataConfig) -> Source | dict[str, Source]:
    """Raises: ConfigError that names the source."""
    nodes = {f"data.sources.{name}": d.sources[name] for name in sorted(d.sources)} or {
        "data.source": d.source
    }
    found = dict[str, Source]()
    for key, node in nodes.items():
        try:
            found[key.removeprefix("data.sources.")] = instantiate(node)
        except Exception as error:  # of a user's own class, too
            raise ConfigError(f"{key}: {error.__cause__ or error}") from error
    return found if d.sources else found["data.source"]


def loss_weights(of: BalanceConfig | Now) -> LossWeights:
    return LossWeights(
        sequence=of.sequence_loss_weight,
        switch=of.switch_loss_weight,
        batch=of.batch_loss_weight,
        z=of.router_z_loss_weight,
    )


@contextmanager
def refusing():
    """What a constructor named in the configuration refuses is a refused configuration."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, InstantiationException) as error:
        raise ConfigError(str(error.__cause__ or error)) from error


def full_state(run: Run, *, heads: StreamState | None = None, num_slots: int | None = None) -> dict[str, Any]:
    """Everything that a resumed run needs, on any layout; collective. heads: of the stream; none: as they are
    now.

    num_slots: of the stream's buffers, where it is known.
    """
    heads = run.stream.state_dict() if heads is None else heads
    if num_slots is None:
        # of the fullest
        num_slots = int(summed(run, torch.tensor(heads["index_VC"].shape[1]), op=dist.ReduceOp.MAX))
    state = training_state(run.model, run.optimizer, run.balancer)
    progress = {
        "step": torch.tensor(run.step),
        "tokens": torch.tensor(run.tokens),
        "window": run.window.state_dict(),
    }
    health = {"counts_3": run.health.counts_3}
    return {
        **state,
        **progress,
        "health": health,
        "stream": stream_state(run, with_slots(heads, num_slots=num_slots)),
    }


def stream_state(run: Run, heads: StreamState) -> dict[str, torch.Tensor]:
    """Each rank holds its own virtual streams: all are saved once and cut anew for any number of ranks.
    Counts are summed.
    """
    mesh = run.dims.get_optional_mesh("batch")
    counts = summed(run, heads["counts"])
    own = {name: tensor.to(run.device) for name, tensor in heads.items() if name != "counts"}
    if mesh is not None:
        own = {name: DTensor.from_local(tensor, mesh, [Shard(0)]) for name, tensor in own.items()}
    return {**own, "counts": counts}


def stream_counts(run: Run) -> dict[str, int]:
    """What all ranks have read since the start of the run; collective."""
    return dict(zip(COUNTED, summed(run, torch.tensor(run.stream.state_counts)).tolist(), strict=True))


def summed(run: Run, numbers: torch.Tensor, *, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Summed, or reduced by `op`, over all ranks that read other tokens."""
    numbers = numbers.to(run.device)
    if run.group is not None:
        dist.all_reduce(numbers, op=op, group=run.group)
    return numbers


def save(run: Run, *, heads: StreamState | None = None) -> None:
    """Writes a checkpoint of this step, if there is none; in the background, if the configuration says so.
    Collective.

    heads: of the stream; none: as they are now. Raises: SaveError.
    """
    run.checkpoints.finish()
    if run.checkpoints.last_saved != run.step:
        about = {"tokens": run.tokens, **run.about}
        wait = not run.config.checkpoint.background
        run.checkpoints.save(run.step, full_state(run, heads=heads), about=about, texts=run.texts, wait=wait)


def finish_saving(run: Run) -> None:
    """Waits until nothing is being written. Raises: SaveError, on all ranks, if this step was to be saved and
    is not.
    """
    run.checkpoints.finish()
    if run.checkpoints.misses and run.checkpoints.last_saved != run.step:
        last = run.checkpoints.last_saved
        newest = f"the newest is of step {last}" if last is not None else "there is none"
        where = f"to {run.checkpoints.directory}, see the warnings"
        raise SaveError(
            f"the checkpoint of step {run.step}, where the run stops, could not be written {where}; {newest}"
        )


def resume(run: Run, origin: Found) -> None:
    """Continues from a checkpoint, of this run or of another one. Raises: ConfigError, ValueError if it does
    not fit.
    """
    checkpoints = Checkpoints(origin.path.parent)
    _, num_slots = checkpoints.shape(origin.step, "stream.read_VC")
    state = checkpoints.load(origin.step, full_state(run, num_slots=num_slots))
    run.step, run.tokens = int(state["step"]), int(state["tokens"])
    run.last_step = run.program.last_step(step=run.step, position=run.tokens)
    run.balancer.end_at(run.last_step)
    run.window.load_state_dict(state["window"])
    run.health.counts_3.copy_(state["health"]["counts_3"])
    set_training_state(state, run.model, run.optimizer, run.balancer)
    run.stream.load_state_dict(
        {k: local(v).cpu() for k, v in state["stream"].items()}, keep_counts=dist.get_rank() == 0
    )
    refuse_past_end(run, where=origin.path)


def refuse_past_end(run: Run, *, where: Path) -> None:
    if run.config.steps is not None and run.step > run.config.steps:
        raise ConfigError(
            f"steps={run.config.steps}, but {where} is at step {run.step}; use steps={run.step} or more"
        )
    if run.tokens >= run.program.end + run.program.at(run.tokens).tokens:
        given = f"stage: the program ends at {run.program.end} tokens, but {where} has seen {run.tokens}"
        raise ConfigError(f"{given}; use a longer program")
