"""Is what the router did on the disk as it was, whatever happened to the run, and does a replay do the same
again?
"""

import json
from dataclasses import fields, replace

import pytest
import torch

from tests.arms import ARMS, Lab, batch, make_lab, make_rule, train
from trainer.balance import Balancer, RoutingStats, register_routing_buffers
from trainer.balance.stats import NUM_MARGINS, NUM_REQUIRED
from trainer.balance.trace import Trace, TraceWriter


def same(a: RoutingStats, b: RoutingStats) -> bool:
    """All fields, their types and shapes too."""
    for field in fields(RoutingStats):
        one, other = getattr(a, field.name), getattr(b, field.name)
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        if not (both and one.dtype == other.dtype and torch.equal(one, other)) and (both or one != other):
            return False
    return True


def test_same_sees_every_field():
    (stats,) = recorded(make_lab("quantile"), steps=1)
    for field in fields(RoutingStats):
        for other in (getattr(stats, field.name) + 1, None):
            assert not same(stats, replace(stats, **{field.name: other}))


def recorded(lab: Lab, steps: int) -> list[RoutingStats]:
    """What an observer is shown in a closed loop."""
    seen: list[RoutingStats] = []
    lab.balancer.observers += (lambda step, stats: seen.append(stats),)
    lab.run(train, range(1, steps + 1))
    return seen


@pytest.mark.parametrize(
    ("name", "required"), [("smebu", False), ("smebu", True), ("none", False), ("quantile", False)]
)
def test_a_trace_is_what_the_observer_saw(tmp_path, name, required):
    """Every field, bit for bit; the histograms of required biases only where the run counted them."""
    path = tmp_path / "new" / "router.trace"
    expected = recorded(make_lab(name, observers=[TraceWriter(path)], required=required), steps=4)
    trace = Trace(path)
    assert (trace.num_layers, trace.num_experts, trace.top_k, trace.num_steps) == (2, 16, 2, 4)
    assert trace.has_required == (required or name == "quantile") == (expected[0].required_MEH is not None)
    for _ in range(2):  # a trace can be read again
        got = list(trace)
        assert len(got) == 4 and all(map(same, got, expected))
    assert [json.loads(line).get("step") for line in path.read_text().splitlines()] == [None, 1, 2, 3, 4]


def test_the_format_is_the_documented_one(tmp_path):
    """Read without our reader: JSON lines, base64 of zlib of little-endian numbers in C order."""
    import base64
    import zlib

    import numpy as np

    path = tmp_path / "router.trace"
    (stats,) = recorded(make_lab("quantile", observers=[TraceWriter(path)]), steps=1)
    header, step = map(json.loads, path.read_text().splitlines())
    assert header == {
        "format": "triquetra-router-trace",
        "version": 1,
        "layers": 2,
        "experts": 16,
        "top_k": 2,
        "margins": NUM_MARGINS,
        "required": NUM_REQUIRED,
    }
    numbers = {key: zlib.decompress(base64.b64decode(step[key])) for key in step if key != "step"}
    assert np.frombuffer(numbers.pop("bias"), "<f4").tolist() == stats.bias_ME.flatten().tolist()
    fields_of = {
        "counts": "counts_ME",
        "margins": "margins_MW",
        "logits": "logits_M1",
        "required": "required_MEH",
    }
    assert {key: np.frombuffer(data, "<i8").tolist() for key, data in numbers.items()} == {
        key: getattr(stats, field).flatten().tolist() for key, field in fields_of.items()
    }


@pytest.mark.parametrize("name", ARMS)
def test_a_replay_under_the_same_rule_reproduces_the_biases_bit_for_bit(tmp_path, name):
    """Open loop, yet the same: the recorded counts are those that the rule's own biases brought about."""
    path = tmp_path / "router.trace"
    lab = make_lab(name, observers=[TraceWriter(path)]).run(train, range(1, 7))
    layers = [torch.nn.Module() for _ in range(2)]
    for layer in layers:
        register_routing_buffers(layer, 16)
        layer.top_k = 2
    replayed = Balancer(layers, make_rule(name, (2, 16)), steps=6)
    for step, stats in enumerate(Trace(path), start=1):
        assert torch.equal(stats.bias_ME, replayed.bias_ME)
        assert replayed.update(step, stats) == lab.metrics[step - 1]
        assert torch.equal(replayed.bias_ME, lab.biases[step - 1])
    assert step == 6 and replayed.verdict() == lab.balancer.verdict()


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path):
    """Five steps, then again from the checkpoint of step 3 with other tokens: the file is that of the second
    history.
    """
    path = tmp_path / "router.trace"
    recorded(make_lab("smebu", observers=[TraceWriter(path)]), steps=5)
    before = list(Trace(path))
    again = TraceWriter(path, after_step=3)
    assert [json.loads(line).get("step") for line in path.read_text().splitlines()] == [None, 1, 2, 3]
    other = recorded(make_lab("sign"), steps=2)
    again(4, other[0])
    again(5, other[1])
    got = list(Trace(path))
    assert len(got) == 5 and all(map(same, got, [*before[:3], *other]))
    TraceWriter(path)  # a run from the start
    assert path.read_text() == ""


