"""Which settings are there, of which type, with which default and between which limits?"""

from dataclasses import dataclass, field, fields, make_dataclass
from math import inf
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from trainer.config.bounds import choice, first_and_last, number, path, target

DTYPES = ("float32", "bfloat16")
AUTO = "auto"
MXFP8 = "mxfp8"  # of experts alone: 8 bits, with a scale for each 32 numbers
# Limits that several keys share.
ROWS = {"at_least": 1, "at_most": 2**20, "why": "64 times the largest published batch"}
ROW = {"at_least": 2, "at_most": 2**24, "why": "no published context is as long"}
LENGTH = {"at_least": 1.0, "at_most": 1e9, "why": "no document is as long"}
STEPS = {"at_least": 1, "at_most": 10**9, "why": "30 years at a step a second"}
LAYERS = {"at_most": 4096, "why": "30 times the deepest published model"}
HEADS = {"at_least": 1, "at_most": 4096, "why": "30 times the most of a published model"}
EXPERTS = {"at_least": 1, "at_most": 65_536, "why": "each step reads the counts of every expert"}
RANKS = {"at_least": 1, "at_most": 2**20, "why": "no machine has as many ranks"}
WEIGHT = {"at_least": 0.0, "at_most": 1e6, "why": "nothing else would be learned"}
BUFFER = {"at_least": 0, "at_most": 10**6, "why": "each stream keeps as many documents open"}
RETRIES = {"at_least": 0, "at_most": 20, "why": "the pauses double: the last would be six days at retry_s=1"}
RETRY_S = {"at_least": 0.0, "at_most": 3600.0, "why": "the pauses double from this one on"}
SECONDS = {"at_most": 2e6, "why": "23 days; 2^31 milliseconds is what timers hold"}
TOKENS = {"above": 0.0, "at_most": 1e17, "why": "positions are counted in 64 bits"}
COUNT = {"at_least": 0, "at_most": 10**6, "why": "no run has as many"}
SOURCE = "{_target_: trainer.data.PythonSource}"
OPTIM = "{_target_: torch.optim.SGD, _partial_: true, lr: 0.1}"
TRACKER = "{_target_: trainer.metrics.TensorboardTracker, _partial_: true}"
RULE = "{_target_: trainer.balance.SignRule, _partial_: true, lr: 1e-3}"


@dataclass(kw_only=True)
class ModelConfig:
    """The shape of an AFMoE (arXiv:2602.17004, section 2 and table 1)."""

    # V, entries of embedding and head; the tokenizer may have fewer
    vocab_size: int = number(MISSING, at_least=1, at_most=2**24, why="no tokenizer has as many entries")
    # D
    dim: int = number(MISSING, at_least=1, at_most=2**17, why="8 times the widest published model")
    num_layers: int = number(MISSING, at_least=1, **LAYERS)
    # the first layers have a dense FFN instead of experts
    num_dense_layers: int = number(MISSING, at_least=0, **LAYERS)
    # hidden size of the dense FFN
    ffn_dim: int = number(MISSING, at_least=1, at_most=2**20, why="16 times the widest published one")
    num_heads: int = number(MISSING, **HEADS)  # N
    num_kv_heads: int = number(MISSING, **HEADS)
    # H; num_heads * head_dim need not be dim
    head_dim: int = number(MISSING, at_least=1, at_most=1024, why="attention kernels end at 256 or 512")
    # [tokens] a local layer sees itself and the window - 1 tokens before
    window: int = number(MISSING, at_least=1, at_most=2**24, why="no row is longer, see seq_len")
    # every 4th layer is global: full causal attention, no positional embedding
    global_every: int = number(4, at_least=1, at_most=4097, why="no layer is global then, see num_layers")
    num_experts: int = number(MISSING, **EXPERTS)  # E, routed experts per MoE layer
    top_k: int = number(MISSING, **EXPERTS)  # K, routed experts per token
    # F
    expert_dim: int = number(MISSING, at_least=1, at_most=2**20, why="16 times the widest published FFN")
    num_shared_experts: int = number(1, at_least=0, at_most=1024, why="they are one wide FFN")
    route_scale: float = number(MISSING, above=0.0, at_most=1e6, why="gates are below 1 before it")
    rope_theta: float = number(10_000.0, above=0.0, at_most=1e15, why="no wave is as long")
    norm_eps: float = number(
        1e-5,
        at_least=1e-30,
        at_most=1.0,
        why="beside it the mean square is nothing",
        least_why="float32 holds hardly less",
    )
    # float32 | bfloat16 | mxfp8 (a GPU from sm_100 on, torchao); null: the run's dtype
    expert_dtype: str | None = choice(None, None, *DTYPES, MXFP8)
    # float32 | bfloat16: in which the gate multiplies, also in a bfloat16 model
    router_dtype: str = choice("float32", *DTYPES)


