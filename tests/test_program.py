"""The program, against hand arithmetic, a loop that counts every step, and the published schedules."""

import math
import random
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from trainer.config import Config, ConfigError, SpanConfig, load
from trainer.program import Curve, Program, StepSettings, program_of

BATCH, LENGTH = 4, 8  # 32 tokens a step


def config(stage: dict | None = None, steps: int | None = None, **own) -> Config:
    spans = {name: SpanConfig(**values) for name, values in (stage or {}).items()}
    own = {"seq_len": LENGTH, "global_batch": BATCH, "micro_batch": 1, **own}
    return Config(name="x", stage=spans, steps=steps, **own)


def program(stage: dict | None = None, steps: int | None = None, **own) -> Program:
    return program_of(config(stage, steps, **own))


def run(of: Program, *, step: int = 0, position: int = 0) -> list[tuple[int, StepSettings]]:
    """What each step of a loop sees: its position and its settings."""
    seen, last_step = [], of.last_step(step=step, position=position)
    while step < last_step:
        now = of.settings_at(position)
        seen.append((position, now))
        step, position = step + 1, position + now.global_batch * now.seq_len
    return seen


def counts(of: Program) -> dict[str, int]:
    """Steps by span, counted one by one."""
    found: dict[str, int] = {}
    for _, now in run(of):
        found[now.span] = found.get(now.span, 0) + 1
    return found


# -- curves -----------------------------------------------------------------------------------------------


def test_linear_curve_by_hand():
    curve = Curve(start=100, end=300, first=1.0, last=0.2)
    at = {0: 1.0, 100: 1.0, 150: 0.8, 200: 0.6, 250: 0.4, 300: 0.2, 10**9: 0.2}
    assert {position: curve.at(position) for position in at} == pytest.approx(at)


def test_cosine_curve_by_hand():
    """(1 - cos(pi x)) / 2 is 0.25 at a third, 0.5 at half, 0.75 at two thirds of the way."""
    curve = Curve(start=300, end=900, first=2.0, last=1.0, shape="cosine")
    at = {0: 2.0, 300: 2.0, 500: 1.75, 600: 1.5, 700: 1.25, 900: 1.0, 1000: 1.0}
    assert {position: curve.at(position) for position in at} == pytest.approx(at)


def test_a_curve_without_length_has_arrived():
    assert Curve(start=5, end=5, first=0.0, last=0.7).at(5) == 0.7


def test_a_step_takes_the_value_in_the_middle_of_its_tokens():
    seen = run(program({"up": {"steps": 4, "lr": {"from": 0, "to": 1}}, "flat": {"steps": 2}}))
    assert [now.lr for _, now in seen] == [0.125, 0.375, 0.625, 0.875, 1.0, 1.0]
    assert {now.bias_rate for _, now in seen} == {1.0}


def test_a_curve_goes_on_from_the_last_value_and_a_number_is_flat():
    stage = {
        "a": {"steps": 2, "lr": 0.5},
        "b": {"steps": 2, "lr": {"to": 0.1}},
        "c": {"steps": 2, "lr": {}},
        "d": {"steps": 2, "lr": {"from": 1}},
        "e": {"steps": 1, "lr": 0},
    }
    assert [now.lr for _, now in run(program(stage))] == pytest.approx(
        [0.5, 0.5, 0.4, 0.2, 0.1, 0.1, 0.775, 0.325, 0]
    )


def test_a_curve_across_spans():
    # b to d: 2 x 32 + 1 x 64 + 4 x 64 = 384 tokens
    stage = {
        "a": {"steps": 1},
        "b": {"steps": 2, "lr": {"to": 0, "until": "d"}},
        "c": {"steps": 1, "global_batch": 8},
        "d": {"steps": 4},
        "e": {"steps": 1},
    }
    seen = run(program(stage))
    middles = [16, 48, 96, 160, 224, 288, 352]
    assert [now.lr for _, now in seen] == pytest.approx([1.0, *(1 - middle / 384 for middle in middles), 0.0])
    assert [now.span for _, now in seen] == list("abbcddd") + ["d", "e"]


