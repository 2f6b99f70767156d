"""In which words is a plan told? Rows for terminal and page.

Times are ranges: from what the figures of the device give to `calibration.width` times that.
"""

from trainer.lab.digits import human, short
from trainer.lab.plan.calibration import UNMEASURED
from trainer.lab.plan.clock import Step
from trainer.lab.plan.layout import GIB
from trainer.lab.plan.plan import DAY_S, Plan, SpanPlan, bounded_by, first_change
from trainer.lab.plan.search import fits, micro_batches
from trainer.program import program_of

Rows = tuple[list[str], list[list[str]]]  # head and rows


def span_of(low: float, high: float, unit: str = "") -> str:
    """1.2 - 2.4 days, 88 - 180; one number where both are the same."""
    ends = list(dict.fromkeys((short(float(f"{low:.2g}")), short(float(f"{high:.2g}")))))
    return f"{' - '.join(ends)}{f' {unit}' if unit else ''}"


def times(plan: Plan, seconds: float, per: float = 1.0, unit: str = "") -> str:
    return span_of(seconds / per, seconds * plan.calibration.width / per, unit)


def rates(plan: Plan, rate: float, unit: str = "") -> str:
    return span_of(rate / plan.calibration.width, rate, unit)


def gpu_hours(plan: Plan, seconds: float) -> float:
    return seconds / 3600 * plan.layout.ranks


def sentence(plan: Plan) -> str:
    """What bounds it, and what to try first."""
    text = f"Bound by {bounded_by(plan.main.step)}"
    if not plan.fits:
        text = f"Does not fit: {gib(plan.main.step.memory.total)} of {plan.hardware.memory.value:,.0f} GiB"
    change = first_change(plan)
    if change is None:
        return f"{text}; no single change gains 5 %." if plan.search else f"{text}."
    words, step = change
    gain = f" ({plan.main.step.seconds / step.seconds:.2g} times as fast)" if plan.fits else ""
    return f"{text}; try {words} first{gain}."


def warnings(plan: Plan) -> list[str]:
    """What is planned otherwise than a stranger may think; spans that do not fit, and what would help."""
    config, remarks = plan.config, list[str]()
    if config.train_only is not None:
        remarks.append(
            f"train_only=[{', '.join(config.train_only)}]: {plan.trained:.3g} of the parameters are trained; "
            "the others have no gradients, no optimizer state, and nothing of them is reduced."
        )
    if config.parallel.dispatcher != "all_to_all":
        remarks.append(
            f"parallel.dispatcher={config.parallel.dispatcher} is planned as all_to_all: its speed was not "
            "measured."
        )
    unfit = [span for span in plan.spans if not fits(span.step, plan.hardware)]
    return remarks + [
        f"{span.name or 'the run'} does not fit: {gib(span.step.memory.total)} of "
        f"{plan.hardware.memory.value:,.0f} GiB a rank for rows of "
        f"{span.step.now.seq_len:,} tokens; use more checkpointing or fewer rows"
        + (
            f", or cut rows: parallel.cp={2 * span.step.layout.cp} or more"
            if span.step.now.micro_batch == 1
            else ""
        )
        for span in unfit
    ]


def facts(plan: Plan) -> dict[str, str]:
    main, layout = plan.main, plan.layout
    rate = main.step.tokens_per_s
    values = {
        "tokens": human(plan.tokens),
        "ranks": f"{layout.ranks:,} {plan.hardware.name}",
        "days": times(plan, plan.seconds, DAY_S),
        "GPU hours": span_of(*(gpu_hours(plan, plan.seconds) * k for k in (1, plan.calibration.width))),
        "tokens/s": rates(plan, rate),
        "tokens/s a GPU": rates(plan, rate / layout.ranks),
        "MFU": rates(plan, 100 * plan.mfu(main.step), "%"),
        "memory": f"{gib(main.step.memory.total)} of {plan.hardware.memory.value:,.0f} GiB",
    }
    if plan.price is not None:
        values["cost"] = span_of(
            *(gpu_hours(plan, plan.seconds) * plan.price * k for k in (1, plan.calibration.width))
        )
    return values


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f} GiB"


def spans(plan: Plan) -> Rows:
    head = [
        "Span",
        "Tokens",
        "Batch",
        "Accumulation",
        "Memory [GiB]",
        "Step [s]",
        "tokens/s",
        "MFU [%]",
        "Days",
    ]
    rows = [span_row(plan, span) for span in plan.spans]
    if plan.price is not None:
        head.append("Cost")
        for row, span in zip(rows, plan.spans, strict=True):
            low = gpu_hours(plan, span.seconds) * plan.price
            row.append(span_of(low, low * plan.calibration.width))
    return head, rows


