"""How is a run put together from its configuration?"""

import inspect
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from torch import nn

from trainer.balance import Balancer, Guard, LossWeights
from trainer.checkpoint import DamagedError
from trainer.config import BalanceConfig, Config, ConfigError, DataConfig
from trainer.data import (
    BadDocument,
    DataError,
    LengthBias,
    Source,
    StreamConfig,
    TokenStream,
    load_tokenizer,
    steps_left,
)
from trainer.model.afmoe import Afmoe, afmoe_config, moe_layers
from trainer.model.frozen import train_only
from trainer.model.hardware import check_hardware, dispatch_of, warn_of_dtype
from trainer.model.init import initialize
from trainer.model.parallelize import build_parallel
from trainer.optim import Optimizers
from trainer.program import LOSS_KEYS, Program, StepSettings, check_sources, program_of
from trainer.ranks import device
from trainer.ranks.agree import compare_clocks, end_if_told, refuse_disagreement
from trainer.ranks.device import ParallelDims
from trainer.ranks.meeting import Meeting, meet
from trainer.ranks.stop import StopRequest
from trainer.run.directory import BadDocumentLog, checkpoints_of, dotted_keys
from trainer.run.health import Health
from trainer.run.memory import refuse_too_large, refuse_too_many_rows
from trainer.run.state import Groups, Run
from trainer.split import check_rows
from trainer.version import code_version

MOST_STEPS = 10**9  # the limit of `steps`


def build(config: Config, *, stop: StopRequest | None = None) -> Run:
    """Forks the data workers, then joins the process group and builds all else on this rank. stop: may end
    the start between its phases. Raises: ConfigError before any training; Stopped.
    """
    stop, config = stop or StopRequest(), device.settled(config)
    meeting = meet(timeout_s=config.timeout_s)
    end_if_told(stop, ask=meeting.all_gather_objects)
    facts = {**dotted_keys(asdict(config)), "the code": code_version(), "torch": torch.__version__}
    refuse_disagreement(facts, broadcast=meeting.broadcast_object, gather=meeting.all_gather_objects)
    device.keep_freed_memory()
    config, program, stream = lasting(config, meeting, stop)
    on = device.start(timeout_s=config.timeout_s, meeting=meeting)
    end_if_told(stop)
    compare_clocks()
    dims = device.build_mesh(config.parallel, num_experts=num_experts_of(config))
    if on.type == "cuda":  # asking it starts CUDA
        refuse_too_large(config, program, degrees_of(config, meeting), on=on)
    groups, checkpoints = Groups.of(dims), checkpoints_of(config)
    checkpoints.connect()
    with refusing():
        rule = instantiate(config.balance.rule)
        num_moe = config.model.num_layers - config.model.num_dense_layers
        rule = rule((num_moe, config.model.num_experts)).to(on) if rule is not None and num_moe else None
    end_if_told(stop)
    model = model_of(config, program, dims, on=on)
    optimizer = build_optimizer(config, model)
    required = config.balance.trace is not None and config.balance.trace_required
    with refusing():
        guard = Guard((num_moe, config.model.num_experts), **vars(config.guard))
        health = Health(**vars(config.skip))
    balancer = Balancer(
        moe_layers(model),
        rule,
        steps=program.last_step(),
        group=groups.tokens,
        guard=guard,
        required=required,
    )
    return Run(
        config=config,
        device=on,
        dims=dims,
        groups=groups,
        model=model,
        optimizer=optimizer,
        program=program,
        balancer=balancer,
        stream=stream,
        stop=stop,
        checkpoints=checkpoints,
        health=health,
        last_step=program.last_step(),
    )


def build_optimizer(config: Config, model: nn.Module) -> Optimizers:
    with refusing():
        return Optimizers(instantiate(config.optim)(model))


def model_of(config: Config, program: Program, dims: ParallelDims, *, on: torch.device) -> Afmoe:
    """The model with its first weights, spread over the ranks. Collective.

    Raises: ConfigError if the hardware cannot do what is asked of it.
    """
    here = device.hardware(on)
    check_hardware(config, here)
    if dist.get_rank() == 0:
        warn_of_dtype(config, here)
    device.set_matmul_precision(dtypes=(config.dtype, config.model.expert_dtype))
    first = program.spans[0].now
    shapes = {(span.now.micro_batch, span.now.seq_len) for span in program.spans}
    shape = afmoe_config(
        config.model,
        flex=on.type == "cuda",
        clears_idle=here.capability[0] == 10,
        dispatch=dispatch_of(config, here, max_tokens=max(rows * length for rows, length in shapes)),
        loss_weights=loss_weights(first),
        z_loss_weight=first.z_loss_weight,
    )
    model = build_parallel(
        shape,
        dims,
        dtype=getattr(torch, config.dtype),
        activation_checkpoint=config.activation_checkpoint,
        compile="inductor" if config.compile else None,
        num_shapes=len(shapes),
        reshard_after_forward=config.parallel.reshard_after_forward,
        reduce_dtype=getattr(torch, config.parallel.reduce_dtype),
    )
    if config.train_only is not None:
        with refusing():
            train_only(model, config.train_only)
    report = partial(print, flush=True) if dist.get_rank() == 0 else None
    initialize(model, device=on, seed=config.seed, report=report)
    return model


