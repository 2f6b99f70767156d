"""Which values contradict each other? (Which one a value may have for itself stands in the schema.)"""

import logging
import math
from fnmatch import fnmatchcase
from pathlib import Path

from trainer.config.bounds import ConfigError, check_values
from trainer.config.fill import nearest
from trainer.config.parts import PARTS
from trainer.config.schema import AUTO, Config, DataConfig, ModelConfig

MAX_SOURCES = 256  # a checkpoint has one byte for the source of an open document
MAX_NAME = 255  # [bytes] of a directory's name
OF_A_RUN = (  # what a run writes into its directory itself
    "config.yaml",
    "metrics.jsonl",
    "evaluations.jsonl",
    "experts.jsonl",
    "alarms.jsonl",
    "verdict.json",
    "checkpoints",
    "exports",
    "tokenizer.json",
    "chat_template.jinja",
    "data.json",
    "starts.jsonl",
    "rolled_back.json",
    "bad_documents.*",
    "stacks.*",
    "lock",
    "profile",
    "tensorboard",
    "wandb",
)
ALIGNED = 8  # [bfloat16 numbers] in the 16 bytes that a row of the grouped GEMM is a multiple of
log = logging.getLogger(__package__)


def divisors(n: int) -> list[int]:
    """What a refusal offers where something must be cut into equal parts."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def check(config: Config) -> None:
    """Limits that a type cannot express. Raises ConfigError with the value, the limit and the remedy."""
    check_values(config)
    if config.compile and (dtype := config.model.expert_dtype or config.dtype) in ("float32", AUTO):
        kind = "dtype=auto, which may choose float32" if dtype == AUTO else "float32 experts"
        raise ConfigError(
            f"compile=true with {kind}: torch compiles the grouped GEMM in bfloat16 only; "
            "use dtype=bfloat16, model.expert_dtype=bfloat16 or compile=false"
        )
    if config.compile and config.activation_checkpoint.startswith("selective") and config.parallel.ep > 1:
        raise ConfigError(
            f"compile=true with activation_checkpoint={config.activation_checkpoint} and "
            f"parallel.ep={config.parallel.ep}: torch cannot trace experts on several ranks inside a "
            "selective checkpoint; use activation_checkpoint=full or none, compile=false or parallel.ep=1"
        )
    _check_shape(config.model)
    _check_rows_of_experts(config)
    _check_sources(config.data)
    _check_length_bias(config.data)
    _check_evaluations(config)
    if config.init_from is not None and config.branch is not None:
        raise ConfigError(
            f"init_from={config.init_from} and branch={config.branch} are both set: a run starts from "
            "one of them"
        )
    if config.epochs is not None and config.data.at_end != "stop":
        raise ConfigError(
            f"epochs={config.epochs} with data.at_end={config.data.at_end}, which reads on; use "
            "data.at_end=stop"
        )
    check_name("name", config.name)
    _check_parts(config.train_only)
    if config.balance.trace is not None:
        _check_trace(config.balance.trace)


def check_name(key: str, name: str, *, kind: str = "directory") -> None:
    """Of a directory or file that lies in another one. Raises: ConfigError."""
    if len(name.splitlines()) != 1 or Path(name).name != name or name in (".", ".."):
        raise ConfigError(f"{key}={name!r}: must be one plain {kind} name, without / or ..")
    if len(name.encode()) > MAX_NAME:
        raise ConfigError(f"{key}={name[:20]}...: has {len(name.encode())} bytes; use at most {MAX_NAME}")


def _check_trace(name: str) -> None:
    check_name("balance.trace", name, kind="file")
    if any(fnmatchcase(name, own) for own in OF_A_RUN):
        raise ConfigError(f"balance.trace={name}: the run writes that itself; use another, like router.trace")


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


def _check_parts(names: list[str] | None) -> None:
    if names == []:
        raise ConfigError("train_only=[]: nothing would be trained; name parts, or use null for all")
    for name in names or ():
        if name not in PARTS:
            raise ConfigError(f"train_only={names}: there is no part {name}{nearest(name, list(PARTS))}")


def _check_length_bias(d: DataConfig) -> None:
    names = list(d.sources) or ["source"]
    for name, bias in d.length_bias.items():
        if name not in names:
            raise ConfigError(f"data.length_bias.{name}: there is no source {name}{nearest(name, names)}")
        where = f"data.length_bias.{name}."
        check_values(bias, where=where)
        if bias.short >= bias.long:
            raise ConfigError(
                f"{where}short={bias.short:g} must be below {where}long={bias.long:g} tokens; use less"
            )


def _check_evaluations(config: Config) -> None:
    for name, node in config.evaluate.items():
        check_name("evaluate", name)
        if not isinstance(node, dict) or "_target_" not in node:
            example = "{_target_: trainer.evaluate.HeldOut}"
            raise ConfigError(f"evaluate.{name}={node}: must be an evaluation, like {example}")
    best = config.checkpoint.keep_best
    if best is not None and best not in config.evaluate:
        names = ", ".join(config.evaluate) or "none; evaluate=held_out adds one"
        raise ConfigError(f"checkpoint.keep_best={best}: is no evaluation of this run (there are: {names})")


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


def _check_rows_of_experts(config: Config) -> None:
    """torch._grouped_mm takes rows of a multiple of 16 bytes. (Experts in float32 on a CPU go without it.)"""
    if (config.model.expert_dtype or config.dtype) == "bfloat16":
        whole_rows(config, num=ALIGNED)


def whole_rows(config: Config, *, num: int) -> None:
    """Raises: ConfigError if rows of experts are not a multiple of `num` numbers, 16 bytes, where a grouped
    GEMM reads them.
    """
    m = config.model
    if m.num_dense_layers == m.num_layers:
        return
    dtype_key = "model.expert_dtype" if m.expert_dtype else "dtype"
    dtype = m.expert_dtype or config.dtype
    other = ", or float32" if dtype == "bfloat16" else ""
    for key in ("dim", "expert_dim"):
        if (size := getattr(m, key)) % num:
            near = [n for n in (size // num * num, -(-size // num) * num) if n]
            raise ConfigError(
                f"model.{key}={size} with {dtype_key}={dtype}: the grouped GEMM wants rows of a multiple of "
                f"16 bytes; use model.{key}={' or '.join(map(str, near))}{other}"
            )
