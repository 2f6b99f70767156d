"""What does a run need, how long does it take, and what should be changed first? The plan, in numbers and in
one sentence.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from trainer.config import MXFP8, Config, ConfigError
from trainer.lab.plan.calibration import Calibration
from trainer.lab.plan.clock import Clock, Step
from trainer.lab.plan.hardware import Hardware
from trainer.lab.plan.layout import GIB, Layout, layout_of
from trainer.lab.plan.search import Search, fits, search, variants_of
from trainer.lab.plan.whole import Traces
from trainer.program import Program, program_of
from trainer.size import flops_per_token
from trainer.split import check_rows

DAY_S = 86400


@dataclass(frozen=True)
class SpanPlan:
    """A span of the program under one layout."""

    name: str
    tokens: int
    num_steps: int
    step: Step

    @property
    def seconds(self) -> float:
        return self.num_steps * self.step.seconds


@dataclass(frozen=True)
class Plan:
    config: Config
    hardware: Hardware
    calibration: Calibration
    layout: Layout
    spans: tuple[SpanPlan, ...]
    search: Search | None
    price: float | None  # of a GPU hour
    overrides: tuple[str, ...] = ()  # overrides of the command line
    span: str | None = None  # that was asked for
    trained: float = 1.0  # share of the parameters

    @property
    def main(self) -> SpanPlan:
        """The span that was asked for, or in which most tokens are seen."""
        return max(self.spans, key=lambda span: (span.name == self.span, span.tokens))

    @cached_property
    def seconds(self) -> float:
        """Of the whole program, at the shortest."""
        return sum(span.seconds for span in self.spans)

    @property
    def tokens(self) -> int:
        return sum(span.tokens for span in self.spans)

    def mfu(self, step: Step) -> float:
        """At the most."""
        flop = flops_per_token(self.config.model, seq_len=step.now.seq_len)
        return step.tokens_per_s * flop / (self.layout.ranks * self.hardware.peak_bf16.value)

    @property
    def fits(self) -> bool:
        return fits(self.main.step, self.hardware)


def plan(
    config: Config,
    hardware: Hardware,
    calibration: Calibration,
    *,
    ranks: int | None = None,
    imbalance: float = 0.0,
    price: float | None = None,
    searches: bool = True,
    span: str | None = None,
) -> Plan:
    """span: the one that is searched for and told of; None: in which most tokens are seen.

    Raises: ConfigError, as a start of training would.
    """
    if config.model.expert_dtype == MXFP8:
        raise ConfigError(
            f"model.expert_dtype={MXFP8}: configs/device has speeds of float32 and bfloat16 alone; plan it "
            "with model.expert_dtype=bfloat16, which is no faster"
        )
    program = program_of(config)
    layout = layout_of(config, ranks=ranks, micro_batch=config.micro_batch)
    program.check_split(num_ranks=layout.readers, num_streams=config.data.num_streams)
    check_rows(program, cp=layout.cp)
    main = max(program.spans, key=lambda each: (each.name == span, each.end - each.start))
    if span not in (None, main.name):
        names = ", ".join(each.name for each in program.spans)
        raise ConfigError(f"span={span}: there is no span {span} (there are: {names}); use one of them")
    with Traces(config) as traces:
        traces.ahead([layout.variant(config.model.num_experts)])
        if searches:
            traces.ahead(variants_of(config, main, ranks=layout.ranks))
        clock = Clock(config, hardware, imbalance=imbalance)
        spans = spans_of(config, program, layout, traces, clock)
        searched = (
            search(config, program, main, traces, clock, hardware, ranks=layout.ranks) if searches else None
        )
    share = clock.optimizer.trained
    return Plan(config, hardware, calibration, layout, spans, searched, price, span=span, trained=share)


def spans_of(
    config: Config, program: Program, layout: Layout, traces: Traces, clock: Clock
) -> tuple[SpanPlan, ...]:
    whole = traces.whole(layout.variant(config.model.num_experts))
    planned, left = list[SpanPlan](), program.last_step()
    for span, _, num_steps in program.walk():
        if num_steps := min(num_steps, left):
            step = clock.step(replace(layout, micro_batch=span.now.micro_batch), whole, span.now)
            planned.append(SpanPlan(span.name, num_steps * span.now.tokens, num_steps, step))
            left -= num_steps
    return tuple(planned)


def bounded_by(step: Step) -> str:
    """In words."""
    times = step.times()
    share = times[step.bound] / sum(times.values())
    forward, backward, *_ = step.phases
    if step.bound == "GPU":
        parts = {name: forward.parts.get(name, 0) + backward.parts.get(name, 0) for name in forward.parts}
        largest = max(parts, key=parts.get)
        words = {"memory": "kernels that move bytes through memory", "all-to-all": "the experts' all-to-all"}
        what = (
            f"the GPU, most of it {words.get(largest, largest)} ({parts[largest] / sum(parts.values()):.0%})"
        )
        return f"{what}, in {share:.0%} of the step"
    words = {
        "NIC": "the network between nodes, which carries weights and gradients",
        "NVLink": "NVLink",
        "host": "the host, which launches kernels",
    }
    return f"{words[step.bound]}, in {share:.0%} of the step"


CHANGES = {
    "micro_batch": lambda layout: layout.micro_batch,
    "activation_checkpoint": lambda layout: layout.policy,
    "parallel.ep": lambda layout: layout.ep,
    "parallel.cp": lambda layout: layout.cp,
    "parallel.dp_replicate": lambda layout: layout.dp_replicate,
    "parallel.reshard_after_forward": lambda layout: layout.reshard,
    "parallel.reduce_dtype": lambda layout: layout.reduce_dtype,
}
TOGETHER = ("micro_batch", "activation_checkpoint")  # larger microbatches may need less to be kept


def first_change(plan: Plan) -> tuple[str, Step] | None:
    """The change of one setting (or of micro_batch and checkpointing together) that gains most, if one gains
    5 %."""
    if plan.search is None:
        return None
    before, now = plan.layout, plan.main.step
    best = None
    for step in plan.search.best:
        changed = [key for key, read in CHANGES.items() if read(step.layout) != read(before)]
        if len(changed) == 1 or set(changed) == set(TOGETHER):
            best = changed, step
            break
    if best is None or (plan.fits and best[1].seconds > 0.95 * now.seconds):
        return None
    changed, step = best
    return " ".join(f"{key}={text(CHANGES[key](step.layout))}" for key in changed), step


def text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def refuse_unfit(plan: Plan) -> None:
    """Raises: ConfigError if no layout of the search fits."""
    if plan.search is None or plan.search.best or plan.fits:
        return
    least = min(plan.search.steps, key=lambda step: step.memory.total, default=plan.main.step)
    raise ConfigError(
        f"device={plan.hardware.name.lower()}: no layout on {plan.layout.ranks} ranks fits, the smallest "
        f"needs {least.memory.total / GIB:,.0f} GiB of {plan.hardware.memory.value:,.0f} GiB "
        f"({' '.join(least.layout.overrides())}); use more ranks= or a device with more memory"
    )
