"""What does simulation.json hold, and what is each figure in it called, in which unit, and what does it mean?

METRICS has the keys of a run's `summary`, CURVES those of its `curves`, in the order in which they are shown.
"""

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

SHARES = "even shares"


class Metric(NamedTuple):
    title: str
    unit: str = ""
    explanation: str = ""
    better: str = "low"  # low | high | ""


class Curve(NamedTuple):
    title: str
    unit: str
    explanation: str
    log: bool = False
    from_zero: bool = True
    limit: float | None = None  # a dotted line


METRICS = {  # "at the end": the last fifth of the steps
    "steps_to_balance": Metric(
        "Balanced",
        "steps to MaxVio < limit",
        "Steps until MaxVio, mean of 10 steps, is under the limit (0.6 unless set); counted to the first of "
        "these 10 steps, so a router that is even from the start has 1. MaxVio is "
        "the load of the busiest expert "
        "minus 1, mean over layers.",
    ),
    "steps_to_floor": Metric(
        "At the floor",
        "steps to MaxVio < 1.25 × floor",
        (
            "Steps until MaxVio, mean of 10 steps, is under 1.25 times the floor: what chance alone would "
            "give independent tokens. Others may never be. Counted to the first of the 10 steps."
        ),
    ),
    "recovery_steps": Metric(
        "Recovery",
        "steps after the shift",
        "Steps after the shift until MaxVio, mean of 10 steps, is under the limit again; counted to the "
        "first of these 10 steps.",
    ),
    "excess_run": Metric(
        "Excess, run",
        SHARES,
        "MaxVio above the floor, mean over the whole run: speed and rest in one figure.",
    ),
    "excess_mean": Metric("Excess, end", SHARES, "MaxVio minus the floor, mean at the end."),
    "excess_p99": Metric(
        "Excess, p99", SHARES, "MaxVio minus the floor: exceeded in one of 100 steps at the end."
    ),
    "bias_step_rms": Metric(
        "Bias step", "score, rms", "How much the biases move in a step at the end. A rule at rest is low."
    ),
    "bias_chatter": Metric(
        "Chatter",
        "share of bias steps",
        (
            "Share of the bias steps at the end that reverse the one before. At "
            "0.5 the biases only follow noise."
        ),
    ),
    "churn": Metric(
        "Churn",
        "share of choices",
        "Share of the choices of the same tokens that a step's bias update changes.",
    ),
    "load_cv": Metric(
        "Load CV", "", "Standard deviation of the experts' loads over their mean, mean of layers, at the end."
    ),
    "gain": Metric(
        "Gain",
        "1/score",
        "How much of its share an expert gains per unit of bias, mean of layers, at the end.",
        "",
    ),
    "mean_score": Metric(
        "Score",
        "of the chosen, mean",
        (
            "Mean router score of the chosen experts, without bias: what balance costs the router. Higher "
            "is better."
        ),
        "high",
    ),
    "ep_max_over_mean": Metric(
        "EP rank max/mean",
        "ratio",
        (
            "Tokens on the busiest expert-parallel rank over the mean of the ranks. 1 is even; all ranks "
            "wait for the busiest."
        ),
    ),
    "min_load": Metric(
        "Least load", SHARES, "Load of the least busy expert of all layers, mean at the end.", "high"
    ),
    "dead_experts": Metric(
        "Dead", "experts", "Experts without a token in a step, over all layers, mean at the end."
    ),
    "stability": Metric(
        "Stability",
        "share of the limit",
        "The rule's step over the largest stable one, worst layer. At 1 biases oscillate.",
        "",
    ),
    "collapse_step": Metric(
        "First collapse",
        "step",
        "The first step at which an expert that once had half a share has under 0.1 (mean of 20).",
        "",
    ),
    "first_alarm": Metric("First alarm", "step", "The first step at which the guard raised an alarm.", ""),
    "alarms": Metric("Alarms", "", "How many alarms the guard raised.", ""),
    "loss": Metric("Loss", "nats", "Cross entropy per token, mean at the end."),
}

