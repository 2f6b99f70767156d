"""What changes as tokens are seen, and when? One program for all of it: spans of tokens, one after another.

A span states what is new; all else stays as it was (SpanConfig). A step belongs to the span in which it
begins, so a span ends with the first step that reaches its end. Rates follow curves over tokens; a step takes
the value in the middle of its tokens. Everything is a function of the tokens seen: a resumed run needs
nothing else.

Units: positions and lengths in tokens since the start of the run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from typing import Any, NamedTuple

from trainer.config import (
    Config,
    ConfigError,
    RouterLossWeights,
    SpanConfig,
    check_values,
    divisors,
    nearest,
)

LENGTHS = ("tokens", "until", "steps", "share")
CURVES = ("lr", "bias_rate")
SHAPES = ("linear", "cosine")
MAX_FACTOR = 1_000_000  # of a curve: on the peak rates
LOSS_KEYS = tuple(loss.name for loss in fields(RouterLossWeights))
MAX_SHARE = 1e18  # weight of a source; even its number of tokens is less
STREAM = ("mixture", "buffer", "drain")
# until a span says otherwise
KEPT = ("global_batch", "micro_batch", "seq_len", "z_loss_weight", *LOSS_KEYS, *STREAM)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """From `first` at `start` to `last` at `end`, then flat."""

    start: int
    end: int
    first: float
    last: float
    shape: str = "linear"

    def at(self, position: float) -> float:
        if position >= self.end:
            return self.last
        done = max(0.0, (position - self.start) / (self.end - self.start))
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.first + (self.last - self.first) * done


_Losses = make_dataclass("_Losses", [(key, float) for key in LOSS_KEYS], frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class StepSettings(_Losses):
    """What holds in one step, the weights of the router's losses among it."""

    span: str
    lr: float  # on every peak rate
    bias_rate: float  # on the balancing rule's step
    global_batch: int
    micro_batch: int
    seq_len: int
    z_loss_weight: float
    mixture: dict[str, float] | None = None
    buffer: int = 0
    drain: bool = False
    phase: int = 0  # how often the mixture has changed

    @property
    def tokens(self) -> int:
        """Of the step."""
        return self.global_batch * self.seq_len


