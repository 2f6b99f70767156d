"""Which layout is best, and why do the others fall out?"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from trainer.config import Config, divisors
from trainer.lab.plan.clock import Clock, Step
from trainer.lab.plan.hardware import Hardware
from trainer.lab.plan.layout import GIB, Layout, refusal, rows_at_once
from trainer.lab.plan.whole import Traces, Variant
from trainer.program import Program, Span

MOST_ROWS = 16  # of a microbatch
MOST_REPLICAS = 64
MOST_CP = 32  # ranks that share rows
MOST_REFINED = 100  # layouts that are tried with other ways to gather and reduce
POLICIES = ("none", "selective_experts", "selective", "full")


@dataclass(frozen=True)
class Search:
    best: list[Step]  # that fit, fastest first
    steps: list[Step]  # that could be started
    fallen: Counter  # layouts by why they fall out

    @property
    def count(self) -> int:
        return len(self.steps) + sum(n for why, n in self.fallen.items() if why != "does not fit")


def space(config: Config, ranks: int, rows: int, cp: int = 1) -> Iterator[Layout]:
    """rows: of the ranks that share them, in a step of the span that is searched for."""
    most_ep = config.model.num_experts if config.model.num_dense_layers < config.model.num_layers else 1
    replicas = [n for n in divisors(ranks) if n <= MOST_REPLICAS]
    eps = [2**i for i in range(most_ep.bit_length())]
    micros = [n for n in range(1, min(rows, MOST_ROWS) + 1) if n in (1, 2, 3, 4, 6, 8, 12, 16)]
    for replicate, ep, micro, policy in product(replicas, eps, micros, POLICIES):
        yield Layout(ranks, replicate, ep, micro, policy, cp=cp)


def space_of(config: Config, span: Span, *, ranks: int) -> Iterator[Layout]:
    """Rows are cut where each of two pieces of a rank would have a window."""
    longest = span.now.seq_len // (2 * config.model.window)
    for cp in (n for n in divisors(ranks) if n == 1 or n <= min(longest, MOST_CP)):
        yield from space(config, ranks, max(1, span.now.global_batch * cp // ranks), cp)


def variants_of(config: Config, span: Span, *, ranks: int) -> list[Variant]:
    """Of all layouts that are searched and can be started: what is traced for them."""
    layouts = [
        layout
        for layout in space_of(config, span, ranks=ranks)
        if refusal(config, layout, [replace(span.now, micro_batch=layout.micro_batch)]) is None
    ]
    return list(dict.fromkeys(layout.variant(config.model.num_experts) for layout in layouts))


def refined(best: list[Step], config: Config) -> Iterator[Layout]:
    """The fastest layouts again, with weights that are kept from forward to backward and with gradients that
    travel in bfloat16. Only of one kind, as each has traces of its own."""
    alike = [step.layout for step in best[:MOST_REFINED]]
    kinds = [layout.variant(config.model.num_experts) for layout in alike]
    for keep, dtype in product((True, False), ("float32", "bfloat16")):
        if (keep, dtype) != (True, "float32"):
            yield from (
                replace(layout, reshard=keep, reduce_dtype=dtype)
                for layout, kind in zip(alike, kinds, strict=True)
                if kind == kinds[0]
            )


def search(
    config: Config,
    program: Program,
    span: Span,
    traces: Traces,
    clock: Clock,
    hardware: Hardware,
    *,
    ranks: int,
) -> Search:
    """Of all layouts, in the span that most tokens are seen in. Where its microbatch does not divide the
    batch of another span, that one has a smaller one (`micro_batches`)."""
    first = replace(span.now, micro_batch=config.micro_batch)
    steps, fallen = list[Step](), Counter()

    def judge(layouts: Iterator[Layout]) -> list[Step]:
        """All that fit so far, fastest first."""
        layouts = list(layouts)
        traces.ahead(layout.variant(config.model.num_experts) for layout in layouts)
        for layout in layouts:
            now = replace(first, micro_batch=layout.micro_batch)
            if why := refusal(config, layout, [now]):
                fallen[why.why] += 1
                continue
            step = clock.step(layout, traces.whole(layout.variant(config.model.num_experts)), now)
            steps.append(step)
            fallen["does not fit"] += not fits(step, hardware)
        return sorted((step for step in steps if fits(step, hardware)), key=lambda step: step.seconds)

    best = judge(space_of(config, span, ranks=ranks))
    return Search(judge(refined(best, config)), steps, fallen)


def micro_batches(program: Program, layout: Layout) -> list[str]:
    """Overrides of the spans in which the layout's micro_batch cannot be, or is not, in the order of the
    program. Spans of other rows than the longest keep theirs."""
    longest = max(program.spans, key=lambda span: span.end - span.start).now.seq_len
    words, holds, before = [], layout.micro_batch, program.spans[0].now.micro_batch
    for span in program.spans:
        now = span.now
        would_hold = now.micro_batch if now.micro_batch != before else holds
        rows = rows_at_once(now, readers=layout.readers, most=layout.micro_batch)
        holds, before = rows if now.seq_len == longest else now.micro_batch, now.micro_batch
        if holds != would_hold and span.name:
            words.append(f"stage.{span.name}.micro_batch={holds}")
    return words


def fits(step: Step, hardware: Hardware) -> bool:
    return step.memory.total <= hardware.memory.value * GIB
