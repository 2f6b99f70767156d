"""metrics.jsonl is complete and readable whatever the trackers do."""

import json
import time
from functools import partial

import numpy
import pytest
import torch

from tests.waiting import until
from trainer.balance import Experts
from trainer.config import load
from trainer.history import read_history
from trainer.metrics import MetricsLog, TensorboardTracker, WandbTracker, Window, batch_heterogeneity
from trainer.size import count_parameters, flops_per_token, step_flops

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


EXPERTS = Experts(torch.tensor([[0.5, 1.5], [1.0, 1.0]]), torch.tensor([[0.1, -0.1], [0.0, 0.2]]))
RESULT = {"step": 4, "tokens": 40, "evaluation": "held_out", "loss": 2.5, "targets": 7, "by_source": {}}


def run_with(start_tracker, directory, *, after_step=0):
    """Four steps as rank 0 logs them: metrics, experts, an evaluation."""
    log = MetricsLog(
        directory / "metrics.jsonl",
        steps=9,
        interval=9,
        after_step=after_step,
        start_tracker=start_tracker,
        histograms=2,
    )
    for step in range(after_step + 1, after_step + 5):
        log.watch(step, EXPERTS)
        log.write({"step": step, **LINE})
    log.write_evaluation(RESULT | {"step": after_step + 4})
    log.close()


def wandb_records(path):
    """wandb's own messages in a .wandb file: a head of 7 bytes, then LevelDB's log format: blocks of 32 KiB
    with pieces of checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, piece = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece, at = piece + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield Record.FromString(piece)
            piece = b""


def test_wandb_has_all_numbers_and_goes_on_under_the_same_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = tmp_path / "a-run"
    run.mkdir()
    config = {"steps": 9, "model": {"dim": 64}}
    start = partial(WandbTracker, run, config, project="triquetra", mode="offline")
    run_with(start, run)
    time.sleep(1.1)  # wandb names its directories by the second
    run_with(start, run, after_step=4)
    parts = []

    def are_written() -> bool:
        """wandb's own process writes, and may be behind."""
        parts[:] = [list(wandb_records(path)) for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
        return len(parts) == 2 and all(any(r.HasField("exit") for r in records) for records in parts)

    assert until(are_written)
    assert [[r.run.run_id for r in records if r.HasField("run")] for records in parts] == [["a-run"]] * 2
    updates = [x for r in parts[0] if r.HasField("run") for x in r.run.config.update]
    settings = {x.key: json.loads(x.value_json) for x in updates}
    assert settings["model"] == {"dim": 64} and settings["steps"] == 9
    logged = list[dict]()
    for r in (r for records in parts for r in records if r.HasField("history")):
        logged.append({"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in r.history.item})
    assert [row["_step"] for row in logged] == list(range(1, 9))
    assert [row["loss"] for row in logged] == [1.5] * 8
    assert [row["eval/held_out/loss"] for row in logged if "eval/held_out/loss" in row] == [2.5, 2.5]
    kept = [row["balance/load/0/values"] for row in logged if "balance/load/0/values" in row]
    assert [sum(counts) for counts in kept] == [2] * 4  # experts
    assert {"balance/load/1/values", "balance/bias/0/bins", "balance/bias/1/bins"} <= logged[1].keys()


def test_tensorboard_has_all_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with(partial(TensorboardTracker, tmp_path, {"model": {"dim": 64}}), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["loss"] == [(step, pytest.approx(1.5)) for step in (1, 2, 3, 4)]
    assert scalars["eval/held_out/loss"] == [(4, pytest.approx(2.5))]
    assert scalars.keys() == {"step", *LINE, "eval/held_out/loss"}
    histograms = {tag: events.Histograms(tag) for tag in events.Tags()["histograms"]}
    assert histograms.keys() == {f"balance/{name}/{m}" for name in ("load", "bias") for m in (0, 1)}
    assert [e.step for e in histograms["balance/load/0"]] == [2, 4]
    value = histograms["balance/load/0"][0].histogram_value
    assert (value.min, value.max, value.num, value.sum) == (0.5, 1.5, 2, 2.0)
    (text,) = events.Tensors("config/text_summary")
    assert json.loads(text.tensor_proto.string_val[0].decode().strip("`json\n")) == {"model": {"dim": 64}}


def test_a_tracker_of_ones_own_may_lack_histograms(tmp_path, caplog):
    run_with(lambda: Broken(fail_at=99), tmp_path)
    assert "tracking stopped" in caplog.text  # at `finish`, not before
    assert len(lines(tmp_path / "metrics.jsonl")) == 4 and (tmp_path / "experts.jsonl").is_file()


def test_alarms_are_kept_and_cut_with_the_other_records(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", steps=9, interval=9)
    for step in (1, 2, 3):
        log.watch(step, EXPERTS)
        log.write({"step": step, **LINE}, alarms=[f"step {step}: starving"])
    log.rewind(2)
    log.close()
    assert [one["step"] for one in lines(tmp_path / "alarms.jsonl")] == [1, 2]
    assert lines(tmp_path / "alarms.jsonl")[0]["text"] == "step 1: starving"
    assert read_history(tmp_path / "experts.jsonl").last_T.tolist() == [1, 2]


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