@dataclass(kw_only=True)
class LengthBiasConfig:
    """How likely a document of a source is drawn, by its length (trainer/data/lengths.py)."""

    # [tokens] up to here at_short, from `long` on at_long, in between linear in the logarithm
    short: float = number(8192.0, **LENGTH)
    long: float = number(131_072.0, **LENGTH)
    at_short: float = number(0.01, at_least=0.0, at_most=1.0, why="a probability")
    at_long: float = number(0.9, above=0.0, at_most=1.0, why="a probability")
    # [bytes of UTF-8] of text: lengths are known before anything is tokenised
    bytes_per_token: float = number(4.0, above=0.0, at_most=1000.0, why="no tokenizer has such entries")


@dataclass(kw_only=True)
class DataConfig:
    # _target_: where documents come from (trainer/data/)
    source: Any = field(default=None, metadata=target(partial=False, example=SOURCE))
    sources: dict[str, Any] = field(default_factory=dict)  # or several of them by name
    # weights of sources, shares of tokens; none: equal ones
    mixture: dict[str, float] | None = field(default_factory=dict)
    # b: each virtual stream keeps b to 2 b documents open; the report's 4,096 is b x num_streams / ranks
    buffer: int = number(0, **BUFFER)
    # where the mixture changes, first read open documents to their ends; false: they wait for their source
    drain: bool = False
    # stream: one document after another, cut where rows end | fit: cut at seq_len, then whole in a row
    packing: str = choice("stream", "stream", "fit")
    # at the end of a source: another epoch | stop: the other sources share its weight, and the run ends with
    # the last of them
    at_end: str = choice("repeat", "repeat", "stop")
    # "train" | directory | tokenizer.json | hub name; null: the source has tokens
    tokenizer: str | None = path("train")
    # that the tokenizer gets if it lacks them, like <|im_start|>; their rows in the model start as all do
    control_tokens: list[str] = field(default_factory=list)
    # virtual streams; null: one for each sequence of the global batch, the common divisor of several batches
    num_streams: int | None = number(None, **ROWS)
    shuffle: bool = True
    document_mask: bool = True  # tokens see their own document only; false: whatever precedes them in the row
    on_bad: str = choice("skip", "skip", "fatal")  # skip: counted and reported
    # share of a rank's documents that may be bad, from the 11th on; empty ones are not counted
    max_bad: float = number(0.01, at_least=0.0, at_most=1.0, why="a share of the documents")
    # [MB] a larger document is a bad document; inf: none is
    max_document_mb: float = number(100.0, above=0.0, at_most=inf, why="inf: of any size")
    # share of the documents that are never trained on, chosen by a hash of their content (evaluate=held_out)
    holdout: float = number(0.0, at_least=0.0, at_most=0.5, why="the rest is what is trained on")
    # by names of sources (`source`: the one of data.source): their documents are drawn by their lengths
    length_bias: dict[str, Any] = field(default_factory=dict)  # a LengthBiasConfig each
    cache_dir: str | None = path(None)  # trained tokenizers; null: $XDG_CACHE_HOME/triquetra
    # who turns text into the tokenizer's ids
    backend: str = choice("tokenizers", "tokenizers", "fastokens", "gigatoken")
    # processes of each rank that read and tokenise ahead; 0: in the step
    workers: int = number(1, at_least=0, at_most=256, why="a few of them keep up with a GPU")
    # [steps] how far ahead
    prefetch: int = number(4, at_least=1, at_most=10_000, why="their documents are kept in memory")
    # how often a failed read is tried again, after 1, 2, 4, ... times retry_s
    retries: int = number(4, **RETRIES)
    retry_s: float = number(1.0, **RETRY_S)  # [s]
    source_loss: bool = False  # also log the loss of each source


@dataclass(kw_only=True)
class RouterLossWeights:
    """Weights of the losses that push the router: each names one of trainer/balance/losses.py. A span may
    have its own (SpanConfig), a step has those that hold in it (trainer/program.py)."""

    sequence_loss_weight: float = number(0.0, **WEIGHT)  # alpha of arXiv:2602.17004, eq. 29
    switch_loss_weight: float = number(0.0, **WEIGHT)  # arXiv:2101.03961, eq. 4: over a rank's microbatch
    batch_loss_weight: float = number(0.0, **WEIGHT)  # arXiv:2501.11873: with the loads of the last step
    router_z_loss_weight: float = number(0.0, **WEIGHT)  # arXiv:2202.08906, eq. 5: on the router's logits