class Span(NamedTuple):
    name: str
    start: int
    end: int
    now: StepSettings  # its lr and bias_rate are those at the span's start
    lr: Curve
    bias_rate: Curve

    def steps_from(self, position: int) -> int:
        """Steps that begin in this span, the first of them at `position`."""
        return max(0, -(-(self.end - position) // self.now.tokens))


@dataclass(frozen=True)
class Program:
    spans: tuple[Span, ...]
    max_steps: int | None = None  # the run ends after this many, wherever the program is

    @property
    def end(self) -> int:
        return self.spans[-1].end

    def settings_at(self, position: int) -> StepSettings:
        """What holds in the step that begins after `position` tokens; after the program's end, what held
        last.
        """
        span = next((span for span in self.spans if position < span.end), self.spans[-1])
        middle = position + span.now.tokens / 2
        return replace(span.now, lr=span.lr.at(middle), bias_rate=span.bias_rate.at(middle))

    def walk(self, position: int = 0) -> Iterator[tuple[Span, int, int]]:
        """Yields each span that is still ahead, the position of its first step and its number of steps."""
        for span in self.spans:
            if num_steps := span.steps_from(position):
                yield span, position, num_steps
                position += num_steps * span.now.tokens

    def last_step(self, *, step: int = 0, position: int = 0) -> int:
        """The number of the run's last step, seen from a run that has made `step` steps and seen `position`
        tokens.
        """
        ahead = step + sum(num_steps for _, _, num_steps in self.walk(position))
        return ahead if self.max_steps is None else min(ahead, max(step, self.max_steps))

    def check_split(self, *, num_ranks: int, num_streams: int) -> None:
        """Raises: ConfigError if a span's batch cannot be split over data-parallel ranks, microbatches or
        virtual streams.
        """
        for span in self.spans:
            where, batch, micro = named(span.name), span.now.global_batch, span.now.micro_batch
            if batch % num_ranks:
                near = [b for b in (batch // num_ranks * num_ranks, -(-batch // num_ranks) * num_ranks) if b]
                raise ConfigError(
                    f"{where}global_batch={batch} sequences do not divide among {num_ranks} data-parallel "
                    "ranks; "
                    f"use global_batch={' or '.join(map(str, near))}"
                )
            if (rows := batch // num_ranks) % micro:
                raise ConfigError(
                    f"{where}micro_batch={micro} does not divide the {rows} sequences of a rank "
                    f"(global_batch={batch} on {num_ranks} data-parallel ranks); use one of {divisors(rows)}"
                )
        batches = sorted({span.now.global_batch for span in self.spans})
        if not serve_evenly(num_streams, batches) or num_streams % num_ranks:
            choices = [d for d in divisors(batches[-1]) if d % num_ranks == 0 and serve_evenly(d, batches)]
            several = f"each of global_batch={batches}" if batches[1:] else f"global_batch={batches[0]}"
            raise ConfigError(
                f"data.num_streams={num_streams} must divide {several} or be a multiple of it, and be a "
                f"multiple of the {num_ranks} data-parallel ranks; use data.num_streams from {choices}"
            )


def serve_evenly(num_streams: int, batches: Sequence[int]) -> bool:
    """Does each stream serve the same number of rows of a step, or one row in its turn?"""
    return all(batch % num_streams == 0 or num_streams % batch == 0 for batch in batches)


def named(span: str) -> str:
    return f"stage.{span}: " if span else ""


# -- from the configuration -------------------------------------------------------------------------------


def program_of(config: Config) -> Program:
    """Raises: ConfigError where spans contradict each other or the run."""
    stage = config.stage or {"": SpanConfig()}
    first = {key: getattr(config, key) for key in ("global_batch", "micro_batch", "seq_len", "z_loss_weight")}
    first |= {key: getattr(config.balance, key) for key in LOSS_KEYS}
    d = config.data
    if d.mixture:
        check_mixture("data.", d.mixture)
    equal = dict.fromkeys(d.sources, 1.0) if d.sources else None
    first |= {"mixture": d.mixture or equal, "buffer": d.buffer, "drain": d.drain}
    nows = list(settings(stage, StepSettings(span="", lr=1.0, bias_rate=1.0, **first)))
    bounds = boundaries(stage, nows, config.steps)
    curves = {key: curves_of(key, stage, bounds) for key in CURVES}
    starts = [0, *bounds[:-1]]
    spans = tuple(
        Span(
            now.span, start, end, replace(now, lr=lr.at(start), bias_rate=bias_rate.at(start)), lr, bias_rate
        )
        for now, start, end, lr, bias_rate in zip(
            nows, starts, bounds, curves["lr"], curves["bias_rate"], strict=True
        )
    )
    program = Program(spans, config.steps)
    check_lengths(stage, program, config.steps)
    refuse_turns_with_an_end(config, spans)
    if config.data.at_end == "stop" and program.spans[-1].now.phase:
        raise ConfigError(
            "data.at_end=stop with a mixture that changes: a phase could end before its sources do, "
            "or the run before a phase; use one mixture, or data.at_end=repeat"
        )
    if config.data.packing == "fit" and (buffered := next((span for span in spans if span.now.buffer), None)):
        raise ConfigError(
            f"{named(buffered.name)}buffer={buffered.now.buffer} with data.packing=fit, which keeps no "
            "document open; use buffer=0 or data.packing=stream"
        )
    return program


def refuse_turns_with_an_end(config: Config, spans: Sequence[Span]) -> None:
    span, num_streams = min(spans, key=lambda span: span.now.global_batch), config.data.num_streams or 0
    if config.data.at_end == "stop" and span.now.global_batch < num_streams:
        raise ConfigError(
            f"data.at_end=stop with {named(span.name)}global_batch={span.now.global_batch} and "
            f"data.num_streams={num_streams}: the streams of a turn could be at their ends before others; "
            f"use data.num_streams={span.now.global_batch}, or data.at_end=repeat"
        )


def settings(stage: dict[str, SpanConfig], now: StepSettings) -> Iterator[StepSettings]:
    """What each span keeps and what it changes, curves aside."""
    for name, span in stage.items():
        check_values(span, where=named(name))
        changes = {key: value for key in KEPT if (value := getattr(span, key)) is not None}
        if "mixture" in changes:
            check_mixture(named(name), changes["mixture"])
        new_phase = "mixture" in changes and dict(changes["mixture"]) != now.mixture
        now = replace(now, span=name, phase=now.phase + (new_phase and bool(now.span)), **changes)
        yield now


def check_mixture(where: str, weights: dict[str, float]) -> None:
    if not all(0 <= w <= MAX_SHARE for w in weights.values()) or not sum(weights.values()):
        limits = f"0 or more, and not all 0, at most {MAX_SHARE:g}"
        raise ConfigError(f"{where}mixture={weights}: weights of sources, {limits}")


def check_sources(config: Config, program: Program) -> None:
    """Raises: ConfigError if a mixture names a source that the run does not have."""
    mixtures = {named(span.name): span.now.mixture for span in program.spans}
    mixtures = {"data.": config.data.mixture} | mixtures
    sources = list(config.data.sources)
    for where, mixture in mixtures.items():
        if mixture and not sources:
            raise ConfigError(
                f"{where}mixture={mixture}: weights, but there is one source, data.source; set data.sources"
            )
        for wrong in (name for name in mixture or () if name not in sources):
            raise ConfigError(
                f"{where}mixture={mixture}: there is no source {wrong}{nearest(wrong, sources)}"
            )


def boundaries(stage: dict[str, SpanConfig], nows: Sequence[StepSettings], steps: int | None) -> list[int]:
    """Where each span ends. One span may be without a length: it gets the steps that the others leave of
    `steps`.
    """
    keys_of = {
        name: [key for key in LENGTHS if getattr(span, key) is not None] for name, span in stage.items()
    }
    for name, keys in keys_of.items():
        check_length(name, {key: getattr(stage[name], key) for key in keys})
    open_spans = [name for name, keys in keys_of.items() if not keys]
    shares = [name for name, keys in keys_of.items() if keys == ["share"]]
    if steps is None and (relative := open_spans or shares):
        raise ConfigError(
            f"not set: steps. {named(relative[0])}its length is a part of them; set steps, or "
            "stage.<span>.tokens (epochs= is counted where a run starts)"
        )
    if len(open_spans) > 1:
        raise ConfigError(
            f"stage: {' and '.join(open_spans)} have no length; one span may go without, give the others one"
        )
    if (total := math.fsum(stage[name].share for name in shares)) > 1:
        raise ConfigError(
            f"stage: the shares of {' and '.join(shares)} add up to {total:g} of the steps; use at most "
            "1 in all"
        )
    if open_spans and (fixed := [name for name, keys in keys_of.items() if keys == ["until"]]):
        until = f"{named(fixed[0])}until={stage[fixed[0]].until:g}"
        raise ConfigError(f"{until} beside {open_spans[0]}, which has no length; give {open_spans[0]} one")
    ends, taken = lay_out(stage, nows, steps, rest=0)
    if not open_spans:
        return ends
    if taken > steps:
        raise ConfigError(
            f"steps={steps}: the spans with a length take {taken}; use steps={taken} or more, or "
            "shorter spans"
        )
    return lay_out(stage, nows, steps, rest=steps - taken)[0]


def check_length(name: str, lengths: dict[str, float]) -> None:
    """Refuses a span whose length is given in more than one way."""
    if len(lengths) > 1:
        one, *others = lengths
        raise ConfigError(
            f"{named(name)}{' and '.join(f'{key}={value:g}' for key, value in lengths.items())} each "
            "give its length; keep one, for example "
            f"{' '.join(f'stage.{name}.{key}=null' for key in others)} to keep {one}"
        )


def lay_out(
    stage: dict[str, SpanConfig], nows: Sequence[StepSettings], steps: int | None, *, rest: int
) -> tuple[list[int], int]:
    """Where each span ends, and the steps of all of them. `rest`: steps of the span without a length."""
    # first: where the span's first step begins; the one before may overshoot
    ends, end, first, total = list[int](), 0, 0, 0
    for span, now in zip(stage.values(), nows, strict=True):
        if span.until is not None:
            if round(span.until) <= end:
                raise ConfigError(
                    f"{named(now.span)}until={span.until:g}: the spans before it end at {end:g} tokens; "
                    "use more"
                )
            end = round(span.until)
        elif span.tokens is not None:
            end += round(span.tokens)
        else:
            num_steps = (
                round(span.share * steps)
                if span.share is not None
                else rest
                if span.steps is None
                else span.steps
            )
            end = first + num_steps * now.tokens
        num_steps = -(-(end - first) // now.tokens)  # none: check_lengths refuses it
        first, total = first + num_steps * now.tokens, total + num_steps
        ends.append(end)
    return ends, total


def check_lengths(stage: dict[str, SpanConfig], program: Program, steps: int | None) -> None:
    """Every span gets a step, unless it is a share of too few; and `steps` is not more than the program
    has.
    """
    reached = {span.name for span, _, _ in program.walk()}
    for name, span in stage.items():
        if name not in reached and any(
            getattr(span, key) is not None for key in ("tokens", "until", "steps")
        ):
            raise ConfigError(f"{named(name)}too short for one step; give it more tokens, or leave it out")
    total = sum(num_steps for _, _, num_steps in program.walk())
    if total == 0:
        raise ConfigError(f"steps={steps}: the program has no step")
    if steps is not None and steps > total:
        # shares were rounded down, or leave something over
        shared = any(span.share is not None for span in stage.values())
        more = (
            "or leave a span without a length: it gets the rest" if shared else "(null: all), or longer spans"
        )
        raise ConfigError(f"steps={steps}: the program ends after {total}; use at most that {more}")


def curves_of(key: str, stage: dict[str, SpanConfig], bounds: Sequence[int]) -> list[Curve]:
    """The curve of `key` that each span follows: its own, or that of the span before it."""
    names, curves = list(stage), list[Curve]()
    curve, owner, target = Curve(start=0, end=0, first=1.0, last=1.0), "", -1
    for i, (name, span) in enumerate(stage.items()):
        value, start = getattr(span, key), bounds[i - 1] if i else 0
        if value is not None:
            if i <= target:
                raise ConfigError(
                    f"{named(name)}{key} is set, but {key} of {owner} runs until {names[target]}; let it "
                    f"end before {name}"
                )
            curve, target = new_curve(
                f"{named(name)}{key}", value, names[i:], start, bounds[i:], before=curve.at(start)
            )
            owner, target = name, i + target
        curves.append(curve)
    return curves


def new_curve(
    where: str, value: Any, names: list[str], start: int, bounds: Sequence[int], *, before: float
) -> tuple[Curve, int]:
    """The curve that begins with the first of `names`, and the index of the span at whose end it is
    through.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = {"from": value, "to": value}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where}={value!r}: must be a number, or from, to, shape and until, like {{from: 0, to: 1}}"
        )
    keys = ["from", "to", "shape", "until"]
    for wrong in (str(key) for key in value if key not in keys):
        raise ConfigError(f"{where}.{wrong}: there is no such key{nearest(wrong, keys)}")
    first, last = value.get("from", before), value.get("to", before)
    shape, until = value.get("shape", "linear"), value.get("until", names[0])
    for what, factor in (("from", first), ("to", last)):
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= MAX_FACTOR:
            raise ConfigError(
                f"{where}.{what}={factor}: must be a number, 0 or more and at most {MAX_FACTOR} times the "
                "peak"
            )
    if shape not in SHAPES:
        raise ConfigError(f"{where}.shape={shape}: must be one of {', '.join(SHAPES)}")
    if until not in names:
        raise ConfigError(f"{where}.until={until}: must be this span or a later one: {', '.join(names)}")
    last_span = names.index(until)
    return Curve(
        start=start, end=bounds[last_span], first=float(first), last=float(last), shape=shape
    ), last_span