CURVES = {
    "max_violation": Curve(
        "MaxVio",
        SHARES,
        "The busiest expert's load minus 1, mean over layers. Dotted: what counts as balanced.",
        limit=0.6,
    ),
    "bias_step_rms": Curve(
        "Bias step", "score, rms", "How much the biases move in a step. A rule at rest is low.", log=True
    ),
    "bias_rms": Curve(
        "Bias", "score, rms", "How far the biases stand from zero. Up without end: they run away."
    ),
    "min_load": Curve(
        "Load of the least busy expert", SHARES, "1 is an even share, 0 no token. Dotted: 0.1.", limit=0.1
    ),
    "dead_experts": Curve("Experts without a token", "experts", "In a step, over all layers."),
    "churn": Curve("Routing churn", "share of choices", METRICS["churn"].explanation),
    "mean_score": Curve(
        "Score of the chosen experts", "mean", METRICS["mean_score"].explanation, from_zero=False
    ),
    "ep_max_over_mean": Curve(
        "Busiest expert-parallel rank",
        "max / mean",
        "1 is even. All ranks wait for the busiest.",
        from_zero=False,
    ),
    "gain": Curve(
        "Gain of the router, G", "1 / score", "How strongly load answers to bias, -∂v/∂b, mean over layers."
    ),
    "stability": Curve(
        "Stability margin used",
        "share of the limit",
        (
            "The rule's step over the largest stable one, worst layer. Dotted: 1, where biases oscillate "
            "without end."
        ),
        limit=1.0,
    ),
    "loss": Curve("Loss", "nats", "Cross entropy per token.", from_zero=False),
}


def check(result: Mapping[str, Any]) -> None:
    """Is it what this page can show? Raises: ValueError, with the place."""

    def need(where: str, mapping: Any, names: str) -> None:
        missing = [name for name in names.split() if not isinstance(mapping, Mapping) or name not in mapping]
        if missing:
            raise ValueError(f"simulation.json: {where} has no {', '.join(missing)}")

    need("it", result, "format version command torch seconds config notes runs ranking thresholds failures")
    if (result["format"], result["version"]) != ("triquetra-simulation", 1):
        raise ValueError(
            f"simulation.json: {result['format']} version {result['version']}; this is for "
            "triquetra-simulation 1"
        )
    if not result["runs"]:
        raise ValueError("simulation.json: no runs; there is nothing to show")
    steps = {}
    for i, run in enumerate(result["runs"]):
        need(f"runs[{i}]", run, "arm seed ok collapsed summary steps curves loads")
        if steps.setdefault(run["arm"], run["steps"]) != run["steps"]:
            raise ValueError(
                f"simulation.json: runs[{i}] has other steps than another seed of {run['arm']}; simulate "
                "them alike"
            )
        for name, values in run["curves"].items():
            if len(values) != len(run["steps"]):
                raise ValueError(
                    f"simulation.json: runs[{i}].curves.{name}: {len(values)} values, "
                    f"{len(run['steps'])} steps"
                )
        if loads := run["loads"]:
            need(f"runs[{i}].loads", loads, "layers experts bins max data")
            size, wanted = (
                len(base64.b64decode(loads["data"])),
                loads["layers"] * loads["experts"] * loads["bins"],
            )
            if size != wanted:
                raise ValueError(
                    f"simulation.json: runs[{i}].loads: {size} bytes, layers x experts x bins is {wanted}"
                )
    for i, rank in enumerate(result["ranking"] or []):
        need(f"ranking[{i}]", rank, "arm rank num_seeds collapsed_runs metrics")
        if rank["arm"] not in steps:
            raise ValueError(f"simulation.json: ranking[{i}]: no run has the arm {rank['arm']}")