@dataclass(kw_only=True)
class BalanceConfig(RouterLossWeights):
    name: str = "custom"  # of the arm: configs/balance/*.yaml
    # _target_: how counts move the biases (trainer/balance/rules.py); null: not at all
    rule: Any = field(default=None, metadata=target(partial=True, example=RULE))
    # file for what the router does in each step, in the run's directory (trainer/balance/trace.py)
    trace: str | None = path(None)
    trace_required: bool = False  # also the histograms that quantile rules need to be replayed; much larger


@dataclass(kw_only=True)
class GuardConfig:
    """What counts as an expert about to be lost (trainer/balance/guard.py)."""

    enabled: bool = False
    grace: int = number(200, **STEPS)  # [steps] not judged, from the start of the run
    patience: int = number(50, **STEPS)  # [steps] from one alarm to the next
    # [even shares] of an expert that had more
    starving: float = number(0.3, above=0.0, at_most=1.0, why="1 is the even share")
    # MaxVio over its floor, of the last 20 steps over the last 200
    rising: float = number(1.5, above=1.0, at_most=1e6, why="it would never alarm")
    # [even shares] and at least this much of it
    excess: float = number(0.5, above=0.0, at_most=1e6, why="it would never alarm")
    # root mean square of the router's logits, of the last 20 steps over the last 200
    logits: float = number(1.5, above=1.0, at_most=1e6, why="it would never alarm")
    stop: bool = False  # an alarm ends the run: it saves, and the same command continues


@dataclass(kw_only=True)
class ParallelConfig:
    """ranks = dp_replicate * dp_shard * cp. The cp ranks of a row hold parts of it; weights are sharded over
    the dp_shard * cp ranks of a replica, and experts are spread over ep of them.
    """

    dp_replicate: int = number(1, **RANKS)
    dp_shard: int | None = number(1, **RANKS)  # null: what the other degrees leave over
    # ranks that share rows (context parallelism): each holds 1 / cp of the tokens of every row
    cp: int = number(1, **RANKS)
    ep: int = number(1, **RANKS)
    # what takes tokens to the ranks of their experts: all_to_all | deepep | hybridep (GPU, deep_ep)
    dispatcher: str = choice("all_to_all", "all_to_all", "deepep", "hybridep")
    # a block gathers its weights again for its backward; false: it keeps them from its forward on, all layers
    # at once: an all-gather in three is saved, for the memory of the whole model in `dtype`
    reshard_after_forward: bool = True
    reduce_dtype: str = choice("float32", *DTYPES)  # of gradients on their way between ranks


@dataclass(kw_only=True)
class CheckpointConfig:
    interval: int = number(200, **STEPS)  # [steps]
    # how many of the newest checkpoints stay; older ones are deleted
    keep: int = number(2, at_least=1, at_most=10**6, why="a directory each")
    keep_every: int | None = number(None, **STEPS)  # [steps] checkpoints at multiples of it stay for good
    # name of an evaluation: the checkpoint with its best result stays, too, and is written at that step
    keep_best: str | None = path(None)
    # written while training goes on, from a copy in host memory; false: the step waits
    background: bool = True
    # how often a failed save is tried again, after 1, 2, 4, ... times retry_s; three failed saves in a row
    # end the run
    retries: int = number(4, **RETRIES)
    retry_s: float = number(1.0, **RETRY_S)  # [s]


@dataclass(kw_only=True)
class SkipConfig:
    """Which steps are skipped, besides those that are not finite (trainer/run/health.py)."""

    # skip a step whose loss or gradient norm exceeds the running median by this many robust deviations;
    # null: never
    spike: float | None = number(None, above=0.0, at_most=1e6, why="null: none is a spike")
    # the run stops, or rolls back, when more steps than this are skipped in a row
    most: int = number(5, **COUNT)
    # how often a run may return to its newest checkpoint, passing over the data that was read since
    rollbacks: int = number(0, **COUNT)


@dataclass(kw_only=True)
class LoggingConfig:
    # [steps] between lines on a terminal that is not interactive; metrics.jsonl has every step
    interval: int = number(1, **STEPS)
    # [steps] between two histograms of each layer's loads and biases for the tracker; null: none
    histograms: int | None = number(1000, **STEPS)
    # _target_: wandb or TensorBoard besides metrics.jsonl (trainer/metrics.py)
    tracker: Any = field(default=None, metadata=target(partial=True, example=TRACKER))