def span_row(plan: Plan, span: SpanPlan) -> list[str]:
    step, now = span.step, span.step.now
    room = plan.hardware.memory.value * GIB
    return [
        span.name,
        human(span.tokens),
        f"{now.global_batch:,} x {now.seq_len:,}",
        f"{step.accumulation:,}",
        f"{step.memory.total / GIB:,.1f}{'' if step.memory.total <= room else ' (does not fit)'}",
        times(plan, step.seconds),
        rates(plan, step.tokens_per_s),
        rates(plan, 100 * plan.mfu(step)),
        times(plan, span.seconds, DAY_S),
    ]


def memory(plan: Plan) -> Rows:
    step = plan.main.step
    names = {
        "weights": "weights, float32",
        "gradients": "gradients, float32",
        "optimizer": "optimizer's state",
        "gathered": "gathered weights",
        "reduced": "gradients before they are reduced",
        "activations": "activations",
    }
    rows = [[names[kind], f"{size / GIB:,.2f}"] for kind, size in step.memory.kinds.items()]
    rows.append(["allocator, CUDA and NCCL", f"{step.memory.lost / GIB:,.2f}"])
    rows.append([f"peak, {step.memory.moment}", f"{step.memory.total / GIB:,.2f}"])
    return ["Memory of a rank", "GiB"], rows


def host_bytes(plan: Plan) -> float:
    """Of a node, while a checkpoint is written: a copy of weights and optimizer state of its ranks."""
    kinds = plan.main.step.memory.kinds
    return (kinds["weights"] + kinds["optimizer"]) * plan.hardware.per_node.value


def flop(plan: Plan) -> Rows:
    step = plan.main.step
    total = sum(step.flop.values())
    rows = [[name, f"{n / 1e12:,.1f}", f"{n / total:.0%}"] for name, n in step.flop.most_common()]
    return ["Work of a rank in a step", "TFLOP", "Share"], rows


def traffic(plan: Plan) -> Rows:
    rows = [
        [name, f"{links.nvlink / 1e9:,.1f}", f"{links.nic / 1e9:,.1f}"]
        for name, links in sorted(plan.main.step.traffic.items(), key=lambda each: -each[1].nic)
        if links.nvlink + links.nic > 1e6
    ]
    return ["Received by a rank in a step", "GB inside the node", "GB between nodes"], rows


def timeline(plan: Plan) -> Rows:
    step = plan.main.step
    n = step.accumulation
    rows = []
    for phase, count, name in zip(
        step.phases, (n, n - 1, 1, 1), ("forward", "backward", "backward, the last", "optimizer"), strict=True
    ):
        if count:
            parts = [phase.gpu, phase.nvlink, phase.nic, phase.host, phase.seconds, phase.exposed]
            rows.append([name, f"{count}", *(f"{seconds:.3f}" for seconds in parts), phase.bound])
    head = [
        "Phase",
        "Times",
        "GPU [s]",
        "NVLink [s]",
        "NIC [s]",
        "Host [s]",
        "Takes [s]",
        "Exposed [s]",
        "Bound by",
    ]
    return head, rows


def best(plan: Plan, count: int = 5) -> Rows:
    head = ["Rank", "tokens/s", "MFU [%]", "GiB", "Days", "Bound by", "Command"]
    rows = []
    for i, step in enumerate(plan.search.best[:count], start=1):
        days = plan.tokens / step.tokens_per_s
        rows.append(
            [
                str(i),
                rates(plan, step.tokens_per_s),
                rates(plan, 100 * plan.mfu(step)),
                f"{step.memory.total / GIB:,.0f}",
                times(plan, days, DAY_S),
                step.bound,
                command(plan, step),
            ]
        )
    return head, rows


def command(plan: Plan, step: Step) -> str:
    spans = micro_batches(program_of(plan.config), step.layout)
    return " ".join(["triquetra train", *plan.overrides, *step.layout.overrides(), *spans])


def fallen(plan: Plan) -> str:
    whys = ", ".join(f"{n:,} {why}" for why, n in plan.search.fallen.most_common())
    return f"{plan.search.count:,} layouts: {len(plan.search.best):,} fit" + (f"; {whys}" if whys else "")


def certainty(plan: Plan) -> str:
    width = plan.calibration.width
    if width == UNMEASURED:
        return (
            f"Times are ranges, up to {width:g} times the shortest: no run of this code was measured on the "
            "device. calibration= narrows them."
        )
    return (
        f"Times are ranges, up to {width:g} times the shortest, from {plan.calibration.device}'s calibration."
    )