def num_experts_of(config: Config) -> int | None:
    """None: the model has no MoE layer."""
    m = config.model
    return m.num_experts if m.num_dense_layers < m.num_layers else None


def degrees_of(config: Config, meeting: Meeting) -> device.Degrees:
    """Raises: ConfigError."""
    return device.degrees_of(config.parallel, num_ranks=meeting.num_ranks, num_experts=num_experts_of(config))


def lasting(config: Config, meeting: Meeting, stop: StopRequest) -> tuple[Config, Program, TokenStream]:
    """The configuration with its number of steps, counted where it has epochs; the program and the stream.
    Collective. Raises: ConfigError, DataError, Stopped, on all ranks.
    """
    if config.epochs is None or config.steps is not None:
        program = program_of(config)
        return config, program, fork_stream(config, program, meeting)
    draft = program_of(replace(config, steps=MOST_STEPS))
    first = draft.spans[0].now
    for span in draft.spans:
        if (span.now.global_batch, span.now.seq_len) != (first.global_batch, first.seq_len):
            raise ConfigError(
                f"epochs={config.epochs} with stage.{span.name}.global_batch={span.now.global_batch} and "
                f"seq_len={span.now.seq_len}: steps are counted for one kind of rows; give the span "
                f"global_batch={first.global_batch} and seq_len={first.seq_len}, or use steps= in its place"
            )
    stream = fork_stream(config, draft, meeting)

    def count() -> tuple[int, str | None]:
        try:
            is_told = lambda: stop.code is not None  # noqa: E731
            return steps_left(stream, micro_batch=first.micro_batch, is_told_to_end=is_told), None
        except (BadDocument, DataError) as error:
            return 0, "\n".join([str(error), *getattr(error, "__notes__", ())])

    answers = meeting.all_gather_objects(meeting.together(count))
    end_if_told(stop, ask=meeting.all_gather_objects)
    if problems := [said for _, said in answers if said]:
        raise DataError(problems[0])
    steps = max(counted for counted, _ in answers)
    if not steps:
        raise ConfigError(f"epochs={config.epochs}: there is nothing to train on; check data.source")
    config = replace(config, steps=steps)
    return config, program_of(config), stream


def fork_stream(config: Config, program: Program, meeting: Meeting) -> TokenStream:
    """Forks the data workers, once all is refused that can be told before. Collective.

    Raises: ConfigError, on all ranks.
    """
    degrees = degrees_of(config, meeting)
    if config.profile.steps and config.profile.rank >= meeting.num_ranks:
        last = meeting.num_ranks - 1
        raise ConfigError(
            f"profile.rank={config.profile.rank}: the last of the ranks is {last}; use at most that"
        )
    check_sources(config, program)
    with refusing():
        program.check_split(num_ranks=degrees.num_readers, num_streams=config.data.num_streams)
    check_rows(program, cp=degrees.cp)
    refuse_late_fork(config.data)
    meeting.together(partial(refuse_what_has_no_room, config, program, degrees, meeting))
    return build_stream(
        config.data,
        first=program.spans[0].now,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
        directory=config.directory,
        meeting=meeting,
        degrees=degrees,
        epochs=config.epochs or 1,
    )


def refuse_what_has_no_room(
    config: Config, program: Program, degrees: device.Degrees, meeting: Meeting
) -> None:
    """On the host; a GPU is asked once it is started. Raises: ConfigError."""
    on = device.of_rank(meeting.local_rank)
    if on.type == "cpu":
        refuse_too_large(config, program, degrees, on=on)
    else:
        refuse_too_many_rows(config, program, degrees)


def refuse_late_fork(d: DataConfig) -> None:
    """Raises: ConfigError where somebody has started NCCL before: it does not survive a fork."""
    if d.workers and dist.is_initialized() and dist.get_world_size() > 1 and "nccl" in dist.get_backend():
        raise ConfigError(
            f"data.workers={d.workers}: the process group was joined before the data workers are forked, and "
            "NCCL does not survive a fork; leave init_process_group to trainer.start, or use data.workers=0"
        )