@dataclass(kw_only=True)
class ProfileConfig:
    """Which steps torch's profiler watches (trainer/run/profile.py)."""

    # [first, last], one after the other; null: none
    steps: list[int] | None = field(
        default=None, metadata=first_and_last(at_most=20, why="a trace takes 5 MB a step and more")
    )
    rank: int = number(0, at_least=0, at_most=2**20, why="no machine has as many ranks")  # that is watched


_SpanWeights = make_dataclass(
    "_SpanWeights",
    [(loss.name, float | None, number(None, **WEIGHT)) for loss in fields(RouterLossWeights)],
    kw_only=True,
)


@dataclass(kw_only=True)
class SpanConfig(_SpanWeights):
    """What changes while the program is in this span (trainer/program.py); null: as in the span before, the
    first one as in the run's own keys of these names."""

    # its length, one of four ways; one span may have none: what the others leave of `steps`
    tokens: float | None = number(None, **TOKENS)
    until: float | None = number(None, **TOKENS)  # [tokens] seen where it ends
    steps: int | None = number(None, **STEPS)
    share: float | None = number(None, at_least=0.0, at_most=1.0, why="a share of the run's steps")
    # factor on the peak rates: a number, or {from, to, shape: linear | cosine, until: a later span}
    lr: Any = None
    bias_rate: Any = None  # factor on the step of the balancing rule, likewise
    global_batch: int | None = number(None, **ROWS)
    micro_batch: int | None = number(None, **ROWS)
    seq_len: int | None = number(None, **ROW)
    z_loss_weight: float | None = number(None, **WEIGHT)
    mixture: dict[str, float] | None = None  # weights of the sources
    # [documents] of the random sequential document buffer of each virtual stream; 0: none
    buffer: int | None = number(None, **BUFFER)
    drain: bool | None = None  # read documents that are open when the mixture changes to their ends first


@dataclass(kw_only=True)
class Config:
    name: str = MISSING  # the run's directory is <run_dir>/<name>
    run_dir: str = path("runs")
    seed: int = number(0, at_least=0, at_most=2**63 - 1, why="generators take 63 bits")
    # the run ends here; null: at the end of the program, if all its spans have a length
    steps: int | None = number(None, **STEPS)
    # where steps is null: how often the data is read; the steps are counted at the start (data.at_end=stop)
    epochs: int | None = number(
        None, at_least=1, at_most=10_000, why="the data is read as often to count the steps"
    )
    seq_len: int = number(MISSING, **ROW)  # L [tokens]
    global_batch: int = number(MISSING, **ROWS)  # [sequences] per optimizer step, over all ranks
    micro_batch: int = number(MISSING, **ROWS)  # [sequences] per forward and rank
    # of weights in forward and backward; the optimizer keeps float32. auto: bfloat16 where the device has
    # instructions for it
    dtype: str = choice("float32", *DTYPES, AUTO)
    z_loss_weight: float = number(0.0, **WEIGHT)  # on the LM logits (arXiv:2602.17004, section 2.2)
    # inf: gradients are never clipped
    max_grad_norm: float = number(1.0, above=0.0, at_most=inf, why="inf: no clipping")
    # selective saves attention, all-to-alls, routing and every second matmul; selective_experts the grouped
    # GEMMs, too
    activation_checkpoint: str = choice("none", "none", "selective", "selective_experts", "full")
    compile: bool = False  # torch.compile each block
    # [s] of a collective, of the first step and of a save
    timeout_s: float = number(600.0, at_least=1.0, least_why="ranks must find each other in it", **SECONDS)
    # [s] a rank that hangs this long in a later step writes its stacks and ends the job
    heartbeat_s: float = number(
        180.0, at_least=1.0, least_why="a rank that waits for a core would be ended", **SECONDS
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    # _target_: model -> optimizer (trainer/optim/)
    optim: Any = field(default=MISSING, metadata=target(partial=True, example=OPTIM))
    stage: dict[str, Any] = field(default_factory=dict)  # the program: a SpanConfig by name, in their order
    # a run's directory, or one of its checkpoints, that a new run starts from
    branch: str | None = path(None)
    # true: of that run only weights and routing biases; data, program and optimizer begin anew
    anew: bool = False
    # parts of the model (trainer/config/parts.py) that are trained, the others stay as they are; null: all
    train_only: list[str] | None = None
    # directory or hub name of AfmoeForCausalLM weights that a new run starts from
    init_from: str | None = path(None)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    # _target_: what the model is asked while it trains (trainer/evaluate/), by names of the user's own
    evaluate: dict[str, Any] = field(default_factory=dict)
    skip: SkipConfig = field(default_factory=SkipConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def directory(self) -> Path:
        return Path(self.run_dir) / self.name


ConfigStore.instance().store(name="schema", node=Config)
