"""experts.jsonl: what every expert did, in bins that stay small however long the run is."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.balance import Balancer, Experts, SignRule, register_routing_buffers
from trainer.history import LEVELS, ROOM, ExpertHistory, decoded, encoded, read_history
from trainer.metrics import MetricsLog

SHAPE_ME = (3, 16)


def write(path, loads_SME, *, after_step=0, close=True):
    history = ExpertHistory(path, after_step=after_step)
    for step, load_ME in enumerate(loads_SME, start=after_step + 1):
        history.add(step, load_ME=load_ME, bias_ME=load_ME - 1, gain_M=load_ME.mean(1))
    if close:
        history.close()
    return history


def loads(num_steps, *, seed=0, shape=SHAPE_ME):
    return np.random.default_rng(seed).lognormal(sigma=0.5, size=(num_steps, *shape))


def test_codes_are_within_half_a_level():
    """A level is 1/32 of a doubling of 1 + load; 250 even shares and more are one code."""
    load = np.concatenate([[0.0], np.geomspace(1e-3, 200, 1000)])
    error = np.log2(1 + decoded(encoded(load))) - np.log2(1 + load)
    assert np.abs(error).max() <= 0.5 / LEVELS * (1 + 1e-12)
    assert encoded(np.array([0.0, 1.0, 1e9])).tolist() == [0, 32, 255]


def test_bins_are_means_of_their_steps_and_leave_none_out(tmp_path):
    loads_SME = loads(700, shape=(20, 64))
    write(tmp_path / "e.jsonl", loads_SME)
    bins = read_history(tmp_path / "e.jsonl")
    assert bins.first_T[0] == 1 and bins.last_T[-1] == 700
    assert (bins.first_T[1:] == bins.last_T[:-1] + 1).all()
    for first, last, load_ME, bias_M5, gain_M in zip(*bins, strict=True):
        stretch = loads_SME[first - 1 : last]
        assert np.log2(1 + load_ME) == pytest.approx(np.log2(1 + stretch.mean(0)), abs=0.51 / LEVELS)
        bias_ME = stretch[-1] - 1
        expected = np.stack([np.quantile(bias_ME, q, axis=1) for q in (0, 0.1, 0.5, 0.9, 1)], axis=1)
        assert bias_M5 == pytest.approx(expected, rel=1e-6)
        assert gain_M == pytest.approx(stretch.mean((0, 2)), rel=1e-6)
    lengths = bins.last_T - bins.first_T + 1
    assert lengths[0] <= 2 and lengths.max() < 700 / 8  # fine at first, and next to the whole


@pytest.mark.parametrize("num_steps", [1, 30, 1000])
def test_the_file_has_at_most_its_room_and_one_line(tmp_path, num_steps):
    """One line more: the bin that is open at the end."""
    path = tmp_path / "e.jsonl"
    write(path, loads(num_steps, shape=(60, 256)))
    longest = max(map(len, path.read_text().splitlines()))
    assert path.stat().st_size <= ROOM * math.sqrt(num_steps) + longest + 100


def test_a_resumed_run_drops_later_bins_and_goes_on(tmp_path):
    path, loads_SME = tmp_path / "e.jsonl", loads(40)
    write(path, loads_SME)
    with path.open("a") as file:
        file.write('{"from": 41, "st')  # a kill
    write(path, loads_SME[25:], after_step=25)
    bins = read_history(path)
    steps = [step for a, b in zip(bins.first_T, bins.last_T, strict=True) for step in range(a, b + 1)]
    assert steps == list(range(1, 41))  # of such a small model every bin is one step
    assert len(path.read_text().splitlines()) == 41


def test_going_back_drops_the_open_bin_too(tmp_path):
    path, loads_SME = tmp_path / "e.jsonl", loads(64, shape=(60, 256))
    history = write(path, loads_SME, close=False)
    assert history.num_steps > 0 or history.every > 1
    history.rewind(20)
    for step in range(21, 65):
        history.add(step, load_ME=loads_SME[step - 1], bias_ME=loads_SME[0], gain_M=None)
    history.close()
    bins = read_history(path)
    lengths = bins.last_T - bins.first_T + 1
    assert bins.last_T[-1] == 64 and 20 - 16 < lengths[bins.last_T <= 20].sum() <= 20
    assert (bins.first_T[1:] > bins.last_T[:-1]).all() and lengths[bins.last_T > 20].sum() == 44


def test_what_is_no_history_is_refused_in_one_line(tmp_path):
    path = tmp_path / "e.jsonl"
    for text in (
        '{"format": "other"}\n{"step": 1}\n',
        "word}\n",
        '{"format": 1, "version": 1}\n{}\n',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"e\.jsonl: not a history") as refusal:
            read_history(path)
        assert "\n" not in str(refusal.value)
    path.write_text("")
    assert read_history(path) is None


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.top_k = 2
        register_routing_buffers(self, SHAPE_ME[1])


def test_the_balancer_shows_its_watchers_what_it_made_of_the_experts(tmp_path):
    """Loads by hand from the counts; biases as they stand in the layers after the step."""
    torch.manual_seed(0)
    layers = [Layer() for _ in range(SHAPE_ME[0])]
    balancer = Balancer(layers, SignRule(SHAPE_ME, lr=0.01), steps=10)
    seen = list[tuple[int, Experts]]()
    log = MetricsLog(tmp_path / "metrics.jsonl", steps=3, interval=9)
    balancer.watchers = (lambda step, experts: seen.append((step, experts)), log.watch)
    for step in (1, 2, 3):
        for layer in layers:
            layer.routing_sums_S.random_(1, 1000)
        counts_ME = torch.stack([layer.routing_sums_S[: SHAPE_ME[1]] for layer in layers]).double()
        metrics = balancer.step(step)
        number, experts = seen[-1]
        assert number == step
        assert torch.equal(experts.load_ME, counts_ME / counts_ME.mean(1, keepdim=True))
        assert torch.equal(experts.bias_ME.float(), balancer.bias_ME)
        assert experts.gain_M.mean().item() == pytest.approx(metrics["balance/gain"])
    log.close()
    bins = read_history(tmp_path / "experts.jsonl")
    assert bins.last_T[-1] == 3 and bins.bias_TM5[-1, :, -1] == pytest.approx(
        balancer.bias_ME.amax(1).numpy()
    )


def watched(directory, num_ranks):
    """Three steps of a Balancer whose counts are a function of step and rank, on this rank or on several."""

    def work():
        rank, is_several = (dist.get_rank(), True) if dist.is_initialized() else (0, False)
        layers = [Layer() for _ in range(SHAPE_ME[0])]
        group = dist.group.WORLD if is_several else None
        balancer = Balancer(layers, SignRule(SHAPE_ME, lr=0.01), steps=10, group=group)
        log = MetricsLog(directory / f"{rank}" / "metrics.jsonl", steps=3, interval=9)
        balancer.watchers = (log.watch,)
        for step in (1, 2, 3):
            for m, layer in enumerate(layers):
                layer.routing_sums_S.zero_()
                for of_rank in [rank] if is_several else range(num_ranks):
                    random = torch.Generator().manual_seed(100 * step + 10 * m + of_rank)
                    layer.routing_sums_S += torch.randint(
                        1, 1000, layer.routing_sums_S.shape, generator=random
                    )
            balancer.step(step)
        log.close()
        return (directory / f"{rank}" / "experts.jsonl").read_text()

    return work


def test_it_is_the_same_on_any_number_of_ranks(tmp_path):
    """Every rank would write what one process writes that has seen all tokens: byte for byte."""
    alone = watched(tmp_path / "alone", 2)()
    assert run_ranks(watched(tmp_path / "two", 2), 2) == [alone, alone]


def test_a_full_disk_costs_the_history_only(tmp_path, caplog):
    (tmp_path / "e.jsonl").mkdir()  # nothing can be written there
    history = write(tmp_path / "e.jsonl", loads(3))
    assert "cannot be written" in caplog.text and history.last == 3


def test_lines_are_json_with_a_step(tmp_path):
    write(tmp_path / "e.jsonl", loads(5))
    header, *lines = map(json.loads, (tmp_path / "e.jsonl").read_text().splitlines())
    assert header == {"format": "triquetra-experts", "version": 1, "layers": 3, "experts": 16}
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
