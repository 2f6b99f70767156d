"""Which values of the right type can no run have?"""

import difflib
import logging
import math
from pathlib import Path

from trainer.config.schema import Config, ConfigError, DataConfig, ModelConfig

DTYPES = ("float32", "bfloat16")
MAX_SOURCES = 256  # a checkpoint has one byte for the source of an open document
log = logging.getLogger(__package__)


def divisors(n: int) -> list[int]:
    """What a refusal offers where something must be cut into equal parts."""
    return [d for d in range(1, n + 1) if n % d == 0]


def check(config: Config) -> None:
    """Limits that a type cannot express. Raises ConfigError with the value, the limit and the remedy."""
    _check_at_least(config)
    _check_above_zero(config)
    _check_zero_or_more(config)
    _check_one_of(config)
    if config.compile and (config.model.expert_dtype or config.dtype) == "float32":
        raise ConfigError(
            "compile=true with float32 experts: torch compiles the grouped GEMM in bfloat16 only; "
            "use dtype=bfloat16, model.expert_dtype=bfloat16 or compile=false"
        )
    _check_shape(config.model)
    _check_sources(config.data)
    if config.init_from is not None and config.branch is not None:
        raise ConfigError(
            f"init_from={config.init_from} and branch={config.branch} are both set: a run starts from "
            "one of them"
        )
    if not config.name or Path(config.name).name != config.name or config.name in (".", ".."):
        raise ConfigError(f"name={config.name!r}: must be one plain directory name, without / or ..")


def _check_at_least(config: Config) -> None:
    m = config.model
    at_least = {
        "steps": (1 if config.steps is None else config.steps, 1),
        "seq_len": (config.seq_len, 2),
        "global_batch": (config.global_batch, 1),
        "micro_batch": (config.micro_batch, 1),
        "checkpoint.interval": (config.checkpoint.interval, 1),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "logging.interval": (config.logging.interval, 1),
        "seed": (config.seed, 0),
        "data.buffer": (config.data.buffer, 0),
        "data.workers": (config.data.workers, 0),
        "data.prefetch": (config.data.prefetch, 1),
        "data.retries": (config.data.retries, 0),
        "checkpoint.retries": (config.checkpoint.retries, 0),
        "model.num_dense_layers": (m.num_dense_layers, 0),
        "model.num_shared_experts": (m.num_shared_experts, 0),
        "parallel.dp_replicate": (config.parallel.dp_replicate, 1),
        "parallel.ep": (config.parallel.ep, 1),
    }
    shape = (
        "vocab_size",
        "dim",
        "num_layers",
        "ffn_dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "window",
        "global_every",
        "num_experts",
        "top_k",
        "expert_dim",
    )
    at_least |= {f"model.{name}": (getattr(m, name), 1) for name in shape}
    if config.checkpoint.keep_every is not None:
        at_least["checkpoint.keep_every"] = (config.checkpoint.keep_every, 1)
    if config.parallel.dp_shard is not None:
        at_least["parallel.dp_shard"] = (config.parallel.dp_shard, 1)
    if config.data.num_streams is not None:
        at_least["data.num_streams"] = (config.data.num_streams, 1)
    for key, (value, limit) in at_least.items():
        if value < limit:
            raise ConfigError(f"{key}={value}: must be at least {limit}")


def _check_above_zero(config: Config) -> None:
    m = config.model
    above_zero = {
        "max_grad_norm": config.max_grad_norm,
        "timeout_s": config.timeout_s,
        "heartbeat_s": config.heartbeat_s,
        "model.rope_theta": m.rope_theta,
        "model.norm_eps": m.norm_eps,
        "model.route_scale": m.route_scale,
        "data.max_document_mb": config.data.max_document_mb,
    }
    for key, value in above_zero.items():
        if not value > 0 or math.isnan(value):
            raise ConfigError(f"{key}={value}: must be above 0")


def _check_zero_or_more(config: Config) -> None:
    losses = ("sequence_loss_weight", "switch_loss_weight", "batch_loss_weight", "router_z_loss_weight")
    not_negative = {f"balance.{name}": getattr(config.balance, name) for name in losses}
    not_negative |= {f"data.{name}": getattr(config.data, name) for name in ("max_bad", "retry_s")}
    not_negative |= {"z_loss_weight": config.z_loss_weight, "checkpoint.retry_s": config.checkpoint.retry_s}
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{key}={value}: must be 0 or more")


def _check_one_of(config: Config) -> None:
    m = config.model
    one_of = {
        "dtype": (config.dtype, DTYPES),
        "model.expert_dtype": (m.expert_dtype, (None, *DTYPES)),
        "model.router_dtype": (m.router_dtype, DTYPES),
        "activation_checkpoint": (config.activation_checkpoint, ("none", "selective", "full")),
        "data.on_bad": (config.data.on_bad, ("skip", "fatal")),
        "data.packing": (config.data.packing, ("stream", "fit")),
        "data.at_end": (config.data.at_end, ("repeat", "stop")),
        "data.backend": (config.data.backend, ("tokenizers", "fastokens", "gigatoken")),
    }
    for key, (value, options) in one_of.items():
        if value not in options:
            near = difflib.get_close_matches(str(value), [str(o) for o in options], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{key}={value}: must be one of {', '.join(map(str, options))}{hint}")


def _check_sources(d: DataConfig) -> None:
    if d.source is None and not d.sources:
        raise ConfigError(
            "not set: data.source. Choose a corpus (data=python), or give several in data.sources"
        )
    if d.source is not None and d.sources:
        raise ConfigError(
            f"data.source and data.sources={{{', '.join(d.sources)}}} are both set; set one of them to null"
        )
    if d.sources and len(d.sources) > MAX_SOURCES:
        raise ConfigError(f"data.sources: {len(d.sources)} of them; use at most {MAX_SOURCES}")
    for name, node in d.sources.items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise ConfigError(
                f"data.sources.{name}={node}: must be a source, like {{_target_: trainer.data.PythonSource}}"
            )


def _check_shape(m: ModelConfig) -> None:
    if m.num_heads % m.num_kv_heads:
        raise ConfigError(
            f"model.num_heads={m.num_heads} is not a multiple of model.num_kv_heads={m.num_kv_heads}"
        )
    if m.head_dim % 2:
        raise ConfigError(f"model.head_dim={m.head_dim}: must be even, rotary embeddings turn pairs")
    if m.num_dense_layers > m.num_layers:
        raise ConfigError(
            f"model.num_dense_layers={m.num_dense_layers} exceeds model.num_layers={m.num_layers}"
        )
    if m.top_k > m.num_experts:
        raise ConfigError(f"model.top_k={m.top_k} exceeds model.num_experts={m.num_experts}")
    if m.top_k == 1 < m.num_experts and m.num_dense_layers < m.num_layers:
        log.warning(
            "model.top_k=1: AFMoE normalises a token's gates, so the gate of one expert is "
            "constant and the loss "
            "cannot train the router; use 2 or more"
        )
