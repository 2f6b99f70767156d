"""metrics.jsonl is complete and readable whatever the trackers do."""

import json

import numpy
import pytest
import torch

from trainer.config import load
from trainer.metrics import MetricsLog, TensorboardTracker, WandbTracker, Window, batch_heterogeneity
from trainer.model.afmoe import count_parameters, flops_per_token, step_flops

LINE = {"loss": 1.5, "tokens_per_s": 10.0, "balance/max_violation": 0.25}


class Broken:
    def __init__(self, fail_at: int):
        self.fail_at, self.seen = fail_at, 0

    def log(self, metrics, step):
        self.seen += 1
        if step >= self.fail_at:
            raise ConnectionError("the service is down")

    def finish(self):
        raise ConnectionError("still down")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_tracker_that_fails_stops_neither_the_run_nor_the_file(tmp_path, caplog):
    broken = Broken(fail_at=2)
    log = MetricsLog(tmp_path / "metrics.jsonl", steps=4, interval=2, start_tracker=lambda: broken)
    for step in range(1, 5):
        log.write({"step": step, **LINE})
    log.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": step, **LINE} for step in range(1, 5)]
    assert broken.seen == 2 and caplog.text.count("tracking stopped") == 1


def test_a_tracker_that_cannot_start_is_reported_once(tmp_path, caplog):
    def start():
        raise RuntimeError("no key")

    log = MetricsLog(tmp_path / "metrics.jsonl", steps=1, interval=1, start_tracker=start)
    log.write({"step": 1, **LINE})
    log.close()
    assert "no key" in caplog.text and len(lines(tmp_path / "metrics.jsonl")) == 1


def test_the_terminal_gets_the_first_the_last_and_every_interval(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl", steps=7, interval=3)
    for step in range(1, 8):
        log.write({"step": step, **LINE})
    log.close()
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out] == ["1/7", "3/7", "6/7", "7/7"]
    assert out[0] == "step 1/7  loss 1.500  10 tokens/s  MaxVio 0.25"


def test_wandb_works_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tracker = WandbTracker(tmp_path, {"steps": 1}, project="triquetra", mode="offline")
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_tensorboard_holds_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorboardTracker(tmp_path, {})
    tracker.log({"loss": 1.25}, step=3)
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, pytest.approx(1.25))]


def test_batch_heterogeneity_by_hand():
    """Means 2, 5 and 2; the microbatch without targets does not count: 5 - 3."""
    loss_U, targets_U = torch.tensor([4.0, 10.0, 0.0, 6.0]), torch.tensor([2.0, 2.0, 0.0, 3.0])
    assert batch_heterogeneity(loss_U, targets_U) == 2
    assert batch_heterogeneity(torch.zeros(2), torch.zeros(2)) == 0


def test_kurtosis_of_the_last_values_by_numpy_and_after_a_restart():
    values = numpy.random.default_rng(0).lognormal(size=(600, 2))
    window, resumed = Window(), Window()
    for step, (loss, grad_norm) in enumerate(values, 1):
        got = window.add(loss=loss, grad_norm=grad_norm)
        again = resumed.add(loss=loss, grad_norm=grad_norm)
        if step in (7, 300):
            other = Window()
            other.load_state_dict({name: tensor.clone() for name, tensor in resumed.state_dict().items()})
            resumed = other
        assert again == got
        if step < 16:
            assert got == {}
            continue
        last = values[max(0, step - 256) : step]
        off = last - last.mean(0)
        expected = (off**4).mean(0) / (off**2).mean(0) ** 2
        assert [got["loss_kurtosis"], got["grad_norm_kurtosis"]] == pytest.approx(expected.tolist())


def test_kurtosis_of_equal_values_is_zero():
    window = Window()
    assert [window.add(loss=1.0, grad_norm=2.0) for _ in range(16)][-1] == {
        "loss_kurtosis": 0.0,
        "grad_norm_kurtosis": 0.0,
    }


def test_attention_is_counted_where_documents_attend():
    """Pairs by a slow loop over rows of documents and padding; a row that is one document is the full row."""
    model = load(["experiment=demo", "model=debug", "model.window=4"]).model
    rows = [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 0, 1, 2, -1, -1, -1]]
    num_global = model.num_layers // model.global_every
    pairs = tokens = 0
    for row in rows:
        for here, position in enumerate(row):
            starts = here - position
            seen = range(starts, here + 1) if position >= 0 else []
            pairs += num_global * len(seen)
            pairs += (model.num_layers - num_global) * len([at for at in seen if here - at < 4])
            tokens += position >= 0
    weights = count_parameters(model).active - model.vocab_size * model.dim
    expected = 6 * weights * tokens + 12 * model.num_heads * model.head_dim * pairs
    assert step_flops(model, torch.tensor(rows)) == expected
    whole = torch.arange(64).expand(3, 64)
    assert step_flops(model, whole) == pytest.approx(3 * 64 * flops_per_token(model, seq_len=64), rel=1e-12)
