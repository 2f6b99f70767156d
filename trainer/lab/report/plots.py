"""Which numbers of metrics.jsonl are drawn, with which title and unit? docs/report.md explains each."""

from typing import NamedTuple


class Plot(NamedTuple):
    """A figure. keys: of metrics.jsonl -> how their lines are called."""

    title: str
    keys: dict[str, str]
    unit: str = ""
    text: str = ""
    log: bool = False
    from_zero: bool = True
    large: bool = False
    unless_zero: bool = False  # no figure if all values are 0


EVEN = "even shares"
LOSS = Plot("Loss", {"loss": "loss"}, "nats per token", from_zero=False, large=True)
RUN = (
    Plot("Gradient norm", {"grad_norm": "gradient norm"}, text="Before clipping.", log=True),
    Plot("Tokens of a step", {"data/step_tokens": "tokens"}, "tokens", "Without padding."),
    Plot("Throughput", {"tokens_per_s": "tokens/s"}, "tokens/s"),
    Plot("MFU", {"mfu": "MFU"}, "share of peak FLOP/s"),
    Plot("Memory", {"memory_gib": "memory"}, "GiB", "Peak so far of rank 0."),
    Plot(
        "Batch heterogeneity",
        {"batch_het": "BatchHet"},
        "nats",
        "The worst microbatch's loss over the mean of the step.",
        unless_zero=True,
    ),
    Plot(
        "Kurtosis",
        {"loss_kurtosis": "loss", "grad_norm_kurtosis": "gradient norm"},
        text="Of the last 256 steps: 3 for a Gaussian, large where a few steps stand out.",
        log=True,
    ),
    Plot(
        "Passed over",
        {"data/skipped": "bad documents", "skipped_steps": "steps not applied"},
        "since the start",
        unless_zero=True,
    ),
)
ROUTER = (
    Plot(
        "MaxVio",
        {
            "balance/max_violation": "MaxVio",
            "balance/max_violation_worst_layer": "worst layer",
            "balance/floor": "chance alone",
        },
        EVEN,
        "How far the busiest expert of a layer lies above its even share, mean over layers.",
        log=True,
        large=True,
    ),
    Plot("Least load", {"balance/min_load": "least"}, EVEN, "Of all experts of all layers."),
    Plot("Experts without a token", {"balance/dead_experts": "dead"}, "in a step", unless_zero=True),
    Plot("Entropy of the load", {"balance/entropy": "entropy"}, "1 is even", from_zero=False),
    Plot("Biases", {"balance/bias_rms": "biases"}, "score", "Root mean square."),
    Plot(
        "Gain",
        {"balance/gain": "gain"},
        "1/score",
        "How much of its share an expert gains per unit of bias, mean over layers.",
    ),
    Plot("Router logits", {"balance/logit_rms": "logits"}, text="Root mean square."),
)
