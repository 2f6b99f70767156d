"""What can be set, with which default and limit?

Plain dataclasses; the YAML files under configs/ fill them through Hydra. A key that is not named here, a
value of the wrong type or out of range is refused before anything is built: `ConfigError` names the key,
the value, the limit and what would work.

`_target_` nodes (rules, optimizers, schedules, sources, trackers) have no dataclass: the constructor they
name is their schema, and its signature is checked here.
"""

import difflib
import inspect
import logging
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.utils import get_method
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

CONFIG_DIR = Path(__file__).parent.parent / "configs"
if not CONFIG_DIR.is_dir():  # installed from a wheel, where the folder lies inside the package
    CONFIG_DIR = Path(__file__).parent / "configs"

DTYPES = ("float32", "bfloat16")
log = logging.getLogger(__name__)


class ConfigError(ValueError):
    """The configuration cannot be run as written; the message says what would work."""


@dataclass(kw_only=True)
class ModelConfig:
    """The shape of an AFMoE (arXiv:2602.17004, section 2 and table 1)."""

    vocab_size: int = MISSING  # V, entries of embedding and head; the tokenizer may have fewer
    dim: int = MISSING  # D
    num_layers: int = MISSING
    num_dense_layers: int = MISSING  # the first layers have a dense FFN instead of experts
    ffn_dim: int = MISSING  # hidden size of the dense FFN
    num_heads: int = MISSING  # N
    num_kv_heads: int = MISSING
    head_dim: int = MISSING  # H; num_heads * head_dim need not be dim
    window: int = MISSING  # [tokens] a local layer sees itself and the window - 1 tokens before
    global_every: int = 4  # every 4th layer is global: full causal attention, no positional embedding
    num_experts: int = MISSING  # E, routed experts per MoE layer
    top_k: int = MISSING  # K, routed experts per token
    expert_dim: int = MISSING  # F
    num_shared_experts: int = 1
    route_scale: float = MISSING
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    expert_dtype: str | None = None  # float32 | bfloat16; null: the run's dtype
    router_dtype: str = "float32"  # float32 | bfloat16: in which the gate multiplies, also in a bfloat16 model


@dataclass(kw_only=True)
class DataConfig:
    source: Any = MISSING  # _target_: where documents come from (trainer/data/)
    tokenizer: str | None = "train"  # "train" | directory | tokenizer.json | hub name; null: the source has tokens
    num_streams: int | None = None  # virtual streams; null: one for each sequence of the global batch
    shuffle: bool = True
    document_mask: bool = True  # tokens see their own document only; false: whatever precedes them in the row
    on_bad: str = "skip"  # skip (counted and reported) | fatal
    max_document_mb: float = 100.0  # [MB] a larger document is a bad document
    cache_dir: str | None = None  # trained tokenizers; null: $XDG_CACHE_HOME/triquetra


@dataclass(kw_only=True)
class BalanceConfig:
    name: str = "custom"  # of the arm: configs/balance/*.yaml
    rule: Any = None  # _target_: how counts move the biases (trainer/balance.py); null: not at all
    sequence_loss_weight: float = 0.0  # alpha of arXiv:2602.17004, eq. 29; losses: trainer/balance/losses.py
    switch_loss_weight: float = 0.0  # arXiv:2101.03961, eq. 4: the same over a rank's microbatch
    batch_loss_weight: float = 0.0  # arXiv:2501.11873: with the loads of the whole last step
    router_z_loss_weight: float = 0.0  # arXiv:2202.08906, eq. 5: on the router's logits
    trace: str | None = None  # file for what the router does in each step, in the run's directory (trainer/balance/trace.py)
    trace_required: bool = False  # also the histograms that quantile rules need to be replayed; much larger


@dataclass(kw_only=True)
class GuardConfig:
    """What counts as an expert about to be lost, and what is done (trainer/balance/guard.py)."""

    enabled: bool = False
    grace: int = 200  # [steps] not judged, from the start of the run
    patience: int = 50  # [steps] from one alarm to the next
    starving: float = 0.3  # [even shares] of an expert that had more
    rising: float = 1.5  # MaxVio over its floor, of the last 20 steps over the last 200
    excess: float = 0.5  # [even shares] and at least this much of it
    logits: float = 1.5  # root mean square of the router's logits, of the last 20 steps over the last 200
    ladder: list[str] = field(default_factory=list)  # of boost, solve, sequence_loss, stop: one for each alarm


@dataclass(kw_only=True)
class ParallelConfig:
    """ranks = dp_replicate * dp_shard; experts are spread over ep of the dp_shard ranks of a replica."""

    dp_replicate: int = 1
    dp_shard: int | None = 1  # null: what the other degrees leave over
    ep: int = 1


@dataclass(kw_only=True)
class CheckpointConfig:
    interval: int = 200  # [steps]
    keep: int = 2  # the newest ones; the rest is deleted