def test_rates_follow_their_own_curves():
    stage = {
        "a": {"steps": 2, "lr": {"from": 0}, "bias_rate": 0.5},
        "b": {"steps": 2, "bias_rate": {"to": 0, "shape": "linear"}},
    }
    of = program(stage)
    assert [(now.lr, now.bias_rate) for _, now in run(of)] == [
        (0.25, 0.5),
        (0.75, 0.5),
        (1.0, 0.375),
        (1.0, 0.125),
    ]
    # at the spans' starts
    assert [(span.now.lr, span.now.bias_rate) for span in of.spans] == [(0.0, 0.5), (1.0, 0.5)]


# -- lengths ----------------------------------------------------------------------------------------------


def test_settings_stay_until_a_span_says_otherwise():
    stage = {
        "a": {"steps": 1, "mixture": {"web": 1.0}},
        "b": {"steps": 1, "seq_len": 16, "z_loss_weight": 1e-6, "buffer": 3},
        "c": {
            "steps": 1,
            "global_batch": 2,
            "micro_batch": 2,
            "mixture": {"code": 0.5},
            "batch_loss_weight": 0.25,
        },
    }
    run_own = config(stage, z_loss_weight=1e-4)
    run_own.balance.sequence_loss_weight, run_own.balance.switch_loss_weight = 0.5, 0.75
    run_own.balance.batch_loss_weight, run_own.balance.router_z_loss_weight = 0.125, 0.0625
    a, b, c = (now for _, now in run(program_of(run_own)))
    assert a == StepSettings(
        span="a",
        lr=1.0,
        bias_rate=1.0,
        global_batch=4,
        micro_batch=1,
        seq_len=8,
        z_loss_weight=1e-4,
        sequence_loss_weight=0.5,
        switch_loss_weight=0.75,
        batch_loss_weight=0.125,
        router_z_loss_weight=0.0625,
        mixture={"web": 1.0},
        buffer=0,
    )
    assert b == replace(a, span="b", seq_len=16, z_loss_weight=1e-6, buffer=3)
    assert c == replace(
        b, span="c", phase=1, global_batch=2, micro_batch=2, mixture={"code": 0.5}, batch_loss_weight=0.25
    )
    assert (a.tokens, b.tokens, c.tokens) == (32, 64, 32)


def test_a_step_belongs_to_the_span_in_which_it_begins():
    """a ends at 40: its second step runs from 32 to 64. b, 40 tokens on, ends at 80: one step, to 96. c has 2
    more.
    """
    of = program({"a": {"tokens": 40}, "b": {"tokens": 40}, "c": {"until": 129}})
    assert [(position, now.span) for position, now in run(of)] == [
        (0, "a"),
        (32, "a"),
        (64, "b"),
        (96, "c"),
        (128, "c"),
    ]
    assert [(span.name, start, num) for span, start, num in of.walk()] == [
        ("a", 0, 2),
        ("b", 64, 1),
        ("c", 96, 2),
    ]
    assert of.end == 129


def test_steps_are_steps_also_after_a_span_that_overshoots():
    """a's one step of 32 tokens ends 31 beyond a: ten steps of 2 tokens begin there."""
    of = program({"a": {"tokens": 1}, "b": {"steps": 10, "global_batch": 1, "seq_len": 2}})
    assert counts(of) == {"a": 1, "b": 10}
    assert of.end == 52


def test_an_open_span_gets_the_steps_that_the_others_take_leave():
    """a overshoots by 24 tokens, so b's 40 tokens from 72 on are 1 step (to 128), and c gets 20 - 3 - 1 -
    5.
    """
    stage = {"a": {"tokens": 72}, "b": {"tokens": 40}, "c": {}, "d": {"share": 0.25}}
    assert counts(program(stage, 20)) == {"a": 3, "b": 1, "c": 11, "d": 5}


def test_shares_are_of_the_steps_and_may_be_none():
    stage = {
        "up": {"share": 0.1, "lr": {"from": 0, "to": 1}},
        "flat": {},
        "down": {"share": 0.2, "lr": {"to": 0}},
    }
    assert counts(program(stage, 20)) == {"up": 2, "flat": 14, "down": 4}
    few = program(stage, 3)  # 0.3 and 0.6 steps
    assert counts(few) == {"flat": 2, "down": 1}
    assert [now.lr for _, now in run(few)] == [1.0, 1.0, 0.5]
    assert counts(program({"up": {"share": 1}, "flat": {}}, 7)) == {"up": 7}


