"""A run that stopped and went on is the run that never stopped: bit for bit on one layout, within float32 on others."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.ranks import run_ranks
from trainer import train
from trainer.config import load

BASE = [
    "model=debug", "data=synthetic", "data.source.mean_length=40", "steps=20", "seq_len=32", "global_batch=4", "micro_batch=1",
    "schedule.warmup=2", "checkpoint.interval=1000",
]  # fmt: skip


def train_worker(overrides: list[str], stop_at: int | None) -> int:
    """Trains; told to stop on the last rank only, during step `stop_at`."""
    config = load(BASE + overrides)
    step = train.train_step

    def stopping_step(run, batches):
        if run.step + 1 == stop_at and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            run.stop.signalled = True
        return step(run, batches)

    train.train_step = stopping_step
    return train.train(config)


def tensors(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, whole."""
    path = directory / "checkpoints" / f"step-{step:08d}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    stored = {name: m for name, m in metadata.items() if isinstance(m, TensorStorageMetadata)}
    state = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in stored.items()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def metrics(directory: Path) -> list[dict]:
    timed = ("tokens_per_s", "mfu", "memory_gib")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.mark.parametrize(("num_ranks", "layout"), [(1, []), (4, ["parallel=hsdp_ep", "activation_checkpoint=full"])])
def test_twenty_steps_equal_ten_and_ten_bit_for_bit(tmp_path, num_ranks, layout):
    where = [f"run_dir={tmp_path}", *layout]
    assert set(run_ranks(train_worker, num_ranks, ["name=whole", *where], None)) <= {train.OK, train.COLLAPSED}
    assert set(run_ranks(train_worker, num_ranks, ["name=halves", *where], 7)) == {train.INTERRUPTED}
    assert set(run_ranks(train_worker, num_ranks, ["name=halves", *where], 13)) == {train.INTERRUPTED}  # trap 18: twice
    assert set(run_ranks(train_worker, num_ranks, ["name=halves", *where], None)) <= {train.OK, train.COLLAPSED}
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "whole")] == list(range(1, 21))
    whole, halves = tensors(tmp_path / "whole", 20), tensors(tmp_path / "halves", 20)
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    # trap 8: what must be in a checkpoint is in it, and is not zero
    moments = [name for name in whole if name.endswith("exp_avg")]
    biases = [name for name in whole if name.endswith("expert_bias_E")]
    assert moments and len(biases) == 4
    for name in [*moments, *biases, "balancer.rule.momentum_ME", "balancer.tail_counts_ME", "stream.cursor_V2"]:
        assert whole[name].any(), name


def next_loss_worker(overrides: list[str]) -> float:
    run = train.build(load(BASE + overrides))
    train.resume(run)
    assert run.step == 5
    return train.train_step(run, run.stream.next_step(1))["loss"]


def test_a_checkpoint_of_four_ranks_continues_on_one_and_on_two(tmp_path):
    where = ["name=moving", f"run_dir={tmp_path}"]
    run_ranks(train_worker, 4, ["parallel=hsdp_ep", *where], 5)
    before = metrics(tmp_path / "moving")[-1]["loss"]
    same = run_ranks(next_loss_worker, 4, ["parallel=hsdp_ep", *where])
    assert len(set(same)) == 1 and same[0] != before
    others = [(1, []), (2, ["parallel=fsdp_ep"]), (2, ["parallel=fsdp"]), (4, ["parallel=fsdp_ep", "parallel.ep=4"])]
    for num_ranks, layout in others:
        for loss in run_ranks(next_loss_worker, num_ranks, [*layout, *where]):
            assert loss == pytest.approx(same[0], rel=1e-6)


def test_only_the_newest_checkpoints_are_kept_and_a_draft_is_none(tmp_path):
    run_ranks(train_worker, 1, ["name=keep", f"run_dir={tmp_path}", "steps=6", "checkpoint={interval: 2, keep: 2}"], None)
    directory = tmp_path / "keep" / "checkpoints"
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000004", "step-00000006"]
    (directory / ".step-00000008.draft").mkdir()
    (directory / "step-00000009").mkdir()  # without metadata
    assert train.checkpoints_of(load([*BASE, "name=keep", f"run_dir={tmp_path}"])).steps() == [4, 6]