def build_stream(
    d: DataConfig,
    *,
    first: StepSettings,
    seed: int,
    vocab_size: int,
    directory: Path,
    meeting: Meeting,
    degrees: device.Degrees,
    epochs: int = 1,
) -> TokenStream:
    """This rank's share of the token stream. `first`: the first span; `directory`: for the lists of bad
    documents. Collective. Raises: ConfigError, on all ranks.
    """
    reader, place_in_row = divmod(meeting.rank, degrees.cp)
    report = BadDocumentLog(directory / f"bad_documents.{reader}.txt")

    def read() -> tuple[Source | dict[str, Source], Any]:
        with refusing():
            source = sources_of(d, vocab_size=vocab_size)
            tokenizer = load_tokenizer(
                d.tokenizer,
                source=source,
                vocab_size=vocab_size,
                cache_dir=d.cache_dir,
                control_tokens=d.control_tokens,
            )
            for name, one in source.items() if isinstance(source, dict) else [("", source)]:
                bind(one, tokenizer, d, key=f"data.sources.{name}" if name else "data.source")
            return source, tokenizer

    # the first rank of a host unpacks files and trains the tokenizer, the others use them
    source, tokenizer = meeting.first_of_host(read)
    stream_config = StreamConfig(
        seq_len=first.seq_len,
        global_batch=first.global_batch,
        num_streams=d.num_streams,
        seed=seed,
        mixture=first.mixture,
        buffer=first.buffer,
        packing=d.packing,
        at_end=d.at_end,
        epochs=epochs,
        shuffle=d.shuffle,
        document_mask=d.document_mask,
        on_bad=d.on_bad,
        max_bad=d.max_bad,
        max_document_mb=d.max_document_mb,
        holdout=d.holdout,
        length_bias={name: LengthBias(**vars(bias)) for name, bias in d.length_bias.items()},
        backend=d.backend,
        workers=d.workers,
        prefetch=d.prefetch,
        retries=d.retries,
        retry_s=d.retry_s,
        with_sources=d.source_loss,
    )

    def fork() -> TokenStream:
        with refusing():
            return TokenStream(
                stream_config,
                source=source,
                tokenizer=tokenizer,
                rank=reader,
                num_ranks=degrees.num_readers,
                report=report if place_in_row == 0 else lambda bad: None,  # all ranks of a row meet it
            )

    return meeting.together(fork)


def sources_of(d: DataConfig, *, vocab_size: int) -> Source | dict[str, Source]:
    """Raises: ConfigError that names the source."""
    nodes = {f"data.sources.{name}": d.sources[name] for name in sorted(d.sources)} or {
        "data.source": d.source
    }
    sources = dict[str, Source]()
    for key, node in nodes.items():
        try:
            sources[key.removeprefix("data.sources.")] = source_of(node, cache_dir=d.cache_dir)
        except Exception as error:  # of a user's own class, too
            raise ConfigError(f"{key}: {' '.join(said(error).split())}") from error
        if not hasattr(sources[key.removeprefix("data.sources.")], "fingerprint"):
            raise ConfigError(f"{key}={node['_target_']}: makes no source: it has no fingerprint")
        if getattr(sources[key.removeprefix("data.sources.")], "vocab_size", 0) > vocab_size:
            raise ConfigError(f"{key}.vocab_size exceeds model.vocab_size={vocab_size}; use at most that")
    return sources if d.sources else sources["data.source"]


def bind(source: Source, tokenizer: Any, d: DataConfig, *, key: str) -> None:
    """Hands the tokenizer to a source that makes tokens itself. Raises: ConfigError."""
    if not hasattr(source, "bind"):
        return
    try:
        source.bind(tokenizer, d.tokenizer)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def source_of(node: Any, *, cache_dir: str | None) -> Source:
    """A source that keeps what it makes once does so in data.cache_dir, unless its own node names a place."""
    keeps = "cache_dir" in inspect.signature(get_method(node["_target_"])).parameters
    return instantiate(node, cache_dir=node.get("cache_dir") or cache_dir) if keeps else instantiate(node)


def loss_weights(settings: BalanceConfig | StepSettings) -> LossWeights:
    """A loss is named as its key, less what sets it apart from the LM head's z_loss_weight."""
    names = {key: key.removesuffix("_loss_weight").removeprefix("router_") for key in LOSS_KEYS}
    return LossWeights(**{name: getattr(settings, key) for key, name in names.items()})


@contextmanager
def refusing():
    """What a constructor named in the configuration refuses is a refused configuration."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, InstantiationException, DamagedError) as error:
        raise ConfigError(said(error)) from error


def said(error: Exception) -> str:
    """What a constructor itself said: Hydra tells of it in an error of its own."""
    return str(error.__cause__ or error) if isinstance(error, InstantiationException) else str(error)