def test_a_resumed_run_without_a_trace_begins_one(tmp_path):
    """Switched on later: the header comes with its first step."""
    path = tmp_path / "router.trace"
    writer = TraceWriter(path, after_step=7)
    (stats,) = recorded(make_lab("sign"), steps=1)
    writer(8, stats)
    (got,) = Trace(path)
    assert same(got, stats)


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_line_that_a_kill_cut_is_ignored(tmp_path, cut):
    """Without its newline it is not whole, whatever is left of it; resuming removes it."""
    path = tmp_path / "router.trace"
    expected = recorded(make_lab("smebu", observers=[TraceWriter(path)]), steps=3)
    text = path.read_text()
    assert len(text.splitlines()[-1]) > cut
    path.write_text(text[:-cut])
    trace = Trace(path)
    assert trace.num_steps == 2 and all(map(same, trace, expected))
    TraceWriter(path, after_step=2)(3, expected[2])
    assert path.read_text() == text


@pytest.fixture
def lines(tmp_path) -> list[dict]:
    recorded(make_lab("quantile", observers=[TraceWriter(tmp_path / "good.trace")]), steps=3)
    return list(map(json.loads, (tmp_path / "good.trace").read_text().splitlines()))


def written(tmp_path, lines: list[dict]) -> str:
    path = tmp_path / "bad.trace"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def test_what_is_no_trace_is_refused(tmp_path, lines):
    """With the path, and what was found."""
    header, *steps = lines

    def refused(path: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            list(Trace(path))
        assert path in str(error.value)

    refused(str(tmp_path / "nowhere.trace"), "there is no such file; .*balance.trace=router.trace")
    refused(str(tmp_path), "there is no such file")
    refused(written(tmp_path, []), "not a router trace of version 1; its first line is {}")
    refused(
        written(tmp_path, [{"step": 1, "loss": 2.0}]),
        "not a router trace of version 1; its first line is .*loss",
    )
    refused(
        written(tmp_path, [header | {"format": "another"}, *steps]),
        "not a router trace of version 1.*another",
    )
    refused(
        written(tmp_path, [header | {"version": 2}, *steps]), "not a router trace of version 1.*'version': 2"
    )
    refused(
        written(tmp_path, [header | {"margins": 99}, *steps]), "has {'margins': 99} bins, this version reads"
    )
    refused(
        written(tmp_path, [header | {"required": 10}, *steps]),
        "has {'required': 10} bins, this version reads",
    )
    refused(written(tmp_path, [header]), "holds no step")
    without = {key: value for key, value in header.items() if key != "experts"}
    refused(written(tmp_path, [without, *steps]), "its first line is .*'layers': 2, 'top_k'")
    (tmp_path / "bad.trace").write_bytes(b"PK\x03\x04\xff\xfe\x00}\n" + bytes(range(256)))
    refused(str(tmp_path / "bad.trace"), "not JSON|not a router trace")
    (tmp_path / "bad.trace").write_text(json.dumps(header) + "\n" + '{"step": 1, "counts": "eJ}\n')
    refused(str(tmp_path / "bad.trace"), "line 2 is not JSON")


@pytest.mark.parametrize("key", ["counts", "bias", "margins", "logits", "required"])
def test_a_corrupt_step_is_refused_with_its_number(tmp_path, lines, key):
    """Not base64, not zlib, a flipped letter, too few numbers, another shape, no text; or not there at
    all.
    """
    other = recorded(make_lab("quantile", experts=8), steps=1)
    path = tmp_path / "other.trace"
    TraceWriter(path)(1, other[0])
    of_eight_experts = json.loads(path.read_text().splitlines()[1])[key]
    good = lines[2][key]
    flipped = good[:20] + ("A" if good[20] != "A" else "B") + good[21:]
    wrong = ["?", "abc", good[: len(good) // 8 * 4], flipped, 5, None]
    wrong += [of_eight_experts] if of_eight_experts != good and key in ("counts", "bias", "required") else []
    for value in wrong:
        lines[2] = lines[2] | {key: value}
        with pytest.raises(ValueError, match="bad.trace: step 2 cannot be read"):
            list(Trace(written(tmp_path, lines)))
    del lines[2][key]
    trace = Trace(written(tmp_path, lines))
    if key == "required":  # may be left out: a run may have been continued without
        assert not trace.has_required and len(list(trace)) == 3
        return
    with pytest.raises(ValueError, match=f"bad.trace: step 2 cannot be read: .*{key}"):
        list(trace)


def test_the_steps_before_a_corrupt_one_can_be_read(tmp_path, lines):
    lines[3]["bias"] = "?"
    steps = iter(Trace(written(tmp_path, lines)))
    assert next(steps).counts_ME.sum() == next(steps).counts_ME.sum() == 2 * batch(1)[..., 0].numel() * 2
    with pytest.raises(ValueError, match="step 3"):
        next(steps)