def test_without_spans_all_steps_are_alike():
    [now] = {str(now) for _, now in run(program(steps=3))}
    assert "span='', lr=1.0" in now
    assert program(steps=3).last_step() == 3


def test_steps_cut_a_program_short():
    stage = {"a": {"steps": 3}, "b": {"tokens": 320}}
    assert program(stage).last_step() == 13
    of = program(stage, 5)
    assert of.last_step() == 5
    assert counts(of) == {"a": 3, "b": 2}
    assert of.last_step(step=4, position=128) == 5
    assert of.last_step(step=9, position=288) == 9  # beyond the cut: nothing is left to do
    assert of.last_step(step=2, position=352) == 4  # another batch before: 2 steps to the program's end


def test_after_the_end_what_held_last_holds():
    of = program({"a": {"steps": 1}, "b": {"steps": 1, "lr": {"to": 0.5}}})
    assert (of.settings_at(10**6).span, of.settings_at(10**6).lr) == ("b", 0.5)
    assert list(of.walk(64)) == []
    assert of.last_step(step=2, position=64) == 2


def random_program(draw: random.Random) -> tuple[Program, list[tuple[str, int, int]]]:
    """And (name, nominal end or steps, tokens of a step) as a loop would need them."""
    stage, plan, batch, length, last = {}, [], BATCH, LENGTH, 0
    for i in range(draw.randint(1, 6)):
        name, values = f"s{i}", {}
        if draw.random() < 0.5:
            values["global_batch"] = batch = draw.randint(1, 9)
        if draw.random() < 0.5:
            values["seq_len"] = length = draw.randint(2, 9)
        kind = draw.choice(["tokens", "until", "steps"])
        # long enough not to be swallowed by the step before, of at most 81 tokens
        amount = draw.randint(1, 20) if kind == "steps" else draw.randint(100, 900)
        values[kind] = amount + (last if kind == "until" else 0)
        last += amount * batch * length + 81 if kind == "steps" else amount  # at least where the span ends
        if draw.random() < 0.4:
            values["lr"] = {
                "from": draw.random(),
                "to": draw.random(),
                "shape": draw.choice(["linear", "cosine"]),
            }
        stage[name] = values
        plan.append((name, kind, values[kind], batch * length))
    return program(stage), plan


@pytest.mark.parametrize("seed", range(60))
def test_walk_last_step_and_at_agree_with_a_loop_that_counts(seed):
    draw = random.Random(seed)
    of, plan = random_program(draw)
    slow, position, end = [], 0, 0  # (span, position) of every step, from the plan alone
    for name, kind, amount, tokens in plan:
        if kind == "steps":
            for _ in range(amount):
                slow.append((name, position))
                position += tokens
            end = position
        else:
            end = amount if kind == "until" else end + amount
            while position < end:
                slow.append((name, position))
                position += tokens
    assert [(now.span, at) for at, now in run(of)] == slow
    assert of.end == end
    assert of.last_step() == len(slow)
    tokens_of = {name: tokens for name, _, _, tokens in plan}
    for span, start, num_steps in of.walk():
        assert [at for name, at in slow if name == span.name] == [
            start + i * tokens_of[span.name] for i in range(num_steps)
        ]
    ends = [span.end for span in of.spans]
    # also not where steps begin
    for at in [draw.randrange(of.end) for _ in range(20)] + [end for end in ends if end < of.end]:
        [name] = [span.name for span in of.spans if span.start <= at < span.end]
        assert of.settings_at(at).span == name
        from_here, here = 0, at
        while here < of.end:
            from_here, here = from_here + 1, here + of.settings_at(here).tokens
        assert of.last_step(step=7, position=at) == 7 + from_here == 7 + sum(num for _, _, num in of.walk(at))


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_is_stopped_anywhere_goes_on_as_if_it_had_not_been(seed):
    draw = random.Random(seed)
    of, _ = random_program(draw)
    whole = run(of)
    step = draw.randint(0, len(whole) - 1)
    assert run(of, step=step, position=whole[step][0]) == whole[step:]