@pytest.mark.parametrize(("change", "message"), [
    ("model.expert_dim=16", "'expert_dim': 32.*'expert_dim': 16"), ("seed=3", "seed=0, now it is seed=3"),
    ("data.source.num_topics=5", "num_topics"), ("data.num_streams=2", "num_streams=4, now it is data.num_streams=2"),
    ("global_batch=8", "num_streams=4, now it is data.num_streams=8; set it back"), ("balance=none", "SmebuRule.*None"),
    ("steps=1", "steps=1, but .* is at step 2; use steps=2 or more"),
])  # fmt: skip
def test_a_run_directory_refuses_another_model_or_stream(tmp_path, change, message):
    where = ["name=fixed", f"run_dir={tmp_path}", "steps=2"]
    run_ranks(train_worker, 1, where, None)
    with pytest.raises(train.ConfigError, match=message):
        run_ranks(train_worker, 1, [*where, change], None)


def test_harmless_changes_apply_from_the_resumed_step(tmp_path):
    where = ["name=change", f"run_dir={tmp_path}", "schedule.decay=0"]
    run_ranks(train_worker, 1, [*where, "steps=4"], None)
    run_ranks(train_worker, 1, [*where, "steps=6", "optim.lr=1e-4"], None)
    assert [line["lr"] for line in metrics(tmp_path / "change")] == [5e-4, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4]


def test_a_larger_batch_continues_with_the_same_streams_and_tokens_add_up(tmp_path):
    where = ["name=grow", f"run_dir={tmp_path}"]
    run_ranks(train_worker, 1, [*where, "steps=2"], None)
    run_ranks(train_worker, 1, [*where, "steps=4", "global_batch=8", "data.num_streams=4"], None)
    assert [line["tokens"] for line in metrics(tmp_path / "grow")] == [128, 256, 512, 768]


def test_another_corpus_under_the_same_path_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one document " * 200)
    where = ["name=corpus", f"run_dir={tmp_path}", "steps=1", "data=txt", f"data.source.path={tmp_path}", "model.vocab_size=260"]
    cache = [f"data.cache_dir={tmp_path / 'cache'}"]
    base = [o for o in BASE if not o.startswith("data")]

    def worker():
        return train.train(load([*base, *where, cache[0]]))

    run_ranks(worker, 1)
    assert (tmp_path / "corpus" / "tokenizer.json").is_file()
    (tmp_path / "b.txt").write_text("another document " * 200)
    with pytest.raises(train.ConfigError, match="the corpus's fingerprint"):
        run_ranks(worker, 1)


def test_more_steps_give_the_run_another_tail(tmp_path):
    """Counts of the old tail are dropped: the verdict of step 6 is about step 6 only."""
    where = ["name=tail", f"run_dir={tmp_path}"]
    run_ranks(train_worker, 1, [*where, "steps=4"], None)
    run_ranks(train_worker, 1, [*where, "steps=6"], None)
    state = tensors(tmp_path / "tail", 6)
    assert state["balancer.tail_3"][0] == 1 and state["balancer.tail_counts_ME"].sum() == 4 * 4 * 32 * 2  # M B L K


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    """A run killed after step 3 resumes from step 2: metrics.jsonl has each step once."""
    where = ["name=killed", f"run_dir={tmp_path}", "checkpoint.interval=2", "steps=6"]

    def killed_worker():
        config, step = load(BASE + where), train.train_step

        def dying_step(run, batches):
            if run.step == 3:
                raise KeyboardInterrupt
            return step(run, batches)

        train.train_step = dying_step
        train.train(config)

    with pytest.raises(BaseException):  # noqa: B017  # KeyboardInterrupt, as the rank raised it
        run_ranks(killed_worker, 1)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a line cut by the kill
    run_ranks(train_worker, 1, where, None)
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(1, 7))
