"""Which settings are there, of which type and with which default?"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


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
    # float32 | bfloat16: in which the gate multiplies, also in a bfloat16 model
    router_dtype: str = "float32"


@dataclass(kw_only=True)
class DataConfig:
    source: Any = None  # _target_: where documents come from (trainer/data/)
    sources: dict[str, Any] = field(default_factory=dict)  # or several of them by name
    # weights of sources, shares of tokens; none: equal ones
    mixture: dict[str, float] | None = field(default_factory=dict)
    # b: b to 2 b documents stay open in each virtual stream; the report's 4,096 is b x num_streams / ranks
    buffer: int = 0
    # where the mixture changes, read open documents to their ends first; false: they wait for their source
    drain: bool = False
    # stream: documents one after another, cut by rows | fit: cut at seq_len, whole in a row, padded
    packing: str = "stream"
    # of a source: another epoch | stop: the others share its weight, the run ends with the last of them
    at_end: str = "repeat"
    # "train" | directory | tokenizer.json | hub name; null: the source has tokens
    tokenizer: str | None = "train"
    num_streams: int | None = None  # virtual streams; null: one for each sequence of the global batch
    shuffle: bool = True
    document_mask: bool = True  # tokens see their own document only; false: whatever precedes them in the row
    on_bad: str = "skip"  # skip (counted and reported) | fatal
    # share of a rank's documents that may be bad, from the 11th on; empty ones are not counted
    max_bad: float = 0.01
    max_document_mb: float = 100.0  # [MB] a larger document is a bad document
    cache_dir: str | None = None  # trained tokenizers, unpacked corpora; null: $XDG_CACHE_HOME/triquetra
    backend: str = "tokenizers"  # tokenizers | fastokens | gigatoken: who turns text into the tokenizer's ids
    workers: int = 1  # processes of each rank that read and tokenise ahead; 0: in the step
    prefetch: int = 4  # [steps] how far ahead
    retries: int = 4  # of a read that fails, after 1, 2, 4, ... times retry_s; then the run ends
    retry_s: float = 1.0  # [s]
    source_loss: bool = False  # also log the loss of each source


@dataclass(kw_only=True)
class BalanceConfig:
    name: str = "custom"  # of the arm: configs/balance/*.yaml
    rule: Any = None  # _target_: how counts move the biases (trainer/balance.py); null: not at all
    sequence_loss_weight: float = 0.0  # alpha of arXiv:2602.17004, eq. 29; losses: trainer/balance/losses.py
    switch_loss_weight: float = 0.0  # arXiv:2101.03961, eq. 4: the same over a rank's microbatch
    batch_loss_weight: float = 0.0  # arXiv:2501.11873: with the loads of the whole last step
    router_z_loss_weight: float = 0.0  # arXiv:2202.08906, eq. 5: on the router's logits
    # file for what the router does in each step, in the run's directory (trainer/balance/trace.py)
    trace: str | None = None
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
    # of boost, solve, sequence_loss, stop: one for each alarm
    ladder: list[str] = field(default_factory=list)


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
    keep_every: int | None = None  # [steps] and for good each at a multiple of it
    # written while training goes on, from a copy in host memory; false: the step waits
    background: bool = True
    # of a save that fails, after 1, 2, 4, ... times retry_s; three saves in a row that fail end the run
    retries: int = 4
    retry_s: float = 1.0  # [s]


@dataclass(kw_only=True)
class SkipConfig:
    """Which steps are not applied (trainer/run/health.py); one whose loss or gradient is not finite never
    is.
    """

    # [deviations] above the median of the last steps that a loss or gradient norm may lie; null: any
    spike: float | None = None
    most: int = 5  # in a row; one more ends the run, or
    rollbacks: int = 0  # so many times: back to the newest checkpoint, passing over the data since


@dataclass(kw_only=True)
class LoggingConfig:
    # [steps] between lines on a terminal that is not interactive; metrics.jsonl has every step
    interval: int = 1
    tracker: Any = None  # _target_: wandb or TensorBoard besides metrics.jsonl (trainer/metrics.py)


@dataclass(kw_only=True)
class SpanConfig:
    """What changes while the program is in this span (trainer/program.py); null: as in the span before, the
    first one as in the run's own keys of these names."""

    # its length, one of four ways; one span may have none: what the others leave of `steps`
    tokens: float | None = None
    until: float | None = None  # [tokens] seen where it ends
    steps: int | None = None
    share: float | None = None  # of the run's `steps`
    # factor on the peak rates: a number, or {from, to, shape: linear | cosine, until: a later span}
    lr: Any = None
    bias_rate: Any = None  # factor on the step of the balancing rule, likewise
    global_batch: int | None = None
    micro_batch: int | None = None
    seq_len: int | None = None
    z_loss_weight: float | None = None
    sequence_loss_weight: float | None = None
    switch_loss_weight: float | None = None
    batch_loss_weight: float | None = None
    router_z_loss_weight: float | None = None
    mixture: dict[str, float] | None = None  # weights of the sources
    # [documents] of the random sequential document buffer of each virtual stream; 0: none
    buffer: int | None = None
    drain: bool | None = None  # read documents that are open when the mixture changes to their ends first


@dataclass(kw_only=True)
class Config:
    name: str = MISSING  # the run's directory is <run_dir>/<name>
    run_dir: str = "runs"
    seed: int = 0
    # the run ends here; null: at the end of the program, if all its spans have a length
    steps: int | None = None
    seq_len: int = MISSING  # L [tokens]
    global_batch: int = MISSING  # [sequences] per optimizer step, over all ranks
    micro_batch: int = MISSING  # [sequences] per forward and rank
    dtype: str = "float32"  # of weights in forward and backward; the optimizer keeps float32
    z_loss_weight: float = 0.0  # on the LM logits (arXiv:2602.17004, section 2.2)
    max_grad_norm: float = 1.0
    activation_checkpoint: str = "none"  # none | selective | full
    compile: bool = False  # torch.compile each block
    timeout_s: float = 600.0  # [s] of a collective, of the first step and of a save
    # [s] a rank that hangs for so long in a later step writes its stacks and ends the job
    heartbeat_s: float = 180.0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: Any = MISSING  # _target_: model -> optimizer (trainer/optim/)
    stage: dict[str, Any] = field(default_factory=dict)  # the program: a SpanConfig by name, in their order
    branch: str | None = None  # a run's directory, or one of its checkpoints, that a new run starts from
    # directory or hub name of AfmoeForCausalLM weights that a new run starts from
    init_from: str | None = None
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    skip: SkipConfig = field(default_factory=SkipConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


ConfigStore.instance().store(name="schema", node=Config)
