"""How does a run go through its program, and in which words is that told? Rows and totals for terminal and
page.

Positions in tokens since the start of the run.
"""

import math
from functools import cache, partial
from typing import NamedTuple

from trainer.config import Config
from trainer.lab.digits import human, short
from trainer.program import KEPT, Curve, Program, Span
from trainer.size import count_parameters, flops_per_token

# the others have columns of their own
SHOWN = [key for key in KEPT if key not in ("global_batch", "seq_len")]
OFF = {"micro_batch": None, "mixture": None}  # not worth a word in the first span; of all else, 0


class Stretch(NamedTuple):
    """A span as the run goes through it, from its first step to its last. start, end: tokens seen."""

    span: Span
    first_step: int
    num_steps: int
    start: int
    end: int

    def along(self, curve: Curve, peak: float = 1.0) -> str:
        return " → ".join(
            dict.fromkeys(
                short(peak * curve.at(at)) for at in (self.span.start, min(self.span.end, self.end))
            )
        )


class Preview(NamedTuple):
    config: Config
    stretches: list[Stretch]
    ranks: int
    tokens_per_s: float

    @property
    def peaks(self) -> dict[str, float]:
        """Peak rates by their keys; the bare factor if there are none."""
        rates = {
            f"optim.{key}": value
            for key, value in self.config.optim.items()
            if key == "lr" or key.endswith("_lr")
        }
        return rates or {"lr": 1.0}

    def days(self, tokens: int) -> str:
        return short(tokens / self.tokens_per_s / 86400)


def stretches(program: Program) -> list[Stretch]:
    """What the run goes through until its last step, which `steps` may set before the program's end."""
    passed, step, last_step = [], 0, program.last_step()
    for span, start, num_steps in program.walk():
        if num_steps := min(num_steps, last_step - step):
            passed.append(Stretch(span, step + 1, num_steps, start, start + num_steps * span.now.tokens))
            step += num_steps
    return passed


def changes(stretch: Stretch, before: Stretch | None) -> str:
    """What is new in a span and has no column; in the first one, whatever is on."""
    now = vars(stretch.span.now)
    old = vars(before.span.now) if before else dict.fromkeys(SHOWN, 0) | OFF
    words = {key: value for key in SHOWN if (value := now[key]) != old[key]}
    changed = [
        f"{key} {mixture(value) if key == 'mixture' else short(value)}" for key, value in words.items()
    ]
    rate = stretch.along(stretch.span.bias_rate)
    last = before.along(before.span.bias_rate) if before else "1"
    return " · ".join(changed + [f"bias_rate {rate}"] * (rate != last.split(" → ")[-1]))


def mixture(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {short(weight)}" for name, weight in weights.items())


def table(preview: Preview) -> tuple[list[str], list[list[str]]]:
    head = ["Span", "First step", "Steps", "Tokens", "Batch", "Accumulation", *preview.peaks, "Else"]
    with_days = math.isfinite(preview.tokens_per_s)
    rows = []
    for before, s in zip([None, *preview.stretches], preview.stretches, strict=False):
        now = s.span.now
        rates = [s.along(s.span.lr, peak) for peak in preview.peaks.values()]
        rows.append(
            [
                now.span,
                f"{s.first_step:,}",
                f"{s.num_steps:,}",
                f"{human(s.start)} - {human(s.end)}",
                f"{now.global_batch:,} x {now.seq_len:,}",
                f"{now.global_batch * preview.config.parallel.cp // (preview.ranks * now.micro_batch):,}",
                *rates,
                changes(s, before),
                *[preview.days(s.end - s.start)] * with_days,
            ]
        )
    return head + ["Days"] * with_days, rows


def totals(preview: Preview) -> dict[str, str]:
    model, last = preview.config.model, preview.stretches[-1]
    count, flop_at = count_parameters(model), cache(partial(flops_per_token, model))
    flop = sum((s.end - s.start) * flop_at(seq_len=s.span.now.seq_len) for s in preview.stretches)
    days = {"days": preview.days(last.end)} if math.isfinite(preview.tokens_per_s) else {}
    return {
        "tokens": human(last.end),
        "steps": f"{last.first_step + last.num_steps - 1:,}",
        "parameters": human(count.total),
        "active": human(count.active),
        **days,
        "training FLOP": short(flop),
        "ranks": f"{preview.ranks:,}",
    }