@pytest.mark.parametrize("seed", range(20))
def test_shares_and_an_open_span_use_exactly_the_steps_there_are(seed):
    draw = random.Random(seed)
    steps = draw.randint(100, 200)
    stage = {
        "a": {"tokens": draw.randint(801, 1500)},
        "b": {"share": 0.2, "global_batch": draw.randint(1, 20)},
        "c": {"steps": 4},
        "d": {},
        "f": {"share": 0.1},
        "e": {"tokens": draw.randint(801, 1500), "seq_len": draw.randint(20, 40)},
    }
    order = list(stage)
    draw.shuffle(order)
    of = program({name: stage[name] for name in order}, steps)
    found = counts(of)
    assert sum(found.values()) == of.last_step() == steps
    assert (found["b"], found["c"], found["f"]) == (round(0.2 * steps), 4, round(0.1 * steps))


# -- refusals ---------------------------------------------------------------------------------------------

ONE = {"steps": 1}
LATER = {"a": {"steps": 2, "lr": {"to": 0, "until": "c"}}, "b": ONE, "c": ONE}
REFUSED = [  # program, steps, message
    (
        {"a": {"tokens": 64, "steps": 2}},
        None,
        "stage.a: tokens=64 and steps=2 each give its length; keep one, for example "
        "stage.a.steps=null to keep tokens",
    ),
    (
        {"a": {"tokens": 4.9e12, "until": 5.0, "share": 0.5}},
        9,
        "stage.a: tokens=4.9e+12 and until=5 and share=0.5 each give its "
        "length; keep one, for example stage.a.until=null stage.a.share=null to keep tokens",
    ),
    (
        {"a": {"tokens": 64}, "b": {"until": 64}},
        None,
        "stage.b: until=64: the spans before it end at 64 tokens; use more",
    ),
    (
        {"a": {"tokens": 64}, "b": {"until": 32}},
        None,
        "stage.b: until=32: the spans before it end at 64 tokens; use more",
    ),
    (
        {"a": {}, "b": ONE, "c": {}},
        9,
        "stage: a and c have no length; one span may go without, give the others one",
    ),
    ({"a": {}, "b": {"until": 64}}, 9, "stage.b: until=64 beside a, which has no length; give a one"),
    (
        {"a": ONE, "b": {}},
        None,
        "not set: steps. stage.b: its length is a part of them; set steps, or stage.<span>.tokens",
    ),
    ({"a": ONE, "b": {"share": 0.5}}, None, "not set: steps. stage.b: "),
    ({}, None, "not set: steps. "),
    ({"a": {"share": 1.1}, "b": {}}, 9, "stage.a: share=1.1: must be at most 1 (a share of the run's steps)"),
    ({"a": {"share": -0.1}, "b": {}}, 9, "stage.a: share=-0.1: must be 0 or more"),
    ({"a": {"share": math.nan}}, 9, "stage.a: share=nan: must be 0 or more, and finite"),
    (
        {"a": {"share": 0.7}, "b": {"share": 0.7}},
        9,
        "stage: the shares of a and b add up to 1.4 of the steps; use at most 1 in all",
    ),
    (
        {"a": {"steps": 7}, "b": {}},
        5,
        "steps=5: the spans with a length take 7; use steps=7 or more, or shorter spans",
    ),
    ({"a": {"tokens": 0}}, None, "stage.a: tokens=0: must be above 0"),
    ({"a": {"tokens": -64}}, None, "stage.a: tokens=-64: must be above 0"),
    ({"a": {"tokens": math.nan}}, None, "stage.a: tokens=nan: must be above 0"),
    ({"a": {"tokens": math.inf}}, None, "stage.a: tokens=inf: must be above 0, and finite"),
    ({"a": {"until": math.nan}}, None, "stage.a: until=nan: must be above 0"),
    ({"a": {"until": math.inf}}, None, "stage.a: until=inf: must be above 0"),
    ({"a": {"steps": 0}}, None, "stage.a: steps=0: must be at least 1"),
    ({"a": {"steps": -2}, "b": {}}, 9, "stage.a: steps=-2: must be at least 1"),
    ({"a": {"tokens": 0.4}}, None, "stage.a: too short for one step; give it more tokens, or leave it out"),
    ({"a": {"tokens": 33}, "b": {"tokens": 31}, "c": ONE}, None, "stage.b: too short for one step"),
    ({"a": {"tokens": 33}, "b": {"until": 64}, "c": ONE}, None, "stage.b: too short for one step"),
    (
        {"a": ONE, "b": {"steps": 2}},
        4,
        "steps=4: the program ends after 3; use at most that (null: all), or longer spans",
    ),
    (
        {"a": {"share": 0.5}},
        4,
        "steps=4: the program ends after 2; use at most that or leave a span without a "
        "length: it gets the rest",
    ),
    ({"a": {"share": 0}}, 4, "steps=4: the program has no step"),
    ({"a": {**ONE, "global_batch": 0}}, None, "stage.a: global_batch=0: must be at least 1"),
    ({"a": {**ONE, "micro_batch": 0}}, None, "stage.a: micro_batch=0: must be at least 1"),
    ({"a": {**ONE, "seq_len": 1}}, None, "stage.a: seq_len=1: must be at least 2"),
    ({"a": {**ONE, "buffer": -1}}, None, "stage.a: buffer=-1: must be at least 0"),
    *(
        ({"a": {**ONE, key: value}}, None, f"stage.a: {key}={value}: must be 0 or more")
        for key in ("z_loss_weight", "sequence_loss_weight", "router_z_loss_weight")
        for value in (-1.0, math.nan, math.inf)
    ),
    *(
        (
            {"a": {**ONE, "mixture": mixture}},
            None,
            f"stage.a: mixture={mixture}: weights of sources, 0 or more, and not all 0",
        )
        for mixture in (
            {},
            {"web": 0.0},
            {"web": 1.0, "code": -1.0},
            *({"web": value} for value in (math.nan, math.inf, 1e308)),
        )
    ),
    (
        {"a": {**ONE, "lr": "high"}},
        None,
        "stage.a: lr='high': must be a number, or from, to, shape and until, like {from: 0, to: 1}",
    ),
    ({"a": {**ONE, "lr": True}}, None, "stage.a: lr=True: must be a number"),
    ({"a": {**ONE, "bias_rate": [1]}}, None, "stage.a: bias_rate=[1]: must be a number"),
    ({"a": {**ONE, "lr": -1}}, None, "stage.a: lr.from=-1: must be a number, 0 or more"),
    *(
        ({"a": {**ONE, "lr": {"to": value}}}, None, f"stage.a: lr.to={value}: must be a number, 0 or more")
        for value in (-0.5, math.nan, math.inf, "x", None, True)
    ),
    ({"a": {**ONE, "lr": {"form": 1}}}, None, "stage.a: lr.form: there is no such key (did you mean from?)"),
    (
        {"a": {**ONE, "lr": {"to": 0, "shape": "cosin"}}},
        None,
        "stage.a: lr.shape=cosin: must be one of linear, cosine",
    ),
    (
        {"a": ONE, "b": {**ONE, "lr": {"to": 0, "until": "a"}}, "c": ONE},
        None,
        "stage.b: lr.until=a: must be this span or a later one: b, c",
    ),
    (
        {"a": {**ONE, "lr": {"to": 0, "until": "z"}}},
        None,
        "stage.a: lr.until=z: must be this span or a later one: a",
    ),
    (
        {**LATER, "b": {**ONE, "lr": 1}},
        None,
        "stage.b: lr is set, but lr of a runs until c; let it end before b",
    ),
    (
        {**LATER, "c": {**ONE, "lr": {"to": 1}}},
        None,
        "stage.c: lr is set, but lr of a runs until c; let it end before c",
    ),
    (
        {"z": ONE, **LATER, "c": {**ONE, "lr": {"to": 1}}},
        None,
        "stage.c: lr is set, but lr of a runs until c",
    ),
]