@dataclass(kw_only=True)
class LoggingConfig:
    interval: int = 1  # [steps] between lines on a terminal that is not interactive; metrics.jsonl has every step
    tracker: Any = None  # _target_: wandb or TensorBoard besides metrics.jsonl (trainer/metrics.py)


@dataclass(kw_only=True)
class Config:
    name: str = MISSING  # the run's directory is <run_dir>/<name>
    run_dir: str = "runs"
    seed: int = 0
    steps: int = MISSING
    seq_len: int = MISSING  # L [tokens]
    global_batch: int = MISSING  # [sequences] per optimizer step, over all ranks
    micro_batch: int = MISSING  # [sequences] per forward and rank
    dtype: str = "float32"  # of weights in forward and backward; the optimizer keeps float32
    z_loss_weight: float = 0.0  # on the LM logits (arXiv:2602.17004, section 2.2)
    max_grad_norm: float = 1.0
    activation_checkpoint: str = "none"  # none | selective | full
    compile: bool = False  # torch.compile each block
    timeout_s: float = 600.0  # [s] of a collective; a hung rank ends the job after this
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: Any = MISSING  # _target_: model -> optimizer (trainer/optim.py)
    schedule: Any = MISSING  # _target_: (step, steps) -> factor on every learning rate (trainer/optim.py)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


ConfigStore.instance().store(name="schema", node=Config)


# -- from the command line to a checked Config ----------------------------------------------------------


def load(overrides: list[str]) -> Config:
    """Composes configs/train.yaml with Hydra overrides and checks every value.

    Raises: ConfigError.
    """
    config = composed("train", overrides)
    assert isinstance(config, Config)
    check(config)
    config.data.num_streams = config.data.num_streams or config.global_batch
    return config


def composed(root: str, overrides: list[str]) -> Any:
    """configs/<root>.yaml with Hydra overrides as the dataclass of its schema; keys and types are checked, limits are not."""
    try:
        with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
            node = compose(root, overrides)
        check_targets(node)
        if missing := sorted(OmegaConf.missing_keys(node)):
            raise ConfigError(f"not set: {', '.join(missing)}. Choose an experiment (experiment=demo) or set them.")
        return OmegaConf.to_object(node)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(_explain(error, overrides, root)) from None


