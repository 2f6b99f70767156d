"""Evaluations beside what goes wrong in a run, with every kind of source, and with a user's own class."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from tests.ranks import run_ranks
from tests.runs import NAN, Scaled, metrics
from trainer import train
from trainer.config import ConfigError, load
from trainer.data import JsonlSource, content_hash
from trainer.evaluate import Example, Material, Measured, Part, packed
from trainer.evaluate.sets import held_out, in_order
from trainer.ranks.watchdog import HUNG

SMALL = [
    *("model=debug", "model.num_layers=2", "model.global_every=2", "model.dim=32", "model.vocab_size=320"),
    *("seq_len=32", "global_batch=4", "micro_batch=1", "steps=9", "data.workers=0", "checkpoint.interval=3"),
]


def corpus(path: Path, *, first: int, count: int = 60) -> Path:
    path.mkdir()
    lines = [
        json.dumps({"text": f"document {n}: " + "token router expert " * (1 + n % 7)})
        for n in range(first, first + count)
    ]
    (path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return path


def settings(tmp_path: Path, *more: str) -> list[str]:
    """A run on a corpus that is made here, and a set beside it that is evaluated after each step."""
    for name, first in (("train", 0), ("other", 1000)):
        if not (tmp_path / name).exists():
            corpus(tmp_path / name, first=first)
    source = f"{{_target_: trainer.data.JsonlSource, path: {tmp_path}/other, field: text}}"
    other = f"evaluate.other={{_target_: trainer.evaluate.Validation, interval: 1, source: {source}}}"
    data = ["data=jsonl", "data.source.field=text", f"data.source.path={tmp_path}/train"]
    return [*SMALL, *data, other, f"run_dir={tmp_path}", *more]


def results(directory: Path) -> list[dict]:
    lines = map(json.loads, (directory / "evaluations.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# -- what goes wrong --


def sleeps_for_ever() -> None:
    while True:
        time.sleep(1)


@pytest.mark.rare
def test_a_rank_that_hangs_in_an_evaluation_is_ended_and_says_where(tmp_path):
    overrides = settings(tmp_path, "name=hangs", "parallel=fsdp", "heartbeat_s=4")  # makes the corpus, once

    def worker() -> int:
        from trainer.evaluate import kernel

        ask = kernel.is_told_to_stop

        def hanging(run):
            if run.step == 2 and dist.get_rank() == 1:
                sleeps_for_ever()
            return ask(run)

        kernel.is_told_to_stop = hanging
        return train.main(overrides)

    # the rank that waits for it ends in the same way, or as its peer is gone
    with pytest.raises((ProcessExitedException, RuntimeError)) as ended:
        run_ranks(worker, 2)
    assert getattr(ended.value, "exit_code", HUNG) == HUNG
    stacks = (tmp_path / "hangs" / "stacks.1.txt").read_text()
    assert "in evaluating other" in stacks and "in sleeps_for_ever" in stacks
    assert [line["step"] for line in results(tmp_path / "hangs")] == [0, 1]


@pytest.mark.slow
def test_a_run_that_goes_back_drops_later_results_and_forgets_that_one_was_the_best(tmp_path):
    """Results are made up. The best one is of step 4, whose checkpoint is damaged; step 5 cannot be applied.

    So the run goes back to step 3, the best result is that of step 2 again, and its checkpoint stays.
    """
    losses = [9.0, 9.0, 5.0, 6.0, 4.0, *[8.0] * 6]  # of steps 0 to 4, and 4 to 9 again

    def worker() -> int:
        from trainer.evaluate.sets import Validation

        step, calls, made_up = train.train_step, 0, iter(losses)
        Validation.result = lambda self, measured: {"loss": next(made_up)}

        def failing(run, batches, **timing):
            nonlocal calls
            calls += 1
            if calls == 5:
                run.checkpoints.finish()
                for path in run.checkpoints.path(4).glob("*.safetensors"):
                    path.write_bytes(path.read_bytes()[:-1])
            factor = NAN if calls == 5 else 1.0
            handle = run.model.register_forward_hook(lambda model, inputs, loss: Scaled.apply(loss, factor))
            try:
                return step(run, batches, **timing)
            finally:
                handle.remove()

        train.train_step = failing
        best = ["checkpoint.keep_best=other", "checkpoint.keep=3", "skip.most=0", "skip.rollbacks=1"]
        return train.train(load(settings(tmp_path, "name=back", *best)))

    run_ranks(worker, 1)
    made = [(line["step"], line["loss"]) for line in results(tmp_path / "back")]
    assert made == [(0, 9.0), (1, 9.0), (2, 5.0), (3, 6.0), *((step, 8.0) for step in range(4, 10))]
    kept = sorted(path.name for path in (tmp_path / "back/checkpoints").glob("step-" + "[0-9]" * 8))
    assert kept == ["step-00000002", "step-00000003", "step-00000006", "step-00000009"]


def test_ranks_that_were_told_to_evaluate_differently_do_not_start(tmp_path):
    def worker() -> None:
        own = [f"evaluate.other.interval={1 + dist.get_rank()}"]
        train.start(load(settings(tmp_path, "name=no", "parallel=fsdp", *own)))

    settings(tmp_path)  # the corpus is made once
    with pytest.raises(
        ConfigError, match=r"do not agree: rank 1 has evaluate\.other\.interval=2 \(rank 0: 1"
    ):
        run_ranks(worker, 2)


# -- a class of the user's own --


class Copying:
    """Rows of one token: how likely is it that it goes on? Its number is a sum over groups, its best too."""

    best = "nats"

    def __init__(self, interval: int = 1, at_start: bool = True, fail: str = "") -> None:
        self.interval, self.at_start, self.fail = interval, at_start, fail

    def parts(self, material: Material) -> list[Part]:
        if self.fail == "parts":
            raise RuntimeError("no\nrows")
        examples = [Example(torch.full((9,), token), torch.arange(9) % 2) for token in (7, 8, 9)]
        return [packed(examples, name=material.name, seq_len=16, num_groups=2, about={"rows": 3})]

    def result(self, measured: list[Measured]) -> dict:
        [one] = measured
        return {"nats": one.loss_G.sum().item(), "targets": one.targets_G.tolist(), **one.part.about}


@pytest.mark.parametrize(
    ("num_ranks", "layout"), [(1, []), pytest.param(2, ["parallel=fsdp"], marks=pytest.mark.rare)]
)
def test_a_class_of_the_users_own_is_as_good(tmp_path, num_ranks, layout):
    own = [f"evaluate.own={{_target_: {__name__}.Copying, interval: 4}}", "checkpoint.keep_best=own"]
    run_ranks(train.main, num_ranks, settings(tmp_path, "name=own", *own, *layout))
    made = [line for line in results(tmp_path / "own") if line["evaluation"] == "own"]
    assert [line["step"] for line in made] == [0, 4, 8, 9]
    assert all(line["targets"] == [12, 12] and line["rows"] == 3 for line in made)  # 3 x 8, every second
    best = min(made[1:], key=lambda line: line["nats"])["step"]
    assert (tmp_path / f"own/checkpoints/step-{best:08d}").is_dir()
    [at_start] = run_ranks(by_hand, 1, settings(tmp_path, "name=by_hand"))
    assert made[0]["nats"] == pytest.approx(at_start, rel=1e-6)


def by_hand(overrides: list[str]) -> float:
    """[nats] Of eight times the same token, one row each, by torch's cross entropy."""
    model = train.build(load(overrides)).model.eval()
    with torch.no_grad():
        return sum(
            torch.nn.functional.cross_entropy(
                model(torch.full((1, 8), token))[0].double(), torch.full((8,), token), reduction="sum"
            ).item()
            for token in (7, 8, 9)
        )