@pytest.mark.parametrize(("stage", "steps", "message"), REFUSED)
def test_a_program_that_contradicts_itself_is_refused(stage, steps, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        program(stage, steps)


def test_what_is_on_the_edge_is_allowed():
    program({**LATER, "d": {**ONE, "lr": 1}})
    # 0.1 + 0.2 + 0.7 is 0.9999999999999999
    program({"a": {"share": 0.1}, "b": {"share": 0.2}, "c": {"share": 0.7}}, 10)
    program({"a": {"share": 0.33}, "b": {"share": 0.56}, "c": {"share": 0.11}}, 100)  # and 1.0000000000000002
    program(
        {
            "a": {
                **ONE,
                "seq_len": 2,
                "buffer": 0,
                "z_loss_weight": 0.0,
                "mixture": {"web": 0.0, "code": 1.0},
                "lr": 0,
            }
        }
    )
    assert counts(program({"a": {"steps": 7}, "b": {}}, 7)) == {"a": 7}
    program({"a": {"tokens": 33}, "b": {"tokens": 32}, "c": ONE})
    assert program({"a": {"until": 1}}, 1).last_step() == 1


def remedied(stage: dict, ranks: int, streams: int, own: dict) -> list[str]:
    """Follows what the refusals say until there is none. Returns them."""
    messages, stage, own = [], {name: dict(values) for name, values in stage.items()}, dict(own)
    for _ in range(12):
        try:
            program(stage, **own).check_split(num_ranks=ranks, num_streams=streams)
        except ConfigError as error:
            messages.append(str(error))
        else:
            return messages
        said, use = messages[-1].split("; use ")
        number = int(re.findall(r"\d+", use)[-1])
        if said.startswith("data.num_streams"):
            streams = number
        else:
            span, key = re.match(r"stage\.(\w+): (\w+)=", said).groups()
            stage[span][key] = number
    raise AssertionError(messages)


def test_a_batch_that_cannot_be_split_is_refused_with_numbers_that_work():
    stage = {"a": {"steps": 1, "global_batch": 12}, "b": {"steps": 1, "global_batch": 18}}
    assert remedied(stage, 6, 6, {}) == []
    assert remedied(stage, 4, 4, {})[0] == (
        "stage.b: global_batch=18 sequences do not divide among 4 data-parallel ranks; use "
        "global_batch=16 or 20"
    )
    small = {"a": {"steps": 1, "global_batch": 3}}
    assert remedied(small, 4, 4, {}) == [
        "stage.a: global_batch=3 sequences do not divide among 4 data-parallel ranks; use global_batch=4"
    ]
    assert remedied(stage, 2, 2, {"micro_batch": 4}) == [
        "stage.a: micro_batch=4 does not divide the 6 sequences of a rank (global_batch=12 on "
        "2 data-parallel ranks); "
        "use one of [1, 2, 3, 6]",
        "stage.b: micro_batch=6 does not divide the 9 sequences of a rank (global_batch=18 on "
        "2 data-parallel ranks); "
        "use one of [1, 3, 9]",
    ]
    for streams in (12, 3):  # 12 does not divide 18, 2 does not divide 3
        assert remedied(stage, 2, streams, {}) == [
            f"data.num_streams={streams} must divide each of global_batch=[12, 18] or be a "
            "multiple of it, and be a multiple of the 2 data-parallel ranks"
            "; use data.num_streams from [2, 6]"
        ]
    with pytest.raises(
        ConfigError, match=r"^data.num_streams=3 must divide global_batch=4 or .* from \[2, 4\]$"
    ):
        program(steps=1).check_split(num_ranks=2, num_streams=3)
    with pytest.raises(
        ConfigError, match=r"^global_batch=4 sequences do not divide among 3 .* use global_batch=3 or 6$"
    ):
        program(steps=1).check_split(num_ranks=3, num_streams=1)


@pytest.mark.parametrize("seed", range(30))
def test_the_remedies_of_random_batches_work(seed):
    draw = random.Random(seed)
    stage = {
        name: {"steps": 1, "global_batch": draw.randint(1, 60), "micro_batch": draw.randint(1, 6)}
        for name in "abc"
    }
    remedied(stage, draw.randint(1, 8), draw.randint(1, 60), {})


# -- from the command line --------------------------------------------------------------------------------

DEMO = ["experiment=demo", "data=synthetic"]  # 200 steps of 16 x 256 tokens; a tenth warm-up, a fifth decay


def test_spans_are_changed_added_and_left_out_on_the_command_line():
    def steps(*overrides: str) -> dict[str, int]:
        return {span.name: num for span, _, num in program_of(load([*DEMO, *overrides])).walk()}

    assert steps() == {"warmup": 20, "stable": 140, "decay": 40}
    assert steps("stage.warmup.share=0.2") == {"warmup": 40, "stable": 120, "decay": 40}
    assert steps("stage.warmup.share=null", "stage.warmup.steps=3") == {
        "warmup": 3,
        "stable": 157,
        "decay": 40,
    }
    # 1.2 steps
    assert steps("+stage.tail.tokens=5000") == {"warmup": 20, "stable": 138, "decay": 40, "tail": 2}
    assert steps("+stage.tail={steps:4}", "stage.tail.lr=0.5") == {
        "warmup": 20,
        "stable": 136,
        "decay": 40,
        "tail": 4,
    }
    assert steps("~stage.decay") == {"warmup": 20, "stable": 180}
    assert steps("stage=constant", "steps=7") == {"run": 7}
    decay = program_of(load([*DEMO, "stage.decay.lr.to=0.5", "stage.decay.lr.shape=cosine"])).spans[-1]
    assert (decay.lr.last, decay.lr.shape) == (0.5, "cosine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stage.wramup.share=0.2",
            "there is no span wramup (did you mean warmup?); +stage.wramup... adds one",
        ),
        (
            "stage.xyz.tokens=5000",
            "there is no span xyz (there are: warmup, stable, decay); +stage.xyz... adds one",
        ),
        ("stage.warmup.shar=0.2", "stage.warmup: shar: Key 'shar' not in 'SpanConfig' (did you mean share?)"),
        ("+stage.tail=5", "stage.tail=5: must be a span, like {steps: 100}; ~stage.tail leaves it out"),
        ("stage.warmup=null", "stage.warmup=None: must be a span"),
        ("stage.warmup.share=lots", "lots"),
        ("stage.warmup.steps=20", "stage.warmup: steps=20 and share=0.1 each give its length"),
        ("stage=nope", "Available options in 'stage': constant cosine"),
    ],
)
def test_a_typo_in_a_span_is_refused(override, message):
    with pytest.raises(ConfigError) as error:
        program_of(load([*DEMO, override]))
    assert message in str(error.value)