def resolved_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def _explain(error: Exception, overrides: list[str], root: str) -> str:
    """Hydra's message, shortened, with the nearest valid keys for the override that it is about."""
    text = str(error.__cause__ or error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    noise = ("full_key", "object_type", "reference_type", "Config search path", "provider=", "See https")
    message = " ".join(line for line in lines if not line.startswith(noise))
    text = f"{error} {text}"
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        if key and (key in text or override in text):
            return f"{override!r}: {message}{_nearest(key, root)}"
    return message


def _nearest(key: str, root: str) -> str:
    valid = list(_all_keys(root))
    if key in valid:
        return ""
    by_leaf = [v for v in valid if v.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = list(dict.fromkeys(difflib.get_close_matches(key, valid, n=4, cutoff=0.6) + by_leaf))[:4]
    if near:
        return f" (did you mean {', '.join(near)}?)"
    return f" (top-level keys: {', '.join(sorted({v.split('.')[0] for v in valid}))})"


def _all_keys(root: str) -> Iterator[str]:
    """Every key of the schema, the keys of the default `_target_` nodes included, and the config groups."""
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        node = compose(root, [])

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in node:
            yield f"{prefix}{key}"
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                yield from walk(child, f"{prefix}{key}.")

    yield from walk(node, "")
    yield from ("experiment",) if root == "train" else ("level",)


# -- checks ---------------------------------------------------------------------------------------------


def check_targets(node: Any, path: str = "") -> None:
    """Checks each `_target_` node against the signature that it names: known keys, right types."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    if "_target_" in node:
        _check_target(node, path)
    for key in node:
        child = node._get_node(key)
        check_targets(child, f"{path}.{key}" if path else str(key))


def _check_target(node: DictConfig, path: str) -> None:
    try:
        target = get_method(node._target_) if isinstance(node._target_, str) else None
    except Exception as error:  # noqa: BLE001  # whatever the import of a user's module raises
        raise ConfigError(f"{path}._target_={node._target_}: cannot be imported ({error})") from None
    if target is None:
        raise ConfigError(f"{path}._target_={node._target_}: not a dotted name")
    parameters = inspect.signature(target).parameters
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = [key for key in node if key not in ("_target_", "_partial_")]
    for key in given:
        if key not in parameters and not takes_any:
            near = difflib.get_close_matches(str(key), list(parameters), n=3, cutoff=0.5) or list(parameters)
            raise ConfigError(f"{path}.{key}: {node._target_} has no such argument (did you mean {', '.join(near)}?)")
        if OmegaConf.is_missing(node, key):
            raise ConfigError(f"{path}.{key} is not set: give it on the command line, {path}.{key}=...")
        value = node[key]
        if key in hints and not _fits(value, hints[key]):
            raise ConfigError(f"{path}.{key}={value!r}: {node._target_} wants {_type_name(hints[key])}")
    if not node.get("_partial_", False):
        named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        absent = [name for name, p in named.items() if p.default is p.empty and name not in given]
        if absent:
            raise ConfigError(f"{path}: {node._target_} needs {', '.join(absent)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a configured value may be passed where `hint` is annotated; unknown kinds of hint pass."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if typing.get_origin(hint) in (Sequence, list, tuple):
        return OmegaConf.is_list(value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return True


def _type_name(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) else str(hint)


def check(config: Config) -> None:
    """Limits that a type cannot express. Raises ConfigError with the value, the limit and the remedy."""
    m = config.model
    at_least = {
        "steps": (config.steps, 1), "seq_len": (config.seq_len, 2), "global_batch": (config.global_batch, 1),
        "micro_batch": (config.micro_batch, 1), "checkpoint.interval": (config.checkpoint.interval, 1),
        "checkpoint.keep": (config.checkpoint.keep, 1), "logging.interval": (config.logging.interval, 1),
        "seed": (config.seed, 0), "model.num_dense_layers": (m.num_dense_layers, 0),
        "model.num_shared_experts": (m.num_shared_experts, 0), "parallel.dp_replicate": (config.parallel.dp_replicate, 1),
        "parallel.ep": (config.parallel.ep, 1),
    }  # fmt: skip
    shape = ("vocab_size", "dim", "num_layers", "ffn_dim", "num_heads", "num_kv_heads", "head_dim", "window",
             "global_every", "num_experts", "top_k", "expert_dim")  # fmt: skip
    at_least |= {f"model.{name}": (getattr(m, name), 1) for name in shape}
    if config.parallel.dp_shard is not None:
        at_least["parallel.dp_shard"] = (config.parallel.dp_shard, 1)
    if config.data.num_streams is not None:
        at_least["data.num_streams"] = (config.data.num_streams, 1)
    for key, (value, limit) in at_least.items():
        if value < limit:
            raise ConfigError(f"{key}={value}: must be at least {limit}")
    above_zero = {"max_grad_norm": config.max_grad_norm, "timeout_s": config.timeout_s,
                  "model.rope_theta": m.rope_theta, "model.norm_eps": m.norm_eps, "model.route_scale": m.route_scale,
                  "data.max_document_mb": config.data.max_document_mb}  # fmt: skip
    for key, value in above_zero.items():
        if not value > 0 or math.isnan(value):
            raise ConfigError(f"{key}={value}: must be above 0")
    losses = ("sequence_loss_weight", "switch_loss_weight", "batch_loss_weight", "router_z_loss_weight")
    not_negative = {f"balance.{name}": getattr(config.balance, name) for name in losses}
    not_negative["z_loss_weight"] = config.z_loss_weight
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{key}={value}: must be 0 or more")
    one_of = {"dtype": (config.dtype, DTYPES), "model.expert_dtype": (m.expert_dtype, (None, *DTYPES)),
              "model.router_dtype": (m.router_dtype, DTYPES),
              "activation_checkpoint": (config.activation_checkpoint, ("none", "selective", "full")),
              "data.on_bad": (config.data.on_bad, ("skip", "fatal"))}  # fmt: skip
    for key, (value, options) in one_of.items():
        if value not in options:
            near = difflib.get_close_matches(str(value), [str(o) for o in options], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{key}={value}: must be one of {', '.join(map(str, options))}{hint}")
    if config.compile and (m.expert_dtype or config.dtype) == "float32":
        raise ConfigError("compile=true with float32 experts: torch compiles the grouped GEMM in bfloat16 only; "
                          "use dtype=bfloat16, model.expert_dtype=bfloat16 or compile=false")  # fmt: skip
    if m.num_heads % m.num_kv_heads:
        raise ConfigError(f"model.num_heads={m.num_heads} is not a multiple of model.num_kv_heads={m.num_kv_heads}")
    if m.head_dim % 2:
        raise ConfigError(f"model.head_dim={m.head_dim}: must be even, rotary embeddings turn pairs")
    if m.num_dense_layers > m.num_layers:
        raise ConfigError(f"model.num_dense_layers={m.num_dense_layers} exceeds model.num_layers={m.num_layers}")
    if m.top_k > m.num_experts:
        raise ConfigError(f"model.top_k={m.top_k} exceeds model.num_experts={m.num_experts}")
    if m.top_k == 1 < m.num_experts and m.num_dense_layers < m.num_layers:
        log.warning("model.top_k=1: AFMoE normalises a token's gates, so the gate of one expert is constant and the loss "
                    "cannot train the router; use 2 or more")  # fmt: skip
    if not config.name or Path(config.name).name != config.name or config.name in (".", ".."):
        raise ConfigError(f"name={config.name!r}: must be one plain directory name, without / or ..")