def test_what_a_class_of_the_users_own_raises_is_one_line_on_all_ranks(tmp_path):
    own = f"evaluate.own={{_target_: {__name__}.Copying, fail: parts}}"
    overrides = settings(tmp_path, "name=own", "parallel=fsdp", own)  # writes the corpus, once
    with pytest.raises(ConfigError, match=r"^evaluate\.own: no rows(\n|$)"):
        run_ranks(lambda: train.start(load(overrides)), 2)


# -- which documents are held out, of sources of every kind --

HELD_OUT = ["data.holdout=0.3", "evaluate.held_out={_target_: trainer.evaluate.HeldOut, interval: 3}"]


@pytest.mark.rare
def test_a_source_that_only_reads_forward_holds_out_what_an_indexed_one_does(tmp_path):
    """A data set that is streamed: the same training and the same results, each document once."""
    indexed = settings(tmp_path, "name=indexed", *HELD_OUT, "data.shuffle=false")
    forward = [
        item for item in indexed if not item.startswith("data=") and not item.startswith("data.source")
    ]
    forward += ["data=hub", f"data.source.name={tmp_path}/train", "name=forward"]
    run_ranks(train.main, 1, indexed)
    run_ranks(train.main, 1, forward)
    assert results(tmp_path / "forward") == results(tmp_path / "indexed")
    assert metrics(tmp_path / "forward") == metrics(tmp_path / "indexed")
    documents = list(held_out(JsonlSource(str(tmp_path / "train"), "text"), 0.3))
    at_start = next(line for line in results(tmp_path / "forward") if line["evaluation"] == "held_out")
    assert at_start["documents"] == len(documents) > 10


@pytest.mark.rare
def test_of_several_sources_each_holds_out_its_own(tmp_path):
    """Counted by reading both; what they share is held out of both or of none."""
    for name, first in (("a", 0), ("b", 50)):  # ten documents are in both
        corpus(tmp_path / name, first=first)
    source = "{{_target_: trainer.data.JsonlSource, path: {}, field: text}}"
    named = [f"data.sources.{name}={source.format(tmp_path / name)}" for name in ("a", "b")]
    plain = [item for item in settings(tmp_path) if not item.startswith("data")]
    mixture = ["data=jsonl", "data.source=null", *named, "data.mixture={a: 1, b: 1}"]
    run_ranks(train.main, 1, [*plain, *mixture, "data.workers=0", *HELD_OUT, "name=two"])
    out = {name: list(held_out(JsonlSource(str(tmp_path / name), "text"), 0.3)) for name in ("a", "b")}
    at_start = next(line for line in results(tmp_path / "two") if line["evaluation"] == "held_out")
    assert {name: of["documents"] for name, of in at_start["by_source"].items()} == {
        name: len(documents) for name, documents in out.items()
    }
    assert at_start["documents"] == sum(map(len, out.values()))
    shared = [
        {content_hash(document) for document in in_order(JsonlSource(str(tmp_path / name), "text"))}
        for name in ("a", "b")
    ]
    both = shared[0] & shared[1]
    sides = [{content_hash(document) for document in documents} & both for documents in out.values()]
    assert len(both) == 10 and sides[0] == sides[1]