def test_streams_are_as_many_as_fit_every_batch():
    assert load(DEMO).data.num_streams == 16
    assert load([*DEMO, "stage.decay.global_batch=24"]).data.num_streams == 8
    assert load([*DEMO, "stage.decay.global_batch=24", "data.num_streams=4"]).data.num_streams == 4
    assert (
        load(
            [*DEMO, "global_batch=3", *(f"stage.{s}.global_batch=8" for s in ("warmup", "decay"))]
        ).data.num_streams
        == 8
    )


# -- the published schedules: recipe, section 3 -----------------------------------------------------------

T, B = 10**12, 10**9


def published(name: str) -> Program:
    return program_of(load([f"experiment=trinity_{name}"]))


def boundaries(of: Program, key: str) -> list[tuple[object, int]]:
    """Each value of a setting and the position of the first step that has it."""
    found = [(getattr(span.now, key), start) for span, start, _ in of.walk()]
    return [found[0], *(new for old, new in pairwise(found) if new[0] != old[0])]


@pytest.mark.parametrize(
    ("name", "peaks"), [("nano", (1e-3, 3e-4)), ("mini", (1e-3, 2e-4)), ("large", (8e-4, 2e-4))]
)
def test_published_warmup_peaks_and_splits(name, peaks):
    of, config = published(name), load([f"experiment=trinity_{name}"])
    assert (config.optim["lr"], config.optim["adamw_lr"]) == peaks
    first, (warmup, start, num_steps) = of.spans[0].now, next(of.walk())
    assert (start, num_steps) == (0, 2000)
    half = 1000 * first.tokens
    assert warmup.lr.at(half) == 0.5  # half of both peaks: the factor is on all rates
    assert of.settings_at(half).lr == pytest.approx(1000.5 / 2000)
    assert of.settings_at(1999 * first.tokens).lr == pytest.approx(1999.5 / 2000)
    assert {
        of.settings_at(position).lr for position in (2000 * first.tokens, T, 3 * T, 5 * T, 69 * T // 10)
    } == {1.0}
    of.check_split(num_ranks=2048 if name == "large" else 512, num_streams=config.data.num_streams)
    if name == "large":  # 4 ranks for a row of the extension
        published("large_extension").check_split(num_ranks=512, num_streams=config.data.num_streams)


def test_published_large():
    """17T in 13 : 4 : 3, batch 12288 to 16384 after 4.9T, cosine to a tenth at 17T, on to a twentieth, no
    re-warming.
    """
    of = published("large_extension")
    assert published("large").spans == of.spans[:-1] and published("large").end == 17 * T
    (small, zero), (large, after), (extension, late) = boundaries(of, "global_batch")
    assert (small, zero, large, extension) == (12288, 0, 16384, 512)
    assert 512 * 262144 == 16384 * 8192  # tokens of a step: those of phase 3
    assert 4.9 * T <= after < 4.9 * T + 12288 * 8192
    assert 17 * T <= late < 17 * T + 16384 * 8192
    assert [value for value, _ in boundaries(of, "seq_len")] == [8192, 262144]
    assert of.settings_at(int(4.89 * T)).global_batch == 12288
    assert of.settings_at(int(4.91 * T)).global_batch == 16384
    ends = {span.name: span.end for span in of.spans}
    phases = [ends["phase1_anneal"], ends["phase2"] - ends["phase1_anneal"], ends["phase3"] - ends["phase2"]]
    assert phases == pytest.approx([17 * T * part / 20 for part in (13, 4, 3)], rel=1e-12)
    assert of.end == 17 * T + 117 * B
    assert of.settings_at(10 * T - 10**9).lr == 1.0  # TrueBase is before the decay
    cosine = next(span.lr for span in of.spans if span.name == "phase3")
    assert (cosine.start, cosine.end, cosine.shape) == (10 * T, 17 * T, "cosine")
    assert cosine.at(10 * T + 7 * T / 2) == pytest.approx(0.55)  # the middle is the mean of 1 and 0.1
    assert cosine.at(10 * T + 7 * T / 3) == pytest.approx(1 - 0.25 * 0.9)
    assert of.settings_at(17 * T - 1).lr == pytest.approx(0.1)
    assert of.spans[-1].lr.at(17 * T + 117 * B / 2) == pytest.approx(0.075)
    assert of.spans[-1].lr.at(of.end) == pytest.approx(0.05)
    rates = [of.settings_at(10 * T + i * (of.end - 10 * T) // 500).lr for i in range(500)]
    assert rates == sorted(rates, reverse=True)  # no re-warming
    assert of.settings_at(of.end - 1).lr == pytest.approx(0.05, rel=1e-3)
    assert of.settings_at(T).z_loss_weight == 0
    assert of.settings_at(16 * T).z_loss_weight == 1e-6
    assert (of.settings_at(14 * T).buffer, of.settings_at(15 * T).buffer) == (
        0,
        4096,
    )  # phase 3 begins at 14.45T


@pytest.mark.parametrize(("name", "length"), [("nano", 262144), ("mini", 131072)])
def test_published_nano_and_mini(name, length):
    """10T in 7 : 1.8 : 1.2, batch 4096 to 8192, linear to 0; extension: up to a tenth, linear to 0."""
    of = published(name)
    assert [value for value, _ in boundaries(of, "global_batch")] == [4096, 8192, 512]
    assert [value for value, _ in boundaries(of, "seq_len")] == [4096, length]
    ends = {span.name: span.end for span in of.spans}
    assert (ends["phase1_larger_batch"], ends["phase2"], ends["phase3"]) == (7 * T, int(8.8 * T), 10 * T)
    assert of.settings_at(7 * T - 1).lr == 1.0
    decay = next(span.lr for span in of.spans if span.name == "phase3")
    assert [decay.at(position * T) for position in (7, 8.5, 8.8, 10)] == pytest.approx([1.0, 0.5, 0.4, 0.0])
    (rewarm, start, num_steps), (extension, begin, _) = list(of.walk())[-2:]
    assert num_steps == 50
    assert [rewarm.lr.at(at) for at in (rewarm.start, rewarm.end)] == pytest.approx([0.0, 0.1])
    assert extension.end - extension.start == 117 * B
    quarters = [extension.lr.at(extension.start + 117 * B * part / 4) for part in range(5)]
    assert quarters == pytest.approx([0.1, 0.075, 0.05, 0.025, 0])
    assert (begin - start) == 50 * 512 * length
